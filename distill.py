"""LCR2S (MM 2023, arXiv 2310.11210): a teacher that sees several images and captions of a person trains a student.

    python distill.py                                       synthetic pedestrians: baseline, teacher, student, scores
    python distill.py --dataset cuhk --data-root DIR        from OpenAI's CLIP ViT-B/16
    python distill.py --dataset cuhk --method lcr2s-paper   what is known of the paper's own form
    python distill.py --dataset cuhk --baseline C           with the encoders of checkpoint C as the baseline
    python distill.py --teacher runs/toy-lcr2s-0/teacher/last.pt --student half --out runs/half    a smaller student

A run has three stages, each in a folder of runs/DATASET-METHOD-SEED/:

    baseline    A dual encoder, trained as usual.
    teacher     The baseline's encoders, frozen, and a fusion: each image attends to its support set, a few other
                images of its person; each caption to other captions. Fused features know more than one view shows.
    student     A dual encoder, trained from the same weights as the baseline, that also copies the teacher's features.
                Search with student/best.pt; it costs what the baseline costs.

A teacher on frozen encoders trains on stored features, in train_fusion; all else goes through tbps.train. There is no
public code, and we had only the paper's abstract and what other papers report. From the paper: support samples of the
same person, drawn at random, without the sample itself; one attention layer as fusion; a teacher that is trained
first, then frozen; a student without fusion that copies features and image-text relations. The rest is our choice.

Letters as in tbps.py, and: M captions, N images of a split, K candidates for a support set, S support samples."""

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

OWN_KEYS = dict(  # key: (default, help)
    # teacher
    end_to_end=(False, "encoders learn too, support sets come from the batch; else fusion only, on stored features"),
    fusion=("attention", "attention (the sample attends to its support set), self (self-attention, mean) or mean"),
    support=(4, "size of a support set"),
    siblings=(True, "the other captions of the same image are support candidates too"),
    support_drop=(0.3, "chance of each support sample to be left out in training"),
    aux=(1.0, "weight of SDM of the features before fusion, end to end"),
    teacher_epochs=(20, "on stored features: passes over the images"),
    teacher_lr=(3e-4, "on stored features: peak learning rate, AdamW"),
    teacher_decay=(0.01, "on stored features: weight decay"),
    # student
    target=("teacher", "what it copies: teacher; as controls self (before fusion), centroid (mean of the person)"),
    affinity=(1.0, "distillation weight: same neighbours (KL of softmaxed cosines)"),
    kd_tau=(0.05, "temperature of affinity"),
    pair=(0.3, "fraction of the pair itself in the target of affinity"),
    features=(0.0, "distillation weight: same features (the paper's)"),
    relations=(0.0, "distillation weight: same image-text cosines (the paper's)"),
    warm=(False, "start from the teacher's encoders, not from the baseline's initial weights"))
KEYS = tbps.SDM_KEYS | OWN_KEYS
LCR2S = tbps.SDM | tbps.make_recipe(OWN_KEYS) | dict(batch=128)
PAPER = LCR2S | dict(end_to_end=True, sampler="views", affinity=0.0, features=0.5, relations=0.2)
RECIPES = {"lcr2s": LCR2S, "lcr2s-paper": PAPER}
CHOICES = tbps.CHOICES | dict(fusion=["attention", "self", "mean"], target=["teacher", "self", "centroid"])
STAGES = ["baseline", "teacher", "student"]


# ---- support sets ---------------------------------------------------------------------------------------------------

def support_candidates(pids, contents, images=None):
    """The samples that each sample's support set is drawn from: (N, K) indices, padded with -1. They show the same
    person, and are no copies (equal `contents`) nor, if `images` is given, of the same image. Lists of N items."""
    of_person = collections.defaultdict(list)
    for i, pid in enumerate(pids):
        of_person[pid].append(i)

    def differ(i, j):
        return contents[j] != contents[i] and (images is None or images[j] != images[i])
    rows = [[j for j in of_person[pid] if differ(i, j)] for i, pid in enumerate(pids)]
    K = max(1, *map(len, rows))
    return torch.tensor([row + [-1] * (K - len(row)) for row in rows])


def members(label):
    """The samples of each of P persons, from labels (N,) in 0 ... P-1: (P, K) indices, padded with -1."""
    rows = label.argsort(stable=True).split(label.bincount().tolist())
    return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)


