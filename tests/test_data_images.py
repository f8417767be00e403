"""Images as the model sees them: augmentations of training, and preprocessing."""

import numpy as np
import pytest
import torch
from PIL import Image

import data


def test_the_pool_draws_two_of_six_with_replacement(people):
    view, drawn = data.TrainView((96, 48)), []
    view.ops = {name: lambda pixels, name=name: drawn.append(name) or pixels for name in data.POOL}
    image = data.load_image(people[0]["image"])
    torch.manual_seed(0)
    for _ in range(3000):
        view(image)
    pairs = list(zip(drawn[::2], drawn[1::2]))
    assert len(pairs) == 3000
    assert np.mean([a == b for a, b in pairs]) == pytest.approx(1 / 6, abs=0.02)
    for name in data.POOL:
        assert np.mean([name in p for p in pairs]) == pytest.approx(0.306, abs=0.025)       # 1 - (5/6)^2


def test_effective_rates_of_the_pool():
    """Of 4000 views of an image with a red left half: 15.3 % mirrored, 3.3 % gray, 16.0 % with erased (black) parts."""
    view = data.TrainView((64, 32))
    view.normalize = lambda pixels: pixels
    view.ops |= {name: lambda pixels: pixels for name in ("jitter", "rotation", "crop")}    # leave the three that count
    pixels = np.full((64, 32, 3), 200, np.uint8)
    pixels[:, :16] = (200, 60, 60)
    image = Image.fromarray(pixels)
    torch.manual_seed(0)
    views = torch.stack([view(image) for _ in range(4000)])
    erased = (views == 0).all(dim=1).flatten(1).float().mean(dim=1)                         # fraction of each view
    assert (erased > 0).float().mean().item() == pytest.approx(0.160, abs=0.02)
    assert 0.08 < erased[erased > 0].min() and erased.max() < 0.36                          # 10 to 20 %, or twice
    red = views[:, 0] > views[:, 1] + 0.2                                                   # (N, H, W)
    gray = ~red.flatten(1).any(dim=1)
    mirrored = red[:, :, 16:].flatten(1).sum(1) > red[:, :, :16].flatten(1).sum(1)
    assert gray.float().mean().item() == pytest.approx(0.033, abs=0.012)
    assert mirrored.float().mean().item() == pytest.approx(0.153 * 0.967, abs=0.02)


@pytest.mark.parametrize("name", data.IMAGE_AUG)
def test_every_image_augmentation(name, people):
    view, image = data.TrainView((96, 48), name), data.load_image(people[0]["image"])
    torch.manual_seed(0)
    views = torch.stack([view(image) for _ in range(20)])
    assert views.shape == (20, 3, 96, 48) and views.isfinite().all()
    plain = data.Preprocessing((96, 48)).image(image)
    assert all(torch.equal(v, plain) for v in views) == (name == "none")


def test_the_augmentation_of_irra():
    """Mirrored half of the time, moved by up to 10 of 384 pixels with black coming in, and half of the time a rectangle
    of 2 to 40 % erased with the mean vector in normalised space."""
    image = Image.new("RGB", (128, 384), (200, 100, 50))
    view = data.TrainView((384, 128), "reid", "clip")
    mean, std = (torch.tensor(v)[:, None, None] for v in data.NORMS["clip"])
    erased, moved = [], 0
    torch.manual_seed(0)
    for _ in range(200):
        pixels = view(image)
        hole = (pixels - mean).abs().amax(dim=0) < 1e-6
        erased.append(hole.float().mean().item())
        black = ((pixels * std + mean).abs() < 1e-6).all(dim=0)
        moved += bool(black.any())
        assert black[10:-10, 10:-10].sum() == 0
    holes = [e for e in erased if e]
    assert 0.4 < len(holes) / 200 < 0.6 and moved > 150
    assert min(holes) > 0.015 and 0.3 < max(holes) < 0.41


def test_self_views_differ(people):
    view, image = data.SelfView((96, 48)), data.load_image(people[0]["image"])
    torch.manual_seed(0)
    views = torch.stack([view(image) for _ in range(20)])
    assert views.shape == (20, 3, 96, 48) and len({v.sum().item() for v in views}) == 20


# ---- preprocessing --------------------------------------------------------------------------------------------------

def normalized(image, norm="imagenet"):
    mean, std = torch.tensor(data.NORMS[norm])[..., None, None]
    return (torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255 - mean) / std


def test_preprocessing_scales_and_normalises(people, tmp_path):
    array, image = people[0]["image"], data.load_image(people[0]["image"])
    image.save(tmp_path / "a.png")
    prepare = data.Preprocessing((96, 48))
    for same in (array, image, tmp_path / "a.png", str(tmp_path / "a.png")):
        assert torch.allclose(prepare.image(same), normalized(array), atol=1e-6)
    wide = data.Preprocessing((40, 40), norm="clip").image(image)
    assert torch.allclose(wide, normalized(image.resize((40, 40), Image.Resampling.BICUBIC), "clip"), atol=1e-6)
    assert data.Preprocessing((40, 40), norm="clip", resize="bilinear").image(image).sub(wide).abs().max() > 0.01


def test_preprocessing_of_captions():
    assert data.Preprocessing((96, 48)).text("A man. ") == "a man"
    assert data.Preprocessing((96, 48), clean=False).text("A man. ") == "A man. "


@pytest.mark.parametrize("norm", ["clip", "half", ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))])
def test_preprocessing_is_made_again_from_its_settings(norm, people, tmp_path):
    one = data.Preprocessing([40, 20], norm, "bilinear", clean=False)
    torch.save(one.settings, tmp_path / "c.pt")
    two = data.Preprocessing(**torch.load(tmp_path / "c.pt", weights_only=True))
    assert two.settings == one.settings == dict(size=(40, 20), norm=norm, resize="bilinear", clean=False)
    assert torch.equal(two.image(people[0]["image"]), one.image(people[0]["image"]))
    view = data.TrainView((40, 20), "none", norm, "bilinear")
    assert torch.equal(view(data.load_image(people[0]["image"])), one.image(people[0]["image"]))
