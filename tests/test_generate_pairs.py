"""The folder that generate.py writes: pairs, resume, several processes, the page; and what users get wrong."""

import collections
import html
import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

import data
import generate
import tbps
from conftest import error, run

QUICK = ["--count", "11", "--edits", "2", "--batch", "2", "--set", "height=64", "width=32", "steps=3"]


@pytest.fixture(scope="module")
def made(diffusion, cuhk, tmp_path_factory):
    """A folder of generated pairs, and what was printed."""
    out = tmp_path_factory.mktemp("made") / "pdg"
    options = ["--dataset", "cuhk", "--data-root", cuhk, "--diffusion", diffusion, "--out", out]
    return out, run("generate.py", *options, *QUICK)


@pytest.fixture
def command(diffusion, cuhk, tmp_path):
    """The same command with another folder, tmp_path/pdg."""
    options = ["--dataset", "cuhk", "--data-root", cuhk, "--diffusion", diffusion, "--out", tmp_path / "pdg"]
    return ["generate.py", *options, *QUICK]


def files(out):
    paths = [p for p in sorted(out.rglob("*")) if p.is_file() and p.name != "report.html"]
    return {str(p.relative_to(out)): p.read_bytes() for p in paths}


def read_entries(out):
    return [json.loads(line) for line in (out / "pairs.jsonl").read_text().splitlines()]


# ---- what is made ---------------------------------------------------------------------------------------------------

def test_entries(made, cuhk):
    out, said = made
    entries = read_entries(out)
    sources = {r["file_path"]: r for r in json.loads((cuhk / "reid_raw.json").read_text())}
    assert len(entries) == len(list((out / "imgs").iterdir())) == 11 and "11 pairs" in said
    assert len({e["pid"] for e in entries}) == 11 and min(e["pid"] for e in entries) == 1_000_000
    for e in entries:
        source = sources[e["source_image"].split("imgs/")[1]]
        assert source["split"] == e["split"] == "train" and source["id"] == e["source_pid"]
        assert e["edit"]["source"] in [data.normalize_text(c) for c in source["captions"]]
        assert e["captions"][0] != e["edit"]["source"]
        assert e["scores"].keys() == {"psnr", "changed", "kept"} and 0 < e["scores"]["kept"] <= 1
    # 6 inversions of 3 steps, 11 edits of 3 evaluations per step
    assert f"{(6 * 3 + 11 * 9) / 11:.0f} evaluations of the UNet each" in said


def test_edits_of_a_source_are_of_different_garments(made):
    sites = collections.defaultdict(set)
    for e in read_entries(made[0]):
        sites[e["source_image"]].add((e["edit"]["noun"], e["edit"]["old"]))
    assert len(sites) == 6 and max(map(len, sites.values())) == 2


def test_images(made):
    out, first = made[0], read_entries(made[0])[0]
    image, original = data.load_image(out / "imgs" / first["image"]), data.load_image(first["source_image"])
    assert image.size == original.size and image.tobytes() != original.tobytes()
    assert data.load_image(out / "strips" / first["image"]).size == (4 * original.width, original.height)


def test_pairs_are_read(made):
    records = data.read("pairs", made[0], "train", hold_out=False)
    assert len(records) == 11 and all(r["image"].exists() for r in records)
    middle = sorted(r["scores"]["changed"] for r in records)[5]
    assert len(data.filter_by_score(records, [f"changed={middle}", "kept=0"])) == 6
    best = max(r["scores"]["psnr"] for r in records)
    for wanted, says in (("psnr=1000", f"no pair reaches psnr=1000; the highest psnr is {best:.3g}$"),
                         ("psnr=nan", "KEY=NUMBER, not 'psnr=nan'"), ("psnr=x", "KEY=NUMBER, not 'psnr=x'"),
                         ("words=0", "no score 'words'; it has psnr, changed, kept")):
        with pytest.raises(ValueError, match=says):
            data.filter_by_score(records, [wanted])


def test_persons_of_two_folders_are_different(made, cuhk, tmp_path):
    shutil.copytree(made[0], tmp_path / "copy")
    options = ["--dataset", "cuhk", "--data-root", str(cuhk), "--extra", str(made[0])]
    args, _ = tbps.parse_args([*options, str(tmp_path / "copy")])
    records, real = tbps.load_data(args)["train"], data.read("cuhk", cuhk, "train")
    pairs = data.read("pairs", made[0], "train", hold_out=False)
    assert data.counts(records)[0] == len({r["pid"] for r in real}) + 2 * len(pairs)
    assert "names a folder twice" in error("tbps.py", *options, made[0])
    args.share, args.extra = 0.5, args.extra[:1]                        # pairs go with the persons they are made from
    some = tbps.load_data(args)["train"]
    persons = {r["pid"] for r in some if "source_pid" not in r}
    assert {r["source_pid"] for r in some if "source_pid" in r} == persons & {r["source_pid"] for r in pairs}


