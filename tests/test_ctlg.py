"""CTLG: sharp contrast, approximate text, both kinds of mixup, the step schedule (arXiv 2311.09084, official code)."""

import functools
import random
from collections import Counter

import pytest
import torch
import torch.nn.functional as F

import data
import losses
import tbps
from conftest import run
from test_model import made_up_merges

NO_AMP = functools.partial(torch.autocast, "cpu", enabled=False)


# ---- the loss -------------------------------------------------------------------------------------------------------

def test_the_hardest_negative_gets_the_gradient():
    """dL/ds_ij = p_ij / tau for negatives, distributed as the softmax of s / tau among them: at tau 0.005 a negative
    that is 0.01 closer gets e^2 = 7.4 times as much."""
    # of one image with its text and four others
    cosines = torch.tensor([0.50, 0.30, 0.31, 0.20, -0.1], dtype=torch.float64)
    text = torch.cat([cosines[:, None], torch.diag((1 - cosines ** 2).sqrt())], dim=1)  # (5, 6), unit rows
    image = F.pad(torch.eye(1, dtype=torch.float64), (0, 5)).requires_grad_()
    s = (image @ text.T)[0].detach().requires_grad_()
    F.cross_entropy(s[None] / 0.005, torch.tensor([0])).backward()
    p, negatives = (s / 0.005).softmax(dim=0), (s[1:] / 0.005).softmax(dim=0)
    assert torch.allclose(s.grad[1:], p[1:] / 0.005) and torch.allclose(s.grad[0], -p[1:].sum() / 0.005)
    assert torch.allclose(s.grad[1:] / s.grad[1:].sum(), negatives)
    assert s.grad[2] / s.grad[1] == pytest.approx(7.389, abs=1e-3)
    # and the loss of a step has that gradient: image 0 against all texts, the other images as far from them as can be
    v = F.pad(torch.eye(5, dtype=torch.float64), (0, 1)).requires_grad_()
    losses.itc(v, text, 200.0).backward()
    logits = (v.detach() @ text.T / 0.005).requires_grad_()
    want = torch.autograd.grad(
        (F.cross_entropy(logits, torch.arange(5)) + F.cross_entropy(logits.T, torch.arange(5))) / 2, logits
    )[0]
    row, column = ((logits.detach().softmax(dim=d) - torch.eye(5)) / 10 for d in (1, 0))
    assert torch.allclose(want, row + column)


def model_and_batch(people, numbers=(0, 1, 2, 8), **more):
    torch.manual_seed(0)
    tokenizer = data.train_tokenizer([c for r in people for c in r["captions"]], vocab=600)
    model = tbps.DualEncoder(**tbps.SIZES["toy"] | dict(vocab=tokenizer.vocab))
    pairs = data.Pairs(people[:5], (96, 48), image_aug="none", **more)
    return model, data.collate(tokenizer, [pairs[0, i] for i in numbers])


def test_a_fixed_temperature_is_not_clamped(people):
    model, batch = model_and_batch(people)
    model.logit_scale.data.fill_(torch.tensor(200.0).log())
    assert model.scale().item() == pytest.approx(100)
    model.logit_scale.requires_grad_(False)
    assert model.scale().item() == pytest.approx(200, rel=1e-6)
    image, text = model.encode_image(batch["pixels"][0]), model.encode_text(batch["tokens"][0])
    loss = tbps.ctlg_losses(model, batch, tbps.CTLG, 0.0, NO_AMP)["itc"]
    assert loss.item() == pytest.approx(losses.itc(image, text, 200.0).item(), rel=1e-5)


@pytest.mark.parametrize("same, right", [("pair", [0, 1, 2, 3]), ("image", [0, 0, 2, 3]), ("person", [0, 0, 0, 3])])
def test_which_captions_are_right(same, right, people):
    """Two captions of an image, one of another image of the person, one of another person; the mean over positives."""
    model, batch = model_and_batch(people)
    right = torch.tensor(right)
    logits = (
        model.scale()
        * F.normalize(model.encode_image(batch["pixels"][0]), dim=1)
        @ F.normalize(model.encode_text(batch["tokens"][0]), dim=1).T
    )
    want = (
        sum(
            table[i].logsumexp(0) - table[i][right == right[i]].mean() for table in (logits, logits.T) for i in range(4)
        )
        / 8
    )
    assert tbps.ctlg_losses(model, batch, tbps.CTLG | dict(positives=same), 0.0, NO_AMP)["itc"].item() == pytest.approx(
        want.item(), rel=1e-5
    )


