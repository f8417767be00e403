"""Speed and memory, as ratios within one run: ours against the plain way to do the same.

    python lab/benchmark.py                  every row, about 12 minutes on 2 cores
    python lab/benchmark.py --quick          some of them, in a minute
    python lab/benchmark.py --only metric    rows whose name holds this word

Each side of a row runs in a process of its own: a warm-up, then medians; memory is what its peak adds to what stood before the first
call (of a search all that is its own, without what is mapped). Share of peak: floating-point operations of the step (counted by torch)
per second, over those of a 1024^3 fp32 matrix product measured in the same process. Rows with two methods compare the first one's step
with the second's. Quote ratios; absolute times belong to the machine, which the last line names."""

import argparse
import functools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))
import data                                                             # noqa: E402
import eval as evaluation                                               # noqa: E402
import losses                                                           # noqa: E402
import tbps                                                             # noqa: E402
from lab.people import draw                                             # noqa: E402


# ---- ranking metrics ------------------------------------------------------------------------------------------------

def features(queries, gallery, persons):
    """Features in which a query is somewhat like the images of its person, as a trained model gives them."""
    g = torch.Generator().manual_seed(0)
    centre = torch.randn(persons, 512, generator=g)
    g_pid = torch.arange(gallery) % persons
    q_pid = torch.arange(queries) % persons
    return centre[q_pid] + 2 * torch.randn(queries, 512, generator=g), centre[g_pid] + 2 * torch.randn(gallery, 512, generator=g), q_pid, g_pid


def full_sort_metrics(query, gallery, q_pid, g_pid):
    """The usual implementation of the field: the whole similarity matrix, sorted, and cumulative sums over it."""
    scores = F.normalize(query, dim=1) @ F.normalize(gallery, dim=1).T                                  # (Q, G)
    matches = g_pid[torch.argsort(scores, dim=1, descending=True)] == q_pid[:, None]
    hits = matches.cumsum(1)
    number = matches.sum(1)
    ap = (hits / torch.arange(1, len(gallery) + 1) * matches).sum(1) / number
    last = torch.tensor([int(row.nonzero()[-1]) + 1 for row in matches])
    return {f"R@{k}": 100 * matches[:, :k].any(1).float().mean().item() for k in (1, 5, 10)} | {
        "mAP": 100 * ap.mean().item(), "mINP": 100 * (number / last).mean().item()}


def metric(which, queries, gallery, persons):
    sample = features(queries, gallery, persons)
    return lambda: (evaluation.retrieval_metrics if which == "ours" else full_sort_metrics)(*sample)


# ---- search ---------------------------------------------------------------------------------------------------------

def search(which, gallery, queries):
    """The top 10 of a gallery of 512 numbers each. Plain: in memory as float32, scored at once, sorted. Ours: float16 in a mapped file."""
    folder, rng = tempfile.mkdtemp(), np.random.default_rng(0)
    index = evaluation.Index(Path(folder) / "i", "w", 512)
    for start in range(0, gallery, 10_000):
        lines = [index.line([f"camera {n % 50:02}/{n:07}.jpg", 34_567, 1_700_000_000_000_000_000 + n]) for n in range(start, start + 10_000)]
        index.append(rng.standard_normal((10_000, 512), np.float32).astype(np.float16) / 22.6, lines)
    query = F.normalize(torch.randn(queries, 512), dim=1)
    if which == "ours":
        return lambda: evaluation.nearest(index.features(), query, 10)

    def plain():
        return (query @ torch.from_numpy(np.fromfile(index.rows_file, np.float16).astype(np.float32).reshape(-1, 512)).T).sort(dim=1, descending=True).indices[:, :10]
    return plain


class Private(threading.Thread):
    """The peak of this process's own memory while it runs, MB: pages of mapped files are not counted."""

    def run(self):
        self.peak, self.on = 0, True
        while self.on:
            status = Path("/proc/self/status").read_text()
            self.peak = max(self.peak, int(status.split("RssAnon:")[1].split()[0]) / 1024)
            time.sleep(0.005)


# ---- encoding and one step at ViT-B/16 ------------------------------------------------------------------------------

def captions(number, length=28):
    """Token rows as CLIP's tokenizer makes them of person descriptions, `length` tokens on average."""
    g = torch.Generator().manual_seed(0)
    tokens = torch.zeros(number, 77, dtype=torch.int64)
    for row, n in zip(tokens, torch.randint(length - 8, length + 9, (number,), generator=g).tolist()):
        row[:n] = torch.randint(1, 49000, (n,), generator=g)
        row[0], row[n] = 49406, 49407
    return tokens


