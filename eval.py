"""Evaluation: ranking metrics, embedding, the report page.

    python eval.py --checkpoint runs/toy-tbps-clip-simplified-0/best.pt                  scores on the data set it was trained on
    python eval.py --checkpoint C --dataset icfg --data-root DIR --split test            scores on another one

Prints R@1, R@5, R@10, mAP and mINP in percent, text-to-image (the protocol of the field: every caption a query, every image of the
split in the gallery), image-to-text, and text-to-image without the image that the caption was written for, and writes a
self-contained page with queries and their top 10. As a module it needs torch, torchvision, numpy and what these bring along
(Pillow, tqdm): `retrieval_metrics` can be copied as it stands. CUHK-PEDES (6,156 queries x 3,074 images) takes it 0.25 s on 2 cores."""

import argparse
import base64
import html
import io
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

# ---- metrics --------------------------------------------------------------------------------------------------------

@torch.no_grad()
def retrieval_metrics(query, gallery, q_pid, g_pid, own=None):
    """Ranks the gallery for each query by cosine and scores the ranking: {"R@1", "R@5", "R@10", "mAP", "mINP"}, in percent.

    query (Q, D), gallery (G, D): features of any norm;  q_pid (Q,), g_pid (G,): who it is
    own (Q,): the gallery index that each query was written for, left out of its ranking; queries that then have nobody left to
        find are dropped, and counted as "dropped" in the result if there are any

    R@k   share of queries with at least one right image among the first k
    mAP   mean over queries of AP = 1/R sum_j j / rank_j, over the ranks rank_1 < ... < rank_R of its right images
    mINP  mean over queries of R / rank_R: how deep one must look to find all of them (Ye et al., arXiv 2001.04193)

    fp32; equal scores rank in gallery order. No ranking is built: for each right image, those that score higher are counted, by a
    search in the sorted scores, in chunks of queries, so memory beyond the features is some megabytes. A query with no right
    image in the gallery, or features that are not finite, raise ValueError."""
    query, gallery = F.normalize(query.float(), dim=1), F.normalize(gallery.float(), dim=1)
    q_pid, g_pid = (torch.as_tensor(p).to(query.device) for p in (q_pid, g_pid))
    Q, G = len(query), len(gallery)
    if not Q or not G:
        raise ValueError(f"nothing to score: {Q} queries, {G} gallery images")
    if not (query.isfinite().all() and gallery.isfinite().all()):
        raise ValueError("the features hold values that are not finite")
    # right images of each person as a row of gallery indices, padded with -1
    order = torch.argsort(g_pid, stable=True)
    pids, number = torch.unique_consecutive(g_pid[order], return_counts=True)
    start = number.cumsum(0) - number                                                                   # (P,)
    person = torch.searchsorted(pids, q_pid).clamp(max=len(pids) - 1)                                   # (Q,)
    if (lost := pids[person] != q_pid).any():
        i = int(lost.nonzero()[0])
        raise ValueError(f"{int(lost.sum())} queries have no image of their person in the gallery, e.g. query {i} (pid {int(q_pid[i])})")
    ranks = torch.full((Q, int(number.max())), torch.inf, device=query.device)                          # 1 = first
    by_number = torch.argsort(number[person], stable=True)              # a chunk shares its number of right images
    for rows in by_number.split(max(128, 2 ** 19 // G)):
        score = query[rows] @ gallery.T                                                                 # (chunk, G)
        many = number[person[rows], None]
        j = torch.arange(int(many.max()), device=query.device)
        right = order[(start[person[rows], None] + j).clamp(max=G - 1)]                                 # (chunk, R) gallery indices
        if own is not None:
            mine = torch.as_tensor(own).to(query.device)[rows, None]
            score.scatter_(1, mine, -torch.inf)
        mark = score.gather(1, right)                                                                   # (chunk, R) their scores
        ordered = torch.from_numpy(np.sort(score.numpy())) if score.device.type == "cpu" else score.sort(dim=1).values       # numpy's is fast
        before = G - torch.searchsorted(ordered, mark, right=True)                                      # how many score higher
        tied = G - torch.searchsorted(ordered, mark) > before + 1
        for i, k in tied.nonzero().tolist():                            # rare, so it may be slow
            before[i, k] += (score[i, :right[i, k]] == mark[i, k]).sum()
        able = (j < many) & (right != mine if own is not None else True)
        ranks[rows, :len(j)] = torch.where(able, before + 1.0, torch.inf)
    ranks = ranks.sort(dim=1).values
    found = ranks.isfinite().sum(dim=1)                                                                 # (Q,) right images
    ranks, found = ranks[found > 0], found[found > 0]
    if not len(ranks):
        raise ValueError("no query has a right image besides its own")
    ap = (torch.arange(1, ranks.shape[1] + 1, device=ranks.device) / ranks).sum(dim=1) / found          # j / inf = 0
    last = ranks.gather(1, found[:, None] - 1)[:, 0]
    scores = {f"R@{k}": 100 * (ranks[:, 0] <= k).double().mean().item() for k in (1, 5, 10)}
    scores |= {"mAP": 100 * ap.double().mean().item(), "mINP": 100 * (found / last).double().mean().item()}
    return scores | ({"dropped": Q - len(ranks)} if Q > len(ranks) else {})


def show(scores):
    """Scores on a line: R@1 62.05 R@5 ..."""
    return " ".join(f"{name} {value:.2f}" if name != "dropped" else f"({value} queries dropped)" for name, value in scores.items())


# ---- embedding ------------------------------------------------------------------------------------------------------

@torch.no_grad()
def embed_images(model, images, device="cpu", workers=0, batch=256, progress=True):
    """A dataset of pixels (3, H, W) -> (G, D) fp32 features of unit length, on the CPU, in order."""
    loader = torch.utils.data.DataLoader(images, batch, num_workers=workers, pin_memory=torch.device(device).type == "cuda")
    model.eval()
    return torch.cat([F.normalize(model.encode_image(pixels.to(device, non_blocking=True)).float(), dim=1).cpu()
                      for pixels in tqdm(loader, desc="images", leave=False, disable=None if progress else True)])


@torch.no_grad()
def embed_texts(model, tokens, batch=512):
    """(Q, T) ids -> (Q, D) fp32 features of unit length, on the CPU, in order. Batches hold captions of like length, as the
    encoder's cost goes with the longest."""
    model.eval()
    order = torch.argsort(tokens.argmax(dim=1), stable=True)
    text = torch.cat([F.normalize(model.encode_text(tokens[rows]).float(), dim=1).cpu() for rows in order.split(batch)])
    return text[torch.argsort(order)]


# ---- the report page ------------------------------------------------------------------------------------------------

STYLE = """body{font:15px/1.5 system-ui,sans-serif;margin:2em auto;max-width:78em;padding:0 1em;color:#222}h1{font-size:1.5em}h2{margin-top:2em;font-size:1.15em}
table{border-collapse:collapse}td,th{padding:.2em .9em .2em 0;text-align:right}td:first-child,th:first-child{text-align:left}th{border-bottom:1px solid #999}
.settings{columns:4;font:13px ui-monospace,monospace;color:#444}.row{margin:1.1em 0}.row p{margin:0 0 .3em}.row img{height:112px;margin-right:4px;border:4px solid #fff;border-radius:4px}
.row img.own{border-color:#bbb;margin-right:18px}.row img.right{border-color:#1a9641}.row img.wrong{border-color:#d7301f}figure{display:inline-block;margin:0;text-align:center}svg{margin-right:2em}svg text{font:12px system-ui;fill:#444}"""
COLOURS = ["#1f6fb4", "#d7301f", "#1a9641", "#8a4fbe", "#e08214", "#555", "#c2569b"]


def thumbnail(image, height=112):
    """PIL image -> data URI of a JPEG."""
    buffer = io.BytesIO()
    image.resize((max(1, round(image.width * height / image.height)), height), Image.Resampling.LANCZOS).save(buffer, "JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def curve(title, series, width=480, height=240):
    """Lines {name: [(x, y), ...]} as one inline SVG with labelled axes; x is the epoch."""
    points = [p for line in series.values() for p in line]
    if not points:
        return ""
    (x0, x1), (y0, y1) = [(min(v), max(v)) for v in zip(*points)]
    x0, y0 = min(x0, 0), min(y0, 0)
    x1, y1 = max(x1, x0 + 1e-9), max(y1, y0 + 1e-9)
    left, right, top, bottom = 64, width - 96, 28, height - 32

    def at(x, y):
        return f"{left + (right - left) * (x - x0) / (x1 - x0):.1f},{bottom - (bottom - top) * (y - y0) / (y1 - y0):.1f}"

    out = [f'<svg width="{width}" height="{height}" role="img"><text x="{left}" y="16" style="font-weight:600">{html.escape(title)}</text>']
    for k in range(5):
        x, y = x0 + k / 4 * (x1 - x0), y0 + k / 4 * (y1 - y0)
        px, py = at(x, y).split(",")
        out.append(f'<line x1="{left}" x2="{right}" y1="{py}" y2="{py}" stroke="#ddd"/><text x="{left - 6}" y="{py}" dy="4" text-anchor="end">{y:.3g}</text>'
                   f'<text x="{px}" y="{bottom + 18}" text-anchor="middle">{x:.3g}</text>')
    for n, (name, line) in enumerate(series.items()):
        colour = COLOURS[n % len(COLOURS)]
        out.append(f'<polyline fill="none" stroke="{colour}" stroke-width="1.8" points="{" ".join(at(x, y) for x, y in line)}"/>'
                   f'<text x="{right + 10}" y="{top + 8 + 17 * n}" style="fill:{colour}">{html.escape(name)}</text>')
    return "".join(out) + "</svg>"


def table(rows):
    """{name: scores} -> an HTML table."""
    names = list(dict.fromkeys(k for scores in rows.values() for k in scores))
    cells = "".join(f"<tr><td>{html.escape(name)}</td>" + "".join(f"<td>{s.get(k, ''):{'.2f' if isinstance(s.get(k), float) else ''}}</td>" for k in names)
                    + "</tr>" for name, s in rows.items())
    return f"<table><tr><th></th>{''.join(f'<th>{k}</th>' for k in names)}</tr>{cells}</table>"


def retrieval_sheet(captions, text, image, q_pid, g_pid, own, load, number=12, top=10):
    """HTML: some queries, evenly spread, each with the image it was written for (grey) and its top 10, right ones framed green,
    wrong ones red. `load` turns a gallery index into a PIL image."""
    rows = []
    for i in range(0, len(captions), max(1, len(captions) // number)):
        best = torch.argsort(image @ text[i], descending=True, stable=True)[:top].tolist()
        shown = "".join(f'<img class="{"right" if g_pid[j] == q_pid[i] else "wrong"}" title="pid {int(g_pid[j])}" src="{thumbnail(load(j))}">' for j in best)
        rows.append(f'<div class=row><p>{html.escape(captions[i])}</p><img class=own title="what the caption was written for" '
                    f'src="{thumbnail(load(int(own[i])))}">{shown}</div>')
    return "".join(rows[:number])


def write_page(path, title, *chapters):
    """One self-contained HTML file: chapters are (heading, HTML) pairs."""
    body = "".join(f"<h2>{html.escape(heading)}</h2>{content}" for heading, content in chapters if content)
    part = Path(f"{path}.part")
    part.write_text(f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(title)}</title><style>{STYLE}</style>"
                    f"<h1>{html.escape(title)}</h1>{body}</html>", encoding="utf-8")
    part.replace(path)


# ---- the command ----------------------------------------------------------------------------------------------------

def main():
    import data                                                         # here: as a module this file stands alone
    import tbps
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--checkpoint", required=True, help="best.pt or last.pt of a run")
    p.add_argument("--dataset", choices=data.DATASETS, help="what to score on (default: what the checkpoint was trained on)")
    p.add_argument("--data-root", help="the set's folder or its parent; for csv the file (default: that of the training run)")
    p.add_argument("--split", choices=["train", "val", "test"], default="test", help="which split (default: test)")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda, cpu or mps (default: cuda where there is one)")
    p.add_argument("--workers", type=int, default=2, help="processes that decode images (default: 2)")
    p.add_argument("--page", help="where to write the retrieval sheet (default: beside the checkpoint, eval-DATASET-SPLIT.html)")
    args = p.parse_args()
    if args.page:
        data.need(Path(args.page).absolute().parent, "the folder for the page", "make it, or name another file with --page")

    model, tokenizer, info = tbps.load_checkpoint(args.checkpoint, args.device)
    dataset, root = args.dataset or info["args"]["dataset"], args.data_root or info["args"]["data_root"]
    records = data.read(dataset, root, args.split)
    rows, sheet = tbps.evaluate(model, tokenizer, info, records, args.device, 0 if dataset.startswith("toy") else args.workers)
    print(f"{args.checkpoint} ({info['method']}, epoch {info['epoch']}) on {dataset} {args.split}: " +
          "{:,} persons, {:,} images, {:,} captions".format(*data.counts(records)))
    for name, scores in rows.items():
        print(f"{name:28}{show(scores)}")
    page = args.page or Path(args.checkpoint).parent / f"eval-{dataset}-{args.split}.html"
    write_page(page, f"{dataset} {args.split}, {info['method']}", ("Scores", table(rows)), ("Queries and their top 10", sheet))
    print(f"page: {page}")


if __name__ == "__main__":
    from data import command
    command(main)
