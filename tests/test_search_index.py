"""The index of a gallery: what is in it, what is embedded again, interruptions, folders that cannot be read."""

import json
import os
import signal
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import data
import eval as evaluation
import tbps
from conftest import run, start
from gallery import checkpoint, index_of, photos, read_index, search                                    # noqa: F401


def files_in(folder):
    return [json.loads(line)[0] for line in evaluation.gallery_files(folder, [])]


# ---- what the index holds -------------------------------------------------------------------------------------------

def test_a_search(checkpoint, photos, tmp_path):
    query, page = "A man in a red coat.", tmp_path / "p.html"
    said = search(checkpoint, photos, "--query", query, "a woman", "--top", "16", "--explain", "1", "--page", page)
    assert "16 images" in said and "cannot be read, skipped: 1 (broken.jpg)" in said
    rows, entries = index_of(photos)
    assert rows.shape == (16, 128)
    assert np.allclose(np.linalg.norm(rows.astype(float), axis=1), 1, atol=2e-3)
    assert sorted(p for p, *_ in entries) == sorted(set(files_in(photos)) - {"broken.jpg"})
    # the features of row n are those of entry n
    model, tokenizer, _ = tbps.load_checkpoint(checkpoint)
    view = data.Preprocessing((96, 48)).image
    paths = [photos / p for p, *_ in entries]
    with torch.no_grad():
        image = F.normalize(model.encode_image(torch.stack([view(p) for p in paths])), dim=1)
        text = F.normalize(model.encode_text(tokenizer([data.clean_caption(query)])), dim=1)
    assert torch.allclose(torch.from_numpy(rows).float(), image, atol=1e-3)
    want = (text @ image.T)[0].sort(descending=True)
    printed = [line.split(maxsplit=2) for line in said.split(f"{query}\n")[1].splitlines()[:3]]
    assert [r[2] for r in printed] == [str(paths[n].relative_to(photos)) for n in want.indices[:3]]
    assert [float(r[1]) for r in printed] == pytest.approx(want.values[:3].tolist(), abs=2e-3)
    html = page.read_text()
    assert html.count('class="hit">') == 32 and html.count("data:image/jpeg") > 33
    assert "ünï" in html and "<script" not in html


@pytest.fixture
def encoded(monkeypatch):
    """Batch sizes that go through the image encoder."""
    seen, encode = [], tbps.DualEncoder.encode_image

    def counted(self, pixels, *more, **how):
        seen.append(len(pixels))
        return encode(self, pixels, *more, **how)
    monkeypatch.setattr(tbps.DualEncoder, "encode_image", counted)
    return seen


def test_only_new_and_changed_files_are_embedded(checkpoint, photos, encoded):
    search(checkpoint, photos)
    rows, entries = index_of(photos)
    encoded.clear()
    search(checkpoint, photos)
    assert sum(encoded) == 1 and (index_of(photos)[0] == rows).all()    # the unreadable file is tried again
    (photos / "00.jpg").unlink()
    Image.new("RGB", (30, 60), "red").save(photos / "a/01.png")
    Image.new("RGB", (30, 60), "blue").save(photos / "new.png")
    encoded.clear()
    search(checkpoint, photos)
    new_rows, new_entries = index_of(photos)
    assert sum(encoded) == 3 and len(new_rows) == len(new_entries) == 16
    kept = [n for n, entry in enumerate(entries) if entry[0] not in ("00.jpg", "a/01.png")]
    assert (new_rows[:14] == rows[kept]).all() and new_entries[:14] == [entries[n] for n in kept]
    assert {e[0] for e in new_entries[14:]} == {"a/01.png", "new.png"}


def test_what_is_gone_is_not_found(checkpoint, photos, tmp_path):
    options = "--query", "a man", "--top", "99", "--page", tmp_path / "p.html"
    (photos / "sub").mkdir()
    for n in range(3):
        Image.new("RGB", (30, 60), (80 * n, 0, 0)).save(photos / f"sub/{n}.png")
    assert "19 images" in search(checkpoint, photos, *options)
    (photos / "sub").rename(tmp_path / "sub")
    said = search(checkpoint, photos, *options)
    assert "16 images" in said and "sub/" not in said and len(index_of(photos)[1]) == 16
    (tmp_path / "sub").rename(photos / "sub")
    said = search(checkpoint, photos, *options)
    assert "19 images" in said and said.count("sub/") == 3 and len(index_of(photos)[1]) == 19


def test_other_weights_have_another_index(checkpoint, photos, tmp_path):
    search(checkpoint, photos)
    saved = torch.load(checkpoint, weights_only=True)
    saved["weights"]["image.proj"] += 0.1
    torch.save(saved, tmp_path / "other.pt")
    search(tmp_path / "other.pt", photos)
    assert len(list(tmp_path.glob("photos-*.f16"))) == 2
    for weights in (checkpoint, tmp_path / "other.pt"):
        assert "16 images" in search(weights, photos, "--index", tmp_path / "i")
    one, other = sorted(tmp_path.glob("i-*.f16"))
    assert not (read_index(one.with_suffix(""))[0] == read_index(other.with_suffix(""))[0]).all()


