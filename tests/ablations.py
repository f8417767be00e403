"""What each part is worth: runs on the toy people, and their table.

    python tests/ablations.py                        every run that is not there yet, then the tables
    python tests/ablations.py --only uit --seeds 1   one group, one seed
    python tests/ablations.py --table                the tables of what is there

A run is a command line and ends in runs/ablations/GROUP/NAME-SEED/; one that was cut off goes on where it stopped. Ablations fine-tune,
as the papers do, from a model that was trained on the generic toy domain (runs/ablations/generic, made first, 5 minutes). "{NAME}" in a
command is the folder of that run of the same seed, for which it waits. In the tables "own" means that the image a caption was written for
is left out; differences are paired by seed, against the rows that the name after '<' tells; the interval holds 95 % of them if they
are normal."""

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from string import Formatter

from tqdm import tqdm

ROOT = Path(__file__).parent.parent
GENERIC = "runs/ablations/generic"
FINE_TUNE = f"tbps.py --dataset toy --clip {GENERIC}/best.pt --epochs 3 --set warmup=0.5"
SDM_ID = "--method irra --set mlm=0"
UIT_PARTS = {
    "ITC": f"{SDM_ID} sdm=0 id=0 itc=1",
    "SDM < ITC": f"{SDM_ID} id=0",
    "SDM + ID < SDM": SDM_ID,
    "SDM + ID + triplet < SDM + ID": f"{SDM_ID} triplet=10",
    "SDM + ID + restoration < SDM + ID": f"{SDM_ID} restoration=10",
    "SDM + ID + pruning < SDM + ID": f"{SDM_ID} prune=0.2",
    "SDM + ID + masking < SDM + ID": f"{SDM_ID} mask_content=0.3 mask_other=0.05 mask_all=1",
    "UIT, all of it < SDM + ID": "--method uit",
    "IRRA, with MLM < SDM + ID": "--method irra",
}
LCR2S_PARTS = {  # on frozen encoders, those of "plain"; students differ from plain in nothing but the losses that copy
    "plain": "--stage light --set affinity=0",
    "teacher": "--plain {plain}/light/best.pt --stage richer",
    "A-KD < plain < SELF": "--teacher {teacher}/richer/last.pt",
    "SELF < plain": "--teacher {teacher}/richer/last.pt --set target=self",
    "CENTROID < plain < SELF": "--teacher {teacher}/richer/last.pt --set target=centroid",
    "affinity without the pair < plain < SELF": "--teacher {teacher}/richer/last.pt --set pair=0",
    "features < plain": "--teacher {teacher}/richer/last.pt --set affinity=0 features=0.5",
    "relations < plain": "--teacher {teacher}/richer/last.pt --set affinity=0 relations=0.2",
    "P-KD < plain < A-KD": "--teacher {teacher}/richer/last.pt --set affinity=0 features=0.5 relations=0.2",
}


def ctlg(dataset, epochs, longer, count, gate):
    """The parts of CTLG; the baseline has a temperature of 0.02. `longer`: epochs without generated pairs of as many steps as with them, or a few more."""
    sharp, diffusion = "--method ctlg --set approximate=0 mixup=0", f"runs/{dataset}-diffusion-0"
    return f"tbps.py --dataset {dataset} --clip {GENERIC}/best.pt --epochs {epochs} --set warmup={epochs / 6:g}", {
        "baseline": f"{sharp} tau=0.02",
        "pairs": f"generate.py --dataset {dataset} --diffusion {diffusion} --count {count} --judge {{baseline}}/best.pt",
        "tau 0.005 < baseline": sharp,
        "as many steps < tau 0.005": f"{sharp} epochs={longer}",
        "+ generated pairs < tau 0.005 < as many steps": f"{sharp} --extra {{pairs}}",
        "+ generated pairs, gate < tau 0.005 < as many steps < + generated pairs": f"{sharp} --extra {{pairs}} --min-score {gate}",
        "+ approximate text < tau 0.005": f"{sharp} approximate=0.5",
        "+ mixup < tau 0.005": f"{sharp} mixup=0.5",
        "+ mixup of features < tau 0.005": f"{sharp} feature_mixup=1",
        "CTLG, all of it < tau 0.005 < as many steps": f"--method ctlg --extra {{pairs}} --min-score {gate}",
    }


