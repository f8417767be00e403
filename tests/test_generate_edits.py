"""Caption edits of generate.py: which words change, which captions are left alone."""

import hashlib
import json

import pytest

import data
import generate
from lab import people as pedestrians
from tiny_diffusion import make_tokenizer

CAPTIONS = {  # what can be edited: "noun: colour, colour ..." per noun, in the order found
    "A man in a red shirt and blue jeans.": "shirt: red; jeans: blue",
    "The woman wears a blue and white striped shirt with black pants": "shirt: blue white; pants: black",
    "His shirt is red. He wears black shoes.": "shirt: red; shoes: black",
    "A colored shirt and grey pants": "pants: grey",
    "a gray hoodie and gray trousers": "hoodie: gray; trousers: gray",
    "She wears a navy blue dress and white shoes.": "shoes: white",
    "a woman with a sky blue top and an orange skirt": "skirt: orange",
    "A person in a shirt in red and black pants": "",
    "a man in a shirt in red": "",
    "a man wearing a red jacket. The red jacket has white stripes.": "jacket: red",
    "a red shirt, and another red shirt": "shirt: red",
    "a red shirt and a blue shirt": "",
    "his coat is black and the coat is long": "coat: black",
    "a red jacket, he holds a jacket": "jacket: red",
    "a man with red hair in a red coat": "coat: red",
    "the red-haired woman wears red shorts and a white top": "top: white",
    "a multicolored dress with blue shoes": "shoes: blue",
    "a man wearing a dark gray suit jacket and a black tie": "jacket: gray; tie: black",
    "the man's trousers are dark blue and his shoes are white": "trousers: blue; shoes: white",
    "a shirt that is green and black pants": "",
    "a shirt that is green, and black pants": "shirt: green; pants: black",
    "his pants are green. black bag": "pants: green; bag: black",
    "black and white checked long sleeve shirt": "shirt: black white",
    "The man has a white shirt with a red logo, carrying a red backpack": "shirt: white; backpack: red",
    "a yellow, green and red polo": "polo: yellow green red",
    "a black/white sweater": "sweater: black white",
    "WEARING BLACK SHORTS AND A BLACK BAG": "shorts: black; bag: black",
    "wears light blue jeans": "jeans: blue",
    "an orange jacket over a white t-shirt": "jacket: orange; t-shirt: white",
    "The lady\u2019s dress is pink": "dress: pink",
    "a brown leather bag on her left shoulder": "bag: brown",
    "a bag of brown leather": "",
    "she walks past a red car": "",
    "a red car, a red coat": "coat: red",
    "white sneakers with white laces": "sneakers: white",
    "a cream white coat": "",
    "blue shirt blue jeans": "shirt: blue; jeans: blue",
    "her hair is black and her hat is black": "",
    "a reddish shirt and tan pants": "pants: tan",
    "dressed in all black, with a red bag": "bag: red",
    "a man": "",
    "": "",
    "a blue hoodie " + "and a very long caption " * 20: "",
}


@pytest.fixture(scope="module")
def tokenizer(people):
    """Trained on the captions above too: their letters are tokens."""
    return make_tokenizer([*CAPTIONS, *[c for r in people for c in r["captions"]]])


def find(caption, tokenizer, old, new, **options):
    return next(e for e in generate.edits(caption, tokenizer, **options) if (e["old"], e["new"]) == (old, new))


@pytest.mark.parametrize("caption, want", CAPTIONS.items(), ids=range(len(CAPTIONS)))
def test_what_can_be_edited(caption, want, tokenizer):
    found = {}
    for e in generate.edits(caption, tokenizer):
        found.setdefault(e["noun"], {}).setdefault(e["old"], []).append(e["new"])
    assert "; ".join(f"{noun}: {' '.join(colours)}" for noun, colours in found.items()) == want


@pytest.mark.parametrize("caption", CAPTIONS, ids=range(len(CAPTIONS)))
def test_tokens_stay_in_their_places(caption, tokenizer):
    for e in generate.edits(caption, tokenizer, garments=True):
        old, new = tokenizer([e["source"], e["caption"]])
        assert old.argmax() == new.argmax() and e["source"] == data.normalize_text(caption) != e["caption"]
        differ = (old != new).nonzero()[:, 0].tolist()
        assert set(e["tokens"]) <= set(differ) and set(e["tokens"]) <= set(e["blend"])      # an article may differ too
        assert e["old"] not in e["caption"].split() or e["what"] == "colour"
        words = tokenizer.bpe.decode([new[t].item() for t in e["tokens"]]).replace("</w>", " ").split()
        assert words == [e["new"]] * len(e["tokens"])


def test_the_example_of_the_docstring(tokenizer):
    assert generate.edits("A man in a red shirt", tokenizer)[0] == dict(
        what="colour", noun="shirt", old="red", new="yellow", source="a man in a red shirt",
        caption="a man in a yellow shirt", tokens=[5], blend=[5, 6])


def test_mentions():
    def found(caption):
        words = caption.split()
        spans = data.tag_words(caption)
        return generate.mentions(words, [kind for *_, kind in spans])

    assert found("red shirt and blue jeans") == ([(1, [0]), (4, [3])], {0, 3})
    assert found("red and white striped shirt") == ([(4, [0, 2])], {0, 2})
    assert found("shirt is red and white") == ([(0, [2, 4])], {2, 4})
    assert found("red hair and a navy blue coat") == ([(6, [4, 5])], {0})


def test_all_mentions_change_and_articles_follow(tokenizer):
    e = find("a man wearing a red jacket. The red jacket has white stripes.", tokenizer, "red", "orange")
    assert e["caption"] == "a man wearing an orange jacket. the orange jacket has white stripes."
    assert len(e["tokens"]) == 2 and len(e["blend"]) == 4
    assert find("an orange skirt", tokenizer, "orange", "red")["caption"] == "a red skirt"
    assert find("a blue and white shirt", tokenizer, "white", "red")["caption"] == "a blue and red shirt"


def test_no_colour_twice(tokenizer):
    assert all(e["new"] not in ("blue", "white") for e in generate.edits("a blue and white shirt", tokenizer))
    assert all(e["new"] not in ("grey", "gray") for e in generate.edits("a gray shirt", tokenizer))


def test_garments(tokenizer):
    e = find("blue trousers, the trousers are long", tokenizer, "trousers", "shorts", garments=True)
    assert e["what"] == "garment" and e["caption"] == "blue shorts, the shorts are long" and len(e["tokens"]) == 2
    assert not generate.edits("a shirt and a jacket", tokenizer, garments=True)
    assert not generate.edits("a red shirt and a blue shirt", tokenizer, garments=True)
    assert not [e for e in generate.edits("blue trousers", tokenizer) if e["what"] == "garment"]


def test_all_edits_of_the_synthetic_pedestrians():
    """The 31,913 edits of toy-few, all fields, are those of the first edition."""
    captions = [caption for record in pedestrians.draw("few") for caption in record["captions"]]
    tokenizer = data.train_tokenizer(captions)
    every = [generate.edits(caption, tokenizer, garments=True) for caption in captions]
    assert sum(map(len, every)) == 31913
    assert hashlib.sha256(json.dumps(every).encode()).hexdigest()[:20] == "9d85f7c212790087723c"
