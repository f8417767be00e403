"""Stable Diffusion 1.x with few channels and random weights: the same kinds of layers, the same files."""

import data
import generate
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel

SCHEDULE = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
                set_alpha_to_one=False)


def make_tokenizer(captions):
    """A tokenizer in which every colour and garment is a word of its own."""
    garments = [word for line in data.GARMENTS for word in line]
    words = " ".join(generate.NEW_COLOURS + garments) + " gray tan trousers shorts shirt jacket"
    return data.train_tokenizer([*captions, *[words] * 8], vocab=2000)


def write_folder(root, tokenizer):
    """Writes unet/, vae/, scheduler/, text_encoder/ and tokenizer/ with random weights."""
    torch.manual_seed(0)
    UNet2DConditionModel(
        sample_size=64, in_channels=4, out_channels=4, block_out_channels=(8, 16, 16, 16), layers_per_block=2,
        cross_attention_dim=32, attention_head_dim=2, norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    ).save_pretrained(root / "unet")
    AutoencoderKL(
        block_out_channels=(8, 8, 8, 8), down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=4, layers_per_block=1, norm_num_groups=4,
        scaling_factor=0.18215,
    ).save_pretrained(root / "vae")
    DDIMScheduler(**SCHEDULE, steps_offset=1).save_pretrained(root / "scheduler")
    generate.save_text_encoder(generate.SDTextEncoder(tokenizer.vocab, 32, 2, 16), root / "text_encoder")
    merges = "\n".join(" ".join(m) for m in tokenizer.merges)
    (root / "tokenizer").mkdir()
    (root / "tokenizer/merges.txt").write_text("#version: 0.2\n" + merges, encoding="utf-8")
    return root
