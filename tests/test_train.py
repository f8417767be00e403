"""Training: recipes, learning rate, the losses of a step, and the commands as a user runs them, mistakes included."""

import functools
import json
import os
import re
import shutil
import signal
import time

import pytest
import torch
import torch.nn.functional as F

import data
import eval as evaluation
import losses
import tbps
from conftest import ROOT, error, run, start, write_images
from lab.people import draw

NO_AMP = functools.partial(torch.autocast, "cpu", enabled=False)
SMALL = ["--size", "toy", "--clip", "none", "--workers", "0", "--set", "height=96", "width=48", "batch=8", "epochs=2"]


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
    groups = tbps.make_optimizers(model, recipe, fused=False)[0].param_groups
    assert [len(g["params"]) for g in groups] == [decayed, undecayed]
    assert [g["weight_decay"] for g in groups] == [0.02, 0.0]
    assert sum(p.numel() for p in model.text.blocks[0].parameters()) == 3_152_384


def test_muon_makes_the_steps_of_the_blocks_matrices():
    recipe = tbps.SIMPLIFIED | dict(lr=1e-3, muon=3.0, weight_decay=0.0)
    model = tbps.DualEncoder(**tbps.SIZES["toy"] | dict(vocab=100))
    adam, muon = tbps.make_optimizers(model, recipe, fused=False)
    names = {id(p): n for n, p in model.named_parameters()}
    own = [names[id(p)] for g in muon.param_groups for p in g["params"]]
    assert sorted(own) == sorted(
        n for n in names.values() if ".blocks." in n and n.endswith("weight") and ".ln" not in n
    )
    assert len(own) == 16
    assert sorted(names.values()) == sorted(own + [names[id(p)] for g in adam.param_groups for p in g["params"]])
    assert [g["factor"] for g in muon.param_groups] == [3.0] and type(adam) is torch.optim.AdamW
    w = model.image.blocks[0].fc1.weight
    before, w.grad = w.detach().clone(), torch.randn(512, 128) * torch.logspace(0, -1.5, 128)
    muon.step()
    moved = torch.linalg.svdvals(before - w.detach())
    assert moved.min() > 0.4 * moved.max()
    assert torch.linalg.svdvals(w.grad).min() < 0.1 * torch.linalg.svdvals(w.grad).max()
    # about what AdamW's steps are
    assert (before - w.detach()).square().mean().sqrt().item() == pytest.approx(0.2e-3, rel=0.3)
    assert len(tbps.make_optimizers(model, recipe | dict(muon=0.0), fused=False)) == 1


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
        tbps.parse_args(["--method", method, "--help"])
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
    return model.double(), recipe, data.collate(tokenizer, [pairs[i] for i in (0, 1, 9, 20, 30, 40)])


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


# ---- the command ----------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def trained(cuhk, tmp_path_factory):
    """A finished run of two short epochs on the little CUHK-PEDES, with every loss and view on."""
    out = tmp_path_factory.mktemp("runs") / "full"
    said = run(
        "tbps.py", "--dataset", "cuhk", "--data-root", cuhk, "--out", out, "--log-every", "1", *SMALL,
        "mvs_text=1", "ss_text=0.1",
    )
    return out, said


def test_a_run(trained):
    out, said = trained
    assert "cuhk train: 3 persons, 12 images, 32 captions" in said and "no back-translations" in said
    assert said.splitlines()[-1].startswith("test R@1 ") and " mINP " in said.splitlines()[-1]
    assert {f.name for f in out.iterdir()} == {"last.pt", "best.pt", "log.jsonl", "report.html", "code"}
    assert (out / "code/tbps.py").read_text() == (ROOT / "tbps.py").read_text()
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    steps = [x for x in lines if "loss" in x]
    assert len(steps) == 8 and sum("val" in x for x in lines) == 2  # 2 epochs of 32 / 8 steps
    assert len(lines) == 11 and evaluation.format_scores(lines[-1]["test"]["best.pt, text to image"]) in said
    for x in steps:
        assert x["loss"] == pytest.approx(sum(x[k] for k in ("nitc", "ritc", "citc", "ss", "ss_text")), rel=1e-4)
    page = (out / "report.html").read_text()
    assert page.count("<polyline") == 6 + 5 + 2 and page.count('class="right"') > 0 and page.count("✓") > 1
    assert "http://" not in page and "<script" not in page


