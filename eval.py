"""Evaluation and search: ranking metrics, embedding, report pages, and search in a folder of images.

    python eval.py --checkpoint runs/NAME/best.pt                                    scores on the data set of the run
    python eval.py --checkpoint A B --dataset cuhk icfg --data-root DIR              a table: checkpoints x data sets
    python eval.py --checkpoint C --gallery PHOTOS --query "a woman in a green coat" the images that fit best
    python eval.py --checkpoint C --gallery PHOTOS --serve                           the same as a page in the browser
    python eval.py --features FILE.npz                                               scores of another model's features
    python eval.py --runs runs/A runs/B                                              runs side by side, on one page
    python eval.py --checkpoint C --export DIR                                       for open_clip and transformers

C is a checkpoint of tbps.py or distill.py, or the weights of a CLIP. Scores are R@1, R@5, R@10, mAP and mINP in percent
of text to image (the protocol of the field: each caption is a query, each image is in the gallery), image to text, and
text to image excluding the source image of the query. The page shows queries and their top 10.

As a module, this file imports nothing of ours: copy it, or one of its chapters. Scoring CUHK-PEDES (6,156 queries,
3,074 images) takes 0.4 s on one CPU core."""

import argparse
import base64
import contextlib
import functools
import hashlib
import html
import io
import itertools
import json
import math
import os
import re
import statistics
import stat
import sys
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qsl, urlencode

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

# ---- metrics --------------------------------------------------------------------------------------------------------

def check_features(query, gallery, q_pid, g_pid, own):
    """Raise ValueError, which says why, if they cannot be scored."""
    Q, G, D = query.shape[:1], gallery.shape[:1], query.shape[1:]
    shapes = [tuple(x.shape) for x in (query, gallery, q_pid, g_pid, own) if x is not None]
    if len(D) != 1 or shapes != [Q + D, G + D, Q, G, Q][:len(shapes)]:
        raise ValueError(f"the shapes of query, gallery, q_pid, g_pid, own do not fit: {shapes}")
    if 0 in Q + G + D:
        raise ValueError(f"nothing to score: {Q[0]} queries, {G[0]} gallery images, {D[0]} numbers each")
    norm = torch.cat([query, gallery]).norm(dim=1)
    if not ((norm > 0) & (norm < torch.inf)).all():                     # False for NaN, too
        raise ValueError("a row of the features is all zeros or not finite; a model like that diverged: lower its --lr")
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


def rank_and_world():
    """(rank, number) of the processes of torchrun; (0, 1) without it."""
    if torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def all_gather_rows(x):
    """Rows rank, rank + W, ... of each of W processes -> all rows, in order, on the CPU. A process may have none."""
    rank, ranks = rank_and_world()
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


def half_on_cuda():
    """Encoders run in fp16 on CUDA, in fp32 elsewhere."""
    return torch.autocast("cuda", torch.float16, enabled=torch.cuda.is_available())


@torch.no_grad()
def embed_batches(model, images, device, workers, batch):
    """Yield the features (B, D) of a dataset of pixels (3, H, W), batch by batch: fp32 of unit length, on the CPU."""
    pinned = torch.device(device).type == "cuda"
    model.eval()
    for pixels in torch.utils.data.DataLoader(images, batch, num_workers=workers, pin_memory=pinned):
        with half_on_cuda():
            features = model.encode_image(pixels.to(device, non_blocking=True))
        yield F.normalize(features.float(), dim=1).cpu()


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
    with half_on_cuda():
        features = [F.normalize(model.encode_text(tokens[rows]).float(), dim=1).cpu() for rows in bar]
    return torch.cat(features)[torch.argsort(order)]


def embed(model, images, tokens, device="cpu", workers=0, progress=True):
    """-> features of unit length, images (G, D) and texts (Q, D). Each process embeds its part; all get all of them.

    images: a dataset of pixels (3, H, W);  tokens (Q, T)"""
    rank, ranks = rank_and_world()
    part = torch.utils.data.Subset(images, range(rank, len(images), ranks))
    image = embed_images(model, part, device, workers, progress=progress and rank == 0)
    text = embed_texts(model, tokens[rank::ranks], progress=progress and rank == 0)
    return all_gather_rows(image), all_gather_rows(text)


