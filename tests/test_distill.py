"""LCR2S: supports, fusion, both stages, and the sanity experiments of its specification on people without pictures."""

import argparse
import contextlib
import functools
import json
import math
import shutil

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

import data
import distill
import eval as evaluation
import losses
import tbps
from conftest import cuhk_rows, error, run, write_cuhk
from test_model import made_up_merges

NO_AMP = functools.partial(torch.autocast, "cpu", enabled=False)
TINY = ["--clip", "none", "--size", "toy", "--workers", "0", "--log-every", "1", "--set", "height=96", "width=48", "batch=8", "epochs=2", "rich_epochs=3", "warmup=0.5"]


# ---- support sets ---------------------------------------------------------------------------------------------------

def test_others_are_the_persons_but_no_copies():
    pids, contents = [1, 1, 1, 2, 1, 3, 3], ["a", "b", "a", "c", "d", "e", "e"]
    found = [sorted(j for j in row if j >= 0) for row in distill.others(pids, contents).tolist()]
    assert found == [[1, 4], [0, 2, 4], [1, 4], [], [0, 1, 2], [], []]
    found = [sorted(j for j in row if j >= 0) for row in distill.others(pids, contents, images=[0, 0, 1, 2, 1, 3, 4]).tolist()]
    assert found == [[4], [2, 4], [1], [], [0, 1], [], []]


def test_supports_are_drawn_without_repeats():
    torch.manual_seed(0)
    table = torch.tensor([[5, 6, 7, 8, 9], [3, 4, -1, -1, -1], [-1] * 5])
    seen_once, first = set(), None
    for _ in range(50):
        support, seen = distill.draw(table, table >= 0, 3)
        assert seen.sum(dim=1).tolist() == [3, 2, 0] and (support >= 0).all()
        for row, there, allowed in zip(support, seen, ({5, 6, 7, 8, 9}, {3, 4}, set())):
            drawn = row[there].tolist()
            assert len(set(drawn)) == len(drawn) and set(drawn) <= allowed
        seen_once |= set(support[0].tolist())
        first = support if first is None else first
    assert seen_once == {5, 6, 7, 8, 9} and not torch.equal(first, support)
    torch.manual_seed(0)
    assert torch.equal(first, distill.draw(table, table >= 0, 3)[0])
    wide = torch.arange(10).expand(4000, 10)
    assert distill.draw(wide, wide >= 0, 4, drop=0.3)[1].float().mean().item() == pytest.approx(0.7, abs=0.02)


def bank_of(image, text, pids, own, device="cpu"):
    """A bank from features alone; texts are written for the images `own`, in order."""
    records = [dict(pid=pid, image=np.array([i]), captions=[f"{i} {n}" for n in range(own.count(i))]) for i, pid in enumerate(pids)]
    return distill.Bank(image, text, records)


def test_siblings_and_copies_in_a_bank(people):
    records = people[:5]
    image, text = torch.randn(5, 8), torch.randn(10, 8)
    with_siblings, without = distill.Bank(image, text, records), distill.Bank(image, text, records, siblings=False)
    assert records[3]["pid"] == records[0]["pid"] != records[4]["pid"]
    assert set(with_siblings.text_others[0].tolist()) - {-1} == {1, 2, 3, 4, 5, 6, 7} and set(without.text_others[0].tolist()) - {-1} == {2, 3, 4, 5, 6, 7}
    assert set(with_siblings.image_others[0].tolist()) - {-1} == {1, 2, 3} and set(with_siblings.image_others[4].tolist()) == {-1}
    twice = [r | dict(image=records[0]["image"].copy(), captions=records[0]["captions"]) if n == 1 else r for n, r in enumerate(records)]
    copies = distill.Bank(image, text, twice)
    assert set(copies.image_others[0].tolist()) - {-1} == {2, 3} and set(copies.text_others[0].tolist()) - {-1} == {1, 3, 4, 5, 6, 7}


# ---- fusion ---------------------------------------------------------------------------------------------------------

def random_fusion(kind="attention", width=64):
    torch.manual_seed(0)
    fusion = distill.Fusion(width, 16, kind).double()
    for p in fusion.parameters():
        nn.init.normal_(p, std=0.3)
    return fusion, torch.randn(5, width, dtype=torch.float64), torch.randn(5, 3, width, dtype=torch.float64), torch.rand(5, 3) < 0.6


@pytest.mark.parametrize("kind", ["attention", "self"])
def test_fusion_starts_as_it_should(kind):
    """`attention` as the identity, `self` as the mean."""
    fusion, (_, anchor, support, seen) = distill.Fusion(64, 16, kind), random_fusion()
    anchor, support = anchor.float(), support.float()
    want = F.normalize(anchor, dim=1) if kind == "attention" else distill.Fusion(64, 16, "mean")(anchor, support, seen)
    assert torch.equal(fusion(anchor, support, seen), want) if kind == "attention" else torch.allclose(fusion(anchor, support, seen), want, atol=1e-6)


