"""Why does a table say no? Training with one thing otherwise than the program, or the paper, has it.

    python tests/explain.py colours,crops --dataset toy --method baseline --set ss=0.4 ...      as tbps.py, with these changes:

colours    views for self-supervision keep their colours: no jitter, no grey
crops      they show most of the person: crops of 80 % at least, instead of 20"""

import argparse
import sys
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


def known(text):
    """colours,crops -> ["colours", "crops"], for argparse."""
    changes = text.split(",")
    if unknown := set(changes) - {"colours", "crops"}:
        raise argparse.ArgumentTypeError(f"name changes, like colours,crops, not {', '.join(sorted(unknown))}")
    return changes


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("changes", type=known, help="colours, crops, or both with a comma; all that follows is for tbps.py")
    mine, rest = p.parse_known_args()
    parse = tbps.parse_args

    def parse_args():
        args, recipe = parse(rest)
        args.changes = ",".join(sorted(mine.changes))                   # the checkpoint says so, and is resumed as such only
        return args, recipe
    with mock.patch.object(data, "SelfView", self_view(mine.changes)), mock.patch.object(tbps, "parse_args", parse_args):
        tbps.main()


if __name__ == "__main__":
    data.command(main)
