"""LCR2S: a richer model that sees several images and texts of a person teaches a light one that sees one (MM 2023, arXiv 2310.11210).

    python distill.py                                         toy people: plain model, richer model, light model, their scores
    python distill.py --dataset cuhk --data-root DIR          from OpenAI's CLIP ViT-B/16
    python distill.py --dataset cuhk --method lcr2s-paper     what is known of the paper's own form
    python distill.py --dataset cuhk --plain C                with the encoders of a checkpoint instead of training plain ones first
    python distill.py --teacher runs/toy-lcr2s-0/richer/last.pt --student half --out runs/half        another, smaller student

A run has three stages in three folders of runs/DATASET-METHOD-SEED/. `plain` is an ordinary dual encoder. `richer` puts a fusion on it:
each image looks at a few other images of its person, each text at other texts, and what comes out has seen more than one view shows. `light`
is a dual encoder again, from the start that plain had, that also learns what the richer model makes of each pair: light/best.pt is what
one searches with, and costs what plain costs. plain, light and a richer model trained end to end go through tbps.train, as all models do, with
the losses below; a richer model on frozen encoders learns from stored features in its own loop, train_fusion. Ctrl-C saves, --resume goes on.

What the paper says and what we chose: no public code exists, and of the paper no more was at hand than its abstract and what others report. From
it: supports of the same person, drawn at random, without the sample itself; one attention layer that fuses both; a richer model that is trained
first and then frozen; a light one without fusion that copies its features and its image-text relations. Ours: everything with a number in it.

M captions, N images of a set, K others of a person at most, S supports; the other letters are those of tbps.py."""

import argparse
import collections
import copy
import functools
import hashlib
import html
import math
import statistics
import time
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

import data
import eval as evaluation
import losses
import tbps

LCR2S = tbps.SDM | dict(
    batch=128,
    # the richer model
    end_to_end=False, fusion="attention", support=4, siblings=True, support_drop=0.3, aux=1.0, rich_epochs=20, rich_lr=3e-4, rich_decay=0.01,
    # what the light one copies
    target="richer", affinity=1.0, kd_tau=0.05, pair=0.3, features=0.0, relations=0.0, warm=False)
PAPER = LCR2S | dict(end_to_end=True, sampler="views", affinity=0.0, features=0.5, relations=0.2)
RECIPES = {"lcr2s": LCR2S, "lcr2s-paper": PAPER}
CHOICES = tbps.CHOICES | dict(fusion=["attention", "self", "mean"], target=["richer", "self", "centroid"])
HELP = dict(  # what --help says of each key
    end_to_end="richer: encoders and fusion learn together, supports come from the batch; else fusion alone, on stored features",
    fusion="attention (the sample looks at its supports), self (all look at all, then the mean) or mean (nothing to learn)",
    support="other images, or texts, that a sample is fused with, at most", siblings="the other captions of the same image are supports too",
    support_drop="richer: chance of each support to be left out in training", aux="weight, end to end: SDM of the features before fusion",
    rich_epochs="richer, on stored features: passes over the pairs", rich_lr="its peak rate, AdamW", rich_decay="its weight decay",
    target="what the light one copies: richer, or as controls self (the teacher's features without fusion), centroid (its person's mean)",
    affinity="weight: the same neighbours (KL of softmaxed cosines)", kd_tau="its temperature", pair="share of the pair itself in its target",
    features="weight: the same features (the paper's)", relations="weight: the same image-text cosines (the paper's)",
    warm="the light one starts from the teacher's encoders instead of where plain started")
KEYS = tbps.SDM_KEYS | {key: (LCR2S[key], text) for key, text in HELP.items()}


# ---- support sets ---------------------------------------------------------------------------------------------------

def others(pids, contents, images=None):
    """Who else there is of each one's person: (N, K) numbers of samples, padded with -1. Copies, samples of equal `contents`, are no
    others; with `images`, neither are samples of the same image."""
    of = collections.defaultdict(list)
    for i, pid in enumerate(pids):
        of[pid].append(i)
    rows = [[j for j in of[pid] if contents[j] != contents[i] and (images is None or images[j] != images[i])] for i, pid in enumerate(pids)]
    K = max(1, *map(len, rows))
    return torch.tensor([row + [-1] * (K - len(row)) for row in rows])


def members(label):
    """The samples of each of P classes, from labels (N,) in 0 ... P-1: (P, K) numbers, padded with -1."""
    return nn.utils.rnn.pad_sequence(label.argsort(stable=True).split(label.bincount().tolist()), batch_first=True, padding_value=-1)


