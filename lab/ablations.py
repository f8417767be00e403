"""What each part is worth: trains the runs of lab/groups.py on the synthetic pedestrians and makes their tables.

    python lab/ablations.py                        every run that is not recorded yet, then the tables
    python lab/ablations.py --only uit --seeds 1   one group, one seed
    python lab/ablations.py --table                the tables of what is recorded
    python lab/ablations.py --results              write these tables into lab/RESULTS.md
    python lab/ablations.py --only uit --again 5   repeat five recorded runs, chosen at random
    python lab/ablations.py --only uit --folders   train recorded runs, too, for their checkpoints

A run is a command line and ends in runs/ablations/GROUP/ROW-SEED/. Its scores are a line of lab/results.jsonl, so a
run that two groups share is made once. An interrupted run continues where it stopped. A run takes a minute or two on 2
cores. The pre-trained model takes 5 minutes, the diffusion models of `ctlg` and `ctlg-few` 30 and 20."""

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from string import Formatter

import torch
from tqdm import tqdm

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import data                                                             # noqa: E402
import eval as evaluation                                               # noqa: E402
from lab import tables                                                  # noqa: E402
from lab.groups import DIFFUSION, GROUPS, PRETRAINED, SEEDS, command, row  # noqa: E402

# ---- one run ---------------------------------------------------------------------------------------------------------


def folder(group, name, seed):
    return ROOT / "runs/ablations" / group / f"{row(name).replace(' ', '_').replace(',', '')}-{seed}"


def result(path):
    """{what: test scores} of the last stage of a finished run; {} for generated pairs; None if not finished."""
    if (path / "pairs.jsonl").exists():
        return {}
    for stage in ("student", "teacher", "."):
        log = path / stage / "log.jsonl"
        if log.exists():
            lines = log.read_text(encoding="utf-8").splitlines()
            return json.loads(lines[-1]).get("test") if lines else None
    return None