# ---- interruptions --------------------------------------------------------------------------------------------------

def rows(*numbers):
    return np.float16([[n, n + 0.5] for n in numbers])


def lines(*names):
    return [f'["{name}", 1, 1]\n'.encode() for name in names]


def opened(file):
    """What a newly opened index holds, if both its files and its memory agree."""
    index = evaluation.Index(file, 2)
    entries = [json.loads(line)[0] for line in index.lines]
    assert index.features().tolist() == read_index(file)[0].tolist()
    return index.features().tolist(), entries


@pytest.fixture
def three(tmp_path):
    """An index of three rows, as FILE."""
    index = evaluation.Index(tmp_path / "i", 2)
    index.append(rows(0, 1), lines("a", "b"))
    index.append(rows(2), lines("c"))
    assert opened(tmp_path / "i") == ([[0, 0.5], [1, 1.5], [2, 2.5]], ["a", "b", "c"])
    return tmp_path / "i"


def test_rows_of_files_that_are_gone_are_removed(three):
    evaluation.Index(three, 2).keep([0, 2])
    assert opened(three) == ([[0, 0.5], [2, 2.5]], ["a", "c"])


@pytest.mark.parametrize("crash", [1, 2])
def test_a_crash_while_rows_are_removed_pairs_no_row_with_another_name(crash, three, monkeypatch):
    """The list is removed first: what is left is begun anew."""
    replace, done = os.replace, []

    def replace_or_crash(old, new):
        done.append(new)
        if len(done) == crash:
            raise OSError("no space")
        replace(old, new)
    monkeypatch.setattr(os, "replace", replace_or_crash)
    with pytest.raises(OSError):
        evaluation.Index(three, 2).keep([0, 2])
    monkeypatch.undo()
    assert evaluation.Index(three, 2).lines == []
    evaluation.Index(three, 2).append(rows(7), lines("d"))
    assert opened(three) == ([[7, 7.5]], ["d"])


def test_what_an_interrupted_append_left_is_cut(three):
    with open(f"{three}.f16", "ab") as f:                               # rows without lines
        f.write(rows(9).tobytes()[:3])
    assert opened(three)[1] == ["a", "b", "c"]
    with open(f"{three}.f16", "ab") as f:
        f.write(rows(9).tobytes())
    index = evaluation.Index(three, 2)
    index.append(rows(3), lines("d"))
    assert opened(three) == ([[0, 0.5], [1, 1.5], [2, 2.5], [3, 3.5]], ["a", "b", "c", "d"])


@pytest.mark.parametrize("cut", [1, 5])
def test_half_a_line_is_cut(three, cut):
    os.truncate(f"{three}.jsonl", os.path.getsize(f"{three}.jsonl") - cut)
    assert opened(three) == ([[0, 0.5], [1, 1.5]], ["a", "b"])


@pytest.mark.parametrize("cut, left", [(1, "ab"), (4, "ab"), (5, "a")])
def test_lines_without_rows_are_cut(three, cut, left):
    os.truncate(f"{three}.f16", 12 - cut)
    assert opened(three)[1] == list(left)


def test_a_list_without_rows_is_begun_anew(three):
    os.remove(f"{three}.f16")
    index = evaluation.Index(three, 2)
    assert index.lines == []
    index.append(rows(4), lines("d"))
    assert opened(three) == ([[4, 4.5]], ["d"])


def test_two_searches_do_not_fill_the_same_index(three):
    index = evaluation.Index(three, 2)
    evaluation.Index(three, 2).append(rows(7), lines("x"))
    with pytest.raises(ValueError, match="another search"):
        index.append(rows(8), lines("y"))


def test_ctrl_c_keeps_what_was_embedded(checkpoint, photos):
    for n in range(3000):
        Image.new("RGB", (48, 96), (n % 256, 0, n // 256)).save(photos / f"m{n:04}.bmp")
    process = start("eval.py", "--checkpoint", checkpoint, "--gallery", photos, "--workers", "2")
    while not any(p.read_text().count("\n") > 200 for p in photos.parent.glob("photos-*.jsonl")):
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGINT)
    said = process.communicate()[0]
    assert process.returncode == 130 and "Traceback" not in said
    assert 200 <= len(index_of(photos)[1]) < 3016
    assert "3,016 images" in search(checkpoint, photos) and len(index_of(photos)[0]) == 3016


# ---- folders that cannot be read ------------------------------------------------------------------------------------

def forbid(monkeypatch, folder):
    """Make a folder unlistable, as chmod 000 does for everybody but root."""
    scandir = os.scandir

    def refuse(path="."):
        if str(path) == str(folder):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)
    monkeypatch.setattr(os, "scandir", refuse)


def test_a_folder_that_cannot_be_listed_keeps_its_rows(checkpoint, photos, encoded, monkeypatch):
    search(checkpoint, photos)
    encoded.clear()
    with monkeypatch.context() as patch:
        forbid(patch, photos / "a")                                     # holds 8 of the 16 images, below it a/deep er
        said = search(checkpoint, photos, "--query", "a man")
        assert "cannot be read, skipped: 2 (a, broken.jpg)" in said and "16 images" in said
    assert "16 images" in search(checkpoint, photos)
    assert sum(encoded) == 2                                            # twice broken.jpg, nothing else