def draw(candidates, able, size, drop=0.0):
    """Supports: of each row of candidates (B, K) up to `size` of those that are `able` (B, K), none twice, each then left out with chance
    `drop`. -> their numbers (B, S), seen (B, S) bool. What is not seen is padding."""
    chance = torch.rand(candidates.shape, device=candidates.device).masked_fill(~able, -1)
    best = chance.topk(min(size, candidates.shape[1]), dim=1)
    return candidates.gather(1, best.indices).clamp(min=0), (best.values >= 0) & (torch.rand_like(best.values) >= drop)


def fused(fuse, features, rows, table, able, size, drop=0.0):
    """Samples `rows` (B,) of a set's features (N, D), each with supports from its row of table (B, K) -> (B, D)."""
    support, seen = draw(table, able, size, drop)
    return fuse(features[rows], features[support], seen)


class Bank:
    """The features of a set without fusion, of unit length, image (N, D), text (M, D); own (M,), the image of each caption; and the
    others of each: image_others (N, K), text_others (M, K)."""

    def __init__(self, image, text, records, siblings=True, device="cpu"):
        images = [i for i, r in enumerate(records) for _ in r["captions"]]
        pids = [r["pid"] for r in records]
        inside = [hashlib.sha256(r["image"].read_bytes() if isinstance(r["image"], Path) else r["image"].tobytes()).digest() for r in records]
        self.image, self.text, self.own, self.pid = image.to(device), text.to(device), torch.tensor(images, device=device), torch.tensor(pids, device=device)
        self.image_others = others(pids, inside).to(device)
        self.text_others = others([pids[i] for i in images], [c for r in records for c in r["captions"]], None if siblings else images).to(device)

    @classmethod
    def of(cls, model, tokenizer, preprocessing, records, recipe, args):
        """With the encoders of a model, in eval mode."""
        images, tokens, *_ = evaluation.evaluation_set(records, preprocessing, tokenizer)
        features = evaluation.embed(model, images, tokens, args.device, args.workers)
        return cls(*features, records, recipe["siblings"], args.device)

    def enrich(self, heads, item, size, drop=0.0):
        """Captions by number (B,) and their images, each fused with supports drawn from its others -> image (B, D), text (B, D)."""
        own = self.own[item]
        images, texts = self.image_others[own], self.text_others[item]                                  # (B, K) each
        return (fused(heads["fuse_image"], self.image, own, images, images >= 0, size, drop),
                fused(heads["fuse_text"], self.text, item, texts, texts >= 0, size, drop))


# ---- fusion ---------------------------------------------------------------------------------------------------------

