"""Pre-train the toy CLIP, the small weights in lab/toyclip/ from which training on synthetic pedestrians starts.

    python lab/pretrain.py                  makes lab/toyclip/ again, in 2 hours on a CPU core

OpenAI's CLIP knows a lot before it is fine-tuned, but it cannot be shipped. The toy CLIP stands in for it: it has seen
`toy-generic` only, pedestrians with other garments, colours, bags and hats than those of the benchmark, under another
camera, described in other words. It goes through the same loading code as the real weights.

Pre-training differs from fine-tuning (`tbps.train`) in what is cheap here: there are always new persons to draw, so
images are not augmented; all weights are new, so Muon moves the matrices of the blocks."""

import argparse
import functools
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import data  # noqa: E402
import eval as evaluation  # noqa: E402
import losses  # noqa: E402
import tbps  # noqa: E402
from lab import people  # noqa: E402

NORM, LR, MUON, WARMUP, WEIGHT_DECAY = "clip", 1e-3, 3e-3, 0.05, 0.02


def read_pairs(persons, preprocessing):
    """-> tokenizer, uint8 pixels (N, 3, H, W), tokens (2 N, T), pid (2 N,). Each image has two captions."""
    records = people.draw("train", seed=1, persons=persons, domain="generic")
    captions = [preprocessing.text(caption) for record in records for caption in record["captions"]]
    tokenizer = data.train_tokenizer(captions)
    tokens = data.trim_padding(tokenizer(captions))
    pixels = torch.from_numpy(np.stack([record["image"] for record in records])).permute(0, 3, 1, 2).contiguous()
    pid = torch.tensor([record["pid"] for record in records]).repeat_interleave(2)
    return tokenizer, pixels, tokens, pid


def make_optimizers(model):
    """AdamW, and Muon (arXiv 2502.16982) for the matrices of the transformer blocks."""
    matrices, others = [], {True: [], False: []}
    for name, p in model.named_parameters():
        if ".blocks." in name and p.ndim == 2:
            matrices.append(p)
        else:
            others[p.ndim >= 2].append(p)
    groups = [dict(params=others[True], weight_decay=WEIGHT_DECAY), dict(params=others[False], weight_decay=0.0)]
    return [torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.98)),
            torch.optim.Muon(matrices, lr=MUON, weight_decay=WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw")]


def lr_factor(step, steps):
    """Linear warm-up, then half a cosine to 1 %."""
    return min(1, (step + 1) / (WARMUP * steps)) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / steps)))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--persons", type=int, default=24000, help="synthetic persons to draw (default: 24000)")
    p.add_argument("--steps", type=int, default=7000, help="training steps (default: 7000)")
    p.add_argument("--batch", type=int, default=256, help="pairs per step (default: 256)")
    p.add_argument("--out", default=tbps.TOY_CLIP, help="folder to write (default: lab/toyclip)")
    args = p.parse_args()
    torch.manual_seed(0)
    preprocessing = data.Preprocessing(people.SIZE, NORM)
    tokenizer, pixels, tokens, pid = read_pairs(args.persons, preprocessing)
    model = tbps.DualEncoder(**tbps.SIZES["toy"] | dict(vocab=tokenizer.vocab))
    optimizers = make_optimizers(model)
    schedulers = [torch.optim.lr_scheduler.LambdaLR(optimizer, functools.partial(lr_factor, steps=args.steps))
                  for optimizer in optimizers]
    val = {name: evaluation.evaluation_set(data.read(name, split="val"), preprocessing, tokenizer)
           for name in ("toy-generic", "toy")}
    mean, std = (255 * torch.tensor(values)[:, None, None] for values in data.NORMS[NORM])
    queue, total, start = torch.empty(0, dtype=torch.int64), 0.0, time.time()
    print(f"{len(tokens):,} pairs of {args.persons:,} persons, {tokenizer.vocab} tokens", flush=True)
    for step in range(args.steps):
        if len(queue) < args.batch:
            queue = torch.randperm(len(tokens))
        batch, queue = queue[:args.batch], queue[args.batch:]
        image = model.train().encode_image((pixels[batch // 2] - mean) / std)
        text, scale = model.encode_text(tokens[batch]), model.scale()
        loss = losses.nitc(image, text, pid[batch], scale) + losses.ritc(image, text, pid[batch], scale)
        model.zero_grad()
        loss.backward()
        for optimizer, scheduler in zip(optimizers, schedulers):
            optimizer.step()
            scheduler.step()
        total += loss.item()
        if (step + 1) % 500 == 0 or step + 1 == args.steps:
            print(f"step {step + 1}  {(time.time() - start) / 60:.1f} minutes  loss {total / (step % 500 + 1):.3f}  "
                  f"scale {scale.item():.1f}", flush=True)
            total = 0.0
            for name, inputs in val.items():
                scores = evaluation.evaluate(model, *inputs, progress=False)[0]["text to image"]
                print(f"  zero-shot, {name} val: {evaluation.format_scores(scores)}", flush=True)
            tbps.save_open_clip(model.eval(), tokenizer, preprocessing, args.out, torch.float16)


if __name__ == "__main__":
    data.command(main)
