"""IRRA and UIT: restoration, word guessing, recipes, and their training as a user runs it."""

import functools
import json
import math
import os
import random
import shutil
import signal

import pytest
import torch
import torch.nn.functional as F

import data
import losses
import tbps
from conftest import error, run
from lab.people import draw
from test_model import made_up_merges

NO_AMP = functools.partial(torch.autocast, "cpu", enabled=False)


def with_heads(model, recipe, persons, method="uit"):
    for name, head in tbps.METHODS[method][1](recipe, model, persons).items():
        model.heads[name] = head
    return model


@pytest.fixture(scope="module")
def setting(people):
    """A tiny model in float64 with every head, and a batch of six pairs, two of them of one person."""
    torch.manual_seed(0)
    tokenizer = data.train_tokenizer([c for r in people for c in r["captions"]], vocab=600, mask=True)
    recipe = tbps.UIT | dict(mlm=1.0, itc=0.5, cmpm=0.5, depth=1, tau=0.02)
    model = tbps.DualEncoder(**tbps.SIZES["toy"] | dict(vocab=tokenizer.vocab, image_layers=1, text_layers=2))
    pairs = data.Pairs(people, (96, 48), image_aug="reid", norm="clip")
    batch = data.collate(tokenizer, [pairs[0, i] for i in (0, 1, 9, 20, 30, 40)], mask=(0.3, 0.05))
    model.logit_scale.data.fill_(math.log(50))
    return with_heads(model, recipe, pairs.persons).double(), recipe, batch | dict(pixels=batch["pixels"].double())


# ---- the parts ------------------------------------------------------------------------------------------------------

def test_fixed_positions():
    pos = tbps.sincos_grid((24, 8), 512)
    assert pos.shape == (193, 512) and not pos[0].any()
    for patch, golden in (
        (1, {0: math.sin(1), 128: math.cos(1), 256: 0, 384: 1}),
        (8, {0: 0, 128: 1, 256: math.sin(1), 384: math.cos(1)}),
    ):
        assert {k: pos[1 + patch, k].item() for k in golden} == pytest.approx(golden, abs=1e-6)


def test_patches():
    """2 x 1 patches of 2 x 2 pixels: row, column, channel; and back."""
    pixels = torch.arange(24.0).view(1, 3, 4, 2)                        # channel c, row y, column x: 8 c + 2 y + x
    patches = tbps.patchify(pixels, 2)
    assert patches[0, 1].tolist() == [4, 12, 20, 5, 13, 21, 6, 14, 22, 7, 15, 23]
    assert torch.equal(tbps.unpatchify(patches, (2, 1), 2), pixels)
    assert tbps.patchify(torch.zeros(1, 3, 7, 5), 2).shape == (1, 6, 12)


def test_grey_is_grey():
    pixels = torch.tensor([1.0, 2.0, 3.0]).view(1, 3, 1, 1)
    assert tbps.grey(pixels).flatten().tolist() == pytest.approx([0.2989 + 2 * 0.5870 + 3 * 0.1140] * 3)


def test_uit_at_full_size():
    """The count of the specification: 24 x 8 patches, 11,003 persons, without what the official code never uses."""
    with torch.device("meta"):
        model = with_heads(tbps.DualEncoder(**tbps.SIZES["ViT-B/16"] | dict(image_size=(384, 128))), tbps.UIT, 11003)
    assert model.image.grid == (24, 8)
    assert sum(p.numel() for n, p in model.named_parameters() if n != "logit_scale") == 169_584_635
    assert sum(p.numel() for n, p in model.named_parameters() if not n.startswith("heads.")) == 149_617_665


@pytest.mark.parametrize("released, visible, scored", [(False, 57, 135), (True, 56, 135)])
def test_what_is_dropped(released, visible, scored, monkeypatch):
    """Of 24 x 8 patches at 0.7: all that are dropped are scored, or, as released, one is neither visible nor scored."""
    model = tbps.DualEncoder(**tbps.SIZES["toy"] | dict(image_size=(192, 64), vocab=100, image_layers=1))
    with_heads(model, recipe := tbps.UIT | dict(official=released, depth=1, id=0.0), 3)
    seen, whole = [], model.image_tokens
    monkeypatch.setattr(
        model, "image_tokens", lambda pixels, patch_ids: seen.append(patch_ids) or whole(pixels, patch_ids)
    )
    restored, dropped = tbps.restore(model, torch.randn(2, 3, 192, 64), torch.randn(2, 5, 128), None, recipe)
    assert seen[0].shape == (2, visible) and dropped.sum(dim=1).tolist() == [scored, scored]
    assert restored.shape == (2, 192, 192)
    assert not dropped.gather(1, seen[0]).any()


