"""The probes of lab/probes.py: what they remove, rewind, freeze and drop; the test sets of lab/domain_shift.py, the changes of lab/train_variants.py."""

import json
import random
import re
from contextlib import ExitStack

import numpy as np
import pytest
import torch
from PIL import Image

import data
import lab.people
import tbps
from lab import domain_shift, probes, train_variants
from conftest import run


def little():
    return tbps.DualEncoder(32, (16, 16), 8, 32, 2, 32, 3, 100, head_width=16).eval()


@torch.no_grad()
def test_a_removed_layer_is_one_that_is_not_there():
    model, pixels = little(), torch.randn(2, 3, 16, 16)
    weights = {n: w.clone() for n, w in model.state_dict().items()}
    model.load_state_dict(probes.removed(weights, ("image", 1, "layer")))
    found = model.encode_image(pixels)
    model.load_state_dict(weights)
    whole = model.encode_image(pixels)
    model.image.blocks = model.image.blocks[:1]
    assert torch.allclose(found, model.encode_image(pixels), atol=1e-6) and not torch.allclose(found, whole, atol=1e-3)
    part = probes.removed(weights, ("text", 2, "attention"))
    assert {n for n in weights if not torch.equal(part[n], weights[n])} == {"text.blocks.2.attn.proj.weight"}       # its bias is 0 at the start


def test_contributions():
    """On a score that is a formula of the weights."""
    model = little()
    after = {n: torch.ones_like(w) for n, w in model.state_dict().items()}
    before = {n: torch.zeros_like(w) for n, w in after.items()}
    worth = {("image", 0, "attention"): 40, ("text", 1, "feed-forward"): 10, ("text", 2, "attention"): 2}

    def score(weights):
        return 50 + sum(value * weights[f"{tower}.blocks.{n}.{'attn.proj' if part == 'attention' else 'fc2'}.weight"].mean().item() for (tower, n, part), value in worth.items())
    found = probes.contributions(score, after, before, probes.modules(model))
    assert len(found) == 15 and found["image", 0, "attention"] == pytest.approx((40, 1, 1.0)) and found["image", 0, "layer"] == pytest.approx((40, 1, 1.0))
    assert found["text", 1, "feed-forward"] == pytest.approx((10, 0.25, 0.8)) and found["text", 1, "attention"] == pytest.approx((0, 0, 0))
    assert found["text", 2, "attention"] == pytest.approx((2, 0.05, 0))      # less than 3 points may be lost
    mixed = probes.rewound(after, before, ("text", 1, "attention"), 0.3)
    assert {n for n in after if not torch.equal(mixed[n], after[n])} == {f"text.blocks.1.{n}" for n in ("ln1.weight", "ln1.bias", "attn.qkv.weight", "attn.qkv.bias", "attn.proj.weight", "attn.proj.bias")}
    assert mixed["text.blocks.1.ln1.bias"][0].item() == pytest.approx(0.3)


@pytest.mark.parametrize("method, millions", [("tbps-clip", (149.2, 146.0, 142.9, 139.7, 136.6, 133.4)), ("tbps-clip-simplified", (149.0, 145.9, 142.7, 139.6, 136.4, 133.3))])
def test_what_is_left_to_train_at_full_size(method, millions, monkeypatch):
    """The table of the paper."""
    recipe, heads, _ = tbps.METHODS[method]

    def build(*_):
        with torch.device("meta"):
            model = tbps.DualEncoder(**tbps.SIZES["ViT-B/16"], lock_patch=True)
            for name, head in heads(recipe, model, 11003).items():
                model.heads[name] = head
            return model
    monkeypatch.setattr(tbps, "build", build)
    for layers, count in zip(([], [7], [7, 8], [3, 7, 8], [3, 5, 7, 8], [3, 5, 6, 7, 8]), millions):
        for how in ("freeze", "drop"):
            assert sum(p.numel() for p in probes.without(layers, how)[1]().parameters() if p.requires_grad) / 1e6 == pytest.approx(count, abs=0.06)
    assert len(probes.without([3, 7], "drop")[1]().text.blocks) == 10
    with pytest.raises(ValueError, match="layers 0 to 11, not 12"):
        probes.without([12], "freeze")[1]()


