"""--augment-on-device: workers only draw the augmentation, the device makes the views of a batch.

Views equal those of the CPU path item by item. Differences are in grey levels, 1/255:

    image views                none; after a rotation, which takes the nearest pixel, 1 value in 10,000 may be another
    self-supervised views      1.3 on average, at most 5 on average of a view: PIL cuts off the fractions after each of
                               up to four changes of colour, and blurs with boxes instead of a Gaussian

The device is the CPU here; the code is the same."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import data
import tbps
from conftest import run

RECIPES = {name: recipe for name, (recipe, *_) in tbps.METHODS.items()}


def photo(number, size=(128, 384)):
    """A picture with edges, areas and all colours, as uint8 (H, W, 3)."""
    rng = np.random.default_rng(number)
    blocks = Image.fromarray(rng.integers(0, 256, (12, 4, 3), np.uint8))
    smooth = np.asarray(blocks.resize(size, Image.Resampling.BICUBIC)).astype(float)
    return np.uint8(np.clip(smooth + rng.normal(0, 4, smooth.shape), 0, 255))


@pytest.fixture(scope="module")
def records():
    return [dict(image=photo(n), captions=["a man in a red coat"], pid=n // 2) for n in range(16)]


@pytest.fixture(scope="module")
def tokenizer(people):
    return data.train_tokenizer([c for r in people for c in r["captions"]], vocab=600)


def both_paths(records, tokenizer, size, norm="imagenet", epochs=2, **options):
    """Pixels (V, N, 3, H, W) of all items by the CPU path and by the device path, in grey levels."""
    found, std = [], torch.tensor(data.NORMS[norm][1])[:, None, None]
    for on_device in (False, True):
        pairs = data.Pairs(records, size, seed=3, norm=norm, on_device=on_device, **options)
        batch = data.collate(tokenizer, [pairs[e, i] for e in range(epochs) for i in range(len(records))])
        batch = tbps.to_device(batch, torch.device("cpu"), norm)
        assert all(torch.is_tensor(x) for x in batch.values())
        found.append(batch)
    assert torch.equal(found[0]["tokens"], found[1]["tokens"])
    return [255 * std * batch["pixels"] for batch in found]


def options_of(recipe):
    views = dict(views=1 + recipe["mvs"], self_views=2 * (recipe["ss"] > 0)) if "mvs" in recipe else {}
    return views | {key: recipe[key] for key in ("image_aug", "norm", "resize", "mixup") if key in recipe}


def assert_same_views(want, got):
    """Of image views (V, N, 3, H, W)."""
    difference = (want - got).abs()
    assert want.shape == got.shape and got.is_contiguous()
    assert (difference > 0.01).float().mean() < 1e-4
    assert difference.flatten(2).mean(dim=2).max() < 0.01


@pytest.mark.parametrize("size", [(24, 16), (96, 48), None], ids=["small", "toy", "published"])
@pytest.mark.parametrize("method", RECIPES)
def test_views_are_the_same_in_both_paths(method, size, records, tokenizer):
    recipe = RECIPES[method]
    options = options_of(recipe)
    size = size or (recipe["height"], recipe["width"])
    want, got = both_paths(records, tokenizer, size, **options)
    n = options.get("views", 1)
    assert_same_views(want[:n], got[:n])
    if options.get("self_views"):
        difference = (want[n:] - got[n:]).abs().flatten(2)
        assert difference.mean() < 1.5 and difference.mean(dim=2).max() < 5 and difference.max() < 40


@pytest.mark.parametrize("name", [name for name in data.IMAGE_AUG if name not in data.CPU_ONLY])
def test_every_augmentation_of_images(name, records, tokenizer):
    assert_same_views(*both_paths(records, tokenizer, (48, 24), epochs=8, image_aug=name))


@pytest.mark.parametrize("mixup", [0.0, 0.5, 1.0])
def test_mixup(mixup, records, tokenizer):
    want, got = both_paths(records, tokenizer, (48, 24), image_aug="shift", views=2, mixup=mixup)
    assert (want - got).abs().max() < 0.01


def test_self_views_without_jitter_and_blur(records, tokenizer):
    """Crop and flip are exact; PIL rounds grey to 8 bits."""
    drawing = data.Pairs(records, (48, 24), seed=3, views=0, self_views=1, on_device=True)
    names = [{step[0] for step in drawing[e, i]["pixels"][0][0][1]} for e in range(8) for i in range(16)]
    plain, gray = ([n for n, drawn in enumerate(names) if drawn <= allowed] for allowed in ({"flip"}, {"flip", "gray"}))
    want, got = both_paths(records, tokenizer, (48, 24), epochs=8, views=0, self_views=1)
    difference = (want - got)[0].abs()
    assert len(gray) > len(plain) > 5
    assert difference[plain].max() < 0.01 and difference[gray].max() < 0.7


def test_draws_depend_on_seed_epoch_and_item_alone(records):
    """So a resumed run continues exactly, in this path too."""
    pairs = data.Pairs(records, (48, 24), views=2, self_views=2, mixup=0.5, on_device=True)
    first, _, again, other = (pairs[epoch, item]["pixels"] for epoch, item in ((0, 7), (0, 3), (0, 7), (1, 7)))
    for view, same in zip(first, again):
        assert [operations for _, operations in view] == [operations for _, operations in same]
        assert all(torch.equal(a, b) for (a, _), (b, _) in zip(view, same))
    assert [operations for view in first for _, operations in view] != [
        operations for view in other for _, operations in view]


def test_nothing_is_read_back_from_the_device(records, tokenizer):
    """Tensors on "meta" have no values: what would make the GPU wait raises."""
    pairs = data.Pairs(records, (48, 24), views=2, self_views=2, mixup=0.5, image_aug="stack", on_device=True)
    batch = data.collate(tokenizer, [pairs[0, i] for i in range(16)])
    assert {name for name, _ in batch["steps"]} > {"hue", "blur", "crop", "erase", "rotation"}
    batch = tbps.to_device(batch, torch.device("meta"), "imagenet")
    assert batch["pixels"].shape == (4, 16, 3, 48, 24) and batch["pixels"].device.type == "meta"


def test_what_is_shipped_is_a_quarter(records, tokenizer):
    sizes = []
    for on_device in (False, True):
        pairs = data.Pairs(records, (224, 224), views=2, self_views=2, on_device=on_device)
        batch = data.collate(tokenizer, [pairs[0, i] for i in range(8)])
        sizes.append(sum(x.nbytes for x in batch.values() if torch.is_tensor(x)))
    assert sizes[0] / sizes[1] == pytest.approx(4, abs=0.02)


# ---- the option -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("more, on", [
    ([], False), (["--augment-on-device"], True), (["--no-augment-on-device"], False),
    (["--augment-on-device", "--set", "image_aug=autoaugment"], False),
])
def test_the_option_reaches_the_pairs(more, on, people):
    args, recipe = tbps.parse_args(["--device", "cpu", "--clip", "none", *more])
    _, _, pairs, _ = tbps.prepare(args, recipe, people, tbps.no_heads)
    assert pairs.on_device == on


def test_it_is_the_default_on_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    assert tbps.parse_args(["--device", "cuda"])[0].augment_on_device
    assert not tbps.parse_args(["--device", "cuda", "--set", "image_aug=randaugment"])[0].augment_on_device
    assert not tbps.parse_args(["--device", "cuda", "--no-augment-on-device"])[0].augment_on_device


def test_a_run_has_the_same_losses_in_both_paths(tmp_path):
    losses = []
    for option in ("--no-augment-on-device", "--augment-on-device"):
        run("tbps.py", "--device", "cpu", "--dataset", "toy-few", "--clip", "none", "--share", "0.1", "--method", "ctlg",
            "--epochs", "1", "--workers", "1", "--batch", "8", "--val", "none", "--log-every", "1", "--set", "warmup=0.5", option,
            "--out", tmp_path / option)
        lines = map(json.loads, (tmp_path / option / "log.jsonl").read_text().splitlines())
        losses.append([line["loss"] for line in lines if "loss" in line])
    assert len(losses[0]) > 3
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_a_resumed_run_may_change_the_path():
    assert "augment_on_device" in tbps.FREE_OPTIONS
