"""Data: readers and their checker, CLIP's tokenizer, augmentation, and batches.

    python data.py --dataset cuhk --data-root DIR      counts beside the published ones, missing and broken files, a sample sheet

Every data set is a list of records, one per image:

    dict(image=path or uint8 array (H, W, 3), captions=[str, ...], pid=int)      and perhaps captions_bt, source, scores

The file follows the way of a pair: it is read, its caption cleaned, varied and cut into tokens, its image varied and scaled,
and both end up in a batch. The data sets toy, toy-few and toy-generic are drawn by lab/people.py. Needs torch, torchvision,
numpy, tokenizers and Pillow. Checking CUHK-PEDES means decoding its 40,206 images once."""

import argparse
import base64
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

import numpy as np
import torch
from PIL import ExifTags, Image, ImageFilter, PngImagePlugin
from tokenizers import Regex, Tokenizer as BPETokenizer, models, pre_tokenizers, trainers
from torchvision.transforms import v2
from tqdm import tqdm

# ---- records: reading what people have on disk ----------------------------------------------------------------------

FOLDERS = {"cuhk": "CUHK-PEDES", "icfg": "ICFG-PEDES", "rstp": "RSTPReid"}
DATASETS = ["toy", "toy-few", "toy-generic", "cuhk", "icfg", "rstp", "reid", "csv", "pairs"]
PUBLISHED = {  # persons, images, captions
    "cuhk": {"train": (11003, 34054, 68126), "val": (1000, 3078, 6158), "test": (1000, 3074, 6156)},
    "icfg": {"train": (3102, 34674, 34674), "test": (1000, 19848, 19848)},
    "rstp": {"train": (3701, 18505, 37010), "val": (200, 1000, 2000), "test": (200, 1000, 2000)},
}
ASK = "ask the authors of the set for it (README, 'Your data'), or try --dataset toy, which needs nothing"


def need(path, what, fix):
    """The path, if it exists. If not: what is missing, what is there instead, and what to do about it."""
    path = Path(path)
    if path.exists():
        return path
    there = next(p for p in path.absolute().parents if p.exists())
    seen = sorted(f.name + "/" * f.is_dir() for f in there.iterdir()) if there.is_dir() else []
    raise FileNotFoundError(f"{what} should be at {path}\n  {there} holds: {', '.join(seen[:8]) or 'nothing'}"
                            f"{f' and {len(seen) - 8} more' if len(seen) > 8 else ''}\n  {fix}")


def progress_bar(*items, **options):
    """tqdm. Without a terminal, as in a log file, it prints a line a minute instead of a bar."""
    if not sys.stderr.isatty():
        line = "{desc}: {n_fmt} of {total_fmt}, {elapsed} elapsed, {remaining} left, {rate_fmt}{postfix}\n"
        options |= dict(delay=60, mininterval=60, maxinterval=60, miniters=1, bar_format=line)
    return tqdm(*items, **options)


def read_text(path):
    """The text of a UTF-8 file, with or without a byte-order mark. A .gz file is unpacked.

    Raises ValueError naming the file if it is a damaged archive, a Git LFS pointer, or in another encoding."""
    path = Path(path)
    content = path.read_bytes()
    if content.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path} is a Git LFS pointer instead of the file itself; fetch the file with `git lfs pull`")
    if path.suffix == ".gz":
        try:
            content = gzip.decompress(content)
        except (EOFError, zlib.error, gzip.BadGzipFile) as e:
            raise ValueError(f"{path} is damaged ({e}); is the download complete?") from None
    if content.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in content:
        raise ValueError(f"{path} is in UTF-16, not in UTF-8; save it as UTF-8")
    try:
        return content.decode("utf-8-sig")                              # Excel begins its UTF-8 with a byte-order mark
    except UnicodeDecodeError as e:
        line = 1 + content.count(b"\n", 0, e.start)
        raise ValueError(f"{path}, line {line}: it is not in UTF-8 but probably in {guess_encoding(content)}; "
                         "save it as UTF-8") from None


def guess_encoding(content):
    """GBK writes a Chinese character as two bytes, most of them above 0x7f. In cp1252 such a byte stands alone."""
    runs = re.findall(rb"[\x80-\xff]+", content)
    in_pairs = sum(len(run) % 2 == 0 for run in runs)
    return "GBK (Chinese)" if 2 * in_pairs > len(runs) else "cp1252 (Western European, the default of Windows)"


def load_json(path):
    """Raises ValueError naming the file if it is not JSON."""
    try:
        return json.loads(read_text(path))
    except (json.JSONDecodeError, RecursionError) as e:
        raise ValueError(f"{path} is not JSON ({e}); is the download complete?") from None


def read(name, root="data", split="train", hold_out=True):
    """The records of one split ("train", "val", "test") of a data set; pids are the file's own.

    name: cuhk, icfg, rstp (their folder, or its parent, is `root`), reid (a folder with the `train_reid.json` ... of
    TBPS-CLIP's authors and the images), csv (columns image, caption, pid, split; `root` is the file or its folder), pairs
    (a folder written by generate.py: imgs/ and pairs.jsonl), toy, toy-few (a tenth of the persons), toy-generic (the
    domain for pre-training). A set without a validation split (ICFG-PEDES) gets one: 200 training persons, seed 0;
    `hold_out=False` trains on them too. Rows that name the same image become one record.
    Raises FileNotFoundError and ValueError that name the file and the row."""
    if name not in DATASETS:
        raise ValueError(f"there is no data set {name!r}; known are {', '.join(DATASETS)}")
    if name.startswith("toy"):
        return synthetic_pedestrians().draw("few" if name == "toy-few" and split == "train" else split,
                                            domain="generic" if name == "toy-generic" else "people")
    return take_split(merge_rows(read_rows(name, root)), split, hold_out, name, root)


def read_rows(name, root):
    """All rows of a data set, checked: dict(image, captions, pid, split, where), where = file and row for messages."""
    readers = {"csv": read_csv, "reid": read_reid, "pairs": read_pairs}
    rows = readers.get(name, functools.partial(read_json, name))(Path(root))
    return [check_row(row, row.get("where", f"{name} in {root}, row {n}")) for n, row in enumerate(rows, start=1)]


def check_row(row, where):
    """The row of a reader with a Path or uint8 array as image, lists of sentences as captions, an int as pid. Raises
    ValueError, so that no mistake in the data waits for the end of the first epoch."""
    if missing := {"image", "captions", "pid", "split"} - row.keys():
        raise ValueError(f"{where}: it has no {', '.join(sorted(missing))}")
    image, split = row["image"], row["split"]
    if isinstance(image, str):
        image = Path(image)
    if not isinstance(image, Path) and not (isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.shape[2:] == (3,)):
        raise ValueError(f"{where}: image is {brief(image)}; it must be a path or a uint8 array (H, W, 3)")
    if split not in ("train", "val", "test"):
        raise ValueError(f"{where}: split is {brief(split)}; the splits are train, val and test")
    row = row | dict(image=image, where=where, captions=check_sentences(row["captions"], "captions", where),
                     pid=check_pid(row["pid"], where))
    translations = row.pop("captions_bt", None)
    if translations not in (None, []):
        translations = check_sentences(translations, "captions_bt", where)
        if len(translations) > len(row["captions"]):
            raise ValueError(f"{where}: {len(translations)} captions_bt belong to {len(row['captions'])} captions")
        row["captions_bt"] = translations + [""] * (len(row["captions"]) - len(translations))
    return row


