"""Training with one thing changed, to test why an augmentation or a loss helps or harms.

    python lab/train_variants.py colours,crops --dataset toy --method baseline --set ss=0.4 ...     as tbps.py, changed:

colours    views for self-supervision keep their colours: no jitter, no grey
crops      they show most of the person: crops of at least 80 % instead of 20 %
untold     captions of images that augmentation has made grey do not name colours
moves      AutoAugment, RandAugment and TrivialAugment without operations on colours
small      TrivialAugment moves images by a fifth: at most 27 degrees and 6.4 pixels
senses     synonyms are those of another word, as if taken in a wrong sense"""

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

CHANGES = {"colours", "crops", "untold", "moves", "small", "senses"}
IMAGE_OPS = data.image_ops


def changed_self_view(changes):
    """data.SelfView with `colours` or `crops`."""
    class SelfView(data.SelfView):
        def __init__(self, size, norm="imagenet"):
            super().__init__(size, norm)
            if "colours" in changes:
                self.colours = []
            if "crops" in changes:
                ratio = data.crop_ratio(size)
                self.crop = v2.RandomResizedCrop(size, scale=(0.8, 1.0), ratio=ratio, antialias=True)
    return SelfView


class UntoldPairs(data.Pairs):
    """data.Pairs whose captions leave out colours if the image has become grey. That is seen in views made here."""

    def __init__(self, *args, on_device=False, **options):
        super().__init__(*args, **options)

    def augment(self, i, rng):
        captions, pixels = super().augment(i, rng)
        normalize = self.views[0].normalize
        mean, std = (torch.tensor(values)[:, None, None] for values in (normalize.mean, normalize.std))
        if (pixels[0] * std + mean).std(0).max() < 1e-3:                # the three channels are equal
            colours = rf"\b({'|'.join(data.COLOURS)})\b ?"
            captions = [re.sub(colours, "", caption, flags=re.I) for caption in captions]
        return captions, pixels


def is_movement(operation):
    return operation.startswith(("Shear", "Translate", "Rotate"))


def divided(magnitudes, by):
    """torchvision's function of an operation's magnitudes, divided by a number."""
    return lambda *size: magnitudes(*size) / by


def changed_image_ops(changes):
    """data.image_ops with `moves` or `small`."""
    def image_ops(size):
        ops = IMAGE_OPS(size)
        auto, rand, trivial = ops["autoaugment"], ops["randaugment"], ops["trivialaugment"]
        if "moves" in changes:
            auto._policies = [[step for step in policy if is_movement(step[0])] for policy in auto._policies]
            for augment in (rand, trivial):
                space = augment._AUGMENTATION_SPACE
                augment._AUGMENTATION_SPACE = {
                    name: entry for name, entry in space.items() if is_movement(name) or name == "Identity"}
        if "small" in changes:
            trivial._AUGMENTATION_SPACE = {
                name: (divided(magnitudes, 5), signed) if is_movement(name) else (magnitudes, signed)
                for name, (magnitudes, signed) in trivial._AUGMENTATION_SPACE.items()}
        return ops
    return image_ops


def patches(changes):
    """The context managers that make these changes to data.py."""
    found = [mock.patch.object(data, "SelfView", changed_self_view(changes))]
    if "untold" in changes:
        found.append(mock.patch.object(data, "Pairs", UntoldPairs))
    if {"moves", "small"} & set(changes):
        found.append(mock.patch.object(data, "image_ops", changed_image_ops(changes)))
    if "senses" in changes:
        words = sorted(data.SYNONYM_OF)
        others = random.Random(0).sample(words, len(words))
        wrong = {word: data.SYNONYM_OF[other] for word, other in zip(words, others)}
        found.append(mock.patch.dict(data.SYNONYM_OF, wrong))
    return found


def known_changes(text):
    """colours,crops -> ["colours", "crops"], for argparse."""
    changes = text.split(",")
    if unknown := set(changes) - CHANGES:
        raise argparse.ArgumentTypeError(f"name changes, like colours,crops, not {', '.join(sorted(unknown))}")
    return changes


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ", ".join(sorted(CHANGES))
    p.add_argument("changes", type=known_changes, help=f"of {names}, separated by commas; the rest is for tbps.py")
    args, rest = p.parse_known_args()
    parse = tbps.parse_args

    def parse_args():
        """Stores the changes in the checkpoint, so that only the same changes resume it."""
        theirs, recipe = parse(rest)
        theirs.changes = ",".join(sorted(args.changes))
        return theirs, recipe

    with ExitStack() as stack:
        for patch in [*patches(args.changes), mock.patch.object(tbps, "parse_args", parse_args)]:
            stack.enter_context(patch)
        tbps.main()


if __name__ == "__main__":
    data.command(main)
