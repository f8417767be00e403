"""The probes of lab/probes.py, the test sets of lab/domain_shift.py, the changes of lab/train_variants.py."""

import random
import re
from contextlib import ExitStack, contextmanager

import numpy as np
import pytest
import torch
from PIL import Image

import data
import tbps
from conftest import run
from lab import domain_shift, people, probes, train_variants

# ---- probes ----------------------------------------------------------------------------------------------------------


def small_model():
    return tbps.DualEncoder(32, (16, 16), 8, 32, 2, 32, 3, 100, head_width=16).eval()


@torch.no_grad()
def test_a_removed_layer_is_one_that_is_not_there():
    model, pixels = small_model(), torch.randn(2, 3, 16, 16)
    weights = {name: w.clone() for name, w in model.state_dict().items()}
    model.load_state_dict(probes.removed(weights, ("image", 1, "layer")))
    found = model.encode_image(pixels)
    model.load_state_dict(weights)
    whole = model.encode_image(pixels)
    model.image.blocks = model.image.blocks[:1]
    assert torch.allclose(found, model.encode_image(pixels), atol=1e-6)
    assert not torch.allclose(found, whole, atol=1e-3)


def test_a_removed_part_leaves_all_other_weights():
    weights = small_model().state_dict()
    part = probes.removed(weights, ("text", 2, "attention"))
    changed = {name for name in weights if not torch.equal(part[name], weights[name])}
    assert changed == {"text.blocks.2.attn.proj.weight"}                # its bias is 0 at the start


WORTH = {("image", 0, "attention"): 40, ("text", 1, "feed-forward"): 10, ("text", 2, "attention"): 2}


def score(weights):
    """50 + what the output weights of some modules are worth, in proportion to their mean."""
    total = 50
    for (tower, n, part), value in WORTH.items():
        output = "attn.proj" if part == "attention" else "fc2"
        total += value * weights[f"{tower}.blocks.{n}.{output}.weight"].mean().item()
    return total


def test_contributions():
    model = small_model()
    after = {name: torch.ones_like(w) for name, w in model.state_dict().items()}
    before = {name: torch.zeros_like(w) for name, w in after.items()}
    found = probes.contributions(score, after, before, probes.modules(model))
    assert len(found) == 15
    assert found["image", 0, "attention"] == pytest.approx((40, 1, 1.0))
    assert found["image", 0, "layer"] == pytest.approx((40, 1, 1.0))
    assert found["text", 1, "feed-forward"] == pytest.approx((10, 0.25, 0.8))
    assert found["text", 1, "attention"] == pytest.approx((0, 0, 0))
    assert found["text", 2, "attention"] == pytest.approx((2, 0.05, 0))                     # below the tolerance


