"""Do generated pairs show what their captions say? For pairs made from synthetic pedestrians, whose colours are known.

    python lab/check_generated.py runs/pdg-toy-0
    python lab/check_generated.py runs/pdg-toy-0 --min-score words=0.02      only pairs that pass this filter

Of each pair with a changed colour: does the edited garment show the colour that the caption names (the nearest in the
palette, corrected for the light of the source)? Do all other garments, hair and bag keep their colours? How far do
pixels outside the garment differ from the source? generate.py itself never sees this truth."""

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
import data                                                             # noqa: E402
import generate                                                         # noqa: E402
from lab import people                                                  # noqa: E402

REGION = {  # garment as generate.GARMENT_OF names it -> region of people.py
    "coat": "top", "shirt": "top", "trousers": "bottom", "shorts": "bottom", "skirt": "bottom", "shoes": "shoes",
    "hat": "hat", "bag": "bag", "suitcase": "bag",
}
COLOURED = ("hair", "hat", "top", "bottom", "shoes", "bag")
NAMES = list(people.PEOPLE["top_colour"])
COLOURS = np.float32([people.PALETTE[name] for name in NAMES])


def true_colour(record, region):
    """The palette colour of a region."""
    return people.PALETTE[record["attributes"]["shoes" if region == "shoes" else f"{region}_colour"]]


def plain(record, region):
    """(H, W) bool: the pixels of a region without pattern, trim and logo."""
    return record["parts"] == people.PART[region]


def nearest(image, where, gain):
    """The name of the palette colour nearest to the mean of these pixels."""
    distance = ((image[where].mean(axis=0) / gain - COLOURS) ** 2).sum(axis=1)
    return NAMES[int(distance.argmin())]


def light(record, regions):
    """The gain of an image: least squares between its pixels and the true colours of the regions."""
    image = record["image"].astype(np.float32)
    shown = np.concatenate([image[plain(record, region)] for region in regions])
    true = [np.broadcast_to(np.float32(true_colour(record, r)), (plain(record, r).sum(), 3)) for r in regions]
    true = np.concatenate(true)
    return (shown * true).sum() / (true * true).sum()


def edited_region(entry):
    return REGION[generate.GARMENT_OF[entry["edit"]["noun"]]]


def judge(entry, picture, records):
    """(shows the new colour, keeps all other colours, mean change outside the garment as a fraction of the range)"""
    record = records[int(entry["source_image"].rsplit(" ", 1)[1])]
    source, region = record["image"].astype(np.float32), edited_region(entry)
    visible = [r for r in COLOURED if plain(record, r).sum() >= 10]
    gain = light(record, visible)
    reached = region in visible
    if reached:
        shown = nearest(picture, plain(record, region), gain)
        reached = people.PALETTE[shown] == people.PALETTE[entry["edit"]["new"]]
    others = [plain(record, r) for r in visible if r != region]
    kept = all(nearest(picture, where, gain) == nearest(source, where, gain) for where in others)
    outside = np.abs(picture - source)[~people.mask(record, region)].mean() / 255
    return reached, kept, float(outside)


def score(folder, thresholds=()):
    """{what: number} for a folder of pairs made from synthetic pedestrians."""
    every = data.read("pairs", folder, "train", hold_out=False)
    passed = data.filter_by_score(every, thresholds)
    dataset = every[0]["source"].rsplit(" ", 1)[0]
    records = data.read(dataset, "", "train")
    entries = [entry for entry in passed if entry["edit"]["what"] == "colour"]
    judged = [judge(entry, np.asarray(data.load_image(entry["image"]), np.float32), records) for entry in entries]
    reached, kept, outside = np.array(judged, np.float64).reshape(-1, 3).T
    regions = np.array([edited_region(entry) for entry in entries])
    found = {
        "pairs": len(every),
        "pass the filter, %": 100 * len(passed) / len(every),
        "show the new colour, %": 100 * reached.mean(),
        "keep all other colours, %": 100 * kept.mean(),
        "both, %": 100 * (reached * kept).mean(),
        "change outside, % of the range": 100 * outside.mean(),
    }
    return found | {f"show the new colour, {r}, %": 100 * reached[regions == r].mean() for r in sorted(set(regions))}


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("folder", type=Path, help="made by generate.py from synthetic pedestrians")
    p.add_argument("--min-score", nargs="+", default=[], metavar="KEY=VALUE", help="only pairs with these scores")
    args = p.parse_args()
    for name, value in score(args.folder, args.min_score).items():
        print(f"{name:36}{value:8.1f}")


if __name__ == "__main__":
    data.command(main)
