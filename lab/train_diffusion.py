"""Train the toy diffusion model, the small weights in lab/toydiffusion/ with which generate.py edits synthetic
pedestrians.

    python lab/train_diffusion.py           makes lab/toydiffusion/, in more than an hour on 2 CPU cores

Stable Diffusion has seen many people before it edits those of a data set, but it cannot be shipped. The toy model
stands in for it: it learns from synthetic pedestrians of whom none is in train, val or test. The layout is that of
diffusers, the weights are the moving average in fp16, written after each epoch.

Training differs from `generate.train_diffusion`, which fine-tunes a large model: the text tower learns too; small
garments weigh as much as large ones in the loss (`region_weights`), and pixels learn to attend to the words of their
garment (`attention_loss`), otherwise captions would be ignored for most of the training; it cannot be resumed."""

import argparse
import copy
import functools
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch.optim.swa_utils import AveragedModel

sys.path.insert(0, str(Path(__file__).parents[1]))
import data  # noqa: E402
import generate  # noqa: E402
import tbps  # noqa: E402
from lab import check_generated, people, pretrain  # noqa: E402

LR, LR_TEXT, WEIGHT_DECAY, DROP_CAPTION, AVERAGE, ATTENTION = 1e-3, 3e-4, 0.01, 0.1, 0.999, 0.05
REGIONS = ("hair", "hat", "top", "bottom", "shoes", "bag")


