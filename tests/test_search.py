"""Searching a gallery from the command line: ranking, queries, word maps, mistakes."""

import base64
import io
import os
import re
import socket
import subprocess
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import data
import eval as evaluation
from conftest import ROOT, error
from gallery import checkpoint, photos, search                          # noqa: F401
from lab import check_word_maps
from lab.people import mask


def test_nearest_equals_a_full_sort():
    """In one piece and in several."""
    g = torch.Generator().manual_seed(0)
    gallery = F.normalize(torch.randn(20_000, 16, generator=g), dim=1).half()
    for queries, number in ((7, 1000), (7, 20_000), (700, 20_000)):
        query, some = F.normalize(torch.randn(queries, 16, generator=g), dim=1), gallery[:number]
        want = (query @ some.float().T).sort(dim=1, descending=True)
        score, place = evaluation.nearest(some.numpy(), query, 10)
        assert torch.equal(place, want.indices[:, :10]) and torch.allclose(score, want.values[:, :10])
    assert evaluation.nearest(gallery[:3].numpy(), query, 10)[1].shape == (700, 3)


def test_pictures_are_upright(tmp_path):
    """A phone writes the picture as the sensor sees it, and beside it how it was held."""
    picture = Image.new("RGB", (40, 20), "red")
    picture.paste("blue", (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = 6                                                    # held upright: turn it to the right
    picture.save(tmp_path / "p.jpg", exif=exif, quality=95)
    upright = data.load_image(tmp_path / "p.jpg")
    assert upright.size == (20, 40) and upright.getpixel((10, 5))[2] > 200 and upright.getpixel((10, 35))[0] > 200
    Image.new("RGB", (4000, 3000)).save(tmp_path / "big.jpg")
    assert data.load_image(tmp_path / "big.jpg", 300).size == (500, 375)


def test_odd_names_and_queries(checkpoint, photos, tmp_path):
    whole = (photos / "00.jpg").read_bytes()
    for name in (b"tab\t\x1b[31m.jpg", b"new\nline.jpg", b"bytes\xff\xfe.jpg"):
        with open(os.path.join(os.fsencode(photos), name), "wb") as f:
            f.write(whole)
    (tmp_path / "q.txt").write_bytes("\ufeffa red hat\n".encode())      # as Windows' editor saves it
    said = search(checkpoint, photos, "--queries", tmp_path / "q.txt", "--query", "a red hat", "\udcff\udcfe hat",
                  "--top", "19", "--page", tmp_path / "p.html")
    first, _, last = (part.splitlines()[1:20] for part in said.split("\n\n")[1:4])
    assert len(first) == 19 and first == last and "\x1b" not in said
    assert "new\ufffdline.jpg" in said and "bytes\ufffd\ufffd.jpg" in said


def test_a_query_of_more_than_75_tokens_is_told(checkpoint, photos, tmp_path):
    said = search(checkpoint, photos, "--query", "a " * 80, "a man", "--page", tmp_path / "p.html")
    assert said.count("reads the first 75 tokens") == 1
    said = search(checkpoint, photos, "--query", "a " * 70, "--page", tmp_path / "p.html")
    assert "reads the first 75 tokens" not in said


# ---- word maps ------------------------------------------------------------------------------------------------------

class Eyes:
    """Sees the red of the top left and the blue of the bottom right; reads the words red and blue."""
    arch, image = dict(patch=8), types.SimpleNamespace(grid=(12, 6))

    def encode_image(self, x):
        red, blue = x[:, 0, :32, :16].mean(dim=(1, 2)), x[:, 2, 64:, 32:].mean(dim=(1, 2))
        return torch.stack([red, blue, torch.ones(len(x))], dim=1)

    def encode_text(self, texts):
        return torch.tensor([[float("red" in t), float("blue" in t), 0.3] for t in texts])


def test_a_word_is_explained_by_the_part_it_is_about():
    white, text = data.Preprocessing((96, 48)).image(Image.new("RGB", (48, 96), "white")), "a red hat, blue shoes"
    (red, adds, heat), (blue, adds_too, heat_too) = evaluation.word_maps(Eyes(), list, white, text, data.tag_words,
                                                                         most=2)
    assert (red, blue) == ("red", "blue") and adds > 0.1 and adds_too > 0.1 and heat.shape == (12, 6)
    inside, inside_too = torch.zeros(12, 6, dtype=torch.bool), torch.zeros(12, 6, dtype=torch.bool)
    inside[:4, :2], inside_too[8:, 4:] = True, True
    assert heat[inside].min() > 2 * heat[~inside].max() / 3
    assert heat_too[inside_too].min() > 2 * heat_too[~inside_too].max() / 3
    assert heat[6:].max() < 0.1 * heat.max() and heat_too[:6].max() < 0.1 * heat_too.max()
    assert evaluation.word_maps(Eyes(), list, torch.zeros(3, 96, 48), "with of the", data.tag_words) == []


def show_maps(monkeypatch, maps, size):
    """What `explained` makes of these word maps for a grey picture."""
    monkeypatch.setattr(evaluation, "word_maps", lambda *_: maps)
    search = types.SimpleNamespace(
        load=lambda row, least: Image.new("RGB", size, "grey"), name=lambda row: "a.png", model=None, tokenizer=None,
        data=types.SimpleNamespace(normalize_text=str, tag_words=None), device="cpu",
        preprocessing=types.SimpleNamespace(text=str, image=lambda picture: None))
    return evaluation.explained(search, 0, "a red hat")


def pictures_of(page):
    return [Image.open(io.BytesIO(base64.b64decode(x))).convert("RGB") for x in re.findall('base64,(.*?)"', page)]


def test_a_word_that_lowers_the_score_is_not_red(monkeypatch):
    """Its map is blue where the picture speaks against it, and its number is negative."""
    heat = torch.tensor([[0.2, -0.2], [0.0, 0.0]])
    page = show_maps(monkeypatch, [("red", 0.1, heat), ("hat", -0.1, heat)], (60, 120))
    assert re.findall("<figcaption>(.*?)</figcaption>", page) == ["the picture", "red +0.100", "hat -0.100"]
    _, red, hat = pictures_of(page)
    left, right = red.getpixel((5, 5)), red.getpixel((red.width - 5, 5))
    assert left[0] > left[2] + 50 and max(right) - min(right) < 20
    left, right = hat.getpixel((5, 5)), hat.getpixel((hat.width - 5, 5))
    assert max(left) - min(left) < 20 and right[2] > right[0] + 50


@pytest.mark.parametrize("size", [(48, 96), (40, 120), (300, 100)])
def test_maps_are_large_enough(size, monkeypatch):
    page = show_maps(monkeypatch, [("red", 0.1, torch.ones(2, 2))], size)
    assert all(picture.height >= 280 for picture in pictures_of(page))


def test_the_judge_of_maps_knows_the_garments(checkpoint, people, monkeypatch, capsys):
    record = next(r for r in people if mask(r, "bottom").sum() > 30 and mask(r, "top").sum() > 30)
    cases = check_word_maps.cases(record, "a man in a red jacket, blue shorts and glasses")
    found = {(word, kind): inside for word, kind, inside in cases}
    assert found.keys() == {("red", "colour"), ("jacket", "noun"), ("blue", "colour"), ("shorts", "noun")}
    assert (found["red", "colour"] == mask(record, "top")).all()
    assert (found["shorts", "noun"] == mask(record, "bottom")).all()
    twice = check_word_maps.cases(record, "a red jacket and red shorts")
    assert {word for word, *_ in twice} == {"jacket", "shorts"}         # which red?
    monkeypatch.setattr(data, "read", lambda *_: people)
    monkeypatch.setattr(sys, "argv", ["check_word_maps.py", str(checkpoint)])
    check_word_maps.main()
    assert capsys.readouterr().out.count("point at their garment; by chance") == 2


# ---- odd pictures, odd readers --------------------------------------------------------------------------------------

def test_odd_pictures_and_queries(checkpoint, tmp_path):
    (tmp_path / "odd").mkdir()
    Image.new("RGB", (20000, 1), "red").save(tmp_path / "odd/wide.png")
    Image.new("RGB", (1, 5000), "red").save(tmp_path / "odd/high.png")
    for name, size in ("wide", (448, 1)), ("high", (1, 112)):
        assert pictures_of(evaluation.figure(Image.open(tmp_path / f"odd/{name}.png"), name))[0].size == size
    (tmp_path / "q.txt").write_text("a red\tcoat\x1b[2J\n" + "a man and " * 80)
    page = tmp_path / "p.html"
    said = search(checkpoint, tmp_path / "odd", "--queries", tmp_path / "q.txt", "--explain", "2", "--page", page)
    assert "\x1b" not in said and "a red coat\ufffd[2J" in said and "75 tokens" in said
    assert "cannot be read" not in page.read_text()


def test_a_reader_that_stops_reading(checkpoint, photos, tmp_path):
    command = [sys.executable, "eval.py", "--checkpoint", checkpoint, "--gallery", photos, "--workers", "0",
               "--query", *["a man"] * 300, "--top", "16", "--page", tmp_path / "p.html"]
    head = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    head.stdout.readline()
    head.stdout.close()
    assert b"Error" not in head.stderr.read() and head.wait(60) == 0 and not list(tmp_path.glob("p.html*"))


# ---- mistakes -------------------------------------------------------------------------------------------------------

QUERY = "--query", "a"
MISTAKES = {  # what is said: options after --checkpoint C --gallery PHOTOS; {} is a folder with files to name
    "notes.txt holds no image": ("--gallery", "{}/photos/notes.txt", *QUERY),
    "the gallery should be at": ("--gallery", "{}/x", *QUERY),
    "query is empty": ("--query", "  "),
    "has no word": ("--query", "..."),
    "is no page, so it is not replaced": (*QUERY, "--page", "{}"),
    "00.jpg exists and is no page": (*QUERY, "--page", "{}/photos/00.jpg"),
    "null exists and is no page": (*QUERY, "--page", os.devnull),
    "latin.txt is UTF-16, not UTF-8": ("--queries", "{}/latin.txt"),
    "Is a directory": ("--queries", "{}"),
    "the query is empty: describe": ("--queries", "{}/blank.txt"),
    "argument --size: invalid": ("--size", "3x"),
    "no folder that can be written to; --index": ("--index", "{}/x/i", *QUERY),
    "name the folder to search": ("--gallery", "", *QUERY),
    "port 65536 cannot be used": ("--serve", 65536),
    "--tokenizer and --size are for": ("--size", "96x48", *QUERY),
}


@pytest.mark.parametrize("said", MISTAKES)
def test_mistakes(checkpoint, photos, tmp_path, said):
    (tmp_path / "latin.txt").write_bytes(b"\xff\xfea\x00")
    (tmp_path / "blank.txt").write_text("\n\n")
    options = [str(o).replace("{}", str(tmp_path)) for o in MISTAKES[said]]
    assert said in search(checkpoint, photos, *options, code=2)
    if said == "query is empty":                                        # said before anything is embedded
        assert not list(tmp_path.glob("photos-*"))


def test_mistakes_without_a_gallery_or_a_checkpoint(checkpoint, photos):
    assert "name the folder" in error("eval.py", "--checkpoint", checkpoint, *QUERY)
    assert "one of the arguments --checkpoint --features --runs is required" in error("eval.py", "--gallery", photos)
    assert "is a file; --pictures" in error("data.py", "--pictures", photos / "notes.txt")


def test_a_port_in_use(checkpoint, photos, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        said = search(checkpoint, photos, "--serve", port, "--index", tmp_path / "i", code=2)
    assert f"port {port} cannot be used" in said
    assert not list(tmp_path.glob("i-*"))                               # said before anything is embedded