def draw_support(candidates, size, drop=0.0):
    """From each row of candidates (B, K), padded with -1, draw up to `size`, none twice, then leave out each with
    probability `drop` -> indices (B, S), key_mask (B, S) bool, where False is padding."""
    chance = torch.rand(candidates.shape, device=candidates.device).masked_fill(candidates < 0, -1)
    best = chance.topk(min(size, candidates.shape[1]), dim=1)
    key_mask = (best.values >= 0) & (torch.rand_like(best.values) >= drop)
    return candidates.gather(1, best.indices).clamp(min=0), key_mask


def fuse_rows(fusion, features, candidates, size, drop=0.0, rows=slice(None)):
    """Features (N, D), each fused with a support set drawn from candidates (N, K) -> (N, D); of `rows` (B,) only, if
    given -> (B, D)."""
    support, key_mask = draw_support(candidates[rows], size, drop)
    return fusion(features[rows], features[support], key_mask)


class FeatureBank:
    """The features of a split before fusion, and the candidates for each support set: image (N, D), text (M, D), of
    unit length; pid (N,); source (M,), the image of each caption; image_candidates (N, K), text_candidates (M, K)."""

    def __init__(self, image, text, records, siblings=True, device="cpu"):
        captions = [c for r in records for c in r["captions"]]
        source = [i for i, r in enumerate(records) for _ in r["captions"]]
        pids, images = [r["pid"] for r in records], [r["image"] for r in records]
        contents = [hashlib.sha256(x.read_bytes() if isinstance(x, Path) else x.tobytes()).digest() for x in images]
        self.image_candidates = support_candidates(pids, contents).to(device)
        text_pids = [pids[i] for i in source]
        self.text_candidates = support_candidates(text_pids, captions, None if siblings else source).to(device)
        self.image, self.text = image.to(device), text.to(device)
        self.source, self.pid = torch.tensor(source, device=device), torch.tensor(pids, device=device)
        self.person = self.pid.unique(return_inverse=True)[1]                                           # (N,), 0 to P-1
        # (M,) bool each: whether the image of a caption, and the caption itself, have any candidates
        self.has_image = (self.image_candidates >= 0).any(dim=1)[self.source]
        self.has_text = (self.text_candidates >= 0).any(dim=1)

    def fuse(self, heads, item, size, drop=0.0):
        """Captions `item` (B,) and their images, fused with their support sets -> image (B, D), text (B, D)."""
        return (fuse_rows(heads["fuse_image"], self.image, self.image_candidates, size, drop, self.source[item]),
                fuse_rows(heads["fuse_text"], self.text, self.text_candidates, size, drop, item))


def make_bank(model, tokenizer, preprocessing, records, recipe, args):
    """The FeatureBank of records by the encoders of a model."""
    images, tokens, *_ = evaluation.evaluation_set(records, preprocessing, tokenizer)
    features = evaluation.embed(model, images, tokens, args.device, args.workers)
    return FeatureBank(*features, records, recipe["siblings"], args.device)


# ---- fusion ---------------------------------------------------------------------------------------------------------

