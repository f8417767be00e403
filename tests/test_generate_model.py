"""Stable Diffusion's text encoder, DDIM inversion, null-text optimisation and prompt-to-prompt, on a tiny model."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler
from safetensors.torch import load_file, save_file

import generate
from tiny_clip import TOKENS, hugging_face, openai_tiny
from tiny_diffusion import SCHEDULE

CAPTION = "a man in a red shirt and blue jeans"


@pytest.fixture
def model(diffusion):
    return generate.load_diffusion(diffusion, steps=10)


def make_control(edits, **options):
    return generate.Control([e["tokens"] for e in edits], [e["blend"] for e in edits], **options)


def make_edit(model, caption=CAPTION, new="green"):
    return next(e for e in generate.edits(caption, model.tokenizer) if e["new"] == new)


# ---- the text encoder -----------------------------------------------------------------------------------------------

# last_hidden_state[:, (0, 4, 40, 76), :4] of transformers 5.23.0's CLIPTextModel with the weights of tiny_clip, per
# number of heads; captions padded with EOT
HIDDEN = {
    1: [[[-3.364189, -0.979074, 0.673918, -0.873639], [-4.209456, 1.491579, 0.641964, -1.729918],
         [-2.579308, 0.759668, 1.175238, -0.471858], [-2.77864, 0.881781, 1.161981, -0.359423]],
        [[-3.364189, -0.979074, 0.673918, -0.873639], [-3.108665, 0.21666, 0.155209, -2.162647],
         [-2.23365, 0.870491, 1.212489, -0.648197], [-2.528584, 0.962096, 1.128063, -0.533916]]],
    4: [[[-3.364189, -0.979074, 0.673918, -0.873639], [-4.373524, 1.006615, 0.787747, -1.282389],
         [-2.441389, 0.546406, 0.884262, -0.456611], [-2.828665, 0.867801, 1.026274, -0.309628]],
        [[-3.364189, -0.979074, 0.673918, -0.873639], [-3.605984, -0.021237, 0.659414, -1.132439],
         [-2.306028, 0.55798, 0.893982, -0.33911], [-3.083023, 1.013612, 0.870254, -0.67657]]]}
TOTAL = {1: 7993.6, 4: 7855.775}                                        # of all absolute values


@pytest.mark.parametrize("heads, prefix", [(1, "text_model."), (4, "text_model."), (4, "")])
def test_text_encoder_is_the_original(heads, prefix, tmp_path):
    theirs = hugging_face(openai_tiny())
    weights = {name: w.contiguous() for name, w in theirs.items() if name.startswith("text_model.")}
    saved = {name.replace("text_model.", prefix): w for name, w in weights.items()}
    saved[f"{prefix}embeddings.position_ids"] = torch.arange(77)[None]                      # old versions save them
    save_file(saved, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(dict(
        hidden_size=64, num_attention_heads=heads, num_hidden_layers=2, vocab_size=100, max_position_embeddings=77,
        hidden_act="quick_gelu")))
    encoder, tokens = generate.load_text_encoder(tmp_path), TOKENS.clone()
    for row in tokens:
        row[int(row.argmax()):] = 99
    hidden = encoder(tokens)
    assert torch.allclose(hidden[:, [0, 4, 40, 76], :4], torch.tensor(HIDDEN[heads]), atol=1e-4)
    assert hidden.double().abs().sum().item() == pytest.approx(TOTAL[heads], abs=0.05)
    generate.save_text_encoder(encoder, tmp_path / "again")
    again = load_file(tmp_path / "again/model.safetensors")
    assert again.keys() == weights.keys() and all(torch.equal(again[name], w) for name, w in weights.items())
    assert torch.equal(generate.load_text_encoder(tmp_path / "again")(tokens), hidden)


# ---- time, noise, latents -------------------------------------------------------------------------------------------

def test_time_and_noise(diffusion):
    model = generate.load_diffusion(diffusion)
    assert model.timesteps == list(range(980, -1, -20)) and len(model.timesteps) == 50
    betas = torch.linspace(0.00085 ** 0.5, 0.012 ** 0.5, 1000, dtype=torch.float64) ** 2
    assert model.alphas[980] == pytest.approx((1 - betas).cumprod(0)[980].item(), rel=1e-5)
    assert model.alphas[0] == pytest.approx(1 - 0.00085, rel=1e-6)


def test_images_of_any_shape(model):
    pixels = torch.rand(2, 3, 128, 64)
    z, mean = model.encode(pixels), model.vae.encode(2 * pixels - 1).latent_dist.mean
    assert z.shape == (2, 4, 16, 8) and torch.allclose(z, 0.18215 * mean) and model.decode(z).shape == (2, 3, 128, 64)
    text = model.encode_text([CAPTION] * 2)
    assert text.shape == (2, 77, 32) and model.predict_noise(z, 500, text).shape == z.shape and model.evaluations == 2
    tokens = model.tokenizer([CAPTION])
    tokens[0, int(tokens.argmax()):] = model.tokenizer.eot
    assert torch.allclose(text[:1], model.text_encoder(tokens), atol=1e-6)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_a_step_is_that_of_diffusers(kind, model):
    z, text = torch.randn(2, 4, 16, 8), model.encode_text([CAPTION, "a man"])
    model.prediction_type = kind
    scheduler = DDIMScheduler(**SCHEDULE, prediction_type=kind)
    scheduler.set_timesteps(10)
    for t in (900, 500, 0):
        with torch.no_grad():
            want = scheduler.step(model.unet(z, t, encoder_hidden_states=text).sample, t, z, eta=0.0).prev_sample
            assert torch.allclose(model.ddim_step(z, model.predict_noise(z, t, text), t, t - 100), want, atol=1e-5)


# ---- inversion ------------------------------------------------------------------------------------------------------

def test_inversion_and_back(diffusion, model):
    """The first step is the identity. A step back undoes a step forth with the same noise. All steps back come close if
    the noise changes slowly."""
    z0, text = torch.randn(2, 4, 16, 8), model.encode_text([CAPTION, "a man"])
    zs = model.invert(z0, text)
    assert len(zs) == 11 and torch.equal(zs[0], z0) and torch.allclose(zs[1], z0, atol=1e-6) and model.evaluations == 20
    with torch.no_grad():
        noise = model.predict_noise(z0, 500, text)
        forth = model.ddim_step(z0, noise, 400, 500)
        assert torch.allclose(model.ddim_step(forth, noise, 500, 400), z0, atol=1e-5)
    model = generate.load_diffusion(diffusion, steps=50)
    model.predict_noise = lambda z, t, text: z.tanh() * (t / 1000) ** 0.5
    zs = model.invert(z0, text)
    z = zs[-1]
    for t in model.timesteps:
        z = model.ddim_step(z, model.predict_noise(z, t, text), t, t - 20)
    assert (z - z0).abs().max() < 0.15 and (zs[-1] - z0).abs().max() > 0.5


@pytest.mark.parametrize("inversion", ["negative", "null"])
def test_the_same_caption_gives_the_same_image(inversion, model, request):
    """With identical captions and weight 1 the target is the source, bit for bit. On one thread: there the result of a
    row does not depend on its place in the batch."""
    threads = torch.get_num_threads()
    request.addfinalizer(lambda: torch.set_num_threads(threads))
    torch.set_num_threads(1)
    text = model.encode_text([CAPTION, "a woman with white shoes"])
    zs = model.invert(torch.randn(2, 4, 16, 8), text)
    nulls = model.null_text(zs, text, 7.5, rounds=1) if inversion == "null" else None
    control = generate.Control([[], []], [[4], [4]], weight=1.0, blend_at=4)
    old, new = model.edit(zs, text, text, control, inversion=inversion, nulls=nulls)
    assert torch.equal(old, new) and old.isfinite().all()


def test_direct_inversion_keeps_the_source(model):
    e = make_edit(model)
    source, target = model.encode_text([e["source"]]), model.encode_text([e["caption"]])
    z0 = torch.randn(1, 4, 32, 16)
    zs, before = model.invert(z0, source), model.evaluations
    control = make_control([e], threshold=0.99)                         # random attention is nearly uniform
    old, new = model.edit(zs, source, target, control)
    assert torch.equal(old, z0) and model.evaluations - before == 3 * 10
    outside = (control.mask == 0).expand_as(new)
    assert 0 < outside.float().mean() < 1 and torch.equal(new[outside], old[outside]) and not torch.equal(new, old)


def test_null_text_leads_back(model):
    """With the optimised empty captions guided steps end closer to the image. Early stopping saves evaluations."""
    text = model.encode_text([CAPTION])
    zs = model.invert(torch.randn(1, 4, 16, 8), text)

    @torch.no_grad()
    def distance(nulls):
        z = zs[-1]
        for i, t in enumerate(model.timesteps):
            conditional, unconditional = model.predict_noise(z, t, text), model.predict_noise(z, t, nulls[i])
            z = model.ddim_step(z, unconditional + 7.5 * (conditional - unconditional), t, t - 100)
        return (z - zs[0]).square().mean().item()

    before = model.evaluations
    nulls = model.null_text(zs, text, 7.5)
    assert len(nulls) == 10 and 10 * 3 <= model.evaluations - before <= 10 * 12
    assert distance(nulls) < distance([model.encode_text([""])] * 10)


@pytest.mark.parametrize("inversion", ["direct", "negative", "null"])
def test_batched_is_single(inversion, model):
    """Two edits in one batch equal those made one by one: inversion, null text, edit, mask."""
    for part in (model.unet, model.text_encoder):
        part.double()
    pairs = [make_edit(model, caption) for caption in (CAPTION, "the woman wears an orange skirt")]
    z0 = torch.randn(2, 4, 16, 8, dtype=torch.float64)

    def run(numbers):
        source, target = (model.encode_text([pairs[n][key] for n in numbers]) for key in ("source", "caption"))
        zs = model.invert(z0[numbers], source)
        nulls = model.null_text(zs, source, 7.5, rounds=3) if inversion == "null" else None
        control = make_control([pairs[n] for n in numbers])
        edited = model.edit(zs, source, target, control, nulls=nulls, inversion=inversion)
        return torch.stack([*edited, control.mask.expand(-1, 4, -1, -1)])

    both = run([0, 1])
    for n in (0, 1):
        assert torch.allclose(both[:, [n]], run([n]), atol=1e-5)


# ---- prompt-to-prompt, layer by layer -------------------------------------------------------------------------------

class Spy(generate.Control):
    """Notes per call: is_cross, factor, is_middle, step, whether q and k are the source's, tokens with scaled v."""

    def __call__(self, q, k, v, is_cross, is_middle):
        out = super().__call__(q, k, v, is_cross, is_middle)
        B = self.shape[0]
        replaced = out[0] is not q
        assert not replaced or torch.equal(out[0][B:2 * B], q[:B]) and torch.equal(out[1][B:2 * B], k[:B])
        factor = round((self.shape[-2] * self.shape[-1] / q.shape[2]) ** 0.5)
        scaled = (out[2] - v).abs().sum(dim=(1, 3)).nonzero()[:, 1].unique().tolist()
        self.calls = getattr(self, "calls", []) + [(is_cross, factor, is_middle, self.step, replaced, scaled)]
        return out


