"""lab/check_generated.py: does it notice what is wrong with generated pairs of synthetic pedestrians?"""

import json

import numpy as np
import pytest
from PIL import Image

import lab.people
from lab import check_generated

KINDS = ["right", "untouched", "all over"]
PAINTED = {"right": ["top"], "untouched": [], "all over": ["top", "bottom"]}


def can_be_painted(record):
    colours = record["attributes"]["top_colour"], record["attributes"]["bottom_colour"]
    return {"top", "bottom"} <= record["visible"] and colours[0] not in ("green", "black") \
        and colours[1] not in ("green", "black", "navy")


def paint(record, regions):
    """The image with the regions in green, in the light of the image."""
    image = record["image"].astype(float)
    colour = lab.people.PALETTE[record["attributes"]["bottom_colour"]]
    light = image[check_generated.plain(record, "bottom")].mean() / np.mean(colour)
    for region in regions:
        image[check_generated.plain(record, region)] = light * np.array(lab.people.PALETTE["green"])
    return Image.fromarray(image.clip(0, 255).astype(np.uint8))


def test_pairs_painted_by_hand(tmp_path, monkeypatch):
    """A third has the right colour, a third is untouched, a third has other garments repainted too."""
    records = lab.people.draw("few", persons=30)
    monkeypatch.setattr(lab.people, "draw", lambda *_, **__: records)
    (tmp_path / "imgs").mkdir()
    chosen = [i for i, record in enumerate(records) if can_be_painted(record)][:30]
    lines = []
    for n, i in enumerate(chosen):
        kind = KINDS[n % 3]
        paint(records[i], PAINTED[kind]).save(tmp_path / f"imgs/{n}.png")
        edit = dict(what="colour", noun="shirt", old=records[i]["attributes"]["top_colour"], new="green")
        lines.append(json.dumps(dict(image=f"{n}.png", pid=n, split="train", captions=["x"], edit=edit,
                                     source_image=f"toy-few {i}", scores=dict(kind=KINDS.index(kind)))))
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    scores = check_generated.score(tmp_path)
    assert len(chosen) == scores["pairs"] == 30
    assert scores["show the new colour, %"] == pytest.approx(66.7, abs=4)
    assert scores["keep all other colours, %"] == pytest.approx(66.7, abs=7)
    assert scores["both, %"] == pytest.approx(33.3, abs=4)
    worst = check_generated.score(tmp_path, ["kind=2"])
    assert worst["pass the filter, %"] == pytest.approx(33.3, abs=0.1) and worst["both, %"] < 10
    assert worst["change outside, % of the range"] > 1
