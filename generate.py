"""Proximity data generation (PDG) of CTLG (arXiv 2311.09084): new training pairs from existing ones.

One word of a caption changes, "a red shirt" becomes "a green shirt", and a diffusion model changes the image to match.

    python generate.py --judge lab/toyclip                                 synthetic pedestrians, no downloads
    python generate.py --dataset cuhk --data-root DIR --diffusion MODEL    a Stable Diffusion 1.x: folder or hub id
    torchrun --nproc_per_node 8 generate.py ...                            on all GPUs of a machine
    python tbps.py --dataset cuhk --data-root DIR --extra runs/pdg-cuhk-0  trains on the new pairs too

The first command makes 500 pairs with the small diffusion model in lab/toydiffusion/, which lab/train_diffusion.py
makes, and scores them with the small CLIP in lab/toyclip/. After an interruption the same command continues; the result
is the same. The output folder holds imgs/, pairs.jsonl (captions, source, edit, scores) and report.html (a sample).

Letters: B sources in a batch, R rows of the UNet's batch, N positions of a layer, H heads, C width. z (B, ...) are
latents. With a VAE: 4 channels, height and width divided by 8. Without: pixels, or blocks of p x p pixels as channels,
12 for p = 2. zs[t] is z after t of T steps of DDIM inversion: zs[0] is the image, zs[T] is noise.
"""

import argparse
import collections
import html
import json
import math
import os
import random
import re
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from PIL import Image
from safetensors.torch import save_file

import data
import eval as evaluation
import tbps

# ---- caption edits --------------------------------------------------------------------------------------------------
#
# A mention is a garment with its colours, as in "blue and white striped shirt" or "his shirt is blue": a pair (index of
# the noun, indices of the colours) into the words of a caption.
#
# An edit replaces words by words of as many tokens. So token n of the new caption corresponds to token n of the old
# one, and the attention maps of one caption fit the other.
#
# The official code differs: it enlarges the images with LDM-SR first (here the key `paste` keeps the resolution of the
# source); its mask words are the whole noun chunk with articles, and it loses the noun before a comma; it makes fewer
# edits (10 colours, 20 garments, only the first coloured garment of a caption), but also of test images.

GARMENT_OF = {word: line[0] for line in data.GARMENTS for word in line}
NEW_COLOURS = "red yellow green purple white brown blue orange pink grey black".split()     # the paper's, and black
SIMILAR_COLOURS = [set(line.split()) for line in (
    "grey gray silver", "gold golden yellow", "beige tan khaki cream", "purple violet lavender",
    "red crimson maroon burgundy", "blue navy cyan", "green olive teal", "pink magenta", "blue teal turquoise")]
NEW_GARMENTS = {"trousers": ["shorts"], "shorts": ["trousers"], "shirt": ["jacket"], "jacket": ["shirt"]}
SHADES = set("sky royal baby lime forest army mint hot wine coffee rose ocean steel charcoal salmon neon electric "
             "midnight military".split())                               # of "sky blue"
VERBS = {"is", "are", "was", "were"}
DEGREES = {"all", "mostly", "light", "dark", "plain", "solid"}
JOINS = {"and", "&", ",", "/", "or"}


def colours_before(words, modifiers, noun):
    """Indices of the colours before a noun: "red and white striped shirt" -> [0, 2].

    Walks left over colours, over what joins two colours, and over modifiers (adjectives and nouns)."""
    colours, i = [], noun - 1
    while i >= 0:
        is_colour = words[i] in data.COLOURS
        joins = words[i] in JOINS and i > 0 and words[i - 1] in data.COLOURS and words[i + 1] in data.COLOURS
        modifies = modifiers[i] and "-" not in words[i] and (words[i] not in GARMENT_OF or i == noun - 1)
        if not (is_colour or joins or modifies):
            break
        if is_colour:
            colours.insert(0, i)
        i -= 1
    # In "a shirt in red and black pants" red may belong to the shirt
    is_ambiguous = i > 0 and words[i] in ("in", "of") and words[i - 1] in GARMENT_OF
    return [] if is_ambiguous else colours


def colours_after(words, noun):
    """Indices of the colours after a noun: "shirt is red and white" -> [2, 4]."""
    verb = noun + 1 + (words[noun + 1:noun + 2] == ["that"])
    if verb >= len(words) or words[verb] not in VERBS:
        return []
    colours = []
    for i in range(verb + 1, len(words)):
        if words[i] in data.COLOURS:
            colours.append(i)
        elif not (words[i] in DEGREES or words[i] in JOINS and words[i - 1] in data.COLOURS):
            break
    return colours


def has_shade(words, i):
    """Whether a colour is part of a compound such as "navy blue" or "sky blue"."""
    before, after = words[max(0, i - 1):i], words[i + 1:i + 2]
    return any(word in data.COLOURS for word in before + after) or any(word in SHADES for word in before)


def mentions(words, kinds):
    """The mentions of a caption, and the set of colour indices that are clear. kinds: as in data.tag_words, per word.

    A colour is clear if it belongs to one noun only, garment or not ("red hair"), and is not part of a compound.
    "red shirt and blue jeans" -> [(1, [0]), (4, [3])], {0, 3}"""
    modifiers = [k in "NJ" and w[0].isalpha() and w not in data.COLOURS for w, k in zip(words, kinds)]
    found, owners = [], collections.Counter()
    for k, word in enumerate(words):
        following = words[k + 1] if k + 1 < len(words) else ""
        ends_phrase = not (following in data.COLOURS or any(modifiers[k + 1:k + 2]))
        if word in GARMENT_OF and following not in GARMENT_OF:          # of "suit jacket" only the jacket
            colours = colours_before(words, modifiers, k) + colours_after(words, k)
            found.append((k, colours))
            owners.update(colours)
        elif modifiers[k] and kinds[k] == "N" and ends_phrase:
            owners.update(colours_before(words, modifiers, k))
    return found, {i for i, n in owners.items() if n == 1 and not has_shade(words, i)}


def colour_edits(words, group, unclear):
    """Edits of the colours of one garment. group: its mentions;  unclear: colours that must stay.
    Yields (what, noun, old word, new word, indices of the words to replace, mentions that are edited)."""
    said = {noun: [words[c] for c in colours] for noun, colours in group}
    for old in dict.fromkeys(colour for colours in said.values() for colour in colours):         # each once, in order
        edited = [(noun, colours) for noun, colours in group if old in said[noun]]
        nouns = {words[noun] for noun, _ in edited}
        # After "a red shirt and a blue shirt", which one is "the shirt"?
        conflict = any(colours and old not in colours and words[noun] in nouns for noun, colours in said.items())
        if old in unclear or conflict:
            continue
        taken = {colour for noun, _ in edited for colour in said[noun]}
        taken = taken.union(*(similar for similar in SIMILAR_COLOURS if similar & taken))
        replaced = [c for _, colours in edited for c in colours if words[c] == old]
        for new in NEW_COLOURS:
            if new not in taken:
                yield "colour", words[edited[0][0]], old, new, replaced, edited


