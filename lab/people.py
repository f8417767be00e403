"""Synthetic pedestrians: a small world in which the claims of the papers can be tested in minutes.

    python lab/people.py sheet.png                  draws a few families, one family per row

    identity    a dict of attributes, e.g. top="shirt", top_colour="red"
    image       one view of an identity: front or back, pose, light, background, sometimes something in front
    caption     describes what this view shows, in varied words, and leaves things out

Identities come in families of three. Two members of a family differ in exactly two attributes, so every person has two
hard negatives. The drawing code knows the truth (attributes, visibility, a mask per garment). `oracle_score` is R@1 of
a reader who sees perfectly and understands every word.

Everything is a function of the seed. The 2,004 test images take 2 seconds. Needs only numpy and Pillow."""

import random
import sys
from types import SimpleNamespace

import numpy as np
from PIL import Image, ImageDraw

VERSION = 1                             # a change of one pixel or word makes a new benchmark: scores do not compare
SIZE = (96, 48)                         # height, width of an image
PERSONS = {"train": 1500, "few": 150, "val": 300, "test": 501}          # `few` is the first tenth of train
VIEWS = 4                               # images per person, two captions each

# ---- attributes ------------------------------------------------------------------------------------------------------


def equally(names):
    """The same frequency for every name of a comma-separated list."""
    return dict.fromkeys(names.split(", "), 1)


PEOPLE = dict(                          # the main domain: attribute -> {value: frequency}
    sex={"man": 5, "woman": 5},
    build={"slim": 3, "medium": 4, "heavy": 3},
    hair={"short": 4, "long": 4, "ponytail": 2},
    hair_colour={"black": 4, "brown": 3, "blond": 2, "grey": 2},
    hat={"none": 7, "cap": 2, "woolly hat": 2},
    hat_colour=equally("black, white, red, blue, green, purple"),
    glasses={"none": 7, "glasses": 3},
    top={"t-shirt": 4, "shirt": 3, "hoodie": 3, "jacket": 3, "coat": 3},
    sleeves={"short": 5, "long": 5},
    top_colour=equally("black, white, grey, red, blue, navy, green, yellow, orange, purple, pink, brown, beige"),
    pattern={"plain": 5, "striped": 3, "checked": 3},
    logo={"none": 7, "logo": 3},
    bottom={"trousers": 5, "shorts": 4, "skirt": 3},
    bottom_colour=equally("black, white, grey, red, blue, navy, green, yellow, orange, purple, brown, beige"),
    shoes={"black": 3, "white": 3, "grey": 2, "red": 2, "blue": 1, "brown": 2, "yellow": 1},
    bag={"none": 5, "backpack": 4, "handbag": 3, "shoulder bag": 3, "suitcase": 2},
    bag_size={"small": 5, "large": 5},
    bag_side={"left": 5, "right": 5},
    bag_colour={"black": 3, "red": 2, "orange": 2, "blue": 2, "green": 2, "pink": 2, "brown": 2, "white": 2},
)
GENERIC = PEOPLE | dict(                # the domain for pre-training: other garments, colours, bags and hats
    top={"t-shirt": 3, "vest": 3, "sweater": 3, "raincoat": 3, "jacket": 2},
    bottom={"leggings": 3, "trousers": 3, "long skirt": 3},
    top_colour=equally(
        "black, white, grey, red, blue, navy, green, yellow, orange, purple, pink, beige, brown, turquoise"),
    bottom_colour=equally("black, white, grey, blue, red, green, purple, brown, beige, turquoise"),
    bag={"none": 5, "backpack": 3, "handbag": 3, "shoulder bag": 3},
    hat={"none": 6, "cap": 2, "woolly hat": 2, "straw hat": 2},
)
# How often the members of a family differ in an attribute. Garment colours are a minority, or they would be enough.
FAMILY = dict(
    top=10, top_colour=14, bottom=10, bottom_colour=14, pattern=8, logo=2, sleeves=3, shoes=8, bag=8, bag_colour=7,
    bag_side=4, bag_size=1, hair=2, hair_colour=4, hat=5, hat_colour=4, glasses=2, sex=6, build=1,
)

PALETTE = dict(
    black=(30, 30, 32), white=(242, 242, 240), grey=(136, 138, 142), red=(204, 30, 36), blue=(48, 104, 214),
    navy=(24, 26, 92), green=(34, 142, 66), yellow=(244, 212, 40), orange=(242, 124, 22), purple=(124, 50, 160),
    pink=(248, 150, 190), brown=(118, 72, 36), beige=(216, 192, 150), turquoise=(40, 190, 190), blond=(226, 190, 104),
)
SKIN = [(250, 214, 186), (232, 180, 144), (196, 138, 98), (140, 92, 62), (98, 64, 44)]