def evaluate(model, images, tokens, pid, source, device="cpu", workers=0, progress=True):
    """Score a split -> {"text to image": scores, "image to text": ..., EXCLUDED: ...}, image (G, D), text (Q, D).

    images: a dataset of G images as pixels (3, H, W);  tokens (Q, T): all captions;  pid (G,): the person of each image
    source (Q,): index of the source image of each caption. The third row is missing if nobody has two images.
    """
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
h1, h2, .hit, .settings { overflow-wrap: anywhere }  .legend { color: #444 }  .note { background: #eee; padding: .5em }
table { border-collapse: collapse }  td, th { padding: .2em .9em .2em 0; text-align: right; font-weight: normal }
td:first-child, th:first-child { text-align: left }  thead th { border-bottom: 1px solid #777; font-weight: 600 }
.settings { columns: 4 16em; font: 13px ui-monospace, monospace }  .row { margin: 1.1em 0 }  .row p { margin: 0 0 .3em }
figure { display: inline-block; margin: 0 .5em .5em 0; text-align: center; vertical-align: top; font-size: 13px }
.row img { height: 112px; border: 4px solid transparent; border-radius: 4px }  .row .source { margin-right: 1.5em }
.row .large img { height: auto; max-width: 100% }  .source img { border-color: #777 }
.right img { border-color: #147a35 }  .wrong img { border-color: #c62817; border-style: dashed }
.hit { width: 11em; text-align: left }  .hit img { max-width: 11em }  .hit a { line-height: 26px; margin-right: .5em }
form { margin-bottom: 1.5em }  button, input { font: inherit; padding: .3em }
#q { display: block; width: 100%; box-sizing: border-box; margin: .3em 0 }
svg { margin-right: 2em; max-width: 100% }  svg text { font: 12px system-ui, sans-serif; fill: #444 }
"""
COLOURS = ["#1f6fb4", "#c62817", "#147a35", "#7a3fb0", "#9a5600", "#555", "#b0398a"]                    # of curves
DASHES = ["", "6 3", "2 3", "8 3 2 3"]                                          # colour is not the only sign


def figure(image, alt, caption="", kind="", height=112):
    """A PIL image as HTML, of this height but at most 4 times as wide, with alternative text and a caption (HTML)."""
    scale = min(height / image.height, 4 * height / image.width)
    size = [max(1, round(scale * side)) for side in image.size]
    jpeg = io.BytesIO()
    image.resize(size, Image.Resampling.LANCZOS).save(jpeg, "JPEG", quality=88)
    source = "data:image/jpeg;base64," + base64.b64encode(jpeg.getvalue()).decode()
    return (f'<figure class="{kind}"><img src="{source}" alt="{html.escape(alt)}">'
            f"<figcaption>{caption}</figcaption></figure>")


def round_ticks(low, high):
    """Axis ticks that enclose low ... high: about five steps of 1, 2 or 5 times a power of ten."""
    span = (high - low) or 1.0
    size = next(m * 10.0 ** n for n in range(-12, 12) for m in (1, 2, 5) if span <= 5 * m * 10.0 ** n)
    first, last = math.floor(low / size + 1e-6), math.ceil((low + span) / size - 1e-6)  # 1e-6: rounding errors
    return [k * size for k in range(first, last + 1)]


def curve(title, series, width=480, height=240, zero=True):
    """Lines {name: [(x, y), ...]} as one inline SVG with labelled axes, of y from 0 on if `zero`; x is the epoch.
    Points (x, y, low, high) also have a band around the line."""
    series = {name: line for name, line in series.items() if line}
    points = [(p[0], value) for line in series.values() for p in line for value in p[1:]]
    if not points:
        return ""
    xs, ys = (round_ticks(min([*start, *v]), max([*start, *v])) for start, v in zip(([0], [0] * zero), zip(*points)))
    left, right, top, bottom = 64, width - 112, 28, height - 42

    def place(x, y):
        return (left + (right - left) * (x - xs[0]) / (xs[-1] - xs[0]),
                bottom - (bottom - top) * (y - ys[0]) / (ys[-1] - ys[0]))

    def path_of(line):
        return " ".join("{:.1f},{:.1f}".format(*place(x, y)) for x, y in line)

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
        if len(line[0]) == 4:
            edge = [(x, high) for x, _, _, high in line] + [(x, low) for x, _, low, _ in reversed(line)]
            out.append(f'<polygon fill="{COLOURS[n % 7]}" opacity="0.2" points="{path_of(edge)}"/>')
        path = path_of([p[:2] for p in line])
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


def check_writable(path, option):
    """Raise ValueError if no file can be made beside this path, before work is done that would be lost."""
    folder = Path(path).absolute().parent
    if not os.access(folder, os.W_OK):
        raise ValueError(f"{folder} is no folder that can be written to; {option} names another place")


def check_page(path):
    """Raise ValueError if the page cannot be written, or if it would replace a file that is not a page."""
    path = Path(path)
    check_writable(path, "--page FILE")
    if path.exists() and not (path.is_file() and path.open("rb").read(15) == b"<!doctype html>"):
        raise ValueError(f"{path} exists and is no page, so it is not replaced; name another file with --page")


def html_page(title, body):
    """A self-contained page as text."""
    title = html.escape(title)
    return ("<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
            f"<title>{title}</title><link rel=icon href=data:,><style>{STYLE}</style>"
            f"<main><h1>{title}</h1>{body}</main></html>")


def write_page(path, title, chapters):
    """Write a self-contained HTML file. chapters: (heading, HTML) pairs."""
    check_page(path)
    body = "".join(f"<h2>{html.escape(heading)}</h2>{content}" for heading, content in chapters if content)
    unfinished = Path(f"{path}.part")
    unfinished.write_text(html_page(title, body), encoding="utf-8")
    unfinished.replace(path)


# ---- the index of a gallery -----------------------------------------------------------------------------------------

SUFFIXES = [".jpg", ".jpeg", ".png", ".bmp", ".webp"]


def printable(path):
    """A path or an argument as text that can be printed: other bytes and control characters become U+FFFD."""
    text = os.fsencode(path).decode("utf-8", "replace")
    return "".join(c if c.isprintable() else "\ufffd" for c in text)


def gallery_files(folder, unreadable):
    """Yield the line of the index for each image file, at any depth, in order: [path, bytes, time in ns] as JSON.

    Hidden files and anything but regular files, like symlinks, are ignored.
    unreadable: a list, receives the paths of folders that cannot be listed and of files that cannot be examined
    """
    prefix = len(os.path.join(folder, ""))
    for where, folders, files in os.walk(folder, onerror=lambda e: unreadable.append(e.filename[prefix:] or ".")):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        for name in sorted(files):
            path = os.path.join(where, name)
            if name.startswith(".") or os.path.splitext(name)[1].lower() not in SUFFIXES:
                continue
            try:
                state = os.lstat(path)
                if stat.S_ISREG(state.st_mode):
                    yield (json.dumps([path[prefix:], state.st_size, state.st_mtime_ns]) + "\n").encode()
            except OSError:
                unreadable.append(path[prefix:])


class Index:
    """Embeddings of the images of a folder, in two files that other programs can read in one line each:

    FILE.f16     np.fromfile("FILE.f16", np.float16).reshape(-1, D)                 row n: a feature of unit length
    FILE.jsonl   [json.loads(line) for line in open("FILE.jsonl")]                  row n: [path, bytes, time in ns]

    Rows are appended, batch by batch, so an interrupted run loses nothing; opening cuts both files to the shorter one.
    `keep` removes the rows of files that are gone. A million images take about 120 MB of memory, for the lines.
    """

    def __init__(self, file, width):
        self.rows_file, self.list_file, self.width, self.lines = Path(f"{file}.f16"), Path(f"{file}.jsonl"), width, []
        there = [path for path in (self.rows_file, self.list_file) if path.exists()]
        if len(there) == 2:
            complete = self.rows_file.stat().st_size // (2 * width)
            with open(self.list_file, "rb") as f:
                self.lines = [line for line in itertools.islice(f, complete) if line.endswith(b"\n")]
        self.size = sum(map(len, self.lines))                           # bytes of FILE.jsonl
        for path in there:
            size = self.size if path == self.list_file else 2 * width * len(self.lines)
            if path.stat().st_size > size:                              # if not, it may be read-only
                os.truncate(path, size)

    def features(self):
        """(N, D) float16, mapped into memory: only what is used is read."""
        return np.memmap(self.rows_file, np.float16, "c", shape=(len(self.lines), self.width))

    def append(self, features, lines):
        """Append features, float16 (n, D), and the line of each: first the features, then what makes them count."""
        with open(self.rows_file, "ab") as rows_file, open(self.list_file, "ab") as list_file:
            if list_file.tell() != self.size:
                raise ValueError(f"{self.list_file} has changed: is another search filling the same index?")
            rows_file.write(features.tobytes())
            rows_file.flush()                                           # before the lines
            list_file.writelines(lines)
        self.lines += lines
        self.size += sum(map(len, lines))

    def keep(self, numbers):
        """Write both files anew with these rows only. A crash on the way leaves the old index, or none."""
        features, lines = self.features(), [self.lines[n] for n in numbers]
        new_rows, new_list = Path(f"{self.rows_file}.part"), Path(f"{self.list_file}.part")
        with open(new_rows, "wb") as f:
            for start in range(0, len(numbers), 8192):
                f.write(features[numbers[start:start + 8192]].tobytes())
        new_list.write_bytes(b"".join(lines))
        self.list_file.unlink()                                         # rows never stand beside the list of others
        os.replace(new_rows, self.rows_file)
        os.replace(new_list, self.list_file)
        self.lines, self.size = lines, sum(map(len, lines))


def read_or_nan(folder, preprocessing, line):
    """The pixels (3, H, W) of a line of the index; NaN, and so a feature of NaN, for a file that cannot be read."""
    try:
        return preprocessing.image(Path(folder) / json.loads(line)[0])
    except (OSError, ValueError, Image.DecompressionBombError):
        return torch.full((3, *preprocessing.size), torch.nan)


def update_index(index, model, preprocessing, folder, device="cpu", workers=0, batch=256):
    """Embed the images of a folder that are not in its index, or have changed; forget those that are gone.

    preprocessing: .size (H, W); .image(Path) -> pixels (3, H, W), or OSError or ValueError for an unreadable file
    Prints what was skipped. Raises ValueError if no image is left.
    """
    gone, new, unreadable = set(index.lines), [], []
    for line in gallery_files(folder, unreadable):
        if line in gone:
            gone.remove(line)
        else:
            new.append(line)

    def is_hidden(line):                                                # below a folder that cannot be listed
        return any(f"{json.loads(line)[0]}/".startswith(f"{path}/") for path in unreadable if path != ".")

    gone = set() if "." in unreadable else {line for line in gone if not is_hidden(line)}
    if new or gone:
        check_writable(index.rows_file, "--index I")
    bar = progress_bar(total=len(new), unit=" images", desc="embedding")
    images = Images(new, functools.partial(read_or_nan, folder, preprocessing))
    for start, features in zip(range(0, len(new), batch), embed_batches(model, images, device, workers, batch)):
        lines, readable = new[start:start + batch], features.isfinite().all(dim=1)
        unreadable += [json.loads(line)[0] for line, ok in zip(lines, readable) if not ok]
        if readable.any():
            index.append(features[readable].half().numpy(), list(itertools.compress(lines, readable)))
        bar.update(len(lines))
    bar.close()
    if unreadable:
        names = ", ".join(map(printable, unreadable))
        print(f"cannot be read, skipped: {len(unreadable):,} ({names})", file=sys.stderr)
    rows = [n for n, line in enumerate(index.lines) if line not in gone]
    if not rows:
        raise ValueError(f"{folder} holds no image that can be read ({', '.join(SUFFIXES)})")
    if gone:
        index.keep(rows)
    print(f"{len(rows):,} images ({', '.join(SUFFIXES)}); index: {printable(index.rows_file)}", flush=True)


@torch.no_grad()
def nearest(features, query, top):
    """Which rows of the features (N, D), float16, are closest to each query (Q, D), best first.

    -> cosines (Q, top), rows (Q, top)
    The features are read in pieces and may be a mapped file: time grows with N, memory does not."""
    chunk = min(8192, 2 ** 22 // len(query) + 1)                        # rows: their scores take 16 MB at most
    score, row = torch.empty(len(query), 0), torch.empty(len(query), 0, dtype=torch.int64)
    for start in range(0, len(features), chunk):
        some = query.float() @ torch.from_numpy(features[start:start + chunk]).float().T                # (Q, chunk)
        some, column = some.topk(min(top, some.shape[1]), dim=1)
        row = torch.cat([row, start + column], dim=1)
        score, column = torch.cat([score, some], dim=1).topk(min(top, row.shape[1]), dim=1)             # (Q, top)
        row = row.gather(1, column)
    return score, row


# ---- searching ------------------------------------------------------------------------------------------------------

class Search:
    """A model and the images of a folder with their embeddings: what the command line and the search page ask.

    preprocessing: .image(path or PIL) -> pixels (3, H, W), .text(query) -> text as in training
    data: the module, for load_image, normalize_text and tag_words
    """

    def __init__(self, model, tokenizer, preprocessing, data, folder, index, device):
        self.model, self.tokenizer, self.preprocessing, self.data = model, tokenizer, preprocessing, data
        self.folder, self.device, self.features, self.lines = Path(folder), device, index.features(), index.lines

    def name(self, row):
        """The path below the folder, to be printed."""
        return printable(json.loads(self.lines[row])[0])

    def load(self, row, least=None):
        """The PIL image of a row; least as in data.load_image. Raises OSError or ValueError if it is gone."""
        return self.data.load_image(self.folder / json.loads(self.lines[row])[0], least)

    def encode(self, texts):
        """Queries -> features (Q, D) of unit length, and whether one fills all 77 places, so that it may have been cut.

        ValueError if cleaning leaves nothing of a query."""
        cleaned = [self.preprocessing.text(t) for t in texts]
        if empty := [text for text, rest in zip(texts, cleaned) if not rest.strip()]:
            raise ValueError(f"the query {empty[0][:40]!r} has no word: describe the person in a sentence")
        tokens = self.tokenizer(cleaned)                                # (Q, 77)
        return embed_texts(self.model, tokens), bool((tokens[:, -1] != 0).any())

    def top(self, query, number):
        """[(row, cosine), ...] for each query (Q, D)."""
        score, row = nearest(self.features, query, number)
        return [list(zip(*found)) for found in zip(row.tolist(), score.tolist())]


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
        picture[:, H * top // h:H * bottom // h, W * left // w:W * right // w] = 0      # the mean colour
    image = torch.cat([F.normalize(model.encode_image(some.to(device)).float(), dim=1).cpu()
                       for some in hidden.split(64)])
    covered, loss = torch.zeros(h, w), torch.zeros(len(words), h, w)
    for (top, left, bottom, right), lost in zip(windows, (image[:1] - image[1:]) @ directions.T):
        loss[:, top:bottom, left:right] += lost[:, None, None]
        covered[top:bottom, left:right] += 1
    adds = image[0] @ directions.T
    chosen = sorted(adds.argsort(descending=True)[:most].tolist())
    return [(text[slice(*words[n])], adds[n].item(), loss[n] / covered) for n in chosen]


TOO_LONG = "A query may have been cut: the model reads the first 75 tokens, about 55 words."
MAPS = ("<p class=legend>The number is what the word adds to the score. Red: the parts that speak for the word. Blue, "
        "if it lowers the score: the parts that speak against it. The maps show what the model reacts to, which need "
        "not be where the thing is.</p>")


def explained(search, row, text):
    """HTML: an image beside the maps of the words of a text, all on one scale."""
    picture, text = search.load(row, 400), search.preprocessing.text(search.data.normalize_text(text))
    pixels, tag = search.preprocessing.image(picture), search.data.tag_words
    maps = [(word, adds, heat if adds > 0 else -heat)
            for word, adds, heat in word_maps(search.model, search.tokenizer, pixels, text, tag, search.device)]
    grey, most = picture.convert("L").convert("RGB"), max([1e-6] + [heat.max().item() for *_, heat in maps])
    shown = [figure(picture, search.name(row), "the picture", "large", 280)]
    for word, adds, heat in maps:
        mask = Image.fromarray((191 * (heat / most).clamp(0, 1).sqrt()).byte().numpy())
        colour = Image.new("RGB", picture.size, (230, 30, 20) if adds > 0 else (20, 60, 230))
        painted = Image.composite(colour, grey, mask.resize(picture.size, Image.Resampling.BICUBIC))
        shown.append(figure(painted, f"map of the word {word}", f"{html.escape(word)} {adds:+.3f}", "large", 280))
    return f"<div class=row>{''.join(shown)}</div>"


def results(search, found, links=None):
    """HTML: the images of [(row, cosine), ...], by rank. links: row -> HTML to put below its image."""
    shown = []
    for rank, (row, score) in enumerate(found, start=1):
        name = search.name(row)
        text = f"<b>{rank}</b> {score:.3f}<br>{html.escape(name)}{links(row) if links else ''}"
        try:
            shown.append(figure(search.load(row, 384), name, text, "hit", 192))
        except (OSError, ValueError):                                   # gone or changed since
            shown.append(f'<figure class="hit">cannot be read any more<figcaption>{text}</figcaption></figure>')
    return "".join(shown)


# ---- the search page ------------------------------------------------------------------------------------------------
#
# A form and links, without a script. Only row numbers come from outside, never a path.

LOCAL = re.compile(r"(localhost|127\.0\.0\.1|\[::1\])(:[0-9]{1,5})?", re.IGNORECASE)
POLICY = ("default-src 'none'; img-src data:; style-src 'unsafe-inline'; form-action 'self'; base-uri 'none'; "
          "frame-ancestors 'none'")
FORM = """<form role=search autocomplete=off><label for=q>Describe the person in a sentence</label>
<input id=q name=q value="{text}" placeholder="a woman in a green coat with a black backpack" maxlength=2000 autofocus>
<button>Search</button> <label>Show <input name=top type=number min=1 max=200 value={top}> pictures</label></form>"""


def answer(search, text, top, like=None, why=None):
    """HTML: the pictures that fit a query, or those like a row. why: a row to explain by word maps.

    Raises ValueError in words for the user, IndexError for a row that is not there."""
    def links(row):
        more = html.escape(urlencode(dict(like=row, top=top)))
        reasons = html.escape(urlencode(dict(why=row, q=text, top=top)))
        return f'<br><a href="/?{more}">more like this</a>' + f'<a href="/?{reasons}">why?</a>' * bool(text)

    if like is not None:
        picture = torch.from_numpy(search.features[[like]])                                             # (1, D)
        return f"<h2>Like {html.escape(search.name(like))}</h2>" + results(search, search.top(picture, top)[0], links)
    if not text:
        return ""
    query, too_long = search.encode([text])
    main = f"<p class=note>{TOO_LONG}</p>" * too_long
    if why is not None:
        main += f"<h2>What the words respond to in {html.escape(search.name(why))}</h2>"
        main += explained(search, why, text) + MAPS
    return main + results(search, search.top(query, top)[0], links)


def search_page(search, query_string):
    """The page for a query string -> HTML. On a mistake it keeps what was typed."""
    asked = dict(parse_qsl(query_string))
    text, numbers = asked.get("q", "").strip(), dict(top=20)
    try:
        numbers |= {name: int(asked[name]) for name in ("top", "like", "why") if name in asked}
        numbers["top"] = min(200, max(1, numbers["top"]))
        main = answer(search, text, **numbers)
    except (ValueError, IndexError, OSError) as e:
        main = f"<p class=note>{html.escape(str(e))}</p>"
    form = FORM.format(text=html.escape(text), top=numbers["top"])
    return html_page(f"Find a person in {len(search.lines):,} pictures", form + main)


class Handler(BaseHTTPRequestHandler):
    """Answers a browser on this machine."""
    search = None

    def handle(self):
        with contextlib.suppress(ConnectionError):                      # the browser may leave before the answer
            super().handle()

    def do_GET(self):
        path, _, query_string = self.path.partition("?")
        if not LOCAL.fullmatch(self.headers.get("Host", "")):           # the name of a site that leads here
            return self.send_error(403, "this page answers to localhost only")
        if path != "/":
            return self.send_error(404)
        page = search_page(self.search, query_string).encode("utf-8", "replace")
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Security-Policy", POLICY)
        self.end_headers()
        self.wfile.write(page)

    def log_message(self, *_):
        """Print nothing."""


# ---- the command ----------------------------------------------------------------------------------------------------

def image_size(text):
    """HxW -> (H, W), for argparse."""
    height, width = text.split("x")
    return int(height), int(width)


def parse_args(data):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cuda = "cuda" if torch.cuda.is_available() else "cpu"
    g = p.add_mutually_exclusive_group(required=True)
    g.add_argument("--checkpoint", nargs="+", metavar="C", help="of ours, or a CLIP (file, folder, hub id)")
    g.add_argument("--features", metavar="FILE", help=".npz of query (Q, D), gallery (G, D), q_pid, g_pid, maybe own")
    g.add_argument("--runs", nargs="+", metavar="DIR", help="run folders to compare: settings, scores, curves")
    p.add_argument("--device", default=cuda, help="cpu, mps, cuda or cuda:N (default: cuda where there is one)")
    p.add_argument("--workers", type=int, default=2, help="processes that decode images (default: 2)")
    p.add_argument("--page", metavar="FILE", help="the page to write (default: beside the checkpoint, or search.html)")
    p.add_argument("--tokenizer", metavar="FILE", help="vocabulary of a CLIP (default: beside its weights)")
    p.add_argument("--size", type=image_size, metavar="HxW", help="input of a CLIP, e.g. 384x128 (default: its own)")
    p.add_argument("--export", metavar="DIR", help="write the model into a folder for open_clip and transformers")
    g = p.add_argument_group("scores")
    g.add_argument("--dataset", nargs="+", choices=data.DATASETS, help="data sets (default: that of the training run)")
    g.add_argument("--data-root", help="the set's folder or its parent; for csv the file (default: as in training)")
    g.add_argument("--split", choices=["train", "val", "test"], default="test", help="which split (default: test)")
    g = p.add_argument_group("search")
    g.add_argument("--gallery", metavar="DIR", help="a folder of images, at any depth: " + ", ".join(SUFFIXES))
    g.add_argument("--query", nargs="+", action="extend", default=[], metavar="TEXT", help="each text in quotes")
    g.add_argument("--queries", metavar="FILE", help="a text file with a query per line")
    g.add_argument("--top", type=int, default=10, help="number of images (default: 10)")
    g.add_argument("--index", metavar="I", help="embeddings are kept in I-WEIGHTS.f16, .jsonl (default I: the gallery)")
    g.add_argument("--explain", type=int, default=0, metavar="N", help="word maps for the first N images of a query")
    g.add_argument("--serve", nargs="?", type=int, const=8000, metavar="PORT", help="search page (default port: 8000)")
    args = p.parse_args()
    if (args.query or args.queries or args.serve is not None) and not args.gallery:
        p.error("name the folder to search with --gallery")
    if (args.gallery or args.export) and len(args.checkpoint or []) != 1:
        p.error("--gallery and --export take one checkpoint")
    if args.export and (args.gallery or args.dataset):
        p.error("--export writes a folder and does nothing else; leave out --gallery and --dataset")
    if args.top < 1:
        p.error("--top is from 1 up")
    return args


def print_rows(rows):
    """Print {name: scores}, a line each."""
    width = max(43, *map(len, rows))
    for name, scores in rows.items():
        print(f"{name:{width}} {format_scores(scores)}", flush=True)


def read_runs(data, tbps, folders):
    """{label: (settings, [log lines of each run])} of run folders; runs that differ only by seed are one group."""
    groups = {}
    for folder in dict.fromkeys(map(Path, folders)):
        file = folder / "last.pt"
        if not file.exists() and len(folders) > 1:
            print(f"{folder}: no last.pt, left out (the runs of LCR2S are its folders baseline, teacher, student)")
            continue
        saved = tbps.read_checkpoint(data.need(file, "the run", "name its folder"))
        settings = {key: value for key, value in (saved["args"] | saved["recipe"]).items()
                    if key not in ("seed", *tbps.FREE_OPTIONS)}
        key = json.dumps(settings, sort_keys=True)
        groups.setdefault(key, (settings, []))[1].append(tbps.read_log(folder))
    if not groups:
        raise FileNotFoundError("none of these folders holds a last.pt; the folders of tbps.py are runs/NAME")
    return {str(number): group for number, group in enumerate(groups.values(), start=1)}


def mean_std(values):
    """The mean, and of several values their standard deviation."""
    return f"{statistics.mean(values):.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")


def validation_scores(logs):
    """{epoch: [validation scores of each run that has got there]}"""
    found = {}
    for line in (line for log in logs for line in log if line.get("val")):
        found.setdefault(line["epoch"], []).append(line["val"])
    return dict(sorted(found.items()))


def final_scores(logs):
    """{name: text} of a group of runs: test scores of best.pt if all have them, else validation at the last epoch that
    all have reached."""
    tests = [line["test"]["best.pt, text to image"] for log in logs for line in log
             if "best.pt, text to image" in line.get("test", {})]
    by_epoch = {epoch: scores for epoch, scores in validation_scores(logs).items() if len(scores) == len(logs)}
    if len(tests) == len(logs):
        name, scores = "test", tests
    elif by_epoch:
        name, scores = f"val, epoch {max(by_epoch)}:", by_epoch[max(by_epoch)]
    else:
        return {}
    return {f"{name} {metric}": mean_std([s[metric] for s in scores]) for metric in ("R@1", "mAP")}


def validation_curves(groups, metric):
    """{label: [(epoch, mean, lowest, highest), ...]} over the runs of each group."""
    curves = {}
    for label, (_, logs) in groups.items():
        values = {epoch: [s[metric] for s in scores] for epoch, scores in validation_scores(logs).items()}
        curves[label] = [(epoch, statistics.mean(v), min(v), max(v)) for epoch, v in values.items()]
    return curves


def compare_runs(data, tbps, folders, page):
    """A table and a page of runs side by side: settings that differ, final scores, curves in the same axes."""
    groups = read_runs(data, tbps, folders)
    keys = sorted({key for settings, _ in groups.values() for key in settings})
    differ = [key for key in keys if len({json.dumps(settings.get(key)) for settings, _ in groups.values()}) > 1]
    rows = {label: {key: str(settings.get(key, "")) for key in differ} | {"runs": len(logs)} | final_scores(logs)
            for label, (settings, logs) in groups.items()}
    for label, row in rows.items():
        print(f"{label}  " + "  ".join(f"{key}={value}" for key, value in row.items()))
    curves = "".join(curve(f"validation {metric}, %", validation_curves(groups, metric), zero=False)
                     for metric in ("R@1", "mAP"))
    legend = "<p class=legend>Bands reach from the lowest to the highest of runs that differ only by seed.</p>"
    chapters = [("Settings that differ, and scores, %", table(rows)), ("Curves", curves + legend)]
    write_page(page, "Runs side by side", chapters)
    print(f"page: {page}")


def score_features(file):
    """Print the scores of an .npz with query (Q, D), gallery (G, D), q_pid (Q,), g_pid (G,), perhaps own (Q,)."""
    types = dict(query="f4", gallery="f4", q_pid="i8", g_pid="i8", own="i8")
    try:
        with np.load(file) as archive:
            x = {name: archive[name].astype(types[name], casting="same_kind") for name in types if name in archive}
        own = x.pop("own", None)
        rows = {"text to image": retrieval_metrics(**x)}
        if own is not None:
            rows[EXCLUDED] = retrieval_metrics(**x, own=own)
    except (ValueError, TypeError, EOFError, zipfile.BadZipFile) as e:
        raise ValueError(f"{file} is no .npz of floating-point features and whole-number ids: {e}") from None
    print("{:,} queries, {:,} gallery images, {} numbers each".format(len(x["query"]), *x["gallery"].shape))
    print_rows(rows)


def training_facts(tbps, path):
    """{method, epoch, args} of a checkpoint, or those of the weights of a CLIP, which were not trained here."""
    if not tbps.is_checkpoint(path):
        return dict(method="zero-shot", epoch=0, args={})
    saved = tbps.read_checkpoint(path)
    return {key: saved[key] for key in ("method", "epoch", "args")}


def compare(data, tbps, args):
    """Scores of all checkpoints on all data sets: printed, and written as a page after each."""
    overview, chapters, first = {}, [], Path(args.checkpoint[0])
    several = len(args.checkpoint) * len(args.dataset or [""]) > 1
    for source, path in zip(args.checkpoint, [tbps.find_weights(source) for source in args.checkpoint]):
        model, tokenizer, preprocessing = tbps.load_model(path, args.device, args.size, args.tokenizer)
        facts = training_facts(tbps, path)
        if not (args.dataset or facts["args"]):
            raise ValueError(f"{source} was trained on no data set known here; name one with --dataset")
        for dataset in args.dataset or [facts["args"]["dataset"]]:
            records = data.read(dataset, args.data_root or facts["args"].get("data_root", "data"), args.split)
            captions = [c for r in records for c in r["captions"]]
            inputs = evaluation_set(records, preprocessing, tokenizer)
            rows, image, text = evaluate(model, *inputs, args.device, args.workers)
            print(f"{source} ({facts['method']}, epoch {facts['epoch']}) on {dataset} {args.split}: "
                  "{:,} persons, {:,} images, {:,} captions".format(*data.counts(records)))
            print_rows(rows)
            overview[f"{source} on {dataset}"] = rows["text to image"]
            sheet = retrieval_sheet(captions, text, image, *inputs[2:], lambda j: data.load_image(records[j]["image"]))
            chapters += [(f"{source} on {dataset} {args.split}", table(rows)), ("Queries and their top 10", sheet)]
            file = "eval-table.html" if several else f"eval-{dataset}-{args.split}.html"
            page = args.page or (first.parent if first.is_file() else Path()) / file
            if rank_and_world()[0] == 0:
                head = [("Text to image", table(overview))] * several
                write_page(page, " and ".join(args.checkpoint), head + chapters)
    if several:
        print("\ntext to image")
        print_rows(overview)
    print(f"page: {page}", flush=True)


def open_index(folder, model, preprocessing, args):
    """The index of a folder, brought up to date."""
    digest = hashlib.sha256(json.dumps([model.arch, preprocessing.settings]).encode())
    for _, w in sorted(model.image.state_dict().items()):               # what the embedding of an image depends on
        digest.update(w.cpu().contiguous().numpy())
    index = Index(f"{args.index or folder.resolve()}-{digest.hexdigest()[:16]}", model.arch["embed"])
    update_index(index, model, preprocessing, folder, args.device, args.workers)
    return index


def answer_queries(search, queries, top, explain):
    """Print what each query finds, and yield its chapter of the result page."""
    query, too_long = search.encode(queries)
    if too_long:
        print(TOO_LONG, file=sys.stderr)
    for text, found in zip(queries, search.top(query, top)):
        print(f"\n{text}")
        for rank, (row, score) in enumerate(found, start=1):
            print(f"{rank:4d}  {score:.3f}  {search.name(row)}")
        maps = "".join(explained(search, row, text) for row, _ in found[:explain])
        yield text, results(search, found) + (maps and MAPS + maps)


def search_gallery(data, tbps, args):
    """Bring the index up to date, then answer the queries, or serve the page."""
    folder = data.need(args.gallery, "the gallery", "--gallery takes a folder of images")
    queries = args.query + (data.read_text(args.queries).splitlines() if args.queries else [])
    queries = [printable(q.expandtabs(1)) for q in queries if q.strip()]
    if not queries and (args.query or args.queries):
        raise ValueError("the query is empty: describe the person in a sentence")
    if args.serve is not None:                                          # first: a port in use is an error at once
        try:
            server = ThreadingHTTPServer(("127.0.0.1", args.serve), Handler)
        except (OSError, OverflowError) as e:
            raise OSError(f"port {args.serve} cannot be used ({e}); take another with --serve PORT") from None
    path = tbps.find_weights(args.checkpoint[0])
    model, tokenizer, preprocessing = tbps.load_model(path, args.device, args.size, args.tokenizer)
    index = open_index(folder, model, preprocessing, args)
    search = Search(model, tokenizer, preprocessing, data, folder, index, args.device)
    if queries:
        page, chapters = args.page or "search.html", list(answer_queries(search, queries, args.top, args.explain))
        write_page(page, f"{printable(folder)}, {training_facts(tbps, path)['method']}", chapters)
        print(f"\npage: {page}", flush=True)
    if args.serve is not None:
        Handler.search = search
        print(f"search page: http://localhost:{server.server_port}/   (Ctrl-C ends it)", flush=True)
        with server:
            server.serve_forever()


def main(data, tbps):
    """data, tbps: the two modules. They are passed on, not imported above, so that this file can be copied alone."""
    args = parse_args(data)
    tbps.check_device(args.device)
    if args.export:
        return tbps.export(args.checkpoint[0], args.export, args.size, args.tokenizer)
    if args.features:
        return score_features(data.need(args.features, "the features", "an .npz with query, gallery, q_pid, g_pid"))
    if args.page or args.query or args.queries:
        check_page(args.page or "search.html")
    if args.runs:
        return compare_runs(data, tbps, args.runs, args.page or "eval-runs.html")
    tbps.join_ranks(args)                                               # the processes of torchrun
    if not args.gallery:
        compare(data, tbps, args)
    elif rank_and_world()[0] == 0:
        search_gallery(data, tbps, args)


if __name__ == "__main__":
    import data
    import tbps
    data.command(lambda: main(data, tbps))