def garment_edits(words, group):
    """The same for the garment itself: trousers become shorts."""
    for noun in dict.fromkeys(words[k] for k, _ in group):
        edited = [(k, colours) for k, colours in group if words[k] == noun and words[k - 1:k] != ["suit"]]
        descriptions = {tuple(words[c] for c in colours) for _, colours in edited if colours}
        if len(descriptions) < 2 and words.count(noun) == len(edited):
            for new in NEW_GARMENTS.get(noun, []):
                if new not in words:
                    yield "garment", noun, noun, new, [k for k, _ in edited], edited


def edits(caption, tokenizer, garments=False):
    """All edits of the colours in a caption, with garments=True also trousers/shorts and shirt/jacket: a list of dicts.

        edits("A man in a red shirt", tokenizer)[0] == dict(
            what="colour", noun="shirt", old="red", new="yellow",
            source="a man in a red shirt", caption="a man in a yellow shirt",       # before and after
            tokens=[5], blend=[5, 6])

    tokens: positions of the new words, the start symbol is 0;  blend: positions of the noun and its colours.
    There is no edit where it could be wrong: of captions over 75 tokens, of a garment mentioned in two colours, of a
    colour without a clear noun ("a shirt in red") or with a shade ("navy blue"), by a word of more or fewer tokens."""
    source = data.normalize_text(caption)
    tagged, encoded = data.tag_words(source), tokenizer.bpe.encode(source)
    if len(encoded.ids) > data.CONTEXT - 2:
        return []
    words, spans = [source[start:end] for start, end, _ in tagged], [(start, end) for start, end, _ in tagged]
    found, clear = mentions(words, [kind for _, _, kind in tagged])
    unclear = {word for k, word in enumerate(words) if word in data.COLOURS and k not in clear}
    unclear |= {part for word in words if "-" in word for part in word.split("-")}          # "red-haired"
    candidates = []
    for garment in dict.fromkeys(GARMENT_OF[words[k]] for k, _ in found):
        group = [(k, colours) for k, colours in found if GARMENT_OF[words[k]] == garment]
        candidates += colour_edits(words, group, unclear)
        if garments:
            candidates += garment_edits(words, group)
    made = (apply_edit(source, spans, encoded, tokenizer, *candidate) for candidate in candidates)
    return [edit for edit in made if edit]


def apply_edit(source, spans, encoded, tokenizer, what, noun, old, new, replaced, edited):
    """The edit as a dict; None if the number of tokens changes. spans: (start, end) per word;  encoded: tokens."""
    caption = source
    for start, end in (spans[k] for k in sorted(replaced, reverse=True)):       # from the last, as places change
        before = re.sub(r"\b(a|an) $", "an " if new[0] in "aeiou" else "a ", caption[:start])
        caption = before + new + caption[end:]

    def positions(indices):
        """Token positions of words."""
        wanted = [spans[k] for k in indices]
        return [n for n, (a, b) in enumerate(encoded.offsets, 1) if any(a < end and b > start for start, end in wanted)]

    if len(encoded.ids) != len(tokenizer.bpe.encode(caption).ids):
        return None
    return dict(what=what, noun=noun, old=old, new=new, source=source, caption=caption, tokens=positions(replaced),
                blend=positions(i for k, colours in edited for i in (k, *colours)))


# ---- the folder of a diffusion model --------------------------------------------------------------------------------

LAYOUT = "a diffusion model is a folder in the layout of diffusers: unet, vae, scheduler, text_encoder and tokenizer"
HUB_FILES = ["*/*config.json", "tokenizer/merges.txt", "tokenizer/tokenizer.json", "text_encoder/model.safetensors",
             "unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors"]


def find_diffusion(source):
    """A local folder, or a hub id, which huggingface_hub fetches into its cache -> the folder."""
    folder = Path(source)
    if not folder.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        try:
            folder = Path(snapshot_download(str(source), allow_patterns=HUB_FILES))
        except (HfHubHTTPError, OSError, ValueError) as e:
            raise FileNotFoundError(f"no diffusion model from {source}: no such folder, and the hub cannot give it "
                                    f"({type(e).__name__})\n  Fetch it where there is a network, then name its folder "
                                    "with --diffusion") from None
    for part in ("unet", "scheduler", "text_encoder", "tokenizer"):
        data.need(folder / part, "a part of the diffusion model", LAYOUT)
    return folder


def load_part(cls, folder, name):
    """A model of diffusers with the weights in folder/name. Raises OSError or ValueError unless every tensor fits."""
    part, report = cls.from_pretrained(folder, subfolder=name, low_cpu_mem_usage=False, output_loading_info=True,
                                       ignore_mismatched_sizes=True)
    # diffusers draws these tensors at random, and goes on
    bad = [*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])]
    tbps.require(not bad, f"{folder / name}: {len(bad)} weights are missing or of another shape, e.g. {bad[:1]}; do "
                 "config.json and weights belong to one model?")
    return part


class SDTextEncoder(tbps.TextTower):
    """The text encoder of Stable Diffusion 1.x: CLIP ViT-L/14's text tower, all tokens, normalised, not projected."""

    def __init__(self, vocab, width, layers, head_width, quick_gelu=True):
        super().__init__(vocab, data.CONTEXT, width, head_width, layers, 1, quick_gelu=quick_gelu)
        del self.proj

    def forward(self, tokens):
        """(B, 77) ids -> (B, 77, C)."""
        return self.ln_post(super().forward(tokens))