@pytest.mark.parametrize("kind", ["attention", "self", "mean"])
def test_what_fusion_depends_on(kind):
    fusion, anchor, support, seen = random_fusion(kind)
    out, weight = fusion(anchor, support, seen, look=True)
    assert torch.allclose(weight.sum(dim=1), torch.ones(5, dtype=torch.float64)) and (weight[:, 1:][~seen] == 0).all() and out.isfinite().all()
    order = torch.tensor([2, 0, 1])
    assert torch.allclose(fusion(anchor, support[:, order], seen[:, order]), out, atol=1e-9)
    assert torch.equal(fusion(anchor, torch.where(seen[..., None], support, 7.0), seen), out)
    nobody = fusion(anchor, support, torch.zeros_like(seen))
    assert torch.allclose(nobody, fusion(anchor, support[:, :0], seen[:, :0])) and not torch.allclose(nobody, out)
    support.requires_grad_()
    fusion(anchor, support, seen).square().sum().backward()
    assert ((support.grad.abs().sum(dim=2) > 0) == seen).all()


def test_fusion_by_torchs_attention():
    fusion, anchor, support, seen = random_fusion()
    theirs = nn.MultiheadAttention(64, 4, batch_first=True, dtype=torch.float64)
    theirs.load_state_dict({"in_proj_weight": torch.cat([fusion.q.weight, fusion.kv.weight]), "in_proj_bias": torch.cat([fusion.q.bias, fusion.kv.bias]),
                            "out_proj.weight": fusion.proj.weight, "out_proj.bias": fusion.proj.bias})
    rows = F.normalize(torch.cat([anchor[:, None], support], dim=1), dim=2)
    keys = fusion.ln_key(rows)
    attended, weight = theirs(fusion.ln_query(rows[:, :1]), keys, keys, key_padding_mask=torch.cat([torch.zeros(5, 1, dtype=torch.bool), ~seen], dim=1))
    z = rows[:, 0] + attended[:, 0]
    want = z + fusion.fc2(F.gelu(fusion.fc1(fusion.ln_mlp(z))))
    out, look = fusion(anchor, support, seen, look=True)
    assert torch.allclose(out, want, atol=1e-9) and torch.allclose(look, weight[:, 0], atol=1e-9)


# ---- losses of a step -----------------------------------------------------------------------------------------------

def tiny_model(recipe, heads, people, persons=2):
    torch.manual_seed(0)
    tokenizer = data.train_tokenizer([c for r in people for c in r["captions"]], vocab=600)
    model = tbps.DualEncoder(**tbps.SIZES["toy"] | dict(vocab=tokenizer.vocab, image_layers=1, text_layers=1))
    for name, head in heads(recipe, model, persons).items():
        model.heads[name] = head
    return model, tokenizer


def encode(model, batch):
    return model.encode_image(batch["pixels"][0]), model.encode_text(batch["tokens"][0])


def test_end_to_end_supports_come_from_the_batch(people):
    """Two persons with three images and one; then two captions of one image."""
    model, tokenizer = tiny_model(distill.PAPER, distill.richer_heads, people)
    pairs = data.Pairs(people[:5], (96, 48), image_aug="none")
    batch = data.collate(tokenizer, [pairs[i] for i in (0, 2, 4, 8)])

    def parts(batch, **weights):
        return distill.richer_losses(*encode(model, batch), batch, model, distill.PAPER | weights, NO_AMP)

    assert list(parts(batch)) == ["sdm", "id", "aux"] and list(parts(batch, aux=0.0)) == ["sdm", "id"]
    seen = []
    model.heads["fuse_image"].forward = lambda anchor, support, able: seen.append(able) or anchor
    parts(batch, support_drop=0.0)
    assert seen[0].sum(dim=1).tolist() == [2, 2, 2, 0]
    parts(data.collate(tokenizer, [pairs[i] for i in (0, 1, 2)]), support_drop=0.0)                     # two captions of one image: it is not its own support
    assert seen[1].sum(dim=1).tolist() == [1, 1, 2]