def test_the_checkpoint_is_all_that_evaluation_needs(trained, cuhk, tmp_path):
    out, said = trained
    copy = shutil.copy(out / "best.pt", tmp_path / "c.pt")
    again = run("eval.py", "--checkpoint", copy, "--data-root", cuhk, "--page", tmp_path / "p.html", "--workers", "0")
    assert said.splitlines()[-1].removeprefix("test ") in again and "image to text" in again
    assert evaluation.EXCLUDED in again
    assert (tmp_path / "p.html").read_text().count("<div class=row>") == 12
    other = run("eval.py", "--checkpoint", copy, "--dataset", "toy", "--split", "val", "--page", tmp_path / "p.html")
    assert "on toy val: 300 persons, 1,200 images, 2,400 captions" in other
    model, tokenizer, preprocessing = tbps.load_checkpoint(copy)
    assert not model.training
    assert preprocessing.settings == dict(size=(96, 48), norm="imagenet", resize="bicubic", clean=True)
    assert model.encode_text(tokenizer(["a man"])).shape == (1, 128) and not list(model.heads)
    tuned = run(
        "tbps.py", "--dataset", "cuhk", "--data-root", cuhk, "--out", tmp_path / "t", *SMALL, "--clip", copy,
        "--method", "baseline",
    )
    assert f"clip: {len(model.state_dict())} tensors from {copy}" in tuned


def wait_for_line(path, number, process):
    began = time.time()
    while not path.exists() or len(path.read_text().splitlines()) < number:
        assert process.poll() is None and time.time() - began < 120, process.communicate()
        time.sleep(0.02)


@pytest.mark.parametrize("workers", ["0", "2"])
def test_resume_is_exact(cuhk, tmp_path, workers):
    """A run that is stopped by Ctrl-C within an epoch and killed in another ends with the same weights, bit for bit, as
    an undisturbed one; the log has every step once."""
    def command(out):
        return [
            "tbps.py", "--dataset", "cuhk", "--data-root", cuhk, *SMALL, "epochs=9", "text_dropout=0.2", "muon=2",
            "--workers", workers, "--log-every", "1", "--out", tmp_path / out,
        ]
    quiet = run(*command("a"))
    first = start(*command("b"), "--save-minutes", "0")
    wait_for_line(tmp_path / "b/log.jsonl", 7, first)
    os.killpg(first.pid, signal.SIGINT)                                 # as a terminal does: the workers get it too
    said = first.communicate(timeout=60)[0]
    assert first.returncode == 130 and "--resume" in said and "Traceback" not in said
    second = start(*command("b"), "--resume", "--save-minutes", "0")
    lines = len((tmp_path / "b/log.jsonl").read_text().splitlines())
    wait_for_line(tmp_path / "b/log.jsonl", lines + 7, second)
    os.killpg(second.pid, signal.SIGKILL)
    second.communicate()
    resumed = run(*command("b"), "--resume")
    a, b = (torch.load(tmp_path / out / "last.pt", weights_only=True) for out in "ab")
    assert all(torch.equal(a["weights"][n], b["weights"][n]) for n in a["weights"]) and a["best"] == b["best"]
    for x, y in zip(a["optimizers"], b["optimizers"], strict=True):
        assert x["state"].keys() == y["state"].keys()
        assert all(torch.equal(x["state"][i][k], y["state"][i][k]) for i in x["state"] for k in x["state"][i])
    assert [set(x["state"][0]) for x in a["optimizers"]] == [{"step", "exp_avg", "exp_avg_sq"}, {"momentum_buffer"}]
    assert quiet.splitlines()[-1] == resumed.splitlines()[-1]
    assert (tmp_path / "a/log.jsonl").read_text() == (tmp_path / "b/log.jsonl").read_text()


def test_runs_are_not_lost_by_mistake(trained, cuhk, tmp_path):
    out, _ = trained
    command = ["tbps.py", "--dataset", "cuhk", "--data-root", cuhk, "--out", out, *SMALL, "mvs_text=1", "ss_text=0.1"]
    assert "--overwrite deletes it" in error(*command)
    said = error(*command, "lr=0.5", "--seed", "3", "--resume")
    assert "lr: 0.0001 then, 0.5 now" in said and "seed: 0 then, 3 now" in said
    assert "start the run without --resume" in error("tbps.py", "--out", tmp_path / "none", "--resume")