# The cut of a garment. Heights are in body units: 0 is above the head, 100 is at the soles.
TOPS = {  # sleeves (0 none, 1 short, 2 long, None: the attribute decides), lower end, details
    "t-shirt": (None, 53, ""),
    "shirt": (None, 54, "buttons collar"),
    "hoodie": (2, 54, "hood pocket"),
    "jacket": (2, 51, "zip band"),
    "coat": (2, 74, "zip collar"),
    "vest": (0, 52, ""),
    "sweater": (2, 54, "band"),
    "raincoat": (2, 66, "hood buttons"),
}
BOTTOMS = {  # shape, lower end, half the width of a leg
    "trousers": ("legs", 93, 3.9),
    "shorts": ("legs", 69, 4.6),
    "leggings": ("legs", 92, 2.8),
    "skirt": ("skirt", 69, 0),
    "long skirt": ("skirt", 88, 0),
}

# A view is drawn as a map of parts first; colour, light and noise come after. So a mask per garment costs nothing.
PARTS = [
    "wall", "deco", "ground", "skin", "face", "hair", "hat", "hat_trim", "glasses", "top", "top_arm", "top_pattern",
    "top_trim", "logo", "bottom", "bottom_trim", "shoes", "bag", "bag_trim", "occluder",
]
PART = {name: i for i, name in enumerate(PARTS)}
REGIONS = dict(
    hair=["hair"], hat=["hat", "hat_trim"], glasses=["glasses"], shoes=["shoes"],
    top=["top", "top_arm", "top_pattern", "top_trim", "logo"], pattern=["top_pattern"], logo=["logo"],
    bottom=["bottom", "bottom_trim"], bag=["bag", "bag_trim"],
)

# ---- records ---------------------------------------------------------------------------------------------------------


def draw(split="train", seed=0, persons=None, domain="people"):
    """The records of one split, dict(image, captions, pid) as everywhere, with the truth beside them:

        attributes   {name: value} of the person
        visible      set of the attributes that this view shows
        parts        (H, W) uint8, the index in PARTS of each pixel; `mask` turns it into a mask
        mentions     per caption, {name: value} of what it says

    split: train, few, val or test.  persons: a multiple of three (default: PERSONS[split]).  domain: people or generic.
    The same arguments give the same pixels and captions everywhere. Raises ValueError for a wrong split or number."""
    if split not in PERSONS:
        raise ValueError(f"synthetic pedestrians have the splits {', '.join(PERSONS)}, not {split!r}")
    persons = PERSONS[split] if persons is None else persons
    if persons % 3:
        raise ValueError(f"synthetic pedestrians come in families of three: {persons} is not a multiple of 3")
    first = {"train": 0, "few": 0, "val": 100_000, "test": 200_000}[split]
    heldout = split in ("val", "test")
    records = []
    for start in range(first, first + persons, 3):
        rng = random.Random(f"toy {seed} {domain} {start}")             # a string, so that neighbours are independent
        for member, person in enumerate(draw_family(rng, domain)):
            for view in range(VIEWS):
                record = dict(pid=start + member, attributes=person)
                record |= draw_view(rng, person, back=view % 2 == 1, domain=domain)
                pairs = [write_caption(rng, person, record["visible"], domain, heldout) for _ in range(2)]
                captions, mentions = zip(*pairs)
                records.append(record | dict(captions=list(captions), mentions=list(mentions)))
    return records


def mask(record, region):
    """(H, W) bool: the pixels of one of REGIONS ("top", "bottom", "shoes", "bag", "hat", "hair", ...) in a record."""
    return np.isin(record["parts"], [PART[part] for part in REGIONS[region]])


def is_applicable(person, name):
    """Whether the attribute means anything for this person: without a bag there is no colour of the bag."""
    if name == "hat_colour":
        return person["hat"] != "none"
    if name == "bag_side":
        return person["bag"] not in ("none", "backpack")
    if name.startswith("bag_"):
        return person["bag"] != "none"
    if name == "sleeves":
        return TOPS[person["top"]][0] is None
    return True


def draw_family(rng, domain):
    """Three persons: A, B = A with x and y changed, C = A with x (as in B) and z changed."""
    table = PEOPLE if domain == "people" else GENERIC
    while True:
        a = {name: rng.choices(list(values), list(values.values()))[0] for name, values in table.items()}
        names = [name for name in FAMILY if is_applicable(a, name)]
        weights = [FAMILY[name] for name in names]
        x, y, z = (rng.choices(names, weights)[0] for _ in range(3))
        if len({x, y, z}) < 3:
            continue
        new = {name: rng.choice([value for value in table[name] if value != a[name]]) for name in (x, y, z)}
        b = a | {x: new[x], y: new[y]}
        c = a | {x: new[x], z: new[z]}
        if all(is_applicable(person, name) for person in (a, b, c) for name in (x, y, z)):
            return [a, b, c]


