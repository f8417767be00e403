"""The scripts in lab/: the groups of runs, their tables, the queue of runs, the exercises, the benchmark."""

import ast
import json
import shutil
import sys

import pytest

import distill
import generate
import tbps
from conftest import ROOT, error
from lab import ablations, benchmark, few_shot, groups, tables, tour

PARSERS = {"tbps.py": tbps, "lab/few_shot.py": few_shot, "distill.py": distill, "generate.py": generate}
# how many words come before the options of tbps.py
OWN_WORDS = {"lab/probes.py": 2, "lab/domain_shift.py": 3, "lab/train_variants.py": 1}


# ---- groups ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", groups.GROUPS)
def test_groups_are_commands(group):
    """Each command can be parsed, names runs that come before it, and is compared with rows that exist."""
    rows = groups.GROUPS[group][1]
    paths = {}
    for name in rows:
        script, *options = groups.command(group, name, 0).format_map(paths).split()
        if script in OWN_WORDS:
            script, options = "tbps.py", options[OWN_WORDS[script]:]
        PARSERS[script].parse_args(options)
        paths[groups.row(name)] = f"runs/{len(paths)}"
        assert set(groups.bases(name)) <= {groups.row(other) for other in rows}
    assert len(paths) == len(rows)                                      # no two rows have one name
    assert groups.PUBLISHED.get(group, {}).keys() <= paths.keys()


def test_every_record_is_a_row():
    """A renamed option must be renamed in results.jsonl, too, or its runs would be made again."""
    commands = {groups.command(*run) for run in ablations.all_runs(groups.GROUPS, 3)}
    assert len(commands & tables.recorded().keys()) > 500


# ---- tables ----------------------------------------------------------------------------------------------------------


SCORES = {
    "CLIP": (50, 51, 52),
    "dropout": (51, 52.1, 53.2),
    "locked patches": (49, 50.1, 51.2),
    "N-ITC": (50.5, 51.5, 52.6),
    "soft labels": (50.5, 51.4, 52.8),
}


@pytest.fixture
def records(tmp_path, monkeypatch):
    """Three seeds of SCORES as the mAP of the group `tricks`; R@1 is 100 minus it, as the verdict must read mAP."""
    monkeypatch.setattr(tables, "RESULTS", tmp_path / "results.jsonl")
    names = {groups.row(name): name for name in groups.GROUPS["tricks"][1]}
    for row, values in SCORES.items():
        for seed, value in enumerate(values):
            scores = {"R@1": 100 - value, "mAP": value}
            ablations.record(groups.command("tricks", names[row], seed), {tables.T2I: scores, tables.EXCLUDED: scores})


def cells(text):
    """{row: its other cells} of the first Markdown table."""
    lines = [line[1:-1].split("|") for line in text.split("\n\n")[0].splitlines()[2:]]
    return {line[0].strip(): [cell.strip() for cell in line[1:]] for line in lines}


def test_table(records):
    found = cells(tables.table("tricks", 3) + "\n")
    assert found["CLIP"] == ["49.0 ± 1.0", "", "51.0 ± 1.0", "", "", ""]
    assert found["dropout (over CLIP)"] == ["47.9 ± 1.1", "-1.1 ± 0.2", "52.1 ± 1.1", "+1.1 ± 0.2", "+0.39", "yes"]
    assert found["locked patches (over CLIP)"][-2:] == ["+0.60", "no"]
    assert found["soft labels (over N-ITC)"][-2:] == ["+0.86", "inconclusive"]
    assert len(found) == 5                                              # "all of these" was not run
    # pooled standard deviation 0.108, 8 degrees of freedom: 2.306 * 0.108 / 3 ** 0.5
    said = "smallest difference significant at 5 % (pooled variance): 0.1 R@1, 0.1 mAP."
    assert tables.table("tricks", 3).splitlines()[-1] == f"`tricks`, 3 seeds; {said}"


def test_table_of_fewer_seeds_than_asked_for(records):
    text = tables.table("tricks", 5)
    assert text.splitlines()[-1] == tables.table("tricks", 3).splitlines()[-1]
    assert "| dropout, 3 seeds (over CLIP) |" in text