def text(which):
    torch.manual_seed(0)
    model = tbps.DualEncoder(**tbps.SIZES["ViT-B/16"] | dict(image_layers=1)).eval()
    tokens = captions(64)

    def run():
        with torch.no_grad():
            if which == "ours":
                model.encode_text(tokens)
            else:                                                       # all 77 positions through every block
                x = model.text.ln_post(model.text(tokens)) @ model.text.proj
                x[torch.arange(64), tokens.argmax(1)]
    return run


def embedding(which, batch=16):
    """Pictures of 384 x 128 pixels through the image tower. Plain: every token through every block, of which one is read."""
    torch.manual_seed(0)
    model = tbps.DualEncoder(**tbps.SIZES["ViT-B/16"] | dict(image_size=(384, 128), text_layers=1)).eval()
    pixels = torch.randn(batch, 3, 384, 128)

    @torch.no_grad()
    def run():
        model.encode_image(pixels) if which == "ours" else model.image_tokens(pixels)[:, 0]
    return run


def step(which, batch=4, micro_batch=0):
    """One step of full TBPS-CLIP. The plain form: a forward per view, the teacher's images and texts in passes of their own, all
    77 text positions, every token through the last block, losses by the same functions."""
    torch.manual_seed(0)
    recipe = tbps.TBPS_CLIP
    model = tbps.DualEncoder(**tbps.SIZES["ViT-B/16"], lock_patch=True, text_dropout=0.05)
    model.micro_batch = micro_batch
    for name, head in tbps.tbps_clip_heads(recipe, model, 11003).items():
        model.heads[name] = head
    optimizer, = tbps.make_optimizers(model, recipe, fused=False)
    tokens = captions(batch)
    sample = dict(pixels=torch.randn(4, batch, 3, 224, 224), tokens=tokens[None], pid=torch.arange(batch))

    def plain():
        def encode_text():
            return (model.text.ln_post(model.text(tokens)) @ model.text.proj)[torch.arange(batch), tokens.argmax(1)]

        def encode_image(v):
            return model.image_tokens(sample["pixels"][v])[:, 0]
        with torch.no_grad():
            teacher, teacher_text = [encode_image(0), encode_image(1)], encode_text()
        image, text, pid, scale = [encode_image(v) for v in range(4)], encode_text(), sample["pid"], model.scale()
        return (sum(losses.nitc(image[v], text, pid, scale, 0.5, teacher[v], teacher_text) for v in (0, 1)) / 2 + losses.ritc(image[0], text, pid, scale)
                + 0.1 * losses.citc(image[0], text) + 0.4 * losses.nt_xent(model.heads["ss"](image[2]), model.heads["ss"](image[3])))

    def ours():
        return sum(tbps.tbps_clip_losses(model, sample, recipe, 0.5, functools.partial(torch.autocast, "cpu", enabled=False)).values())

    def run():
        optimizer.zero_grad(set_to_none=True)
        (ours if which == "ours" else plain)().backward()
        optimizer.step()
    return run


def method_step(method, batch=8, size=(384, 128), patch_drop=0.0):
    """One step of a method as it is, at ViT-B/16 and the persons of CUHK-PEDES."""
    torch.manual_seed(0)
    recipe, heads, step_losses = tbps.METHODS[method]
    model = tbps.DualEncoder(**tbps.SIZES["ViT-B/16"] | dict(image_size=size, stride=recipe["stride"] or None), patch_drop=patch_drop)
    for name, head in heads(recipe, model, 11003).items():
        model.heads[name] = head
    optimizer, = tbps.make_optimizers(model, recipe, fused=False)
    tokens = captions(batch)
    asked = torch.where((torch.rand(tokens.shape) < 0.15) & (tokens > 0) & (tokens < 49406), tokens, -1)
    sample = dict(pixels=torch.randn(1, batch, 3, *size), tokens=tokens[None], pid=torch.arange(batch), image=torch.arange(batch), asked=asked, masked=torch.where(asked >= 0, 49405, tokens))

    def run():
        optimizer.zero_grad(set_to_none=True)
        sum(step_losses(model, sample, recipe, 1.0, functools.partial(torch.autocast, "cpu", enabled=False)).values()).backward()
        optimizer.step()
    return run


