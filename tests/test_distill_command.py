"""distill.py as a user runs it: stages, resuming, students, mistakes."""

import contextlib
import shutil

import pytest
import torch
from PIL import Image

import distill
import tbps
from conftest import cuhk_rows, error, run, StopAfter, write_cuhk

TINY = ["--clip", "none", "--size", "toy", "--workers", "0", "--log-every", "1",
        "--set", "height=96", "width=48", "batch=8", "epochs=2", "teacher_epochs=3", "warmup=0.5"]


@pytest.fixture(scope="module")
def lonely(tmp_path_factory, people):
    """A directory in the layout of CUHK-PEDES in which one training person has one image with one caption."""
    kept = [r for n, r in enumerate(people) if r["pid"] != 1 or n % 4 == 0]
    rows = cuhk_rows(kept)
    for row in rows:
        row["captions"] = row["captions"][:1] if row["id"] == 2 else row["captions"]
    return write_cuhk(tmp_path_factory.mktemp("data") / "CUHK-PEDES", kept, rows)


@pytest.fixture
def distil(lonely):
    """Run distill.py on these data with some options."""
    def command(*options, run=run, **how):
        return run("distill.py", "--dataset", "cuhk", "--data-root", lonely, *options, **how)
    return command


@pytest.fixture(scope="module")
def distilled(lonely, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "d"
    said = run("distill.py", "--dataset", "cuhk", "--data-root", lonely, "--out", out, *TINY)
    return out, said


def weights(path):
    return torch.load(path, weights_only=True)["weights"]


def test_a_run(distilled, lonely, tmp_path, distil):
    out, said = distilled
    assert "without support: 1 of 9 images, 1 of 25 captions" in said
    assert said.splitlines()[-1].startswith("test R@1 ") and "ms per image" in said
    assert said.count("held-out view: ") == 5 and said.count("both sides: ") == 3
    assert {f.name for f in out.iterdir()} == {"baseline", "teacher", "student"}
    page = (out / "teacher/report.html").read_text()
    assert page.count("<figcaption>") > 6 and "held-out view: support of a wrong person" in page
    assert page.count("<polyline") == 5 and "Cost of a search" in (out / "student/report.html").read_text()
    assert not [n for n in weights(out / "student/last.pt") if "fuse" in n]
    assert [n for n in weights(out / "teacher/last.pt") if "fuse" in n]
    again = run("eval.py", "--checkpoint", out / "student/best.pt", "--data-root", lonely, "--workers", "0",
                "--page", tmp_path / "p.html")
    assert said.splitlines()[-1].removeprefix("test ") in again
    assert distil("--out", out, *TINY, "--resume").count(" is done") == 3


def test_the_encoders_of_the_teacher_are_the_baselines(distilled):
    """A frozen teacher changes nothing but its heads."""
    out, _ = distilled
    baseline, teacher = weights(out / "baseline/best.pt"), weights(out / "teacher/last.pt")
    assert all(torch.equal(w, teacher[n]) for n, w in baseline.items())
    assert not torch.equal(teacher["heads.fuse_image.fc2.weight"], torch.zeros(128, 512))


# ---- resuming -------------------------------------------------------------------------------------------------------

@contextlib.contextmanager
def stopping(*stops):
    """The stages that are trained are asked to stop after these numbers of looks; None: never."""
    stops = iter([() if looks is None else StopAfter(looks) for looks in stops])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tbps, "stop_on_signal", lambda: contextlib.nullcontext(next(stops, ())))
        yield


@pytest.mark.parametrize("method, looks", [
    ("lcr2s", dict(baseline=1, teacher=0, student=1)), ("lcr2s-paper", dict(teacher=0, student=0))])
