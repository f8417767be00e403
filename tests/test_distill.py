"""LCR2S, part by part: support sets, fusion, losses, evaluation of a teacher, smaller students."""

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
import losses
import tbps
from test_model import made_up_merges

NO_AMP = functools.partial(torch.autocast, "cpu", enabled=False)


# ---- support sets ---------------------------------------------------------------------------------------------------

def without_padding(table):
    return [sorted(j for j in row if j >= 0) for row in table.tolist()]


def test_support_candidates_are_of_the_person_but_no_copies():
    pids, contents = [1, 1, 1, 2, 1, 3, 3], ["a", "b", "a", "c", "d", "e", "e"]
    found = distill.support_candidates(pids, contents)
    assert without_padding(found) == [[1, 4], [0, 2, 4], [1, 4], [], [0, 1, 2], [], []]
    found = distill.support_candidates(pids, contents, images=[0, 0, 1, 2, 1, 3, 4])
    assert without_padding(found) == [[4], [2, 4], [1], [], [0, 1], [], []]


def test_support_is_drawn_without_repeats():
    torch.manual_seed(0)
    table = torch.tensor([[5, 6, 7, 8, 9], [3, 4, -1, -1, -1], [-1] * 5])
    drawn_once, first = set(), None
    for _ in range(50):
        support, key_mask = distill.draw_support(table, 3)
        assert key_mask.sum(dim=1).tolist() == [3, 2, 0] and (support >= 0).all()
        for row, real, allowed in zip(support, key_mask, ({5, 6, 7, 8, 9}, {3, 4}, set())):
            drawn = row[real].tolist()
            assert len(set(drawn)) == len(drawn) and set(drawn) <= allowed
        drawn_once |= set(support[0].tolist())
        first = support if first is None else first
    assert drawn_once == {5, 6, 7, 8, 9} and not torch.equal(first, support)
    torch.manual_seed(0)
    assert torch.equal(first, distill.draw_support(table, 3)[0])
    wide = torch.arange(10).expand(4000, 10)
    key_mask = distill.draw_support(wide, 4, drop=0.3)[1]
    assert key_mask.float().mean().item() == pytest.approx(0.7, abs=0.02)


def make_bank(image, text, pids, source):
    """A bank from features alone; the texts are of the images `source`, in order."""
    records = [dict(pid=pid, image=np.array([i]), captions=[f"{i} {n}" for n in range(source.count(i))])
               for i, pid in enumerate(pids)]
    return distill.FeatureBank(image, text, records)


def test_siblings_and_copies_in_a_bank(people):
    records = people[:5]
    image, text = torch.randn(5, 8), torch.randn(10, 8)
    with_siblings = distill.FeatureBank(image, text, records)
    without = distill.FeatureBank(image, text, records, siblings=False)
    assert records[3]["pid"] == records[0]["pid"] != records[4]["pid"]
    assert without_padding(with_siblings.text_candidates)[0] == [1, 2, 3, 4, 5, 6, 7]
    assert without_padding(without.text_candidates)[0] == [2, 3, 4, 5, 6, 7]
    images = without_padding(with_siblings.image_candidates)
    assert images[0] == [1, 2, 3] and images[4] == []
    copy = records[1] | dict(image=records[0]["image"].copy(), captions=records[0]["captions"])
    copies = distill.FeatureBank(image, text, [records[0], copy, *records[2:]])
    assert without_padding(copies.image_candidates)[0] == [2, 3]
    assert without_padding(copies.text_candidates)[0] == [1, 3, 4, 5, 6, 7]


# ---- fusion ---------------------------------------------------------------------------------------------------------

def random_fusion(kind="attention", width=64):
    torch.manual_seed(0)
    fusion = distill.Fusion(width, 16, kind).double()
    for p in fusion.parameters():
        nn.init.normal_(p, std=0.3)
    sample, support = torch.randn(5, width, dtype=torch.float64), torch.randn(5, 3, width, dtype=torch.float64)
    return fusion, sample, support, torch.rand(5, 3) < 0.6