class Fusion(nn.Module):
    """A sample and its support set -> one feature, by pre-norm cross-attention and an MLP. The sample is among the
    keys, so the support set may be empty. The last layers start at 0, so training starts from the identity."""

    def __init__(self, width, head_width, kind="attention"):
        super().__init__()
        self.kind, self.heads = kind, width // head_width
        if kind == "mean":
            return
        self.ln_query, self.ln_key, self.ln_mlp = nn.LayerNorm(width), nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.kv, self.proj = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        for layer in (self.proj, self.fc2):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, sample, support, key_mask, return_attention=False):
        """sample (B, D), support (B, S, D), key_mask (B, S) bool -> (B, D), not normalised; with return_attention also
        (B, 1+S), the attention weights of the sample and its support, averaged over heads."""
        x = torch.cat([sample[:, None], support], dim=1)                                                # (B, 1+S, D)
        x = F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=2)
        key_mask = F.pad(key_mask, (1, 0), value=True)                                                  # (B, 1+S)
        uniform = (key_mask / key_mask.sum(dim=1, keepdim=True)).to(x.dtype)                            # (B, 1+S)
        if self.kind == "mean":
            x, attention = (uniform[..., None] * x).sum(dim=1), uniform
        else:
            x, attention = self.attend(x if self.kind == "self" else x[:, :1], x, key_mask)             # (B, X, D)
            x = x + self.fc2(F.gelu(self.fc1(self.ln_mlp(x))))
            x = (uniform[..., None] * x).sum(dim=1) if self.kind == "self" else x[:, 0]
        return (x, attention) if return_attention else x

    def attend(self, x, keys, key_mask):
        """x (B, X, D) attends to keys (B, T, D) -> (B, X, D); attention of the first of x, (B, T)."""
        B, T, D = keys.shape
        q = self.q(self.ln_query(x)).view(B, -1, self.heads, D // self.heads).transpose(1, 2)           # (B, H, X, D/H)
        k, v = self.kv(self.ln_key(keys)).view(B, T, 2, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        logits = q @ k.transpose(2, 3) * (D // self.heads) ** -0.5                                      # (B, H, X, T)
        weight = logits.masked_fill(~key_mask[:, None, None], -torch.inf).softmax(dim=3)
        attended = (weight @ v).transpose(1, 2).reshape(B, -1, D)
        return x + self.proj(attended), weight[:, :, 0].mean(dim=1)


def teacher_heads(recipe, model, persons):
    """The fusion of each side, and the classifier of persons."""
    sizes = model.arch["embed"], model.arch["head_width"]
    fusions = {name: Fusion(*sizes, recipe["fusion"]) for name in ("fuse_image", "fuse_text")}
    return fusions | tbps.id_heads(recipe, model, persons)


# ---- losses of a step -----------------------------------------------------------------------------------------------

def encode(model, batch, autocast):
    """The features of a batch of pairs before fusion: image (B, D), text (B, D)."""
    with autocast():
        return model.encode_image(batch["pixels"][0]), model.encode_text(batch["tokens"][0])


def teacher_losses(recipe, model, batch, epoch, autocast):
    """The losses of a step of a teacher trained end to end, as in the paper. Support sets are drawn from the batch; the
    sampler "views" puts several images of a person into it. `aux` trains the encoders without support, too."""
    r, (image, text) = recipe, encode(model, batch, autocast)
    pid, image, text = map(losses.gather, (batch["pid"], image, text))
    tokens, image_id = (losses.gather(x.to(pid.device)) for x in (batch["tokens"][0], batch["image"]))
    same_person = pid[:, None] == pid[None, :]                                                          # (B, B)
    same_image = image_id[:, None] == image_id[None, :]
    same_caption = (tokens[:, None] == tokens[None, :]).all(dim=2)
    everyone, fused = torch.arange(len(pid), device=pid.device), []
    for name, features, same in (("fuse_image", image, same_image), ("fuse_text", text, same_caption)):
        candidates = torch.where(same_person & ~same, everyone, -1)                                     # (B, B)
        support, key_mask = draw_support(candidates, r["support"], r["support_drop"])
        fused.append(model.heads[name](features, features[support], key_mask))
    out = tbps.pair_losses(*fused, pid, model.scale(), model.heads, r, autocast)
    if r["aux"]:
        out["aux"] = r["aux"] * losses.sdm(image, text, pid, model.scale())
    return out


def encoder_losses(recipe, targets, model, batch, epoch, autocast):
    """The losses of a step of a baseline. A student has targets(item) -> the arguments of distillation_losses."""
    image, text, pid = map(losses.gather, (*encode(model, batch, autocast), batch["pid"]))
    out = tbps.pair_losses(image, text, pid, model.scale(), model.heads, recipe, autocast)
    if targets:
        item = losses.gather(batch["item"].to(pid.device))
        out |= distillation_losses(image, text, *targets(item), recipe)
    return out


def distillation_losses(image, text, target_image, target_text, has_image, has_text, recipe):
    """The losses by which a student copies its target. Features (B, D); has_image, has_text (B,): with support or not.

    Only features with support are copied one by one: the others are those of a single view."""
    r, out = recipe, {}
    if r["affinity"]:
        affinity = losses.distil_affinity(image, text, target_image, target_text, r["kd_tau"], r["pair"])
        out["affinity"] = r["affinity"] * affinity
    if r["features"]:
        out["features"] = r["features"] * (losses.distil_features(image, target_image, has_image) +
                                           losses.distil_features(text, target_text, has_text))
    if r["relations"]:
        out["relations"] = r["relations"] * losses.distil_relations(image, text, target_image, target_text)
    return out


@torch.no_grad()
def distillation_targets(bank, heads, target, size, item):
    """What a student copies for captions `item` (B,): image, text (B, D) each, and which have support, (B,) bool each.

    target: "teacher", or a control: "self" is the teacher before fusion, "centroid" the mean of the person."""
    item = item.to(bank.source.device)
    source = bank.source[item]
    if target == "teacher":
        image, text = bank.fuse(heads, item, size)
    elif target == "self":
        image, text = bank.image[source], bank.text[item]
    else:                                                               # sums: only their direction is used
        zeros, person = torch.zeros_like(bank.image), bank.person
        image = zeros.index_add(0, person, bank.image)[person[source]]
        text = zeros.index_add(0, person[bank.source], bank.text)[person[source]]
    return image, text, bank.has_image[item], bank.has_text[item]


# ---- a teacher on stored features -----------------------------------------------------------------------------------

def train_fusion(args, recipe, model, tokenizer, preprocessing, bank, out, stop=()):
    """Train fusion and classifier on stored features, in minutes. Saves, logs and resumes as tbps.train does, between
    epochs."""
    epochs = recipe["teacher_epochs"] if recipe["fusion"] != "mean" else 0      # a mean has nothing to learn
    model.to(args.device).requires_grad_(False)
    heads = model.heads.requires_grad_(True)
    optimizer = torch.optim.AdamW(heads.parameters(), lr=recipe["teacher_lr"], weight_decay=recipe["teacher_decay"])
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    state, saved_at = tbps.initial_state(args, model, optimizer, scaler, out), time.time()
    save = functools.partial(tbps.save_checkpoints, args, recipe, model, tokenizer, preprocessing, optimizer, scaler,
                             state, out, time.time() - 60 * state["minutes"])
    N = len(bank.image)
    bar = data.progress_bar(total=epochs * N, initial=state["epoch"] * N, unit=" pairs", desc="fusion",
                            disable=losses.ranks()[0] > 0)
    for epoch in range(state["epoch"], epochs):
        began = time.time()
        means, lr = train_fusion_epoch(args, recipe, model, bank, optimizer, epoch, epochs, bar)
        state["epoch"] = epoch + 1
        tbps.write_log(out, at=[epoch + 1, 0], epoch=epoch + 1, lr=lr, scale=model.scale().item(), **means)
        speed = f"{N / (time.time() - began):.0f} pairs/s"
        tbps.print_above(bar, f"epoch {epoch + 1:3d}/{epochs}  {tbps.format_losses(means)}  {speed}")
        stopping = tbps.any_rank(stop, args.device)                     # read once, so that a stop is always saved
        if stopping or tbps.any_rank(time.time() - saved_at > 60 * args.save_minutes, args.device):
            save("last.pt")
            saved_at = time.time()
        tbps.stop_here(stopping, f"after epoch {epoch + 1} of the teacher", out)
    save("last.pt")
    bar.close()


def train_fusion_epoch(args, recipe, model, bank, optimizer, epoch, epochs, bar):
    """One pass over the images, each with one of its captions -> mean losses by name, the last learning rate.

    A batch holds several images of each person ("views"). Among strangers, only a sample's own support would show the
    right person, and the fusion would learn to look at nothing else."""
    source, label = bank.source.tolist(), bank.person[bank.source]                                      # (M,) each
    no_amp = functools.partial(torch.autocast, bank.image.device.type, enabled=False)
    seed = data.derive_seed(args.seed, epoch, 1)
    torch.manual_seed(seed)
    order = data.batches("views", bank.pid[bank.source].tolist(), recipe["batch"], seed, source, drop_last=False)
    total = 0
    for i, item in enumerate(order):
        item, done = torch.tensor(item, device=args.device), (epoch + i / len(order)) / epochs
        optimizer.param_groups[0]["lr"] = lr = recipe["teacher_lr"] * (1 + math.cos(math.pi * done)) / 2
        image, text = bank.fuse(model.heads, item, recipe["support"], recipe["support_drop"])           # (B, D) each
        parts = tbps.pair_losses(image, text, label[item], model.scale(), model.heads, recipe, no_amp)
        loss = sum(parts.values())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        bar.update(len(item))
        total = total + torch.stack([loss, *parts.values()]).detach()
    means = dict(zip(["loss", *parts], (total / len(order)).tolist()))
    if not math.isfinite(means["loss"]):
        raise FloatingPointError(f"the loss of the teacher is not finite in epoch {epoch + 1}; try a lower "
                                 f"--set teacher_lr= (now {recipe['teacher_lr']:g})")
    return means, lr


# ---- evaluation of a teacher ----------------------------------------------------------------------------------------

@torch.no_grad()
def evaluate_teacher(heads, bank, size, seed=0):
    """Scores of a teacher on a test set, {name: scores}. With a person's other images at hand, search is easy for a
    reason that does not count: the support tells who it is, and may hold the very image that is searched for. Hence:

    held-out view   Queries are the captions of each person's k-th image, without fusion; the gallery is all other
                    images, fused with support among them; the mean over all k. Judge a teacher by this score.
    wrong person    The same with support of another person: what is left if support only marks identity.
    both sides      Queries are fused too, nothing is held out: leaks identity, as wrong support shows."""
    torch.manual_seed(seed)                                             # the same support sets for every caller
    person, source, P = bank.person, bank.source, 1 + int(bank.person.max())
    images, texts = members(person), members(person[source])                                            # (P, K) each
    fuse_image, fuse_text, mean = heads["fuse_image"], heads["fuse_text"], Fusion(bank.image.shape[1], 1, "mean")
    nobody, stranger = torch.full_like(bank.image_candidates, -1), images[(person + 1) % P]
    cases = [("single images", mean, nobody), ("teacher", fuse_image, bank.image_candidates),
             ("mean instead of fusion", mean, bank.image_candidates),
             ("support of a wrong person", fuse_image, stranger), ("no support", fuse_image, nobody)]
    rows = {f"held-out view: {name}": held_out_scores(bank, images, *case, size) for name, *case in cases}

    wrong = fuse_rows(fuse_image, bank.image, stranger, size)
    one_wrong, two_wrong = (texts[(person[source] + n) % P] for n in (1, 2))                            # (M, K) each
    sides = {"leaks identity": (fuse_rows(fuse_text, bank.text, bank.text_candidates, size),
                                fuse_rows(fuse_image, bank.image, bank.image_candidates, size)),
             "support of one wrong person": (fuse_rows(fuse_text, bank.text, one_wrong, size), wrong),
             "support of two wrong persons": (fuse_rows(fuse_text, bank.text, two_wrong, size), wrong)}
    for name, (text, image) in sides.items():
        rows[f"both sides: {name}"] = evaluation.retrieval_metrics(text, image, bank.pid[source], bank.pid)
    return rows


def held_out_scores(bank, images, fusion, candidates, size):
    """The held-out view scores of evaluate_teacher. images (P, K): those of each person; candidates (N, K): what the
    support of each image is drawn from."""
    pid, person, source, total = bank.pid, bank.person, bank.source, collections.Counter()
    everyone = torch.arange(len(pid), device=pid.device)
    view = (images[person] == everyone[:, None]).int().argmax(dim=1)    # (N,): it is its person's image number `view`
    for k in range(images.shape[1]):
        rows = (view != k).nonzero()[:, 0]
        findable = torch.isin(person[source], person[rows])             # those whose person has another image
        asked = ((view[source] == k) & findable).nonzero()[:, 0]
        if len(asked):
            others = candidates.masked_fill(view[candidates] == k, -1)
            gallery = fuse_rows(fusion, bank.image, others, size, rows=rows)
            scores = evaluation.retrieval_metrics(bank.text[asked], gallery, pid[source[asked]], pid[rows])
            total.update({name: value * len(asked) for name, value in scores.items()} | {"queries": len(asked)})
    return {name: value / total["queries"] for name, value in total.items() if name != "queries"}


@torch.no_grad()
def attention_html(heads, bank, records, size, number=6):
    """Some images and captions with their support sets and attention weights, as HTML."""
    def attention(fusion, features, candidates, row):
        """The sample `row` and its support set: [(index, attention weight in percent)]."""
        support, key_mask = draw_support(candidates[[row]], size)
        weight = 100 * fusion(features[[row]], features[support], key_mask, return_attention=True)[1][0]
        index, there = [row, *support[0].tolist()], [True, *key_mask[0].tolist()]
        return [(j, f"{w:.0f} %") for j, w, real in zip(index, weight.tolist(), there) if real]

    captions, out = [c for r in records for c in r["captions"]], ["<p>Each row: a sample, then its support set.</p>"]
    able = (bank.has_image & bank.has_text).nonzero()[:, 0].tolist()
    for m in able[::max(1, len(able) // number)][:number]:
        out.append("<div class=row>")
        images = attention(heads["fuse_image"], bank.image, bank.image_candidates, int(bank.source[m]))
        for n, (j, share) in enumerate(images):
            role = "support image" if n else "the image itself"
            out.append(evaluation.figure(data.load_image(records[j]["image"]), f"{role}, {share}", share))
        texts = attention(heads["fuse_text"], bank.text, bank.text_candidates, m)
        items = "".join(f"<li><b>{share}</b> {html.escape(captions[j])}</li>" for j, share in texts)
        out.append(f"<ul>{items}</ul></div>")
    return "".join(out)


# ---- smaller students -----------------------------------------------------------------------------------------------

def halve_depth(model):
    """A DualEncoder of every second block of both towers, the last one included."""
    small = copy.deepcopy(model)
    small.heads = nn.ModuleDict()
    for name in ("image", "text"):
        tower = getattr(small, name)
        tower.blocks = tower.blocks[1 - len(tower.blocks) % 2::2]
        small.arch[f"{name}_layers"] = len(tower.blocks)
    return small


def halve_width(model):
    """A DualEncoder of every second channel, head and hidden unit. ValueError if the heads cannot be halved."""
    arch, head_width = dict(model.arch), model.arch["head_width"]
    for tower in ("image", "text"):
        C = arch[f"{tower}_width"]
        tbps.require(C % (2 * head_width) == 0,
                     f"the {tower} tower is {C} wide, with heads of {head_width}: that cannot be halved")
        arch[f"{tower}_width"] = C // 2
    small, weights = tbps.DualEncoder(**arch), {}
    for name, target in small.state_dict().items():
        w = model.state_dict()[name]
        for dim, (before, after) in enumerate(zip(w.shape, target.shape)):
            if before != after:
                by_heads = dim == 0 and ".qkv." in name or dim == 1 and ".attn.proj." in name
                step = head_width if by_heads else 1                    # whole heads, or single channels
                w = w.index_select(dim, torch.arange(before, device=w.device).view(-1, step)[::2].flatten())
        weights[name] = w
    small.load_state_dict(weights)
    return small


SMALLER = {"half": halve_depth, "narrow": halve_width}                  # --student: made of the teacher's encoders


@torch.no_grad()
def measure_cost(model, tokenizer, batch=32, times=5):
    """The cost of a search with a model: parameters, and milliseconds per image and per caption, median of `times`."""
    model.eval()
    pixels = torch.rand(batch, 3, *model.arch["image_size"], device=model.logit_scale.device)
    tokens = tokenizer(["a man"] * batch)
    out = {"parameters": sum(p.numel() for n, p in model.named_parameters() if not n.startswith("heads."))}
    for name, encoder, x in (("image", model.encode_image, pixels), ("caption", model.encode_text, tokens)):
        spent = []
        for _ in range(1 + times):
            began = time.perf_counter()
            encoder(x).sum().item()                                     # .item() waits for a GPU
            spent.append(1000 * (time.perf_counter() - began) / len(x))
        out[f"ms per {name}"] = statistics.median(spent[1:])            # the first one warms up
    return out


# ---- stages ---------------------------------------------------------------------------------------------------------

def train_encoder(args, recipe, splits, folder, clip, targets=None, costs=()):
    """Train and score a baseline, or with `targets` (see encoder_losses) a student, from the weights `clip`. costs:
    {name: cost} of other models, to show beside its own."""
    start = argparse.Namespace(**vars(args) | dict(clip=str(clip)))
    model, tokenizer, pairs, preprocessing = tbps.prepare(start, recipe, splits["train"], tbps.id_heads)
    tbps.open_run(args, folder)
    step_losses = functools.partial(encoder_losses, recipe, targets)
    tbps.train(args, recipe, model, tokenizer, preprocessing, pairs, splits.get("val"), folder, step_losses)
    costs = dict(costs) | {f"the {args.trains}": measure_cost(model, tokenizer)}
    for name, c in costs.items():
        print(f"{name:24}{c['parameters']:,} parameters, {c['ms per image']:.2f} ms per image, "
              f"{c['ms per caption']:.2f} ms per caption")
    tbps.score_run(args, recipe, splits["test"], folder, ("Cost of a search", evaluation.table(costs)))


def train_teacher(args, recipe, splits, folder, baseline):
    """Train and score a teacher, end to end or on the frozen encoders of the checkpoint `baseline`."""
    if recipe["end_to_end"]:
        model, tokenizer, pairs, preprocessing = tbps.prepare(args, recipe, splits["train"], teacher_heads)
        tbps.open_run(args, folder)
        step_losses = functools.partial(teacher_losses, recipe)
        tbps.train(args, recipe, model, tokenizer, preprocessing, pairs, splits.get("val"), folder, step_losses)
    else:
        model, tokenizer, preprocessing = tbps.load_checkpoint(baseline, args.device)
        bank = make_bank(model, tokenizer, preprocessing, splits["train"], recipe, args)
        torch.manual_seed(data.derive_seed(args.seed, 2))
        model.heads.update(teacher_heads(recipe, model, 1 + int(bank.person.max())))
        tbps.open_run(args, folder)
        with tbps.stop_on_signal() as stop:
            train_fusion(args, recipe, model, tokenizer, preprocessing, bank, folder, stop)
    report_teacher(args, recipe, splits["test"], folder)


def report_teacher(args, recipe, records, folder):
    """Score a teacher on the test split, print and log the scores, write report.html."""
    model, tokenizer, preprocessing = load_teacher(folder / "last.pt", args)
    bank, rows = make_bank(model, tokenizer, preprocessing, records, recipe, args), {}
    if max(collections.Counter(bank.pid.tolist()).values()) > 1:
        rows = evaluate_teacher(model.heads, bank, recipe["support"])
    else:
        print("no person of the test split has two images: the teacher cannot be evaluated on it")
    for name, scores in rows.items():
        print(f"{name:44}{evaluation.format_scores(scores)}")
    minutes = tbps.read_checkpoint(folder / "last.pt")["minutes"]
    if losses.ranks()[0] == 0:
        attention = attention_html(model.heads, bank, records, recipe["support"])
        tbps.write_report(folder, args, recipe, rows, minutes, ("Attention of the fusion", attention))
        tbps.write_log(folder, at=[recipe["epochs"], 1], test=rows)
    print(f"teacher trained in {minutes:.1f} minutes; report: {folder / 'report.html'}", flush=True)


def load_teacher(path, args):
    """-> model with heads, tokenizer, preprocessing. ValueError if the checkpoint is no teacher."""
    saved = tbps.read_checkpoint(path)["args"]
    tbps.require(saved.get("trains") == "teacher",
                 f"{path} is no teacher: name the teacher/last.pt of a run of distill.py")
    return tbps.load_checkpoint(path, args.device, teacher_heads)


def distill_student(args, recipe, splits, folder, teacher):
    """Train and score a student of the frozen teacher in the checkpoint `teacher`."""
    model, tokenizer, preprocessing = load_teacher(teacher, args)
    costs, targets, clip = {"the teacher's encoders": measure_cost(model, tokenizer)}, None, args.student
    if any(recipe[weight] for weight in ("affinity", "features", "relations")):
        bank = make_bank(model, tokenizer, preprocessing, splits["train"], recipe, args)
        targets = functools.partial(distillation_targets, bank, model.heads, recipe["target"], recipe["support"])
    if clip == "same":
        clip = teacher if recipe["warm"] else args.clip
    elif clip in SMALLER:                                               # a file like any other weights
        small, clip = SMALLER[clip](model), folder.parent / f"initial/{clip}.pt"
        clip.parent.mkdir(parents=True, exist_ok=True)
        saved = tbps.checkpoint_dict(args, recipe, small, tokenizer, preprocessing, heads=False)
        tbps.save(clip, saved | dict(epoch=0, scores={}))
    train_encoder(args, recipe, splits, folder, clip, targets, costs)


# ---- the command line -----------------------------------------------------------------------------------------------

def default_method(dataset):
    return "lcr2s"


def parse_args(argv=None):
    """-> args, recipe. ValueError for options that exclude each other."""
    p = tbps.training_options(__doc__, RECIPES, KEYS, default_method, argv)
    g = p.add_argument_group("stages")
    g.add_argument("--stage", choices=["teacher", "student"], help="teacher: end with the teacher; student: train only "
                   "the student, from the teacher in the run folder (default: all)")
    g.add_argument("--baseline", metavar="FILE", help="a checkpoint to use as the baseline, instead of training one")
    g.add_argument("--teacher", metavar="FILE", help="teacher/last.pt of another run: train only the student")
    g.add_argument("--student", default="same", help="same (as the baseline), half (its depth) or narrow (half its "
                   "width), both from the teacher's layers, or weights as --clip takes them (default: same)")
    checkpoints = [f"{stage}/last.pt" for stage in reversed(STAGES)]
    args, recipe = tbps.parse_options(p, RECIPES, argv, checkpoints, default_method)
    r = recipe = tbps.resolve_recipe(args, recipe, KEYS, CHOICES)
    new_teacher = not args.teacher and args.stage != "student"
    for key in ("support", "teacher_lr", "kd_tau"):
        tbps.require(r[key] > 0, f"{key}={r[key]} must be above 0")
    for key in ("support_drop", "pair"):
        tbps.require(r[key] <= 1, f"{key}={r[key]} must be a fraction from 0 to 1")
    tbps.require(not (r["end_to_end"] and new_teacher) or r["sampler"] == "views",
                 "end_to_end=1 draws support sets from the batch; sampler=views puts several images of a person there")
    tbps.require(not args.baseline or new_teacher and not r["end_to_end"],
                 "--baseline is for a new teacher; --teacher, --stage student and end_to_end=1 use no baseline")
    tbps.require(not r["warm"] or args.student == "same", f"warm=1 starts the student from the teacher's encoders, "
                 f"--student {args.student} from other weights: choose one")
    tbps.require(not (args.teacher and args.stage == "teacher"), "--teacher names a trained one; omit --stage teacher")
    return args, recipe


def stages_to_train(args, recipe):
    """The names of the stages that the options ask for, in order."""
    if args.teacher or args.stage == "student":
        return ["student"]
    stages = ["teacher"] if args.baseline or recipe["end_to_end"] else ["baseline", "teacher"]
    return stages if args.stage == "teacher" else stages + ["student"]


def check_files(args, stages, teacher):
    """Read what the options name before the data are read, so that a mistake is reported at once."""
    if args.baseline:
        tbps.read_checkpoint(args.baseline)
    if "teacher" not in stages:
        data.need(teacher, "the teacher", "train it with --stage teacher, or name one with --teacher")
        load_teacher(teacher, args)
    if args.student not in ("same", *SMALLER):
        tbps.read_file(tbps.find_weights(args.student))


def check_support(records):
    """Print how many samples have no candidates for support; ValueError if none has any."""
    images = collections.Counter(r["pid"] for r in records)
    captions = collections.Counter(r["pid"] for r in records for _ in r["captions"])
    i, c = (list(counts.values()).count(1) for counts in (images, captions))
    print(f"without support: {i:,} of {images.total():,} images, {c:,} of {captions.total():,} captions, each the only "
          "one of its person")
    tbps.require(max(captions.values()) > 1, "every training person has one image and one caption: there is nothing to "
                 "draw support from")


def main():
    args, recipe = parse_args()
    out, stages = Path(args.out), stages_to_train(args, recipe)
    tbps.join_ranks(args)
    tbps.keep_image_size(args, recipe)
    baseline = Path(args.baseline or out / "baseline/best.pt")
    teacher = Path(args.teacher or out / "teacher/last.pt")
    check_files(args, stages, teacher)
    todo = []
    for stage in stages:
        folder, stage_args = out / stage, copy.copy(args)
        stage_args.trains, stage_args.resume = stage, args.resume and (folder / "last.pt").exists()
        tbps.check_run(stage_args, recipe, folder)
        if stage_args.resume and any("test" in line for line in tbps.read_log(folder)):
            print(f"{folder} is done: {folder / 'report.html'}")
        else:
            todo.append((stage, stage_args, folder))
    if not todo:
        return
    print(tbps.format_recipe(args, recipe, RECIPES[args.method]))
    splits = tbps.load_data(args)
    check_support(splits["train"])
    for stage, stage_args, folder in todo:
        print(f"\n{stage}")
        if stage == "baseline":
            train_encoder(stage_args, recipe, splits, folder, args.clip)
        elif stage == "teacher":
            train_teacher(stage_args, recipe, splits, folder, baseline)
        else:
            distill_student(stage_args, recipe, splits, folder, teacher)


if __name__ == "__main__":
    data.command(main)