def toy_step(patch_drop=0.0):
    torch.manual_seed(0)
    people = draw("train", persons=48)
    tokenizer = data.train_tokenizer([c for r in people for c in r["captions"]])
    recipe = tbps.SIMPLIFIED | tbps.TOY | tbps.SCRATCH
    pairs = data.Pairs(people, (96, 48), text=dict(deletion=0.05))
    sample = data.collate(tokenizer, [pairs[i] for i in range(recipe["batch"])])
    model = tbps.DualEncoder(**tbps.SIZES["toy"] | dict(vocab=tokenizer.vocab, text_dropout=recipe["text_dropout"], lock_patch=recipe["lock_patch"]), patch_drop=patch_drop)
    optimizers = tbps.make_optimizers(model, recipe, fused=False)

    def run():
        loss = sum(tbps.tbps_clip_losses(model, sample, recipe, 1.0, functools.partial(torch.autocast, "cpu", enabled=False)).values())
        model.zero_grad(set_to_none=True)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
    return run


def generation(which, sources=4):
    """Two pairs of each of some toy people, with the toy's diffusion model, untrained. Plain: one at a time, each by null-text inversion,
    as published; ours: all in one batch, directly, two pairs from one inversion."""
    import generate
    torch.manual_seed(0)
    people = draw("train", persons=30)
    recipe = generate.TOY | dict(inversion="null" if which == "plain" else "direct")
    model = generate.toy_model([c for r in people for c in r["captions"]], recipe["steps"], "cpu")
    todo = generate.plan(people, model.tokenizer, 0, 2 * sources, 2, False)
    batches = [[(i, [edit])] for i, some in todo for edit in some] if which == "plain" else [todo]
    return lambda: [generate.make(model, people, batch, recipe, None, 0) for batch in batches]


# ---- the data pipeline ----------------------------------------------------------------------------------------------

FOUR = [dict(), dict(), dict(views=0, self_views=1), dict(views=0, self_views=1)]                        # full TBPS-CLIP, view by view
ONCE = [dict(views=2, self_views=2)]


def pipeline(passes, size, photo=(128, 384), number=200):
    """Training items from JPEG files in one process, as a worker makes them. `passes`: what is made of a file each time it is opened."""
    torch.set_num_threads(1)
    folder = tempfile.mkdtemp()
    rng = np.random.default_rng(0)
    records = []
    for n in range(number):
        small = Image.fromarray(rng.integers(0, 255, (24, 8, 3), np.uint8))
        small.resize(photo, Image.Resampling.BICUBIC).save(f"{folder}/{n}.jpg", quality=92)
        records.append(dict(image=Path(f"{folder}/{n}.jpg"), captions=["a man in a red jacket with a black backpack and white shoes"], pid=n))
    made = [data.Pairs(records, size, text=dict(deletion=0.05), **p) for p in passes]
    return lambda: [pairs[i] for pairs in made for i in range(number)]


# ---- the table ------------------------------------------------------------------------------------------------------

ROWS = [  # name, the plain side (or None), ours; each (function, arguments), repetitions, items per call
    ("metric, CUHK size 6,156 x 3,074", (metric, "plain", 6156, 3074, 1000), (metric, "ours", 6156, 3074, 1000), 5, 6156),
    ("metric, ICFG size 19,848 x 19,848", (metric, "plain", 19848, 19848, 1000), (metric, "ours", 19848, 19848, 1000), 1, 19848),
    ("search, 1 query in 10,000", (search, "plain", 10_000, 1), (search, "ours", 10_000, 1), 9, 10_000),
    ("search, 1 query in 100,000", (search, "plain", 100_000, 1), (search, "ours", 100_000, 1), 9, 100_000),
    ("search, 1 query in 1,000,000", (search, "plain", 1_000_000, 1), (search, "ours", 1_000_000, 1), 5, 1_000_000),
    ("search, 1,000 queries in 1,000,000", None, (search, "ours", 1_000_000, 1000), 1, 1000),
    ("text, 64 captions, cut to the longest", (text, "plain"), (text, "ours"), 3, 64),
    ("embedding, ViT-B/16, 384 x 128", (embedding, "plain"), (embedding, "ours"), 3, 16),
    ("step, TBPS-CLIP, ViT-B/16, batch 4", (step, "plain"), (step, "ours"), 3, 4),
    ("step, TBPS-CLIP, batch 16: in parts of 4", (step, "ours", 16), (step, "ours", 16, 4), 1, 16),
    ("step, TBPS-CLIP, batch 16: in parts of 8", None, (step, "ours", 16, 8), 1, 16),
    ("step, TBPS-CLIP, batch 32: parts of 16, 32", (step, "ours", 32, 16), (step, "ours", 32, 32), 1, 32),
    ("step, ViT-B/16: baseline, simplified", (method_step, "baseline"), (method_step, "tbps-clip-simplified"), 3, 8),
    ("step, ViT-B/16: baseline, ctlg", (method_step, "baseline"), (method_step, "ctlg"), 3, 8),
    ("step, ViT-B/16: baseline, irra", (method_step, "baseline"), (method_step, "irra"), 3, 8),
    ("step, ViT-B/16: irra, uit", (method_step, "irra"), (method_step, "uit"), 3, 8),
    ("step, baseline: all patches, half", (method_step, "baseline"), (method_step, "baseline", 8, (384, 128), 0.5), 3, 8),
    ("step, baseline: batch 4, 16", (method_step, "baseline", 4), (method_step, "baseline", 16), 3, 16),
    ("step, baseline: 384 x 128, 384 x 384", (method_step, "baseline"), (method_step, "baseline", 8, (384, 384)), 3, 8),
    ("step, toy, batch 128", None, (toy_step,), 10, 128),
    ("step, toy: all patches, half", (toy_step,), (toy_step, 0.5), 10, 128),
    ("pairs, toy: null-text, direct", (generation, "plain"), (generation, "ours"), 1, 8),
    ("data, 4 views: decoded for each, once", (pipeline, FOUR, (224, 224)), (pipeline, ONCE, (224, 224)), 3, 200),
]
QUICK = ["metric, CUHK size 6,156 x 3,074", "search, 1 query in 100,000", "step, toy, batch 128"]


