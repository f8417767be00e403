"""What each part is worth: runs on the toy people, and their table.

    python lab/ablations.py                        every run that is not recorded yet, then the tables
    python lab/ablations.py --only uit --seeds 1   one group, one seed
    python lab/ablations.py --table                the tables of what is recorded
    python lab/ablations.py --only uit --again 5   five of the recorded runs once more, drawn at random: what was recorded, and what comes out now
    python lab/ablations.py --only uit --folders   recorded runs, too, for their checkpoints
    python lab/ablations.py --results              the tables into lab/RESULTS.md

A run is a command line and ends in runs/ablations/GROUP/NAME-SEED/; its scores are a line of lab/results.jsonl, which is kept with the program, and whoever
has the same command in another group need not run it. A run that was cut off goes on where it stopped. Ablations fine-tune, as the papers do, from a model
that was trained on the generic toy domain (runs/ablations/generic, made first, 5 minutes). "{NAME}" in a command is the folder of that run of the same
seed, for which it waits. In the tables "own" means that the image a caption was written for is left out; differences are paired by seed, against the rows that the name after '<' tells; the interval holds 95 % of them if they
are normal."""

import argparse
import html
import json
import os
import random
import re
import statistics
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

GENERIC = "runs/ablations/generic"
FINE_TUNE = f"tbps.py --dataset toy --clip {GENERIC}/best.pt --epochs 3 --set warmup=0.5"


def part(share, epochs):
    """A share of the persons for this many epochs."""
    return f"tbps.py --dataset toy --share {share} --clip {GENERIC}/best.pt --epochs {epochs} --set warmup={epochs / 6:g}"


PART = {share: part(share, epochs) for share, epochs in (("0.05", 40), ("0.1", 20), ("0.25", 10))} | {"1": FINE_TUNE}        # for about as many steps
QUARTER = PART["0.25"]                     # a model learns so few pairs by heart, so regularising can help, as it does with the papers' large models


def explained(changes):
    """A quarter of the persons, with these changes."""
    return QUARTER.replace("tbps.py", f"lab/train_variants.py {changes}")


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
LCR2S = f"distill.py --dataset toy --clip {GENERIC}/best.pt --epochs 3 --set warmup=0.5 tau=0.05"
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


SIMPLIFIED = "--method tbps-clip-simplified"
BEST = f"{SIMPLIFIED} --set image_aug=shift"                              # what --method best is


def ctlg(dataset, epochs, longer, count, gate, more={}):
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
    } | more


