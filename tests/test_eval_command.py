"""Scores from the command line: weights of a CLIP, tables of several checkpoints, features of another model."""

import numpy as np
import pytest
import torch

import data
import eval as evaluation
from conftest import error, run
from gallery import checkpoint, photos                                  # noqa: F401
from tiny_clip import openai_tiny


@pytest.fixture
def clip(tmp_path, people):
    """A folder as Hugging Face publishes CLIP, with the names and shapes of OpenAI's weights but few channels."""
    tokenizer = data.train_tokenizer([c for r in people for c in r["captions"]], vocab=700)
    folder, weights = tmp_path / "clip", openai_tiny()
    folder.mkdir()
    weights["token_embedding.weight"] = weights["token_embedding.weight"].repeat(9, 1)[:tokenizer.vocab]
    torch.save(weights, folder / "weights.pt")
    merges = "".join(" ".join(pair) + "\n" for pair in tokenizer.merges)
    (folder / "merges.txt").write_text("#version: 0.2\n" + merges.strip(), encoding="utf-8")
    return folder


def test_weights_of_a_clip_search_without_training(clip, photos, tmp_path):
    said = run("eval.py", "--checkpoint", clip, "--gallery", photos, "--workers", "0", "--query", "a man",
               "--page", tmp_path / "p.html", "--size", "48x24")
    assert "positions from 3x3 to 6x3" in said and "16 images" in said
    ranks = [line.split()[0] for line in said.split("\na man\n")[1].splitlines()[:10]]
    assert ranks == [str(n) for n in range(1, 11)]


def test_a_table_of_checkpoints(clip, checkpoint, tmp_path):
    said = run("eval.py", "--checkpoint", clip / "weights.pt", checkpoint, "--dataset", "toy", "--split", "val",
               "--page", tmp_path / "t.html")
    table = said.split("\ntext to image\n")[1]
    assert "(zero-shot, epoch 0) on toy val" in said and table.count("R@1 ") == 2 and table.count(" on toy ") == 2
    assert (tmp_path / "t.html").read_text().count("<h2>") == 5


def test_mistakes(clip, checkpoint, tmp_path):
    page = tmp_path / "u.html"
    assert "name one with --dataset" in error("eval.py", "--checkpoint", clip)
    said = error("eval.py", "--checkpoint", checkpoint, tmp_path / "gone.pt", "--page", page)
    assert "the weights should be at" in said and not page.exists()
    (tmp_path / "bad.pt").write_bytes(b"no weights")
    both = [checkpoint, tmp_path / "bad.pt"]
    assert "bad.pt" in error("eval.py", "--checkpoint", *both, "--split", "val", "--page", page)
    assert "toy val" in page.read_text()                                # what was scored before


# ---- features of another model --------------------------------------------------------------------------------------

@pytest.fixture
def arrays():
    g = torch.Generator().manual_seed(0)
    query, gallery = torch.randn(20, 8, generator=g).numpy(), torch.randn(10, 8, generator=g).numpy()
    return dict(query=query, gallery=gallery, q_pid=np.arange(20) % 5, g_pid=np.arange(10) % 5, own=np.arange(20) % 10)


def test_features_of_another_model(arrays, tmp_path):
    np.savez(tmp_path / "f.npz", **arrays)
    said = run("eval.py", "--features", tmp_path / "f.npz")
    for names in (["query", "gallery", "q_pid", "g_pid"], list(arrays)):
        scores = evaluation.retrieval_metrics(*(arrays[name] for name in names))
        assert evaluation.format_scores(scores) in said
    other = dict(query=arrays["query"].astype(">f4"), q_pid=arrays["q_pid"].astype(np.uint64))
    np.savez(tmp_path / "g.npz", **arrays | other)                      # byte order and kind of number do not matter
    assert run("eval.py", "--features", tmp_path / "g.npz") == said


CHANGES = {
    "dtype('<U21') to dtype('int64')": lambda x: dict(q_pid=x["q_pid"].astype(str)),
    "dtype('float64') to dtype('int64')": lambda x: dict(q_pid=x["q_pid"] + 0.5),
    "do not fit: [(), (10, 8)": lambda x: dict(query=np.float32(3)),
    "whole-number ids: Cannot cast": lambda x: dict(query=x["query"] * 1j),
    "own must be rows of the gallery": lambda x: dict(own=x["own"] - 5),
    "a row of the features is all zeros": lambda x: dict(gallery=x["gallery"] * (np.arange(10) != 3)[:, None]),
    "0 numbers each": lambda x: dict(query=x["query"][:, :0], gallery=x["gallery"][:, :0]),
    "do not fit: [(20, 8), (9, 8), (9,), (9,)]": lambda x: {k: v[:9] for k, v in x.items() if k != "query"},
}


@pytest.mark.parametrize("said", CHANGES)
def test_features_that_do_not_fit(arrays, tmp_path, said):
    np.savez(tmp_path / "f.npz", **arrays | CHANGES[said](arrays))
    assert said in error("eval.py", "--features", tmp_path / "f.npz")


def test_a_file_that_holds_no_features(arrays, tmp_path):
    file = tmp_path / "f.npz"
    assert "the features should be at" in error("eval.py", "--features", file)
    np.savez(file, query=arrays["query"])
    assert "missing 3 required positional arguments: 'gallery'" in error("eval.py", "--features", file)
    np.savez(file, **arrays)
    assert "not allowed with argument --features" in error("eval.py", "--features", file, "--checkpoint", file)
    assert "name the folder" in error("eval.py", "--features", file, "--query", "a")
    whole = file.read_bytes()
    for bad in (b"nothing", b"", whole[:300], whole[:-40], whole[:700] + b"x" + whole[701:]):
        file.write_bytes(bad)
        assert "is no .npz of floating-point features" in error("eval.py", "--features", file)