def test_rewound_weights():
    after = {name: torch.ones_like(w) for name, w in small_model().state_dict().items()}
    before = {name: torch.zeros_like(w) for name, w in after.items()}
    mixed = probes.rewound(after, before, ("text", 1, "attention"), 0.3)
    changed = {name for name in after if not torch.equal(mixed[name], after[name])}
    layers = ("ln1", "attn.qkv", "attn.proj")
    assert changed == {f"text.blocks.1.{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}
    assert mixed["text.blocks.1.ln1.bias"][0].item() == pytest.approx(0.3)


LAYERS = ([], [7], [7, 8], [3, 7, 8], [3, 5, 7, 8], [3, 5, 6, 7, 8])
MILLIONS = {
    "tbps-clip": (149.2, 146.0, 142.9, 139.7, 136.6, 133.4),
    "tbps-clip-simplified": (149.0, 145.9, 142.7, 139.6, 136.4, 133.3),
}


@pytest.mark.parametrize("method", MILLIONS)
def test_trainable_parameters_at_full_size(method, monkeypatch):
    """The table of the paper."""
    recipe, heads, _ = tbps.METHODS[method]

    def build(*_):
        with torch.device("meta"):
            model = tbps.DualEncoder(**tbps.SIZES["ViT-B/16"], lock_patch=True)
            for name, head in heads(recipe, model, 11003).items():
                model.heads[name] = head
            return model

    monkeypatch.setattr(tbps, "build_model", build)
    for layers, millions in zip(LAYERS, MILLIONS[method]):
        for how in ("freeze", "drop"):
            model = probes.without(layers, how)[1]()
            count = sum(p.numel() for p in model.parameters() if p.requires_grad)
            assert count / 1e6 == pytest.approx(millions, abs=0.06)
    assert len(probes.without([3, 7], "drop")[1]().text.blocks) == 10
    with pytest.raises(ValueError, match="layers 0 to 11, not 12"):
        probes.without([12], "freeze")[1]()


@pytest.fixture(scope="module")
def base(cuhk, tmp_path_factory):
    """Options of a small run, and a checkpoint that it made."""
    folder = tmp_path_factory.mktemp("base")
    options = ["--dataset", "cuhk", "--data-root", cuhk, "--method", "baseline", "--size", "toy", "--workers", "0"]
    recipe = ["--set", "batch=8", "epochs=1", "height=96", "width=48", "warmup=0"]
    run("tbps.py", *options, *recipe, "--clip", "none", "--out", folder)
    return [*options, *recipe], folder / "best.pt"


@contextmanager
def tbps_restored():
    """The commands replace functions of tbps, for the process of a user; here they must come back."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tbps, "build_model", tbps.build_model)
        patch.setattr(tbps, "parse_args", tbps.parse_args)
        yield


@pytest.mark.parametrize("how, layers", [("freeze", 2), ("drop", 1)])
def test_training_without_a_layer(how, layers, base, tmp_path):
    options, checkpoint = base
    options = [*options, "--clip", checkpoint, "--out", tmp_path]
    with tbps_restored():
        assert "test R@1" in run("lab/probes.py", how, "0", *options)
    with tbps_restored():
        said = run("lab/probes.py", how, "1", *options, "--resume", code=2)
    assert f"layers: '{how} [0]' then, '{how} [1]' now" in said
    before, after = (torch.load(path, weights_only=True) for path in (checkpoint, tmp_path / "best.pt"))
    assert after["arch"]["text_layers"] == layers
    first = [name for name in before["weights"] if name.startswith("text.blocks.0.") and name in after["weights"]]
    equal = [torch.equal(before["weights"][name], after["weights"][name]) for name in first]
    assert all(equal) == (how == "freeze")
    if how == "drop":
        said = run("lab/probes.py", "modules", "--checkpoint", tmp_path / "best.pt", "--before", checkpoint,
                   "--page", tmp_path / "p.html", code=2)
        assert "another architecture" in said


def test_the_table_of_modules(base, tmp_path):
    _, checkpoint = base
    page = tmp_path / "p.html"
    said = run("lab/probes.py", "modules", "--checkpoint", checkpoint, "--before", checkpoint, "--page", page)
    assert said.count("C1 ") == 12 and page.read_text().count("<tr>") == 5


# ---- domain shift ----------------------------------------------------------------------------------------------------


@pytest.fixture
def few_people(monkeypatch):
    monkeypatch.setattr(people, "PERSONS", dict.fromkeys(people.PERSONS, 12))


def starts_with_new_plan(records):
    return any(caption.startswith(("Dressed", "Carrying")) for r in records for caption in r["captions"])


def test_sets_differ_in_one_thing(few_people):
    found = {name: domain_shift.records(name, "test") for name in domain_shift.SETS}
    toy, fronts, backs = (found[name] for name in ("toy", "fronts", "backs"))
    for a, b in zip(toy, found["other-camera"], strict=True):
        assert a["captions"] == b["captions"] and a["attributes"] == b["attributes"]
        assert np.array_equal(a["parts"], b["parts"]) and not np.array_equal(a["image"], b["image"])
    assert toy[0]["image"].std() > found["other-camera"][0]["image"].std()                  # paler
    assert [r["attributes"] for r in found["usual-words"]] == [r["attributes"] for r in toy]
    assert starts_with_new_plan(toy) and not starts_with_new_plan(found["usual-words"])
    assert [r["pid"] for r in fronts] == [r["pid"] for r in backs] == [r["pid"] for r in toy[::2]]
    assert any("glasses" in r["visible"] for r in fronts) and not any("glasses" in r["visible"] for r in backs)
    assert {r["attributes"]["top"] for r in found["toy-generic"]} != {r["attributes"]["top"] for r in toy}
    assert people.paint is domain_shift.PAINT                           # nothing stays replaced


def test_the_table_of_sets(few_people, tmp_path):
    options = ["--workers", 0, "--set", "epochs=1", "batch=16", "warmup=0"]
    paths = [tmp_path / f"some_name-{seed}" for seed in (0, 1)]
    for seed, path in enumerate(paths):
        said = run("lab/domain_shift.py", "--only", "fronts", "--train", "--dataset", "toy", "--out", path,
                   "--seed", seed, *options)
        assert "test R@1" in said
    assert '"at": [0, 3], "epoch": 1.0' in (paths[0] / "log.jsonl").read_text()             # 48 captions of 12 persons
    checkpoints = [path / "best.pt" for path in paths]
    said = run("lab/domain_shift.py", *checkpoints, "--only", "toy", "toy-generic")
    assert "| R@1 | seeds | toy | toy-generic |" in said
    assert "| some name | 2 |" in said and said.count("±") == 2
    assert "| some name | 1 |" in run("lab/domain_shift.py", checkpoints[0], "--only", "toy")


def test_domain_shift_says_what_it_needs():
    assert "takes one set" in run("lab/domain_shift.py", "--train", "--dataset", "toy", code=2)
    assert "name checkpoints" in run("lab/domain_shift.py", code=2)


# ---- variants of training --------------------------------------------------------------------------------------------

MEAN, STD = (torch.tensor(values)[:, None, None] for values in data.NORMS["imagenet"])


def colours_and_shares(*changes):
    """Of 40 self-supervision views of an image, red above blue: most green, smallest and largest share of red."""
    halves = [np.full((48, 48, 3), colour, np.uint8) for colour in ((200, 0, 0), (0, 0, 200))]
    image = Image.fromarray(np.concatenate(halves))
    torch.manual_seed(0)
    view = train_variants.changed_self_view(changes)((96, 48))
    found = [255 * (view(image) * STD + MEAN) for _ in range(40)]
    red = [(pixels[0] > pixels[2]).float().mean().item() for pixels in found]
    return max(pixels[1].max().item() for pixels in found), min(red), max(red)


def test_changed_self_views():
    green, _, _ = colours_and_shares()
    assert green > 20
    green, least, _ = colours_and_shares("colours")
    assert green < 1 and least < 0.25
    green, least, most = colours_and_shares("colours", "crops")
    assert green < 1 and 0.3 < least < most < 0.7


def test_variants_train_otherwise(few_people, tmp_path):
    def first_loss(out, *script):
        """The first logged loss of self-supervision."""
        run(*script, "--dataset", "toy", "--workers", 0, "--out", tmp_path / out,
            "--set", "epochs=1", "batch=16", "warmup=0", "ss=0.4")
        return next(line["ss"] for line in tbps.read_log(tmp_path / out) if "ss" in line)

    changed = first_loss("a", "lab/train_variants.py", "colours,crops")
    assert changed != first_loss("b", "tbps.py") == first_loss("c", "tbps.py")              # nothing stays replaced
    assert tbps.read_file(tmp_path / "a/last.pt")["args"]["changes"] == "colours,crops"
    assert "name changes" in run("lab/train_variants.py", "--dataset", "toy", code=2)


@contextmanager
def variant(*changes):
    with ExitStack() as stack:
        for patch in train_variants.patches(changes):
            stack.enter_context(patch)
        yield


def test_captions_of_grey_images_without_colours():
    records = people.draw("train", persons=3)
    colours = re.compile(rf"\b({'|'.join(data.COLOURS)})\b", re.I)

    def deleted_colours():
        """{whether the image is grey: how many colours each caption has lost}"""
        found = {True: [], False: []}
        pairs = data.Pairs(records, (96, 48), views=1, image_aug="gray", back_translation=0, text=dict(deletion=0))
        for epoch in range(4):
            for caption, item in zip(pairs.captions, (pairs[epoch, i] for i in range(len(pairs)))):
                grey = bool(((item["pixels"][0] * STD + MEAN).std(0) < 1e-3).all())
                found[grey].append(len(colours.findall(caption)) - len(colours.findall(item["captions"][0])))
        return found

    usual = deleted_colours()
    assert set(usual[True] + usual[False]) == {0} and usual[True]
    with variant("untold"):
        untold = deleted_colours()
    assert set(untold[False]) == {0} and max(untold[True]) > 1


def policies():
    """Names of the operations of AutoAugment's policies."""
    augment = data.image_ops((96, 48))["autoaugment"]
    return {tuple(sorted({name for name, *_ in policy})) for policy in augment._policies}


def red_views(name):
    """100 views of a red image, by one augmentation."""
    red = torch.tensor((200, 0, 0), dtype=torch.uint8)[:, None, None].expand(3, 96, 48)
    return torch.stack([data.image_ops((96, 48))[name](red) for _ in range(100)])


def smallest_share(views):
    """The smallest part of an image that is still red, and not black from outside."""
    return (views[:, 0] > 0).float().mean(dim=(1, 2)).min()


def test_policies_that_only_move():
    assert red_views("randaugment")[:, 1:].any() and red_views("trivialaugment")[:, 1:].any()
    with variant("moves"):
        assert policies() == {(), ("Rotate",), ("ShearX",)}
        assert not red_views("trivialaugment")[:, 1:].any() and not red_views("randaugment")[:, 1:].any()
    assert red_views("randaugment")[:, 1:].any()                        # nothing stays replaced


def test_small_moves():
    assert smallest_share(red_views("trivialaugment")) < 0.5
    with variant("moves", "small"):
        assert 0.75 < smallest_share(red_views("trivialaugment")) < 1


def test_wrong_synonyms():
    def synonym():
        return data.augment_caption("man", random.Random(0), deletion=0, synonym=1)

    assert synonym() in ("male", "guy", "gentleman")
    with variant("senses"):
        assert synonym() not in ("man", "male", "guy", "gentleman")
    assert synonym() in ("male", "guy", "gentleman")