# ---- drawing: shapes -------------------------------------------------------------------------------------------------


class Canvas:
    """A map of parts at twice the final size, for smooth edges. A person fills the frame, as in detected crops.

    Shapes take body units: x = 0 is the middle of the person, y = 0 is above the head, y = 100 is at the soles."""

    def __init__(self, rng):
        self.height, self.width = 2 * SIZE[0], 2 * SIZE[1]
        self.image = Image.new("L", (self.width, self.height), PART["wall"])
        self.pen = ImageDraw.Draw(self.image)
        self.unit = self.height * rng.uniform(0.84, 0.95) / 100         # pixels per body unit
        self.x0 = self.width * rng.uniform(0.45, 0.55)
        self.y0 = self.height * 0.98 - 98 * self.unit - 2 * rng.uniform(0, 2)

    def at(self, x, y):
        return self.x0 + x * self.unit, self.y0 + y * self.unit

    def poly(self, part, *points):
        self.pen.polygon([self.at(*p) for p in points], PART[part])

    def line(self, part, width, *points):
        self.pen.line([self.at(*p) for p in points], PART[part], max(1, round(width * self.unit)), joint="curve")

    def oval(self, part, x, y, rx, ry):
        self.pen.ellipse([*self.at(x - rx, y - ry), *self.at(x + rx, y + ry)], PART[part])

    def box(self, part, left, top, right, bottom):
        self.pen.rectangle([*self.at(left, top), *self.at(right, bottom)], PART[part])

    def rounded(self, part, left, top, right, bottom, radius):
        self.pen.rounded_rectangle([*self.at(left, top), *self.at(right, bottom)], radius * self.unit, PART[part])

    def dome(self, part, left, top, right, bottom):
        """The upper half of the ellipse in this box."""
        self.pen.pieslice([*self.at(left, top), *self.at(right, bottom)], 180, 360, PART[part])

    def pixels(self, part, left, top, right, bottom):
        """A rectangle in pixels, for what does not move with the person."""
        self.pen.rectangle([left, top, right, bottom], PART[part])


def draw_view(rng, person, back, domain):
    """One view of a person: dict(image (H, W, 3) uint8, parts (H, W) uint8, visible = set of attribute names)."""
    canvas = Canvas(rng)
    draw_place(canvas, rng)
    body = measure_body(rng, person, back)
    draw_legs(canvas, body, domain)
    draw_bottom(canvas, person, body)
    draw_top(canvas, person, body)
    draw_bag(canvas, person, body)
    draw_head(canvas, person, body)
    draw_occluder(canvas, rng)
    index = np.asarray(canvas.image)                                                                # (2H, 2W)
    parts = index[1::2, 1::2].copy()                                                                # (H, W)
    return dict(image=paint(rng, index, person, domain), parts=parts, visible=visible_attributes(person, parts, back))


def measure_body(rng, person, back):
    """Widths and positions in body units. `side` is 1 where the person's left is on the right of the image."""
    wide = {"slim": 0.82, "medium": 1.0, "heavy": 1.24}[person["build"]]
    widths = (13.2, 10.2, 9.6) if person["sex"] == "man" else (10.2, 7.0, 11.2)
    shoulder, waist, hip = [wide * width for width in widths]
    stride = rng.uniform(0.5, 4.5)
    swing = {-1: rng.uniform(0, 4.5), 1: rng.uniform(0, 4.5)}           # -1 and 1: left and right in the image
    feet = {s: s * (4.6 * wide + stride) for s in (-1, 1)}
    hands = {s: (s * (shoulder + 1.5 + swing[s]), 54) for s in (-1, 1)}
    return SimpleNamespace(wide=wide, shoulder=shoulder, waist=waist, hip=hip, feet=feet, hands=hands, back=back,
                           side=-1 if back else 1)


