"""Do generated toy people show what their captions say? The truth about their sources is known; whoever made the pairs never saw it.

    python lab/check_generated.py runs/pdg-toy-0
    python lab/check_generated.py runs/pdg-toy-0 --min-score words=0.02      of those that pass the gate

Of each pair: does the edited garment now have the colour that the caption names, the nearest in the palette once the light of the source is taken
out; do all other garments, the hair and the bag still have theirs; and how far do pixels outside the garment differ from the source's."""

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
import data                                                             # noqa: E402
import generate                                                         # noqa: E402
from lab import people                                                  # noqa: E402

REGION = {"coat": "top", "shirt": "top", "trousers": "bottom", "shorts": "bottom", "skirt": "bottom", "shoes": "shoes", "hat": "hat", "bag": "bag", "suitcase": "bag"}
NAMES = list(people.PEOPLE["top_colour"])
COLOURS = np.float32([people.PALETTE[c] for c in NAMES])


def colour_of(record, region):
    """The name of the region's true colour."""
    return record["attributes"]["shoes" if region == "shoes" else f"{region}_colour"]


def plain(record, region):
    """Where the region shows its colour plainly: no pattern, trim or logo."""
    return record["parts"] == people.PART[region]


def nearest(image, where, gain):
    return NAMES[int(((image[where].mean(axis=0) / gain - COLOURS) ** 2).sum(axis=1).argmin())]


def judge(entry, picture, records):
    """-> reached, kept (bool), change outside (share of the range)."""
    record = records[int(entry["source_image"].rsplit(" ", 1)[1])]
    source, region = record["image"].astype(np.float32), REGION[generate.GARMENT_OF[entry["edit"]["noun"]]]
    seen = [r for r in ("hair", "hat", "top", "bottom", "shoes", "bag") if plain(record, r).sum() >= 10]
    true = np.concatenate([np.broadcast_to(np.float32(people.PALETTE[colour_of(record, r)]), (plain(record, r).sum(), 3)) for r in seen])
    shown = np.concatenate([source[plain(record, r)] for r in seen])
    gain = (shown * true).sum() / (true * true).sum()                   # the light of this picture
    reached = region in seen and people.PALETTE[nearest(picture, plain(record, region), gain)] == people.PALETTE[entry["edit"]["new"]]
    kept = all(nearest(picture, plain(record, r), gain) == nearest(source, plain(record, r), gain) for r in seen if r != region)
    return reached, kept, float(np.abs(picture - source)[~people.mask(record, region)].mean() / 255)


def score(folder, wanted=()):
    """{what: number} of a folder of pairs made from toy people."""
    every = data.read("pairs", folder, "train", hold_out=False)
    passed = data.filter_by_score(every, wanted)
    dataset = every[0]["source"].rsplit(" ", 1)[0]
    records = data.read(dataset, "", "train")
    entries = [e for e in passed if e["edit"]["what"] == "colour"]
    found = np.array([judge(e, np.asarray(data.load_image(e["image"]), np.float32), records) for e in entries], np.float64).reshape(-1, 3)
    region = np.array([REGION[generate.GARMENT_OF[e["edit"]["noun"]]] for e in entries])
    return {"pairs": len(every), "pass the gate, %": 100 * len(passed) / len(every), "reach the colour, %": 100 * found[:, 0].mean(),
            "the rest keeps its colours, %": 100 * found[:, 1].mean(), "both, %": 100 * (found[:, 0] * found[:, 1]).mean(),
            "change outside, % of the range": 100 * found[:, 2].mean()} | {f"reach the colour, {r}, %": 100 * found[region == r, 0].mean() for r in sorted(set(region))}


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("folder", type=Path, help="made by generate.py from toy people")
    p.add_argument("--min-score", nargs="+", default=[], metavar="KEY=VALUE", help="only pairs whose scores reach the values")
    args = p.parse_args()
    for name, value in score(args.folder, args.min_score).items():
        print(f"{name:36}{value:8.1f}")


if __name__ == "__main__":
    data.command(main)
