"""How well does a model work on pedestrians unlike those it was trained on? The test sets below differ in one thing.

    python lab/domain_shift.py CHECKPOINT ...       text-to-image R@1 on every set, mean over seeds (X-0, X-1, ...)
    python lab/domain_shift.py --only fronts --train --dataset toy ...      as tbps.py, trained and tested on this set

toy             the test split as it is
usual-words     its captions without the words and sentence plans that the training split never shows
other-camera    its images with the colours of the generic domain's camera
fronts, backs   two of its four views; the gallery is half as large, so compare models, not sets
toy-generic     other garments, colours, shoes, camera and words at once"""

import argparse
import re
import sys
from pathlib import Path
from unittest import mock

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
import data                                                             # noqa: E402
import eval as evaluation                                               # noqa: E402
import tbps                                                             # noqa: E402
from lab import people, tables                                          # noqa: E402

READ, PAINT, WRITE_CAPTION = data.read, people.paint, people.write_caption


def usual_caption(rng, person, visible, domain, heldout):
    return WRITE_CAPTION(rng, person, visible, domain, heldout=False)


def paint_generic(rng, index, person, domain):
    return PAINT(rng, index, person, "generic")


SETS = {  # name: (data set, functions of people.py to replace, views)
    "toy": ("toy", {}, slice(None)),
    "usual-words": ("toy", dict(write_caption=usual_caption), slice(None)),
    "other-camera": ("toy", dict(paint=paint_generic), slice(None)),
    "fronts": ("toy", {}, slice(0, None, 2)),
    "backs": ("toy", {}, slice(1, None, 2)),
    "toy-generic": ("toy-generic", {}, slice(None)),
}


def records(name, split):
    """The records of a split of one of SETS."""
    dataset, replaced, views = SETS[name]
    with mock.patch.dict(vars(people), replaced):
        return READ(dataset, "", split)[views]


def train(name, options):
    """Run tbps.py with these options; every split is that of the set."""
    def read(dataset, root, split, hold_out=True):
        return records(name, split)

    with mock.patch.object(data, "read", read), mock.patch.object(sys, "argv", ["tbps.py", *options]):
        tbps.main()


def run_name(checkpoint):
    """What the seeds of a run have in common: runs/A/B-0/student/best.pt -> B."""
    folder = next(part for part in reversed(checkpoint.parent.parts) if part not in ("student", "teacher"))
    return re.sub(r"-\d+$", "", folder)


def score(checkpoints, names):
    """{run: {set: [R@1 of each seed]}}"""
    sets, found = {name: records(name, "test") for name in names}, {}
    for path in tqdm(checkpoints, unit=" checkpoints"):
        model, tokenizer, preprocessing = tbps.load_checkpoint(path)
        scores = found.setdefault(run_name(path), {name: [] for name in names})
        for name in names:
            inputs = evaluation.evaluation_set(sets[name], preprocessing, tokenizer)
            result = evaluation.evaluate(model, *inputs, progress=False)[0]
            scores[name].append(result["text to image"]["R@1"])
    return found


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("checkpoints", nargs="*", type=Path)
    p.add_argument("--only", nargs="+", choices=SETS, default=list(SETS), help="test sets (default: all)")
    p.add_argument("--train", nargs=argparse.REMAINDER, help="options of tbps.py, to train on this one set")
    args = p.parse_args()
    if args.train is not None:
        if len(args.only) != 1:
            p.error("--train takes one set: --only NAME")
        train(args.only[0], args.train)
        return
    if not args.checkpoints:
        p.error("name checkpoints")
    rows = [["R@1", "seeds", *args.only]]
    for run, scores in score(args.checkpoints, args.only).items():
        number = len(scores[args.only[0]])
        rows.append([run.replace("_", " "), str(number)] + [tables.mean_std(scores[name]) for name in args.only])
    print(tables.markdown(rows))


if __name__ == "__main__":
    data.command(main)