def test_restoration_sees_nothing_of_what_is_dropped(setting):
    model, recipe, batch = setting
    pixels, patch = batch["pixels"][0], model.arch["patch"]
    text = torch.randn(6, 4, 128, dtype=torch.float64)
    one, dropped = tbps.restore(model, pixels, text, None, recipe, torch.Generator().manual_seed(5))
    patches = tbps.patchify(pixels, patch)
    changed = tbps.unpatchify(
        torch.where(dropped[..., None], torch.randn_like(patches), patches), model.image.grid, patch
    )
    assert torch.equal(one, tbps.restore(model, changed, text, None, recipe, torch.Generator().manual_seed(5))[0])
    # nor any colour: two images of the same grey
    turned = pixels + torch.tensor([0.1140, 0.0, -0.2989])[:, None, None] * 2
    torch.testing.assert_close(
        one, tbps.restore(model, turned, text, None, recipe, torch.Generator().manual_seed(5))[0]
    )
    assert not torch.allclose(
        one,
        tbps.restore(
            model, pixels, text + 1.0 * torch.randn_like(text), None, recipe, torch.Generator().manual_seed(5)
        )[0],
    )


def test_patches_return_to_their_places():
    """With embed and attention close to the identity, the head's input has each visible token where its patch is."""
    restorer = tbps.RestorationHead(64, 32, 1, (3, 2), 4)
    found = []
    restorer.cross_encoder.forward = lambda x, text, context_mask=None: found.append(x) or x
    order = torch.tensor([[4, 1, 5, 0, 2, 3]])
    visible = torch.randn(1, 3, 64)                                     # class token, patch 4, patch 1
    restorer(visible, order, torch.randn(1, 2, 64))
    tokens = restorer.embed(restorer.ln(visible))[0]
    want = [tokens[0], restorer.mask, tokens[2], restorer.mask, restorer.mask, tokens[1], restorer.mask]
    torch.testing.assert_close(found[0][0], torch.stack(want) + restorer.pos)


def test_there_is_no_residual_around_the_cross_attention():
    """All queries that look at one and the same token get the same, whoever asks."""
    torch.manual_seed(0)
    look = tbps.CrossEncoder(64, 32, 2)
    out = look(torch.randn(2, 5, 64), torch.randn(2, 1, 64))
    torch.testing.assert_close(out, out[:, :1].expand_as(out))
    assert not torch.allclose(out[0], out[1])


def test_only_visible_patches_go_through_the_transformer(setting):
    """keep = all patches in order is the whole image; a kept patch has the position that is its own."""
    model, _, batch = setting
    pixels = batch["pixels"][0]
    N = math.prod(model.image.grid)
    torch.testing.assert_close(model.image_tokens(pixels, torch.arange(N).expand(6, N)), model.image_tokens(pixels))
    some = torch.tensor([3, 17, 40]).expand(6, 3)
    lengths = []
    hook = model.image.blocks[0].register_forward_pre_hook(lambda module, inputs: lengths.append(inputs[0].shape))
    tokens = model.image_tokens(pixels, some)
    hook.remove()
    assert tokens.shape == (6, 4, 128) and lengths == [(6, 4, 128)]


# ---- a step ---------------------------------------------------------------------------------------------------------

