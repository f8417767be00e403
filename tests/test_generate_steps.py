"""How many steps the parts of PDG last: as in the official prompt-to-prompt and null-text code, also if not 50."""

import pytest
import torch

import generate
from conftest import error


@pytest.mark.parametrize("total, cross, own", [(50, 40, 20), (20, 16, 8), (9, 8, 3), (4, 4, 1), (99, 80, 39)])
def test_steps_of_attention_control(total, cross, own):
    """Official: cross-attention int(0.8 * (T + 1)) steps, self-attention int(0.4 * T) steps."""
    control = generate.Control([[1]], [[1]], blend_from=1)
    control.start(type("Model", (), dict(timesteps=range(total), device="cpu")), (1, 4, 4, 4))
    q = torch.randn(3, 1, 4, 2)                                         # 4 positions of 16: the picture is halved
    replaced = {True: 0, False: 0}
    for control.step in range(total):
        for is_cross in replaced:
            k = v = torch.randn(3, 1, 77 if is_cross else 4, 2)
            replaced[is_cross] += control(q, k, v, is_cross, False)[0] is not q
    assert replaced == {True: cross, False: own}


@pytest.mark.parametrize("total", [10, 50, 100])
def test_rate_of_null_text(total, diffusion, monkeypatch):
    """Official: 0.01 * (1 - i / 100) at step i, whatever the number of steps."""
    model, rates, adam = generate.load_diffusion(diffusion, steps=total), [], torch.optim.Adam
    model.predict_noise = lambda z, t, text: z * text.mean()
    monkeypatch.setattr(torch.optim, "Adam", lambda params, lr: rates.append(lr) or adam(params, lr=lr))
    text = model.encode_text(["a man in a red shirt"])
    model.null_text(model.invert(torch.randn(1, 4, 4, 4), text), text, 7.5, rounds=1)
    assert rates == [0.01 * (1 - i / 100) for i in range(total)]


def test_null_text_takes_at_most_100_steps():
    assert "steps=101 must be from 1 to 100" in error("generate.py", "--set", "inversion=null", "steps=101")
