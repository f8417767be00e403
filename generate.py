"""Proximity data generation (PDG) of CTLG (arXiv 2311.09084): a diffusion model turns a training pair into new pairs nearby, in which one
piece of clothing has another colour, in the picture and in the caption.

    python generate.py --words C --judge C                                 toy people: trains a small diffusion model, then 500 pairs
    python generate.py --dataset cuhk --data-root DIR --diffusion MODEL    with a Stable Diffusion 1.x: a folder, or a hub id
    torchrun --nproc_per_node 8 generate.py ...                            on all GPUs of a machine
    python tbps.py --dataset cuhk --data-root DIR --extra runs/pdg-cuhk-0  trains on them too

C is a checkpoint of tbps.py: the diffusion model starts from its text tower, its encoders score the pairs. Stopped at any moment and started
again with the same command, it ends with the same files. Pictures of the folder: imgs/; what each was made from, its captions and
scores: pairs.jsonl; some of them side by side: report.html.

M mentions, B sources in a batch, R rows of the model's batch, T steps, L latents: 4 channels and an eighth of the pixels' side (Stable
Diffusion), or the pixels themselves (no VAE). z[t] is the latent at step t of T, 0 the clean one."""

import argparse
import collections
import html
import io
import json
import math
import os
import random
import re
import sys
import time
from pathlib import Path
from pickle import UnpicklingError

import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import save_file

import data
import eval as evaluation
import tbps

# ---- caption edits --------------------------------------------------------------------------------------------------
#
# What is edited is a *mention*: a garment with its colours, "blue and white striped shirt" or "his shirt is blue". An edit replaces words by
# others of as many tokens, so that token n of the new caption stands for what token n of the old one stood for, and attention maps of one serve
# the other.
#
# Differences from the official code of PDG:
# - It enlarges the pictures first, by LDM-SR (latent diffusion super-resolution, 60x160 to 240x640 pixels). That model is
#   published. Only the authors' fine-tuned weights of Stable Diffusion are not. Here `paste` keeps the source's resolution.
# - Its mask words are all words of the noun chunk, with articles. Ours are the garment and its colours.
# - It splits the caption at spaces, so a garment before a comma gets no mask. Ours are found by their place in the text.
# - It edits the first coloured garment only: 10 colours, 20 garments, one edit per picture. Ours edit any garment of data.py.
# - It takes pictures of the test split as well. We take the training split only.

GARMENT_OF = {word: line[0] for line in data.GARMENTS for word in line}
NEW_COLOURS = ["red", "yellow", "green", "purple", "white", "brown", "blue", "orange", "pink", "grey", "black"]               # the paper's and black
SAME_COLOUR = [{"grey", "gray", "silver"}, {"gold", "golden", "yellow"}, {"beige", "tan", "khaki", "cream"}, {"purple", "violet", "lavender"},
               {"red", "crimson", "maroon", "burgundy"}, {"blue", "navy", "cyan"}, {"green", "olive", "teal"}, {"pink", "magenta"}, {"blue", "teal", "turquoise"}]
NEW_GARMENTS = {"trousers": ["shorts"], "shorts": ["trousers"], "shirt": ["jacket"], "jacket": ["shirt"]}
SHADES = set("sky royal baby lime forest army mint hot wine coffee rose ocean steel charcoal salmon neon electric midnight military".split())      # of "sky blue"
IS, JOINS = {"is", "are", "was", "were"}, {"and", "&", ",", "/", "or"}


def mentions(words, kinds):
    """-> mentions, [(number of the noun, numbers of its colours)], and the numbers of all colour words that are clear: each belongs to one
    mention or to another noun ("red hair"), and is no part of a shade ("navy blue", "sky blue")."""
    found, owners, colour = [], collections.Counter(), [w in data.COLOURS for w in words]
    other = [k in "NJ" and w[0].isalpha() and not c for w, k, c in zip(words, kinds, colour)]           # other words of a noun phrase
    ends = [not (k + 1 < len(words) and (other[k + 1] or colour[k + 1])) for k in range(len(words))]    # the noun, in "long sleeve shirt"

    def before(k):
        """Colours before a noun, past adjectives, nouns, and what joins two colours."""
        i, colours = k - 1, []
        while i >= 0:
            joins = words[i] in JOINS and i > 0 and colour[i - 1] and colour[i + 1]
            describes = other[i] and "-" not in words[i] and (words[i] not in GARMENT_OF or i == k - 1)
            if not (colour[i] or joins or describes):
                break
            colours = [i] * colour[i] + colours
            i -= 1
        return [] if i > 0 and words[i] in ("in", "of") and words[i - 1] in GARMENT_OF else colours      # "a shirt in red and black pants"

    def after(k):
        """Colours after a noun: "is red and white"."""
        i, colours = k + 1 + (words[k + 1:k + 2] == ["that"]), []
        if words[i:i + 1] and words[i] in IS:
            i += 1
            while i < len(words) and (colour[i] or words[i] in ("all", "mostly", "light", "dark", "plain", "solid") or words[i] in JOINS and colour[i - 1]):
                colours += [i] * colour[i]
                i += 1
        return colours

    for k, word in enumerate(words):
        if word in GARMENT_OF and not words[k + 1:k + 2] or word in GARMENT_OF and words[k + 1] not in GARMENT_OF:   # in "suit jacket" the suit is none
            found.append((k, before(k) + after(k)))
            owners.update(found[-1][1])
        elif other[k] and kinds[k] == "N" and ends[k]:
            owners.update(before(k))
    shaded = {i for i in range(len(words)) if colour[i] and (words[i - 1:i] and (colour[i - 1] or words[i - 1] in SHADES) or colour[i + 1:i + 2] == [True])}
    return found, {i for i, n in owners.items() if n == 1} - shaded


def edits(caption, tokenizer, garments=False):
    """All edits of a caption: [dict(what, noun, old, new, caption, source, tokens, blend)].

    what: "colour" or "garment"; old, new: the words; source, caption: before and after, as the tokenizer sees them; tokens: positions in
    the 77 of what changed; blend: positions of the noun and its colours, where the picture may change. Word for word, never part of one.
    No edit is offered where it could be wrong: a caption of more than 75 tokens; a garment that is mentioned twice in different colours; a
    colour that belongs to nothing ("a shirt in red"), or that has a shade ("navy blue"); words of another number of tokens."""
    source = data.normalize_text(caption)
    tagged, text = data.tag_words(source), tokenizer.bpe.encode(source)
    words = [source[start:end] for start, end, _ in tagged]
    if len(text.ids) > data.CONTEXT - 2:
        return []
    found, clear = mentions(words, [kind for _, _, kind in tagged])
    unclear = {w for k, w in enumerate(words) if w in data.COLOURS and k not in clear} | {part for w in words if "-" in w for part in w.split("-")}
    out = []
    for group in dict.fromkeys(GARMENT_OF[words[k]] for k, _ in found):
        same = [m for m in found if GARMENT_OF[words[m[0]]] == group]
        said = {k: [words[c] for c in colours] for k, colours in same}                                  # noun: its colours, in words
        for old in dict.fromkeys(c for colours in said.values() for c in colours):
            having = [(k, colours) for k, colours in same if old in said[k]]
            if old in unclear or any(said[k] and old not in said[k] and words[k] == words[h] for k in said for h, _ in having):
                continue                                                # two shirts, or one that is not understood
            near = {c for k, _ in having for c in said[k]}
            near = near.union(*(s for s in SAME_COLOUR if s & near))
            changed = [c for _, colours in having for c in colours if words[c] == old]
            out += [("colour", words[having[0][0]], old, new, changed, having) for new in NEW_COLOURS if new not in near]
        for noun in dict.fromkeys(words[k] for k, _ in same) if garments else ():
            having = [m for m in same if words[m[0]] == noun and not words[m[0] - 1:m[0]] == ["suit"]]
            if len({tuple(said[k]) for k, _ in having if said[k]}) < 2 and words.count(noun) == len(having):
                out += [("garment", noun, noun, new, [k for k, _ in having], having) for new in NEW_GARMENTS.get(noun, ()) if new not in words]
    return [edit for what, noun, old, new, changed, having in out
            if (edit := replaced(source, what, noun, old, new, changed, [i for k, colours in having for i in (k, *colours)], text, tokenizer))]