@pytest.mark.parametrize("kind", ["attention", "self"])
def test_fusion_starts_as_it_should(kind):
    """`attention` as the identity, `self` as the mean."""
    _, sample, support, key_mask = random_fusion()
    sample, support = sample.float(), support.float()
    found = distill.Fusion(64, 16, kind)(sample, support, key_mask)
    if kind == "attention":
        assert torch.equal(found, F.normalize(sample, dim=1))
    else:
        assert torch.allclose(found, distill.Fusion(64, 16, "mean")(sample, support, key_mask), atol=1e-6)


@pytest.mark.parametrize("kind", ["attention", "self", "mean"])
def test_what_fusion_depends_on(kind):
    fusion, sample, support, key_mask = random_fusion(kind)
    out, weight = fusion(sample, support, key_mask, return_attention=True)
    assert torch.allclose(weight.sum(dim=1), torch.ones(5, dtype=torch.float64)) and out.isfinite().all()
    assert (weight[:, 1:][~key_mask] == 0).all()
    order = torch.tensor([2, 0, 1])
    assert torch.allclose(fusion(sample, support[:, order], key_mask[:, order]), out, atol=1e-9)
    assert torch.equal(fusion(sample, torch.where(key_mask[..., None], support, 7.0), key_mask), out)
    alone = fusion(sample, support, torch.zeros_like(key_mask))
    assert torch.allclose(alone, fusion(sample, support[:, :0], key_mask[:, :0])) and not torch.allclose(alone, out)
    support.requires_grad_()
    fusion(sample, support, key_mask).square().sum().backward()
    assert ((support.grad.abs().sum(dim=2) > 0) == key_mask).all()


def test_fusion_by_torchs_attention():
    fusion, sample, support, key_mask = random_fusion()
    theirs = nn.MultiheadAttention(64, 4, batch_first=True, dtype=torch.float64)
    theirs.load_state_dict({
        "in_proj_weight": torch.cat([fusion.q.weight, fusion.kv.weight]),
        "in_proj_bias": torch.cat([fusion.q.bias, fusion.kv.bias]),
        "out_proj.weight": fusion.proj.weight, "out_proj.bias": fusion.proj.bias})
    rows = F.normalize(torch.cat([sample[:, None], support], dim=1), dim=2)
    keys, padding = fusion.ln_key(rows), torch.cat([torch.zeros(5, 1, dtype=torch.bool), ~key_mask], dim=1)
    attended, weight = theirs(fusion.ln_query(rows[:, :1]), keys, keys, key_padding_mask=padding)
    z = rows[:, 0] + attended[:, 0]
    want = z + fusion.fc2(F.gelu(fusion.fc1(fusion.ln_mlp(z))))
    out, attention = fusion(sample, support, key_mask, return_attention=True)
    assert torch.allclose(out, want, atol=1e-9) and torch.allclose(attention, weight[:, 0], atol=1e-9)


# ---- losses of a step -----------------------------------------------------------------------------------------------

def tiny_model(recipe, heads, people, persons=2):
    torch.manual_seed(0)
    tokenizer = data.train_tokenizer([c for r in people for c in r["captions"]], vocab=600)
    sizes = tbps.SIZES["toy"] | dict(vocab=tokenizer.vocab, image_layers=1, text_layers=1)
    model = tbps.DualEncoder(**sizes)
    for name, head in heads(recipe, model, persons).items():
        model.heads[name] = head
    return model, tokenizer