def test_a_step_by_its_parts(setting):
    """The losses of a step are those of `losses.py` on features computed one by one."""
    model, recipe, batch = setting
    torch.manual_seed(1)
    parts = tbps.irra_losses(model, batch, recipe, 0.0, NO_AMP)
    pixels, masked, pid = batch["pixels"][0], batch["masked"], batch["pid"]
    image, text = model.encode_image(pixels), model.encode_text(masked)
    want = dict(
        itc=0.5 * losses.itc(image, text, 50), sdm=losses.sdm(image, text, pid, 50),
        cmpm=0.5 * losses.cmpm(image, text, pid),
        id=losses.id_loss(model.heads["id"](image), model.heads["id"](text), pid),
        triplet=10 * losses.triplet(image, text, pid),
    )
    tokens = model.text_tokens(masked)
    seen = torch.arange(tokens.shape[1]) <= masked.argmax(1)[:, None]
    logits = model.heads["mlm"](tokens, model.image_tokens(pixels), batch["positions"], seen)
    want["mlm"] = F.cross_entropy(logits, batch["targets"])
    torch.manual_seed(1)
    restored, dropped = tbps.restore(model, pixels, tokens, seen, recipe)
    want["restoration"] = 10 * (restored - tbps.patchify(pixels, 8))[dropped].square().mean()
    assert list(parts) == list(want)
    assert {k: v.item() for k, v in parts.items()} == pytest.approx({k: v.item() for k, v in want.items()}, rel=1e-6)


def test_masked_captions_everywhere_or_for_guessing_only(setting):
    model, recipe, batch = setting
    values = {}
    for everywhere in (True, False):
        torch.manual_seed(1)
        values[everywhere] = tbps.irra_losses(model, batch, recipe | dict(mask_all=everywhere), 0.0, NO_AMP)
    # guessing always reads the masked ones
    assert values[True]["mlm"].item() == pytest.approx(values[False]["mlm"].item())
    assert all(values[True][k] != values[False][k] for k in ("itc", "sdm", "cmpm", "id", "triplet", "restoration"))
    clean = losses.sdm(model.encode_image(batch["pixels"][0]), model.encode_text(batch["tokens"][0]), batch["pid"], 50)
    assert values[False]["sdm"].item() == pytest.approx(clean.item())


def restore_without_official_drop(restore, model, pixels, text_tokens, seen, recipe):
    return restore(model, pixels, text_tokens, seen, recipe | dict(official=False))


def test_padding_counts_for_nothing_unless_asked(setting, monkeypatch):
    """A caption's losses do not depend on how long the others are; with official=1 all 77 positions are attended to."""
    model, recipe, batch = setting
    pixels, tokens = batch["pixels"][0][:1], batch["masked"][:1]
    length = int(tokens.argmax(1)) + 1
    seen = torch.arange(tokens.shape[1]) < length
    order = torch.Generator().manual_seed(0)
    short = tbps.restore(model, pixels, model.text_tokens(tokens), None, recipe, order)[0]
    long = tbps.restore(
        model, pixels, model.text_tokens(tokens, trim=False), seen[None], recipe, torch.Generator().manual_seed(0)
    )[0]
    torch.testing.assert_close(short, long)
    monkeypatch.setattr(tbps, "restore", functools.partial(restore_without_official_drop, tbps.restore))

    def values(batch, official):
        torch.manual_seed(1)
        parts = tbps.irra_losses(model, batch, recipe | dict(official=official), 0.0, NO_AMP)
        return {name: value.item() for name, value in parts.items()}

    T, at = batch["masked"].shape[1], batch["positions"]
    padded = batch | {k: F.pad(batch[k], (0, 77 - T)) for k in ("masked", "tokens")}
    padded["positions"] = at // T * 77 + at % T
    want, found = values(batch, False), values(padded, True)
    assert values(padded, False) == pytest.approx(want, rel=1e-9)
    assert {k for k in want if found[k] != pytest.approx(want[k], rel=1e-9)} == {"mlm", "restoration"}


@pytest.mark.parametrize(
    "change, gone", [({k: 0.0}, k) for k in ("itc", "sdm", "cmpm", "id", "triplet", "mlm", "restoration")]
)
def test_each_loss_can_be_left_out(setting, change, gone):
    model, recipe, batch = setting
    torch.manual_seed(1)
    every = tbps.irra_losses(model, batch, recipe, 0.0, NO_AMP)
    torch.manual_seed(1)
    some = tbps.irra_losses(model, batch, recipe | change, 0.0, NO_AMP)
    assert every.keys() - some.keys() == {gone}
    assert {k: v.item() for k, v in some.items()} == pytest.approx({k: every[k].item() for k in some}, rel=1e-9)
    fresh = tbps.DualEncoder(**tbps.SIZES["toy"] | dict(vocab=100))
    heads = tbps.irra_heads(recipe | change, fresh, 3)
    assert set(heads) == {"id", "mlm", "restoration"} - {gone}


