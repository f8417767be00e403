"""Do the word maps of `eval.py --explain` point at the word's garment? On synthetic pedestrians, whose parts are known.

    python lab/check_word_maps.py runs/toy-tbps-clip-simplified-0/best.pt

Counts words that occur once in a caption and belong to a visible garment. A hit: the strongest patch of the map lies on
the garment, by at least a quarter of its area. Chance: the fraction of patches that do."""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))
import data                                                             # noqa: E402
import eval as evaluation                                               # noqa: E402
import generate                                                         # noqa: E402
import tbps                                                             # noqa: E402
from lab import check_generated, people                                 # noqa: E402


def cases(record, caption):
    """[(word, "colour" or "noun", mask (H, W) of its garment)] of a caption."""
    tagged = data.tag_words(caption)
    words = [caption[start:end] for start, end, _ in tagged]
    found = []
    for noun, colours in generate.mentions(words, [kind for *_, kind in tagged])[0]:
        region = check_generated.REGION.get(generate.GARMENT_OF[words[noun]])       # None for glasses: too small
        if region is None or people.mask(record, region).sum() < 30:
            continue
        for kind, positions in (("noun", [noun]), ("colour", colours)):
            found += [(words[n], kind, people.mask(record, region)) for n in positions if words.count(words[n]) == 1]
    return found


def score(model, tokenizer, preprocessing, records):
    """{"colour" or "noun": [(hit, chance), ...]}"""
    hits = dict(colour=[], noun=[])
    for record in records:
        for caption in map(data.normalize_text, record["captions"]):
            caption = preprocessing.text(caption)
            pixels = preprocessing.image(record["image"])
            found = evaluation.word_maps(model, tokenizer, pixels, caption, data.tag_words, most=99)
            maps = {word: heat for word, _, heat in found}
            for word, kind, mask in cases(record, caption):
                if word in maps:
                    area = F.adaptive_avg_pool2d(torch.from_numpy(mask)[None].float(), model.image.grid)[0]
                    on = (area > 0.25).flatten()                                                        # (patches,)
                    hits[kind].append((on[maps[word].argmax()].item(), on.float().mean().item()))
    return hits


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("checkpoint")
    found = score(*tbps.load_checkpoint(p.parse_args().checkpoint), data.read("toy", "", "test")[::20])
    for kind, found in found.items():
        hit, chance = 100 * np.mean(found, axis=0)
        print(f"{kind}s: {hit:.0f} % of {len(found):,} point at their garment; by chance {chance:.0f} %")


if __name__ == "__main__":
    data.command(main)