def test_targets_and_controls():
    torch.manual_seed(0)
    bank = bank_of(F.normalize(torch.randn(4, 64), dim=1), F.normalize(torch.randn(6, 64), dim=1), [7, 7, 7, 9], [0, 0, 1, 1, 2, 3])
    heads = nn.ModuleDict(dict(fuse_image=distill.Fusion(64, 16), fuse_text=distill.Fusion(64, 16, "mean")))
    item = torch.tensor([2, 5])
    image, text, has_image, has_text = distill.targets(bank, heads, "richer", 2, item)
    assert torch.allclose(image, bank.image[[1, 3]]) and not torch.allclose(text[0], bank.text[2]) and torch.allclose(text[1], bank.text[5])
    assert has_image.tolist() == has_text.tolist() == [True, False] and not image.requires_grad
    image, text, *_ = distill.targets(bank, heads, "self", 2, item)
    assert torch.equal(image, bank.image[[1, 3]]) and torch.equal(text, bank.text[[2, 5]])
    image, text, *_ = distill.targets(bank, heads, "centroid", 2, item)
    assert torch.allclose(image, torch.stack([bank.image[:3].sum(dim=0), bank.image[3]])) and torch.allclose(text[0], bank.text[:5].sum(dim=0))


@pytest.mark.parametrize("weights, names", [(dict(), ["affinity"]), (dict(features=0.5, relations=0.2, affinity=0.0), ["features", "relations"]), (dict(affinity=0.0), [])])
def test_what_a_light_model_learns_from(weights, names):
    torch.manual_seed(0)
    image, text, *rich = torch.randn(4, 4, 128)
    has = torch.tensor([1, 1, 1, 0])
    parts = distill.copy_losses(image, text, *rich, has, has, distill.LCR2S | weights)
    assert list(parts) == names
    want = dict(affinity=losses.distil_affinity(image, text, *rich, 0.05, 0.3), relations=0.2 * losses.distil_relations(image, text, *rich),
                features=0.5 * (losses.distil_features(image[:3], rich[0][:3]) + losses.distil_features(text[:3], rich[1][:3])))
    for name in names:
        assert parts[name].item() == pytest.approx(want[name].item(), rel=1e-5)


# ---- judging a richer model -----------------------------------------------------------------------------------------

def test_the_held_out_view_does_not_leak():
    """Features that know nothing but which image a caption was written for: with both sides fused, or with the own image in the gallery,
    all is found; held out, nothing. And features that know the person: all is found in every way but with wrong supports."""
    torch.manual_seed(0)
    pids, own = [p for p in range(60) for _ in range(3)], list(range(180))
    heads = dict(fuse_image=distill.Fusion(256, 64, "mean"), fuse_text=distill.Fusion(256, 64, "mean"))
    one_each = F.normalize(torch.randn(180, 256), dim=1)
    rows = distill.judge(heads, bank_of(one_each, one_each, pids, own), size=2)
    assert len(rows) == 8 and rows["both sides: leaks who it is"]["R@1"] > 95
    assert all(rows[f"held-out view: {way}"]["R@1"] < 8 for way in ("single images", "richer", "wrong donors", "no supports"))
    person = F.normalize(torch.randn(60, 256), dim=1).repeat_interleave(3, dim=0) + 0.01 * torch.randn(180, 256)
    rows = distill.judge(heads, bank_of(person, person, pids, own), size=2)
    assert all(rows[f"held-out view: {way}"]["R@1"] > 99 for way in ("single images", "richer", "mean instead of fusion", "no supports"))
    assert rows["held-out view: wrong donors"]["R@1"] < 20 and rows["both sides, two wrong persons' supports"]["R@1"] < 20
    assert rows["both sides, one wrong person's supports"]["R@1"] > 95 and rows == distill.judge(heads, bank_of(person, person, pids, own), size=2)


def test_the_held_out_view_by_a_slow_loop():
    torch.manual_seed(0)
    pids, own = [0, 0, 0, 1, 1, 2, 3, 3, 3], [0, 0, 1, 2, 3, 4, 4, 5, 6, 7, 8]
    image, text = torch.randn(9, 16), torch.randn(11, 16)
    heads = dict(fuse_image=distill.Fusion(16, 4, "mean"), fuse_text=distill.Fusion(16, 4, "mean"))
    rows = distill.judge(heads, bank_of(image, text, pids, own), size=9)          # all supports: nothing is drawn
    number = [pids[:i].count(p) for i, p in enumerate(pids)]
    found = []
    for m, i in enumerate(own):
        gallery = [j for j in range(9) if number[j] != number[i]]
        if not any(pids[j] == pids[i] for j in gallery):
            continue
        rich = torch.stack([torch.stack([F.normalize(image[s], dim=0) for s in gallery if pids[s] == pids[j]]).mean(dim=0) for j in gallery])
        best = torch.argsort(F.normalize(rich, dim=1) @ F.normalize(text[m], dim=0), descending=True, stable=True)
        found.append(pids[gallery[best[0]]] == pids[i])
    assert len(found) == 10 and rows["held-out view: richer"]["R@1"] == pytest.approx(100 * sum(found) / len(found))


# ---- small students -------------------------------------------------------------------------------------------------

