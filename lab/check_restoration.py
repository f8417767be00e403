"""Does restoration follow the words? Toy people, whose garments and their colours are known.

    python lab/check_restoration.py runs/toy-uit-0/last.pt

A view of the test split whose caption names the colour of the top is restored twice from the same grey patches: with its caption, and
with the colour exchanged for another. Over the dropped pixels of the top, the mean colour must move from the old colour towards the
new one; and, stricter, end nearer to the new one. Control: the two captions of somebody else, with their own pair of colours."""

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
    """The model of a run's last.pt with the heads it was trained with, its tokenizer, and info."""
    model, tokenizer, info = tbps.load_checkpoint(path, make_heads=tbps.irra_heads)
    if "restoration" not in model.heads or info["size"] != people.SIZE:
        raise ValueError(f"{path} has no restorer for toy people: name last.pt, which keeps the heads, of a run with restoration at 96x48")
    return model, tokenizer, info


def cases(records, rng):
    """(record, caption, changed caption, old colour, new colour): the colour of the top is named by one word that occurs once."""
    colours = list(people.PEOPLE["top_colour"])
    for r in records:
        old = r["attributes"]["top_colour"]
        words = re.split(r", | \| ", people.WORDS.get(old, old))
        for caption, said in zip(r["captions"], r["mentions"]):
            there = [w for w in words if re.search(rf"\b{w}\b", caption)]
            if said.get("top_colour") and len(there) == 1 and len(re.findall(rf"\b{there[0]}\b", caption)) == 1:
                new = rng.choice([c for c in colours if c != old and people.PALETTE[c] != people.PALETTE[old]])
                yield r, caption, re.sub(rf"\b{there[0]}\b", new, caption), old, new


@torch.no_grad()
def follow(model, tokenizer, info, number=1000, shuffled=False):
    """Shares of cases in which the top's mean colour moves towards the new colour, and ends nearer to it than to the old one."""
    rng = random.Random(0)
    found = list(cases(people.draw("test"), rng))
    found = rng.sample(found, min(number, len(found)))
    texts = [(c, d) for _, c, d, _, _ in found]
    if shuffled:
        texts = texts[1:] + texts[:1]
    view = data.EvalView(info["size"], info["norm"], info["resize"])
    mean, std = (torch.tensor(v)[:, None, None] for v in data.NORMS[info["norm"]])
    moved = nearer = total = 0
    for n, ((r, _, _, old, new), pair) in enumerate(zip(found, texts)):
        pixels, colours = view(r["image"])[None], []
        for caption in pair:
            text = model.text_tokens(tokenizer([data.clean_caption(caption) if info["clean"] else caption]), cut=not info["recipe"]["official"])
            restored, dropped = tbps.restore(model, pixels, text, None, info["recipe"], torch.Generator().manual_seed(n))
            image = 255 * (tbps.unpatchify(restored, model.image.grid, model.arch["patch"])[0] * std + mean)
            where = tbps.unpatchify(dropped[..., None].expand_as(restored).float(), model.image.grid, model.arch["patch"])[0, 0] > 0
            where &= torch.from_numpy(people.mask(r, "top") & (r["parts"] != people.PART["top_pattern"]))
            colours.append(image[:, where].mean(dim=1))
        if where.any():
            a, b = (torch.tensor(people.PALETTE[c], dtype=torch.float32) for c in (old, new))
            moved += bool((colours[1] - colours[0]) @ (b - a) > 0)
            nearer += bool((colours[1] - b).norm() < (colours[1] - a).norm())
            total += 1
    return 100 * moved / total, 100 * nearer / total, total


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("checkpoint", help="last.pt of a run on toy people with restoration")
    model, tokenizer, info = with_heads(p.parse_args().checkpoint)
    for shuffled in (False, True):
        print("{}: moves towards the new colour in {:.1f} %, ends nearer to it in {:.1f} % of {} cases".format(
            "somebody else's captions" if shuffled else "the colour of the top changed", *follow(model, tokenizer, info, shuffled=shuffled)))


if __name__ == "__main__":
    data.command(main)
