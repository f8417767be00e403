"""Proximity data generation: caption edits, Stable Diffusion's text encoder, inversion, prompt-to-prompt, on tiny models in the true format."""

import collections
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler
from PIL import Image
from safetensors.torch import load_file, save_file

import data
import generate
import lab.people
from lab import check_generated
import tbps
from conftest import error, run
from tiny_clip import TOKENS, hugging_face, openai_tiny

# ---- caption edits --------------------------------------------------------------------------------------------------

CAPTIONS = {  # what can be edited: "noun: colour, colour ..." per noun, in the order found
    "A man in a red shirt and blue jeans.": "shirt: red; jeans: blue",
    "The woman wears a blue and white striped shirt with black pants": "shirt: blue white; pants: black",
    "His shirt is red. He wears black shoes.": "shirt: red; shoes: black",
    "A colored shirt and grey pants": "pants: grey",
    "a gray hoodie and gray trousers": "hoodie: gray; trousers: gray",
    "She wears a navy blue dress and white shoes.": "shoes: white",
    "a woman with a sky blue top and an orange skirt": "skirt: orange",
    "A person in a shirt in red and black pants": "",
    "a man in a shirt in red": "",
    "a man wearing a red jacket. The red jacket has white stripes.": "jacket: red",
    "a red shirt, and another red shirt": "shirt: red",
    "a red shirt and a blue shirt": "",
    "his coat is black and the coat is long": "coat: black",
    "a red jacket, he holds a jacket": "jacket: red",
    "a man with red hair in a red coat": "coat: red",
    "the red-haired woman wears red shorts and a white top": "top: white",
    "a multicolored dress with blue shoes": "shoes: blue",
    "a man wearing a dark gray suit jacket and a black tie": "jacket: gray; tie: black",
    "the man's trousers are dark blue and his shoes are white": "trousers: blue; shoes: white",
    "a shirt that is green and black pants": "",
    "a shirt that is green, and black pants": "shirt: green; pants: black",
    "his pants are green. black bag": "pants: green; bag: black",
    "black and white checked long sleeve shirt": "shirt: black white",
    "The man has a white shirt with a red logo, carrying a red backpack": "shirt: white; backpack: red",
    "a yellow, green and red polo": "polo: yellow green red",
    "a black/white sweater": "sweater: black white",
    "WEARING BLACK SHORTS AND A BLACK BAG": "shorts: black; bag: black",
    "wears light blue jeans": "jeans: blue",
    "an orange jacket over a white t-shirt": "jacket: orange; t-shirt: white",
    "The lady\u2019s dress is pink": "dress: pink",
    "a brown leather bag on her left shoulder": "bag: brown",
    "a bag of brown leather": "",
    "she walks past a red car": "",
    "a red car, a red coat": "coat: red",
    "white sneakers with white laces": "sneakers: white",
    "a cream white coat": "",
    "blue shirt blue jeans": "shirt: blue; jeans: blue",
    "her hair is black and her hat is black": "",
    "a reddish shirt and tan pants": "pants: tan",
    "dressed in all black, with a red bag": "bag: red",
    "a man": "",
    "": "",
    "a blue hoodie " + "and a very long caption " * 20: "",
}


@pytest.mark.parametrize("caption, want", CAPTIONS.items(), ids=range(len(CAPTIONS)))
def test_what_can_be_edited(caption, want, tokenizer):
    found = {}
    for e in generate.edits(caption, tokenizer):
        found.setdefault(e["noun"], {}).setdefault(e["old"], []).append(e["new"])
    assert "; ".join(f"{noun}: {' '.join(colours)}" for noun, colours in found.items()) == want
    for e in generate.edits(caption, tokenizer, garments=True):
        old, new = tokenizer([e["source"], e["caption"]])
        assert old.argmax() == new.argmax() and e["source"] == data.normalize_text(caption) != e["caption"]
        differ = (old != new).nonzero()[:, 0].tolist()
        assert set(e["tokens"]) <= set(differ) and set(e["tokens"]) <= set(e["blend"])                  # an article may differ as well
        assert e["old"] not in e["caption"].split() or e["what"] == "colour"
        assert tokenizer.bpe.decode([new[t].item() for t in e["tokens"]]).replace("</w>", " ").split() == [e["new"]] * len(e["tokens"])


