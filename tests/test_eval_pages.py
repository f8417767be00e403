"""Report pages: what they hold, and that nothing is told by colour alone or needs to be seen to be read."""

import re
from html.parser import HTMLParser

import pytest
import torch
from PIL import Image

import eval as evaluation


class Tags(HTMLParser):
    """All start tags of a page as [(name, attributes)]."""

    def __init__(self, page):
        super().__init__()
        self.found = []
        self.feed(page)

    def handle_starttag(self, name, attributes):
        self.found.append((name, dict(attributes)))

    def all(self, name):
        return [attributes for tag, attributes in self.found if tag == name]


@pytest.fixture
def sheet():
    """Two queries of persons 4 and 5; the second one ranks the image of person 4 first."""
    image, text = torch.eye(3), torch.tensor([[1.0, 0.2, 0.1], [0.9, 0.5, 0.1]])
    return evaluation.retrieval_sheet(["a <red> coat", "a hat"], text, image, torch.tensor([4, 5, 6]),
                                      torch.tensor([0, 1]), lambda j: Image.new("RGB", (48, 96)), number=2, top=2)


def test_a_sheet_says_right_and_wrong_in_signs_and_words(sheet):
    names = [image["alt"] for image in Tags(sheet).all("img")]
    assert names == ["source image, person 4", "rank 1, right, person 4", "rank 2, wrong, person 5",
                     "source image, person 5", "rank 1, wrong, person 4", "rank 2, right, person 5"]
    assert re.findall(r"<figcaption>(.*?)</figcaption>", sheet) == ["source", "1 ✓", "2 ✗", "source", "1 ✗", "2 ✓"]
    assert "class=legend" in sheet and "✓ in a green frame" in sheet and "a &lt;red&gt; coat" in sheet


def luminance(colour):
    digits = colour.lstrip("#")
    digits = digits if len(digits) == 6 else "".join(2 * d for d in digits)
    parts = [int(digits[k:k + 2], 16) / 255 for k in (0, 2, 4)]
    parts = [v / 12.92 if v <= 0.03928 else ((v + 0.055) / 1.055) ** 2.4 for v in parts]
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]


def test_text_and_curves_have_contrast():
    """WCAG 2.1: 4.5 : 1 for text on the white page. Lines need 3 : 1 only."""
    for colour in evaluation.COLOURS + re.findall(r"(?<![-\w])(?:color|fill): (#\w+)", evaluation.STYLE):
        assert 1.05 / (luminance(colour) + 0.05) >= 4.5, colour


@pytest.mark.parametrize("low, high, want", [(0, 84.2, [0, 20, 40, 60, 80, 100]), (0, 5, [0, 1, 2, 3, 4, 5]),
                                             (0, 0, [0, .2, .4, .6, .8, 1]), (0, 3.1e-4, [0, 1e-4, 2e-4, 3e-4, 4e-4]),
                                             (-0.3, 0.4, [-.4, -.2, 0, .2, .4]), (0, 63.2, [0, 20, 40, 60, 80])])
def test_ticks_are_round(low, high, want):
    assert evaluation.round_ticks(low, high) == pytest.approx(want)


def test_curve_and_table_hold_what_they_are_given():
    svg = evaluation.curve("loss", {"a<b": [(0, 1.0), (1, 0.5)], "flat": [(0, 0.0), (1, 0.0)]})
    assert svg.count("<polyline") == 2 and "a&lt;b" in svg and "nan" not in svg
    assert 'role="img" aria-label="loss by epoch"' in svg
    assert len(set(re.findall(r'stroke-dasharray="[^"]*"', svg))) == 2                          # not only colours
    assert evaluation.curve("none", {"a": []}) == ""
    page = evaluation.table({"t2i": {"R@1": 62.123, "mAP": 5.0}, "own": {"R@1": 1.0, "dropped": 3}})
    assert "<td>62.12</td>" in page and "<th scope=col>dropped</th>" in page and "<th scope=row>t2i</th>" in page
    assert "<td>3</td>" in page


def test_a_page_is_readable_without_seeing_it(tmp_path, sheet):
    evaluation.write_page(tmp_path / "p.html", "A & B", [("Queries", sheet), ("Nothing", "")])
    page = (tmp_path / "p.html").read_text()
    tags = Tags(page)
    assert tags.all("html") == [{"lang": "en"}] and len(tags.all("main")) == 1 and len(tags.all("h2")) == 1
    assert "<title>A &amp; B</title>" in page and all(image["alt"] for image in tags.all("img"))


def test_a_page_does_not_replace_another_file(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="is no page, so it is not replaced"):
        evaluation.write_page(tmp_path / "mine.txt", "title", [])
    evaluation.write_page(tmp_path / "p.html", "old", [])

    def chapters():
        yield "first", "<p>first</p>"
        raise ValueError("no picture")
    with pytest.raises(ValueError, match="no picture"):
        evaluation.write_page(tmp_path / "p.html", "new", chapters())
    assert "old" in (tmp_path / "p.html").read_text() and len(list(tmp_path.iterdir())) == 2