CTLG_CHOICES = {
    "tau 0.005": "--method ctlg --set approximate=0 mixup=0",
    "tau 0.05 < tau 0.005": "--method ctlg --set approximate=0 mixup=0 tau=0.05",
    "all texts of the image right < tau 0.005": "--method ctlg --set approximate=0 mixup=0 same=image",
    "all texts of the person right < tau 0.005": "--method ctlg --set approximate=0 mixup=0 same=person",
    "rate 1e-4 < tau 0.005": "--method ctlg --set approximate=0 mixup=0 lr=1e-4",
    "rate 1e-5 < tau 0.005": "--method ctlg --set approximate=0 mixup=0 lr=1e-5",
}
GROUPS = {  # group: (what all its runs have, {name: options}); a name's first words, up to '<', are its row
    "uit": (FINE_TUNE, UIT_PARTS),
    "uit-few": (f"tbps.py --dataset toy-few --clip {GENERIC}/best.pt --epochs 20 --set warmup=2", UIT_PARTS),
    "uit-long": (f"tbps.py --dataset toy --clip {GENERIC}/best.pt --epochs 10 --set warmup=1",
                 {name: UIT_PARTS[name] for name in ("UIT, all of it < SDM + ID", "SDM + ID + restoration < SDM + ID", "ITC")} | {"SDM + ID": SDM_ID}),
    "uit-temperature": (FINE_TUNE, {
        "ITC": f"{SDM_ID} sdm=0 id=0 itc=1",
        "SDM < ITC": f"{SDM_ID} id=0",
        "ITC, tau 0.05 < ITC": f"{SDM_ID} sdm=0 id=0 itc=1 tau=0.05",
        "SDM, tau 0.05 < ITC, tau 0.05": f"{SDM_ID} id=0 tau=0.05",
        "SDM, random-count sampler < SDM": f"{SDM_ID} id=0 sampler=random-count",
    }),
    "uit-choices": (FINE_TUNE, {
        "UIT, all of it": "--method uit",
        "UIT, new layers x5 < UIT, all of it": "--method uit --set lr_new=5 lr_bias=2",
        "UIT, x5 as released < UIT, new layers x5": "--method uit --set lr_new=5 lr_bias=2 lr_named=1",
        "UIT, drop as released < UIT, all of it": "--method uit --set released_drop=1",
        "UIT, hardest positive < UIT, all of it": "--method uit --set hardest=1",
        "UIT, padding seen < UIT, all of it": "--method uit --set padding=1",
        "UIT, clean captions < UIT, all of it": "--method uit --set mask_all=0",
        "IRRA, with MLM": "--method irra",
        "IRRA, masked captions everywhere < IRRA, with MLM": "--method irra --set mask_all=1",
    }),
    "lcr2s": (f"distill.py --dataset toy --clip {GENERIC}/best.pt --epochs 3 --set warmup=0.5 tau=0.05", LCR2S_PARTS | {
        "plain, warm < plain": "--teacher {teacher}/richer/last.pt --set warm=1 affinity=0",
        "A-KD, warm < plain, warm < SELF, warm": "--teacher {teacher}/richer/last.pt --set warm=1",
        "SELF, warm < plain, warm": "--teacher {teacher}/richer/last.pt --set warm=1 target=self",
        "teacher, the mean": "--plain {plain}/light/best.pt --stage richer --set fusion=mean",
        "A-KD from the mean < A-KD < SELF": "--teacher {teacher, the mean}/richer/last.pt",
        "teacher, support 1": "--plain {plain}/light/best.pt --stage richer --set support=1",
        "A-KD, support 1 < A-KD": "--teacher {teacher, support 1}/richer/last.pt --set support=1",
        "teacher, support 2": "--plain {plain}/light/best.pt --stage richer --set support=2",
        "A-KD, support 2 < A-KD": "--teacher {teacher, support 2}/richer/last.pt --set support=2",
        "teacher, end to end": "--method lcr2s-paper --stage richer",
        "P-KD, end to end < plain < P-KD": "--teacher {teacher, end to end}/richer/last.pt --set affinity=0 features=0.5 relations=0.2",
        "half": "--teacher {teacher}/richer/last.pt --student half --set affinity=0",
        "half, A-KD < half < half, SELF": "--teacher {teacher}/richer/last.pt --student half",
        "half, SELF < half": "--teacher {teacher}/richer/last.pt --student half --set target=self",
        "narrow": "--teacher {teacher}/richer/last.pt --student narrow --set affinity=0",
        "narrow, A-KD < narrow < narrow, SELF": "--teacher {teacher}/richer/last.pt --student narrow",
        "narrow, SELF < narrow": "--teacher {teacher}/richer/last.pt --student narrow --set target=self",
    }),
    "ctlg": ctlg("toy", 3, 4, 1500, "direction=0.65"),
    "ctlg-choices": (FINE_TUNE, CTLG_CHOICES),
    "ctlg-few": ctlg("toy-few", 20, 30, 600, "direction=0.65"),
    "lcr2s-few": (f"distill.py --dataset toy-few --clip {GENERIC}/best.pt --epochs 20 --set warmup=2 tau=0.05", LCR2S_PARTS),
}


def row(name):
    return name.split(" < ")[0]


def folder(group, name, seed):
    return ROOT / "runs/ablations" / group / f"{row(name).replace(' ', '_').replace(',', '')}-{seed}"


def result(path):
    """{what: test scores} of a finished run, of its last stage, or None; {} of finished generated pairs."""
    if (path / "pairs.jsonl").exists():
        return {}
    log = next((f for stage in ("light", "richer", ".") if (f := path / stage / "log.jsonl").exists()), None)
    last = json.loads(log.read_text().splitlines()[-1]) if log and log.stat().st_size else {}
    return last.get("test")