def test_which_layers_and_when(diffusion):
    """50 steps: cross-attention of all 16 layers to step 39; self-attention of layers that halve the image at least, to
    step 19; blend from the 11th step on; values are scaled at the new word only."""
    model = generate.load_diffusion(diffusion, steps=50)
    e = make_edit(model)
    source, target = model.encode_text([e["source"]]), model.encode_text([e["caption"]])
    spy, blends = Spy([e["tokens"]], [e["blend"]]), []

    def blend(old, new):
        blends.append(generate.Control.blend(spy, old, new) is not new)
        return new

    spy.blend = blend
    model.edit([torch.randn(1, 4, 32, 16)] * 51, source, target, spy)
    assert len([1 for is_cross, _, _, step, *_ in spy.calls if is_cross and step == 0]) == 16
    assert len(spy.calls) == 50 * 32 and {factor for _, factor, *_ in spy.calls} == {1, 2, 4, 8}
    assert {factor for _, factor, is_middle, *_ in spy.calls if is_middle} == {8}
    for is_cross, factor, _, step, replaced, scaled in spy.calls:
        assert replaced == (step < 40 if is_cross else step < 20 and factor >= 2), (is_cross, factor, step)
        assert scaled == (e["tokens"] if is_cross and step < 40 else [])
    assert blends == [False] * 10 + [True] * 40