def start(path, line, threads):
    """Make a run, or finish it. Its output is shown only if it fails."""
    script, *options = line.split()
    options += ["--out", path]
    if script != "generate.py":                                         # which continues by itself
        options += ["--workers", "0"] + ["--resume"] * any(path.glob("**/last.pt"))
    environment = os.environ | dict(OMP_NUM_THREADS=str(threads))
    done = subprocess.run([sys.executable, script, *options], cwd=ROOT, env=environment, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        raise RuntimeError(f"{script} {' '.join(map(str, options))}\n{done.stdout}")


def record(line, scores):
    """Append the scores of best.pt to the records."""
    kept = {what: {metric: round(value, 2) for metric, value in values.items()}
            for what, values in scores.items() if not what.startswith("last.pt")}
    with open(tables.RESULTS, "a", encoding="utf-8") as f:
        f.write(json.dumps(dict(command=line, torch=torch.__version__, test=kept)) + "\n")


# ---- many runs -------------------------------------------------------------------------------------------------------


def make_pretrained():
    """The model that all runs start from."""
    if result(ROOT / PRETRAINED) is None:
        line = "tbps.py --dataset toy-generic --clip none --set epochs=10 warmup=2 soft=0 lock_patch=0"
        start(ROOT / PRETRAINED, line, os.cpu_count())


def make_diffusion(wanted):
    """The diffusion models of the generated pairs."""
    for group, (dataset, epochs) in DIFFUSION.items():
        needed = group in wanted or "ctlg-few" in wanted                # which also uses the model of all persons
        if needed and not (ROOT / f"runs/{dataset}-diffusion-0/unet").exists():
            line = f"generate.py --dataset {dataset} --words {PRETRAINED}/best.pt --count 1 --set train_epochs={epochs}"
            start(ROOT / f"runs/ablations/{group}/trial", line, os.cpu_count())


def make_runs(todo, jobs):
    """Make runs, [(group, name, seed)], `jobs` at a time, each after those that it names; record their scores."""
    runs, failed = {}, []
    threads, old = max(1, os.cpu_count() // jobs), tables.recorded()

    def make(path, line, needed):
        for _, run in needed.values():
            run.result()                                                # wait for it; raises if it failed
        if result(path) is None:
            start(path, line.format_map({name: where for name, (where, _) in needed.items()}), threads)
        if line not in old:
            record(line, result(path))

    def submit(group, name, seed):
        line, names = command(group, name, seed), {row(other): other for other in GROUPS[group][1]}
        if line not in runs:
            fields = [field for _, field, *_ in Formatter().parse(line) if field]
            needed = {field: submit(group, names[field], seed) for field in fields}
            runs[line] = folder(group, name, seed), pool.submit(make, folder(group, name, seed), line, needed)
        return runs[line]

    with ThreadPoolExecutor(jobs) as pool:
        for run in todo:
            submit(*run)
        futures = [run for _, run in runs.values()]
        for run in tqdm(as_completed(futures), total=len(futures), unit="run"):
            if run.exception():
                failed.append(run.exception())
    if failed:
        raise failed[0]


def all_runs(names, seeds):
    """[(group, name, seed)] of these groups."""
    return [(group, name, seed)
            for group in names for name in GROUPS[group][1] for seed in range(SEEDS.get(group, seeds))]


def repeat(names, seeds, number, jobs):
    """Markdown: the recorded scores of some runs, chosen at random, beside those of a new run.

    Only runs that need no other run's folder and are scored text to image can be chosen."""
    known, lines = tables.recorded(), {command(*run) for run in all_runs(names, seeds)}
    able = sorted(line for line in lines & known.keys() if "{" not in line and tables.T2I in known[line])
    if number > len(able):
        raise ValueError(f"--again {number}: of these groups {len(able)} runs are recorded that need no other")
    make_pretrained()
    chosen, threads = random.sample(able, number), max(1, os.cpu_count() // jobs)
    rows = [["command", "R@1, recorded", "now", "mAP, recorded", "now"]]
    with tempfile.TemporaryDirectory() as base, ThreadPoolExecutor(jobs) as pool:
        paths = [Path(base) / str(n) for n in range(number)]
        list(tqdm(pool.map(start, paths, chosen, [threads] * number), total=number, unit="run"))
        for path, line in zip(paths, chosen):
            old, new = known[line][tables.T2I], result(path)[tables.T2I]
            values = [scores.get(metric) for metric in ("R@1", "mAP") for scores in (old, new)]
            rows.append([f"`{line}`"] + ["not recorded" if value is None else f"{value:.2f}" for value in values])
    return tables.markdown(rows)


# ---- output ----------------------------------------------------------------------------------------------------------


def filled(text):
    """A text with today's tables between its marks <!-- ablations: GROUP --> and <!-- end -->."""
    return re.sub(r"(<!-- ablations: (\S+) -->\n).*?(<!-- end -->)",
                  lambda match: f"{match[1]}{tables.table(match[2], 3)}\n{match[3]}", text, flags=re.DOTALL)


def write_tables(names, seeds):
    """Print the tables; write them as Markdown and, with bars, as HTML."""
    found = {group: tables.table(group, seeds) for group in names}
    text = "\n\n".join(f"{group}\n\n{table}" for group, table in found.items())
    page = ROOT / "runs/ablations/tables.html"
    page.parent.mkdir(parents=True, exist_ok=True)
    chapters = [(group, tables.bars(group, seeds) + tables.as_html(table)) for group, table in found.items()]
    evaluation.write_page(page, "Ablations on synthetic pedestrians", chapters)
    page.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
    print(f"\n{text}\n\nthe same as files: {page} and .md")


def positive(text):
    """A whole number from 1 on, for argparse."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text} is not 1, 2, 3, ...")
    return int(text)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    more = ", ".join(f"{group} {number}" for group, number in SEEDS.items())
    p.add_argument("--only", nargs="+", choices=GROUPS, default=list(GROUPS), help="groups of runs (default: all)")
    p.add_argument("--seeds", type=positive, default=3, help=f"seeds 0 ... N-1 (default: 3; {more})")
    p.add_argument("--jobs", type=positive, default=2, help="runs at a time, sharing the cores (default: 2)")
    g = p.add_mutually_exclusive_group()
    g.add_argument("--table", action="store_true", help="run nothing")
    g.add_argument("--folders", action="store_true", help="make recorded runs, too, if their folder is missing")
    g.add_argument("--results", action="store_true", help="write the tables of what is recorded into lab/RESULTS.md")
    g.add_argument("--again", type=positive, metavar="N", help="repeat N of the recorded runs")
    args = p.parse_args()
    if args.again:
        print(repeat(args.only, args.seeds, args.again, args.jobs))
        return
    if args.results:
        path = ROOT / "lab/RESULTS.md"
        path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")
        return
    known = tables.recorded()
    todo = [run for run in all_runs(args.only, args.seeds) if args.folders or command(*run) not in known]
    if todo and not args.table:
        make_pretrained()
        make_diffusion({group for group, *_ in todo})
        make_runs(todo, args.jobs)
    write_tables(args.only, args.seeds)


if __name__ == "__main__":
    data.command(main)
