"""Does the map of a word (eval.py --explain) point at the garment that the word is about? The truth about toy people is known.

    python lab/check_word_maps.py runs/toy-tbps-clip-simplified-0/best.pt

Of words that occur once in a caption and belong to a garment in sight: in how many cases lies the hottest patch on the garment (a quarter
of it at least), and what share of all patches does."""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch.nn.functional as F
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import data                                                             # noqa: E402
import eval as evaluation                                               # noqa: E402
import generate                                                         # noqa: E402
import tbps                                                             # noqa: E402
from lab import check_generated, people                                 # noqa: E402


def cases(record, caption):
    """[(word, "colour" or "noun", mask of its garment)] of a caption."""
    tagged = data.tag_words(caption)
    words, found = [caption[a:b] for a, b, _ in tagged], []
    for noun, colours in generate.mentions(words, [kind for *_, kind in tagged])[0]:
        region = check_generated.REGION.get(generate.GARMENT_OF[words[noun]])       # glasses have no colour, nor the room for one
        if region and (mask := people.mask(record, region)).sum() >= 30:
            found += [(words[n], kind, mask) for kind, ns in (("noun", [noun]), ("colour", colours)) for n in ns if words.count(words[n]) == 1]
    return found


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("checkpoint")
    model, tokenizer, info = tbps.load_checkpoint(p.parse_args().checkpoint)
    view, hits = data.EvalView(info["size"], info["norm"], info["resize"]), dict(colour=[], noun=[])
    for record in data.read("toy", "", "test")[::20]:
        for caption in record["captions"]:
            caption = data.clean_caption(data.normalize_text(caption)) if info["clean"] else data.normalize_text(caption)
            maps = {word: heat for word, _, heat in evaluation.word_maps(model, tokenizer, view(record["image"]), caption, data.tag_words, most=99)}
            for word, kind, mask in cases(record, caption):
                on = F.adaptive_avg_pool2d(torch.from_numpy(mask)[None].float(), model.image.grid)[0] > 0.25
                if word in maps:
                    hits[kind].append((on.flatten()[maps[word].argmax()].item(), on.float().mean().item()))
    for kind, found in hits.items():
        hit, chance = 100 * np.mean(found, axis=0)
        print(f"{kind}s: {hit:.0f} % of {len(found):,} point at their garment; by chance {chance:.0f} %")


if __name__ == "__main__":
    data.command(main)
