"""Proximity data generation (PDG) of CTLG (arXiv 2311.09084): a diffusion model turns a training pair into new pairs nearby, in which one
piece of clothing has another colour, in the picture and in the caption.

M mentions, B sources in a batch, R rows of the model's batch, T steps, L latents: 4 channels and an eighth of the pixels' side (Stable
Diffusion), or the pixels themselves (no VAE). z[t] is the latent at step t of T, 0 the clean one."""

import collections
import json
import re
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from safetensors.torch import save_file

import data
import tbps

# ---- caption edits --------------------------------------------------------------------------------------------------
#
# What is edited is a *mention*: a garment with its colours, "blue and white striped shirt" or "his shirt is blue". An edit replaces words by
# others of as many tokens, so that token n of the new caption stands for what token n of the old one stood for, and attention maps of one serve
# the other.

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
        while i >= 0 and (colour[i] or other[i] and "-" not in words[i] and (words[i] not in GARMENT_OF or i == k - 1) or words[i] in JOINS and i > 0 and colour[i - 1] and colour[i + 1]):
            colours = [i] * colour[i] + colours
            i -= 1
        return [] if words[max(i, 0)] in ("in", "of") and i > 0 and words[i - 1] in GARMENT_OF else colours         # "a shirt in red and black pants"

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
    source = data.plain_text(caption)
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
    for k in changed:
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
    config = json.loads(data.need(folder / "config.json", "the text encoder's configuration", "the folder has the layout of diffusers").read_text())
    path = next((folder / n for n in ("model.safetensors", "pytorch_model.bin") if (folder / n).exists()), folder / "model.safetensors")
    weights = tbps.read_file(data.need(path, "the text encoder's weights", "or pytorch_model.bin"))
    weights = {"text_model." + n.removeprefix("text_model."): w for n, w in weights.items()}           # transformers 5 saves it without
    weights = tbps.to_openai_names({n: w for n, w in weights.items() if not re.match(tbps.NOT_WEIGHTS, n)}, path)
    for pattern, replacement in tbps.OPENAI_NAMES:
        weights = {re.sub(pattern, replacement, n): w.float() for n, w in weights.items()}
    weights = {re.sub("^text", "tower", n): w for n, w in weights.items()}
    if config.get("hidden_act", "quick_gelu") not in ("quick_gelu", "gelu"):
        raise ValueError(f"{folder}: the activation {config['hidden_act']!r} is not one of CLIP's")
    width, heads = config["hidden_size"], config["num_attention_heads"]
    words = Words(config["vocab_size"], width, config["num_hidden_layers"], width // heads, config.get("hidden_act", "quick_gelu") == "quick_gelu",
                  config["max_position_embeddings"])
    if differ := sorted(words.state_dict().keys() ^ weights.keys()):
        raise ValueError(f"{path} is not the text encoder of a Stable Diffusion 1.x: it {'lacks' if differ[0] in words.state_dict() else 'also has'} {differ[0]}")
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


FOLDERS = ["unet", "scheduler", "text_encoder", "tokenizer", "vae"]
FILES = ["config.json", "scheduler_config.json", "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin", "model.safetensors", "pytorch_model.bin",
         "merges.txt", "tokenizer.json"]