def test_mistakes_at_the_command_line(trained, cuhk, tmp_path):
    out, _ = trained
    base = ["tbps.py", "--dataset", "cuhk", "--data-root", cuhk, "--out", tmp_path / "r", *SMALL]
    assert "has no key 'nonsense'" in error(*base, "nonsense=1")
    assert "do not fill one batch of 64" in error(*base, "batch=64")
    assert "batch=1 is too small" in error(*base, "batch=1")
    assert "4x48 pixels hold no patch" in error(*base, "height=4")
    assert "torch sees no CUDA device" in error(*base, "--device", "cuda")
    assert "no CLIP weights from no/such" in error(*base, "--clip", "no/such")
    assert "the CLIP weights should be at" in error(*base, "--clip", tmp_path / "x.pt")
    assert "the checkpoint should be at" in error("eval.py", "--checkpoint", tmp_path / "x.pt")
    newer = torch.load(out / "best.pt", weights_only=True) | dict(version=99)
    torch.save(newer, tmp_path / "newer.pt")
    assert "written by a newer version (99" in error("eval.py", "--checkpoint", tmp_path / "newer.pt")
    (tmp_path / "text.pt").write_text("hello")
    assert "cannot be read as weights" in error("eval.py", "--checkpoint", tmp_path / "text.pt")
    torch.save(dict(a=torch.ones(1)), tmp_path / "other.pt")
    assert "is no CLIP that can be read" in error("eval.py", "--checkpoint", tmp_path / "other.pt")
    with pytest.raises(ValueError, match="is not a checkpoint of this program"):
        tbps.load_checkpoint(tmp_path / "other.pt")


@pytest.mark.parametrize(
    "bad, words",
    [
        (["lr=nan"], "lr=nan must be"),
        (["deletion=2"], "a fraction from 0 to 1"),
        (["nitc=0", "ritc=0", "citc=0", "ss=0"], "nothing to learn"),
        (["stride=-1"], "stride=-1 is too small"),
        (["beta2=1"], "below 1"),
        (["eps=0"], "above 0"),
        (["height=5000"], "4096 pixels"),
    ],
)
def test_values_that_make_no_sense(bad, words):
    with pytest.raises(ValueError, match=words):
        tbps.parse_args(["--set", *bad])
    for option in (["--seed", "-1"], ["--log-every", "0"], ["--device", "gpu"], ["--save-minutes", "nan"]):
        with pytest.raises(ValueError):
            tbps.parse_args(option)


def test_other_peoples_files_stay(tmp_path):
    (tmp_path / "code").mkdir()
    (tmp_path / "code/thesis.py").write_text("mine")
    assert "exists and is not a run" in error("tbps.py", "--out", tmp_path)
    assert "is not a run" in error("tbps.py", "--out", tmp_path / "code/thesis.py")
    assert (tmp_path / "code/thesis.py").read_text() == "mine"
    assert "choose one" in error("tbps.py", "--out", tmp_path, "--resume", "--overwrite")
    assert "the CLIP weights should be at" in error("eval.py", "--checkpoint", tmp_path)
    with pytest.raises(ValueError, match="the checkpoint is a file in it"):
        tbps.load_checkpoint(tmp_path)


def test_a_loss_that_is_not_finite(cuhk, tmp_path):
    said = error(
        "tbps.py", "--dataset", "cuhk", "--data-root", cuhk, *SMALL, "lr=1e30", "lr_start=1e30", "--out", tmp_path / "r"
    )
    assert "the loss is not finite in epoch 1, step" in said and "imgs/" in said and "lower --lr" in said


def test_bad_images(tmp_path, people):
    lines = ["image,caption,pid,split"]
    write_images(tmp_path, [f"{n}.jpg" for n in range(len(people))], people)
    splits = ["train", "train", "train", "val", "val", "test"]
    for n, r in enumerate(people):
        lines.append(f"{n}.jpg,a {r['attributes']['top_colour']} top,{r['pid']},{splits[r['pid']]}")
    (tmp_path / "x.csv").write_text("\n".join(lines))
    (tmp_path / "3.jpg").write_bytes((tmp_path / "3.jpg").read_bytes()[:500])
    command = [
        "tbps.py", "--dataset", "csv", "--data-root", tmp_path, "--out", tmp_path / "r", "--overwrite", *SMALL,
        "--workers",
    ]
    loaded = start(*command, "2")  # the error comes from a loader's process, which ends quietly
    for said in (error(*command, "0"), loaded.communicate()[0]):
        assert said.splitlines()[-1].startswith("error: ") and "3.jpg cannot be read" in said.splitlines()[-1]
        assert "--skip-bad" in said
    said = run(
        "tbps.py", "--dataset", "csv", "--data-root", tmp_path, "--out", tmp_path / "r", "--overwrite",
        "--skip-bad", *SMALL,
    )
    assert "skipped: " in said and "csv train: 3 persons, 11 images, 11 captions" in said


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    tbps.save(path, dict(a=1))

    def full(content, file):
        open(file, "wb").write(b"half")
        raise RuntimeError("[enforce fail at inline_container.cc] . PytorchStreamWriter failed writing file")
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="Is the disk full"):
        tbps.save(path, dict(a=2))
    assert torch.load(path, weights_only=True) == dict(a=1) and list(tmp_path.iterdir()) == [path]