def gradients_are_where_they_should_be(model, recipe, batch):
    """Every parameter learns, but for the temperature, which the recipe fixes."""
    parts = tbps.irra_losses(model, batch, recipe, 0.0, NO_AMP)
    sum(parts.values()).backward()
    for name, p in model.named_parameters():
        if name == "logit_scale":
            assert p.grad is None
        else:
            assert p.grad is not None and p.grad.isfinite().all() and p.grad.any(), name
    return parts


@pytest.mark.parametrize("method", ["uit", "irra"])
def test_gradients(method, people):
    torch.manual_seed(0)
    tokenizer = data.train_tokenizer([c for r in people for c in r["captions"]], vocab=600, mask=True)
    recipe = tbps.METHODS[method][0] | dict(depth=2)
    pairs = data.Pairs(people, (96, 48), image_aug="reid", norm="clip")
    batch = data.collate(tokenizer, [pairs[0, i] for i in range(0, 48, 4)], mask=tbps.mask_rates(recipe))
    model = with_heads(
        tbps.DualEncoder(**tbps.SIZES["toy"] | dict(vocab=tokenizer.vocab)), recipe, pairs.persons, method
    )
    model.logit_scale.requires_grad_(False)
    parts = gradients_are_where_they_should_be(model, recipe, batch)
    assert list(parts) == (["sdm", "id", "triplet", "restoration"] if method == "uit" else ["sdm", "id", "mlm"])


@pytest.mark.slow
@pytest.mark.parametrize("method, parameters", [("uit", 169_584_635), ("irra", 194_535_419)])
def test_a_step_at_full_size(method, parameters, people):
    """ViT-B/16, 384 x 128, 11,003 persons, batch 8, and one step of the optimizer moves every parameter that learns."""
    torch.manual_seed(0)
    recipe = tbps.METHODS[method][0]
    tokenizer = data.Tokenizer([m.split() for m in made_up_merges(48894)], mask=True)
    model = with_heads(tbps.DualEncoder(**tbps.SIZES["ViT-B/16"] | dict(image_size=(384, 128))), recipe, 11003, method)
    assert sum(p.numel() for p in model.parameters()) - 1 == parameters
    model.logit_scale.data.fill_(math.log(50))
    model.logit_scale.requires_grad_(False)
    pairs = data.Pairs(people, (384, 128), image_aug="reid", norm="clip", clean=False)
    optimizer = tbps.make_optimizer(model, recipe, fused=False)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    gradients_are_where_they_should_be(
        model, recipe, data.collate(tokenizer, [pairs[0, i] for i in range(0, 48, 6)], mask=tbps.mask_rates(recipe))
    )
    optimizer.step()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert before.keys() - moved == {"logit_scale"}


# ---- recipes --------------------------------------------------------------------------------------------------------

def test_learning_rate_per_epoch():
    factors = {
        1: 0.1,
        2: 0.28,
        3: 0.46,
        4: 0.64,
        5: 0.82,
        6: 1.0,
        30: 0.5 * (1 + math.cos(math.pi * 24 / 55)),
        60: 0.5 * (1 + math.cos(math.pi * 54 / 55)),
    }
    for epoch, factor in factors.items():
        for it in (532 * (epoch - 1), 532 * epoch - 1):  # the same from the first to the last step of an epoch
            assert tbps.lr_at(it, 532, tbps.UIT) == pytest.approx(1e-5 * factor, rel=1e-9)
    assert factors[30] == pytest.approx(0.599, abs=1e-3) and factors[60] == pytest.approx(0.0008, abs=1e-4)


