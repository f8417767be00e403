"""Training: recipes, learning rate, and the losses of a step."""

import functools

import pytest
import torch
import torch.nn.functional as F

import data
import losses
import tbps
from lab.people import draw

NO_AMP = functools.partial(torch.autocast, "cpu", enabled=False)


# ---- recipes and schedule -------------------------------------------------------------------------------------------

def test_learning_rate():
    golden = {
        0: 1e-6,
        1: 1.4691943127962084e-6,
        211: 1e-4,
        212: 1e-4,
        213: 9.999967403485945e-5,
        636: 5.25e-5,
        1059: 5.000325965140551e-6,
    }
    for it, lr in golden.items():
        assert tbps.lr_at(it, 212, tbps.TBPS_CLIP) == pytest.approx(lr, rel=1e-12)


@pytest.mark.parametrize(
    "method, trained, decayed, undecayed",
    [("tbps-clip", 149_162_625, 103, 202), ("tbps-clip-simplified", 149_030_913, 101, 200)],
)
def test_what_is_trained_at_full_size(method, trained, decayed, undecayed):
    """The counts of the paper; the official optimizer also holds the frozen convolution: one more decayed tensor."""
    recipe, heads, _ = tbps.METHODS[method]
    with torch.device("meta"):
        model = tbps.DualEncoder(
            **tbps.SIZES["ViT-B/16"], lock_patch=recipe["lock_patch"], text_dropout=recipe["text_dropout"]
        )
        assert sum(p.numel() for p in model.parameters()) == 149_620_737
        for name, head in heads(recipe, model, 11003).items():
            model.heads[name] = head
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == trained
    groups = tbps.make_optimizer(model, recipe, fused=False).param_groups
    assert [len(g["params"]) for g in groups] == [decayed, undecayed]
    assert [g["weight_decay"] for g in groups] == [0.02, 0.0]
    assert sum(p.numel() for p in model.text.blocks[0].parameters()) == 3_152_384


def test_set_is_checked():
    args, recipe = tbps.parse_args(["--set", "mvs=1", "tau=0.01", "image_aug=flip", "--epochs", "3"])
    assert recipe["mvs"] is True and recipe["tau"] == 0.01 and recipe["image_aug"] == "flip" and recipe["epochs"] == 3
    assert args.method == "tbps-clip-simplified" and args.out == "runs/toy-tbps-clip-simplified-0"
    assert recipe["citc"] == 0
    assert tbps.parse_args(["--dataset", "cuhk"])[0].method == "tbps-clip"
    for bad, words in (
        ("mvss=1", "has no key 'mvss'; it has epochs"),
        ("batch=x", "a whole number, not 'x'"),
        ("mvs=2", "0 or 1"),
        ("sampler=all", "one of random, random-count"),
        ("image_aug=cut", "one of pool"),
    ):
        with pytest.raises(ValueError, match=words):
            tbps.parse_args(["--set", bad])
    assert tbps.KEYS.keys() == (tbps.CTLG | tbps.UIT | tbps.TBPS_CLIP).keys()


