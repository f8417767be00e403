"""Searching one's own pictures: the index, ranking, explanation, the search page and what it must not do, export, features from elsewhere."""

import argparse
import base64
import http.client
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import types
import urllib.parse

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import data
import eval as evaluation
import tbps
from lab.people import mask
from lab import check_word_maps
from conftest import ROOT, error, run, start
from gallery import checkpoint, photos, search                                                        # noqa: F401
from tiny_clip import openai_tiny


def test_nearest_equals_a_full_sort():
    """In one piece and in several."""
    g = torch.Generator().manual_seed(0)
    gallery = F.normalize(torch.randn(20_000, 16, generator=g), dim=1).half()
    for queries, number in ((7, 1000), (7, 20_000), (700, 20_000)):
        query = F.normalize(torch.randn(queries, 16, generator=g), dim=1)
        want = (query @ gallery[:number].float().T).sort(dim=1, descending=True)
        score, row = evaluation.nearest(gallery[:number].numpy(), query, 10)
        assert torch.equal(row, want.indices[:, :10]) and torch.allclose(score, want.values[:, :10])
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
    said = search(checkpoint, photos, "--queries", tmp_path / "q.txt", "--query", "a red hat", "\udcff\udcfe hat", "--top", "19", "--page", tmp_path / "p.html")
    first, _, last = (part.splitlines()[1:20] for part in said.split("\n\n")[1:4])
    assert len(first) == 19 and first == last and "\x1b" not in said and "new\ufffdline.jpg" in said and "bytes\ufffd\ufffd.jpg" in said


# ---- explanation ----------------------------------------------------------------------------------------------------

def test_a_word_is_explained_by_the_part_it_is_about():
    """A model whose one number is the red of the top left, whose other is the blue of the bottom right; and words that ask for them."""
    class Model:
        arch, image = dict(patch=8), types.SimpleNamespace(grid=(12, 6))

        def encode_image(self, x):
            return torch.stack([x[:, 0, :32, :16].mean(dim=(1, 2)), x[:, 2, 64:, 32:].mean(dim=(1, 2)), torch.ones(len(x))], dim=1)

        def encode_text(self, texts):
            return torch.tensor([[float("red" in t), float("blue" in t), 0.3] for t in texts])
    view = data.EvalView((96, 48))
    found = evaluation.word_maps(Model(), list, view(Image.new("RGB", (48, 96), "white")), "a red hat, blue shoes", data.tag_words, most=2)
    (red, adds, heat), (blue, adds_too, heat_too) = found
    assert (red, blue) == ("red", "blue") and adds > 0.1 and adds_too > 0.1 and heat.shape == (12, 6)
    inside, inside_too = torch.zeros(12, 6, dtype=torch.bool), torch.zeros(12, 6, dtype=torch.bool)
    inside[:4, :2], inside_too[8:, 4:] = True, True
    assert heat[inside].min() > 2 * heat[~inside].max() / 3 and heat_too[inside_too].min() > 2 * heat_too[~inside_too].max() / 3
    assert heat[6:].max() < 0.1 * heat.max() and heat_too[:6].max() < 0.1 * heat_too.max()
    assert evaluation.word_maps(Model(), list, torch.zeros(3, 96, 48), "with of the", data.tag_words) == []


def test_the_judge_of_maps_knows_the_garments(checkpoint, people, monkeypatch, capsys):
    record = next(r for r in people if mask(r, "bottom").sum() > 30 and mask(r, "top").sum() > 30)
    found = {(word, kind): mask for word, kind, mask in check_word_maps.cases(record, "a man in a red jacket, blue shorts and glasses")}
    assert found.keys() == {("red", "colour"), ("jacket", "noun"), ("blue", "colour"), ("shorts", "noun")}
    assert (found["red", "colour"] == mask(record, "top")).all() and (found["shorts", "noun"] == mask(record, "bottom")).all()
    assert {word for word, *_ in check_word_maps.cases(record, "a red jacket and red shorts")} == {"jacket", "shorts"}       # which red?
    monkeypatch.setattr(data, "read", lambda *_: people)
    monkeypatch.setattr(sys, "argv", ["check_word_maps.py", str(checkpoint)])
    check_word_maps.main()
    said = capsys.readouterr().out
    assert said.count("point at their garment; by chance") == 2


