"""Evaluation and search: ranking metrics, embedding, report pages, and search in a folder of images.

    python eval.py --checkpoint runs/NAME/best.pt                                    scores on the data set of the run
    python eval.py --checkpoint A B --dataset cuhk icfg --data-root DIR              a table: checkpoints x data sets
    python eval.py --checkpoint C --gallery PHOTOS --query "a woman in a green coat" the images that fit best
    python eval.py --checkpoint C --gallery PHOTOS --serve                           the same as a page in the browser
    python eval.py --features FILE.npz                                               scores of another model's features

C is a checkpoint of tbps.py or distill.py, or the weights of a CLIP. Scores are R@1, R@5, R@10, mAP and mINP in percent
of text to image (the protocol of the field: each caption is a query, each image is in the gallery), image to text, and
text to image excluding the source image of the query. The page shows queries and their top 10.

As a module, this file imports nothing of ours: copy it, or one of its chapters. Scoring CUHK-PEDES (6,156 queries,
3,074 images) takes 0.4 s on one CPU core."""

import argparse
import base64
import collections
import functools
import hashlib
import html
import io
import itertools
import json
import math
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

def check_features(query, gallery, q_pid, g_pid, own):
    Q, G, D = query.shape[:1], gallery.shape[:1], query.shape[1:]
    shapes = [tuple(x.shape) for x in (query, gallery, q_pid, g_pid, own) if x is not None]
    if len(D) != 1 or shapes != [Q + D, G + D, Q, G, Q][:len(shapes)]:
        raise ValueError(f"the shapes of query, gallery, q_pid, g_pid, own do not fit: {shapes}")
    if 0 in Q + G + D:
        raise ValueError(f"nothing to score: {Q[0]} queries, {G[0]} gallery images, {D[0]} numbers each")
    norm = torch.cat([query, gallery]).norm(dim=1)
    if not ((norm > 0) & (norm < torch.inf)).all():                     # False for NaN, too
        raise ValueError("a row of the features is all zeros, or holds values that are not finite")
    if own is not None and not ((own >= 0) & (own < G[0])).all():
        raise ValueError(f"own must be rows of the gallery, 0 to {G[0] - 1}")
    if (lost := ~torch.isin(q_pid, g_pid)).any():
        i = int(lost.nonzero()[0])
        raise ValueError(f"{int(lost.sum())} queries have no image of their person in the gallery, "
                         f"e.g. query {i} (pid {int(q_pid[i])})")