def replaced(source, what, noun, old, new, changed, blend, text, tokenizer):
    """The edit in which the words with the numbers `changed` become `new`, or None if tokens do not stay in their places."""
    spans = [(m.start(), m.end()) for m in data.WORD.finditer(source)]
    pieces, end = [], 0
    for k in sorted(changed):
        before = source[end:spans[k][0]]
        pieces += [re.sub(r"\b(a|an) $", "an " if new[0] in "aeiou" else "a ", before), new]
        end = spans[k][1]
    caption = "".join(pieces) + source[end:]
    after = tokenizer.bpe.encode(caption)

    def at(numbers):
        """Tokens of these words, counted from the start symbol."""
        return [1 + t for t, (start, stop) in enumerate(text.offsets) if any(start < spans[k][1] and stop > spans[k][0] for k in numbers)]

    tokens = [1 + t for t, (a, b) in enumerate(zip(text.ids, after.ids)) if a != b]
    articles = {1 + t for t, (start, stop) in enumerate(text.offsets) if source[start:stop].strip() in ("a", "an")}
    if len(text.ids) != len(after.ids) or not set(tokens) - articles <= set(at(changed)):
        return None
    return dict(what=what, noun=noun, old=old, new=new, source=source, caption=caption, tokens=at(changed), blend=at(blend))


# ---- diffusion, from parts ------------------------------------------------------------------------------------------

class Words(nn.Module):
    """The text encoder of Stable Diffusion 1.x: the tower of CLIP ViT-L/14 with all its tokens, after the last norm, not projected."""

    def __init__(self, vocab, width, layers, head_width, quick_gelu=True, context=data.CONTEXT):
        super().__init__()
        self.tower = tbps.TextTower(vocab, context, width, head_width, layers, 1, quick_gelu=quick_gelu)
        del self.tower.proj

    def forward(self, tokens):
        """(B, 77) ids -> (B, 77, C)."""
        return self.tower.ln_post(self.tower(tokens))


def load_words(folder):
    """The text encoder in a folder of the diffusers layout, with the names that Hugging Face gives its tensors."""
    config = data.load_json(folder / "config.json")
    path = next((folder / n for n in ("model.safetensors", "pytorch_model.bin") if (folder / n).exists()), folder / "model.safetensors")
    weights = tbps.read_file(data.need(path, "the text encoder's weights", "or pytorch_model.bin"))
    weights = {"text_model." + n.removeprefix("text_model."): w for n, w in weights.items()}           # transformers 5 saves it without
    weights = tbps.to_openai_names({n: w for n, w in weights.items() if not re.search(tbps.NOT_WEIGHTS, n)}, path)
    weights = {re.sub("^text", "tower", tbps.rename(n, tbps.OPENAI_NAMES)): w.float() for n, w in weights.items()}
    width, heads = config["hidden_size"], config["num_attention_heads"]
    words = Words(config["vocab_size"], width, config["num_hidden_layers"], width // heads, config.get("hidden_act", "quick_gelu") == "quick_gelu",
                  config["max_position_embeddings"])
    if differ := sorted(words.state_dict().keys() ^ weights.keys()):
        raise ValueError(f"{path} is not the text encoder of a Stable Diffusion 1.x: it "
                         f"{'lacks' if differ[0] in words.state_dict() else 'also has'} {differ[0]}")
    words.load_state_dict(weights)
    return words


def save_words(words, folder):
    """The way back: the same layout and names, so that what is trained here can be read like what is downloaded."""
    weights, arch = {}, words.tower
    for name, w in words.state_dict().items():
        name = name.replace("tower.", "text_model.").replace("blocks.", "encoder.layers.").replace(".fc", ".mlp.fc").replace(".ln1", ".layer_norm1")
        name = name.replace(".ln2", ".layer_norm2").replace("ln_post", "final_layer_norm").replace("attn.proj", "self_attn.out_proj")
        name = name.replace("text_model.tok", "text_model.embeddings.token_embedding").replace("text_model.pos", "text_model.embeddings.position_embedding.weight")
        for part, x in zip("qkv", w.chunk(3)) if "attn.qkv" in name else (("", w),):
            weights[name.replace("attn.qkv", f"self_attn.{part}_proj")] = x.contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "model.safetensors")
    width = arch.pos.shape[1]
    (folder / "config.json").write_text(json.dumps(dict(
        hidden_size=width, num_hidden_layers=len(arch.blocks), num_attention_heads=arch.blocks[0].attn.heads, vocab_size=len(arch.tok.weight),
        max_position_embeddings=len(arch.pos), hidden_act="quick_gelu" if arch.blocks[0].quick_gelu else "gelu")))


WEIGHTS = ["diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"]
PARTS = {  # folder -> its configuration, its weights (one of them)
    "unet": ("config.json", WEIGHTS),
    "vae": ("config.json", WEIGHTS),
    "text_encoder": ("config.json", ["model.safetensors", "pytorch_model.bin"]),
    "scheduler": ("scheduler_config.json", []),
    "tokenizer": (None, ["merges.txt", "tokenizer.json"]),
}
ALLOWED = {  # key of a configuration -> what works here, first what holds if the key is absent
    "unet": {
        "_class_name": ["UNet2DConditionModel"],
        "addition_embed_type": [None],                                  # SDXL
        "class_embed_type": [None],
        "num_class_embeds": [None],                                     # the x4 upscaler
        "encoder_hid_dim_type": [None],                                 # Kandinsky, DeepFloyd IF
    },
    "vae": {"_class_name": ["AutoencoderKL"]},
    "text_encoder": {"hidden_act": ["quick_gelu", "gelu"], "max_position_embeddings": [data.CONTEXT]},
    "scheduler": {
        "num_train_timesteps": [1000],
        "prediction_type": ["epsilon", "v_prediction"],
        "beta_schedule": ["linear", "scaled_linear", "squaredcos_cap_v2"],
    },
}
SIZES = {  # whole numbers that a configuration must have, with diffusers' defaults
    "unet": dict(in_channels=4, out_channels=4, cross_attention_dim=1280),
    "vae": dict(latent_channels=4),
    "text_encoder": dict(hidden_size=None, num_attention_heads=None, num_hidden_layers=None, vocab_size=None),
    "scheduler": {},
}


