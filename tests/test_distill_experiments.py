"""LCR2S: the sanity experiments of its specification, on persons without pictures (slow).

An identity has 24 correlated attributes of 6 values. Each of its 4 views shows half of them, as a vector under a fixed
rotation, beside noise. The caption of a view is a multi-hot vector of attributes, half of which the view shows.
Encoders are small MLPs. A model takes seconds."""

import argparse
import functools
import math

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import data
import distill
import eval as evaluation
import tbps
from test_distill import NO_AMP, make_bank


def world(persons, seed, shown=0.5, related=1.2):
    """-> image (4 P, 112), text (4 P, 144), pid (4 P,). related: how much attributes of a person predict each other."""
    fixed, rng = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
    weights = related * torch.randn(24, 6, 6, generator=fixed)
    code = torch.randn(24, 6, 4, generator=fixed)
    rotation = torch.linalg.qr(torch.randn(112, 112, generator=fixed))[0]
    z = torch.randn(persons, 6, generator=rng)
    gumbel = -(-torch.rand(persons, 24, 6, generator=rng).log()).log()
    value = (torch.einsum("avk,pk->pav", weights, z) + gumbel).argmax(dim=2).repeat_interleave(4, dim=0)     # (N, 24)

    def coin(chance):
        return torch.rand(value.shape, generator=rng) < chance

    def misread():
        return torch.where(coin(0.03), torch.randint(6, value.shape, generator=rng), value)

    visible = coin(0.5)
    codes = code[torch.arange(24), misread()] * visible[..., None]                                      # (N, 24, 4)
    image = torch.cat([codes.flatten(1), torch.randn(len(value), 16, generator=rng)], dim=1) @ rotation
    image = image + 0.05 * torch.randn(len(value), 112, generator=rng)
    mentioned = torch.where(coin(shown), visible, coin(0.5)) & coin(0.7)
    text = (F.one_hot(misread(), 6) * mentioned[..., None]).flatten(1).float()
    return image, text, torch.arange(persons).repeat_interleave(4)


def mlp(width):
    return nn.Sequential(nn.Linear(width, 256), nn.LayerNorm(256), nn.GELU(), nn.Linear(256, 256), nn.GELU(),
                         nn.Linear(256, 128))


class Mlps(nn.Module):
    """Two small encoders that the losses of distill.py can train."""

    def __init__(self, persons):
        super().__init__()
        self.image, self.text = mlp(112), mlp(144)
        self.heads = nn.ModuleDict(dict(id=nn.Linear(128, persons)))
        self.arch = dict(embed=128, head_width=64)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(20)), requires_grad=False)
        self.scale = lambda: torch.tensor(20.0)


def learn(people, seed, steps, targets=None, **changes):
    torch.manual_seed(seed)
    image, text, pid = people
    persons = int(pid.max()) + 1
    model, recipe = Mlps(persons), distill.LCR2S | changes
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 1e-3 * min(1, step / 50) * (1 + math.cos(math.pi * step / steps)) / 2
        item = (4 * torch.randperm(persons)[:32, None] + torch.arange(4)).flatten()
        pair = model.image(image[item]), model.text(text[item])
        parts = tbps.pair_losses(*pair, pid[item], model.scale(), model.heads, recipe, NO_AMP)
        if targets:
            parts |= distill.distillation_losses(*pair, *targets(item), recipe)
        optimizer.zero_grad()
        sum(parts.values()).backward()
        optimizer.step()
    return model.eval()


@torch.no_grad()
def bank_of(model, people):
    image, text, pid = people
    features = F.normalize(model.image(image), dim=1), F.normalize(model.text(text), dim=1)
    return make_bank(*features, pid.tolist(), list(range(len(pid))))


def scores_of(model, people):
    """Scores of a model, and scores excluding the source image."""
    bank = bank_of(model, people)
    return [evaluation.retrieval_metrics(bank.text, bank.image, bank.pid, bank.pid, own)
            for own in (None, bank.source)]


def train_teacher(baseline, people, tmp_path):
    """A teacher on the frozen features of a baseline -> its heads, the bank."""
    bank, recipe = bank_of(baseline, people), distill.LCR2S
    for name, head in distill.teacher_heads(recipe, baseline, int(people[2].max()) + 1).items():
        baseline.heads[name] = head
    args = argparse.Namespace(device="cpu", resume=False, save_minutes=10, seed=0, method="lcr2s", argv=[])
    preprocessing = data.Preprocessing((8, 8))
    distill.train_fusion(args, recipe, baseline, data.Tokenizer([("a", "b")]), preprocessing, bank, tmp_path)
    return baseline.heads, bank


@pytest.mark.slow
def test_e1_a_teacher_knows_more(tmp_path):
    """Support helps captions find their person where the gallery does not hold their view; wrong support does not."""
    people, test = world(3000, 1), world(300, 2)
    baseline = learn(people, 0, 1000)
    heads, _ = train_teacher(baseline, people, tmp_path)
    rows = distill.evaluate_teacher(heads, bank_of(baseline, test), size=3)
    for name, scores in rows.items():
        print(f"{name:44}{evaluation.format_scores(scores)}")
    single, teacher = rows["held-out view: single images"], rows["held-out view: teacher"]
    assert teacher["R@1"] >= single["R@1"] + 2 and teacher["mAP"] >= single["mAP"] + 12
    assert rows["held-out view: support of a wrong person"]["R@1"] < 6
    assert rows["held-out view: mean instead of fusion"]["R@1"] >= single["R@1"] + 2


def gains(tmp_path, related):
    """Per seed, of a student of the teacher: mAP excluding the source image over the baseline and over a student of
    the baseline; R@1 over the baseline."""
    people, test, rows = world(3000, 1, related=related), world(300, 2, related=related), []
    for seed in range(3):
        baseline = learn(people, seed, 1000)
        (tmp_path / str(seed)).mkdir()
        heads, bank = train_teacher(baseline, people, tmp_path / str(seed))
        student, control = (
            learn(people, seed, 1000, functools.partial(distill.distillation_targets, bank, heads, target, 4))
            for target in ("teacher", "self"))
        (b, b_excl), (s, s_excl), (c, c_excl) = (scores_of(model, test) for model in (baseline, student, control))
        rows.append((s_excl["mAP"] - b_excl["mAP"], s_excl["mAP"] - c_excl["mAP"], s["R@1"] - b["R@1"]))
        print(seed, *(evaluation.format_scores(x) for x in (b, b_excl, s, s_excl, c, c_excl)), sep="\n")
    print(np.array(rows))
    return np.array(rows)


@pytest.mark.slow
def test_e2_a_student_gains_from_other_views(tmp_path):
    """Copying the teacher brings more than copying the baseline, excluding the source image; every seed."""
    over = gains(tmp_path, related=1.2)
    mean = over.mean(axis=0)
    assert (over[:, :2] > 0).all() and mean[0] > 0.5 and mean[1] > 0.5 and mean[2] > -0.5


@pytest.mark.slow
def test_e2_but_only_what_a_view_can_tell(tmp_path):
    """Where attributes of a person do not predict each other, what other views show cannot be guessed."""
    assert gains(tmp_path, related=0.0).mean(axis=0)[1] < 0.5
