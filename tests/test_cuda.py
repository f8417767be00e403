"""CUDA without a GPU. Tensors of the device "meta" have no values: whatever would wait for a value on a GPU raises."""

import contextlib
import functools
import re
import types

import pytest
import torch

import tbps
from test_scale import STEPS, sample

FP32 = functools.partial(torch.autocast, "cpu", enabled=False)


def without_values(monkeypatch, name, people):
    """A model and a batch on the device "meta", and the step."""
    model, batch, step = sample(name, people)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())       # it does not know "meta"
    model = model.to("meta")
    for head in model.heads.modules():
        for key, buffer in list(head.named_buffers(recurse=False)):
            setattr(head, key, buffer.to("meta"))
    return model, {key: x.to("meta") for key, x in batch.items()}, step


@pytest.mark.parametrize("micro_batch", [0, 3])
@pytest.mark.parametrize("name", [name for name in STEPS if name != "lcr2s"])        # its targets there are numbers
def test_no_step_waits_for_the_gpu(name, micro_batch, people, monkeypatch):
    """Losses and gradients are queued without reading a number back."""
    model, batch, step = without_values(monkeypatch, name, people)
    model.micro_batch = micro_batch
    parts = step(batch)
    tbps.total_loss(parts).backward()
    history = tbps.LossHistory()
    history.append(sum(parts.values()), parts)
    assert all(p.grad.device.type == "meta" for p in model.parameters() if p.grad is not None)


def test_what_reads_a_number_is_caught(people, monkeypatch):
    """The test above can fail."""
    model, batch, step = without_values(monkeypatch, "baseline", people)
    for wait in (lambda: float(sum(step(batch).values())), lambda: batch["pid"][batch["pid"] > 0], batch["pid"].tolist):
        with pytest.raises((RuntimeError, NotImplementedError)):
            wait()


# ---- memory ---------------------------------------------------------------------------------------------------------

def small_model():
    torch.manual_seed(0)
    return tbps.DualEncoder(64, (32, 16), 8, 64, 2, 64, 2, 100, head_width=32).train()


def test_the_memory_of_a_pair():
    """It grows with views and captions, shrinks with recomputation, and does not depend on --micro-batch."""
    model = small_model()
    one, two, five = (tbps.encoder_memory(model, views, 1, FP32) for views in (1, 2, 5))
    assert five - one == 4 * (two - one) > 0                            # each view costs the same
    caption = tbps.encoder_memory(model, 1, 2, FP32) - one
    assert caption > 2 * 10 * 64 * 64 * 4                               # 2 blocks, ten times 64 tokens of 64
    model.micro_batch = 2
    assert tbps.encoder_memory(model, 1, 1, FP32) == one and model.micro_batch == 2
    model.image.recompute = model.text.recompute = True
    assert tbps.encoder_memory(model, 1, 1, FP32) < one / 2


@pytest.mark.parametrize("gigabytes, micro_batch, says", [
    (1.0, 0, r"about 0\.\d GB, \d MB a pair; of 1 GB here, \d+ pairs fit at once"),
    (0.02, 0, r"--micro-batch \d+ fits"), (0.02, 4, r"about 0\.0 GB")])
def test_what_fits_on_a_card(gigabytes, micro_batch, says, monkeypatch, capsys):
    model, pairs = small_model(), types.SimpleNamespace(views=[0] * 4, texts=1)
    card = types.SimpleNamespace(total_memory=gigabytes * 1e9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    args = types.SimpleNamespace(device="cuda", micro_batch=micro_batch)
    hint = tbps.memory_hint(args, tbps.TBPS_CLIP, model, pairs, FP32)
    said = capsys.readouterr().out
    assert said.rstrip().endswith(hint)
    assert re.search(says, said), said


def test_out_of_memory_says_what_fits():
    with pytest.raises(ValueError, match="(?s)CUDA out of memory.*--micro-batch 7 fits"):
        with tbps.explain_out_of_memory("--micro-batch 7 fits"):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB. GPU 0 has 8 GiB")


# ---- fp16 -----------------------------------------------------------------------------------------------------------

def test_skipped_steps_are_counted():
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0 ** 16)
    skipped, p = tbps.SkippedSteps(scaler), torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([p], lr=1.0)
    for grad in (1.0, float("inf"), 1.0, float("nan")):
        scaler.scale(p.sum()).backward()
        p.grad.fill_(grad)
        scaler.step(optimizer)
        scaler.update()
    assert skipped.update() == dict(loss_scale=2.0 ** 14, skipped=2)
    assert "2 steps skipped" in skipped.note(4) and skipped.note(4) == ""
    assert tbps.SkippedSteps(torch.amp.GradScaler("cpu", enabled=False)).update() == {}
