"""Text-based person search: find a person in a picture collection by a sentence. The model, CLIP weights, and training.

    python tbps.py                                          synthetic pedestrians, from the toy CLIP, on a laptop's CPU
    python tbps.py --dataset cuhk --data-root DIR           TBPS-CLIP (AAAI 2024) on CUHK-PEDES, from CLIP ViT-B/16
    python tbps.py --dataset cuhk --method baseline         plain fine-tuning, the reference for the others
    python tbps.py --dataset cuhk --method uit              UIT (2023), or irra: IRRA (CVPR 2023)
    python tbps.py --set mvs=0 citc=0 tau=0.01              any key of the method's recipe; --help lists them

A run writes runs/DATASET-METHOD-SEED/: last.pt, best.pt (best on the validation split), log.jsonl, report.html, and a
copy of the scripts. Ctrl-C saves; --resume continues with exactly the same numbers. The last line printed is the test
score of best.pt.

Letters in shapes, in all files: B pairs in a batch, T tokens of a caption, C width of a tower, H heads, D embedding
size, Q queries, G gallery size, P persons, V views of an image, U variations of a caption, N patches of an image, K
visible patches, M masked tokens; in (3, H, W) height and width in pixels; W is also the number of processes. Token
sequences are always (B, T, C), batch first.
Names: in losses and metrics image and text are features (B, D); pixels and tokens are inputs; pid is a person id; scale
is 1 / temperature. model.image and model.text are the towers."""

import argparse
import atexit
import collections
import contextlib
import functools
import html
import itertools
import json
import math
import os
import pickle
import random
import re
import shutil
import signal
import sys
import time
import warnings
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.utils.checkpoint import checkpoint as recompute_in_backward

import data
import eval as evaluation
import losses

# ---- the dual encoder -----------------------------------------------------------------------------------------------

VIT_B = dict(embed=512, image_size=(224, 224), image_width=768, image_layers=12, text_width=512, text_layers=12,
             vocab=49408)
SIZES = {
    "ViT-B/32": VIT_B | dict(patch=32),
    "ViT-B/16": VIT_B | dict(patch=16),
    "ViT-L/14": VIT_B | dict(patch=14, embed=768, image_width=1024, image_layers=24, text_width=768),
    "toy": dict(embed=128, image_size=(96, 48), patch=8, image_width=128, image_layers=2, text_width=128, text_layers=2,
                vocab=1024, head_width=32),
}