def test_learning_rates_of_layers():
    recipe = tbps.UIT | dict(mlm=1.0)
    with torch.device("meta"):
        model = with_heads(tbps.DualEncoder(**tbps.SIZES["toy"] | dict(vocab=100)), recipe, 7)
    optimizer = tbps.make_optimizer(model, recipe, fused=False)
    assert isinstance(optimizer, torch.optim.Adam) and not isinstance(optimizer, torch.optim.AdamW)
    assert optimizer.defaults["eps"] == 1e-3
    group_of = {id(p): g for g in optimizer.param_groups for p in g["params"]}
    for name, p in model.named_parameters():
        group, bias = group_of[id(p)], name.endswith("bias")
        assert group["factor"] == (5 if name.startswith("heads.") else 2 if bias else 1), name
        assert group["weight_decay"] == (0 if bias else 4e-5), name
    named = {name: tbps.lr_factor(name, recipe | dict(official=True)) for name, _ in model.named_parameters()}
    assert {
        named["heads.restoration." + n]
        for n in (
            "cross_encoder.cross.q.weight",
            "cross_encoder.blocks.0.fc1.weight",
            "cross_encoder.blocks.0.ln1.weight",
        )
    } == {5}
    assert {
        named["heads.restoration." + n]
        for n in (
            "cross_encoder.cross.q.bias", "cross_encoder.blocks.1.attn.qkv.bias", "embed.bias", "ln.bias",
            "cross_encoder.ln_post.bias",
        )
    } == {2}
    assert {
        named["heads.restoration." + n]
        for n in (
            "embed.weight", "pixels.weight", "mask", "ln.weight", "cross_encoder.ln_mid.weight",
            "cross_encoder.ln_query.weight",
        )
    } == {1}
    assert {
        named[n]
        for n in (
            "heads.id.weight", "heads.id.bias", "heads.mlm.fc.weight", "heads.mlm.out.bias",
            "heads.mlm.cross_encoder.blocks.0.fc2.weight",
        )
    } == {5}
    assert named["heads.mlm.cross_encoder.blocks.0.fc2.bias"] == 2 and named["image.proj"] == 1
    assert named["image.blocks.0.fc1.bias"] == 2


@pytest.mark.parametrize(
    "bad, words",
    [
        (dict(drop=0.0), "leaves 72 of 72"),
        (dict(drop=0.99), "leaves 0 of 72"),
        (dict(drop=0.01, official=True), "leaves 71 of 72"),
    ],
)
def test_some_patches_are_visible_and_some_not(bad, words):
    with pytest.raises(ValueError, match=words):
        tbps.irra_heads(tbps.UIT | bad, tbps.DualEncoder(**tbps.SIZES["toy"] | dict(vocab=100)), 3)


@pytest.mark.parametrize(
    "bad, words",
    [
        (["depth=0"], "depth=0 must be above 0"),
        (["mask_content=0", "mask_other=0"], "mlm=0 mask_all=0 switches masking off"),
    ],
)
def test_values_that_make_no_sense(bad, words):
    with pytest.raises(ValueError, match=words):
        tbps.parse_args(["--method", "uit", "--set", *bad])


def test_overlapping_patches_cannot_be_restored():
    model = tbps.DualEncoder(**tbps.SIZES["toy"] | dict(vocab=100, stride=4))
    with pytest.raises(ValueError, match="do not overlap"):
        tbps.irra_heads(tbps.UIT, model, 3)
    assert set(tbps.irra_heads(tbps.UIT | dict(restoration=0.0), model, 3)) == {"id"}


# ---- as a user runs them --------------------------------------------------------------------------------------------

SMALL = [
    "--size", "toy", "--clip", "none", "--workers", "0", "--log-every", "1", "--set", "height=96", "width=48",
    "batch=6", "epochs=2", "depth=1",
]


@pytest.mark.parametrize("method", ["uit", "irra"])
def test_a_run(method, cuhk, tmp_path):
    said = run("tbps.py", "--dataset", "cuhk", "--data-root", cuhk, "--method", method, "--out", tmp_path / "r", *SMALL)
    assert said.splitlines()[-1].startswith("test R@1")
    last, best = (torch.load(tmp_path / "r" / name, weights_only=True)["weights"] for name in ("last.pt", "best.pt"))
    heads = {n for n in last if n.startswith("heads.")}
    assert heads and last.keys() - best.keys() == heads  # nothing of them is needed, or stored, to search
    page = (tmp_path / "r/report.html").read_text()
    assert ("Restorations" in page) == (method == "uit")
    if method == "uit":
        rows = page.split("Restorations")[1].split("<h2>")[0].split("<div class=row>")[1:]
        assert len(rows) == 8 and all(row.count("<img") == 5 for row in rows)
        again = run(
            "eval.py", "--checkpoint", tmp_path / "r/best.pt", "--data-root", cuhk, "--page", tmp_path / "p.html",
            "--workers", "0",
        )
        assert said.splitlines()[-1].removeprefix("test ") in again