def test_the_commands(cuhk, tmp_path, monkeypatch):
    base = ["--dataset", "cuhk", "--data-root", cuhk, "--method", "baseline", "--size", "toy", "--workers", "0", "--set", "batch=8", "epochs=1", "height=96", "width=48", "warmup=0"]
    run("tbps.py", *base, "--clip", "none", "--out", tmp_path / "a")
    for how, layers in (("freeze", 2), ("drop", 1)):
        with monkeypatch.context() as patch:                            # the command replaces it in this process
            patch.setattr(tbps, "build", tbps.build)
            patch.setattr(tbps, "parse_args", tbps.parse_args)
            assert "test R@1" in run("lab/probes.py", how, "0", *base, "--clip", tmp_path / "a/best.pt", "--out", tmp_path / how)
        with monkeypatch.context() as patch:
            patch.setattr(tbps, "build", tbps.build)
            patch.setattr(tbps, "parse_args", tbps.parse_args)
            assert f"layers: '{how} [0]' then, '{how} [1]' now" in run("lab/probes.py", how, "1", *base, "--clip", tmp_path / "a/best.pt", "--out", tmp_path / how, "--resume", code=2)
        a, b = (torch.load(tmp_path / f"{n}/best.pt", weights_only=True) for n in ("a", how))
        assert b["arch"]["text_layers"] == layers
        same = {n: torch.equal(w, b["weights"][n]) for n, w in a["weights"].items() if n.startswith("text.blocks.0.") and n in b["weights"]}
        assert all(same.values()) == (how == "freeze")
    said = run("lab/probes.py", "modules", "--checkpoint", tmp_path / "freeze/best.pt", "--before", tmp_path / "a/best.pt", "--page", tmp_path / "p.html")
    assert said.count("C1 ") == 12 and (tmp_path / "p.html").read_text().count("<tr>") == 5
    assert "another architecture" in run("lab/probes.py", "modules", "--checkpoint", tmp_path / "drop/best.pt", "--before", tmp_path / "a/best.pt", "--page", tmp_path / "q.html", code=2)


@pytest.fixture
def few_people(monkeypatch):
    monkeypatch.setattr(lab.people, "PERSONS", dict.fromkeys(lab.people.PERSONS, 12))


def test_domains_differ_in_one_thing(few_people):
    found = {name: domain_shift.records(name, "test") for name in domain_shift.SETS}
    toy, camera, usual = (found[name] for name in ("toy", "other-camera", "usual-words"))
    for a, b in zip(toy, camera, strict=True):
        assert a["captions"] == b["captions"] and a["attributes"] == b["attributes"] and np.array_equal(a["parts"], b["parts"])
        assert not np.array_equal(a["image"], b["image"])
    assert toy[0]["image"].std() > camera[0]["image"].std()             # paler
    assert [r["attributes"] for r in usual] == [r["attributes"] for r in toy]
    assert any(c.startswith(("Dressed", "Carrying")) for r in toy for c in r["captions"]) and not any(c.startswith(("Dressed", "Carrying")) for r in usual for c in r["captions"])
    assert [r["pid"] for r in found["fronts"]] == [r["pid"] for r in found["backs"]] == [r["pid"] for r in toy[::2]]
    assert not any("glasses" in r["visible"] for r in found["backs"]) and any("glasses" in r["visible"] for r in found["fronts"])
    assert {r["attributes"]["top"] for r in found["toy-generic"]} != {r["attributes"]["top"] for r in toy}
    assert lab.people.paint is domain_shift.PAINT                              # nothing stays exchanged


def test_the_table_of_domains(few_people, tmp_path):
    for seed in (0, 1):
        said = run("lab/domain_shift.py", "--only", "fronts", "--train", "--dataset", "toy", "--out", tmp_path / f"some_name-{seed}", "--seed", seed, "--workers", 0,
                   "--set", "epochs=1", "batch=16", "warmup=0")
        assert "test R@1" in said
    assert '"at": [0, 3], "epoch": 1.0' in (tmp_path / "some_name-0/log.jsonl").read_text()                # 48 captions of 12 persons, 2 views each
    said = run("lab/domain_shift.py", *(tmp_path / f"some_name-{seed}/best.pt" for seed in (0, 1)), "--only", "toy", "toy-generic")
    assert "| R@1 | seeds | toy | toy-generic |" in said and "| some name | 2 |" in said and said.count("±") == 2
    assert "| some name | 1 |" in run("lab/domain_shift.py", tmp_path / "some_name-0/best.pt", "--only", "toy")
    assert "takes one set" in run("lab/domain_shift.py", "--train", "--dataset", "toy", code=2) and "name checkpoints" in run("lab/domain_shift.py", code=2)