def test_end_to_end_support_comes_from_the_batch(people):
    """Two persons with three images and one; then two captions of one image."""
    model, tokenizer = tiny_model(distill.PAPER, distill.teacher_heads, people)
    pairs = data.Pairs(people[:5], (96, 48), image_aug="none")
    batch = data.collate(tokenizer, [pairs[0, i] for i in (0, 2, 4, 8)])

    def parts(batch, **changes):
        return distill.teacher_losses(distill.PAPER | changes, model, batch, 0.0, NO_AMP)

    assert list(parts(batch)) == ["sdm", "id", "aux"] and list(parts(batch, aux=0.0)) == ["sdm", "id"]
    masks = []
    model.heads["fuse_image"].forward = lambda sample, support, key_mask: masks.append(key_mask) or sample
    parts(batch, support_drop=0.0)
    assert masks[0].sum(dim=1).tolist() == [2, 2, 2, 0]
    # two captions of one image: it is not its own support
    parts(data.collate(tokenizer, [pairs[0, i] for i in (0, 1, 2)]), support_drop=0.0)
    assert masks[1].sum(dim=1).tolist() == [1, 1, 2]


def test_targets_and_controls():
    torch.manual_seed(0)
    image, text = F.normalize(torch.randn(4, 64), dim=1), F.normalize(torch.randn(6, 64), dim=1)
    bank = make_bank(image, text, [7, 7, 7, 9], [0, 0, 1, 1, 2, 3])
    heads = nn.ModuleDict(dict(fuse_image=distill.Fusion(64, 16), fuse_text=distill.Fusion(64, 16, "mean")))
    item = torch.tensor([2, 5])
    image, text, has_image, has_text = distill.distillation_targets(bank, heads, "teacher", 2, item)
    assert torch.allclose(image, bank.image[[1, 3]]) and not torch.allclose(text[0], bank.text[2])
    assert torch.allclose(text[1], bank.text[5])
    assert has_image.tolist() == has_text.tolist() == [True, False] and not image.requires_grad
    image, text, *_ = distill.distillation_targets(bank, heads, "self", 2, item)
    assert torch.equal(image, bank.image[[1, 3]]) and torch.equal(text, bank.text[[2, 5]])
    image, text, *_ = distill.distillation_targets(bank, heads, "centroid", 2, item)
    assert torch.allclose(image, torch.stack([bank.image[:3].sum(dim=0), bank.image[3]]))
    assert torch.allclose(text[0], bank.text[:5].sum(dim=0))


@pytest.mark.parametrize("weights, names", [
    (dict(), ["affinity"]),
    (dict(features=0.5, relations=0.2, affinity=0.0), ["features", "relations"]),
    (dict(affinity=0.0), [])])
def test_what_a_student_learns_from(weights, names):
    torch.manual_seed(0)
    image, text, *target = torch.randn(4, 4, 128)
    has = torch.tensor([1, 1, 1, 0])
    parts = distill.distillation_losses(image, text, *target, has, has, distill.LCR2S | weights)
    assert list(parts) == names
    features = losses.distil_features(image[:3], target[0][:3]) + losses.distil_features(text[:3], target[1][:3])
    want = dict(affinity=losses.distil_affinity(image, text, *target, 0.05, 0.3), features=0.5 * features,
                relations=0.2 * losses.distil_relations(image, text, *target))
    for name in names:
        assert parts[name].item() == pytest.approx(want[name].item(), rel=1e-5)


# ---- evaluation of a teacher ----------------------------------------------------------------------------------------

def test_the_held_out_view_does_not_leak():
    """Features that know nothing but which image a caption was written for: with both sides fused, all is found; with
    the held-out view, nothing. Features that know the person: all is found in every way but with wrong support."""
    torch.manual_seed(0)
    pids, source = [p for p in range(60) for _ in range(3)], list(range(180))
    heads = dict(fuse_image=distill.Fusion(256, 64, "mean"), fuse_text=distill.Fusion(256, 64, "mean"))

    def scores(features):
        rows = distill.evaluate_teacher(heads, make_bank(features, features, pids, source), size=2)
        return {name: row["R@1"] for name, row in rows.items()}
    rows = scores(F.normalize(torch.randn(180, 256), dim=1))
    assert len(rows) == 8 and rows["both sides: leaks identity"] > 95
    assert all(rows[f"held-out view: {way}"] < 8 for way in ("single images", "teacher", "support of a wrong person",
                                                            "no support"))
    features = F.normalize(torch.randn(60, 256), dim=1).repeat_interleave(3, dim=0) + 0.01 * torch.randn(180, 256)
    rows = scores(features)
    assert all(rows[f"held-out view: {way}"] > 99 for way in ("single images", "teacher", "mean instead of fusion",
                                                             "no support"))
    assert rows["held-out view: support of a wrong person"] < 20
    assert rows["both sides: support of two wrong persons"] < 20
    assert rows["both sides: support of one wrong person"] > 95
    assert rows == scores(features)