def check_sentences(value, key, where):
    if not isinstance(value, (list, tuple)) or not value or not all(isinstance(text, str) for text in value):
        raise ValueError(f"{where}: {key} are {brief(value)}, not a list of sentences")
    for text in value:
        try:
            text.encode()
        except UnicodeEncodeError as e:
            raise ValueError(f"{where}: {key} hold half of a character, {brief(text[e.start:])} (a lone surrogate)") from None
    return list(value)


def check_pid(value, where):
    """A whole number; "12" and 12.0 count as 12."""
    try:
        pid = int(value)
    except (TypeError, ValueError, OverflowError):
        pid = None
    if pid is None or isinstance(value, float) and pid != value:
        raise ValueError(f"{where}: pid is {brief(value)}, it must be a whole number")
    if not -2 ** 63 <= pid < 2 ** 63:
        raise ValueError(f"{where}: pid is {brief(value)}, it must fit in 64 bits")
    return pid


def brief(value):
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "..."


def merge_rows(rows):
    """One row per image: those that name the same image hand their captions to the first of them."""
    merged = {}
    for row in rows:
        first = merged.setdefault(row["image"] if isinstance(row["image"], Path) else id(row["image"]), row)
        if first is row:
            continue
        if (first["pid"], first["split"]) != (row["pid"], row["split"]):
            raise ValueError(f"{row['where']}: {row['image']} has another pid or split than in {first['where']}")
        if "captions_bt" in first or "captions_bt" in row:              # "" where a caption has no translation
            first["captions_bt"] = sum((r.get("captions_bt", [""] * len(r["captions"])) for r in (first, row)), [])
        first["captions"] = first["captions"] + row["captions"]
    return list(merged.values())