def test_half_the_depth():
    torch.manual_seed(0)
    big = tbps.DualEncoder(**tbps.SIZES["toy"] | dict(image_layers=3, text_layers=2))
    small = distill.shrink(big, "half")
    assert small.arch["image_layers"] == 2 and small.arch["text_layers"] == 1
    big.image.blocks, big.text.blocks = big.image.blocks[::2], big.text.blocks[1:]
    pixels, tokens = torch.randn(2, 3, 96, 48), torch.tensor([[5, 6, 7, 1023, 0]])
    assert torch.equal(small.encode_image(pixels), big.encode_image(pixels)) and torch.equal(small.encode_text(tokens), big.encode_text(tokens))


def test_half_the_width():
    """Every second channel, head and hidden unit of the big one."""
    torch.manual_seed(0)
    big = tbps.DualEncoder(**tbps.SIZES["toy"] | dict(image_layers=1, text_layers=1))
    small = distill.shrink(big, "narrow")
    assert small.arch["image_width"] == small.arch["text_width"] == 64 and small.arch["embed"] == 128
    for tower, ours in ((big.image, small.image), (big.text, small.text)):
        block, half = tower.blocks[0], ours.blocks[0]
        assert torch.equal(half.attn.qkv.weight[64:96], block.attn.qkv.weight[128:160, ::2])            # the first head's keys
        assert torch.equal(half.attn.qkv.weight[96:128], block.attn.qkv.weight[192:224, ::2])           # the second's are the third's
        assert torch.equal(half.attn.proj.weight[:, 32:], block.attn.proj.weight[::2, 64:96])
        assert torch.equal(half.fc1.weight, block.fc1.weight[::2, ::2]) and torch.equal(half.fc2.weight, block.fc2.weight[::2, ::2])
        assert torch.equal(half.fc1.bias, block.fc1.bias[::2]) and torch.equal(ours.proj, tower.proj[::2]) and torch.equal(ours.pos, tower.pos[:, ::2])
    assert torch.equal(small.text.tok.weight, big.text.tok.weight[:, ::2]) and torch.equal(small.image.patch.weight, big.image.patch.weight[::2])
    with pytest.raises(ValueError, match="cannot be halved"):
        distill.shrink(tbps.DualEncoder(**tbps.SIZES["toy"] | dict(text_width=32)), "narrow")


# ---- the command ----------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def lonely(tmp_path_factory, people):
    """A directory in the layout of CUHK-PEDES in which one training person has a single image with a single caption."""
    kept = [r for n, r in enumerate(people) if r["pid"] != 1 or n % 4 == 0]
    rows = cuhk_rows(kept)
    for row in rows:
        row["captions"] = row["captions"][:1] if row["id"] == 2 else row["captions"]
    return write_cuhk(tmp_path_factory.mktemp("data") / "CUHK-PEDES", kept, rows)