def test_the_held_out_view_by_a_slow_loop():
    torch.manual_seed(0)
    pids, source = [0, 0, 0, 1, 1, 2, 3, 3, 3], [0, 0, 1, 2, 3, 4, 4, 5, 6, 7, 8]
    image, text = torch.randn(9, 16), torch.randn(11, 16)
    heads = dict(fuse_image=distill.Fusion(16, 4, "mean"), fuse_text=distill.Fusion(16, 4, "mean"))
    rows = distill.evaluate_teacher(heads, make_bank(image, text, pids, source), size=9)    # all support: no draw
    number = [pids[:i].count(p) for i, p in enumerate(pids)]
    found = []
    for m, i in enumerate(source):
        gallery = [j for j in range(9) if number[j] != number[i]]
        if not any(pids[j] == pids[i] for j in gallery):
            continue
        unit = F.normalize(image, dim=1)
        fused = torch.stack([unit[[s for s in gallery if pids[s] == pids[j]]].mean(dim=0) for j in gallery])
        cosine = F.normalize(fused, dim=1) @ F.normalize(text[m], dim=0)
        best = torch.argsort(cosine, descending=True, stable=True)
        found.append(pids[gallery[best[0]]] == pids[i])
    assert len(found) == 10
    assert rows["held-out view: teacher"]["R@1"] == pytest.approx(100 * sum(found) / len(found))


# ---- smaller students -----------------------------------------------------------------------------------------------

def test_half_the_depth():
    torch.manual_seed(0)
    big = tbps.DualEncoder(**tbps.SIZES["toy"] | dict(image_layers=3, text_layers=2))
    small = distill.halve_depth(big)
    assert small.arch["image_layers"] == 2 and small.arch["text_layers"] == 1 and big.arch["image_layers"] == 3
    big.image.blocks, big.text.blocks = big.image.blocks[::2], big.text.blocks[1:]
    pixels, tokens = torch.randn(2, 3, 96, 48), torch.tensor([[5, 6, 7, 1023, 0]])
    assert torch.equal(small.encode_image(pixels), big.encode_image(pixels))
    assert torch.equal(small.encode_text(tokens), big.encode_text(tokens))
    tbps.DualEncoder(**small.arch).load_state_dict(small.state_dict())


def test_half_the_width():
    """Every second channel, head and hidden unit of the big one."""
    torch.manual_seed(0)
    big = tbps.DualEncoder(**tbps.SIZES["toy"] | dict(image_layers=1, text_layers=1))
    small = distill.halve_width(big)
    assert small.arch["image_width"] == small.arch["text_width"] == 64 and small.arch["embed"] == 128
    for tower, ours in ((big.image, small.image), (big.text, small.text)):
        block, half = tower.blocks[0], ours.blocks[0]
        assert torch.equal(half.attn.qkv.weight[64:96], block.attn.qkv.weight[128:160, ::2])    # the first head's keys
        assert torch.equal(half.attn.qkv.weight[96:128], block.attn.qkv.weight[192:224, ::2])   # the third head's
        assert torch.equal(half.attn.proj.weight[:, 32:], block.attn.proj.weight[::2, 64:96])
        assert torch.equal(half.fc1.weight, block.fc1.weight[::2, ::2])
        assert torch.equal(half.fc2.weight, block.fc2.weight[::2, ::2])
        assert torch.equal(half.fc1.bias, block.fc1.bias[::2])
        assert torch.equal(ours.proj, tower.proj[::2]) and torch.equal(ours.pos, tower.pos[:, ::2])
    assert torch.equal(small.text.tok.weight, big.text.tok.weight[:, ::2])
    assert torch.equal(small.image.patch.weight, big.image.patch.weight[::2])
    with pytest.raises(ValueError, match="cannot be halved"):
        distill.halve_width(tbps.DualEncoder(**tbps.SIZES["toy"] | dict(text_width=32)))