def test_extra_pairs_are_trained_on(cuhk, tmp_path, people):
    (tmp_path / "imgs").mkdir()
    rows = [
        dict(
            image=f"{n}.png", captions=r["captions"], pid=900 + n, split="train", source_image="x", source_pid=1,
            edit={}, seed=0, scores={},
        )
        for n, r in enumerate(people[:4])
    ]
    write_images(tmp_path / "imgs", [r["image"] for r in rows], people)
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    said = run("tbps.py", "--dataset", "cuhk", "--data-root", cuhk, *SMALL, "epochs=1", "--extra", tmp_path,
               "--out", tmp_path / "r", "--method", "tbps-clip-simplified")
    assert "cuhk train: 7 persons, 16 images, 40 captions" in said


@pytest.mark.parametrize("name", ["icfg", "rstp"])
def test_the_other_layouts(name, icfg, rstp, tmp_path):
    root = dict(icfg=icfg, rstp=rstp)[name]
    small = [*SMALL, "epochs=1", "batch=4"]
    assert (
        run("tbps.py", "--dataset", name, "--data-root", root.parent, *small, "--out", tmp_path / "r")
        .splitlines()[-1]
        .startswith("test R@1")
    )
    if name == "icfg":
        said = run("tbps.py", "--dataset", name, "--data-root", root, *small, "--val", "none", "--out", tmp_path / "r2")
        assert "icfg train: 4 persons" in said and "val" not in said.split("epoch")[1]
        assert torch.load(tmp_path / "r2/best.pt", weights_only=True)["epoch"] == 1


def test_amp_bf16(cuhk, tmp_path):
    """The encoders under autocast on the CPU: losses and weights stay fp32."""
    run("tbps.py", "--dataset", "cuhk", "--data-root", cuhk, *SMALL, "--amp", "bf16", "--out", tmp_path / "r")
    assert {w.dtype for w in torch.load(tmp_path / "r/last.pt", weights_only=True)["weights"].values()} == {
        torch.float32
    }


def test_what_the_objective_learns():
    """A few steps on one fixed batch bring every loss down: the signs are right, and gradients reach both towers."""
    torch.manual_seed(0)
    people = draw("train", persons=6)[::2]
    tokenizer = data.train_tokenizer([c for r in people for c in r["captions"]], vocab=600)
    recipe = tbps.TBPS_CLIP | dict(lr=1e-3)
    pairs = data.Pairs(people, (96, 48), views=2, self_views=2)
    batch = data.collate(tokenizer, [pairs[i] for i in range(0, 24, 2)])
    model = tbps.DualEncoder(**tbps.SIZES["toy"] | dict(vocab=tokenizer.vocab, image_layers=1, text_layers=1))
    for name, head in tbps.tbps_clip_heads(recipe, model, 3).items():
        model.heads[name] = head
    (optimizer,), seen = tbps.make_optimizers(model, recipe, fused=False), []
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


def test_a_share_of_the_persons(cuhk):
    def persons(split, *more):
        args, _ = tbps.parse_args(["--dataset", "cuhk", "--data-root", str(cuhk), *more])
        return {r["pid"] for r in tbps.load_data(args)[split]}
    everyone, some, others = (
        persons("train"),
        persons("train", "--share", "0.5"),
        persons("train", "--share", "0.5", "--seed", "1"),
    )
    assert some < everyone and len(some) == round(len(everyone) / 2) == len(others)
    assert some == persons("train", "--share", "0.5")
    assert len({frozenset(persons("train", "--share", "0.3", "--seed", str(n))) for n in range(5)}) > 1
    assert persons("test", "--share", "0.5") == persons("test") and len(persons("train", "--share", "0.001")) == 1
    assert "must be above 0" in error("tbps.py", "--share", "0")
    assert "must be above 0" in error("tbps.py", "--share", "1.5")