def test_all_mentions_change_and_articles_follow(tokenizer):
    def edit(caption, old, new, **more):
        return next(e for e in generate.edits(caption, tokenizer, **more) if (e["old"], e["new"]) == (old, new))

    e = edit("a man wearing a red jacket. The red jacket has white stripes.", "red", "orange")
    assert e["caption"] == "a man wearing an orange jacket. the orange jacket has white stripes." and len(e["tokens"]) == 2 and len(e["blend"]) == 4
    assert edit("an orange skirt", "orange", "red")["caption"] == "a red skirt"
    assert edit("a blue and white shirt", "white", "red")["caption"] == "a blue and red shirt"
    assert all(e["new"] not in ("blue", "white") for e in generate.edits("a blue and white shirt", tokenizer))
    assert all(e["new"] not in ("grey", "gray") for e in generate.edits("a gray shirt", tokenizer))
    e = edit("blue trousers, the trousers are long", "trousers", "shorts", garments=True)
    assert e["what"] == "garment" and e["caption"] == "blue shorts, the shorts are long" and len(e["tokens"]) == 2
    assert not [e for e in generate.edits("a shirt and a jacket", tokenizer, garments=True)]
    assert not [e for e in generate.edits("a red shirt and a blue shirt", tokenizer, garments=True)]
    assert not [e for e in generate.edits("blue trousers", tokenizer) if e["what"] == "garment"]


# ---- the text encoder -----------------------------------------------------------------------------------------------

# last_hidden_state[:, (0, 4, 40, 76), :4] of transformers 5.23.0's CLIPTextModel with the weights of tiny_clip, captions padded with EOT
HIDDEN = {1: [[[-3.364189, -0.979074, 0.673918, -0.873639], [-4.209456, 1.491579, 0.641964, -1.729918], [-2.579308, 0.759668, 1.175238, -0.471858], [-2.77864, 0.881781, 1.161981, -0.359423]],
              [[-3.364189, -0.979074, 0.673918, -0.873639], [-3.108665, 0.21666, 0.155209, -2.162647], [-2.23365, 0.870491, 1.212489, -0.648197], [-2.528584, 0.962096, 1.128063, -0.533916]]],
          4: [[[-3.364189, -0.979074, 0.673918, -0.873639], [-4.373524, 1.006615, 0.787747, -1.282389], [-2.441389, 0.546406, 0.884262, -0.456611], [-2.828665, 0.867801, 1.026274, -0.309628]],
              [[-3.364189, -0.979074, 0.673918, -0.873639], [-3.605984, -0.021237, 0.659414, -1.132439], [-2.306028, 0.55798, 0.893982, -0.33911], [-3.083023, 1.013612, 0.870254, -0.67657]]]}
TOTAL = {1: 7993.6, 4: 7855.775}                                        # of all absolute values


@pytest.mark.parametrize("heads, prefix", [(1, "text_model."), (4, "text_model."), (4, "")])
def test_text_encoder_is_the_original(heads, prefix, tmp_path):
    weights = {n.replace("text_model.", prefix): w.contiguous() for n, w in hugging_face(openai_tiny()).items() if n.startswith("text_model.")}
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(dict(hidden_size=64, num_attention_heads=heads, num_hidden_layers=2, vocab_size=100, max_position_embeddings=77, hidden_act="quick_gelu")))
    words = generate.load_words(tmp_path)
    tokens = TOKENS.clone()
    for row in tokens:
        row[int(row.argmax()):] = 99
    hidden = words(tokens)
    assert torch.allclose(hidden[:, [0, 4, 40, 76], :4], torch.tensor(HIDDEN[heads]), atol=1e-4)
    assert hidden.double().abs().sum().item() == pytest.approx(TOTAL[heads], abs=0.05)
    generate.save_words(words, tmp_path / "again")
    again = load_file(tmp_path / "again/model.safetensors")
    assert again.keys() == {"text_model." + n.removeprefix("text_model.") for n in weights} and all(torch.equal(again["text_model." + n.removeprefix("text_model.")], w) for n, w in weights.items())
    assert torch.equal(generate.load_words(tmp_path / "again")(tokens), hidden)


# ---- a tiny model in the true format --------------------------------------------------------------------------------

CAPTION = "a man in a red shirt and blue jeans"


@pytest.fixture
def model(diffusion):
    return generate.load_diffusion(diffusion, steps=10)


def control(model, edits, **more):
    return generate.Control([e["tokens"] for e in edits], [e["blend"] for e in edits], **more)


def an_edit(model, caption=CAPTION, new="green"):
    return next(e for e in generate.edits(caption, model.tokenizer) if e["new"] == new)


def test_time_and_noise(diffusion):
    model = generate.load_diffusion(diffusion)
    assert model.steps == list(range(980, -1, -20)) and len(model.steps) == 50
    betas = torch.linspace(0.00085 ** 0.5, 0.012 ** 0.5, 1000, dtype=torch.float64) ** 2
    assert model.alpha(980) == pytest.approx((1 - betas).cumprod(0)[980].item(), rel=1e-5) and model.alpha(-20) == model.alpha(0) == pytest.approx(1 - 0.00085, rel=1e-6)


