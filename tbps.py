"""Text-based person search: find a person in a picture collection by a sentence. The model, CLIP weights, and training.

    python tbps.py                                          built-in toy people, from scratch, on a laptop's CPU
    python tbps.py --dataset cuhk --data-root DIR           TBPS-CLIP (AAAI 2024) on CUHK-PEDES, from OpenAI's CLIP ViT-B/16
    python tbps.py --dataset cuhk --method baseline         plain fine-tuning, the row everything is measured against
    python tbps.py --dataset cuhk --method uit              UIT (2023), or irra: IRRA (CVPR 2023)
    python tbps.py --set mvs=0 citc=0 tau=0.01              any key of the method's recipe; --help lists them

A run writes runs/DATASET-METHOD-SEED/: last.pt, best.pt (best on the validation split), log.jsonl, report.html, and a copy of
the scripts. Ctrl-C saves; --resume goes on bit for bit where it stopped. The last line printed is the test score of best.pt.

Letters in all files: B pairs in a batch, T tokens, C width, H heads, D embedding size, Q queries, G gallery size, P persons,
V views of an image, U variations of a caption. image, text are features; pixels, tokens are inputs; pid is a person id; scale is
1 / temperature. Everything is (B, T, C) throughout."""

import argparse
import atexit
import collections
import contextlib
import functools
import html
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
from safetensors.torch import load_file
from torch.utils.checkpoint import checkpoint as made_again
from tqdm import tqdm

import data
import eval as evaluation
import losses

# ---- the dual encoder -----------------------------------------------------------------------------------------------

SIZES = {
    "ViT-B/32": dict(embed=512, image_size=(224, 224), patch=32, image_width=768, image_layers=12, text_width=512, text_layers=12, vocab=49408),
    "ViT-B/16": dict(embed=512, image_size=(224, 224), patch=16, image_width=768, image_layers=12, text_width=512, text_layers=12, vocab=49408),
    "ViT-L/14": dict(embed=768, image_size=(224, 224), patch=14, image_width=1024, image_layers=24, text_width=768, text_layers=12, vocab=49408),
    "toy": dict(embed=128, image_size=(96, 48), patch=8, image_width=128, image_layers=2, text_width=128, text_layers=2, vocab=1024, head_width=32),
}


class Attention(nn.Module):
    """Multi-head self-attention. qkv rows are stacked q, k, v, as in nn.MultiheadAttention's in_proj."""

    def __init__(self, width, head_width, dropout=0.0):
        super().__init__()
        assert width % head_width == 0, f"width {width} does not split into heads of {head_width}"
        self.heads, self.dropout = width // head_width, dropout
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x, causal=False, at=None, seen=None):
        """(B, T, C) -> (B, T, C), or with `at` (B,) the result of these tokens alone, (B, 1, C). seen (B, T) bool: where to look."""
        B, T, C = x.shape
        dropout = self.dropout if self.training else 0.0
        if at is None:
            q, k, v = self.qkv(x).view(B, T, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)       # each (B, H, T, C/H)
            x = F.scaled_dot_product_attention(q, k, v, None if seen is None else seen[:, None, None], dropout, causal)
        else:
            q = F.linear(pick(x, at), self.qkv.weight[:C], self.qkv.bias[:C]).view(B, 1, self.heads, -1).transpose(1, 2)      # (B, H, 1, C/H)
            k, v = F.linear(x, self.qkv.weight[C:], self.qkv.bias[C:]).view(B, T, 2, self.heads, -1).permute(2, 0, 3, 1, 4)
            seen = (torch.arange(T, device=x.device) <= at[:, None])[:, None, None] if causal else None                       # (B, 1, 1, T)
            x = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, dropout_p=dropout)
        return self.proj(x.transpose(1, 2).reshape(B, -1, C))


def pick(x, at):
    """Token at[b] of each sample: (B, T, C), (B,) -> (B, 1, C)."""
    return x[torch.arange(x.shape[0], device=x.device), at][:, None]


def mixed(x, share, partner):
    """Each sample mixed with its partner: x (B, ...), share in [0, 1] its own part, partner (B,)."""
    return share * x + (1 - share) * x[partner]


class Block(nn.Module):
    """Pre-norm transformer block; both towers are built from it. Dropout is on the attention weights only."""

    def __init__(self, width, head_width, dropout=0.0, quick_gelu=True):
        super().__init__()
        self.ln1, self.attn = nn.LayerNorm(width), Attention(width, head_width, dropout)
        self.ln2, self.fc1, self.fc2 = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.quick_gelu = quick_gelu

    def forward(self, x, causal=False, at=None, seen=None):
        attended = self.attn(self.ln1(x), causal, at, seen)
        x = (x if at is None else pick(x, at)) + attended
        h = self.ln2(x)
        if self.quick_gelu:
            # OpenAI's CLIP was trained with h * sigmoid(1.702 h), and one must keep what one was trained with; LAION's models have the
            # exact GELU. Written as silu(1.702 h) / 1.702 with the factors moved into the weights, it is one pass over h instead of three
            h = F.silu(F.linear(h, 1.702 * self.fc1.weight, 1.702 * self.fc1.bias))
            return x + F.linear(h, self.fc2.weight / 1.702, self.fc2.bias)
        return x + self.fc2(F.gelu(self.fc1(h)))


def init_blocks(blocks, width):
    """CLIP's initialisation: residual branches start smaller the deeper the tower."""
    for block in blocks:
        nn.init.normal_(block.attn.qkv.weight, std=width ** -0.5)
        nn.init.normal_(block.attn.proj.weight, std=width ** -0.5 * (2 * len(blocks)) ** -0.5)
        nn.init.normal_(block.fc1.weight, std=(2 * width) ** -0.5)
        nn.init.normal_(block.fc2.weight, std=width ** -0.5 * (2 * len(blocks)) ** -0.5)
        nn.init.zeros_(block.attn.qkv.bias)
        nn.init.zeros_(block.attn.proj.bias)


