"""Data: dataset readers and their checker, captions, CLIP's tokenizer, image augmentation, batches.

    python data.py --dataset cuhk --data-root DIR      check a data set: counts beside the published ones, bad files

Every data set becomes a list of records, one per image:

    dict(image=path or uint8 array (H, W, 3), captions=[str, ...], pid=int)

with the optional keys captions_bt (back-translated captions), source and scores (generated pairs). The file follows a
pair on its way into a batch: it is read and checked, the caption is cleaned, augmented and tokenized, the image is
loaded, augmented and scaled. The data sets toy, toy-few and toy-generic are drawn by lab/people.py.

Needs torch, torchvision, numpy, tokenizers and Pillow; imports nothing of this project unless toy data are asked for.
Checking CUHK-PEDES decodes its 40,206 images once."""

import argparse
import base64
import contextlib
import csv
import functools
import gzip
import html
import io
import json
import math
import os
import random
import re
import struct
import sys
import traceback
import unicodedata
import zlib
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from reprlib import repr as brief                                        # at most some 30 characters

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image, ImageFilter, PngImagePlugin
from tokenizers import Regex, Tokenizer as BPETokenizer, models, normalizers, pre_tokenizers, processors, trainers
from torchvision.transforms import v2
from tqdm import tqdm

# ---- helpers: missing files, text files, progress -------------------------------------------------------------------


def need(path, what, fix):
    """Return the path if it exists. Otherwise raise FileNotFoundError: what is missing, what is there, what to do."""
    path = Path(path)
    if path.exists():
        return path
    there = next(p for p in path.absolute().parents if p.exists())
    names = sorted(f.name + "/" * f.is_dir() for f in there.iterdir()) if there.is_dir() else []
    holds = ", ".join(names[:8]) or "nothing"
    if len(names) > 8:
        holds += f" and {len(names) - 8} more"
    raise FileNotFoundError(f"{what} should be at {path}\n  {there} holds: {holds}\n  {fix}")


def read_text(path):
    """The text of a UTF-8 file, with or without a byte-order mark. A .gz file is unpacked.

    Raises ValueError naming the file if it is a damaged archive, a Git LFS pointer, or in another encoding."""
    path = Path(path)
    content = path.read_bytes()
    if content.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path} is a Git LFS pointer, not the file itself; fetch the file with `git lfs pull`")
    if path.suffix == ".gz":
        try:
            content = gzip.decompress(content)
        except (EOFError, zlib.error, gzip.BadGzipFile) as e:
            raise ValueError(f"{path} is damaged ({e}); is the download complete?") from None
    if content.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in content:
        raise ValueError(f"{path} is UTF-16, not UTF-8; save it as UTF-8")
    try:
        return content.decode("utf-8-sig")                              # Excel writes a byte-order mark
    except UnicodeDecodeError as e:
        # GBK writes a Chinese character as two bytes, most of them above 0x7f; in cp1252 such bytes stand alone
        runs = re.findall(rb"[\x80-\xff]+", content)
        chinese = 2 * sum(len(run) % 2 == 0 for run in runs) > len(runs)
        found = "GBK (Chinese)" if chinese else "cp1252 (Western European, the default of Windows)"
        line = 1 + content.count(b"\n", 0, e.start)
        raise ValueError(f"{path}, line {line}: it is not UTF-8 but probably {found}; save it as UTF-8") from None


def load_json(path):
    """Raises ValueError naming the file if it is not JSON."""
    try:
        return json.loads(read_text(path))
    except (json.JSONDecodeError, RecursionError) as e:
        raise ValueError(f"{path} is not JSON ({e}); is the download complete?") from None


def progress_bar(*items, **options):
    """tqdm. Without a terminal, as in a log file, it prints a line a minute instead of a bar."""
    if not sys.stderr.isatty():
        line = "{desc}: {n_fmt} of {total_fmt}, {elapsed} elapsed, {remaining} left, {rate_fmt}{postfix}\n"
        options |= dict(delay=60, mininterval=60, maxinterval=60, miniters=1, bar_format=line)
    return tqdm(*items, **options)


# ---- readers: the files of a data set -> rows -----------------------------------------------------------------------
#
# A reader returns dicts with image, captions, pid and split, and with `where`, the file and row for error messages.
# It may return several rows for one image. To add a data set, write a reader and name it in READERS.

ASK = "ask the authors of the set for it (README, 'Your data'), or try --dataset toy, which needs nothing"
BENCHMARKS = {  # name: folder, names of the annotation file, key of the image path
    "cuhk": ("CUHK-PEDES", ["reid_raw.json"], "file_path"),                                  # Li et al., CVPR 2017
    "icfg": ("ICFG-PEDES", ["ICFG-PEDES.json", "ICFG_PEDES.json"], "file_path"),             # Ding et al., 2021
    "rstp": ("RSTPReid", ["data_captions.json"], "img_path"),                                # Zhu et al., MM 2021
}


def read_benchmark(name, root):
    """CUHK-PEDES, ICFG-PEDES or RSTPReid: one JSON list that has the split in each row."""
    folder, files, path_key = BENCHMARKS[name]
    places = [place / file for place in (root, root / folder) for file in files]
    file = next((p for p in places if p.exists()), None)
    if file is None:
        fix = f"--data-root is that folder or its parent; {ASK}"
        if name == "cuhk" and any((place / "caption_all.json").exists() for place in (root, root / folder)):
            fix = ("caption_all.json, the first release of CUHK-PEDES, has no splits and other ids; get reid_raw.json "
                   "from the same authors")
        need(places[len(files)] if (root / folder).exists() else places[0], f"the annotation of {folder}", fix)
    rows = json_rows(file, path_key, file.parent / "imgs")
    if name == "rstp" and len({str(r["pid"]) for r in rows if r["split"] == "train"}) == 3901:
        raise ValueError(f"{file} is the early RSTPReid annotation with a wrong split (3901/100/100 persons).\n"
                         "  Get the corrected one (3701/200/200) from the RSTPReid repository")
    return rows


def json_rows(file, path_key, images, split=None):
    """Rows of a JSON list of objects with id, captions, an image path below `images`, and perhaps captions_bt.
    The split is in each object unless it is given."""
    entries, keys = load_json(file), ["id", "captions", path_key] + ["split"] * (split is None)
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"{file} should be a list of objects with {', '.join(keys)}; it is {brief(entries)}")
    rows = []
    for n, entry in enumerate(entries, start=1):
        where, path = f"{file}, row {n}", entry.get(path_key)
        if missing := [key for key in keys if key not in entry]:
            raise ValueError(f"{where}: it has no {', '.join(missing)}")
        rows.append(dict(image=images / path if isinstance(path, str) else path, captions=entry["captions"],
                         captions_bt=entry.get("captions_bt"), pid=entry["id"], split=split or entry["split"],
                         where=where))
    return rows


def read_reid(root):
    """The files of TBPS-CLIP's authors, with back-translated captions: train_reid.json, test_reid.json, and
    val_reid.json if it is there."""
    need(root / "train_reid.json", "the annotation",
         "--data-root is the folder of train_reid.json and test_reid.json; the images are in it or in its imgs/")
    images = root / "imgs" if (root / "imgs").exists() else root
    rows = []
    for split in ("train", "val", "test"):
        if (file := root / f"{split}_reid.json").exists():
            rows += json_rows(file, "file_path", images, split)
    return rows


def csv_lines(file):
    """Yields (line number, fields) for each row of a csv file. Empty lines are skipped."""
    reader, line = csv.reader(io.StringIO(read_text(file), newline=""), strict=True), 1
    try:
        for fields in reader:
            if fields:
                yield line, fields
            line = reader.line_num + 1                                  # a quoted field may span several lines
    except csv.Error as e:
        raise ValueError(f"{file}, line {line}: {e}. Is there a stray quotation mark? Inside a quoted caption it is "
                         "written twice") from None


# A caption may have several lines. A cell in it that is the name of a split means that it is several rows.
SPLIT_CELL = re.compile(r"(^|[,\r\n])(train|val|test)([,\r\n]|$)")


def read_csv(root):
    """Your own data: a csv file with the columns image, caption, pid and split, a line per caption. Image paths are
    relative to the file. `root` is the file, or a folder with one csv file."""
    need(root, "the csv file or its folder", "name it with --data-root FILE.csv")
    files = [root] if root.is_file() else sorted(root.glob("*.csv"))
    if len(files) != 1:
        raise ValueError(f"{root} holds {len(files)} .csv files; name the one to read with --data-root FILE.csv")
    file, lines, rows = files[0], csv_lines(files[0]), []
    _, names = next(lines, (1, []))
    if missing := {"image", "caption", "pid", "split"} - set(names):
        raise ValueError(f"{file} lacks the columns {', '.join(sorted(missing))}; it has {', '.join(names) or 'none'} "
                         "(columns are separated by commas)")
    for line, fields in lines:
        where = f"{file}, line {line}"
        if len(fields) != len(names):
            raise ValueError(f"{where}: it has {len(fields)} fields instead of {len(names)}")
        if any(len(field.splitlines()) > 1 and SPLIT_CELL.search(field) for field in fields):
            raise ValueError(f"{where}: a stray quotation mark joins it with the following lines")
        row = dict(zip(names, fields))
        rows.append(dict(image=file.parent / row["image"], captions=[row["caption"]], pid=row["pid"],
                         split=row["split"], where=where))
    return rows