def test_teachers_have_a_table_of_their_own(records):
    ablations.record(groups.command("lcr2s-few", "teacher", 0), {tables.TEACHER: {"R@1": 60, "mAP": 70}})
    lines = tables.table("lcr2s-few", 3).splitlines()
    assert lines[-3:] == ["| lcr2s-few: R@1, mAP | teacher |", "|---|---|", f"| {tables.TEACHER} | 60.0, 70.0 |"]


def test_tables_in_a_text(records):
    text = "a\n<!-- ablations: tricks -->\nold\n<!-- end -->\nb"
    assert ablations.filled(text) == text.replace("old", tables.table("tricks", 3))


def test_t_quantiles():
    assert [round(tables.t_quantile(df), 1) for df in (1, 3, 4, 8, 30)] == [12.7, 3.2, 2.8, 2.3, 2.0]


def test_bars_and_html(records):
    assert tables.bars("tricks", 3).count("<rect") == 5 and "47.9 ± 1.1" in tables.bars("tricks", 3)
    assert tables.bars("images", 3) == ""
    page = tables.as_html(tables.table("tricks", 3))
    assert page.count("<tr>") == 6 and page.count("<table>") == page.count("</table>") == 1
    assert "pooled variance" in page and "<td>+0.39</td><td>yes</td>" in page


def test_results_hold_the_tables_of_the_records():
    text = (ROOT / "lab/RESULTS.md").read_text(encoding="utf-8")
    assert text.count("<!-- ablations: ") >= 5
    assert ablations.filled(text) == text, "run python lab/ablations.py --results"


# ---- the queue of runs -----------------------------------------------------------------------------------------------

FIRST = "tbps.py --x 1 --seed 0"
STUDENT = "tbps.py --teacher {teacher}/best.pt --seed 0"


@pytest.fixture
def queue(tmp_path, monkeypatch):
    """Two groups that share a run; `start` only writes a log, with R@1 50 and as mAP the number of runs so far."""
    monkeypatch.setattr(ablations, "ROOT", tmp_path)
    monkeypatch.setattr(tables, "RESULTS", tmp_path / "results.jsonl")
    small = {
        "a": ("tbps.py", {"teacher": "--x 1", "student < teacher": "--teacher {teacher}/best.pt"}),
        "b": ("tbps.py", {"same": "--x 1"}),
    }
    for module in (groups, ablations):
        monkeypatch.setattr(module, "GROUPS", small)
    made = []

    def start(path, line, threads):
        made.append(line.replace(f"{tmp_path}/", ""))
        path.mkdir(parents=True)
        scores = {tables.T2I: {"R@1": 50.004, "mAP": len(made)}}
        (path / "log.jsonl").write_text(json.dumps({"test": scores}) + "\n")

    monkeypatch.setattr(ablations, "start", start)
    return made


def test_a_shared_run_is_made_once_after_those_it_names(queue):
    ablations.make_runs([("a", "student < teacher", 0), ("a", "teacher", 0), ("b", "same", 0)], 2)
    assert queue == [FIRST, "tbps.py --teacher runs/ablations/a/teacher-0/best.pt --seed 0"]
    assert tables.recorded() == {
        FIRST: {tables.T2I: {"R@1": 50.0, "mAP": 1}},
        STUDENT: {tables.T2I: {"R@1": 50.0, "mAP": 2}},
    }


def test_a_recorded_run_is_repeated_only_for_its_folder(queue, tmp_path):
    ablations.make_runs([("a", "student < teacher", 0)], 2)
    ablations.make_runs([("a", "student < teacher", 0)], 2)
    assert len(queue) == 2
    shutil.rmtree(tmp_path / "runs")
    ablations.make_runs([("a", "student < teacher", 0)], 2)
    assert len(queue) == 4 and len(tables.recorded()) == 2


