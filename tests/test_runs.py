"""The machinery around training: many processes, log, resuming, progress, and what a method must not leave out."""

import contextlib
import shutil
import sys

import pytest
import torch
import tqdm

import data
import losses
import eval as evaluation
import tbps
from conftest import error, run, StopAfter
from lab.people import draw

SMALL = ["--size", "toy", "--clip", "none", "--workers", "0", "--log-every", "1",
         "--set", "height=48", "width=24", "batch=8", "epochs=2"]


@pytest.fixture(scope="module")
def trained(cuhk, tmp_path_factory):
    """A finished run: 2 epochs of 4 steps."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    run("tbps.py", "--dataset", "cuhk", "--data-root", cuhk, "--method", "baseline", "--out", out, *SMALL)
    return out


@pytest.fixture
def copied(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "r")


def main(*options):
    """tbps.main() of this process's module, whose functions a test may replace."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["tbps.py", *map(str, options)])
        tbps.main()


@pytest.fixture(scope="module")
def stopped(cuhk, tmp_path_factory):
    """The same run as `trained`, stopped in its second epoch, after a few steps."""
    out = tmp_path_factory.mktemp("runs") / "stopped"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tbps, "stop_on_signal", lambda: contextlib.nullcontext(StopAfter(7)))
        with pytest.raises(KeyboardInterrupt, match="--resume"):
            main("--dataset", "cuhk", "--data-root", cuhk, "--method", "baseline", "--out", out, *SMALL)
    saved = torch.load(out / "last.pt", weights_only=True)
    assert saved["epoch"] == 1 and 0 < saved["step"] < 4
    return out


@pytest.fixture
def interrupted(stopped, tmp_path):
    return shutil.copytree(stopped, tmp_path / "r")


# ---- many processes -------------------------------------------------------------------------------------------------

def tiny_model(records):
    torch.manual_seed(0)
    tokenizer = data.train_tokenizer([c for r in records for c in r["captions"]], vocab=600)
    return tbps.DualEncoder(16, (32, 16), 8, 32, 1, 32, 1, tokenizer.vocab, head_width=16), tokenizer


def score(records):
    model, tokenizer = tiny_model(records)
    inputs = evaluation.evaluation_set(records, data.Preprocessing((32, 16)), tokenizer)
    scores, *features = evaluation.evaluate(model, *inputs)
    return features, {"text to image": scores["text to image"]}


def score_as_one_of_three(rank, file, out):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=3)
    torch.save(score(draw("train", persons=6)[:1]), f"{out}.{rank}")
    torch.distributed.destroy_process_group()


def test_more_processes_than_images(people, tmp_path):
    """One image with two captions on three processes: two have no image, one has no caption, all get the scores."""
    torch.multiprocessing.spawn(score_as_one_of_three, (str(tmp_path / "meet"), str(tmp_path / "found")), nprocs=3)
    features, scores = score(people[:1])
    assert features[0].shape == (1, 16) and features[1].shape == (2, 16)
    for rank in range(3):
        found, found_scores = torch.load(tmp_path / f"found.{rank}")
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found, features)) and found_scores == scores


# ---- the log --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("damage", [b'{"at": [1, 3], "epo', b"\0" * 40, b"7\n", b""])
def test_a_damaged_log_does_not_matter(damage, trained, interrupted):
    """A crash may leave half a line or zero bytes. The checkpoint holds the log of all steps before it."""
    log = interrupted / "log.jsonl"
    log.write_bytes(log.read_bytes()[:200] + damage)
    assert run("tbps.py", "--out", interrupted, "--resume").splitlines()[-1].startswith("test R@1")
    assert tbps.read_log(interrupted) == tbps.read_log(trained)
    assert len(tbps.read_log(trained)) == 11                            # 8 steps, 2 validations, the test


# ---- resuming -------------------------------------------------------------------------------------------------------