def read_pairs(root):
    """A folder written by generate.py: imgs/ and pairs.jsonl. Each generated person has an id of its own."""
    file = need(root / "pairs.jsonl", "the list of generated pairs", "such a folder holds imgs/ and pairs.jsonl")
    rows = []
    for n, line in enumerate(read_text(file).split("\n"), start=1):     # splitlines() would also split at U+2028
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            scores = {key: float(value) for key, value in dict(entry.get("scores") or {}).items()}
            rows.append(entry | dict(image=root / "imgs" / entry["image"], source=entry["source_image"], scores=scores,
                                     where=f"{file}, line {n}"))
        except (json.JSONDecodeError, KeyError, TypeError, ValueError, AttributeError) as e:
            raise ValueError(f"{file}, line {n}, is no generated pair ({type(e).__name__}: {e})") from None
    if not rows:
        raise ValueError(f"{file} has no pairs")
    return rows


READERS = {name: functools.partial(read_benchmark, name) for name in BENCHMARKS}
READERS |= {"reid": read_reid, "csv": read_csv, "pairs": read_pairs}
DATASETS = ["toy", "toy-few", "toy-generic", *READERS]


# ---- records: rows are checked, merged per image, and split ---------------------------------------------------------

def check_sentences(value, key, where):
    if not isinstance(value, (list, tuple)) or not value or not all(isinstance(text, str) for text in value):
        raise ValueError(f"{where}: {key} are {brief(value)}; they must be a list of at least one sentence")
    for text in value:
        try:
            text.encode()
        except UnicodeEncodeError as e:
            half = brief(text[e.start:])
            raise ValueError(f"{where}: {key} hold half of a character, {half} (a lone surrogate)") from None
    return list(value)


def check_pid(value, where):
    """A person id as int; "12" and 12.0 count as 12."""
    try:
        pid = int(value)
        if isinstance(value, float) and pid != value or not -2 ** 63 <= pid < 2 ** 63:
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{where}: pid is {brief(value)}, it must be a whole number of at most 64 bits") from None
    return pid


def check_row(row, where):
    """The row of any reader in its final form: image is a Path or a uint8 array, captions and captions_bt are lists of
    str, pid is an int. Raises ValueError naming the row, so that no mistake shows up only during training."""
    if missing := {"image", "captions", "pid", "split"} - row.keys():
        raise ValueError(f"{where}: it has no {', '.join(sorted(missing))}")
    image, split = row["image"], row["split"]
    if isinstance(image, str):
        image = Path(image)
    is_array = isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.shape[2:] == (3,)
    if not isinstance(image, Path) and not is_array:
        raise ValueError(f"{where}: image is {brief(image)}; it must be a path or a uint8 array (H, W, 3)")
    if split not in ("train", "val", "test"):
        raise ValueError(f"{where}: split is {brief(split)}; the splits are train, val and test")
    captions = check_sentences(row["captions"], "captions", where)
    row = row | dict(image=image, captions=captions, pid=check_pid(row["pid"], where), where=where)
    translations = row.pop("captions_bt", None)
    if translations not in (None, []):
        translations = check_sentences(translations, "captions_bt", where)
        if len(translations) > len(captions):
            raise ValueError(f"{where}: {len(translations)} captions_bt belong to {len(captions)} captions")
        row["captions_bt"] = translations + [""] * (len(captions) - len(translations))
    return row


def read_rows(name, root):
    """All rows of a data set, checked."""
    rows = READERS[name](Path(root))
    return [check_row(row, row.get("where", f"{name} in {root}, row {n}")) for n, row in enumerate(rows, start=1)]


def merge_rows(rows):
    """One row per image: the captions of all rows that name it, in order. Raises ValueError if their pid or split
    differ."""
    merged = {}
    for row in rows:
        key = row["image"] if isinstance(row["image"], Path) else id(row["image"])
        first = merged.setdefault(key, row)
        if first is row:
            continue
        if (first["pid"], first["split"]) != (row["pid"], row["split"]):
            raise ValueError(f"{row['where']}: {row['image']} has another pid or split than in {first['where']}")
        if "captions_bt" in first or "captions_bt" in row:              # "" where a caption has no translation
            first["captions_bt"] = [bt for r in (first, row) for bt in r.get("captions_bt", [""] * len(r["captions"]))]
        first["captions"] = first["captions"] + row["captions"]
    return list(merged.values())


def take_split(rows, split, hold_out, name, root):
    """The rows of one split as records. `hold_out` makes a validation split where there is none."""
    if hold_out and not any(r["split"] == "val" for r in rows):
        pids = sorted({r["pid"] for r in rows if r["split"] == "train"})
        held = set(random.Random(0).sample(pids, min(200, math.ceil(len(pids) / 10))))
        rows = [r | dict(split="val") if r["split"] == "train" and r["pid"] in held else r for r in rows]
    records = [{k: v for k, v in r.items() if k not in ("split", "where")} for r in rows if r["split"] == split]
    if not records:
        there = ", ".join(f"{n} in {s!r}" for s, n in Counter(r["split"] for r in rows).items())
        raise ValueError(f"{name} in {root} has no images in the split {split!r}; it has {there or 'no rows at all'}")
    for folder in sorted({r["image"].parent for r in records if isinstance(r["image"], Path)}):
        need(folder, f"a folder of images that the {split} split of {name} uses",
             "unpack the rest of the archive" + f", or {ASK}" * (name in PUBLISHED))
    return records


def synthetic_pedestrians():
    """The module lab/people.py. It is imported only when toy data are asked for, so that data.py works alone."""
    need(Path(__file__).parent / "lab" / "people.py", "the code that draws the synthetic pedestrians",
         "copy the folder lab/ along with data.py, or name another data set")
    from lab import people
    return people


def read(name, root="data", split="train", hold_out=True):
    """The records of one split ("train", "val" or "test") of a data set, with the person ids of its files.

    name   cuhk, icfg, rstp    `root` is their folder or its parent
           reid                a folder with train_reid.json ... of TBPS-CLIP's authors and the images
           csv                 a file with the columns image, caption, pid, split, or its folder
           pairs               a folder written by generate.py
           toy, toy-few (a tenth of the persons), toy-generic (the domain for pre-training)
    hold_out   a set without validation split, as ICFG-PEDES, gets one: 200 training persons, seed 0

    Raises FileNotFoundError and ValueError that name the file and the row."""
    if name not in DATASETS:
        raise ValueError(f"there is no data set {name!r}; known are {', '.join(DATASETS)}")
    if name.startswith("toy"):
        part = "few" if name == "toy-few" and split == "train" else split
        return synthetic_pedestrians().draw(part, domain="generic" if name == "toy-generic" else "people")
    return take_split(merge_rows(read_rows(name, root)), split, hold_out, name, root)


def filter_by_score(records, thresholds):
    """Generated records whose scores reach all thresholds, texts KEY=NUMBER: the quality gate of PDG, applied when
    pairs are read. Raises ValueError if no record does, or a score is missing."""
    for text in thresholds:
        key, _, value = text.partition("=")
        try:
            least = float(value)
            if math.isnan(least):
                raise ValueError
        except ValueError:
            raise ValueError(f"--min-score takes KEY=NUMBER, not {text!r}") from None
        if missing := [r for r in records if key not in r.get("scores", {})]:
            there = ", ".join(missing[0].get("scores", {})) or "none"
            raise ValueError(f"{missing[0]['image']} has no score {key!r}; it has {there}")
        good = [r for r in records if r["scores"][key] >= least]
        if not good:
            highest = max(r["scores"][key] for r in records)
            raise ValueError(f"no pair reaches {text}; the highest {key} is {highest:.3g}"
                             + " of those that pass the others" * (len(thresholds) > 1))
        records = good
    return records


def counts(records):
    """(persons, images, captions)"""
    return len({r["pid"] for r in records}), len(records), sum(len(r["captions"]) for r in records)


# ---- picture files --------------------------------------------------------------------------------------------------

# What Pillow raises for damaged files. Its decoders do not turn all their failures into OSError.
DECODER_ERRORS = (OSError, SyntaxError, ValueError, TypeError, AttributeError, ArithmeticError, AssertionError,
                  LookupError, EOFError, RuntimeError, MemoryError, struct.error, zlib.error,
                  Image.DecompressionBombError)
# A PNG with more than 1 MB of text, XMP or ICC profile is a good picture. The limit of 64 MB for all text stays.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY
TURN = Image.Transpose
UPRIGHT = {2: TURN.FLIP_LEFT_RIGHT, 3: TURN.ROTATE_180, 4: TURN.FLIP_TOP_BOTTOM, 5: TURN.TRANSPOSE,
           6: TURN.ROTATE_270, 7: TURN.TRANSVERSE, 8: TURN.ROTATE_90}  # by EXIF orientation


def upright(image):
    """A loaded PIL image, turned as its EXIF orientation says; unchanged if the EXIF cannot be read.

    ImageOps.exif_transpose also rewrites the EXIF, which fails if any other tag in it is odd."""
    try:
        turn = UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation))
    except DECODER_ERRORS:
        turn = None
    return image if turn is None else image.transpose(turn)