def sincos(positions, width):
    """Sine-cosine embedding of numbers (T,) -> (T, width): [sin(p w_k), cos(p w_k)], w_k = 10000^(-k / (width / 2))."""
    w = 10000 ** (-torch.arange(width // 2) / (width // 2))
    angle = positions[:, None] * w                                                                      # (T, width/2)
    return torch.cat([angle.sin(), angle.cos()], dim=1)


def sincos_grid(grid, width):
    """Of a class token (zeros) and the patches of a grid (rows, columns): half the width tells the column, half the row; (T, width)."""
    row, column = torch.cartesian_prod(*(torch.arange(n, dtype=torch.float32) for n in grid)).T
    return torch.cat([torch.zeros(1, width), torch.cat([sincos(column, width // 2), sincos(row, width // 2)], dim=1)])


def kept(block, checkpoint_blocks, x, **how):
    """block(x, ...), of which backward keeps all that it needs, or with checkpoint_blocks x alone, to make the rest again."""
    if checkpoint_blocks and torch.is_grad_enabled():
        return made_again(block, x, use_reentrant=False, **how)
    return block(x, **how)


class ImageTower(nn.Module):
    """Vision transformer: (B, 3, H, W) in, patches behind a class token through the blocks, (B, T, C) out, not yet normalised
    and projected. With `at` (B,) only these tokens, (B, 1, C): the last block need not compute the others."""

    def __init__(self, size, patch, stride, width, head_width, layers, embed, quick_gelu=True):
        super().__init__()
        self.checkpoint_blocks, self.patch_drop = False, 0.0
        self.grid = tuple((side - patch) // stride + 1 for side in size)                                # rows, columns
        if min(self.grid) < 1:
            raise ValueError(f"images of {size[0]}x{size[1]} pixels hold no patch of {patch}x{patch}")
        self.patch = nn.Conv2d(3, width, patch, stride, bias=False)
        self.cls = nn.Parameter(width ** -0.5 * torch.randn(width))
        # From scratch, positions start as sines of column and row rather than CLIP's noise: neighbours are then alike from the
        # first step on, which is worth many epochs where there are only a few
        self.pos = nn.Parameter(0.5 * sincos_grid(self.grid, width))                                    # (T, C)
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.blocks = nn.ModuleList(Block(width, head_width, quick_gelu=quick_gelu) for _ in range(layers))
        self.proj = nn.Parameter(width ** -0.5 * torch.randn(width, embed))
        init_blocks(self.blocks, width)

    def project(self, x):
        """Class tokens (B, C) as `forward` gives them -> features (B, D)."""
        return self.ln_post(x) @ self.proj

    def forward(self, pixels, at=None, keep=None, mix=None):
        """keep (B, K): only these patches, by number, go through the transformer; in training with a patch_drop a share of them at random (FLIP,
        arXiv 2212.00794). mix: as `mixed` takes it, after the first block."""
        x = self.patch(pixels).flatten(2).transpose(1, 2)                                               # (B, T-1, C), row by row
        x = torch.cat([self.cls.to(x.dtype).expand(x.shape[0], 1, -1), x], dim=1) + self.pos              # (B, T, C)
        if keep is None and self.training and self.patch_drop:
            keep = torch.rand(x.shape[0], x.shape[1] - 1, device=x.device).argsort(dim=1)[:, :max(1, round((1 - self.patch_drop) * (x.shape[1] - 1)))]
        if keep is not None:
            x = torch.cat([x[:, :1], x[:, 1:].gather(1, keep[..., None].expand(-1, -1, x.shape[2]))], dim=1)      # (B, 1+K, C)
        x = self.ln_pre(x)
        for n, block in enumerate(self.blocks[:-1]):
            x = kept(block, self.checkpoint_blocks, x)
            x = mixed(x, *mix) if mix and n == 0 else x
        return kept(self.blocks[-1], self.checkpoint_blocks, x, at=at)


class TextTower(nn.Module):
    """Causal transformer over caption tokens: (B, T) ids in, (B, T, C) out, or (B, 1, C) as above."""

    def __init__(self, vocab, context, width, head_width, layers, embed, dropout=0.0, quick_gelu=True):
        super().__init__()
        self.checkpoint_blocks = False
        self.tok = nn.Embedding(vocab, width)
        self.pos = nn.Parameter(0.03 * sincos(torch.arange(context, dtype=torch.float32), width))      # about as large as the tokens
        self.blocks = nn.ModuleList(Block(width, head_width, dropout, quick_gelu) for _ in range(layers))
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(width ** -0.5 * torch.randn(width, embed))
        nn.init.normal_(self.tok.weight, std=0.02)
        init_blocks(self.blocks, width)

    def forward(self, tokens, at=None, mix=None):
        x = self.tok(tokens)                                                                            # (B, T, C)
        x = x + self.pos[:x.shape[1]]
        for n, block in enumerate(self.blocks[:-1]):
            x = kept(block, self.checkpoint_blocks, x, causal=True)
            x = mixed(x, *mix) if mix and n == 0 else x
        return kept(self.blocks[-1], self.checkpoint_blocks, x, causal=True, at=at)


class DualEncoder(nn.Module):
    """CLIP: an image tower and a text tower into one space of D numbers, compared by cosine. Any image size (H, W) that holds
    a patch; a stride smaller than the patch makes patches overlap. `heads` are a method's extra layers, used in training only."""

    def __init__(self, embed, image_size, patch, image_width, image_layers, text_width, text_layers, vocab, context=data.CONTEXT,
                 head_width=64, text_head_width=None, stride=None, quick_gelu=True, text_dropout=0.0, patch_drop=0.0, lock_patch=False):
        super().__init__()
        self.arch = dict(embed=embed, image_size=tuple(image_size), patch=patch, image_width=image_width, image_layers=image_layers,
                         text_width=text_width, text_layers=text_layers, vocab=vocab, context=context, head_width=head_width,
                         text_head_width=text_head_width or head_width, stride=stride or patch, quick_gelu=quick_gelu)
        self.image = ImageTower(image_size, patch, stride or patch, image_width, head_width, image_layers, embed, quick_gelu)
        self.text = TextTower(vocab, context, text_width, text_head_width or head_width, text_layers, embed, text_dropout, quick_gelu)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.heads = nn.ModuleDict()
        self.image.patch_drop = patch_drop
        # TBPS-CLIP's "locked bottom layer" is the patch convolution alone. Frozen here, so that no optimizer ever sees it
        self.image.patch.weight.requires_grad_(not lock_patch)
        self.micro_batch = 0

    def in_parts(self, encode, x, *more):
        """encode(x, ...) of a batch; with `micro_batch` M in parts of M rows, of which nothing is kept but the result. Backward makes each part
        again, random numbers included, when the gradient of its result is known (arXiv 2101.06983, "GradCache"): the exact gradient of a
        contrastive loss over the whole batch, in the memory of a part."""
        if not 0 < self.micro_batch < len(x):
            return encode(x, *more)
        run = functools.partial(made_again, encode, use_reentrant=False) if torch.is_grad_enabled() else encode
        return torch.cat([run(*part) for part in zip(*(y.split(self.micro_batch) for y in (x, *more)))])

    def image_tokens(self, pixels, keep=None):
        """(B, 3, H, W) -> (B, T, D): class token first, then the patches row by row, or those of `keep` (B, K)."""
        def encode(pixels, *keep):
            return self.image.ln_post(self.image(pixels, keep=keep[0] if keep else None)) @ self.image.proj
        return self.in_parts(encode, pixels, *([] if keep is None else [keep]))

    def text_tokens(self, tokens, cut=True):
        """(B, 77) ids -> (B, T, D), T the longest caption of the batch, or with cut=False all 77."""
        tokens = self.cut(tokens)[0] if cut else tokens.to(self.logit_scale.device, non_blocking=True)
        return self.in_parts(lambda part: self.text.ln_post(self.text(part)) @ self.text.proj, tokens)

    def encode_image(self, pixels, mix=None):
        """(B, 3, H, W) -> (B, D), not normalised: the class token. mix: CTLG's mixup of features, as `mixed` takes it."""
        def encode(pixels):
            cls = torch.zeros(pixels.shape[0], dtype=torch.int64, device=pixels.device)      # not len(): export keeps the batch free
            return self.image.project(self.image(pixels, at=cls, mix=mix)[:, 0])
        return encode(pixels) if mix else self.in_parts(encode, pixels)

    def encode_text(self, tokens, mix=None):
        """(B, 77) ids -> (B, D), not normalised: the token at EOT, which has the largest id. Tokens may still be on the CPU. A mixed
        caption ends twice, and both ends are looked at, in the same shares."""
        if mix:
            tokens, eot = self.cut(tokens)
            x = self.text(tokens, mix=mix)                                                              # (B, T, C)
            share, partner = mix
            end = share * pick(x, eot)[:, 0] + (1 - share) * pick(x, eot[partner])[:, 0]
            return self.text.ln_post(end) @ self.text.proj

        def encode(tokens):
            tokens, eot = self.cut(tokens)
            return self.text.ln_post(self.text(tokens, at=eot)[:, 0]) @ self.text.proj
        return self.in_parts(encode, tokens)

    def cut(self, tokens):
        """Tokens without the padding after the longest caption, and where each EOT is. The tower is causal, so nothing changes
        but the cost: captions have 30 tokens where CLIP has room for 77. Cheapest where the tokens are, on the CPU."""
        eot = tokens.argmax(dim=1)
        tokens = tokens[:, :int(eot.max()) + 1]
        return tokens.to(self.logit_scale.device, non_blocking=True), eot.to(self.logit_scale.device, non_blocking=True)

    def scale(self):
        """exp(logit_scale), while it learns at most 100. The limit acts on the value only: the gradient goes on as if it were not there,
        as in the code of TBPS-CLIP, so a scale beyond 100 can come back."""
        scale = self.logit_scale.exp()
        if not self.logit_scale.requires_grad:
            return scale
        return scale + (scale.clamp(max=100) - scale).detach()


# ---- weights: every format people have ------------------------------------------------------------------------------

# Where to fetch CLIP by hand; the hub has the same weights as openai/clip-vit-base-patch16
OPENAI_WEIGHTS = ("https://openaipublic.azureedge.net/clip/models/"
                  "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f/ViT-B-16.pt")
OPENAI_VOCABULARY = "https://github.com/openai/CLIP/raw/main/clip/bpe_simple_vocab_16e6.txt.gz"

OPENAI_NAMES = [  # OpenAI's and open_clip's name -> ours, applied in this order
    (r"^visual\.", "image."),
    (r"^(transformer|token_embedding|positional_embedding|ln_final|text_projection)", r"text.\1"),
    (r"transformer\.resblocks\.", "blocks."), (r"attn\.in_proj_", "attn.qkv."), (r"attn\.out_proj", "attn.proj"),
    (r"\.ln_([12])\.", r".ln\1."), (r"mlp\.c_fc", "fc1"), (r"mlp\.c_proj", "fc2"), (r"conv1\.", "patch."),
    (r"class_embedding", "cls"), (r"token_embedding", "tok"), (r"positional_embedding", "pos"),
    (r"text_projection", "proj"), (r"ln_final", "ln_post"),
]
HF_NAMES = [  # name in Hugging Face's CLIPModel -> OpenAI's; to_openai_names stacks q, k, v and transposes projections
    (r"^vision_model\.", "visual."), (r"^text_model\.", ""), (r"encoder\.layers\.", "transformer.resblocks."),
    (r"embeddings\.class_embedding", "class_embedding"), (r"embeddings\.patch_embedding", "conv1"),
    (r"embeddings\.position_embedding\.weight", "positional_embedding"), (r"embeddings\.token_", "token_"),
    (r"self_attn\.q_proj\.", "attn.in_proj_"), (r"self_attn\.out_proj", "attn.out_proj"),
    (r"layer_norm([12])", r"ln_\1"), (r"pre_layrnorm", "ln_pre"), (r"post_layernorm", "ln_post"),
    (r"final_layer_norm", "ln_final"), (r"mlp\.fc1", "mlp.c_fc"), (r"mlp\.fc2", "mlp.c_proj"),
    (r"visual_projection\.weight", "visual.proj"), (r"text_projection\.weight", "text_projection"),
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
HF_VIEWS = ["preprocessor_config.json", "processor_config.json"]        # of transformers until 4, of 5
VOCABULARIES = ["tokenizer.json", "merges.txt", "bpe_simple_vocab_16e6.txt.gz"]


def read_json(path):
    """The object in a JSON file; {} if the file does not exist."""
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))      # with or without a byte-order mark
    except ValueError:
        content = None
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
    path = Path(source)
    if path.is_dir():
        files = [path / name for name in rank_weight_files(path)] + sorted(path.glob("*.pt"))
        found = [file for file in files if file.exists()]
        return found[0] if found else data.need(files[0], "the CLIP weights", f"or {', '.join(WEIGHT_FILES)}, *.pt")
    is_file_name = path.suffix in (".pt", ".pth", ".bin", ".safetensors")
    if path.exists() or is_file_name or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        return data.need(path, "the CLIP weights", "weights are a file, a folder or a hub id like "
                         "openai/clip-vit-base-patch16; --clip none trains from scratch")
    return fetch_weights(str(source))


def fetch_weights(hub_id):
    """The weights of a model on the hub, with its config and vocabulary beside them -> Path."""
    from huggingface_hub import errors, snapshot_download
    reason = f"it has none of {', '.join(WEIGHT_FILES)}"
    try:
        beside = [*CONFIG_KEYS, *HF_VIEWS, *VOCABULARIES]
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
        f"    mkdir clip && cd clip && curl -LO {OPENAI_WEIGHTS} -LO {OPENAI_VOCABULARY}\n"
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
    """The config beside a weights file, its own one first -> (Path, content), or (None, {})."""
    own = WEIGHT_FILES.get(path.name, "open_clip_config.json")
    there = [path.parent / name for name in sorted(CONFIG_KEYS, key=lambda name: name != own)]
    there = [file for file in there if file.exists()]
    for file in there:
        if CONFIG_KEYS[file.name] in (config := read_json(file)):
            return file, config
    if there:                                                           # e.g. timm's
        raise ValueError(f"{there[0]} is not the configuration of a CLIP; remove it, or fetch it again")
    return None, {}


def read_config(path):
    """What tensors do not tell. Without a config beside the weights file: the values of OpenAI's models.

    -> dict(file=name of the config or None, quick_gelu, head_width, text_head_width, norm, resize,
            sizes=image sizes (H, W) that the config names)"""
    file, config = find_config(path)
    if file is None:
        return dict(file=None, quick_gelu=True, head_width=64, text_head_width=64, norm="clip", resize="bicubic",
                    sizes=[])
    try:
        if file.name == "config.json":
            views = [read_json(file.parent / name) for name in HF_VIEWS]
            said = read_hf_config(config, views[0] or views[1].get("image_processor", {}))
        else:
            said = read_open_clip_config(config["model_cfg"], config.get("preprocess_cfg", {}))
        mean, std, resize = said.pop("mean"), said.pop("std"), said.pop("resize")
        norm = (tuple(mean), tuple(std)) if mean and std else data.NORMS["clip"]
        norm = next((name for name, values in data.NORMS.items() if values == norm), norm)
        # Hugging Face writes Pillow's numbers: 2, 3
        resize = {None: "bicubic", "bicubic": "bicubic", "bilinear": "bilinear", 3: "bicubic", 2: "bilinear"}[resize]
        sizes = [as_size(size) for size in said.pop("sizes") if size]
        return said | dict(file=file.name, norm=norm, resize=resize, sizes=sizes)
    except (KeyError, TypeError, AttributeError, ZeroDivisionError) as e:
        raise ValueError(f"{file} is not the configuration of a known CLIP ({type(e).__name__}: {e})") from None


def read_open_clip_config(model, views):
    image, text = model.get("vision_cfg", {}), model.get("text_cfg", {})
    return dict(quick_gelu=model.get("quick_gelu", False), head_width=image.get("head_width", 64),
                text_head_width=text.get("width", 512) // text.get("heads", 8),
                mean=views.get("mean"), std=views.get("std"), resize=views.get("interpolation"),
                sizes=[image.get("image_size"), views.get("size")])


def read_hf_config(model, views):
    image, text = model["vision_config"], model.get("text_config", {})
    activations = {part.get("hidden_act", "quick_gelu") for part in (image, text)}
    if activations not in ({"quick_gelu"}, {"gelu"}):
        raise KeyError(f"hidden_act {activations}")
    return dict(quick_gelu=activations == {"quick_gelu"},
                head_width=image.get("hidden_size", 768) // image.get("num_attention_heads", 12),
                text_head_width=text.get("hidden_size", 512) // text.get("num_attention_heads", 8),
                mean=views.get("image_mean"), std=views.get("image_std"), resize=views.get("resample"),
                sizes=[image.get("image_size"), views.get("crop_size"), views.get("size")])


def as_size(size):
    """224, [224, 224], or Hugging Face's {"shortest_edge": 224} or {"height": 224, "width": 224} -> (H, W)."""
    if isinstance(size, dict):
        size = size.get("shortest_edge") or (size["height"], size["width"])
    return (size, size) if isinstance(size, int) else tuple(size)


def patch_grid(size, patch, stride):
    """Rows and columns of patches in an image of size (H, W)."""
    return tuple((side - patch) // stride + 1 for side in size)


def read_image_size(positions, patch, sizes, asked, stride, source):
    """The image size (H, W) and stride that a number of patch positions comes from, which tensors do not tell.

    First the `sizes` a config names, then the size `asked` for, if they have as many patches; else the only usual
    shape. Raises ValueError, which asks for the size, if several shapes fit."""
    candidates = [(size, patch) for size in sizes] + ([(asked, stride or patch)] if asked else [])
    for size, step in candidates:
        if math.prod(patch_grid(size, patch, step)) == positions:
            return tuple(size), step
    usual = []
    for ratio in (3, 4, 2, 1):                                          # persons are tall: IRRA has 24 x 8 patches
        columns = math.isqrt(positions // ratio)
        if ratio * columns ** 2 == positions:
            usual.append((ratio * columns * patch, columns * patch))
    published = [size for size in usual if size in ((224, 224), (336, 336))]       # the sizes of OpenAI's models
    if published or len(usual) == 1:
        return (published or usual)[0], patch
    shapes = f"may be images of {' or '.join(f'{h}x{w}' for h, w in usual)}" if usual else "fit no usual image size"
    raise ValueError(f"{source} has {positions} positions of {patch}x{patch} patches, which {shapes}\n"
                     "  Name the size of its training: --size HxW (eval.py), --set height=H width=W (tbps.py)")


def check_clip(weights, source):
    """That these are the tensors of two transformers that can be read, with OpenAI's names."""
    if any(name.startswith(("visual.layer1", "visual.attnpool")) for name in weights):
        raise ValueError(f"{source} is a CLIP with a ResNet image tower; only vision transformers can be read")
    dims = {"visual.conv1.weight": 4, "visual.positional_embedding": 2, "token_embedding.weight": 2,
            "positional_embedding": 2, "text_projection": 2}
    for name, number in dims.items():
        if name not in weights or weights[name].ndim != number:
            shape = tuple(weights[name].shape) if name in weights else "missing"
            raise ValueError(f"{source} is no CLIP that can be read: {name} is {shape}. "
                             f"It has {len(weights)} tensors, e.g. {sorted(weights)[:3]}")
    if (context := len(weights["positional_embedding"])) < data.CONTEXT:
        raise ValueError(f"{source} reads texts of {context} tokens; OpenAI's CLIP and tbps read {data.CONTEXT}")


def read_arch(weights, config, image_size, stride, source):
    """The architecture of a CLIP with OpenAI's names, from the shapes of its tensors and what read_config found."""
    check_clip(weights, source)

    def depth(tower):
        numbers = [int(m[1]) for name in weights if (m := re.match(tower + r"transformer\.resblocks\.(\d+)\.", name))]
        return 1 + max(numbers, default=-1)

    width, _, patch, _ = weights["visual.conv1.weight"].shape
    vocab, text_width = weights["token_embedding.weight"].shape
    positions = len(weights["visual.positional_embedding"]) - 1
    size, stride = read_image_size(positions, patch, config["sizes"], image_size, stride, source)
    arch = dict(
        embed=weights["text_projection"].shape[1], image_size=size, patch=patch, stride=stride,
        image_width=width, image_layers=depth(r"visual\."), text_width=text_width, text_layers=depth(""), vocab=vocab,
        context=len(weights["positional_embedding"]), head_width=config["head_width"],
        text_head_width=config["text_head_width"], quick_gelu=config["quick_gelu"])
    rows, columns = patch_grid(size, patch, stride)
    known_from = config["file"] or "assumed: OpenAI's, as there is no config beside the weights"
    said = (f"patch {patch}, image {arch['image_layers']} layers of {width}, text {arch['text_layers']} layers of "
            f"{text_width}; {rows}x{columns} positions, of images of {size[0]}x{size[1]}; "
            f"heads of {arch['head_width']}, {'Quick' * arch['quick_gelu']}GELU ({known_from})")
    knows_heads = config["file"] or width <= 1024                       # larger models have heads of 80 and more
    splits = width % config["head_width"] == 0 and text_width % config["text_head_width"] == 0
    if not (knows_heads and splits and arch["image_layers"] and arch["text_layers"]):
        raise ValueError(f"{source} is no CLIP that can be read: {said}")
    print(f"clip: {said}")
    return arch


# ---- weights: into the model ----------------------------------------------------------------------------------------

def rename(name, table):
    """Apply every (pattern, replacement) of the table in order."""
    for pattern, replacement in table:
        name = re.sub(pattern, replacement, name)
    return name


def to_openai_names(weights, source):
    """Hugging Face's CLIPModel -> OpenAI's names: q, k, v become one in_proj, the projections are transposed."""
    theirs = {}
    for name, w in weights.items():
        if re.search(r"\.self_attn\.[kv]_proj\.", name):
            continue
        if ".self_attn.q_proj." in name:
            parts = [name.replace("q_proj", p) for p in ("q_proj", "k_proj", "v_proj")]
            if missing := [p for p in parts if p not in weights]:
                raise ValueError(f"{source} lacks {missing[0]}")
            w = torch.cat([weights[p] for p in parts])
        theirs[rename(name, HF_NAMES)] = w.T if name in ("visual_projection.weight", "text_projection.weight") else w
    return theirs


def read_foreign_clip(saved, path, image_size, stride):
    """What another program's file holds -> architecture, tensors with our names, names of what is left out."""
    nested = next((saved[key] for key in ("model", "state_dict") if isinstance(saved.get(key), dict)), None)
    weights, left_out, config = {}, set(), read_config(path)
    for name, w in (saved if nested is None else nested).items():
        if not torch.is_tensor(w):
            raise ValueError(f"{path} holds {', '.join(sorted(saved)[:5])}, not a dict of tensors")
        if name.endswith("input_resolution"):                           # OpenAI's archives tell the size of images
            config["sizes"].append(as_size(int(w)))
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
    if any(name.startswith("text_model.") for name in weights):
        weights = to_openai_names(weights, path)
    if nested is not None:
        weights.setdefault("logit_scale", torch.tensor(math.log(50)))   # IRRA's temperature is fixed at 0.02
    arch = read_arch(weights, config, image_size, stride, path)
    return arch, {rename(name, OPENAI_NAMES): w for name, w in weights.items()}, sorted(left_out)


def resize_pos(pos, old, new):
    """Position embeddings (1 + rows * columns, C) of a grid `old` -> of a grid `new`; that of the class token stays."""
    grid = pos[1:].float().reshape(1, *old, -1).permute(0, 3, 1, 2)                     # (1, C, rows, columns)
    grid = F.interpolate(grid, size=new, mode="bilinear")
    return torch.cat([pos[:1].float(), grid.flatten(2)[0].T])


@torch.no_grad()
def copy_weights(model, weights, source, old_grid):
    """Copy tensors with our names into `model`. Each is copied, or resized and copied; the model's heads are new.
    Anything else is a ValueError that names the tensor."""
    ours = {name: p for name, p in model.state_dict().items() if not name.startswith("heads.")}
    resized = "none"
    for name, w in weights.items():
        if name not in ours:
            raise ValueError(f"{source} has a tensor {name} for which this model has no place")
        if name == "image.pos" and old_grid != model.image.grid:
            w = resize_pos(w, old_grid, model.image.grid)
            resized = "positions from {}x{} to {}x{}".format(*old_grid, *model.image.grid)
        if w.shape != ours[name].shape or not w.is_floating_point():
            raise ValueError(f"{source}: tensor {name} is {tuple(w.shape)} {w.dtype}, "
                             f"it should be {tuple(ours[name].shape)} of floating point")
        ours[name].copy_(w)                                             # shares memory with the model; also casts fp16
    if missing := sorted(ours.keys() - weights.keys()):
        raise ValueError(f"{source} lacks {len(missing)} tensors, e.g. {', '.join(missing[:3])}")
    print(f"clip: {len(ours)} tensors from {source}, resized: {resized}")


def encoder_of(arch, source, **options):
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
        arch, left_out = saved["arch"], []
        weights = {name: w for name, w in saved["weights"].items() if not name.startswith("heads.")}
    else:
        arch, weights, left_out = read_foreign_clip(saved, path, image_size, stride)
    asked = {key: value for key, value in dict(image_size=image_size, stride=stride).items() if value is not None}
    model = encoder_of(arch, path, **options | asked)
    copy_weights(model, weights, path, old_grid=patch_grid(arch["image_size"], arch["patch"], arch["stride"]))
    if left_out:
        print(f"clip: left out, for they are no encoders: {', '.join(left_out)}")
    return model


def preprocessing_for(source):
    """How images and captions are prepared for these weights; file: the file that says so, None if it is assumed."""
    path = find_weights(source)
    if is_ours(path):
        return read_file(path)["info"] | dict(file=path.name)
    config = read_config(path)
    return dict(norm=config["norm"], resize=config["resize"], clean=False, file=config["file"])


def tokenizer_for(source, vocabulary=None, mask=False):
    """The tokenizer of these weights: the vocabulary named, that of our checkpoint, or the file beside the weights."""
    if vocabulary:
        return data.load_tokenizer(vocabulary, mask)
    path = find_weights(source)
    if is_ours(path):
        return saved_tokenizer(read_file(path), mask)
    files = [path.parent / name for name in VOCABULARIES]
    fix = f"put it beside the weights (curl -LO {OPENAI_VOCABULARY}), or name it with --tokenizer"
    found = next((file for file in files if file.exists()), None)
    return data.load_tokenizer(found or data.need(files[-1], "CLIP's vocabulary", fix), mask)


# ---- checkpoints ----------------------------------------------------------------------------------------------------

VERSION = 1


def content(args, recipe, model, tokenizer, info, heads):
    """What a checkpoint holds besides the state of the training: all that a search needs, with or without the heads."""
    weights = {name: w for name, w in model.state_dict().items() if heads or not name.startswith("heads.")}
    return dict(format="tbps", version=VERSION, weights=weights, arch=model.arch, info=info,
                method=args.method, recipe=recipe, args=settings(args),
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


def is_ours(path):
    """Whether a weights file is a checkpoint of this program."""
    saved = read_file(path)
    return isinstance(saved, dict) and saved.get("format") == "tbps"


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
    wait()


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
    model = encoder_of(saved["arch"], path)
    weights = {name: w for name, w in saved["weights"].items() if make_heads or not name.startswith("heads.")}
    if make_heads:
        persons = len(weights.get("heads.id.bias", ()))
        for name, head in make_heads(saved["recipe"], model, persons).items():
            model.heads[name] = head
        if differ := sorted(model.state_dict().keys() ^ weights.keys()):
            raise ValueError(f"{path} does not hold the heads wanted here (e.g. {differ[0]}): they are in the last.pt "
                             "of a run with the method that has them")
    model.load_state_dict(weights)
    info = {key: saved[key] for key in ("method", "recipe", "args", "epoch", "step", "best", "scores")} | saved["info"]
    return model.eval().to(device), saved_tokenizer(saved), info


# ---- methods: a recipe, a step, heads -------------------------------------------------------------------------------

COMMON = dict(  # what every method has
    # optimisation: a rise, then a cosine, per iteration; AdamW
    epochs=5, batch=320, lr=1e-4, lr_start=1e-6, lr_end=5e-6, warmup=1.0, per_epoch=False, decay_every=0, weight_decay=0.02, coupled=False, eps=1e-8, beta2=0.98,
    muon=0.0, lr_bias=1.0, lr_new=1.0, sampler="random",
    # images and captions
    height=224, width=224, stride=0, norm="imagenet", resize="bilinear", eval_resize="bicubic", clean=True,
    # augmentation
    image_aug="pool", back_translation=0.1, deletion=0.05, synonym=0.0, insertion=0.0, swap=0.0, eda=0.0, prune=0.0, approximate=0.0,
    # model
    tau=0.0, text_dropout=0.05, patch_drop=0.0, lock_patch=True)
TBPS_CLIP = COMMON | dict(
    itc=0.0, nitc=1.0, ritc=1.0, ritc_eps=0.01, citc=0.1, ss=0.4, ss_text=0.0, mvs=True, mvs_text=False,
    soft=0.5, soft_ramp=1.0, teacher_pass=True)
SIMPLIFIED = TBPS_CLIP | dict(ss=0.0, mvs=False, citc=0.0)
BASELINE = SIMPLIFIED | dict(itc=1.0, nitc=0.0, ritc=0.0, soft=0.0, text_dropout=0.0, lock_patch=False, image_aug="none", back_translation=0.0,
                             deletion=0.0)
BEST = SIMPLIFIED | dict(image_aug="shift")      # what stayed of all four papers on toy people (README, "The best of all four"): CTLG's augmentation instead of the pool
SDM_ID = COMMON | dict(  # what IRRA, UIT and LCR2S share
    epochs=60, batch=64, lr=1e-5, lr_start=1e-6, lr_end=0.0, warmup=5.0, per_epoch=True, weight_decay=4e-5, coupled=True, eps=1e-3, beta2=0.999,
    lr_bias=2.0, lr_new=5.0, height=384, width=128, norm="clip", eval_resize="bilinear", clean=False, image_aug="reid", back_translation=0.0,
    deletion=0.0, tau=0.02, text_dropout=0.0, lock_patch=False,
    itc=0.0, sdm=1.0, cmpm=0.0, id=1.0, triplet=0.0)
IRRA = SDM_ID | dict(
    restoration=0.0, mlm=1.0, mask_content=0.15, mask_other=0.15, mask_all=False, depth=4, drop=0.7, official=False, half_weights=False)
UIT = IRRA | dict(batch=128, sampler="random-count", triplet=10.0, restoration=10.0, mlm=0.0, prune=0.2, mask_content=0.3, mask_other=0.05, mask_all=True)
CTLG = COMMON | dict(
    epochs=70, batch=256, lr=1e-4, lr_start=1e-5, lr_end=0.0, warmup=9.0, per_epoch=True, decay_every=20, weight_decay=0.0, beta2=0.999,
    height=384, width=128, stride=12, resize="bicubic", clean=False, image_aug="shift", back_translation=0.0, deletion=0.0, approximate=0.5,
    tau=0.005, text_dropout=0.0, lock_patch=False,
    itc=1.0, same="pair", mixup=0.5, feature_mixup=0.0, official=False)
KEYS = dict(  # what --help says of each key
    epochs="passes over the pairs", batch="pairs per step: also the number of negatives", lr="peak learning rate", lr_start="at the first step",
    lr_end="at the last step", warmup="epochs of linear rise", per_epoch="the rate changes between epochs only",
    decay_every="epochs after which the rate falls to a tenth, each time; 0: half a cosine instead", weight_decay="of matrices",
    coupled="Adam with an L2 penalty on all but biases, instead of AdamW", eps="of Adam", beta2="of Adam", muon="factor of the rate of "
    "the blocks' matrices, whose steps Muon makes; 0: as all others", lr_bias="factor of the rate of biases",
    lr_new="factor of the rate of layers that CLIP does not have", sampler="random, random-count or views (data.batches)",
    height="of the image, pixels", width="of the image, pixels", stride="of the patches, pixels; 0: no overlap", norm="mean and std: imagenet, clip or half",
    resize="of training images: bilinear or bicubic", eval_resize="of all others", clean="lower case, no full stops",
    image_aug="pool (2 of 6), stack (all), reid (mirror, pad-crop, erase), shift (reid without erasing), none, or one of " + ", ".join(data.IMAGE_AUG[5:]),
    back_translation="chance to take captions_bt instead, where the data have it", deletion="chance of each word to be left out",
    synonym="share of words replaced", insertion="share of words inserted", swap="share of words exchanged", eda="rate of one of these four at random",
    prune="chance of a caption to be cut to its nouns, adjectives and pronouns",
    approximate="chance of CTLG's approximate text: a fifth of the words replaced, left out, or left out in a row",
    tau="temperature; 0: learned from where the weights have it", text_dropout="on attention weights",
    patch_drop="share of the patches that the image tower does not see in training: steps are cheaper", lock_patch="freeze the patch convolution",
    itc="weight: contrast with one right answer each", nitc="weight: N-ITC, all captions of the person are right", ritc="weight: reversed KL",
    ritc_eps="its label smoothing", citc="weight: cyclic consistency", ss="weight: self-supervision between two image views",
    ss_text="weight: the same between two caption variations", mvs="a second image view in N-ITC", mvs_text="a second caption variation in N-ITC",
    soft="share of the model's own belief in the targets of N-ITC", soft_ramp="epochs until `soft` is reached",
    teacher_pass="the teacher's texts get a dropout mask of their own",
    sdm="weight: similarity distribution matching", cmpm="weight: projection matching", id="weight: classifying persons",
    triplet="weight: nearest of other persons, margin 0.05",
    restoration="weight: dropped patches from a grey image and the caption", mlm="weight: masked words from the image",
    mask_content="chance of nouns and adjectives to be masked", mask_other="of other words", mask_all="the masked captions are used in all losses",
    depth="blocks of the restorer and of the word guesser", drop="share of patches dropped",
    official="the quirks of the official code, see OFFICIAL in tbps.py", half_weights="fp16 weights without fp32 copies, as the official code trains",
    same="which captions are right for an image in itc: of its pair, image or person", mixup="chance of a pair to be mixed with another: mean pixels, both captions",
    feature_mixup="alpha of the Beta distribution that tells how pairs are mixed after the first block; 0: they are not")


def tbps_clip_heads(recipe, model, persons):
    """SimCLR's projection heads, where self-supervision is on."""
    embed = model.arch["embed"]

    def mlp():
        return nn.Sequential(nn.Linear(embed, 128), nn.ReLU(), nn.Linear(128, embed))
    return {name: mlp() for name in ("ss", "ss_text") if recipe[name]}


def tbps_clip_losses(model, batch, recipe, epoch, autocast):
    """The weighted losses of one step of TBPS-CLIP (arXiv 2308.10045) by name; their sum is the objective.

    batch: pixels (V, B, 3, H, W): the view, the second one (mvs), two for self-supervision (ss); tokens (U, B, 77) likewise.
    epoch: passes done, with fraction. All views go through the encoder in one forward. The features of all ranks are gathered, and each
    computes the loss of the whole batch."""
    r, B = recipe, len(batch["pid"])
    alpha = r["soft"] * (min(1, epoch / r["soft_ramp"]) if r["soft_ramp"] else 1)                       # the model's own belief in the targets
    with autocast():
        image = model.encode_image(batch["pixels"].flatten(0, 1)).view(-1, B, model.arch["embed"])      # (V, B, D)
        text = model.encode_text(batch["tokens"].flatten(0, 1)).view(-1, B, model.arch["embed"])        # (U, B, D)
        teacher_text = text.detach()
        # The teacher is the model itself. Its image features are the student's, dropped patches included: nothing else is random in the image tower. Its text
        # features differ by the dropout mask if it gets a pass of its own, as in the released code; it costs a forward of the text tower.
        if alpha > 0 and r["teacher_pass"] and r["text_dropout"] > 0:
            with torch.no_grad():
                teacher_text = model.encode_text(batch["tokens"][:1 + r["mvs_text"]].flatten(0, 1)).view(-1, B, model.arch["embed"])
        pid, image, text, teacher_text = (losses.gather(x, dim) for x, dim in ((batch["pid"], 0), (image, 1), (text, 1), (teacher_text, 1)))
        a, b = (model.heads["ss"](image[-2:]) if r["ss"] else (None, None))
        c, d = (model.heads["ss_text"](text[-2:]) if r["ss_text"] else (None, None))
    scale, out = model.scale(), {}
    if r["itc"]:
        out["itc"] = r["itc"] * losses.itc(image[0], text[0], scale)
    if r["nitc"]:                                                       # multi-view supervision: the mean over the views
        views = [(0, 0), (int(r["mvs"]), int(r["mvs_text"]))] if r["mvs"] or r["mvs_text"] else [(0, 0)]
        out["nitc"] = r["nitc"] / len(views) * sum(losses.nitc(image[v], text[u], pid, scale, alpha, image[v].detach(), teacher_text[u])
                                                   for v, u in views)
    if r["ritc"]:
        out["ritc"] = r["ritc"] * losses.ritc(image[0], text[0], pid, scale, r["ritc_eps"])
    if r["citc"]:
        out["citc"] = r["citc"] * losses.citc(image[0], text[0])
    if r["ss"]:
        out["ss"] = r["ss"] * losses.nt_xent(a, b)
    if r["ss_text"]:
        out["ss_text"] = r["ss_text"] * losses.nt_xent(c, d)
    return out


class CrossAttention(nn.Module):
    """Queries (B, T, C) look at a context (B, S, C) -> (B, T, C). seen (B, S) bool: where they may."""

    def __init__(self, width, head_width):
        super().__init__()
        self.heads = width // head_width
        self.q, self.kv, self.proj = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(width, width)

    def forward(self, x, context, seen=None):
        B, T, C = x.shape
        q = self.q(x).view(B, T, self.heads, -1).transpose(1, 2)                                        # (B, H, T, C/H)
        k, v = self.kv(context).view(B, context.shape[1], 2, self.heads, -1).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v, None if seen is None else seen[:, None, None])
        return self.proj(x.transpose(1, 2).reshape(B, T, C))


class Interaction(nn.Module):
    """What IRRA and UIT share: tokens of one kind (B, T, C) look once at those of the other (B, S, C), then a few blocks. There is
    no residual around the look: what comes out is made of the context alone, the query only chooses where to look."""

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

    def forward(self, query, context, query_seen=None, context_seen=None):
        x = self.ln_mid(self.cross(self.ln_query(query), self.ln_context(context), context_seen))
        for block in self.blocks:
            x = block(x, seen=query_seen)
        return self.ln_post(x)


class Guesser(nn.Module):
    """IRRA's masked language model (arXiv 2303.12501, Sec. 3.2): masked words look at the image, and are to be guessed."""

    def __init__(self, width, head_width, depth, vocab):
        super().__init__()
        self.look = Interaction(width, head_width, depth)
        self.fc, self.ln, self.out = nn.Linear(width, width), nn.LayerNorm(width), nn.Linear(width, vocab)
        nn.init.normal_(self.fc.weight, std=(2 * width) ** -0.5)
        nn.init.normal_(self.out.weight, std=(2 * depth * width) ** -0.5)

    def forward(self, text, image, where, seen=None):
        """text (B, T, D), image (B, S, D), where (B, T) bool -> logits (M, vocab) of the M tokens asked for."""
        x = self.look(text, image, query_seen=seen)[where]
        return self.out(self.ln(F.silu(1.702 * self.fc(x)) / 1.702))


class Restorer(nn.Module):
    """UIT's text-guided image restoration (arXiv 2307.09059): from the tokens of a grey image's visible patches and the words to the
    pixels, in colour, of all patches. The colours can only come from the words."""

    def __init__(self, width, head_width, depth, grid, patch):
        super().__init__()
        self.ln, self.embed = nn.LayerNorm(width), nn.Linear(width, width)
        self.mask = nn.Parameter(0.02 * torch.randn(width))
        self.register_buffer("pos", sincos_grid(grid, width), persistent=False)                         # (1+N, D), fixed
        self.look = Interaction(width, head_width, depth)
        self.look.ln_mid = nn.LayerNorm(width)
        self.pixels = nn.Linear(width, 3 * patch ** 2)

    def forward(self, visible, order, text, seen=None):
        """visible (B, 1+K, D): class token and the first K patches of `order` (B, N); text (B, T, D) -> (B, N, 3 patch^2)."""
        x = self.embed(self.ln(visible))
        B, K, N = len(x), x.shape[1] - 1, order.shape[1]
        patches = torch.cat([x[:, 1:], self.mask.to(x.dtype).expand(B, N - K, -1)], dim=1)              # (B, N, D), as drawn
        patches = patches.gather(1, order.argsort(dim=1)[..., None].expand_as(patches))                 # row by row
        x = torch.cat([x[:, :1], patches], dim=1) + self.pos
        return self.pixels(self.look(x, text, context_seen=seen)[:, 1:])


def patchify(pixels, patch):
    """(B, 3, H, W) -> (B, N, 3 patch^2): patches row by row, each by row, column, channel. Rows and columns that fill none are cut."""
    B, _, H, W = pixels.shape
    h, w = H // patch, W // patch
    x = pixels[:, :, :h * patch, :w * patch].reshape(B, 3, h, patch, w, patch)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(B, h * w, -1)


def unpatchify(patches, grid, patch):
    """The way back: (B, N, 3 patch^2) -> (B, 3, H, W)."""
    x = patches.reshape(-1, *grid, patch, patch, 3).permute(0, 5, 1, 3, 2, 4)
    return x.reshape(len(patches), 3, grid[0] * patch, grid[1] * patch)


def grey(pixels):
    """Luma in all three channels, of normalised pixels as released: within 0.11 of normalising the grey image."""
    return (pixels * pixels.new_tensor([0.2989, 0.5870, 0.1140])[:, None, None]).sum(dim=1, keepdim=True).expand_as(pixels)


def visible_patches(model, recipe):
    """The number of patches that the restorer sees. Of 192 patches 57 are visible; with official=1 56, and the loss still leaves out
    the first 57, so one dropped patch is not scored."""
    N, visible = math.prod(model.image.grid), 1 - recipe["drop"]
    return int((N + 1) * visible + 1e-6) - 1 if recipe["official"] else int(N * visible + 1e-6)


def id_heads(recipe, model, persons):
    """One classifier of persons for both sides, if the recipe gives it a weight."""
    if not recipe["id"]:
        return {}
    classifier = nn.Linear(model.arch["embed"], persons)
    nn.init.normal_(classifier.weight, std=0.001)
    nn.init.zeros_(classifier.bias)
    return {"id": classifier}


def pair_losses(image, text, pid, scale, heads, recipe, autocast):
    """The weighted losses that need no more than the features of the pairs, (B, D) each, by name."""
    r, out = recipe, {}
    if r["itc"]:
        out["itc"] = r["itc"] * losses.itc(image, text, scale)
    if r["sdm"]:
        out["sdm"] = r["sdm"] * losses.sdm(image, text, pid, scale)
    if r["cmpm"]:
        out["cmpm"] = r["cmpm"] * losses.cmpm(image, text, pid)
    if r["id"]:
        with autocast():
            who = heads["id"](image), heads["id"](text)                                                 # (B, P)
        out["id"] = r["id"] * losses.id_loss(*who, pid)
    if r["triplet"]:
        out["triplet"] = r["triplet"] * losses.triplet(image, text, pid)
    return out


def irra_heads(recipe, model, persons):
    """The classifier, word guesser and restorer that the recipe's weights ask for."""
    arch, heads = model.arch, id_heads(recipe, model, persons)
    size = arch["embed"], arch["head_width"], recipe["depth"]
    if recipe["mlm"]:
        heads["mlm"] = Guesser(*size, arch["vocab"])
    if recipe["restoration"]:
        if arch["stride"] != arch["patch"]:
            raise ValueError("restoration needs patches that do not overlap: stride=0")
        N, K = math.prod(model.image.grid), visible_patches(model, recipe)
        if not 0 < K < N - recipe["official"]:
            raise ValueError(f"drop={recipe['drop']} leaves {max(K, 0)} of {N} patches visible: some must be, and some not")
        heads["restoration"] = Restorer(*size, model.image.grid, arch["patch"])
        if recipe["official"]:
            nn.init.zeros_(heads["restoration"].mask)
    return heads


def masks_all_losses(recipe):
    """Whether the losses of the features see masked captions too, and not MLM alone."""
    return recipe.get("mask_all") or recipe.get("official") and "mlm" in recipe


def irra_losses(model, batch, recipe, epoch, autocast):
    """The weighted losses of one step of IRRA (arXiv 2303.12501) or UIT (arXiv 2307.09059), which differ in their recipes' weights.

    batch: pixels (1, B, 3, H, W), tokens (1, B, 77), and where captions are masked also masked, asked (B, 77)."""
    r, pid, pixels = recipe, batch["pid"], batch["pixels"][0]
    restorer, guesser, mask_all = r["restoration"], r["mlm"], masks_all_losses(r)
    tokens = batch["masked"] if mask_all else batch["tokens"][0]
    eot = tokens.argmax(dim=1)                                          # the same in masked captions
    seen = None if r["official"] else (torch.arange(int(eot.max()) + 1) <= eot[:, None]).to(pid.device)            # (B, T)
    with autocast():
        image_tokens = model.image_tokens(pixels) if guesser else model.encode_image(pixels)[:, None]   # (B, S, D), or the class token
        if restorer or guesser and mask_all:
            text_tokens = model.text_tokens(tokens, cut=not r["official"])                               # (B, T, D)
            text = pick(text_tokens, eot.to(pid.device))[:, 0]                                          # (B, D)
        else:
            text = model.encode_text(tokens)
        image = image_tokens[:, 0]                                                                      # (B, D)
        if guesser:
            words = text_tokens if mask_all else model.text_tokens(batch["masked"], cut=not r["official"])
            asked = batch["asked"][:, :words.shape[1]].to(pid.device)
            guessed = model.heads["mlm"](words, image_tokens, asked >= 0, seen)                         # (M, vocab)
        if restorer:
            restored, dropped = restore(model, pixels, text_tokens, seen, r)
    out = pair_losses(*map(losses.gather, (image, text, pid)), model.scale(), model.heads, r, autocast)
    if guesser:
        out["mlm"] = guesser * losses.mlm(guessed, asked[asked >= 0]) * losses.rank_weight(len(guessed))
    if restorer:
        out["restoration"] = restorer * losses.restoration(restored, patchify(pixels, model.arch["patch"]), dropped)
    return out


def restore(model, pixels, text_tokens, seen, recipe, generator=None):
    """-> all patches as restored (B, N, 3 patch^2) from a grey image with most of them dropped and the caption's tokens (B, T, D);
    which of them count, (B, N) bool. Only the visible ones are computed: at drop=0.7 this costs a third of a normal pass."""
    K = visible_patches(model, recipe)
    order = torch.rand(len(pixels), math.prod(model.image.grid), generator=generator, device=pixels.device).argsort(dim=1)       # (B, N)
    visible = model.image_tokens(grey(pixels), keep=order[:, :K])                                       # (B, 1+K, D)
    dropped = order.argsort(dim=1) >= K + recipe["official"]                                       # (B, N)
    return model.heads["restoration"](visible, order, text_tokens, seen), dropped


def ctlg_losses(model, batch, recipe, epoch, autocast):
    """The loss of one step of CTLG (arXiv 2311.09084): contrast at a very low temperature, where nearly all the gradient goes to the hardest
    negative. With feature_mixup all pairs are mixed with others, in one share for the batch, and what comes out are pairs again."""
    mix, B = None, len(batch["pid"])
    if recipe["feature_mixup"]:
        alpha = torch.tensor(recipe["feature_mixup"])
        mix = float(torch.distributions.Beta(alpha, alpha).sample()), torch.randperm(B).to(batch["pid"].device)
    with autocast():
        image, text = model.encode_image(batch["pixels"][0], mix), model.encode_text(batch["tokens"][0], mix)      # (B, D)
    image, text = losses.gather(image), losses.gather(text)
    right = torch.arange(len(image), device=image.device)               # which text is right for which image
    if recipe["same"] != "pair":
        right = losses.gather(batch["image" if recipe["same"] == "image" else "pid"].to(image.device))
    return {"itc": recipe["itc"] * losses.nitc(image, text, right, model.scale())}                      # N-ITC of numbers that differ is ITC


# official=1 reproduces what the official code does where it differs from the paper, or from what one would expect:
#
#   IRRA, UIT   learning rates by layer names: new layers outside of cross-attention, its blocks and classifiers learn at CLIP's rate (lr_factor)
#   IRRA, UIT   the MLM head and the restorer also attend to the padding after a caption (irra_losses)
#   IRRA        all losses see the masked captions, not MLM alone; UIT does so anyway (masks_all_losses)
#   IRRA, UIT, CTLG   the last, smaller batch of an epoch is used (train)
#   UIT         one patch more is dropped than scored (visible_patches), and the mask token starts at zero (irra_heads)
#   CTLG        approximate text may also replace and delete colours and garments (data.approximate_caption)
#
# TBPS-CLIP and the baseline have no such key: their recipes are what the official code does. half_weights=1 (IRRA, UIT) is a key of its own:
# see HalfAdam.
METHODS = {  # name: (recipe, heads, losses of a step)
    "tbps-clip": (TBPS_CLIP, tbps_clip_heads, tbps_clip_losses),
    "tbps-clip-simplified": (SIMPLIFIED, tbps_clip_heads, tbps_clip_losses),
    "baseline": (BASELINE, tbps_clip_heads, tbps_clip_losses),
    "best": (BEST, tbps_clip_heads, tbps_clip_losses),
    "irra": (IRRA, irra_heads, irra_losses),
    "uit": (UIT, irra_heads, irra_losses),
    "ctlg": (CTLG, lambda *_: {}, ctlg_losses),
}
# On top of any recipe, for toy people learned from scratch: a smaller model and rate, more and smaller batches. There is nothing to lock or to
# believe in before anything is learned, so the patch convolution learns too and the targets are the labels; every layer is new
TOY = dict(height=96, width=48, stride=0, epochs=10, batch=128, lr=1e-3, lr_start=1e-5, lr_end=1e-5, warmup=2.0, per_epoch=False, decay_every=0, weight_decay=0.02, coupled=False,
           eps=1e-8, beta2=0.98, lr_bias=1.0, lr_new=1.0, soft=0.0, lock_patch=False, depth=1)
SCRATCH = dict(muon=3.0, epochs=8, warmup=1.0)      # and this where no --clip tells what to start from


# ---- training -------------------------------------------------------------------------------------------------------

def lr_at(it, n, recipe):
    """Learning rate at iteration `it`, n iterations per epoch: linear from lr_start to lr, then half a cosine to lr_end, or with decay_every
    tenths of it. Per iteration the warm-up ends at lr; per epoch, the first epoch after it begins there (IRRA: 0.1, 0.28 ... 0.82, then 1 of
    the rate)."""
    if recipe["per_epoch"]:
        it, n = it // n, 1
    warm = round(recipe["warmup"] * n)
    if it < warm:
        return recipe["lr_start"] + (recipe["lr"] - recipe["lr_start"]) * it / max(1, warm - (not recipe["per_epoch"]))
    if recipe["decay_every"]:
        return recipe["lr"] * 0.1 ** (it // (recipe["decay_every"] * n))
    done = (it - warm) / max(1, recipe["epochs"] * n - warm)
    return recipe["lr_end"] + 0.5 * (recipe["lr"] - recipe["lr_end"]) * (1 + math.cos(math.pi * done))


def lr_factor(name, recipe):
    """Factor of a parameter's learning rate: lr_new for layers that CLIP does not have, lr_bias for CLIP's biases. With official=1 by
    names: lr_new for cross-attention, its blocks and classifiers only, and lr_bias for the biases of the former two."""
    new, bias = name.startswith("heads."), name.endswith("bias")
    if recipe.get("official") and not re.match(r"heads\.(id|mlm\.(fc|ln|out))\.", name):
        new = new and not bias and re.search(r"\.(cross|blocks)\.", name)
    return recipe["lr_new"] if new else recipe["lr_bias"] if bias else 1.0


class HalfAdam(torch.optim.Adam):
    """Adam on weights in pure fp16, as the official code of IRRA and UIT trains: gradient, both moments and the step are rounded to
    fp16, and there is no fp32 copy that would add up steps too small for fp16. At a rate of 1e-5 weights above 0.03 then never move:
    half of the distance to the next fp16 number is more than a step.

    parameters: as torch.optim.Adam takes them. halves: those held in fp16; the model keeps them as fp32 numbers that fp16 can hold."""

    def __init__(self, groups, halves, **options):
        self.copies = {p: p.detach().half() for p in halves}
        groups = [group | dict(params=[self.copies.get(p, p) for p in group["params"]]) for group in groups]
        super().__init__(groups, **options, foreach=False)              # the plain loop: the same roundings on any device
        self.write_back()

    @torch.no_grad()
    def write_back(self):
        for p, half in self.copies.items():
            p.copy_(half)

    def step(self, closure=None):
        for p, half in self.copies.items():
            half.copy_(p.detach())                                      # the same unless a checkpoint was loaded
            half.grad = None if p.grad is None else p.grad.half()
        super().step(closure)
        self.write_back()


def held_in_half(model):
    """The parameters that OpenAI's convert_weights turns to fp16: weights and biases of linear layers and convolutions, and the two
    projections. Norms, embeddings and single tokens stay in fp32."""
    layers = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    found = [p for layer in layers for p in layer.parameters()] + [model.image.proj, model.text.proj]
    return [p for p in found if p.requires_grad]


def make_optimizers(model, recipe, fused):
    """AdamW: matrices decay; biases, norms, the class token and the temperature do not. Or `coupled`, as IRRA: Adam, where all but
    biases are drawn to 0 by their gradient. And with `muon` Muon (arXiv 2502.16982) for the matrices of both towers' blocks, whose steps
    are then orthogonal: a model that starts from nothing needs fewer of them. Each group has a `factor` of the learning rate."""
    groups, matrices = {}, []
    for name, p in model.named_parameters():
        if p.requires_grad and recipe["muon"] and not recipe.get("half_weights") and p.ndim == 2 and re.match(r"(image|text)\.blocks\.", name):
            matrices.append(p)
        elif p.requires_grad:
            decays = not name.endswith("bias") if recipe["coupled"] else p.ndim >= 2
            groups.setdefault((lr_factor(name, recipe), decays), []).append(p)
    groups = [dict(params=params, factor=factor, weight_decay=recipe["weight_decay"] if decays else 0.0)
              for (factor, decays), params in sorted(groups.items(), key=lambda g: (g[0][0], not g[0][1]))]
    options = dict(lr=recipe["lr"], betas=(0.9, recipe["beta2"]), eps=recipe["eps"])
    if recipe.get("half_weights"):
        return [HalfAdam(groups, held_in_half(model), **options)]
    kind = torch.optim.Adam if recipe["coupled"] else torch.optim.AdamW
    optimizers = [kind(groups, **options, fused=fused)]
    if matrices:
        matrices = [dict(params=matrices, factor=recipe["muon"])]
        optimizers.append(torch.optim.Muon(matrices, lr=recipe["lr"], weight_decay=recipe["weight_decay"], adjust_lr_fn="match_rms_adamw"))
    return optimizers


def build(args, recipe, tokenizer, persons, make_heads):
    """The model for a run, with its method's heads."""
    torch.manual_seed(data.derive_seed(args.seed))
    options = {k: recipe[k] for k in ("text_dropout", "patch_drop", "lock_patch")}
    size, stride = (recipe["height"], recipe["width"]), recipe["stride"]
    if args.clip == "none":
        model = DualEncoder(**SIZES[args.size] | dict(image_size=size, stride=stride, vocab=tokenizer.vocab) | options)
    else:
        model = load_clip(args.clip, size, stride, **options)
    for name, head in make_heads(recipe, model, persons).items():
        model.heads[name] = head
    if recipe["tau"]:
        model.logit_scale.data.fill_(math.log(1 / recipe["tau"]))
        model.logit_scale.requires_grad_(False)
    return model


def embed(model, tokenizer, info, records, device, workers=0, progress=True):
    """-> features of unit length of the images (N, D) and captions (M, D) of a split. Each process embeds its share, and all have them."""
    rank, ranks = losses.ranks()
    images = data.Images([r["image"] for r in records[rank::ranks]], data.EvalView(info["size"], info["norm"], info["resize"]))
    captions = [data.clean_caption(c) if info["clean"] else c for r in records for c in r["captions"]]
    image = evaluation.embed_images(model, images, device, workers, progress=progress and rank == 0)
    return together(image), together(evaluation.embed_texts(model, tokenizer(captions[rank::ranks])))


def evaluate(model, tokenizer, info, records, device, workers=0, sheet=True, progress=True):
    """Scores of a split in three ways, {name: scores}, and its retrieval sheet as HTML (None if sheet=False, then text-to-image only)."""
    captions = [c for r in records for c in r["captions"]]
    g_pid = torch.tensor([r["pid"] for r in records])
    own = torch.tensor([i for i, r in enumerate(records) for _ in r["captions"]])
    if not all(p.isfinite().all() for p in model.parameters()):
        raise FloatingPointError("the weights are not finite: training diverged in its last steps; try a lower --lr")
    image, text = embed(model, tokenizer, info, records, device, workers, progress)
    rows = {"text to image": evaluation.retrieval_metrics(text, image, g_pid[own], g_pid)}
    if not sheet:
        return rows, None
    rows["image to text"] = evaluation.retrieval_metrics(image, text, g_pid, g_pid[own])
    if any(n > 1 for n in collections.Counter(g_pid.tolist()).values()):
        rows["text to other images"] = evaluation.retrieval_metrics(text, image, g_pid[own], g_pid, own)
    return rows, evaluation.retrieval_sheet(captions, text, image, g_pid, own, lambda j: data.load_image(records[j]["image"]))


# ---- many processes -------------------------------------------------------------------------------------------------
#
# torchrun starts W processes of the same command. Each takes its part of every batch through the encoders, gathers the features of all
# (losses.gather) and computes the loss of the whole batch; the mean of their gradients is then the gradient of one process with the
# whole batch. Nothing else is different, so all of them make the same step.

def join(args):
    """Under torchrun: joins its processes, a GPU each. The first alone prints and writes."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return
    if args.device == "cuda":
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(args.device)
    torch.distributed.init_process_group("nccl" if args.device.startswith("cuda") else "gloo")
    atexit.register(torch.distributed.destroy_process_group)
    if losses.ranks()[0]:
        sys.stdout = open(os.devnull, "w")


def wait():
    """Until all processes are here."""
    if losses.ranks()[1] > 1:
        torch.distributed.barrier()


def together(x):
    """Rows rank, rank + W, ... from each process -> all of them, in order, on the CPU."""
    rank, ranks = losses.ranks()
    if ranks == 1:
        return x
    torch.distributed.all_gather_object(parts := [None] * ranks, x)
    out = x.new_empty(sum(map(len, parts)), *x.shape[1:])
    for r, part in enumerate(parts):
        out[r::ranks] = part
    return out


def mean_of_ranks(tensors):
    """Makes each of these tensors the mean over all processes, in one message."""
    if (W := losses.ranks()[1]) > 1 and tensors:
        flat = torch.cat([x.flatten() for x in tensors])
        torch.distributed.all_reduce(flat)
        for x, part in zip(tensors, flat.div_(W).split([x.numel() for x in tensors])):
            x.copy_(part.view_as(x))


def any_rank(wanted, device):
    """Whether any process wants it."""
    said = torch.tensor(float(bool(wanted)), device=device)
    mean_of_ranks([said])
    return said.item() > 0


def quiet_worker(_):
    """Ctrl-C reaches every process of the terminal; the workers leave it to the training process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextlib.contextmanager
def asked_to_stop():
    """A list that Ctrl-C and SIGTERM add to, instead of ending the program then and there."""
    asked = []
    handlers = {s: signal.signal(s, lambda number, frame: asked.append(number)) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def steps(args, recipe, model, tokenizer, pairs, val, out, info, stop=()):
    """The whole of training but the losses, which a method computes in the loop over this:

        for batch, epoch, autocast, parts in steps(...):
            parts |= {name: weighted loss of this batch}

    Each step is made when the loop asks for the next batch. epoch: how many are done, with a fraction; autocast: for the encoders. Writes
    last.pt, best.pt and log.jsonl; all that matters is in the files. Saves and raises KeyboardInterrupt, with what to do next, when
    something is in `stop`."""
    device, (rank, ranks) = torch.device(args.device), losses.ranks()
    if recipe["batch"] % ranks:
        raise ValueError(f"a batch of {recipe['batch']} cannot be shared by {ranks} processes; choose --batch so that it can")
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": torch.float32}[args.amp]
    autocast = functools.partial(torch.autocast, device.type, dtype=dtype, enabled=args.amp != "off")      # of the encoders; losses are fp32
    model.to(device)
    model.micro_batch, model.image.checkpoint_blocks, model.text.checkpoint_blocks = args.micro_batch, args.checkpoint_blocks, args.checkpoint_blocks
    if args.compile:
        model.image.compile()
        model.text.compile()
    optimizers = make_optimizers(model, recipe, fused=device.type == "cuda")
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16" and not recipe.get("half_weights"))
    state = dict(epoch=0, step=0, best=-1.0, scores={})                 # step: batches done in this epoch
    if args.resume:
        saved = read_file(out / "last.pt")
        model.load_state_dict(saved["weights"])
        for optimizer, was in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(was)
        scaler.load_state_dict(saved["scaler"])
        state = {k: saved[k] for k in state}

    def checkpoint(name):
        going_on = dict(optimizers=[optimizer.state_dict() for optimizer in optimizers], scaler=scaler.state_dict()) if name == "last.pt" else {}       # best.pt is for use
        save(out / name, content(args, recipe, model, tokenizer, info, heads=name == "last.pt") | state | going_on)

    log = functools.partial(write_log, out)

    drop_last = not recipe.get("official")
    n = len(data.batches(recipe["sampler"], pairs.pids, recipe["batch"], data.derive_seed(args.seed, 0), pairs.images, drop_last))
    if n == 0:
        raise ValueError(f"{len(pairs)} training pairs do not fill one batch of {recipe['batch']}; lower it with --batch")
    bar = tqdm(total=recipe["epochs"] * n * recipe["batch"], initial=(state["epoch"] * n + state["step"]) * recipe["batch"], unit=" pairs",
               smoothing=0.05, disable=True if rank else None)
    saved_at = time.time()
    while state["epoch"] < recipe["epochs"]:
        epoch, done = state["epoch"], state["step"]
        order = data.batches(recipe["sampler"], pairs.pids, recipe["batch"], data.derive_seed(args.seed, epoch), pairs.images, drop_last)
        order = [items for items in order if len(items) >= ranks]       # a smaller batch cannot be shared
        if recipe.get("triplet") and (alone := sum(len({pairs.pids[j] for j in items}) == 1 for items in order)):
            print(f"{alone} of {len(order)} batches show one person only: nothing to be told from, the triplet loss is 0 there")
        pairs.epoch = epoch
        shares = [items[rank * (len(items) // ranks):(rank + 1) * (len(items) // ranks)] for items in order[done:]]
        loader = torch.utils.data.DataLoader(pairs, batch_sampler=shares, num_workers=args.workers, worker_init_fn=quiet_worker,
                                             pin_memory=device.type == "cuda", collate_fn=functools.partial(data.collate, tokenizer, mask=masks(recipe)))
        model.train()
        values, logged, began = [], 0, time.time()                      # of the losses, a row per step; how many rows log.jsonl has
        for i, batch in enumerate(loader, start=done):
            it = epoch * n + i * n / len(order)                         # samplers by person give epochs of slightly different length
            lr = lr_at(it, n, recipe)
            for group in (group for optimizer in optimizers for group in optimizer.param_groups):
                group["lr"] = lr * group["factor"]
            torch.manual_seed(data.derive_seed(args.seed, epoch, i, rank))         # dropout is a function of where we are: resume is exact
            batch = batch | {k: batch[k].to(device, non_blocking=True) for k in ("pixels", "pid")}         # tokens are cut first
            parts = {}
            yield batch, it / n, autocast, parts
            loss = sum(parts.values())
            model.zero_grad(set_to_none=True)
            scaler.scale(loss).backward()
            mean_of_ranks([p.grad for p in model.parameters() if p.grad is not None])
            for optimizer in optimizers:
                scaler.step(optimizer)                                  # left out by itself if fp16 overflowed
            scaler.update()
            state["step"] = i + 1
            bar.update(recipe["batch"])
            values.append(torch.stack([loss, *parts.values()]).detach())
            now, due = i % args.log_every == 0 or i + 1 == len(order), bool(stop) or time.time() - saved_at > 60 * args.save_minutes
            if ranks > 1:                                               # one wants to save or stop: all do, at the next step that is logged
                due = now and any_rank(due, device)
            if now or due:                                              # reading a number waits for the GPU, so not at every step
                recent = torch.stack(values[logged:])
                mean_of_ranks([recent])
                if not recent.isfinite().all():
                    bad = done + logged + int((~recent.isfinite().all(dim=1)).nonzero()[0])
                    files = [str(pairs.items[j][0]["image"]) for j in order[bad][:4] if isinstance(pairs.items[j][0]["image"], Path)]
                    raise FloatingPointError(f"the loss is not finite in epoch {epoch + 1}, step {bad + 1}" + f" (images {', '.join(files)} ...)" * bool(files) +
                                             f"\n  Try a lower --lr (now {recipe['lr']:g})" + ", --amp bf16 or off" * (args.amp == "fp16") +
                                             f"; {out}/last.pt, if there, is from before")
            if now:
                mean, logged = recent.mean(dim=0).tolist(), len(values)
                bar.set_postfix_str(" ".join(f"{k} {v:.3f}" for k, v in zip(["loss", *parts], mean)))
                log(at=[epoch, i + 1], epoch=epoch + (i + 1) / len(order), lr=lr, scale=model.scale().item(), loss=mean[0], **dict(zip(parts, mean[1:])))
            if due and i + 1 < len(order):
                checkpoint("last.pt")
                saved_at = time.time()
                if any_rank(stop, device):
                    bar.close()
                    raise KeyboardInterrupt(f"stopped in epoch {epoch + 1}, step {i + 1} of {len(order)}; {out}/last.pt is saved. "
                                  "Go on with the same command and --resume")

        state |= dict(epoch=epoch + 1, step=0)
        speed = (len(order) - done) * recipe["batch"] / (time.time() - began)
        mean = torch.stack(values).mean(dim=0).tolist()
        line = f"epoch {epoch + 1:3d}/{recipe['epochs']}  " + "  ".join(f"{k} {v:.3f}" for k, v in zip(["loss", *parts], mean)) + f"  {speed:.0f} pairs/s"
        if val:
            scores, _ = evaluate(model, tokenizer, info, val, device, args.workers, sheet=False, progress=False)
            state["scores"] = scores["text to image"]
            line += f"  val {evaluation.format_scores(state['scores'])}"
            log(at=[epoch + 1, 0], epoch=epoch + 1, val=state["scores"])
        bar.write(line) if not bar.disable else print(line, flush=True)
        if not val or state["scores"]["R@1"] > state["best"]:           # without a validation split the last epoch is the best
            state["best"] = state["scores"].get("R@1", -1.0)
            checkpoint("best.pt")
        checkpoint("last.pt")
        saved_at = time.time()
        if any_rank(stop, device):
            bar.close()
            raise KeyboardInterrupt(f"stopped after epoch {epoch + 1}; {out}/last.pt is saved. Go on with the same command and --resume")
    bar.close()


# ---- the command line -----------------------------------------------------------------------------------------------

def listed(recipe, keys, without=()):
    return "".join(f"  {k:18}{str(v):12}{keys[k]}\n" for k, v in recipe.items() if k not in without)


def parse_args(argv=None):
    """-> args, recipe. The command line beats the recipe, the recipe beats the default."""
    recipes = {name: recipe for name, (recipe, *_) in METHODS.items()}
    p = arguments(recipes, __doc__, f"keys of a recipe, for --set, with the values of tbps-clip:\n{listed(TBPS_CLIP, KEYS)}"
                  f"and of irra and uit alone, with the values of uit:\n{listed(UIT, KEYS, TBPS_CLIP)}"
                  f"and of ctlg alone:\n{listed(CTLG, KEYS, TBPS_CLIP)}\n" +
                  "".join(f"{name} differs in: {differences(recipe, CTLG | UIT | TBPS_CLIP)}\n" for name, recipe in recipes.items() if recipe != TBPS_CLIP))
    args = p.parse_args(argv)
    args.method = args.method or ("tbps-clip-simplified" if args.dataset.startswith("toy") else "tbps-clip")
    return args, settle(args, recipes[args.method])


def arguments(recipes, description, epilog):
    """The options that training commands share."""
    p = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter,
                                epilog=epilog + f"on toy people every recipe gets: {' '.join(f'{k}={v}' for k, v in TOY.items())}; "
                                f"without --clip also {' '.join(f'{k}={v}' for k, v in SCRATCH.items())}")
    g = p.add_argument_group("what")
    g.add_argument("--dataset", choices=data.DATASETS, default="toy", help="the data set (default: toy, drawn on the spot)")
    g.add_argument("--data-root", default="data", help="the set's folder or its parent; for csv the file (default: data)")
    g.add_argument("--method", choices=recipes, help="one of: " + ", ".join(recipes))
    g.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="keys of the recipe, below, by other values")
    g.add_argument("--epochs", type=int, help="short for --set epochs=")
    g.add_argument("--batch", type=int, help="short for --set batch=, pairs per step")
    g.add_argument("--lr", type=float, help="short for --set lr=, the peak")
    g.add_argument("--extra", nargs="+", default=[], metavar="DIR", help="folders of generated pairs (imgs/ and pairs.jsonl) to train on too")
    g.add_argument("--min-score", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="of these pairs only those whose scores reach the values, like words=0.02")
    g.add_argument("--share", type=float, default=1.0, help="train on this share of the training persons, drawn by the seed (default: 1, all)")
    g.add_argument("--val", choices=["auto", "none"], default="auto", help="none: train on what a set without validation split would hold out, keep the last epoch")
    g.add_argument("--skip-bad", action="store_true", help="decode all images first and leave out those that fail (default: stop at one)")
    g = p.add_argument_group("from what")
    g.add_argument("--clip", help="CLIP weights: a file, folder, hub id, checkpoint of ours, or none (default: none on toy people, else openai/clip-vit-base-patch16)")
    g.add_argument("--tokenizer", help="CLIP's vocabulary, if it is not beside the weights: bpe_simple_vocab_16e6.txt.gz or tokenizer.json")
    g.add_argument("--size", choices=SIZES, help="architecture for --clip none (default: toy on toy people, else ViT-B/16)")
    g = p.add_argument_group("how")
    g.add_argument("--seed", type=int, default=0, help="of weights, order, augmentation and dropout (default: 0)")
    g.add_argument("--out", help="the run's folder (default: runs/DATASET-METHOD-SEED)")
    g.add_argument("--resume", action="store_true", help="go on from last.pt in the run's folder, exactly")
    g.add_argument("--overwrite", action="store_true", help="replace the run in the run's folder")
    g.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda, cpu or mps (default: cuda where there is one)")
    g.add_argument("--amp", choices=["auto", "bf16", "fp16", "off"], default="auto", help="precision of the encoders (default: bf16 or fp16 on CUDA, off elsewhere)")
    g.add_argument("--compile", action="store_true", help="torch.compile the towers: slow start, faster steps on a GPU")
    g.add_argument("--micro-batch", type=int, default=0, metavar="M", help="encode M pictures or captions at a time, twice: the same loss and gradient of the whole "
                   "batch in less memory (default: all at once)")
    g.add_argument("--checkpoint-blocks", action="store_true", help="compute each transformer block twice: less memory still")
    g.add_argument("--workers", type=int, help="processes that decode and augment (default: 0 on toy people, else the number of cores, at most 8)")
    g.add_argument("--save-minutes", type=float, default=10, help="minutes between saves within an epoch (default: 10)")
    g.add_argument("--log-every", type=int, default=10, help="steps between lines of log.jsonl (default: 10)")
    return p


CHOICES = dict(sampler=["random", "random-count", "views"], norm=list(data.NORMS), resize=["bilinear", "bicubic"], eval_resize=["bilinear", "bicubic"],
               image_aug=data.IMAGE_AUG, same=["pair", "image", "person"])


def settle(args, recipe, choices=CHOICES):
    """-> the recipe with the values from the command line, checked; completes args."""
    toy = args.dataset.startswith("toy")
    recipe = recipe | ({k: v for k, v in (TOY | (SCRATCH if args.clip in (None, "none") else {})).items() if k in recipe} if toy else {})
    given = [f"{k}={getattr(args, k)}" for k in ("epochs", "batch", "lr") if getattr(args, k) is not None]
    for text in given + args.set:
        key, _, value = text.partition("=")
        if key not in recipe:
            raise ValueError(f"the recipe of {args.method} has no key {key!r}; it has {', '.join(recipe)}")
        recipe[key] = typed(key, value, recipe[key])
    for key, able in choices.items():
        if recipe.get(key, able[0]) not in able:
            raise ValueError(f"{key} must be one of {', '.join(able)}, not {recipe[key]!r}")
    for key, value in recipe.items():
        if isinstance(value, float) and not 0 <= value < math.inf:      # nan too
            raise ValueError(f"{key}={value} must be a number from 0 up")
        if key in SHARES and value > 1:
            raise ValueError(f"{key}={value} must be a share from 0 to 1")
    if not any(recipe.get(k) for k in LOSSES):
        raise ValueError("all losses have the weight 0: nothing to learn")
    if max(recipe["height"], recipe["width"]) > 4096 or recipe["stride"] < 0:
        raise ValueError("height and width go up to 4096 pixels, stride from 0")
    if zero := [k for k in ("eps", "ritc_eps", "depth") if recipe.get(k, 1) <= 0]:
        raise ValueError(f"{zero[0]}={recipe[zero[0]]} must be above 0")
    if recipe.get("half_weights") and (not recipe["coupled"] or recipe["eps"] < 6e-8):
        raise ValueError(f"half_weights=1 trains with Adam and an eps that fp16 can hold: set coupled=1 eps=1e-3 too, not {recipe['coupled']:d} and {recipe['eps']:g}")
    if recipe["beta2"] >= 1:
        raise ValueError(f"beta2={recipe['beta2']} must be below 1")
    if masks(recipe) == (0, 0):
        raise ValueError("mask_content and mask_other are both 0: masking is left out by mlm=0 mask_all=0")
    if "" in (args.out, args.clip, args.tokenizer, *args.extra):
        raise ValueError("an option was given an empty text; is a variable of the shell not set?")
    if len({Path(folder).resolve() for folder in args.extra}) < len(args.extra):
        raise ValueError("--extra names a folder twice")
    if args.min_score and not args.extra:
        raise ValueError("--min-score chooses among generated pairs; name their folder with --extra")
    if args.micro_batch < 0 or args.micro_batch and recipe.get("feature_mixup"):
        raise ValueError("--micro-batch must be at least 1, and cannot be had with feature_mixup, which mixes the whole batch within the encoder")
    if args.seed < 0 or (args.workers or 0) < 0 or args.log_every < 1 or not args.save_minutes >= 0:
        raise ValueError("--seed, --workers and --save-minutes go from 0, --log-every from 1")
    if not 0 < args.share <= 1:
        raise ValueError(f"--share {args.share} must be above 0 and at most 1")
    check_device(args.device)
    if small := [k for k, least in dict(epochs=1, batch=2, height=1, width=1).items() if recipe[k] < least]:
        raise ValueError(f"{small[0]}={recipe[small[0]]} is too small" + ": a pair alone in its batch has nothing to be told from" * (small[0] == "batch"))
    args.clip = args.clip or ("none" if toy else "openai/clip-vit-base-patch16")
    args.size = args.size or ("toy" if toy else "ViT-B/16")
    args.out = args.out or f"runs/{args.dataset}-{args.method}-{args.seed}"
    args.workers = args.workers if args.workers is not None else 0 if toy else min(8, os.cpu_count())
    if args.amp == "auto":
        half = recipe.get("half_weights") or not torch.cuda.is_bf16_supported()
        args.amp = ("fp16" if half else "bf16") if args.device.startswith("cuda") else "off"
    return recipe


def check_device(device):
    if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", device):
        raise ValueError(f"--device is cpu, mps, cuda or cuda:N, not {device!r}")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError("torch sees no CUDA device here; take --device cpu, or install the driver")


TEXT_AUG = ["deletion", "synonym", "insertion", "swap", "eda", "prune", "approximate"]
SHARES = ["mixup", "back_translation", *TEXT_AUG, "soft", "text_dropout", "patch_drop", "mask_content", "mask_other", "drop"]
LOSSES = ["itc", "nitc", "ritc", "citc", "ss", "ss_text", "sdm", "cmpm", "id", "triplet", "restoration", "mlm"]


def masks(recipe):
    """The rates at which words are masked, or None where the recipe has no use for masked captions."""
    return (recipe["mask_content"], recipe["mask_other"]) if recipe.get("mlm") or masks_all_losses(recipe) else None


def differences(recipe, base):
    return " ".join(f"{k}={v}" for k, v in recipe.items() if v != base.get(k))


def typed(key, value, like):
    """The text of a --set value as the type its key has."""
    try:
        if isinstance(like, bool):
            return {"0": False, "1": True, "false": False, "true": True}[value.lower()]
        return type(like)(value)
    except (KeyError, ValueError):
        raise ValueError(f"{key} takes {'0 or 1' if isinstance(like, bool) else 'a whole number' if isinstance(like, int) else 'a number'}, not {value!r}") from None


def settings(args):
    """What of the arguments decides the result; where it is computed, and how often it is saved, does not."""
    return {k: v for k, v in vars(args).items() if k not in ("resume", "overwrite", "out", "device", "workers", "save_minutes", "log_every", "micro_batch", "checkpoint_blocks", "set", "epochs", "batch", "lr")}


WRITTEN = ["last.pt", "best.pt", "log.jsonl", "report.html", "code"]      # what a run's folder holds


def check_run(args, recipe, out):
    """Before anything is read: a new run must not meet an old one, a resumed one must have the same settings."""
    last = out / "last.pt"
    if args.resume and args.overwrite:
        raise ValueError("--resume goes on with a run, --overwrite deletes it: take one of them")
    if not args.resume:
        if last.exists() and not args.overwrite:
            raise ValueError(f"{out} holds a run already; --resume goes on with it, --overwrite deletes it, --out or --seed makes another")
        if not last.exists() and out.exists() and not (out / "log.jsonl").exists() and (not out.is_dir() or any(out.iterdir())):
            raise ValueError(f"{out} exists and is not a run; --out makes another folder")
        out.mkdir(parents=True, exist_ok=True)
        return
    saved = read_file(data.need(last, "the checkpoint to resume from", "start the run without --resume"))
    before, now = saved["args"] | saved["recipe"], settings(args) | recipe
    if changed := [f"{k}: {before.get(k)!r} then, {now.get(k)!r} now" for k in sorted(before.keys() | now.keys()) if before.get(k) != now.get(k)]:
        raise ValueError(f"{last} was made with other options, so going on would not be the same run:\n  " + "\n  ".join(changed) +
                         f"\n  --clip {last} with another --out starts a new run from these weights")


def open_run(args, out):
    """The run's folder, when all is ready to start: emptied of an old run, or its log cut back to the checkpoint."""
    wait()                                                              # all have checked it
    if losses.ranks()[0]:
        return wait()
    if args.resume:
        saved = read_file(out / "last.pt")
        lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        with open(out / "log.jsonl", "w") as f:                         # steps after the checkpoint will be done, and logged, again
            f.writelines(json.dumps(line) + "\n" for line in lines if line["at"] <= [saved["epoch"], saved["step"]])
        return wait()
    for name in WRITTEN:
        shutil.rmtree(out / name) if (out / name).is_dir() else (out / name).unlink(missing_ok=True)
    (out / "code").mkdir()
    (out / "log.jsonl").touch()
    for file in Path(__file__).parent.glob("*.py"):
        shutil.copy(file, out / "code")
    wait()


def load_data(args):
    """-> {split: records}; the training split with what --extra adds, without what --skip-bad finds."""
    for folder in args.extra:                                           # first: to read a set takes a while
        data.need(Path(folder) / "pairs.jsonl", "the list of generated pairs", "generate.py writes such folders, which hold imgs/ and pairs.jsonl")
    hold_out = args.val == "auto"
    splits = {s: data.read(args.dataset, args.data_root, s, hold_out) for s in (("train", "val", "test") if hold_out else ("train", "test"))}
    if args.share < 1:
        pids = sorted({r["pid"] for r in splits["train"]})
        drawn = set(random.Random(f"share {args.seed}").sample(pids, max(1, round(args.share * len(pids)))))
        splits["train"] = [r for r in splits["train"] if r["pid"] in drawn]
    for folder in args.extra:
        pairs = data.read("pairs", folder, "train", hold_out=False)
        good, first = data.filter_by_score(pairs, args.min_score), 1 + max(r["pid"] for r in splits["train"])
        if args.share < 1:                                              # what is made of others is not known either
            good = [r for r in good if r["source_pid"] in drawn]
        print(f"{folder}: {len(good):,} of {len(pairs):,} generated pairs" + f" reach {' '.join(args.min_score)}" * bool(args.min_score) + " and are of these persons" * (args.share < 1))
        pids = {pid: n for n, pid in enumerate(sorted({r["pid"] for r in good}), start=first)}          # those of two folders may be the same
        splits["train"] = splits["train"] + [r | dict(pid=pids[r["pid"]]) for r in good]
    for split, records in splits.items():
        if args.skip_bad:
            bad = data.unreadable_images(records)
            for _, why in bad:
                print(f"left out: {why}")
            splits[split] = records = [r for r in records if not any(r is b for b, _ in bad)]
        print(f"{args.dataset} {split}: " + "{:,} persons, {:,} images, {:,} captions".format(*data.counts(records)))
    return splits


def prepare(args, recipe, records, make_heads):
    """-> model, tokenizer, pairs, info: what `steps` takes, from the training records."""
    if recipe["back_translation"] and not any(r.get("captions_bt") for r in records):
        print("no back-translations (captions_bt) in these data: that augmentation is off")
    r, size = recipe, (recipe["height"], recipe["width"])
    more = dict(views=1 + r["mvs"], self_views=2 * (r["ss"] > 0), texts=1 + r["mvs_text"], self_texts=2 * (r["ss_text"] > 0)) if "mvs" in r else {}
    pairs = data.Pairs(records, size, args.seed, **more, image_aug=r["image_aug"], norm=r["norm"], resize=r["resize"], clean=r["clean"],
                       back_translation=r["back_translation"], text={k: r[k] for k in TEXT_AUG} | dict(protect=not r.get("official")), mixup=r.get("mixup", 0.0))
    if args.tokenizer or args.clip != "none":
        tokenizer = tokenizer_for(args.clip, args.tokenizer, mask=masks(r) is not None)
    else:
        tokenizer = data.train_tokenizer([c for record in records for c in record["captions"]], mask=masks(r) is not None)
    model = build(args, recipe, tokenizer, pairs.persons, make_heads)
    if tokenizer.vocab != model.arch["vocab"]:
        raise ValueError(f"the tokenizer has {tokenizer.vocab:,} tokens, the weights {model.arch['vocab']:,}: they do not belong together")
    if pairs.persons < 2:
        raise ValueError("all training images show one person: there is nobody to be told from")
    if r["warmup"] >= r["epochs"]:
        print(f"note: the warm-up takes {r['warmup']:g} of {r['epochs']} epochs, so the rate never reaches its peak; see --set warmup=")
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"{args.method}: {trained:,} parameters trained of {sum(p.numel() for p in model.parameters()):,}; {size[0]}x{size[1]} pixels, "
          f"{model.image.grid[0]}x{model.image.grid[1]} patches; batch {r['batch']}, {r['epochs']} epochs; {args.device}, amp {args.amp}", flush=True)
    known = preprocessing_for(args.clip) if args.clip != "none" else dict(file=None)
    if known["file"] and known["norm"] != r["norm"]:
        print(f"note: images are normalised with norm={r['norm']}, as the recipe says; the weights were trained with norm={known['norm']} "
              f"({known['file']})")
    return model, tokenizer, pairs, dict(size=size, norm=r["norm"], resize=r["eval_resize"], clean=r["clean"])


def conclude(args, recipe, records, out, minutes, *chapters):
    """Looks at the test split, once: scores best.pt and last.pt on these records, writes report.html, prints."""
    rows = {}
    for name in ("last.pt", "best.pt"):
        model, tokenizer, info = load_checkpoint(out / name, args.device)
        scores, sheet = evaluate(model, tokenizer, info, records, args.device, args.workers)
        rows |= {f"{name}, {way}": s for way, s in scores.items()}
    write_log(out, at=[recipe["epochs"], 1], test=rows)
    if losses.ranks()[0] == 0:
        report(out, args, recipe, rows, sheet, minutes, *chapters)
    print(f"trained in {minutes:.1f} minutes; report: {out / 'report.html'}")
    if other := rows.get("best.pt, text to other images"):
        print(f"test, without the image that a caption was written for, {evaluation.format_scores(other)}")
    print(f"test {evaluation.format_scores(rows['best.pt, text to image'])}", flush=True)


def main():
    args, recipe = parse_args()
    make_heads, step_losses = METHODS[args.method][1:]
    out = Path(args.out)
    join(args)
    check_run(args, recipe, out)
    splits = load_data(args)
    model, tokenizer, pairs, info = prepare(args, recipe, splits["train"], make_heads)
    open_run(args, out)
    began = time.time()
    with asked_to_stop() as stop:
        for batch, epoch, autocast, parts in steps(args, recipe, model, tokenizer, pairs, splits.get("val"), out, info, stop):
            parts |= step_losses(model, batch, recipe, epoch, autocast)
    minutes = (time.time() - began) / 60
    restored = restorations(model, tokenizer, info, splits["test"], recipe) if recipe.get("restoration") else ""
    conclude(args, recipe, splits["test"], out, minutes, ("Restorations (last.pt, test split)", restored))


@torch.no_grad()
def restorations(model, tokenizer, info, records, recipe, number=8):
    """HTML: images as a restorer sees and paints them, with their own caption and with one whose first colour word is another."""
    able = [(r, c, data.change_colour(c)) for r in records for c in r["captions"][:1] if data.change_colour(c)]
    device, patch, rows = model.logit_scale.device, model.arch["patch"], []
    view = data.EvalView(info["size"], info["norm"], info["resize"])
    mean, std = (torch.tensor(v, device=device)[:, None, None] for v in data.mean_std(info["norm"]))
    for record, caption, changed in able[::max(1, len(able) // number)][:number]:
        pixels, painted = view(record["image"])[None].to(device), []
        image = pixels * std + mean                                     # in [0, 1], to look at
        plain = patchify(grey(image), patch)
        for words in (caption, changed):
            text = model.eval().text_tokens(tokenizer([data.clean_caption(words) if info["clean"] else words]), cut=not recipe["official"])
            restored, dropped = restore(model, pixels, text, None, recipe, torch.Generator(device).manual_seed(len(rows)))
            restored = patchify(unpatchify(restored, model.image.grid, patch) * std + mean, patch)
            painted.append(torch.where(dropped[..., None], restored, plain))
        seen = torch.where(dropped[..., None], plain.new_tensor([0.80, 0.75, 0.95]).repeat(patch ** 2), plain)
        shown = [grey(image), *(unpatchify(p, model.image.grid, patch) for p in (seen, *painted)), image]
        names = ["grey image", "visible patches", "restored with caption 1", "restored with caption 2", "image"]
        pictures = [data.load_image((255 * x[0].clamp(0, 1)).byte().permute(1, 2, 0).cpu().numpy()) for x in shown]
        figures = "".join(evaluation.figure(x, name, name, "large", 192) for name, x in zip(names, pictures))
        rows.append(f"<div class=row><p>1: {html.escape(caption)}<br>2: {html.escape(changed)}</p>{figures}</div>")
    if not rows:
        return ""
    return ("<p class=legend>The grey image; its visible patches, with the dropped ones in violet; the dropped patches "
            "restored with caption 1; with caption 2, which names another first colour; the image.</p>" + "".join(rows))


def report(out, args, recipe, rows, sheet, minutes, *chapters):
    """report.html: scores, curves, retrieval sheet, a method's own chapters, settings."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    steps, vals = [x for x in lines if "loss" in x], [x for x in lines if "val" in x]
    parts = [k for k in steps[0] if k not in ("at", "epoch", "lr", "scale")]
    curves = evaluation.curve("losses", {k: [(x["epoch"], x[k]) for x in steps] for k in parts})
    curves += evaluation.curve("validation, %", {k: [(x["epoch"], x["val"][k]) for x in vals] for k in (vals[0]["val"] if vals else [])})
    curves += evaluation.curve("learning rate", {"lr": [(x["epoch"], x["lr"]) for x in steps]})
    curves += evaluation.curve("scale = 1 / temperature", {"scale": [(x["epoch"], x["scale"]) for x in steps]})
    shown = "".join(f"<div>{k} = {v}</div>" for k, v in sorted((settings(args) | recipe).items()))
    evaluation.write_page(out / "report.html", f"{args.method} on {args.dataset}, seed {args.seed}", [("Test scores, %", evaluation.table(rows)),
                          ("Curves", curves), ("Queries and their top 10 (best.pt, test split)", sheet), *chapters,
                          ("Settings", f"<p>trained in {minutes:.1f} minutes on {args.device}</p><div class=settings>{shown}</div>")])


if __name__ == "__main__":
    data.command(main)