def test_resume_needs_no_other_option(trained, interrupted):
    """All options come from last.pt: the result is, bit for bit, that of an undisturbed run."""
    run("tbps.py", "--out", interrupted, "--resume", "--workers", "1")  # an option that decides nothing may change
    want, found = (torch.load(out / "last.pt", weights_only=True) for out in (trained, interrupted))
    assert found["recipe"] == want["recipe"] and found["args"] == want["args"] | dict(workers=1)
    assert all(torch.equal(found["weights"][n], want["weights"][n]) for n in want["weights"])
    assert (interrupted / "log.jsonl").read_text() == (trained / "log.jsonl").read_text()


def test_options_given_at_resuming_must_agree(copied, cuhk):
    assert run("tbps.py", "--out", copied, "--resume", "--data-root", cuhk, "--batch", "8", "--set", "height=48")
    said = error("tbps.py", "--out", copied, "--resume", "--batch", "4", "--seed", "1")
    assert "batch: 8 then, 4 now" in said and "seed: 0 then, 1 now" in said
    assert "depends on the number of epochs" not in said
    assert "method: 'baseline' then, 'irra' now" in error("tbps.py", "--out", copied, "--resume", "--method", "irra")


def test_lists_given_again_at_resuming_count_once(copied):
    saved = torch.load(copied / "last.pt", weights_only=True)
    lists = ["--extra", "a", "--min-score", "words=0.5"]
    torch.save(saved | dict(argv=saved["argv"] + lists), copied / "last.pt")
    options = ["--out", str(copied), "--resume"]
    for more in ([], lists):
        args, recipe = tbps.parse_args(options + more)
        assert args.extra == ["a"] and args.min_score == ["words=0.5"] and recipe == saved["recipe"]


def test_more_epochs_are_another_run(copied):
    for option in (["--epochs", "3"], ["--set", "epochs=3"]):
        said = error("tbps.py", "--out", copied, "--resume", *option)
        assert "epochs: 2 then, 3 now" in said and "learning rate of every step depends on the number of epochs" in said
        assert f"--clip {copied / 'last.pt'}" in said


def test_a_finished_run_keeps_its_training_time(copied):
    saved = torch.load(copied / "last.pt", weights_only=True)
    assert 0 < saved["minutes"] < 5
    torch.save(saved | dict(minutes=12.3), copied / "last.pt")
    assert "trained in 12.3 minutes" in run("tbps.py", "--out", copied, "--resume")
    assert "trained in 12.3 minutes" in (copied / "report.html").read_text()
    torch.save(saved | dict(minutes=12.3, epoch=1), copied / "last.pt")
    run("tbps.py", "--out", copied, "--resume")
    assert 12.3 < torch.load(copied / "last.pt", weights_only=True)["minutes"] < 13


# ---- the command line -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("script", ["tbps.py", "distill.py"])
def test_a_run_that_cannot_start_leaves_no_folder(script, tmp_path):
    out = tmp_path / "r"
    assert "nothing" in error(script, "--dataset", "cuhk", "--data-root", tmp_path, "--out", out, "--clip", "none")
    assert not out.exists()


def test_methods_of_the_other_script_are_named():
    assert "lcr2s-paper are trained by distill.py" in error("tbps.py", "--method", "lcr2s")
    assert "all others by tbps.py" in error("distill.py", "--method", "irra")


# ---- progress -------------------------------------------------------------------------------------------------------

def test_a_line_a_minute_without_a_terminal(cuhk, tmp_path, monkeypatch, capsys):
    """Where each of 16 steps takes 20 s, a line is due at every third one, and another at the end."""
    command, now = ["--dataset", "cuhk", "--data-root", cuhk, "--method", "baseline", *SMALL, "epochs=4"], [0]

    def slow_itc(*features, itc=losses.itc):
        now[0] += 20
        return itc(*features)
    monkeypatch.setattr(tqdm.std, "time", lambda: now[0])
    main(*command, "--out", tmp_path / "a")
    assert "elapsed" not in capsys.readouterr().err
    monkeypatch.setattr(losses, "itc", slow_itc)
    main(*command, "--out", tmp_path / "b")
    lines = [x.lstrip("\r") for x in capsys.readouterr().err.splitlines() if "training: " in x]
    assert len(lines) == 6 and "loss" in lines[0]
    assert lines[0].startswith("training: 24 of 128, 01:00 elapsed, 04:20 left")


