"""The synthetic pedestrians: what makes them a benchmark, and that not a pixel of them changes."""

import hashlib
import json
import random
import re

import numpy as np
import pytest

import data
from lab import people

# sha256 (first 16 digits) of everything that `draw(split, persons=30)` returns, version 1
PIXELS = {
    ("people", "train"): "1937caaf9010f4fe",
    ("people", "few"): "1937caaf9010f4fe",
    ("people", "val"): "618f57c3abe707d5",
    ("people", "test"): "32585154f28ae8c8",
    ("generic", "train"): "350c7c8e09a9ba45",
    ("generic", "few"): "350c7c8e09a9ba45",
    ("generic", "val"): "97b7551d7e92b908",
    ("generic", "test"): "1a2874ed0bfad16f",
}
TRUTH = {
    ("people", "train"): "b0874fa456b07fc0",
    ("people", "few"): "b0874fa456b07fc0",
    ("people", "val"): "8d6dc26c5093cc94",
    ("people", "test"): "f3e6957c00a62157",
    ("generic", "train"): "d4a4aecf33301116",
    ("generic", "few"): "d4a4aecf33301116",
    ("generic", "val"): "413a84c8a60a09f2",
    ("generic", "test"): "a4b16368b8e73e37",
}


@pytest.fixture(scope="module")
def test_split():
    return data.read("toy", split="test")


@pytest.fixture(scope="module")
def train_split():
    return people.draw("train", persons=300)


def checksums(records):
    """Of images and part maps; of ids, captions, mentions, visible attributes and attributes."""
    pixels, truth = hashlib.sha256(), hashlib.sha256()
    for r in records:
        pixels.update(r["image"].tobytes() + r["parts"].tobytes())
        facts = [r["pid"], r["captions"], r["mentions"], sorted(r["visible"]), r["attributes"]]
        truth.update(json.dumps(facts).encode())
    return pixels.hexdigest()[:16], truth.hexdigest()[:16]


def equal(a, b):
    return np.array_equal(a["image"], b["image"]) and a["captions"] == b["captions"] and a["pid"] == b["pid"]


@pytest.mark.parametrize("domain, split", PIXELS)
def test_version_1_byte_for_byte(domain, split):
    """All recorded scores are of these pixels and words."""
    assert people.VERSION == 1
    assert checksums(people.draw(split, persons=30, domain=domain)) == (PIXELS[domain, split], TRUTH[domain, split])


def test_sizes(test_split):
    assert data.counts(test_split) == (501, 2004, 4008)
    assert people.PERSONS["train"] == 1500 and people.PERSONS["few"] == 150 and people.VIEWS == 4
    r = test_split[0]
    assert r["image"].shape == (96, 48, 3) and r["image"].dtype == np.uint8
    assert r["parts"].shape == (96, 48) and r["parts"].dtype == np.uint8


def test_oracle_scores(test_split):
    """Chance is 0.2 %. Colours alone, or garments alone, are not enough; reading everything nearly is."""
    colours = ["top_colour", "bottom_colour"]
    assert people.oracle_score(test_split) == pytest.approx(94.7, abs=0.05)
    assert people.oracle_score(test_split, ["top", "bottom"] + colours) == pytest.approx(55.3, abs=0.05)
    assert people.oracle_score(test_split, colours) == pytest.approx(22.0, abs=0.05)
    assert people.oracle_score(test_split, ["build"]) < 2


def test_families_of_three_differ_in_exactly_two(test_split, train_split):
    for records in (test_split, train_split):
        persons = [r["attributes"] for r in records[::people.VIEWS]]
        for family in zip(persons[::3], persons[1::3], persons[2::3]):
            for a, b in ((0, 1), (0, 2), (1, 2)):
                differ = [name for name in family[a] if family[a][name] != family[b][name]]
                assert len(differ) == 2
                for name in differ:
                    assert people.is_applicable(family[a], name) or people.is_applicable(family[b], name)


def test_everything_is_a_function_of_the_seed(test_split):
    again = people.draw("test", persons=6)
    assert all(map(equal, again, test_split))
    assert not np.array_equal(people.draw("test", seed=1, persons=3)[0]["image"], again[0]["image"])
    assert all(map(equal, people.draw("few", persons=6), people.draw("train", persons=6)))


def test_wrong_arguments():
    with pytest.raises(ValueError, match="multiple of 3"):
        people.draw("train", persons=4)
    with pytest.raises(ValueError, match="not 'tset'"):
        people.draw("tset")


def test_splits_share_no_person(test_split, train_split):
    val = data.read("toy", split="val")
    train_pids, val_pids, test_pids = ({r["pid"] for r in records} for records in (train_split, val, test_split))
    assert len(val_pids) == 300
    assert not (train_pids & val_pids | train_pids & test_pids | val_pids & test_pids)