def test_learning_rate():
    golden = {
        0: 1e-5,
        1: 2e-5,
        8: 9e-5,
        9: 1e-4,
        10: 1e-4,
        19: 1e-4,
        20: 1e-5,
        39: 1e-5,
        40: 1e-6,
        59: 1e-6,
        60: 1e-7,
        69: 1e-7,
    }
    for epoch, lr in golden.items():
        for it in (267 * epoch, 267 * epoch + 266):
            assert tbps.lr_at(it, 267, tbps.CTLG) == pytest.approx(lr, rel=1e-9)
    assert tbps.lr_at(267 * 30 + 5, 267, tbps.CTLG | dict(per_epoch=False)) == pytest.approx(1e-5, rel=1e-9)


def test_overlapping_patches():
    with torch.device("meta"):
        model = tbps.DualEncoder(**tbps.SIZES["ViT-B/16"] | dict(image_size=(384, 128), stride=12))
    assert model.image.grid == (31, 10) and model.image.pos.shape == (311, 768)


# ---- mixup ----------------------------------------------------------------------------------------------------------

def test_mean_pixels_are_mean_patches(people):
    """The released mixup is one of features after all: of the patch embedding, which is linear."""
    model, batch = model_and_batch(people)
    a, b = batch["pixels"][0, :2]
    patch = model.image.patch
    assert torch.allclose(patch(((a + b) / 2)[None]), (patch(a[None]) + patch(b[None])) / 2, atol=1e-5)


def test_pairs_are_mixed(people):
    plain, mixed = (
        data.Pairs(people, (96, 48), seed=3, image_aug="none", text=dict(deletion=0.0), mixup=m) for m in (0.0, 0.5)
    )
    tokenizer, partners = data.train_tokenizer([c for r in people for c in r["captions"]], vocab=600), Counter()
    for i in range(len(plain)):
        a, b = plain[0, i], mixed[0, i]
        assert (a["pid"], a["image"], a["item"]) == (b["pid"], b["image"], b["item"])
        partners[type(b["captions"][0])] += 1
        if isinstance(b["captions"][0], str):
            assert b["captions"] == a["captions"] and torch.equal(a["pixels"], b["pixels"])
            continue
        (own, other), = b["captions"]
        assert own == a["captions"][0]
        j = next(j for j in range(len(plain)) if plain.captions[j] == other)
        assert torch.allclose(b["pixels"], (a["pixels"] + plain[0, j]["pixels"]) / 2, atol=1e-6)
    assert 0.35 < partners[tuple] / len(plain) < 0.65
    first, second = ([type(mixed[epoch, i]["captions"][0]) for i in range(20)] for epoch in (0, 1))
    assert first != second
    tokens = tokenizer([("a man", "a woman"), "a man. a woman"])
    assert torch.equal(*tokens)


@pytest.mark.parametrize(
    "a, b, kept",
    [
        (100, 100, (37, 37)),
        (10, 100, (10, 64)),
        (100, 10, (64, 10)),
        (37, 38, (37, 37)),
        (38, 37, (37, 37)),
        (37, 37, (37, 37)),
        (5, 6, (5, 6)),
    ],
)
def test_joined_captions_are_cut_in_balance(a, b, kept):
    tokenizer = data.Tokenizer([m.split() for m in made_up_merges(300)])
    x, y, stop = (tokenizer([c])[0, 1].item() for c in ("x", "y", "."))
    row = tokenizer([("x " * a, "y " * b)])[0]
    end = int(row.argmax())
    assert row[1:end].tolist() == [x] * kept[0] + [stop] + [y] * kept[1] and row[0] == tokenizer.sot
    assert end <= 76 and row[end] == tokenizer.eot


def test_features_are_mixed_after_the_first_block(people):
    """Against both towers taken apart; with share 1 nothing happens, and a caption mixed with itself is itself."""
    model, batch = model_and_batch(people)
    model.eval()
    pixels, tokens, partner = batch["pixels"][0], batch["tokens"][0], torch.tensor([1, 2, 3, 0])
    for encode, inputs in ((model.encode_image, pixels), (model.encode_text, tokens)):
        plain = encode(inputs)
        assert torch.allclose(encode(inputs, (1.0, partner)), plain, atol=1e-5)
        assert torch.allclose(encode(inputs, (0.0, partner)), plain[partner], atol=1e-5)
        assert torch.allclose(encode(inputs, (0.3, torch.arange(4))), plain, atol=1e-5)
        assert not torch.allclose(encode(inputs, (0.3, partner)), 0.3 * plain + 0.7 * plain[partner], atol=1e-2)
    tower, eot = model.image, tokens.argmax(dim=1)
    x = torch.cat([tower.cls.expand(4, 1, -1), tower.patch(pixels).flatten(2).transpose(1, 2)], dim=1) + tower.pos
    x = tower.blocks[0](tower.ln_pre(x))
    x = tower.blocks[1](0.3 * x + 0.7 * x[partner])[:, 0]
    assert torch.allclose(model.encode_image(pixels, (0.3, partner)), tower.ln_post(x) @ tower.proj, atol=1e-5)
    tower = model.text
    tokens = F.pad(tokens, (0, 77 - tokens.shape[1]))                   # all 77: trimming changes nothing
    x = tower.blocks[0](tower.tok(tokens) + tower.pos, causal=True)
    x = tower.blocks[1](0.3 * x + 0.7 * x[partner], causal=True)
    ends = torch.stack([0.3 * x[i, eot[i]] + 0.7 * x[i, eot[partner[i]]] for i in range(4)])
    assert torch.allclose(model.encode_text(tokens, (0.3, partner)), tower.ln_post(ends) @ tower.proj, atol=1e-5)