@pytest.fixture(scope="module")
def distilled(lonely, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "d"
    said = run("distill.py", "--dataset", "cuhk", "--data-root", lonely, "--out", out, *TINY)
    return out, said


def test_a_run(distilled, lonely, tmp_path):
    out, said = distilled
    assert "supports: 1 of 9 images and 1 of 25 captions have no others" in said and said.splitlines()[-1].startswith("test R@1 ")
    assert said.count("held-out view: ") == 5 and said.count("both sides") == 3 and "ms per image" in said
    assert {f.name for f in out.iterdir()} == {"plain", "richer", "light"}
    page = (out / "richer/report.html").read_text()
    assert page.count("<figcaption>") > 6 and "held-out view: wrong donors" in page and page.count("<polyline") == 3
    assert "Cost of a search" in (out / "light/report.html").read_text()
    saved = torch.load(out / "light/last.pt", weights_only=True)
    assert not [n for n in saved["weights"] if "fuse" in n] and [n for n in torch.load(out / "richer/last.pt", weights_only=True)["weights"] if "fuse" in n]
    again = run("eval.py", "--checkpoint", out / "light/best.pt", "--data-root", lonely, "--workers", "0", "--page", tmp_path / "p.html")
    assert said.splitlines()[-1].removeprefix("test ") in again
    assert run("distill.py", "--dataset", "cuhk", "--data-root", lonely, "--out", out, *TINY, "--resume").count(" is done") == 3


def test_the_encoders_of_the_richer_model_are_the_plain_ones(distilled):
    """A frozen teacher changes nothing but its heads."""
    out, _ = distilled
    plain, richer = (torch.load(out / name, weights_only=True)["weights"] for name in ("plain/best.pt", "richer/last.pt"))
    assert all(torch.equal(w, richer[n]) for n, w in plain.items()) and not torch.equal(richer["heads.fuse_image.fc2.weight"], torch.zeros(128, 512))


class After:
    """What is asked to stop after a number of looks, as by Ctrl-C."""

    def __init__(self, looks):
        self.looks = looks

    def __bool__(self):
        self.looks -= 1
        return self.looks < 0


@pytest.mark.parametrize("method, looks", [("lcr2s", dict(plain=1, richer=1, light=1)), ("lcr2s-paper", dict(richer=0, light=0))])
def test_resume_is_exact(method, looks, lonely, tmp_path, monkeypatch):
    """Stopped once in each stage, a run ends with the weights, bit for bit, of one that nobody disturbed."""
    command = ["distill.py", "--dataset", "cuhk", "--data-root", lonely, "--method", method, *TINY]
    run(*command, "--out", tmp_path / "a")
    for n, (stage, number) in enumerate(looks.items()):
        stops = iter([()] * (n > 0) + [After(number)])                  # the stage that was stopped before ends, the next one is stopped
        monkeypatch.setattr(tbps, "stop_on_signal", lambda: contextlib.nullcontext(next(stops)))
        said = run(*command, "--out", tmp_path / "b", *["--resume"] * (n > 0), code=130)
        assert f"b/{stage}/last.pt is saved" in said.splitlines()[-1] and "--resume" in said.splitlines()[-1]
        saved = torch.load(tmp_path / "b" / stage / "last.pt", weights_only=True)
        assert (saved["epoch"], saved["step"]) == ((0, 2) if method == "lcr2s" and stage != "richer" else (1, 0))
    monkeypatch.undo()
    run(*command, "--out", tmp_path / "b", "--resume")
    for stage in looks:
        a, b = (torch.load(tmp_path / x / stage / "last.pt", weights_only=True)["weights"] for x in "ab")
        assert not [n for n in a if not torch.equal(a[n], b[n])], stage


@pytest.mark.parametrize("options", [["--student", "half"], ["warm=1"]])
def test_a_student_that_starts_elsewhere_can_be_resumed(options, distilled, lonely, tmp_path, monkeypatch):
    out, _ = distilled
    command = ["distill.py", "--dataset", "cuhk", "--data-root", lonely, "--out", tmp_path, *TINY, *options]
    shutil.copytree(out / "plain", tmp_path / "plain")
    shutil.copytree(out / "richer", tmp_path / "richer")
    with monkeypatch.context() as patch:
        patch.setattr(tbps, "stop_on_signal", lambda: contextlib.nullcontext(After(1)))
        run(*command, "--stage", "light", code=130)
    assert run(*command, "--stage", "light", "--resume").splitlines()[-1].startswith("test R@1")


def test_a_warm_student_starts_from_the_teacher(distilled, lonely, tmp_path):
    """At rate 0 it stays there."""
    teacher = distilled[0] / "richer/last.pt"
    run("distill.py", "--dataset", "cuhk", "--data-root", lonely, "--teacher", teacher, "--out", tmp_path, *TINY, "warm=1", "lr=0", "lr_start=0", "lr_end=0")
    light, rich = (torch.load(f, weights_only=True)["weights"] for f in (tmp_path / "light/best.pt", teacher))
    assert all(torch.equal(light[n], rich[n]) for n in light)


@pytest.mark.parametrize("student", ["half", "narrow"])
def test_smaller_students(student, distilled, lonely, tmp_path):
    out, _ = distilled
    parameters = sum(p.numel() for p in distill.shrink(tbps.load_checkpoint(out / "plain/best.pt")[0], student).parameters())
    command = ["distill.py", "--dataset", "cuhk", "--data-root", lonely, "--teacher", out / "richer/last.pt", "--student", student, "--out", tmp_path]
    said = run(*command, *TINY)
    assert f"the light model         {parameters:,} parameters" in said and said.splitlines()[-1].startswith("test R@1")
    assert "affinity" not in run(*command, *TINY, "affinity=0", "--overwrite")         # the small encoder alone


def test_a_student_from_other_weights(distilled, lonely, tmp_path):
    """--student takes what --clip takes; with other sizes of features relations can be shared, features not."""
    out, _ = distilled
    saved = torch.load(out / "plain/best.pt", weights_only=True)
    model = tbps.DualEncoder(**saved["arch"] | dict(embed=64))
    torch.save(saved | dict(arch=model.arch, weights=model.state_dict()), tmp_path / "other.pt")
    command = ["distill.py", "--dataset", "cuhk", "--data-root", lonely, "--teacher", out / "richer/last.pt", "--student", tmp_path / "other.pt"]
    assert "relations" in run(*command, "--out", tmp_path / "r", *TINY, "relations=0.2")
    assert "which compare cosines" in error(*command, "--out", tmp_path / "f", *TINY, "features=0.2")


def test_mistakes_at_the_command_line(distilled, lonely, tmp_path):
    out, _ = distilled
    base = ["distill.py", "--dataset", "cuhk", "--data-root", lonely, "--out", tmp_path / "r"]
    assert "train it with --stage richer" in error(*base, "--stage", "light", *TINY)
    for wrong in ("light/last.pt", "light/best.pt", "plain/last.pt"):
        assert "is no richer model: name the richer/last.pt" in error(*base, "--teacher", out / wrong, *TINY)
    (tmp_path / "text.pt").write_text("weights")
    for option in ("--teacher", "--plain", "--student"):                # before anything is read or trained, and nothing is left behind
        said = error(*base, option, tmp_path / "text.pt", *TINY)
        assert "text.pt cannot be read as weights" in said and "persons" not in said
    assert "--student haf is none of same, half, narrow, ViT-B/32" in error(*base, "--student", "haf", *TINY) and not (tmp_path / "r").exists()
    for other in (["--teacher", "x"], ["--stage", "light"], ["--set", "end_to_end=1", "sampler=views"]):
        assert "there is none to put on" in error(*base, "--plain", "y", *other)
    assert "take one of them" in error(*base, "--set", "warm=1", "--student", "half")
    assert "leave out --stage richer" in error(*base, "--teacher", "x", "--stage", "richer")
    assert "nothing.pt" in error(*base, "--plain", tmp_path / "nothing.pt", *TINY)
    assert "holds a run already" in error(*base[:-1], out, *TINY)
    said = error(*base[:-1], out, "--resume", *TINY, "rich_lr=0.1")     # also of stages that are done
    assert "rich_lr: 0.0003 then, 0.1 now" in said
    said = run(*base[:-1], out, "--resume", *TINY)
    assert said.splitlines() == [f"{out / stage} is done: {out / stage / 'report.html'}" for stage in ("plain", "richer", "light")]


def test_people_of_one_image(people, tmp_path):
    """In the test split, a richer model is trained but not judged; in the training split, and with one caption, there is nothing to fuse."""
    singles = [r for n, r in enumerate(people) if n % 4 == 0][:8]
    rows = [[r["image"], c, n, split] for split, some in (("train", people[:8]), ("test", singles)) for n, r in enumerate(some) for c in r["captions"][:1]]
    for n, (image, caption, pid, split) in enumerate(rows):
        Image.fromarray(image).save(tmp_path / f"{n}.png")

    def write(name, pid_of):
        lines = [f'{n}.png,"{caption}",{pid_of(pid) if split == "train" else 100 + pid},{split}' for n, (_, caption, pid, split) in enumerate(rows)]
        (tmp_path / name).write_text("image,caption,pid,split\n" + "\n".join(lines))
        return ["distill.py", "--dataset", "csv", "--data-root", tmp_path / name, "--val", "none", "--out", tmp_path / name[0], *TINY, "batch=4"]

    said = run(*write("a.csv", lambda n: n // 4))
    assert "no person of the test split has two images: the richer model cannot be judged" in said and said.splitlines()[-1].startswith("test R@1")
    assert "there is nothing to fuse them with" in error(*write("b.csv", lambda n: n))


@pytest.mark.parametrize("bad, words", [(["support=0"], "support=0 must be above 0"), (["end_to_end=1"], "sampler=views"), (["fusion=sum"], "fusion must be one of attention, self, mean"),
                                        (["target=x"], "target must be one of"), (["support_drop=1.5"], "share from 0 to 1"), (["pair=2"], "share from 0 to 1"),
                                        (["mlm=1"], "has no key 'mlm'"), (["kd_tau=0"], "kd_tau=0.0 must be above 0")])
def test_values_that_make_no_sense(bad, words):
    distill.parse_args(["--set", "end_to_end=1", "--stage", "light"])   # where no richer model is trained, any sampler will do
    with pytest.raises(ValueError, match=words):
        distill.parse_args(["--set", *bad])


# ---- full size ------------------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_steps_at_full_size(people, tmp_path):
    """ViT-B/16, 384 x 128, 11,003 persons: finite gradients exactly where they belong, in each stage."""
    tokenizer = data.Tokenizer([m.split() for m in made_up_merges(48894)])
    pairs = data.Pairs(people[:8], (384, 128), image_aug="reid", norm="clip", clean=False)
    batch = data.collate(tokenizer, [pairs[i] for i in range(0, 16, 2)])
    model = tbps.DualEncoder(**tbps.SIZES["ViT-B/16"] | dict(image_size=(384, 128)))
    model.logit_scale.data.fill_(math.log(50))
    model.logit_scale.requires_grad_(False)

    def gradients(step_losses, make_heads, recipe):
        model.heads = nn.ModuleDict(make_heads(recipe, model, 11003))
        model.zero_grad(set_to_none=True)
        for head in ("fuse_image", "fuse_text") if "fuse_image" in model.heads else ():
            nn.init.normal_(model.heads[head].proj.weight, std=0.02)    # at zero, nothing flows to the attention
            nn.init.normal_(model.heads[head].fc2.weight, std=0.02)
        sum(step_losses(*encode(model, batch)).values()).backward()
        for n, p in model.named_parameters():
            assert n == "logit_scale" or p.grad is not None and p.grad.isfinite().all() and p.grad.any(), n

    gradients(lambda *pair: distill.richer_losses(*pair, batch, model, distill.PAPER, NO_AMP), distill.richer_heads, distill.PAPER)
    richer = nn.ModuleDict({n: model.heads[n] for n in ("fuse_image", "fuse_text")})
    bank = distill.Bank(F.normalize(torch.randn(8, 512), dim=1), F.normalize(torch.randn(16, 512), dim=1), people[:8])
    before = {n: p.clone() for n, p in richer.state_dict().items()}
    teacher = distill.targets(bank, richer, "richer", 4, batch["item"])
    gradients(lambda *pair: distill.copy_losses(*pair, *teacher, distill.PAPER | dict(affinity=1.0)) |
              tbps.pair_losses(*pair, batch["pid"], model.scale(), model.heads, distill.LCR2S, NO_AMP), tbps.id_heads, distill.LCR2S)
    assert all(torch.equal(p, before[n]) for n, p in richer.state_dict().items())
    model.heads = nn.ModuleDict(distill.richer_heads(distill.LCR2S, model, 11003))
    model.zero_grad(set_to_none=True)
    frozen = {n: p.clone() for n, p in model.named_parameters()}
    recipe = distill.LCR2S | dict(batch=8, rich_epochs=2)
    distill.train_fusion(argparse.Namespace(device="cpu", resume=False, save_minutes=10, seed=0, method="lcr2s"), recipe, model, tokenizer, {}, bank, tmp_path)
    for n, p in model.named_parameters():
        assert n.startswith("heads.") == (p.grad is not None) == (not torch.equal(p, frozen[n])), n


# ---- sanity experiments, on people without pictures -----------------------------------------------------------------
#
# An identity has 24 correlated attributes of 6 values. Of its 4 views each shows half of them, as a vector through a fixed rotation, beside
# noise; the caption of a view is a multi-hot vector of attributes, half of which the view shows. Encoders are small MLPs. Seconds a model.

def world(persons, seed, shown=0.5, related=1.2):
    """-> image (4 P, 112), text (4 P, 144), pid (4 P,). related: how much attributes of a person tell of each other."""
    fixed, rng = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
    weights, code = related * torch.randn(24, 6, 6, generator=fixed), torch.randn(24, 6, 4, generator=fixed)
    rotation = torch.linalg.qr(torch.randn(112, 112, generator=fixed))[0]
    z = torch.randn(persons, 6, generator=rng)
    gumbel = -(-torch.rand(persons, 24, 6, generator=rng).log()).log()
    value = (torch.einsum("avk,pk->pav", weights, z) + gumbel).argmax(dim=2).repeat_interleave(4, dim=0)          # (N, 24)

    def coin(chance):
        return torch.rand(value.shape, generator=rng) < chance

    def misread():
        return torch.where(coin(0.03), torch.randint(6, value.shape, generator=rng), value)

    visible = coin(0.5)
    codes = code[torch.arange(24), misread()] * visible[..., None]                                                # (N, 24, 4)
    image = torch.cat([codes.flatten(1), torch.randn(len(value), 16, generator=rng)], dim=1) @ rotation + 0.05 * torch.randn(len(value), 112, generator=rng)
    mentioned = torch.where(coin(shown), visible, coin(0.5)) & coin(0.7)
    return image, (F.one_hot(misread(), 6) * mentioned[..., None]).flatten(1).float(), torch.arange(persons).repeat_interleave(4)


class Mlps(nn.Module):
    """Two small encoders that the losses of distill.py can train."""

    def __init__(self, persons):
        super().__init__()
        self.image, self.text = (nn.Sequential(nn.Linear(n, 256), nn.LayerNorm(256), nn.GELU(), nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 128)) for n in (112, 144))
        self.heads = nn.ModuleDict(dict(id=nn.Linear(128, persons)))
        self.arch = dict(embed=128, head_width=64)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(20)), requires_grad=False)
        self.scale = lambda: torch.tensor(20.0)


