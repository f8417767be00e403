"""Speed and memory, as ratios within one run: our way and the usual way of doing the same (lab/BENCHMARK.md).

    python lab/benchmark.py                  every row, about 12 minutes on 2 cores
    python lab/benchmark.py --quick          some of them, in a minute
    python lab/benchmark.py --only metric    rows whose name holds this word

Each side of a row runs in its own process: a warm-up, then the median time. Memory is what the peak adds to the memory
before the first call; of a search it is all memory of the process, without mapped files. "Of peak": floating-point
operations of the call (counted by torch) per second, relative to a 1024^3 fp32 matrix product in the same process. Rows
with two methods compare the step of the second with that of the first. Quote ratios; absolute times belong to the
machine, which the last line names."""

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

# Each function below prepares its inputs and returns the function to measure.

# ---- ranking metrics -------------------------------------------------------------------------------------------------


def features(queries, gallery, persons):
    """Query (Q, 512) and gallery (G, 512) features with a common centre per person, and their ids."""
    g = torch.Generator().manual_seed(0)
    centre = torch.randn(persons, 512, generator=g)
    g_pid = torch.arange(gallery) % persons
    q_pid = torch.arange(queries) % persons
    query = centre[q_pid] + 2 * torch.randn(queries, 512, generator=g)
    return query, centre[g_pid] + 2 * torch.randn(gallery, 512, generator=g), q_pid, g_pid


def full_sort_metrics(query, gallery, q_pid, g_pid):
    """The usual implementation of the field: sort the whole similarity matrix, then cumulative sums."""
    scores = F.normalize(query, dim=1) @ F.normalize(gallery, dim=1).T                                  # (Q, G)
    matches = g_pid[torch.argsort(scores, dim=1, descending=True)] == q_pid[:, None]
    hits = matches.cumsum(1)
    number = matches.sum(1)
    ap = (hits / torch.arange(1, len(gallery) + 1) * matches).sum(1) / number
    last = torch.tensor([int(row.nonzero()[-1]) + 1 for row in matches])
    found = {f"R@{k}": 100 * matches[:, :k].any(1).float().mean().item() for k in (1, 5, 10)}
    return found | {"mAP": 100 * ap.mean().item(), "mINP": 100 * (number / last).mean().item()}


def metric(side, queries, gallery, persons):
    sample = features(queries, gallery, persons)
    score = evaluation.retrieval_metrics if side == "ours" else full_sort_metrics
    return lambda: score(*sample)


# ---- search ----------------------------------------------------------------------------------------------------------


def search(side, gallery, queries):
    """The top 10 of a gallery of 512 numbers each. Usual: float32 in memory, sorted. Ours: float16 in a mapped file."""
    folder, rng = tempfile.mkdtemp(), np.random.default_rng(0)
    index = evaluation.Index(Path(folder) / "i", 512)
    for start in range(0, gallery, 10_000):
        lines = [f'["camera {n % 50:02}/{n:07}.jpg", 34567, {1_700_000_000_000_000_000 + n}]\n'.encode()
                 for n in range(start, start + 10_000)]
        index.append(rng.standard_normal((10_000, 512), np.float32).astype(np.float16) / 22.6, lines)
    query = F.normalize(torch.randn(queries, 512), dim=1)
    if side == "ours":
        return lambda: evaluation.nearest(index.features(), query, 10)

    def usual():
        rows = np.fromfile(index.rows_file, np.float16).astype(np.float32).reshape(-1, 512)
        return (query @ torch.from_numpy(rows).T).sort(dim=1, descending=True).indices[:, :10]
    return usual


class PrivateMemory(threading.Thread):
    """The peak of this process's own memory while it runs, in MB, without the pages of mapped files."""

    def run(self):
        self.peak, self.on = 0, True
        while self.on:
            status = Path("/proc/self/status").read_text()
            self.peak = max(self.peak, int(status.split("RssAnon:")[1].split()[0]) / 1024)
            time.sleep(0.005)


# ---- encoding at ViT-B/16 --------------------------------------------------------------------------------------------


def captions(number, length=28):
    """Token rows (number, 77) as CLIP's tokenizer makes them of descriptions of persons, `length` tokens on average."""
    g = torch.Generator().manual_seed(0)
    tokens = torch.zeros(number, 77, dtype=torch.int64)
    for row, n in zip(tokens, torch.randint(length - 8, length + 9, (number,), generator=g).tolist()):
        row[:n] = torch.randint(1, 49000, (n,), generator=g)
        row[0], row[n] = 49406, 49407
    return tokens


def encode_every_position(model, tokens):
    """Text features, all 77 positions through every block."""
    x = model.text.ln_post(model.text(tokens)) @ model.text.proj
    return x[torch.arange(len(tokens)), tokens.argmax(1)]


