"""The same objective on less memory and more processes: with micro-batches, activation checkpointing and two ranks the
losses and gradients of a step are those of one process with the whole batch."""

import functools
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch

import data
import distill
import eval as evaluation
import tbps
from conftest import ROOT, error
from lab.people import draw
from test_distill_command import TINY

NO_AMP = functools.partial(torch.autocast, "cpu", enabled=False)
STEPS = {  # name: (recipe, heads, losses of a step)
    **{name: (recipe | dict(soft_ramp=0), heads, step) for name, (recipe, heads, step) in tbps.METHODS.items()},
    "tbps-clip, all views": (
        tbps.TBPS_CLIP | dict(mvs_text=True, ss_text=0.5, itc=1.0, soft_ramp=0),
        *tbps.METHODS["tbps-clip"][1:],
    ),
    "irra, masked everywhere": (tbps.IRRA | dict(mask_all=True, cmpm=1.0), *tbps.METHODS["irra"][1:]),
    "ctlg, person": (tbps.CTLG | dict(same="person"), *tbps.METHODS["ctlg"][1:]),
    "ctlg, image": (tbps.CTLG | dict(same="image"), *tbps.METHODS["ctlg"][1:]),
}
B = 8


def student_step(model, batch, recipe, epoch, autocast):
    """A step of a student, with made-up targets by item."""
    g = torch.Generator().manual_seed(5)
    made_up = torch.randn(2, 1000, model.arch["embed"], generator=g, dtype=torch.float64)

    def targets(item):
        return made_up[0, item], made_up[1, item], item >= 0, item > 2
    recipe = recipe | dict(features=0.5, relations=0.2)
    return distill.encoder_losses(recipe, targets, model, batch, epoch, autocast)


STEPS["lcr2s"] = distill.LCR2S, tbps.id_heads, student_step


def sample(name, people, dropout=0.0):
    """-> a model in float64, a batch of B pairs, the step. Everything follows from the name."""
    recipe, heads, step = STEPS[name]
    more = {}
    if "mvs" in recipe:
        more = dict(views=1 + recipe["mvs"], self_views=2 * (recipe["ss"] > 0), texts=1 + recipe["mvs_text"],
                    self_texts=2 * (recipe["ss_text"] > 0))
    pairs = data.Pairs(people, (32, 16), **more, text=dict(deletion=0.3))
    tokenizer = data.train_tokenizer([c for r in people for c in r["captions"]], vocab=700, mask=True)
    mask = (0.5, 0.3) if "mlm" in recipe else None
    batch = data.collate(tokenizer, [pairs[0, i] for i in range(0, 3 * B, 3)], mask=mask)
    batch["pixels"] = batch["pixels"].double()
    torch.manual_seed(0)
    model = tbps.DualEncoder(64, (32, 16), 8, 64, 2, 64, 2, tokenizer.vocab, head_width=32,
                             text_dropout=dropout).double()
    for head, module in heads(recipe | dict(depth=1), model, pairs.persons).items():
        model.heads[head] = module.double()
    if recipe["tau"]:
        model.logit_scale.data.fill_(-torch.tensor(recipe["tau"]).log())
    return model, batch, lambda b: step(model, b, recipe | dict(text_dropout=dropout), 1.0, NO_AMP)


def share_of(batch, rank, ranks):
    """The rows of a rank, as tbps.train loads them."""
    n, T = B // ranks, batch["tokens"].shape[2]
    rows = slice(rank * n, (rank + 1) * n)
    mine = {k: x[:, rows] if k in ("pixels", "tokens") else x[rows] for k, x in batch.items()}
    if "masked" in batch:
        here = batch["positions"] // (n * T) == rank
        mine |= dict(positions=batch["positions"][here] - rank * n * T, targets=batch["targets"][here])
    return mine