def measure(make, arguments, times):
    """In a process of its own: median seconds, peak memory above the start (MB), share of the matrix-product peak (%)."""
    run = make(*arguments)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if make is search:
        watch = Private(daemon=True)
        watch.start()
    began = time.perf_counter()
    run()
    seconds = [time.perf_counter() - began]
    if times > 1:
        seconds = []
        for _ in range(times):
            began = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - began)
    memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    if make is search:
        watch.on, memory = False, watch.peak
    share = None
    if make in (step, method_step, toy_step, text, embedding):
        from torch.utils.flop_counter import FlopCounterMode
        with FlopCounterMode(display=False) as counter:
            run()
        a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
        peaks = []
        for _ in range(20):
            began = time.perf_counter()
            a @ b
            peaks.append(2 * 1024 ** 3 / (time.perf_counter() - began))
        share = 100 * counter.get_total_flops() / statistics.median(seconds) / max(peaks)
    return statistics.median(seconds), memory, share


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--only", default="", help="rows whose name holds this word (default: all)")
    p.add_argument("--quick", action="store_true", help=f"only: {'; '.join(QUICK)}")
    p.add_argument("--one", nargs=2, type=int, help=argparse.SUPPRESS)                                   # row and side, for the processes
    args = p.parse_args()
    if args.one:
        name, plain, ours, times, _ = ROWS[args.one[0]]
        make, *arguments = (plain, ours)[args.one[1]]
        print(json.dumps(measure(make, arguments, times)))
        return
    if not any(args.only in row[0] for row in ROWS):
        p.error(f"no row holds {args.only!r}; there are: " + "; ".join(row[0] for row in ROWS))
    print(f"{'':40}{'plain s':>9}{'ours s':>9}{'faster':>8}{'plain MB':>10}{'ours MB':>9}{'items/s':>9}{'of peak':>9}")
    for n, (name, plain, ours, times, items) in enumerate(ROWS):
        if args.only not in name or args.quick and name not in QUICK:
            continue
        # glibc does not give back all that was freed, which hides how little parts need: for them freed blocks go back at once
        env = os.environ | dict(MALLOC_MMAP_THRESHOLD_="1000000") if "parts of" in name else None
        results = [json.loads(subprocess.run([sys.executable, __file__, "--one", str(n), str(side)], check=True, stdout=subprocess.PIPE, text=True, env=env).stdout)
                   if which else None for side, which in enumerate((plain, ours))]
        (a, b) = results
        print(f"{name:40}" + (f"{a[0]:9.3f}" if a else f"{'-':>9}") + f"{b[0]:9.3f}" + (f"{a[0] / b[0]:7.1f}x" if a else f"{'-':>8}") +
              (f"{a[1]:10.0f}" if a else f"{'-':>10}") + f"{b[1]:9.0f}{items / b[0]:9.0f}" + (f"{b[2]:8.0f}%" if b[2] else f"{'-':>9}"), flush=True)
    cpu = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), "") if os.path.exists("/proc/cpuinfo") else ""
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {cpu} {torch.backends.cpu.get_cpu_capability()}")


if __name__ == "__main__":
    main()
