"""Why does a table say no? Training with one thing otherwise than the program, or the paper, has it.

    python tests/explain.py colours,crops --dataset toy --method baseline --set ss=0.4 ...      as tbps.py, with these changes:

colours    views for self-supervision keep their colours: no jitter, no grey
crops      they show most of the person: crops of 80 % at least, instead of 20"""

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


def main():
    changes = sys.argv[1].split(",") if sys.argv[1:] else []
    if not changes or set(changes) - {"colours", "crops"}:
        raise ValueError(f"name changes, like colours,crops\n\n{__doc__}")
    with mock.patch.object(data, "SelfView", self_view(changes)), mock.patch.object(sys, "argv", ["tbps.py", *sys.argv[2:]]):
        tbps.main()


if __name__ == "__main__":
    data.command(main)