def test_a_gallery_that_cannot_be_listed(checkpoint, photos, monkeypatch):
    search(checkpoint, photos)
    before = index_of(photos)
    forbid(monkeypatch, photos)
    assert "skipped: 1 (.)" in search(checkpoint, photos)
    assert index_of(photos)[1] == before[1]


def test_a_file_that_cannot_be_examined_keeps_its_row(checkpoint, photos, monkeypatch):
    """As in a folder that can be listed but not entered, or on a disk with errors."""
    search(checkpoint, photos)
    lstat = os.lstat

    def refuse(path, **how):
        if str(path).endswith("01.png"):
            raise OSError(5, "Input/output error", str(path))
        return lstat(path, **how)
    monkeypatch.setattr(os, "lstat", refuse)
    said = search(checkpoint, photos)
    assert "skipped: 2 (a/01.png, broken.jpg)" in said and len(index_of(photos)[1]) == 16


def test_a_missing_disk_does_not_empty_the_index(checkpoint, photos, tmp_path):
    search(checkpoint, photos, "--index", tmp_path / "i")
    (tmp_path / "gone").mkdir()
    assert "holds no image" in search(checkpoint, tmp_path / "gone", "--index", tmp_path / "i", code=2)
    assert read_index(tmp_path / "i")[0].shape == (16, 128)


def test_a_gallery_may_be_named_in_many_ways(photos, tmp_path, monkeypatch):
    want = files_in(photos)
    assert len(want) == 17 and "a/deep er/02.bmp" in want and not any(path.startswith("/") for path in want)
    (tmp_path / "link").symlink_to(photos)
    monkeypatch.chdir(photos)
    for name in (".", str(photos) + "/", "../photos", tmp_path / "link"):
        assert files_in(name) == want


def test_links_are_no_images(photos):
    (photos / "loop.png").symlink_to(photos / "loop.png")
    (photos / "twice.jpg").symlink_to(photos / "00.jpg")
    unreadable = []
    paths = [json.loads(line)[0] for line in evaluation.gallery_files(photos, unreadable)]
    assert len(paths) == 17 and not {"loop.png", "twice.jpg"} & set(paths) and not unreadable


def test_an_empty_gallery_leaves_no_files(checkpoint, tmp_path):
    (tmp_path / "empty").mkdir()
    said = search(checkpoint, tmp_path / "empty", "--query", "a", code=2)
    assert "holds no image that can be read (.jpg, .jpeg" in said and [p.name for p in tmp_path.iterdir()] == ["empty"]
    (tmp_path / "empty/broken.jpg").write_bytes(b"no picture")
    assert "that can be read" in search(checkpoint, tmp_path / "empty", "--query", "a", code=2)
    assert [p.name for p in tmp_path.iterdir()] == ["empty"]


def test_a_folder_that_cannot_be_written_to(checkpoint, photos, tmp_path, monkeypatch):
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: os.fspath(path) != str(tmp_path) and access(path, mode))
    said = search(checkpoint, photos, code=2)
    assert f"{tmp_path} is no folder that can be written to; --index I names another place" in said
    (tmp_path / "mine").mkdir()
    assert "16 images" in search(checkpoint, photos, "--index", tmp_path / "mine/i")
    (photos / "broken.jpg").unlink()                                    # nothing is to be written now
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK and access(path, mode))
    assert "16 images" in search(checkpoint, photos, "--index", tmp_path / "mine/i")


class Constant(torch.nn.Module):
    """Encodes every image as the same two numbers, but what is NaN as NaN."""

    def encode_image(self, pixels):
        return pixels.mean(dim=(1, 2, 3))[:, None] + torch.ones(2)


def test_a_view_gets_paths_and_may_refuse_them(photos, tmp_path, capsys):
    """update_index without tbps or data: a view of Pillow alone, which refuses a picture of too many pixels."""
    def view(path):
        assert path.is_relative_to(photos)
        with Image.open(path) as opened:
            opened.load()
        if path.name == "00.jpg":
            raise Image.DecompressionBombError("too many pixels")
        return torch.zeros(3, 4, 2)
    index = evaluation.Index(tmp_path / "i", 2)
    preprocessing = types.SimpleNamespace(image=view, size=(4, 2))
    evaluation.update_index(index, Constant(), preprocessing, photos, batch=5)
    assert "skipped: 2 (00.jpg, broken.jpg)" in capsys.readouterr().err
    assert len(index.lines) == 15
    assert np.allclose(read_index(tmp_path / "i")[0], 0.5 ** 0.5, atol=1e-3)


def test_pictures_to_try_it_on(cuhk, tmp_path):
    said = run("data.py", "--dataset", "cuhk", "--data-root", cuhk, "--pictures", tmp_path / "p")
    names = sorted(files_in(tmp_path / "p"))
    assert f"{len(names)} pictures" in said and len(names) == len(data.read("cuhk", cuhk, "test"))
    assert names[0] == "0005_00000.png"