def test_pictures_of_any_shape(model):
    pixels = torch.rand(2, 3, 128, 64)
    z = model.encode(pixels)
    mean = model.vae.encode(2 * pixels - 1).latent_dist.mean
    assert z.shape == (2, 4, 16, 8) and torch.allclose(z, 0.18215 * mean) and model.decode(z).shape == (2, 3, 128, 64)
    text = model.read([CAPTION] * 2)
    assert text.shape == (2, 77, 32) and model.noise(z, 500, text).shape == z.shape and model.evaluations == 2
    tokens = model.tokenizer([CAPTION])
    tokens[0, int(tokens.argmax()):] = model.tokenizer.eot
    assert torch.allclose(text[:1], model.words(tokens), atol=1e-6)


def test_the_schedulers_own_step(model):
    """A step is that of diffusers' DDIMScheduler, also for a model that predicts v."""
    z, text = torch.randn(2, 4, 16, 8), model.read([CAPTION, "a man"])
    for kind in ("epsilon", "v_prediction"):
        model.kind = kind
        scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False, prediction_type=kind)
        scheduler.set_timesteps(10)
        for t in (900, 500, 0):
            with torch.no_grad():
                want = scheduler.step(model.unet(z, t, encoder_hidden_states=text).sample, t, z, eta=0.0).prev_sample
                assert torch.allclose(model.move(z, model.noise(z, t, text), t, t - 100), want, atol=1e-5)


def test_inversion_and_back(diffusion, model):
    """The first step is the identity; a step back undoes a step forth if the noise is the same; all steps back come near, where the noise
    changes slowly."""
    z0, text = torch.randn(2, 4, 16, 8), model.read([CAPTION, "a man"])
    zs = model.invert(z0, text)
    assert len(zs) == 11 and torch.equal(zs[0], z0) and torch.allclose(zs[1], z0, atol=1e-6) and model.evaluations == 20
    with torch.no_grad():
        noise = model.noise(z0, 500, text)
        assert torch.allclose(model.move(model.move(z0, noise, 400, 500), noise, 500, 400), z0, atol=1e-5)
    model = generate.load_diffusion(diffusion, steps=50)
    model.noise = lambda z, t, text: z.tanh() * (t / 1000) ** 0.5
    zs = model.invert(z0, text)
    z = zs[-1]
    for t in model.steps:
        z = model.move(z, model.noise(z, t, text), t, t - 20)
    assert (z - z0).abs().max() < 0.15 and (zs[-1] - z0).abs().max() > 0.5


@pytest.mark.parametrize("inversion", ["negative", "null"])
def test_the_same_caption_gives_the_same_picture(inversion, model, request):
    """Identical captions and weight 1: the target is the source, bit for bit, where a row's result does not depend on its place in the batch:
    on one thread."""
    threads = torch.get_num_threads()
    request.addfinalizer(lambda: torch.set_num_threads(threads))
    torch.set_num_threads(1)
    text = model.read([CAPTION, "a woman with white shoes"])
    zs = model.invert(torch.randn(2, 4, 16, 8), text)
    nulls = model.null_text(zs, text, 7.5, rounds=1) if inversion == "null" else None
    old, new = model.edit(zs, text, text, generate.Control([[], []], [[4], [4]], weight=1.0, blend_at=4), inversion=inversion, nulls=nulls)
    assert torch.equal(old, new) and old.isfinite().all()


def test_direct_inversion_keeps_the_source(model):
    e = an_edit(model)
    source, target = model.read([e["source"]]), model.read([e["caption"]])
    z0 = torch.randn(1, 4, 32, 16)
    zs, before = model.invert(z0, source), model.evaluations
    c = control(model, [e], threshold=0.99)                             # attention of a random model is nearly the same everywhere
    old, new = model.edit(zs, source, target, c)
    assert torch.equal(old, z0) and model.evaluations - before == 3 * 10
    outside = (c.mask == 0).expand_as(new)
    assert 0 < outside.float().mean() < 1 and torch.equal(new[outside], old[outside]) and not torch.equal(new, old)