def load_text_encoder(folder):
    """The text encoder in a folder with config.json and weights. Raises ValueError unless all weights fit."""
    file = data.need(folder / "config.json", "the configuration of the text encoder", LAYOUT)
    config, keys = data.load_json(file), ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
    tbps.require(isinstance(config, dict) and config.keys() >= set(keys), f"{file} should have {', '.join(keys)}")
    vocab, width, layers, heads = (config[key] for key in keys)
    activation = config.get("hidden_act", "quick_gelu")
    tbps.require(activation in ("quick_gelu", "gelu"), f"{file}: hidden_act is {activation}, not quick_gelu or gelu")
    encoder = SDTextEncoder(vocab, width, layers, width // heads, activation == "quick_gelu")
    path = tbps.find_weights(folder)
    # transformers 5 leaves out the prefix; old versions save position_ids, which are no weights
    weights = {f"text_model.{name.removeprefix('text_model.')}": w for name, w in tbps.read_file(path).items()
               if not name.endswith("position_ids")}
    tbps.copy_weights(nn.ModuleDict(dict(text=encoder)), weights, path, names=tbps.HF_NAMES)
    return encoder


def save_text_encoder(encoder, folder):
    """In the layout that load_text_encoder reads."""
    folder.mkdir(parents=True, exist_ok=True)
    weights, block = tbps.named_tensors(nn.ModuleDict(dict(text=encoder)), tbps.HF_NAMES), encoder.blocks[0]
    save_file({name: w.contiguous() for name, w in weights.items()}, folder / "model.safetensors")
    width = encoder.pos.shape[1]
    tbps.write_json(folder / "config.json", dict(
        model_type="clip_text_model", vocab_size=len(encoder.tok.weight), hidden_size=width,
        intermediate_size=4 * width, num_hidden_layers=len(encoder.blocks), num_attention_heads=block.attn.heads,
        max_position_embeddings=data.CONTEXT, hidden_act="quick_gelu" if block.quick_gelu else "gelu"))


def load_diffusion(source, steps=50, device="cpu"):
    """A Stable Diffusion 1.x from a folder or the hub -> Diffusion. Without vae/ it works on pixels.

    Raises FileNotFoundError if a part is missing, ValueError if a part is damaged or of another kind of model."""
    folder = find_diffusion(source)
    text_encoder, tokenizer = load_text_encoder(folder / "text_encoder"), data.load_tokenizer(folder / "tokenizer")
    scheduler = DDIMScheduler.from_pretrained(folder, subfolder="scheduler")
    vae = load_part(AutoencoderKL, folder, "vae") if (folder / "vae").exists() else None
    unet = load_part(UNet2DConditionModel, folder, "unet")
    for what, value, *allowed in (
            ("text_encoder: vocab_size", len(text_encoder.tok.weight), tokenizer.vocab),
            ("unet: cross_attention_dim", unet.config.cross_attention_dim, text_encoder.pos.shape[1]),
            ("unet: in_channels" + " (there is no vae/)" * (not vae), unet.config.in_channels,
             *([vae.config.latent_channels] if vae else [3, 12, 48])),
            ("scheduler: prediction_type", scheduler.config.prediction_type, "epsilon", "v_prediction")):
        tbps.require(value in allowed, f"{folder}, {what} is {value!r}, the other parts need "
                     f"{' or '.join(map(repr, allowed))}\n  Only models like Stable Diffusion 1.x can be used")
    return Diffusion(unet, vae, scheduler, text_encoder, tokenizer, steps, device)


# ---- diffusion ------------------------------------------------------------------------------------------------------

class Diffusion:
    """A text-conditioned diffusion model: UNet, VAE or None, noise schedule, text encoder, tokenizer.

    evaluations: how many samples the UNet has seen;  control: what changes its attention, set during an edit"""

    def __init__(self, unet, vae, scheduler, text_encoder, tokenizer, steps=50, device="cpu"):
        self.unet, self.vae, self.text_encoder = (
            m and m.to(device).eval().requires_grad_(False) for m in (unet, vae, text_encoder))
        unet.to(memory_format=torch.channels_last)                      # a third faster, on a CPU too
        unet.set_attn_processor({name: AttentionProcessor(self, name) for name in unet.attn_processors})
        self.tokenizer, self.device, self.evaluations, self.control = tokenizer, device, 0, None
        self.patch = 1 if vae else math.isqrt(unet.config.in_channels // 3)
        # As in prompt-to-prompt and CTLG: t = 980, 960, ..., 0 for 50 steps, and below 0 the noise level of 0
        scheduler = DDIMScheduler.from_config(
            scheduler.config, steps_offset=0, clip_sample=False, set_alpha_to_one=False, timestep_spacing="leading")
        scheduler.set_timesteps(steps)
        self.scheduler, self.prediction_type = scheduler, scheduler.config.prediction_type
        self.alphas, self.timesteps = scheduler.alphas_cumprod.double().tolist(), scheduler.timesteps.tolist()
        self.stride = scheduler.config.num_train_timesteps // steps

    def encode_text(self, captions, learn=False):
        """Captions -> (B, 77, C). Padded with the end symbol, as Stable Diffusion was trained."""
        tokens = self.tokenizer(captions)
        is_padding = torch.arange(tokens.shape[1]) > tokens.argmax(dim=1, keepdim=True)
        with torch.set_grad_enabled(learn):
            return self.text_encoder(copy_to(self.device, tokens.masked_fill(is_padding, self.tokenizer.eot)))

    @torch.no_grad()
    def encode(self, pixels):
        """(B, 3, H, W) in [0, 1] -> latents."""
        x = 2 * copy_to(self.device, pixels) - 1
        if self.vae is None:
            return F.pixel_unshuffle(x, self.patch)
        return self.vae.encode(x).latent_dist.mean * self.vae.config.scaling_factor

    @torch.no_grad()
    def decode(self, z):
        """Latents -> (B, 3, H, W) in [0, 1]."""
        if self.vae is None:
            x = F.pixel_shuffle(z, self.patch)
        else:
            x = self.vae.decode(z / self.vae.config.scaling_factor).sample
        return ((x + 1) / 2).clamp(0, 1)

    def predict_noise(self, z, t, text):
        self.evaluations += len(z)
        in_half = str(self.device).startswith("cuda") and not torch.is_grad_enabled()       # null-text inversion: fp32
        with torch.autocast("cuda", torch.float16, enabled=in_half):
            out = self.unet(z, t, encoder_hidden_states=text).sample.to(z.dtype)
        if self.prediction_type == "v_prediction":
            return self.alphas[t] ** 0.5 * out + (1 - self.alphas[t]) ** 0.5 * z
        return out

    def ddim_step(self, z, noise, start, to):
        """From time `start` to time `to`, in either direction (arXiv 2010.02502, eq. 12 with sigma = 0)."""
        a, b = (self.alphas[max(t, 0)] for t in (start, to))            # the power of the signal
        return b ** 0.5 * (z - (1 - a) ** 0.5 * noise) / a ** 0.5 + (1 - b) ** 0.5 * noise

    @torch.no_grad()
    def invert(self, z, text):
        """DDIM inversion without guidance: z (B, ...) -> [zs[0], ..., zs[T]]. The first step is the identity."""
        zs = [z]
        for t in reversed(self.timesteps):
            zs.append(self.ddim_step(zs[-1], self.predict_noise(zs[-1], t, text), t - self.stride, t))
        return zs

    def null_text(self, zs, text, guidance, rounds=10):
        """Null-text optimisation (arXiv 2211.09794): for each step an embedding (B, 77, C) of the empty caption with
        which guidance leads back along zs. Samples are independent: losses are summed, finished samples are frozen."""
        z, null, nulls = zs[-1], self.encode_text([""]).expand(len(text), -1, -1), []
        for i, t in enumerate(self.timesteps):
            null = null.detach().clone().requires_grad_()
            optimizer = torch.optim.Adam([null], lr=0.01 * (1 - i / 100))       # for any T, as in the official code
            done = torch.zeros(len(z), dtype=torch.bool, device=z.device)
            with torch.no_grad():
                conditional = self.predict_noise(z, t, text)
            for _ in range(rounds):
                noise = guide(self.predict_noise(z, t, null), conditional, guidance)
                back = self.ddim_step(z, noise, t, t - self.stride)
                loss = (back - zs[-2 - i]).square().flatten(1).mean(dim=1)                  # (B,)
                null.grad = torch.autograd.grad(loss.sum(), null)[0]
                before = null.detach().clone()
                optimizer.step()
                null.data[done] = before[done]
                done |= loss.detach() < 1e-5 + 2e-5 * i
                if done.all():
                    break
            nulls.append(null.detach())
            with torch.no_grad():
                noise = guide(self.predict_noise(z, t, null), conditional, guidance)
                z = self.ddim_step(z, noise, t, t - self.stride)
        return nulls

    @torch.no_grad()
    def edit(self, zs, source, target, control, guidance=7.5, nulls=None, inversion="direct"):
        """Prompt-to-prompt (arXiv 2208.01626): denoise zs[T] with the source caption and with the target caption, whose
        attention `control` replaces. source, target (B, 77, C) -> latents of both, (B, ...) each.

        inversion  direct: the source is put back onto zs after each step (arXiv 2310.01506)
                   negative: the source caption replaces the empty caption (arXiv 2305.16807)
                   null: `nulls` of null_text replace it"""
        source_z = target_z = zs[-1]
        control.start(self, zs[-1].shape)
        empty = self.encode_text([""]).expand_as(source)
        for i, t in enumerate(self.timesteps):
            unconditional = dict(direct=empty, negative=source, null=nulls and nulls[i])[inversion]
            latents, texts = [source_z, target_z, target_z], [source, target, unconditional]
            if inversion == "null":                                     # else the source needs no guidance
                latents, texts = latents + [source_z], texts + [unconditional]
            control.step, self.control = i, control
            noises = self.predict_noise(torch.cat(latents), t, torch.cat(texts)).chunk(len(latents))
            self.control = None
            target_z = self.ddim_step(target_z, guide(noises[2], noises[1], guidance), t, t - self.stride)
            noise = guide(noises[3], noises[0], guidance) if inversion == "null" else noises[0]
            source_z = zs[-2 - i] if inversion == "direct" else self.ddim_step(source_z, noise, t, t - self.stride)
            target_z = control.blend(source_z, target_z)
        return source_z, target_z

    def save(self, folder):
        """In the layout of diffusers. The UNet comes last: its folder shows that all is there."""
        save_text_encoder(self.text_encoder, folder / "text_encoder")
        (folder / "tokenizer").mkdir(exist_ok=True)
        self.tokenizer.save(folder / "tokenizer/tokenizer.json")
        self.scheduler.save_pretrained(folder / "scheduler")
        if self.vae:
            self.vae.save_pretrained(folder / "vae")
        self.unet.save_pretrained(folder / "unet.part")
        (folder / "unet.part").rename(folder / "unet")


def copy_to(device, x):
    """x on the device. A copy to a GPU starts from pinned memory, so that nothing waits for it."""
    x = x.pin_memory() if str(device).startswith("cuda") else x
    return x.to(device, non_blocking=True)


def guide(unconditional, conditional, guidance):
    """Classifier-free guidance (arXiv 2207.12598)."""
    return unconditional + guidance * (conditional - unconditional)


# ---- prompt-to-prompt -----------------------------------------------------------------------------------------------

class AttentionProcessor:
    """The attention of one layer of the UNet, changed by model.control during an edit."""

    def __init__(self, model, name):
        self.model, self.is_cross, self.is_middle = model, ".attn2." in name, name.startswith("mid_block")

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        inputs = ((attn.to_q, hidden_states), (attn.to_k, context), (attn.to_v, context))
        q, k, v = (layer(x).unflatten(2, (attn.heads, -1)).transpose(1, 2) for layer, x in inputs)
        if self.model.control:                                          # q (R, H, N, C/H);  k, v (R, H, N or 77, C/H)
            q, k, v = self.model.control(q, k, v, self.is_cross, self.is_middle)
        x = F.scaled_dot_product_attention(q, k, v)
        return attn.to_out[1](attn.to_out[0](x.transpose(1, 2).flatten(2)))


class Control:
    """What prompt-to-prompt changes. The UNet's batch: B sources, B targets, then rows without caption.

    Cross-attention: in the first `cross_attention` of the steps the target uses the maps of the source, and its new
    words count `weight` times. Attention is linear in the values, so we scale the values and need no maps.
    Self-attention: in the first `self_attention` of the steps the target uses the maps of the source, in layers that
    reduce the image at least by half.
    Local blend: after the first `blend_from` of the steps the target differs from the source only inside a mask, where
    the summed attention to the words `blend` exceeds `threshold` of its maximum in source or target. Only these maps
    are computed, in layers that reduce the image `blend_at` times.

    tokens, blend: per pair, positions of the new words, and of the noun with its colours"""

    def __init__(self, tokens, blend, weight=6.0, cross_attention=0.8, self_attention=0.4, blend_from=0.2,
                 threshold=0.3, blend_at=4):
        self.weight = torch.ones(len(tokens), data.CONTEXT)
        self.words = torch.zeros(len(tokens), data.CONTEXT)
        for weights, words, new, marked in zip(self.weight, self.words, tokens, blend):
            weights[new] = weight
            words[marked] = 1
        self.cross_attention, self.self_attention = cross_attention, self_attention
        self.blend_from, self.threshold, self.blend_at = blend_from, threshold, blend_at

    def start(self, model, shape):
        """Begin an edit of latents of a shape (B, ..., H, W)."""
        self.total, self.shape, self.maps, self.step, self.mask = len(model.timesteps), shape, None, 0, None
        self.weight, self.words = self.weight.to(model.device), self.words.to(model.device)

    def __call__(self, q, k, v, is_cross, is_middle):
        B, (H, W) = self.shape[0], self.shape[-2:]
        factor = round((H * W / q.shape[2]) ** 0.5)                     # how much this layer reduces the image
        # The official code counts T + 1 steps for cross-attention, T for self-attention
        last = int(self.cross_attention * (self.total + 1)) if is_cross else int(self.self_attention * self.total)
        replace = self.step < last and (is_cross or factor >= 2)
        if is_cross and factor == self.blend_at and not is_middle and self.blend_from < 1:
            self.add_maps(q[:2 * B], k[:2 * B], replace, (-(-H // factor), -(-W // factor)))
        if replace:
            q, k = (torch.cat([x[:B], x[:B], x[2 * B:]]) for x in (q, k))
            if is_cross:
                v = torch.cat([v[:B], v[B:2 * B] * self.weight[:, None, :, None], v[2 * B:]])
        return q, k, v

    def add_maps(self, q, k, replace, grid):
        """Add a layer's attention to the words, of source and target, to self.maps (2, B, h, w)."""
        def attention(q, k):
            return (q @ k.transpose(2, 3) / q.shape[3] ** 0.5).softmax(dim=3)               # (B, H, N, 77)

        (source_q, target_q), (source_k, target_k) = q.chunk(2), k.chunk(2)
        source = attention(source_q, source_k)
        target = source * self.weight[:, None, None] if replace else attention(target_q, target_k)
        maps = [(m * self.words[:, None, None]).sum(dim=3).mean(dim=1).unflatten(1, grid) for m in (source, target)]
        self.maps = torch.stack(maps) if self.maps is None else self.maps + torch.stack(maps)

    def blend(self, source_z, target_z):
        """The target inside the mask (B, 1, H, W), the source outside. Called once after each step."""
        tbps.require(self.maps is not None or self.blend_from == 1, f"no layer of this UNet reduces the image "
                     f"{self.blend_at} times; set blend_at to another power of 2, or blend_from=1 for no local blend")
        if self.step + 1 <= int(self.blend_from * self.total):
            return target_z
        maps = F.interpolate(F.max_pool2d(self.maps, 3, stride=1, padding=1), self.shape[-2:])
        is_high = maps / maps.amax(dim=(2, 3), keepdim=True) > self.threshold
        self.mask = is_high.any(dim=0)[:, None].to(target_z.dtype)
        return source_z + self.mask * (target_z - source_z)


# ---- recipes --------------------------------------------------------------------------------------------------------

ANY, COUNT, FRACTION = (0, math.inf), (1, math.inf), (0, 1)             # ranges of numbers
RECIPE = {  # key: (value for Stable Diffusion 1.x on images of persons, what --help says, range or choices)
    "height": (512, "height of the images that the model sees, pixels", COUNT),
    "width": (192, "their width", COUNT),
    "steps": (50, "DDIM steps, each way", (1, 1000)),
    "guidance": (7.5, "classifier-free guidance: how closely the new caption is followed", ANY),
    "inversion": ("direct", "direct, negative or null: how the source image is kept", ["direct", "negative", "null"]),
    "rounds": (10, "null-text optimisation steps per DDIM step, at most", COUNT),
    "weight": (6.0, "factor on the attention to the new word", ANY),
    "cross_attention": (0.8, "fraction of the steps in which the target has the source's cross-attention", FRACTION),
    "self_attention": (0.4, "the same for self-attention", FRACTION),
    "blend_from": (0.2, "fraction of the steps before the mask applies; 1: no mask", FRACTION),
    "threshold": (0.3, "of the mask, as a fraction of its maximum", FRACTION),
    "blend_at": (4, "reduction of the layers whose attention makes the mask: 1, 2, 4 or 8", [1, 2, 4, 8]),
    "paste": (True, "add the change to the source in its full resolution", [False, True]),
    "garments": (False, "exchange garments too", [False, True]),
    "train_epochs": (5, "passes over the images in --finetune", COUNT),
    "train_batch": (8, "images per training step", COUNT),
    "train_lr": (1e-5, "peak learning rate", ANY),
    "drop_caption": (0.1, "fraction of empty captions in training", FRACTION),
}
SD = {key: value for key, (value, *_) in RECIPE.items()}
PAPER = SD | dict(width=512, inversion="null", paste=False)
TOY_DIFFUSION = Path(__file__).parent / "lab" / "toydiffusion"          # made by lab/train_diffusion.py
TOY = SD | dict(height=96, width=48, steps=20, guidance=3.0, weight=1.0, threshold=0.5, blend_at=2, train_batch=16,
                train_lr=1e-4)
CONTROL = ["weight", "cross_attention", "self_attention", "blend_from", "threshold", "blend_at"]
TRAINING = ["height", "width", "train_epochs", "train_batch", "train_lr", "drop_caption", "dataset", "data_root",
            "diffusion", "seed"]


def check_recipe(recipe):
    """Raise ValueError if a value is out of range."""
    for key, (_, _, allowed) in RECIPE.items():
        value = recipe[key]
        if isinstance(allowed, list):
            tbps.require(value in allowed, f"{key} must be one of {', '.join(map(str, allowed))}, not {value!r}")
        else:
            low, high = allowed
            tbps.require(low <= value <= high and value < math.inf, f"{key}={value} must be from {low} to {high}")
    tbps.require(recipe["inversion"] != "null" or recipe["steps"] <= 100,
                 f"steps={recipe['steps']} must be from 1 to 100 with inversion=null: there its learning rate ends")


# ---- training -------------------------------------------------------------------------------------------------------

def training_batches(model, records, recipe, seed, epoch, first):
    """Yields (step, latents (B, ...), captions, times (B,), noise (B, ...)) of an epoch from step `first` on. For the
    steps before, only the random draws are repeated: training resumes exactly."""
    torch.manual_seed(data.derive_seed(seed, epoch))
    rng, z = random.Random(data.derive_seed(seed, epoch)), None
    scale = data.Resize((recipe["height"], recipe["width"]), "bicubic")
    for i, chunk in enumerate(torch.randperm(len(records)).split(recipe["train_batch"])):
        chosen = [records[j] for j in chunk]
        captions = ["" if rng.random() < recipe["drop_caption"] else rng.choice(r["captions"]) for r in chosen]
        if z is None or i >= first:
            z = model.encode(torch.stack([scale(data.load_image(r["image"])) for r in chosen]))
        times = model.scheduler.config.num_train_timesteps
        t, noise = torch.randint(times, (len(chunk),), device=z.device), torch.randn_like(z[:len(chunk)])
        if i >= first:
            yield i, z, captions, t, noise


def denoising_loss(model, z, text, t, noise):
    """Mean squared error of the predicted noise (arXiv 2006.11239, eq. 14) or v (arXiv 2202.00512, app. D)."""
    out = model.unet(model.scheduler.add_noise(z, noise, t), t, encoder_hidden_states=text).sample
    is_noise = model.prediction_type == "epsilon"
    return F.mse_loss(out, noise if is_noise else model.scheduler.get_velocity(z, noise, t))


def train_diffusion(model, records, recipe, seed, folder, save_minutes=10):
    """Train the UNet. The result is the moving average of its weights, saved in the layout of diffusers. Writes
    folder/last.pt after each epoch and every save_minutes; resumes from it exactly."""
    learned = list(model.unet.requires_grad_(True).train().parameters())
    optimizer = torch.optim.AdamW(learned, lr=recipe["train_lr"], weight_decay=0.01, fused=True)
    average = [p.detach().clone() for p in learned]
    epochs, n = recipe["train_epochs"], -(-len(records) // recipe["train_batch"])
    state = dict(epoch=0, step=0, losses=0.0)                           # step and losses of the unfinished epoch
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "last.pt").exists():
        saved = tbps.read_file(folder / "last.pt")
        model.unet.load_state_dict(saved["weights"])
        optimizer.load_state_dict(saved["optimizer"])
        average, state = [m.to(model.device) for m in saved["mean"]], {key: saved[key] for key in state}

    total = torch.tensor(state["losses"], device=model.device)          # only read to save: reading waits for a GPU

    def save():
        state["losses"] = total.item()
        if not math.isfinite(state["losses"]):
            raise FloatingPointError(f"the loss of the diffusion model is not finite in epoch {state['epoch'] + 1}, by "
                                     f"step {state['step']}; try a lower --set train_lr=")
        tbps.save(folder / "last.pt", state | dict(weights=model.unet.state_dict(), mean=average, recipe=recipe,
                                                   seed=seed, optimizer=optimizer.state_dict()))
        return time.time()

    bar = data.progress_bar(total=epochs * len(records), unit=" images", desc="diffusion model",
                            initial=state["epoch"] * len(records) + state["step"] * recipe["train_batch"])
    saved_at = time.time()
    while state["epoch"] < epochs:
        epoch = state["epoch"]
        for i, z, captions, t, noise in training_batches(model, records, recipe, seed, epoch, state["step"]):
            it, done = epoch * n + i, (epoch * n + i) / (epochs * n)
            cosine = (1 + math.cos(math.pi * done)) / 2                 # after a warm-up over a twentieth of the steps
            optimizer.param_groups[0]["lr"] = recipe["train_lr"] * min(1, 20 * done + 0.01) * cosine
            loss = denoising_loss(model, z, model.encode_text(captions), t, noise)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(learned, 1.0)
            optimizer.step()
            torch._foreach_lerp_(average, [p.detach() for p in learned], 1 - min(0.999, (1 + it) / (10 + it)))
            state["step"] = i + 1
            total += loss.detach()
            bar.update(len(z))
            if time.time() - saved_at > 60 * save_minutes:
                saved_at = save()
        tbps.print_above(bar, f"epoch {epoch + 1:3d}/{epochs}  loss {total.item() / n:.4f}")
        if total.isfinite():                                            # if not, save says so
            state |= dict(epoch=epoch + 1, step=0)
            total.zero_()
        saved_at = save()
    bar.close()
    with torch.no_grad():
        for p, m in zip(learned, average):
            p.copy_(m)
    model.save(folder)


def finetuned_model(args, recipe, records, model):
    """The model in the folder --finetune; `model` is trained on the records first unless that is done already."""
    folder = Path(args.finetune)
    recipe = recipe | dict(dataset=args.dataset, data_root=args.data_root, diffusion=args.diffusion, seed=args.seed)
    if (folder / "last.pt").exists():
        before = tbps.read_file(folder / "last.pt")["recipe"]
        changed = [f"{key} {before.get(key)} then, {recipe[key]} now" for key in TRAINING
                   if before.get(key) != recipe[key]]
        tbps.require(not changed, f"{folder} holds a diffusion model trained with other options "
                     f"({'; '.join(changed)}): remove it, or use it as it is with --diffusion {folder}")
    if not (folder / "unet").exists():
        tbps.require(int(os.environ.get("WORLD_SIZE", 1)) == 1,
                     f"there is no diffusion model in {folder} yet; train it first in one process")
        print(f"training a diffusion model in {folder}", flush=True)
        train_diffusion(model, records, recipe, args.seed, folder, save_minutes=args.save_minutes)
    return load_diffusion(folder, recipe["steps"], args.device)


# ---- a batch of pairs -----------------------------------------------------------------------------------------------

def plan(records, tokenizer, seed, count, per_source, garments):
    """Which pairs to make: [(number of the first pair, index of the record, [edit, ...]), ...], `count` edits, at most
    per_source of a record and as far as possible of different garments. A function of the seed."""
    out, left = [], count
    order = list(range(len(records)))
    random.Random(data.derive_seed(seed, 0)).shuffle(order)
    for i in order:
        rng, able = random.Random(data.derive_seed(seed, 1, i)), []
        for caption in rng.sample(records[i]["captions"], len(records[i]["captions"])):
            if able := edits(caption, tokenizer, garments):
                break
        sites = collections.defaultdict(list)
        for e in able:
            sites[e["what"], e["noun"], e["old"]].append(e)
        shuffled = [rng.sample(site, len(site)) for site in rng.sample(list(sites.values()), len(sites))]
        rounds = range(max(map(len, shuffled), default=0))
        chosen = [site[k] for k in rounds for site in shuffled if k < len(site)][:min(per_source, left)]
        if chosen:
            out.append((count - left, i, chosen))
            left -= len(chosen)
        if not left:
            break
    return out


class Judge:
    """A dual encoder that scores edited images, {name: score} each (see SCORES; direction is from arXiv 2108.00946)."""

    def __init__(self, source, device):
        self.model, self.tokenizer, self.preprocessing = tbps.load_model(source, device)

    def embed_images(self, images):
        pixels = torch.stack([self.preprocessing.image(image) for image in images]).to(self.model.logit_scale.device)
        return F.normalize(self.model.encode_image(pixels), dim=1)      # (B, D)

    def embed_texts(self, captions):
        tokens = self.tokenizer([self.preprocessing.text(caption) for caption in captions])
        return F.normalize(self.model.encode_text(tokens), dim=1)

    @torch.no_grad()
    def __call__(self, sources, images, edits):
        image = self.embed_images(images)
        text = self.embed_texts([e["caption"] for e in edits]) - self.embed_texts([e["source"] for e in edits])
        direction = F.cosine_similarity(image - self.embed_images(sources), text)
        return [dict(words=w, direction=d) for w, d in zip((image * text).sum(dim=1).tolist(), direction.tolist())]


def to_image(pixels):
    """(3, H, W) in [0, 1] -> PIL image."""
    return Image.fromarray((255 * pixels.clamp(0, 1) + 0.5).byte().permute(1, 2, 0).cpu().numpy())


def full_size(source, old, new, paste):
    """The edit at the size of the source. paste: the source plus the enlarged difference of reconstruction and edit."""
    size, small = (source.height, source.width), new - old if paste else new
    large = F.interpolate(small[None], size, mode="bicubic", antialias=True)[0]
    return to_image(data.Resize(size, "bicubic")(source) + large if paste else large)


def score_edit(pixels, old, new, mask):
    """{name: score} (see SCORES) of source, reconstruction and edit (3, H, W) and mask (1, H, W)."""
    change = (new - old).abs().mean(dim=0, keepdim=True)
    return dict(psnr=-10 * math.log10(max(1e-10, (old - pixels).square().mean().item())),
                changed=(change * mask).sum().item() / max(1.0, mask.sum().item()),
                kept=1 - (change * (1 - mask)).sum().item() / max(1.0, (1 - mask).sum().item()))


def generate_batch(model, records, batch, recipe, judge=None):
    """Make the pairs of a part of the plan -> [(panels, entry), ...] in its order. Nothing is random here.
    panels: {source, reconstruction, edit, mask: PIL image};  entry: captions, edit, scores as in pairs.jsonl."""
    size = recipe["height"], recipe["width"]
    sources, edited = [data.load_image(records[i]["image"]) for _, i, _ in batch], [chosen for *_, chosen in batch]
    pixels = torch.stack([data.Resize(size, "bicubic")(source) for source in sources])
    text = model.encode_text([chosen[0]["source"] for chosen in edited])
    zs = model.invert(model.encode(pixels), text)                       # all edits of a source share its inversion
    nulls = model.null_text(zs, text, recipe["guidance"], recipe["rounds"]) if recipe["inversion"] == "null" else None
    made = {}
    for k in range(max(map(len, edited))):                              # the k-th edit of each source that has one
        rows = [n for n, chosen in enumerate(edited) if k < len(chosen)]
        chosen = [edited[n][k] for n in rows]
        options = {key: recipe[key] for key in CONTROL}
        control = Control([e["tokens"] for e in chosen], [e["blend"] for e in chosen], **options)
        target = model.encode_text([e["caption"] for e in chosen])
        old, new = model.edit([z[rows] for z in zs], text[rows], target, control, recipe["guidance"],
                              [null[rows] for null in nulls] if nulls else None, recipe["inversion"])
        old, new = model.decode(old).cpu(), model.decode(new).cpu()
        mask = torch.ones_like(new[:, :1]) if control.mask is None else F.interpolate(control.mask.float().cpu(), size)
        made |= {(n, k): (n, *rest) for n, *rest in zip(rows, chosen, old, new, mask)}
    made, pairs = [made[place] for place in sorted(made)], []
    for n, e, old, new, mask in made:
        inside = old * (0.2 + 0.8 * mask)                               # the reconstruction, dark outside the mask
        small = [to_image(x).resize(sources[n].size, Image.Resampling.NEAREST) for x in (old, inside)]
        large = full_size(sources[n], old, new, recipe["paste"])
        panels = dict(source=sources[n], reconstruction=small[0], edit=large, mask=small[1])
        edit = {key: e[key] for key in ("what", "noun", "old", "new", "source", "tokens", "blend")}
        pairs.append((panels, dict(captions=[e["caption"]], edit=edit, scores=score_edit(pixels[n], old, new, mask))))
    if judge:
        scores = judge([p["source"] for p, _ in pairs], [p["edit"] for p, _ in pairs], [e for _, e, *_ in made])
        for (_, entry), more in zip(pairs, scores):
            entry["scores"] |= more
    return pairs


# ---- the folder of pairs --------------------------------------------------------------------------------------------

LEGEND = ("From left to right: the source, its reconstruction after inversion and denoising, the edit, and the mask, "
          "which is the reconstruction, dark where the edit may change nothing.")
SCORES = {
    "psnr": "peak signal-to-noise ratio of the reconstruction against the source, in dB. Higher is closer.",
    "changed": "mean change from reconstruction to edit inside the mask, from 0 to 1. 0: the edit does nothing.",
    "kept": "1 minus the mean change outside the mask. 1: nothing changes there.",
    "words": "cosine of edit and new caption minus cosine of edit and old caption. Above 0: the new one fits better.",
    "direction": "cosine between the changes of image and caption features. 1: the image changes as the caption says.",
}


def check_folder(out, settings):
    """Raise ValueError unless a folder for pairs is new, or was begun by the same command. The count may grow."""
    file = out / "settings.json"
    if not file.exists():
        is_new = not out.exists() or out.is_dir() and not any(out.iterdir())
        tbps.require(is_new, f"{out} exists and is no folder of generated pairs; name another with --out")
        return
    before = data.load_json(file)
    before["count"] = max(before["count"], settings["count"])
    changed = [f"{key}: {before.get(key)!r} then, {value!r} now" for key, value in settings.items()
               if before.get(key) != value]
    tbps.require(not changed, f"{out} was made with other options:\n  " + "\n  ".join(changed) +
                 "\n  Name another folder with --out, and for other pairs another --seed")


def write_file(path, text):
    """Atomically, also if two ranks write it."""
    part = path.with_name(f"{path.name}.{os.environ.get('RANK', 0)}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def count_pairs(batch):
    return sum(len(chosen) for *_, chosen in batch)


def read_part(out, batch):
    """The entries of a batch, a part of the plan, from its file in parts/; None if the batch is not complete."""
    file = out / f"parts/{batch[0][0]:06d}.jsonl"
    entries = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    complete = len(entries) == count_pairs(batch) and all((out / "imgs" / e["image"]).exists() for e in entries)
    return entries if complete else None


def write_part(out, batch, pairs, records, args):
    """Write the images of a batch, then its file in parts/, which says that the batch is complete."""
    lines, first, indices = [], batch[0][0], [i for _, i, chosen in batch for _ in chosen]
    for number, (i, (panels, entry)) in enumerate(zip(indices, pairs), first):
        name, image = f"{number:06d}.png", records[i]["image"]
        panels["edit"].save(out / "imgs" / name)
        Image.fromarray(np.hstack(list(panels.values()))).save(out / "strips" / name)
        source = str(image) if isinstance(image, Path) else f"{args.dataset} {i}"
        pid = 1_000_000 * (args.seed + 1) + number                      # no id of a data set, nor of another seed
        lines.append(json.dumps(dict(image=name, pid=pid, split="train", source_image=source,
                                     source_pid=records[i]["pid"], seed=args.seed) | entry) + "\n")
    write_file(out / f"parts/{first:06d}.jsonl", "".join(lines))


def generate_all(out, model, records, batches, recipe, judge, args):
    """Make the batches that are not complete."""
    bar = data.progress_bar(total=sum(map(count_pairs, batches)), unit=" pairs", desc="pairs")
    began, fresh = time.time(), 0
    for batch in batches:
        if read_part(out, batch) is None:
            pairs = generate_batch(model, records, batch, recipe, judge)
            write_part(out, batch, pairs, records, args)
            fresh += len(pairs)
        bar.update(count_pairs(batch))
    bar.close()
    if fresh:
        print(f"{fresh:,} pairs made, {fresh / (time.time() - began):.2f} per second; {model.evaluations / fresh:.0f} "
              "evaluations of the UNet each (official code: about 1,000)", flush=True)


def show_pair(out, entry):
    """HTML of one pair: the edit, both captions, images, scores."""
    edit, caption = entry["edit"], entry["captions"][0]
    said = [f"<b>{edit['noun']}: {edit['old']} → {edit['new']}</b>", *map(html.escape, (edit["source"], caption))]
    scores = ", ".join(f"{name} {value:.3g}" for name, value in entry["scores"].items())
    strip = data.load_image(out / "strips" / entry["image"])
    figure = evaluation.figure(strip, f"source, reconstruction, edit, mask: {caption}", scores, "large", 160)
    return f"<div class=row><p>{'<br>'.join(said)}</p>{figure}</div>"


def finish(out, entries):
    """Write pairs.jsonl, and report.html with the scores and a sample of 40 pairs."""
    write_file(out / "pairs.jsonl", "".join(json.dumps(e) + "\n" for e in entries))
    levels, rows = {"lowest": 0.0, "5 %": 0.05, "median": 0.5, "95 %": 0.95, "highest": 1.0}, {}
    for name in entries[0]["scores"]:
        values = torch.tensor([e["scores"][name] for e in entries])
        rows[name] = {level: f"{values.quantile(q).item():.3g}" for level, q in levels.items()}
    meanings = "".join(f"<dt><strong>{name}</strong></dt><dd>{SCORES[name]}</dd>" for name in rows)
    sample = entries[::max(1, len(entries) // 40)][:40]
    evaluation.write_page(out / "report.html", f"{len(entries):,} generated pairs", [
        ("Scores", f"{evaluation.table(rows)}<dl class=legend>{meanings}</dl>"),
        ("Pairs", f"<p class=legend>{LEGEND}</p>{''.join(show_pair(out, e) for e in sample)}")])
    print(f"{len(entries):,} pairs in {out}; look at {out / 'report.html'}; train on them with tbps.py --extra {out}")


# ---- run ------------------------------------------------------------------------------------------------------------

def parse_args(argv=None):
    """-> args, recipe. The command line beats the preset."""
    paper, toy = (tbps.format_values({k: v for k, v in r.items() if v != SD[k]}) for r in (PAPER, TOY))
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"keys for --set, with the values for Stable Diffusion:\n{tbps.format_keys(SD, RECIPE)}\n"
               f"--preset paper differs in: {paper}\nsynthetic pedestrians (toy) in: {toy}")
    add = p.add_argument
    add("--dataset", choices=data.DATASETS, default="toy", help="whose training split is edited (default: toy)")
    add("--data-root", default="data", help="the set's folder or its parent; for csv the file (default: data)")
    add("--diffusion", help="a Stable Diffusion 1.x: folder in the layout of diffusers, or hub id (toy: ours)")
    add("--finetune", metavar="DIR", help="first train the UNet on the training split, and keep it in this folder")
    add("--count", type=int, default=500, help="pairs to make; a folder that holds fewer is added to (default: 500)")
    add("--edits", type=int, default=2, help="pairs per source at most; they share one inversion (default: 2)")
    add("--batch", type=int, default=16, help="sources at a time (default: 16)")
    add("--judge", metavar="C", help="checkpoint or weights of a CLIP; it scores how well an edited image fits its "
        "new caption")
    add("--preset", choices=["persons", "paper"], default="persons", help="paper: square images, null-text inversion")
    add("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="change keys of the recipe, below")
    add("--seed", type=int, default=0, help="of the choice of sources and edits, and of training (default: 0)")
    add("--out", help="the folder of the pairs (default: runs/pdg-DATASET-SEED)")
    add("--save-minutes", type=float, default=10, help="minutes between saves while the model trains (default: 10)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu",
        help="cuda, cpu or mps (default: cuda if there is one)")
    args = p.parse_args(argv)
    is_toy = args.dataset.startswith("toy")
    recipe = dict(TOY if is_toy else PAPER if args.preset == "paper" else SD)
    for text in args.set:
        key, _, value = text.partition("=")
        tbps.require(key in recipe, f"there is no key {key!r}; there are {', '.join(recipe)}")
        recipe[key] = tbps.parse_value(key, value, recipe[key])
    check_recipe(recipe)
    tbps.check_device(args.device)
    for condition, sentence in (
            (args.preset != "paper" or not is_toy, "--preset paper is for Stable Diffusion; toy has its own preset"),
            ("" not in vars(args).values(), "an option was given an empty text; is a shell variable not set?"),
            (min(args.count, args.edits, args.batch) > 0, "--count, --edits and --batch must be at least 1"),
            (is_toy or args.diffusion, f"name the diffusion model with --diffusion; {LAYOUT}")):
        tbps.require(condition, sentence)
    args.out = args.out or f"runs/pdg-{args.dataset}-{args.seed}"
    return args, recipe


def main():
    args, recipe = parse_args()
    out, rank, ranks = Path(args.out), int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    no_settings = ("out", "device", "set", "preset", "save_minutes")    # they do not decide what is made
    settings = {key: value for key, value in vars(args).items() if key not in no_settings} | recipe
    check_folder(out, settings)
    if args.device == "cuda" and ranks > 1:
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
    judge = Judge(args.judge, args.device) if args.judge else None
    model = load_diffusion(args.diffusion or TOY_DIFFUSION, recipe["steps"], args.device)
    block = 2 ** (len(model.vae.config.block_out_channels) - 1) if model.vae else model.patch
    tbps.require(recipe["height"] % block == recipe["width"] % block == 0, f"height={recipe['height']} and width="
                 f"{recipe['width']} must be multiples of {block} for this model")
    records = data.read(args.dataset, args.data_root, "train")
    if args.finetune:
        model = finetuned_model(args, recipe, records, model)
    todo = plan(records, model.tokenizer, args.seed, args.count, args.edits, recipe["garments"])
    tbps.require(todo, "no caption of the training split has a coloured garment that could be edited")
    for name in ("imgs", "strips", "parts"):
        (out / name).mkdir(parents=True, exist_ok=True)
    write_file(out / "settings.json", json.dumps(settings, indent=1))
    print(f"{count_pairs(todo):,} pairs from {len(todo):,} of {len(records):,} images; {recipe['inversion']} "
          f"inversion, {recipe['steps']} steps, {recipe['height']}x{recipe['width']} pixels", flush=True)
    batches = [todo[start:start + args.batch] for start in range(0, len(todo), args.batch)]
    generate_all(out, model, records, batches[rank::ranks], recipe, judge, args)
    parts = [read_part(out, batch) for batch in batches]
    if None not in parts:
        finish(out, [entry for part in parts for entry in part])


if __name__ == "__main__":
    data.command(main, "stopped; what is done is kept, and the same command goes on from there")
