"""CLIP's tokenizer: frozen ids, forms of the vocabulary, trained vocabularies, masking."""

import json
import random

import pytest
import tokenizers
import torch

import data
from conftest import bpe_file, needs_bpe
from lab.people import draw

GOLDEN = {
    "a man in red": "49406 320 786 530 736 49407",
    "A man in a red shirt.": "49406 320 786 530 320 736 2523 269 49407",
    "The woman's hair is long; she's wearing blue-jeans &amp; 2 white shoes!":
        "49406 518 2308 568 2225 533 1538 282 1043 568 3309 1746 268 10157 261 273 1579 4079 256 49407",
}


@pytest.fixture(scope="module")
def small(people):
    return data.train_tokenizer([c for r in people for c in r["captions"]], vocab=700)


@needs_bpe
@pytest.mark.parametrize("mask", [False, True])
def test_golden_ids(mask):
    tokenizer = data.load_tokenizer(bpe_file(), mask)
    tokens = tokenizer(list(GOLDEN))
    assert tokens.shape == (3, 77) and tokens.dtype == torch.int64
    for row, ids in zip(tokens, GOLDEN.values()):
        ids = [int(i) for i in ids.split()]
        assert row.tolist() == ids + [0] * (77 - len(ids))
    assert (tokenizer.sot, tokenizer.eot, tokenizer.vocab) == (49406, 49407, 49408)
    plain = "The woman's hair is long; she's wearing blue-jeans & 2 white shoes!"
    typographic = ("The woman\u2019s hair is long; she&rsquo;s wearing blue-jeans &amp;amp; \uff12 white shoes\uff01")
    assert torch.equal(tokenizer([typographic]), tokenizer([plain]))


@needs_bpe
def test_jekyll_and_the_mask():
    plain, masking = data.load_tokenizer(bpe_file()), data.load_tokenizer(bpe_file(), mask=True)
    assert plain.mask is None and masking.mask == 49405
    whole, spelt = plain(["dr jekyll"])[0], masking(["dr jekyll"])[0]
    assert 49405 in whole and 49405 not in spelt
    assert spelt.argmax() > whole.argmax()                              # more tokens before EOT


@needs_bpe
def test_three_forms_of_the_vocabulary(tmp_path):
    tokenizer = data.load_tokenizer(bpe_file())
    spec = json.loads(tokenizer.bpe.to_str())
    spec["model"]["vocab"] |= {"<|startoftext|>": 49406, "<|endoftext|>": 49407}
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    texts = [*GOLDEN, "ceci n'est pas une pipe", "\U0001f642 na\u00efve", ""]
    for path in (tmp_path / "tokenizer.json", tmp_path):
        assert torch.equal(data.load_tokenizer(path)(texts), tokenizer(texts))
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(m) for m in tokenizer.merges))
    assert torch.equal(data.load_tokenizer(tmp_path)(texts), tokenizer(texts))


def test_every_vocabulary_ends_in_mask_start_end(small):
    assert (small.sot, small.eot) == (small.vocab - 2, small.vocab - 1)
    masking = data.Tokenizer(small.merges, mask=True)
    assert masking.mask == small.vocab - 3 and masking.vocab == small.vocab
    tokens = small(["a man in a red shirt", "x" * 500, ""])
    assert (tokens[:, 0] == small.sot).all()
    assert tokens.argmax(dim=1).tolist()[1:] == [76, 1] and tokens[1, 76] == small.eot      # cut, and empty
    assert tokens[0, tokens[0].argmax() + 1:].sum() == 0
    assert small(["<|endoftext|> a"])[0].argmax() > 5                   # the words of a caption cannot be an EOT
    assert torch.equal(small(["\ufb01ne \u201cA\u201d  Man"]), small(['fine "a" man']))
    assert small([]).shape == (0, 77)


def test_pairs_of_captions_share_the_room(small):
    """SOT, first, full stop, second, EOT. The longer one is cut first."""
    stop = small.bpe.encode(".").ids
    one, two = (small.bpe.encode(text).ids for text in ("a red hat", "a blue coat"))
    row = small([("a red hat", "a blue coat")])[0]
    assert row[:row.argmax() + 1].tolist() == [small.sot, *one, *stop, *two, small.eot]
    row = small([("a red hat " * 60, "a blue coat")])[0].tolist()
    assert row[-1] == small.eot and row[-1 - len(two):-1] == two
    row = small([("a red hat", "a blue coat " * 60)])[0].tolist()
    assert row[-1] == small.eot and row[1:1 + len(one)] == one


