"""Annotation files as users have them: each mistake is a sentence that names the file and the row."""

import gzip
import json

import numpy as np
import pytest
from PIL import Image

import data
from conftest import bpe_file, error, needs_bpe, run

HEAD = "image,caption,pid,split\n"


def read_csv(folder, text):
    (folder / "x.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    return data.read("csv", folder / "x.csv", "train", hold_out=False)


def cuhk_row(**changes):
    return dict(split="train", captions=["a man"], id=1, file_path="a.png") | changes


def read_cuhk(folder, *rows, encode=json.dumps):
    text = encode(rows)
    (folder / "reid_raw.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    (folder / "imgs").mkdir(exist_ok=True)
    return data.read("cuhk", folder, "train", hold_out=False)


# ---- csv: no row is lost --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("rows, line", [
    ('a.png,a man,1,train\nb.png,"a man,2,train\nc.png,another man",3,train\n', 3),         # joins two rows
    ('a.png,a man,1,train\nb.png,"a man,2,train\nc.png,"another man",3,train\n', 3),
    ('a.png,a man,1,train\nb.png,"a man,2,train\nc.png,another man,3,train\n', 3),          # never closed
    ('\na.png,"a 5" bag",1,train\n', 3),                                                     # inside a quoted caption
    ('a.png,"a man,1,train\r\n' + "b.png,a woman,2,train\r\n" * 9000, 2),          # beyond the field limit of csv
])
def test_a_stray_quotation_mark(rows, line, tmp_path):
    with pytest.raises(ValueError, match=f"x.csv, line {line}: .*stray quotation mark"):
        read_csv(tmp_path, HEAD + rows)


@pytest.mark.parametrize("head, rows", [
    ("pid,split,image,caption", '1,train,a.png,"a man\n2,train,b.png,a woman"\n'),
    ("caption,image,pid,split", '"a man,a.png,1,train\na woman",b.png,2,train\n'),
    ("split,caption,image,pid", 'train,"a man,a.png,1\ntrain,a woman",b.png,2\n')])
def test_a_stray_quotation_mark_in_other_orders_of_columns(head, rows, tmp_path):
    with pytest.raises(ValueError, match="line 2: a stray quotation mark"):
        read_csv(tmp_path, head + "\n" + rows)


def test_captions_with_lines_separators_and_quotation_marks(tmp_path):
    captions = ["A man,\nin red, blue, green,\r\nand white, 1, 2", 'a "red" coat', "one\n\n1, train, 2", "a man"]
    quoted = ['"{}"'.format(c.replace('"', '""')) for c in captions]
    records = read_csv(tmp_path, HEAD + "\n".join(f"{n}.png,{c},{n},train\n" for n, c in enumerate(quoted)))
    assert [r["captions"] for r in records] == [[c] for c in captions]
    assert read_csv(tmp_path, HEAD + 'a.png,a 5" bag,1,train\n')[0]["captions"] == ['a 5" bag']


# ---- text and encodings ---------------------------------------------------------------------------------------------

def test_byte_order_marks_are_accepted(tmp_path):
    mark = b"\xef\xbb\xbf"
    assert read_csv(tmp_path, mark + HEAD.encode() + b"a.png,a man,1,train\n")[0]["pid"] == 1
    assert read_cuhk(tmp_path, cuhk_row(), encode=lambda rows: mark + json.dumps(rows).encode())[0]["pid"] == 1
    line = json.dumps(dict(image="a.png", captions=["a man"], pid=7, split="train", source_image="b.png"))
    (tmp_path / "pairs.jsonl").write_bytes(mark + line.encode() + b"\n\n")
    assert data.read("pairs", tmp_path, "train", hold_out=False)[0]["pid"] == 7


@pytest.mark.parametrize("encoding, name", [
    ("utf-16", "UTF-16"), ("utf-16-le", "UTF-16"), ("cp1252", "cp1252"), ("gbk", "GBK")])
def test_the_encoding_is_named(encoding, name, tmp_path):
    caption = "一个穿红色外套的男人，背着黑色背包" if encoding == "gbk" else "un homme à la veste dorée, très élégant"
    for read in (lambda: read_csv(tmp_path, (HEAD + f"a.png,{caption},1,train\n").encode(encoding)),
                 lambda: read_cuhk(tmp_path, cuhk_row(captions=[caption]),
                                   encode=lambda rows: json.dumps(rows, ensure_ascii=False).encode(encoding))):
        with pytest.raises(ValueError, match=rf"(x.csv|reid_raw.json).*{name}.*save it as UTF-8"):
            read()