def take_split(rows, split, hold_out, name, root):
    """The rows of one split as records. With hold_out a set without validation split gets one."""
    if hold_out and not any(r["split"] == "val" for r in rows):
        pids = sorted({r["pid"] for r in rows if r["split"] == "train"})
        held = set(random.Random(0).sample(pids, min(200, -(-len(pids) // 10))))
        rows = [r | dict(split="val") if r["split"] == "train" and r["pid"] in held else r for r in rows]
    records = [{k: v for k, v in r.items() if k not in ("split", "where")} for r in rows if r["split"] == split]
    if not records:
        there = ", ".join(f"{n} in {s!r}" for s, n in Counter(r["split"] for r in rows).items())
        raise ValueError(f"{name} in {root} has no images in the split {split!r}; it has {there or 'no rows at all'}")
    for folder in sorted({r["image"].parent for r in records if isinstance(r["image"], Path)}):
        need(folder, f"a folder of images that the {split} split of {name} uses", "unpack the rest of the archive, or " + ASK)
    return records


def synthetic_pedestrians():
    """The module lab/people.py, which draws the data sets toy, toy-few and toy-generic. Imported only when it is used,
    so that this file works alone."""
    need(Path(__file__).parent / "lab" / "people.py", "the code that draws the synthetic pedestrians",
         "copy it beside this file, or name another data set")
    from lab import people
    return people


def read_json(name, root):
    """CUHK-PEDES (Li et al., CVPR 2017), ICFG-PEDES (Ding et al., 2021), RSTPReid (Zhu et al., MM 2021): rows with a split."""
    files = {"cuhk": ["reid_raw.json"], "icfg": ["ICFG-PEDES.json", "ICFG_PEDES.json"], "rstp": ["data_captions.json"]}[name]
    places = [folder / file for folder in (root, root / FOLDERS[name]) for file in files]
    file = next((p for p in places if p.exists()), None)
    if file is None:
        for folder in (root, root / FOLDERS[name]):
            if name == "cuhk" and (folder / "caption_all.json").exists():
                raise FileNotFoundError(f"{folder} holds caption_all.json, the first release of CUHK-PEDES, which has no splits and other ids.\n"
                                        "  The protocol needs reid_raw.json of the same authors; ids cannot be converted")
        need(places[len(files)] if (root / FOLDERS[name]).exists() else places[0], f"the annotation of {FOLDERS[name]}",
             f"--data-root is that folder or its parent; {ASK}")
    rows = load_rows(file, "img_path" if name == "rstp" else "file_path", file.parent / "imgs")
    if name == "rstp" and len({str(r["pid"]) for r in rows if r["split"] == "train"}) == 3901:
        raise ValueError(f"{file} is the early RSTPReid annotation with a wrong split (3901/100/100 persons).\n"
                         "  Get the corrected one (3701/200/200) from the RSTPReid repository")
    return rows


def load_rows(file, path_key, images, split=None):
    """A JSON list with id, captions, split and a path -> rows."""
    entries, keys = load_json(file), ["id", "captions", path_key] + ["split"] * (split is None)
    if not isinstance(entries, list):
        raise ValueError(f"{file} should be a list of objects with {', '.join(keys)}; it is {brief(entries)}")
    rows = []
    for n, e in enumerate(entries, start=1):
        where = f"{file}, row {n}"
        if not isinstance(e, dict):
            raise ValueError(f"{where}: it should be an object with {', '.join(keys)}; it is {brief(e)}")
        if missing := [key for key in keys if key not in e]:
            raise ValueError(f"{where}: it has no {', '.join(missing)}")
        image = images / e[path_key] if isinstance(e[path_key], str) else e[path_key]
        rows.append(dict(image=image, captions=e["captions"], captions_bt=e.get("captions_bt"), pid=e["id"],
                         split=split or e["split"], where=where))
    return rows


def read_reid(root):
    """The files of TBPS-CLIP's authors: train_reid.json, test_reid.json (val_reid.json if there), with back-translations."""
    need(root / "train_reid.json", "the annotation", "--data-root is the folder of train_reid.json and test_reid.json; images below it or its imgs/")
    images = root / "imgs" if (root / "imgs").exists() else root
    files = [(split, root / f"{split}_reid.json") for split in ("train", "val", "test")]
    return [row for split, file in files if file.exists() for row in load_rows(file, "file_path", images, split)]


def read_csv(root):
    """One's own data: a csv file with the columns image, caption, pid, split; a line per caption, images relative to the file."""
    need(root, "the csv file or its folder", "name it with --data-root FILE.csv")
    files = [root] if root.is_file() else sorted(root.glob("*.csv"))
    if len(files) != 1:
        raise ValueError(f"{root} holds {len(files)} .csv files; name the one to read with --data-root FILE.csv")
    file, rows = files[0], []
    lines = csv_lines(file)
    names = next(lines, (1, []))[1]
    if missing := {"image", "caption", "pid", "split"} - set(names):
        raise ValueError(f"{file} lacks the columns {', '.join(sorted(missing))}; it has {', '.join(names) or 'none'} "
                         "(columns are separated by commas)")
    for line, fields in lines:
        where = f"{file}, line {line}"
        if len(fields) != len(names):
            raise ValueError(f"{where}: it has {len(fields)} fields instead of {len(names)}")
        check_quotes(names, fields, where)
        row = dict(zip(names, fields))
        rows.append(dict(image=file.parent / row["image"], captions=[row["caption"]], pid=row["pid"], split=row["split"], where=where))
    return rows


def csv_lines(file):
    """Yields (number of the first line, fields) of each row of a csv file; empty lines are skipped."""
    reader, line = csv.reader(io.StringIO(read_text(file), newline=""), strict=True), 1
    try:
        for fields in reader:
            if fields:
                yield line, fields
            line = reader.line_num + 1
    except csv.Error as e:
        raise ValueError(f"{file}, line {line}: {e}. Is there a stray quotation mark? Inside a quoted caption it is written twice") from None


def check_quotes(names, fields, where):
    """Raises ValueError if a stray quotation mark made one field of several rows. Captions may have several lines, but
    then no line break stands between the end of one row and the beginning of the next."""
    def fits(cells, columns):
        found = dict(zip(columns, cells))
        return found.get("split", "train") in ("train", "val", "test") and found.get("pid", "0").strip().isdigit()

    for k, field in enumerate(fields):
        before, after = names[:k], names[k + 1:]
        parts = [part.split(",") for part in re.split("\r\n|\r|\n", field)]
        for end, start in zip(parts, parts[1:]):
            if len(end) > len(after) and len(start) > len(before) and fits(end[len(end) - len(after):], after) and fits(start, before):
                raise ValueError(f"{where}: a stray quotation mark joins it with the following lines")


def read_pairs(root):
    """A folder of generated pairs: imgs/ and pairs.jsonl, each generated person with an id of its own."""
    file = need(root / "pairs.jsonl", "the list of generated pairs", "such a folder holds imgs/ and pairs.jsonl")
    rows = []
    for n, line in enumerate(read_text(file).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            e = json.loads(line)
            scores = {key: float(value) for key, value in dict(e.get("scores") or {}).items()}
            rows.append(e | dict(image=root / "imgs" / e["image"], source=e["source_image"], scores=scores, where=f"{file}, line {n}"))
        except (json.JSONDecodeError, KeyError, TypeError, ValueError, AttributeError) as e:
            raise ValueError(f"{file}, line {n}, is no generated pair ({type(e).__name__}: {e})") from None
    if not rows:
        raise ValueError(f"{file} has no pairs")
    return rows


def filter_by_score(records, wanted):
    """Those of generated records whose scores reach all of `wanted`, texts KEY=VALUE: the quality gate of PDG, put up when pairs are read. Raises
    ValueError if there are none."""
    for text in wanted:
        key, _, value = text.partition("=")
        try:
            least = float(value)
            if math.isnan(least):
                raise ValueError
        except ValueError:
            raise ValueError(f"--min-score takes KEY=NUMBER, not {text!r}") from None
        if missing := [r for r in records if key not in r.get("scores", {})]:
            raise ValueError(f"{missing[0]['image']} has no score {key!r}; it has {', '.join(missing[0].get('scores', {})) or 'none'}")
        good = [r for r in records if r["scores"][key] >= least]
        if not good:
            raise ValueError(f"no pair reaches {text}; the highest {key} is {max(r['scores'][key] for r in records):.3g}" + " of those that pass the others" * (len(wanted) > 1))
        records = good
    return records


def counts(records):
    """(persons, images, captions)"""
    return len({r["pid"] for r in records}), len(records), sum(len(r["captions"]) for r in records)


# What Pillow raises for damaged files: not only OSError, but whatever its decoders run into
DECODER_ERRORS = (OSError, SyntaxError, ValueError, TypeError, AttributeError, ArithmeticError, AssertionError, LookupError, EOFError,
                  RuntimeError, MemoryError, struct.error, zlib.error, Image.DecompressionBombError)
# A PNG with more than 1 MB of text, XMP or ICC profile is a good picture. All of them together stay below 64 MB
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY
UPRIGHT = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
           5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90}


def load_image(image, least=None):
    """A path, or a uint8 array (H, W, 3) or what becomes one -> PIL image, RGB, upright as its EXIF says.

    least: the picture may come smaller, but no less than so many pixels high and wide; fast for JPEG.
    Raises FileNotFoundError, or ValueError naming the file if it is no picture, cut off or damaged."""
    if not isinstance(image, (str, Path)):
        return Image.fromarray(np.asarray(image))
    try:
        with Image.open(image) as opened:
            if opened.mode.startswith("I"):                             # 16 bits: convert() would cut them off at 255, all white
                return Image.fromarray((np.asarray(opened) / 257).astype(np.uint8)).convert("RGB")
            if least:
                opened.draft("RGB", (least, least))
            opened.load()
            return upright(opened).convert("RGB")
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no image {image}; run python data.py to check the whole set") from None
    except DECODER_ERRORS as e:
        raise ValueError(f"{image} cannot be read as an image ({e or type(e).__name__}); replace it, or leave such files out with --skip-bad") from None


def upright(image):
    """A loaded PIL image turned as the orientation in its EXIF says; as it is where that cannot be read. ImageOps.exif_transpose
    would also write the EXIF anew, and fail on the oddities of other tags."""
    try:
        turn = UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation))
    except DECODER_ERRORS:
        turn = None
    return image if turn is None else image.transpose(turn)


def unreadable_images(records):
    """[(record, why)] of the images that are missing or do not decode; reads every file once."""
    def why(record):
        try:
            load_image(record["image"])
        except (ValueError, FileNotFoundError) as e:
            return str(e)

    with ThreadPoolExecutor() as pool:
        found = progress_bar(pool.map(why, records), total=len(records), desc="decoding", leave=False)
        return [(record, reason) for record, reason in zip(records, found) if reason]


# ---- captions: which words carry the content ------------------------------------------------------------------------

# What kind of word: N noun, J adjective, P pronoun, V verb, O other. Nouns are what is not listed and has no telling ending, so
# only those nouns are here that an ending would mislead. Extend at will.
KINDS = {"P": "he she it they him her his hers its their theirs them himself herself itself themselves i we you my your our me us",
         "O": """a an the this that these those which who whom whose what where when while as and or but nor so yet if because both either neither each
    every all any some no not none another there here in on at of off by to from for with without over under underneath beneath above below behind
    beside besides between across along around near next through during into onto out up down away toward towards against about after before
    until upon inside outside than then too also very quite rather slightly just only still even maybe perhaps possibly probably apparently almost
    well together forward forwards backward backwards ahead straight currently today once twice again one two three four five six seven eight
    nine ten twenty thirty forty fifty half fast since like per via plus except despite instead""",
         "V": """is are was were be been being am has have had having do does did can could may might will would must should wear wears wearing wore worn
    carry carries carrying carried hold holds holding held walking walked stand standing stood sit sits sitting sat ride rides riding rode
    run runs running ran go goes going went seen see sees seem seems appear appears appearing look looking looked face facing faced made make makes
    put puts putting take takes taking taken took keep keeps kept let lets get gets got come comes came hang hangs hanging hung push pushes pull pulls
    pulling drag drags lean leans leaning bend bends bent use uses using used talk talking speaking texting tied tucked dressed clad said says think
    show shows showing shown give gives gave featuring feature features contain contains include includes including consist consists
    reach reaches reaching fall falls falling fell cover covers covering covered match matches try tries trying sling slung draped wrapped
    rolled pulled zipped buttoned unbuttoned untucked swinging moving moves move steps stepping cross crosses crossing wait waits waiting turn turns
    turning turned going pushing dragging reading eating drinking smoking smiling laughing smiles waving checking checks glancing glances jumps laughs
    leads describe describes thrown heading stare stares""",
         "J": """black white red blue green yellow orange purple pink brown grey gray beige tan navy khaki teal maroon turquoise violet crimson cyan magenta golden
    silver gold cream burgundy olive lavender dark light bright pale deep plain solid solid-colored long short medium small large big little tiny tall thin
    slim slender skinny fat heavy stout plump chubby broad wide narrow tight loose baggy fitted young old middle-aged elderly adult male female
    left right front rear upper lower high low full open closed new same other different similar multiple several many few much more most less first
    second last single double casual formal sporty athletic denim leather woolen woollen woolly cotton plastic floral plaid checked checkered chequered striped
    stripy patterned printed spotted dotted camouflage colorful colourful colored coloured multicolored ripped faded torn folded cropped cuffed padded quilted hooded
    sleeveless bare bald curly wavy straightened blond blonde brunette asian african caucasian european visible clear black-and-white round square thick
    average normal dirty clean fashionable free light-weight overweight petite muscular neat sheer uneven auburn charcoal tartan polka-dot
    tie-dye mobile chinese american warm cold wet shiny soft empty own
    such certain shorter longer darker lighter bigger smaller larger taller better matching revealing""",
         "N": """clothing building earring earrings railing stockings legging leggings ring wing string king thing things something anything nothing morning evening
    ceiling painting shopping walking-stick piping lining trimming lettering writing drawing marking markings wedding lady body baby boy key keys tray jersey hoody
    belly family city country party story day way pony tummy trolley bed shed sled kid red-head tie dress watch top back side
    need weed seed feed speed velvet lanyard fanny guy navy-blue bag material"""}
KIND = {word: kind for kind, words in KINDS.items() for word in words.split()}
VERB_OR_NOUN = {"walk", "walks", "looks", "talks", "stands", "ties", "watches", "faces", "falls", "turns", "tops", "backs", "works", "work", "strolls", "strides",
                "poses", "waits", "holds", "steps", "heads", "waves", "matches", "runs", "moves", "covers"}
ENDINGS = {"ly": "O", "ing": "V", "ish": "J", "ous": "J", "ful": "J", "less": "J", "able": "J", "ible": "J", "ive": "J", "ical": "J", "ity": "N", "way": "N", "y": "J"}
WORD = re.compile(r"\w+n't|[^\W\d_]+(?:-[^\W\d_]+)*|\d+|'\w*|[^\w\s]")


@functools.lru_cache(maxsize=2 ** 18)
def tag_words(caption):
    """The words of a caption with their kind, in the order of the text: [(start, end, kind), ...], kinds as in KINDS. A table,
    endings and a little context instead of a tagger to download; tests/tagged.txt tells how often it is right."""
    found = [(m.start(), m.end(), m[0].lower()) for m in WORD.finditer(caption)]
    words = [w for _, _, w in found] + [""]
    kinds = []
    for i, (word, following) in enumerate(zip(words, words[1:])):
        kind, last = KIND.get(word), word.rsplit("-", 1)[-1]
        if not word[0].isalpha():
            kind = "O"
        elif word.endswith("n't"):
            kind = "V"
        elif word in VERB_OR_NOUN:
            subject = kinds[-1:] == ["N"] or i > 0 and words[i - 1] in ("he", "she", "it", "they", "who", "that", "and")
            kind = "V" if subject else "N"
        elif kind is None and last != word:                             # long-sleeved, knee-length, but t-shirt
            kind = "J" if last.endswith("ed") or last in ("length", "sleeve", "style", "size", "high", "neck") else KIND.get(last, "N")
        elif kind is None:
            kind = next((k for ending, k in ENDINGS.items() if word.endswith(ending) and len(word) > len(ending) + 2), "N")
        if kind in "NV" and word.endswith("ed") and KIND.get(word) in (None, "V"):
            named = following.isalpha() and KIND.get(following, "N") in "NJ"                  # "a knitted hat" against "is knitted", "knitted by"
            kind = "J" if named and (not kinds or kinds[-1] in "OJP") else "V"
        kinds.append(kind)
    return [(start, end, kind) for (start, end, _), kind in zip(found, kinds)]


def prune_caption(caption):
    """Only its nouns, adjectives and pronouns (UIT's text pruning); the caption itself where nothing would be left."""
    caption = normalize_text(caption)
    return " ".join(caption[start:end] for start, end, kind in tag_words(caption) if kind in "NJP") or caption


COLOURS = """black white red blue green yellow orange purple pink brown grey gray beige tan navy khaki teal maroon turquoise violet crimson
    cream burgundy olive lavender golden gold silver magenta cyan""".split()
# A line per piece of clothing: words that may stand for the same one
GARMENTS = [line.split() for line in """coat jacket windbreaker parka blazer cardigan vest overcoat raincoat
shirt t-shirt tshirt tee tee-shirt top blouse polo tunic sweatshirt hoodie hoody sweater jumper pullover jersey shirts t-shirts
trousers pants slacks jeans leggings tights sweatpants
shorts
skirt
dress robe romper gown
suit uniform overalls clothes clothing cloth outfit
shoes shoe sneakers trainers boots sandals heels footwear flip-flops
socks
hat cap beanie
scarf
gloves
belt
tie
bag backpack rucksack handbag purse satchel
suitcase
umbrella
glasses sunglasses""".splitlines()]


def change_colour(caption):
    """The caption with another first colour, hair aside: red, or blue where it was a red one. None if it names none."""
    any_of = "|".join(COLOURS)
    found = re.search(rf"\b({any_of})(\s+({any_of}))*\b(?!\s+(\w+\s+)?hair)", caption, re.I)
    if found:
        new = "blue" if found[0].lower() in "red orange pink crimson maroon burgundy magenta purple violet brown".split() else "red"
        return caption[:found.start()] + new + caption[found.end():]


# ---- captions: cleaning and variation -------------------------------------------------------------------------------

def clean_caption(caption):
    """As TBPS-CLIP cleans captions, in training and in search: lower case, . ! " ( ) * # : ; ~ become blanks, runs of white space
    one blank, at most 77 words. Commas, hyphens and apostrophes stay. What it leaves of "..." is the empty string."""
    caption = re.sub(r'[.!"()*#:;~]', " ", caption.lower())
    caption = re.sub(r"\s{2,}", " ", caption).rstrip("\n").strip(" ")
    return " ".join(caption.split(" ")[:77])


# Words for words: synonym replacement and insertion take from here (the papers: WordNet). One line per meaning; extend at will.
SYNONYMS = [line.split(", ") for line in """man, male, guy, gentleman
woman, lady, female
person, pedestrian, individual
wearing, sporting
wears, sports
carrying, holding, toting
carries, holds
walking, strolling, striding
standing, waiting
dressed, clad, clothed
big, large
small, little
long, lengthy
short, brief
dark, deep
light, pale, bright
thin, slim, slender
heavy, stout
young, youthful
striped, stripy
checked, checkered, plaid
backpack, rucksack
handbag, purse
trousers, pants, slacks
shoes, footwear
sneakers, trainers
glasses, spectacles
hat, headgear
jacket, windbreaker
has, possesses
also, additionally
picture, photo, image""".splitlines()]
PROTECTED = set(COLOURS).union(*GARMENTS)                               # from CTLG's approximate text
SYNONYM_OF = {word: [w for w in line if w != word] for line in SYNONYMS for word in line}


def replace_synonyms(words, rate, rng):
    """Puts synonyms for rate * len(words) words, at least one; words without a synonym in the table stay."""
    words = list(words)
    able = sorted({w for w in words if w in SYNONYM_OF})
    for old in rng.sample(able, min(len(able), max(1, int(rate * len(words))))):
        new = rng.choice(SYNONYM_OF[old])
        words = [new if w == old else w for w in words]
    return words


def insert_synonyms(words, rate, rng):
    """Inserts a synonym of one of the words at a random place, rate * len(words) times, at least once."""
    words = list(words)
    if able := [w for w in words if w in SYNONYM_OF]:
        for _ in range(max(1, int(rate * len(words)))):
            words.insert(rng.randrange(len(words)), rng.choice(SYNONYM_OF[rng.choice(able)]))
    return words


def swap_words(words, rate, rng):
    """Exchanges two words, rate * len(words) times, at least once."""
    words = list(words)
    for _ in range(max(1, int(rate * len(words))) if len(words) > 1 else 0):
        i, j = rng.sample(range(len(words)), 2)
        words[i], words[j] = words[j], words[i]
    return words


def delete_words(words, rate, rng):
    """Leaves out each word with probability `rate`; never all of them."""
    return [w for w in words if rng.random() >= rate] or [rng.choice(words)] if words else []


def approximate_caption(caption, rng, protect=True):
    """CTLG's approximate text: one of three operations on a fifth of the N words and punctuation marks, at least 1, at most 10: a synonym
    instead, any of them left out, or as many in a row. Colours and garments are what a caption is about: they are neither replaced nor left
    out, but a row may contain them; with protect=False, as in the official code, they may be. No words left: unchanged."""
    found = list(WORD.finditer(caption))
    operation, n = rng.choice(["synonym", "crop", "delete"]), max(1, min(10, -(-len(found) // 5)))
    able = [k for k, m in enumerate(found) if m[0][0].isalnum() and not (protect and m[0].lower() in PROTECTED)]
    if operation == "crop":
        start = rng.randrange(max(1, len(found) - n + 1))
        changed = dict.fromkeys(range(start, start + n), "")
    elif operation == "delete":
        changed = dict.fromkeys(rng.sample(able, min(n, len(able))), "")
    else:
        able = [k for k in able if found[k][0].lower() in SYNONYM_OF]
        changed = {k: rng.choice(SYNONYM_OF[found[k][0].lower()]) for k in rng.sample(able, min(n, len(able)))}
    ends = [0] + [m.end() for m in found]
    said = "".join(caption[end:m.start()] + changed.get(k, m[0]) if changed.get(k) != "" else "" for k, (m, end) in enumerate(zip(found, ends))).strip()
    return said if any(c.isalnum() for c in said) else caption


TEXT_OPS = {"synonym": replace_synonyms, "insertion": insert_synonyms, "swap": swap_words, "deletion": delete_words}


def augment_caption(caption, rng, deletion=0.05, synonym=0.0, insertion=0.0, swap=0.0, eda=0.0, prune=0.0, approximate=0.0,
                 protect=True):
    """The text augmentations of TBPS-CLIP's study by their rates (0 = off); its recipe is deletion alone. `eda` is one of the
    four at random, as in EDA (arXiv 1901.11196); `prune` is the chance of UIT's text pruning, `approximate` that of CTLG's approximate text,
    which come first. White space is collapsed; a caption with words keeps at least one."""
    caption = prune_caption(caption) if prune and rng.random() < prune else caption
    words = (approximate_caption(caption, rng, protect) if approximate and rng.random() < approximate else caption).split()
    for name, rate in dict(synonym=synonym, insertion=insertion, swap=swap, deletion=deletion).items():
        words = TEXT_OPS[name](words, rate, rng) if rate else words
    return " ".join(TEXT_OPS[rng.choice(list(TEXT_OPS))](words, eda, rng) if eda else words)


# ---- tokens: CLIP's byte-pair encoding ------------------------------------------------------------------------------

CONTEXT = 77
PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
# What ftfy does to clean text, as far as it matters here: straight quotes, no ligatures. (Repairing mojibake is left out.)
PLAIN = {ord(c): plain for plain, group in {"'": "\u2018\u2019\u201a\u201b\u02bc", '"': "\u201c\u201d\u201e\u201f", "ff": "\ufb00", "fi": "\ufb01",
                                            "fl": "\ufb02", "ffi": "\ufb03", "ffl": "\ufb04", "st": "\ufb05\ufb06", "ij": "\u0133"}.items() for c in group}
PLAIN |= {code: chr(code - 0xfee0) for code in range(0xff01, 0xff5f)} | {0x3000: " "}        # full-width forms


def normalize_text(text):
    """HTML entities resolved twice, curly quotes, ligatures and full-width forms made plain, white space collapsed, lower case."""
    text = unicodedata.normalize("NFC", html.unescape(html.unescape(text)).translate(PLAIN))
    return " ".join(text.split()).lower()


class Tokenizer:
    """CLIP's byte-level BPE on the `tokenizers` package: a list of captions -> (B, 77) int64, start + tokens + end + zeros.

    merges: pairs, most frequent first. Ids: 256 bytes, 256 bytes that end a word, a token per merge, start, end. So the
    end-of-text token EOT has the largest id, and 0 (also the id of "!") pads. mask=True gives the id of the last merge to a mask
    symbol; in CLIP's vocabulary that costs the word "jekyll", which is then spelt in pieces. Too long: cut, but EOT stays. A pair of
    captions is joined by a full stop, and the longer one is cut first."""

    def __init__(self, merges, mask=False):
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")        # the loader's workers are our parallelism
        self.merges = [tuple(m) for m in merges]
        learned = self.merges[:-1] if mask else self.merges
        letters = sorted(pre_tokenizers.ByteLevel.alphabet())           # by code point: the order of OpenAI's file
        tokens = letters + [c + "</w>" for c in letters] + ["".join(m) for m in learned]
        self.sot, self.eot = 512 + len(self.merges), 513 + len(self.merges)
        self.mask, self.vocab = (self.sot - 1 if mask else None), self.eot + 1
        self.bpe = BPETokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, learned, end_of_word_suffix="</w>"))
        self.bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(PATTERN), "removed", invert=True),
                                                          pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])

    def __call__(self, captions):
        assert not isinstance(captions, str), "the tokenizer takes a list of captions"
        tokens = torch.zeros(len(captions), CONTEXT, dtype=torch.int64)
        pairs = [(c, "") if isinstance(c, str) else c for c in captions]
        first, second = (self.bpe.encode_batch([normalize_text(c) for c in side]) for side in zip(*pairs)) if pairs else ((), ())
        for row, a, b in zip(tokens, first, second):
            stop, room = self.bpe.encode(".").ids if b.ids else [], CONTEXT - 2
            room -= len(stop)
            ids = [self.sot, *a.ids[:max(room - len(b.ids), room - room // 2)], *stop]
            ids += b.ids[:CONTEXT - 1 - len(ids)] + [self.eot]
            row[:len(ids)] = torch.tensor(ids)
        return tokens

    def masked(self, caption, rng, content=0.15, other=0.15):
        """BERT's masking of one caption -> tokens (77,), and what was asked for: (77,) the token that was there, -1 elsewhere.

        Tokens of nouns and adjectives are chosen with probability `content`, all others with `other` (UIT: 0.30 and 0.05; IRRA: 0.15
        both), at least one; of the chosen ones 80 % become the mask symbol, 10 % any token, 10 % stay. Start, end and token 0 never."""
        tokens, text = self([caption])[0], normalize_text(caption)
        asked = torch.full_like(tokens, -1)
        kind_at = {place: kind for start, end, kind in tag_words(text) for place in range(start, end)}
        offsets = self.bpe.encode(text).offsets[:CONTEXT - 2]
        able = [i for i in range(1, len(offsets) + 1) if tokens[i] > 0]
        chosen = [i for i in able if rng.random() < (content if kind_at.get(offsets[i - 1][0]) in ("N", "J") else other)]
        for i in chosen or able[:1]:
            asked[i] = tokens[i]
            draw = rng.random() if chosen else 0.0
            if draw < 0.9:
                tokens[i] = self.mask if draw < 0.8 else rng.randrange(1, self.mask)
        return tokens, asked


def load_tokenizer(path, mask=False):
    """CLIP's tokenizer from OpenAI's bpe_simple_vocab_16e6.txt.gz, a Hugging Face tokenizer.json or merges.txt, or a folder that
    holds one of them: a callable, list of str -> (B, 77) int64."""
    path = need(path, "the vocabulary of the tokenizer", "it is bpe_simple_vocab_16e6.txt.gz of OpenAI's CLIP, or tokenizer.json of a hub model")
    if path.is_dir():
        names = ["tokenizer.json", "merges.txt", "bpe_simple_vocab_16e6.txt.gz"]
        path = next((path / n for n in names if (path / n).exists()), None) or need(path / names[0], "the vocabulary of the tokenizer", f"or {names[1:]}")
    if path.suffix == ".json":
        spec = load_json(path)
        try:
            vocab = dict(spec["model"]["vocab"])
            merges = [m.split(" ") if isinstance(m, str) else list(m) for m in spec["model"]["merges"]]
        except (KeyError, TypeError, ValueError) as e:
            raise ValueError(f"{path} is not a byte-pair tokenizer.json ({type(e).__name__}: {e})") from None
    else:
        merges = [line.split() for line in read_text(path).splitlines()[1:49152 - 256 - 2 + 1]]           # as CLIP cuts it
    check_merges(path, merges)
    if path.suffix == ".json":
        if differ := [t for t, i in Tokenizer(merges).bpe.get_vocab().items() if vocab.get(t) != i]:
            raise ValueError(f"{path} numbers its tokens differently from CLIP, e.g. {differ[:3]}; it belongs to another model")
    return Tokenizer(merges, mask)


def check_merges(path, merges):
    """Raises ValueError if these are not pairs of tokens, each a letter or made by an earlier merge."""
    if not merges or any(len(m) != 2 or not all(isinstance(part, str) for part in m) for m in merges):
        raise ValueError(f"{path} is not a list of merges, one pair a line")
    letters = pre_tokenizers.ByteLevel.alphabet()
    known = {*letters, *(c + "</w>" for c in letters)}
    for n, (a, b) in enumerate(merges, start=1):
        if not {a, b} <= known:
            raise ValueError(f"{path}: merge {n}, {brief(a)} {brief(b)}, uses a token that no earlier merge makes; is the file complete?")
        known.add(a + b)


def train_tokenizer(captions, vocab=1024, mask=False):
    """A vocabulary of about `vocab` tokens from the captions themselves, for the toy people."""
    bpe = BPETokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = Tokenizer([("a", "b")]).bpe.pre_tokenizer
    captions = [normalize_text(c) for c in captions]
    # The trainer numbers letters that end words in the order of a hash table, and settles ties by number: name all letters first, in order
    words = {word for c in captions for word, _ in bpe.pre_tokenizer.pre_tokenize_str(c)}
    letters = sorted(set("".join(words))) + sorted({word[-1] + "</w>" for word in words})
    bpe.train_from_iterator(captions, trainers.BpeTrainer(vocab_size=vocab, show_progress=False, end_of_word_suffix="</w>", special_tokens=letters))
    return Tokenizer(json.loads(bpe.to_str())["model"]["merges"], mask)


# ---- images: augmentation -------------------------------------------------------------------------------------------

NORMS = {"imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
         "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
         "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))}                    # some of LAION's models, e.g. their ViT-L/14


def mean_std(norm):
    """Mean and standard deviation of the channels: those of a name in NORMS, or `norm` itself, (mean, std), as other CLIPs' configs have them."""
    return NORMS[norm] if isinstance(norm, str) else norm


POOL = ["jitter", "rotation", "crop", "gray", "flip", "erase"]         # what TBPS-CLIP draws from
IMAGE_AUG = ["pool", "stack", "reid", "shift", "none", *POOL, "hue", "blur", "vflip", "autoaugment", "randaugment", "trivialaugment"]


def crop_ratio(size, low=3 / 4, high=4 / 3):
    """Aspect ratios for random crops, relative to the frame: at 224 x 224 the usual 3/4 ... 4/3, and no taller frame loses heads."""
    return low * size[1] / size[0], high * size[1] / size[0]


def image_ops(size):
    """Augmentations of TBPS-CLIP (its code; the paper has no numbers) on float images (3, H, W) in [0, 1]; erased is black."""
    return {"jitter": v2.ColorJitter(0.1, 0.1, 0.1), "rotation": v2.RandomRotation(15),
            "crop": v2.RandomResizedCrop(size, scale=(0.9, 1.0), ratio=crop_ratio(size), antialias=True),
            "gray": v2.RandomGrayscale(0.1), "flip": v2.RandomHorizontalFlip(0.5),
            "erase": v2.RandomErasing(0.5, scale=(0.10, 0.20), ratio=(0.3, 3.3), value=0),
            "hue": v2.ColorJitter(hue=0.1), "blur": v2.GaussianBlur(3), "vflip": v2.RandomVerticalFlip(0.5),
            "padcrop": v2.RandomCrop(size, padding=max(1, round(10 * size[0] / 384))),
            "autoaugment": v2.AutoAugment(), "randaugment": v2.RandAugment(2, 9), "trivialaugment": v2.TrivialAugmentWide()}


class TrainView:
    """The view of an image for the image-text losses: PIL -> (3, H, W), scaled, augmented, normalised. image_aug: one of
    IMAGE_AUG; "pool" is two of POOL drawn with replacement, in drawn order, "stack" all of them, "reid" what IRRA does (mirror, pad
    10 of 384 pixels and crop, after normalising erase 2 to 40 % with the *mean*, so with a light grey), "shift" the same without erasing
    (CTLG), or the name of one."""

    def __init__(self, size, image_aug="pool", norm="imagenet", resize="bilinear"):
        assert image_aug in IMAGE_AUG, image_aug
        self.scale, self.ops, self.image_aug = Scale(size, resize), image_ops(size), image_aug
        self.normalize = v2.Normalize(*mean_std(norm))
        if image_aug == "reid":
            self.normalize = v2.Compose([self.normalize, v2.RandomErasing(0.5, scale=(0.02, 0.4), ratio=(0.3, 3.3), value=list(NORMS[norm][0]))])

    def __call__(self, image):
        names = {"pool": [POOL[i] for i in torch.randint(len(POOL), (2,))], "stack": POOL, "reid": ["flip", "padcrop"], "shift": ["flip", "padcrop"], "none": []}.get(
            self.image_aug, [self.image_aug])
        pixels = self.scale(image)
        for name in names:
            pixels = self.ops[name](pixels)
        return self.normalize(pixels)


class SelfView:
    """One of the two views for self-supervision (SimSiam's, as TBPS-CLIP takes them): PIL -> (3, H, W)."""

    def __init__(self, size, norm="imagenet"):
        self.size = size
        self.crop = v2.RandomResizedCrop(size, scale=(0.2, 1.0), ratio=crop_ratio(size), antialias=True)
        self.colour = v2.Compose([v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.8), v2.RandomGrayscale(0.2)])
        self.finish = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(*mean_std(norm))])

    def __call__(self, image):
        image = self.colour(self.crop(image))
        blur, sigma, mirror = torch.rand(3).tolist()
        if blur < 0.5:
            image = image.filter(ImageFilter.GaussianBlur(0.1 + 1.9 * sigma))
        if mirror < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return self.finish(image)


class Scale:
    """PIL -> float (3, H, W) in [0, 1], stretched to size (H, W): the aspect ratio is given up, as CLIP recipes do."""

    def __init__(self, size, resize):
        self.size, self.how = tuple(size), {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}[resize]

    def fit(self, image):
        return image if image.size == self.size[::-1] else image.resize(self.size[::-1], self.how)

    def __call__(self, image):
        return torch.from_numpy(np.asarray(self.fit(image)).copy()).permute(2, 0, 1).float() / 255


class EvalView:
    """What the model sees outside training: path, array or PIL image -> (3, H, W), scaled and normalised."""

    def __init__(self, size, norm="imagenet", resize="bicubic"):
        self.scale, self.normalize = Scale(size, resize), v2.Normalize(*mean_std(norm))

    def __call__(self, image):
        return self.normalize(self.scale(image if isinstance(image, Image.Image) else load_image(image)))


# ---- batches --------------------------------------------------------------------------------------------------------

def derive_seed(*numbers):
    """A 63-bit seed from some whole numbers, such that neighbours share nothing: draws for an item come from (seed, epoch, item)."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]) >> 1


class Images(torch.utils.data.Dataset):
    """Images as the encoder takes them, in order."""

    def __init__(self, images, view):
        self.images, self.view = images, view

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.view(self.images[i])


class Pairs(torch.utils.data.Dataset):
    """Training items, one (image, caption) each: an image with two captions is two items. Set `epoch` before each pass: all
    draws for item i are functions of (seed, epoch, i), whatever process makes it, so that a resumed run goes on exactly.

    views, self_views: how many TrainViews and SelfViews of the image (decoded once); texts, self_texts: how many variations
    of the caption. back_translation: chance to start from the caption's entry in captions_bt, where there is one. `text`: rates
    for augment_caption. clean: clean captions first. mixup: the chance of an
    item to be mixed with another at random, as CTLG's code does it: the mean of the pixels, and both captions, which makes them pairs."""

    def __init__(self, records, size, seed=0, views=1, self_views=0, texts=1, self_texts=0, image_aug="pool", norm="imagenet",
                 resize="bilinear", clean=True, back_translation=0.1, text=None, mixup=0.0):
        cleaned = clean_caption if clean else str
        self.items = [(r, n) for r in records for n in range(len(r["captions"]))]
        self.images = [i for i, r in enumerate(records) for _ in r["captions"]]             # which record an item is of
        self.captions = [cleaned(r["captions"][n]) for r, n in self.items]
        self.translated = [any(bt := r.get("captions_bt", [])[n:n + 1]) and cleaned(bt[0]) for r, n in self.items]
        label = {pid: n for n, pid in enumerate(sorted({r["pid"] for r in records}))}       # ids have gaps, classes not
        self.pids = [label[r["pid"]] for r, _ in self.items]
        self.persons = len(label)
        self.views = [TrainView(size, image_aug, norm, resize)] * views + [SelfView(size, norm)] * self_views
        self.texts, self.back_translation, self.text = texts + self_texts, back_translation, text or {}
        self.seed, self.epoch, self.mixup = seed, 0, mixup

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        seed = derive_seed(self.seed, self.epoch, i)
        torch.default_generator.manual_seed(seed)       # not torch.manual_seed: that one takes 0.3 ms to look for GPUs
        rng = random.Random(seed)
        captions, pixels = self.vary(i, rng)
        if self.mixup and rng.random() < self.mixup:
            more, others = self.vary(rng.randrange(len(self)), rng)
            captions, pixels = list(zip(captions, more)), (pixels + others) / 2
        return dict(pixels=pixels, captions=captions, pid=self.pids[i], image=self.images[i], item=i, seed=seed)

    def vary(self, i, rng):
        """-> the captions of an item, its pixels (V, 3, H, W)."""
        captions = []
        for _ in range(self.texts):
            translated = rng.random() < self.back_translation and self.translated[i]
            captions.append(augment_caption(translated or self.captions[i], rng, **self.text))
        image = load_image(self.items[i][0]["image"])
        return captions, torch.stack([view(image) for view in self.views])


def collate(tokenizer, items, mask=None):
    """Items -> batch: pixels (V, B, 3, H, W), tokens (U, B, 77), pid, image, item (B,): person, record and its own number. With mask = (content, other), the rates of
    Tokenizer.masked, also masked, asked (B, 77), of the first variation of each caption."""
    tokens = tokenizer([c for item in items for c in item["captions"]])
    more = {}
    if mask:
        rows = [tokenizer.masked(item["captions"][0], random.Random(item["seed"] + 1), *mask) for item in items]
        more = dict(masked=torch.stack([row for row, _ in rows]), asked=torch.stack([asked for _, asked in rows]))
    return more | dict(pixels=torch.stack([item["pixels"] for item in items], dim=1), tokens=tokens.view(len(items), -1, CONTEXT).transpose(0, 1),
                **{k: torch.tensor([item[k] for item in items]) for k in ("pid", "image", "item")})


def batches(sampler, pids, batch, seed, images=None, drop_last=True):
    """One epoch as a list of batches of item numbers.

    sampler   random: every item once, shuffled
              random-count: one or two items of a person side by side (UIT); batch / 2 persons at a time
              views: every image once with one of its captions, up to 4 images of a person in the same batch (LCR2S)
    pids      the person of each item;  images (for "views"): the image of each item
    drop_last leaves out a last batch that is smaller than the others
    Raises ValueError if random-count has too few persons for a batch."""
    rng = random.Random(seed)
    if sampler == "views":
        return view_batches(pids, batch, images, drop_last, rng)
    order = rng.sample(range(len(pids)), len(pids)) if sampler == "random" else random_count_order(pids, batch, rng)
    chunks = [order[j:j + batch] for j in range(0, len(order), batch)]
    return chunks[:-1] if drop_last and chunks and len(chunks[-1]) < batch else chunks


def random_count_order(pids, batch, rng):
    """UIT's sampler: each person's items are cut into groups of 1 or 2 (drawn per person and epoch, the remainder left out).
    batch / 2 persons that still have groups give one each, until too few are left."""
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
        raise ValueError(f"a batch of {batch} needs {persons} persons with the sampler random-count; the set has {len(able)}")
    while len(able) >= persons:
        for pid in rng.sample(able, persons):
            order += groups[pid].pop()
        able = [pid for pid in able if groups[pid]]
    return order


def view_batches(pids, batch, images, drop_last, rng):
    """LCR2S: groups of up to 4 images of a person stay together. No image meets itself, so batches are up to 3 items short."""
    captions, items_of, chunks = defaultdict(list), defaultdict(list), [[]]
    for item, image in enumerate(images):
        captions[image].append(item)
    for items in captions.values():
        items_of[pids[items[0]]].append(rng.choice(items))
    k = min(4, batch)
    groups = []
    for items in items_of.values():
        items = rng.sample(items, len(items))
        groups += [items[j:j + k] for j in range(0, len(items), k)]
    for group in rng.sample(groups, len(groups)):
        if len(chunks[-1]) + len(group) > batch:
            chunks.append([])
        chunks[-1] += group
    return chunks[:-1] if drop_last and len(chunks[-1]) <= batch - k else chunks


# ---- commands -------------------------------------------------------------------------------------------------------

def command(main, stopped="stopped"):
    """Runs the main function of a script: a user's mistake ends in a sentence and exit code 2, Ctrl-C in 130 and what the script says of it."""
    code = 0
    try:
        main()
    except KeyboardInterrupt as e:
        print(e if e.args else stopped, file=sys.stderr)
        code = 130
    except torch.OutOfMemoryError as e:
        print(f"error: {str(e).split('. ')[0]}\n  In training, --micro-batch M computes the same in parts, and --checkpoint-blocks keeps less; "
              "or lower --batch", file=sys.stderr)
        code = 2
    except BrokenPipeError:                                             # ... | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (FileNotFoundError, ValueError, FloatingPointError, OSError) as e:
        said = str(e).rsplit(f"\n{type(e).__name__}: ", 1)[-1].rstrip()          # one from a loader's process brings its traceback along
        print(f"error: {said}", file=sys.stderr)
        traceback.clear_frames(e.__traceback__)                         # they hold the loader, whose processes can now end in order
        code = 2
    sys.exit(code)


# ---- the checker ----------------------------------------------------------------------------------------------------

def check(name, root, sheet):
    """Prints what the set holds beside what it should; writes a sample sheet. Returns the number of things that are wrong."""
    wrong, splits, rows = 0, {}, [] if name.startswith("toy") else read_rows(name, root)
    images, count = merge_rows(rows), len(rows)
    print(f"{'split':8}{'persons':>10}{'images':>10}{'captions':>10}   published")
    for split in ("train", "val", "test"):
        if split == "val" and name in PUBLISHED and "val" not in PUBLISHED[name]:
            print(f"{split:8}{'none published: 200 training persons are held out by training':>62}")
            continue
        records = read(name, root, split) if name.startswith("toy") else take_split(images, split, name not in PUBLISHED, name, root)
        splits[split] = records
        published = PUBLISHED.get(name, {}).get(split)
        differs = published is not None and published != counts(records)
        wrong += differs
        print(f"{split:8}" + "".join(f"{n:10,}" for n in counts(records)) + "   " +
              ("-" if published is None else " / ".join(f"{n:,}" for n in published) + ("   DIFFERS" if differs else "   ok")))
    if count > len(images):
        print(f"{count - len(images):,} of {count:,} rows name an image of an earlier row: their captions are added to it")
    for a, b in (("train", "test"), ("train", "val"), ("val", "test")):
        both = {r["pid"] for r in splits.get(a, [])} & {r["pid"] for r in splits.get(b, [])}
        if both:
            wrong += 1
            print(f"{len(both)} persons are in {a} and in {b}, e.g. {min(both)}: scores will be too good")
    records = [r for s in splits.values() for r in s]
    for record, why in (bad := unreadable_images(records)):
        print(f"bad image: {why}")
    wrong += len(bad)
    persons = defaultdict(set)
    for r in records:
        for caption in r["captions"]:
            persons[clean_caption(caption)].add(r["pid"])
    shared = sorted((c for c in persons if len(persons[c]) > 1), key=lambda c: -len(persons[c]))
    if name.startswith("toy"):
        people, garments, colours = synthetic_pedestrians(), ["top", "bottom"], ["top_colour", "bottom_colour"]
        oracles = [people.oracle_score(splits["test"], names) for names in (None, garments + colours, colours)]
        print("synthetic benchmark version {}: oracle R@1 on test {:.1f}, with garment types and colours {:.1f}, with colours "
              "alone {:.1f}".format(people.VERSION, *oracles))
    lengths = [len(c.split()) for r in records for c in r["captions"]]
    print(f"captions: {np.mean(lengths):.1f} words on average, {max(lengths)} at most; {len(persons.get('', ()))} persons with an empty one; "
          f"{len(shared)} texts are shared by different persons (label noise)" + "".join(f"\n  {len(persons[c])} persons: {c[:100]}" for c in shared[:3]))
    good = [r for r in records if r not in [b for b, _ in bad]] if bad else records
    write_sample_sheet(sheet, name, random.Random(0).sample(good, min(24, len(good))))
    print(f"{wrong} wrong\nsample sheet: {sheet}" if wrong else f"all is well\nsample sheet: {sheet}")
    return wrong


def write_sample_sheet(path, title, records):
    """One self-contained page with some images and their captions."""
    cells = []
    for r in records:
        image, buffer = load_image(r["image"]), io.BytesIO()
        image.resize((max(1, round(image.width * 192 / image.height)), 192)).save(buffer, "JPEG", quality=85)
        cells.append(f'<figure><img src="data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}">'
                     f'<figcaption><b>{r["pid"]}</b> {"<br>".join(html.escape(c) for c in r["captions"])}</figcaption></figure>')
    Path(path).write_text(f"<!doctype html><meta charset=utf-8><title>{html.escape(title)}</title><style>body{{font:14px system-ui;margin:2em}}"
                          "figure{display:inline-flex;gap:1em;width:26em;margin:0 1em 1em 0;vertical-align:top}figcaption{font-size:13px}</style>"
                          f"<h1>{html.escape(title)}: a sample</h1>{''.join(cells)}", encoding="utf-8")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--dataset", choices=DATASETS, default="toy", help="what to check (default: toy)")
    p.add_argument("--data-root", default="data", help="the set's folder or its parent; for csv the file (default: data)")
    p.add_argument("--sheet", help="where to write the sample sheet (default: check-DATASET.html)")
    p.add_argument("--pictures", metavar="DIR", help="write the pictures of the test split into this folder instead, to try a search on")
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
