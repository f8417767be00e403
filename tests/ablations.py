"""What each part is worth: runs on the toy people, and their table.

    python tests/ablations.py                        every run that is not there yet, then the tables
    python tests/ablations.py --only uit --seeds 1   one group, one seed
    python tests/ablations.py --table                the tables of what is there

A run is a command line of tbps.py and ends in runs/ablations/GROUP/NAME-SEED/; one that was cut off goes on where it stopped. Ablations
fine-tune, as the papers do, from a model that was trained on the generic toy domain (runs/ablations/generic, made first, 5 minutes).
Differences are paired by seed, against the row that the name after '<' tells; the interval holds 95 % of them if they are normal."""

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).parent.parent
GENERIC = "runs/ablations/generic"
FINE_TUNE = f"--dataset toy --clip {GENERIC}/best.pt --epochs 3 --set warmup=0.5"
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
GROUPS = {  # group: (what all its runs have, {name: options}); a name's first words, up to '<', are its row
    "uit": (FINE_TUNE, UIT_PARTS),
    "uit-few": (f"--dataset toy-few --clip {GENERIC}/best.pt --epochs 20 --set warmup=2", UIT_PARTS),
    "uit-long": (f"--dataset toy --clip {GENERIC}/best.pt --epochs 10 --set warmup=1",
                 {name: UIT_PARTS[name] for name in ("UIT, all of it < SDM + ID", "SDM + ID + restoration < SDM + ID", "SDM + ID < SDM", "ITC")}),
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
}


def row(name):
    return name.split(" < ")[0]


def folder(group, name, seed):
    return ROOT / "runs/ablations" / group / f"{row(name).replace(' ', '_').replace(',', '')}-{seed}"


def result(path):
    """The test scores of best.pt in a finished run's folder, or None."""
    log = path / "log.jsonl"
    last = json.loads(log.read_text().splitlines()[-1]) if log.exists() and log.stat().st_size else {}
    return last.get("test", {}).get("best.pt, text to image")


def start(path, options, threads):
    """Makes a run, or ends one, quietly; what it printed is in its folder if it failed."""
    command = [sys.executable, ROOT / "tbps.py", *options.split(), "--out", path] + ["--resume"] * (path / "last.pt").exists() + ["--workers", "0"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | dict(OMP_NUM_THREADS=str(threads)), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stdout}")


def table(group, seeds):
    """Markdown: a row per name, R@1 as mean and standard deviation over seeds, the paired difference and its interval."""
    found = {row(name): {s: r["R@1"] for s in range(seeds) if (r := result(folder(group, name, s)))} for name in GROUPS[group][1]}
    lines = [f"| {group} | R@1 | seeds | against | difference |", "|---|---|---|---|---|"]
    for name in GROUPS[group][1]:
        own, base = found[row(name)], found.get(name.partition(" < ")[2], {})
        if not own:
            continue
        spread = f" ± {statistics.stdev(own.values()):.1f}" if len(own) > 1 else ""
        pairs = [own[s] - base[s] for s in own if s in base]
        student = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}.get(len(pairs), 2.5)
        interval = f" ± {student * statistics.stdev(pairs) / len(pairs) ** 0.5:.1f}" if len(pairs) > 1 else ""
        difference = f"{statistics.mean(pairs):+.1f}{interval}" if pairs else ""
        lines.append(f"| {row(name)} | {statistics.mean(own.values()):.1f}{spread} | {len(own)} | {name.partition(' < ')[2]} | {difference} |")
    return "\n".join(lines)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--only", nargs="+", choices=GROUPS, default=list(GROUPS), help="groups of runs (default: all)")
    p.add_argument("--seeds", type=int, default=3, help="seeds 0 ... N-1 (default: 3)")
    p.add_argument("--jobs", type=int, default=2, help="runs at a time, sharing the cores (default: 2)")
    p.add_argument("--table", action="store_true", help="run nothing")
    args = p.parse_args()
    if not args.table:
        threads = max(1, os.cpu_count() // args.jobs)
        if not result(ROOT / GENERIC):
            start(ROOT / GENERIC, "--dataset toy-generic", os.cpu_count())
        todo = [(folder(g, name, s), f"{GROUPS[g][0]} {options} --seed {s}") for g in args.only for s in range(args.seeds)
                for name, options in GROUPS[g][1].items() if not result(folder(g, name, s))]
        with ThreadPoolExecutor(args.jobs) as pool:
            for _ in tqdm(pool.map(lambda job: start(*job, threads), todo), total=len(todo), unit="run"):
                pass
    for group in args.only:
        print(f"\n{table(group, args.seeds)}")


if __name__ == "__main__":
    main()