def learn(people, seed, steps, teacher=None, **weights):
    torch.manual_seed(seed)
    image, text, pid = people
    model, recipe, persons = Mlps(int(pid.max()) + 1), distill.LCR2S | weights, int(pid.max()) + 1
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 1e-3 * min(1, step / 50) * (1 + math.cos(math.pi * step / steps)) / 2
        item = (4 * torch.randperm(persons)[:32, None] + torch.arange(4)).flatten()
        pair = model.image(image[item]), model.text(text[item])
        parts = tbps.pair_losses(*pair, pid[item], model.scale(), model.heads, recipe, NO_AMP)
        if teacher:
            parts |= distill.copy_losses(*pair, *teacher(item), recipe)
        optimizer.zero_grad()
        sum(parts.values()).backward()
        optimizer.step()
    return model.eval()


@torch.no_grad()
def features_of(model, people):
    return bank_of(F.normalize(model.image(people[0]), dim=1), F.normalize(model.text(people[1]), dim=1), people[2].tolist(), list(range(len(people[2]))))


def scores_of(model, people):
    bank = features_of(model, people)
    return [evaluation.retrieval_metrics(bank.text, bank.image, bank.pid, bank.pid, own) for own in (None, bank.own)]


def teach(plain, people, tmp_path):
    """A richer model on the frozen features of a plain one -> its fusions, the bank."""
    bank, recipe = features_of(plain, people), distill.LCR2S
    for name, head in distill.richer_heads(recipe, plain, int(people[2].max()) + 1).items():
        plain.heads[name] = head
    distill.train_fusion(argparse.Namespace(device="cpu", resume=False, save_minutes=10, seed=0, method="lcr2s"), recipe, plain, data.Tokenizer([("a", "b")]), {}, bank, tmp_path)
    return plain.heads, bank