def match_ranks(query, gallery, q_pid, g_pid, own=None):
    """-> (Q, R): the ranks (1 = first) of each query's correct images, in order, filled up with infinity."""
    G, R = len(gallery), int(g_pid.unique(return_counts=True)[1].max())
    ranks = []
    for rows in torch.arange(len(query), device=query.device).split(max(128, 2 ** 19 // G)):
        score = query[rows] @ gallery.T                                                                 # (chunk, G)
        if own is not None:
            score.scatter_(1, own[rows, None], -torch.inf)
        wrong = q_pid[rows, None] != g_pid
        mark, correct = score.masked_fill(wrong, -torch.inf).topk(R, dim=1)     # (chunk, R) scores, gallery indices
        on_cpu = score.device.type == "cpu"                             # where numpy sorts faster
        ordered = torch.from_numpy(np.sort(score.numpy())) if on_cpu else score.sort(dim=1).values
        higher = G - torch.searchsorted(ordered, mark, right=True)      # how many images score higher
        tied = G - torch.searchsorted(ordered, mark) > higher + 1
        for i, k in tied.nonzero().tolist():                            # rare, so a loop is fast enough
            higher[i, k] += (score[i, :correct[i, k]] == mark[i, k]).sum()
        ranks.append(torch.where(mark.isfinite(), higher + 1.0, torch.inf).sort(dim=1).values)
    return torch.cat(ranks)


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
    Raises ValueError if a query has no correct image in the gallery, or if features are not finite, zero or do not fit.
    """
    query, gallery = (torch.as_tensor(x).float() for x in (query, gallery))
    q_pid, g_pid = (torch.as_tensor(p).to(query.device) for p in (q_pid, g_pid))
    own = None if own is None else torch.as_tensor(own).to(query.device)
    check_features(query, gallery, q_pid, g_pid, own)
    ranks = match_ranks(F.normalize(query, dim=1), F.normalize(gallery, dim=1), q_pid, g_pid, own)      # (Q, R)
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
    return " ".join(f"({value} queries dropped)" if name == "dropped" else f"{name} {value:.2f}"
                    for name, value in scores.items())


# ---- embedding and evaluation ---------------------------------------------------------------------------------------

EXCLUDED = "text to image, excluding the source image"


def progress_bar(*items, **options):
    """tqdm. Without a terminal, as in a log file, it prints a line a minute instead of a bar."""
    if not sys.stderr.isatty():
        line = "{desc}: {n_fmt} of {total_fmt}, {elapsed} elapsed, {remaining} left, {rate_fmt}{postfix}\n"
        options |= dict(delay=60, mininterval=60, maxinterval=60, miniters=1, bar_format=line)
    return tqdm(*items, **options)


def process():
    """(rank, number) of the processes of torchrun; (0, 1) without it."""
    if torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def all_gather_rows(x):
    """Rows rank, rank + W, ... of each of W processes -> all rows, in order, on the CPU. A process may have none."""
    rank, ranks = process()
    if ranks == 1:
        return x
    parts = [None] * ranks
    torch.distributed.all_gather_object(parts, x)
    in_turn = itertools.zip_longest(*parts)                             # None where a process has a row less
    return torch.stack([row for turn in in_turn for row in turn if row is not None])


class Images(torch.utils.data.Dataset):
    """Images as the encoder takes them: view(item) -> pixels (3, H, W)."""

    def __init__(self, items, view):
        self.items, self.view = items, view

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        return self.view(self.items[i])


def evaluation_set(records, preprocessing, tokenizer):
    """The records of a split, dict(image, captions, pid), as `evaluate` takes them -> images, tokens, pid, source."""
    captions = [preprocessing.text(c) for r in records for c in r["captions"]]
    source = torch.tensor([n for n, r in enumerate(records) for _ in r["captions"]])
    pid = torch.tensor([r["pid"] for r in records])
    return Images([r["image"] for r in records], preprocessing.image), tokenizer(captions), pid, source


@torch.no_grad()
def embed_batches(model, images, device, workers, batch):
    """Yield the features (B, D) of a dataset of pixels (3, H, W), batch by batch: fp32 of unit length, on the CPU."""
    pinned = torch.device(device).type == "cuda"
    model.eval()
    for pixels in torch.utils.data.DataLoader(images, batch, num_workers=workers, pin_memory=pinned):
        yield F.normalize(model.encode_image(pixels.to(device, non_blocking=True)).float(), dim=1).cpu()


def embed_images(model, images, device="cpu", workers=0, batch=256, progress=True):
    """A dataset of pixels (3, H, W) -> (G, D) fp32 features of unit length, on the CPU, in order."""
    batches, total = embed_batches(model, images, device, workers, batch), -(-len(images) // batch)
    bar = progress_bar(batches, total=total, desc="images", leave=False, disable=not progress)
    return torch.cat(list(bar) or [torch.empty(0, 0)])


@torch.no_grad()
def embed_texts(model, tokens, batch=128, progress=False):
    """(Q, T) ids -> (Q, D) fp32 features of unit length, on the CPU, in order.

    A batch holds captions of similar length: the text encoder costs as much as the longest needs."""
    model.eval()
    order = torch.argsort(tokens.argmax(dim=1), stable=True)
    if not len(tokens):                                                 # one of many processes may have none
        return torch.empty(0, 0)
    bar = progress_bar(order.split(batch), desc="captions", leave=False, disable=not progress)
    features = [F.normalize(model.encode_text(tokens[rows]).float(), dim=1).cpu() for rows in bar]
    return torch.cat(features)[torch.argsort(order)]


def embed(model, images, tokens, device="cpu", workers=0, progress=True):
    """-> features of unit length, images (G, D) and texts (Q, D). Each process embeds its part; all get all of them.

    images: a dataset of pixels (3, H, W);  tokens (Q, T)"""
    rank, ranks = process()
    part = torch.utils.data.Subset(images, range(rank, len(images), ranks))
    image = embed_images(model, part, device, workers, progress=progress and rank == 0)
    text = embed_texts(model, tokens[rank::ranks], progress=progress and rank == 0)
    return all_gather_rows(image), all_gather_rows(text)


def evaluate(model, images, tokens, pid, source, device="cpu", workers=0, progress=True):
    """Score a split -> {"text to image": scores, "image to text": ..., EXCLUDED: ...}, image (G, D), text (Q, D).

    images: a dataset of G images as pixels (3, H, W);  tokens (Q, T): all captions;  pid (G,): the person of each image
    source (Q,): index of the source image of each caption. The third row is missing if nobody has two images.
    """
    if not all(p.isfinite().all() for p in model.parameters()):
        raise FloatingPointError("the weights are not finite: training diverged in its last steps; try a lower --lr")
    image, text = embed(model, images, tokens, device, workers, progress)
    rows = {"text to image": retrieval_metrics(text, image, pid[source], pid),
            "image to text": retrieval_metrics(image, text, pid, pid[source])}
    if len(pid.unique()) < len(pid):
        rows[EXCLUDED] = retrieval_metrics(text, image, pid[source], pid, source)
    return rows, image, text


# ---- report pages ---------------------------------------------------------------------------------------------------
#
# Every page is one self-contained HTML file. Nothing is told by colour alone, text has a contrast of at least 4.5 : 1,
# and every picture has an alternative text.

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 78em; padding: 0 1em }
body { color: #222; background: #fff }  h1 { font-size: 1.5em }  h2 { margin-top: 2em; font-size: 1.15em }
h1, h2, .hit, .settings { overflow-wrap: anywhere }  .ending { white-space: nowrap }  .legend { color: #444 }
table { border-collapse: collapse }  td, th { padding: .2em .9em .2em 0; text-align: right; font-weight: normal }
td:first-child, th:first-child { text-align: left }  thead th { border-bottom: 1px solid #777; font-weight: 600 }
.settings { columns: 4 16em; font: 13px ui-monospace, monospace }  .row { margin: 1.1em 0 }  .row p { margin: 0 0 .3em }
figure { display: inline-block; margin: 0 .5em .5em 0; text-align: center; vertical-align: top; font-size: 13px }
.row img { height: 112px; border: 4px solid transparent; border-radius: 4px }  .row .source { margin-right: 1.5em }
.row .large img { height: auto; max-width: 100% }  .source img { border-color: #777 }
.right img { border-color: #147a35 }  .wrong img { border-color: #c62817; border-style: dashed }
.hits { display: flex; flex-wrap: wrap; gap: 1em }  .hit { width: 9.5em; text-align: left }
.hit img { max-width: 9.5em; border-radius: 4px }
svg { margin-right: 2em; max-width: 100% }  svg text { font: 12px system-ui, sans-serif; fill: #444 }
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

    title = html.escape(title)
    out = [f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
           f'aria-label="{title} by epoch"><text x="{left}" y="16" style="font-weight:600">{title}</text>'
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
    if path.exists() and not (path.is_file() and path.open("rb").read(15) == b"<!doctype html>"):
        raise ValueError(f"{path} exists and is no page, so it is not replaced; name another file with --page")


def write_page(path, title, chapters):
    """Write a self-contained HTML file. chapters: (heading, HTML) pairs, perhaps from a generator."""
    check_page(path)
    body = "".join(f"<h2>{html.escape(heading)}</h2>{content}" for heading, content in chapters if content)
    head = ("<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
            f"<title>{html.escape(title)}</title><style>{STYLE}</style><main><h1>{html.escape(title)}</h1>")
    part(path).write_text(f"{head}{body}</main></html>", encoding="utf-8")
    part(path).replace(path)


# ---- the index of a gallery -----------------------------------------------------------------------------------------

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp"}
OTHER_SUFFIXES = {".avif", ".gif", ".heic", ".heif", ".jfif", ".jp2", ".jpe", ".tif", ".tiff"}       # counted, not read


def gallery_files(folder, skipped, failed):
    """Yield [path below the folder, bytes, modification time in ns] of each image file, at any depth, in order.

    Hidden files, symlinks that are broken or leave the folder, and anything but regular files are ignored.
    skipped: a Counter, receives the endings of images that are not read
    failed: a list, receives the OSError of each folder that cannot be listed and of each file that cannot be examined
    """
    root, prefix = os.path.join(os.path.realpath(folder), ""), len(os.path.join(folder, ""))
    for where, folders, files in os.walk(folder, onerror=failed.append):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        for name in sorted(f for f in files if not f.startswith(".")):
            path, ending = os.path.join(where, name), os.path.splitext(name)[1].lower()
            skipped.update({ending} & OTHER_SUFFIXES)
            if ending not in SUFFIXES or os.path.islink(path) and not os.path.realpath(path).startswith(root):
                continue
            try:
                state = os.stat(path)
                if stat.S_ISREG(state.st_mode):
                    yield [path[prefix:], state.st_size, state.st_mtime_ns]
            except FileNotFoundError:                                   # a broken symlink
                pass
            except OSError as e:
                failed.append(e)


class Index:
    """Embeddings of the images of a folder, in two files that other programs can read in one line each:

    FILE.f16     np.fromfile("FILE.f16", np.float16).reshape(-1, D)                 row n: a feature of unit length
    FILE.jsonl   [json.loads(line) for line in open("FILE.jsonl")][1:]              row n: [path, bytes, time in ns]

    The first line of FILE.jsonl is {"weights": ..., "width": D}: embeddings of other weights are replaced. Rows are
    appended batch by batch, so an interrupted run loses nothing; opening cuts both files to the shorter one. A million
    images take about 120 MB of memory, for the lines. Raises ValueError for files that are not an index.
    """

    def __init__(self, file, weights, width):
        self.rows_file, self.list_file = Path(f"{file}.f16"), Path(f"{file}.jsonl")
        self.width, self.head, self.lines, self.size = width, self.line(dict(weights=weights, width=width)), [], 0
        if part(self.list_file).exists() and not part(self.rows_file).exists():                         # see `keep`
            part(self.list_file).replace(self.list_file)
        there = [p for p in (self.list_file, self.rows_file) if p.exists()]
        head, *lines = (self.list_file.open("rb").readlines() if self.list_file in there else []) or [b""]
        if there and not head.startswith(b'{"weights": "'):
            raise ValueError(f"{there[0]} exists and is no index; remove it, or name another file with --index")
        if head == self.head:
            size = self.rows_file.stat().st_size if len(there) == 2 else 0
            self.lines = [line for line in lines[:size // (2 * width)] if line.endswith(b"\n")]
            self.size = len(head) + sum(map(len, self.lines))
            for path, size in (self.list_file, self.size), (self.rows_file, 2 * width * len(self.lines)):
                if path in there and path.stat().st_size != size:
                    os.truncate(path, size)

    @staticmethod
    def line(entry):
        return (json.dumps(entry) + "\n").encode()

    def features(self):
        """(N, D) float16, mapped into memory: only what is used is read."""
        return np.memmap(self.rows_file, np.float16, "c", shape=(len(self.lines), self.width))

    def check_writable(self):
        """A finished index may be read-only; call this before work that would be lost."""
        places = [self.rows_file.absolute().parent] + [p for p in (self.rows_file, self.list_file) if p.exists()]
        if not all(os.access(p, os.W_OK) for p in places):
            raise OSError(f"{places[0]} is no folder that the index can be written to; --index FILE puts it elsewhere")

    def append(self, rows, lines):
        """Append rows, float16 (n, D), and the line of each: first the rows, then what makes them count."""
        if not self.lines:                                              # new, or of other weights
            self.keep([])
        if self.list_file.stat().st_size != self.size:
            raise ValueError(f"{self.list_file} has changed meanwhile: is another search filling the same index?")
        with open(self.rows_file, "r+b") as f:
            f.seek(2 * self.width * len(self.lines))
            f.write(rows.tobytes())
            f.truncate()
        with open(self.list_file, "ab") as f:
            f.writelines(lines)
        self.lines += lines
        self.size += sum(map(len, lines))

    def keep(self, wanted):
        """Keep only the rows with wanted (N,) True. Both files are written anew, then replaced, the rows first.

        If the program ends between the two, FILE.jsonl.part is there alone; opening puts it in its place."""
        numbers, old = np.flatnonzero(wanted), self.features() if self.lines else None
        self.lines = list(itertools.compress(self.lines, wanted))
        self.size = len(self.head) + sum(map(len, self.lines))
        with open(part(self.rows_file), "wb") as f:
            for some in np.array_split(numbers, len(numbers) // 4096 + 1):
                f.write(old[some].tobytes() if len(some) else b"")
        with open(part(self.list_file), "wb") as f:
            f.writelines([self.head, *self.lines])
        del old                                                         # some systems do not replace a mapped file
        part(self.rows_file).replace(self.rows_file)
        part(self.list_file).replace(self.list_file)


def read_or_nan(folder, view, size, line):
    """The pixels (3, H, W) of a line of the index; NaN, and so a feature of NaN, for a file that cannot be read."""
    try:
        return view(Path(folder) / json.loads(line)[0])
    except (OSError, ValueError, Image.DecompressionBombError):
        return torch.full((3, *size), torch.nan)


def find_changes(index, folder):
    """Compare a folder with its index, and drop the rows of files that are gone. What cannot be listed is not gone.

    -> lines of new and changed files, Counter of skipped endings, [OSError] of what cannot be listed"""
    gone, new, skipped, failed = set(index.lines), [], collections.Counter(), []
    for line in map(index.line, gallery_files(folder, skipped, failed)):
        if line in gone:
            gone.remove(line)
        else:
            new.append(line)
    hidden = [os.path.relpath(e.filename, folder) for e in failed]
    if "." in hidden:
        raise ValueError(f"{folder} cannot be listed: {failed[0].strerror}")
    if hidden:
        below = tuple(place + os.sep for place in hidden)
        gone = {line for line in gone if not (json.loads(line)[0] + os.sep).startswith(below)}
    if gone and len(gone) == len(index.lines) and not new:              # a disk that is not mounted
        raise ValueError(f"{folder} holds no picture any more; its index is left as it is: {index.list_file}")
    if new or gone:
        index.check_writable()
    if gone:
        index.keep([line not in gone for line in index.lines])
    return new, skipped, failed


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
    files = Images(new[rank::ranks], functools.partial(read_or_nan, folder, view, size))
    batches = embed_batches(model, files, device, workers, batch)
    bar = progress_bar(total=len(new), unit=" images", desc="embedding", disable=rank > 0)
    for start in range(0, len(new), batch * ranks):
        lines = new[start:start + batch * ranks]
        features = all_gather_rows(next(batches, torch.empty(0, 0)))                                    # (n, D)
        readable = features.isfinite().all(dim=1)
        bad += [json.loads(line)[0] for line, ok in zip(lines, readable) if not ok]
        if rank == 0 and readable.any():
            index.append(features[readable].half().numpy(), list(itertools.compress(lines, readable)))
        bar.update(len(lines))
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

def printable(path):
    """A path or an argument as text that can be printed: other bytes and control characters become U+FFFD."""
    text = os.fsencode(path).decode("utf-8", "replace")
    return "".join(c if c.isprintable() else "\ufffd" for c in text)


class Search:
    """A model and the images of a folder with their embeddings: what the command line and the search page ask.

    preprocessing: .image(path or PIL) -> pixels (3, H, W), .text(query) -> text as in training
    data: the module, for load_image, normalize_text and tag_words
    """

    def __init__(self, model, tokenizer, preprocessing, data, folder, index, device):
        self.model, self.tokenizer, self.preprocessing, self.data = model, tokenizer, preprocessing, data
        self.folder, self.lines, self.features = Path(folder), index.lines, index.features()
        self.device, self.lock = device, threading.Lock()

    def path(self, row):
        """The path below the folder."""
        return json.loads(self.lines[row])[0]

    def load(self, row, least=None):
        """The PIL image of a row, reduced to no less than `least` pixels a side. ValueError if it is gone."""
        path = self.folder / self.path(row)
        if not path.exists() or not path.resolve().is_relative_to(self.folder.resolve()):               # or led out
            raise ValueError(f"{printable(self.path(row))} is not in the folder any more")
        return self.data.load_image(path, least)

    def encode(self, texts):
        """Queries -> (Q, D) of unit length. ValueError if cleaning leaves nothing of one."""
        cleaned = [self.preprocessing.text(t) for t in texts]
        if empty := [text for text, rest in zip(texts, cleaned) if not rest.strip()]:
            raise ValueError(f"the query {empty[0][:40]!r} has no word: describe the person in a sentence")
        with self.lock:
            return embed_texts(self.model, self.tokenizer(cleaned))

    def unread(self, text):
        """How many tokens of a query are not read: the encoder takes 75, and cleaning keeps 77 words."""
        def count(words):
            return len(self.tokenizer.bpe.encode(self.data.normalize_text(words)).ids)
        whole = " ".join(filter(None, map(self.preprocessing.text, text.split())))                      # nothing is cut
        return count(whole) - min(75, count(self.preprocessing.text(text)))

    def top(self, query, number):
        """[(row, cosine), ...] for each query (Q, D)."""
        score, row = nearest(self.features, query, number)
        return [list(zip(*found)) for found in zip(row.tolist(), score.tolist())]

    def like(self, row, number):
        """[(row, cosine), ...] of the images most similar to an image of the gallery, without itself."""
        found = self.top(torch.from_numpy(self.features[row:row + 1]).float(), number + 1)[0]
        return [(other, score) for other, score in found if other != row][:number]

    def explain(self, picture, text):
        """What in a PIL image the words of a text respond to; see `word_maps`."""
        pixels, text = self.preprocessing.image(picture), self.preprocessing.text(self.data.normalize_text(text))
        with self.lock:
            return word_maps(self.model, self.tokenizer, pixels, text, self.data.tag_words, self.device)


@torch.no_grad()
def word_maps(model, tokenizer, pixels, text, tag, device="cpu", most=6):
    """Which parts of an image (3, H, W) the words of a text respond to.

    -> [(word, what it adds to the cosine, (h, w) map), ...]: the nouns and adjectives that add most, in text order

    The direction of a word is the text feature minus the feature of the text without the word. The map is how much the
    image loses in this direction when a window is painted grey (occlusion); windows overlap by half. It shows what the
    model reacts to, not where a thing is: a noun that most images share has hardly a direction of its own.
    tag: text -> [(start, end, kind), ...] with kind N for nouns, J for adjectives
    """
    words = [(a, b) for a, b, kind in tag(text) if kind in "NJ"]
    if not words:
        return []
    texts = [text] + [(text[:a] + text[b:]).strip() or "a person" for a, b in words]
    whole, *without = F.normalize(model.encode_text(tokenizer(texts)).float(), dim=1).cpu()
    directions = whole - torch.stack(without)                                                           # (W, D)
    (h, w), (H, W) = model.image.grid, pixels.shape[1:]
    step = math.ceil((h * w / 100) ** 0.5)                              # at most a hundred windows of two steps
    windows = [(y, x, min(h, y + 2 * step), min(w, x + 2 * step))
               for y in range(0, max(1, h - step), step) for x in range(0, max(1, w - step), step)]
    hidden = pixels.repeat(len(windows) + 1, 1, 1, 1)
    for picture, (top, left, bottom, right) in zip(hidden[1:], windows):
        picture[:, H * top // h:H * bottom // h, W * left // w:W * right // w] = 0
    image = torch.cat([F.normalize(model.encode_image(some.to(device)).float(), dim=1).cpu()
                       for some in hidden.split(64)])
    covered, loss = torch.zeros(h, w), torch.zeros(len(words), h, w)
    for (top, left, bottom, right), lost in zip(windows, (image[:1] - image[1:]) @ directions.T):
        loss[:, top:bottom, left:right] += lost[:, None, None]
        covered[top:bottom, left:right] += 1
    adds = image[0] @ directions.T
    shown = sorted(adds.argsort(descending=True)[:most].tolist())
    return [(text[slice(*words[n])], adds[n].item(), loss[n] / covered) for n in shown]


MAPS = ("<p class=legend>The number is what the word adds to the score. Red: the parts that speak for the word. Blue, "
        "if it lowers the score: the parts that speak against it. The maps show what the model reacts to, which need "
        "not be where the thing is.</p>")


def explained(search, row, text):
    """HTML: an image beside the maps of the words of a text, all on one scale. A map is at least 150 pixels wide."""
    picture = search.load(row, 600)
    found = [(word, adds, heat if adds > 0 else -heat) for word, adds, heat in search.explain(picture, text)]
    height = round(min(600, max(240, 160 * picture.height / picture.width)))
    picture.thumbnail((4 * height, 2 * height))
    grey, most = picture.convert("L").convert("RGB"), max([1e-6] + [heat.max().item() for *_, heat in found])
    shown = [figure(picture, printable(search.path(row)), "the picture", "large", height)]
    for word, adds, heat in found:
        mask = Image.fromarray((191 * (heat / most).clamp(0, 1).sqrt()).byte().numpy())
        colour = Image.new("RGB", picture.size, (230, 30, 20) if adds > 0 else (20, 60, 230))
        painted = Image.composite(colour, grey, mask.resize(picture.size, Image.Resampling.BICUBIC))
        shown.append(figure(painted, f"map of the word {word}", f"{html.escape(word)} {adds:+.3f}", "large", height))
    return f"<div class=row>{''.join(shown)}</div>"


def breakable(path):
    """A path as HTML, which is never broken shortly before or inside its ending."""
    name = printable(path)
    cut = max(0, len(os.path.splitext(name)[0]) - 4)
    return f"{html.escape(name[:cut])}<span class=ending>{html.escape(name[cut:])}</span>"


def results(search, found, links=None):
    """HTML: the images of [(row, cosine), ...], by rank. links: row -> HTML to put below its image."""
    cells = []
    for rank, (row, score) in enumerate(found, start=1):
        name = printable(search.path(row))
        try:
            shown = f'<img src="{thumbnail(search.load(row, 384), 192)}" alt="{html.escape(name)}">'
        except (OSError, ValueError):
            shown = f"<span>{html.escape(name)} cannot be read any more</span>"
        if links:
            shown = f'<a href="/photo?row={row}">{shown}</a>'
        cells.append(f"<figure class=hit>{shown}<figcaption><b>{rank}</b> {score:.3f}<br>{breakable(search.path(row))}"
                     f"{links(row) if links else ''}</figcaption></figure>")
    return f"<div class=hits>{''.join(cells)}</div>"


# ---- the search page ------------------------------------------------------------------------------------------------
#
# The browser sends the form and loads the pages: errors, titles and the way back are its own. The script only sends the
# form with Enter, and keeps what is typed while a search runs.

LONGEST = 5000      # characters of a query. Percent-encoded, they fit the 65,536 bytes that http.server reads of an URL
LOCAL = re.compile(r"(localhost|127\.0\.0\.1|\[::1\])(:[0-9]{1,5})?", re.IGNORECASE)
PAGE = """<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content="width=device-width">
<title>{title}</title><link rel=icon href=data:,><style>{style}
form {{ margin-bottom: 1.5em }}  button {{ font: inherit; padding: .3em 1em }}  input {{ font: inherit; width: 4.5em }}
textarea {{ display: block; width: 100%; box-sizing: border-box; font: inherit; margin: .3em 0; padding: .5em }}
.note {{ background: #f3f3f3; padding: .5em .8em }}  .more a {{ display: inline-block; line-height: 26px }}</style>
<header><h1>Find a person in {number:,} pictures</h1></header>
<form action=/ method=get role=search autocomplete=off><label for=q>Describe the person</label>
<textarea id=q name=q rows=2 autofocus maxlength={longest} placeholder="a woman in a green coat with a black backpack">
{text}</textarea>
<button>Search</button> <label>Show <input name=top type=number min=1 max=200 value={top}> pictures</label>
<p class=legend>Several lines describe the same person; their features are averaged.</p></form><main>{main}</main>
<script nonce={nonce}>
const text = document.forms[0].q
let sent = text.value
text.onkeydown = e => {{ if (e.key == "Enter" && !e.shiftKey) {{ e.preventDefault(); text.form.requestSubmit() }} }}
onbeforeunload = () => {{ sent = text.value }}
onpagehide = () => {{ if (text.value != sent) sessionStorage.typed = text.value }}
onpageshow = () => {{ if (sessionStorage.typed) {{ text.value = sessionStorage.typed; delete sessionStorage.typed }} }}
</script></html>"""


def whole_number(asked, name, low, high, default=None):
    """A number of the query string; the default if it is missing or empty."""
    value = asked.get(name, [""])[-1].strip()
    if value and not (re.fullmatch("[0-9]{1,9}", value) and low <= int(value) <= high):
        raise ValueError(f"{name} must be a number from {low} to {high}, not {value[:20]!r}")
    return int(value) if value else default


def answer(search, asked, text, top):
    """The main part of the page for a query string as a dict -> HTML. Raises ValueError in words for the user."""
    like, why = (whole_number(asked, name, 0, len(search.lines) - 1) for name in ("like", "why"))
    lines, main = [line for line in text.splitlines() if line.strip()], ""

    def links(row):
        why = html.escape(urlencode(dict(why=row, q=text, top=top)))
        return (f'<br><span class=more><a href="/?like={row}&amp;top={top}">more like this</a>'
                + f' &nbsp; <a href="/?{why}">why?</a>' * bool(lines) + "</span>")

    if len(text) > LONGEST:
        raise ValueError(f"a description of {len(text):,} characters is too long; a few sentences are enough")
    if like is not None:
        return f"<h2>Like {breakable(search.path(like))}</h2>{results(search, search.like(like, top), links)}"
    if not lines:
        return "<p class=note>Describe the person in a sentence.</p>" if "q" in asked else ""
    if why is not None:
        main += f"<h2>What the words respond to in {breakable(search.path(why))}</h2>"
        main += explained(search, why, " ".join(lines)) + MAPS
    if unread := sum(map(search.unread, lines)):
        main += f"<p class=note>{unread:,} tokens were not read: the model reads 75 tokens a line, about 55 words.</p>"
    query = F.normalize(search.encode(lines).mean(dim=0, keepdim=True), dim=1)
    return main + results(search, search.top(query, top)[0], links)


class Handler(BaseHTTPRequestHandler):
    """Answers a browser on this machine. Only row numbers come from outside, never a path."""
    timeout = 15                                                        # seconds for a client that sends nothing
    search = None

    def do_GET(self):
        if not LOCAL.fullmatch(self.headers.get("Host", "")):           # a name of another site that leads here
            return self.send(403, "text/plain", b"this page answers to localhost only\n")
        try:
            url = urlsplit(self.path)
            asked = parse_qs(url.query, keep_blank_values=True, max_num_fields=20)
            if url.path == "/":
                return self.send_page(asked)
            row = whole_number(asked, "row", 0, len(self.search.lines) - 1) if url.path == "/photo" else None
            if row is None:
                return self.send(404, "text/plain", b"there is nothing here\n")
            buffer = io.BytesIO()
            self.search.load(row).save(buffer, "JPEG", quality=92)
            self.send(200, "image/jpeg", buffer.getvalue())
        except (ConnectionError, TimeoutError):
            raise
        except (ValueError, OSError) as e:
            self.send(400, "text/plain; charset=utf-8", f"{e}\n".encode("utf-8", "replace"))

    def send_page(self, asked):
        """Send the page for a query string. On a mistake it keeps what was typed."""
        text, top, code = "\n".join(asked.get("q", [])), 20, 200
        try:
            top = whole_number(asked, "top", 1, 200, top)
            main = answer(self.search, asked, text, top)
        except (ValueError, OSError) as e:
            main, code = f"<p class=note>{html.escape(str(e))}</p>", 400
        nonce = base64.b64encode(os.urandom(12)).decode()
        title = " ".join(text.split())[:80] or ("similar pictures" if "like" in asked else "search")
        page = PAGE.format(style=STYLE, number=len(self.search.lines), text=html.escape(text), top=top, main=main,
                           nonce=nonce, title=html.escape(f"{title} - find a person"), longest=LONGEST)
        self.send(code, "text/html; charset=utf-8", page.encode("utf-8", "replace"),
                  f"default-src 'none'; img-src data: 'self'; style-src 'unsafe-inline'; script-src 'nonce-{nonce}'; "
                  "form-action 'self'; base-uri 'none'; frame-ancestors 'none'")

    def send(self, code, kind, body, policy="default-src 'none'; style-src 'unsafe-inline'"):
        self.send_response(code)
        for name, value in {"Content-Type": kind, "Content-Length": len(body), "Content-Security-Policy": policy,
                            "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer",
                            "Cache-Control": "no-store", "Cross-Origin-Resource-Policy": "same-origin"}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


class Server(ThreadingHTTPServer):
    """Holds a port of localhost; requests that come before serve_forever wait."""
    daemon_threads, request_queue_size = True, 128

    def __init__(self, port):
        try:
            super().__init__(("127.0.0.1", port), Handler)
        except OSError as e:
            raise OSError(f"port {port} cannot be used ({e.strerror}); take another with --serve PORT") from None

    def handle_error(self, request, client):
        if not isinstance(sys.exc_info()[1], (ConnectionError, TimeoutError)):
            super().handle_error(request, client)


# ---- the command ----------------------------------------------------------------------------------------------------

def image_size(text):
    """HxW -> (H, W), for argparse."""
    if not re.fullmatch("[1-9][0-9]{0,3}x[1-9][0-9]{0,3}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no size; height x width, like 384x128")
    return tuple(map(int, text.split("x")))


def parse_args(data):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cuda = "cuda" if torch.cuda.is_available() else "cpu"
    p.add_argument("--checkpoint", nargs="+", default=[], metavar="C", help="of ours, or a CLIP (file, folder, hub id)")
    p.add_argument("--device", default=cuda, help="cpu, mps, cuda or cuda:N (default: cuda where there is one)")
    p.add_argument("--workers", type=int, default=2, help="processes that decode images (default: 2)")
    p.add_argument("--page", metavar="FILE", help="the page to write (default: beside the checkpoint, or search.html)")
    p.add_argument("--tokenizer", metavar="FILE", help="vocabulary of a CLIP (default: beside its weights)")
    p.add_argument("--size", type=image_size, metavar="HxW", help="input of a CLIP, e.g. 384x128 (default: its own)")
    g = p.add_argument_group("scores")
    g.add_argument("--dataset", nargs="+", choices=data.DATASETS, help="data sets (default: that of the training run)")
    g.add_argument("--data-root", help="the set's folder or its parent; for csv the file (default: as in training)")
    g.add_argument("--split", choices=["train", "val", "test"], default="test", help="which split (default: test)")
    g.add_argument("--features", metavar="FILE", help=".npz of query (Q, D), gallery (G, D), q_pid, g_pid, maybe own")
    g = p.add_argument_group("search")
    g.add_argument("--gallery", metavar="DIR", help="a folder of images, at any depth: " + ", ".join(sorted(SUFFIXES)))
    g.add_argument("--query", nargs="+", action="extend", default=[], metavar="TEXT", help="each text in quotes")
    g.add_argument("--queries", metavar="FILE", help="a text file with a query per line")
    g.add_argument("--top", type=int, default=10, help="number of images (default: 10)")
    g.add_argument("--index", metavar="FILE", help="where the embeddings are stored (default: beside the gallery)")
    g.add_argument("--explain", type=int, default=0, metavar="N", help="word maps for the first N images of a query")
    g.add_argument("--serve", nargs="?", type=int, const=8000, metavar="PORT", help="search page (default port: 8000)")
    return p.parse_args()


def check_args(args):
    """Raise ValueError for the first mistake, before anything is read."""
    given = [args.gallery, args.queries, args.index, args.page, args.features, *args.checkpoint]
    asks = bool(args.query or args.queries)
    for wrong, said in [
        ("" in given, "an option was given an empty text; is a variable of the shell not set?"),
        (args.features and (args.checkpoint or args.page or args.gallery), "one thing at a time: --features FILE, "
         "--checkpoint C --gallery PHOTOS, or --checkpoint C for scores"),
        (args.top < 1 or args.explain < 0 or args.workers < 0, "--top is from 1 up, --explain and --workers from 0 up"),
        (not 0 <= (args.serve or 0) <= 65535, "--serve takes a port at most 65535"),
        ((asks or args.serve is not None) and not args.gallery, "name the folder to search with --gallery"),
        (not (args.features or args.checkpoint), "name a checkpoint with --checkpoint, or features with --features"),
        (args.gallery and len(args.checkpoint) > 1, "a gallery is searched with one checkpoint"),
        (args.explain and not asks, "--explain shows maps for the images that a query finds: give one with --query"),
        (args.index and os.path.isdir(args.index), f"{args.index} is a folder; --index names a file in it"),
    ]:
        if wrong:
            raise ValueError(said)


def print_rows(rows):
    """Print {name: scores}, a line each."""
    for name, scores in rows.items():
        print(f"{name:44}{format_scores(scores)}", flush=True)


def score_features(file):
    """Print the scores of an .npz with query (Q, D), gallery (G, D), q_pid (Q,), g_pid (G,), perhaps own (Q,)."""
    types = dict(query="f4", gallery="f4", q_pid="i8", g_pid="i8", own="i8")
    try:
        with np.load(file) as archive:
            x = {name: archive[name].astype(types[name], casting="same_kind") for name in types if name in archive}
    except (ValueError, EOFError, TypeError, AttributeError, zipfile.BadZipFile, zlib.error, OSError) as e:
        raise ValueError(f"{file} is no .npz of floating-point features and whole-number ids ({e})") from None
    if missing := types.keys() - {"own"} - x.keys():
        raise ValueError(f"{file} lacks {', '.join(sorted(missing))}; it has {', '.join(x) or 'none of them'}")
    own = x.pop("own", None)
    rows = {"text to image": retrieval_metrics(**x)}
    if own is not None:
        rows[EXCLUDED] = retrieval_metrics(**x, own=own)
    print("{:,} queries, {:,} gallery images, {} numbers each".format(len(x["query"]), *x["gallery"].shape))
    print_rows(rows)


def find_model(data, tbps, source):
    """A checkpoint, or the weights of a CLIP: a file, a folder or a hub id -> path of the file."""
    if Path(source).suffix in (".pt", ".pth", ".bin", ".safetensors"):
        data.need(source, "the checkpoint", "python tbps.py writes runs/NAME/best.pt; or name the weights of a CLIP")
    return tbps.find_weights(source)


def open_model(data, tbps, args, path):
    """-> model, tokenizer, preprocessing, facts {method, epoch, args} of a checkpoint or of the weights of a CLIP."""
    if tbps.is_checkpoint(path):
        if args.tokenizer or args.size:
            raise ValueError(f"--tokenizer and --size are for the weights of a CLIP; the checkpoint {path} has its own")
        saved = tbps.read_checkpoint(path)
        return *tbps.load_checkpoint(path, args.device), {k: saved[k] for k in ("method", "epoch", "args")}
    model, tokenizer = tbps.load_clip(path, args.size), tbps.tokenizer_for(path, args.tokenizer)
    if tokenizer.vocab != model.arch["vocab"]:
        raise ValueError(f"the tokenizer has {tokenizer.vocab:,} tokens, the weights {model.arch['vocab']:,}: "
                         "they do not belong together")
    config = tbps.read_config(path)
    preprocessing = data.Preprocessing(model.arch["image_size"], config["norm"], config["resize"], clean=False)
    facts = dict(method="zero-shot", epoch=0, args={})
    return model.eval().to(args.device), tokenizer, preprocessing, facts


def compare(data, tbps, args):
    """Scores of all checkpoints on all data sets: printed, and written as a page after each."""
    overview, chapters, first = {}, [], Path(args.checkpoint[0])
    several = len(args.checkpoint) * len(args.dataset or [""]) > 1
    for source, path in zip(args.checkpoint, [find_model(data, tbps, source) for source in args.checkpoint]):
        model, tokenizer, preprocessing, facts = open_model(data, tbps, args, path)
        if not (args.dataset or facts["args"]):
            raise ValueError(f"{source} was trained on no data set known here; name one with --dataset")
        for dataset in args.dataset or [facts["args"]["dataset"]]:
            records = data.read(dataset, args.data_root or facts["args"].get("data_root", "data"), args.split)
            captions = [c for r in records for c in r["captions"]]
            inputs = evaluation_set(records, preprocessing, tokenizer)
            workers = 0 if dataset.startswith("toy") else args.workers
            rows, image, text = evaluate(model, *inputs, args.device, workers)
            print(f"{source} ({facts['method']}, epoch {facts['epoch']}) on {dataset} {args.split}: "
                  "{:,} persons, {:,} images, {:,} captions".format(*data.counts(records)))
            print_rows(rows)
            overview[f"{source} on {dataset}"] = rows["text to image"]
            sheet = retrieval_sheet(captions, text, image, *inputs[2:], lambda j: data.load_image(records[j]["image"]))
            chapters += [(f"{source} on {dataset} {args.split}", table(rows)), ("Queries and their top 10", sheet)]
            file = "eval-table.html" if several else f"eval-{dataset}-{args.split}.html"
            page = args.page or (first.parent if first.is_file() else Path()) / file
            if process()[0] == 0:
                head = [("Text to image", table(overview))] * several
                write_page(page, " and ".join(args.checkpoint), head + chapters)
    if several:
        print("\ntext to image")
        for name, scores in overview.items():
            print(f"{name:{max(map(len, overview))}}  {format_scores(scores)}")
    print(f"page: {page}", flush=True)


def read_queries(data, args):
    """-> the texts of --query and --queries."""
    queries = list(args.query)
    if args.queries:
        file = data.need(args.queries, "the file of queries", "it has one query per line")
        queries += [line for line in data.read_text(file).splitlines() if line.strip()]
    if (args.queries and not queries) or not all(q.strip() for q in queries):
        raise ValueError("a query is empty: describe the person in a sentence")
    return [printable(q.expandtabs(1)) for q in queries]


def answered(search, queries, args):
    """Print what each query finds, and yield its chapter of the page."""
    for query, found in zip(queries, search.top(search.encode(queries), args.top)):
        if unread := search.unread(query):
            print(f"{query[:40]}...: its last {unread:,} tokens were not read; there is room for 75", file=sys.stderr)
        print(f"\n{query}")
        for rank, (row, score) in enumerate(found, start=1):
            print(f"{rank:4d}  {score:.3f}  {printable(search.path(row))}")
        maps = "".join(explained(search, row, query) for row, _ in found[:args.explain])
        yield query, results(search, found) + (maps and MAPS + maps)


def open_index(folder, model, preprocessing, args):
    """The index of a folder, brought up to date -> Index (None but in the first process). Says what was skipped."""
    prepared = {k: v for k, v in preprocessing.settings.items() if k != "clean"}
    digest = hashlib.sha256(json.dumps([model.arch, prepared]).encode())
    for _, w in sorted(model.image.state_dict().items()):               # what the embedding of an image depends on
        digest.update(w.cpu().contiguous().numpy())
    weights = digest.hexdigest()[:16]
    file = re.sub(r"\.(f16|jsonl)$", "", args.index) if args.index else f"{folder.resolve()}-{weights[:8]}"
    index = Index(file, weights, model.arch["embed"]) if process()[0] == 0 else None
    bad, skipped, failed = update_index(index, model, preprocessing.image, preprocessing.size, folder, args.device,
                                        args.workers)
    suffixes = " ".join(sorted(SUFFIXES))
    said = [f"{printable(e.filename)} cannot be listed ({e.strerror}); its rows of the index are kept" for e in failed]
    said += [f"{ending} images skipped: {number:,} (only {suffixes} are read)" for ending, number in skipped.items()]
    said += [f"unreadable images skipped: {len(bad):,} ({', '.join(map(printable, bad))})"] * bool(bad)
    if index:
        print("".join(line + "\n" for line in said), end="", file=sys.stderr)
        if not index.lines:
            raise ValueError(f"{folder} holds no image that can be read ({suffixes})")
        print(f"{len(index.lines):,} images; index: {printable(index.rows_file)}", flush=True)
    return index


def search_gallery(data, tbps, args):
    """Bring the index up to date, then answer the queries, or serve the page."""
    folder = data.need(args.gallery, "the gallery", "--gallery takes a folder of images")
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file; --gallery takes a folder of images")
    queries = read_queries(data, args)
    server = Server(args.serve) if args.serve is not None and process()[0] == 0 else None
    model, tokenizer, preprocessing, facts = open_model(data, tbps, args, find_model(data, tbps, *args.checkpoint))
    index = open_index(folder, model, preprocessing, args)
    if index is None:
        return
    search = Search(model, tokenizer, preprocessing, data, folder, index, args.device)
    if queries:
        page = args.page or "search.html"
        write_page(page, f"{printable(folder)}, {facts['method']}", answered(search, queries, args))
        print(f"\npage: {page}", flush=True)
    if server:
        Handler.search = search
        print(f"search page: http://localhost:{server.server_port}/   (Ctrl-C ends it)", flush=True)
        with server:
            server.serve_forever()


def main(data, tbps):
    args = parse_args(data)
    tbps.check_device(args.device)
    check_args(args)
    if args.features:
        return score_features(data.need(args.features, "the features", "an .npz with query, gallery, q_pid, g_pid"))
    if args.page or args.query or args.queries:
        page = Path(args.page or "search.html")
        data.need(page.absolute().parent, "the folder for the page", "make it, or name another file with --page")
        check_page(page)
    tbps.join_ranks(args)                                               # the processes of torchrun
    (search_gallery if args.gallery else compare)(data, tbps, args)


if __name__ == "__main__":
    try:
        import data
        import tbps
    except ModuleNotFoundError as e:
        if e.name not in ("data", "tbps", "losses"):
            raise
        print(f"error: {e.name}.py must be beside eval.py; alone, eval.py is a module: import eval", file=sys.stderr)
        sys.exit(2)
    data.command(lambda: main(data, tbps))