BAD_IMAGES = "python data.py --dataset NAME lists all such files, tbps.py --skip-bad leaves them out"


def load_image(image, least=None):
    """A path, a PIL image or a uint8 array (H, W, 3) -> PIL image, RGB, turned upright as its EXIF says.

    least   for speed: a large JPEG may be decoded at a reduced size, not below so many pixels high and wide
    Raises FileNotFoundError, or ValueError naming the file if it is no picture, truncated or damaged."""
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.shape[2:] != (3,):
            raise ValueError(f"an image is a uint8 array (H, W, 3), not {image.dtype} {image.shape}")
        return Image.fromarray(image)
    try:
        with contextlib.nullcontext(image) if isinstance(image, Image.Image) else Image.open(image) as opened:
            if opened.mode.startswith("I"):                             # 16 bits: convert() would clip them at 255
                return Image.fromarray((np.asarray(opened) / 257).astype(np.uint8)).convert("RGB")
            if least:
                opened.draft("RGB", (least, least))
            opened.load()
            return upright(opened).convert("RGB")
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no image {image}; {BAD_IMAGES}") from None
    except DECODER_ERRORS as e:
        why = str(e) or type(e).__name__
        raise ValueError(f"{image} cannot be read as an image ({why}); {BAD_IMAGES}") from None


def unreadable_images(records):
    """[(record, reason)] of the images that are missing or cannot be decoded. Reads every file once."""
    def reason(record):
        try:
            load_image(record["image"])
        except (ValueError, FileNotFoundError) as e:
            return str(e)

    with ThreadPoolExecutor() as pool:
        reasons = progress_bar(pool.map(reason, records), total=len(records), desc="decoding", leave=False)
        return [(record, said) for record, said in zip(records, reasons) if said]


# ---- captions: which words carry the content ------------------------------------------------------------------------

COLOURS = """black white red blue green yellow orange purple pink brown grey gray beige tan navy khaki teal maroon
    turquoise violet crimson cream burgundy olive lavender golden gold silver magenta cyan""".split()
# Words for the same piece of clothing, between bars
GARMENTS = [words.split() for words in """coat jacket windbreaker parka blazer cardigan vest overcoat raincoat |
    shirt t-shirt tshirt tee tee-shirt top blouse polo tunic sweatshirt hoodie hoody sweater jumper pullover jersey
    shirts t-shirts | trousers pants slacks jeans leggings tights sweatpants | shorts | skirt | dress robe romper gown |
    suit uniform overalls clothes clothing cloth outfit | shoes shoe sneakers trainers boots sandals heels footwear
    flip-flops | socks | hat cap beanie | scarf | gloves | belt | tie | bag backpack rucksack handbag purse satchel |
    suitcase | umbrella | glasses sunglasses""".split("|")]

# The kinds of words: N noun, J adjective, P pronoun, V verb, O other. A word that is not listed and has none of the
# ENDINGS is a noun, so NOUNS lists only those whose ending would mislead. Extend at will.
PRONOUNS = """he she it they him her his hers its their theirs them himself herself itself themselves i we you my your
    our me us"""
OTHERS = """a an the this that these those which who whom whose what where when while as and or but nor so yet if
    because both either neither each every all any some no not none another there here in on at of off by to from for
    with without over under underneath beneath above below behind beside besides between across along around near next
    through during into onto out up down away toward towards against about after before until upon inside outside than
    then too also very quite rather slightly just only still even maybe perhaps possibly probably apparently almost
    well together forward forwards backward backwards ahead straight currently today once twice again one two three
    four five six seven eight nine ten twenty thirty forty fifty half fast since like per via plus except despite
    instead"""
VERBS = """is are was were be been being am has have had having do does did can could may might will would must should
    wear wears wearing wore worn carry carries carrying carried hold holds holding held walking walked stand standing
    stood sit sits sitting sat ride rides riding rode run runs running ran go goes going went seen see sees seem seems
    appear appears appearing look looking looked face facing faced made make makes put puts putting take takes taking
    taken took keep keeps kept let lets get gets got come comes came hang hangs hanging hung push pushes pushing pull
    pulls pulling pulled drag drags dragging lean leans leaning bend bends bent use uses using used talk talking
    speaking texting tied tucked dressed clad said says think show shows showing shown give gives gave featuring
    feature features contain contains include includes including consist consists reach reaches reaching fall falls
    falling fell cover covers covering covered match matches try tries trying sling slung draped wrapped rolled zipped
    buttoned unbuttoned untucked swinging moving moves move steps stepping cross crosses crossing wait waits waiting
    turn turns turning turned reading eating drinking smoking smiling smiles laughing laughs waving checking checks
    glancing glances jumps leads describe describes thrown heading stare stares"""
ADJECTIVES = """dark light bright pale deep plain solid solid-colored long short medium small large big little tiny
    tall thin slim slender skinny fat heavy stout plump chubby broad wide narrow tight loose baggy fitted young old
    middle-aged elderly adult male female left right front rear upper lower high low full open closed new same other
    different similar multiple several many few much more most less first second last single double casual formal
    sporty athletic denim leather woolen woollen woolly cotton plastic floral plaid checked checkered chequered striped
    stripy patterned printed spotted dotted camouflage colorful colourful colored coloured multicolored ripped faded
    torn folded cropped cuffed padded quilted hooded sleeveless bare bald curly wavy straightened blond blonde brunette
    asian african caucasian european visible clear black-and-white round square thick average normal dirty clean
    fashionable free light-weight overweight petite muscular neat sheer uneven auburn charcoal tartan polka-dot tie-dye
    mobile chinese american warm cold wet shiny soft empty own such certain shorter longer darker lighter bigger
    smaller larger taller better matching revealing"""
NOUNS = """clothing building earring earrings railing stockings legging leggings ring wing string king thing things
    something anything nothing morning evening ceiling painting shopping walking-stick piping lining trimming lettering
    writing drawing marking markings wedding lady body baby boy key keys tray jersey hoody belly family city country
    party story day way pony tummy trolley bed shed sled kid red-head tie dress watch top back side need weed seed feed
    speed velvet lanyard fanny guy navy-blue bag material"""
KIND = {word: kind for kind, words in dict(P=PRONOUNS, O=OTHERS, V=VERBS, J=ADJECTIVES, N=NOUNS).items()
        for word in words.split()} | dict.fromkeys(COLOURS, "J")
# Verbs behind a subject, nouns elsewhere
VERB_OR_NOUN = set("""walk walks looks talks stands ties watches faces falls turns tops backs works work strolls strides
    poses waits holds steps heads waves matches runs moves covers""".split())
SUBJECTS = {"he", "she", "it", "they", "who", "that", "and"}
ENDINGS = {"ly": "O", "ing": "V", "ish": "J", "ous": "J", "ful": "J", "less": "J", "able": "J", "ible": "J",
           "ive": "J", "ical": "J", "ity": "N", "way": "N", "y": "J"}
WORD = re.compile(r"\w+n't|[^\W\d_]+(?:-[^\W\d_]+)*|\d+|'\w*|[^\w\s]")


@functools.lru_cache(maxsize=2 ** 18)
def tag_words(caption):
    """The words of a caption with their kinds, in order: [(start, end, kind), ...].

    A table, endings and a little context replace a tagger that would have to be downloaded. tests/tagged.txt measures
    how often it is right."""
    found = [(m.start(), m.end(), m[0].lower()) for m in WORD.finditer(caption)]
    words = [word for _, _, word in found] + [""]
    kinds = []
    for i, (word, following) in enumerate(zip(words, words[1:])):
        kind, last = KIND.get(word), word.rsplit("-", 1)[-1]
        if not word[0].isalpha():
            kind = "O"
        elif word.endswith("n't"):
            kind = "V"
        elif word in VERB_OR_NOUN:
            kind = "V" if kinds[-1:] == ["N"] or i > 0 and words[i - 1] in SUBJECTS else "N"
        elif kind is None and last != word:                             # long-sleeved, knee-length, but t-shirt
            describes = last.endswith("ed") or last in ("length", "sleeve", "style", "size", "high", "neck")
            kind = "J" if describes else KIND.get(last, "N")
        elif kind is None:
            fits = [k for ending, k in ENDINGS.items() if word.endswith(ending) and len(word) > len(ending) + 2]
            kind = fits[0] if fits else "N"
        if kind in "NV" and word.endswith("ed") and KIND.get(word) in (None, "V"):
            # an adjective in "a knitted hat", a verb in "is knitted" and "knitted by"
            names_something = following.isalpha() and KIND.get(following, "N") in "NJ"
            kind = "J" if names_something and (not kinds or kinds[-1] in "OJP") else "V"
        kinds.append(kind)
    return [(start, end, kind) for (start, end, _), kind in zip(found, kinds)]


def prune_caption(caption):
    """UIT's text pruning: only nouns, adjectives and pronouns stay. A caption without any is returned as it is."""
    caption = normalize_text(caption)
    return " ".join(caption[start:end] for start, end, kind in tag_words(caption) if kind in "NJP") or caption