def draw_place(canvas, rng):
    """A wall with up to two posts or windows, and the ground."""
    for _ in range(rng.randrange(3)):
        x = rng.randrange(canvas.width)
        width = rng.randrange(4, 30)
        y = rng.randrange(canvas.height // 2)
        canvas.pixels("deco", x, y, x + width, y + rng.randrange(20, 90))
    canvas.pixels("ground", 0, canvas.height * rng.uniform(0.74, 0.86), canvas.width, canvas.height)


def draw_legs(canvas, body, domain):
    for s in (-1, 1):
        foot = body.feet[s]
        canvas.line("skin", 5.6 * body.wide ** 0.5, (s * 4.6 * body.wide, 52), (foot, 95))
        canvas.oval("shoes", foot + s * 0.8, 95.5, 4.3, 3.0)
        if domain == "people":                                          # ankle-high; low shoes in the generic domain
            canvas.box("shoes", foot - 2.6, 91.5, foot + 2.6, 95)


def draw_bottom(canvas, person, body):
    """Trousers, shorts and leggings, or a skirt."""
    shape, end, half = BOTTOMS[person["bottom"]]
    waist, hip = body.waist, body.hip
    if shape == "legs":
        canvas.poly("bottom", (-waist, 47), (waist, 47), (hip, 56), (-hip, 56))
        for s in (-1, 1):
            x = s * hip * 0.52
            below = x + (body.feet[s] - x) * (end - 54) / 41
            canvas.line("bottom", 2 * half * body.wide ** 0.7, (x, 54), (below, end))
        canvas.line("bottom_trim", 0.9, (0, 55), (0, 62))
        return
    flare = hip + (4.5 if end < 75 else 6)
    canvas.poly("bottom", (-waist, 47), (waist, 47), (hip, 54), (flare, end), (-flare, end), (-hip, 54))
    for x in (-0.45, 0.1, 0.6):                                         # folds
        canvas.line("bottom_trim", 0.7, (x * hip, 58), (x * flare, end - 1))


LONG_HAIR = [(-6.4, 8), (6.4, 8), (7.6, 29), (-7.6, 29)]


def draw_top(canvas, person, body):
    """Arms, then the garment over their upper ends, then its pattern and details."""
    if person["hair"] == "long" and not body.back:                      # falls behind the shoulders
        canvas.poly("hair", *LONG_HAIR)
    sleeve, hem, details = TOPS[person["top"]]
    if sleeve is None:
        sleeve = 1 if person["sleeves"] == "short" else 2
    draw_arms(canvas, body, sleeve)
    flare = body.hip + (2.2 if hem > 60 else 0.6)
    half = [(4, 17), (body.shoulder, 20.5), (body.waist + 0.8, 42), (flare, hem)]
    if sleeve == 0:
        half[1] = (body.shoulder - 2.5, 20)
    canvas.line("skin", 5.0, (0, 12), (0, 18))                          # the neck
    canvas.poly("top", (-4, 17), *half, *[(-x, y) for x, y in half[:0:-1]])
    if person["pattern"] != "plain":
        draw_pattern(canvas, person["pattern"], hem)
    if "band" in details:
        x = flare + 0.4
        canvas.poly("top_trim", (x, hem - 3), (x, hem), (-x, hem), (-x, hem - 3))
    if not body.back:
        draw_front(canvas, details, hem, person["logo"])


def draw_arms(canvas, body, sleeve):
    for s in (-1, 1):
        hand_x, hand_y = body.hands[s]
        x, y = s * (body.shoulder - 2), 21
        canvas.line("skin", 4.2 * body.wide ** 0.5, (x, y), (hand_x, hand_y))
        canvas.oval("skin", hand_x, hand_y, 2.4, 2.6)
        if sleeve:
            length = 0.36 if sleeve == 1 else 0.93                      # as a fraction of the arm
            end = (x + length * (hand_x - x), y + length * (hand_y - y))
            canvas.line("top_arm", 5.4 * body.wide ** 0.5, (x, y), end)


def draw_pattern(canvas, pattern, hem):
    """Stripes or checks, drawn across the image and kept on the garment only."""
    before = np.asarray(canvas.image)
    for y in range(23, hem, 6):
        canvas.box("top_pattern", -40, y, 40, y + 2.2)
    if pattern == "checked":
        for x in range(-36, 40, 6):
            canvas.box("top_pattern", x, 17, x + 1.8, hem)
    on_garment = np.isin(before, [PART["top"], PART["top_arm"]])
    canvas.image.paste(Image.fromarray(np.where(on_garment, np.asarray(canvas.image), before)))


def draw_front(canvas, details, hem, logo):
    """What only the front of a top has."""
    if "zip" in details:
        canvas.line("top_trim", 1.3, (0, 18), (0, hem))
    if "buttons" in details:
        for y in range(23, hem - 1, 5):
            canvas.oval("top_trim", 0, y, 1.0, 1.0)
    if "pocket" in details:
        canvas.poly("top_trim", (-4.5, 41), (4.5, 41), (6, 48), (-6, 48))
    if "collar" in details:
        right = [(5, 16.5), (6.5, 18.5), (1.2, 24)]
        left = [(-1.2, 24), (-6.5, 18.5)]
        canvas.poly("top_trim", (-5, 16.5), (0, 21.5), *right, (0, 22.5), *left)
    if logo == "logo":
        canvas.oval("logo", 0, 30, 4.2, 3.8)


def draw_bag(canvas, person, body):
    """On the back, in a hand, over a shoulder, or rolling beside the person."""
    bag, large = person["bag"], person["bag_size"] == "large"
    s = body.side * (1 if person["bag_side"] == "left" else -1)         # the person's side, as seen in the image
    x, y = body.hands[s]
    if bag == "backpack" and body.back:
        w, bottom = (9.4, 49) if large else (6.6, 38)
        canvas.rounded("bag", -w, 20, w, bottom, radius=3)
        canvas.box("bag_trim", -w + 2, bottom - 9, w - 2, bottom - 7.6)
    elif bag == "backpack":                                             # from the front only its straps show
        for strap in (-1, 1):
            canvas.line("bag", 4.0, (strap * body.shoulder * 0.62, 19), (strap * body.shoulder * 0.66, 40))
    elif bag == "handbag":
        w, h = (8.2, 15) if large else (5.4, 10)
        canvas.line("bag_trim", 1.3, (x - 3, y + 5), (x, y), (x + 3, y + 5))
        canvas.box("bag", x - w, y + 4, x + w, y + 4 + h)
    elif bag == "shoulder bag":
        w, h = (7.4, 17) if large else (5.2, 11)
        x = s * (body.shoulder + 1.0)
        canvas.line("bag_trim", 1.7, (s * body.shoulder * 0.66, 19), (x, 40))
        canvas.box("bag", x - w, 38, x + w, 38 + h)
    elif bag == "suitcase":
        w, h = (7.4, 33) if large else (5.8, 22)
        canvas.line("bag_trim", 1.4, (x, y), (x + s * 2.0, 97 - h))
        x = x + s * 2.0
        canvas.rounded("bag", x - w, 97 - h, x + w, 97, radius=1.5)


def draw_head(canvas, person, body):
    """Hood, head with hair and face, hat: in this order, each covers the one before."""
    hair, back = person["hair"], body.back
    if "hood" in TOPS[person["top"]][2]:
        canvas.oval("top_trim", 0, 17.5, 7.2 if back else 6.6, 4.6 if back else 3.0)
    canvas.oval("hair" if back else "skin", 0, 9, 5.6, 7.2)
    if not back:
        draw_face(canvas, person)
    elif hair == "long":
        canvas.poly("hair", *LONG_HAIR)
    elif hair == "ponytail":
        canvas.line("hair", 3.4, (0, 12), (0, 31))
        canvas.oval("hair", 0, 31, 1.8, 2.6)

    if person["hat"] == "cap":
        canvas.dome("hat", -6.6, -1.5, 6.6, 14)
        if not back:                                                    # the peak
            canvas.poly("hat_trim", (-8.2, 5.4), (8.2, 5.4), (6.0, 8.0), (-6.0, 8.0))
    elif person["hat"] == "woolly hat":
        canvas.dome("hat", -7.0, -2.5, 7.0, 15)
        canvas.box("hat_trim", -7.0, 4.6, 7.0, 7.4)
        canvas.oval("hat", 0, -2.4, 2.8, 2.4)
    elif person["hat"] == "straw hat":
        canvas.oval("hat", 0, 4.8, 11.0, 2.4)
        canvas.dome("hat", -5.6, -2.5, 5.6, 11)
        canvas.box("hat_trim", -5.6, 2.6, 5.6, 4.2)


def draw_face(canvas, person):
    canvas.dome("hair", -6.2, 0.6, 6.2, 14)
    if person["hair"] != "short":
        for x in (-1, 1):
            canvas.line("hair", 1.9, (x * 5.4, 6), (x * 5.6, 15 if person["hair"] == "ponytail" else 22))
    for x in (-2.2, 2.2):
        canvas.oval("face", x, 9.2, 0.9, 0.9)
    canvas.line("face", 0.8, (-1.6, 13.2), (1.6, 13.2))
    if person["glasses"] == "glasses":
        for x in (-2.6, 2.6):
            canvas.oval("glasses", x, 9.4, 2.2, 1.8)
        canvas.line("glasses", 0.9, (-5.2, 8.8), (5.2, 8.8))


def draw_occluder(canvas, rng):
    """In 12 % of the views a post or a box hides a part of the person."""
    if rng.random() >= 0.12:
        return
    if rng.random() < 0.5:
        x = canvas.x0 + 2 * rng.choice([-1, 1]) * rng.uniform(5, 12)
        canvas.pixels("occluder", x, 0, x + 2 * rng.uniform(3, 6), canvas.height)
    else:
        canvas.pixels("occluder", 0, canvas.height * rng.uniform(0.68, 0.86), canvas.width, canvas.height)


# ---- drawing: colours and light --------------------------------------------------------------------------------------


def shade(colour, factor):
    return tuple(factor * value for value in colour)


def trim_colour(colour):
    """Of seams, zips and pockets: darker than the garment, or lighter on a dark one."""
    return shade(colour, 0.55) if sum(colour) > 330 else tuple(70 + 0.8 * value for value in colour)


def part_colours(rng, person, domain):
    """{part: colour}. Skin, wall, ground and what stands in front are drawn at random."""
    names = ("hair", "hat", "top", "bottom", "bag")
    hair, hat, top, bottom, bag = (PALETTE[person[f"{name}_colour"]] for name in names)
    skin = SKIN[rng.randrange(len(SKIN))]
    grey = rng.uniform(85, 195)
    tint = 55 if domain == "generic" else 28
    wall = tuple(grey + rng.uniform(-tint, tint) for _ in range(3))
    light_top = person["top_colour"] in ("white", "beige", "yellow", "pink")
    contrast = (70, 70, 76) if light_top else (236, 236, 232)           # of the pattern and the logo
    return dict(
        wall=wall,
        deco=shade(wall, rng.uniform(0.7, 1.2)),
        ground=shade((128, 124, 118), rng.uniform(0.6, 1.2)),
        skin=skin, face=shade(skin, 0.45), glasses=(16, 16, 18),
        hair=hair,
        hat=hat, hat_trim=trim_colour(hat),
        top=top, top_arm=trim_colour(top) if domain == "generic" else shade(top, 0.88),
        top_pattern=contrast, logo=contrast, top_trim=trim_colour(top),
        bottom=bottom, bottom_trim=trim_colour(bottom),
        shoes=PALETTE[person["shoes"]],
        bag=bag, bag_trim=trim_colour(bag),
        occluder=tuple(rng.uniform(40, 150) for _ in range(3)),
    )


def paint(rng, index, person, domain):
    """Colour the parts, then add light, its tint and direction, and noise. index (2H, 2W) -> image (H, W, 3) uint8."""
    H, W = SIZE
    table = part_colours(rng, person, domain)
    colours = np.array([table[part] for part in PARTS], np.float32)
    if domain == "generic":                                             # another camera: paler and greener
        colours = 30 + 0.78 * colours + np.float32([-8, 10, 0])
    gain = rng.uniform(0.84, 1.08) * np.float32([rng.uniform(0.97, 1.03) for _ in range(3)])
    image = (colours * gain)[index]                                                                 # (2H, 2W, 3)
    image = image.reshape(H, 2, W, 2, 3).mean(axis=(1, 3))                                          # (H, W, 3)
    tilt = rng.uniform(-0.12, 0.12)                                     # the light comes from the left or the right
    image *= np.linspace(1 + tilt, 1 - tilt, W, dtype=np.float32)[None, :, None]
    noise_rng = np.random.default_rng(rng.getrandbits(64))
    noise = noise_rng.normal(0, rng.uniform(2, 6), (H, W, 3)).astype(np.float32)
    return (image + noise).clip(0, 255).astype(np.uint8)


def visible_attributes(person, parts, back):
    """Names of the attributes that this view shows, by the number of pixels that are left of each region."""
    count = np.bincount(parts.ravel(), minlength=len(PARTS))
    pixels = {region: sum(count[PART[part]] for part in names) for region, names in REGIONS.items()}
    front = not back
    visible = {"sex", "build"}
    if pixels["top"] > 90:
        visible |= {"top", "top_colour", "sleeves", "pattern"}
        if front and (pixels["logo"] >= 4 or person["logo"] == "none"):
            visible.add("logo")
    if pixels["bottom"] > 50:
        visible |= {"bottom", "bottom_colour"}
    if pixels["shoes"] > 10:
        visible.add("shoes")
    if pixels["hair"] > 8:
        visible.add("hair_colour")
        if back or person["hair"] != "ponytail":
            visible.add("hair")
    if pixels["hat"] > 10 or person["hat"] == "none":
        visible |= {"hat", "hat_colour"}
    if front and (pixels["glasses"] > 4 or person["glasses"] == "none"):
        visible.add("glasses")
    if pixels["bag"] > 12:
        visible |= {"bag", "bag_colour", "bag_side"}
        if back or person["bag"] != "backpack":                         # from the front only the straps show
            visible.add("bag_size")
    return {name for name in visible if is_applicable(person, name)}


# ---- captions --------------------------------------------------------------------------------------------------------

# Words for a value. Before the bar: in all captions. After it: only in val, test and the generic domain.
WORDS = {
    "man": "man, male, guy | gentleman", "woman": "woman, female, lady | girl",
    "slim": "slim, thin | skinny", "heavy": "heavy, stout | big",
    "t-shirt": "t-shirt | tee", "shirt": "shirt, button-up shirt | dress shirt",
    "hoodie": "hoodie, hooded sweatshirt | hooded top", "jacket": "jacket | windbreaker",
    "coat": "coat, long coat | overcoat",
    "vest": "vest, tank top", "sweater": "sweater, jumper",
    "trousers": "trousers, pants | slacks", "leggings": "leggings, tights",
    "cap": "cap | baseball cap", "woolly hat": "beanie, woolly hat | knitted hat",
    "backpack": "backpack, rucksack | knapsack", "handbag": "handbag | purse",
    "shoulder bag": "shoulder bag, satchel", "suitcase": "suitcase, trolley | rolling case",
    "shoes": "shoes, sneakers | trainers", "glasses": "glasses | spectacles",
    "striped": "striped | stripy", "checked": "checked, plaid", "logo": "logo, print | emblem",
    "small": "small | little", "large": "large, big",
    "grey": "grey, gray", "navy": "navy, dark blue", "beige": "beige, tan", "purple": "purple, violet",
    "red": "red | crimson",
}


def join(*phrases):
    """The phrases that are not empty, with spaces between them."""
    return " ".join(phrase for phrase in phrases if phrase)


def a(phrase):
    """The phrase with its indefinite article."""
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


class Phrases:
    """Writes the phrases of one caption and remembers in `mentions` which attributes they name."""

    def __init__(self, rng, person, visible, fresh):
        self.rng, self.person, self.visible, self.fresh = rng, person, visible, fresh
        self.mentions = {}

    def value(self, name, chance):
        """The value of an attribute if the caption mentions it (it must be visible and worth a word), else None."""
        value = self.person[name]
        if name in self.visible and value not in ("none", "medium") and self.rng.random() < chance:
            self.mentions[name] = value
            return value
        return None

    def word(self, value):
        """One of the words for a value."""
        if value is None:
            return ""
        usual, _, new = WORDS.get(value, value).partition(" | ")
        use_new = new and self.fresh and self.rng.random() < 0.05
        return self.rng.choice((new if use_new else usual).split(", "))

    def noun(self, noun, colour, *adjectives):
        """ "striped red shirt", now and then "striped shirt in red"."""
        adjectives = self.rng.sample(adjectives, len(adjectives))
        if colour and self.rng.random() < 0.12:
            return join(*adjectives, noun, "in", self.word(colour))
        return join(*adjectives, self.word(colour), noun)

    def pair(self, phrase):
        return "a pair of " + phrase if self.rng.random() < 0.15 else phrase

    def top(self):
        """The top with its pattern, sleeves and logo, or "" if neither garment nor colour is mentioned."""
        pattern = self.value("pattern", 0.85 if self.person["pattern"] != "plain" else 0.12)
        sleeves = self.value("sleeves", 0.45)
        top, colour, logo = self.value("top", 0.93), self.value("top_colour", 0.95), self.value("logo", 0.7)
        if not (top or colour):
            for name in ("pattern", "sleeves", "logo"):
                self.mentions.pop(name, None)
            return ""
        noun = self.word(top) if top else "top"
        phrase = a(self.noun(noun, colour, self.word(pattern), sleeves and sleeves + "-sleeved"))
        return phrase + (f" with {a(self.word(logo))} on the chest" if logo else "")

    def bottom(self):
        bottom, colour = self.value("bottom", 0.9), self.value("bottom_colour", 0.92)
        if not (bottom or colour):
            return ""
        phrase = self.noun(self.word(bottom) if bottom else "bottoms", colour)
        return a(phrase) if bottom and "skirt" in bottom else self.pair(phrase)

    def shoes(self):
        colour = self.value("shoes", 0.8)
        return self.pair(self.noun(self.word("shoes"), colour)) if colour else ""

    def hat(self):
        hat = self.value("hat", 0.9)
        return a(self.noun(self.word(hat), self.value("hat_colour", 0.9))) if hat else ""

    def clothes(self):
        """Everything that the person wears, as one list in words."""
        worn = [self.top(), self.bottom(), self.shoes(), self.hat(), self.word(self.value("glasses", 0.85))]
        worn = [phrase for phrase in worn if phrase]
        if self.rng.random() < 0.3:                                     # the hat first; with fresh plans in any order
            worn = self.rng.sample(worn, len(worn)) if self.fresh else worn[::-1]
        if len(worn) > 1:
            return ", ".join(worn[:-1]) + " and " + worn[-1]
        return "".join(worn) or "plain clothes"

    def hair(self):
        style, colour = self.value("hair", 0.6), self.value("hair_colour", 0.65)
        if not (style or colour):
            return ""
        if style == "ponytail":
            tail = self.rng.choice(["in a ponytail", "tied back"])
            return join(self.word(colour), "hair", tail)
        return join(style, self.word(colour), "hair")

    def bag(self, his):
        """The bag and where it is carried."""
        bag = self.value("bag", 0.93)
        if not bag:
            return ""
        size, colour, side = self.value("bag_size", 0.4), self.value("bag_colour", 0.9), self.value("bag_side", 0.9)
        if bag == "backpack":
            where = f"on {his} back"
        elif bag == "shoulder bag":
            where = f"over {his} {side} shoulder" if side else "over one shoulder"
        else:
            where = f"in {his} {side} hand" if side else "in one hand"
        return a(self.noun(self.word(bag), colour, self.word(size))) + " " + where


def write_caption(rng, person, visible, domain, heldout):
    """One description of a view: (caption, {attribute: value} that it mentions).

    heldout: use also the words and sentence plans that training captions of the main domain never contain."""
    fresh = heldout or domain == "generic"
    phrases = Phrases(rng, person, visible, fresh)
    sex, build = phrases.value("sex", 0.9), phrases.value("build", 0.5)
    subject = join(phrases.word(build), phrases.word(sex) if sex else rng.choice(["person", "pedestrian"]))
    he, his = {"man": ("he", "his"), "woman": ("she", "her"), None: ("the person", "the")}[sex]
    worn, hair, bag = phrases.clothes(), phrases.hair(), phrases.bag(his)
    plan = rng.randrange(6 if fresh and rng.random() < 0.4 else 4)
    caption = write_sentence(plan, subject, he, worn, hair, bag)
    sentences = [sentence[:1].upper() + sentence[1:] for sentence in caption.split(". ")]
    return ". ".join(sentences), phrases.mentions


def write_sentence(plan, subject, he, worn, hair, bag):
    """One of six sentence plans; plans 4 and 5 are held out from training."""
    with_hair = f" with {hair}" if hair else ""
    has_hair = f"has {hair}" if hair else ""
    carries = f"carries {bag}" if bag else ""
    if plan == 0:
        return f"{a(subject)}{with_hair} is wearing {worn}." + (f" {he} {carries}." if bag else "")
    if plan == 1:
        more = " and ".join(phrase for phrase in (has_hair, carries) if phrase)
        return f"{a(subject)} wears {worn}." + (f" {he} {more}." if more else "")
    if plan == 2:
        *more, last = [phrase for phrase in (has_hair, f"is dressed in {worn}", carries) if phrase]
        return f"the {subject} " + (", ".join(more) + " and " if more else "") + last + "."
    if plan == 3:
        return f"this {subject} in {worn} {has_hair or 'walks by'}." + (f" there is {bag}." if bag else "")
    if plan == 4:
        return f"dressed in {worn}, {a(subject)}{with_hair} {carries or 'stands there'}."
    return (f"carrying {bag}, " if bag else "") + f"{a(subject)}{with_hair} walks along in {worn}."


# ---- the oracle ------------------------------------------------------------------------------------------------------


def oracle_score(records, names=None):
    """Text-to-image R@1 in percent of a reader who sees every visible attribute and understands every word.

    Ties count by chance. `names` limits the reader to some attributes, e.g. ["top_colour", "bottom_colour"]."""
    names = list(names or PEOPLE)
    values = {name: sorted({r["attributes"][name] for r in records}) for name in names}

    def codes(attributes, known):
        """The number of each value; -1 where it is not known."""
        return [values[name].index(attributes[name]) if name in known else -1 for name in names]

    shown = np.array([codes(r["attributes"], r["visible"]) for r in records])                       # (G, names)
    said = np.array([codes(mentions, mentions) for r in records for mentions in r["mentions"]])     # (Q, names)
    g_pid = np.array([r["pid"] for r in records])
    q_pid = np.array([r["pid"] for r in records for _ in r["mentions"]])
    wrong = np.zeros((len(said), len(shown)), np.int8)                                              # (Q, G)
    for said_value, shown_value in zip(said.T, shown.T):
        wrong += (said_value[:, None] >= 0) & (said_value[:, None] != shown_value[None, :])
    best = wrong == wrong.min(axis=1, keepdims=True)
    right = best & (q_pid[:, None] == g_pid)
    return 100 * float((right.sum(axis=1) / best.sum(axis=1)).mean())


def main():
    path = sys.argv[1] if len(sys.argv) > 1 else "people.png"
    records = draw("test", persons=9)
    rows = np.stack([r["image"] for r in records]).reshape(3, 3 * VIEWS, *SIZE, 3)                          # 3 families
    Image.fromarray(np.concatenate([np.concatenate(row, axis=1) for row in rows])).save(path)
    for r in records[::VIEWS]:
        print(r["pid"], r["captions"][0])
    print(f"{path}: three families of three persons, {VIEWS} views each, one family per row")


if __name__ == "__main__":
    main()