def toy_model(clip=tbps.TOY_CLIP, channels=(32, 48, 64, 64)):
    """A diffusion model of patches of 2 x 2 pixels: a UNet with new weights, the text tower of a CLIP.

    Its schedule is noisier than Stable Diffusion's, and it predicts v. Garments are flat: through less noise their
    colours would show, and the captions would not matter."""
    dual_encoder, tokenizer = tbps.load_clip(clip), tbps.tokenizer_for(clip)
    sizes = (dual_encoder.arch[key] for key in ("vocab", "text_width", "text_layers", "text_head_width", "quick_gelu"))
    text_encoder = generate.SDTextEncoder(*sizes)
    weights = dual_encoder.text.state_dict()
    text_encoder.load_state_dict({name: w for name, w in weights.items() if name != "proj"})
    levels = len(channels) - 1
    unet = UNet2DConditionModel(
        sample_size=(people.SIZE[0] // 2, people.SIZE[1] // 2), in_channels=12, out_channels=12,
        block_out_channels=channels, layers_per_block=1, attention_head_dim=4, norm_num_groups=8,
        cross_attention_dim=text_encoder.pos.shape[1],
        down_block_types=("DownBlock2D",) + ("CrossAttnDownBlock2D",) * levels,
        up_block_types=("CrossAttnUpBlock2D",) * levels + ("UpBlock2D",))
    scheduler = DDIMScheduler(beta_start=0.0001, beta_end=0.02, prediction_type="v_prediction", clip_sample=False,
                              set_alpha_to_one=False)
    return generate.Diffusion(unet, None, scheduler, text_encoder, tokenizer)


def region_weights(record):
    """(1, H, W) weights of the pixels in the loss, of mean 1: every garment in sight has about the same sum."""
    weight = np.ones(people.SIZE, np.float32)
    for region in REGIONS:
        where = people.mask(record, region)
        if where.any():
            weight[where] += 0.1 / where.mean()
    return torch.from_numpy(weight / weight.mean())[None]


def read_images(persons):
    """-> pixels (N, 3, H, W), uint8; weights (N, 1, H, W), fp16; masks of REGIONS (N, 6, H, W), bool; captions."""
    records = people.draw("train", seed=1, persons=persons)
    pixels = torch.from_numpy(np.stack([record["image"] for record in records])).permute(0, 3, 1, 2).contiguous()
    weights = torch.stack([region_weights(record).half() for record in records])
    masks = np.stack([np.stack([people.mask(record, region) for region in REGIONS]) for record in records])
    return pixels, weights, torch.from_numpy(masks), [record["captions"] for record in records]


def words_of_regions(captions, tokenizer):
    """(B, 6, 77): 1 at the tokens of the noun and the colours of each of REGIONS that a caption mentions."""
    words = torch.zeros(len(captions), len(REGIONS), data.CONTEXT)
    for row, caption in zip(words, captions):
        for edit in generate.edits(caption, tokenizer):
            row[REGIONS.index(check_generated.edited_region(dict(edit=edit))), edit["blend"]] = 1
    return words


class KeepAttention:
    """Keeps the queries and keys of the UNet's cross-attention layers; changes nothing. See generate.Control."""

    def __init__(self):
        self.layers = []

    def __call__(self, q, k, v, is_cross, is_middle):
        if is_cross:
            self.layers.append((q, k))
        return q, k, v


def attention_loss(layers, words, masks):
    """How little the pixels of a garment attend to its words: the mean of -log(attention to them), as in TokenCompose
    (arXiv 2312.03626). words (B, 6, 77), masks (B, 6, H, W)."""
    total = 0.0
    for q, k in layers:                                                                     # (B, heads, N or 77, C)
        attention = (q @ k.transpose(2, 3) / q.shape[3] ** 0.5).softmax(dim=3).mean(dim=1)  # (B, N, 77)
        found = torch.einsum("bnt,brt->brn", attention, words).clamp(min=1e-4)              # (B, 6, N)
        factor = round((masks[0, 0].numel() / q.shape[2]) ** 0.5)
        inside = F.avg_pool2d(masks, factor).flatten(2) * words.amax(dim=2, keepdim=True)   # (B, 6, N)
        inside = inside / inside.sum(dim=2, keepdim=True).clamp(min=1e-4)                   # garments count the same
        total = total - (inside * found.log()).sum() / inside.sum().clamp(min=1)
    return total / len(layers)


def training_loss(model, z, captions, weights, masks):
    """The weighted mean squared error of the predicted v (arXiv 2202.00512, app. D) at random times, and the loss of
    the attention. z (B, 12, H/2, W/2)."""
    t, noise = torch.randint(1000, (len(z),)), torch.randn_like(z)
    noisy, target = model.scheduler.add_noise(z, noise, t), model.scheduler.get_velocity(z, noise, t)
    model.control = KeepAttention()
    predicted = model.unet(noisy, t, encoder_hidden_states=model.encode_text(captions, learn=True)).sample
    layers, model.control = model.control.layers, None
    weights = F.pixel_unshuffle(weights.float().expand(-1, 3, -1, -1), model.patch)
    error = (weights * (predicted - target).square()).mean()
    return error, attention_loss(layers, words_of_regions(captions, model.tokenizer), masks.float())


def update_average(averages, parameters, updates):
    """The moving average of weights; a short one at first, so that the initial weights are soon forgotten."""
    torch._foreach_lerp_(averages, parameters, 1 - min(AVERAGE, (1 + int(updates)) / (10 + int(updates))))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--persons", type=int, default=6000, help="synthetic persons to draw (default: 6000)")
    p.add_argument("--epochs", type=int, default=6, help="passes over their images, four a person (default: 6)")
    p.add_argument("--batch", type=int, default=32, help="images per step (default: 32)")
    p.add_argument("--out", type=Path, default=generate.TOY_DIFFUSION, help="folder (default: lab/toydiffusion)")
    args = p.parse_args()
    torch.manual_seed(0)
    rng, model, (pixels, weights, masks, captions) = np.random.default_rng(0), toy_model(), read_images(args.persons)
    parts = nn.ModuleList([model.unet, model.text_encoder]).requires_grad_(True).train()
    average = AveragedModel(parts, multi_avg_fn=update_average)
    optimizer = torch.optim.AdamW([dict(params=model.unet.parameters(), lr=LR),
                                   dict(params=model.text_encoder.parameters(), lr=LR_TEXT)],
                                  weight_decay=WEIGHT_DECAY, fused=True)
    per_epoch, step, start = len(pixels) // args.batch, 0, time.time()
    steps = args.epochs * per_epoch
    lr_factor = functools.partial(pretrain.lr_factor, steps=steps)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lr_factor)
    print(f"{len(pixels):,} images; {sum(p.numel() for p in model.unet.parameters()):,} parameters in the UNet, "
          f"{sum(p.numel() for p in model.text_encoder.parameters()):,} in the text encoder", flush=True)
    for epoch in range(args.epochs):
        totals = torch.zeros(2)
        for batch in torch.randperm(len(pixels)).split(args.batch)[:per_epoch]:
            chosen = ["" if rng.random() < DROP_CAPTION else captions[i][rng.integers(2)] for i in batch.tolist()]
            z = model.encode(pixels[batch] / 255)
            error, attention = training_loss(model, z, chosen, weights[batch], masks[batch])
            optimizer.zero_grad()
            (error + ATTENTION * attention).backward()
            nn.utils.clip_grad_norm_(parts.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            average.update_parameters(parts)
            totals, step = totals + torch.tensor([error.item(), attention.item()]), step + 1
            if step % 100 == 0:
                print(f"step {step} of {steps}, {(time.time() - start) / 60:.1f} minutes, error {error.item():.4f}, "
                      f"attention {attention.item():.3f}", flush=True)
        error, attention = (totals / per_epoch).tolist()
        print(f"epoch {epoch + 1}/{args.epochs}  error {error:.4f}  attention {attention:.3f}", flush=True)
        finished = copy.deepcopy(model)
        nn.ModuleList([finished.unet, finished.text_encoder]).half().load_state_dict(average.module.state_dict())
        shutil.rmtree(args.out / "unet", ignore_errors=True)
        finished.save(args.out)


if __name__ == "__main__":
    data.command(main)