def gradients(model, parts):
    model.zero_grad(set_to_none=True)
    sum(parts.values()).backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def same_draws(patch, rank=0, ranks=1):
    """Each row's draw of dropped patches is its own, whoever holds the row, and however often."""
    ordinary = torch.rand

    def rand(*size, **how):
        if len(size) != 2:
            return ordinary(*size, **how)
        draws = torch.linspace(0, 7e3, B * size[1], dtype=torch.float64).view(B, size[1]).sin()
        return draws[rank * (B // ranks):][:size[0]]
    patch.setattr(torch, "rand", rand)


@pytest.mark.parametrize("name", STEPS)
def test_in_parts_a_step_is_the_same(name, people, monkeypatch):
    same_draws(monkeypatch)
    model, batch, step = sample(name, people)
    parts = step(batch)
    want = gradients(model, parts)
    assert len(want) > 40 and all(g.abs().sum() > 0 for n, g in want.items() if "attn" not in n)
    for micro, blocks in ((3, False), (0, True), (3, True), (1, False)):
        model.micro_batch, model.image.recompute, model.text.recompute = micro, blocks, blocks
        again = step(batch)
        assert again.keys() == parts.keys() and all(torch.allclose(again[k], parts[k], rtol=1e-9) for k in parts)
        found = gradients(model, again)
        assert found.keys() == want.keys()
        for n in want:
            assert torch.allclose(found[n], want[n], rtol=1e-9, atol=1e-11), (micro, blocks, n)


@pytest.mark.parametrize("name", STEPS)
def test_in_parts_dropout_is_replayed(name, people, monkeypatch):
    """With dropout, the gradients are those of the same parts without recomputation, and of no others."""
    model, batch, step = sample(name, people, dropout=0.5)
    model.micro_batch, found = 3, []

    def keep(encode, *inputs, **_):
        return encode(*inputs)

    for seed, checkpoint in ((7, tbps.recompute_in_backward), (7, keep), (8, keep)):
        monkeypatch.setattr(tbps, "recompute_in_backward", checkpoint)
        torch.manual_seed(seed)
        found.append(gradients(model, step(batch)))
    recomputed, kept, other = found
    assert all(torch.allclose(recomputed[n], kept[n], rtol=1e-9, atol=1e-11) for n in kept)
    assert not torch.allclose(recomputed["text.tok.weight"], other["text.tok.weight"], rtol=0.01)


def test_micro_batched_dropout_is_replayed():
    """Backward sees the dropout masks of the forward pass: the gradient agrees with finite differences, same seed."""
    torch.manual_seed(0)
    model = tbps.DualEncoder(16, (16, 16), 8, 32, 2, 32, 2, 100, head_width=16, text_dropout=0.5).double().train()
    model.micro_batch = 2
    tokens = torch.randint(1, 98, (6, 77))
    tokens[:, 9] = 99
    w = model.text.blocks[0].fc1.weight

    def loss():
        torch.manual_seed(7)
        return (model.encode_text(tokens) ** 2).sum()

    g, = torch.autograd.grad(loss(), w)
    with torch.no_grad():
        step = 1e-6 * g / g.norm()
        w += step
        up = loss()
        w -= 2 * step
        down = loss()
    assert ((up - down) / 2e-6).item() == pytest.approx(g.norm().item(), rel=1e-5)


def test_what_is_checkpointed_is_on_the_device_of_the_model(monkeypatch):
    """checkpoint() saves the random state of its inputs' devices only. Captions that come from the CPU must be moved
    first, or backward would draw other dropout masks on a GPU."""
    devices = []

    def checkpoint(encode, *inputs, **_):
        devices.extend(x.device.type for x in inputs)
        return encode(*inputs)

    monkeypatch.setattr(tbps, "recompute_in_backward", checkpoint)
    model = tbps.DualEncoder(16, (16, 16), 8, 32, 2, 32, 2, 100, head_width=16, text_dropout=0.5).to("meta").train()
    model.micro_batch = 2
    tokens = torch.randint(1, 98, (6, 77)).index_fill(1, torch.tensor([9]), 99)
    for encode in (model.encode_text, model.text_tokens):
        assert encode(tokens).device.type == "meta"
    assert devices == ["meta"] * 6


def test_in_parts_less_is_kept(people):
    """Bytes kept for backward: micro-batches keep little more than the input, checkpointed blocks less than others."""
    def kept(micro, blocks):
        model, batch, step = sample("baseline", people)
        model.micro_batch, model.image.recompute, model.text.recompute = micro, blocks, blocks
        storages, own = {}, {p.untyped_storage().data_ptr() for p in model.parameters()}

        def pack(x):
            if x.untyped_storage().data_ptr() not in own:
                storages[x.untyped_storage().data_ptr()] = x                # held, so that no address comes twice
            return x
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            parts = step(batch)
        assert parts
        return sum(x.untyped_storage().nbytes() for x in storages.values())
    plain, blocks, micro = kept(0, False), kept(0, True), kept(2, False)
    assert blocks < plain / 2 and micro < plain / 5


def test_in_parts_under_fp16_scaling(people):
    """With autocast and a scaled loss the scaled gradients are those of the whole batch, up to half precision."""
    model, batch, _ = sample("tbps-clip-simplified", people)
    recipe, _, step = STEPS["tbps-clip-simplified"]
    model.float()
    batch["pixels"], found = batch["pixels"].float(), []
    for micro in (0, 3):
        model.micro_batch = micro
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
        autocast = functools.partial(torch.autocast, "cpu", dtype=torch.float16)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        optimizer.zero_grad()
        scaler.scale(sum(step(model, batch, recipe | dict(text_dropout=0.0), 1.0, autocast).values())).backward()
        scaler.unscale_(optimizer)
        found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert found[0].isfinite().all() and (found[0] - found[1]).norm() < 0.02 * found[0].norm()


# ---- two processes --------------------------------------------------------------------------------------------------

def rank_of_two(rank, file, out, micro):
    """One of two processes: a step of every method with its half of the batch; rank 0 writes losses and gradients."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    people, found = draw("train", persons=6), {}
    with pytest.MonkeyPatch.context() as patch:
        same_draws(patch, rank, 2)
        for name in STEPS:
            model, batch, step = sample(name, people)
            model.micro_batch = micro
            gradient_mean = tbps.GradientMean(model.parameters(), bytes_at_once=2e5)
            parts = step(share_of(batch, rank, 2))
            sum(parts.values()).backward()
            assert gradient_mean.sent                                   # some while backward ran
            gradient_mean.wait()
            shown = {k: v.detach().clone() for k, v in parts.items()}
            tbps.average_over_ranks(list(shown.values()))
            found[name] = shown, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model, _, _ = sample("baseline", people)
    model, seen = model.float(), []
    tokenizer = data.train_tokenizer([c for r in people for c in r["captions"]], vocab=700, mask=True)
    for tower in (model.image, model.text):
        tower.register_forward_pre_hook(lambda _, x: seen.append(len(x[0])))
    some = people[:7]
    image, text = evaluation.embed(model, *evaluation.evaluation_set(some, data.Preprocessing((32, 16)), tokenizer)[:2])
    assert len(image) == 7 and len(text) == sum(len(r["captions"]) for r in some)
    assert sum(seen) == (len(image) + 1 - rank) // 2 + (len(text) + 1 - rank) // 2
    found["embedded"] = image, text
    rows = torch.arange(7.0)[rank::2]
    assert evaluation.all_gather_rows(rows[:, None]).flatten().tolist() == list(range(7))
    assert tbps.any_rank(rank == 1, "cpu") and not tbps.any_rank(False, "cpu")
    if rank == 0:
        torch.save(found, out)
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("micro", [0, 3])
def test_two_processes_make_the_same_step(people, tmp_path, micro, monkeypatch):
    torch.multiprocessing.spawn(rank_of_two, (str(tmp_path / "meet"), str(tmp_path / "found.pt"), micro), nprocs=2)
    found = torch.load(tmp_path / "found.pt")
    model, _, _ = sample("baseline", people)
    tokenizer = data.train_tokenizer([c for r in people for c in r["captions"]], vocab=700, mask=True)
    inputs = evaluation.evaluation_set(people[:7], data.Preprocessing((32, 16)), tokenizer)
    alone = evaluation.embed(model.float(), *inputs[:2])
    # each embedded half, and all have all
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(alone, found["embedded"]))
    same_draws(monkeypatch)
    for name in STEPS:
        model, batch, step = sample(name, people)
        parts = step(batch)
        want, (seen, grads) = gradients(model, parts), found[name]
        rtol = 1e-6 if "mlm" in parts else 1e-9                         # losses.rank_weight is computed in fp32
        assert seen.keys() == parts.keys() and all(torch.allclose(seen[k], parts[k], rtol=rtol) for k in parts), name
        assert grads.keys() == want.keys()
        for n in want:
            assert torch.allclose(grads[n], want[n], rtol=rtol, atol=rtol / 100), (name, n)


RUN = [
    "--dataset", "cuhk", "--method", "irra", "--size", "toy", "--clip", "none", "--workers", "0", "--log-every",
    "1", "--set", "batch=8", "epochs=2", "height=48", "width=24", "lr=1e-3",
]


def command(ranks, *options, script="tbps.py"):
    """A run on some processes."""
    start = [
        sys.executable,
        *["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)] * (ranks > 1), script,
        *map(str, options),
    ]
    return subprocess.Popen(
        start, cwd=ROOT, text=True, env=os.environ | dict(OMP_NUM_THREADS="1"), stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def test_a_run_of_two_processes_is_that_of_one(cuhk, tmp_path):
    options = [*RUN, "--data-root", cuhk]
    one, two = command(1, *options, "--out", tmp_path / "one"), command(2, *options, "--out", tmp_path / "two")
    (alone, _), (said, errors) = one.communicate(), two.communicate()
    assert one.returncode == two.returncode == 0, errors
    assert said.count("epoch   2/2") == 1 and said.splitlines()[-1] == alone.splitlines()[-1]
    assert said.splitlines()[-1].startswith("test R@1")
    a, b = (torch.load(tmp_path / n / "last.pt", weights_only=True) for n in ("one", "two"))
    assert all(torch.allclose(a["weights"][n], b["weights"][n], atol=1e-3) for n in a["weights"])
    assert a["epoch"] == b["epoch"] == 2
    logs = [
        [json.loads(line) for line in (tmp_path / n / "log.jsonl").read_text().splitlines()] for n in ("one", "two")
    ]
    assert [x["at"] for x in logs[0]] == [x["at"] for x in logs[1]] and len(logs[0]) > 8
    assert all(x["loss"] == pytest.approx(y["loss"], rel=1e-3) for x, y in zip(*logs) if "loss" in x)
    scores = [
        command(n, "--checkpoint", tmp_path / "one/best.pt", "--page", tmp_path / f"{n}.html", script="eval.py")
        .communicate()[0]
        .splitlines()
        for n in (1, 2)
    ]
    # torch 2.9 says whom it is connected to
    scores = [[line for line in lines if not line.startswith("[Gloo]")] for lines in scores]
    assert "mINP" in scores[0][1] and scores[0][:-1] == scores[1][:-1] and (tmp_path / "2.html").exists()
    # what two processes made, one goes on with: the third epoch of a run is that of the run that one made
    for saved in (a, b):
        saved["recipe"]["epochs"] = 3
    for n, saved in (("one", a), ("two", b)):
        torch.save(saved, tmp_path / n / "last.pt")
    on = [command(1, *RUN, "epochs=3", "--data-root", cuhk, "--resume", "--out", tmp_path / n) for n in ("one", "two")]
    told = [p.communicate() for p in on]
    assert all(p.returncode == 0 for p in on), told
    ends = [said.splitlines()[-1] for said, _ in told]
    assert ends[0] == ends[1]
    odd = command(2, *RUN, "batch=7", "--data-root", cuhk, "--out", tmp_path / "odd")
    assert "cannot be shared by 2 processes" in odd.communicate()[1] and odd.returncode
    assert "does not go with feature_mixup" in error(
        "tbps.py", "--method", "ctlg", "--set", "feature_mixup=1", "--micro-batch", "8"
    )


def test_distillation_on_two_processes_is_that_on_one(cuhk, tmp_path):
    options = ["--dataset", "cuhk", "--data-root", cuhk, "--student", "half", *TINY]
    runs = [command(n, *options, "--out", tmp_path / str(n), script="distill.py") for n in (1, 2)]
    one, two = (
        [re.sub(r"\d+ pairs/s", "", line) for line in run.communicate()[0].splitlines() if "R@1" in line]
        for run in runs
    )
    assert [run.returncode for run in runs] == [0, 0] and one == two and len(one) > 8
    a, b = (torch.load(tmp_path / f"{n}/student/last.pt", weights_only=True)["weights"] for n in "12")
    assert all(torch.allclose(a[n], b[n], atol=1e-3) for n in a)


@pytest.mark.parametrize(
    "script, options, log",
    [
        ("tbps.py", [*RUN, "epochs=500"], "log.jsonl"),
        ("distill.py", ["--dataset", "cuhk", *TINY, "teacher_epochs=5000"], "teacher/log.jsonl"),
    ],
)
def test_one_that_wants_to_stop_stops_all(cuhk, tmp_path, script, options, log):
    """Ctrl-C reaches the processes at different steps; they agree on one, save, and end."""
    process = command(2, *options, "--data-root", cuhk, "--out", tmp_path / "r", script=script)
    log = tmp_path / "r" / log
    while not (log.exists() and len(log.read_text().splitlines()) > 5):
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    errors = process.communicate(timeout=60)[1]
    assert "is saved. Go on with the same command and --resume" in errors
    saved = torch.load(log.with_name("last.pt"), weights_only=True)
    lines = [json.loads(line)["at"] for line in log.read_text().splitlines()]
    assert [saved["epoch"], saved["step"]] in (lines[-1], lines[-2])