class Fusion(nn.Module):
    """A sample and its supports -> one richer feature: pre-norm cross-attention and an MLP, with the sample among the keys, so that it is
    defined for no supports at all and does not depend on their order. Starts as the identity: the last layers of both branches are 0."""

    def __init__(self, width, head_width, kind="attention"):
        super().__init__()
        self.kind, self.heads = kind, width // head_width
        if kind != "mean":
            self.ln_query, self.ln_key, self.ln_mlp = nn.LayerNorm(width), nn.LayerNorm(width), nn.LayerNorm(width)
            self.q, self.kv, self.proj = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(width, width)
            self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
            for layer in (self.proj, self.fc2):
                nn.init.zeros_(layer.weight)
                nn.init.zeros_(layer.bias)

    def forward(self, anchor, support, seen, look=False):
        """anchor (B, D), support (B, S, D), seen (B, S) bool -> (B, D), not normalised. With look=True also how much of its attention
        the anchor gives to itself and to each support, (B, 1+S), the mean over heads."""
        rows = torch.cat([anchor[:, None], support], dim=1)                                             # (B, 1+S, D)
        rows = F.normalize(rows.to(torch.promote_types(rows.dtype, torch.float32)), dim=2)
        seen = F.pad(seen, (1, 0), value=True)                                                          # (B, 1+S)
        share = (seen / seen.sum(dim=1, keepdim=True)).to(rows.dtype)[..., None]                        # (B, 1+S, 1)
        if self.kind == "mean":
            return ((share * rows).sum(dim=1), share[..., 0]) if look else (share * rows).sum(dim=1)
        B, T, D = rows.shape
        x = rows if self.kind == "self" else rows[:, :1]                                                # (B, X, D): who looks
        q = self.q(self.ln_query(x)).view(B, -1, self.heads, D // self.heads).transpose(1, 2)           # (B, H, X, D/H)
        k, v = self.kv(self.ln_key(rows)).view(B, T, 2, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        logits = (q @ k.transpose(2, 3) * (D // self.heads) ** -0.5).masked_fill(~seen[:, None, None], -torch.inf)
        weight = logits.softmax(dim=3)                                                                  # (B, H, X, 1+S)
        x = x + self.proj((weight @ v).transpose(1, 2).reshape(B, -1, D))
        x = x + self.fc2(F.gelu(self.fc1(self.ln_mlp(x))))
        x = (share * x).sum(dim=1) if self.kind == "self" else x[:, 0]
        return (x, weight[:, :, 0].mean(dim=1)) if look else x


def richer_heads(recipe, model, persons):
    fusions = {name: Fusion(model.arch["embed"], model.arch["head_width"], recipe["fusion"]) for name in ("fuse_image", "fuse_text")}
    return fusions | tbps.id_heads(recipe, model, persons)


# ---- losses of a step -----------------------------------------------------------------------------------------------

def richer_losses(image, text, batch, model, recipe, autocast):
    """End to end, the paper's way: encoders and fusion together, each sample fused with what the batch holds of its person (the sampler
    "views" sees to it that there is something). `aux` keeps the encoders able to tell people from one view. image, text (B, D) without
    fusion."""
    pid, image, text = map(losses.gather, (batch["pid"], image, text))
    tokens, image_of = (losses.gather(x.to(pid.device)) for x in (batch["tokens"][0], batch["image"]))
    same = pid[:, None] == pid[None, :]
    copies = (tokens[:, None] == tokens[None, :]).all(dim=2)
    everyone, rich = torch.arange(len(pid), device=pid.device).expand(len(pid), -1), []
    for fuse, features, able in ((model.heads["fuse_image"], image, same & (image_of[:, None] != image_of[None, :])), (model.heads["fuse_text"], text, same & ~copies)):
        support, seen = draw(everyone, able, recipe["support"], recipe["support_drop"])
        rich.append(fuse(features, features[support], seen))
    out = tbps.pair_losses(*rich, pid, model.scale(), model.heads, recipe, autocast)
    if recipe["aux"]:
        out["aux"] = recipe["aux"] * losses.sdm(image, text, pid, model.scale())
    return out


def copy_losses(image, text, rich_image, rich_text, has_image, has_text, recipe):
    """What a light model loses by not copying its teacher. All features (B, D); which samples had supports (B,)."""
    out = {}
    if recipe["affinity"]:
        out["affinity"] = recipe["affinity"] * losses.distil_affinity(image, text, rich_image, rich_text, recipe["kd_tau"], recipe["pair"])
    if recipe["features"]:
        out["features"] = recipe["features"] * (losses.distil_features(image, rich_image, has_image) + losses.distil_features(text, rich_text, has_text))
    if recipe["relations"]:
        out["relations"] = recipe["relations"] * losses.distil_relations(image, text, rich_image, rich_text)
    return out


@torch.no_grad()
def targets(bank, heads, target, size, item):
    """What a student copies, for captions by number (B,): `richer`, or one of the controls that tell what supports and fusion are worth."""
    item = item.to(bank.own.device)
    own = bank.own[item]
    has_image, has_text = (bank.image_others[own] >= 0).any(dim=1), (bank.text_others[item] >= 0).any(dim=1)
    if target == "richer":
        return *bank.enrich(heads, item, size), has_image, has_text
    if target == "self":
        return bank.image[own], bank.text[item], has_image, has_text
    person = bank.pid.unique(return_inverse=True)[1]                                                    # (N,)
    means = [torch.zeros(len(bank.image), features.shape[1], device=features.device).index_add_(0, who, features)
             for who, features in ((person, bank.image), (person[bank.own], bank.text))]                # sums, of which only the direction counts
    return means[0][person[own]], means[1][person[own]], has_image, has_text


# ---- the richer model on stored features ----------------------------------------------------------------------------

def train_fusion(args, recipe, model, tokenizer, preprocessing, bank, out, stop=()):
    """Trains the fusion and a classifier on features that do not change: minutes, and no supports need to be loaded with a batch. Batches
    hold several images of a person, each with one of its captions: among strangers alone, whoever brings supports of the right person wins,
    and the fusion learns to look at nothing else. Writes last.pt and log.jsonl, as tbps.train does; resumes exactly."""
    images, pid, label = bank.own.tolist(), bank.pid[bank.own].tolist(), bank.pid.unique(return_inverse=True)[1][bank.own]         # of each caption
    N, epochs = len(bank.image), recipe["rich_epochs"] if recipe["fusion"] != "mean" else 0
    no_amp = functools.partial(torch.autocast, bank.image.device.type, enabled=False)
    model.to(args.device).requires_grad_(False)
    heads = model.heads.requires_grad_(True)
    optimizer = torch.optim.AdamW(heads.parameters(), lr=recipe["rich_lr"], weight_decay=recipe["rich_decay"])
    state, saved_at = dict(epoch=0, step=0, best=-1.0, scores={}, minutes=0.0), time.time()
    if args.resume:
        saved = tbps.read_file(out / "last.pt")
        model.load_state_dict(saved["weights"])
        optimizer.load_state_dict(saved["optimizer"])
        state |= {k: saved[k] for k in state if k in saved}
    bar = data.progress_bar(total=epochs * N, initial=state["epoch"] * N, unit=" pairs", desc="fusion", disable=losses.ranks()[0] > 0)
    started = time.time() - 60 * state["minutes"]
    while True:
        stopping = tbps.any_rank(stop, args.device)                     # looked at once: what is said to be saved is saved
        if state["epoch"] == epochs or stopping or tbps.any_rank(time.time() - saved_at > 60 * args.save_minutes, args.device):
            state["minutes"] = (time.time() - started) / 60
            tbps.save(out / "last.pt", tbps.checkpoint_dict(args, recipe, model, tokenizer, preprocessing, heads=True) | state | dict(optimizer=optimizer.state_dict()))
            saved_at = time.time()
        if stopping:
            raise KeyboardInterrupt(f"stopped after epoch {state['epoch']} of the richer model; {out}/last.pt is saved. Go on with the same command and --resume")
        if state["epoch"] == epochs:
            break
        torch.manual_seed(data.derive_seed(args.seed, state["epoch"], 1))
        order = data.batches("views", pid, recipe["batch"], data.derive_seed(args.seed, state["epoch"], 1), images, drop_last=False)
        total, began = 0, time.time()
        for i, item in enumerate(order):
            item, done = torch.tensor(item, device=args.device), (state["epoch"] + i / len(order)) / epochs
            optimizer.param_groups[0]["lr"] = lr = recipe["rich_lr"] * (1 + math.cos(math.pi * done)) / 2
            image, text = bank.enrich(heads, item, recipe["support"], recipe["support_drop"])           # (B, D) each
            parts = tbps.pair_losses(image, text, label[item], model.scale(), heads, recipe, no_amp)
            loss = sum(parts.values())
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            bar.update(len(item))
            total = total + torch.stack([loss, *parts.values()]).detach()
        mean = (total / len(order)).tolist()
        if not math.isfinite(mean[0]):
            raise FloatingPointError(f"the loss of the richer model is not finite in epoch {state['epoch'] + 1}; try a lower --set rich_lr= (now {recipe['rich_lr']:g})")
        state |= dict(epoch=state["epoch"] + 1)
        tbps.write_log(out, at=[state["epoch"], 0], epoch=state["epoch"], lr=lr, scale=model.scale().item(), loss=mean[0], **dict(zip(parts, mean[1:])))
        line = f"epoch {state['epoch']:3d}/{epochs}  " + "  ".join(f"{k} {v:.3f}" for k, v in zip(["loss", *parts], mean)) + f"  {N / (time.time() - began):.0f} pairs/s"
        tbps.print_above(bar, line)
    bar.close()


# ---- what the richer model knows ------------------------------------------------------------------------------------

@torch.no_grad()
def judge(heads, bank, size, seed=0):
    """Scores of the richer model on a test set, {what: scores}. With the person's other images at hand a search is easy for a reason that
    does not count: supports tell who it is, and may contain the very image that is asked for. Hence

    held-out view  for each k, queries are the captions of everyone's k-th image, as they are; the gallery are all other images, each fused
                   with supports among them. All queries of all k together; the one score to judge a teacher by
    wrong donors   the same, but supports come from one other person: what is left if they only mark who it is
    both sides     queries fused as well, nothing held out: leaks, shown with supports of one wrong person on both sides, and of two"""
    torch.manual_seed(seed)                                                                             # the same supports for every caller
    pid, own, device = bank.pid, bank.own, bank.image.device
    persons, person = pid.unique(return_inverse=True)
    P, images, texts = len(persons), members(person), members(person[own])                      # (P, K) each
    view = (images[person] == torch.arange(len(pid), device=device)[:, None]).int().argmax(dim=1)       # (N,): which of its person's it is

    def held_out(fuse, table):
        """The mean over the queries of all views. table (N, K): from where each image has its supports."""
        total = collections.Counter()
        for k in range(images.shape[1]):
            rows = (view != k).nonzero()[:, 0]
            asked = ((view[own] == k) & torch.isin(person[own], person[rows])).nonzero()[:, 0]          # of those who have another image
            if len(asked):
                able = (table[rows] >= 0) & (view[table[rows]] != k)
                scores = evaluation.retrieval_metrics(bank.text[asked], fused(fuse, bank.image, rows, table[rows], able, size), pid[own[asked]], pid[rows])
                total.update({name: value * len(asked) for name, value in scores.items()} | {"n": len(asked)})
        return {name: value / total["n"] for name, value in total.items() if name != "n"}

    def side(fuse, features, table):
        return fused(fuse, features, torch.arange(len(features), device=device), table, table >= 0, size)

    nobody, mean, fuse_image, fuse_text = torch.full_like(bank.image_others, -1), Fusion(bank.image.shape[1], 1, "mean"), heads["fuse_image"], heads["fuse_text"]
    rows = {"held-out view: single images": held_out(mean, nobody),
            "held-out view: richer": held_out(fuse_image, bank.image_others),
            "held-out view: mean instead of fusion": held_out(mean, bank.image_others),
            "held-out view: wrong donors": held_out(fuse_image, images[(person + 1) % P]),
            "held-out view: no supports": held_out(fuse_image, nobody)}
    wrong = side(fuse_image, bank.image, images[(person + 1) % P])
    sides = {"both sides: leaks who it is": (side(fuse_text, bank.text, bank.text_others), side(fuse_image, bank.image, bank.image_others)),
             "both sides, one wrong person's supports": (side(fuse_text, bank.text, texts[(person[own] + 1) % P]), wrong),
             "both sides, two wrong persons' supports": (side(fuse_text, bank.text, texts[(person[own] + 2) % P]), wrong)}
    return rows | {name: evaluation.retrieval_metrics(text, image, pid[own], pid) for name, (text, image) in sides.items()}


@torch.no_grad()
def attention_pictures(heads, bank, records, size, number=6):
    """HTML: of some persons an image and a caption, and how much of its attention each gives to itself and to each support."""
    def look(fuse, features, table, row):
        """The sample and what it is fused with, [(number, share of attention)]."""
        support, seen = draw(table[[row]], table[[row]] >= 0, size)
        share = fuse(features[[row]], features[support], seen, look=True)[1][0].tolist()
        return [(row, share[0])] + [(j, w) for j, w, there in zip(support[0].tolist(), share[1:], seen[0].tolist()) if there]

    captions, out = [c for r in records for c in r["captions"]], []
    able = ((bank.image_others[bank.own] >= 0).any(dim=1) & (bank.text_others >= 0).any(dim=1)).nonzero()[:, 0].tolist()
    for m in able[::max(1, len(able) // number)][:number]:
        shown = "".join(evaluation.figure(data.load_image(records[j]["image"]), f"{'support' if n else 'the image itself'}, {100 * w:.0f} %", f"{100 * w:.0f} %")
                        for n, (j, w) in enumerate(look(heads["fuse_image"], bank.image, bank.image_others, int(bank.own[m]))))
        said = "".join(f"<li><b>{100 * w:.0f} %</b> {html.escape(captions[j])}</li>" for j, w in look(heads["fuse_text"], bank.text, bank.text_others, m))
        out.append(f"<div class=row>{shown}<ul>{said}</ul></div>")
    return "<p>First the sample itself, then its supports; the share of attention is the mean over heads.</p>" + "".join(out)


# ---- students -------------------------------------------------------------------------------------------------------

SHRUNK = ["half", "narrow"]


def shrink(model, kind):
    """A smaller dual encoder out of a trained one. "half": every second block of both towers, the last one included; "narrow": every second
    channel, head and hidden unit. It has to learn again, but starts from something."""
    arch, weights = dict(model.arch), {n: w for n, w in model.state_dict().items() if not n.startswith("heads.")}
    if kind == "half":
        kept = {tower: list(range(1 - arch[f"{tower}_layers"] % 2, arch[f"{tower}_layers"], 2)) for tower in ("image", "text")}
        for tower in kept:
            new = {f"{tower}.blocks.{old}.": f"{tower}.blocks.{n}." for n, old in enumerate(kept[tower])}
            arch[f"{tower}_layers"] = len(new)
            weights = {next((n.replace(old, to) for old, to in new.items() if n.startswith(old)), n): w for n, w in weights.items()
                       if not n.startswith(f"{tower}.blocks.") or n.startswith(tuple(new))}
    else:
        for tower in ("image", "text"):
            C = arch[f"{tower}_width"]
            if C % (2 * arch["head_width"]):
                raise ValueError(f"the {tower} tower is {C} wide, with heads of {arch['head_width']}: that cannot be halved")
            arch[f"{tower}_width"] = C // 2
            heads = torch.arange(C).view(-1, arch["head_width"])[::2].flatten()
            for n in [n for n in weights if n.startswith(f"{tower}.")]:
                rows, columns = torch.arange(0, C, 2), slice(None)
                if ".qkv." in n:
                    rows, columns = torch.cat([heads, heads + C, heads + 2 * C]), rows
                elif n.endswith("attn.proj.weight"):
                    columns = heads
                elif ".fc1." in n:
                    rows, columns = torch.arange(0, 4 * C, 2), rows
                elif n.endswith("fc2.weight"):
                    columns = torch.arange(0, 4 * C, 2)
                elif n in (f"{tower}.pos", f"{tower}.tok.weight"):
                    rows, columns = slice(None), rows
                weights[n] = weights[n][rows][:, columns] if weights[n].ndim == 2 else weights[n][rows]
    small = tbps.DualEncoder(**arch)
    small.load_state_dict(weights)
    return small


@torch.no_grad()
def cost(model, tokens, batch=32, times=5):
    """Of a search: parameters, and milliseconds per image and per caption, in batches, the median of some."""
    model.eval()
    pixels, device = torch.rand(batch, 3, *model.arch["image_size"]), model.logit_scale.device
    out = [sum(p.numel() for n, p in model.named_parameters() if not n.startswith("heads."))]
    for encode, inputs in ((model.encode_image, pixels.to(device)), (model.encode_text, tokens[:batch])):
        spent = []
        for _ in range(1 + times):
            began = time.perf_counter()
            encode(inputs).sum().item()                                                                 # waits for a GPU
            spent.append(1000 * (time.perf_counter() - began) / len(inputs))
        out.append(statistics.median(spent[1:]))
    return dict(zip(("parameters", "ms per image", "ms per caption"), out))


# ---- the command ----------------------------------------------------------------------------------------------------

def default_method(dataset):
    return "lcr2s"


def parse_args(argv=None):
    p = tbps.training_options(__doc__, RECIPES, KEYS, default_method, argv)
    g = p.add_argument_group("stages")
    g.add_argument("--stage", choices=["richer", "light"], help="richer: end with the richer model; light: only the light one, from the richer one there (default: all)")
    g.add_argument("--plain", metavar="FILE", help="a checkpoint whose encoders to put the fusion on, instead of training plain ones")
    g.add_argument("--teacher", metavar="FILE", help="richer/last.pt of another run: only the light model is trained")
    g.add_argument("--student", default="same", help="the light model: same (as the plain one), half (its depth) or narrow (half its width), both from the "
                   "teacher's layers; ViT-B/32, or any CLIP weights as --clip takes them (default: same)")
    args, recipe = tbps.parse_options(p, RECIPES, argv, [f"{stage}/last.pt" for stage in ("light", "richer", "plain")], default_method)
    recipe = tbps.resolve_recipe(args, recipe, KEYS, CHOICES)
    if recipe["end_to_end"] and recipe["sampler"] != "views" and not args.teacher and args.stage != "light":
        raise ValueError("end to end, supports come from the batch, which must hold several images of a person: sampler=views")
    if zero := [k for k in ("support", "rich_lr", "kd_tau") if recipe[k] <= 0]:
        raise ValueError(f"{zero[0]}={recipe[zero[0]]} must be above 0")
    if over := [k for k in ("support_drop", "pair") if recipe[k] > 1]:
        raise ValueError(f"{over[0]}={recipe[over[0]]} must be a share from 0 to 1")
    if args.plain and (args.teacher or args.stage == "light" or recipe["end_to_end"]):
        raise ValueError("--plain names encoders to put a new fusion on; with --teacher, --stage light or end_to_end=1 there is none to put on")
    if recipe["warm"] and args.student != "same":
        raise ValueError(f"warm=1 starts the light model from the teacher's encoders, --student {args.student} from others: take one of them")
    if args.teacher and args.stage == "richer":
        raise ValueError("--teacher names a richer model, so there is none to train: leave out --stage richer")
    return args, recipe


def main():
    args, recipe = parse_args()
    out = Path(args.out)
    tbps.join_ranks(args)
    stages = [] if args.plain or recipe["end_to_end"] else ["plain"]
    stages = {None: stages + ["richer", "light"], "richer": stages + ["richer"], "light": ["light"]}["light" if args.teacher else args.stage]
    plain = Path(args.plain) if args.plain else out / "plain/best.pt"
    teacher = Path(args.teacher) if args.teacher else out / "richer/last.pt"
    if "richer" not in stages and (distils(recipe) or recipe["warm"] or args.student in SHRUNK):
        data.need(teacher, "the richer model", "train it with --stage richer, or name one with --teacher")
    if args.plain:
        tbps.read_checkpoint(plain)                                     # now, and not after the data are read: what is wrong is said at once
    if "richer" not in stages and teacher.exists():
        load_teacher(teacher, args)
    if args.student not in ("same", *SHRUNK, "ViT-B/32"):
        try:
            tbps.read_file(tbps.find_weights(args.student))
        except (FileNotFoundError, ValueError) as e:
            raise ValueError(f"--student {args.student} is none of same, {', '.join(SHRUNK)}, ViT-B/32, so it should be CLIP weights:\n  {e}") from None
    todo = []
    for stage in stages:
        folder, here = out / stage, copy.copy(args)
        here.trains, here.resume = stage, args.resume and (folder / "last.pt").exists()
        tbps.check_run(here, recipe, folder)
        if here.resume and any("test" in line for line in tbps.read_log(folder)):
            print(f"{folder} is done: {folder / 'report.html'}")
        else:
            todo.append((stage, here, folder))
    if not todo:
        return
    splits = tbps.load_data(args)
    images, texts = [r["pid"] for r in splits["train"]], [r["pid"] for r in splits["train"] for _ in r["captions"]]
    alone = [sum(n == 1 for n in collections.Counter(pids).values()) for pids in (images, texts)]
    print(f"supports: {alone[0]:,} of {len(images):,} images and {alone[1]:,} of {len(texts):,} captions have no others of their person")
    if alone == [len(images), len(texts)]:
        raise ValueError("every training person has one image and one caption: there is nothing to fuse them with")
    for stage, here, folder in todo:
        print(f"\n{stage}")
        if stage == "plain":
            train_light(here, recipe, splits, folder, args.clip)
        elif stage == "richer":
            train_richer(here, recipe, splits, folder, plain)
        else:
            teach(here, recipe, splits, folder, teacher)


def train_light(args, recipe, splits, folder, clip, target=None, rows=()):
    """A dual encoder from the weights `clip`, and its scores: by itself or, with target(item) -> what `copy_losses` takes, as the copy of
    a richer one. rows: what its cost is shown beside, {name: cost}."""
    model, tokenizer, pairs, preprocessing = tbps.prepare(argparse.Namespace(**vars(args) | dict(clip=str(clip))), recipe, splits["train"], tbps.id_heads)
    tbps.open_run(args, folder)

    def step_losses(model, batch, epoch, autocast):
        with autocast():
            image, text = model.encode_image(batch["pixels"][0]), model.encode_text(batch["tokens"][0])        # (B, D)
        image, text, pid = map(losses.gather, (image, text, batch["pid"]))                               # of all processes
        parts = tbps.pair_losses(image, text, pid, model.scale(), model.heads, recipe, autocast)
        if target:
            parts |= copy_losses(image, text, *target(losses.gather(batch["item"].to(pid.device))), recipe)
        return parts

    tbps.train(args, recipe, model, tokenizer, preprocessing, pairs, splits.get("val"), folder, step_losses)
    rows = dict(rows) | {f"the {args.trains} model": cost(model, tokenizer(["a man"] * 32))}
    for name, row in rows.items():
        print(f"{name:24}{row['parameters']:,} parameters, {row['ms per image']:.2f} ms per image, {row['ms per caption']:.2f} ms per caption")
    tbps.score_run(args, recipe, splits["test"], folder, ("Cost of a search", evaluation.table(rows)))


def train_richer(args, recipe, splits, folder, plain):
    if recipe["end_to_end"]:
        model, tokenizer, pairs, preprocessing = tbps.prepare(args, recipe, splits["train"], richer_heads)
        tbps.open_run(args, folder)

        def step_losses(model, batch, epoch, autocast):
            with autocast():
                image, text = model.encode_image(batch["pixels"][0]), model.encode_text(batch["tokens"][0])    # (B, D)
            return richer_losses(image, text, batch, model, recipe, autocast)

        tbps.train(args, recipe, model, tokenizer, preprocessing, pairs, splits.get("val"), folder, step_losses)
    else:
        model, tokenizer, preprocessing = tbps.load_checkpoint(plain, args.device)
        bank = Bank.of(model, tokenizer, preprocessing, splits["train"], recipe, args)
        torch.manual_seed(data.derive_seed(args.seed, 2))
        for name, head in richer_heads(recipe, model, len(bank.pid.unique())).items():
            model.heads[name] = head
        tbps.open_run(args, folder)
        with tbps.stop_on_signal() as stop:
            train_fusion(args, recipe, model, tokenizer, preprocessing, bank, folder, stop)
    model, tokenizer, preprocessing = load_teacher(folder / "last.pt", args)
    bank = Bank.of(model, tokenizer, preprocessing, splits["test"], recipe, args)
    several = max(collections.Counter(bank.pid.tolist()).values()) > 1
    rows = judge(model.heads, bank, recipe["support"]) if several else {}
    if not several:
        print("no person of the test split has two images: the richer model cannot be judged on it")
    for name, scores in rows.items():
        print(f"{name:44}{evaluation.format_scores(scores)}")
    steps = [x for x in tbps.read_log(folder) if "loss" in x]
    curves = evaluation.curve("losses", {k: [(x["epoch"], x[k]) for x in steps] for k in (steps[0] if steps else []) if k not in ("at", "epoch", "lr", "scale")})
    if losses.ranks()[0]:
        return                                                          # the first process writes
    evaluation.write_page(folder / "report.html", f"the richer model of {args.method} on {args.dataset}, seed {args.seed}", [("Test scores, %", evaluation.table(rows)),
                          ("Where the fusion looks", attention_pictures(model.heads, bank, splits["test"], recipe["support"])), ("Curves", curves)])
    tbps.write_log(folder, at=[recipe["epochs"], 1], test=rows)
    print(f"the richer model took {tbps.read_file(folder / 'last.pt')['minutes']:.1f} minutes; report: {folder / 'report.html'}", flush=True)


def load_teacher(path, args):
    """-> model with its heads, tokenizer, preprocessing."""
    saved = tbps.read_checkpoint(path)["args"]
    if saved.get("trains", saved.get("stage")) != "richer":
        raise ValueError(f"{path} is no richer model: name the richer/last.pt of a run of distill.py")
    return tbps.load_checkpoint(path, args.device, richer_heads)


def teach(args, recipe, splits, folder, teacher):
    """The light model, from a frozen richer one in the file `teacher`."""
    target, rows = None, {}
    if distils(recipe) or args.student in SHRUNK:
        model, tokenizer, preprocessing = load_teacher(teacher, args)
        rows["the teacher's encoders"] = cost(model, tokenizer(["a man"] * 32))
    if distils(recipe):
        bank = Bank.of(model, tokenizer, preprocessing, splits["train"], recipe, args)
        target = functools.partial(targets, bank, model.heads, recipe["target"], recipe["support"])
    clip = {"same": teacher if recipe["warm"] else args.clip, "ViT-B/32": "openai/clip-vit-base-patch32"}.get(args.student, args.student)
    if args.student in SHRUNK:                                          # a file like any other weights: sizes and dropout are the recipe's
        clip = folder.parent / f"{args.student}.pt"
        clip.parent.mkdir(parents=True, exist_ok=True)
        saved, small = tbps.read_checkpoint(teacher), shrink(model, args.student)
        state = {k: saved[k] for k in ("epoch", "step", "best", "scores")}
        tbps.save(clip, tbps.checkpoint_dict(args, recipe, small, tokenizer, preprocessing, heads=False) | state)
    train_light(args, recipe, splits, folder, clip, target, rows)


def distils(recipe):
    return any(recipe[k] for k in ("affinity", "features", "relations"))


if __name__ == "__main__":
    data.command(main)