def check_value(file, key, value, allowed, why=""):
    if value not in allowed:
        raise ValueError(f"{file}: {key} is {value!r}, wanted is {' or '.join(map(repr, allowed))}{why}\n"
                         "  Only models like Stable Diffusion 1.x can make pairs")


def check_diffusion(folder):
    """Raises FileNotFoundError or ValueError, naming the file, what is there and what is wanted, if the folder does not hold
    a diffusion model that can be edited here. Reads the configurations, not the weights."""
    layout = "a diffusion model is a folder in the layout of diffusers, with unet, vae, scheduler, text_encoder and tokenizer"
    if folder.is_file():
        raise ValueError(f"{folder} is a file; {layout}")
    config, has_vae = {}, (folder / "vae").exists()
    for part, (config_name, weights) in PARTS.items():
        if part == "vae" and not has_vae:
            continue
        data.need(folder / part, "a part of the diffusion model", layout)
        if weights and not any((folder / part / name).exists() for name in weights):
            data.need(folder / part / weights[0], "a part of the diffusion model", f"or {weights[1]}; other variants are not read")
        if config_name is None:
            continue
        file = data.need(folder / part / config_name, "the configuration of a part", layout)
        found = data.load_json(file)
        if not isinstance(found, dict):
            raise ValueError(f"{file} is not a JSON object; is the download complete?")
        for key, allowed in ALLOWED[part].items():
            check_value(file, key, found.get(key, allowed[0]), allowed)
        config[part] = SIZES[part] | {key: found[key] for key in SIZES[part] if key in found}
        for key, size in config[part].items():
            if type(size) is not int or size < 1:
                raise ValueError(f"{file}: {key} should be a whole number from 1 up, not {size!r}; is this the file of another model?")
    check_sizes(folder, config["unet"], config.get("vae"), config["text_encoder"])


def check_sizes(folder, unet, vae, text):
    """Whether the parts fit together."""
    if not vae and unet["in_channels"] != 3:
        raise ValueError(f"{folder / 'unet/config.json'}: in_channels is {unet['in_channels']}, so the UNet works on latents, but {folder} "
                         "has no vae/; fetch it. Without a VAE the UNet works on pixels and has 3")
    channels, what = (vae["latent_channels"], "channels of the VAE") if vae else (3, "of pixels")
    for key in ("in_channels", "out_channels"):
        more = "; inpainting and upscaling models take more" if unet[key] > channels else ""
        check_value(folder / "unet/config.json", key, unet[key], [channels], f", the {what}{more}")
    check_value(folder / "unet/config.json", "cross_attention_dim", unet["cross_attention_dim"], [text["hidden_size"]],
                ", the width of the text encoder")
    if text["hidden_size"] % text["num_attention_heads"]:
        raise ValueError(f"{folder / 'text_encoder/config.json'}: hidden_size {text['hidden_size']} cannot be shared by "
                         f"{text['num_attention_heads']} heads")


def find_diffusion(source):
    """A local folder in the layout of diffusers, or a hub id, which is fetched through huggingface_hub's cache -> the folder."""
    folder = Path(source)
    if not folder.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        try:
            folder = Path(snapshot_download(str(source), allow_patterns=[f"{part}/{name}" for part, (config, files) in PARTS.items() for name in (config, *files)]))
        except (HfHubHTTPError, OSError, ValueError) as e:
            raise FileNotFoundError(f"no diffusion model from {source}: it is no folder here, and the hub cannot give it ({type(e).__name__})\n  Fetch it on a "
                                    "machine with network and name its folder with --diffusion") from None
    check_diffusion(folder)
    return folder


def load_part(cls, folder, name):
    """A model of diffusers with the weights in folder/name; every tensor must be there."""
    try:
        part, report = cls.from_pretrained(folder, subfolder=name, low_cpu_mem_usage=False, output_loading_info=True)
    except (OSError, ValueError, TypeError, RuntimeError, KeyError, SafetensorError, UnpicklingError) as e:
        reason = " ".join(str(e).split())[:200] or type(e).__name__
        raise ValueError(f"{folder / name} cannot be read as {cls.__name__}: {reason}\n  Is the download complete?") from None
    if missing := report["missing_keys"]:
        raise ValueError(f"{folder / name} lacks {len(missing)} weights, e.g. {sorted(missing)[0]}; are config.json and weights of the same model?")
    return part


def load_diffusion(source, steps=50, device="cpu"):
    """A model as Stable Diffusion 1.x is published. Without vae/ it works on pixels."""
    folder = find_diffusion(source)
    unet = load_part(UNet2DConditionModel, folder, "unet")
    vae = load_part(AutoencoderKL, folder, "vae") if (folder / "vae").exists() else None
    words, tokenizer = load_words(folder / "text_encoder"), data.load_tokenizer(folder / "tokenizer")
    if tokenizer.vocab != len(words.tower.tok.weight):
        raise ValueError(f"{folder}: the tokenizer has {tokenizer.vocab:,} tokens, the text encoder {len(words.tower.tok.weight):,}: they do not belong together")
    return Diffusion(unet, vae, DDIMScheduler.from_pretrained(folder, subfolder="scheduler"), words, tokenizer, steps, device)