def test_resume_is_exact(method, looks, tmp_path, distil):
    """Stopped once in each stage, a run ends with the weights, bit for bit, of one that nobody disturbed."""
    options = ["--method", method, *TINY]
    distil(*options, "--out", tmp_path / "a")
    for n, (stage, number) in enumerate(looks.items()):
        with stopping(*[None] * (n > 0), number):                       # the stage that was stopped before ends
            said = distil(*options, "--out", tmp_path / "b", *["--resume"] * (n > 0), code=130).splitlines()[-1]
        assert f"b/{stage}/last.pt is saved" in said and "--resume" in said
        saved = torch.load(tmp_path / "b" / stage / "last.pt", weights_only=True)
        at = (0, 2) if method == "lcr2s" and stage != "teacher" else (1, 0)
        assert (saved["epoch"], saved["step"]) == at
    distil(*options, "--out", tmp_path / "b", "--resume")
    for stage in looks:
        a, b = (weights(tmp_path / x / stage / "last.pt") for x in "ab")
        assert not [n for n in a if not torch.equal(a[n], b[n])], stage


def test_resume_needs_no_other_options(distil, tmp_path):
    """Also for a student made of other layers, where only the student's stage was asked for."""
    with stopping(None, 0):
        distil(*TINY, "--out", tmp_path / "a", "--stage", "teacher", code=130)
    said = run("distill.py", "--out", tmp_path / "a", "--resume")
    assert f"{tmp_path / 'a/baseline'} is done" in said and not (tmp_path / "a/student").exists()
    again = run("distill.py", "--out", tmp_path / "a", "--resume", "--set", "teacher_epochs=3")
    assert again.count(" is done: ") == 2 and len(again.splitlines()) == 2
    said = error("distill.py", "--out", tmp_path / "a", "--resume", "--set", "teacher_epochs=4")
    assert "teacher_epochs: 3 then, 4 now" in said
    said = error("distill.py", "--out", tmp_path / "a", "--resume", "--epochs", "3")
    assert "depends on the number of epochs" in said and f"--clip {tmp_path / 'a/baseline/last.pt'}" in said
    student = [*TINY, "--stage", "student", "--student", "half"]
    with stopping(3):
        distil(*student, "--out", tmp_path / "a", code=130)
    resumed = run("distill.py", "--out", tmp_path / "a", "--resume").splitlines()[-1]
    shutil.copytree(tmp_path / "a/teacher", tmp_path / "b/teacher")
    assert resumed == distil(*student, "--out", tmp_path / "b").splitlines()[-1] and resumed.startswith("test R@1")
    a, b = (weights(tmp_path / x / "student/last.pt") for x in "ab")
    assert all(torch.equal(a[n], b[n]) for n in b)


def test_a_warm_student_can_be_resumed(distilled, distil, tmp_path):
    for stage in ("baseline", "teacher"):
        shutil.copytree(distilled[0] / stage, tmp_path / stage)
    options = ["--out", tmp_path, *TINY, "warm=1", "--stage", "student"]
    with stopping(1):
        distil(*options, code=130)
    assert distil(*options, "--resume").splitlines()[-1].startswith("test R@1")


# ---- students -------------------------------------------------------------------------------------------------------

def test_a_warm_student_starts_from_the_teacher(distilled, distil, tmp_path):
    """At rate 0 it stays there."""
    teacher = distilled[0] / "teacher/last.pt"
    distil("--teacher", teacher, "--out", tmp_path, *TINY, "warm=1", "lr=0", "lr_start=0", "lr_end=0")
    student, want = weights(tmp_path / "student/best.pt"), weights(teacher)
    assert all(torch.equal(student[n], want[n]) for n in student)


@pytest.mark.parametrize("student", ["half", "narrow"])
def test_smaller_students(student, distilled, distil, tmp_path):
    out, _ = distilled
    small = distill.SMALLER[student](tbps.load_checkpoint(out / "baseline/best.pt")[0])
    parameters = sum(p.numel() for p in small.parameters())
    options = ["--teacher", out / "teacher/last.pt", "--student", student, "--out", tmp_path, *TINY]
    said = distil(*options)
    assert f"the student             {parameters:,} parameters" in said
    assert said.splitlines()[-1].startswith("test R@1")
    assert "affinity " not in distil(*options, "affinity=0", "--overwrite")     # the small encoder alone


