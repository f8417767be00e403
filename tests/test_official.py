"""official=1, what the official code does differently, and half_weights=1, its training in pure fp16."""

import random

import pytest
import torch

import data
import tbps
from conftest import error, run

SMALL = [
    "--size", "toy", "--clip", "none", "--workers", "0", "--log-every", "1", "--set", "height=96", "width=48",
    "stride=0", "epochs=1", "warmup=0",
]


def with_heads(recipe, method, vocab=100):
    model = tbps.DualEncoder(**tbps.SIZES["toy"] | dict(vocab=vocab))
    for name, head in tbps.METHODS[method][1](recipe, model, 7).items():
        model.heads[name] = head
    return model


# ---- official=1 -----------------------------------------------------------------------------------------------------

def test_only_methods_whose_official_code_has_quirks_have_the_key():
    assert [name for name, (recipe, *_) in tbps.METHODS.items() if "official" in recipe] == ["irra", "uit", "ctlg"]
    assert not any(recipe.get("official") or recipe.get("half_weights") for recipe, *_ in tbps.METHODS.values())
    assert "has no key 'official'" in error("tbps.py", "--method", "tbps-clip", "--set", "official=1")


def test_the_mask_token_starts_at_zero():
    start = {
        official: tbps.irra_heads(tbps.UIT | dict(official=official), with_heads(tbps.UIT, "uit"), 7)[
            "restoration"
        ].mask
        for official in (False, True)
    }
    assert start[False].detach().std().item() == pytest.approx(0.02, rel=0.3) and not start[True].any()


def test_irra_masks_the_captions_of_all_losses(people):
    """With official=1 the losses of the features follow the masked captions, in IRRA too."""
    torch.manual_seed(0)
    tokenizer = data.train_tokenizer([c for r in people for c in r["captions"]], vocab=600, mask=True)
    pairs = data.Pairs(people, (96, 48), image_aug="none")
    batch = data.collate(tokenizer, [pairs[0, i] for i in range(6)], mask=(0.15, 0.15))
    recipe = tbps.IRRA | dict(depth=1)
    model = with_heads(recipe, "irra", tokenizer.vocab).eval()
    no_amp = lambda: torch.autocast("cpu", enabled=False)               # noqa: E731
    for official, same in (False, True), (True, False):
        before = tbps.irra_losses(model, batch, recipe | dict(official=official), 0, no_amp)["sdm"]
        other = batch | dict(masked=batch["tokens"][0])
        assert (tbps.irra_losses(model, other, recipe | dict(official=official), 0, no_amp)["sdm"] == before) == same


def test_approximate_text_protects_no_words():
    """The official code may delete and replace colours and garments; ours keeps them, unless a row of words is cut."""
    caption = "red shirt blue trousers black shoes white hat"
    words = set(caption.split())
    lost = {protect: 0 for protect in (True, False)}
    for protect in lost:
        for seed in range(60):
            rng = random.Random(seed)
            rng.random()                                                # whether the text is changed at all
            if rng.choice(["synonym", "crop", "delete"]) != "crop":
                said = data.augment_caption(
                    caption, random.Random(seed), deletion=0.0, approximate=1.0, protect=protect
                )
                lost[protect] += len(words - set(said.split()))
    assert lost[True] == 0 and lost[False] > 20


@pytest.mark.parametrize("official", [0, 1])
def test_official_reaches_the_captions_of_a_run(official, people):
    args, recipe = tbps.parse_args(["--method", "ctlg", "--set", f"official={official}"])
    _, _, pairs, _ = tbps.prepare(args, recipe, people, tbps.no_heads)
    assert pairs.text["protect"] == (not official)


@pytest.mark.parametrize("method", ["irra", "uit", "ctlg"])
def test_the_last_small_batch_is_used(method, cuhk, tmp_path):
    """An epoch has one step more, unless its pairs fill the last batch."""
    steps = {}
    for official in (0, 1):
        out = tmp_path / str(official)
        run(
            "tbps.py", "--dataset", "cuhk", "--data-root", cuhk, "--method", method, "--out", out, *SMALL,
            "batch=5",
            f"official={official}",
        )
        steps[official] = sum('"loss"' in line for line in (out / "log.jsonl").read_text().splitlines())
    assert steps[1] == steps[0] + 1


# ---- half_weights=1 -------------------------------------------------------------------------------------------------