# ---- the search page ------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def server(checkpoint, tmp_path_factory, people):
    root = tmp_path_factory.mktemp("served")
    photos = root / "photos"
    photos.mkdir()
    for n, r in enumerate(people):
        data.load_image(r["image"]).save(photos / f"{n:02}.png")
    (photos / "<b>&'.png").write_bytes((photos / "00.png").read_bytes())
    Image.new("RGB", (9, 9)).save(root / "secret.png")
    process = start("eval.py", "--checkpoint", checkpoint, "--gallery", photos, "--workers", "0", "--serve", "0")
    said = ""
    while "search page: " not in said:
        said += (line := process.stdout.readline())
        assert line, said
    yield int(said.rsplit("localhost:")[1].split("/")[0]), photos, process
    os.killpg(process.pid, signal.SIGINT)
    said = process.communicate()[0]
    assert process.returncode == 130 and "Traceback" not in said, said


def get(port, path, method="GET", **headers):
    """-> status, headers, body of a request, in an encoding of our own making."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.putrequest(method, path, skip_host=True)
    for name, value in (dict(Host=f"localhost:{port}") | headers).items():
        connection.putheader(name, value)
    connection.endheaders()
    answer = connection.getresponse()
    return answer.status, answer.headers, answer.read().decode("utf-8", "replace")


def test_the_page(server):
    port, photos, _ = server
    status, headers, body = get(port, "/")
    assert status == 200 and "Find a person in 25 pictures" in body and "class=hit>" not in body
    assert "default-src 'none'" in headers["Content-Security-Policy"] and headers["X-Content-Type-Options"] == "nosniff"
    status, _, body = get(port, "/?" + urllib.parse.urlencode(dict(q="a man in a red coat", top=7)))
    assert status == 200 and body.count("class=hit>") == 7 and "a man in a red coat</textarea>" in body and "more like this" in body
    everything = get(port, "/?" + urllib.parse.urlencode(dict(q="a man", top=200)))[2]
    assert everything.count("class=hit>") == 25 and "&lt;b&gt;&amp;" in everything and "<b>&'" not in everything
    like = get(port, "/?like=3&q=a+man&top=5")[2]
    assert like.count("class=hit>") == 5 and "<b>1</b> 1.000<br>03.png" in like
    why = get(port, "/?why=3&q=a+man+in+a+red+coat")[2]
    assert "What in 03.png answers to the words" in why and why.count("<figcaption>") >= 3
    status, headers, _ = get(port, "/photo?row=3")
    assert status == 200 and headers["Content-Type"] == "image/jpeg"
    one, two, both = (get(port, "/?" + urllib.parse.urlencode(dict(q=q, top=200)))[2] for q in ("a man", "a red coat", "a man\na red coat"))
    scores = [{part.split("<br>")[1].split("<")[0]: float(part.split("</b> ")[1].split("<")[0]) for part in page.split("<figcaption>")[1:]} for page in (one, two, both)]
    mean = {name: scores[0][name] + scores[1][name] for name in scores[0]}
    ratio = [scores[2][name] / mean[name] for name in mean]             # the mean of two directions, of unit length again
    assert max(ratio) - min(ratio) < 0.02


ODD = {"empty": "", "blank": "  \n\t ", "long": "a red coat " * 900, "10,000 characters": "x" * 10_000, "markup": "<script>alert(1)</script></textarea><img src=x onerror=alert(1)>",
       "emoji": "🧍🏽‍♀️ in 🟢 🧥", "null": "a\0man\0", "controls": "".join(map(chr, range(32))), "right to left": "‮a man", "lone surrogate": "%ED%A0%80", "bytes": "%ff%fe",
       "words of CLIP": "<|endoftext|> <|startoftext|>", "format": "{text} {0} %s", "dots": "....", "quote": "'\"`"}


@pytest.mark.parametrize("query", ODD.values(), ids=ODD)
def test_odd_queries_get_an_answer(server, query):
    port, _, _ = server
    status, _, body = get(port, "/?q=" + (query if query.startswith("%") else urllib.parse.quote(query)))
    assert status in (200, 400) and "<main>" in body and "Internal" not in body
    assert "<script>alert" not in body and "<img src=x" not in body
    if not query.strip(". \n\t"):
        assert "escribe the person in a sentence" in body
    elif len(query) > 5000:
        assert "tokens were not read" in body


@pytest.mark.parametrize("path, status", [
    ("/photo?row=999", 404), ("/photo?row=-1", 404), ("/photo?row=x", 404), ("/photo?row=" + "9" * 5000, 404), ("/photo?row=٣", 404), ("/photo?row=1%00", 404), ("/photo", 404),
    ("/secret.png", 404), ("/../secret.png", 404), ("/photo/../../secret.png", 404), ("/%2e%2e/secret.png", 404), ("//etc/passwd", 404), ("http://[bad/", 400), ("/photo?row=../secret.png", 404),
    ("/?like=25", 400), ("/?like=-1", 400), ("/?like=x", 400), ("/?top=0&q=a", 400), ("/?top=1e9&q=a", 400), ("/?top=" + "9" * 5000, 400), ("/?why=99&q=a", 400), ("/?" + "a=1&" * 100, 400),
    ("/?q=" + "a" * 70_000, 414)], ids=lambda x: str(x)[:24])
def test_nothing_but_rows_can_be_asked_for(server, path, status):
    port, _, _ = server
    if not path.isascii():
        path = urllib.parse.quote(path, safe="/?=")
    assert get(port, path)[0] == status


def test_only_localhost_is_answered(server):
    port, _, _ = server
    for host in ("evil.example", f"evil.example:{port}", "localhost", f"localhost:{port + 1}", f"localhost:{port}.evil.example", ""):
        assert get(port, "/", Host=host)[0] == 403
    assert get(port, "/", Host=f"127.0.0.1:{port}")[0] == 200
    assert get(port, "/", method="HEAD")[2] == "" and get(port, "/", method="POST")[0] == 501
    others = {found[4][0] for found in socket.getaddrinfo(socket.gethostname(), port, socket.AF_INET)} - {"127.0.0.1"}
    for address in others:                                              # bound to the loopback address alone
        with pytest.raises(OSError):
            socket.create_connection((address, port), timeout=2)


def test_a_picture_that_became_a_link_is_not_shown(server):
    port, photos, _ = server
    row = next(n for n in range(25) if "07.png" in get(port, f"/?like={n}&top=1")[2].split("<h2>")[1][:20])
    whole = (photos / "07.png").read_bytes()
    (photos / "07.png").unlink()
    try:
        assert get(port, f"/photo?row={row}")[0] == 400 and "cannot be read any more" in get(port, f"/?like={row}")[2]
        (photos / "07.png").symlink_to(photos.parent / "secret.png")
        assert get(port, f"/photo?row={row}")[0] == 400 and "cannot be read any more" in get(port, f"/?like={row}")[2]
    finally:
        (photos / "07.png").unlink()
        (photos / "07.png").write_bytes(whole)
    assert get(port, f"/photo?row={row}")[0] == 200


def test_many_clients_and_some_that_hang(server):
    port, _, _ = server
    hanging = [socket.create_connection(("127.0.0.1", port)) for _ in range(8)]
    for s in hanging[:4]:
        s.sendall(b"GET / HTTP/1.1\r\nHost: local")
    gone = socket.create_connection(("127.0.0.1", port))
    gone.sendall(f"GET /?q=a HTTP/1.1\r\nHost: localhost:{port}\r\n\r\n".encode())
    gone.close()
    found = []

    def client(n):
        found.append((n, get(port, "/?" + urllib.parse.urlencode(dict(q=f"a man in a coat {n}", top=3)))))
    threads = [threading.Thread(target=client, args=(n,)) for n in range(32)]
    [t.start() for t in threads]
    [t.join(60) for t in threads]
    assert len(found) == 32 and all(answer[0] == 200 and f"a man in a coat {n}</textarea>" in answer[2] and answer[2].count("class=hit>") == 3 for n, answer in found)
    for s in hanging:
        s.close()


def test_odd_pictures_and_queries(checkpoint, tmp_path):
    (tmp_path / "odd").mkdir()
    Image.new("RGB", (20000, 1), "red").save(tmp_path / "odd/wide.png")
    Image.new("RGB", (1, 5000), "red").save(tmp_path / "odd/high.png")
    assert {Image.open(f).size: Image.open(io.BytesIO(base64.b64decode(evaluation.thumbnail(Image.open(f)).split(",")[1]))).size for f in (tmp_path / "odd").iterdir()} \
        == {(20000, 1): (448, 1), (1, 5000): (1, 112)}
    (tmp_path / "q.txt").write_text("a red\tcoat\x1b[2J\n" + "a man and " * 80)
    said = search(checkpoint, tmp_path / "odd", "--queries", tmp_path / "q.txt", "--explain", "2", "--page", tmp_path / "p.html")
    assert "\x1b" not in said and "a red coat\ufffd[2J" in said and "tokens were not read" in said and "cannot be read" not in (tmp_path / "p.html").read_text()


def test_a_reader_that_stops_reading(checkpoint, photos, tmp_path):
    command = [sys.executable, "eval.py", "--checkpoint", checkpoint, "--gallery", photos, "--workers", "0", "--query", *["a man"] * 300, "--top", "16", "--page", tmp_path / "p.html"]
    head = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    head.stdout.readline()
    head.stdout.close()
    assert b"Error" not in head.stderr.read() and head.wait(60) == 0 and not list(tmp_path.glob("p.html*"))


# ---- mistakes -------------------------------------------------------------------------------------------------------

def test_mistakes(checkpoint, photos, tmp_path, server):
    assert "the gallery should be at" in error("eval.py", "--checkpoint", checkpoint, "--gallery", tmp_path / "x", "--query", "a")
    assert "takes a folder" in error("eval.py", "--checkpoint", checkpoint, "--gallery", photos / "notes.txt", "--query", "a")
    assert "name the folder" in error("eval.py", "--checkpoint", checkpoint, "--query", "a")
    assert "name a checkpoint" in error("eval.py", "--gallery", photos)
    assert "query is empty" in search(checkpoint, photos, "--query", "  ", code=2) and not list(tmp_path.glob("photos-*"))
    assert "has no word" in search(checkpoint, photos, "--query", "...", code=2)
    assert "one thing at a time" in search(checkpoint, photos, "--export", tmp_path / "e", code=2) and "give one with --query" in search(checkpoint, photos, "--explain", "3", code=2)
    assert "is no page, so it is not replaced" in search(checkpoint, photos, "--query", "a", "--page", tmp_path, code=2) and "is a folder; --index" in search(checkpoint, photos, "--index", tmp_path, code=2)
    assert "is no page" in search(checkpoint, photos, "--query", "a", "--page", photos / "00.jpg", code=2) and "is no page" in search(checkpoint, photos, "--query", "a", "--page", os.devnull, code=2)
    (tmp_path / "latin.txt").write_bytes(b"\xff\xfea\x00")
    assert "no text in UTF-8" in search(checkpoint, photos, "--queries", tmp_path / "latin.txt", code=2)
    assert "no text in UTF-8" in search(checkpoint, photos, "--queries", tmp_path, code=2)
    assert "height x width, like 384x128" in search(checkpoint, photos, "--size", "3x", code=2)
    assert "is a file; --pictures" in error("data.py", "--pictures", photos / "notes.txt")
    (tmp_path / "q.txt").write_text("\n\n")
    assert "has no query" in search(checkpoint, photos, "--queries", tmp_path / "q.txt", code=2)
    (tmp_path / "empty").mkdir()
    assert "holds no picture (.bmp, .jpeg" in search(checkpoint, tmp_path / "empty", "--query", "a", code=2)
    assert "no folder" in search(checkpoint, photos, "--index", tmp_path / "x/i", "--query", "a", code=2)
    (tmp_path / "mine.f16").write_bytes(b"mine")
    assert "is no index" in search(checkpoint, photos, "--index", tmp_path / "mine.f16", "--query", "a", code=2)
    assert (tmp_path / "mine.f16").read_bytes() == b"mine"
    assert f"port {server[0]} cannot be had" in search(checkpoint, photos, "--serve", server[0], "--index", tmp_path / "i", code=2)
    assert not (tmp_path / "i.f16").exists()                            # said before anything is embedded
    assert "empty text" in search(checkpoint, "", "--query", "a", code=2) and "empty text" in search(checkpoint, photos, "--index", "", code=2)
    assert "a port at most 65535" in search(checkpoint, photos, "--serve", 65536, code=2)
    assert "--tokenizer and --size are for" in search(checkpoint, photos, "--size", "96x48", "--query", "a", code=2)


# ---- zero-shot, tables, features from elsewhere, export --------------------------------------------------------------

def test_weights_of_a_clip_search_without_training(tmp_path, photos, checkpoint, people):
    """A folder as Hugging Face publishes CLIP: weights, configuration, vocabulary."""
    tokenizer = data.train_tokenizer([c for r in people for c in r["captions"]], vocab=700)
    folder = tmp_path / "clip"
    folder.mkdir()
    weights = openai_tiny()                                             # the same names and shapes as OpenAI's, few channels
    torch.save(weights | {"token_embedding.weight": weights["token_embedding.weight"].repeat(9, 1)[:tokenizer.vocab]}, folder / "weights.pt")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(m) for m in tokenizer.merges), encoding="utf-8")
    said = run("eval.py", "--checkpoint", folder, "--gallery", photos, "--workers", "0", "--query", "a man", "--page", tmp_path / "p.html", "--size", "48x24")
    assert "positions from 3x3 to 6x3" in said and "16 pictures" in said and [line.split()[0] for line in said.split("\na man\n")[1].splitlines()[:10]] == [str(n) for n in range(1, 11)]
    said = run("eval.py", "--checkpoint", folder / "weights.pt", checkpoint, "--dataset", "toy", "--split", "val", "--page", tmp_path / "t.html")
    table = said.split("\ntext to image\n")[1]
    assert "(zero-shot, epoch 0) on toy val" in said and table.count("R@1 ") == 2 and table.count(" on toy ") == 2
    assert (tmp_path / "t.html").read_text().count("<h2>") == 5
    assert "name one with --dataset" in error("eval.py", "--checkpoint", folder)
    assert "the checkpoint should be at" in error("eval.py", "--checkpoint", checkpoint, tmp_path / "gone.pt", "--page", tmp_path / "u.html") and not (tmp_path / "u.html").exists()
    (tmp_path / "bad.pt").write_bytes(b"no weights")
    assert "bad.pt" in error("eval.py", "--checkpoint", checkpoint, tmp_path / "bad.pt", "--split", "val", "--page", tmp_path / "v.html")
    assert "toy val" in (tmp_path / "v.html").read_text()               # what was scored before


def test_features_of_another_model(tmp_path):
    g = torch.Generator().manual_seed(0)
    x = dict(query=torch.randn(20, 8, generator=g), gallery=torch.randn(10, 8, generator=g), q_pid=torch.arange(20) % 5, g_pid=torch.arange(10) % 5, own=torch.arange(20) % 10)
    np.savez(tmp_path / "f.npz", **{k: v.numpy() for k, v in x.items()})
    said = run("eval.py", "--features", tmp_path / "f.npz")
    assert evaluation.format_scores(evaluation.retrieval_metrics(*(x[k] for k in ("query", "gallery", "q_pid", "g_pid")))) in said
    assert evaluation.format_scores(evaluation.retrieval_metrics(*x.values())) in said
    np.savez(tmp_path / "g.npz", query=x["query"].numpy())
    assert "lacks g_pid, gallery, q_pid" in error("eval.py", "--features", tmp_path / "g.npz")
    np.savez(tmp_path / "h.npz", **{k: v.numpy()[:9] for k, v in x.items()} | dict(query=x["query"].numpy()))
    assert "the shapes do not fit: query (20, 8)" in error("eval.py", "--features", tmp_path / "h.npz")
    whole, arrays = (tmp_path / "f.npz").read_bytes(), {k: v.numpy() for k, v in x.items()}
    for bad in (b"nothing", b"", whole[:300], whole[:-40], whole[:700] + b"x" + whole[701:]):
        (tmp_path / "i.npz").write_bytes(bad)
        assert "is no .npz of arrays that can be read" in error("eval.py", "--features", tmp_path / "i.npz")
    for change, words in ((dict(q_pid=arrays["q_pid"].astype(str)), "ids whole numbers"), (dict(q_pid=arrays["q_pid"] + 0.5), "ids whole numbers"), (dict(query=np.float32(3)), "floating-point (N, D)"),
                          (dict(query=arrays["query"] * 1j), "floating-point"), (dict(gallery=arrays["gallery"] * 0), "row 0 of gallery is all zeros"), (dict(own=arrays["own"] - 5), "own must be rows"),
                          (dict(query=arrays["query"][:, :0], gallery=arrays["gallery"][:, :0]), "shapes do not fit")):
        np.savez(tmp_path / "k.npz", **arrays | change)
        assert words in error("eval.py", "--features", tmp_path / "k.npz")
    np.savez(tmp_path / "l.npz", **arrays | dict(query=arrays["query"].astype(">f4"), q_pid=arrays["q_pid"].astype(np.uint64)))
    assert run("eval.py", "--features", tmp_path / "l.npz") == said    # byte order and kind of number do not matter
    assert "the features should be at" in error("eval.py", "--features", tmp_path / "j.npz")
    assert "one thing at a time" in error("eval.py", "--features", tmp_path / "f.npz", "--page", tmp_path / "f.html")
    assert "name the folder" in error("eval.py", "--features", tmp_path / "f.npz", "--query", "a")


def test_export(checkpoint, tmp_path, monkeypatch):
    said = run("eval.py", "--checkpoint", checkpoint, "--export", tmp_path / "e")
    assert "differ from the checkpoint by" in said
    info = json.loads((tmp_path / "e/info.json").read_text())
    model, tokenizer, _ = tbps.load_checkpoint(checkpoint)
    image, text = (torch.export.load(tmp_path / f"e/{n}.pt2").module() for n in ("image", "text"))
    from tokenizers import Tokenizer                                    # without this program
    ids = Tokenizer.from_file(str(tmp_path / "e/tokenizer.json")).encode("a man in a red coat").ids
    row = torch.zeros(1, info["context"], dtype=torch.int64)
    row[0, :len(ids) + 2] = torch.tensor([info["start"], *ids, info["end"]])
    with torch.no_grad():
        assert torch.equal(row, tokenizer(["a man in a red coat"]))
        assert torch.allclose(text(row), F.normalize(model.encode_text(row), dim=1), atol=1e-5)
        pixels = torch.randn(5, 3, *info["size"])
        assert torch.allclose(image(pixels), F.normalize(model.encode_image(pixels), dim=1), atol=1e-5)
    assert (tmp_path / "e/image.pt2").stat().st_size + (tmp_path / "e/text.pt2").stat().st_size < 1.5 * checkpoint.stat().st_size
    assert "is no empty folder" in error("eval.py", "--checkpoint", checkpoint, "--export", tmp_path / "e")
    monkeypatch.setattr(evaluation.TextEncoder, "forward", lambda self, t: F.normalize(self.tower(t)[:, 0] @ self.tower.proj, dim=1))
    with pytest.raises(ValueError, match="do not use"):
        evaluation.export(model, tokenizer, dict(size=(96, 48), norm="imagenet", resize="bicubic", clean=True), tmp_path / "f")