def test_a_student_from_other_weights(distilled, distil, tmp_path):
    """--student takes what --clip takes; with another embedding size it can copy relations, not features."""
    out, _ = distilled
    saved = torch.load(out / "baseline/best.pt", weights_only=True)
    model = tbps.DualEncoder(**saved["arch"] | dict(embed=64))
    torch.save(saved | dict(arch=model.arch, weights=model.state_dict()), tmp_path / "other.pt")
    options = ["--teacher", out / "teacher/last.pt", "--student", tmp_path / "other.pt"]
    assert "relations" in distil(*options, "--out", tmp_path / "r", *TINY, "relations=0.2")
    assert "which compare cosines" in distil(*options, "--out", tmp_path / "f", *TINY, "features=0.2", run=error)


# ---- mistakes -------------------------------------------------------------------------------------------------------

def test_wrong_files(distilled, lonely, distil, tmp_path):
    out, _ = distilled

    def said(*options):
        return distil("--out", tmp_path / "r", *options, *TINY, run=error)
    assert "train it with --stage teacher" in said("--stage", "student")
    for wrong in ("student/last.pt", "student/best.pt", "baseline/last.pt"):
        assert "is no teacher: name the teacher/last.pt" in said("--teacher", out / wrong)
    (tmp_path / "text.pt").write_text("weights")
    for option in ("--teacher", "--baseline", "--student"):             # before anything is read or trained
        message = said(option, tmp_path / "text.pt")
        assert "text.pt cannot be read as weights" in message and "persons" not in message
    assert "haf" in said("--student", "haf") and not (tmp_path / "r").exists()
    assert "nothing.pt" in said("--baseline", tmp_path / "nothing.pt")


def test_options_that_exclude_each_other(distilled, distil, tmp_path):
    def said(*options):
        return distil("--out", tmp_path / "r", *options, run=error)
    for other in (["--teacher", "x"], ["--stage", "student"], ["--set", "end_to_end=1", "sampler=views"]):
        assert "--baseline is for a new teacher" in said("--baseline", "y", *other)
    assert "choose one" in said("--set", "warm=1", "--student", "half")
    assert "omit --stage teacher" in said("--teacher", "x", "--stage", "teacher")
    out, _ = distilled
    assert "holds a run already" in distil("--out", out, *TINY, run=error)
    changed = distil("--out", out, "--resume", *TINY, "teacher_lr=0.1", run=error)      # also of stages that are done
    assert "teacher_lr: 0.0003 then, 0.1 now" in changed
    done = distil("--out", out, "--resume", *TINY).splitlines()
    assert done == [f"{out / stage} is done: {out / stage / 'report.html'}" for stage in distill.STAGES]


def test_people_of_one_image(people, tmp_path):
    """In the test split: a teacher is trained but not evaluated. In the training split, with one caption each: there
    is no support."""
    singles = [r for n, r in enumerate(people) if n % 4 == 0][:8]
    rows = [(r["image"], c, n, split) for split, records in (("train", people[:8]), ("test", singles))
            for n, r in enumerate(records) for c in r["captions"][:1]]
    for n, (image, *_) in enumerate(rows):
        Image.fromarray(image).save(tmp_path / f"{n}.png")

    def options(name, pid_of):
        lines = ["image,caption,pid,split"]
        for n, (_, caption, pid, split) in enumerate(rows):
            lines.append(f'{n}.png,"{caption}",{pid_of(pid) if split == "train" else 100 + pid},{split}')
        (tmp_path / name).write_text("\n".join(lines))
        return ["distill.py", "--dataset", "csv", "--data-root", tmp_path / name, "--val", "none",
                "--out", tmp_path / name[0], *TINY, "batch=4"]

    said = run(*options("a.csv", lambda n: n // 4))
    assert "no person of the test split has two images" in said and said.splitlines()[-1].startswith("test R@1")
    assert "there is nothing to draw support from" in error(*options("b.csv", lambda n: n))