def text(side):
    torch.manual_seed(0)
    model = tbps.DualEncoder(**tbps.SIZES["ViT-B/16"] | dict(image_layers=1)).eval()
    tokens = captions(64)
    encode = model.encode_text if side == "ours" else functools.partial(encode_every_position, model)
    return torch.no_grad()(lambda: encode(tokens))


def embedding(side, batch=16):
    """Images of 384 x 128 through the image tower. Usual: every token through the last block, of which one is read."""
    torch.manual_seed(0)
    model = tbps.DualEncoder(**tbps.SIZES["ViT-B/16"] | dict(image_size=(384, 128), text_layers=1)).eval()
    pixels = torch.randn(batch, 3, 384, 128)
    encode = model.encode_image if side == "ours" else (lambda x: model.image_tokens(x)[:, 0])
    return torch.no_grad()(lambda: encode(pixels))


# ---- training steps --------------------------------------------------------------------------------------------------

FP32 = functools.partial(torch.autocast, "cpu", enabled=False)


def training_step(model, optimizer, compute_loss):
    """The function to measure: backward and update after `compute_loss()`."""
    def run():
        model.zero_grad(set_to_none=True)
        compute_loss().backward()
        optimizer.step()
    return run


def add_heads(model, heads):
    for name, head in heads.items():
        model.heads[name] = head


def usual_losses(model, sample):
    """TBPS-CLIP with a forward per view, others for the teacher, all 77 positions, every token of the last block."""
    def encode_text():
        return encode_every_position(model, sample["tokens"][0])

    def encode_image(view):
        return model.image_tokens(sample["pixels"][view])[:, 0]

    with torch.no_grad():
        teacher, teacher_text = [encode_image(0), encode_image(1)], encode_text()
    image, text = [encode_image(view) for view in range(4)], encode_text()
    pid, scale = sample["pid"], model.scale()
    nitc = sum(losses.nitc(image[v], text, pid, scale, 0.5, teacher[v], teacher_text) for v in (0, 1)) / 2
    ss = losses.nt_xent(model.heads["ss"](image[2]), model.heads["ss"](image[3]))
    return nitc + losses.ritc(image[0], text, pid, scale) + 0.1 * losses.citc(image[0], text) + 0.4 * ss


def step(side, batch=4, micro_batch=0):
    """One step of full TBPS-CLIP."""
    torch.manual_seed(0)
    recipe = tbps.TBPS_CLIP
    model = tbps.DualEncoder(**tbps.SIZES["ViT-B/16"], lock_patch=True, text_dropout=0.05)
    model.micro_batch = micro_batch
    add_heads(model, tbps.tbps_clip_heads(recipe, model, 11003))
    optimizer = tbps.make_optimizer(model, recipe, fused=False)
    pixels = torch.randn(4, batch, 3, 224, 224)
    sample = dict(pixels=pixels, tokens=captions(batch)[None], pid=torch.arange(batch))

    def ours():
        return sum(tbps.tbps_clip_losses(model, sample, recipe, 0.5, FP32).values())

    return training_step(model, optimizer, ours if side == "ours" else lambda: usual_losses(model, sample))


def method_step(method, batch=8, size=(384, 128)):
    """One step of a method, at ViT-B/16 and the number of persons of CUHK-PEDES."""
    torch.manual_seed(0)
    recipe, heads, step_losses = tbps.METHODS[method]
    model = tbps.DualEncoder(**tbps.SIZES["ViT-B/16"] | dict(image_size=size, stride=recipe["stride"] or None))
    add_heads(model, heads(recipe, model, 11003))
    optimizer = tbps.make_optimizer(model, recipe, fused=False)
    tokens = data.trim_padding(captions(batch))                         # as data.collate does
    is_masked = (torch.rand(tokens.shape) < 0.15) & (tokens > 0) & (tokens < 49406)
    positions = is_masked.flatten().nonzero()[:, 0]
    sample = dict(pixels=torch.randn(1, batch, 3, *size), tokens=tokens[None], pid=torch.arange(batch),
                  image=torch.arange(batch), masked=torch.where(is_masked, 49405, tokens), positions=positions,
                  targets=tokens.flatten()[positions])
    return training_step(model, optimizer, lambda: sum(step_losses(model, sample, recipe, 1.0, FP32).values()))