def test_a_weight_above_0_031_does_not_move_and_one_below_does():
    """A step of Adam is at most 1e-5. fp16 numbers are 3.05e-5 apart from 2^-5 = 0.03125 on, 1.5e-5 below it."""
    model = torch.nn.Linear(2, 1, bias=False)
    model.weight.data = torch.tensor([[0.04, 0.02]])
    optimizer = tbps.HalfAdam([dict(params=[model.weight])], [model.weight], lr=1e-5, eps=1e-3)
    start = model.weight.detach().clone()
    for _ in range(20):
        model.weight.grad = torch.ones(1, 2)
        optimizer.step()
    assert model.weight[0, 0] == start[0, 0] and model.weight[0, 1] < start[0, 1] - 1e-4
    fp32 = torch.tensor([0.04], requires_grad=True)                     # the same steps with a fp32 weight
    optimizer = torch.optim.Adam([fp32], lr=1e-5, eps=1e-3)
    for _ in range(20):
        fp32.grad = torch.ones(1)
        optimizer.step()
    assert fp32.item() < 0.04 - 1e-4


def test_steps_equal_adam_on_half_tensors():
    """20 steps, with weight decay and a rate that changes, of a layer and of a norm that stays in fp32."""
    torch.manual_seed(0)
    layer, norm = torch.nn.Linear(8, 8), torch.nn.LayerNorm(8)
    groups = [dict(params=[layer.weight, norm.weight], weight_decay=4e-5), dict(params=[layer.bias], weight_decay=0.0)]
    half = [p.detach().half().requires_grad_() for p in (layer.weight, layer.bias)]
    fp32 = norm.weight.detach().clone().requires_grad_()
    ours = tbps.HalfAdam(groups, [layer.weight, layer.bias], lr=1e-3, eps=1e-3)
    theirs = torch.optim.Adam(
        [dict(params=[half[0], fp32], weight_decay=4e-5), dict(params=[half[1]], weight_decay=0.0)],
        lr=1e-3,
        eps=1e-3,
        foreach=False,
    )
    start = layer.weight.detach().clone()
    for step in range(20):
        for optimizer in (ours, theirs):
            for group in optimizer.param_groups:
                group["lr"] = 1e-3 / (1 + step)
        for p, q in zip((layer.weight, layer.bias, norm.weight), (*half, fp32)):
            p.grad = 0.1 * torch.randn_like(p)
            q.grad = p.grad.to(q.dtype)
        ours.step()
        theirs.step()
        assert torch.equal(layer.weight, half[0].float()) and torch.equal(layer.bias, half[1].float())
        assert torch.equal(norm.weight, fp32)
    assert (layer.weight != start).float().mean() > 0.5


@pytest.mark.parametrize("method", ["irra", "uit"])
def test_what_is_held_in_fp16(method):
    """As OpenAI's convert_weights: linear layers, convolutions, projections; not norms, embeddings, single tokens."""
    model = with_heads(tbps.METHODS[method][0] | dict(depth=1), method)
    halves = {id(p) for p in tbps.half_parameters(model)}
    names = {name for name, p in model.named_parameters() if id(p) in halves}
    rest = {name for name, _ in model.named_parameters()} - names
    assert {"image.patch.weight", "image.proj", "text.proj", "image.blocks.0.attn.qkv.bias", "heads.id.weight"} <= names
    assert {"text.tok.weight", "image.pos", "text.pos", "image.cls", "logit_scale"} <= rest
    assert all(name in ("logit_scale", "heads.restoration.mask") or is_norm_or_embedding(name) for name in rest)


def is_norm_or_embedding(name):
    return any(part in name for part in (".ln", "tok.weight", ".pos", ".cls"))


def test_a_run_with_half_weights(cuhk, tmp_path):
    """Weights of the checkpoint fit into fp16, the moments are fp16; norms and embeddings stay in fp32."""
    run(
        "tbps.py", "--dataset", "cuhk", "--data-root", cuhk, "--method", "irra", "--out", tmp_path, *SMALL,
        "batch=6", "half_weights=1",
    )
    saved = torch.load(tmp_path / "last.pt", weights_only=True)
    weight, position = (saved["weights"][name] for name in ("image.blocks.0.fc1.weight", "image.pos"))
    assert weight.dtype == torch.float32 and torch.equal(weight, weight.half().float())
    assert not torch.equal(position, position.half().float())
    kinds = {state["exp_avg"].dtype for state in saved["optimizer"]["state"].values()}
    assert kinds == {torch.float16, torch.float32}


def test_what_half_weights_needs():
    # on toy data it is AdamW
    assert "coupled=1 eps=1e-3" in error("tbps.py", "--method", "irra", "--set", "half_weights=1")
    args, recipe = tbps.parse_args(["--dataset", "cuhk", "--method", "irra", "--set", "half_weights=1"])
    assert recipe["coupled"] and recipe["eps"] == 1e-3
