"""Evaluation and search: ranking metrics, embedding, the report page, searching a folder of pictures.

    python eval.py --checkpoint runs/toy-tbps-clip-simplified-0/best.pt                  scores on the data set it was trained on
    python eval.py --checkpoint A B --dataset cuhk icfg --data-root DIR                  a table: checkpoints x data sets
    python eval.py --checkpoint C --gallery PHOTOS --query "a woman in a green coat"     the pictures of a folder that fit best
    python eval.py --checkpoint C --gallery PHOTOS --serve                               the same as a page in the browser
    python eval.py --features FILE.npz                                                   scores of features from elsewhere
    python eval.py --checkpoint C --export DIR                                           the encoders as torch.export programs

C is a checkpoint of tbps.py or distill.py, or the weights of a CLIP. Scores are R@1, R@5, R@10, mAP and mINP in percent, text-to-image
(the protocol of the field: every caption a query, every image of the split in the gallery), image-to-text, and text-to-image without
the image that the caption was written for, with a self-contained page of queries and their top 10. As a module it needs torch,
torchvision, numpy and what these bring along (Pillow, tqdm): `retrieval_metrics` can be copied as it stands. CUHK-PEDES (6,156
queries x 3,074 images) takes it 0.25 s on 2 cores."""

import argparse
import array
import base64
import collections
import hashlib
import html
import io
import itertools
import json
import math
import mmap
import os
import re
import stat
import sys
import threading
import zipfile
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlencode, urlsplit

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

# ---- metrics --------------------------------------------------------------------------------------------------------

def check_features(query, gallery):
    if not len(query) or not len(gallery):
        raise ValueError(f"nothing to score: {len(query)} queries, {len(gallery)} gallery images")
    if not (query.isfinite().all() and gallery.isfinite().all()):
        raise ValueError("the features hold values that are not finite")


def count_higher(score, correct):
    """How many images rank before each correct one: score (chunk, G), gallery indices (chunk, R) -> (chunk, R)."""
    G, mark = score.shape[1], score.gather(1, correct)
    if score.device.type == "cpu":
        ordered = torch.from_numpy(np.sort(score.numpy()))              # faster than torch's sort
    else:
        ordered = score.sort(dim=1).values
    higher = G - torch.searchsorted(ordered, mark, right=True)
    tied = G - torch.searchsorted(ordered, mark) > higher + 1
    for i, k in tied.nonzero().tolist():                                # rare, so a loop is fast enough
        higher[i, k] += (score[i, :correct[i, k]] == mark[i, k]).sum()
    return higher