def change_colour(caption):
    """The caption with another first colour, hair aside: red becomes blue, others red. None if no colour is named."""
    any_of = "|".join(COLOURS)
    found = re.search(rf"\b({any_of})(\s+({any_of}))*\b(?!\s+(\w+\s+)?hair)", caption, re.I)
    if not found:
        return None
    reddish = "red orange pink crimson maroon burgundy magenta purple violet brown".split()
    new = "blue" if found[0].lower() in reddish else "red"
    return caption[:found.start()] + new + caption[found.end():]


# ---- captions: cleaning and augmentation ----------------------------------------------------------------------------

def clean_caption(caption):
    """TBPS-CLIP's cleaning, for training and search: lower case, . ! " ( ) * # : ; ~ become spaces, runs of white
    space become one space, at most 77 words. Commas, hyphens and apostrophes stay. "..." becomes the empty string."""
    caption = re.sub(r'[.!"()*#:;~]', " ", caption.lower())
    caption = re.sub(r"\s{2,}", " ", caption).rstrip("\n").strip(" ")
    return " ".join(caption.split(" ")[:77])


# For synonym replacement and insertion, where the papers use WordNet. Extend at will.
SYNONYMS = [words.split() for words in """man male guy gentleman | woman lady female | person pedestrian individual |
    young youthful | has possesses | wearing sporting | wears sports | carrying holding toting | carries holds |
    walking strolling striding | standing waiting | dressed clad clothed | big large | small little | long lengthy |
    short brief | dark deep | light pale bright | thin slim slender | heavy stout | striped stripy |
    checked checkered plaid | also additionally | backpack rucksack | handbag purse | trousers pants slacks |
    shoes footwear | sneakers trainers | glasses spectacles | hat headgear | jacket windbreaker |
    picture photo image""".split("|")]
SYNONYM_OF = {word: [w for w in words if w != word] for words in SYNONYMS for word in words}
PROTECTED = set(COLOURS).union(*GARMENTS)                               # from CTLG's approximate text


def replace_synonyms(words, rate, rng):
    """Replaces rate * len(words) words by synonyms, at least one if the table has any."""
    words = list(words)
    able = sorted({w for w in words if w in SYNONYM_OF})
    for old in rng.sample(able, min(len(able), max(1, int(rate * len(words))))):
        new = rng.choice(SYNONYM_OF[old])
        words = [new if w == old else w for w in words]
    return words


def insert_synonyms(words, rate, rng):
    """Inserts synonyms of the words at random places, rate * len(words) times, at least once."""
    words = list(words)
    if able := [w for w in words if w in SYNONYM_OF]:
        for _ in range(max(1, int(rate * len(words)))):
            words.insert(rng.randrange(len(words)), rng.choice(SYNONYM_OF[rng.choice(able)]))
    return words


def swap_words(words, rate, rng):
    """Swaps two words, rate * len(words) times, at least once."""
    words = list(words)
    for _ in range(max(1, int(rate * len(words))) if len(words) > 1 else 0):
        i, j = rng.sample(range(len(words)), 2)
        words[i], words[j] = words[j], words[i]
    return words


def delete_words(words, rate, rng):
    """Deletes each word with probability `rate`, but never all of them."""
    return [w for w in words if rng.random() >= rate] or [rng.choice(words)] if words else []


def approximate_caption(caption, rng, protect=True):
    """CTLG's approximate text. Of the N words and punctuation marks, a fifth (1 to 10) are replaced by synonyms,
    deleted one by one, or deleted as one run; which of the three is drawn.

    protect   colours and garments are neither replaced nor deleted one by one (the paper; the official code does not
              protect them). A caption that would lose all its words is returned as it is."""
    found = list(WORD.finditer(caption))
    operation, n = rng.choice(["synonym", "crop", "delete"]), max(1, min(10, math.ceil(len(found) / 5)))
    able = [k for k, m in enumerate(found) if m[0][0].isalnum() and not (protect and m[0].lower() in PROTECTED)]
    if operation == "crop":
        start = rng.randrange(max(1, len(found) - n + 1))
        changed = dict.fromkeys(range(start, start + n), "")
    elif operation == "delete":
        changed = dict.fromkeys(rng.sample(able, min(n, len(able))), "")
    else:
        able = [k for k in able if found[k][0].lower() in SYNONYM_OF]
        changed = {k: rng.choice(SYNONYM_OF[found[k][0].lower()]) for k in rng.sample(able, min(n, len(able)))}
    said, end = "", 0
    for k, m in enumerate(found):
        word = changed.get(k, m[0])
        if word:
            said += caption[end:m.start()] + word                       # with the white space before the word
        end = m.end()
    said = said.strip()
    return said if any(c.isalnum() for c in said) else caption


TEXT_OPS = {"synonym": replace_synonyms, "insertion": insert_synonyms, "swap": swap_words, "deletion": delete_words}


def augment_caption(caption, rng, deletion=0.05, synonym=0.0, insertion=0.0, swap=0.0, eda=0.0, prune=0.0,
                    approximate=0.0, protect=True):
    """Text augmentation by rates, 0 = off: prune (probability, UIT), approximate (probability, CTLG), then synonym,
    insertion, swap and deletion (fraction of the words, TBPS-CLIP's study), then eda, one of these four at random
    (arXiv 1901.11196). White space is collapsed. A caption with words keeps at least one."""
    if prune and rng.random() < prune:
        caption = prune_caption(caption)
    if approximate and rng.random() < approximate:
        caption = approximate_caption(caption, rng, protect)
    words = caption.split()
    for name, rate in dict(synonym=synonym, insertion=insertion, swap=swap, deletion=deletion).items():
        if rate:
            words = TEXT_OPS[name](words, rate, rng)
    if eda:
        words = TEXT_OPS[rng.choice(list(TEXT_OPS))](words, eda, rng)
    return " ".join(words)


# ---- tokens: CLIP's byte-pair encoding ------------------------------------------------------------------------------

CONTEXT = 77
PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
VOCABULARIES = ["tokenizer.json", "merges.txt", "bpe_simple_vocab_16e6.txt.gz"]
OPENAI_VOCABULARY = "https://github.com/openai/CLIP/raw/main/clip/bpe_simple_vocab_16e6.txt.gz"
# What ftfy does to clean text: quotes straight, ligatures split, full-width forms narrow. It also repairs mojibake;
# that is left out.
PLAIN = {ord(c): plain for plain, group in {
    "'": "\u2018\u2019\u201a\u201b\u02bc", '"': "\u201c\u201d\u201e\u201f", "ff": "\ufb00", "fi": "\ufb01",
    "fl": "\ufb02", "ffi": "\ufb03", "ffl": "\ufb04", "st": "\ufb05\ufb06", "ij": "\u0133"}.items() for c in group}
PLAIN |= {code: chr(code - 0xfee0) for code in range(0xff01, 0xff5f)} | {0x3000: " "}
CONTROL = [*range(0x09), 0x0b, *range(0x0e, 0x20), 0x7f, *range(0x206a, 0x2070), 0xfeff, *range(0xfff9, 0xfffd)]
PLAIN |= dict.fromkeys(CONTROL)                                         # removed, as by ftfy


def normalize_text(text):
    """What CLIP's tokenizer does first: HTML entities unescaped twice, typographic characters made plain, white space
    collapsed, lower case."""
    text = unicodedata.normalize("NFC", html.unescape(html.unescape(text)).translate(PLAIN))
    return " ".join(text.split()).lower()


