"""The scripts in lab/: ablations and their tables, exercises, the benchmark."""

import ast
import json
import shutil
import sys

import pytest

import distill
import generate
import tbps
from lab import ablations, tour
from conftest import ROOT, error

FILES = sorted(p.stem for p in ROOT.glob("*.py"))


@pytest.mark.parametrize("group", ablations.GROUPS)
def test_ablations_are_commands(group):
    """Each can be parsed, names runs that come before it, and is compared with rows that exist."""
    common, rows = ablations.GROUPS[group]
    paths = {}
    for name, options in rows.items():
        script, *options = f"{'' if '.py ' in options else common} {options.format_map(paths)}".split()
        if script in (more := {"lab/probes.py": 2, "lab/domain_shift.py": 3, "lab/train_variants.py": 1}):       # words before what tbps.py takes
            script, options = "tbps.py", options[more[script]:]
        {"tbps.py": tbps, "distill.py": distill, "generate.py": generate}[script].parse_args(options)
        assert set(name.split(" < ")[1:]) <= {ablations.row(n) for n in rows}
        paths[ablations.row(name)] = f"runs/{len(paths)}"


@pytest.mark.parametrize("n", range(1, 1 + len(tour.EXERCISES)))
def test_exercises_fit_the_code(n, tmp_path):
    """The lines to change are there, once, and what comes out is Python; the command can be parsed."""
    asked, command, changes = tour.EXERCISES[n - 1]
    for file in FILES:
        (tmp_path / f"{file}.py").write_text((ROOT / f"{file}.py").read_text())
    tour.change(tmp_path, changes)
    for file, _, new in changes:
        changed = (tmp_path / file).read_text()
        assert new in changed and ast.parse(changed)
    script, *options = command.split()
    assert script == "eval.py" or tbps.parse_args(options)
    assert changes or options


def test_exercises_are_applied_one_by_one():
    assert "takes one exercise" in error("lab/tour.py", "1", "2", "--apply") and "takes one exercise" in error("lab/tour.py", "--apply")
    assert "there are 1 to 10" in error("lab/tour.py", "11")


def test_without_a_number_all_exercises_are_tried(tmp_path, monkeypatch, capsys):
    (tmp_path / tour.MAIN).mkdir(parents=True)
    (tmp_path / tour.MAIN / "best.pt").touch()
    monkeypatch.setattr(tour, "ROOT", tmp_path)
    monkeypatch.setattr(tour, "score", lambda command, changes=(): (60.0 + len(changes), 50.0))
    monkeypatch.setattr(sys, "argv", ["tour.py"])
    tour.main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 + len(tour.EXERCISES) and lines[-1].endswith("| losses.py, tbps.py | 62.00 (+2.0) | 50.00 (+0.0) |")


def test_an_applied_exercise_does_not_touch_the_main_job(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tour, "ROOT", tmp_path)
    (tmp_path / "tbps.py").write_text((ROOT / "tbps.py").read_text())
    monkeypatch.setattr(sys, "argv", ["tour.py", "9", "--apply"])
    tour.main()
    assert capsys.readouterr().out == "9: python tbps.py --out runs/tour-9\n" and (tmp_path / "tbps.py").read_text() != (ROOT / "tbps.py").read_text()
    with pytest.raises(ValueError, match="applied already"):
        tour.main()


@pytest.mark.parametrize("options", [["--again", "0"], ["--jobs", "0"], ["--seeds", "-2"]])
def test_ablations_take_numbers_from_1_on(options):
    assert "is not 1, 2, 3" in error("lab/ablations.py", *options)


def test_ablations_do_one_thing():
    assert "not allowed with" in error("lab/ablations.py", "--table", "--again", "3")


def test_the_benchmark_names_its_rows():
    assert "no row holds 'nonsense'" in error("lab/benchmark.py", "--only", "nonsense")