def load_diffusion(source, steps=50, device="cpu"):
    """A model in the layout of diffusers, as Stable Diffusion 1.x has it: a local folder, or a hub id. Without vae/ it works on pixels."""
    folder = Path(source)
    if not folder.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        try:
            folder = Path(snapshot_download(str(source), allow_patterns=[f"{f}/{name}" for f in FOLDERS for name in FILES]))
        except (HfHubHTTPError, OSError, ValueError) as e:
            raise FileNotFoundError(f"no diffusion model from {source}: it is no folder here, and the hub cannot give it ({type(e).__name__})\n  Fetch it on a "
                                    "machine with network and name its folder with --diffusion") from None
    for name in FOLDERS[:-1]:
        data.need(folder / name, "a part of the diffusion model", "a folder in the layout of diffusers has unet, vae, scheduler, text_encoder and tokenizer")
    unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet", low_cpu_mem_usage=False)
    vae = AutoencoderKL.from_pretrained(folder, subfolder="vae", low_cpu_mem_usage=False) if (folder / "vae").exists() else None
    words, tokenizer = load_words(folder / "text_encoder"), data.load_tokenizer(folder / "tokenizer")
    if tokenizer.vocab != len(words.tower.tok.weight):
        raise ValueError(f"{folder}: the tokenizer has {tokenizer.vocab:,} tokens, the text encoder {len(words.tower.tok.weight):,}: they do not belong together")
    if unet.config.cross_attention_dim != words.tower.pos.shape[1]:
        raise ValueError(f"{folder}: the UNet looks at words of {unet.config.cross_attention_dim} numbers, the text encoder has {words.tower.pos.shape[1]}")
    return Diffusion(unet, vae, DDIMScheduler.from_pretrained(folder, subfolder="scheduler"), words, tokenizer, steps, device)


class Diffusion:
    """A text-conditioned diffusion model: UNet, VAE or None, noise schedule, text encoder, tokenizer. Knows how to follow DDIM both ways and
    how to edit. `evaluations` counts how often the UNet has seen a sample, for forward and backward passes alike."""

    def __init__(self, unet, vae, scheduler, words, tokenizer, steps=50, device="cpu"):
        self.unet, self.vae, self.words = (m and m.to(device).eval().requires_grad_(False) for m in (unet, vae, words))
        self.tokenizer, self.device, self.evaluations, self.control = tokenizer, device, 0, None
        if any(isinstance(m, Attention) and (m.group_norm is not None or m.norm_cross or m.residual_connection) for m in unet.modules()):
            raise ValueError("this UNet has attention layers of another kind than Stable Diffusion 1.x and 2.x; such models cannot be edited here")
        unet.set_attn_processor({name: Attend(self, name) for name in unet.attn_processors})
        # As published for prompt-to-prompt and CTLG: t = 980, 960, ..., 0 for 50 steps, and below 0 the first noise level, not none
        scheduler = DDIMScheduler.from_config(scheduler.config, steps_offset=0, clip_sample=False, set_alpha_to_one=False, timestep_spacing="leading")
        scheduler.set_timesteps(steps)
        self.kind, self.alphas, self.steps = scheduler.config.prediction_type, scheduler.alphas_cumprod.double().tolist(), scheduler.timesteps.tolist()
        self.stride = scheduler.config.num_train_timesteps // steps
        if self.kind not in ("epsilon", "v_prediction"):
            raise ValueError(f"the model predicts {self.kind!r}; epsilon and v_prediction are known")

    @torch.no_grad()
    def read(self, captions):
        """Captions -> what the UNet looks at, (B, 77, C). Padded with the end symbol, as Stable Diffusion was trained."""
        tokens = self.tokenizer(captions)
        after = torch.arange(tokens.shape[1]) > tokens.argmax(dim=1, keepdim=True)
        return self.words(tokens.masked_fill(after, self.tokenizer.eot).to(self.device))

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
            adam, done = torch.optim.Adam([null], lr=0.01 * (1 - i / (2 * len(self.steps)))), torch.zeros(len(z), dtype=torch.bool, device=z.device)
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
        replace = self.step < int((self.cross if cross else self.own) * (self.total + 1)) and (cross or factor >= 2)
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
            raise ValueError(f"no layer of this UNet reduces the picture {self.blend_at} times; set blend_at to another power of 2, or blend_from=1 for no local blend")
        if self.step + 1 <= int(self.blend_from * self.total):
            return new
        maps = F.interpolate(F.max_pool2d(self.maps, 3, stride=1, padding=1), self.shape[-2:])
        self.mask = (maps / maps.amax(dim=(2, 3), keepdim=True) > self.threshold).any(dim=0)[:, None].to(new.dtype)
        return old + self.mask * (new - old)