@pytest.mark.slow
def test_e1_a_richer_model_knows_more(tmp_path):
    """Supports help captions find their person where the gallery does not hold their view, and wrong supports do not."""
    people, test = world(3000, 1), world(300, 2)
    plain = learn(people, 0, 1000)
    heads, _ = teach(plain, people, tmp_path)
    rows = distill.judge(heads, features_of(plain, test), size=3)
    print(*(f"{name:44}{evaluation.format_scores(scores)}" for name, scores in rows.items()), sep="\n")
    single, richer, wrong = (rows[f"held-out view: {way}"] for way in ("single images", "richer", "wrong donors"))
    assert richer["R@1"] >= single["R@1"] + 2 and richer["mAP"] >= single["mAP"] + 12 and wrong["R@1"] < 6
    assert rows["held-out view: mean instead of fusion"]["R@1"] >= single["R@1"] + 2


def gains(tmp_path, related):
    """Per seed, of a student of the richer model: mAP without the own image over plain and over a student of plain; R@1 over plain."""
    people, test, rows = world(3000, 1, related=related), world(300, 2, related=related), []
    for seed in range(3):
        plain = learn(people, seed, 1000)
        (tmp_path / str(seed)).mkdir()
        heads, bank = teach(plain, people, tmp_path / str(seed))
        rich, own = (learn(people, seed, 1000, functools.partial(distill.targets, bank, heads, target, 4)) for target in ("richer", "self"))
        (p, px), (r, rx), (s, sx) = (scores_of(model, test) for model in (plain, rich, own))
        rows.append((rx["mAP"] - px["mAP"], rx["mAP"] - sx["mAP"], r["R@1"] - p["R@1"]))
        print(seed, *(evaluation.format_scores(x) for x in (p, px, r, rx, s, sx)), sep="\n")
    print(np.array(rows))
    return np.array(rows)


