"""Choose the toy recipe of each method: its rate, temperature and weights of losses, on the validation split.

    python lab/toy_recipes.py                       all trials that are not recorded yet, then the table
    python lab/toy_recipes.py --only irra ctlg      some methods
    python lab/toy_recipes.py --table               the table of what is recorded

The published values were chosen for a large model on photos. Here every method has twelve trials, the baseline, too:
three rates times three temperatures; then, with the best of these, three changes of its own, one at a time. A trial
fine-tunes the toy CLIP with a tenth of the persons, for 10 epochs, seed 0. Its score is the validation mAP of the epoch
with the best R@1. The trials are lines of lab/toy_recipes.jsonl. No recipe of tbps.py uses the winners yet."""

import argparse
import json
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import data                                                             # noqa: E402
import tbps                                                             # noqa: E402
from lab import ablations, tables                                       # noqa: E402

RECORDS = ROOT / "lab/toy_recipes.jsonl"
RATES, TEMPERATURES = ("1e-4", "3e-4", "1e-3"), ("0", "0.02", "0.05")  # 0: learned
OWN = {  # method: changes of its own
    "baseline": ["weight_decay=0.1", "text_dropout=0.05", "lock_patch=1"],
    "tbps-clip-simplified": ["soft=0", "deletion=0", "image_aug=shift"],
    "tbps-clip": ["ss=0.1", "ss=0.1 soft=0", "ss=0.1 citc=0"],
    "irra": ["id=0.2", "mlm=0.2", "id=0.2 mlm=0.2"],
    "uit": ["triplet=1", "restoration=1", "triplet=1 restoration=1"],
    "ctlg": ["mixup=0.2", "approximate=0.2", "mixup=0.2 approximate=0.2"],
    "lcr2s": ["affinity=0.5", "affinity=2", "warm=1"],
}


def command(method, settings):
    script = "distill.py" if method == "lcr2s" else f"tbps.py --method {method}"
    return f"{script} --dataset toy-few --epochs 10 --set warmup=1 {settings} --seed 0"


def recorded():
    """{command: {metric: validation score}}"""
    lines = RECORDS.read_text(encoding="utf-8").splitlines() if RECORDS.exists() else []
    return {trial["command"]: trial["val"] for trial in map(json.loads, lines)}


def best_validation(folder):
    """R@1 and mAP of the epoch with the best R@1. Of LCR2S the student counts."""
    lines = tbps.read_log(folder / "student" if (folder / "student").exists() else folder)
    scores = [line["val"] for line in lines if line.get("val") and line["epoch"] > 0]       # epoch 0: before training
    best = max(scores, key=lambda val: val["R@1"])
    return {metric: round(best[metric], 2) for metric in ("R@1", "mAP")}


def run(line):
    """Train a trial that is not recorded, and record its scores."""
    if line in recorded():
        return
    folder = ROOT / "runs/toy-recipes" / "".join(c if c.isalnum() or c in ".=-" else "_" for c in line)
    ablations.start(folder, line, threads=1)
    with open(RECORDS, "a", encoding="utf-8") as f:
        f.write(json.dumps(dict(command=line, val=best_validation(folder))) + "\n")
    shutil.rmtree(folder)


def run_all(lines, jobs):
    with ThreadPoolExecutor(jobs) as pool:
        list(tqdm(pool.map(run, lines), total=len(lines), unit="trial"))


def first_trials():
    """The settings of the first nine trials, the same for each method."""
    return [f"lr={rate} tau={tau}" for rate in RATES for tau in TEMPERATURES]


def best_of(method, trials):
    """The settings with the highest mAP, of those that are recorded; None if none is."""
    known = recorded()
    able = [settings for settings in trials if command(method, settings) in known]
    return max(able, key=lambda settings: known[command(method, settings)]["mAP"], default=None)


def all_trials(method):
    first = first_trials()
    best = best_of(method, first)
    return first + [f"{best} {change}" for change in OWN[method]] if best else first


def table(methods):
    """Markdown: a row per trial, R@1 and mAP on the validation split; the winner of each method is marked."""
    known, rows = recorded(), [["method", "settings", "val R@1", "val mAP", ""]]
    for method in methods:
        trials = all_trials(method)
        best = best_of(method, trials)
        for settings in trials:
            if scores := known.get(command(method, settings)):
                winner = "chosen" if settings == best else ""
                rows.append([method, settings, f"{scores['R@1']:.1f}", f"{scores['mAP']:.1f}", winner])
    return tables.markdown(rows)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--only", nargs="+", choices=OWN, default=list(OWN), help="methods (default: all)")
    p.add_argument("--jobs", type=ablations.positive, default=2, help="trials at a time, a core each (default: 2)")
    p.add_argument("--table", action="store_true", help="run nothing")
    args = p.parse_args()
    if not args.table:
        run_all([command(method, settings) for method in args.only for settings in first_trials()], args.jobs)
        run_all([command(method, settings) for method in args.only for settings in all_trials(method)], args.jobs)
    print(table(args.only))


if __name__ == "__main__":
    data.command(main)