def test_recorded_runs_again(queue):
    """Runs that need no other run are repeated, after the pre-trained model is made."""
    ablations.make_runs([("a", "student < teacher", 0), ("a", "student < teacher", 1)], 1)
    text = ablations.repeat(["a", "b"], 2, 2, 1)
    assert queue[4].startswith("tbps.py --dataset toy-generic")
    assert sorted(queue[5:]) == [FIRST, FIRST.replace("seed 0", "seed 1")]
    assert text.count("| 50.00 | 50.00 | ") == 2
    with pytest.raises(ValueError, match="of these groups 2 runs are recorded"):
        ablations.repeat(["a", "b"], 2, 3, 1)


def test_records_without_a_metric(queue):
    """As old records are, which hold only mAP; and those of teachers, which hold nothing to compare."""
    ablations.record(FIRST, {tables.T2I: {"mAP": 1}})
    ablations.record(FIRST.replace("seed 0", "seed 1"), {tables.TEACHER: {"mAP": 1}})
    assert "| not recorded | 50.00 | 1.00 |" in ablations.repeat(["b"], 2, 1, 1)
    assert ">1.0<" in tables.bars("b", 1)
    with pytest.raises(ValueError, match="of these groups 1 runs are recorded"):
        ablations.repeat(["b"], 2, 2, 1)


@pytest.mark.parametrize("options", [["--again", "0"], ["--jobs", "0"], ["--seeds", "-2"]])
def test_numbers_are_positive(options):
    assert "is not 1, 2, 3" in error("lab/ablations.py", *options)


def test_ablations_do_one_thing():
    assert "not allowed with" in error("lab/ablations.py", "--table", "--again", "3")


# ---- the benchmark ---------------------------------------------------------------------------------------------------


def test_the_benchmark_names_its_rows():
    assert "no row holds 'nonsense'" in error("lab/benchmark.py", "--only", "nonsense")


# ---- the exercises ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", range(1, 1 + len(tour.EXERCISES)))
def test_exercises_fit_the_code(n, tmp_path):
    """The lines to change exist once, the result is Python, and the command can be parsed."""
    _, command, changes = tour.EXERCISES[n - 1]
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    tour.change(tmp_path, changes)
    for file, _, new in changes:
        changed = (tmp_path / file).read_text(encoding="utf-8")
        assert new in changed and ast.parse(changed)
    script, *options = command.split()
    assert script == "eval.py" or tbps.parse_args(options)
    assert changes or options


def test_exercises_are_applied_one_by_one():
    assert "takes one exercise" in error("lab/tour.py", "1", "2", "--apply")
    assert "takes one exercise" in error("lab/tour.py", "--apply")
    assert "there are 1 to 10" in error("lab/tour.py", "11")


def test_without_a_number_all_exercises_are_tried(tmp_path, monkeypatch, capsys):
    (tmp_path / tour.MAIN).mkdir(parents=True)
    (tmp_path / tour.MAIN / "report.html").touch()
    monkeypatch.setattr(tour, "ROOT", tmp_path)
    monkeypatch.setattr(tour, "score", lambda command, changes=(): (60.0 + len(changes), 50.0))
    monkeypatch.setattr(sys, "argv", ["tour.py"])
    tour.main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 + len(tour.EXERCISES)
    assert lines[-1].endswith("| losses.py, tbps.py | 62.00 (+2.0) | 50.00 (+0.0) |")


def test_an_applied_exercise_writes_to_a_folder_of_its_own(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tour, "ROOT", tmp_path)
    shutil.copy(ROOT / "tbps.py", tmp_path)
    monkeypatch.setattr(sys, "argv", ["tour.py", "9", "--apply"])
    tour.main()
    assert capsys.readouterr().out == f"9: python {tour.TRAIN} --out runs/tour-9\n"
    assert (tmp_path / "tbps.py").read_text() != (ROOT / "tbps.py").read_text()
    with pytest.raises(ValueError, match="applied already"):
        tour.main()


@pytest.mark.parametrize("method", ["baseline", "irra", "uit", "ctlg"])
def test_the_benchmark_makes_steps_of_a_method(method):
    """The batch that it makes is one that the method's losses can read."""
    benchmark.method_step(method, batch=2, size=(48, 32))()
