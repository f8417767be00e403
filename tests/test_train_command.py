"""Training as a user runs it: a run, resuming, mistakes, data sets in all layouts."""

import json
import os
import shutil
import signal
import time

import pytest
import torch

import eval as evaluation
import tbps
from conftest import ROOT, error, run, start, write_images

SMALL = ["--size", "toy", "--clip", "none", "--workers", "0", "--set", "height=96", "width=48", "batch=8", "epochs=2"]


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
            "tbps.py", "--dataset", "cuhk", "--data-root", cuhk, *SMALL, "epochs=9", "text_dropout=0.2",
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
    x, y = a["optimizer"]["state"], b["optimizer"]["state"]
    assert x.keys() == y.keys() and set(x[0]) == {"step", "exp_avg", "exp_avg_sq"}
    assert all(torch.equal(x[i][k], y[i][k]) for i in x for k in x[i])
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
    assert "the weights should be at" in error(*base, "--clip", tmp_path / "x.pt")
    assert "the weights should be at" in error("eval.py", "--checkpoint", tmp_path / "x.pt")
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
    assert "the weights should be at" in error("eval.py", "--checkpoint", tmp_path)
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
