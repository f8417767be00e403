"""Readers on small sets in the layouts of the real ones, what they say when something is wrong, and the checker."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

import data
from conftest import error, run

HEAD = "image,caption,pid,split\n"


def test_cuhk(cuhk):
    for root in (cuhk, cuhk.parent):                                    # the folder, or its parent
        train = data.read("cuhk", root, "train")
        assert data.counts(train) == (3, 12, 32)                        # ten captions on one image, two on the others
    assert {r["pid"] for r in train} == {1, 2, 3}
    assert {r["pid"] for r in data.read("cuhk", cuhk, "test")} == {5, 6}
    assert {r["image"].suffix for r in train} == {".png", ".bmp", ".jpg"}
    assert all(data.load_image(r["image"]).size == (48, 96) for r in train)


def test_icfg_gets_a_validation_split_of_persons(icfg):
    splits = {s: {r["pid"] for r in data.read("icfg", icfg, s)} for s in ("train", "val", "test")}
    assert splits["test"] == {4, 5} and len(splits["val"]) == 1
    assert splits["val"] | splits["train"] == {0, 1, 2, 3} and not splits["val"] & splits["train"]
    assert {r["pid"] for r in data.read("icfg", icfg, "train", hold_out=False)} == {0, 1, 2, 3}
    assert [r["pid"] for r in data.read("icfg", icfg, "val")] == [r["pid"] for r in data.read("icfg", icfg, "val")]


def test_rstp(rstp):
    assert data.counts(data.read("rstp", rstp.parent, "train")) == (4, 16, 32)
    assert data.counts(data.read("rstp", rstp, "val")) == (1, 4, 8)


def test_reid_has_back_translations(tmp_path, people):
    for split, part in (("train", people[:16]), ("test", people[16:])):
        rows = []
        for n, r in enumerate(part):
            translated = [c.upper() for c in r["captions"]]
            rows.append(dict(id=r["pid"], file_path=f"{split}/{n}.png", captions=r["captions"], captions_bt=translated))
        (tmp_path / f"{split}_reid.json").write_text(json.dumps(rows))
        (tmp_path / split).mkdir()
    train = data.read("reid", tmp_path, "train")
    assert train[0]["captions_bt"] == [c.upper() for c in train[0]["captions"]]
    assert len({r["pid"] for r in data.read("reid", tmp_path, "val")}) == 1


def test_csv(tmp_path, people):
    lines, splits = [HEAD.strip()], ["train", "train", "train", "train", "val", "test"]
    for n, r in enumerate(people):
        Image.fromarray(r["image"]).save(tmp_path / f"{n}.png")
        lines += [f'{n}.png,"{c}",{r["pid"]},{splits[r["pid"]]}' for c in r["captions"]]
    (tmp_path / "mine.csv").write_text("\n".join(lines))
    for root in (tmp_path, tmp_path / "mine.csv"):
        assert data.counts(data.read("csv", root, "train")) == (4, 16, 32)
    assert data.read("csv", tmp_path, "train")[3]["captions"] == people[3]["captions"]


@pytest.mark.parametrize("text, words", [
    ("image,caption,pid\n", "lacks the columns split"),
    ("image;caption;pid;split\n", "separated by commas"),
    (HEAD, "it has no rows at all"),
    (HEAD + "a.png,text,bob,train\n", "line 2: pid is 'bob'"),
    (HEAD + "a.png,a man,1,Train\n", "line 2: split is 'Train'; the splits are train, val and test"),
    (HEAD + "a.png,a man\n", "line 2: it has 2 fields instead of 4"),
    (HEAD + "a.png,t,1,train\na.png,u,2,train\n", "line 3: .*a.png has another pid or split than in .*line 2"),
    (HEAD + "a.png,caf\u00e9,1,train\n", "line 2: it is not UTF-8"),
])
def test_mistakes_in_a_csv_file(text, words, tmp_path):
    (tmp_path / "x.csv").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=words):
        data.read("csv", tmp_path / "x.csv", "train", hold_out=False)


def test_a_generated_folder(tmp_path, people):
    """As generate.py writes it: imgs/ and pairs.jsonl, a new person per generated one."""
    (tmp_path / "imgs").mkdir()
    with open(tmp_path / "pairs.jsonl", "w") as f:
        for n, r in enumerate(people[:4]):
            Image.fromarray(r["image"]).save(tmp_path / "imgs" / f"{n}.png")
            entry = dict(image=f"{n}.png", captions=r["captions"][:1], pid=10_000 + n, split="train", seed=n,
                         source_image=f"old/{n}.jpg", source_pid=r["pid"], edit=dict(old="red", new="blue"),
                         scores=dict(clip=0.3))
            f.write(json.dumps(entry) + "\n")
    records = data.read("pairs", tmp_path, "train", hold_out=False)
    assert [r["pid"] for r in records] == [10_000, 10_001, 10_002, 10_003] and records[0]["source"] == "old/0.jpg"
    assert records[2]["scores"] == dict(clip=0.3) and data.load_image(records[2]["image"]).size == (48, 96)
    (tmp_path / "pairs.jsonl").write_text('{"image": "x"}')
    with pytest.raises(ValueError, match="pairs.jsonl, line 1, is no generated pair"):
        data.read("pairs", tmp_path, "train")


def test_pairs_below_a_score_are_left_out():
    records = [dict(image=f"{n}.png", scores=dict(clip=n / 10, kept=1.0)) for n in range(5)]
    assert data.filter_by_score(records, []) == records
    assert data.filter_by_score(records, ["clip=0.3"]) == records[3:]
    assert data.filter_by_score(records, ["clip=0.1", "kept=1"]) == records[1:]
    for threshold, words in (("clip", "takes KEY=NUMBER, not 'clip'"), ("clip=x", "takes KEY=NUMBER"),
                             ("blur=1", "0.png has no score 'blur'; it has clip, kept"),
                             ("clip=0.9", "no pair reaches clip=0.9; the highest clip is 0.4"),
                             ("clip=nan", "takes KEY=NUMBER")):
        with pytest.raises(ValueError, match=words):
            data.filter_by_score(records, [threshold])


def test_mistakes_with_the_folder(cuhk, tmp_path):
    def said():
        return error("data.py", "--dataset", "cuhk", "--data-root", tmp_path)
    assert "holds: nothing" in said()
    missing = ["--data-root", tmp_path / "nowhere", "--out", tmp_path / "r"]
    assert "try --dataset toy" in error("tbps.py", "--dataset", "cuhk", *missing)
    (tmp_path / "caption_all.json").write_text("[]")
    assert "caption_all.json, the first release" in said()
    shutil.copytree(cuhk, tmp_path / "CUHK-PEDES")
    shutil.rmtree(tmp_path / "CUHK-PEDES/imgs/Market")
    assert "imgs/Market" in said() and "CUHK01/, cam_a/, test_query/" in said()
    (tmp_path / "CUHK-PEDES/reid_raw.json").write_text('[{"split": "train", "captions": ["x"], "id": 1}]')
    assert "row 1: it has no file_path" in said()
    (tmp_path / "CUHK-PEDES/reid_raw.json").write_text('[{"split": "tra')
    assert "is the download complete?" in said()


def test_the_early_split_of_rstp(tmp_path):
    rows = []
    for n in range(4101):
        split = "train" if n < 3901 else "val" if n < 4001 else "test"
        rows.append(dict(id=n, img_path="x.jpg", captions=["a"], split=split))
    (tmp_path / "data_captions.json").write_text(json.dumps(rows))
    assert "3901/100/100" in error("data.py", "--dataset", "rstp", "--data-root", tmp_path)


# ---- pictures and the checker ---------------------------------------------------------------------------------------

def test_broken_images(tmp_path, people):
    Image.fromarray(people[0]["image"]).save(tmp_path / "a.jpg")
    (tmp_path / "b.jpg").write_bytes((tmp_path / "a.jpg").read_bytes()[:400])
    (tmp_path / "c.png").write_text("not an image")
    for name in ("b.jpg", "c.png"):
        with pytest.raises(ValueError, match=f"{name} cannot be read as an image"):
            data.load_image(tmp_path / name)
    bad = data.unreadable_images([dict(image=tmp_path / n) for n in ("a.jpg", "b.jpg", "c.png", "d.png")])
    assert [r["image"].name for r, _ in bad] == ["b.jpg", "c.png", "d.png"]


def test_gray_and_16_bit_images(tmp_path, people):
    Image.fromarray(people[0]["image"]).convert("L").save(tmp_path / "gray.png")
    assert data.load_image(tmp_path / "gray.png").mode == "RGB"
    Image.fromarray(np.full((96, 48), 32768, np.uint16)).save(tmp_path / "deep.png")
    assert np.asarray(data.load_image(tmp_path / "deep.png"))[0, 0].tolist() == [127, 127, 127]


def checked(root, sheet, code):
    return run("data.py", "--dataset", "csv", "--data-root", root, "--sheet", sheet, code=code)


def test_the_checker(cuhk, tmp_path):
    sheet, root = tmp_path / "s.html", tmp_path / "csv"
    said = run("data.py", "--dataset", "cuhk", "--data-root", cuhk, "--sheet", sheet, code=1)
    assert "3        12        32   11,003 / 34,054 / 68,126   DIFFERS" in said and sheet.stat().st_size > 10_000
    root.mkdir()
    rows = HEAD
    for n, split in enumerate(["train", "train", "val", "test"]):
        Image.new("RGB", (48, 96)).save(root / f"{n}.jpg")
        rows += f"{n}.jpg,a person,{n},{split}\n"
    (root / "x.csv").write_text(rows)
    said = checked(root, sheet, code=0)
    assert "all is well" in said and "1 texts are shared by different persons" in said
    (root / "0.jpg").write_bytes((root / "0.jpg").read_bytes()[:300])                       # cut off
    (root / "1.jpg").write_text("no image")
    (root / "2.jpg").unlink()
    said = checked(root, sheet, code=1)
    assert all(f"{n}.jpg" in said for n in (0, 1, 2)) and "3.jpg" not in said and "3 wrong" in said


def test_the_checker_finds_persons_of_two_splits(tmp_path):
    rows = HEAD
    for split in ("train", "val", "test"):
        Image.new("RGB", (48, 96)).save(tmp_path / f"{split}.png")
        rows += f"{split}.png,a,1,{split}\n"
    (tmp_path / "x.csv").write_text(rows)
    said = checked(tmp_path / "x.csv", tmp_path / "s.html", code=1)
    assert "1 persons are in train and in test, e.g. 1" in said and "3 wrong" in said


def test_pictures_to_try_a_search_on(cuhk, tmp_path):
    command = ["data.py", "--dataset", "cuhk", "--data-root", cuhk, "--pictures"]
    assert "8 pictures in" in run(*command, tmp_path / "p") and len(list((tmp_path / "p").glob("*.png"))) == 8
    (tmp_path / "file").touch()
    assert "--pictures names a folder" in error(*command, tmp_path / "file")