class Diffusion:
    """A text-conditioned diffusion model: UNet, VAE or None, noise schedule, text encoder, tokenizer. Knows how to follow DDIM both ways and
    how to edit. `evaluations` counts how often the UNet has seen a sample, for forward and backward passes alike."""

    def __init__(self, unet, vae, scheduler, words, tokenizer, steps=50, device="cpu"):
        self.unet, self.vae, self.words = (m and m.to(device).eval().requires_grad_(False) for m in (unet, vae, words))
        unet.to(memory_format=torch.channels_last)                      # a third faster, on a CPU too
        self.tokenizer, self.device, self.evaluations, self.control = tokenizer, device, 0, None
        if any(isinstance(m, Attention) and (m.group_norm is not None or m.norm_cross or m.residual_connection) for m in unet.modules()):
            raise ValueError("this UNet has attention layers of another kind than Stable Diffusion's; such models cannot be edited here")
        unet.set_attn_processor({name: Attend(self, name) for name in unet.attn_processors})
        # As published for prompt-to-prompt and CTLG: t = 980, 960, ..., 0 for 50 steps, and below 0 the first noise level, not none
        scheduler = DDIMScheduler.from_config(scheduler.config, steps_offset=0, clip_sample=False, set_alpha_to_one=False, timestep_spacing="leading")
        scheduler.set_timesteps(steps)
        self.scheduler, self.kind, self.alphas, self.steps = scheduler, scheduler.config.prediction_type, scheduler.alphas_cumprod.double().tolist(), scheduler.timesteps.tolist()
        self.stride = scheduler.config.num_train_timesteps // steps

    def read(self, captions, learn=False):
        """Captions -> what the UNet looks at, (B, 77, C). Padded with the end symbol, as Stable Diffusion was trained."""
        tokens = self.tokenizer(captions)
        after = torch.arange(tokens.shape[1]) > tokens.argmax(dim=1, keepdim=True)
        with torch.set_grad_enabled(learn):
            return self.words(tokens.masked_fill(after, self.tokenizer.eot).to(self.device))

    def save(self, folder):
        """In the layout of diffusers; the UNet last, whose folder tells that all is there."""
        save_words(self.words, folder / "text_encoder")
        (folder / "tokenizer").mkdir(exist_ok=True)
        (folder / "tokenizer/merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(m) for m in self.tokenizer.merges), encoding="utf-8")
        self.scheduler.save_pretrained(folder / "scheduler")
        if self.vae:
            self.vae.save_pretrained(folder / "vae")
        self.unet.save_pretrained(folder / "unet.part")
        (folder / "unet.part").rename(folder / "unet")

    @torch.no_grad()
    def encode(self, pixels):
        """(B, 3, H, W) in [0, 1] -> latents."""
        x = 2 * pixels.to(self.device) - 1
        return x if self.vae is None else self.vae.encode(x).latent_dist.mean * self.vae.config.scaling_factor

    @torch.no_grad()
    def decode(self, z):
        """Latents -> (B, 3, H, W) in [0, 1]."""
        x = z if self.vae is None else self.vae.decode(z / self.vae.config.scaling_factor).sample
        return ((x + 1) / 2).clamp(0, 1)

    def alpha(self, t):
        """The share of signal, squared, at time t; below 0 that at 0."""
        return self.alphas[max(t, 0)]

    def noise(self, z, t, text):
        """What of z (B, ...) is noise, at time t."""
        self.evaluations += len(z)
        out = self.unet(z, t, encoder_hidden_states=text).sample
        return self.alpha(t) ** 0.5 * out + (1 - self.alpha(t)) ** 0.5 * z if self.kind == "v_prediction" else out

    def move(self, z, noise, start, to):
        """A DDIM step (arXiv 2010.02502, eq. 12 without noise), either way, from time `start` to time `to`."""
        a, b = self.alpha(start), self.alpha(to)
        return b ** 0.5 * (z - (1 - a) ** 0.5 * noise) / a ** 0.5 + (1 - b) ** 0.5 * noise

    @torch.no_grad()
    def invert(self, z, text):
        """DDIM inversion without guidance: z (B, ...) -> [z_0, ..., z_T]. The first of the steps changes nothing."""
        out = [z]
        for t in reversed(self.steps):
            out.append(self.move(out[-1], self.noise(out[-1], t, text), t - self.stride, t))
        return out

    def null_text(self, zs, text, guidance, rounds=10):
        """Null-text optimisation (arXiv 2211.09794): for each step an empty caption (B, 77, C) with which guidance leads back along zs.
        Samples are independent of each other: a sum of losses, one Adam, and who is done stays as it is."""
        z, null, out = zs[-1], self.read([""]).expand(len(text), -1, -1), []
        for i, t in enumerate(self.steps):
            null = null.detach().clone().requires_grad_()
            adam = torch.optim.Adam([null], lr=0.01 * (1 - i / 100))    # by the number of the step, however many there are
            done = torch.zeros(len(z), dtype=torch.bool, device=z.device)
            with torch.no_grad():
                told = self.noise(z, t, text)
            for _ in range(rounds):
                untold = self.noise(z, t, null)
                back = self.move(z, untold + guidance * (told - untold), t, t - self.stride)
                loss = (back - zs[-2 - i]).square().flatten(1).mean(dim=1)                              # (B,)
                null.grad = torch.autograd.grad(loss.sum(), null)[0]
                before = null.detach().clone()
                adam.step()
                null.data[done] = before[done]
                done |= loss.detach() < 1e-5 + 2e-5 * i
                if done.all():
                    break
            out.append(null.detach())
            with torch.no_grad():
                untold = self.noise(z, t, null)
                z = self.move(z, untold + guidance * (told - untold), t, t - self.stride)
        return out

    @torch.no_grad()
    def edit(self, zs, source, target, control, guidance=7.5, nulls=None, inversion="direct"):
        """Prompt-to-prompt (arXiv 2208.01626): from z_T again, a source branch with the source's caption and a target branch that takes over
        its attention as `control` says. zs: of `invert`; source, target (B, 77, C). -> latents of both, (B, ...) each.

        inversion  direct: the source branch is put back onto zs after each step (arXiv 2310.01506)
                   negative: the source's caption takes the place of the empty one (arXiv 2305.16807)
                   null: nulls are those of `null_text`"""
        old = new = zs[-1]
        control.start(self, old.shape)
        for i, t in enumerate(self.steps):
            empty = dict(direct=lambda: self.read([""]).expand_as(source), negative=lambda: source, null=lambda: nulls[i])[inversion]()
            latents, texts = [old, new, new], [source, target, empty]
            if inversion == "null":                                     # else the source branch needs no guidance
                latents, texts = latents + [old], texts + [empty]
            control.step, self.control = i, control
            told, wanted, untold, *unguided = self.noise(torch.cat(latents), t, torch.cat(texts)).chunk(len(latents))
            self.control = None
            new = self.move(new, untold + guidance * (wanted - untold), t, t - self.stride)
            told = unguided[0] + guidance * (told - unguided[0]) if unguided else told
            old = zs[-2 - i] if inversion == "direct" else self.move(old, told, t, t - self.stride)
            new = control.blended(old, new)
        return old, new


class Attend:
    """Attention of one layer of the UNet; in an edit, with what `Control` makes of it."""

    def __init__(self, model, name):
        self.model, self.cross, self.middle = model, ".attn2." in name, name.startswith("mid_block")

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = (layer(x).unflatten(2, (attn.heads, -1)).transpose(1, 2)                              # (B, H, N or 77, C/H)
                   for layer, x in ((attn.to_q, hidden_states), (attn.to_k, context), (attn.to_v, context)))
        if self.model.control:
            q, k, v = self.model.control(q, k, v, self.cross, self.middle)
        x = F.scaled_dot_product_attention(q, k, v)
        return attn.to_out[1](attn.to_out[0](x.transpose(1, 2).flatten(2)))


class Control:
    """What prompt-to-prompt does to attention. Rows of the batch: source, target, then those without caption.

    Cross-attention, for the first 0.8 of the steps: the target looks where the source looks, and what it takes from its new words counts
    `weight` times. Attention is linear in the values, so its values are scaled and no map is ever made. Self-attention, for the first 0.4,
    where the picture is halved at least: where the source looks. Local blend: after the first 0.2, only what attention to the words of
    the edit marks, in either branch, differs from the source; these maps alone are made, where the picture is reduced `blend_at` times.

    tokens, blend: per pair, the positions of new words, and of the noun with its colours."""

    def __init__(self, tokens, blend, weight=6.0, cross=0.8, own=0.4, blend_from=0.2, threshold=0.3, blend_at=4):
        self.weight = torch.ones(len(tokens), data.CONTEXT)
        self.words = torch.zeros(len(tokens), data.CONTEXT)
        for weights, words, new, marked in zip(self.weight, self.words, tokens, blend):
            weights[new] = weight
            words[marked] = 1
        self.cross, self.own, self.blend_from, self.threshold, self.blend_at = cross, own, blend_from, threshold, blend_at

    def start(self, model, shape):
        """Once per edit; shape: of the latents (B, ..., H, W)."""
        self.total, self.shape, self.maps, self.step, self.mask = len(model.steps), shape, None, 0, None
        self.weight, self.words = self.weight.to(model.device), self.words.to(model.device)

    def __call__(self, q, k, v, cross, middle):
        B, (H, W) = self.shape[0], self.shape[-2:]
        factor = round((H * W / q.shape[2]) ** 0.5)                     # how far this layer's picture is reduced
        (source, target), (source_k, target_k) = q[:2 * B].chunk(2), k[:2 * B].chunk(2)
        # The official code counts T + 1 steps for cross-attention and T for self-attention
        last = int(self.cross * (self.total + 1)) if cross else int(self.own * self.total)
        replace = self.step < last and (cross or factor >= 2)
        if cross and factor == self.blend_at and not middle and self.blend_from < 1:
            maps = (source @ source_k.transpose(2, 3) / q.shape[3] ** 0.5).softmax(dim=3)               # (B, H, N, 77)
            after = maps * self.weight[:, None, None] if replace else (target @ target_k.transpose(2, 3) / q.shape[3] ** 0.5).softmax(dim=3)
            marked = torch.stack([(m * self.words[:, None, None]).sum(dim=3).mean(dim=1) for m in (maps, after)])                # (2, B, N)
            marked = marked.unflatten(2, (-(-H // factor), -(-W // factor)))
            self.maps = marked if self.maps is None else self.maps + marked
        if replace:
            q, k = (torch.cat([x[:B], x[:B], x[2 * B:]]) for x in (q, k))
            if cross:
                v = torch.cat([v[:B], v[B:2 * B] * self.weight[:, None, :, None], v[2 * B:]])
        return q, k, v

    def blended(self, old, new):
        """The target with what lies outside the mask (B, 1, H, W) from the source; called once after each step."""
        if self.maps is None and self.blend_from < 1:
            raise ValueError(f"no layer of this UNet reduces the picture {self.blend_at} times; set blend_at to another power of 2, "
                             "or blend_from=1 for no local blend")
        if self.step + 1 <= int(self.blend_from * self.total):
            return new
        maps = F.interpolate(F.max_pool2d(self.maps, 3, stride=1, padding=1), self.shape[-2:])
        self.mask = (maps / maps.amax(dim=(2, 3), keepdim=True) > self.threshold).any(dim=0)[:, None].to(new.dtype)
        return old + self.mask * (new - old)


# ---- training: the toy's model from scratch, or a UNet on one's own pictures ----------------------------------------

def toy_model(captions, steps, device, checkpoint=None):
    """A small model of the toy people, in pixels: a UNet of 1.7 M parameters and a text encoder that learns along, from scratch or from
    the text tower of a checkpoint. The schedule is noisier than Stable Diffusion's: garments are flat, so that one sees their colours
    through its noise at any time, and nothing is left that only the caption could tell. For the same reason the model predicts v."""
    if checkpoint:
        model, tokenizer, _ = tbps.load_checkpoint(checkpoint)
        words = Words(**{k: model.arch[k] for k in ("vocab", "head_width", "quick_gelu", "context")}, width=model.arch["text_width"], layers=model.arch["text_layers"])
        words.tower.load_state_dict({n: w for n, w in model.text.state_dict().items() if n != "proj"})
    else:
        tokenizer = data.train_tokenizer(captions)
        words = Words(tokenizer.vocab, 128, 2, 32)
    unet = UNet2DConditionModel(
        sample_size=(48, 24), in_channels=3, out_channels=3, block_out_channels=(32, 64, 64), layers_per_block=1, attention_head_dim=4, norm_num_groups=8,
        cross_attention_dim=words.tower.pos.shape[1], down_block_types=("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 2, up_block_types=("CrossAttnUpBlock2D",) * 2 + ("UpBlock2D",))
    scheduler = DDIMScheduler(beta_start=0.0001, beta_end=0.02, prediction_type="v_prediction", clip_sample=False, set_alpha_to_one=False)
    return Diffusion(unet, None, scheduler, words, tokenizer, steps, device)


TRAINING = ["height", "width", "train_epochs", "train_batch", "train_lr", "drop_caption", "words"]


def check_training(saved, recipe, folder):
    if changed := [f"{k} {saved['recipe'][k]} then, {recipe[k]} now" for k in TRAINING if saved["recipe"][k] != recipe[k]]:
        raise ValueError(f"{folder} holds a diffusion model trained with other options ({'; '.join(changed)}): remove it, or take it as it is with --diffusion {folder}")


def train_diffusion(model, records, recipe, seed, folder, words, save_minutes=10):
    """Teaches the UNet, and with `words` the text encoder, to tell the noise in the pictures of records (arXiv 2006.11239, eq. 14), a tenth of
    the captions left empty for guidance. What is kept is the running mean of the weights. Writes folder/last.pt after each epoch and every
    `save_minutes`, and resumes from it exactly; ends with the folder in the layout of diffusers."""
    scale, parts = data.Scale((recipe["height"], recipe["width"]), "bicubic"), nn.ModuleDict(dict(unet=model.unet) | (dict(words=model.words) if words else {}))
    learned = list(parts.requires_grad_(True).train().parameters())
    optimizer, n = torch.optim.AdamW(learned, lr=recipe["train_lr"], weight_decay=0.01, fused=True), -(-len(records) // recipe["train_batch"])
    total, mean = recipe["train_epochs"] * n, [p.detach().clone() for p in learned]
    epoch, step, sum_of_losses = 0, 0, 0.0                              # step: batches done in this epoch
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "last.pt").exists():
        saved = tbps.read_file(folder / "last.pt")
        check_training(saved, recipe, folder)
        parts.load_state_dict(saved["weights"])
        optimizer.load_state_dict(saved["optimizer"])
        mean, epoch = [m.to(model.device) for m in saved["mean"]], saved["epoch"]
        step, sum_of_losses = saved.get("step", 0), saved.get("losses", 0.0)

    def save(epoch, step, sum_of_losses):
        tbps.save(folder / "last.pt", dict(weights=parts.state_dict(), mean=mean, optimizer=optimizer.state_dict(), epoch=epoch, step=step,
                                           losses=sum_of_losses, recipe=recipe, seed=seed))

    saved_at = time.time()
    bar = data.progress_bar(total=recipe["train_epochs"] * len(records), initial=epoch * len(records) + step * recipe["train_batch"],
                            unit=" images", desc="diffusion model")
    for epoch in range(epoch, recipe["train_epochs"]):
        torch.manual_seed(data.derive_seed(seed, epoch))
        rng, began, z = random.Random(data.derive_seed(seed, epoch)), time.time(), None
        for i, chunk in enumerate(torch.randperm(len(records)).split(recipe["train_batch"])):
            captions = ["" if rng.random() < recipe["drop_caption"] else rng.choice(records[j]["captions"]) for j in chunk]
            if z is None or i >= step:
                z = model.encode(torch.stack([scale(data.load_image(records[j]["image"])) for j in chunk]))
            t, noise = torch.randint(1000, (len(chunk),), device=z.device), torch.randn_like(z[:len(chunk)])
            if i < step:                                                # done before the resume: only its random draws are repeated
                continue
            done = (epoch * n + i) / total
            optimizer.param_groups[0]["lr"] = recipe["train_lr"] * min(1, 20 * done + 0.01) * (1 + math.cos(math.pi * done)) / 2
            text = model.read(captions, learn=words)
            a = torch.tensor(model.alphas, dtype=z.dtype, device=z.device)[t].view(-1, 1, 1, 1)
            out = model.unet(a.sqrt() * z + (1 - a).sqrt() * noise, t, encoder_hidden_states=text).sample
            loss = F.mse_loss(out, noise if model.kind == "epsilon" else a.sqrt() * noise - (1 - a).sqrt() * z)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(learned, 1.0)
            optimizer.step()
            torch._foreach_lerp_(mean, [p.detach() for p in learned], 1 - min(0.999, (1 + epoch * n + i) / (10 + epoch * n + i)))
            sum_of_losses += loss.item()
            if not math.isfinite(sum_of_losses):
                raise FloatingPointError(f"the loss of the diffusion model is not finite in epoch {epoch + 1}, step {i + 1}; try a lower --set train_lr=")
            bar.update(len(chunk))
            if time.time() - saved_at > 60 * save_minutes:
                save(epoch, i + 1, sum_of_losses)
                saved_at = time.time()
        line = f"epoch {epoch + 1:3d}/{recipe['train_epochs']}  loss {sum_of_losses / n:.4f}  {(len(records) - step * recipe['train_batch']) / (time.time() - began):.0f} images/s"
        bar.write(line) if sys.stderr.isatty() else print(line, flush=True)
        step, sum_of_losses = 0, 0.0
        save(epoch + 1, step, sum_of_losses)
        saved_at = time.time()
    bar.close()
    with torch.no_grad():
        for p, m in zip(learned, mean):
            p.copy_(m)
    parts.requires_grad_(False).eval()
    model.save(folder)


# ---- production -----------------------------------------------------------------------------------------------------

SD = dict(  # for Stable Diffusion 1.x, in the shape of persons
    height=512, width=192, steps=50, guidance=7.5, inversion="direct", rounds=10, weight=6.0, cross=0.8, own=0.4, blend_from=0.2, threshold=0.3, blend_at=4,
    paste=True, garments=False, train_epochs=5, train_batch=8, train_lr=1e-5, drop_caption=0.1)
PAPER = SD | dict(width=512, inversion="null", paste=False)
TOY = SD | dict(height=48, width=24, steps=20, guidance=3.0, weight=1.0, threshold=0.5, blend_at=2, train_epochs=14, train_batch=16, train_lr=1e-3)
KEYS = dict(  # what --help says of each key
    height="of what the model sees, pixels", width="likewise", steps="of DDIM, each way", guidance="how much the new caption is insisted on",
    inversion="direct, negative or null: how the source picture is kept", rounds="of null-text optimisation per step, at most",
    weight="how much the new word counts", cross="share of the steps in which the target looks where the source looks", own="the same for self-attention",
    blend_from="share of the steps after which the picture outside the mask is the source's; 1: never", threshold="of the mask, of its maximum",
    blend_at="reduction of the layers whose attention makes the mask", paste="what the model cannot hold is taken from the source, in full size",
    garments="garments are exchanged, too", train_epochs="passes over the pictures, for the toy's model and --finetune", train_batch="its batch",
    train_lr="its rate", drop_caption="share of empty captions in it")


def plan(records, tokenizer, seed, count, per_source, garments):
    """Which pairs to make: [(number of the record, [edit, ...])], `count` edits in all, at most per_source of a record; a function of the
    seed. A source's edits are of different garments, as far as it has them."""
    out, left = [], count
    order = list(range(len(records)))
    random.Random(data.derive_seed(seed, 0)).shuffle(order)
    for i in order:
        rng, able = random.Random(data.derive_seed(seed, 1, i)), []
        for caption in rng.sample(records[i]["captions"], len(records[i]["captions"])):
            if able := edits(caption, tokenizer, garments):
                break
        sites = {}
        for e in able:
            sites.setdefault((e["what"], e["noun"], e["old"]), []).append(e)
        ways = [rng.sample(of, len(of)) for of in rng.sample(list(sites.values()), len(sites))]
        chosen = [way[k] for k in range(max(map(len, ways), default=0)) for way in ways if k < len(way)][:min(per_source, left)]
        if chosen:
            out.append((i, chosen))
            left -= len(chosen)
        if not left:
            break
    return out


class Judge:
    """What a dual encoder says of an edit, {name: score} per pair: words, how much better the new picture goes with the new caption than with the
    old, a difference of cosines; direction, the cosine between what changed in the picture's features and what changed in the caption's
    (arXiv 2108.00946), low also where more has changed than was said."""

    def __init__(self, path, device):
        self.model, self.tokenizer, info = tbps.load_checkpoint(path, device)
        self.view, self.clean = data.EvalView(info["size"], info["norm"], info["resize"]), data.clean_caption if info["clean"] else str

    @torch.no_grad()
    def __call__(self, sources, pictures, edits):
        def images(pictures):
            return F.normalize(self.model.encode_image(torch.stack([self.view(p) for p in pictures]).to(self.model.logit_scale.device)), dim=1)

        def texts(key):
            return F.normalize(self.model.encode_text(self.tokenizer([self.clean(e[key]) for e in edits])), dim=1)
        image, text = images(pictures), texts("caption") - texts("source")                              # (B, D)
        direction = F.cosine_similarity(image - images(sources), text)
        return [dict(words=w, direction=d) for w, d in zip((image * text).sum(dim=1).tolist(), direction.tolist())]


def to_picture(pixels):
    return Image.fromarray((255 * pixels.clamp(0, 1) + 0.5).byte().permute(1, 2, 0).cpu().numpy())


def make(model, records, batch, recipe, judge, seed):
    """One batch of the plan -> [(picture, manifest entry without its file, strip of pictures to look at)] in the plan's order."""
    size, pictures = (recipe["height"], recipe["width"]), [data.load_image(records[i]["image"]) for i, _ in batch]
    pixels = torch.stack([data.Scale(size, "bicubic")(p) for p in pictures])
    torch.manual_seed(data.derive_seed(seed, 2, batch[0][0]))
    made = []
    text = model.read([some[0]["source"] for _, some in batch])
    zs = model.invert(model.encode(pixels), text)
    nulls = model.null_text(zs, text, recipe["guidance"], recipe["rounds"]) if recipe["inversion"] == "null" else None
    for k in range(max(len(some) for _, some in batch)):                                                # all edits share one inversion
        rows = [n for n, (_, some) in enumerate(batch) if k < len(some)]
        chosen = [batch[n][1][k] for n in rows]
        control = Control([e["tokens"] for e in chosen], [e["blend"] for e in chosen],
                          **{key: recipe[key] for key in ("weight", "cross", "own", "blend_from", "threshold", "blend_at")})
        old, new = model.edit([z[rows] for z in zs], text[rows], model.read([e["caption"] for e in chosen]), control, recipe["guidance"],
                              [x[rows] for x in nulls] if nulls else None, recipe["inversion"])
        old, new = model.decode(old).cpu(), model.decode(new).cpu()
        mask = torch.ones_like(new[:, :1]) if control.mask is None else F.interpolate(control.mask.float().cpu(), size)
        change = (new - old).abs().mean(dim=1, keepdim=True)
        for n, e, o, x, m, c in zip(rows, chosen, old, new, mask, change):
            H, W = pictures[n].height, pictures[n].width
            if recipe["paste"]:
                full = data.Scale((H, W), "bicubic")(pictures[n])
                x = full + F.interpolate((x - o)[None], (H, W), mode="bicubic", antialias=True)[0]
            else:
                x = F.interpolate(x[None], (H, W), mode="bicubic", antialias=True)[0]
            scores = dict(psnr=-10 * math.log10(max(1e-10, (o - pixels[n]).square().mean().item())), changed=(c * m).sum().item() / max(1.0, m.sum().item()),
                          kept=1 - (c * (1 - m)).sum().item() / max(1.0, (1 - m).sum().item()))
            strip = [pictures[n], *(to_picture(p).resize((W, H), Image.Resampling.NEAREST) for p in (o, o * (0.2 + 0.8 * m)))]
            said = {key: e[key] for key in ("what", "noun", "old", "new", "source", "tokens", "blend")}
            made.append((n, k, to_picture(x), dict(captions=[e["caption"]], edit=said, scores=scores), strip))
    made.sort(key=lambda m: m[:2])
    if judge:
        for (*_, entry, _), scores in zip(made, judge([pictures[m[0]] for m in made], [m[2] for m in made], [batch[m[0]][1][m[1]] for m in made])):
            entry["scores"] |= scores
    return [m[2:] for m in made]


def parse_args(argv=None):
    listed = tbps.format_keys(SD, {key: (SD[key], text) for key, text in KEYS.items()})

    def differences(recipe, base):
        return " ".join(f"{k}={v}" for k, v in recipe.items() if v != base[k])
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                epilog=f"keys for --set, with the values for Stable Diffusion:\n{listed}\n--preset paper differs in: {differences(PAPER, SD)}\n"
                                       f"on toy people: {differences(TOY, SD)}")
    p.add_argument("--dataset", choices=data.DATASETS, default="toy", help="whose training split the sources are from (default: toy)")
    p.add_argument("--data-root", default="data", help="the set's folder or its parent; for csv the file (default: data)")
    p.add_argument("--diffusion", help="a folder in the layout of diffusers, or a hub id of a Stable Diffusion 1.x (toy people: trained first, and kept)")
    p.add_argument("--words", metavar="FILE", help="toy people: a checkpoint whose text tower the diffusion model starts from (default: from scratch, which learns less)")
    p.add_argument("--finetune", metavar="DIR", help="first train its UNet on the training split, and keep that in this folder")
    p.add_argument("--count", type=int, default=500, help="pairs to make; a folder that holds fewer is added to (default: 500)")
    p.add_argument("--edits", type=int, default=2, help="pairs per source at most; they share one inversion (default: 2)")
    p.add_argument("--batch", type=int, default=16, help="sources at a time (default: 16)")
    p.add_argument("--judge", metavar="FILE", help="a checkpoint whose encoders score how well a picture goes with its new caption: words, direction")
    p.add_argument("--preset", choices=["persons", "paper"], default="persons", help="paper: squashed to a square, null-text inversion, as published")
    p.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="keys of the recipe, below, by other values")
    p.add_argument("--seed", type=int, default=0, help="of the choice of sources and edits, and of the toy's model (default: 0)")
    p.add_argument("--out", help="the folder of the pairs (default: runs/pdg-DATASET-SEED)")
    p.add_argument("--save-minutes", type=float, default=10, help="training the diffusion model also saves within an epoch, this often (default: 10)")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda, cpu or mps (default: cuda where there is one)")
    args = p.parse_args(argv)
    toy = args.dataset.startswith("toy")
    if toy and args.preset == "paper":
        raise ValueError("--preset paper is for Stable Diffusion; toy people have a preset of their own")
    recipe = dict(TOY if toy else PAPER if args.preset == "paper" else SD)
    for text in args.set:
        key, _, value = text.partition("=")
        if key not in recipe:
            raise ValueError(f"there is no key {key!r}; there are {', '.join(recipe)}")
        recipe[key] = tbps.parse_value(key, value, recipe[key])
    if recipe["inversion"] not in ("direct", "negative", "null"):
        raise ValueError(f"inversion must be one of direct, negative, null, not {recipe['inversion']!r}")
    if zero := [k for k in ("height", "width", "steps", "rounds", "blend_at", "train_epochs", "train_batch") if recipe[k] < 1]:
        raise ValueError(f"{zero[0]}={recipe[zero[0]]} must be at least 1")
    if recipe["steps"] > 1000:
        raise ValueError(f"steps={recipe['steps']}: a diffusion model has 1,000")
    if recipe["inversion"] == "null" and recipe["steps"] > 100:
        raise ValueError(f"steps={recipe['steps']}: inversion=null takes at most 100, where its learning rate reaches 0")
    if "" in (args.out, args.diffusion, args.words, args.judge, args.finetune):
        raise ValueError("an option was given an empty text; is a variable of the shell not set?")
    if over := [k for k in ("cross", "own", "blend_from", "threshold", "drop_caption") if not 0 <= recipe[k] <= 1]:
        raise ValueError(f"{over[0]}={recipe[over[0]]} must be a share from 0 to 1")
    if recipe["blend_at"] not in (1, 2, 4, 8):
        raise ValueError(f"blend_at={recipe['blend_at']} must be 1, 2, 4 or 8: layers of a UNet reduce the picture by such numbers")
    if bad := [k for k, v in recipe.items() if isinstance(v, float) and not 0 <= v < math.inf]:         # nan too
        raise ValueError(f"{bad[0]}={recipe[bad[0]]} must be a number from 0 up")
    tbps.check_device(args.device)
    if args.save_minutes < 0:
        raise ValueError("--save-minutes goes from 0")
    if small := [k for k in ("count", "edits", "batch") if getattr(args, k) < 1]:
        raise ValueError(f"--{small[0]} must be at least 1")
    if not toy and not args.diffusion:
        raise ValueError("name the diffusion model with --diffusion: a folder in the layout of diffusers, or a hub id of a Stable Diffusion 1.x")
    args.out = args.out or f"runs/pdg-{args.dataset}-{args.seed}"
    return args, recipe


def check_folder(out, settings):
    """A folder for pairs is new, or one that the same command began."""
    file = out / "settings.json"
    if file.exists():
        try:
            before = json.loads(file.read_text())
            more = settings["count"] > before["count"]                  # what was made is the beginning of what will be
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{file} is damaged: it no longer says how the pairs were made. Remove the folder, or name another with --out") from None
        if changed := [f"{k}: {before.get(k)!r} then, {settings.get(k)!r} now" for k in sorted(before.keys() | settings.keys()) if before.get(k) != settings.get(k) and not (k == "count" and more)]:
            raise ValueError(f"{out} was made with other options, so going on would mix two things:\n  " + "\n  ".join(changed) +
                             "\n  Name another folder with --out, and for other pairs another --seed")
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is no folder of generated pairs; name another with --out")


def write_whole(path, content):
    """A file that is there wholly or not at all, also if two ranks write it."""
    part = path.with_name(f"{path.name}.{os.environ.get('RANK', 0)}.part")
    part.write_bytes(content)
    part.replace(path)


def write_picture(path, picture):
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    write_whole(path, buffer.getvalue())


def name_of(record, i, dataset):
    return str(record["image"]) if isinstance(record["image"], Path) else f"{dataset} {i}"


def prepared_model(args, recipe, records, ranks):
    """The diffusion model: given, or of the toy people and trained first; tuned first if that is wanted. What is trained is kept."""
    def once(folder, train):
        if not (folder / "unet").exists():
            if ranks > 1:
                raise ValueError(f"the diffusion model {folder} is not there yet; make it first with the same command in one process")
            print(f"a diffusion model is trained first, and kept in {folder}", flush=True)
            torch.manual_seed(data.derive_seed(args.seed))
            train()
        elif (folder / "last.pt").exists():
            check_training(tbps.read_file(folder / "last.pt"), training, folder)
        return folder

    def toy():
        model = toy_model([c for r in records for c in r["captions"]], recipe["steps"], args.device, args.words)
        train_diffusion(model, records, training, args.seed, toys, True, args.save_minutes)

    def tune():
        train_diffusion(load_diffusion(source, recipe["steps"], args.device), records, training, args.seed, Path(args.finetune), False, args.save_minutes)

    toys, training = Path(f"runs/{args.dataset}-diffusion-{args.seed}"), recipe | dict(words=args.words)
    source = args.diffusion or once(toys, toy)
    return load_diffusion(once(Path(args.finetune), tune) if args.finetune else source, recipe["steps"], args.device)


def main():
    args, recipe = parse_args()
    out, rank, ranks = Path(args.out), int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    settings = {k: v for k, v in vars(args).items() if k not in ("out", "device", "set", "preset", "save_minutes")} | recipe
    check_folder(out, settings)
    if args.device == "cuda" and ranks > 1:
        args.device = f"cuda:{int(os.environ.get('LOCAL_RANK', 0))}"
    if args.words:
        if args.diffusion or not args.dataset.startswith("toy"):
            raise ValueError("--words is for the diffusion model of toy people that is trained here; with --diffusion the text encoder comes along")
        data.need(Path(args.words), "the checkpoint for --words", "train one with python tbps.py, which writes runs/NAME/best.pt")
    if args.judge:
        data.need(Path(args.judge), "the judge", "it is a checkpoint of tbps.py, like runs/NAME/best.pt")
    judge = Judge(args.judge, args.device) if args.judge else None
    if args.diffusion:
        find_diffusion(args.diffusion)
    records = data.read(args.dataset, args.data_root, "train")
    if max(r["pid"] for r in records) >= 1_000_000:
        raise ValueError("person ids of this set reach a million, from where generated persons are counted")
    model = prepared_model(args, recipe, records, ranks)
    todo = plan(records, model.tokenizer, args.seed, args.count, args.edits, recipe["garments"])
    if not todo:
        raise ValueError("no caption of the training split has a coloured garment that could be edited")
    for name in ("imgs", "strips", "parts"):
        (out / name).mkdir(parents=True, exist_ok=True)
    write_whole(out / "settings.json", json.dumps(settings, indent=1).encode())
    sizes = [len(some) for _, some in todo]
    print(f"{sum(sizes):,} pairs from {len(todo):,} of {len(records):,} pictures; {recipe['inversion']} inversion, {recipe['steps']} steps, "
          f"{recipe['height']}x{recipe['width']} pixels", flush=True)
    starts = range(0, len(todo), args.batch)                            # batches are fixed: what one gives depends on nothing else
    batches = {sum(sizes[:k]): todo[k:k + args.batch] for k in starts}  # by the number of its first pair
    mine = list(batches.items())[rank::ranks]
    bar, began, fresh = data.progress_bar(total=sum(len(some) for _, batch in mine for _, some in batch), unit=" pairs", desc="pairs"), time.time(), 0
    for first, batch in mine:
        if known(out, first, batch) is None:
            entries, sources = [], [i for i, some in batch for _ in some]
            for number, (i, (picture, entry, strip)) in enumerate(zip(sources, make(model, records, batch, recipe, judge, args.seed)), start=first):
                file = f"{number:06d}.png"
                write_picture(out / "imgs" / file, picture)
                write_picture(out / "strips" / file, side_by_side(strip[0], strip[1], picture, strip[2]))
                entries.append(dict(image=file, pid=1_000_000 * (args.seed + 1) + number, split="train", source_image=name_of(records[i], i, args.dataset),
                                    source_pid=records[i]["pid"], seed=args.seed) | entry)
            write_whole(part_of(out, first), "".join(json.dumps(e) + "\n" for e in entries).encode())    # last: now the batch is done
            fresh += len(entries)
        bar.update(sum(len(some) for _, some in batch))
    bar.close()
    if fresh:
        print(f"{fresh:,} pairs made, {fresh / (time.time() - began):.2f} per second; {model.evaluations / fresh:.0f} evaluations of the UNet each "
              "(the published code needs about 1,000)", flush=True)
    if None not in (parts := [known(out, first, batch) for first, batch in batches.items()]):
        finish(out, [entry for part in parts for entry in part])


def part_of(out, first):
    """What is known of the batch whose first pair has this number."""
    return out / f"parts/{first:06d}.jsonl"


def known(out, first, batch):
    """The entries of a batch; None if it has not been made, or not all of it is there any more."""
    try:
        entries = [json.loads(line) for line in part_of(out, first).read_text().splitlines()]
        whole = all((out / folder / e["image"]).stat().st_size for folder in ("imgs", "strips") for e in entries)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return entries if whole and len(entries) == sum(len(some) for _, some in batch) else None


def side_by_side(*pictures):
    wide = Image.new("RGB", (sum(p.width for p in pictures), pictures[0].height))
    for n, p in enumerate(pictures):
        wide.paste(p, (n * p.width, 0))
    return wide


def finish(out, entries):
    """The list of pairs, and a page to look at them."""
    write_whole(out / "pairs.jsonl", "".join(json.dumps(e) + "\n" for e in entries).encode())
    shown = []
    for e in entries[::max(1, len(entries) // 40)][:40]:
        strip = evaluation.thumbnail(data.load_image(out / "strips" / e["image"]), 160)
        scores = ", ".join(f"{k} {v:.3g}" for k, v in e["scores"].items())
        shown.append(f"<div class=row><img src='{strip}'><p>{html.escape(e['edit']['source'])}<br><b>{html.escape(e['captions'][0])}</b><br>{scores}</p></div>")
    shares = {"lowest": 0.0, "5 %": 0.05, "median": 0.5, "95 %": 0.95, "highest": 1.0}
    rows = {k: {name: f"{torch.tensor([e['scores'][k] for e in entries]).quantile(share).item():.3g}" for name, share in shares.items()} for k in entries[0]["scores"]}
    evaluation.write_page(out / "report.html", f"{len(entries):,} generated pairs", [("Scores", evaluation.table(rows)), ("Source, reconstruction, edit, mask", "".join(shown))])
    print(f"{len(entries):,} pairs in {out}; look at {out / 'report.html'}; train on them with tbps.py --extra {out}")


if __name__ == "__main__":
    data.command(main, "stopped; what is done is kept, and the same command goes on from there")
