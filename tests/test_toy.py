"""The toy people: what makes them a laboratory. Each claim of the README about them is asserted here."""

import re

import numpy as np
import pytest

import data


@pytest.fixture(scope="module")
def test_split():
    return data.read("toy", split="test")


@pytest.fixture(scope="module")
def train_split():
    return data.toy("train", persons=300)


def test_sizes(test_split):
    assert data.counts(test_split) == (501, 2004, 4008)
    assert data.TOY_PERSONS["train"] == 1500 and data.TOY_PERSONS["few"] == 150 and data.TOY_VIEWS == 4
    r = test_split[0]
    assert r["image"].shape == (96, 48, 3) and r["image"].dtype == np.uint8 and r["parts"].shape == (96, 48)


def test_oracle_gates(test_split):
    """Chance is 0.2 %. Colours alone, or garments alone, are not enough; reading everything nearly is."""
    assert 88 <= data.toy_oracle(test_split) <= 95
    assert data.toy_oracle(test_split, ["top", "top_colour", "bottom", "bottom_colour"]) <= 65
    assert data.toy_oracle(test_split, ["top_colour", "bottom_colour"]) <= 33
    assert data.toy_oracle(test_split, ["build"]) < 2


def test_families_of_three_differ_in_exactly_two(test_split, train_split):
    for records in (test_split, train_split):
        persons = [r["attributes"] for r in records[::data.TOY_VIEWS]]
        for family in zip(persons[::3], persons[1::3], persons[2::3]):
            for a, b in ((0, 1), (0, 2), (1, 2)):
                differ = [n for n in family[a] if family[a][n] != family[b][n]]
                assert len(differ) == 2 and all(data.toy_applies(family[a], n) or data.toy_applies(family[b], n) for n in differ)


def test_the_same_everywhere(test_split):
    again = data.toy("test", persons=6)
    assert all(np.array_equal(a["image"], b["image"]) and a["captions"] == b["captions"] for a, b in zip(again, test_split))
    assert not np.array_equal(data.toy("test", seed=1, persons=3)[0]["image"], again[0]["image"])
    few, train = data.toy("few", persons=6), data.toy("train", persons=6)
    assert all(np.array_equal(a["image"], b["image"]) and a["captions"] == b["captions"] and a["pid"] == b["pid"] for a, b in zip(few, train))
    with pytest.raises(ValueError, match="multiple of 3"):
        data.toy("train", persons=4)
    with pytest.raises(ValueError, match="not 'tset'"):
        data.toy("tset")


def test_splits_share_no_person(test_split, train_split):
    val = data.read("toy", split="val")
    pids = [{r["pid"] for r in records} for records in (train_split, val, test_split)]
    assert not (pids[0] & pids[1] | pids[0] & pids[2] | pids[1] & pids[2]) and len(pids[1]) == 300


def test_captions_say_only_what_the_view_shows(test_split):
    for r in test_split:
        for caption, said in zip(r["captions"], r["mentions"]):
            assert said.keys() <= r["visible"] and all(r["attributes"][n] == v for n, v in said.items())
            for name in ("top_colour", "bottom_colour", "shoes", "bag_colour", "hair_colour"):
                if name in said:                                        # and what is in `mentions` is in the words
                    usual, _, new = data.WORDS.get(said[name], said[name]).partition(" | ")
                    assert any(word in caption.lower() for word in (usual + ", " + new).split(", ") if word), (caption, said)


def test_views_hide_what_others_show(test_split):
    """Many-to-many: a logo from the front only, a ponytail and a backpack's size from behind only; captions of one view differ."""
    front, back = test_split[::2], test_split[1::2]
    assert not any("logo" in r["visible"] or "glasses" in r["visible"] for r in back)
    assert all("hair" not in r["visible"] for r in front if r["attributes"]["hair"] == "ponytail")
    assert all("bag_size" not in r["visible"] for r in front if r["attributes"]["bag"] == "backpack")
    assert sum("bag_size" in r["visible"] for r in back if r["attributes"]["bag"] == "backpack") > 50
    assert 0.02 < np.mean(["shoes" not in r["visible"] for r in test_split]) < 0.2                       # occluded
    assert np.mean([set(r["mentions"][0]) != set(r["mentions"][1]) for r in test_split]) > 0.9