def test_captions_say_only_what_the_view_shows(test_split):
    for r in test_split:
        for caption, mentions in zip(r["captions"], r["mentions"]):
            assert mentions.keys() <= r["visible"]
            assert all(r["attributes"][name] == value for name, value in mentions.items())
            for name in {"top_colour", "bottom_colour", "shoes", "bag_colour", "hair_colour"} & mentions.keys():
                words = re.split(r", | \| ", people.WORDS.get(mentions[name], mentions[name]))
                assert any(word in caption.lower() for word in words), (caption, mentions)


def test_views_hide_what_others_show(test_split):
    """Many-to-many: a logo shows from the front only, a ponytail and the size of a backpack from behind only."""
    front, back = test_split[::2], test_split[1::2]
    assert not any("logo" in r["visible"] or "glasses" in r["visible"] for r in back)
    assert all("hair" not in r["visible"] for r in front if r["attributes"]["hair"] == "ponytail")
    assert all("bag_size" not in r["visible"] for r in front if r["attributes"]["bag"] == "backpack")
    assert sum("bag_size" in r["visible"] for r in back if r["attributes"]["bag"] == "backpack") > 50
    assert 0.02 < np.mean(["shoes" not in r["visible"] for r in test_split]) < 0.2                          # occluded
    differ = [set(r["mentions"][0]) != set(r["mentions"][1]) for r in test_split]
    assert np.mean(differ) > 0.9                                        # the two captions of a view


BASE = dict(
    sex="man", build="medium", hair="short", hair_colour="black", hat="cap", hat_colour="red", glasses="none",
    top="t-shirt", sleeves="short", top_colour="blue", pattern="plain", logo="none", bottom="trousers",
    bottom_colour="grey", shoes="white", bag="handbag", bag_size="small", bag_side="left", bag_colour="green",
)


def views_differ(name, value, back, domain):
    """Whether a change of one attribute changes the part map, or for a colour the pixels of the part."""
    a, b = (people.draw_view(random.Random("same"), p, back, domain) for p in (BASE, BASE | {name: value}))
    if "colour" not in name and name != "shoes":
        return (a["parts"] != b["parts"]).sum() > 2
    part = people.mask(a, name.replace("_colour", ""))
    change = np.abs(a["image"].astype(int) - b["image"])
    return part.any() and change[part].mean() > 5


@pytest.mark.parametrize("domain, table", [("people", people.PEOPLE), ("generic", people.GENERIC)])
def test_every_attribute_that_a_caption_can_name_is_drawn(domain, table):
    """Two persons alike but for one attribute look different, in the part that it is about."""
    assert BASE.keys() == people.PEOPLE.keys()
    for name, values in table.items():
        for value in values.keys() - {BASE[name]}:
            assert any(views_differ(name, value, back, domain) for back in (False, True)), (name, value)


def test_left_and_right():
    """A bag in the left hand is on the right of the image from the front, on the left from behind."""
    person = {name: next(iter(values)) for name, values in people.PEOPLE.items()}
    person |= dict(bag="handbag", bag_side="left")
    for back in (False, True):
        for seed in range(20):
            view = people.draw_view(random.Random(seed), person, back, "people")
            bag, top = (people.mask(view, part).nonzero()[1] for part in ("bag", "top"))
            if len(bag) and len(top) > 100:
                assert (bag.mean() > top.mean()) == (not back)


def test_masks_hold_the_colour_that_the_caption_names(test_split):
    for name in ("top", "bottom", "bag"):
        means = []
        for r in test_split:
            part = people.mask(r, name)
            if r["attributes"][f"{name}_colour"] == "red" and r["attributes"]["pattern"] == "plain" and part.sum() > 40:
                means.append(r["image"][part].mean(axis=0))
        assert len(means) > 20
        assert np.mean([red > 1.5 * green and red > 1.5 * blue for red, green, blue in means]) > 0.95


def vocabulary(records):
    return {word for r in records for caption in r["captions"] for word in re.findall(r"[a-z-]+", caption.lower())}


def test_language_held_out(test_split):
    """Val and test use words and sentence plans that train never does. The generic domain has them."""
    train = people.draw("train")
    new = vocabulary(test_split) - vocabulary(train)
    examples = {"crimson", "gentleman", "knapsack", "spectacles"}
    assert examples <= new and examples <= vocabulary(people.draw("train", persons=300, domain="generic"))
    train_captions, test_captions = ([c for r in records for c in r["captions"]] for records in (train, test_split))
    assert not any(c.startswith(("Dressed", "Carrying")) for c in train_captions)
    assert sum(c.startswith(("Dressed", "Carrying")) for c in test_captions) > 100
    has_new_word = [bool(set(re.findall(r"[a-z-]+", c.lower())) & new) for c in test_captions]
    assert 0.1 < np.mean(has_new_word) < 0.5


def test_the_generic_domain_is_another(train_split):
    generic = data.read("toy-generic", split="val")
    values = {name: {r["attributes"][name] for r in generic} for name in ("top", "bottom", "top_colour")}
    assert values["top"] - {r["attributes"]["top"] for r in train_split} == {"vest", "sweater", "raincoat"}
    assert values["bottom"] >= {"leggings", "long skirt"}
    assert "turquoise" in values["top_colour"]
    assert 88 <= people.oracle_score(generic) <= 99