def test_null_text_leads_back(model):
    """With the empty captions it finds, guided steps come nearer to the inversion's than with the empty caption; early stop saves passes."""
    text = model.read([CAPTION])
    zs = model.invert(torch.randn(1, 4, 16, 8), text)

    def off(nulls):
        z = zs[-1]
        for i, t in enumerate(model.steps):
            with torch.no_grad():
                told, untold = model.noise(z, t, text), model.noise(z, t, nulls[i])
            z = model.move(z, untold + 7.5 * (told - untold), t, t - 100)
        return (z - zs[0]).square().mean().item()

    before = model.evaluations
    nulls = model.null_text(zs, text, 7.5)
    assert len(nulls) == 10 and 10 * 3 <= model.evaluations - before <= 10 * 12
    assert off(nulls) < off([model.read([""])] * 10)


def test_batched_is_single(model):
    """Two edits of other captions in one batch are those made one by one: inversion, null text, edit, mask."""
    for part in (model.unet, model.words):
        part.double()
    captions = [CAPTION, "the woman wears an orange skirt"]
    pairs = [an_edit(model, c, "green") for c in captions]
    z0 = torch.randn(2, 4, 16, 8, dtype=torch.float64)

    def make(numbers, inversion):
        source, target = (model.read([pairs[n][k] for n in numbers]) for k in ("source", "caption"))
        zs = model.invert(z0[numbers], source)
        nulls = model.null_text(zs, source, 7.5, rounds=3) if inversion == "null" else None
        c = control(model, [pairs[n] for n in numbers])
        return torch.stack([*model.edit(zs, source, target, c, nulls=nulls, inversion=inversion), c.mask.expand(-1, 4, -1, -1)])

    for inversion in ("direct", "negative", "null"):
        both = make([0, 1], inversion)
        for n in (0, 1):
            assert torch.allclose(both[:, [n]], make([n], inversion), atol=1e-5), inversion


# ---- prompt-to-prompt, layer by layer -------------------------------------------------------------------------------

class Spy(generate.Control):
    """Notes of each layer: cross or self, factor, middle, step, whether the source's queries and keys were taken, whose values were scaled."""

    def __call__(self, q, k, v, cross, middle):
        out = super().__call__(q, k, v, cross, middle)
        B = self.shape[0]
        assert out[0] is q or torch.equal(out[0][B:2 * B], q[:B]) and torch.equal(out[1][B:2 * B], k[:B])
        factor = round((self.shape[-2] * self.shape[-1] / q.shape[2]) ** 0.5)
        self.seen = getattr(self, "seen", [])
        self.seen.append((cross, factor, middle, self.step, out[0] is not q, (out[2] - v).abs().sum(dim=(1, 3)).nonzero()[:, 1].unique().tolist()))
        return out


def test_which_layers_and_when(diffusion):
    """50 steps: cross-attention of all 16 layers to step 39, self-attention where the picture is halved at least to step 19; blend from the
    11th step on; values scaled at the new word alone."""
    model = generate.load_diffusion(diffusion, steps=50)
    e = an_edit(model)
    source, target = model.read([e["source"]]), model.read([e["caption"]])
    spy, blends = Spy([e["tokens"]], [e["blend"]]), []
    spy.blended = lambda old, new: blends.append((spy.step, generate.Control.blended(spy, old, new) is not new)) or new
    model.edit([torch.randn(1, 4, 32, 16)] * 51, source, target, spy)
    layers = len([1 for s in spy.seen if s[0] and s[3] == 0])
    assert layers == 16 and len(spy.seen) == 50 * 32
    assert {f for c, f, *_ in spy.seen} == {1, 2, 4, 8} and {f for c, f, middle, *_ in spy.seen if middle} == {8}
    for cross, factor, _, step, replaced, scaled in spy.seen:
        assert replaced == (step < 40 if cross else step < 20 and factor >= 2), (cross, factor, step)
        assert scaled == (e["tokens"] if cross and step < 40 else [])
    assert [s for s, blended in blends if blended] == list(range(10, 50))