def start(path, options, threads):
    """Makes a run, or ends one, quietly; what it printed is in its folder if it failed."""
    script, *options = options.split()
    command = [sys.executable, script, *options, "--out", path]
    if script != "generate.py":                           # which goes on by itself
        command += ["--resume"] * any(path.glob("**/last.pt")) + ["--workers", "0"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | dict(OMP_NUM_THREADS=str(threads)), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stdout}")


def queue(groups, seeds, jobs):
    """Runs what is not there yet, some at a time. A run waits for those it names, which are earlier in the queue."""
    runs, threads = {}, max(1, os.cpu_count() // jobs)

    def make(path, options, needed):
        for other in needed:
            if other in runs:
                runs[other].result()
        start(path, options, threads)

    with ThreadPoolExecutor(jobs) as pool:
        for group in groups:
            common, rows = GROUPS[group]
            for name, seed in ((name, seed) for name in rows for seed in range(seeds)):
                path, paths = folder(group, name, seed), {row(n): folder(group, n, seed) for n in rows}
                if result(path) is None:
                    needed = [paths[n] for _, n, *_ in Formatter().parse(rows[name]) if n]
                    runs[path] = pool.submit(make, path, f"{'' if '.py ' in rows[name] else common} {rows[name].format_map(paths)} --seed {seed}", needed)
        failed = [run.exception() for run in tqdm(as_completed(runs.values()), total=len(runs), unit="run") if run.exception()]
    if failed:
        raise failed[0]


WAYS = {"R@1": ("text to image", "R@1"), "mAP": ("text to image", "mAP"), "R@1, own": ("text to other images", "R@1"), "mAP, own": ("text to other images", "mAP")}


def mean(values):
    return f"{statistics.mean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")


def difference(pairs):
    """The mean and its 95 % interval, by Student's t."""
    if len(pairs) < 2:
        return f" ({pairs[0]:+.1f})" if pairs else ""
    t = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}.get(len(pairs), 2.5)
    return f" ({statistics.mean(pairs):+.1f} ± {t * statistics.stdev(pairs) / len(pairs) ** 0.5:.1f})"


def table(group, seeds):
    """Markdown: a row per name and row it is compared with; the mean and standard deviation over seeds, then the mean of the paired
    differences and its interval. Richer models have a table of their own."""
    found = {row(name): {s: r for s in range(seeds) if (r := result(folder(group, name, s)))} for name in GROUPS[group][1]}
    lines = [f"| {group} | seeds | {' | '.join(WAYS)} | against |", "|---" * (3 + len(WAYS)) + "|"]
    teachers = {name: runs for name, runs in found.items() if any("held-out view: richer" in r for r in runs.values())}
    for name in GROUPS[group][1]:
        own, bases = found[row(name)], name.split(" < ")[1:]
        for n, base in enumerate(bases or [""]) if any(own.values()) and row(name) not in teachers else ():
            cells, both = [], [s for s in own if s in found.get(base, ())]
            for what, metric in WAYS.values():
                value = {s: r[f"best.pt, {what}"][metric] for s, r in own.items() if f"best.pt, {what}" in r}
                pairs = [value[s] - found[base][s][f"best.pt, {what}"][metric] for s in both]
                cells.append((mean(value.values()) if value and n == 0 else "") + difference(pairs))
            lines.append(f"| {row(name) if n == 0 else ''} | {len(own) if n == 0 else ''} | {' | '.join(cells)} | {base} |")
    if teachers:
        lines += ["", f"| {group}: R@1, mAP | {' | '.join(teachers)} |", "|---" * (1 + len(teachers)) + "|"]
        for what in next(iter(next(iter(teachers.values())).values())):
            lines.append(f"| {what} | " + " | ".join(", ".join(mean([r[what][metric] for r in runs.values()]) for metric in ("R@1", "mAP")) for runs in teachers.values()) + " |")
    return "\n".join(lines)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--only", nargs="+", choices=GROUPS, default=list(GROUPS), help="groups of runs (default: all)")
    p.add_argument("--seeds", type=int, default=3, help="seeds 0 ... N-1 (default: 3)")
    p.add_argument("--jobs", type=int, default=2, help="runs at a time, sharing the cores (default: 2)")
    p.add_argument("--table", action="store_true", help="run nothing")
    args = p.parse_args()
    if not args.table:
        if result(ROOT / GENERIC) is None:
            start(ROOT / GENERIC, "tbps.py --dataset toy-generic", os.cpu_count())
        for group, dataset, epochs in (("ctlg", "toy", 14), ("ctlg-few", "toy-few", 100)):              # half an hour, 20 minutes
            if group in args.only and not (ROOT / f"runs/{dataset}-diffusion-0/unet").exists():
                start(ROOT / f"runs/ablations/{group}/trial", f"generate.py --dataset {dataset} --words {GENERIC}/best.pt --count 1 --set train_epochs={epochs}", os.cpu_count())
        queue(args.only, args.seeds, args.jobs)
    for group in args.only:
        print(f"\n{table(group, args.seeds)}")


if __name__ == "__main__":
    main()
