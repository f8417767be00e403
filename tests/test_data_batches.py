"""Training items, samplers and batches: every draw is a function of (seed, epoch, item)."""

import random
from collections import Counter

import numpy as np
import pytest
import torch

import data

SIZE = (96, 48)


def tokenizer_of(people, **options):
    return data.train_tokenizer([c for r in people for c in r["captions"]], **options)


def test_pairs(people):
    pairs = data.Pairs(people, SIZE, views=2, self_views=2, texts=2, text=dict(deletion=0.05))
    assert len(pairs) == 48 and pairs.persons == 6
    batch = data.collate(tokenizer_of(people, vocab=700), [pairs[0, i] for i in (3, 40)])
    assert batch["pixels"].shape == (4, 2, 3, 96, 48) and batch["tokens"].shape[:2] == (2, 2)
    assert batch["item"].tolist() == [3, 40] and batch["image"].tolist() == [1, 20]
    assert batch["pid"].tolist() == [pairs.pids[3], pairs.pids[40]] == [0, 5]


def test_draws_depend_on_seed_epoch_and_item_alone(people):
    one, other = (data.Pairs(people, SIZE, seed=5, text=dict(deletion=0.3)) for _ in range(2))
    for i in (7, 3, 7):
        torch.manual_seed(i)                                            # whatever happened before
        a, b = one[0, i], other[0, i]
        assert torch.equal(a["pixels"], b["pixels"]) and a["captions"] == b["captions"]
    assert not torch.equal(one[0, 7]["pixels"], one[1, 7]["pixels"])
    assert len({data.derive_seed(s, e, i) for s in range(10) for e in range(10) for i in range(10)}) == 1000


def test_an_image_is_decoded_once_and_only_the_views_asked_for_are_made(people, monkeypatch):
    loads = []
    load = data.load_image
    monkeypatch.setattr(data, "load_image", lambda image: loads.append(1) or load(image))
    assert data.Pairs(people, SIZE)[0, 0]["pixels"].shape[0] == 1
    assert data.Pairs(people, SIZE, views=2, self_views=2)[0, 0]["pixels"].shape[0] == 4
    assert len(loads) == 2


def test_back_translation(people):
    records = [people[0] | dict(captions=["one"], captions_bt=["two"]),
               people[1] | dict(captions=["one"], captions_bt=[""]),
               people[2] | dict(captions=["one"])]
    pairs = data.Pairs(records, SIZE, back_translation=0.5)
    seen = []
    for epoch in range(300):
        seen.append([pairs[epoch, i]["captions"][0] for i in range(3)])
    seen = np.array(seen)
    assert np.mean(seen[:, 0] == "two") == pytest.approx(0.5, abs=0.1)
    assert (seen[:, 1:] == "one").all()


def test_masked_captions_are_functions_of_the_item(people):
    tokenizer = tokenizer_of(people, vocab=600, mask=True)
    pairs = data.Pairs(people, SIZE, text=dict(prune=0.2))

    def collate(*items, epoch=0):
        return data.collate(tokenizer, [pairs[epoch, i] for i in items], mask=(0.3, 0.05), trim=False)
    one, other = collate(3, 8), collate(8, 5)
    assert torch.equal(one["masked"][1], other["masked"][0])
    assert not torch.equal(collate(8, epoch=1)["masked"][0], other["masked"][0])
    assert "masked" not in data.collate(tokenizer, [pairs[0, 8]])


def test_what_is_masked_is_found_again(people):
    """positions and targets put the words back; without trim all is the same but for more padding."""
    tokenizer = tokenizer_of(people, vocab=600, mask=True)
    pairs = data.Pairs(people, SIZE, text=dict(deletion=0.0))
    items = [pairs[0, i] for i in range(8)]
    batch, whole = (data.collate(tokenizer, items, mask=(0.3, 0.3), trim=trim) for trim in (True, False))
    for b in (batch, whole):
        assert (b["masked"] != b["tokens"][0]).any() and len(b["positions"]) == len(b["targets"])
        assert torch.equal(b["masked"].flatten().scatter(0, b["positions"], b["targets"]), b["tokens"][0].flatten())
    T = batch["tokens"].shape[2]
    assert T == (whole["tokens"] > 0).any(dim=(0, 1)).sum() < 77 == whole["tokens"].shape[2]
    assert torch.equal(whole["tokens"][:, :, :T], batch["tokens"]) and torch.equal(whole["targets"], batch["targets"])
    assert all(x.is_contiguous() for x in batch.values())


# ---- samplers -------------------------------------------------------------------------------------------------------

def test_random_batches():
    pids = [0] * 50 + list(range(50))
    batches = data.batches("random", pids, 32, seed=1)
    assert [len(b) for b in batches] == [32, 32, 32] and len({i for b in batches for i in b}) == 96
    assert sorted(i for b in data.batches("random", pids, 32, 1, drop_last=False) for i in b) == list(range(100))
    assert data.batches("random", pids, 32, 1) == batches != data.batches("random", pids, 32, 2)


def test_random_count_batches():
    """UIT's sampler on persons with 5 to 7 items: about 97 % of the items are seen, half of them with a partner in the
    batch."""
    pids = [p for p in range(1000) for _ in range(5 + p % 3)]
    batches = data.batches("random-count", pids, 128, seed=0)
    seen = [i for b in batches for i in b]
    assert len(seen) == len(set(seen)) and 0.9 < len(seen) / len(pids) <= 1
    partners = []
    for batch in batches:
        count = Counter(pids[i] for i in batch)
        partners += [count[pids[i]] > 1 for i in batch]
    assert 0.40 < np.mean(partners) < 0.60
    with pytest.raises(ValueError, match="needs 64 persons for batch=128; the set has 63"):
        data.batches("random-count", range(63), 128, seed=0)


def test_batches_of_views():
    """LCR2S's sampler: every image once, up to four of a person together; persons with few images are not filled up."""
    images = [i for i in range(33) for _ in range(2)]
    pids = [0 if i == 0 else 1 + (i - 1) // 8 for i in images]          # one person with one image, four with eight
    order = data.batches("views", pids, 16, seed=0, images=images)
    assert all(13 <= len(b) <= 16 for b in order)
    for batch in order:
        count = Counter(pids[i] for i in batch)
        assert all(n in ((1,) if pid == 0 else (4, 8)) for pid, n in count.items())
    everything = [i for b in data.batches("views", pids, 16, 0, images, drop_last=False) for i in b]
    assert sorted(images[i] for i in everything) == list(range(33))
    assert 0 < sum(i % 2 for i in everything) < 33                      # first and second captions
    assert data.batches("views", pids, 16, 0, images) == order != data.batches("views", pids, 16, 1, images)


def test_mixup_takes_the_mean_of_two_images_and_both_captions(people):
    plain, mixed = (data.Pairs(people, SIZE, seed=2, image_aug="none", text=dict(deletion=0), mixup=m) for m in (0, 1))
    rng = random.Random(data.derive_seed(2, 0, 7))
    rng.random()                                                        # back-translation
    rng.random()                                                        # whether to mix
    partner = rng.randrange(48)
    a, b, item = plain[0, 7], plain[0, partner], mixed[0, 7]
    assert torch.equal(item["pixels"], (a["pixels"] + b["pixels"]) / 2)
    assert item["captions"] == list(zip(a["captions"], b["captions"])) and item["pid"] == a["pid"]