def test_scaled_values_are_scaled_maps():
    """Replace and reweight as published, A_target = A_source * weight, by the maps; the mask by hand."""
    torch.manual_seed(0)
    B, H, N, C = 2, 4, 8, 6
    q, k, v = torch.randn(3 * B, H, N, C), torch.randn(3 * B, H, 77, C), torch.randn(3 * B, H, 77, C)
    c = generate.Control([[5], [2, 3]], [[5, 6], [2, 3, 4]], weight=6.0, blend_at=2)
    c.start(type("M", (), dict(steps=range(10), device="cpu")), (B, 4, 8, 4))
    out = F.scaled_dot_product_attention(*c(q, k, v, cross=True, middle=False))
    maps = (q @ k.transpose(2, 3) / math.sqrt(C)).softmax(dim=3)
    e = torch.ones(B, 77)
    e[0, 5] = e[1, 2] = e[1, 3] = 6
    edited = maps[:B] * e[:, None, None]
    assert torch.allclose(out[B:2 * B], edited @ v[B:2 * B], atol=1e-5) and torch.allclose(out[:B], maps[:B] @ v[:B], atol=1e-5)
    assert torch.allclose(out[2 * B:], maps[2 * B:] @ v[2 * B:], atol=1e-5)                             # without caption: untouched
    words = [[5, 6], [2, 3, 4]]
    c.step = 9
    old, new = torch.zeros(B, 4, 8, 4), torch.ones(B, 4, 8, 4)
    mask = torch.zeros(B, 8, 4)
    for b in range(B):
        for m in (maps[b], edited[b]):
            grid = m[:, :, words[b]].sum(dim=2).mean(dim=0).view(4, 2)
            around = torch.tensor([[max(grid[y, x] for y in range(max(0, i - 1), min(4, i + 2)) for x in range(max(0, j - 1), min(2, j + 2))) for j in range(2)] for i in range(4)])
            mask[b] += (around / around.max() > 0.3).float().repeat_interleave(2, 0).repeat_interleave(2, 1)
    assert torch.equal(c.blended(old, new)[:, 0], (mask > 0).float()) and torch.equal(c.mask[:, 0], (mask > 0).float())
    c.step = 8                                                          # of 10 steps, 0.8 of 11 are replaced: 0 ... 7
    q2, k2, v2 = c(q, k, v, cross=True, middle=False)
    assert torch.equal(q2, q) and torch.equal(v2, v)


# ---- production -----------------------------------------------------------------------------------------------------

QUICK = ["--count", "11", "--edits", "2", "--batch", "2", "--set", "height=64", "width=32", "steps=3"]


@pytest.fixture(scope="module")
def made(diffusion, cuhk, tmp_path_factory):
    """A folder of generated pairs, and what was said while they were made."""
    out = tmp_path_factory.mktemp("made") / "pdg"
    return out, run("generate.py", "--dataset", "cuhk", "--data-root", cuhk, "--diffusion", diffusion, "--out", out, *QUICK)


def files(out):
    return {str(p.relative_to(out)): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file() and p.name != "report.html"}


def test_pairs_are_made(made, cuhk, people):
    out, said = made
    entries = [json.loads(line) for line in (out / "pairs.jsonl").read_text().splitlines()]
    sources = {r["file_path"]: r for r in json.loads((cuhk / "reid_raw.json").read_text())}
    assert len(entries) == len(list((out / "imgs").iterdir())) == 11 and "11 pairs" in said and "12 evaluations of the UNet each" not in said
    assert len({e["pid"] for e in entries}) == 11 and min(e["pid"] for e in entries) == 1_000_000
    for e in entries:
        source = sources[e["source_image"].split("imgs/")[1]]
        assert source["split"] == e["split"] == "train" and source["id"] == e["source_pid"]
        assert e["edit"]["source"] in [data.normalize_text(c) for c in source["captions"]] and e["captions"][0] != e["edit"]["source"]
        assert e["scores"].keys() == {"psnr", "changed", "kept"} and 0 < e["scores"]["kept"] <= 1
    sites = collections.defaultdict(set)
    for e in entries:
        sites[e["source_image"]].add((e["edit"]["noun"], e["edit"]["old"]))
    assert len(sites) == 6 and max(map(len, sites.values())) == 2      # two edits of a source are of two garments
    first = entries[0]
    picture, original = data.load_image(out / "imgs" / first["image"]), data.load_image(first["source_image"])
    assert picture.size == original.size and picture.tobytes() != original.tobytes()
    assert data.load_image(out / "strips" / first["image"]).size == (4 * original.width, original.height)
    assert f"{(6 * 3 + 11 * 9) / 11:.0f} evaluations of the UNet each" in said
    page = (out / "report.html").read_text()
    assert page.count("<img") == 11 and first["captions"][0] in page and "psnr" in page


def test_pairs_are_read(made):
    records = data.read("pairs", made[0], "train", hold_out=False)
    assert len(records) == 11 and all(r["image"].exists() for r in records)
    middle = sorted(r["scores"]["changed"] for r in records)[5]
    assert len(data.filter_by_score(records, [f"changed={middle}", "kept=0"])) == 6
    best = max(r["scores"]["psnr"] for r in records)
    with pytest.raises(ValueError, match=f"no pair reaches psnr=1000; the highest psnr is {best:.3g}$"):
        data.filter_by_score(records, ["psnr=1000"])
    with pytest.raises(ValueError, match="KEY=NUMBER, not 'psnr=nan'"):
        data.filter_by_score(records, ["psnr=nan"])
    with pytest.raises(ValueError, match="no score 'words'; it has psnr, changed, kept"):
        data.filter_by_score(records, ["words=0"])
    with pytest.raises(ValueError, match="KEY=NUMBER, not 'psnr=x'"):
        data.filter_by_score(records, ["psnr=x"])