def test_odd_separators_of_lines_in_generated_pairs(tmp_path):
    (tmp_path / "imgs").mkdir()
    entry = dict(image="a.png", captions=["a man\u2028in red\x85"], pid=7, split="train", source_image="b.png")
    (tmp_path / "pairs.jsonl").write_text(json.dumps(entry, ensure_ascii=False) + "\n", encoding="utf-8")
    assert data.read("pairs", tmp_path, "train", hold_out=False)[0]["captions"] == entry["captions"]


# ---- rows -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("changes, words", [
    (dict(captions=["a \ud83d man"]), r"captions hold half of a character, '\\ud83d man'"),
    (dict(captions="a man"), "captions are 'a man'; they must be a list"),
    (dict(captions=[]), r"captions are \[\]; they must be a list"),
    (dict(captions_bt="a man"), "captions_bt are 'a man'; they must be a list"),
    (dict(captions_bt=[["x"], ["y"]]), "captions_bt are .*; they must be a list"),
    (dict(captions_bt=5), "captions_bt are 5; they must be a list"),
    (dict(captions_bt=["\udc00"]), "captions_bt hold half of a character"),
    (dict(captions_bt=["one", "two"]), "2 captions_bt belong to 1 captions"),
    (dict(id=2 ** 63), "pid is 9223372036854775808, it must be a whole number of at most 64 bits"),
    (dict(id=-2 ** 63 - 1), "pid is -9223372036854775809, it must be a whole number of at most 64 bits"),
    (dict(id="p12"), "pid is 'p12', it must be a whole number"),
    (dict(id=1.5), "pid is 1.5, it must be a whole number"),
    (dict(id=None), "pid is None, it must be a whole number"),
    (dict(id=float("inf")), "pid is inf, it must be a whole number"),
    (dict(file_path=5), "image is 5; it must be a path"),
    (dict(split="dev"), "split is 'dev'; the splits are train, val and test"),
])
def test_a_bad_row_is_named(changes, words, tmp_path):
    good = cuhk_row(file_path="b.png")
    with pytest.raises(ValueError, match=f"reid_raw.json, row 2: {words}"):
        read_cuhk(tmp_path, good, cuhk_row(**changes))
    assert "reid_raw.json, row 2: " in error("data.py", "--dataset", "cuhk", "--data-root", tmp_path)


def test_numbers_that_count_as_ids(tmp_path):
    rows = [cuhk_row(file_path=f"{n}.png", id=pid) for n, pid in enumerate([3, "3", 3.0, 2 ** 63 - 1])]
    assert [r["pid"] for r in read_cuhk(tmp_path, *rows)] == [3, 3, 3, 2 ** 63 - 1]


@pytest.mark.parametrize("rows, words", [
    ("5", "should be a list of objects"),
    ('{"a": 1}', "should be a list of objects"),
    ("[5]", "should be a list of objects"),
    ("[" * 100_000, "is not JSON"),
    ('[{"id": 1}]', "row 1: it has no captions, file_path, split"),
])
def test_json_of_another_shape(rows, words, tmp_path):
    with pytest.raises(ValueError, match=f"reid_raw.json.*{words}"):
        read_cuhk(tmp_path, encode=lambda _: rows)


def test_the_rows_of_any_reader_are_checked(tmp_path, monkeypatch):
    """A reader that somebody adds: paths may be strings, ids must be numbers."""
    row = dict(image=str(tmp_path / "a.png"), captions=("a man",), pid=np.int64(4), split="train")
    monkeypatch.setitem(data.READERS, "csv", lambda root: [row])
    record = dict(image=tmp_path / "a.png", captions=["a man"], pid=4)
    assert data.read("csv", tmp_path, "train", hold_out=False) == [record]
    pixels = np.zeros((96, 48, 3), np.uint8)
    monkeypatch.setitem(data.READERS, "csv", lambda root: [row | dict(image=pixels), row | dict(image=pixels.copy())])
    assert len(data.read("csv", tmp_path, "train", hold_out=False)) == 2
    for changes, words in ((dict(pid="tom"), "row 1: pid is 'tom'"),
                           (dict(image=pixels.astype(float)), "row 1: image is array"),
                           (dict(image=pixels[0]), "row 1: image is array"),
                           (dict(image=None), "row 1: image is None")):
        monkeypatch.setitem(data.READERS, "csv", lambda root: [row | changes])
        with pytest.raises(ValueError, match=words):
            data.read("csv", tmp_path, "train")
    monkeypatch.setitem(data.READERS, "csv", lambda root: [dict(image="a.png")])
    with pytest.raises(ValueError, match="row 1: it has no captions, pid, split"):
        data.read("csv", tmp_path, "train")


