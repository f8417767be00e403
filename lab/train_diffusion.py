"""Train the toy diffusion model, the small weights in lab/toydiffusion/ with which generate.py edits synthetic
pedestrians.

    python lab/train_diffusion.py           makes lab/toydiffusion/ again, in 2 hours on a CPU core

Stable Diffusion has seen many people before it edits those of a data set, but it cannot be shipped. The toy model
stands in for it: it learns from synthetic pedestrians of whom none is in train, val or test. Training can be stopped:
the same command goes on. The layout is that of diffusers, the weights are fp16."""

import argparse
import sys
from pathlib import Path

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel

sys.path.insert(0, str(Path(__file__).parents[1]))
import data  # noqa: E402
import generate  # noqa: E402
import tbps  # noqa: E402
from lab import people  # noqa: E402

RECIPE = generate.TOY | dict(train_epochs=8, train_batch=16, train_lr=1e-3)


def toy_model(clip=tbps.TOY_CLIP, channels=(40, 64, 80)):
    """A diffusion model of patches of 2 x 2 pixels: a UNet with new weights, the text tower of a CLIP.

    Its schedule is noisier than Stable Diffusion's, and it predicts v. Garments are flat: through less noise their
    colours would show, and the captions would not matter."""
    dual_encoder, tokenizer = tbps.load_clip(clip), tbps.tokenizer_for(clip)
    sizes = (dual_encoder.arch[key] for key in ("vocab", "text_width", "text_layers", "head_width", "quick_gelu"))
    text_encoder = generate.SDTextEncoder(*sizes)
    weights = dual_encoder.text.state_dict()
    text_encoder.load_state_dict({name: w for name, w in weights.items() if name != "proj"})
    unet = UNet2DConditionModel(
        sample_size=(people.SIZE[0] // 2, people.SIZE[1] // 2), in_channels=12, out_channels=12,
        block_out_channels=channels, layers_per_block=1, attention_head_dim=4, norm_num_groups=8,
        cross_attention_dim=text_encoder.pos.shape[1],
        down_block_types=("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2 + ("UpBlock2D",))
    scheduler = DDIMScheduler(beta_start=0.0001, beta_end=0.03, prediction_type="v_prediction", clip_sample=False,
                              set_alpha_to_one=False)
    return generate.Diffusion(unet, None, scheduler, text_encoder, tokenizer)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--persons", type=int, default=6000, help="synthetic persons to draw (default: 6000)")
    p.add_argument("--epochs", type=int, default=RECIPE["train_epochs"],
                   help=f"passes over their images (default: {RECIPE['train_epochs']})")
    p.add_argument("--work", type=Path, default="runs/toydiffusion", help="folder for what a resumption needs")
    p.add_argument("--out", type=Path, default=generate.TOY_DIFFUSION, help="folder to write (lab/toydiffusion)")
    args = p.parse_args()
    torch.manual_seed(0)
    model = toy_model()
    records = people.draw("train", seed=1, persons=args.persons)
    print(f"{len(records):,} images; {sum(p.numel() for p in model.unet.parameters()):,} parameters in the UNet, "
          f"{sum(p.numel() for p in model.text_encoder.parameters()):,} in the text encoder", flush=True)
    recipe = RECIPE | dict(train_epochs=args.epochs)
    generate.train_diffusion(model, records, recipe, seed=0, folder=args.work, learn_text=True)
    for part in (model.unet, model.text_encoder):
        part.half()
    model.save(args.out)


if __name__ == "__main__":
    data.command(main, "stopped; what is done is kept, and the same command goes on from there")
