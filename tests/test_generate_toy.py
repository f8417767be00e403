"""PDG on synthetic pedestrians: a diffusion model is trained, pairs are made, scored, and trained on."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import data
import generate
import lab.people
import tbps
from conftest import error, run

TINY = ["--set", "train_epochs=2", "train_batch=4", "steps=2"]
MODEL = "runs/toy-diffusion-0"


def files(out):
    paths = [p for p in sorted(Path(out).rglob("*")) if p.is_file() and p.name != "report.html"]
    return {str(p.relative_to(out)): p.read_bytes() for p in paths}


def weights(folder):
    return load_file(f"{folder}/unet/diffusion_pytorch_model.safetensors")


@pytest.fixture(scope="module")
def work(people, tmp_path_factory):
    """A folder with a checkpoint c/best.pt, a diffusion model whose training was stopped and resumed, and pairs p."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("work"))
        patch.setattr(lab.people, "draw", lambda split, **_: people[:8] if split in ("train", "few") else people[8:24])
        run("tbps.py", "--out", "c", "--set", "epochs=1", "batch=4")
        save = tbps.save

        def save_and_stop(*args):
            save(*args)
            raise KeyboardInterrupt

        with pytest.MonkeyPatch.context() as stop:
            stop.setattr(tbps, "save", save_and_stop)
            run("generate.py", "--count", "3", "--out", "p", *TINY, code=130)
        assert torch.load(f"{MODEL}/last.pt")["epoch"] == 1
        other = ["generate.py", "--count", "3", "--out", "p", *TINY, "train_lr=0.1"]
        assert "train_lr 0.001 then, 0.1 now): remove it" in error(*other)
        said = run("generate.py", "--count", "3", "--out", "p", "--judge", "c/best.pt", *TINY)
        assert "epoch   2/2" in said and "epoch   1/2" not in said and "3 pairs in p" in said
        yield


def test_stopped_or_not(work):
    """Another model of the same seed, trained without a stop, has the same weights and makes the same pairs."""
    other = ["generate.py", "--count", "3", "--out", "o", *TINY, "train_lr=0.1"]
    assert "train_lr 0.001 then, 0.1 now): remove it" in error(*other)
    shutil.move(MODEL, "stopped")
    run("generate.py", "--count", "3", "--out", "q", "--judge", "c/best.pt", *TINY)
    whole, stopped = weights(MODEL), weights("stopped")
    assert all(torch.equal(whole[name], stopped[name]) for name in whole) and files("p") == files("q")


def test_scores_are_read_by_training(work):
    entries = [json.loads(line) for line in Path("p/pairs.jsonl").read_text().splitlines()]
    assert all(-2 < e["scores"]["words"] < 2 and e["source_image"].startswith("toy ") for e in entries)
    best = max(e["scores"]["words"] for e in entries)
    said = run("tbps.py", "--out", "d", "--extra", "p", "--min-score", f"words={best}", "--set", "epochs=1", "batch=4")
    assert "p: 1 of 3 generated pairs have these scores" in said
    page = Path("p/report.html").read_text()
    assert generate.SCORES["words"] in page and generate.SCORES["direction"] in page


def test_finetune_changes_the_unet_only(work):
    shutil.copytree(MODEL, "kept")
    run("generate.py", "--count", "1", "--out", "f", "--diffusion", "kept", "--finetune", "tuned", *TINY)
    before, tuned = weights("kept"), weights("tuned")
    assert any(not torch.equal(before[name], tuned[name]) for name in before)
    text = "text_encoder/model.safetensors"
    assert (Path("kept") / text).read_bytes() == (Path("tuned") / text).read_bytes()


def test_a_text_encoder_from_a_checkpoint(work):
    """At the end symbol it gives the text feature before the projection."""
    encoder, tokenizer, _ = tbps.load_checkpoint("c/best.pt")
    model, caption = generate.toy_model([], 2, "cpu", "c/best.pt"), ["a man in a red coat"]
    tokens = tokenizer(caption)
    hidden = model.encode_text(caption)[0, tokens.argmax()]
    assert torch.allclose(hidden @ encoder.text.proj, encoder.encode_text(tokens)[0], atol=1e-5)
    options = ["--count", "1", "--seed", "1"]
    run("generate.py", *options, "--out", "w", "--words", "c/best.pt", *TINY)
    assert "words c/best.pt then, None now" in error("generate.py", *options, "--out", "v", *TINY)


def test_the_judge(work, people):
    """Its scores if nothing changes, and if all changes as the caption says."""
    judge, edit = generate.Judge("c/best.pt", "cpu"), dict(caption="a man in a red coat", source="a man in a blue coat")
    one, two = (data.load_image(r["image"]) for r in people[:2])
    still, moved = judge([one, one], [one, two], [edit, edit])
    with torch.no_grad():
        change = judge.embed_texts([edit["caption"]]) - judge.embed_texts([edit["source"]])
        a, b = judge.embed_images([one]), judge.embed_images([two])
    assert a.norm().item() == pytest.approx(1, abs=1e-5)
    assert still["direction"] == pytest.approx(0, abs=1e-4)
    assert still["words"] == pytest.approx((a @ change.T).item(), abs=1e-5)
    assert moved["direction"] == pytest.approx(F.cosine_similarity(b - a, change).item(), abs=1e-4)