def test_both_towers_are_mixed_alike(people, monkeypatch):
    model, batch = model_and_batch(people)
    seen = []
    for name in ("encode_image", "encode_text"):
        monkeypatch.setattr(model, name, lambda x, mix, encode=getattr(model, name): seen.append(mix) or encode(x, mix))
    torch.manual_seed(0)
    for _ in range(20):
        tbps.ctlg_losses(model, batch, tbps.CTLG | dict(feature_mixup=0.4), 0.0, NO_AMP)
    assert all(a is b for a, b in zip(seen[::2], seen[1::2]))
    assert all(sorted(p.tolist()) == [0, 1, 2, 3] for _, p in seen)
    shares = [share for share, _ in seen[::2]]
    assert min(shares) < 0.2 and max(shares) > 0.8 and len(set(shares)) == 20  # Beta(0.4, 0.4) likes the ends


# ---- approximate text -----------------------------------------------------------------------------------------------

LONG = "a " + "person carries a big thing and walks along with his phone, while the sun shines on all of us, and " * 4


@pytest.mark.parametrize(
    "N, n", [(1, 1), (2, 1), (5, 1), (10, 2), (15, 3), (23, 5), (28, 6), (35, 7), (46, 10), (80, 10)]
)
def test_how_many_words_change(N, n):
    words = LONG.replace(",", "").split()[:N]
    lengths = Counter(len(data.approximate_caption(" ".join(words), random.Random(s)).split()) for s in range(60))
    assert set(lengths) == ({N} if N == 1 else {N, N - n})              # synonyms keep the number


def test_approximate_text():
    caption = "The man wears a red t-shirt, dark blue jeans and carries a big black backpack."
    seen = Counter()
    for seed in range(600):
        said = data.approximate_caption(caption, random.Random(seed))
        assert isinstance(said, str) and any(c.isalnum() for c in said) and "  " not in said and said == said.strip()
        seen[said] += 1
        if len(data.WORD.findall(said)) == len(data.WORD.findall(caption)):                             # synonyms
            for old, new in zip(data.WORD.findall(caption), data.WORD.findall(said)):
                assert new == old or new in data.SYNONYM_OF[old.lower()] and old not in data.PROTECTED
        elif all(w in said for w in ("red", "t-shirt", "blue", "jeans", "black", "backpack")):
            seen["protected"] += 1
        else:  # a row of 4, punctuation counted, is missing somewhere
            found = data.WORD.findall(caption)
            assert data.WORD.findall(said) in [found[:k] + found[k + 4:] for k in range(len(found) - 3)]
    assert len(seen) > 100 and seen["protected"] > 150
    for short in ("", "red", "red shirt", ".", "...", "a. b"):
        assert all(isinstance(data.approximate_caption(short, random.Random(s)), str) for s in range(20))
    assert all(data.approximate_caption("red", random.Random(s)) == "red" for s in range(20))
    changed = sum(
        data.augment_caption(caption, random.Random(s), deletion=0.0, approximate=0.5) != caption for s in range(400)
    )
    assert 140 < changed < 215


# ---- the command ----------------------------------------------------------------------------------------------------

def test_a_run(cuhk, tmp_path):
    said = run(
        "tbps.py", "--dataset", "cuhk", "--data-root", cuhk, "--method", "ctlg", "--size", "toy", "--clip", "none",
        "--workers", "0", "--out", tmp_path / "r", "--set", "height=96", "width=48", "stride=6", "batch=8",
        "epochs=1", "feature_mixup=0.4", "positives=image",
    )
    assert said.splitlines()[-1].startswith("test R@1") and "15x7 patches" in said and "ctlg" in said