@pytest.mark.slow
def test_e2_a_student_gains_from_other_views(tmp_path):
    """Copying the richer model brings more than copying the plain one, where the own image does not count; every seed."""
    over = gains(tmp_path, related=1.2)
    assert (over[:, :2] > 0).all() and over.mean(axis=0)[0] > 0.5 and over.mean(axis=0)[1] > 0.5 and over.mean(axis=0)[2] > -0.5


@pytest.mark.slow
def test_e2_but_only_what_a_view_can_tell(tmp_path):
    """Where the attributes of a person tell nothing of each other, as with the toy people, what other views show cannot be guessed."""
    assert gains(tmp_path, related=0.0).mean(axis=0)[1] < 0.5


@pytest.mark.slow
def test_e3_few_people_make_distillation_harmful(tmp_path):
    """The known failure: with 400 persons KL costs R@1; a small weight on relations alone does not cost mAP."""
    people, test = world(400, 1), world(300, 2)
    plain = learn(people, 0, 400)
    heads, bank = teach(plain, people, tmp_path)
    teacher = functools.partial(distill.targets, bank, heads, "richer", 4)
    (p, _), (kl, _), (relations, _) = (scores_of(model, test) for model in (plain, learn(people, 0, 400, teacher, pair=0.0), learn(people, 0, 400, teacher, affinity=0.0, relations=0.2)))
    print(*(evaluation.format_scores(x) for x in (p, kl, relations)), sep="\n")
    assert kl["R@1"] < p["R@1"] and relations["mAP"] > p["mAP"] - 0.5