@pytest.mark.parametrize("method, keys", [("uit", []), ("irra", []), ("irra", ["official=1", "half_weights=1"])])
def test_resume_is_exact(method, keys, cuhk, tmp_path, monkeypatch):
    """Stopped in the middle of the second epoch and resumed: the same weights, heads included, bit for bit."""
    def command(out):
        return [
            "tbps.py", "--dataset", "cuhk", "--data-root", cuhk, "--method", method, "--out", tmp_path / out,
            *SMALL, *keys,
        ]
    run(*command("a"))
    at = [json.loads(line)["at"] for line in (tmp_path / "a/log.jsonl").read_text().splitlines()]
    calls, sdm = [], losses.sdm

    def interrupted(*args):
        calls.append(args)
        if len(calls) == at.index([1, 2]):                              # one line is of the validation
            os.kill(os.getpid(), signal.SIGINT)
        return sdm(*args)
    with monkeypatch.context() as patch:
        patch.setattr(losses, "sdm", interrupted)
        assert "stopped in epoch 2, step 2 of" in run(*command("b"), code=130)
    run(*command("b"), "--resume")
    a, b = (torch.load(tmp_path / out / "last.pt", weights_only=True) for out in "ab")
    assert a["weights"].keys() == b["weights"].keys()
    assert all(torch.equal(a["weights"][n], b["weights"][n]) for n in a["weights"])
    assert (tmp_path / "a/log.jsonl").read_text() == (tmp_path / "b/log.jsonl").read_text()


def test_a_batch_of_one_person_is_told(cuhk, tmp_path):
    said = run(
        "tbps.py", "--dataset", "cuhk", "--data-root", cuhk, "--method", "uit", "--out", tmp_path / "r", *SMALL,
        "sampler=random", "batch=2", "epochs=1",
    )
    assert said.count("of 16 batches show one person only") == 1 and "nan" not in said
    assert "the warm-up takes 5 of 1 epochs" in said


def test_captions_without_words(cuhk, tmp_path):
    """Nothing to mask, to guess, or to paint after: the losses are 0 there, not nan."""
    root = tmp_path / "CUHK-PEDES"
    shutil.copytree(cuhk, root)
    rows = json.loads((root / "reid_raw.json").read_text())
    (root / "reid_raw.json").write_text(json.dumps([row | dict(captions=["", "..."]) for row in rows]))
    said = run(
        "tbps.py", "--dataset", "cuhk", "--data-root", root, "--method", "uit", "--out", tmp_path / "r", *SMALL,
        "sampler=random", "mlm=1",
    )
    assert "mlm" in said and "nan" not in said and "Restorations" not in (tmp_path / "r/report.html").read_text()


def test_one_person_is_not_enough(cuhk, tmp_path):
    root = tmp_path / "CUHK-PEDES"
    shutil.copytree(cuhk, root)
    rows = json.loads((root / "reid_raw.json").read_text())
    (root / "reid_raw.json").write_text(json.dumps([row for row in rows if row["split"] != "train" or row["id"] == 1]))
    assert "show one person" in error(
        "tbps.py", "--dataset", "cuhk", "--data-root", root, "--method", "irra", "--out", tmp_path / "r", *SMALL
    )


def test_colours_names_what_it_needs(tmp_path, cuhk):
    run(
        "tbps.py", "--dataset", "cuhk", "--data-root", cuhk, "--method", "uit", "--out", tmp_path / "r", *SMALL,
        "epochs=1",
    )
    assert "they are in the last.pt" in error("lab/check_restoration.py", tmp_path / "r/best.pt")
    assert "the checkpoint should be at" in error("lab/check_restoration.py", tmp_path / "none.pt")
    from lab import check_restoration
    loaded = check_restoration.with_heads(tmp_path / "r/last.pt")
    moved, nearer, number = check_restoration.follow(*loaded, number=20)
    assert 0 <= moved <= 100 and 0 <= nearer <= 100 and 15 <= number <= 20
    for record, caption, changed, old, new in check_restoration.cases(draw("test", persons=6), random.Random(0)):
        assert caption != changed and new in changed and old == record["attributes"]["top_colour"] != new
