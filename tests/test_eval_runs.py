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
    first, second = said.splitlines()[:2]
    assert first == "1  lr=0.0001  runs=2  test R@1=62.00 ± 2.83  test mAP=57.00 ± 2.83"
    assert second == "2  lr=0.5  runs=1  val, epoch 2: R@1=45.00  val, epoch 2: mAP=35.00"
    text = page.read_text(encoding="utf-8")
    assert text.count("<polyline") == 4 and text.count("<polygon") == 4
    assert "62.00 ± 2.83" in text and "<td>0.0001</td>" in text


def test_curves_are_means_between_the_lowest_and_the_highest():
    logs = [[dict(epoch=1, val={"R@1": 10.0})], [dict(epoch=1, val={"R@1": 20.0}), dict(epoch=2, val={"R@1": 30.0})]]
    found = evaluation.validation_curves({"A": ({}, logs), "B": ({}, [[]])}, "R@1")
    assert found == {"A": [(1, 15.0, 10.0, 20.0), (2, 30.0, 30.0, 30.0)], "B": []}
    assert evaluation.curve("R@1", found).count("<polyline") == 1       # what has no validation has no curve
    assert ">0</text>" in evaluation.curve("", {"A": [(1, 50.0), (2, 60.0)]})
    assert evaluation.curve("", {"A": [(1, 50.0), (2, 60.0)]}, zero=False).count(">0</text>") == 1     # of epochs only


def test_unfinished_runs_are_compared_at_the_last_epoch_that_all_have():
    logs = [[dict(epoch=n, val={"R@1": 10.0 * n, "mAP": 1.0}) for n in range(last)] for last in (2, 4)]
    assert evaluation.final_scores(logs)["val, epoch 1: R@1"] == "10.00 ± 0.00"
    assert evaluation.final_scores([[dict(test={"held-out view: teacher": {}})]]) == {}


def test_stages_are_no_seeds(runs):
    saved = torch.load(runs / "a0/last.pt")
    torch.save(saved | dict(args=saved["args"] | dict(trains="student")), runs / "a0/last.pt")
    said = run("eval.py", "--runs", runs / "a0", runs / "a1", runs / "a1", "--page", runs / "page.html")
    assert "trains=student  runs=1" in said and said.count("runs=1") == 2


def test_a_folder_without_a_run(runs):
    assert "the run should be at" in error("eval.py", "--runs", runs)
    said = run("eval.py", "--runs", runs, runs / "b", "--page", runs / "page.html")
    assert f"{runs}: no last.pt, left out" in said and "runs=1" in said
    assert "none of these folders" in error("eval.py", "--runs", runs, runs.parent)
    (runs / "b/log.jsonl").write_text('{"epoch": 1')
    assert "b/log.jsonl is damaged" in error("eval.py", "--runs", runs / "b")