def test_every_attribute_that_a_caption_can_name_is_drawn():
    """Two persons alike but for one attribute look different, in the part that it is about."""
    import random
    base = dict(sex="man", build="medium", hair="short", hair_colour="black", hat="cap", hat_colour="red", glasses="none", top="t-shirt", sleeves="short",
                top_colour="blue", pattern="plain", logo="none", bottom="trousers", bottom_colour="grey", shoes="white", bag="handbag", bag_size="small",
                bag_side="left", bag_colour="green")
    assert base.keys() == data.PEOPLE.keys()
    for domain, table in (("people", data.PEOPLE), ("generic", data.GENERIC)):
        for name, values in table.items():
            for value in values:
                if value == base[name]:
                    continue
                differ = []
                for back in (False, True):
                    a, b = (data.toy_view(random.Random("same"), p, back, domain) for p in (base, base | {name: value}))
                    if "colour" not in name and name != "shoes":
                        differ.append((a["parts"] != b["parts"]).sum() > 2)
                    else:
                        part = data.toy_mask(a, name.replace("_colour", ""))
                        differ.append((np.abs(a["image"].astype(int) - b["image"])[part].mean() if part.any() else 0) > 5)
                assert any(differ), (domain, name, value)


def test_handedness():
    """A bag in the left hand is right in the picture from the front, left from behind."""
    import random
    person = {n: next(iter(v)) for n, v in data.PEOPLE.items()} | dict(bag="handbag", bag_side="left")
    for back in (False, True):
        for seed in range(20):
            view = data.toy_view(random.Random(seed), person, back, "people")
            bag, top = (data.toy_mask(view, part).nonzero()[1] for part in ("bag", "top"))
            if len(bag) and len(top) > 100:
                assert (bag.mean() > top.mean()) == (not back)


def test_masks_hold_the_colour_that_the_caption_names(test_split):
    for name in ("top", "bottom", "bag"):
        reds = [r["image"][data.toy_mask(r, name)].mean(axis=0) for r in test_split if r["attributes"][name + "_colour"] == "red"
                and data.toy_mask(r, name).sum() > 40 and r["attributes"]["pattern"] == "plain"]
        assert len(reds) > 20 and np.mean([c[0] > 1.5 * c[1] and c[0] > 1.5 * c[2] for c in reds]) > 0.95


def test_language_held_out(test_split):
    """Val and test use words and sentence plans that train never does; the generic domain, for pre-training, knows them."""
    def words(records):
        return {w for r in records for c in r["captions"] for w in re.findall(r"[a-z-]+", c.lower())}
    train = data.toy("train")
    generic = words(data.toy("train", persons=300, domain="generic"))
    new = words(test_split) - words(train)
    assert {"crimson", "gentleman", "knapsack", "spectacles"} <= new and {"crimson", "gentleman", "knapsack", "spectacles"} <= generic
    assert not any(c.startswith(("Dressed", "Carrying")) for r in train for c in r["captions"])
    assert sum(c.startswith(("Dressed", "Carrying")) for r in test_split for c in r["captions"]) > 100
    said = [set(re.findall(r"[a-z-]+", c.lower())) & new for r in test_split for c in r["captions"]]
    assert 0.1 < np.mean([bool(s) for s in said]) < 0.5


def test_the_generic_domain_is_another(train_split):
    generic = data.read("toy-generic", split="val")
    assert {r["attributes"]["top"] for r in generic} - {r["attributes"]["top"] for r in train_split} == {"vest", "sweater", "raincoat"}
    assert {r["attributes"]["bottom"] for r in generic} >= {"leggings", "long skirt"}
    assert "turquoise" in {r["attributes"]["top_colour"] for r in generic}
    assert 88 <= data.toy_oracle(generic) <= 99
