"""eval.py --runs: run folders side by side, on one page."""

import json

import pytest
import torch

import eval as evaluation
import tbps
from conftest import error, run


def make_run(folder, seed, vals, test=None, **recipe):
    """A run folder as tbps.py leaves it, with these validation scores of R@1."""
    folder.mkdir()
    torch.save(dict(format="tbps", version=tbps.VERSION, recipe=tbps.BASELINE | recipe,
                    args=dict(dataset="toy", method="baseline", seed=seed, workers=seed)), folder / "last.pt")
    lines = [dict(epoch=n, val={"R@1": value, "mAP": value - 10}) for n, value in enumerate(vals)]
    if test:
        lines.append(dict(test={"best.pt, text to image": {"R@1": test, "mAP": test - 5}}))
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def runs(tmp_path):
    make_run(tmp_path / "a0", 0, [10.0, 50.0], 60.0)
    make_run(tmp_path / "a1", 1, [12.0, 54.0], 64.0)
    make_run(tmp_path / "b", 0, [10.0, 40.0, 45.0], lr=0.5)             # not finished
    return tmp_path


def test_seeds_are_one_line_with_their_spread(runs):
    page = runs / "page.html"
    said = run("eval.py", "--runs", runs / "a0", runs / "a1", runs / "b", "--page", page)
    a, b = said.splitlines()[:2]
    assert a == "A  lr=0.0001  runs=2  test R@1=62.00 ± 2.83  test mAP=57.00 ± 2.83"
    assert b == "B  lr=0.5  runs=1  val R@1=45.00  val mAP=35.00"
    text = page.read_text(encoding="utf-8")
    assert text.count("<polyline") == 4 and text.count("<polygon") == 4 and "62.00 ± 2.83" in text


def test_curves_are_means_between_the_lowest_and_the_highest():
    logs = [[dict(epoch=1, val={"R@1": 10.0})], [dict(epoch=1, val={"R@1": 20.0}), dict(epoch=2, val={"R@1": 30.0})]]
    found = evaluation.validation_curves({"A": ({}, logs)}, "R@1")
    assert found == {"A": [(1, 15.0, 10.0, 20.0), (2, 30.0, 30.0, 30.0)]}


def test_a_folder_without_a_run(runs):
    assert "the run should be at" in error("eval.py", "--runs", runs)