class Tokenizer:
    """CLIP's byte-level BPE on the `tokenizers` package: list of captions -> (B, 77) int64, SOT + tokens + EOT + zeros.

    merges   pairs of tokens, most frequent first
    mask     whether the id of the last merge becomes a mask symbol; CLIP's vocabulary gives up "jekyll" for it

    Ids: 256 bytes, 256 bytes that end a word, one token per merge, SOT, EOT. So EOT has the largest id, and 0 (also the
    id of "!") is the padding. Long captions are cut, EOT stays. A pair of captions is joined by a full stop, and the
    longer one is cut first."""

    def __init__(self, merges, mask=False):
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")        # the workers of the loader are parallel already
        self.merges = [tuple(m) for m in merges]
        learned = self.merges[:-1] if mask else self.merges
        letters = sorted(pre_tokenizers.ByteLevel.alphabet())           # by code point: the order of OpenAI's file
        tokens = letters + [c + "</w>" for c in letters] + ["".join(m) for m in learned]
        self.sot, self.eot = 512 + len(self.merges), 513 + len(self.merges)
        self.mask, self.vocab = (self.sot - 1 if mask else None), self.eot + 1
        ids = {token: i for i, token in enumerate(tokens)}
        self.bpe = BPETokenizer(models.BPE(ids, learned, end_of_word_suffix="</w>"))
        self.bpe.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Split(Regex(PATTERN), "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])

    def __call__(self, captions):
        assert not isinstance(captions, str), "the tokenizer takes a list of captions"
        tokens = torch.zeros(len(captions), CONTEXT, dtype=torch.int64)
        pairs = [(c, "") if isinstance(c, str) else c for c in captions]
        first = self.bpe.encode_batch([normalize_text(a) for a, _ in pairs])
        second = self.bpe.encode_batch([normalize_text(b) for _, b in pairs])
        for row, a, b in zip(tokens, first, second):
            stop = self.bpe.encode(".").ids if b.ids else []
            room = CONTEXT - 2 - len(stop)                              # without SOT and EOT
            first_room = max(room - len(b.ids), room - room // 2)       # what b leaves, at least half
            ids = [self.sot, *a.ids[:first_room], *stop]
            ids += b.ids[:CONTEXT - 1 - len(ids)] + [self.eot]
            row[:len(ids)] = torch.tensor(ids)
        return tokens

    def masked(self, caption, rng, content=0.15, other=0.15):
        """BERT's masking of one caption -> tokens (77,), targets (77,): the id that was there, -1 where nothing is
        masked.

        Tokens of nouns and adjectives are chosen with probability `content`, others with `other` (UIT: 0.30 and 0.05;
        IRRA: 0.15 both), at least one. Of these 80 % become the mask symbol, 10 % a random token, 10 % stay. SOT, EOT
        and token 0 are never chosen."""
        tokens, text = self([caption])[0], normalize_text(caption)
        targets = torch.full_like(tokens, -1)
        kind_at = {char: kind for start, end, kind in tag_words(text) for char in range(start, end)}
        offsets = self.bpe.encode(text).offsets[:CONTEXT - 2]
        able = [i for i in range(1, len(offsets) + 1) if tokens[i] > 0]
        kinds = {i: kind_at.get(offsets[i - 1][0]) for i in able}
        chosen = [i for i in able if rng.random() < (content if kinds[i] in ("N", "J") else other)]
        for i in chosen or able[:1]:                                    # if none was chosen, mask the first
            targets[i] = tokens[i]
            draw = rng.random() if chosen else 0.0
            if draw < 0.9:
                tokens[i] = self.mask if draw < 0.8 else rng.randrange(1, self.mask)
        return tokens, targets

    def save(self, path):
        """Write the tokenizer.json that Hugging Face's libraries and load_tokenizer read."""
        bpe = BPETokenizer(models.BPE(Tokenizer(self.merges).bpe.get_vocab(), self.merges, end_of_word_suffix="</w>"))
        bpe.normalizer = normalizers.Sequence([
            normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()])
        bpe.pre_tokenizer = self.bpe.pre_tokenizer
        bpe.add_special_tokens(["<|startoftext|>", "<|endoftext|>"])
        bpe.post_processor = processors.TemplateProcessing(
            "<|startoftext|> $A <|endoftext|>",
            special_tokens=[("<|startoftext|>", self.sot), ("<|endoftext|>", self.eot)])
        bpe.save(str(path))


def check_merges(path, merges):
    """Raises ValueError if these are not pairs of tokens, each a letter or made by an earlier merge."""
    if not merges or any(len(m) != 2 or not all(isinstance(part, str) for part in m) for m in merges):
        raise ValueError(f"{path} is not a list of merges, one pair a line")
    letters = pre_tokenizers.ByteLevel.alphabet()
    known = {*letters, *(c + "</w>" for c in letters)}
    for n, (a, b) in enumerate(merges, start=1):
        if not {a, b} <= known:
            raise ValueError(f"{path}: merge {n}, {brief(a)} {brief(b)}, uses a token that no earlier merge makes; "
                             "is the file complete?")
        known.add(a + b)


def load_tokenizer(path, mask=False):
    """CLIP's tokenizer, a callable: list of str -> (B, 77) int64. Raises ValueError naming a file that is damaged or
    belongs to another model.

    path   OpenAI's bpe_simple_vocab_16e6.txt.gz, Hugging Face's tokenizer.json or merges.txt, or a folder with one"""
    what, fix = "the vocabulary of the tokenizer", (
        f"it is one of {', '.join(VOCABULARIES)}, beside the weights or named by --tokenizer\n"
        f"  CLIP's own: curl -LO {OPENAI_VOCABULARY}")
    path = need(path, what, fix)
    if path.is_dir():
        found = [path / name for name in VOCABULARIES if (path / name).exists()]
        path = found[0] if found else need(path / VOCABULARIES[0], what, fix)
    if path.suffix == ".json":
        spec = load_json(path)
        try:
            vocab = dict(spec["model"]["vocab"])
            merges = [m.split(" ") if isinstance(m, str) else list(m) for m in spec["model"]["merges"]]
        except (KeyError, TypeError, ValueError) as e:
            raise ValueError(f"{path} is not a byte-pair tokenizer.json ({type(e).__name__}: {e})") from None
    else:
        vocab, lines = None, read_text(path).splitlines()
        merges = [line.split() for line in lines[1:49152 - 256 - 2 + 1]]                    # as CLIP cuts the file
    check_merges(path, merges)
    tokenizer = Tokenizer(merges, mask)
    if vocab is not None:
        ids = Tokenizer(merges).bpe.get_vocab()
        if differ := [token for token, i in ids.items() if vocab.get(token) != i]:
            raise ValueError(f"{path} numbers its tokens differently from CLIP, e.g. {differ[:3]}; "
                             "it belongs to another model")
    return tokenizer


def train_tokenizer(captions, vocab=1024, mask=False):
    """A Tokenizer of about `vocab` tokens, trained on the captions. It serves where there are no CLIP weights."""
    bpe = BPETokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = Tokenizer([("a", "b")]).bpe.pre_tokenizer
    captions = [normalize_text(c) for c in captions]
    # Ties between merges are settled by the ids of letters, which the trainer takes from a hash table. Naming all
    # letters first, in order, makes the result reproducible.
    words = {word for c in captions for word, _ in bpe.pre_tokenizer.pre_tokenize_str(c)}
    letters = sorted(set("".join(words))) + sorted({word[-1] + "</w>" for word in words})
    trainer = trainers.BpeTrainer(vocab_size=vocab, show_progress=False, end_of_word_suffix="</w>",
                                  special_tokens=letters)
    bpe.train_from_iterator(captions, trainer)
    return Tokenizer(json.loads(bpe.to_str())["model"]["merges"], mask)


# ---- images: augmentation -------------------------------------------------------------------------------------------

NORMS = {  # mean and standard deviation of the channels
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),                         # some of LAION's models, e.g. their ViT-L/14
}
POOL = ["jitter", "rotation", "crop", "gray", "flip", "erase"]         # what TBPS-CLIP draws from
SEQUENCES = {"stack": POOL, "reid": ["flip", "padcrop", "erase_mean"], "shift": ["flip", "padcrop"], "none": []}
CPU_ONLY = ["blur", "autoaugment", "randaugment", "trivialaugment"]     # not made by make_views
IMAGE_AUG = ["pool", *SEQUENCES, *POOL, "hue", "vflip", *CPU_ONLY]


def mean_std(norm):
    """norm is a name in NORMS, or (mean, std) itself, as the config of another CLIP gives it."""
    return NORMS[norm] if isinstance(norm, str) else norm


def crop_ratio(size, low=3 / 4, high=4 / 3):
    """Aspect ratios of random crops relative to the frame, so that tall frames do not lose heads."""
    return low * size[1] / size[0], high * size[1] / size[0]


def image_ops(size):
    """The augmentations by name, on float images (3, H, W) in [0, 1]. Strengths are those of TBPS-CLIP's code, as the
    paper gives none. Erased areas are black."""
    return {
        "jitter": v2.ColorJitter(0.1, 0.1, 0.1),
        "rotation": v2.RandomRotation(15),
        "crop": v2.RandomResizedCrop(size, scale=(0.9, 1.0), ratio=crop_ratio(size), antialias=True),
        "gray": v2.RandomGrayscale(0.1),
        "flip": v2.RandomHorizontalFlip(0.5),
        "erase": v2.RandomErasing(0.5, scale=(0.10, 0.20), ratio=(0.3, 3.3), value=0),
        "hue": v2.ColorJitter(hue=0.1),
        "blur": v2.GaussianBlur(3),
        "vflip": v2.RandomVerticalFlip(0.5),
        "padcrop": v2.RandomCrop(size, padding=max(1, round(10 * size[0] / 384))),
        "autoaugment": v2.AutoAugment(),
        "randaugment": v2.RandAugment(2, 9),
        "trivialaugment": v2.TrivialAugmentWide(),
    }


def to_uint8(image):
    """PIL image -> uint8 (3, H, W). Contiguous: all that follows is twice as fast."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


class Resize:
    """PIL image -> float (3, H, W) in [0, 1], stretched to size (H, W) as CLIP recipes do: the aspect ratio is lost."""

    def __init__(self, size, resize):
        self.size = tuple(size)
        self.filter = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}[resize]

    def picture(self, image):
        """The same as a PIL image."""
        return image if image.size == self.size[::-1] else image.resize(self.size[::-1], self.filter)

    def __call__(self, image):
        return to_uint8(self.picture(image)).float() / 255


class TrainView:
    """An image for the image-text losses: PIL image -> (3, H, W), scaled, augmented, normalised.

    image_aug   pool: two of POOL, drawn with replacement, applied in drawn order (TBPS-CLIP);  stack: all of POOL
                reid: flip, pad by 10 of 384 pixels and crop, normalise, erase 2 to 40 % with the mean (IRRA)
                shift: reid without erasing (CTLG);  none;  or one name of image_ops"""

    def __init__(self, size, image_aug="pool", norm="imagenet", resize="bilinear"):
        assert image_aug in IMAGE_AUG, image_aug
        self.resize, self.ops, self.image_aug = Resize(size, resize), image_ops(size), image_aug
        self.normalize = v2.Normalize(*mean_std(norm))
        # IRRA erases after normalising, with the mean; before normalising, that value is a light grey
        light = [mean * std + mean for mean, std in zip(*mean_std(norm))]
        self.ops["erase_mean"] = v2.RandomErasing(0.5, scale=(0.02, 0.4), ratio=(0.3, 3.3), value=light)

    def draw_names(self):
        drawn = [POOL[i] for i in torch.randint(len(POOL), (2,))]       # always, so that seeded runs stay the same
        return drawn if self.image_aug == "pool" else SEQUENCES.get(self.image_aug, [self.image_aug])

    def __call__(self, image):
        pixels = self.resize(image)
        for name in self.draw_names():
            pixels = self.ops[name](pixels)
        return self.normalize(pixels)

    def draw(self, image):
        """-> the scaled image as uint8 (3, H, W), and the operations of its view; see make_views."""
        picture = to_uint8(self.resize.picture(image))
        return picture, [step for name in self.draw_names() for step in draw_operations(self.ops[name], picture)]


class SelfView:
    """An image for the self-supervised loss, with the augmentations of SimSiam, as in TBPS-CLIP: PIL -> (3, H, W)."""

    def __init__(self, size, norm="imagenet"):
        self.crop = v2.RandomResizedCrop(size, scale=(0.2, 1.0), ratio=crop_ratio(size), antialias=True)
        self.colours = [v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.8), v2.RandomGrayscale(0.2)]
        self.normalize = v2.Normalize(*mean_std(norm))

    def __call__(self, image):
        image = self.crop(image)
        for transform in self.colours:
            image = transform(image)
        blur, sigma, flip = torch.rand(3).tolist()
        if blur < 0.5:
            image = image.filter(ImageFilter.GaussianBlur(0.1 + 1.9 * sigma))
        if flip < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return self.normalize(to_uint8(image).float() / 255)

    def draw(self, image):
        """-> the cropped image as uint8 (3, H, W), and the operations of its view; see make_views."""
        picture = to_uint8(self.crop(image))
        operations = [step for transform in self.colours for step in draw_operations(transform, picture)]
        blur, sigma, flip = torch.rand(3).tolist()
        if blur < 0.5:
            operations.append(("blur", 0.1 + 1.9 * sigma))
        if flip < 0.5:
            operations.append(("flip",))
        return picture, operations


class Preprocessing:
    """What a trained model needs to know about its inputs. A checkpoint stores `settings`; Preprocessing(**settings)
    is the same again.

    size (H, W) in pixels;  norm as in mean_std;  resize: bilinear or bicubic;  clean: whether captions are cleaned"""

    def __init__(self, size, norm="imagenet", resize="bicubic", clean=True):
        self.settings = dict(size=tuple(size), norm=norm, resize=resize, clean=clean)
        self.size, self.clean, self.resize = tuple(size), clean, Resize(size, resize)
        self.mean, self.std = mean_std(norm)
        self.normalize = v2.Normalize(self.mean, self.std)

    def image(self, image):
        """A path, uint8 array (H, W, 3) or PIL image -> pixels (3, H, W), scaled and normalised."""
        return self.normalize(self.resize(load_image(image)))

    def text(self, caption):
        """The caption as in training."""
        return clean_caption(caption) if self.clean else caption


# ---- images: augmentation on the device -----------------------------------------------------------------------------
#
# With --augment-on-device the loader scales and crops images to uint8 and only draws their augmentation, with the
# random numbers of TrainView and SelfView. make_views then makes the views of a whole batch on the GPU. An operation
# is a name in OPERATIONS and its numbers. It acts on the images (n, 3, H, W) in [0, 1] that have drawn it, and takes
# each number as (n, 1, 1, 1). tests/test_augment_on_device.py states how much these views differ from those of the CPU.

JITTER = ["brightness", "contrast", "saturation", "hue"]                # as ColorJitter numbers them
DRAWN = {  # transform: name of the operation, its numbers as make_params names them
    v2.RandomRotation: ("rotation", ["angle"]),
    v2.RandomResizedCrop: ("crop", ["top", "left", "height", "width"]),
    v2.RandomGrayscale: ("gray", []),
    v2.RandomHorizontalFlip: ("flip", []),
    v2.RandomVerticalFlip: ("vflip", []),
}


def draw_operations(transform, picture):
    """What a transform would do to a picture (3, H, W), with the same random draws: a list of (name, *numbers)."""
    if hasattr(transform, "p") and torch.rand(1) >= transform.p:
        return []
    if isinstance(transform, v2.RandomApply):
        return draw_operations(transform.transforms[0], picture)
    drawn = transform.make_params([picture])
    if isinstance(transform, v2.ColorJitter):
        factors = [(JITTER[k], drawn[f"{JITTER[k]}_factor"]) for k in drawn["fn_idx"]]
        return [(name, factor) for name, factor in factors if factor is not None]
    if isinstance(transform, v2.RandomErasing):
        if drawn["v"] is None:                                          # no box has fitted
            return []
        return [("erase", *(drawn[key] for key in "ijhw"), *drawn["v"].flatten().expand(3).tolist())]
    if isinstance(transform, v2.RandomCrop):
        left, top, _, _ = drawn["padding"]
        return [("shift", drawn["top"] - top, drawn["left"] - left)]
    name, keys = DRAWN[type(transform)]
    return [(name, *(drawn[key] for key in keys))]


def rows_and_columns(pixels):
    """The coordinates of pixels (n, 3, H, W): y (H, 1) and x (W,)."""
    H, W = pixels.shape[-2:]
    return torch.arange(H, device=pixels.device)[:, None], torch.arange(W, device=pixels.device)


def sample(pixels, y, x, mode, outside):
    """Pixels at rows y and columns x, which are fractions and broadcast to (n, 1, H, W)."""
    H, W = pixels.shape[-2:]
    y, x = torch.broadcast_tensors(y, x)
    grid = torch.stack([(2 * x + 1) / W - 1, (2 * y + 1) / H - 1], dim=-1)[:, 0]                        # (n, H, W, 2)
    return F.grid_sample(pixels, grid, mode, outside, align_corners=False)


gray = v2.functional.rgb_to_grayscale


def blend(pixels, base, factor):
    return (factor * pixels + (1 - factor) * base).clamp(0, 1)


def shift_hue(pixels, turn):
    """Add a part of a turn to the hue of HSV colours."""
    high, low = pixels.amax(dim=1, keepdim=True), pixels.amin(dim=1, keepdim=True)
    chroma = high - low                                                                                 # (n, 1, H, W)
    red, green, blue = ((high - pixels) / chroma.clamp(min=1e-6)).split(1, dim=1)
    hue = torch.where(red == 0, blue - green, torch.where(green == 0, 2 + red - blue, 4 + green - red)) + 6 * turn
    place = torch.cat([hue + 5, hue + 3, hue + 1], dim=1) % 6           # of each channel on the circle of hues
    return high - chroma * torch.minimum(place, 4 - place).clamp(0, 1)


def rotation(pixels, angle):
    """Turn around the centre. Without a matrix product, which may use TF32: too coarse for coordinates."""
    y, x = rows_and_columns(pixels)
    middle_y, middle_x = (pixels.shape[-2] - 1) / 2, (pixels.shape[-1] - 1) / 2
    y, x = y - middle_y, x - middle_x
    sin, cos = torch.deg2rad(angle).sin(), torch.deg2rad(angle).cos()
    return sample(pixels, sin * x + cos * y + middle_y, cos * x - sin * y + middle_x, "nearest", "zeros")


def crop(pixels, top, left, height, width):
    """Cut out a box and stretch it to the size of the image."""
    y, x = rows_and_columns(pixels)
    y = ((y + 0.5) * height / pixels.shape[-2] - 0.5).clamp(min=0)
    x = ((x + 0.5) * width / pixels.shape[-1] - 0.5).clamp(min=0)
    return sample(pixels, top + torch.minimum(y, height - 1), left + torch.minimum(x, width - 1), "bilinear", "border")


def shift(pixels, top, left):
    y, x = rows_and_columns(pixels)
    return sample(pixels, y + top, x + left, "nearest", "zeros")


def erase(pixels, top, left, height, width, red, green, blue):
    y, x = rows_and_columns(pixels)
    hole = (y >= top) & (y < top + height) & (x >= left) & (x < left + width)                           # (n, 1, H, W)
    return torch.where(hole, torch.cat([red, green, blue], dim=1), pixels)


def blur(pixels, sigma):
    """Gaussian blur, one direction after the other."""
    n, channels, H, W = pixels.shape
    reach = 6                                                           # pixels: three times the largest sigma
    weights = torch.exp(-torch.arange(-reach, reach + 1, device=pixels.device) ** 2 / (2 * sigma[:, :, 0] ** 2))
    weights = (weights / weights.sum(dim=2, keepdim=True)).repeat_interleave(channels, dim=0)           # (3n, 1, 13)
    pixels = F.pad(pixels, 4 * [reach], mode="replicate").view(1, n * channels, H + 2 * reach, W + 2 * reach)
    pixels = F.conv2d(pixels, weights[:, :, :, None], groups=n * channels)
    return F.conv2d(pixels, weights[:, :, None], groups=n * channels).view(n, channels, H, W)


OPERATIONS = {  # name: function, how many numbers it takes
    "brightness": (lambda pixels, factor: blend(pixels, 0, factor), 1),
    "contrast": (lambda pixels, factor: blend(pixels, gray(pixels).mean(dim=(1, 2, 3), keepdim=True), factor), 1),
    "saturation": (lambda pixels, factor: blend(pixels, gray(pixels), factor), 1),
    "hue": (shift_hue, 1),
    "gray": (lambda pixels: gray(pixels, num_output_channels=3), 0),
    "rotation": (rotation, 1),
    "crop": (crop, 4),
    "shift": (shift, 2),
    "flip": (v2.functional.horizontal_flip, 0),
    "vflip": (v2.functional.vertical_flip, 0),
    "erase": (erase, 7),
    "blur": (blur, 1),
}


def group_operations(views):
    """Drawn views -> what make_views takes. A view is a list of one (picture, operations), or two to be mixed.

    pictures (N, 3, H, W) uint8, all second ones last;  mixed (M,): the views of these M
    steps: a list of (name, n);  rows (K,): the n pictures of each step in turn;  numbers (K, 7): theirs, padded"""
    mixed = [n for n, view in enumerate(views) if len(view) == 2]
    drawn = [view[0] for view in views] + [views[n][1] for n in mixed]
    groups = defaultdict(list)                                          # (0, "flip"): those that begin with a flip
    for row, (_, operations) in enumerate(drawn):
        for place, (name, *numbers) in enumerate(operations):
            groups[place, name].append((row, numbers + [0.0] * (7 - len(numbers))))
    entries = [entry for key in sorted(groups) for entry in groups[key]]
    return dict(pictures=torch.stack([picture for picture, _ in drawn]), mixed=torch.tensor(mixed, dtype=torch.int64),
                steps=[(key[1], len(groups[key])) for key in sorted(groups)],
                rows=torch.tensor([row for row, _ in entries], dtype=torch.int64),
                numbers=torch.tensor([numbers for _, numbers in entries]).view(-1, 7))


def make_views(batch, norm):
    """A batch with what group_operations made, on the device -> the batch with pixels (V, B, 3, H, W) instead."""
    rest = dict(batch)
    pictures, mixed, steps, rows, numbers = (rest.pop(key) for key in ("pictures", "mixed", "steps", "rows", "numbers"))
    pixels, counts = pictures.float() / 255, [n for _, n in steps]
    for (name, _), chosen, values in zip(steps, rows.split(counts), numbers.split(counts)):
        operation, takes = OPERATIONS[name]
        pixels.index_copy_(0, chosen, operation(pixels[chosen], *values.T[:takes, :, None, None, None]))
    pixels, others = pixels.split([len(pixels) - len(mixed), len(mixed)])
    pixels.index_copy_(0, mixed, (pixels[mixed] + others) / 2)
    for channel, mean, std in zip(pixels.unbind(dim=1), *mean_std(norm)):
        channel.sub_(mean).div_(std)                                    # numbers, not tensors, which would be copied
    return rest | dict(pixels=pixels.view(-1, len(rest["pid"]), *pixels.shape[1:]))


# ---- batches --------------------------------------------------------------------------------------------------------

def derive_seed(*numbers):
    """A 63-bit seed from whole numbers, like (seed, epoch, item). Similar numbers give unrelated seeds."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]) >> 1


class Pairs(torch.utils.data.Dataset):
    """Training items, one (image, caption) pair each: an image with two captions is two items.

    pairs[epoch, i] is item i as it looks in this epoch. All random draws are functions of (seed, epoch, i), whichever
    process makes them, so a resumed run continues exactly.

    views, self_views   number of TrainViews and SelfViews of the image, which come first and last in pixels
    texts, self_texts   number of augmented captions;  text: rates for augment_caption
    clean               clean captions first (TBPS-CLIP)
    back_translation    probability to start from the caption's entry in captions_bt, if there is one
    mixup               probability to mix an item with a random one, as in CTLG's code: the mean of the pixels, and
                        the captions of both as pairs
    on_device           only draw the views, for make_views on the device. A view is then a list of the images that it
                        mixes: one, or two with mixup"""

    def __init__(self, records, size, seed=0, views=1, self_views=0, texts=1, self_texts=0, image_aug="pool",
                 norm="imagenet", resize="bilinear", clean=True, back_translation=0.1, text=None, mixup=0.0,
                 on_device=False):
        assert not on_device or image_aug not in CPU_ONLY, f"make_views cannot make {image_aug}"
        cleaned = clean_caption if clean else str
        self.items = [(r, n) for r in records for n in range(len(r["captions"]))]
        self.images = [i for i, r in enumerate(records) for _ in r["captions"]]             # the record of each item
        self.captions = [cleaned(r["captions"][n]) for r, n in self.items]
        self.translated = [cleaned("".join(r.get("captions_bt", [])[n:n + 1])) for r, n in self.items]  # "" for none
        label = {pid: n for n, pid in enumerate(sorted({r["pid"] for r in records}))}       # ids have gaps, classes not
        self.pids = [label[r["pid"]] for r, _ in self.items]            # 0 ... P-1, as id_loss needs them
        self.persons = len(label)
        self.views = [TrainView(size, image_aug, norm, resize)] * views + [SelfView(size, norm)] * self_views
        self.resize, self.train_views = Resize(size, resize), views
        self.texts, self.back_translation, self.text = texts + self_texts, back_translation, text or {}
        self.seed, self.mixup, self.on_device = seed, mixup, on_device

    def __len__(self):
        return len(self.items)

    def __getitem__(self, epoch_and_item):
        epoch, i = epoch_and_item
        seed = derive_seed(self.seed, epoch, i)
        torch.default_generator.manual_seed(seed)       # torch.manual_seed would take 0.3 ms to look for GPUs
        rng = random.Random(seed)
        captions, pixels = self.augment(i, rng)
        if self.mixup and rng.random() < self.mixup:
            others, other_pixels = self.augment(rng.randrange(len(self)), rng)
            captions = list(zip(captions, others))
            if self.on_device:
                pixels = [view + other for view, other in zip(pixels, other_pixels)]
            else:
                pixels = (pixels + other_pixels) / 2
        return dict(pixels=pixels, captions=captions, pid=self.pids[i], image=self.images[i], item=i, seed=seed)

    def augment(self, i, rng):
        """The augmented captions of item i, and its pixels (V, 3, H, W) or, on_device, its drawn views."""
        captions = []
        for _ in range(self.texts):
            translated = rng.random() < self.back_translation and self.translated[i]
            captions.append(augment_caption(translated or self.captions[i], rng, **self.text))
        image = load_image(self.items[i][0]["image"])
        images = [self.resize.picture(image)] * self.train_views        # scaled once; SelfView crops the image itself
        images += [image] * (len(self.views) - self.train_views)
        if self.on_device:
            return captions, [[view.draw(image)] for view, image in zip(self.views, images)]
        return captions, torch.stack([view(image) for view, image in zip(self.views, images)])


def trim_padding(tokens):
    """ids (B, 77) -> ids up to the longest caption of the batch, (B, T)."""
    return tokens[:, :int(tokens.argmax(dim=1).max()) + 1].contiguous()


def collate(tokenizer, items, mask=None, trim=True):
    """Items -> batch: pixels (V, B, 3, H, W), tokens (U, B, T), and pid, image (record) and item, each (B,). T is the
    length of the longest caption, or 77 without trim. Shapes that depend on tokens are computed here, on the CPU.
    Drawn views are grouped for make_views, which puts pixels in their place.

    mask = (content, other), the rates of Tokenizer.masked, adds masked (B, T), the masked first caption of each item;
    positions (M,), the places of the masked tokens in it, flattened; and targets (M,), the ids of these tokens."""
    tokens = tokenizer([c for item in items for c in item["captions"]])
    tokens = trim_padding(tokens) if trim else tokens
    T = tokens.shape[1]
    batch = dict(tokens=tokens.view(len(items), -1, T).transpose(0, 1).contiguous())
    views = [item["pixels"] for item in items]
    if torch.is_tensor(views[0]):
        batch["pixels"] = torch.stack(views, dim=1)
    else:
        batch |= group_operations([view for same_number in zip(*views) for view in same_number])        # V * B views
    for key in ("pid", "image", "item"):
        batch[key] = torch.tensor([item[key] for item in items])
    if mask:
        rows = [tokenizer.masked(item["captions"][0], random.Random(item["seed"] + 1), *mask) for item in items]
        masked, targets = (torch.stack(column)[:, :T].contiguous() for column in zip(*rows))
        positions = (targets.flatten() >= 0).nonzero()[:, 0]
        batch |= dict(masked=masked, positions=positions, targets=targets.flatten()[positions])
    return batch


def random_count_order(pids, batch, rng):
    """UIT's sampler: each person's items are cut into groups of 1 or 2 (drawn per person and epoch; a remainder is left
    out). batch / 2 persons that still have groups give one each, until too few are left."""
    items_of = defaultdict(list)
    for item, pid in enumerate(pids):
        items_of[pid].append(item)
    groups = {}
    for pid, items in items_of.items():
        k = rng.randint(1, 2)
        if len(items) < k:
            items = items + rng.choices(items, k=k - len(items))
        items = rng.sample(items, len(items))
        groups[pid] = [items[j:j + k] for j in range(0, len(items) - k + 1, k)]
    able, order, persons = sorted(groups), [], batch // 2
    if len(able) < persons:
        raise ValueError(f"sampler=random-count needs {persons} persons for batch={batch}; the set has {len(able)}")
    while len(able) >= persons:
        for pid in rng.sample(able, persons):
            order += groups[pid].pop()
        able = [pid for pid in able if groups[pid]]
    return order


def view_batches(pids, batch, images, drop_last, rng):
    """LCR2S: groups of up to 4 images of a person stay together. No image meets itself, so batches are up to 3 items
    short."""
    captions, items_of, chunks, k = defaultdict(list), defaultdict(list), [[]], min(4, batch)
    for item, image in enumerate(images):
        captions[image].append(item)
    for items in captions.values():
        items_of[pids[items[0]]].append(rng.choice(items))
    groups = []
    for items in items_of.values():
        items = rng.sample(items, len(items))
        groups += [items[j:j + k] for j in range(0, len(items), k)]
    for group in rng.sample(groups, len(groups)):
        if len(chunks[-1]) + len(group) > batch:
            chunks.append([])
        chunks[-1] += group
    return chunks[:-1] if drop_last and len(chunks[-1]) <= batch - k else chunks


def batches(sampler, pids, batch, seed, images=None, drop_last=True):
    """One epoch as a list of batches of item numbers.

    sampler   random: every item once, shuffled
              random-count: one or two items of a person side by side (UIT)
              views: every image once with one of its captions, up to 4 images of a person in the same batch (LCR2S)
    pids      the person of each item;  images (for views): the image of each item
    drop_last leaves out a last batch that is smaller than the others
    Raises ValueError if random-count has too few persons for a batch."""
    rng = random.Random(seed)
    if sampler == "views":
        return view_batches(pids, batch, images, drop_last, rng)
    order = rng.sample(range(len(pids)), len(pids)) if sampler == "random" else random_count_order(pids, batch, rng)
    chunks = [order[j:j + batch] for j in range(0, len(order), batch)]
    return chunks[:-1] if drop_last and chunks and len(chunks[-1]) < batch else chunks


# ---- the frame of every command -------------------------------------------------------------------------------------

def command(main, stopped="stopped"):
    """Run the main function of a script and exit: a user's mistake prints one sentence and gives exit code 2, Ctrl-C
    prints `stopped` (or what the script raised it with) and gives 130."""
    code = 0
    try:
        main()
    except KeyboardInterrupt as e:
        print(e if e.args else stopped, file=sys.stderr)
        code = 130
    except torch.OutOfMemoryError as e:
        print(f"error: {str(e).split('. ')[0]}\n  In training, --micro-batch M and --checkpoint-blocks compute the "
              "same in less memory; or lower --batch", file=sys.stderr)
        code = 2
    except BrokenPipeError:                                             # ... | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (FileNotFoundError, ValueError, FloatingPointError, OSError) as e:
        sentence = str(e).rsplit(f"\n{type(e).__name__}: ", 1)[-1].rstrip()   # a loader's process adds its traceback
        print(f"error: {sentence}", file=sys.stderr)
        traceback.clear_frames(e.__traceback__)         # they hold the loader, whose processes can end in order now
        code = 2
    sys.exit(code)


# ---- the checker ----------------------------------------------------------------------------------------------------

PUBLISHED = {  # persons, images, captions
    "cuhk": {"train": (11003, 34054, 68126), "val": (1000, 3078, 6158), "test": (1000, 3074, 6156)},
    "icfg": {"train": (3102, 34674, 34674), "test": (1000, 19848, 19848)},
    "rstp": {"train": (3701, 18505, 37010), "val": (200, 1000, 2000), "test": (200, 1000, 2000)},
}
SHEET = """<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title><style>
body{{font:14px system-ui;margin:2em}} figcaption{{font-size:13px}}
figure{{display:inline-flex;gap:1em;width:26em;margin:0 1em 1em 0;vertical-align:top}}
</style><main><h1>{title}: a sample</h1>{cells}</main>"""


def write_sample_sheet(path, title, records):
    """One self-contained page with some images and their captions."""
    cells = []
    for r in records:
        image, buffer = load_image(r["image"]), io.BytesIO()
        image.resize((max(1, round(image.width * 192 / image.height)), 192)).save(buffer, "JPEG", quality=85)
        source = f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
        captions = "<br>".join(html.escape(c) for c in r["captions"])
        cells.append(f'<figure><img alt="person {r["pid"]}" src="{source}">'
                     f"<figcaption><b>{r['pid']}</b> {captions}</figcaption></figure>")
    Path(path).write_text(SHEET.format(title=html.escape(title), cells="".join(cells)), encoding="utf-8")


def check_splits(name, root):
    """Prints the counts of each split beside the published ones -> {split: records}, number of differences."""
    toy, published = name.startswith("toy"), PUBLISHED.get(name, {})
    rows = [] if toy else read_rows(name, root)
    number, images, splits, problems = len(rows), merge_rows(rows), {}, 0
    print(f"{'split':8}{'persons':>10}{'images':>10}{'captions':>10}   published")
    for split in ("train", "val", "test"):
        if published and split not in published:
            print(f"{split:8}{'none published: 200 training persons are held out by training':>62}")
            continue
        records = read(name, root, split) if toy else take_split(images, split, not published, name, root)
        splits[split], found, said = records, counts(records), "-"
        if published:
            differs = found != published[split]
            problems += differs
            said = " / ".join(f"{n:,}" for n in published[split]) + ("   DIFFERS" if differs else "   ok")
        print(f"{split:8}" + "".join(f"{n:10,}" for n in found) + "   " + said)
    if number > len(images):
        print(f"{number - len(images):,} of {number:,} rows name the image of another row; their captions are merged")
    return splits, problems


def check(name, root, sheet):
    """Prints what a data set holds beside what it should, and writes a sample sheet. Returns the number of problems."""
    splits, problems = check_splits(name, root)
    for a, b in (("train", "test"), ("train", "val"), ("val", "test")):
        if both := {r["pid"] for r in splits.get(a, [])} & {r["pid"] for r in splits.get(b, [])}:
            problems += 1
            print(f"{len(both)} persons are in {a} and in {b}, e.g. {min(both)}: scores will be too good")
    records = [r for split in splits.values() for r in split]
    bad = unreadable_images(records)
    for _, reason in bad:
        print(f"bad image: {reason}")
    problems += len(bad)
    if name.startswith("toy"):
        people, garments, colours = synthetic_pedestrians(), ["top", "bottom"], ["top_colour", "bottom_colour"]
        oracles = [people.oracle_score(splits["test"], names) for names in (None, garments + colours, colours)]
        print("synthetic benchmark version {}: oracle R@1 on test {:.1f}, with garment types and colours {:.1f}, with "
              "colours alone {:.1f}".format(people.VERSION, *oracles))
    persons = defaultdict(set)                                          # of each caption
    for r in records:
        for caption in r["captions"]:
            persons[clean_caption(caption)].add(r["pid"])
    shared = sorted((c for c in persons if len(persons[c]) > 1), key=lambda c: -len(persons[c]))
    lengths = [len(c.split()) for r in records for c in r["captions"]]
    print(f"captions: {np.mean(lengths):.1f} words on average, {max(lengths)} at most; "
          f"{len(persons.get('', ()))} persons with an empty one; "
          f"{len(shared)} texts are shared by different persons (label noise)")
    for caption in shared[:3]:
        print(f"  {len(persons[caption])} persons: {caption[:100]}")
    good = [r for r in records if not any(r is b for b, _ in bad)]
    write_sample_sheet(sheet, name, random.Random(0).sample(good, min(24, len(good))))
    print(f"{problems} wrong" if problems else "all is well")
    print(f"sample sheet: {sheet}")
    return problems


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--dataset", choices=DATASETS, default="toy", help="what to check (default: toy)")
    p.add_argument("--data-root", default="data", help="its folder or the parent; for csv the file (default: data)")
    p.add_argument("--sheet", help="where to write the sample sheet (default: check-DATASET.html)")
    p.add_argument("--pictures", metavar="DIR", help="write the pictures of the test split into this folder instead")
    args = p.parse_args()
    if args.pictures:
        folder, records = Path(args.pictures), read(args.dataset, args.data_root, "test")
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"{folder} is a file; --pictures names a folder")
        folder.mkdir(parents=True, exist_ok=True)
        for n, r in enumerate(records):
            load_image(r["image"]).save(folder / f"{r['pid']:04}_{n:05}.png")
        print(f"{len(records):,} pictures in {folder}")
        return
    sheet = Path(args.sheet or f"check-{args.dataset}.html")
    need(sheet.absolute().parent, "the folder for the sample sheet", "make it, or name another file with --sheet")
    sys.exit(1 if check(args.dataset, args.data_root, sheet) else 0)


if __name__ == "__main__":
    command(main)
