"""Why does a table say no? Training with one thing otherwise than the program, or the paper, has it.

    python lab/train_variants.py colours,crops --dataset toy --method baseline --set ss=0.4 ...      as tbps.py, with these changes:

colours    views for self-supervision keep their colours: no jitter, no grey
crops      they show most of the person: crops of 80 % at least, instead of 20
untold     captions of pictures that augmentation has made grey do not tell colours
moves      AutoAugment, RandAugment and TrivialAugment move pictures only: no operations on colours
small      TrivialAugment moves pictures by a fifth of what it does: turns of 27 degrees at most, shifts of 6.4 pixels, shears
senses     synonyms are those of another word, as of a wrong sense"""

import argparse
import random
import re
import sys
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import torch
from torchvision.transforms import v2

sys.path.insert(0, str(Path(__file__).parent.parent))
import data                                                             # noqa: E402
import tbps                                                             # noqa: E402


def self_view(changes):
    """A SelfView with these changes."""
    class Changed(data.SelfView):
        def __init__(self, size, norm="imagenet"):
            super().__init__(size, norm)
            if "colours" in changes:
                self.colour = torch.nn.Identity()
            if "crops" in changes:
                self.crop = v2.RandomResizedCrop(size, scale=(0.8, 1.0), ratio=data.crop_ratio(size), antialias=True)
    return Changed


class Untold(data.Pairs):
    """Pairs whose captions leave out colours where the picture has become grey."""

    def vary(self, i, rng):
        captions, pixels = super().vary(i, rng)
        mean, std = (torch.tensor(values)[:, None, None] for values in (self.views[0].normalize.mean, self.views[0].normalize.std))
        if (pixels[0] * std + mean).std(0).max() < 1e-3:
            captions = [re.sub(rf"\b({'|'.join(data.COLOURS)})\b ?", "", caption, flags=re.I) for caption in captions]
        return captions, pixels


def image_ops(changes):
    """data.image_ops with these changes."""
    original = data.image_ops

    def moves(name):
        return name.startswith(("Shear", "Translate", "Rotate"))

    def changed(size):
        ops = original(size)
        auto, rand, trivial = (ops[f"{name}augment"] for name in ("auto", "rand", "trivial"))
        if "moves" in changes:
            auto._policies = [[step for step in policy if moves(step[0])] for policy in auto._policies]
            for augment in (rand, trivial):
                augment._AUGMENTATION_SPACE = {name: way for name, way in augment._AUGMENTATION_SPACE.items() if moves(name) or name == "Identity"}
        if "small" in changes:
            trivial._AUGMENTATION_SPACE = {name: ((lambda *size, far=way[0]: far(*size) / 5), way[1]) if moves(name) else way for name, way in trivial._AUGMENTATION_SPACE.items()}
        return ops
    return changed


def exchanged(changes):
    """The patches that make these changes."""
    patches = [mock.patch.object(data, "SelfView", self_view(changes))]
    if "untold" in changes:
        patches.append(mock.patch.object(data, "Pairs", Untold))
    if {"moves", "small"} & set(changes):
        patches.append(mock.patch.object(data, "image_ops", image_ops(changes)))
    if "senses" in changes:
        words = sorted(data.SYNONYM_OF)
        patches.append(mock.patch.dict(data.SYNONYM_OF, {word: data.SYNONYM_OF[other] for word, other in zip(words, random.Random(0).sample(words, len(words)))}))
    return patches


CHANGES = {"colours", "crops", "untold", "moves", "small", "senses"}


def known(text):
    """colours,crops -> ["colours", "crops"], for argparse."""
    changes = text.split(",")
    if unknown := set(changes) - CHANGES:
        raise argparse.ArgumentTypeError(f"name changes, like colours,crops, not {', '.join(sorted(unknown))}")
    return changes


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("changes", type=known, help=f"of {', '.join(sorted(CHANGES))}, with a comma between; all that follows is for tbps.py")
    mine, rest = p.parse_known_args()
    parse = tbps.parse_args

    def parse_args():
        args, recipe = parse(rest)
        args.changes = ",".join(sorted(mine.changes))                   # the checkpoint says so, and is resumed as such only
        return args, recipe
    with ExitStack() as stack:
        for patch in [*exchanged(mine.changes), mock.patch.object(tbps, "parse_args", parse_args)]:
            stack.enter_context(patch)
        tbps.main()


if __name__ == "__main__":
    data.command(main)