def toy_step():
    """One step of `python tbps.py`."""
    torch.manual_seed(0)
    people = draw("train", persons=48)
    tokenizer = data.train_tokenizer([caption for r in people for caption in r["captions"]])
    recipe = tbps.SIMPLIFIED | tbps.TOY
    pairs = data.Pairs(people, (96, 48), text=dict(deletion=0.05))
    sample = data.collate(tokenizer, [pairs[0, i] for i in range(recipe["batch"])])
    options = dict(vocab=tokenizer.vocab, text_dropout=recipe["text_dropout"], lock_patch=recipe["lock_patch"])
    model = tbps.DualEncoder(**tbps.SIZES["toy"] | options)
    optimizer = tbps.make_optimizer(model, recipe, fused=False)
    return training_step(model, optimizer,
                         lambda: sum(tbps.tbps_clip_losses(model, sample, recipe, 1.0, FP32).values()))


# ---- generated pairs and the data pipeline ---------------------------------------------------------------------------


def generation(side, sources=4):
    """Two pairs each of some pedestrians, by an untrained toy diffusion model.

    Usual: one at a time by null-text inversion, as published. Ours: one batch, direct inversion, once per source."""
    import generate                                                     # takes seconds; other rows need not wait
    torch.manual_seed(0)
    people = draw("train", persons=30)
    recipe = generate.TOY | dict(inversion="direct" if side == "ours" else "null")
    model = generate.toy_model([caption for r in people for caption in r["captions"]], recipe["steps"], "cpu")
    plan = generate.plan(people, model.tokenizer, 0, 2 * sources, 2, False)
    batches = [plan] if side == "ours" else [[(n, i, [edit])] for n, i, edits in plan for edit in edits]
    return lambda: [generate.generate_batch(model, people, batch, recipe) for batch in batches]


# what is made of a file each time it is opened: the four views of TBPS-CLIP one by one, or at once
VIEW_BY_VIEW = [dict(), dict(), dict(views=0, self_views=1), dict(views=0, self_views=1)]
AT_ONCE = [dict(views=2, self_views=2)]
DRAWN = [dict(views=2, self_views=2, on_device=True)]                  # --augment-on-device: the loader's part


def pipeline(passes, size=(224, 224), photo=(128, 384), number=200):
    """Training items from JPEG files in one process, as a loader's process makes them."""
    torch.set_num_threads(1)
    folder, rng = tempfile.mkdtemp(), np.random.default_rng(0)
    caption = "a man in a red jacket with a black backpack and white shoes"
    records = []
    for n in range(number):
        small = Image.fromarray(rng.integers(0, 255, (24, 8, 3), np.uint8))
        path = Path(folder) / f"{n}.jpg"
        small.resize(photo, Image.Resampling.BICUBIC).save(path, quality=92)
        records.append(dict(image=path, captions=[caption], pid=n))
    datasets = [data.Pairs(records, size, text=dict(deletion=0.05), **options) for options in passes]
    return lambda: [pairs[0, i] for pairs in datasets for i in range(number)]


# ---- the table -------------------------------------------------------------------------------------------------------


def sides(function, *arguments):
    """The usual and our side of a row."""
    return (function, "usual", *arguments), (function, "ours", *arguments)


ROWS = [  # name, usual side (or None), our side: (function, *arguments); repetitions, items per call
    ("metric, CUHK size 6,156 x 3,074", *sides(metric, 6156, 3074, 1000), 5, 6156),
    ("metric, ICFG size 19,848 x 19,848", *sides(metric, 19848, 19848, 1000), 1, 19848),
    ("search, 1 query in 10,000", *sides(search, 10_000, 1), 9, 10_000),
    ("search, 1 query in 100,000", *sides(search, 100_000, 1), 9, 100_000),
    ("search, 1 query in 1,000,000", *sides(search, 1_000_000, 1), 5, 1_000_000),
    ("search, 1,000 queries in 1,000,000", None, (search, "ours", 1_000_000, 1000), 1, 1000),
    ("text, 64 captions, trimmed", *sides(text), 3, 64),
    ("embedding, ViT-B/16, 384 x 128", *sides(embedding), 3, 16),
    ("step, TBPS-CLIP, ViT-B/16, batch 4", *sides(step), 3, 4),
    ("step, TBPS-CLIP, batch 16: micro 4", (step, "ours", 16), (step, "ours", 16, 4), 1, 16),
    ("step, TBPS-CLIP, batch 16: micro 8", None, (step, "ours", 16, 8), 1, 16),
    ("step, TBPS-CLIP, batch 32: micro 16, 32", (step, "ours", 32, 16), (step, "ours", 32, 32), 1, 32),
    ("step, ViT-B/16: baseline, simplified", (method_step, "baseline"), (method_step, "tbps-clip-simplified"), 3, 8),
    ("step, ViT-B/16: baseline, ctlg", (method_step, "baseline"), (method_step, "ctlg"), 3, 8),
    ("step, ViT-B/16: baseline, irra", (method_step, "baseline"), (method_step, "irra"), 3, 8),
    ("step, ViT-B/16: irra, uit", (method_step, "irra"), (method_step, "uit"), 3, 8),
    ("step, baseline: batch 4, 16", (method_step, "baseline", 4), (method_step, "baseline", 16), 3, 16),
    ("step, baseline: 384 x 128, 384 x 384", (method_step, "baseline"), (method_step, "baseline", 8, (384, 384)), 3, 8),
    ("step, toy, batch 128", None, (toy_step,), 10, 128),
    ("pairs, toy: null-text, direct", *sides(generation), 1, 8),
    ("data, 4 views: one by one, at once", (pipeline, VIEW_BY_VIEW), (pipeline, AT_ONCE), 3, 200),
    ("data, 4 views: at once, only drawn", (pipeline, AT_ONCE), (pipeline, DRAWN), 3, 200),
]
QUICK = ["metric, CUHK size 6,156 x 3,074", "search, 1 query in 100,000", "step, toy, batch 128"]
COUNTED = (step, method_step, toy_step, text, embedding)                # their floating-point operations are counted