class Attention(nn.Module):
    """Multi-head self-attention. The rows of qkv are q, k, v, as in the in_proj of nn.MultiheadAttention."""

    def __init__(self, width, head_width, dropout=0.0):
        super().__init__()
        assert width % head_width == 0, f"width {width} does not split into heads of {head_width}"
        self.heads, self.dropout = width // head_width, dropout
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x, causal=False, token_index=None, key_mask=None):
        """(B, T, C) -> (B, T, C), or (B, 1, C) if token_index (B,) names the only token of each sample that is needed.
        key_mask (B, T) bool: the tokens that may be attended to; it does not go with token_index."""
        assert token_index is None or key_mask is None
        B, T, C = x.shape
        dropout = self.dropout if self.training else 0.0
        if token_index is None:
            qkv = self.qkv(x).view(B, T, 3, self.heads, C // self.heads)
            q, k, v = qkv.permute(2, 0, 3, 1, 4)                                            # each (B, H, T, C/H)
            mask = None if key_mask is None else key_mask[:, None, None]                    # (B, 1, 1, T)
            x = F.scaled_dot_product_attention(q, k, v, mask, dropout, causal)
        else:
            q = F.linear(pick(x, token_index), self.qkv.weight[:C], self.qkv.bias[:C])
            q = q.view(B, 1, self.heads, -1).transpose(1, 2)                                # (B, H, 1, C/H)
            kv = F.linear(x, self.qkv.weight[C:], self.qkv.bias[C:])
            k, v = kv.view(B, T, 2, self.heads, -1).permute(2, 0, 3, 1, 4)
            mask = None
            if causal:
                mask = (torch.arange(T, device=x.device) <= token_index[:, None])[:, None, None]
            x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        return self.proj(x.transpose(1, 2).reshape(B, -1, C))


def pick(x, token_index):
    """One token of each sample: x (B, T, C), token_index (B,) -> (B, 1, C)."""
    return x[torch.arange(x.shape[0], device=x.device), token_index][:, None]


def mix_samples(x, weight, partner):
    """Mixup: each sample of x (B, ...) interpolated with its partner (B,); weight in [0, 1] is its own part."""
    return weight * x + (1 - weight) * x[partner]


class Block(nn.Module):
    """Pre-norm transformer block; both towers are built from it. Dropout acts on the attention weights only."""

    def __init__(self, width, head_width, dropout=0.0, quick_gelu=True):
        super().__init__()
        self.ln1, self.attn = nn.LayerNorm(width), Attention(width, head_width, dropout)
        self.ln2, self.fc1, self.fc2 = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.quick_gelu = quick_gelu

    def forward(self, x, causal=False, token_index=None, key_mask=None):
        attended = self.attn(self.ln1(x), causal, token_index, key_mask)
        x = (x if token_index is None else pick(x, token_index)) + attended
        h = self.ln2(x)
        if not self.quick_gelu:                                         # LAION's models
            return x + self.fc2(F.gelu(self.fc1(h)))
        # OpenAI's CLIP was trained with h * sigmoid(1.702 h). That is silu(1.702 h) / 1.702; with the factors moved
        # into the weights, the activation takes one pass over h instead of three.
        h = F.silu(F.linear(h, 1.702 * self.fc1.weight, 1.702 * self.fc1.bias))
        return x + F.linear(h, self.fc2.weight / 1.702, self.fc2.bias)


def run_block(block, recompute, x, **options):
    """Run a block. With `recompute` (activation checkpointing) its activations are not kept but computed again."""
    if recompute and torch.is_grad_enabled():
        return recompute_in_backward(block, x, use_reentrant=False, **options)
    return block(x, **options)


def init_blocks(blocks, width):
    """CLIP's initialisation: the deeper the tower, the smaller its residual branches start."""
    for block in blocks:
        nn.init.normal_(block.attn.qkv.weight, std=width ** -0.5)
        nn.init.normal_(block.attn.proj.weight, std=width ** -0.5 * (2 * len(blocks)) ** -0.5)
        nn.init.normal_(block.fc1.weight, std=(2 * width) ** -0.5)
        nn.init.normal_(block.fc2.weight, std=width ** -0.5 * (2 * len(blocks)) ** -0.5)
        nn.init.zeros_(block.attn.qkv.bias)
        nn.init.zeros_(block.attn.proj.bias)


def sincos(positions, width):
    """Sine-cosine embedding of positions (T,) -> (T, width): [sin(p w_k), cos(p w_k)], w_k = 10000^(-k / (width /
    2))."""
    w = 10000 ** (-torch.arange(width // 2) / (width // 2))
    angle = positions[:, None] * w                                                          # (T, width/2)
    return torch.cat([angle.sin(), angle.cos()], dim=1)


def sincos_grid(grid, width):
    """Sine-cosine embedding of a class token (zeros) and a grid (rows, columns) of patches -> (1 + rows * columns,
    width). One half of the width encodes the column, the other the row."""
    row, column = torch.cartesian_prod(*(torch.arange(n, dtype=torch.float32) for n in grid)).T
    patches = torch.cat([sincos(column, width // 2), sincos(row, width // 2)], dim=1)
    return torch.cat([torch.zeros(1, width), patches])


def patch_grid(size, patch, stride):
    """Rows and columns of patches in an image of size (H, W)."""
    return tuple((side - patch) // stride + 1 for side in size)


class ImageTower(nn.Module):
    """Vision transformer: pixels (B, 3, H, W) -> tokens (B, T, C); the class token is the first. `project` applies the
    last norm and the projection."""

    def __init__(self, size, patch, stride, width, head_width, layers, embed, quick_gelu=True):
        super().__init__()
        self.recompute = False
        self.grid = patch_grid(size, patch, stride)                                         # rows, columns
        if min(self.grid) < 1:
            raise ValueError(f"images of {size[0]}x{size[1]} pixels hold no patch of {patch}x{patch}")
        self.patch = nn.Conv2d(3, width, patch, stride, bias=False)
        self.cls = nn.Parameter(width ** -0.5 * torch.randn(width))
        # CLIP starts positions from noise. Sines make neighbours alike from the first step on, which saves epochs when
        # training from scratch.
        self.pos = nn.Parameter(0.5 * sincos_grid(self.grid, width))                        # (T, C)
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.blocks = nn.ModuleList(Block(width, head_width, quick_gelu=quick_gelu) for _ in range(layers))
        self.proj = nn.Parameter(width ** -0.5 * torch.randn(width, embed))
        init_blocks(self.blocks, width)

    def project(self, x):
        """Tokens (..., C) as `forward` gives them -> features (..., D)."""
        return self.ln_post(x) @ self.proj

    def forward(self, pixels, token_index=None, patch_ids=None, mixup=None):
        """token_index (B,): return only this token of each sample, (B, 1, C); the last block then computes no other.
        patch_ids (B, K): only these patches go through the transformer. mixup: (weight, partner) of `mix_samples`,
        applied after the first block."""
        x = self.patch(pixels).flatten(2).transpose(1, 2)                                   # (B, T-1, C), row by row
        x = torch.cat([self.cls.to(x.dtype).expand(x.shape[0], 1, -1), x], dim=1) + self.pos                # (B, T, C)
        if patch_ids is not None:
            patches = x[:, 1:].gather(1, patch_ids[..., None].expand(-1, -1, x.shape[2]))
            x = torch.cat([x[:, :1], patches], dim=1)                                       # (B, 1+K, C)
        x = self.ln_pre(x)
        for n, block in enumerate(self.blocks[:-1]):
            x = run_block(block, self.recompute, x)
            if mixup and n == 0:
                x = mix_samples(x, *mixup)
        return run_block(self.blocks[-1], self.recompute, x, token_index=token_index)


class TextTower(nn.Module):
    """Causal transformer over caption tokens: ids (B, T) -> (B, T, C). `project` applies the last norm and the
    projection."""

    def __init__(self, vocab, context, width, head_width, layers, embed, dropout=0.0, quick_gelu=True):
        super().__init__()
        self.recompute = False
        self.tok = nn.Embedding(vocab, width)
        self.pos = nn.Parameter(0.03 * sincos(torch.arange(context, dtype=torch.float32), width))   # as large as tokens
        self.blocks = nn.ModuleList(Block(width, head_width, dropout, quick_gelu) for _ in range(layers))
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(width ** -0.5 * torch.randn(width, embed))
        nn.init.normal_(self.tok.weight, std=0.02)
        init_blocks(self.blocks, width)

    def project(self, x):
        """Tokens (..., C) as `forward` gives them -> features (..., D)."""
        return self.ln_post(x) @ self.proj

    def forward(self, tokens, token_index=None, mixup=None):
        """token_index and mixup as in ImageTower."""
        x = self.tok(tokens) + self.pos[:tokens.shape[1]]                                   # (B, T, C)
        for n, block in enumerate(self.blocks[:-1]):
            x = run_block(block, self.recompute, x, causal=True)
            if mixup and n == 0:
                x = mix_samples(x, *mixup)
        return run_block(self.blocks[-1], self.recompute, x, causal=True, token_index=token_index)


class DualEncoder(nn.Module):
    """CLIP: an image tower and a text tower that map into one space of D numbers, compared by cosine.

    Images may have any size (H, W) that holds a patch; a stride smaller than the patch gives overlapping patches.
    `heads` are the extra layers of a method, used in training only. With micro_batch M > 0 the encoders see M samples
    at a time."""

    def __init__(self, embed, image_size, patch, image_width, image_layers, text_width, text_layers, vocab,
                 context=data.CONTEXT, head_width=64, text_head_width=None, stride=None, quick_gelu=True,
                 text_dropout=0.0, lock_patch=False):
        super().__init__()
        stride, text_head_width = stride or patch, text_head_width or head_width
        self.arch = dict(embed=embed, image_size=tuple(image_size), patch=patch, image_width=image_width,
                         image_layers=image_layers, text_width=text_width, text_layers=text_layers, vocab=vocab,
                         context=context, head_width=head_width, text_head_width=text_head_width, stride=stride,
                         quick_gelu=quick_gelu)
        self.image = ImageTower(image_size, patch, stride, image_width, head_width, image_layers, embed, quick_gelu)
        self.text = TextTower(vocab, context, text_width, text_head_width, text_layers, embed, text_dropout, quick_gelu)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.heads = nn.ModuleDict()
        # The "locked bottom layer" of TBPS-CLIP: the patch convolution keeps CLIP's weights, all else learns.
        self.image.patch.weight.requires_grad_(not lock_patch)
        self.micro_batch = 0

    def encode_image(self, pixels, mixup=None):
        """(B, 3, H, W) -> features (B, D), not normalised, from the class token. mixup: (weight, partner), CTLG's
        mixup of features."""
        def encode(pixels):
            first = torch.zeros(len(pixels), dtype=torch.int64, device=pixels.device)       # the class token
            return self.image.project(self.image(pixels, token_index=first, mixup=mixup)[:, 0])
        return encode(pixels) if mixup else self.micro_batched(encode, pixels)

    def encode_text(self, tokens, mixup=None):
        """(B, T) ids -> features (B, D), not normalised, from the EOT token, which has the largest id. Tokens may be
        on the CPU. With mixup, interpolate the features at both EOT positions with the mixup weight."""
        tokens = self.trim_padding(tokens)
        if mixup:
            eot, (weight, partner) = tokens.argmax(dim=1), mixup
            x = self.text(tokens, mixup=mixup)                                              # (B, T, C)
            x = weight * pick(x, eot)[:, 0] + (1 - weight) * pick(x, eot[partner])[:, 0]
            return self.text.project(x)

        def encode(tokens):
            return self.text.project(self.text(tokens, token_index=tokens.argmax(dim=1))[:, 0])
        return self.micro_batched(encode, tokens)

    def image_tokens(self, pixels, patch_ids=None):
        """(B, 3, H, W) -> (B, T, D): the class token, then the patches row by row, or those of patch_ids (B, K)."""
        def encode(pixels, patch_ids=None):
            return self.image.project(self.image(pixels, patch_ids=patch_ids))
        return self.micro_batched(encode, pixels, *([] if patch_ids is None else [patch_ids]))

    def text_tokens(self, tokens, trim=True):
        """(B, T) ids -> (B, T, D), T the length of the longest caption in the batch; trim=False keeps the padding."""
        tokens = self.trim_padding(tokens) if trim else tokens.to(self.logit_scale.device)
        return self.micro_batched(lambda part: self.text.project(self.text(part)), tokens)

    def trim_padding(self, tokens):
        """ids (B, 77) -> ids up to the longest caption (B, T), on the model's device. Captions that are on a GPU come
        from data.collate, which has trimmed them; the CPU would have to wait to read their length again.

        The tower is causal, so trimming changes the cost and nothing else: captions have about 30 tokens of 77."""
        if tokens.device.type == "cpu":
            tokens = data.trim_padding(tokens)
        return tokens.to(self.logit_scale.device)

    def micro_batched(self, encode, x, *more):
        """encode(x, ...) in parts of `micro_batch` rows. Only the results are kept, not the activations. Backward
        recomputes each part when the gradient of its result is known (GradCache, arXiv 2101.06983): the exact gradient
        of a contrastive loss over the whole batch, in the memory of a part. Random numbers are recomputed too."""
        if not 0 < self.micro_batch < len(x):
            return encode(x, *more)
        run = encode
        if torch.is_grad_enabled():
            run = functools.partial(recompute_in_backward, encode, use_reentrant=False)
        return torch.cat([run(*part) for part in zip(*(y.split(self.micro_batch) for y in (x, *more)))])

    def scale(self):
        """exp(logit_scale), limited to 100 if it is learned. The limit acts on the value only, not on the gradient,
        as in the official code of TBPS-CLIP: a scale beyond 100 can come back."""
        scale = self.logit_scale.exp()
        if not self.logit_scale.requires_grad:
            return scale
        return scale + (scale.clamp(max=100) - scale).detach()


# ---- weights: every format people have ------------------------------------------------------------------------------

TOY_CLIP = Path(__file__).parent / "lab" / "toyclip"                    # made by lab/pretrain.py

OPENAI_CLIP = "openai/clip-vit-base-patch16"                            # the hub id; the same weights by hand:
OPENAI_WEIGHTS = ("https://openaipublic.azureedge.net/clip/models/"
                  "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f/ViT-B-16.pt")

OPENAI_VOCAB, OPENAI_SIZES = 49408, [(224, 224), (336, 336)]            # tokens; sizes of images
OPENAI_NAMES = [  # our name -> OpenAI's and open_clip's, applied in this order
    (r"^image\.", "visual."), (r"^text\.ln_post", "ln_final"), (r"^text\.proj", "text_projection"), (r"^text\.", ""),
    (r"blocks\.", "transformer.resblocks."), (r"attn\.qkv\.", "attn.in_proj_"), (r"attn\.proj", "attn.out_proj"),
    (r"\.ln([12])\.", r".ln_\1."), (r"fc1", "mlp.c_fc"), (r"fc2", "mlp.c_proj"), (r"patch\.", "conv1."),
    (r"cls$", "class_embedding"), (r"tok\.", "token_embedding."), (r"pos$", "positional_embedding"),
]
HF_NAMES = [  # our name -> that in Hugging Face's CLIPModel
    (r"^image\.proj", "visual_projection.weight"), (r"^text\.proj", "text_projection.weight"),
    (r"^text\.ln_post", "text_model.final_layer_norm"), (r"^image\.", "vision_model."), (r"^text\.", "text_model."),
    (r"blocks\.", "encoder.layers."), (r"attn\.qkv", "self_attn.qkv"), (r"attn\.proj", "self_attn.out_proj"),
    (r"\.ln([12])", r".layer_norm\1"), (r"ln_pre", "pre_layrnorm"), (r"ln_post", "post_layernorm"),
    (r"fc([12])", r"mlp.fc\1"), (r"patch\.", "embeddings.patch_embedding."), (r"cls$", "embeddings.class_embedding"),
    (r"tok\.", "embeddings.token_embedding."), (r"pos$", "embeddings.position_embedding.weight"),
]
WRAPPERS = r"^((module|model|clip|clip_model)\.)+"                      # modules that people wrap a CLIP in
NOT_WEIGHTS = r"(^|\.)(input_resolution|context_length|vocab_size|position_ids|attn_mask)$"     # constants saved along
ENCODER = (r"^(?:\w+\.)*?(visual\..+|transformer\.resblocks\..+|token_embedding\.weight|positional_embedding|"
           r"ln_final\..+|text_projection|logit_scale|(?:vision|text)_model\..+|(?:visual|text)_projection\.weight)$")

CONFIG_KEYS = {"config.json": "vision_config", "open_clip_config.json": "model_cfg"}    # the key that tells a CLIP's
WEIGHT_FILES = {  # name -> the config that belongs to it
    "model.safetensors": "config.json",
    "model.safetensors.index.json": "config.json",                      # a list of shards
    "open_clip_model.safetensors": "open_clip_config.json",
    "open_clip_pytorch_model.bin": "open_clip_config.json",
    "pytorch_model.bin": "config.json",
}
HF_PREPROCESSING = ["preprocessor_config.json", "processor_config.json"]        # of transformers 4, of 5


def read_json(path):
    """The object in a JSON file; {} if the file does not exist."""
    content = data.load_json(path) if path.exists() else {}
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a JSON object; remove it, or fetch it again")
    return content


def rank_weight_files(folder):
    """Names of weights files; first those whose own config is in the folder and is the config of a CLIP."""
    def lacks_config(name):
        config = WEIGHT_FILES[name]
        return CONFIG_KEYS[config] not in read_json(folder / config)
    return sorted(WEIGHT_FILES, key=lacks_config)


def find_weights(source):
    """A local file or folder, or a hub id, which huggingface_hub fetches into its cache -> Path of the weights file."""
    path, what = Path(source), "the weights"
    if path.is_dir():
        files = [path / name for name in rank_weight_files(path)] + sorted(path.glob("*.pt"))
        found = [file for file in files if file.exists()]
        return found[0] if found else data.need(files[0], what, f"or {', '.join(WEIGHT_FILES)}, *.pt")
    is_file_name = path.suffix in (".pt", ".pth", ".bin", ".safetensors")
    if path.exists() or is_file_name or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        return data.need(path, what, "name a checkpoint that tbps.py wrote, like runs/NAME/best.pt, or a CLIP: a file, "
                         f"a folder or a hub id like {OPENAI_CLIP}")
    return fetch_weights(str(source))


def fetch_weights(hub_id):
    """The weights of a model on the hub, with its config and vocabulary beside them -> Path."""
    from huggingface_hub import errors, snapshot_download
    reason = f"it has none of {', '.join(WEIGHT_FILES)}"
    try:
        beside = [*CONFIG_KEYS, *HF_PREPROCESSING, *data.VOCABULARIES]
        folder = Path(snapshot_download(hub_id, allow_patterns=beside))
        for name in rank_weight_files(folder):
            snapshot_download(hub_id, allow_patterns=[name])
            if (folder / name).exists():
                if name.endswith(".index.json"):
                    snapshot_download(hub_id, allow_patterns=shard_names(folder / name))
                return folder / name
    except errors.RepositoryNotFoundError:
        raise ValueError(f"{hub_id} is neither a file here nor a model on the hub") from None
    except (errors.LocalEntryNotFoundError, errors.HfHubHTTPError, OSError) as e:
        reason = f"the hub cannot be reached ({type(e).__name__})"
    raise FileNotFoundError(
        f"no CLIP weights from {hub_id}: {reason}\n"
        f"  Fetch weights and vocabulary where there is a network, then name their folder with --clip:\n"
        f"    hf download {hub_id} --exclude '*.h5' --exclude '*.msgpack' --local-dir {hub_id.split('/')[1]}\n"
        f"  or OpenAI's ViT-B/16, without the hub:\n"
        f"    mkdir clip && cd clip && curl -LO {OPENAI_WEIGHTS} -LO {data.OPENAI_VOCABULARY}\n"
        f"  --clip none trains from scratch")


def shard_names(index):
    """The files that a model.safetensors.index.json lists."""
    files = read_json(index).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(f, str) and f == Path(f).name for f in files.values()):
        raise ValueError(f"{index} does not list the files of a model (weight_map)")
    return sorted(set(files.values()))


def allowed_classes():
    """What torch.load(weights_only=True) may find beside tensors: numpy's scalars and arrays, under the names of numpy
    1 and 2, and TBPS-CLIP's configuration, an EasyDict, which becomes a plain dict. None of them runs code."""
    classes = [np.ndarray, np.dtype, *(getattr(np.dtypes, name) for name in np.dtypes.__all__)]
    for maker in (np.float64(0).__reduce__()[0], np.zeros(0).__reduce__()[0]):
        classes += [(maker, f"{package}.multiarray.{maker.__name__}") for package in ("numpy.core", "numpy._core")]
    return classes + [(collections.OrderedDict, "easydict.EasyDict")]


def is_torchscript(path):
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def read_file(path):
    """Any weights file -> what is in it: tensors by name, or a training checkpoint. Runs no code of the file."""
    if path.name.endswith(".index.json"):
        shards = [data.need(path.parent / f, "a part of the weights", f"{path} lists it") for f in shard_names(path)]
        return {name: w for shard in shards for name, w in read_file(shard).items()}
    with open(path, "rb") as f:
        head = f.read(64)
    if head.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path} is a Git LFS pointer, a text that stands for the file. Fetch the file: git lfs pull")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if not head.startswith((b"PK", b"\x80")):
            raise ValueError(f"it is neither zip nor pickle and begins with {head[:24]!r}")
        if zipfile.is_zipfile(path) and is_torchscript(path):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)          # torch prefers torch.export
                return torch.jit.load(path, map_location="cpu").state_dict()
        with torch.serialization.safe_globals(allowed_classes()):
            return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, zipfile.BadZipFile, SafetensorError, RuntimeError, OSError, EOFError, ValueError,
            LookupError) as e:
        if found := re.search(r"GLOBAL (\S+)", str(e)):
            raise ValueError(f"{path} holds an object of {found[1]} beside the weights; loading it could run code\n"
                             "  Save the weights alone, where the file comes from: "
                             "torch.save(model.state_dict(), 'weights.pt')") from None
        reason = (str(e).splitlines() or [type(e).__name__])[0].split(". ")[0]
        raise ValueError(f"{path} cannot be read as weights: {reason}\n  Is the download complete? "
                         f"It has {path.stat().st_size:,} bytes") from None


# ---- weights: architecture and preprocessing, from the tensors and the config beside them ---------------------------

def find_config(path):
    """The config beside a weights file, its own one first -> Path or None, content."""
    own = WEIGHT_FILES.get(path.name, "open_clip_config.json")
    there = [path.parent / name for name in sorted(CONFIG_KEYS, key=lambda name: name != own)]
    there = [file for file in there if file.exists()]
    for file in there:
        if CONFIG_KEYS[file.name] in (config := read_json(file)):
            return file, config
    if there:                                                           # e.g. timm's
        raise ValueError(f"{there[0]} is not the configuration of a CLIP; remove it, or fetch it again")
    return None, {"model_cfg": {"quick_gelu": True}}                    # OpenAI's models


def read_config(path):
    """What tensors do not tell. Without a config beside the weights file: the values of OpenAI's models.

    -> dict(file=name of the config or None, quick_gelu, head_width, text_head_width, image_size=(H, W) or None,
            norm, resize, clean)"""
    file, config = find_config(path)
    try:
        if file and file.name == "config.json":
            old, new = (read_json(file.parent / name) for name in HF_PREPROCESSING)
            found = read_hf_config(config, old or new.get("image_processor", {}))
        else:
            found = read_open_clip_config(config["model_cfg"], config.get("preprocess_cfg", {}))
        mean, std, resize, size = (found.pop(key) for key in ("mean", "std", "resize", "image_size"))
        norm = (tuple(mean), tuple(std)) if mean and std else data.NORMS["clip"]
        norm = next((name for name, values in data.NORMS.items() if values == norm), norm)
        # Hugging Face writes Pillow's numbers: 2, 3
        resize = {None: "bicubic", "bicubic": "bicubic", "bilinear": "bilinear", 3: "bicubic", 2: "bilinear"}[resize]
        size = (size, size) if isinstance(size, int) else size and tuple(size)
        clean = config.get("tbps", {}).get("clean", False)              # a key of ours, see save_open_clip
        return found | dict(file=file and file.name, image_size=size, norm=norm, resize=resize, clean=clean)
    except (KeyError, TypeError, AttributeError, ZeroDivisionError) as e:
        raise ValueError(f"{file} is not the configuration of a known CLIP ({type(e).__name__}: {e})") from None


def read_open_clip_config(model, preprocess):
    """model_cfg, preprocess_cfg -> what read_config needs, with open_clip's defaults."""
    image, text = model.get("vision_cfg", {}), model.get("text_cfg", {})
    return dict(quick_gelu=model.get("quick_gelu", False), image_size=image.get("image_size"),
                head_width=image.get("head_width", 64), text_head_width=text.get("width", 512) // text.get("heads", 8),
                mean=preprocess.get("mean"), std=preprocess.get("std"), resize=preprocess.get("interpolation"))


def read_hf_config(model, preprocess):
    """config.json, preprocessor_config.json -> what read_config needs, with the defaults of transformers."""
    image, text = model["vision_config"], model.get("text_config", {})
    activations = {part.get("hidden_act", "quick_gelu") for part in (image, text)}
    if activations not in ({"quick_gelu"}, {"gelu"}):
        raise KeyError(f"hidden_act {activations}")
    return dict(quick_gelu=activations == {"quick_gelu"}, image_size=image.get("image_size"),
                head_width=image.get("hidden_size", 768) // image.get("num_attention_heads", 12),
                text_head_width=text.get("hidden_size", 512) // text.get("num_attention_heads", 8),
                mean=preprocess.get("image_mean"), std=preprocess.get("image_std"), resize=preprocess.get("resample"))


def read_image_size(positions, patch, config_size, requested, stride, source):
    """The image size (H, W) and stride that a number of patch positions comes from, which tensors do not tell.

    First the size in the config, then the `requested` one, if they have as many patches; else the only usual shape.
    Raises ValueError, which asks for the size, if several shapes fit."""
    for size, step in ((config_size, patch), (requested, stride or patch)):
        if size and math.prod(patch_grid(size, patch, step)) == positions:
            return tuple(size), step
    usual = []
    for ratio in (3, 4, 2, 1):                                          # persons are tall: IRRA has 24 x 8 patches
        columns = math.isqrt(positions // ratio)
        if ratio * columns ** 2 == positions:
            usual.append((ratio * columns * patch, columns * patch))
    published = [size for size in usual if size in OPENAI_SIZES]
    if published or len(usual) == 1:
        return (published or usual)[0], patch
    shapes = f"may be images of {' or '.join(f'{h}x{w}' for h, w in usual)}" if usual else "fit no usual image size"
    raise ValueError(f"{source} has {positions} positions of {patch}x{patch} patches, which {shapes}\n"
                     "  Name the size of its training: --size HxW (eval.py), --set height=H width=W (tbps.py)")


def clip_shapes(weights, names, source):
    """{our name: shape} of the five tensors that tell the sizes of a CLIP. names: the table from our names to its."""
    if any(name.startswith(("visual.layer1", "visual.attnpool")) for name in weights):
        raise ValueError(f"{source} is a CLIP with a ResNet image tower; only vision transformers can be read")
    dims = {"image.patch.weight": 4, "image.pos": 2, "text.tok.weight": 2, "text.pos": 2, "text.proj": 2}
    for name, number in dims.items():
        name = rename(name, names)
        if name not in weights or weights[name].ndim != number:
            raise ValueError(f"{source} is no CLIP that can be read: it lacks {name} of {number} dimensions. "
                             f"It has {len(weights)} tensors, e.g. {sorted(weights)[:3]}")
    shapes = {name: tuple(weights[rename(name, names)].shape) for name in dims}
    if (context := shapes["text.pos"][0]) < data.CONTEXT:
        raise ValueError(f"{source} reads texts of {context} tokens; OpenAI's CLIP and tbps read {data.CONTEXT}")
    return shapes


def read_arch(weights, names, config, image_size, stride, source):
    """The architecture of a CLIP, from the shapes of its tensors and what read_config found."""
    shapes = clip_shapes(weights, names, source)

    def depth(tower):
        block = re.escape(rename(f"{tower}.blocks.", names)) + r"(\d+)\."
        return 1 + max((int(m[1]) for name in weights if (m := re.match(block, name))), default=-1)

    width, _, patch, _ = shapes["image.patch.weight"]
    vocab, text_width = shapes["text.tok.weight"]
    positions = shapes["image.pos"][0] - 1
    size, stride = read_image_size(positions, patch, config["image_size"], image_size, stride, source)
    arch = dict(
        embed=shapes["text.proj"][0 if names is HF_NAMES else 1], image_size=size, patch=patch, stride=stride,
        image_width=width, image_layers=depth("image"), text_width=text_width, text_layers=depth("text"), vocab=vocab,
        context=shapes["text.pos"][0], head_width=config["head_width"],
        text_head_width=config["text_head_width"], quick_gelu=config["quick_gelu"])
    rows, columns = patch_grid(size, patch, stride)
    known_from = config["file"] or "assumed: OpenAI's, as there is no config beside the weights"
    summary = (f"patch {patch}, image {arch['image_layers']} layers of {width}, text {arch['text_layers']} layers of "
               f"{text_width}; {rows}x{columns} positions, of images of {size[0]}x{size[1]}; "
               f"heads of {arch['head_width']}, {'Quick' * arch['quick_gelu']}GELU ({known_from})")
    knows_heads = config["file"] or width <= 1024                       # larger models have heads of 80 and more
    splits = width % config["head_width"] == 0 and text_width % config["text_head_width"] == 0
    if not (knows_heads and splits and arch["image_layers"] and arch["text_layers"]):
        raise ValueError(f"{source} is no CLIP that can be read: {summary}")
    print(f"clip: {summary}")
    return arch


# ---- weights: into the model ----------------------------------------------------------------------------------------

def rename(name, table):
    """Apply every (pattern, replacement) of the table in order."""
    for pattern, replacement in table:
        name = re.sub(pattern, replacement, name)
    return name


def named_tensors(model, names):
    """The tensors of a model without its heads, by the names of another program. They are views: copying into one
    changes the model. Hugging Face's CLIPModel splits q, k, v, and transposes the projections."""
    weights = {rename(name, names): w for name, w in model.state_dict().items() if not name.startswith("heads.")}
    if names is not HF_NAMES:
        return weights
    theirs = {}
    for name, w in weights.items():
        if ".qkv." in name:
            theirs |= {name.replace("qkv", f"{part}_proj"): rows for part, rows in zip("qkv", w.chunk(3))}
        else:
            theirs[name] = w.T if name.endswith("_projection.weight") else w
    return theirs


def read_foreign_clip(saved, path, image_size, stride):
    """What another program's file holds -> architecture, tensors, the table of their names, what is left out."""
    nested = next((saved[key] for key in ("model", "state_dict") if isinstance(saved.get(key), dict)), None)
    weights, left_out, config = {}, set(), read_config(path)
    for name, w in (saved if nested is None else nested).items():
        if not torch.is_tensor(w):
            raise ValueError(f"{path} holds {', '.join(sorted(saved)[:5])}, not a dict of tensors")
        if name.endswith("input_resolution"):                           # OpenAI's archives tell the size of images
            config["image_size"] = int(w), int(w)
        if re.search(NOT_WEIGHTS, name):
            continue
        key = re.sub(WRAPPERS, "", name.replace("_orig_mod.", ""))      # torch.compile's, at any depth
        if nested is not None:                                          # a training checkpoint: any prefix, and heads
            match = re.match(ENCODER, key)
            if not match:
                left_out.add(key.split(".")[0])
                continue
            key = match[1]
        if key in weights:
            raise ValueError(f"{path} holds more than one encoder: {name} is the second {key}")
        weights[key] = w
    names = HF_NAMES if any(name.startswith("text_model.") for name in weights) else OPENAI_NAMES
    if nested is not None:
        weights.setdefault("logit_scale", torch.tensor(math.log(50)))   # IRRA's temperature is fixed at 0.02
    arch = read_arch(weights, names, config, image_size, stride, path)
    return arch, weights, names, sorted(left_out)


def resize_pos(pos, old, new):
    """Position embeddings (1 + rows * columns, C) of a grid `old` -> of a grid `new`; that of the class token stays."""
    grid = pos[1:].float().reshape(1, *old, -1).permute(0, 3, 1, 2)                     # (1, C, rows, columns)
    grid = F.interpolate(grid, size=new, mode="bilinear")
    return torch.cat([pos[:1].float(), grid.flatten(2)[0].T])


@torch.no_grad()
def copy_weights(model, weights, source, old_grid=None, names=()):
    """Copy tensors into `model`: each is copied, or resized and copied; the model's heads are new. Anything else is a
    ValueError that names the tensor. names: the table from our names to those of the tensors; (): they are ours."""
    places = named_tensors(model, names)
    resized = "none"
    for name, w in weights.items():
        if name not in places:
            raise ValueError(f"{source} has a tensor {name} for which this model has no place")
        if name == rename("image.pos", names) and old_grid != model.image.grid:
            w = resize_pos(w, old_grid, model.image.grid)
            resized = "positions from {}x{} to {}x{}".format(*old_grid, *model.image.grid)
        if w.shape != places[name].shape or not w.is_floating_point():
            raise ValueError(f"{source}: tensor {name} is {tuple(w.shape)} {w.dtype}, "
                             f"it should be {tuple(places[name].shape)} of floating point")
        places[name].copy_(w)                                           # shares memory with the model; also casts fp16
    if missing := sorted(places.keys() - weights.keys()):
        raise ValueError(f"{source} lacks {len(missing)} tensors, e.g. {', '.join(missing[:3])}")
    print(f"clip: {len(places)} tensors from {source}, resized: {resized}")


def encoder_from_arch(arch, source, **options):
    """A DualEncoder of a checkpoint's architecture."""
    arch = dict(arch)
    if any([arch.pop(key, 0) for key in ("prompt", "adapter")]):        # the first edition has both keys, mostly 0
        raise ValueError(f"{source} has a prompt (CoOp) or an adapter (CLIP-Adapter): only lab/few_shot.py knows those")
    return DualEncoder(**arch | options)


def load_clip(source, image_size=None, stride=None, **options):
    """A DualEncoder with the weights of `source`: a file, a folder or a hub id. Files: OpenAI's TorchScript archive, a
    state dict, open_clip's safetensors or bin, Hugging Face's safetensors (also in shards) or bin, a checkpoint of
    ours, or a released checkpoint of IRRA, RDE or TBPS-CLIP, whose heads are left out.

    The architecture is read from the tensors and the config beside them. image_size (H, W): position embeddings are
    resized to it; stride of the patches, 0: no overlap; None keeps what the file has. `options` go to DualEncoder.
    Raises FileNotFoundError or ValueError if anything is missing, left over or of another shape."""
    path = find_weights(source)
    saved = read_file(path)
    if not isinstance(saved, dict) or not all(isinstance(name, str) for name in saved):
        raise ValueError(f"{path} holds no dict of named tensors but a {type(saved).__name__}")
    if saved.get("format") == "tbps":
        arch, left_out, names = saved["arch"], [], ()
        weights = {name: w for name, w in saved["weights"].items() if not name.startswith("heads.")}
    else:
        arch, weights, names, left_out = read_foreign_clip(saved, path, image_size, stride)
    requested = {key: value for key, value in dict(image_size=image_size, stride=stride).items() if value is not None}
    model = encoder_from_arch(arch, path, **options | requested)
    copy_weights(model, weights, path, patch_grid(arch["image_size"], arch["patch"], arch["stride"]), names)
    if left_out:
        print(f"clip: left out, for they are no encoders: {', '.join(left_out)}")
    return model


def tokenizer_for(source, vocabulary=None, mask=False):
    """The tokenizer of these weights: the vocabulary named, that of our checkpoint, or the file beside the weights."""
    if vocabulary:
        return data.load_tokenizer(vocabulary, mask)
    path = find_weights(source)
    if is_checkpoint(path):
        return saved_tokenizer(read_file(path), mask)
    return data.load_tokenizer(path.parent, mask)


# ---- checkpoints ----------------------------------------------------------------------------------------------------

VERSION = 1


def checkpoint_dict(args, recipe, model, tokenizer, preprocessing, heads):
    """What a checkpoint holds besides the state of the training: all that a search needs, with or without the heads."""
    weights = {name: w for name, w in model.state_dict().items() if heads or not name.startswith("heads.")}
    return dict(format="tbps", version=VERSION, weights=weights, arch=model.arch, info=preprocessing.settings,
                method=args.method, recipe=recipe, args=saved_options(args), argv=args.argv,
                tokenizer=dict(merges=[" ".join(m) for m in tokenizer.merges], mask=tokenizer.mask is not None))


def saved_tokenizer(saved, mask=None):
    """The tokenizer in a checkpoint's dict."""
    merges = [pair.split(" ") for pair in saved["tokenizer"]["merges"]]
    return data.Tokenizer(merges, saved["tokenizer"]["mask"] if mask is None else mask)


def write_log(out, **facts):
    """Append a line to log.jsonl, on the first rank."""
    if losses.ranks()[0] == 0:
        with open(out / "log.jsonl", "a") as f:
            f.write(json.dumps(facts) + "\n")


def read_log(out):
    """The lines of a run's log.jsonl as dicts."""
    path = data.need(out / "log.jsonl", "the log of the run", "training writes it")
    try:
        return [json.loads(line) for line in path.read_text().splitlines()]
    except ValueError as e:
        raise ValueError(f"{path} is damaged: {e}") from None


def is_checkpoint(path):
    """Whether a file is a checkpoint of this program. Does not read its tensors."""
    try:
        with zipfile.ZipFile(path) as archive:
            pickled = next((name for name in archive.namelist() if name.endswith("/data.pkl")), None)
            return pickled is not None and b"tbps" in archive.read(pickled)[:200]       # the value of "format"
    except zipfile.BadZipFile:                                          # not a zip archive, or damaged: see read_file
        return False


def save(path, content):
    """Write a checkpoint such that a crash or a full disk leaves the old one. The first rank writes."""
    part = Path(f"{path}.part")
    if losses.ranks()[0] == 0:
        try:
            torch.save(content, part)
            os.replace(part, path)
        except (OSError, RuntimeError) as e:                            # torch reports a full disk as RuntimeError
            part.unlink(missing_ok=True)
            raise OSError(f"{path} could not be written ({str(e).splitlines()[0]}); an older one is untouched. "
                          "Is the disk full?") from None
    barrier()


def read_checkpoint(path):
    """The dict in a checkpoint: method, recipe, args, epoch, step, best, scores, weights, arch, info, tokenizer.

    Raises FileNotFoundError or ValueError if there is none, or one of a newer version."""
    path = data.need(path, "the checkpoint", "train one with python tbps.py, which writes runs/NAME/best.pt")
    if path.is_dir():
        raise ValueError(f"{path} is a folder; the checkpoint is a file in it, like {path / 'best.pt'}")
    saved = read_file(path)
    if not (isinstance(saved, dict) and saved.get("format") == "tbps"):
        raise ValueError(f"{path} is not a checkpoint of this program")
    if saved["version"] > VERSION:
        raise ValueError(f"{path} was written by a newer version ({saved['version']}, this is {VERSION}); update tbps")
    return saved


def load_checkpoint(path, device="cpu", make_heads=None):
    """-> model in eval mode, tokenizer, data.Preprocessing: all that a search needs. With the method's make_heads the
    model has its heads, too, which only last.pt holds. read_checkpoint tells how the model was trained."""
    saved = read_checkpoint(path)
    model = encoder_from_arch(saved["arch"], path)
    weights = {name: w for name, w in saved["weights"].items() if make_heads or not name.startswith("heads.")}
    if make_heads:
        persons = len(weights.get("heads.id.bias", ()))
        for name, head in make_heads(saved["recipe"], model, persons).items():
            model.heads[name] = head
        if differ := sorted(model.state_dict().keys() ^ weights.keys()):
            raise ValueError(f"{path} does not hold the heads wanted here (e.g. {differ[0]}): they are in the last.pt "
                             "of a run with the method that has them")
    model.load_state_dict(weights)
    return model.eval().to(device), saved_tokenizer(saved), data.Preprocessing(**saved["info"])


def load_model(source, device="cpu", image_size=None, vocabulary=None):
    """A checkpoint of ours or the weights of a CLIP: a file, a folder or a hub id -> model in eval mode, tokenizer,
    data.Preprocessing: all that a search needs. image_size (H, W) and vocabulary, a file, are for a CLIP."""
    path = find_weights(source)
    if is_checkpoint(path):
        require(not (image_size or vocabulary), "--tokenizer and --size are for the weights of a CLIP; the checkpoint "
                f"{path} has its own")
        return load_checkpoint(path, device)
    model, tokenizer, config = load_clip(path, image_size), tokenizer_for(path, vocabulary), read_config(path)
    require(tokenizer.vocab == model.arch["vocab"], f"the tokenizer has {tokenizer.vocab:,} tokens, the weights "
            f"{model.arch['vocab']:,}: they do not belong together")
    preprocessing = data.Preprocessing(model.arch["image_size"], *(config[key] for key in ("norm", "resize", "clean")))
    return model.eval().to(device), tokenizer, preprocessing


# ---- out: a folder that open_clip and transformers read -------------------------------------------------------------

def save_open_clip(model, tokenizer, preprocessing, folder, dtype=torch.float32):
    """Write a model as open_clip does: open_clip_config.json, open_clip_model.safetensors, the tokenizer. load_clip
    reads it. Raises ValueError if its patches overlap."""
    arch, folder = model.arch, Path(folder)
    require(arch["stride"] == arch["patch"], "this model has overlapping patches; open_clip and transformers know none")
    text = dict(context_length=arch["context"], vocab_size=arch["vocab"], width=arch["text_width"],
                heads=arch["text_width"] // arch["text_head_width"], layers=arch["text_layers"])
    if arch["vocab"] != OPENAI_VOCAB:                                   # else open_clip takes its own tokenizer
        text["hf_tokenizer_name"] = "."
    image = dict(image_size=arch["image_size"], patch_size=arch["patch"], width=arch["image_width"],
                 layers=arch["image_layers"], head_width=arch["head_width"])
    write_json(folder / "open_clip_config.json", dict(
        model_cfg=dict(embed_dim=arch["embed"], quick_gelu=arch["quick_gelu"], vision_cfg=image, text_cfg=text),
        preprocess_cfg=dict(mean=preprocessing.mean, std=preprocessing.std, resize_mode="squash",
                            interpolation=preprocessing.settings["resize"]),
        tbps=dict(clean=preprocessing.clean)))                          # whether captions are cleaned; others ignore it
    write_tensors(folder / "open_clip_model.safetensors", named_tensors(model, OPENAI_NAMES), dtype)
    tokenizer.save(folder / "tokenizer.json")
    write_json(folder / "tokenizer_config.json", dict(
        tokenizer_class="CLIPTokenizer", bos_token="<|startoftext|>", eos_token="<|endoftext|>",
        pad_token="<|endoftext|>", unk_token="<|endoftext|>", model_max_length=arch["context"]))


def save_hugging_face(model, tokenizer, preprocessing, folder):
    """Add the files of a CLIPModel of transformers, which knows square images only."""
    arch = model.arch

    def tower(name, head_width):
        return dict(hidden_size=arch[f"{name}_width"], intermediate_size=4 * arch[f"{name}_width"],
                    num_hidden_layers=arch[f"{name}_layers"], projection_dim=arch["embed"],
                    num_attention_heads=arch[f"{name}_width"] // head_width,
                    hidden_act="quick_gelu" if arch["quick_gelu"] else "gelu")

    image = tower("image", arch["head_width"]) | dict(image_size=arch["image_size"][0], patch_size=arch["patch"])
    text = tower("text", arch["text_head_width"]) | dict(
        vocab_size=arch["vocab"], max_position_embeddings=arch["context"], bos_token_id=tokenizer.sot,
        eos_token_id=tokenizer.eot, pad_token_id=tokenizer.eot)
    write_json(folder / "config.json", dict(
        model_type="clip", architectures=["CLIPModel"], projection_dim=arch["embed"], text_config=text,
        vision_config=image, tbps=dict(clean=preprocessing.clean)))
    size = dict(zip(("height", "width"), arch["image_size"]))
    resample = dict(bilinear=2, bicubic=3)[preprocessing.settings["resize"]]                # Pillow's numbers
    write_json(folder / "preprocessor_config.json", dict(
        image_processor_type="CLIPImageProcessor", do_resize=True, size=size, resample=resample, do_center_crop=False,
        do_normalize=True, image_mean=preprocessing.mean, image_std=preprocessing.std))
    write_tensors(folder / "model.safetensors", named_tensors(model, HF_NAMES))


def write_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write_tensors(path, weights, dtype=torch.float32):
    save_file({name: w.to(dtype).contiguous() for name, w in weights.items()}, path, metadata={"format": "pt"})


CARD = """---
library_name: open_clip
pipeline_tag: zero-shot-image-classification
license: other
tags:
- text-based-person-search
- open_clip
- clip
---

# {title}

{body}"""
CARD_BODY = """Finds persons in images by a description such as "a man in a red jacket with a black backpack". A CLIP:
{start}, fine-tuned on {dataset} with the method {method}.

## Scores

{scores}

## Use

    import open_clip
    model, _, preprocess = open_clip.create_model_and_transforms("{place}")
    tokenizer = open_clip.get_tokenizer("{place}")
    model.eval()

Images are stretched to {size} pixels. Captions: {captions}.

## Recipe

{recipe}

## Intended use and licence

Research and teaching. Do not identify, track or profile persons who have not agreed to it. The licences of the data
set and of the weights that training started from apply to this model, too.
"""


def model_card(path, title, preprocessing):
    """The README.md of an exported model: what it is, how it was trained, its scores, how to use it."""
    if not is_checkpoint(path):
        return CARD.format(title=title, body="The weights of a CLIP, written in another layout.\n")
    saved = read_checkpoint(path)
    args, start = saved["args"], Path(saved["args"]["clip"])
    require(args.get("trains") != "teacher", f"{path} is a teacher, which needs support sets; export its student")
    log = read_log(path.parent) if (path.parent / "log.jsonl").exists() else []
    tested = [line["test"] for line in log if "test" in line]
    scores = {f"test split, {what.removeprefix(f'{path.name}, ')}": values for what, values in
              (tested[-1] if tested else {}).items() if what.startswith(path.name)}
    if not scores and saved["scores"]:
        scores = {"validation split, text to image": saved["scores"]}
    lines = [f"- {what}: {evaluation.format_scores(values)}" for what, values in scores.items()]
    clean = 'in lower case, without . ! " ( ) * # : ; ~, which only tbps removes by itself'
    own_tokens = saved["arch"]["vocab"] != OPENAI_VOCAB
    return CARD.format(title=title, body=CARD_BODY.format(
        start=f"{start.parent.name}/{start.name}" if start.suffix else start.name, dataset=args["dataset"],
        method=saved["method"], scores="\n".join(lines) or "None were computed.",
        place="local-dir:FOLDER" if own_tokens else "hf-hub:NAME", recipe=format_values(saved["recipe"]),
        size="{}x{}".format(*preprocessing.size), captions=clean if preprocessing.clean else "as they are"))


def export(source, folder, image_size=None, vocabulary=None):
    """Write a checkpoint, or the weights of a CLIP, into a new folder for open_clip and, if its images are square, for
    transformers, with a model card. Raises ValueError if open_clip cannot express it (overlapping patches)."""
    folder, path = Path(folder), find_weights(source)
    require(not folder.exists() or folder.is_dir() and not any(folder.iterdir()),
            f"{folder} exists and is not an empty folder; name a new one with --export")
    model, tokenizer, preprocessing = load_model(path, "cpu", image_size, vocabulary)
    height, width = model.arch["image_size"]
    card = model_card(path, folder.name, preprocessing)
    save_open_clip(model, tokenizer, preprocessing, folder)
    if height == width:
        save_hugging_face(model, tokenizer, preprocessing, folder)
    (folder / "README.md").write_text(card, encoding="utf-8")
    print(f"{folder}: a model for open_clip{' and transformers' * (height == width)}; its card is README.md")


# ---- recipes --------------------------------------------------------------------------------------------------------
#
# A recipe is a flat dict. Each key has one row here: its default, which is TBPS-CLIP's value, and its help. The
# recipes below say what else a method has. --set key=value changes a value; a key whose help begins with "weight"
# switches a loss.

COMMON_KEYS = dict(
    # optimisation
    epochs=(5, "passes over the pairs"),
    batch=(320, "pairs per step; also the number of negatives"),
    lr=(1e-4, "peak learning rate"),
    lr_start=(1e-6, "learning rate of the first step"),
    lr_end=(5e-6, "learning rate of the last step"),
    warmup=(1.0, "epochs of linear warm-up; then half a cosine down to lr_end"),
    per_epoch=(False, "change the rate between epochs only, not at every step"),
    decay_every=(0, "instead of the cosine: divide the rate by 10 every so many epochs"),
    weight_decay=(0.02, "of matrices"),
    coupled=(False, "Adam with an L2 penalty on all but biases, instead of AdamW"),
    eps=(1e-8, "of Adam"),
    beta2=(0.98, "of Adam"),
    lr_bias=(1.0, "factor of the rate of biases"),
    lr_new=(1.0, "factor of the rate of layers that CLIP does not have"),
    sampler=("random", "random, random-count (UIT) or views (LCR2S); see data.batches"),
    # images and captions
    height=(224, "of the image in pixels"),
    width=(224, "of the image in pixels"),
    stride=(0, "of the patches in pixels; 0: patches do not overlap"),
    norm=("imagenet", "mean and std of pixels: imagenet, clip or half"),
    resize=("bilinear", "of training images: bilinear or bicubic"),
    eval_resize=("bicubic", "of all other images"),
    clean=(True, "captions in lower case, without full stops"),
    # augmentation
    image_aug=("pool", "pool (2 of 6 operations), stack (all 6), reid (flip, pad-crop, erase), shift (flip, pad-crop), "
               "none, or the name of an operation"),
    back_translation=(0.1, "chance to use captions_bt instead of captions, where the data have them"),
    deletion=(0.05, "chance of each word to be deleted"),
    synonym=(0.0, "fraction of words replaced by synonyms"),
    insertion=(0.0, "fraction of words to insert"),
    swap=(0.0, "fraction of words to swap"),
    eda=(0.0, "strength of one of these four operations, drawn per caption"),
    prune=(0.0, "chance of a caption to be reduced to nouns, adjectives and pronouns (UIT)"),
    approximate=(0.0, "chance of approximate text (CTLG): a fifth of the words replaced, deleted or cut out"),
    # model
    tau=(0.0, "temperature; 0: learned, starting from that of the weights"),
    text_dropout=(0.05, "on the attention weights of the text tower"),
    lock_patch=(True, "freeze the patch convolution"),
    itc=(0.0, "weight of ITC, as CLIP is trained: one positive per row"))
TBPS_CLIP_KEYS = COMMON_KEYS | dict(
    nitc=(1.0, "weight of N-ITC: all pairs of a person are positives"),
    ritc=(1.0, "weight of R-ITC, reversed KL"),
    ritc_eps=(0.01, "label smoothing of R-ITC"),
    citc=(0.1, "weight of C-ITC, cyclic consistency"),
    ss=(0.4, "weight of self-supervision between two image views"),
    ss_text=(0.0, "weight of self-supervision between two variations of a caption"),
    mvs=(True, "multi-view supervision: a second image view in N-ITC"),
    mvs_text=(False, "a second variation of the caption in N-ITC"),
    soft=(0.5, "share of soft labels, the model's own predictions, in the targets of N-ITC"),
    soft_ramp=(1.0, "epochs until `soft` is reached"),
    teacher_pass=(True, "compute the texts of the soft labels with a dropout mask of their own"))
SDM_KEYS = COMMON_KEYS | dict(
    sdm=(1.0, "weight of SDM, similarity distribution matching"),
    cmpm=(0.0, "weight of CMPM, projection matching"),
    id=(1.0, "weight of identity classification"),
    triplet=(0.0, "weight of the hardest cross-modal triplet, margin 0.05"))
IRRA_KEYS = SDM_KEYS | dict(
    restoration=(0.0, "weight of the restoration of dropped patches from a grey image and the caption"),
    mlm=(1.0, "weight of masked language modelling with the image"),
    mask_content=(0.15, "chance of nouns and adjectives to be masked"),
    mask_other=(0.15, "chance of other words to be masked"),
    mask_all=(False, "use the masked captions in all losses, not in MLM only"),
    depth=(4, "blocks of the cross-modal encoder in the MLM and restoration heads"),
    drop=(0.7, "fraction of patches dropped for restoration"),
    official=(False, "do what the official code does; see OFFICIAL CODE in tbps.py"),
    half_weights=(False, "train in fp16 without fp32 master weights, as the official code"))
CTLG_KEYS = COMMON_KEYS | dict(
    positives=("pair", "the texts that are right for an image: of its pair, image or person"),
    mixup=(0.5, "chance of a pair to be mixed with another: mean of the pixels, both captions"),
    feature_mixup=(0.0, "alpha of the Beta distribution of mixup after the first block; 0: off"),
    official=(False, "do what the official code does; see OFFICIAL CODE in tbps.py"))
KEYS = TBPS_CLIP_KEYS | IRRA_KEYS | CTLG_KEYS
CHOICES = dict(sampler=["random", "random-count", "views"], norm=list(data.NORMS), resize=["bilinear", "bicubic"],
               eval_resize=["bilinear", "bicubic"], image_aug=data.IMAGE_AUG, positives=["pair", "image", "person"])
TEXT_AUG = ["deletion", "synonym", "insertion", "swap", "eda", "prune", "approximate"]
FRACTIONS = ["mixup", "back_translation", *TEXT_AUG, "soft", "text_dropout", "mask_content", "mask_other", "drop"]


def make_recipe(keys, **changes):
    """A flat recipe: the defaults of a table of keys, and what a method changes."""
    assert changes.keys() <= keys.keys(), f"no such keys: {changes.keys() - keys.keys()}"
    return {key: default for key, (default, _) in keys.items()} | changes


# TBPS-CLIP, AAAI 2024: config.yaml of the official code, s.config.yaml for the simplified form
TBPS_CLIP = make_recipe(TBPS_CLIP_KEYS)
SIMPLIFIED = make_recipe(TBPS_CLIP_KEYS, ss=0.0, mvs=False, citc=0.0)
# Fine-tuning with CLIP's own loss. The first row of the paper's tables; the official code cannot be configured for it
BASELINE = make_recipe(
    TBPS_CLIP_KEYS, itc=1.0, nitc=0.0, ritc=0.0, citc=0.0, ss=0.0, mvs=False, soft=0.0, text_dropout=0.0,
    lock_patch=False, image_aug="none", back_translation=0.0, deletion=0.0)
# IRRA, CVPR 2023: defaults of the official code, paper Sec. 4. LCR2S starts from the same values (distill.py)
SDM = make_recipe(
    SDM_KEYS, epochs=60, batch=64, lr=1e-5, lr_start=1e-6, lr_end=0.0, warmup=5.0, per_epoch=True, weight_decay=4e-5,
    coupled=True, eps=1e-3, beta2=0.999, lr_bias=2.0, lr_new=5.0, height=384, width=128, norm="clip",
    eval_resize="bilinear", clean=False, image_aug="reid", back_translation=0.0, deletion=0.0, tau=0.02,
    text_dropout=0.0, lock_patch=False)
IRRA = make_recipe(IRRA_KEYS) | SDM
# UIT / SEN, 2023: run.sh of the official code
UIT = IRRA | dict(batch=128, sampler="random-count", triplet=10.0, restoration=10.0, mlm=0.0, prune=0.2,
                  mask_content=0.3, mask_other=0.05, mask_all=True)
# CTLG, TCSVT 2023: paper Sec. IV-B and the official code
CTLG = make_recipe(
    CTLG_KEYS, epochs=70, batch=256, lr_start=1e-5, lr_end=0.0, warmup=9.0, per_epoch=True, decay_every=20,
    weight_decay=0.0, beta2=0.999, height=384, width=128, stride=12, resize="bicubic", clean=False, image_aug="shift",
    back_translation=0.0, deletion=0.0, approximate=0.5, tau=0.005, text_dropout=0.0, lock_patch=False, itc=1.0)
# On synthetic pedestrians every recipe gets these values: a small model that was pre-trained with norm=clip, small
# batches. The rate, the epochs, and that soft labels and locked patches stay were chosen on the validation split.
TOY = dict(height=96, width=48, stride=0, norm="clip", epochs=3, batch=128, lr=1e-3, lr_start=1e-5, lr_end=1e-5,
           warmup=0.5, per_epoch=False, decay_every=0, weight_decay=0.02, coupled=False, eps=1e-8, beta2=0.98,
           lr_bias=1.0, lr_new=1.0, depth=1)


# ---- methods: TBPS-CLIP ---------------------------------------------------------------------------------------------

def tbps_clip_heads(recipe, model, persons):
    """SimCLR's projection heads, where self-supervision is on."""
    embed = model.arch["embed"]

    def mlp():
        return nn.Sequential(nn.Linear(embed, 128), nn.ReLU(), nn.Linear(128, embed))
    return {name: mlp() for name in ("ss", "ss_text") if recipe[name]}


def tbps_clip_losses(model, batch, recipe, epoch, autocast):
    """The weighted losses of one step of TBPS-CLIP (arXiv 2308.10045) by name; their sum is the objective.

    batch: pixels (V, B, 3, H, W): the view, the second one (mvs), two for self-supervision (ss); tokens (U, B, T)
    likewise, T the length of the longest caption. epoch: epochs done, with a fraction. All views go through the encoder
    in one forward pass. The features of all ranks are gathered, and each rank computes the losses of the whole
    batch."""
    r, B = recipe, len(batch["pid"])
    alpha = r["soft"] * (min(1, epoch / r["soft_ramp"]) if r["soft_ramp"] else 1)           # share of soft labels
    with autocast():
        image = model.encode_image(batch["pixels"].flatten(0, 1)).view(-1, B, model.arch["embed"])      # (V, B, D)
        text = model.encode_text(batch["tokens"].flatten(0, 1)).view(-1, B, model.arch["embed"])        # (U, B, D)
        # The teacher of the soft labels is the model itself. Nothing in the image tower is random, so its image
        # features are the student's. Its texts differ by a dropout mask if they are computed again, as in the
        # official code.
        teacher_text = text.detach()
        if alpha > 0 and r["teacher_pass"] and r["text_dropout"] > 0:
            with torch.no_grad():
                tokens = batch["tokens"][:1 + r["mvs_text"]]
                teacher_text = model.encode_text(tokens.flatten(0, 1)).view(-1, B, model.arch["embed"])
        # from here on B is the batch of all ranks
        pid, image = losses.gather(batch["pid"]), losses.gather(image, dim=1)
        text, teacher_text = losses.gather(text, dim=1), losses.gather(teacher_text, dim=1)
        ss_image = model.heads["ss"](image[-2:]) if r["ss"] else None                                   # (2, B, D)
        ss_text = model.heads["ss_text"](text[-2:]) if r["ss_text"] else None
    scale, out = model.scale(), {}
    if r["itc"]:
        out["itc"] = r["itc"] * losses.itc(image[0], text[0], scale)
    if r["nitc"]:                                                       # multi-view supervision: the mean over views
        pairs = [(0, 0)]                                                # (image view, variation of the caption)
        if r["mvs"] or r["mvs_text"]:
            pairs.append((int(r["mvs"]), int(r["mvs_text"])))
        out["nitc"] = r["nitc"] / len(pairs) * sum(
            losses.nitc(image[v], text[u], pid, scale, alpha, image[v].detach(), teacher_text[u]) for v, u in pairs)
    if r["ritc"]:
        out["ritc"] = r["ritc"] * losses.ritc(image[0], text[0], pid, scale, r["ritc_eps"])
    if r["citc"]:
        out["citc"] = r["citc"] * losses.citc(image[0], text[0])
    if r["ss"]:
        out["ss"] = r["ss"] * losses.nt_xent(ss_image[0], ss_image[1])
    if r["ss_text"]:
        out["ss_text"] = r["ss_text"] * losses.nt_xent(ss_text[0], ss_text[1])
    return out


# ---- methods: IRRA and UIT ------------------------------------------------------------------------------------------
#
# OFFICIAL CODE. official=1 does what the official code does where it differs from the paper, or is surprising:
#
#   IRRA, UIT        rates by layer names: new layers outside of cross-attention, its blocks and classifiers learn at
#                    CLIP's rate (lr_factor)
#   IRRA, UIT        the heads also attend to the padding after a caption (irra_losses)
#   IRRA             all losses see the masked captions, not MLM alone; UIT does so anyway (masks_all_losses)
#   IRRA, UIT, CTLG  the last, smaller batch of an epoch is used (train)
#   UIT              one patch more is dropped than scored (visible_patches); the mask token starts at zero (irra_heads)
#   CTLG             approximate text may also replace and delete colours and garments (data.approximate_caption)
#
# The recipes of TBPS-CLIP are what its official code does. half_weights=1 is a key of its own: see HalfAdam.

class CrossAttention(nn.Module):
    """Queries (B, T, C) attend to a context (B, S, C) -> (B, T, C). key_mask (B, S) bool: what may be attended to."""

    def __init__(self, width, head_width):
        super().__init__()
        self.heads = width // head_width
        self.q, self.kv, self.proj = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(width, width)

    def forward(self, x, context, key_mask=None):
        B, T, C = x.shape
        q = self.q(x).view(B, T, self.heads, -1).transpose(1, 2)                                        # (B, H, T, C/H)
        k, v = self.kv(context).view(B, context.shape[1], 2, self.heads, -1).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v, None if key_mask is None else key_mask[:, None, None])
        return self.proj(x.transpose(1, 2).reshape(B, T, C))


class CrossEncoder(nn.Module):
    """The cross-modal encoder that IRRA and UIT share: one cross-attention of queries (B, T, C) to a context (B, S,
    C), then a few blocks. There is no residual around the cross-attention: its output is made of the context
    alone."""

    def __init__(self, width, head_width, depth):
        super().__init__()
        self.ln_query, self.ln_context, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width), nn.LayerNorm(width)
        self.cross = CrossAttention(width, head_width)
        self.ln_mid = nn.Identity()                                     # a layer norm in UIT
        self.blocks = nn.ModuleList(Block(width, head_width) for _ in range(depth))
        for layer in (self.cross.q, self.cross.kv):
            nn.init.normal_(layer.weight, std=width ** -0.5)
            nn.init.zeros_(layer.bias)
        nn.init.normal_(self.cross.proj.weight, std=(2 * depth * width) ** -0.5)
        nn.init.zeros_(self.cross.proj.bias)
        init_blocks(self.blocks, width)

    def forward(self, query, context, query_mask=None, context_mask=None):
        x = self.ln_mid(self.cross(self.ln_query(query), self.ln_context(context), context_mask))
        for block in self.blocks:
            x = block(x, key_mask=query_mask)
        return self.ln_post(x)


class MLMHead(nn.Module):
    """Masked language modelling of IRRA (arXiv 2303.12501, Sec. 3.2): predict masked words from the caption and the
    image."""

    def __init__(self, width, head_width, depth, vocab):
        super().__init__()
        self.cross_encoder = CrossEncoder(width, head_width, depth)
        self.fc, self.ln, self.out = nn.Linear(width, width), nn.LayerNorm(width), nn.Linear(width, vocab)
        nn.init.normal_(self.fc.weight, std=(2 * width) ** -0.5)
        nn.init.normal_(self.out.weight, std=(2 * depth * width) ** -0.5)

    def forward(self, text, image, positions, key_mask=None):
        """text (B, T, D), image (B, S, D), positions (M,) of the masked tokens in B * T -> logits (M, vocab)."""
        x = self.cross_encoder(text, image, query_mask=key_mask).flatten(0, 1)[positions]
        return self.out(self.ln(F.silu(1.702 * self.fc(x)) / 1.702))    # QuickGELU, as in Block


class RestorationHead(nn.Module):
    """Text-guided image restoration of UIT (arXiv 2307.09059): from the visible patches of a grey image and the
    caption to the colour pixels of all patches. Colours can only come from the caption."""

    def __init__(self, width, head_width, depth, grid, patch):
        super().__init__()
        self.ln, self.embed = nn.LayerNorm(width), nn.Linear(width, width)
        self.mask = nn.Parameter(0.02 * torch.randn(width))
        self.register_buffer("pos", sincos_grid(grid, width), persistent=False)             # (1+N, D), fixed
        self.cross_encoder = CrossEncoder(width, head_width, depth)
        self.cross_encoder.ln_mid = nn.LayerNorm(width)
        self.pixels = nn.Linear(width, 3 * patch ** 2)

    def forward(self, visible, order, text, key_mask=None):
        """visible (B, 1+K, D): the class token and the first K patches of `order` (B, N); text (B, T, D), key_mask
        (B, T) -> (B, N, 3 patch^2)."""
        x = self.embed(self.ln(visible))
        B, K, N = len(x), x.shape[1] - 1, order.shape[1]
        patches = torch.cat([x[:, 1:], self.mask.to(x.dtype).expand(B, N - K, -1)], dim=1)  # (B, N, D), in order
        patches = patches.gather(1, order.argsort(dim=1)[..., None].expand_as(patches))                 # row by row
        x = torch.cat([x[:, :1], patches], dim=1) + self.pos
        return self.pixels(self.cross_encoder(x, text, context_mask=key_mask)[:, 1:])


def patchify(pixels, patch):
    """(B, 3, H, W) -> (B, N, 3 patch^2): patches row by row, each by row, column, channel. Incomplete patches are cut
    off."""
    B, _, H, W = pixels.shape
    h, w = H // patch, W // patch
    x = pixels[:, :, :h * patch, :w * patch].reshape(B, 3, h, patch, w, patch)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(B, h * w, -1)


def unpatchify(patches, grid, patch):
    """The inverse of patchify: (B, N, 3 patch^2) -> (B, 3, H, W)."""
    x = patches.reshape(-1, *grid, patch, patch, 3).permute(0, 5, 1, 3, 2, 4)
    return x.reshape(len(patches), 3, grid[0] * patch, grid[1] * patch)


def grey(pixels):
    """Luma in all three channels. The pixels are normalised, as in the official code; the result is within 0.11 of the
    normalised grey image."""
    red, green, blue = pixels.split(1, dim=1)
    return (0.2989 * red + 0.5870 * green + 0.1140 * blue).expand_as(pixels)


def visible_patches(model, recipe):
    """The number of patches that the restoration head sees: 57 of 192. With official=1 it is 56, and the loss still
    leaves out the first 57, so one dropped patch is not scored."""
    N, visible = math.prod(model.image.grid), 1 - recipe["drop"]
    return int((N + 1) * visible + 1e-6) - 1 if recipe["official"] else int(N * visible + 1e-6)


def id_heads(recipe, model, persons):
    """One classifier of persons for images and texts, if its loss has a weight."""
    if not recipe["id"]:
        return {}
    classifier = nn.Linear(model.arch["embed"], persons)
    nn.init.normal_(classifier.weight, std=0.001)
    nn.init.zeros_(classifier.bias)
    return {"id": classifier}


def irra_heads(recipe, model, persons):
    """The classifier, MLM head and restoration head whose losses have a weight."""
    arch, heads = model.arch, id_heads(recipe, model, persons)
    size = arch["embed"], arch["head_width"], recipe["depth"]
    if recipe["mlm"]:
        heads["mlm"] = MLMHead(*size, arch["vocab"])
    if recipe["restoration"]:
        if arch["stride"] != arch["patch"]:
            raise ValueError("restoration needs patches that do not overlap: stride=0")
        N, K = math.prod(model.image.grid), visible_patches(model, recipe)
        if not 0 < K < N - recipe["official"]:
            raise ValueError(f"drop={recipe['drop']} leaves {max(K, 0)} of {N} patches visible: "
                             "some must be, and some not")
        heads["restoration"] = RestorationHead(*size, model.image.grid, arch["patch"])
        if recipe["official"]:
            nn.init.zeros_(heads["restoration"].mask)
    return heads


def pair_losses(image, text, pid, scale, heads, recipe, autocast):
    """The weighted losses of features of pairs by name: image, text (B, D), pid (B,)."""
    r, out = recipe, {}
    if r["itc"]:
        out["itc"] = r["itc"] * losses.itc(image, text, scale)
    if r["sdm"]:
        out["sdm"] = r["sdm"] * losses.sdm(image, text, pid, scale)
    if r["cmpm"]:
        out["cmpm"] = r["cmpm"] * losses.cmpm(image, text, pid)
    if r["id"]:
        with autocast():
            image_logits, text_logits = heads["id"](image), heads["id"](text)                           # (B, P)
        out["id"] = r["id"] * losses.id_loss(image_logits, text_logits, pid)
    if r["triplet"]:
        out["triplet"] = r["triplet"] * losses.triplet(image, text, pid)
    return out


def masks_all_losses(recipe):
    """Whether the losses of the features see masked captions too, and not MLM alone."""
    return recipe.get("mask_all") or recipe.get("official") and "mlm" in recipe


def mask_rates(recipe):
    """(rate of content words, rate of other words) to mask, or None where the recipe has no use for masked captions."""
    if recipe.get("mlm") or masks_all_losses(recipe):
        return recipe["mask_content"], recipe["mask_other"]
    return None


def irra_losses(model, batch, recipe, epoch, autocast):
    """The weighted losses of one step of IRRA (arXiv 2303.12501) or UIT (arXiv 2307.09059), which differ in their
    recipes.

    batch: pixels (1, B, 3, H, W), tokens (1, B, T), and where captions are masked also the masked captions, masked
    (B, T), the positions (M,) of masked tokens in the flattened captions, and their ids, targets (M,)."""
    r, pid, pixels = recipe, batch["pid"], batch["pixels"][0]
    mlm, restoration, mask_all = r["mlm"] > 0, r["restoration"] > 0, masks_all_losses(r)
    tokens = batch["masked"] if mask_all else batch["tokens"][0]
    eot = tokens.argmax(dim=1)                                          # the same in masked captions
    key_mask = None                                                     # official: heads attend to the padding, too
    if not r["official"]:
        key_mask = torch.arange(tokens.shape[1], device=eot.device) <= eot[:, None]                     # (B, T)
    with autocast():
        if mlm:
            image_tokens = model.image_tokens(pixels)                                                   # (B, S, D)
        else:
            image_tokens = model.encode_image(pixels)[:, None]                                          # (B, 1, D)
        if restoration or (mlm and mask_all):                           # a head reads all of `tokens`
            text_tokens = model.text_tokens(tokens, trim=False)         # (B, T, D), as long as key_mask
            text = pick(text_tokens, eot)[:, 0]
        else:
            text = model.encode_text(tokens)
        image = image_tokens[:, 0]                                                                      # (B, D)
        if mlm:
            masked_tokens = text_tokens if mask_all else model.text_tokens(batch["masked"], trim=False)
            logits = model.heads["mlm"](masked_tokens, image_tokens, batch["positions"], key_mask)      # (M, vocab)
        if restoration:
            restored, dropped = restore(model, pixels, text_tokens, key_mask, r)
    image, text, pid = (losses.gather(x) for x in (image, text, pid))
    out = pair_losses(image, text, pid, model.scale(), model.heads, r, autocast)
    if mlm:
        out["mlm"] = r["mlm"] * losses.mlm(logits, batch["targets"]) * losses.rank_weight(logits)
    if restoration:
        patches = patchify(pixels, model.arch["patch"])
        out["restoration"] = r["restoration"] * losses.restoration(restored, patches, dropped)
    return out


def restore(model, pixels, text_tokens, key_mask, recipe, generator=None):
    """Restore a grey image with most patches dropped, from the caption's tokens (B, T, D) -> all patches (B, N, 3
    patch^2), and which of them are scored (B, N) bool. Only visible patches are encoded: a third of the cost of a
    normal pass at drop=0.7."""
    K, N = visible_patches(model, recipe), math.prod(model.image.grid)
    order = torch.rand(len(pixels), N, generator=generator, device=pixels.device).argsort(dim=1)        # (B, N)
    visible = model.image_tokens(grey(pixels), patch_ids=order[:, :K])                                  # (B, 1+K, D)
    dropped = order.argsort(dim=1) >= K + recipe["official"]                                            # (B, N)
    return model.heads["restoration"](visible, order, text_tokens, key_mask), dropped


# ---- methods: CTLG --------------------------------------------------------------------------------------------------

def no_heads(recipe, model, persons):
    return {}


def ctlg_losses(model, batch, recipe, epoch, autocast):
    """The loss of one step of CTLG (arXiv 2311.09084): contrast at a very low temperature, where nearly all of the
    gradient goes to the hardest negative. feature_mixup mixes all pairs of a batch with others by one weight; the
    results are pairs."""
    mixup, B = None, len(batch["pid"])
    if recipe["feature_mixup"]:
        alpha = torch.tensor(recipe["feature_mixup"])
        weight = float(torch.distributions.Beta(alpha, alpha).sample())
        mixup = weight, torch.randperm(B, device=batch["pid"].device)
    with autocast():
        image = model.encode_image(batch["pixels"][0], mixup)                                           # (B, D)
        text = model.encode_text(batch["tokens"][0], mixup)
    image, text = losses.gather(image), losses.gather(text)
    label = torch.arange(len(image), device=image.device)               # pairs with the same label are positives
    if recipe["positives"] != "pair":
        label = losses.gather(batch["image" if recipe["positives"] == "image" else "pid"])
    return {"itc": recipe["itc"] * losses.nitc(image, text, label, model.scale())}      # N-ITC of unique labels is ITC


METHODS = {  # name: (recipe, heads, losses of a step)
    "tbps-clip": (TBPS_CLIP, tbps_clip_heads, tbps_clip_losses),
    "tbps-clip-simplified": (SIMPLIFIED, tbps_clip_heads, tbps_clip_losses),
    "baseline": (BASELINE, tbps_clip_heads, tbps_clip_losses),
    "irra": (IRRA, irra_heads, irra_losses),
    "uit": (UIT, irra_heads, irra_losses),
    "ctlg": (CTLG, no_heads, ctlg_losses),
}


# ---- optimisation ---------------------------------------------------------------------------------------------------

def lr_at(it, n, recipe):
    """Learning rate at iteration `it`, with n iterations per epoch: linear warm-up from lr_start to lr, then half a
    cosine to lr_end, or with decay_every a tenth of the rate every so many epochs.

    Per iteration, the warm-up ends at lr. Per epoch, the first epoch after it begins there (IRRA: 0.1, 0.28 ... 0.82,
    1)."""
    if recipe["per_epoch"]:
        it, n = it // n, 1
    warmup = round(recipe["warmup"] * n)
    if it < warmup:
        last = max(1, warmup - (not recipe["per_epoch"]))
        return recipe["lr_start"] + (recipe["lr"] - recipe["lr_start"]) * it / last
    if recipe["decay_every"]:
        return recipe["lr"] * 0.1 ** (it // (recipe["decay_every"] * n))
    done = (it - warmup) / max(1, recipe["epochs"] * n - warmup)
    return recipe["lr_end"] + 0.5 * (recipe["lr"] - recipe["lr_end"]) * (1 + math.cos(math.pi * done))


def lr_factor(name, recipe):
    """Factor of a parameter's learning rate: lr_new for layers that CLIP does not have, lr_bias for CLIP's biases.
    With official=1 by names: lr_new for cross-attention, its blocks and classifiers only, lr_bias for biases of the
    former two."""
    new, bias = name.startswith("heads."), name.endswith("bias")
    if recipe.get("official") and not re.match(r"heads\.(id|mlm\.(fc|ln|out))\.", name):
        new = new and not bias and re.search(r"\.(cross|blocks)\.", name)
    return recipe["lr_new"] if new else recipe["lr_bias"] if bias else 1.0


class HalfAdam(torch.optim.Adam):
    """Adam on pure fp16 weights, as the official code of IRRA and UIT trains. Gradients, moments and steps are
    rounded to fp16, and there is no fp32 copy that would sum up steps too small for fp16. At a rate of 1e-5, weights
    above 0.03 never move: a step is less than half the distance to the next fp16 number.

    halves: the parameters held in fp16. The model keeps them in fp32, with values that fp16 can represent."""

    def __init__(self, groups, halves, **options):
        self.copies = {p: p.detach().half() for p in halves}
        groups = [group | dict(params=[self.copies.get(p, p) for p in group["params"]]) for group in groups]
        super().__init__(groups, **options, foreach=False)  # the plain loop: the same rounding on any device
        self.write_back()

    @torch.no_grad()
    def write_back(self):
        for p, half in self.copies.items():
            p.copy_(half)

    def step(self, closure=None):
        for p, half in self.copies.items():
            half.copy_(p.detach())                                      # differs only after a checkpoint was loaded
            half.grad = None if p.grad is None else p.grad.half()
        super().step(closure)
        self.write_back()


def half_parameters(model):
    """The parameters that OpenAI's convert_weights turns into fp16: weights and biases of linear layers and
    convolutions, and the two projections. Norms, embeddings and single tokens stay in fp32."""
    layers = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    found = [p for layer in layers for p in layer.parameters()] + [model.image.proj, model.text.proj]
    return [p for p in found if p.requires_grad]


def make_optimizer(model, recipe, fused):
    """AdamW, where matrices decay and biases, norms, tokens and the temperature do not. With `coupled` Adam with an
    L2 penalty on all but biases, as IRRA has it. Each parameter group has a `factor` of the learning rate."""
    groups = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            decays = not name.endswith("bias") if recipe["coupled"] else p.ndim >= 2
            groups.setdefault((lr_factor(name, recipe), decays), []).append(p)
    groups = [dict(params=params, factor=factor, weight_decay=recipe["weight_decay"] if decays else 0.0)
              for (factor, decays), params in sorted(groups.items(), key=lambda g: (g[0][0], not g[0][1]))]
    options = dict(lr=recipe["lr"], betas=(0.9, recipe["beta2"]), eps=recipe["eps"])
    if recipe.get("half_weights"):
        return HalfAdam(groups, half_parameters(model), **options)
    return (torch.optim.Adam if recipe["coupled"] else torch.optim.AdamW)(groups, **options, fused=fused)


# ---- several processes ----------------------------------------------------------------------------------------------
#
# torchrun starts W processes of one command. Each encodes its part of every batch, gathers the features of all ranks
# (losses.gather), and computes the loss of the whole batch. The mean of their gradients is the gradient of one
# process with the whole batch, so all ranks make the same step.

def join_ranks(args):
    """Under torchrun: join its processes, with a GPU each. Only the first one prints and writes files."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return
    backend, gpu = "gloo", None
    if args.device.startswith("cuda"):
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
        backend, gpu = "nccl", torch.device(args.device)
        torch.cuda.set_device(gpu)
    torch.distributed.init_process_group(backend, device_id=gpu)
    atexit.register(torch.distributed.destroy_process_group)
    if losses.ranks()[0]:
        sys.stdout = open(os.devnull, "w")


def barrier():
    """Wait until all ranks are here."""
    if losses.ranks()[1] > 1:
        torch.distributed.barrier()


def average_over_ranks(tensors):
    """Replace each tensor by its mean over all ranks, in one message."""
    W = losses.ranks()[1]
    if W > 1 and tensors:
        flat = torch.cat([x.flatten() for x in tensors])
        torch.distributed.all_reduce(flat)
        for x, part in zip(tensors, flat.div_(W).split([x.numel() for x in tensors])):
            x.copy_(part.view_as(x))


class GradientMean:
    """Replaces gradients by their mean over all ranks while backward still runs: as soon as the gradients of some
    layers are complete (25 MB), they are sent. Call `wait` after backward. Does nothing with one process."""

    def __init__(self, parameters, bytes_at_once=25e6):
        self.limit, self.complete, self.sent = bytes_at_once, [], []
        if losses.ranks()[1] > 1:
            for p in parameters:
                if p.requires_grad:
                    p.register_post_accumulate_grad_hook(self.add)

    def add(self, p):
        self.complete.append(p.grad)
        if sum(grad.nbytes for grad in self.complete) > self.limit:
            self.send()

    def send(self):
        flat = torch.cat([grad.flatten() for grad in self.complete])
        self.sent.append((self.complete, flat, torch.distributed.all_reduce(flat, async_op=True)))
        self.complete = []

    def wait(self):
        if self.complete:
            self.send()
        for grads, flat, work in self.sent:
            work.wait()
            for grad, mean in zip(grads, flat.div_(losses.ranks()[1]).split([grad.numel() for grad in grads])):
                grad.copy_(mean.view_as(grad))
        self.sent = []


def any_rank(wanted, device):
    """Whether any rank wants it. All ranks must ask at the same step, for they communicate."""
    votes = torch.tensor(float(bool(wanted)), device=device)
    average_over_ranks([votes])
    return votes.item() > 0


# ---- training -------------------------------------------------------------------------------------------------------

def train(args, recipe, model, tokenizer, preprocessing, pairs, val, out, step_losses):
    """Train a model and write last.pt, best.pt and log.jsonl into the folder `out`.

    step_losses(model, batch, epoch, autocast) -> {name: weighted loss}: the losses of a step, whose sum is minimised.
    `epoch` counts the epochs done, with a fraction; encoders run under autocast(). pairs: data.Pairs; val: records of
    the validation split, or None. Ctrl-C and SIGTERM save last.pt and raise KeyboardInterrupt; --resume then
    continues bit for bit."""
    device, rank = torch.device(args.device), losses.ranks()[0]
    autocast, hint = prepare_model(args, recipe, model, pairs)
    optimizer = make_optimizer(model, recipe, fused=device.type == "cuda")
    gradient_mean = GradientMean(model.parameters())
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16" and not recipe.get("half_weights"))
    state = initial_state(args, model, optimizer, scaler, out)          # epoch, step, best, scores, minutes
    save = functools.partial(save_checkpoints, args, recipe, model, tokenizer, preprocessing, optimizer, scaler, state,
                             out, time.time() - 60 * state["minutes"])
    n = len(epoch_batches(args, recipe, pairs, epoch=0))                # steps; with samplers by person epochs differ
    loader = load_batches(args, recipe, tokenizer, pairs, state["epoch"], state["step"])
    val_set = evaluation.evaluation_set(val, preprocessing, tokenizer) if val else None
    if val and args.clip != "none" and state["epoch"] == state["step"] == 0:
        print(f"before training  val {evaluation.format_scores(validate(args, model, val_set, out, 0))}", flush=True)
    skipped = SkippedSteps(scaler)
    with stop_on_signal() as stop, training_bar(recipe, state, n) as bar, explain_out_of_memory(hint):
        for epoch in range(state["epoch"], recipe["epochs"]):
            batches, start = epoch_batches(args, recipe, pairs, epoch), state["step"]
            history, saved_at = LossHistory(), time.time()
            model.train()
            for i, batch in enumerate(itertools.islice(loader, len(batches) - start), start):   # goes on where it was
                it = epoch * n + i * n / len(batches)
                lr = lr_at(it, n, recipe)
                set_learning_rate(optimizer, lr)
                torch.manual_seed(data.derive_seed(args.seed, epoch, i, rank))      # of dropout: resume is exact

                parts = step_losses(model, batch, it / n, autocast)
                loss = total_loss(parts)
                model.zero_grad(set_to_none=True)
                scaler.scale(loss).backward()
                gradient_mean.wait()
                scaler.step(optimizer)                                  # skips the step if fp16 overflowed
                scaler.update()
                state["step"] = i + 1
                history.append(loss, parts)
                bar.update(recipe["batch"])
                last = i + 1 == len(batches)
                log_now = i % args.log_every == 0 or last               # not at every step: reading waits for the GPU
                save_now = wants_save(stop, saved_at, args, log_now)
                if log_now or save_now:
                    check_finite(history, epoch, start, pairs, batches, args, recipe, out)
                if log_now:
                    log_step(out, bar, history, skipped, model, at=[epoch, i + 1],
                             epoch=epoch + (i + 1) / len(batches), lr=lr)
                if save_now and not last:
                    save("last.pt")
                    saved_at = time.time()
                    stop_here(any_rank(stop, device), f"in epoch {epoch + 1}, step {i + 1} of {len(batches)}", out)
            state |= dict(epoch=epoch + 1, step=0)
            line = f"epoch {epoch + 1:3d}/{recipe['epochs']}  {history.summary(recipe['batch'])}"
            if val:
                state["scores"] = validate(args, model, val_set, out, epoch + 1)
                line += f"  val {evaluation.format_scores(state['scores'])}"
            print_above(bar, line + skipped.note(len(batches)))
            if not val or state["scores"]["R@1"] > state["best"]:       # without a validation split: the last epoch
                state["best"] = state["scores"].get("R@1", -1.0)
                save("best.pt")
            save("last.pt")
            stop_here(any_rank(stop, device), f"after epoch {epoch + 1}", out)


def validate(args, model, val_set, out, epoch):
    """The scores on the validation split after so many epochs, which are also logged."""
    scores = evaluation.evaluate(model, *val_set, args.device, args.workers)[0]["text to image"]
    write_log(out, at=[epoch, 0], epoch=epoch, val=scores)
    return scores


def prepare_model(args, recipe, model, pairs):
    """Move the model to its device, switch on what saves memory or time -> autocast, advice if memory is short."""
    device = torch.device(args.device)
    torch.set_float32_matmul_precision("high")                          # TF32 on CUDA, for what is not under autocast
    model.to(device)
    model.micro_batch = args.micro_batch
    model.image.recompute = model.text.recompute = args.checkpoint_blocks
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": torch.float32}[args.amp]
    autocast = functools.partial(torch.autocast, device.type, dtype=dtype, enabled=args.amp != "off")
    hint = memory_hint(args, recipe, model, pairs, autocast)
    if args.compile:                                                    # after the estimate, whose batches are small
        model.image.compile()
        model.text.compile()
    return autocast, hint


def encoder_memory(model, views, texts, autocast):
    """Bytes per pair that the encoders keep for backward, with so many views of an image and variations of a caption
    of 64 tokens: the slope between two and six pairs."""
    device, micro_batch = model.logit_scale.device, model.micro_batch

    def kept_bytes(B):
        kept = {}

        def keep(x):
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage()
            return x

        pixels = torch.zeros(B * views, 3, *model.arch["image_size"], device=device)
        tokens = torch.ones(B * texts, 64, dtype=torch.int64, device=device)            # as long as a long caption
        tokens[:, -1] = model.arch["vocab"] - 1                                         # EOT
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), autocast():
            features = model.encode_image(pixels), model.encode_text(tokens)                # holds what is kept
            return sum(storage.nbytes() for storage in kept.values())

    model.micro_batch = 0
    two, six = kept_bytes(2), kept_bytes(6)
    model.micro_batch = micro_batch
    return (six - two) / 4


def memory_hint(args, recipe, model, pairs, autocast):
    """On CUDA: print what training will need, and say what fits. The heads of a method come on top."""
    if not args.device.startswith("cuda"):
        return "a small --micro-batch fits"
    per_pair = encoder_memory(model, len(pairs.views), pairs.texts, autocast)
    fixed = 16 * sum(p.numel() for p in model.parameters())             # weight, gradient and two moments of Adam
    card, at_once = torch.cuda.get_device_properties(args.device).total_memory, recipe["batch"] // losses.ranks()[1]
    need = fixed + per_pair * (min(args.micro_batch, at_once) or at_once)
    fits = max(1, int((0.85 * card - fixed) / per_pair))
    hint = f"--micro-batch {fits} fits" if fits < at_once else f"{fits} pairs fit at once"
    print(f"memory: about {need / 1e9:.1f} GB, {per_pair / 1e6:.0f} MB a pair; of {card / 1e9:.0f} GB here, {hint}")
    return hint


@contextlib.contextmanager
def explain_out_of_memory(hint):
    try:
        yield
    except torch.OutOfMemoryError as e:
        raise ValueError(f"{str(e).split('. ')[0]}\n  By an estimate {hint}; --checkpoint-blocks needs less, too. Both "
                         "compute the same. Or lower --batch") from None


class SkippedSteps:
    """Counts the steps that were skipped because gradients overflowed in fp16: each halves the scale of the loss."""

    def __init__(self, scaler):
        self.scaler, self.scale, self.number, self.noted = scaler, scaler.get_scale(), 0, 0

    def update(self):
        """Facts for the log, nothing without fp16. Waits for the GPU."""
        if not self.scaler.is_enabled():
            return {}
        before, self.scale = self.scale, self.scaler.get_scale()
        self.number += max(0, round(math.log2(before / self.scale)))
        return dict(loss_scale=self.scale, skipped=self.number)

    def note(self, steps):
        """A warning if in an epoch of so many steps more than one in ten was skipped."""
        number, self.noted = self.number - self.noted, self.number
        return f"  WARNING: {number} steps skipped, gradients overflow in fp16; try --amp bf16" * (number > steps / 10)


def epoch_batches(args, recipe, pairs, epoch):
    """The batches of an epoch as lists of item numbers. The last, smaller one is dropped, but not by the official
    code of IRRA, UIT and CTLG. Raises ValueError if there is no batch, or if ranks cannot share batches equally."""
    W, size = losses.ranks()[1], recipe["batch"]
    if size % W:
        raise ValueError(f"a batch of {size} cannot be shared by {W} processes; choose a multiple with --batch")
    batches = data.batches(recipe["sampler"], pairs.pids, size, data.derive_seed(args.seed, epoch), pairs.images,
                           drop_last=not recipe.get("official"))
    batches = [items for items in batches if len(items) >= W]
    if not batches:
        raise ValueError(f"{len(pairs)} training pairs do not fill one batch of {size}; lower it with --batch")
    return batches


def load_batches(args, recipe, tokenizer, pairs, epoch, step):
    """Yields this rank's part of every batch, on the device, from a step of an epoch to the end of training. One loader
    serves all epochs, so its processes start once."""
    rank, W = losses.ranks()
    first = epoch_batches(args, recipe, pairs, epoch)
    one_person = sum(len({pairs.pids[j] for j in items}) == 1 for items in first)
    if recipe.get("triplet") and one_person:
        print(f"{one_person} of {len(first)} batches show one person only; the triplet loss is 0 there")

    def rank_batches():
        for e in range(epoch, recipe["epochs"]):
            for items in epoch_batches(args, recipe, pairs, e)[step if e == epoch else 0:]:
                yield [(e, item) for item in items[rank * (len(items) // W):(rank + 1) * (len(items) // W)]]

    collate = functools.partial(data.collate, tokenizer, mask=mask_rates(recipe), trim=not recipe.get("official"))
    loader = torch.utils.data.DataLoader(
        pairs, batch_sampler=rank_batches(), num_workers=args.workers, collate_fn=collate,
        worker_init_fn=ignore_signals, pin_memory=args.device.startswith("cuda"))
    return copy_to_device(loader, torch.device(args.device), recipe["norm"])


def to_device(batch, device, norm):
    """The batch with its tensors on the device, where drawn views (--augment-on-device) are made."""
    on_cuda, tensors = device.type == "cuda", {name: x for name, x in batch.items() if torch.is_tensor(x)}
    batch = batch | {name: x.to(device, non_blocking=on_cuda) for name, x in tensors.items()}
    return batch if "pixels" in batch else data.make_views(batch, norm)


def copy_to_device(batches, device, norm):
    """Yield batches with their tensors on the device. On CUDA each is copied, on a side stream, while the step before
    is computed."""
    if device.type != "cuda":
        for batch in batches:
            yield to_device(batch, device, norm)
        return
    side, ready = torch.cuda.Stream(device), None
    for batch in itertools.chain(batches, [None]):
        torch.cuda.current_stream(device).wait_stream(side)             # for the copy of `ready`, not for the next one
        following = None
        if batch:
            with torch.cuda.stream(side):
                following = to_device(batch, device, norm)
        if ready:
            for x in ready.values():                                    # its memory is free after the step, not before
                x.record_stream(torch.cuda.current_stream(device))
            yield ready
        ready = following


def total_loss(parts):
    """The sum of a step's losses {name: weighted loss}. ValueError, for the author of a step, if it has no gradient."""
    parts = parts or {}                                                 # None: the step forgot to return them
    for name, value in parts.items():
        require(torch.is_tensor(value), f"the step's loss {name!r} is {value!r}, it must be a tensor with a gradient")
    loss = sum(parts.values())
    require(parts and loss.requires_grad, f"the step's losses ({', '.join(parts) or 'none'}) have no gradient: a step "
            "returns {name: weight * loss} for every loss whose weight in the recipe is above 0")
    return loss


class LossHistory:
    """The losses of an epoch's steps. Steps only append, since reading a number waits for the GPU."""

    def __init__(self):
        self.names, self.rows, self.logged, self.began = [], [], 0, time.time()

    def append(self, loss, parts):
        self.names = ["loss", *parts]
        self.rows.append(torch.stack([loss, *parts.values()]).detach())

    def recent(self):
        """The losses of the steps since the last logged one, mean over all ranks: (steps, losses)."""
        rows = torch.stack(self.rows[self.logged:])
        average_over_ranks([rows])
        return rows

    def pop_means(self):
        """The mean of each recent loss, {name: value}. These steps are then logged."""
        means = dict(zip(self.names, self.recent().mean(dim=0).tolist()))
        self.logged = len(self.rows)
        return means

    def summary(self, batch):
        """The mean losses of the epoch, and the speed."""
        means = dict(zip(self.names, torch.stack(self.rows).mean(dim=0).tolist()))
        return f"{format_losses(means)}  {len(self.rows) * batch / (time.time() - self.began):.0f} pairs/s"


def format_losses(means):
    return "  ".join(f"{name} {value:.3f}" for name, value in means.items())


def log_step(out, bar, history, skipped, model, **place):
    """Log the mean losses since the last logged step, and show them beside the progress bar."""
    means = history.pop_means()
    bar.set_postfix_str(format_losses(means), refresh=False)
    write_log(out, **place, scale=model.scale().item(), **means, **skipped.update())


def set_learning_rate(optimizer, lr):
    for group in optimizer.param_groups:
        group["lr"] = lr * group["factor"]


def wants_save(stop, saved_at, args, log_now):
    """Whether to save within an epoch: on a signal, or after --save-minutes. Several ranks agree, at logged steps."""
    wanted = bool(stop) or time.time() - saved_at > 60 * args.save_minutes
    return wanted if losses.ranks()[1] == 1 else log_now and any_rank(wanted, args.device)


def check_finite(history, epoch, start, pairs, batches, args, recipe, out):
    """Raises FloatingPointError, naming step and images, if a recent loss is not finite. start: number of the first
    step of the history."""
    bad = (~history.recent().isfinite().all(dim=1)).nonzero()
    if not len(bad):
        return
    step = start + history.logged + int(bad[0])
    images = [pairs.items[j][0]["image"] for j in batches[step][:4]]
    paths = ", ".join(str(image) for image in images if isinstance(image, Path))
    raise FloatingPointError(
        f"the loss is not finite in epoch {epoch + 1}, step {step + 1}" + f" (images {paths} ...)" * bool(paths) +
        f"\n  Try a lower --lr (now {recipe['lr']:g})" + ", --amp bf16 or off" * (args.amp == "fp16") +
        f"; {out}/last.pt, if there, is from before")


def training_bar(recipe, state, n):
    done = (state["epoch"] * n + state["step"]) * recipe["batch"]
    return data.progress_bar(total=recipe["epochs"] * n * recipe["batch"], initial=done, unit=" pairs", desc="training",
                             smoothing=0.05, disable=losses.ranks()[0] > 0)


def print_above(bar, line):
    """Print a line while a progress bar is on the terminal."""
    if sys.stderr.isatty():
        bar.write(line)
    else:
        print(line, flush=True)


def save_checkpoints(args, recipe, model, tokenizer, preprocessing, optimizer, scaler, state, out, started, name):
    """Write last.pt, from which a run resumes, or best.pt, which has no heads and no optimizer."""
    state["minutes"] = (time.time() - started) / 60
    contents = checkpoint_dict(args, recipe, model, tokenizer, preprocessing, heads=name == "last.pt") | state
    if name == "last.pt":
        contents |= dict(optimizer=optimizer.state_dict(), scaler=scaler.state_dict(),
                         log=(out / "log.jsonl").read_text())
    save(out / name, contents)


def initial_state(args, model, optimizer, scaler, out):
    """Where training begins: epochs done, steps done in the next one, best and last scores, minutes spent. With
    --resume what save_checkpoints wrote, and model, optimizers, scaler and log are as they were."""
    state = dict(epoch=0, step=0, best=-1.0, scores={}, minutes=0.0)
    if args.resume:
        saved = read_file(out / "last.pt")
        model.load_state_dict(saved["weights"])
        optimizer.load_state_dict(saved["optimizer"])
        scaler.load_state_dict(saved["scaler"])
        if losses.ranks()[0] == 0:                                      # steps after the checkpoint are logged again
            (out / "log.jsonl").write_text(saved["log"])
        state = {k: saved[k] for k in state}
    return state


@contextlib.contextmanager
def stop_on_signal():
    """A list that becomes true on Ctrl-C or SIGTERM, in place of ending the program at once."""
    stop = []
    old = {s: signal.signal(s, lambda number, frame: stop.append(number)) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def stop_here(wanted, where, out):
    if wanted:
        raise KeyboardInterrupt(f"stopped {where}; {out}/last.pt is saved. Go on with the same command and --resume")


def ignore_signals(_):
    """For the loader's processes: Ctrl-C reaches them too, but the training process decides."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


# ---- the command line -----------------------------------------------------------------------------------------------

def parse_args(argv=None):
    """-> args, recipe. The command line beats the recipe, the recipe beats the default."""
    recipes = {name: recipe for name, (recipe, *_) in METHODS.items()}
    args, published = parse_options(training_options(__doc__, recipes, KEYS, default_method, argv), recipes, argv)
    return args, resolve_recipe(args, published)


def default_method(dataset):
    return "tbps-clip-simplified" if dataset.startswith("toy") else "tbps-clip"


def training_options(description, recipes, keys, default_method, argv):
    """The parser of the options that training commands share. Its --help ends with the keys of one method: of
    --method M, or of the default."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--dataset", choices=data.DATASETS, default="toy", help="default: toy, synthetic pedestrians")
    first.add_argument("--method", help=f"{', '.join(recipes)} (default: {default_method('cuhk')}; on synthetic "
                       f"pedestrians {default_method('toy')})")
    chosen, _ = first.parse_known_args(argv)
    method = chosen.method if chosen.method in recipes else default_method(chosen.dataset)
    p = argparse.ArgumentParser(
        usage="%(prog)s [options]", description=description, parents=[first],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"keys of {method} for --set, as published (other methods: --method M --help):\n"
               f"{format_keys(recipes[method], keys)}\non synthetic pedestrians: {format_values(TOY)}")
    g = p.add_argument_group("data")
    g.add_argument("--data-root", default="data",
                   help="the data set's folder or its parent; for csv the file (default: data)")
    g.add_argument("--val", choices=["auto", "none"], default="auto",
                   help="none: no validation split is held out, and the last epoch is kept")
    g.add_argument("--extra", nargs="+", default=[], metavar="DIR", help="also train on these folders of generate.py")
    g.add_argument("--min-score", nargs="+", action="extend", default=[], metavar="KEY=VALUE",
                   help="of these pairs only those with at least these scores, like words=0.02")
    g.add_argument("--share", type=float, default=1.0, help="train on this fraction of the persons, drawn by the seed")
    g.add_argument("--skip-bad", action="store_true", help="skip unreadable images (default: stop at the first)")
    g = p.add_argument_group("model")
    g.add_argument("--clip", help="weights to start from: a file, folder, hub id, checkpoint, or none "
                   f"(default: {OPENAI_CLIP}; on synthetic pedestrians lab/toyclip)")
    g.add_argument("--tokenizer", help="CLIP's vocabulary, if it is not beside the weights: tokenizer.json or "
                   "bpe_simple_vocab_16e6.txt.gz")
    g.add_argument("--size", choices=SIZES,
                   help="architecture for --clip none (default: ViT-B/16; on synthetic pedestrians toy)")
    g = p.add_argument_group("recipe")
    g.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE",
                   help="change keys of the recipe, listed below")
    for key in ("epochs", "batch", "lr"):
        g.add_argument(f"--{key}", dest="set", action="append", type=f"{key}={{}}".format, metavar=key.upper(),
                       help=f"short for --set {key}=")
    g = p.add_argument_group("run")
    g.add_argument("--seed", type=int, default=0, help="of weights, order, augmentation and dropout (default: 0)")
    g.add_argument("--out", help="the run folder (default: runs/DATASET-METHOD-SEED)")
    g.add_argument("--resume", action="store_true",
                   help="continue from last.pt in the run folder; other options need not be given")
    g.add_argument("--overwrite", action="store_true", help="replace the run in the run folder")
    g.add_argument("--save-minutes", type=float, default=10, help="minutes between saves within an epoch (default: 10)")
    g.add_argument("--log-every", type=int, default=10, help="steps between lines of log.jsonl (default: 10)")
    g = p.add_argument_group("hardware")
    g.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                   help="cuda, cpu or mps (default: cuda where there is one)")
    g.add_argument("--amp", choices=["auto", "bf16", "fp16", "off"], default="auto",
                   help="precision of the encoders (default: bf16 or fp16 on CUDA, off elsewhere)")
    g.add_argument("--micro-batch", type=int, default=0, metavar="M",
                   help="encode M samples at a time, twice: same gradient, less memory")
    g.add_argument("--checkpoint-blocks", action="store_true",
                   help="recompute transformer blocks in backward: less memory")
    g.add_argument("--compile", action="store_true",
                   help="torch.compile the towers: a slow first step, then faster on a GPU")
    g.add_argument("--augment-on-device", action=argparse.BooleanOptionalAction, help="make image views on the device, "
                   f"not in the loader (default: on CUDA); never for image_aug={', '.join(data.CPU_ONLY)}")
    g.add_argument("--workers", type=int, help="processes that load images (default: the cores, at most 8; on "
                   "synthetic pedestrians 0)")
    return p


def format_values(values):
    return " ".join(f"{k}={v}" for k, v in values.items())


def format_keys(recipe, keys):
    """A line of --help per key of a recipe: name, value, help."""
    missing = "", "no help: add a row for this key to the table of keys"
    return "".join(f"  {k:17}{str(v):11}{keys.get(k, missing)[1]}\n" for k, v in recipe.items())


def parse_options(p, recipes, argv, checkpoints=("last.pt",), default_method=default_method):
    """-> args, the recipe without --set. With --resume the options of the run come first, those of `argv` after them;
    check_run compares both. The former are in the first of `checkpoints` (names in the run folder) that exists."""
    def parse(argv):
        args = p.parse_args(argv)
        args.method, args.min_score = args.method or default_method(args.dataset), list(dict.fromkeys(args.min_score))
        args.out = f"runs/{args.dataset}-{args.method}-{args.seed}" if args.out is None else args.out
        return args

    argv = sys.argv[1:] if argv is None else [str(text) for text in argv]
    args = parse(argv)
    found = [Path(args.out, name) for name in checkpoints if args.resume and Path(args.out, name).exists()]
    if found:
        argv = read_file(found[0]).get("argv", []) + argv               # older runs have none: check_run refuses them
        args = parse(argv)
    args.argv = [text for text in argv if text not in ("--resume", "--overwrite")]
    if args.method not in recipes:
        raise ValueError(f"there is no method {args.method!r} here but {', '.join(recipes)}; lcr2s and lcr2s-paper are "
                         "trained by distill.py, all others by tbps.py")
    return args, recipes[args.method] | toy_values(args, recipes[args.method])


def toy_values(args, recipe):
    """What the recipe gets on synthetic pedestrians."""
    if not args.dataset.startswith("toy"):
        return {}
    return {k: v for k, v in TOY.items() if k in recipe}


def given_keys(args):
    """The keys of the recipe on the command line: {key: text of its value}."""
    return {key: value for key, _, value in (text.partition("=") for text in args.set)}


def resolve_recipe(args, recipe, keys=KEYS, choices=CHOICES):
    """-> the recipe with the values of the command line, checked. Completes args. Raises ValueError in words."""
    recipe, toy = dict(recipe), args.dataset.startswith("toy")
    for key, value in given_keys(args).items():
        if key not in recipe:
            raise ValueError(f"the recipe of {args.method} has no key {key!r}; it has {', '.join(recipe)}")
        recipe[key] = parse_value(key, value, recipe[key])
    check_recipe(recipe, keys, choices)
    args.clip = args.clip or (str(TOY_CLIP) if toy else OPENAI_CLIP)
    args.size = args.size or ("toy" if toy else "ViT-B/16")
    args.workers = args.workers if args.workers is not None else 0 if toy else default_workers()
    check_options(args, recipe)
    if args.augment_on_device is None:
        args.augment_on_device = args.device.startswith("cuda")
    args.augment_on_device &= recipe["image_aug"] not in data.CPU_ONLY
    if args.amp == "auto":
        fp16 = recipe.get("half_weights") or not torch.cuda.is_bf16_supported(including_emulation=False)
        args.amp = ("fp16" if fp16 else "bf16") if args.device.startswith("cuda") else "off"
    return recipe


def keep_image_size(args, recipe):
    """Put the image size that weights name into the recipe, unless the command line gives one. A model of the size of
    OpenAI's gets that of the recipe, which was made for it."""
    given = {"height", "width"} & given_keys(args).keys()
    if args.clip in ("none", OPENAI_CLIP) or args.dataset.startswith("toy") or given:
        return
    path = find_weights(args.clip)
    size = read_checkpoint(path)["arch"]["image_size"] if is_checkpoint(path) else read_config(path)["image_size"]
    if size and tuple(size) not in OPENAI_SIZES:
        recipe["height"], recipe["width"] = size


def default_workers():
    """The cores that this process may use, at most 8."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(8, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def parse_value(key, text, default):
    """The text of a --set value as the type of the key's default."""
    kind = {bool: "0 or 1", int: "a whole number", float: "a number"}.get(type(default))
    try:
        if isinstance(default, bool):
            return {"0": False, "1": True, "false": False, "true": True}[text.lower()]
        return type(default)(text)
    except (KeyError, ValueError):
        raise ValueError(f"{key} takes {kind}, not {text!r}") from None


def require(condition, sentence):
    """All checks of options use this: a sentence for the user."""
    if not condition:
        raise ValueError(sentence)


def check_recipe(recipe, keys, choices):
    """Raises ValueError if a value makes no sense."""
    r = recipe
    for key, allowed in choices.items():
        require(r.get(key, allowed[0]) in allowed, f"{key} must be one of {', '.join(allowed)}, not {r.get(key)!r}")
    for key, value in r.items():
        require(not isinstance(value, float) or 0 <= value < math.inf, f"{key}={value} must be a number from 0 up")
        require(key not in FRACTIONS or value <= 1, f"{key}={value} must be a fraction from 0 to 1")
    for key, least in dict(epochs=1, batch=2, height=1, width=1, stride=0).items():
        require(r[key] >= least, f"{key}={r[key]} is too small: it must be at least {least}" +
                ", as a single pair has no negatives" * (key == "batch"))
    for key in ("eps", "ritc_eps", "depth"):
        require(r.get(key, 1) > 0, f"{key}={r.get(key)} must be above 0")
    require(max(r["height"], r["width"]) <= 4096, "height and width are at most 4096 pixels")
    require(r["beta2"] < 1, f"beta2={r['beta2']} must be below 1")
    weights = [k for k in r if k not in keys or keys[k][1].startswith("weight of")]     # without help it may be one
    require(any(r[k] for k in weights), "all losses have the weight 0: nothing to learn")
    require(mask_rates(r) != (0, 0), "mask_content and mask_other are both 0; mlm=0 mask_all=0 switches masking off")
    require(not r.get("half_weights") or r["coupled"] and r["eps"] >= 6e-8, "half_weights=1 trains with Adam and an "
            f"eps that fp16 can represent: set coupled=1 eps=1e-3, not {r['coupled']:d} and {r['eps']:g}")


def check_options(args, recipe):
    """Raises ValueError if an option makes no sense."""
    require("" not in (args.out, args.clip, args.tokenizer, *args.extra),
            "an option was given an empty text; is a variable of the shell not set?")
    require(len({Path(folder).resolve() for folder in args.extra}) == len(args.extra), "--extra names a folder twice")
    require(args.extra or not args.min_score, "--min-score selects generated pairs; name their folder with --extra")
    require(args.micro_batch >= 0, "--micro-batch must be at least 1")
    require(not (args.micro_batch and recipe.get("feature_mixup")),
            "--micro-batch does not go with feature_mixup, which mixes the whole batch inside the encoder")
    require(args.seed >= 0 and args.workers >= 0 and args.save_minutes >= 0 and args.log_every >= 1,
            "--seed, --workers and --save-minutes are at least 0, --log-every at least 1")
    require(0 < args.share <= 1, f"--share {args.share} must be above 0 and at most 1")
    check_device(args.device)


def check_device(device):
    require(re.fullmatch(r"cpu|mps|cuda(:\d+)?", device), f"--device is cpu, mps, cuda or cuda:N, not {device!r}")
    require(not device.startswith("cuda") or torch.cuda.is_available(),
            "torch sees no CUDA device here; use --device cpu, or install the driver")


def format_recipe(args, recipe, published):
    """The effective recipe in lines: what differs from the method's published values, and because of what."""
    toy, given = toy_values(args, recipe), given_keys(args)
    reasons = {}
    for key, value in recipe.items():
        if value != published[key]:
            reason = "command line" if key in given else "synthetic pedestrians" if key in toy else "weights"
            reasons.setdefault(reason, []).append(f"{key}={value}")
    lines = [f"  {reason}: {' '.join(values)}" for reason, values in reasons.items()]
    return "\n".join([f"recipe: {args.method} as published" + ", except" * bool(lines), *lines])


# ---- run folder and main --------------------------------------------------------------------------------------------

RUN_FILES = ["last.pt", "best.pt", "log.jsonl", "report.html", "code"]
# Options that a resumed run may change, as they do not decide what is computed. (stage: distill.py)
FREE_OPTIONS = ["device", "workers", "save_minutes", "log_every", "micro_batch", "checkpoint_blocks", "stage",
                "augment_on_device"]


def saved_options(args):
    """The options that --resume compares. What --set changes is in the recipe."""
    return {k: v for k, v in vars(args).items() if k not in ("argv", "resume", "overwrite", "out", "set")}


def check_run(args, recipe, out):
    """Before anything is read: a new run must not overwrite an old one, a resumed one must have the same options."""
    last = out / "last.pt"
    require(not (args.resume and args.overwrite), "--resume continues a run, --overwrite deletes it: choose one")
    if not args.resume:
        require(args.overwrite or not last.exists(), f"{out} holds a run already; --resume continues it, --overwrite "
                "deletes it, --out or --seed makes another")
        is_run, is_empty = last.exists() or (out / "log.jsonl").exists(), out.is_dir() and not any(out.iterdir())
        require(not out.exists() or is_run or is_empty, f"{out} exists and is not a run; name another --out")
        return
    saved = read_file(data.need(last, "the checkpoint to resume from", "start the run without --resume"))
    require(args.method != saved["method"] or recipe.keys() == saved["recipe"].keys(), f"{last} is of another version "
            f"of this program, whose runs cannot be resumed; --clip {last} starts a new run from its weights")
    before, now = saved["args"] | saved["recipe"], saved_options(args) | recipe
    differ = [k for k in sorted(before.keys() | now.keys()) if before.get(k) != now.get(k) and k not in FREE_OPTIONS]
    changed = "".join(f"\n  {k}: {before.get(k)!r} then, {now.get(k)!r} now" for k in differ)
    if any(k.endswith("epochs") for k in differ):
        changed += ("\n  The learning rate of every step depends on the number of epochs: a longer run differs from "
                    "the first step on.")
    require(not differ, f"{last} was made with other options, so going on would not be the same run:{changed}\n"
            f"  --clip {last} with another --out starts a new run from these weights")


def open_run(args, out):
    """Prepare the folder of a new run, when all is ready to start: remove an old run, copy the scripts."""
    barrier()                                                           # all ranks have checked it
    if losses.ranks()[0] == 0 and not args.resume:
        out.mkdir(parents=True, exist_ok=True)
        for path in (out / name for name in RUN_FILES):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        (out / "code").mkdir()
        (out / "log.jsonl").touch()
        for file in Path(__file__).parent.glob("*.py"):
            shutil.copy(file, out / "code")
    barrier()


def load_data(args):
    """-> {split: records}. The training split has what --extra adds; --skip-bad removes unreadable images."""
    for folder in args.extra:                                           # first: reading a data set takes a while
        data.need(Path(folder, "pairs.jsonl"), "the list of generated pairs", "generate.py writes such folders")
    names = ["train", "val", "test"] if args.val == "auto" else ["train", "test"]
    splits = {name: data.read(args.dataset, args.data_root, name, args.val == "auto") for name in names}
    chosen = {r["pid"] for r in splits["train"]}
    if args.share < 1:
        number = max(1, round(args.share * len(chosen)))
        chosen = set(random.Random(f"share {args.seed}").sample(sorted(chosen), number))
        splits["train"] = [r for r in splits["train"] if r["pid"] in chosen]
    for folder in args.extra:
        first_pid = 1 + max(r["pid"] for r in splits["train"])
        splits["train"] = splits["train"] + load_generated(args, folder, chosen, first_pid)
    for name, records in splits.items():
        if args.skip_bad:
            bad = data.unreadable_images(records)
            for _, reason in bad:
                print(f"skipped: {reason}")
            splits[name] = records = [r for r in records if not any(r is b for b, _ in bad)]
        print(f"{args.dataset} {name}: " + "{:,} persons, {:,} images, {:,} captions".format(*data.counts(records)))
    return splits


def load_generated(args, folder, sources, first_pid):
    """Generated pairs that pass --min-score, with new person ids; with --share only those of `sources` (pids)."""
    pairs = data.read("pairs", folder, "train", hold_out=False)
    good = data.filter_by_score(pairs, args.min_score)
    if args.share < 1:
        good = [r for r in good if r["source_pid"] in sources]
    print(f"{folder}: {len(good):,} of {len(pairs):,} generated pairs" + " have these scores" * bool(args.min_score) +
          " and are of these persons" * (args.share < 1))
    pids = {pid: n for n, pid in enumerate(sorted({r["pid"] for r in good}), start=first_pid)}
    return [r | dict(pid=pids[r["pid"]]) for r in good]


def prepare(args, recipe, records, make_heads):
    """-> model, tokenizer, pairs, preprocessing: what `train` takes, from the training records."""
    r, size = recipe, (recipe["height"], recipe["width"])
    if r["back_translation"] and not any(record.get("captions_bt") for record in records):
        print("no back-translations (captions_bt) in these data: that augmentation is off")
    views = {}
    if "mvs" in r:                                                      # a recipe of TBPS-CLIP
        views = dict(views=2 if r["mvs"] else 1, self_views=2 if r["ss"] else 0,
                     texts=2 if r["mvs_text"] else 1, self_texts=2 if r["ss_text"] else 0)
    pairs = data.Pairs(records, size, args.seed, **views, image_aug=r["image_aug"], norm=r["norm"], resize=r["resize"],
                       clean=r["clean"], back_translation=r["back_translation"], mixup=r.get("mixup", 0.0),
                       text={k: r[k] for k in TEXT_AUG} | dict(protect=not r.get("official")),
                       on_device=args.augment_on_device)
    require(pairs.persons >= 2, "all training images show one person: there are no negatives")
    masked = mask_rates(r) is not None
    if args.tokenizer or args.clip != "none":
        tokenizer = tokenizer_for(args.clip, args.tokenizer, masked)
    else:
        tokenizer = data.train_tokenizer([c for record in records for c in record["captions"]], mask=masked)
    model = build_model(args, recipe, tokenizer, pairs.persons, make_heads)
    if r["warmup"] >= r["epochs"]:
        print(f"note: the warm-up takes {r['warmup']:g} of {r['epochs']} epochs, so the rate never reaches its peak; "
              "see --set warmup=")
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    print(f"{args.method}: {trained:,} parameters trained of {total:,}; "
          f"{size[0]}x{size[1]} pixels, {model.image.grid[0]}x{model.image.grid[1]} patches; batch {r['batch']}, "
          f"{r['epochs']} epochs; {args.device}, amp {args.amp}", flush=True)
    config = read_config(find_weights(args.clip)) if args.clip != "none" else dict(file=None)
    if config["file"] and config["norm"] != r["norm"]:
        print(f"note: images are normalised with norm={r['norm']}, as the recipe says; the weights were trained with "
              f"norm={config['norm']} ({config['file']})")
    return model, tokenizer, pairs, data.Preprocessing(size, r["norm"], r["eval_resize"], r["clean"])


def build_model(args, recipe, tokenizer, persons, make_heads):
    """The model of a run, with its method's heads. ValueError if tokenizer and weights do not belong together."""
    torch.manual_seed(data.derive_seed(args.seed))
    options = dict(text_dropout=recipe["text_dropout"], lock_patch=recipe["lock_patch"])
    size, stride = (recipe["height"], recipe["width"]), recipe["stride"]
    if args.clip == "none":
        sizes = SIZES[args.size] | dict(image_size=size, stride=stride, vocab=tokenizer.vocab)
        model = DualEncoder(**sizes, **options)
    else:
        model = load_clip(args.clip, size, stride, **options)
    require(tokenizer.vocab == model.arch["vocab"], f"the tokenizer has {tokenizer.vocab:,} tokens, the weights "
            f"{model.arch['vocab']:,}: they do not belong together")
    for name, head in make_heads(recipe, model, persons).items():
        model.heads[name] = head
    if recipe["tau"]:
        model.logit_scale.data.fill_(math.log(1 / recipe["tau"]))
        model.logit_scale.requires_grad_(False)
    return model


@torch.no_grad()
def restorations(model, tokenizer, preprocessing, records, recipe, number=8):
    """HTML: images that the restoration head completes with their caption, and with one of another first colour."""
    examples = [(r, c, data.change_colour(c)) for r in records for c in r["captions"][:1] if data.change_colour(c)]
    rows = []
    for record, *captions in examples[::max(1, len(examples) // number)][:number]:
        pictures = restored_pictures(model, tokenizer, preprocessing, record, captions, recipe, seed=len(rows))
        figures = "".join(evaluation.figure(x, name, name, "large", 192) for name, x in pictures.items())
        said = "<br>".join(f"{n}: {html.escape(caption)}" for n, caption in enumerate(captions, start=1))
        rows.append(f"<div class=row><p>{said}</p>{figures}</div>")
    if not rows:
        return ""
    return ("<p class=legend>The grey image; its visible patches, with the dropped ones in violet; the dropped patches "
            "restored with caption 1; with caption 2, which names another first colour; the image.</p>" + "".join(rows))


def restored_pictures(model, tokenizer, preprocessing, record, captions, recipe, seed):
    """{name: PIL image}: how an image is restored with each of two captions, and what the head sees of it."""
    device, patch = model.logit_scale.device, model.arch["patch"]
    mean, std = (torch.tensor(v, device=device)[:, None, None] for v in (preprocessing.mean, preprocessing.std))
    pixels = preprocessing.image(record["image"])[None].to(device)
    image = pixels * std + mean                                         # in [0, 1]
    grey_patches, restored = patchify(grey(image), patch), []           # (1, N, 3 patch^2)
    for tokens in (tokenizer([preprocessing.text(caption)]) for caption in captions):
        text = model.eval().text_tokens(tokens, trim=not recipe["official"])
        generator = torch.Generator(device).manual_seed(seed)           # drops the same patches for both captions
        patches, dropped = restore(model, pixels, text, None, recipe, generator)
        patches = patchify(unpatchify(patches, model.image.grid, patch) * std + mean, patch)
        restored.append(torch.where(dropped[..., None], patches, grey_patches))
    violet = grey_patches.new_tensor([0.80, 0.75, 0.95]).repeat(patch ** 2)
    visible = torch.where(dropped[..., None], violet, grey_patches)
    names = ["grey image", "visible patches", "restored with caption 1", "restored with caption 2", "image"]
    shown = [grey(image), *(unpatchify(p, model.image.grid, patch) for p in (visible, *restored)), image]
    return {name: data.load_image((255 * x[0].clamp(0, 1)).byte().permute(1, 2, 0).cpu().numpy())
            for name, x in zip(names, shown)}


def score_run(args, recipe, records, out, *chapters):
    """Score best.pt and last.pt on the test split, once; write report.html with more chapters (heading, HTML)."""
    rows, minutes = {}, read_file(out / "last.pt")["minutes"]           # of all parts of a run that was resumed
    for name in ("last.pt", "best.pt"):
        model, tokenizer, preprocessing = load_checkpoint(out / name, args.device)
        inputs = evaluation.evaluation_set(records, preprocessing, tokenizer)
        scores, image, text = evaluation.evaluate(model, *inputs, args.device, args.workers)
        rows |= {f"{name}, {way}": s for way, s in scores.items()}
    write_log(out, at=[recipe["epochs"], 1], test=rows)
    if losses.ranks()[0] == 0:
        captions, pid, source = [c for r in records for c in r["captions"]], *inputs[2:]
        sheet = evaluation.retrieval_sheet(captions, text, image, pid, source,
                                           lambda j: data.load_image(records[j]["image"]))
        write_report(out, args, recipe, rows, minutes, ("Queries and their top 10 (best.pt, test split)", sheet),
                     *chapters)
    print(f"trained in {minutes:.1f} minutes; report: {out / 'report.html'}")
    if other := rows.get(f"best.pt, {evaluation.EXCLUDED}"):
        print(f"test, excluding the source image of each caption: {evaluation.format_scores(other)}")
    print(f"test {evaluation.format_scores(rows['best.pt, text to image'])}", flush=True)


def write_report(out, args, recipe, rows, minutes, *chapters):
    """report.html: scores, curves, chapters (heading, HTML), settings."""
    lines = read_log(out)
    steps, vals = [x for x in lines if "loss" in x], [x for x in lines if "val" in x]
    facts = ("at", "epoch", "lr", "scale", "loss_scale", "skipped")
    names = [k for k in (steps[0] if steps else []) if k not in facts]
    curves = evaluation.curve("losses", {k: [(x["epoch"], x[k]) for x in steps] for k in names})
    metrics = vals[0]["val"] if vals else []
    curves += evaluation.curve("validation, %", {k: [(x["epoch"], x["val"][k]) for x in vals] for k in metrics})
    curves += evaluation.curve("learning rate", {"lr": [(x["epoch"], x["lr"]) for x in steps]})
    curves += evaluation.curve("scale = 1 / temperature", {"scale": [(x["epoch"], x["scale"]) for x in steps]})
    settings = "".join(f"<div>{k} = {v}</div>" for k, v in sorted((saved_options(args) | recipe).items()))
    evaluation.write_page(out / "report.html", f"{args.method} on {args.dataset}, seed {args.seed}", [
        ("Test scores, %", evaluation.table(rows)), ("Curves", curves), *chapters,
        ("Settings", f"<p>trained in {minutes:.1f} minutes on {args.device}</p><div class=settings>{settings}</div>")])


def main():
    args, recipe = parse_args()
    published, make_heads, losses_of_step = METHODS[args.method]
    out = Path(args.out)
    join_ranks(args)
    keep_image_size(args, recipe)
    check_run(args, recipe, out)
    print(format_recipe(args, recipe, published))
    splits = load_data(args)
    model, tokenizer, pairs, preprocessing = prepare(args, recipe, splits["train"], make_heads)
    open_run(args, out)

    def step_losses(model, batch, epoch, autocast):
        return losses_of_step(model, batch, recipe, epoch, autocast)

    train(args, recipe, model, tokenizer, preprocessing, pairs, splits.get("val"), out, step_losses)
    chapters = []
    if recipe.get("restoration"):
        shown = restorations(model, tokenizer, preprocessing, splits["test"], recipe)
        chapters = [("Restorations (last.pt, test split)", shown)]
    score_run(args, recipe, splits["test"], out, *chapters)


if __name__ == "__main__":
    data.command(main)
