"""Shared by the tests: the project on the path, commands, and small data sets in the layouts of the real ones."""

import contextlib
import html
import io
import json
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from lab.people import draw                                             # noqa: E402


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: at full size, minutes each; run with -m slow")
    # A background job of a shell ignores Ctrl-C, and so would the processes that the tests start and interrupt.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(config, items):
    if not config.getoption("-m"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="at full size: run with -m slow"))


os.environ["HF_HUB_OFFLINE"] = "1"                                     # read once, when huggingface_hub is imported


def run(script, *options, code=0):
    """Run `python script options` within this process, which saves its start of five seconds.

    Returns what it printed, both streams together. An error that the command does not put into words is raised here."""
    said, got = io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        patch.setattr(sys, "argv", [script, *map(str, options)])
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        except SystemExit as e:
            got = e.code
    assert (got or 0) == code, f"exit code {got} instead of {code}\n{said.getvalue()}"
    return said.getvalue()


def start(*command, cwd=ROOT):
    """Start `python *command` as a user would, in a process group of its own."""
    environment = os.environ | dict(OMP_NUM_THREADS=str(torch.get_num_threads()))
    return subprocess.Popen([sys.executable, *map(str, command)], cwd=cwd, env=environment, start_new_session=True,
                            text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def error(script, *options):
    """Run a command that must fail as a user's mistake should: exit code 2, a sentence. Returns the sentence."""
    return run(script, *options, code=2)


@pytest.fixture(scope="session")
def people():
    """A few synthetic pedestrians: 6 persons, 24 images, 48 captions."""
    return draw("train", persons=6)


def cuhk_rows(records):
    """Records as the list in reid_raw.json: ids from 1, several folders, jpg, png and bmp, odd captions."""
    rows = []
    for n, r in enumerate(records):
        split = ["train", "train", "train", "val", "test", "test"][(r["pid"] % 6)]
        folder, ending = [("CUHK01", "png"), ("cam_a", "bmp"), ("Market", "jpg"), ("test_query", "jpg")][n % 4]
        rows.append(dict(split=split, captions=list(r["captions"]), file_path=f"{folder}/{r['pid']:04}_{n:05}.{ending}",
                         processed_tokens=[c.lower().split() for c in r["captions"]], id=r["pid"] + 1))
    rows[0]["captions"][0] = "A man &amp;quot;in&amp;quot; a jekyll &amp; hyde t-shirt, " + html.escape("it's <red>")
    rows[1]["captions"] = [f"{c} Number {k}." for k in range(5) for c in rows[1]["captions"]]           # ten captions
    rows[2]["captions"][1] = ("The man wears a black coat and grey trousers, " * 12)[:490]              # 490 characters
    assert len(rows[1]["captions"]) == 10 and len(rows[2]["captions"][1]) == 490
    return rows


def write_images(folder, paths, records):
    for path, r in zip(paths, records):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(r["image"]).save(folder / path)


def write_cuhk(root, records, rows):
    write_images(root / "imgs", [r["file_path"] for r in rows], records)
    (root / "reid_raw.json").write_text(json.dumps(rows))
    return root


@pytest.fixture(scope="session")
def cuhk(tmp_path_factory, people):
    """A directory in the layout of CUHK-PEDES."""
    return write_cuhk(tmp_path_factory.mktemp("data") / "CUHK-PEDES", people, cuhk_rows(people))


@pytest.fixture(scope="session")
def icfg(tmp_path_factory, people):
    """ICFG-PEDES: one caption per image, no validation split, ids from 0, folders that look like splits but are not."""
    root = tmp_path_factory.mktemp("data") / "ICFG-PEDES"
    rows = []
    for n, r in enumerate(people):
        path = f"{['train', 'test'][n % 2]}/{r['pid']:04}/{r['pid']:04}_{n:03}_02_0303morning_0101_1.jpg"
        rows.append(dict(split="test" if r["pid"] >= 4 else "train", captions=r["captions"][:1], id=r["pid"],
                         processed_tokens=[[]], file_path=path))
    write_images(root / "imgs", [r["file_path"] for r in rows], people)
    (root / "ICFG_PEDES.json").write_text(json.dumps(rows))
    return root


@pytest.fixture(scope="session")
def rstp(tmp_path_factory, people):
    """RSTPReid: flat images, img_path instead of file_path."""
    root = tmp_path_factory.mktemp("data") / "RSTPReid"
    rows = [dict(id=r["pid"], img_path=f"{r['pid']:04}_c{n % 15}_{n:04}.jpg", captions=r["captions"],
                 split=["train", "train", "train", "train", "val", "test"][r["pid"]]) for n, r in enumerate(people)]
    write_images(root / "imgs", [r["img_path"] for r in rows], people)
    (root / "data_captions.json").write_text(json.dumps(rows))
    return root


def bpe_file():
    """OpenAI's merges file, where somebody has put it; it is not part of this project."""
    places = [os.environ.get("CLIP_BPE", ""), ROOT / "bpe_simple_vocab_16e6.txt.gz"]
    return next((Path(p) for p in places if p and Path(p).exists()), None)


needs_bpe = pytest.mark.skipif(bpe_file() is None,
                               reason="needs OpenAI's bpe_simple_vocab_16e6.txt.gz: name it in CLIP_BPE")


def sines(a, b, c, rows=4, dim=3):
    """The raw features of the golden values: sin(a i + b d + c), float64."""
    i, d = torch.arange(rows, dtype=torch.float64)[:, None], torch.arange(dim, dtype=torch.float64)
    return torch.sin(a * i + b * d + c)


@pytest.fixture(scope="session")
def tokenizer(people):
    """Trained on the captions of `people`; every colour and garment is a word of its own."""
    from tiny_diffusion import make_tokenizer
    return make_tokenizer([c for r in people for c in r["captions"]])


@pytest.fixture(scope="session")
def diffusion(tokenizer, tmp_path_factory):
    """A folder with a tiny Stable Diffusion."""
    from tiny_diffusion import write_folder
    return write_folder(tmp_path_factory.mktemp("diffusion"), tokenizer)


class StopAfter:
    """In the place of tbps.stop_on_signal's list: asks to stop when it was looked at a number of times."""

    def __init__(self, looks):
        self.looks = looks

    def __bool__(self):
        self.looks -= 1
        return self.looks < 0