def test_training_saves_every_few_minutes(cuhk, tmp_path, monkeypatch):
    """Also within an epoch: with --save-minutes 0 after every step."""
    seen, save = [], tbps.save

    def watched_save(path, content):
        seen.append((path.name, content["step"]))
        save(path, content)
    monkeypatch.setattr(tbps, "save", watched_save)
    options = ["--dataset", "cuhk", "--data-root", str(cuhk), "--method", "baseline", *SMALL, "epochs=1"]
    main(*options, "--out", tmp_path / "r", "--save-minutes", "0")
    assert seen == [("last.pt", 1), ("last.pt", 2), ("last.pt", 3), ("best.pt", 0), ("last.pt", 0)]


# ---- adding a loss: what is forgotten is named ----------------------------------------------------------------------

def add_method(monkeypatch, recipe, step_losses):
    monkeypatch.setitem(tbps.METHODS, "mine", (tbps.make_recipe(tbps.COMMON_KEYS) | recipe, lambda *_: {}, step_losses))


def siglip_step(model, batch, recipe, epoch, autocast):
    image, text = model.encode_image(batch["pixels"][0]), model.encode_text(batch["tokens"][0])
    return {"siglip": recipe["siglip"] * losses.itc(image, text, model.scale())}


def test_a_new_loss_needs_no_list(cuhk, tmp_path, monkeypatch, capsys):
    """A recipe and a step are enough to train; --help works without a row of help."""
    add_method(monkeypatch, dict(siglip=1.0), siglip_step)
    options = ["--dataset", "cuhk", "--data-root", str(cuhk), "--method", "mine", *SMALL, "epochs=1",
               "--out", str(tmp_path / "r")]
    main(*options)
    assert "siglip" in capsys.readouterr().out
    with pytest.raises(ValueError, match="all losses have the weight 0"):
        tbps.parse_args([*options, "--set", "siglip=0"])
    monkeypatch.setitem(tbps.SIMPLIFIED, "siglip", 0.0)
    with pytest.raises(SystemExit) as end:
        tbps.parse_args(["--help"])
    said = capsys.readouterr().out
    assert not end.value.code
    assert "siglip           0.0        no help: add a row for this key to the table of keys" in said


@pytest.mark.parametrize("returned, words", [
    (None, r"the step's losses \(none\) have no gradient: a step returns"), ({}, r"the step's losses \(none\)"),
    (dict(siglip=0), "the step's loss 'siglip' is 0, it must be a tensor"),
    (dict(siglip=torch.tensor(1.0)), r"the step's losses \(siglip\) have no gradient")])
def test_a_step_without_losses_is_explained(returned, words, cuhk, tmp_path, monkeypatch):
    add_method(monkeypatch, dict(siglip=1.0), lambda *_: returned)
    with pytest.raises(ValueError, match=words):
        main("--dataset", "cuhk", "--data-root", cuhk, "--method", "mine", *SMALL, "--out", tmp_path / "r")


def test_a_run_of_another_version_is_not_resumed(copied):
    """Its recipe has other keys; the sentence says how to use its weights."""
    saved = torch.load(copied / "last.pt", weights_only=True)
    torch.save(saved | dict(recipe=saved["recipe"] | dict(aware=False)), copied / "last.pt")
    said = error("tbps.py", "--out", copied, "--resume")
    assert "another version" in said and f"--clip {copied / 'last.pt'}" in said