def neighbourhood_max(grid, i, j):
    return grid[max(0, i - 1):i + 2, max(0, j - 1):j + 2].max()


def test_scaled_values_are_scaled_maps():
    """Replace and reweight as published, A_target = A_source * weight, with explicit maps; the mask by hand."""
    torch.manual_seed(0)
    B, H, N, C = 2, 4, 8, 6
    q, k, v = torch.randn(3 * B, H, N, C), torch.randn(3 * B, H, 77, C), torch.randn(3 * B, H, 77, C)
    words = [[5, 6], [2, 3, 4]]
    control = generate.Control([[5], [2, 3]], words, weight=6.0, blend_at=2)
    control.start(type("Model", (), dict(timesteps=range(10), device="cpu")), (B, 4, 8, 4))
    out = F.scaled_dot_product_attention(*control(q, k, v, is_cross=True, is_middle=False))
    maps = (q @ k.transpose(2, 3) / math.sqrt(C)).softmax(dim=3)
    weight = torch.ones(B, 77)
    weight[0, 5] = weight[1, 2] = weight[1, 3] = 6
    edited = maps[:B] * weight[:, None, None]
    assert torch.allclose(out[:B], maps[:B] @ v[:B], atol=1e-5)
    assert torch.allclose(out[B:2 * B], edited @ v[B:2 * B], atol=1e-5)
    assert torch.allclose(out[2 * B:], maps[2 * B:] @ v[2 * B:], atol=1e-5)                 # without caption: untouched

    mask = torch.zeros(B, 8, 4)
    for b in range(B):
        for m in (maps[b], edited[b]):
            grid = m[:, :, words[b]].sum(dim=2).mean(dim=0).view(4, 2)
            pooled = torch.tensor([[neighbourhood_max(grid, i, j) for j in range(2)] for i in range(4)])
            mask[b] += (pooled / pooled.max() > 0.3).float().repeat_interleave(2, 0).repeat_interleave(2, 1)
    control.step = 9
    blended = control.blend(torch.zeros(B, 4, 8, 4), torch.ones(B, 4, 8, 4))
    assert torch.equal(blended[:, 0], (mask > 0).float()) and torch.equal(control.mask[:, 0], (mask > 0).float())
    control.step = 8                                                    # of 10 steps, 0.8 of 11 are replaced: 0 ... 7
    q2, _, v2 = control(q, k, v, is_cross=True, is_middle=False)
    assert torch.equal(q2, q) and torch.equal(v2, v)


def test_no_layer_for_the_mask(model):
    text = model.encode_text([CAPTION])
    control = make_control([make_edit(model)], blend_at=16)
    with pytest.raises(ValueError, match="no layer of this UNet reduces the image 16 times"):
        model.edit(model.invert(torch.randn(1, 4, 16, 8), text), text, text, control)


def test_a_copy_to_a_gpu_starts_from_pinned_memory(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: calls.append("pinned") or x)
    monkeypatch.setattr(torch.Tensor, "to", lambda x, device, non_blocking: calls.append((device, non_blocking)) or x)
    generate.copy_to("cuda:1", torch.zeros(1))
    generate.copy_to("cpu", torch.zeros(1))
    assert calls == ["pinned", ("cuda:1", True), ("cpu", True)]