# ---- options --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("bad, words", [
    (["support=0"], "support=0 must be above 0"), (["end_to_end=1"], "sampler=views"),
    (["fusion=sum"], "fusion must be one of attention, self, mean"), (["target=x"], "target must be one of"),
    (["support_drop=1.5"], "fraction from 0 to 1"), (["pair=2"], "fraction from 0 to 1"),
    (["mlm=1"], "has no key 'mlm'"), (["kd_tau=0"], "kd_tau=0.0 must be above 0")])
def test_values_that_make_no_sense(bad, words):
    distill.parse_args(["--set", "end_to_end=1", "--stage", "student"])     # without a teacher any sampler will do
    with pytest.raises(ValueError, match=words):
        distill.parse_args(["--set", *bad])


# ---- full size ------------------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_steps_at_full_size(people, tmp_path):
    """ViT-B/16, 384 x 128, 11,003 persons: finite gradients exactly where they belong, in each stage."""
    tokenizer = data.Tokenizer([m.split() for m in made_up_merges(48894)])
    pairs = data.Pairs(people[:8], (384, 128), image_aug="reid", norm="clip", clean=False)
    batch = data.collate(tokenizer, [pairs[0, i] for i in range(0, 16, 2)])
    model = tbps.DualEncoder(**tbps.SIZES["ViT-B/16"] | dict(image_size=(384, 128)))
    model.logit_scale.data.fill_(math.log(50))
    model.logit_scale.requires_grad_(False)

    def check_gradients(step_losses, make_heads, recipe):
        model.heads = nn.ModuleDict(make_heads(recipe, model, 11003))
        model.zero_grad(set_to_none=True)
        for head in ("fuse_image", "fuse_text") if "fuse_image" in model.heads else ():
            nn.init.normal_(model.heads[head].proj.weight, std=0.02)    # at zero, nothing flows to the attention
            nn.init.normal_(model.heads[head].fc2.weight, std=0.02)
        sum(step_losses(model, batch, 0.0, NO_AMP).values()).backward()
        for n, p in model.named_parameters():
            assert n == "logit_scale" or p.grad is not None and p.grad.isfinite().all() and p.grad.any(), n

    step = functools.partial(distill.teacher_losses, distill.PAPER)
    check_gradients(step, distill.teacher_heads, distill.PAPER)
    heads = nn.ModuleDict({n: model.heads[n] for n in ("fuse_image", "fuse_text")})
    before = {n: p.clone() for n, p in heads.state_dict().items()}
    image, text = F.normalize(torch.randn(8, 512), dim=1), F.normalize(torch.randn(16, 512), dim=1)
    bank = distill.FeatureBank(image, text, people[:8])
    targets = functools.partial(distill.distillation_targets, bank, heads, "teacher", 4)
    recipe = distill.PAPER | dict(affinity=1.0)
    check_gradients(functools.partial(distill.encoder_losses, recipe, targets), tbps.id_heads, recipe)
    assert all(torch.equal(p, before[n]) for n, p in heads.state_dict().items())

    recipe = distill.LCR2S | dict(batch=8, teacher_epochs=2)
    model.heads = nn.ModuleDict(distill.teacher_heads(recipe, model, 11003))
    model.zero_grad(set_to_none=True)
    frozen = {n: p.clone() for n, p in model.named_parameters()}
    args = argparse.Namespace(device="cpu", resume=False, save_minutes=10, seed=0, method="lcr2s", argv=[])
    distill.train_fusion(args, recipe, model, tokenizer, data.Preprocessing((384, 128)), bank, tmp_path)
    for n, p in model.named_parameters():
        assert n.startswith("heads.") == (p.grad is not None) == (not torch.equal(p, frozen[n])), n