@pytest.mark.parametrize("method", tbps.METHODS)
def test_help_shows_the_keys_of_one_method(method, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    with pytest.raises(SystemExit):
        tbps.parse_args([f"--method={method}", "--help"])
    said = capsys.readouterr().out
    keys = said.split("(other methods: --method M --help):\n")[1].split("\n\n")[0]
    shown = [line.split()[0] for line in keys.splitlines()]
    assert shown == list(tbps.METHODS[method][0]) and len(said.splitlines()) < 130


def test_the_effective_recipe_is_printed():
    """What differs from the published recipe, by reason."""
    args, recipe = tbps.parse_args(["--epochs", "3", "--set", "citc=0.5"])
    lines = tbps.format_recipe(args, recipe, tbps.SIMPLIFIED).splitlines()
    assert lines[0] == "recipe: tbps-clip-simplified as published, except"
    assert lines[1].startswith("  command line: epochs=3") or lines[2] == "  command line: epochs=3 citc=0.5"
    shown = dict(pair.split("=") for line in lines[1:] for pair in line.split(": ")[1].split())
    assert shown == {k: str(v) for k, v in recipe.items() if v != tbps.SIMPLIFIED[k]} and shown["lr"] == "0.001"
    args, recipe = tbps.parse_args(["--dataset", "cuhk"])
    assert tbps.format_recipe(args, recipe, tbps.TBPS_CLIP) == "recipe: tbps-clip as published"


# ---- the losses of a step -------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def setting(people):
    """A tiny model without dropout, and a batch with every view there is."""
    torch.manual_seed(0)
    tokenizer = data.train_tokenizer([c for r in people for c in r["captions"]], vocab=600)
    recipe = tbps.TBPS_CLIP | dict(mvs_text=True, ss_text=0.3, itc=0.7, text_dropout=0.0, soft=0.3, soft_ramp=2.0)
    model = tbps.DualEncoder(
        **tbps.SIZES["toy"] | dict(vocab=tokenizer.vocab, image_layers=1, text_layers=1, lock_patch=True)
    )
    for name, head in tbps.tbps_clip_heads(recipe, model, 3).items():
        model.heads[name] = head
    pairs = data.Pairs(people, (96, 48), views=2, self_views=2, texts=2, self_texts=2, text=dict(deletion=0.1))
    return model.double(), recipe, data.collate(tokenizer, [pairs[0, i] for i in (0, 1, 9, 20, 30, 40)])


def one_by_one(model, batch, recipe, alpha):
    """The same objective in the naive form: a pass per view, and passes of their own for the teacher."""
    with torch.no_grad():
        teachers = [
            [model.encode_image(batch["pixels"][v].double()) for v in (0, 1)],
            [model.encode_text(batch["tokens"][u]) for u in (0, 1)],
        ]
    images = [model.encode_image(p.double()) for p in batch["pixels"]]
    texts = [model.encode_text(t) for t in batch["tokens"]]
    scale, pid = model.scale(), batch["pid"]
    nitc = sum(losses.nitc(images[v], texts[v], pid, scale, alpha, teachers[0][v], teachers[1][v]) for v in (0, 1)) / 2
    return (
        recipe["itc"] * losses.itc(images[0], texts[0], scale)
        + recipe["nitc"] * nitc
        + recipe["ritc"] * losses.ritc(images[0], texts[0], pid, scale, 0.01)
        + recipe["citc"] * losses.citc(images[0], texts[0])
        + recipe["ss"] * losses.nt_xent(*[model.heads["ss"](x) for x in images[2:]])
        + recipe["ss_text"] * losses.nt_xent(*[model.heads["ss_text"](x) for x in texts[2:]])
    )


def test_stacked_views_are_the_same_objective(setting):
    model, recipe, batch = setting
    batch = batch | dict(pixels=batch["pixels"].double())
    gradients = []
    for total in (
        lambda: sum(tbps.tbps_clip_losses(model, batch, recipe, 1.0, NO_AMP).values()),
        lambda: one_by_one(model, batch, recipe, 0.15),
    ):
        model.zero_grad()
        value = total()
        value.backward()
        gradients.append([value.detach()] + [p.grad.clone() for p in model.parameters() if p.requires_grad])
    assert len(gradients[0]) > 30
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    assert model.image.patch.weight.grad is None


@pytest.mark.parametrize(
    "change, gone",
    [
        (dict(itc=0.0), "itc"),
        (dict(nitc=0.0), "nitc"),
        (dict(ritc=0.0), "ritc"),
        (dict(citc=0.0), "citc"),
        (dict(ss=0.0), "ss"),
        (dict(ss_text=0.0), "ss_text"),
    ],
)
def test_each_loss_can_be_left_out(setting, change, gone):
    model, recipe, batch = setting
    batch = batch | dict(pixels=batch["pixels"].double())
    every = tbps.tbps_clip_losses(model, batch, recipe, 5.0, NO_AMP)
    some = tbps.tbps_clip_losses(model, batch, recipe | change, 5.0, NO_AMP)
    assert every.keys() - some.keys() == {gone} and all(torch.equal(some[k], every[k]) for k in some)


def test_the_weights_of_the_full_recipe(setting):
    """Full = mean of two N-ITC + R-ITC + 0.4 SS + 0.1 C-ITC; simplified = N-ITC + R-ITC."""
    r = tbps.TBPS_CLIP
    assert (r["nitc"], r["ritc"], r["ss"], r["citc"], r["itc"], r["soft"]) == (1, 1, 0.4, 0.1, 0, 0.5)
    assert r["mvs"] and not r["mvs_text"]
    s = tbps.SIMPLIFIED
    assert {k for k in r if r[k] != s[k]} == {"ss", "mvs", "citc"} and not any(s[k] for k in ("ss", "mvs", "citc"))
    model, _, batch = setting
    batch = dict(pixels=batch["pixels"].double(), tokens=batch["tokens"][:1], pid=batch["pid"])
    parts = tbps.tbps_clip_losses(model, batch, r | dict(text_dropout=0.0), 1.0, NO_AMP)
    image, text = [model.encode_image(p) for p in batch["pixels"]], model.encode_text(batch["tokens"][0])
    scale, pid = model.scale(), batch["pid"]
    two = [losses.nitc(image[v], text, pid, scale, 0.5) for v in (0, 1)]
    want = dict(
        nitc=(two[0] + two[1]) / 2, ritc=losses.ritc(image[0], text, pid, scale),
        citc=0.1 * losses.citc(image[0], text),
        ss=0.4 * losses.nt_xent(model.heads["ss"](image[2]), model.heads["ss"](image[3])),
    )
    assert {k: v.item() for k, v in parts.items()} == pytest.approx({k: v.item() for k, v in want.items()}, rel=1e-9)


def test_the_teachers_text_pass(setting):
    """With dropout, a pass of its own makes the teacher differ; without one the teacher is the student."""
    model, recipe, batch = setting
    batch = batch | dict(pixels=batch["pixels"].double())
    for block in model.text.blocks:
        block.attn.dropout = 0.3
    values = {}
    for own in (True, False):
        torch.manual_seed(3)
        values[own] = tbps.tbps_clip_losses(
            model.train(), batch, recipe | dict(text_dropout=0.3, teacher_pass=own), 5.0, NO_AMP
        )
    for block in model.text.blocks:
        block.attn.dropout = 0.0
    assert values[True]["nitc"] != values[False]["nitc"] and values[True]["ritc"] == values[False]["ritc"]


def test_the_scale_is_limited_but_its_gradient_is_not():
    model = tbps.DualEncoder(**tbps.SIZES["toy"] | dict(image_layers=1, text_layers=1))
    model.logit_scale.data.fill_(torch.tensor(200.0).log())
    scale = model.scale()
    (3 * scale).backward()
    assert scale.item() == 100 and model.logit_scale.grad.item() == pytest.approx(3 * 200, rel=1e-5)


def test_what_the_objective_learns():
    """A few steps on one fixed batch bring every loss down: the signs are right, and gradients reach both towers."""
    torch.manual_seed(0)
    people = draw("train", persons=6)[::2]
    tokenizer = data.train_tokenizer([c for r in people for c in r["captions"]], vocab=600)
    recipe = tbps.TBPS_CLIP | dict(lr=1e-3)
    pairs = data.Pairs(people, (96, 48), views=2, self_views=2)
    batch = data.collate(tokenizer, [pairs[0, i] for i in range(0, 24, 2)])
    model = tbps.DualEncoder(**tbps.SIZES["toy"] | dict(vocab=tokenizer.vocab, image_layers=1, text_layers=1))
    for name, head in tbps.tbps_clip_heads(recipe, model, 3).items():
        model.heads[name] = head
    optimizer, seen = tbps.make_optimizer(model, recipe, fused=False), []
    for _ in range(40):
        parts = tbps.tbps_clip_losses(model, batch, recipe, 0.0, NO_AMP)
        seen.append({k: v.item() for k, v in parts.items()})
        optimizer.zero_grad()
        sum(parts.values()).backward()
        optimizer.step()
    assert all(seen[-1][k] < seen[0][k] for k in ("nitc", "ritc", "ss"))
    assert seen[-1]["nitc"] < 0.5 * seen[0]["nitc"]
    assert (
        F.cosine_similarity(model.encode_image(batch["pixels"][0]), model.encode_text(batch["tokens"][0])).mean() > 0.2
    )