def seconds(run, times):
    """Duration of each of some calls."""
    found = []
    for _ in range(times):
        began = time.perf_counter()
        run()
        found.append(time.perf_counter() - began)
    return found


def fraction_of_peak(run, median):
    """Operations per second of a call, relative to those of the fastest of 20 matrix products."""
    from torch.utils.flop_counter import FlopCounterMode
    with FlopCounterMode(display=False) as counter:
        run()
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    return counter.get_total_flops() / median * min(seconds(lambda: a @ b, 20)) / (2 * 1024 ** 3)


def measure(function, arguments, times):
    """In a process of its own: (median seconds, MB, fraction of the matrix-product peak or None)."""
    run = function(*arguments)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if function is search:
        watch = PrivateMemory(daemon=True)
        watch.start()
    warm_up = seconds(run, 1)
    median = statistics.median(seconds(run, times) if times > 1 else warm_up)
    memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    if function is search:
        watch.on, memory = False, watch.peak
    return median, memory, fraction_of_peak(run, median) if function in COUNTED else None


def measure_in_process(n, side):
    """`measure` of a side of row n, in a new process; None if the row has no such side."""
    name = ROWS[n][0]
    if ROWS[n][1 + side] is None:
        return None
    # glibc keeps freed blocks, which hides how little memory micro-batches need: for them it gives blocks back at once
    env = os.environ | dict(MALLOC_MMAP_THRESHOLD_="1000000") if ": micro" in name else None
    done = subprocess.run([sys.executable, __file__, "--one", str(n), str(side)], check=True, stdout=subprocess.PIPE,
                          text=True, env=env)
    return json.loads(done.stdout)


def write_row(n):
    name, _, _, _, items = ROWS[n]
    usual, ours = (measure_in_process(n, side) for side in (0, 1))
    cells = [
        f"{usual[0]:.3f}" if usual else "-",
        f"{ours[0]:.3f}",
        f"{usual[0] / ours[0]:.1f}x" if usual else "-",
        f"{usual[1]:.0f}" if usual else "-",
        f"{ours[1]:.0f}",
        f"{items / ours[0]:.0f}",
        f"{100 * ours[2]:.0f}%" if ours[2] else "-",
    ]
    print(f"{name:40}" + "".join(f"{cell:>10}" for cell in cells), flush=True)


def machine():
    """The name of the processor, where /proc tells it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--only", default="", help="rows whose name holds this word (default: all)")
    p.add_argument("--quick", action="store_true", help=f"only: {'; '.join(QUICK)}")
    p.add_argument("--one", nargs=2, type=int, help=argparse.SUPPRESS)  # row and side, for the processes
    args = p.parse_args()
    if args.one:
        n, side = args.one
        function, *arguments = ROWS[n][1 + side]
        print(json.dumps(measure(function, arguments, ROWS[n][3])))
        return
    chosen = [n for n, (name, *_) in enumerate(ROWS) if args.only in name]
    if not chosen:
        p.error(f"no row holds {args.only!r}; there are: " + "; ".join(row[0] for row in ROWS))
    head = ["usual s", "ours s", "faster", "usual MB", "ours MB", "items/s", "of peak"]
    print(f"{'':40}" + "".join(f"{cell:>10}" for cell in head))
    for n in chosen:
        if not args.quick or ROWS[n][0] in QUICK:
            write_row(n)
    threads, level = torch.get_num_threads(), torch.backends.cpu.get_cpu_capability()
    print(f"torch {torch.__version__}, {threads} threads, {machine()} {level}")


if __name__ == "__main__":
    main()
