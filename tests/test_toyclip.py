"""The toy CLIP in lab/toyclip: small enough for the repository, and it knows something about unseen people."""

from pathlib import Path

import pytest

import data
import eval as evaluation
import tbps
from conftest import run
from lab import people

FOLDER = Path(tbps.TOY_CLIP)


def test_it_is_small():
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) < 4e6
    assert {file.name for file in FOLDER.iterdir()} == {
        "open_clip_config.json", "open_clip_model.safetensors", "tokenizer.json", "tokenizer_config.json"}


@pytest.mark.parametrize("domain, least", [("generic", 85), ("people", 60)])
def test_its_zero_shot_score(domain, least):
    """R@1 among 240 images of 60 persons that it was not trained on; chance is 2 %."""
    config = tbps.read_config(tbps.find_weights(FOLDER))
    model, tokenizer = tbps.load_clip(FOLDER), tbps.tokenizer_for(FOLDER)
    preprocessing = data.Preprocessing(model.arch["image_size"], config["norm"], config["resize"])
    inputs = evaluation.evaluation_set(people.draw("val", persons=60, domain=domain), preprocessing, tokenizer)
    assert evaluation.evaluate(model, *inputs, progress=False)[0]["text to image"]["R@1"] > least


def test_it_can_be_made_again(tmp_path):
    """A few steps of the command that made it."""
    said = run("lab/pretrain.py", "--persons", "12", "--steps", "2", "--batch", "8", "--out", tmp_path / "m")
    assert "zero-shot, toy val: R@1" in said
    made, shipped = (tbps.load_clip(folder).arch for folder in (tmp_path / "m", FOLDER))
    assert made | dict(vocab=0) == shipped | dict(vocab=0)              # fewer captions, fewer tokens