def test_ablation_tables(tmp_path, monkeypatch):
    monkeypatch.setattr(ablations, "ROOT", tmp_path)
    scores = {"CLIP": (50, 51, 52), "dropout": (51, 52.1, 53.2), "locked patches": (49, 50.1, 51.2), "N-ITC": (50.5, 51.5, 52.6), "soft labels": (50.5, 51.4, 52.8)}
    (tmp_path / "lab").mkdir()
    names = {ablations.row(n): n for n in ablations.GROUPS["tricks"][1]}
    for name, values in scores.items():
        for seed, value in enumerate(values):
            row = {"R@1": 100 - value, "mAP": value}                    # agreement is judged by mAP
            ablations.record(ablations.command("tricks", names[name], seed), {f"best.pt, {way}": row for way in ("text to image", "text to other images")})
    text = ablations.table("tricks", 3)
    cells = {line.split("|")[1].strip(): [c.strip() for c in line.split("|")[2:-1]] for line in text.splitlines()[2:] if line.startswith("|")}
    assert cells["CLIP"] == ["49.0 ± 1.0", "", "51.0 ± 1.0", "", "", ""] and cells["dropout (over CLIP)"] == ["47.9 ± 1.1", "-1.1 ± 0.2", "52.1 ± 1.1", "+1.1 ± 0.2", "+0.39", "yes"]
    assert cells["locked patches (over CLIP)"][-2:] == ["+0.60", "no"] and cells["soft labels (over N-ITC)"][-2:] == ["+0.86", "within the spread"]
    assert cells["N-ITC (over CLIP)"][-2:] == ["", ""] and len(cells) == 5                              # no run of "all of these"
    assert text.splitlines()[-1] == "`tricks`, 3 seeds; more than noise, by all rows together: differences of 0.1 of R@1, 0.1 of mAP."      # 2.306 * 0.108 / 3 ** 0.5
    assert ablations.table("tricks", 5).splitlines()[-1] == text.splitlines()[-1] and "| dropout, 3 seeds (over CLIP) |" in ablations.table("tricks", 5)          # of those there are
    ablations.record(ablations.command("lcr2s-few", "teacher", 0), {"held-out view: richer": {"R@1": 60, "mAP": 70}})
    assert ablations.table("lcr2s-few", 3).splitlines()[-3:] == ["| lcr2s-few: R@1, mAP | teacher |", "|---|---|", "| held-out view: richer | 60.0, 70.0 |"]
    assert ablations.filled("a\n<!-- ablations: tricks -->\nold\n<!-- end -->\nb") == f"a\n<!-- ablations: tricks -->\n{text}\n<!-- end -->\nb"
    assert [round(ablations.student(df), 1) for df in (1, 3, 4, 8, 30)] == [12.7, 3.2, 2.8, 2.3, 2.0]
    assert ablations.bars("tricks", 3).count("<rect") == 5 and "47.9 ± 1.1" in ablations.bars("tricks", 3) and ablations.bars("images", 3) == ""
    assert ablations.as_html(text).count("<tr>") == 6 and ablations.as_html(text).count("<table>") == 1 and "more than noise" in ablations.as_html(text) and "<td>+0.39</td><td>yes</td>" in ablations.as_html(text)
    assert all(found.keys() <= set(map(ablations.row, ablations.GROUPS[group][1])) for group, found in ablations.PAPER.items())


def test_ablation_queue(tmp_path, monkeypatch):
    """A run that two groups have is made once, after those it names; what is recorded is made again only if its folder is needed."""
    monkeypatch.setattr(ablations, "ROOT", tmp_path)
    monkeypatch.setattr(ablations, "GROUPS", {"a": ("tbps.py", {"teacher": "--x 1", "student < teacher": "--teacher {teacher}/best.pt"}), "b": ("tbps.py", {"same": "--x 1"})})
    made = []

    def start(path, options, threads):
        made.append(options.replace(f"{tmp_path}/", ""))
        path.mkdir(parents=True)
        (path / "log.jsonl").write_text(json.dumps({"test": {"best.pt, text to image": {"R@1": 50.004, "mAP": len(made)}}}) + "\n")
    monkeypatch.setattr(ablations, "start", start)
    (tmp_path / "lab").mkdir()
    runs = [("a", "student < teacher", 0), ("a", "teacher", 0), ("b", "same", 0)]
    ablations.queue(runs, 2)
    teacher, student = "tbps.py --x 1 --seed 0", "tbps.py --teacher {teacher}/best.pt --seed 0"
    assert made == [teacher, "tbps.py --teacher runs/ablations/a/teacher-0/best.pt --seed 0"]
    assert ablations.recorded() == {teacher: {"best.pt, text to image": {"R@1": 50.0, "mAP": 1}}, student: {"best.pt, text to image": {"R@1": 50.0, "mAP": 2}}}
    shutil.rmtree(tmp_path / "runs")
    ablations.queue([("a", "student < teacher", 1)], 2)
    assert made[2:] == ["tbps.py --x 1 --seed 1", "tbps.py --teacher runs/ablations/a/teacher-1/best.pt --seed 1"] and len(ablations.recorded()) == 4
    text = ablations.again(["a", "b"], 2, 2, 1)                         # the two that need no other
    assert made[4].startswith("tbps.py --dataset toy-generic") and sorted(made[5:]) == [teacher, "tbps.py --x 1 --seed 1"] and text.count("| 50.00 | 50.00 | ") == 2
    ends = {tuple(line.split(" | ")[-2:]) for line in text.splitlines()[2:]}                            # mAP, recorded and now, in either order of the two runs
    assert ends in ({("1.00", "6.00 |"), ("3.00", "7.00 |")}, {("1.00", "7.00 |"), ("3.00", "6.00 |")})
    ablations.record(teacher, {"best.pt, text to image": {"mAP": 1}})   # as old records are
    assert "| not recorded | 50.00 | 1.00 |" in ablations.again(["b"], 1, 1, 1) and ">1.0<" in ablations.bars("b", 1)
    ablations.record("tbps.py --x 1 --seed 1", {"held-out view: richer": {"mAP": 1}})                   # nothing to compare: not drawn
    with pytest.raises(ValueError, match="of these groups 1 runs are recorded"):
        ablations.again(["a", "b"], 2, 2, 1)
    with pytest.raises(ValueError, match="of these groups 1 runs are recorded"):
        ablations.again(["b"], 1, 2, 1)


def test_best_is_what_was_measured():
    """--method best is the recipe of the rows that justify it."""
    assert tbps.parse_args(["--dataset", "toy", "--method", "best"])[1] == tbps.parse_args(["--dataset", "toy", *ablations.BEST.split()])[1]


def test_results_hold_the_tables_of_the_records():
    text = (ROOT / "lab/RESULTS.md").read_text()
    assert text.count("<!-- ablations: ") >= 5 and ablations.filled(text) == text, "python lab/ablations.py --results"