# ---- the page -------------------------------------------------------------------------------------------------------

def test_the_page_shows_the_pairs(made):
    page, entries = (made[0] / "report.html").read_text(), read_entries(made[0])
    assert page.count("<img") == len(entries)
    for e in entries:
        assert f"<b>{e['edit']['noun']}: {e['edit']['old']} → {e['edit']['new']}</b>" in page
        source, caption = (html.escape(text) for text in (e["edit"]["source"], e["captions"][0]))
        assert source in page and f'alt="source, reconstruction, edit, mask: {caption}"' in page


def test_the_page_defines_every_score(made):
    page = (made[0] / "report.html").read_text()
    assert {"psnr", "changed", "kept"} <= generate.SCORES.keys() and "words" in generate.SCORES
    assert all(generate.SCORES[name] in page for name in ("psnr", "changed", "kept"))


# ---- resume ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("after", [0, 5, 8])
def test_killed_and_started_again(after, made, command, tmp_path, monkeypatch):
    """Wherever it stops, the same files come out in the end. What is done is not repeated."""
    save, left = Image.Image.save, [after]

    def die(image, path, *options):
        left[0] -= 1
        if left[0] < 0:
            Path(path).write_bytes(b"half an image")
            raise KeyboardInterrupt
        save(image, path, *options)

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", die)
        assert "the same command goes on" in run(*command, code=130)
    assert not (tmp_path / "pdg/pairs.jsonl").exists()
    done = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "pdg/parts").iterdir()}
    run(*command)
    assert files(tmp_path / "pdg") == files(made[0])
    assert all((tmp_path / "pdg/parts" / name).stat().st_mtime_ns == when for name, when in done.items())
    assert "pairs made" not in run(*command)


def test_two_processes(made, command, tmp_path, monkeypatch):
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert not (tmp_path / "pdg/pairs.jsonl").exists()
        run(*command)
    assert files(tmp_path / "pdg") == files(made[0])


def test_what_is_deleted_is_made_again(made, command, tmp_path):
    shutil.copytree(made[0], tmp_path / "pdg")
    images, parts = (sorted((tmp_path / "pdg" / name).iterdir()) for name in ("imgs", "parts"))
    images[1].unlink()
    parts[-1].unlink()
    assert "pairs made" in run(*command) and files(tmp_path / "pdg") == files(made[0])


def test_more_pairs_can_be_added(made, command, tmp_path):
    """A smaller count first gives the same folder in the end."""
    count = command.index("--count") + 1
    whole, command[count] = command[count], "3"
    assert "3 pairs in" in run(*command)
    command[count] = whole
    run(*command)
    assert files(tmp_path / "pdg") == files(made[0])
    command[count] = "3"
    assert f"count: {whole} then, 3 now" in error(*command)


def test_nothing_is_overwritten(made, diffusion, cuhk, tmp_path):
    command = ["generate.py", "--dataset", "cuhk", "--data-root", cuhk, "--diffusion", diffusion]
    assert "guidance: 7.5 then, 2.0 now" in error(*command, "--out", made[0], *QUICK, "guidance=2")
    (tmp_path / "thesis.txt").write_text("mine")
    assert "is no folder of generated pairs" in error(*command, "--out", tmp_path, *QUICK)


# ---- mistakes -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("options, says", [
    (["--dataset", "cuhk"], "name the diffusion model with --diffusion"),
    (["--preset", "paper"], "has its own preset"),
    (["--set", "inversion=magic"], "one of direct, negative, null"),
    (["--set", "guide=1"], "there is no key 'guide'"),
    (["--set", "self_attention=2"], "self_attention=2.0 must be from 0 to 1"),
    (["--set", "guidance=nan"], "guidance=nan must be"),
    (["--set", "blend_at=3"], "must be one of 1, 2, 4, 8"),
    (["--set", "steps=0"], "steps=0 must be from 1 to 1000"),
    (["--device", "foo"], "--device is cpu"),
    (["--count", "0"], "--count, --edits and --batch must be at least 1"),
    (["--out", ""], "empty text"),
    (["--judge", "x.pt"], "the weights should be at"),
])
def test_options_that_are_wrong(options, says):
    assert says in error("generate.py", *options)


def test_scores_without_pairs():
    assert "name their folder with --extra" in error("tbps.py", "--min-score", "words=0")


def test_full_size():
    """With paste the source keeps its resolution where the edit changes nothing."""
    source = Image.effect_noise((64, 128), 80).convert("RGB")
    old = torch.rand(3, 32, 16)
    assert generate.full_size(source, old, old, paste=True).tobytes() == source.tobytes()
    assert generate.full_size(source, old, old, paste=False).size == source.size
