"""Ten training steps of the official code of TBPS-CLIP, IRRA and UIT, repeated from the same weights and batches.

golden/METHOD.json holds what the official training loop, model, losses, optimizer and schedule computed in float64:
learning rates, losses, and how far every parameter moved. Dropout, augmentation, tokenizer and samplers are not
covered. IRRA and UIT run with official=1; the recipes of TBPS-CLIP and the baseline are the official ones."""

import functools
import json
import math
import re
from pathlib import Path

import pytest
import torch

import golden_inputs as inputs
import tbps

GOLDEN = Path(__file__).parent / "golden"
NO_AMP = functools.partial(torch.autocast, "cpu", enabled=False)
LOSSES = {  # method: {official name: ours}
    "tbps-clip": dict(nitc_loss="nitc", ritc_loss="ritc", citc_loss="citc", ss_loss="ss"),
    "tbps-clip-simplified": dict(nitc_loss="nitc", ritc_loss="ritc"),
    "baseline": dict(nitc_loss="itc"),
    "irra": dict(sdm_loss="sdm", id_loss="id", mlm_loss="mlm"),
    "uit": dict(sdm_loss="sdm", id_loss="id", tri_loss="triplet", mae_loss="restoration")}
OUR_NAMES = [  # official name -> ours, applied in this order: heads, then towers and blocks
    (r"^simclr_mlp\.", "heads.ss."),
    (r"^classifier\.", "heads.id."),
    (r"^cross_attn\.out_proj", "heads.mlm.cross_encoder.cross.proj"),
    (r"^cross_modal_transformer\.res", "heads.mlm.cross_encoder.transformer.res"),
    (r"^ln_pre_t", "heads.mlm.cross_encoder.ln_query"),
    (r"^ln_pre_i", "heads.mlm.cross_encoder.ln_context"),
    (r"^ln_post", "heads.mlm.cross_encoder.ln_post"),
    (r"^mlm_head\.dense", "heads.mlm.fc"),
    (r"^mlm_head\.ln", "heads.mlm.ln"),
    (r"^mlm_head\.fc", "heads.mlm.out"),
    (r"^norm_1", "heads.restoration.ln"),
    (r"^decoder_embed", "heads.restoration.embed"),
    (r"^mask_token", "heads.restoration.mask"),
    (r"^norm_4", "heads.restoration.cross_encoder.ln_query"),
    (r"^norm_2", "heads.restoration.cross_encoder.ln_context"),
    (r"^norm_6", "heads.restoration.cross_encoder.ln_mid"),
    (r"^norm_7", "heads.restoration.cross_encoder.ln_post"),
    (r"^decoder_pred", "heads.restoration.pixels"),
    (r"^cross_attn_Text\.out_proj", "heads.restoration.cross_encoder.cross.proj"),
    (r"^cross_modal_transformer_mae\.res", "heads.restoration.cross_encoder.transformer.res"),
    (r"^visual\.", "image."),
    (r"^(transformer|token_embedding|positional_embedding|ln_final|text_projection)", r"text.\1"),
    (r"transformer\.resblocks\.", "blocks."), (r"attn\.in_proj_", "attn.qkv."), (r"attn\.out_proj", "attn.proj"),
    (r"\.ln_([12])\.", r".ln\1."), (r"mlp\.c_fc", "fc1"), (r"mlp\.c_proj", "fc2"), (r"conv1\.", "patch."),
    (r"class_embedding", "cls"), (r"token_embedding", "tok"), (r"positional_embedding", "pos"),
    (r"text_projection", "proj"), (r"ln_final", "ln_post")]


def our_names(name):
    """Official name -> ours. The official in_proj of a cross-attention is two layers here, q and kv."""
    if found := re.match(r"cross_attn(_Text)?\.in_proj_(weight|bias)", name):
        cross = f"heads.{'restoration' if found[1] else 'mlm'}.cross_encoder.cross."
        return [f"{cross}q.{found[2]}", f"{cross}kv.{found[2]}"]
    return [tbps.rename(name, OUR_NAMES)]


def golden_recipe(method, config):
    """Our recipe with what the golden run changed: smaller sizes, another rate. It must agree with all of `config`."""
    height, width = inputs.SIZE[method]
    changed = {key: config[key] for key in ("epochs", "batch", "lr", "lr_start", "lr_end")}
    changed |= dict(height=height, width=width, warmup=float(config["warmup_epochs"]), text_dropout=0.0)
    if method in ("irra", "uit"):
        changed |= dict(depth=config["depth"], official=True)
    recipe = tbps.METHODS[method][0] | changed
    ours = dict(
        weight_decay="weight_decay", soft_label="soft", nitc="nitc", ritc="ritc", ritc_eps="ritc_eps", citc="citc",
        ss="ss", mvs="mvs", lr_bias_factor="lr_bias", lr_new_factor="lr_new", id="id", sdm="sdm", mlm="mlm",
        triplet="triplet", restoration="restoration", drop="drop", patch_convolution_frozen="lock_patch",
    )
    if method == "baseline":
        ours["nitc"] = "itc"                                            # the same when all persons differ
    assert {k: recipe[ours[k]] for k in ours if k in config} == {k: config[k] for k in ours if k in config}
    assert (recipe["tau"] or None) == config["temperature"]
    return recipe


