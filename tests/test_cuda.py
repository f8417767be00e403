"""What would make a GPU wait, without a GPU: tensors of the device "meta" have no values, so whatever needs one raises."""

import contextlib

import pytest
import torch

import tbps
from test_scale import STEPS, sample


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
@pytest.mark.parametrize("name", [name for name in STEPS if name != "lcr2s"])
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