def test_wrong_vocabularies(tmp_path):
    (tmp_path / "tokenizer.json").write_text('{"model": {"merges": ["a b"], "vocab": {"!": 5}}}')
    with pytest.raises(ValueError, match="numbers its tokens differently"):
        data.load_tokenizer(tmp_path / "tokenizer.json")
    (tmp_path / "merges.txt").write_text("first line\nno")
    with pytest.raises(ValueError, match="not a list of merges"):
        data.load_tokenizer(tmp_path / "merges.txt")
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "none.gz", tmp_path / "empty"):
        with pytest.raises(FileNotFoundError, match="bpe_simple_vocab_16e6.txt.gz"):
            data.load_tokenizer(path)


def test_a_trained_vocabulary_is_the_same_each_time(people):
    """Few captions hold many ties between merges."""
    captions = [c for r in people[:5] for c in r["captions"]]
    assert len({tuple(map(tuple, data.train_tokenizer(captions).merges)) for _ in range(12)}) == 1


# ---- masking --------------------------------------------------------------------------------------------------------

def test_masking():
    """Frequencies over 3,000 captions: nouns and adjectives at 0.30, others at 0.05; of these 80 % masked, 10 % random,
    10 % kept."""
    captions = [c for r in draw("train", persons=375) for c in r["captions"]]
    tokenizer = data.train_tokenizer(captions, mask=True)
    chosen, kinds, became = {True: 0, False: 0}, {True: 0, False: 0}, dict(mask=0, same=0, other=0)
    for n, caption in enumerate(captions):
        plain = tokenizer([caption])[0]
        masked, targets = tokenizer.masked(caption, random.Random(n), content=0.30, other=0.05)
        length = int(plain.argmax())
        assert masked[0] == tokenizer.sot and masked[length] == tokenizer.eot and not masked[length + 1:].any()
        assert (targets >= 0).any()
        assert torch.equal(masked[targets < 0], plain[targets < 0])
        assert torch.equal(targets[targets >= 0], plain[targets >= 0])
        assert 0 < masked[1:length].min() and masked[1:length].max() <= tokenizer.mask < tokenizer.sot
        text = data.normalize_text(caption)
        content = {i for start, end, kind in data.tag_words(text) if kind in "NJ" for i in range(start, end)}
        offsets = tokenizer.bpe.encode(text).offsets
        for i in range(1, length):
            noun = offsets[i - 1][0] in content
            kinds[noun] += 1
            if targets[i] >= 0:
                chosen[noun] += 1
                became["mask" if masked[i] == tokenizer.mask else "same" if masked[i] == plain[i] else "other"] += 1
    assert chosen[True] / kinds[True] == pytest.approx(0.30, abs=0.01)
    assert chosen[False] / kinds[False] == pytest.approx(0.05, abs=0.006)
    shares = [became[k] / sum(became.values()) for k in ("mask", "other", "same")]
    assert shares == pytest.approx([0.8, 0.1, 0.1], abs=0.015)


def test_masking_takes_one_at_least_but_never_start_or_end(people):
    tokenizer = data.train_tokenizer([c for r in people for c in r["captions"]], vocab=600, mask=True)
    masked, targets = tokenizer.masked("a man", random.Random(0), content=0.0, other=0.0)
    assert masked[:2].tolist() == [tokenizer.sot, tokenizer.mask] and (targets >= 0).nonzero().tolist() == [[1]]
    masked, targets = tokenizer.masked("", random.Random(0))
    assert masked[:3].tolist() == [tokenizer.sot, tokenizer.eot, 0] and not (targets >= 0).any()
    masked, _ = tokenizer.masked("a red hat " * 60, random.Random(0), content=1.0, other=1.0)
    assert masked[76] == tokenizer.eot and masked[0] == tokenizer.sot


def test_odd_characters_as_ftfy_leaves_them():
    """Line breaks of every kind are white space, control characters vanish; values are those of ftfy 6.3 and CLIP."""
    for c in "\u2028\u2029\n\r\t\x0c\u3000\u00a0":
        assert data.normalize_text(f"a man{c}in red") == "a man in red", hex(ord(c))
    for c in "\x00\x08\x0b\x0e\x1c\x1f\x7f\u206a\ufeff\ufff9\ufffc":
        assert data.normalize_text(f"a man{c}in red") == "a manin red", hex(ord(c))


def test_a_tokenizer_is_written_for_other_libraries(people, tmp_path):
    """The tokenizers package reads the same ids from the file, SOT and EOT included; so does load_tokenizer."""
    captions = [c for r in people for c in r["captions"]] + ["A man,  in a RED\tjacket: it's no. 12!", "été"]
    ours = data.train_tokenizer(captions, vocab=700)
    ours.save(tmp_path / "tokenizer.json")
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for row, encoded in zip(ours(captions), theirs.encode_batch(captions)):
        assert row[:len(encoded.ids)].tolist() == encoded.ids and not row[len(encoded.ids):].any()
    assert torch.equal(data.load_tokenizer(tmp_path)(captions), ours(captions))