def test_explain(few_people, tmp_path):
    halves = Image.fromarray(np.concatenate([np.full((48, 48, 3), colour, np.uint8) for colour in ((200, 0, 0), (0, 0, 200))]))           # red above, blue below

    def views(*changes):
        """Of 40 views the most green, the least and the largest share of red."""
        torch.manual_seed(0)
        mean, std = (torch.tensor(v)[:, None, None] for v in data.NORMS["imagenet"])
        seen = [255 * (train_variants.changed_self_view(changes)((96, 48))(halves) * std + mean) for _ in range(40)]
        red = [(v[0] > v[2]).float().mean().item() for v in seen]
        return max(v[1].max().item() for v in seen), min(red), max(red)
    green, least, most = views()
    assert green > 20
    green, least, most = views("colours")
    assert green < 1 and least < 0.25
    green, least, most = views("colours", "crops")
    assert green < 1 and 0.3 < least < most < 0.7

    def first(out, *script):
        """The first logged loss of self-supervision."""
        run(*script, "--dataset", "toy", "--workers", 0, "--out", tmp_path / out, "--set", "epochs=1", "batch=16", "warmup=0", "ss=0.4")
        return json.loads((tmp_path / out / "log.jsonl").read_text().splitlines()[0])["ss"]
    assert first("a", "lab/train_variants.py", "colours,crops") != first("b", "tbps.py") == first("c", "tbps.py")              # and nothing stays exchanged
    assert tbps.read_file(tmp_path / "a/last.pt")["args"]["changes"] == "colours,crops"                                   # or --resume would not notice
    assert "name changes" in run("lab/train_variants.py", "--dataset", "toy", code=2)


def test_explained_augmentations():
    mean, std = (torch.tensor(v)[:, None, None] for v in data.NORMS["imagenet"])
    records, colours = lab.people.draw("train", persons=3), re.compile(rf"\b({'|'.join(data.COLOURS)})\b", re.I)

    def vary():
        """Of many draws: (whether the picture is grey, how many of its caption's colours are left out)."""
        pairs = data.Pairs(records, (96, 48), views=1, image_aug="gray", back_translation=0, text=dict(deletion=0))
        for pairs.epoch in range(4):
            for i, item in enumerate(pairs):
                yield bool(((item["pixels"][0] * std + mean).std(0) < 1e-3).all()), len(colours.findall(pairs.captions[i])) - len(colours.findall(item["captions"][0]))

    def views(name):
        """Of a red picture."""
        red = torch.tensor((200, 0, 0), dtype=torch.uint8)[:, None, None].expand(3, 96, 48)
        return torch.stack([data.image_ops((96, 48))[name](red) for _ in range(100)])
    assert {left for _, left in vary()} == {0}
    with ExitStack() as stack:
        for patch in train_variants.patches(["untold", "moves", "senses"]):
            stack.enter_context(patch)
        told = list(vary())
        assert {left for grey, left in told if not grey} == {0} and max(left for grey, left in told if grey) > 1
        assert data.augment_caption("man", random.Random(0), deletion=0, synonym=1) not in ("man", "male", "guy", "gentleman")
        assert {tuple(sorted({name for name, *_ in policy})) for policy in data.image_ops((96, 48))["autoaugment"]._policies} == {(), ("Rotate",), ("ShearX",)}
        assert not views("trivialaugment")[:, 1:].any() and not views("randaugment")[:, 1:].any()                      # red and black
    with ExitStack() as stack:
        for patch in train_variants.patches(["moves", "small"]):
            stack.enter_context(patch)
        assert 0.75 < (views("trivialaugment")[:, 0] > 0).float().mean(dim=(1, 2)).min() < 1
    assert data.augment_caption("man", random.Random(0), deletion=0, synonym=1) in ("male", "guy", "gentleman")          # and nothing stays exchanged
    assert views("randaugment")[:, 1:].any() and (trivial := views("trivialaugment"))[:, 1:].any() and (trivial[:, 0] > 0).float().mean(dim=(1, 2)).min() < 0.5
