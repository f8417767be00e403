"""What is a model worth on people unlike those it learned from? The truth about toy people is known, so one thing can differ at a time.

    python lab/domain_shift.py CHECKPOINT ...           text-to-image R@1 of each on every test set below; of several seeds (X-0/best.pt, X-1/best.pt) the mean
    python lab/domain_shift.py --only fronts --train --dataset toy ...      as tbps.py, where all persons are seen from the front

Captions of val and test hold words and plans of sentences that those of train never show; usual-words has none of them. toy-generic has other garments, colours,
shoes and another camera at once. With two of four views the gallery is half as large: compare the models on a set, not the sets."""

import argparse
import re
import sys
from pathlib import Path
from unittest import mock

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
import data                                                             # noqa: E402
import tbps                                                             # noqa: E402
from lab import people, tables                                          # noqa: E402

PAINT, CAPTION, READ = people.paint, people.write_caption, data.read
SETS = {  # name: (data set, what is drawn otherwise, which views)
    "toy": ("toy", {}, slice(None)),
    "usual-words": ("toy", dict(write_caption=lambda rng, person, visible, domain, heldout: CAPTION(rng, person, visible, domain, False)), slice(None)),
    "other-camera": ("toy", dict(paint=lambda rng, index, person, domain: PAINT(rng, index, person, "generic")), slice(None)),
    "fronts": ("toy", {}, slice(0, None, 2)),
    "backs": ("toy", {}, slice(1, None, 2)),
    "toy-generic": ("toy-generic", {}, slice(None)),
}


def records(name, split):
    """The records of a split of one of SETS."""
    dataset, drawn, views = SETS[name]
    with mock.patch.dict(vars(people), drawn):
        return READ(dataset, "", split)[views]


def named(checkpoint):
    """runs/A/B-0/light/best.pt -> B: what seeds have in common."""
    return re.sub(r"-\d+$", "", next(part for part in reversed(checkpoint.parent.parts) if part not in ("light", "richer")))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("checkpoints", nargs="*", type=Path)
    p.add_argument("--only", nargs="+", choices=SETS, default=list(SETS), help="test sets (default: all)")
    p.add_argument("--train", nargs=argparse.REMAINDER, help="options of tbps.py, to train on this one set")
    args = p.parse_args()
    if args.train is not None:
        if len(args.only) != 1:
            p.error("--train takes one set: --only NAME")
        with mock.patch.object(data, "read", lambda dataset, root, split, hold_out: records(args.only[0], split)), mock.patch.object(sys, "argv", ["tbps.py", *args.train]):
            return tbps.main()
    if not args.checkpoints:
        p.error("name checkpoints")
    sets, found = {name: records(name, "test") for name in args.only}, {}
    for path in tqdm(args.checkpoints, unit=" checkpoints"):
        model, tokenizer, info = tbps.load_checkpoint(path)
        for name, found_records in sets.items():
            found.setdefault(named(path), {}).setdefault(name, []).append(tbps.evaluate(model, tokenizer, info, found_records, "cpu", sheet=False, progress=False)[0]["text to image"]["R@1"])
    print(f"| R@1 | seeds | {' | '.join(sets)} |\n" + "|---" * (2 + len(sets)) + "|")
    for row, scores in found.items():
        print(f"| {row.replace('_', ' ')} | {len(scores[args.only[0]])} | {' | '.join(map(tables.mean_std, scores.values()))} |")


if __name__ == "__main__":
    data.command(main)