CTLG_CHOICES = {
    "tau 0.005": "--method ctlg --set approximate=0 mixup=0",
    "tau 0.05 < tau 0.005": "--method ctlg --set approximate=0 mixup=0 tau=0.05",
    "all texts of the image right < tau 0.005": "--method ctlg --set approximate=0 mixup=0 same=image",
    "all texts of the person right < tau 0.005": "--method ctlg --set approximate=0 mixup=0 same=person",
    "rate 1e-4 < tau 0.005": "--method ctlg --set approximate=0 mixup=0 lr=1e-4",
    "rate 1e-5 < tau 0.005": "--method ctlg --set approximate=0 mixup=0 lr=1e-5",
}
CLIP = "--method baseline"
CLIP_STAR = f"{CLIP} --set text_dropout=0.05 lock_patch=1"
AUGMENTED = f"{CLIP_STAR} image_aug=pool deletion=0.05"
N_ITC = f"{AUGMENTED} itc=0 nitc=1"
LIKE_SIMPLIFIED = "--set tau=0.05 image_aug=pool deletion=0.05 text_dropout=0.05 clean=1 norm=imagenet resize=bilinear eval_resize=bicubic"
TEXTS = {"synonym": "synonyms", "insertion": "insertions", "swap": "swaps", "deletion": "deletions", "eda": "EDA"}
FROZEN = {"full fine-tuning": CLIP, "CoOp < full fine-tuning": "--method coop", "CLIP-Adapter < full fine-tuning": "--method adapter"}
FEW = FROZEN | {"TBPS-CLIP simplified < full fine-tuning": SIMPLIFIED, "best < full fine-tuning": BEST}         # of more persons methods and equal-time tell
GROUPS = {  # group: (what all its runs have, {name: options}); a name's first words, up to '<', are its row
    "seeds": (FINE_TUNE, {"TBPS-CLIP simplified": SIMPLIFIED}),
    "tricks": (QUARTER, {
        "CLIP": CLIP,
        "dropout < CLIP": f"{CLIP} --set text_dropout=0.05",
        "locked patches < CLIP": f"{CLIP} --set lock_patch=1",
        "N-ITC < CLIP": f"{CLIP} --set itc=0 nitc=1",
        "soft labels < N-ITC": f"{CLIP} --set itc=0 nitc=1 soft=0.5",
        "all of these < CLIP < N-ITC": f"{CLIP_STAR} itc=0 nitc=1 soft=0.5",
    }),
    "images": (QUARTER, {"CLIP*": CLIP_STAR} | {f"{op} < CLIP*": f"{CLIP_STAR} image_aug={op}" for op in (
        "crop", "erase", "gray", "blur", "jitter", "hue", "flip", "vflip", "rotation", "stack", "autoaugment", "randaugment", "trivialaugment", "pool", "reid", "shift")}),
    "texts": (QUARTER, {"CLIP*": CLIP_STAR} | {f"{name} {rate} < CLIP*": f"{CLIP_STAR} {key}={rate}" for key, name in TEXTS.items() for rate in (0.05, 0.1, 0.2)}),
    "losses": (QUARTER, {
        "CLIP*, augmented": AUGMENTED,
        "N-ITC < CLIP*, augmented": N_ITC,
        "SS of images < CLIP*, augmented": f"{AUGMENTED} ss=0.4",
        "SS of texts < CLIP*, augmented": f"{AUGMENTED} ss_text=0.4",
        "MVS of images < N-ITC": f"{N_ITC} mvs=1",
        "MVS of texts < N-ITC": f"{N_ITC} mvs_text=1",
        "R-ITC < CLIP*, augmented": f"{AUGMENTED} ritc=1",
        "C-ITC < CLIP*, augmented": f"{AUGMENTED} citc=0.1",
        "C-ITC as printed < CLIP*, augmented": f"{AUGMENTED} citc=512",     # sums over the batch of 128 and weights of 1, instead of means and 0.25, times 0.1
        "simplified < CLIP*, augmented": f"{N_ITC} ritc=1",
        "TBPS-CLIP, all of it < CLIP*, augmented < simplified": f"{N_ITC} ritc=1 citc=0.1 ss=0.4 mvs=1",
        "all but SS < TBPS-CLIP, all of it < simplified": f"{N_ITC} ritc=1 citc=0.1 mvs=1",
    }),
    "methods": (FINE_TUNE, {"CLIP": CLIP} | {f"{name} < CLIP": f"--method {name}" for name in ("tbps-clip-simplified", "tbps-clip", "irra", "uit", "ctlg")} | {
        "best < CLIP < tbps-clip-simplified": BEST,
        "lcr2s < CLIP": LCR2S}),
    "why-ss": (QUARTER, {                                                   # self-supervision costs: because its views hide what captions tell?
        "CLIP*, augmented": AUGMENTED,
        "SS of images < CLIP*, augmented": f"{AUGMENTED} ss=0.4",
        "views keep their colours < SS of images < CLIP*, augmented": f"{explained('colours')} {AUGMENTED} ss=0.4",
        "views show most of the person < SS of images < CLIP*, augmented": f"{explained('crops')} {AUGMENTED} ss=0.4",
        "both < SS of images < CLIP*, augmented": f"{explained('colours,crops')} {AUGMENTED} ss=0.4",
    }),
    "why-images": (QUARTER, {                                               # grey pictures and learned policies cost: because captions tell what they hide?
        "CLIP*": CLIP_STAR,
        "gray < CLIP*": f"{CLIP_STAR} image_aug=gray",
        "gray, and captions without colours then < gray < CLIP*": f"{explained('untold')} {CLIP_STAR} image_aug=gray",
        "trivialaugment < CLIP*": f"{CLIP_STAR} image_aug=trivialaugment",
        "trivialaugment, colours kept < trivialaugment < CLIP*": f"{explained('moves')} {CLIP_STAR} image_aug=trivialaugment",
        "trivialaugment, small moves < trivialaugment < CLIP*": f"{explained('small')} {CLIP_STAR} image_aug=trivialaugment",
        "autoaugment < CLIP*": f"{CLIP_STAR} image_aug=autoaugment",
        "autoaugment, colours kept < autoaugment < CLIP*": f"{explained('moves')} {CLIP_STAR} image_aug=autoaugment",
        "randaugment < CLIP*": f"{CLIP_STAR} image_aug=randaugment",
        "randaugment, colours kept < randaugment < CLIP*": f"{explained('moves')} {CLIP_STAR} image_aug=randaugment",
    }),
    "why-texts": (QUARTER, {                                                # synonyms do no harm: because those of our table are right?
        "CLIP*": CLIP_STAR,
        "synonyms 0.1 < CLIP*": f"{CLIP_STAR} synonym=0.1",
        "synonyms 0.1, of another word < synonyms 0.1 < CLIP*": f"{explained('senses')} {CLIP_STAR} synonym=0.1",
        "insertions 0.1 < CLIP*": f"{CLIP_STAR} insertion=0.1",
        "insertions 0.1, of another word < insertions 0.1 < CLIP*": f"{explained('senses')} {CLIP_STAR} insertion=0.1",
    }),
    "ingredients": (QUARTER, {                                              # what the other methods could lend to TBPS-CLIP simplified
        "simplified": SIMPLIFIED,
        "overlapping patches < simplified": f"{SIMPLIFIED} --set stride=6",
        "random-count sampler < simplified": f"{SIMPLIFIED} --set sampler=random-count",
        "shift instead of the pool < simplified": BEST,
        "synonyms < simplified": f"{SIMPLIFIED} --set synonym=0.1",
        "batches of 64 < simplified": f"{SIMPLIFIED} --batch 64",
        "pruned captions < simplified": f"{SIMPLIFIED} --set prune=0.2",
        "approximate text < simplified": f"{SIMPLIFIED} --set approximate=0.5",
        "tau 0.02 < simplified": f"{SIMPLIFIED} --set tau=0.02",
        "SDM + ID + triplet instead, tau 0.05 < simplified": f"--method irra {LIKE_SIMPLIFIED} mlm=0 triplet=10",
        "ITC instead, tau 0.05 < simplified": f"--method ctlg {LIKE_SIMPLIFIED} mixup=0 approximate=0",
        "mixup of features < ITC instead, tau 0.05": f"--method ctlg {LIKE_SIMPLIFIED} mixup=0 approximate=0 feature_mixup=1",
    }),
    "combinations": (QUARTER, {
        "shift instead of the pool": BEST,
        "no deletion < shift instead of the pool": f"{BEST} deletion=0",
        "no deletion, no dropout < shift instead of the pool": f"{BEST} deletion=0 text_dropout=0",
        "pruned < shift instead of the pool": f"{BEST} prune=0.2",
        "pruned, random-count < shift instead of the pool": f"{BEST} prune=0.2 sampler=random-count",
    }),
    "best": (QUARTER, {
        "simplified": SIMPLIFIED,
        "shift instead of the pool < simplified": BEST,
        "shift, pruned, random-count < simplified < shift instead of the pool": f"{BEST} prune=0.2 sampler=random-count",
    }),
    "equal-time": (QUARTER, {                                               # as many epochs as best could make 10 of, by the pairs per second of the README
        "best": BEST,
        "CLIP < best": CLIP,
        "TBPS-CLIP simplified < best": SIMPLIFIED,
    } | {f"{name}, {epochs} epochs < best": part(0.25, epochs).replace("tbps.py", f"tbps.py --method {name}") for name, epochs in (("tbps-clip", 3), ("irra", 4), ("uit", 4), ("ctlg", 8))} | {
        "lcr2s, twice 4 epochs < best": part(0.25, 4).replace("tbps.py", "distill.py") + " tau=0.05"}),
    "layers": (FINE_TUNE, {"all text layers": CLIP} | {f"{how} {layers} < all text layers": FINE_TUNE.replace("tbps.py", f"lab/probes.py {verb} {layers}") + f" {CLIP}"
                                                       for how, verb in (("frozen", "freeze"), ("dropped", "drop")) for layers in ("0", "1")}),
    **{f"share-{share}": (PART[share], FEW) for share in ("0.05", "0.1")},
    **{f"share-{share}": (PART[share], FROZEN) for share in ("0.25", "1")},
    "domains": (FINE_TUNE, {                                                # tested at home; lab/domain_shift.py tests them abroad
        "toy": SIMPLIFIED,
        "fronts": FINE_TUNE.replace("tbps.py", "lab/domain_shift.py --only fronts --train").replace("--epochs 3", "--epochs 6") + f" {SIMPLIFIED}",
    }),
    "why-few": (PART["0.1"], {                                              # with few persons TBPS-CLIP simplified loses: by its losses, or by what it does to pictures and captions?
        "full fine-tuning": CLIP,
        "simplified < full fine-tuning": SIMPLIFIED,
        "its losses alone < full fine-tuning < simplified": f"{CLIP} --set itc=0 nitc=1 ritc=1",
        "its augmentation and dropout alone < full fine-tuning < simplified": f"{CLIP} --set image_aug=pool deletion=0.05 text_dropout=0.05",
    }),
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
        "UIT, clean captions < UIT, all of it": "--method uit --set mask_all=0",
        "IRRA, with MLM": "--method irra",
        "IRRA, masked captions everywhere < IRRA, with MLM": "--method irra --set mask_all=1",
    }),
    "lcr2s": (LCR2S, LCR2S_PARTS | {
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
    }),
    "lcr2s-small": (LCR2S, {name: LCR2S_PARTS[name] for name in ("plain", "teacher")} | {                 # half of the depth, or of the width
        "half": "--teacher {teacher}/richer/last.pt --student half --set affinity=0",
        "half, A-KD < half < half, SELF": "--teacher {teacher}/richer/last.pt --student half",
        "half, SELF < half": "--teacher {teacher}/richer/last.pt --student half --set target=self",
        "narrow": "--teacher {teacher}/richer/last.pt --student narrow --set affinity=0",
        "narrow, A-KD < narrow < narrow, SELF": "--teacher {teacher}/richer/last.pt --student narrow",
        "narrow, SELF < narrow": "--teacher {teacher}/richer/last.pt --student narrow --set target=self",
    }),
    "ctlg": ctlg("toy", 3, 4, 1500, "direction=0.65"),
    "ctlg-choices": (FINE_TUNE, CTLG_CHOICES),
    "ctlg-few": ctlg("toy-few", 20, 30, 600, "direction=0.45", {   # and pairs of a diffusion model that saw everybody, as one from elsewhere would have
        "pairs, all seen": "generate.py --dataset toy-few --diffusion runs/toy-diffusion-0 --count 600 --judge {baseline}/best.pt",
        "+ pairs of a model that saw all < tau 0.005 < as many steps < + generated pairs": "--method ctlg --set approximate=0 mixup=0 --extra {pairs, all seen}",
    }),
    "lcr2s-few": (f"distill.py --dataset toy-few --clip {GENERIC}/best.pt --epochs 20 --set warmup=2 tau=0.05", LCR2S_PARTS),
}
SEEDS = {"seeds": 10, "best": 8}                                                   # groups that want more of them
PAPER = {  # R@1 on CUHK-PEDES minus that of the first row it is compared with, as published (TBPS-CLIP, ViT-B/32, and its few-shot probe; IRRA); of MVS minus
    # that of CLIP*, augmented
    "tricks": {"dropout": 0.39, "locked patches": 0.60, "soft labels": 0.86},
    "images": {"crop": 0.95, "erase": 0.30, "gray": 0.95, "blur": -9.04, "jitter": 0.52, "hue": -0.22, "flip": 1.14, "vflip": -0.11, "rotation": 1.16, "stack": 1.58,
               "autoaugment": 1.09, "randaugment": 1.24, "trivialaugment": 1.25, "pool": 1.79},
    "texts": {f"{name} {rate}": value for name, values in {
        "synonyms": (-0.39, -2.89, -4.64), "insertions": (-0.63, -1.51, -4.25), "swaps": (-7.93, -13.28, -14.83), "deletions": (1.19, 0.65, -0.03), "EDA": (-0.91, -2.17, -3.68),
    }.items() for rate, value in zip((0.05, 0.1, 0.2), values)},
    "losses": {"N-ITC": 0.13, "SS of images": 0.76, "SS of texts": -0.81, "MVS of images": 0.72, "MVS of texts": -0.32, "R-ITC": 1.41,
               "C-ITC": 0.37, "TBPS-CLIP, all of it": 2.76},
    "uit": {"SDM": 2.23, "SDM + ID": 0.10, "IRRA, with MLM": 2.86},
    "share-0.05": {"TBPS-CLIP simplified": 5.28, "CoOp": -27.00, "CLIP-Adapter": -26.41},
    "share-0.1": {"TBPS-CLIP simplified": 7.89, "CoOp": -30.27, "CLIP-Adapter": -29.76},
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


def command(group, name, seed):
    """What is run, and what its scores are recorded by."""
    common, rows = GROUPS[group]
    return " ".join(f"{'' if '.py ' in rows[name] else common} {rows[name]} --seed {seed}".split())


def recorded():
    """{command: test scores} of all runs that were ever made."""
    path = ROOT / "lab/results.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return {run["command"]: run["test"] for run in map(json.loads, lines)}


def record(line, scores):
    """Writes the scores of a run down, of best.pt alone."""
    scores = {what: {metric: round(value, 2) for metric, value in values.items()} for what, values in scores.items() if not what.startswith("last.pt")}
    with open(ROOT / "lab/results.jsonl", "a") as f:
        f.write(json.dumps(dict(command=line, torch=torch.__version__, test=scores)) + "\n")


def queue(todo, jobs):
    """Makes runs, [(group, name, seed)], some at a time, each after those that it names; and records their scores."""
    runs, threads, old = {}, max(1, os.cpu_count() // jobs), recorded()

    def make(path, line, needed):
        for _, run in needed.values():
            run.result()                                                # waits, and fails if that one has failed
        if result(path) is None:
            start(path, line.format_map({name: where for name, (where, _) in needed.items()}), threads)
        if line not in old:
            record(line, result(path))

    def ask(group, name, seed):
        line, path, names = command(group, name, seed), folder(group, name, seed), {row(n): n for n in GROUPS[group][1]}
        if line not in runs:
            needed = {n: ask(group, names[n], seed) for _, n, *_ in Formatter().parse(line) if n}
            runs[line] = path, pool.submit(make, path, line, needed)
        return runs[line]

    with ThreadPoolExecutor(jobs) as pool:
        for run in todo:
            ask(*run)
        failed = [run.exception() for run in tqdm(as_completed([run for _, run in runs.values()]), total=len(runs), unit="run") if run.exception()]
    if failed:
        raise failed[0]


def make_generic():
    """The model that runs start from, if it is not there."""
    if result(ROOT / GENERIC) is None:
        start(ROOT / GENERIC, "tbps.py --dataset toy-generic --set muon=0 epochs=10 warmup=2", os.cpu_count())


def again(groups, seeds, number, jobs):
    """Markdown: what was recorded of some runs, and what comes out now. Those that need another run's folder, and richer models, are not drawn."""
    known, lines = recorded(), {command(group, name, seed) for group in groups for name in GROUPS[group][1] for seed in range(SEEDS.get(group, seeds))}
    able = sorted(line for line in lines & known.keys() if "{" not in line and "best.pt, text to image" in known[line])
    if number > len(able):
        raise ValueError(f"--again {number}: of these groups {len(able)} runs are recorded that need no other")
    make_generic()
    drawn = random.sample(able, number)
    with tempfile.TemporaryDirectory() as base, ThreadPoolExecutor(jobs) as pool:
        paths = [Path(base) / str(n) for n in range(number)]
        list(tqdm(pool.map(start, paths, drawn, [max(1, os.cpu_count() // jobs)] * number), total=number, unit="run"))
        pairs = [[scores["best.pt, text to image"].get(metric) for metric in ("R@1", "mAP") for scores in (known[line], result(path))] for path, line in zip(paths, drawn)]
    return "\n".join(["| command | R@1, recorded | now | mAP, recorded | now |", "|---|---|---|---|---|"] + [
        f"| `{line}` | " + " | ".join("not recorded" if value is None else f"{value:.2f}" for value in values) + " |" for line, values in zip(drawn, pairs)])


WAYS = {"R@1": ("best.pt, text to image", "R@1"), "mAP": ("best.pt, text to image", "mAP"), "mAP, own": ("best.pt, text to other images", "mAP")}


def mean(values):
    return f"{statistics.mean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")


def student(df):
    """Student's t: how many standard errors hold 95 % of means, with df degrees of freedom (Cornish and Fisher's series from 5 on)."""
    z = 1.96
    return {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78}.get(df) or z + (z ** 3 + z) / (4 * df) + (5 * z ** 5 + 16 * z ** 3 + 3 * z) / (96 * df ** 2)


def spread(pairs):
    """Half of the 95 % interval of a mean."""
    return student(len(pairs) - 1) * statistics.stdev(pairs) / len(pairs) ** 0.5


def least(differences):
    """The smallest mean difference that is more than noise, as far as a group can tell: rows of paired differences, all with the same true
    spread, which many rows know better than one; None with one seed."""
    rows = [pairs for pairs in differences if len(pairs) > 1]
    if not rows:
        return None
    df = sum(len(pairs) - 1 for pairs in rows)
    deviation = (sum(statistics.variance(pairs) * (len(pairs) - 1) for pairs in rows) / df) ** 0.5
    return student(df) * deviation / statistics.median(map(len, rows)) ** 0.5


def difference(pairs):
    """The mean and its 95 % interval."""
    if len(pairs) < 2:
        return f"{pairs[0]:+.1f}" if pairs else ""
    return f"{statistics.mean(pairs):+.1f} ± {spread(pairs):.1f}"


def agrees(pairs, published, least):
    """Whether differences tell what the paper found. Of mAP: its noise is half that of R@1."""
    if len(pairs) < 2:
        return ""
    found = statistics.mean(pairs)
    return "within the spread" if abs(found) <= least else "yes" if found * published > 0 else "no"


def table(group, seeds):
    """Markdown: a row per name and row it is compared with: mean and standard deviation over seeds, and of the paired differences the mean and
    its interval; what the paper found for R@1, and whether mAP has the same sign here. The last line tells which differences from the first row
    that a name is compared with are more than noise. Richer models have a table of their own."""
    seeds, known, paper = SEEDS.get(group, seeds), recorded(), PAPER.get(group, {})
    found = {row(name): {s: r for s in range(seeds) if (r := known.get(command(group, name, s)))} for name in GROUPS[group][1]}
    teachers = {name: runs for name, runs in found.items() if any("held-out view: richer" in r for r in runs.values())}
    names = [name for name in GROUPS[group][1] if found[row(name)] and row(name) not in teachers]

    def values(name, way, metric):
        return {s: r[way][metric] for s, r in found.get(name, {}).items() if metric in r.get(way, {})}

    def paired(name, base, way, metric):
        ours, theirs = values(name, way, metric), values(base, way, metric)
        return [ours[s] - theirs[s] for s in ours if s in theirs]
    ways = {what: way for what, way in WAYS.items() if (group.startswith("lcr2s") or "own" not in what) and any(values(row(name), *way) for name in names)}
    told = {what: least([paired(row(name), name.split(" < ")[1], *way) for name in names if " < " in name]) for what, way in ways.items()}
    head = ["", *(cell for what in ways for cell in (what, "difference")), *["paper, R@1", "the same sign, in mAP?"] * bool(paper)]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name in names:
        number = len(found[row(name)])
        for n, base in enumerate(name.split(" < ")[1:] or [""]):
            cells = [(row(name) + f", {number} seed{'s' * (number > 1)}" * (number < seeds)) * (n == 0) + f" (over {base})" * bool(base)]
            for way in ways.values():
                own = values(row(name), *way).values()
                cells += [mean(own) if own and n == 0 else "", difference(paired(row(name), base, *way))]
            if paper:
                published = paper.get(row(name)) if n == 0 else None
                cells += ["", ""] if published is None else [f"{published:+.2f}", agrees(paired(row(name), base, *ways["mAP"]), published, told["mAP"]) if "mAP" in ways else ""]
            lines.append(f"| {' | '.join(cells)} |")
    if any(told.values()):
        lines += ["", f"`{group}`, {max(map(len, found.values()))} seeds; more than noise, by all rows together: differences of " + ", ".join(f"{value:.1f} of {what}" for what, value in told.items() if value) + "."]
    if teachers:
        lines += ["", f"| {group}: R@1, mAP | {' | '.join(teachers)} |", "|---" * (1 + len(teachers)) + "|"]
        for what in next(iter(next(iter(teachers.values())).values())):
            lines.append(f"| {what} | " + " | ".join(", ".join(mean([r[what][metric] for r in runs.values()]) for metric in ("R@1", "mAP")) for runs in teachers.values()) + " |")
    return "\n".join(lines)


def filled(text):
    """A text with the tables of today in the places that it has for them: between <!-- ablations: GROUP --> and <!-- end -->."""
    return re.sub(r"(<!-- ablations: (\S+) -->\n).*?(<!-- end -->)", lambda m: f"{m[1]}{table(m[2], 3)}\n{m[3]}", text, flags=re.DOTALL)


def bars(group, seeds):
    """The means of a group as the bars of one inline SVG, each with a line of a standard deviation to both sides: R@1, or mAP where that alone is recorded."""
    known = recorded()
    scores = {row(name): [r for s in range(SEEDS.get(group, seeds)) if (r := known.get(command(group, name, s), {}).get("best.pt, text to image"))] for name in GROUPS[group][1]}
    metric = "R@1" if any("R@1" in r for runs in scores.values() for r in runs) else "mAP"
    found = {name: values for name, runs in scores.items() if (values := [r[metric] for r in runs if metric in r])}
    if not found:
        return ""
    low, high, out = max(0, min(map(min, found.values())) - 2), max(map(max, found.values())), []

    def at(value):
        return 260 + 480 * (value - low) / (high - low)
    for n, (name, values) in enumerate(found.items()):
        middle, y = statistics.mean(values), 22 * n + 11
        side = statistics.stdev(values) if len(values) > 1 else 0
        out.append(f'<text x="252" y="{y + 4}" text-anchor="end">{html.escape(name)}</text><rect x="260" y="{y - 8}" width="{at(middle) - 260:.1f}" height="16" fill="#9bbfe0"/>'
                   f'<path d="M{at(middle - side):.1f},{y}H{at(middle + side):.1f}" stroke="#222" stroke-width="2"/><text x="{at(middle + side) + 8:.1f}" y="{y + 4}">{mean(values)}</text>')
    return f'<svg width="900" height="{22 * len(found)}" role="img">{"".join(out)}</svg><p>{metric}, %; bars begin at {low:.0f}; lines: a standard deviation of the seeds to both sides, which share most of it: see the paired differences</p>'


def as_html(markdown):
    """Tables of Markdown, and the lines between them, as HTML."""
    def cells(line):
        return "".join(f"<td>{html.escape(cell.strip()).replace(' ± ', '&nbsp;±&nbsp;')}</td>" for cell in line[1:-1].split("|"))
    lines = [line for line in markdown.splitlines() if not line.startswith("|---")]
    return "".join(f"<table><tr>{cells(line)}</tr></table>" if line.startswith("|") else f"<p>{html.escape(line.replace('`', ''))}</p>" for line in lines if line).replace("</table><table>", "")


def natural(text):
    """A number from 1 on, for argparse."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text} is not 1, 2, 3, ...")
    return int(text)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--only", nargs="+", choices=GROUPS, default=list(GROUPS), help="groups of runs (default: all)")
    p.add_argument("--seeds", type=natural, default=3, help=f"seeds 0 ... N-1 (default: 3), but of {', '.join(f'{group} {n}' for group, n in SEEDS.items())}")
    p.add_argument("--jobs", type=natural, default=2, help="runs at a time, sharing the cores (default: 2)")
    g = p.add_mutually_exclusive_group()
    g.add_argument("--table", action="store_true", help="run nothing")
    g.add_argument("--folders", action="store_true", help="make what is recorded, too, where its folder is not there: for its checkpoints")
    g.add_argument("--results", action="store_true", help="write the tables of what is recorded into lab/RESULTS.md, where it has places for them")
    g.add_argument("--again", type=natural, metavar="N", help="run N of the recorded runs once more")
    args = p.parse_args()
    if args.again:
        return print(again(args.only, args.seeds, args.again, args.jobs))
    if args.results:
        (ROOT / "lab/RESULTS.md").write_text(filled((ROOT / "lab/RESULTS.md").read_text()))
        return
    known = recorded()
    todo = [(group, name, seed) for group in args.only for name in GROUPS[group][1] for seed in range(SEEDS.get(group, args.seeds))
            if command(group, name, seed) not in known or args.folders]
    if todo and not args.table:
        make_generic()
        for group, dataset, epochs in (("ctlg", "toy", 14), ("ctlg-few", "toy-few", 100)):              # half an hour, 20 minutes
            if {group, "ctlg-few"} & {group for group, *_ in todo} and not (ROOT / f"runs/{dataset}-diffusion-0/unet").exists():
                start(ROOT / f"runs/ablations/{group}/trial", f"generate.py --dataset {dataset} --words {GENERIC}/best.pt --count 1 --set train_epochs={epochs}", os.cpu_count())
        queue(todo, args.jobs)
    tables = {group: table(group, args.seeds) for group in args.only}
    print("\n" + "\n\n".join(f"{group}\n\n{text}" for group, text in tables.items()))
    page = ROOT / "runs/ablations/tables.html"
    page.parent.mkdir(parents=True, exist_ok=True)
    evaluation.write_page(page, "Ablations on toy people", ((group, bars(group, args.seeds) + as_html(text)) for group, text in tables.items()))
    page.with_suffix(".md").write_text("\n\n".join(f"{group}\n\n{text}" for group, text in tables.items()) + "\n")
    print(f"\nthe same as files: {page} and .md")


if __name__ == "__main__":
    data.command(main)