def golden_model(method, recipe):
    """A float64 model with the golden weights. Every tensor of the golden run has a place, and none of ours is left."""
    model = tbps.DualEncoder(
        embed=inputs.EMBED, image_size=inputs.SIZE[method], patch=inputs.PATCH, image_width=inputs.WIDTH,
        image_layers=inputs.LAYERS, text_width=inputs.WIDTH, text_layers=inputs.LAYERS, vocab=inputs.VOCAB,
        lock_patch=recipe["lock_patch"],
    )
    for name, head in tbps.METHODS[method][1](recipe, model, inputs.PERSONS).items():
        model.heads[name] = head
    model.double()
    state = {}
    for name, w in inputs.weights(method).items():
        w, names = torch.as_tensor(w), our_names(name)
        if name == "mask_token":
            w = w.flatten()
        parts = [w] if len(names) == 1 else [w[:inputs.EMBED], w[inputs.EMBED:]]
        state |= dict(zip(names, parts))
    if recipe["tau"]:
        state["logit_scale"] = torch.tensor(math.log(1 / recipe["tau"]), dtype=torch.float64)
        model.logit_scale.requires_grad_(False)
    model.load_state_dict(state)
    if method == "uit":                                                 # ours are computed in fp32, up to 1e-7 away
        positions = torch.from_numpy(inputs.positions(model.image.grid, inputs.EMBED))
        torch.testing.assert_close(model.heads["restoration"].pos, positions, rtol=0, atol=1e-5)
        model.heads["restoration"].pos.copy_(positions)
    return model.train()


def golden_batch(method, step, recipe):
    given = {name: torch.from_numpy(x) for name, x in inputs.batch(method, step).items()}
    views = 4 if recipe.get("ss") else 2 if recipe.get("mvs") else 1
    labels = given["labels"].flatten()
    positions = (labels > 0).nonzero()[:, 0]
    return dict(pixels=given["pixels"][:views], tokens=given["tokens"][None], masked=given["masked"], pid=given["pid"],
                positions=positions, targets=labels[positions]), given["order"]


def check_groups(model, optimizer, golden):
    """Each tensor has the weight decay of the official optimizer; what is frozen there too has no place in ours."""
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    ours = {name: decay.get(id(p)) for name, p in model.named_parameters()}
    for group in golden["groups"]:
        for official in group["parameters"]:
            for name in our_names(official):
                assert (
                    ours[name] == group["weight_decay"] or ours[name] is None and official in golden["without_gradient"]
                )


@pytest.mark.parametrize("method", LOSSES)
def test_ten_steps_of_the_official_code(method, monkeypatch):
    golden = json.loads((GOLDEN / f"{method}.json").read_text())
    config, n = golden["config"], golden["config"]["iterations_per_epoch"]
    batches = [x for step in range(inputs.STEPS) for x in inputs.batch(method, step).values()]
    assert golden["crc32"] == dict(weights=inputs.crc(inputs.weights(method).values()), batches=inputs.crc(batches))

    recipe = golden_recipe(method, config)
    model = golden_model(method, recipe)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = tbps.make_optimizer(model, recipe, fused=False)
    assert type(optimizer).__name__ == golden["optimizer"]["kind"]
    assert (list(optimizer.defaults["betas"]), optimizer.defaults["eps"]) == (
        golden["optimizer"]["betas"],
        golden["optimizer"]["eps"],
    )
    check_groups(model, optimizer, golden)
    names = {id(p): name for name, p in model.named_parameters()}

    for it, want in enumerate(golden["steps"]):
        rates = {}
        for group in optimizer.param_groups:
            group["lr"] = tbps.lr_at(it, n, recipe) * group["factor"]
            rates |= {names[id(p)]: group["lr"] for p in group["params"]}
        for group, rate in zip(golden["groups"], want["lr"], strict=True):
            ours = [rates[name] for official in group["parameters"] for name in our_names(official) if name in rates]
            assert ours == pytest.approx([rate] * len(ours), rel=1e-9)
        batch, order = golden_batch(method, it, recipe)
        noise = (order.argsort(dim=1) + 0.5) / order.shape[1]           # sorted, it gives this order of patches
        with monkeypatch.context() as patch:
            patch.setattr(torch, "rand", lambda *shape, **options: noise)
            parts = tbps.METHODS[method][2](model, batch, recipe, it / n, NO_AMP)
        assert {LOSSES[method][k]: want[k] for k in LOSSES[method]} == pytest.approx(
            {k: v.item() for k, v in parts.items()}, rel=1e-9
        )
        total = sum(parts.values())
        assert total.item() == pytest.approx(want["total"], rel=1e-9)
        scale = model.scale() if recipe["tau"] else model.logit_scale
        assert scale.item() == pytest.approx(want["logit_scale"], rel=1e-9)
        model.zero_grad(set_to_none=True)
        total.backward()
        optimizer.step()

    own = dict(model.named_parameters())
    for official, (total, size, movement) in golden["parameters"].items():
        now, before = (torch.cat([d[name].detach().flatten() for name in our_names(official)]) for d in (own, start))
        assert now.sum().item() == pytest.approx(total, abs=2e-9 * size), official
        assert now.abs().sum().item() == pytest.approx(size, rel=2e-9), official
        # the bias of a key cannot change attention: its gradient is rounding noise, which Adam divides by itself
        tolerance = 1e-7 if official.endswith("in_proj_bias") else 2e-9
        assert (now - before).abs().sum().item() == pytest.approx(movement, rel=tolerance, abs=0), official
