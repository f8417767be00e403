"""Does UIT's restoration follow the words of the caption? On synthetic pedestrians, whose colours are known.

    python lab/check_restoration.py runs/toy-uit-0/last.pt

A test image whose caption names the colour of the top is restored twice from the same grey patches: with its caption,
and with another colour in the caption. Over the dropped patches of the top, the mean colour should move from the old
colour towards the new one, and, stricter, end nearer to the new one. Control: the two captions of another image."""

import argparse
import random
import re
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import data                                                             # noqa: E402
import tbps                                                             # noqa: E402
from lab import people                                                  # noqa: E402


def with_heads(path):
    """The model of a run's last.pt with its training heads, its tokenizer, its preprocessing and its recipe."""
    model, tokenizer, preprocessing = tbps.load_checkpoint(path, make_heads=tbps.irra_heads)
    if "restoration" not in model.heads or preprocessing.size != people.SIZE:
        raise ValueError(f"{path} has no restoration head for synthetic pedestrians: name last.pt of a run with "
                         "restoration at 96 x 48 (best.pt holds no heads)")
    return model, tokenizer, preprocessing, tbps.read_checkpoint(path)["recipe"]


def cases(records, rng):
    """Yield (record, caption, changed caption, old colour, new colour) where one word names the top's colour, once."""
    for r in records:
        old = r["attributes"]["top_colour"]
        others = [c for c in people.PEOPLE["top_colour"] if people.PALETTE[c] != people.PALETTE[old]]
        for caption, mentions in zip(r["captions"], r["mentions"]):
            words = re.split(r", | \| ", people.WORDS.get(old, old))
            named = [word for word in words if re.search(rf"\b{word}\b", caption)]
            if "top_colour" in mentions and len(named) == 1 and len(re.findall(rf"\b{named[0]}\b", caption)) == 1:
                new = rng.choice(others)
                yield r, caption, re.sub(rf"\b{named[0]}\b", new, caption), old, new


def restored_colour(model, tokenizer, preprocessing, recipe, record, caption, seed):
    """Mean colour (3,) that is painted on the dropped patches of the top, or None if no patch of it is dropped."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (preprocessing.mean, preprocessing.std))
    grid, patch = model.image.grid, model.arch["patch"]
    text = model.text_tokens(tokenizer([preprocessing.text(caption)]), trim=not recipe["official"])
    generator = torch.Generator().manual_seed(seed)                     # the same patches are dropped for both captions
    pixels = preprocessing.image(record["image"])[None]
    restored, dropped = tbps.restore(model, pixels, text, None, recipe, generator)
    image = 255 * (tbps.unpatchify(restored, grid, patch)[0] * std + mean)                          # (3, H, W)
    where = tbps.unpatchify(dropped[..., None].expand_as(restored).float(), grid, patch)[0, 0] > 0  # (H, W)
    where &= torch.from_numpy(people.mask(record, "top") & (record["parts"] != people.PART["top_pattern"]))
    return image[:, where].mean(dim=1) if where.any() else None


@torch.no_grad()
def follow(model, tokenizer, preprocessing, recipe, number=1000, shuffled=False):
    """(percent that move towards the new colour, percent that end nearer to it, number of cases)"""
    rng = random.Random(0)
    found = list(cases(people.draw("test"), rng))
    found = rng.sample(found, min(number, len(found)))
    pairs = [(caption, changed) for _, caption, changed, _, _ in found]
    if shuffled:
        pairs = pairs[1:] + pairs[:1]
    moved = nearer = total = 0
    for n, ((record, _, _, old, new), pair) in enumerate(zip(found, pairs)):
        before, after = (restored_colour(model, tokenizer, preprocessing, recipe, record, c, n) for c in pair)
        if before is None:
            continue
        a, b = (torch.tensor(people.PALETTE[colour], dtype=torch.float32) for colour in (old, new))
        moved += bool((after - before) @ (b - a) > 0)
        nearer += bool((after - b).norm() < (after - a).norm())
        total += 1
    return 100 * moved / total, 100 * nearer / total, total


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("checkpoint", help="last.pt of a run with restoration on synthetic pedestrians")
    found = with_heads(p.parse_args().checkpoint)
    for shuffled, name in ((False, "own captions"), (True, "captions of another image")):
        moved, nearer, total = follow(*found, shuffled=shuffled)
        print(f"{name}: moves towards the new colour in {moved:.1f} %, ends nearer to it in {nearer:.1f} % of {total}")


if __name__ == "__main__":
    data.command(main)