def match_ranks(query, gallery, q_pid, g_pid, own=None):
    """-> (Q, R): the ranks (1 = first) of each query's correct images, unsorted, filled up with infinity."""
    G = len(gallery)
    # The correct images of a person are a run order[start : start + number] of the gallery sorted by person
    order = torch.argsort(g_pid, stable=True)
    pids, number = torch.unique_consecutive(g_pid[order], return_counts=True)                           # (P,) each
    start = number.cumsum(0) - number
    person = torch.searchsorted(pids, q_pid).clamp(max=len(pids) - 1)                                   # (Q,)
    if (lost := pids[person] != q_pid).any():
        i = int(lost.nonzero()[0])
        raise ValueError(f"{int(lost.sum())} queries have no image of their person in the gallery, "
                         f"e.g. query {i} (pid {int(q_pid[i])})")
    ranks = torch.full((len(query), int(number.max())), torch.inf, device=query.device)
    by_number = torch.argsort(number[person], stable=True)              # a chunk has queries of similar R
    for rows in by_number.split(max(128, 2 ** 19 // G)):
        score = query[rows] @ gallery.T                                                                 # (chunk, G)
        many = number[person[rows], None]
        j = torch.arange(int(many.max()), device=query.device)
        correct = order[(start[person[rows], None] + j).clamp(max=G - 1)]                               # (chunk, R)
        valid = j < many
        if own is not None:
            score.scatter_(1, own[rows, None], -torch.inf)
            valid &= correct != own[rows, None]
        higher = count_higher(score, correct)
        ranks[rows, :len(j)] = torch.where(valid, higher + 1.0, torch.inf)
    return ranks


@torch.no_grad()
def retrieval_metrics(query, gallery, q_pid, g_pid, own=None):
    """Rank the gallery for each query by cosine and score it, in percent -> {"R@1", "R@5", "R@10", "mAP", "mINP"}.

    query (Q, D), gallery (G, D)   features of any norm, tensors or numpy arrays
    q_pid (Q,), g_pid (G,)         person ids
    own (Q,)                       gallery index of each query's source image, which is left out of its ranking. Queries
                                   without another image of their person are dropped and counted as "dropped"

    R@k    fraction of queries with at least one correct image among the first k
    mAP    mean over queries of AP = 1/R sum_j j / rank_j, where rank_1 < ... < rank_R are the correct images' ranks
    mINP   mean over queries of R / rank_R: how deep one must look to find all of them (Ye et al., arXiv 2001.04193)

    Scores are fp32; ties rank in gallery order. No ranking is stored: for each correct image we count the images that
    score higher, by a search in the sorted scores, in chunks of queries. Memory beyond the features is a few megabytes.
    Raises ValueError if a query has no correct image in the gallery, or if features are not finite.
    """
    query, gallery = (F.normalize(torch.as_tensor(x).float(), dim=1) for x in (query, gallery))
    q_pid, g_pid = (torch.as_tensor(p).to(query.device) for p in (q_pid, g_pid))
    own = None if own is None else torch.as_tensor(own).to(query.device)
    check_features(query, gallery)
    ranks = match_ranks(query, gallery, q_pid, g_pid, own).sort(dim=1).values                           # (Q, R)
    found = ranks.isfinite().sum(dim=1)                                                                 # (Q,)
    dropped = int((found == 0).sum())
    ranks, found = ranks[found > 0], found[found > 0]
    if not len(ranks):
        raise ValueError("no query has a correct image besides its source image")
    ap = (torch.arange(1, ranks.shape[1] + 1, device=ranks.device) / ranks).sum(dim=1) / found          # j / inf = 0
    last = ranks.gather(1, found[:, None] - 1)[:, 0]
    scores = {f"R@{k}": 100 * (ranks[:, 0] <= k).double().mean().item() for k in (1, 5, 10)}
    scores["mAP"] = 100 * ap.double().mean().item()
    scores["mINP"] = 100 * (found / last).double().mean().item()
    return scores | ({"dropped": dropped} if dropped else {})


def format_scores(scores):
    """Scores on one line: R@1 62.05 R@5 ..."""
    parts = [f"{name} {value:.2f}" for name, value in scores.items() if name != "dropped"]
    if "dropped" in scores:
        parts.append(f"({scores['dropped']} queries dropped)")
    return " ".join(parts)


# ---- embedding ------------------------------------------------------------------------------------------------------

def process():
    """(rank, number) of the processes of torchrun; (0, 1) without it."""
    if torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def progress_bar(*items, **options):
    """tqdm. Without a terminal, as in a log file, it prints a line a minute instead of a bar."""
    if not sys.stderr.isatty():
        line = "{desc}: {n_fmt} of {total_fmt}, {elapsed} elapsed, {remaining} left, {rate_fmt}{postfix}\n"
        options |= dict(delay=60, mininterval=60, maxinterval=60, miniters=1, bar_format=line)
    return tqdm(*items, **options)


@torch.no_grad()
def embed_images(model, images, device="cpu", workers=0, batch=256, progress=True):
    """A dataset of pixels (3, H, W) -> (G, D) fp32 features of unit length, on the CPU, in order."""
    loader = torch.utils.data.DataLoader(images, batch, num_workers=workers, pin_memory=torch.device(device).type == "cuda")
    model.eval()
    return torch.cat([F.normalize(model.encode_image(pixels.to(device, non_blocking=True)).float(), dim=1).cpu()
                      for pixels in progress_bar(loader, desc="images", leave=False, disable=not progress)])


@torch.no_grad()
def embed_texts(model, tokens, batch=128):
    """(Q, T) ids -> (Q, D) fp32 features of unit length, on the CPU, in order. Batches hold captions of like length, as the
    encoder's cost goes with the longest."""
    model.eval()
    order = torch.argsort(tokens.argmax(dim=1), stable=True)
    text = torch.cat([F.normalize(model.encode_text(tokens[rows]).float(), dim=1).cpu() for rows in order.split(batch)])
    return text[torch.argsort(order)]


# ---- report pages ---------------------------------------------------------------------------------------------------
#
# Every page is one self-contained HTML file. Nothing is told by colour alone, text has a contrast of at least 4.5 : 1,
# and every picture has an alternative text.

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 78em; padding: 0 1em }
body { color: #222; background: #fff }
h1 { font-size: 1.5em; overflow-wrap: anywhere }
h2 { margin-top: 2em; font-size: 1.15em; overflow-wrap: anywhere }
table { border-collapse: collapse }
td, th { padding: .2em .9em .2em 0; text-align: right; font-weight: normal }
td:first-child, th:first-child { text-align: left }
thead th { border-bottom: 1px solid #777; font-weight: 600 }
.settings { columns: 4 16em; font: 13px ui-monospace, monospace; color: #444; overflow-wrap: anywhere }
.row { margin: 1.1em 0 }
.row p { margin: 0 0 .3em }
figure { display: inline-block; margin: 0 .5em .5em 0; text-align: center; vertical-align: top; font-size: 13px }
.row img { height: 112px; border: 4px solid transparent; border-radius: 4px }
.row .large img { height: auto; max-width: 100% }
.row .source { margin-right: 1.5em }
.source img { border-color: #777 }
.right img { border-color: #147a35 }
.wrong img { border-color: #c62817; border-style: dashed }
.hits { display: flex; flex-wrap: wrap; gap: 1em }
.hit { width: 9.5em; text-align: left; overflow-wrap: anywhere }
.hit img { max-width: 9.5em; border-radius: 4px }
.ending { white-space: nowrap }
.legend { color: #444 }
svg { margin-right: 2em; max-width: 100% }
svg text { font: 12px system-ui, sans-serif; fill: #444 }
"""
COLOURS = ["#1f6fb4", "#c62817", "#147a35", "#7a3fb0", "#9a5600", "#555", "#b0398a"]                    # of curves
DASHES = ["", "6 3", "2 3", "8 3 2 3"]                                          # colour is not the only sign


def thumbnail(image, height=112):
    """PIL image -> data URI of a JPEG of this height. An image wider than 4 heights gets the width 4 * height."""
    scale = min(height / image.height, 4 * height / image.width)
    size = [max(1, round(scale * side)) for side in image.size]
    buffer = io.BytesIO()
    image.resize(size, Image.Resampling.LANCZOS).save(buffer, "JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def figure(image, alt, caption="", kind="", height=112):
    """A PIL image as HTML, with its alternative text and, below it, a caption (HTML)."""
    return (f'<figure class="{kind}"><img src="{thumbnail(image, height)}" alt="{html.escape(alt)}">'
            f"<figcaption>{caption}</figcaption></figure>")


def round_ticks(low, high, steps=5):
    """Axis ticks that enclose low ... high, about `steps` intervals of 1, 2 or 5 times a power of ten."""
    span = (high - low) or 1.0
    size = 10.0 ** math.floor(math.log10(span / steps))
    size *= next(m for m in (1, 2, 5, 10) if span <= steps * m * size * 1.0001)
    first, last = math.floor(low / size + 1e-6), math.ceil((low + span) / size - 1e-6)
    return [k * size for k in range(first, last + 1)]


def curve(title, series, width=480, height=240):
    """Lines {name: [(x, y), ...]} as one inline SVG with labelled axes from 0 on; x is the epoch."""
    points = [p for line in series.values() for p in line]
    if not points:
        return ""
    xs, ys = (round_ticks(min(0, *v), max(0, *v)) for v in zip(*points))
    left, right, top, bottom = 64, width - 112, 28, height - 42

    def place(x, y):
        return (left + (right - left) * (x - xs[0]) / (xs[-1] - xs[0]),
                bottom - (bottom - top) * (y - ys[0]) / (ys[-1] - ys[0]))

    name = html.escape(title)
    out = [f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
           f'aria-label="{name} by epoch"><text x="{left}" y="16" style="font-weight:600">{name}</text>'
           f'<text x="{(left + right) / 2}" y="{height - 6}" text-anchor="middle">epoch</text>']
    for y in ys:
        py = place(xs[0], y)[1]
        out.append(f'<line x1="{left}" x2="{right}" y1="{py:.1f}" y2="{py:.1f}" stroke="#ddd"/>'
                   f'<text x="{left - 6}" y="{py:.1f}" dy="4" text-anchor="end">{y:.6g}</text>')
    for x in xs:
        out.append(f'<text x="{place(x, ys[0])[0]:.1f}" y="{bottom + 18}" text-anchor="middle">{x:.6g}</text>')
    for n, (name, line) in enumerate(series.items()):
        pen = (f'fill="none" stroke="{COLOURS[n % 7]}" stroke-width="1.8" stroke-linecap="round" '
               f'stroke-dasharray="{DASHES[n % 4]}"')
        line = line if len(line) > 1 else 2 * line                      # so that a single point is drawn, as a dot
        path = " ".join("{:.1f},{:.1f}".format(*place(x, y)) for x, y in line)
        y = top + 8 + 17 * n                                            # of the legend
        out.append(f'<polyline {pen} points="{path}"/>'
                   f'<line {pen} x1="{right + 8}" x2="{right + 30}" y1="{y}" y2="{y}"/>'
                   f'<text x="{right + 36}" y="{y + 4}">{html.escape(name)}</text>')
    return "".join(out) + "</svg>"


def table(rows):
    """{name: scores} -> an HTML table."""
    def cell(value):
        return f"<td>{f'{value:.2f}' if isinstance(value, float) else html.escape(str(value))}</td>"

    names = list(dict.fromkeys(k for scores in rows.values() for k in scores))
    head = "".join(f"<th scope=col>{html.escape(k)}</th>" for k in names)
    body = "".join(f"<tr><th scope=row>{html.escape(name)}</th>{''.join(cell(s.get(k, '')) for k in names)}</tr>"
                   for name, s in rows.items())
    return f"<table><thead><tr><td></td>{head}</tr></thead><tbody>{body}</tbody></table>"


def retrieval_sheet(captions, text, image, pid, source, load, number=12, top=10):
    """HTML: some queries, evenly spread, each with its source image and its top 10.

    text (Q, D), image (G, D): features;  pid (G,);  source (Q,): index of the source image of each caption
    load: gallery index -> PIL image
    """
    rows = []
    for i in range(0, len(captions), max(1, len(captions) // number)):
        best = torch.argsort(image @ text[i], descending=True, stable=True)[:top].tolist()
        own = int(source[i])
        shown = [figure(load(own), f"source image, person {int(pid[own])}", "source", "source")]
        for rank, j in enumerate(best, start=1):
            kind, sign = ("right", "✓") if pid[j] == pid[own] else ("wrong", "✗")
            shown.append(figure(load(j), f"rank {rank}, {kind}, person {int(pid[j])}", f"{rank} {sign}", kind))
        rows.append(f"<div class=row><p>{html.escape(captions[i])}</p>{''.join(shown)}</div>")
    return ("<p class=legend>First the source image: the caption was written for it. Then the images that rank first: "
            "✓ in a green frame is the same person, ✗ in a dashed red frame another one.</p>" + "".join(rows[:number]))


def part(path):
    """The name under which a file is written before it replaces the old one."""
    return Path(f"{path}.part")


def check_page(path):
    """Raise ValueError if the page cannot be written, or if it would replace a file that is not a page."""
    path = Path(path)
    if not os.access(path.absolute().parent, os.W_OK):
        raise ValueError(f"{path.absolute().parent} cannot be written to; name another place with --page FILE")
    if not path.exists():
        return
    start = b""
    if path.is_file():
        with open(path, "rb") as f:
            start = f.read(15)
    if start != b"<!doctype html>":
        raise ValueError(f"{path} exists and is no page, so it is not replaced; name another file with --page")


def write_page(path, title, chapters):
    """Write a self-contained HTML file. chapters: (heading, HTML) pairs, perhaps from a generator."""
    check_page(path)
    title = html.escape(title)
    try:
        with open(part(path), "w", encoding="utf-8") as f:
            f.write("<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
                    f"<title>{title}</title><style>{STYLE}</style><main><h1>{title}</h1>")
            f.writelines(f"<h2>{html.escape(heading)}</h2>{content}" for heading, content in chapters if content)
            f.write("</main></html>")
        part(path).replace(path)
    finally:
        part(path).unlink(missing_ok=True)                                    # still there if a chapter failed


# ---- the index of a gallery -----------------------------------------------------------------------------------------

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp"}
OTHER_SUFFIXES = {".avif", ".gif", ".heic", ".heif", ".jfif", ".jp2", ".jpe", ".tif", ".tiff"}       # counted, not read


def gallery_files(folder, skipped, failed):
    """Yield [path below the folder, bytes, modification time in ns] of each image file, at any depth, in order.

    Hidden files, symlinks that leave the folder, broken symlinks and anything but regular files are ignored.
    skipped: a Counter, receives the number of images per ending that is not read
    failed: a list, receives the OSError of each folder that cannot be listed and of each file that cannot be examined
    """
    root = Path(folder).resolve()
    for where, folders, files in os.walk(folder, onerror=failed.append):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        below = os.path.relpath(where, folder)
        for name in sorted(f for f in files if not f.startswith(".")):
            ending = os.path.splitext(name)[1].lower()
            if ending not in SUFFIXES:
                skipped.update([ending] if ending in OTHER_SUFFIXES else [])
                continue
            path = os.path.join(where, name)                            # not Path: a million of them take half a minute
            try:
                state = os.stat(path)
            except FileNotFoundError:                                   # a broken symlink
                continue
            except OSError as e:
                failed.append(e)
                continue
            inside = not os.path.islink(path) or Path(path).resolve().is_relative_to(root)
            if stat.S_ISREG(state.st_mode) and inside:
                yield [name if below == "." else os.path.join(below, name), state.st_size, state.st_mtime_ns]


class Index:
    """Embeddings of the images of a folder, in two files that other programs can read in one line each:

    FILE.f16     np.fromfile("FILE.f16", np.float16).reshape(-1, D)                 row n: a feature of unit length
    FILE.jsonl   [json.loads(line) for line in open("FILE.jsonl")][1:]              row n: [path, bytes, time in ns]

    The first line of FILE.jsonl is {"weights": ..., "width": D}: embeddings of other weights are replaced. Rows are
    appended batch by batch, so an interrupted run loses nothing; opening cuts both files to the shorter one. In memory
    are only the positions of the lines: 8 bytes per image. Raises ValueError for files that are not an index.
    """

    def __init__(self, file, weights, width):
        self.rows_file, self.list_file = Path(f"{file}.f16"), Path(f"{file}.jsonl")
        self.width, self.head = width, self.line(dict(weights=weights, width=width))
        self.starts, self.end = array.array("q"), 0                     # byte positions of the lines, and of the end
        if not self.rows_file.absolute().parent.is_dir():
            raise FileNotFoundError(f"there is no folder {self.rows_file.parent} for the index; make it, or name another"
                                    " file with --index")
        if part(self.list_file).exists() and not part(self.rows_file).exists():                         # see `keep`
            part(self.list_file).replace(self.list_file)
        if not self.list_file.exists():
            if self.rows_file.exists():
                self.refuse(self.rows_file)
            return
        with open(self.list_file, "rb") as f:
            head = f.readline(1000)
        if not re.match(rb'\{"weights": "[^"]*"', head):
            self.refuse(self.list_file)
        if head == self.head:
            self.open()

    @staticmethod
    def refuse(path):
        raise ValueError(f"{path} exists and is no index of pictures; remove it, or name another file with --index")

    @staticmethod
    def line(entry):
        return (json.dumps(entry) + "\n").encode()

    def open(self):
        """Find the lines, and cut both files to the shorter one."""
        size = self.rows_file.stat().st_size if self.rows_file.exists() else 0
        with open(self.list_file, "rb") as f:
            self.end = len(f.readline())
            for line in itertools.islice(f, size // (2 * self.width)):
                if line.endswith(b"\n"):
                    self.add(line)
        if (self.list_file.stat().st_size, size) != (self.end, 2 * self.width * len(self.starts)):
            os.truncate(self.list_file, self.end)
            if self.rows_file.exists():
                os.truncate(self.rows_file, 2 * self.width * len(self.starts))

    def add(self, line):
        self.starts.append(self.end)
        self.end += len(line)

    def lines(self):
        """Iterate over the lines of the rows, in bytes."""
        if self.end:
            with open(self.list_file, "rb") as f:
                f.readline()
                yield from itertools.islice(f, len(self.starts))

    def features(self):
        """(N, D) float16, mapped: only what is used is read. There must be a row."""
        return np.memmap(self.rows_file, np.float16, "c", shape=(len(self.starts), self.width))

    def check_writable(self):
        """Raise PermissionError, with advice, if the index cannot be written. A finished index may be read-only."""
        places = [self.rows_file.absolute().parent] + [p for p in (self.rows_file, self.list_file) if p.exists()]
        if not all(os.access(p, os.W_OK) for p in places):
            raise PermissionError(f"the index cannot be written to {places[0]}; --index FILE puts it elsewhere")

    def append(self, rows, entries):
        """Append rows, float16 (n, D), and their [path, bytes, time]: first the rows, then what makes them count."""
        if not self.end:                                                # new, or of other weights
            self.keep(())
        if self.list_file.stat().st_size != self.end:
            raise ValueError(f"{self.list_file} has changed meanwhile: is another search filling the same index?")
        with open(self.rows_file, "r+b") as f:
            f.seek(2 * self.width * len(self.starts))
            f.write(rows.tobytes())
            f.truncate()
        lines = [self.line(e) for e in entries]
        with open(self.list_file, "ab") as f:
            f.writelines(lines)
        for line in lines:
            self.add(line)

    def keep(self, wanted):
        """Keep only the rows with wanted (N,) True. Both files are written anew, then replaced: first the rows.

        If the program ends between the two, FILE.jsonl.part is there alone, and opening replaces the second file."""
        numbers, old = np.flatnonzero(wanted), self.features() if len(self.starts) else None
        with open(part(self.rows_file), "wb") as f:
            for some in np.array_split(numbers, len(numbers) // 4096 + 1):
                f.write(old[some].tobytes() if len(some) else b"")
        kept = itertools.compress(self.lines(), wanted)
        starts, end = array.array("q"), len(self.head)
        with open(part(self.list_file), "wb") as f:
            f.write(self.head)
            for line in kept:
                starts.append(end)
                end += f.write(line)
        del old                                                         # some systems do not replace a mapped file
        part(self.rows_file).replace(self.rows_file)
        part(self.list_file).replace(self.list_file)
        self.starts, self.end = starts, end


class Photos(torch.utils.data.Dataset):
    """Files of a folder as the encoder takes them: (view(path), True), or (zeros, False) if a file cannot be read."""

    def __init__(self, folder, paths, view, size):
        self.folder, self.paths, self.view, self.size = Path(folder), paths, view, size

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        try:
            return self.view(self.folder / self.paths[i]), True
        except (OSError, ValueError, Image.DecompressionBombError):
            return torch.zeros(3, *self.size), False


def find_changes(index, folder):
    """Compare a folder with its index, and drop the rows of files that are gone. What cannot be listed is not gone.

    -> entries to embed, Counter of skipped endings, [OSError] of what cannot be listed"""
    new, skipped, failed = [], collections.Counter(), []
    gone = set(map(hash, index.lines()))                                # 64 bits each: a million do not collide
    for entry in gallery_files(folder, skipped, failed):
        line = hash(index.line(entry))
        if line in gone:
            gone.remove(line)
        else:
            new.append(entry)
    hidden = [os.path.relpath(e.filename, folder) for e in failed]
    if "." in hidden:
        raise ValueError(f"{folder} cannot be listed: {failed[0].strerror}")

    def stays(line):
        if hash(line) not in gone:
            return True
        path = json.loads(line)[0]
        return any(path == place or path.startswith(place + os.sep) for place in hidden)

    wanted = np.fromiter(map(stays, index.lines()), bool)
    if len(wanted) and not wanted.any() and not new:                    # a disk that is not mounted
        raise ValueError(f"{folder} holds no picture any more; its index is left as it is: {index.list_file}")
    if new or not wanted.all():
        index.check_writable()
    if not wanted.all():
        index.keep(wanted)
    return new, skipped, failed


@torch.no_grad()
def update_index(index, model, view, size, folder, device="cpu", workers=0, batch=256):
    """Bring the index of a folder up to date: embed new and changed files, drop those that are gone.

    view: called with the Path of a file -> pixels (3, H, W), or OSError or ValueError for a file that cannot be read
    size: (H, W)
    -> paths of unreadable files, Counter of skipped images by ending, [OSError] of what could not be listed
    Under torchrun each process embeds its part. Only the first one has the index; the others pass None.
    """
    rank, ranks = process()
    bad, new, skipped, failed = [], [], {}, []
    if rank == 0:
        new, skipped, failed = find_changes(index, folder)
    if ranks > 1:
        torch.distributed.broadcast_object_list(box := [new])
        new = box[0]
    steps = [range(k, min(k + batch * ranks, len(new)))[rank::ranks] for k in range(0, len(new), batch * ranks)]
    files = Photos(folder, [path for path, *_ in new], view, size)
    loader = iter(torch.utils.data.DataLoader(files, batch_sampler=[s for s in steps if s], num_workers=workers))
    bar = progress_bar(total=len(new), unit=" pictures", desc="embedding", disable=rank > 0)
    for rows in steps:
        found = []                                                      # [(entry, feature or None), ...]
        if rows:
            pixels, readable = next(loader)
            features = F.normalize(model.encode_image(pixels.to(device)).float(), dim=1).half().cpu().numpy()
            found = [(new[n], f if ok else None) for n, f, ok in zip(rows, features, readable.tolist())]
        if ranks > 1:
            parts = [None] * ranks if rank == 0 else None
            torch.distributed.gather_object(found, parts)
            found = [pair for some in parts or [] for pair in some]
        if rank == 0:
            bad += [entry[0] for entry, f in found if f is None]
            if good := [(entry, f) for entry, f in found if f is not None]:
                index.append(np.stack([f for _, f in good]), [entry for entry, _ in good])
            bar.update(len(found))
    bar.close()
    return bad, skipped, failed


@torch.no_grad()
def nearest(features, query, top):
    """The rows of a gallery (N, D), float16, closest to each query (Q, D) -> cosines (Q, top), row numbers (Q, top).

    The gallery is read in pieces and may be a mapped file: time grows with N, memory does not."""
    chunk = min(8192, 2 ** 22 // len(query) + 1)                        # rows: their scores take 16 MB at most
    score, row = torch.empty(len(query), 0), torch.empty(len(query), 0, dtype=torch.int64)
    for start in range(0, len(features), chunk):
        some = query.float() @ torch.from_numpy(features[start:start + chunk]).float().T                # (Q, chunk)
        some, place = some.topk(min(top, some.shape[1]), dim=1)
        score, which = torch.cat([score, some], dim=1).topk(min(top, score.shape[1] + some.shape[1]), dim=1)
        row = torch.cat([row, place + start], dim=1).gather(1, which)
    return score, row


# ---- searching ------------------------------------------------------------------------------------------------------

def readable(path):
    """A path or an argument as text, also where its bytes are none, or would command a terminal."""
    text = os.fsencode(path).decode("utf-8", "replace")
    return "".join(c if c.isprintable() else "\ufffd" for c in text)


class Search:
    """A model, the pictures of a folder, and their embeddings: what the command line and the page in the browser ask."""

    def __init__(self, model, tokenizer, info, folder, index, device):
        import data
        self.model, self.tokenizer, self.folder, self.device, self.starts = model, tokenizer, Path(folder), device, index.starts
        with open(index.list_file, "rb") as f:
            self.list = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
        self.features, self.view, self.load = index.features(), data.EvalView(info["size"], info["norm"], info["resize"]), data.load_image
        self.clean, self.plain, self.tag, self.lock = data.clean_caption if info["clean"] else str, data.normalize_text, data.tag_words, threading.Lock()

    def entry(self, row):
        """The path below the folder."""
        return json.loads(self.list[self.starts[row]:self.list.find(b"\n", self.starts[row])])[0]

    def path(self, row):
        """The file of a row, as long as it is a picture below the folder: it may be gone, or replaced by a link."""
        path = self.folder / self.entry(row)
        if not path.exists() or not path.resolve().is_relative_to(self.folder.resolve()):
            raise ValueError(f"{self.name(row)} is not in the folder any more")
        return path

    def name(self, row):
        """The path below the folder, as text."""
        return readable(self.entry(row))

    def encode(self, texts):
        """Sentences, cleaned as in training -> (Q, D) of unit length."""
        if none := [t for t in texts if not self.clean(t).strip()]:
            raise ValueError(f"the query {none[0][:40]!r} has no word: describe the person in a sentence")
        texts = [self.clean(t) for t in texts]
        with self.lock:
            return embed_texts(self.model, self.tokenizer(texts))

    def left_out(self, text):
        """How many tokens of a text are beyond the 75 that the encoder reads."""
        return max(0, len(self.tokenizer.bpe.encode(self.clean(text)).ids) - 75)

    def describe(self, texts):
        """One query (1, D) from some descriptions of one person: the mean of their directions."""
        return F.normalize(self.encode(texts).mean(dim=0, keepdim=True), dim=1)

    def like(self, row):
        """A picture as the query (1, D)."""
        return torch.from_numpy(self.features[row:row + 1]).float()

    def top(self, query, number):
        """[(row, cosine), ...] of each query (Q, D)."""
        score, row = nearest(self.features, query, number)
        return [list(zip(*found)) for found in zip(row.tolist(), score.tolist())]

    def explain(self, row, text):
        """What in a picture the words of a text answer to; see `word_maps`."""
        with self.lock:
            return word_maps(self.model, self.tokenizer, self.view(self.path(row)), self.clean(self.plain(text)), self.tag, self.device)


@torch.no_grad()
def word_maps(model, tokenizer, pixels, text, tag, device="cpu", most=6):
    """Which parts of a picture (3, H, W) the words of a text answer to: [(word, how much it adds to the cosine, (h, w) map)], the `most` nouns
    and adjectives that matter most, in the order of the text.

    A word is what the text loses without it, a direction: text minus text without the word. A part is what the picture loses in
    this direction when a window over it is painted grey (occlusion); windows overlap by half. So this shows what the model reacts to, not
    where a thing is: a noun that many pictures share has hardly any direction of its own."""
    words = [(a, b) for a, b, kind in tag(text) if kind in "NJ"]
    if not words:
        return []
    texts = [text] + [(text[:a] + text[b:]).strip() or "a person" for a, b in words]
    whole, *without = F.normalize(model.encode_text(tokenizer(texts)).float(), dim=1).cpu()
    directions = whole - torch.stack(without)                                                           # (W, D)
    (h, w), (H, W) = model.image.grid, pixels.shape[1:]
    step = int(np.ceil((h * w / 100) ** 0.5))                           # at most a hundred windows of two steps
    windows = [(y, x, min(h, y + 2 * step), min(w, x + 2 * step)) for y in range(0, max(1, h - step), step) for x in range(0, max(1, w - step), step)]
    hidden = pixels.repeat(len(windows) + 1, 1, 1, 1)
    for picture, (top, left, bottom, right) in zip(hidden[1:], windows):
        picture[:, H * top // h:H * bottom // h, W * left // w:W * right // w] = 0
    image = torch.cat([F.normalize(model.encode_image(part.to(device)).float(), dim=1).cpu() for part in hidden.split(64)])
    seen, loss = torch.zeros(h, w), torch.zeros(len(words), h, w)
    for (top, left, bottom, right), lost in zip(windows, (image[:1] - image[1:]) @ directions.T):
        loss[:, top:bottom, left:right] += lost[:, None, None]
        seen[top:bottom, left:right] += 1
    adds = image[0] @ directions.T
    return [(text[slice(*words[n])], adds[n].item(), loss[n] / seen) for n in sorted(adds.argsort(descending=True)[:most].tolist())]


def overlay(picture, heat):
    """A picture with what is hot in red; heat (h, w) in [0, 1]."""
    shown = Image.fromarray((255 * heat.clamp(0, 1)).byte().numpy()).resize(picture.size, Image.Resampling.BICUBIC)
    return Image.composite(Image.new("RGB", picture.size, (230, 30, 20)), picture.convert("L").convert("RGB"), shown.point(lambda v: int(0.75 * v)))


def explained(search, row, text, height=176):
    """HTML: a picture beside maps of what answers to the words of a text, on one scale, the root of the strongest word's."""
    found, picture = search.explain(row, text), search.load(search.path(row), 2 * height)
    picture.thumbnail((4 * height, 2 * height))
    most = max([1e-6] + [heat.max().item() for *_, heat in found])
    cells = [("the picture", picture)] + [(f"{html.escape(word)} {adds:+.3f}", overlay(picture, (heat / most).clamp(min=0).sqrt())) for word, adds, heat in found]
    return "<div class=row>" + "".join(f'<figure><img src="{thumbnail(shown, height)}"><figcaption>{said}</figcaption></figure>' for said, shown in cells) + "</div>"


def results(search, found, links=None):
    """HTML: the pictures of [(row, cosine), ...], by rank. links(row) is what may stand below each."""
    cells = []
    for rank, (row, score) in enumerate(found, start=1):
        try:
            shown = f'<img src="{thumbnail(search.load(search.path(row), 384), 192)}" alt="">'
        except (OSError, ValueError):
            shown = "<p>cannot be read any more</p>"
        cells.append(f"<figure class=hit>{f'<a href=/photo?row={row}>{shown}</a>' if links else shown}<figcaption><b>{rank}</b> {score:.3f}<br>"
                     f"{html.escape(search.name(row))}{links(row) if links else ''}</figcaption></figure>")
    return f"<div class=hits>{''.join(cells)}</div>"


# ---- the search page ------------------------------------------------------------------------------------------------

PAGE = """<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content="width=device-width"><title>Find a person</title><link rel=icon href=data:,><style>{style}</style>
<h1>Find a person in {number:,} pictures</h1>
<form action=/ method=get><textarea name=q rows=2 autofocus maxlength=20000 placeholder="a woman in a green coat with a black backpack">{text}</textarea>
<button>Search</button> <label><input name=top type=number min=1 max=200 value={top}> pictures</label>
<p class=hint>A line is a description; several lines describe the same person, and are averaged.</p></form><main>{main}</main>
<script nonce={nonce}>
const form = document.forms[0], text = form.q
async function go(url, push) {{
  document.body.classList.add("busy")
  const page = new DOMParser().parseFromString(await (await fetch(url)).text(), "text/html")
  document.querySelector("main").replaceWith(page.querySelector("main"))
  text.value = page.querySelector("textarea").value
  if (push) history.pushState(0, "", url)
  document.body.classList.remove("busy")
}}
text.addEventListener("keydown", e => {{ if (e.key == "Enter" && !e.shiftKey) {{ e.preventDefault(); form.requestSubmit() }} }})
form.addEventListener("submit", e => {{ e.preventDefault(); go("/?" + new URLSearchParams(new FormData(form)), true) }})
addEventListener("click", e => {{ const a = e.target.closest("main a[href^='/?']"); if (a && !e.ctrlKey && !e.metaKey) {{ e.preventDefault(); go(a.href, true) }} }})
addEventListener("popstate", () => go(location.href, false))
</script></html>"""
PAGE_STYLE = """form{margin-bottom:1.5em}textarea{width:100%;box-sizing:border-box;font:inherit;padding:.5em;border:1px solid #888;border-radius:6px}button{font:inherit;padding:.3em 1.2em}
input{font:inherit;width:4em}.hint,.busy main{opacity:.55}.note{background:#f3f3f3;padding:.5em .8em;border-radius:6px}"""


def answer(search, query):
    """The main part of the page for a query string -> (text of the field, number of pictures, HTML). Raises ValueError in words."""
    asked = parse_qs(query, keep_blank_values=True, max_num_fields=20)

    def number(name, low, high, default):
        value = asked.get(name, [default])[-1]
        if value is not None and not (re.fullmatch("[0-9]{1,9}", value) and low <= int(value) <= high):
            raise ValueError(f"{name} must be a number from {low} to {high}, not {value[:20]!r}")
        return None if value is None else int(value)

    text, rows = "\n".join(asked.get("q", [])), len(search.starts) - 1
    top, like, why = number("top", 1, 200, "20"), number("like", 0, rows, None), number("why", 0, rows, None)

    def links(row):
        more = [(f"/?{urlencode(dict(like=row, q=text, top=top))}", "more like this")]
        if text.strip():
            more.append((f"/?{urlencode(dict(why=row, q=text, top=top))}", "why?"))
        return "<br>" + " ".join(f"<a href='{html.escape(url)}'>{said}</a>" for url, said in more)

    if len(text) > 20_000:
        raise ValueError(f"a query of {len(text):,} characters is too long; some sentences are enough")
    said = [line for line in text.splitlines() if line.strip()]
    if like is not None:
        main = f"<h2>Like {html.escape(search.name(like))}</h2>" + results(search, search.top(search.like(like), top)[0], links)
    elif "q" not in asked:
        main = ""
    elif not said:
        main = "<p class=note>Describe the person in a sentence.</p>"
    else:
        main = results(search, search.top(search.describe(said), top)[0], links)
        if longest := max(map(search.left_out, said)):
            main = f"<p class=note>A description has room for 75 tokens, about 55 words: the last {longest:,} tokens were not read.</p>" + main
        if why is not None:
            main = f"<h2>What in {html.escape(search.name(why))} answers to the words</h2>{explained(search, why, ' '.join(said))}<p>{WHY}</p>" + main
    return text, top, main


WHY = ("Red: painted grey, these parts would cost the word its share of the score, which stands beside it. This is what the model reacts to; it need not be "
       "where the thing is.")


class Server(ThreadingHTTPServer):
    """Holds a port of localhost; who asks before `serve` answers waits."""
    daemon_threads, request_queue_size = True, 128

    def __init__(self, port):
        try:
            super().__init__(("127.0.0.1", port), None)
        except OSError as e:
            raise OSError(f"port {port} cannot be had ({e.strerror}); name another with --serve PORT, or 0 for any") from None

    def handle_error(self, request, client):
        if not isinstance(sys.exc_info()[1], (ConnectionError, TimeoutError)):
            super().handle_error(request, client)


def serve(search, server):
    """Answers on localhost until Ctrl-C. Only numbers of rows come from outside, never a path."""
    class Handler(BaseHTTPRequestHandler):
        timeout = 15                                                    # seconds for a client that sends nothing

        def do_GET(self):
            hosts = {f"{name}:{self.server.server_port}" for name in ("localhost", "127.0.0.1")}
            if self.headers.get("Host") not in hosts:                   # a foreign site's name that was made to lead here
                return self.send(403, "text/plain", b"this page answers to localhost only\n")
            try:
                url = urlsplit(self.path)
                if url.path == "/":
                    nonce = base64.b64encode(os.urandom(12)).decode()
                    self.page(200, nonce, *answer(search, url.query))
                elif url.path == "/photo" and re.fullmatch("[0-9]{1,9}", row := parse_qs(url.query).get("row", [""])[0]) and int(row) < len(search.starts):
                    buffer = io.BytesIO()
                    search.load(search.path(int(row))).save(buffer, "JPEG", quality=92)
                    self.send(200, "image/jpeg", buffer.getvalue())
                else:
                    self.send(404, "text/plain", b"there is nothing here\n")
            except (ValueError, OSError) as e:
                if isinstance(e, (ConnectionError, TimeoutError)):
                    raise
                self.page(400, "", "", 20, f"<p class=note>{html.escape(str(e))}</p>")

        do_HEAD = do_GET

        def page(self, code, nonce, text, top, main):
            shown = PAGE.format(style=STYLE + PAGE_STYLE, number=len(search.starts), text=html.escape(text), top=top, main=main, nonce=nonce)
            self.send(code, "text/html; charset=utf-8", shown.encode("utf-8", "replace"), f"default-src 'none'; img-src data: 'self'; style-src 'unsafe-inline'; "
                      f"script-src 'nonce-{nonce}'; connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'")

        def send(self, code, kind, body, policy="default-src 'none'; style-src 'unsafe-inline'"):
            self.send_response(code)
            for name, value in {"Content-Type": kind, "Content-Length": len(body), "Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff",
                                "Referrer-Policy": "no-referrer", "Cache-Control": "no-store", "Cross-Origin-Resource-Policy": "same-origin"}.items():
                self.send_header(name, str(value))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, *_):
            pass

    server.RequestHandlerClass = Handler
    print(f"search page: http://localhost:{server.server_port}/   (Ctrl-C ends it)", flush=True)
    with server:
        server.serve_forever()


# ---- export ---------------------------------------------------------------------------------------------------------

class ImageEncoder(torch.nn.Module):
    """(B, 3, H, W) pixels, scaled and normalised -> (B, D) of unit length."""

    def __init__(self, model):
        super().__init__()
        self.tower = model.image

    def forward(self, pixels):
        first = torch.zeros(pixels.shape[0], dtype=torch.int64)         # the class token
        return F.normalize(self.tower.project(self.tower(pixels, at=first)[:, 0]), dim=1)


class TextEncoder(torch.nn.Module):
    """(B, 77) token ids -> (B, D) of unit length. All 77 positions are computed: where a text ends must not change the program."""

    def __init__(self, model):
        super().__init__()
        self.tower = model.text

    def forward(self, tokens):
        end = self.tower(tokens, at=tokens.argmax(dim=1))[:, 0]
        return F.normalize(self.tower.ln_post(end) @ self.tower.proj, dim=1)


@torch.no_grad()
def export(model, tokenizer, info, folder):
    """Writes image.pt2, text.pt2 (torch.export, any batch size), tokenizer.json and info.json (what pictures and texts need), and checks
    what it wrote against the model: -> the largest difference of a feature. Raises ValueError if that is not rounding."""
    import data
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is no empty folder; name another, so that nothing is overwritten")
    folder.mkdir(parents=True, exist_ok=True)
    tokens = tokenizer(["a man in a red jacket", "a woman", "a person with a black backpack and a white hat"])
    worst = 0.0
    for name, encoder, encode, x in (("image", ImageEncoder(model), model.encode_image, torch.randn(3, 3, *info["size"])),
                                     ("text", TextEncoder(model), model.encode_text, tokens)):
        path = folder / f"{name}.pt2"
        torch.export.save(torch.export.export(encoder.eval(), (x,), dynamic_shapes=({0: torch.export.Dim("batch")},)), path)
        program = torch.export.load(path).module()
        for some in (x, x[:1], torch.cat([x, x])):
            worst = max(worst, (program(some) - F.normalize(encode(some), dim=1)).abs().max().item())
    if not worst < 1e-4:
        raise ValueError(f"the exported programs differ from the checkpoint by {worst:.2g}: do not use {folder}")
    tokenizer.bpe.save(str(folder / "tokenizer.json"))
    mean, std = data.mean_std(info["norm"])
    (folder / "info.json").write_text(json.dumps(dict(size=info["size"], mean=mean, std=std, resize=info["resize"], clean=info["clean"], context=data.CONTEXT,
                                                      start=tokenizer.eot - 1, end=tokenizer.eot, embed=model.arch["embed"]), indent=1))
    return worst


# ---- the command ----------------------------------------------------------------------------------------------------

def find_model(source):
    """A checkpoint, or the weights of a CLIP: a file, a folder or a hub id -> path of the file."""
    import data
    import tbps
    if Path(source).suffix in (".pt", ".pth", ".bin", ".safetensors"):
        data.need(source, "the checkpoint", "train one with python tbps.py, which writes runs/NAME/best.pt, or name the weights of a CLIP")
    return tbps.find_weights(source)


def open_model(source, device="cpu", tokenizer=None, size=None):
    """-> model, tokenizer, info of a checkpoint, or of the weights of a CLIP, which then sees pictures as it was trained to, or of `size`."""
    import tbps
    path = find_model(source)
    if tbps.is_ours(path):
        if tokenizer or size:
            raise ValueError(f"--tokenizer and --size are for the weights of a CLIP; {path} is a checkpoint and knows its own")
        return tbps.load_checkpoint(path, device)
    model, tokenizer = tbps.load_clip(path, size), tbps.tokenizer_for(path, tokenizer)
    if tokenizer.vocab != model.arch["vocab"]:
        raise ValueError(f"the tokenizer has {tokenizer.vocab:,} tokens, the weights {model.arch['vocab']:,}: they do not belong together")
    info = tbps.preprocessing_for(path) | dict(size=model.arch["image_size"], method="zero-shot", epoch=0, args={})
    return model.eval().to(device), tokenizer, info


def weights_id(model, info):
    """A name for what the embeddings of pictures depend on: the weights of the image tower and how pictures are prepared."""
    digest = hashlib.sha256(json.dumps([model.arch, list(info["size"]), info["norm"], info["resize"]]).encode())
    for name, w in sorted(model.image.state_dict().items()):
        digest.update(w.cpu().contiguous().numpy())
    return digest.hexdigest()[:16]


def compare(args):
    """Scores of all checkpoints on all data sets: printed, and written as a page."""
    import data
    import tbps
    tbps.join(args)
    table_rows, chapters = {}, []
    several = len(args.checkpoint) * len(args.dataset or [""]) > 1
    for source in args.checkpoint:
        find_model(source)                                              # all of them, before the first is scored
    for source in args.checkpoint:
        model, tokenizer, info = open_model(source, args.device, args.tokenizer, args.size)
        if not (args.dataset or info["args"]):
            raise ValueError(f"{source} was trained on no data set known here; name one with --dataset")
        for dataset in args.dataset or [info["args"]["dataset"]]:
            records = data.read(dataset, args.data_root or info["args"].get("data_root", "data"), args.split)
            rows, sheet = tbps.evaluate(model, tokenizer, info, records, args.device, 0 if dataset.startswith("toy") else args.workers)
            print(f"{source} ({info['method']}, epoch {info['epoch']}) on {dataset} {args.split}: " + "{:,} persons, {:,} images, {:,} captions".format(*data.counts(records)))
            for name, scores in rows.items():
                print(f"{name:28}{format_scores(scores)}", flush=True)
            table_rows[f"{source} on {dataset}"] = rows["text to image"]
            chapters += [(f"{source} on {dataset} {args.split}", table(rows)), ("Queries and their top 10", sheet)]
            file = "eval-table.html" if several else f"eval-{dataset}-{args.split}.html"
            page = Path(args.page or (Path(args.checkpoint[0]).parent if Path(args.checkpoint[0]).is_file() else Path()) / file)
            if os.environ.get("RANK", "0") == "0":                      # what there is so far
                write_page(page, " and ".join(args.checkpoint), [("Text to image", table(table_rows) if several else ""), *chapters])
    if several:
        print("\ntext to image")
        for name, scores in table_rows.items():
            print(f"{name:{max(map(len, table_rows))}}  {format_scores(scores)}")
    print(f"page: {page}", flush=True)


def search_gallery(args):
    """Brings the index up to date, then answers the queries, or serves the page."""
    import data
    import tbps
    if len(args.checkpoint) > 1:
        raise ValueError("a gallery is searched with one checkpoint")
    folder = data.need(args.gallery, "the gallery", "--gallery takes a folder of pictures")
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file; --gallery takes a folder of pictures")
    queries = [readable(q) for q in args.query]
    if args.queries:
        try:
            lines = data.need(args.queries, "the file of queries", "it has one query per line").read_text(encoding="utf-8-sig").splitlines()
        except (UnicodeDecodeError, IsADirectoryError):
            raise ValueError(f"{args.queries} is no text in UTF-8 with a query per line") from None
        queries += [readable(line.expandtabs(1)) for line in lines if line.strip()]
    if any(not q.strip() for q in queries):
        raise ValueError("a query is empty: describe the person in a sentence")
    if args.explain and not queries:
        raise ValueError("--explain shows maps for the pictures that a query finds: give one with --query")
    if args.queries and not queries:
        raise ValueError(f"{args.queries} has no query: it has one per line")
    tbps.join(args)
    server = Server(args.serve) if args.serve is not None and os.environ.get("RANK", "0") == "0" else None
    model, tokenizer, info = open_model(args.checkpoint[0], args.device, args.tokenizer, args.size)
    weights, rank = weights_id(model, info), int(os.environ.get("RANK", 0))
    if args.index and Path(args.index).is_dir():
        raise ValueError(f"{args.index} is a folder; --index names a file in it")
    file = re.sub(r"\.(f16|jsonl)$", "", args.index) if args.index else f"{folder.resolve()}-{weights[:8]}"
    index = Index(file, weights, model.arch["embed"]) if rank == 0 else None
    view = data.EvalView(info["size"], info["norm"], info["resize"])
    bad, skipped, failed = update_index(index, model, view, info["size"], folder, args.device, args.workers)
    if rank:
        return
    if bad:
        print(f"skipped, as they cannot be read as pictures ({len(bad):,}): {', '.join(map(readable, bad))}", file=sys.stderr)
    if skipped:
        print("skipped, as only " + " ".join(sorted(SUFFIXES)) + " are read: " +
              ", ".join(f"{number:,} {ending}" for ending, number in skipped.most_common()), file=sys.stderr)
    for e in failed:
        print(f"{readable(e.filename)} cannot be listed ({e.strerror}); what the index holds of it is kept", file=sys.stderr)
    if not index.starts:
        raise ValueError(f"{folder} holds no picture ({', '.join(sorted(SUFFIXES))}) that can be read")
    print(f"{len(index.starts):,} pictures; index: {readable(index.rows_file)}", flush=True)
    search = Search(model, tokenizer, info, folder, index, args.device)

    def chapters():
        for query, found in zip(queries, search.top(search.encode(queries), args.top)):
            if left := search.left_out(query):
                print(f"{query[:40]}...: its last {left:,} tokens were not read; there is room for 75, about 55 words", file=sys.stderr)
            print(f"\n{query}" + "".join(f"\n{rank:4d}  {score:.3f}  {search.name(row)}" for rank, (row, score) in enumerate(found, start=1)))
            why = "".join(explained(search, row, query) for row, _ in found[:args.explain])
            yield query, results(search, found) + (why and f"<p>{WHY}</p>{why}")
    if queries:
        write_page(args.page or "search.html", f"{readable(folder)}, {info['method']}", chapters())
        print(f"\npage: {args.page or 'search.html'}", flush=True)
    if server:
        serve(search, server)


def main():
    import data
    import tbps
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--checkpoint", nargs="+", default=[], help="best.pt or last.pt of a run, or the weights of a CLIP: a file, a folder or a hub id (zero-shot)")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda, cpu or mps (default: cuda where there is one)")
    p.add_argument("--workers", type=int, default=2, help="processes that decode images (default: 2)")
    p.add_argument("--page", metavar="FILE", help="the page to write (default: eval-DATASET-SPLIT.html beside the checkpoint; search.html here)")
    p.add_argument("--tokenizer", help="CLIP's vocabulary, for the weights of a CLIP (default: beside them)")
    p.add_argument("--size", type=image_size, metavar="HxW", help="what a CLIP sees, in pixels, e.g. 384x128 (default: as it was trained)")
    g = p.add_argument_group("scores")
    g.add_argument("--dataset", nargs="+", choices=data.DATASETS, help="what to score on (default: what the checkpoint was trained on)")
    g.add_argument("--data-root", help="the set's folder or its parent; for csv the file (default: that of the training run)")
    g.add_argument("--split", choices=["train", "val", "test"], default="test", help="which split (default: test)")
    g.add_argument("--features", metavar="FILE", help="an .npz with query (Q, D), gallery (G, D), q_pid (Q,), g_pid (G,), and own (Q,) if wanted: scores of any model")
    g = p.add_argument_group("search")
    g.add_argument("--gallery", metavar="DIR", help="a folder of pictures, at any depth: " + ", ".join(sorted(SUFFIXES)))
    g.add_argument("--query", nargs="+", action="extend", default=[], metavar="TEXT", help="whom to find; each text in quotes")
    g.add_argument("--queries", metavar="FILE", help="a text file with a query per line")
    g.add_argument("--top", type=int, default=10, help="how many pictures (default: 10)")
    g.add_argument("--index", metavar="FILE", help="where the embeddings are kept (default: beside the gallery)")
    g.add_argument("--explain", type=int, default=0, metavar="N", help="show for the first N pictures of a query which parts answer to its words")
    g.add_argument("--serve", nargs="?", type=int, const=8000, metavar="PORT", help="a search page on localhost (default port: 8000)")
    g = p.add_argument_group("export")
    g.add_argument("--export", metavar="DIR", help="write both encoders as torch.export programs, and check them")
    args = p.parse_args()
    tbps.check_device(args.device)
    if args.page:
        data.need(Path(args.page).absolute().parent, "the folder for the page", "make it, or name another file with --page")
    if args.page or args.query or args.queries:
        check_page(args.page or "search.html")
    if "" in (args.gallery, args.queries, args.index, args.page, args.features, args.export, *args.checkpoint):
        raise ValueError("an option was given an empty text; is a variable of the shell not set?")
    if sum(map(bool, (args.features, args.export, args.gallery))) > 1 or args.features and (args.checkpoint or args.page) or args.export and (args.dataset or args.page):
        raise ValueError("one thing at a time: --features FILE, --checkpoint C --export DIR, --checkpoint C --gallery PHOTOS, or --checkpoint C for scores")
    if args.top < 1 or args.explain < 0 or args.workers < 0 or args.serve is not None and not 0 <= args.serve <= 65535:
        raise ValueError("--top must be at least 1, --explain and --workers at least 0, and a port at most 65535")
    if (args.query or args.queries or args.serve is not None) and not args.gallery:
        raise ValueError("name the folder to search with --gallery")
    if args.features:
        return score_features(args.features)
    if not args.checkpoint:
        raise ValueError("name a checkpoint with --checkpoint, or features with --features; --help tells what can be done")
    if args.export:
        model, tokenizer, info = open_model(args.checkpoint[0], "cpu", args.tokenizer, args.size)
        worst = export(model, tokenizer, info, Path(args.export))
        print(f"{args.export}: image.pt2, text.pt2, tokenizer.json, info.json; they differ from the checkpoint by {worst:.1g} at most")
    elif args.gallery:
        search_gallery(args)
    else:
        compare(args)


def image_size(text):
    """HxW -> (H, W), for argparse."""
    if not re.fullmatch("[1-9][0-9]{0,3}x[1-9][0-9]{0,3}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no size; height x width, like 384x128")
    return tuple(map(int, text.split("x")))


def score_features(file):
    """Prints the scores of features in an .npz."""
    import data
    kinds = dict(query=(2, "f", np.float32), gallery=(2, "f", np.float32), q_pid=(1, "iu", np.int64), g_pid=(1, "iu", np.int64), own=(1, "iu", np.int64))
    try:
        with np.load(data.need(file, "the features", "an .npz with query, gallery, q_pid, g_pid")) as archive:
            found = {name: np.asarray(archive[name]) for name in kinds if name in archive}
    except FileNotFoundError:
        raise
    except (ValueError, OSError, EOFError, TypeError, AttributeError, zipfile.BadZipFile, zlib.error):
        raise ValueError(f"{file} is no .npz of arrays that can be read: numpy.savez writes one") from None
    if missing := kinds.keys() - {"own"} - found.keys():
        raise ValueError(f"{file} lacks {', '.join(sorted(missing))}; of what is wanted it has {', '.join(sorted(found)) or 'nothing'}")
    if wrong := [n for n, v in found.items() if v.ndim != kinds[n][0] or v.dtype.kind not in kinds[n][1]]:
        raise ValueError(f"{file}: {wrong[0]} is {found[wrong[0]].dtype} {found[wrong[0]].shape}; features are floating-point (N, D), ids whole numbers (N,)")
    x = {n: torch.from_numpy(np.ascontiguousarray(v, kinds[n][2])) for n, v in found.items()}
    Q, G, D = len(x["query"]), *x["gallery"].shape
    if x["query"].shape != (Q, D) or not D or len(x["q_pid"]) != Q or len(x["g_pid"]) != G or "own" in x and len(x["own"]) != Q:
        raise ValueError(f"{file}: the shapes do not fit: " + ", ".join(f"{name} {tuple(v.shape)}" for name, v in x.items()))
    for name in ("query", "gallery"):
        if len(zero := (x[name] == 0).all(dim=1).nonzero()):
            raise ValueError(f"{file}: row {int(zero[0])} of {name} is all zeros, which is no direction")
    if "own" in x and not ((x["own"] >= 0) & (x["own"] < G)).all():
        raise ValueError(f"{file}: own must be rows of the gallery, 0 to {G - 1}")
    print(f"{Q:,} queries, {G:,} gallery images, {D} numbers each")
    print(f"text to image               {format_scores(retrieval_metrics(x['query'], x['gallery'], x['q_pid'], x['g_pid']))}")
    if "own" in x:
        print(f"text to other images        {format_scores(retrieval_metrics(*(x[n] for n in ('query', 'gallery', 'q_pid', 'g_pid', 'own'))))}")


if __name__ == "__main__":
    from data import command
    command(main)