# ---- rows of one image ----------------------------------------------------------------------------------------------

def test_rows_of_one_image_are_merged(tmp_path, people):
    splits = ["train", "val", "test"]
    rows = [cuhk_row(captions=[f"caption {n}"], file_path=f"{n // 2}.png", id=n // 4, split=splits[n // 4])
            for n in range(12)]
    rows[1] |= dict(captions_bt=["translated"], file_path="./0.png")
    train = read_cuhk(tmp_path, *rows)
    assert [r["captions"] for r in train] == [["caption 0", "caption 1"], ["caption 2", "caption 3"]]
    assert train[0]["captions_bt"] == ["", "translated"] and "captions_bt" not in train[1]
    for n in range(6):
        Image.fromarray(people[n]["image"]).save(tmp_path / f"imgs/{n}.png")
    said = run("data.py", "--dataset", "cuhk", "--data-root", tmp_path, "--sheet", tmp_path / "s.html", code=1)
    assert "6 of 12 rows name the image of another row" in said and "train            1         2         4" in said
    for changes in (dict(id=9), dict(split="test")):
        with pytest.raises(ValueError, match="row 2: .*0.png has another pid or split than in .*row 1"):
            read_cuhk(tmp_path, rows[0], rows[1] | changes)


# ---- vocabularies ---------------------------------------------------------------------------------------------------

def spoilt_vocabularies():
    """Name -> bytes of a vocabulary file that arrived damaged."""
    lines = ["version", "a b</w>", *(f"{a} {b}" for a in "cdefgh" for b in "klmnop")]
    good = gzip.compress("\n".join(lines).encode())
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1356917\n"
    return {
        "cut.gz": good[:-20],
        "empty.gz": b"",
        "header.gz": good[:8],
        "crc.gz": good[:-8] + bytes(4) + good[-4:],
        "stream.gz": good[:30] + b"\xff" * 20 + good[50:],
        "other.gz": b"<html>",
        "pointer.gz": pointer,
        "pointer.json": pointer,
        "cut.json": b'{"model": {"merges": ["a',
        "utf16.json": "{}".encode("utf-16"),
        "unigram.json": b'{"model": {"vocab": [["a", 0.5]]}}',
        "list.json": b"[]",
        "numbers.json": b'{"model": {"vocab": {}, "merges": [1, 2]}}',
        "none.json": b'{"model": {"vocab": {}, "merges": []}}',
        "order.txt": b"version\na b\nab c\nxy z",
    }


@pytest.mark.parametrize("name", spoilt_vocabularies())
def test_a_spoilt_vocabulary_is_a_sentence_with_its_file(name, tmp_path):
    (tmp_path / name).write_bytes(spoilt_vocabularies()[name])
    with pytest.raises(ValueError, match=name.replace(".", r"\.")) as e:
        data.load_tokenizer(tmp_path / name)
    assert len(str(e.value)) < 300


def test_a_tokenizer_json_with_a_byte_order_mark(people, tmp_path):
    tokenizer = data.train_tokenizer([c for r in people for c in r["captions"]], vocab=700)
    spec = json.loads(tokenizer.bpe.to_str())
    (tmp_path / "tokenizer.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(spec).encode())
    merges = "\r\n".join(" ".join(m) for m in tokenizer.merges)
    (tmp_path / "merges.txt").write_bytes(b"\xef\xbb\xbfversion\r\n" + merges.encode())
    for name in ("tokenizer.json", "merges.txt"):
        assert data.load_tokenizer(tmp_path / name).merges == tokenizer.merges


@needs_bpe
def test_the_real_vocabulary_cut_off(tmp_path):
    (tmp_path / "bpe_simple_vocab_16e6.txt.gz").write_bytes(bpe_file().read_bytes()[:500_000])
    with pytest.raises(ValueError, match="bpe_simple_vocab_16e6.txt.gz is damaged"):
        data.load_tokenizer(tmp_path)