@pytest.mark.parametrize("after", [0, 5, 8])
def test_killed_and_started_again(after, made, diffusion, cuhk, tmp_path, monkeypatch):
    """Wherever it is stopped, the same files come out in the end; what is done is not done again."""
    command = ["generate.py", "--dataset", "cuhk", "--data-root", cuhk, "--diffusion", diffusion, "--out", tmp_path / "pdg", *QUICK]
    replace, left = Path.replace, [after]

    def dies(part, path):
        left[0] -= Path(path).suffix == ".png"
        if left[0] < 0:
            raise KeyboardInterrupt
        return replace(part, path)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", dies)
        assert "the same command goes on" in run(*command, code=130)
    assert not (tmp_path / "pdg/pairs.jsonl").exists()
    done = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "pdg/parts").iterdir()}
    run(*command)
    assert files(tmp_path / "pdg") == files(made[0])
    assert all((tmp_path / "pdg/parts" / name).stat().st_mtime_ns == when for name, when in done.items())
    assert "pairs made" not in run(*command)


def test_shards(made, diffusion, cuhk, tmp_path, monkeypatch):
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert not (tmp_path / "pdg/pairs.jsonl").exists()
        run("generate.py", "--dataset", "cuhk", "--data-root", cuhk, "--diffusion", diffusion, "--out", tmp_path / "pdg", *QUICK)
    assert files(tmp_path / "pdg") == files(made[0])


def test_what_is_damaged_is_made_again(made, diffusion, cuhk, tmp_path):
    command = ["generate.py", "--dataset", "cuhk", "--data-root", cuhk, "--diffusion", diffusion, "--out", tmp_path / "pdg", *QUICK]
    shutil.copytree(made[0], tmp_path / "pdg")
    pictures, parts = (sorted((tmp_path / f"pdg/{name}").iterdir()) for name in ("imgs", "parts"))
    pictures[1].unlink()
    (tmp_path / "pdg/strips" / pictures[-1].name).write_bytes(b"")
    assert len(parts) > 2
    parts[1].write_text(parts[1].read_text()[:50])
    assert "pairs made" in run(*command) and files(tmp_path / "pdg") == files(made[0])
    (tmp_path / "pdg/settings.json").write_text("")
    assert "settings.json is damaged" in error(*command)


def test_more_pairs_can_be_added(made, diffusion, cuhk, tmp_path):
    """A smaller count first gives the same folder in the end."""
    command = ["generate.py", "--dataset", "cuhk", "--data-root", cuhk, "--diffusion", diffusion, "--out", tmp_path / "pdg", *QUICK]
    count = command.index("--count") + 1
    whole, command[count] = command[count], "3"
    assert "3 pairs in" in run(*command)
    command[count] = whole
    run(*command)
    assert files(tmp_path / "pdg") == files(made[0])
    command[count] = "3"
    assert f"count: {whole} then, 3 now" in error(*command)


def test_persons_of_two_folders_are_not_one(made, cuhk, tmp_path):
    shutil.copytree(made[0], tmp_path / "copy")
    args, _ = tbps.parse_args(["--dataset", "cuhk", "--data-root", str(cuhk), "--extra", str(made[0]), str(tmp_path / "copy")])
    records, real = tbps.load_data(args)["train"], data.read("cuhk", cuhk, "train")
    pairs = len(data.read("pairs", made[0], "train", hold_out=False))
    assert data.counts(records)[0] == data.counts(real)[0] + 2 * pairs == len({r["pid"] for r in real}) + 2 * pairs
    assert "names a folder twice" in error("tbps.py", "--dataset", "cuhk", "--data-root", cuhk, "--extra", made[0], made[0])
    args.share, args.extra = 0.5, args.extra[:1]                        # pairs made of persons that are left out are left out
    some = tbps.load_data(args)["train"]
    persons = {r["pid"] for r in some if "source_pid" not in r}
    assert {r["source_pid"] for r in some if "source_pid" in r} == persons & {r["source_pid"] for r in data.read("pairs", made[0], "train", hold_out=False)}


def test_nothing_is_overwritten(made, diffusion, cuhk, tmp_path):
    command = ["generate.py", "--dataset", "cuhk", "--data-root", cuhk, "--diffusion", diffusion]
    assert "guidance: 7.5 then, 2.0 now" in error(*command, "--out", made[0], *QUICK, "guidance=2")
    (tmp_path / "thesis.txt").write_text("mine")
    assert "is no folder of generated pairs" in error(*command, "--out", tmp_path, *QUICK)


