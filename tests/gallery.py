"""A gallery of pictures and an untrained checkpoint, for the tests of the index, the search and its page."""

import argparse
import json
import os

import numpy as np
import pytest
import torch
from PIL import Image

import data
import tbps
from conftest import run


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory, people):
    """An ordinary checkpoint, untrained."""
    torch.manual_seed(0)
    tokenizer = data.train_tokenizer([c for r in people for c in r["captions"]], vocab=700)
    model = tbps.DualEncoder(**tbps.SIZES["toy"] | dict(vocab=tokenizer.vocab))
    args = argparse.Namespace(dataset="toy", data_root="data", method="baseline", argv=[])
    preprocessing = data.Preprocessing((96, 48))
    content = tbps.checkpoint_dict(args, tbps.BASELINE, model, tokenizer, preprocessing, heads=False)
    path = tmp_path_factory.mktemp("run") / "best.pt"
    tbps.save(path, content | dict(epoch=1, step=0, best=0.0, scores={}))
    return path


@pytest.fixture
def photos(tmp_path, people):
    """Sixteen images at several depths and in all formats; and files that are none, links, a pipe."""
    root = tmp_path / "photos"
    for n, r in enumerate(people[:16]):
        folder = root / ["", "a", "a/deep er", "ünï"][n % 4]
        folder.mkdir(parents=True, exist_ok=True)
        data.load_image(r["image"]).save(folder / f"{n:02}.{['jpg', 'png', 'bmp', 'webp', 'JPEG'][n % 5]}")
    (root / "notes.txt").write_text("no picture")
    (root / "broken.jpg").write_bytes(b"no picture either")
    (root / ".hidden").mkdir()
    Image.new("RGB", (9, 9)).save(root / ".hidden/h.png")
    Image.new("RGB", (9, 9)).save(tmp_path / "secret.png")
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    (root / "nowhere.png").symlink_to(tmp_path / "nothing.png")
    os.mkfifo(root / "pipe.png")
    return root


def search(checkpoint, photos, *more, code=0):
    command = ["--checkpoint", checkpoint, "--gallery", photos, "--workers", "0", "--device", "cpu"]
    return run("eval.py", *command, *more, code=code)


def read_index(file):
    """(rows, entries) of FILE*.f16 and FILE*.jsonl, as another program would read them."""
    rows_file, = file.parent.glob(f"{file.name}*.f16")
    entries = [json.loads(line) for line in open(rows_file.with_suffix(".jsonl"))]
    return np.fromfile(rows_file, np.float16).reshape(len(entries), -1), entries


def index_of(photos):
    """The one index beside a gallery."""
    return read_index(photos.with_name("photos-"))