def test_the_whole_chain_on_toy_people(people, tmp_path, monkeypatch):
    """A model of the toy people is trained, stopped and gone on with, makes pairs in pixels, a checkpoint judges them, training reads them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(lab.people, "draw", lambda split, **_: people[:8] if split in ("train", "few") else people[8:24])
    tiny = ["train_epochs=2", "train_batch=4", "steps=2"]
    save = tbps.save
    monkeypatch.setattr(tbps, "save", lambda *a: save(*a) or (_ for _ in ()).throw(KeyboardInterrupt()))
    run("generate.py", "--count", "3", "--out", "p", "--set", *tiny, code=130)
    assert torch.load("runs/toy-diffusion-0/last.pt")["epoch"] == 1
    monkeypatch.setattr(tbps, "save", save)
    other = ["--count", "3", "--out", "p", "--set", *tiny, "train_lr=0.1"]
    assert "train_lr 0.001 then, 0.1 now): remove it" in error("generate.py", *other)
    run("tbps.py", "--out", "c", "--set", "epochs=1", "batch=4")
    said = run("generate.py", "--count", "3", "--out", "p", "--judge", "c/best.pt", "--set", *tiny)
    assert "epoch   2/2" in said and "epoch   1/2" not in said and "3 pairs in p" in said
    assert "train_lr 0.001 then, 0.1 now): remove it" in error("generate.py", *other[:3], "o", *other[4:])
    weights = load_file("runs/toy-diffusion-0/unet/diffusion_pytorch_model.safetensors")
    shutil.copytree("runs/toy-diffusion-0", "kept")
    shutil.rmtree("runs/toy-diffusion-0")
    run("generate.py", "--count", "3", "--out", "q", "--judge", "c/best.pt", "--set", *tiny)
    again = load_file("runs/toy-diffusion-0/unet/diffusion_pytorch_model.safetensors")
    assert all(torch.equal(weights[n], again[n]) for n in weights)      # stopped or not
    assert files(Path("p")) == files(Path("q"))
    entries = [json.loads(line) for line in Path("p/pairs.jsonl").read_text().splitlines()]
    assert all(-2 < e["scores"]["words"] < 2 and e["source_image"].startswith("toy ") for e in entries)
    said = run("tbps.py", "--out", "d", "--extra", "p", "--min-score", f"words={max(e['scores']['words'] for e in entries)}", "--set", "epochs=1", "batch=4")
    assert "p: 1 of 3 generated pairs reach words=" in said
    before = load_file("kept/unet/diffusion_pytorch_model.safetensors")
    run("generate.py", "--count", "1", "--out", "f", "--diffusion", "kept", "--finetune", "tuned", "--set", *tiny)
    tuned = load_file("tuned/unet/diffusion_pytorch_model.safetensors")
    assert any(not torch.equal(before[n], tuned[n]) for n in before)
    assert (Path("kept/text_encoder/model.safetensors").read_bytes() == Path("tuned/text_encoder/model.safetensors").read_bytes())
    # from the text tower of a checkpoint: at the end of the text stands what it would be compared by
    encoder, tokenizer, _ = tbps.load_checkpoint("c/best.pt")
    model = generate.toy_model([], 2, "cpu", "c/best.pt")
    tokens = tokenizer(["a man in a red coat"])
    assert torch.allclose(model.read(["a man in a red coat"])[0, tokens.argmax()] @ encoder.text.proj, encoder.encode_text(tokens)[0], atol=1e-5)
    run("generate.py", "--count", "1", "--seed", "1", "--out", "w", "--words", "c/best.pt", "--set", *tiny)
    assert "words c/best.pt then, None now" in error("generate.py", "--count", "1", "--seed", "1", "--out", "v", "--set", *tiny)
    # what the judge says: nothing has changed; all has changed as was said
    judge, edit = generate.Judge("c/best.pt", "cpu"), dict(caption="a man in a red coat", source="a man in a blue coat")
    one, two = (data.load_image(r["image"]) for r in people[:2])
    new, old = (F.normalize(encoder.encode_text(tokenizer([edit[k]])), dim=1) for k in ("caption", "source"))
    a, b = (F.normalize(encoder.encode_image(judge.view(p)[None]), dim=1) for p in (one, two))
    still, moved = judge([one, one], [one, two], [edit, edit])
    assert still["direction"] == pytest.approx(0, abs=1e-4) and still["words"] == pytest.approx((a @ (new - old).T).item(), abs=1e-5)
    assert moved["direction"] == pytest.approx(F.cosine_similarity(b - a, new - old).item(), abs=1e-4)


# ---- mistakes -------------------------------------------------------------------------------------------------------

def test_mistakes(diffusion, tmp_path, model):
    with pytest.raises(FileNotFoundError, match="layout of diffusers"):
        generate.load_diffusion(tmp_path)
    with pytest.raises(FileNotFoundError, match="name its folder with --diffusion"):
        generate.load_diffusion("nobody/nothing")
    e = an_edit(model)
    text = model.read([e["source"]])
    with pytest.raises(ValueError, match="no layer of this UNet reduces the picture 16 times"):
        model.edit(model.invert(torch.randn(1, 4, 16, 8), text), text, text, control(model, [e], blend_at=16))
    for options, words in ((["--dataset", "cuhk"], "name the diffusion model with --diffusion"), (["--preset", "paper"], "a preset of their own"),
                           (["--set", "inversion=magic"], "one of direct, negative, null"), (["--set", "guide=1"], "there is no key 'guide'"),
                           (["--set", "own=2"], "a share from 0 to 1"), (["--set", "guidance=nan"], "guidance=nan must be"), (["--device", "foo"], "--device is cpu"), (["--count", "0"], "--count must be at least 1"), (["--judge", "x.pt"], "the judge"), (["--words", "x.pt"], "the checkpoint for --words"),
                           (["--words", "x.pt", "--diffusion", diffusion], "--words is for"), (["--set", "blend_at=3"], "must be 1, 2, 4 or 8")):
        assert words in error("generate.py", *options)
    assert "name their folder with --extra" in error("tbps.py", "--min-score", "words=0")


# ---- the oracle of the toy people -----------------------------------------------------------------------------------

def test_the_oracle(tmp_path, monkeypatch):
    """Pairs painted by hand: the right colour is reached, an untouched picture is not, a repainted rest is noticed."""
    records = lab.people.draw("few", persons=30)
    monkeypatch.setattr(lab.people, "draw", lambda *_, **__: records)
    (tmp_path / "imgs").mkdir()
    entries, kinds = [], ["right", "untouched", "all over"]
    able = [i for i, r in enumerate(records) if {"top", "bottom"} <= r["visible"] and r["attributes"]["top_colour"] not in ("green", "black")
            and r["attributes"]["bottom_colour"] not in ("green", "black", "navy")]
    for n, i in enumerate(able[:30]):
        r, kind = records[i], kinds[n % 3]
        picture = r["image"].astype(float)
        light = picture[check_generated.plain(r, "bottom")].mean() / np.mean(lab.people.PALETTE[r["attributes"]["bottom_colour"]])
        for region in dict(right=["top"], untouched=[]).get(kind, ["top", "bottom"]):
            picture[check_generated.plain(r, region)] = light * np.array(lab.people.PALETTE["green"])
        Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(tmp_path / f"imgs/{n}.png")
        entries.append(dict(image=f"{n}.png", pid=n, split="train", captions=["x"], source_image=f"toy-few {i}", scores=dict(kind=kinds.index(kind)),
                            edit=dict(what="colour", noun="shirt", old=r["attributes"]["top_colour"], new="green")))
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, entries)))
    assert len(entries) == 30
    everything = check_generated.score(tmp_path)
    assert everything["show the new colour, %"] == pytest.approx(66.7, abs=4) and everything["keep all other colours, %"] == pytest.approx(66.7, abs=7)
    assert everything["both, %"] == pytest.approx(33.3, abs=4) and everything["pairs"] == 30
    worst = check_generated.score(tmp_path, ["kind=2"])
    assert worst["pass the filter, %"] == pytest.approx(33.3, abs=0.1) and worst["both, %"] < 10 and worst["change outside, % of the range"] > 1


def test_a_model_of_the_hub(diffusion, tmp_path, monkeypatch):
    """From the hub's cache, as the hub leaves it there, without network; and what is said if it is not there."""
    import huggingface_hub
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    cached, commit = tmp_path / "models--someone--tiny-sd", "a" * 40
    shutil.copytree(diffusion, cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    (cached / "refs/main").write_text(commit)
    assert generate.find_diffusion("someone/tiny-sd") == cached / "snapshots" / commit
    assert generate.load_diffusion("someone/tiny-sd", steps=3).unet.config.cross_attention_dim == generate.load_diffusion(diffusion, steps=3).unet.config.cross_attention_dim
    with pytest.raises(FileNotFoundError, match="the hub cannot give it"):
        generate.find_diffusion("someone/else")
