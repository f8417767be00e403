"""PDG on synthetic pedestrians: a small diffusion model is trained, pairs are made, scored, and trained on."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import data
import generate
import lab.people
import tbps
from conftest import error, run
from lab import train_diffusion

TINY = ["--set", "train_epochs=1", "train_batch=4", "steps=2"]


def weights(folder):
    return load_file(f"{folder}/unet/diffusion_pytorch_model.safetensors")


@pytest.fixture(scope="module")
def work(people, tmp_path_factory):
    """A folder with a checkpoint c/best.pt, a diffusion model m, and pairs p made with it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("work"))
        patch.setattr(lab.people, "draw", lambda split, **_: people[:8] if split in ("train", "few") else people[8:24])
        run("tbps.py", "--out", "c", "--set", "epochs=1", "batch=4")
        said = run("lab/train_diffusion.py", "--epochs", "2", "--batch", "4", "--out", "m")
        assert "8 images" in said and "epoch 2/2" in said
        said = run("generate.py", "--count", "3", "--diffusion", "m", "--out", "p", "--judge", "c/best.pt", *TINY)
        assert "3 pairs in p" in said
        yield


def test_the_command_that_trains(work):
    """Its weights are in fp16, read back as fp32; both parts were trained."""
    assert all(w.dtype == torch.float16 for w in weights("m").values())
    model, start = generate.load_diffusion("m"), train_diffusion.toy_model()
    for part in ("unet", "text_encoder"):
        pairs = list(zip(getattr(model, part).parameters(), getattr(start, part).parameters()))
        assert all(a.dtype == torch.float32 for a, _ in pairs) and any(not torch.equal(a, b) for a, b in pairs)
    assert model.tokenizer.merges == start.tokenizer.merges and model.patch == 2
    assert model.scheduler.config.prediction_type == "v_prediction" and model.scheduler.config.beta_end == 0.02


def test_every_garment_weighs_the_same(people):
    """The pixels of a hat together as much as those of a coat, beside the weight that every pixel has."""
    weights = torch.stack([train_diffusion.region_weights(record) for record in people])
    assert torch.allclose(weights.mean(dim=(1, 2, 3)), torch.ones(len(people)))
    for record, weight in zip(people, weights[:, 0]):
        extra = (weight / weight.min() - 1).numpy()
        sums = [extra[lab.people.mask(record, region)].sum() for region in train_diffusion.REGIONS]
        assert all(total == pytest.approx(0.1 * extra.size, rel=1e-4) for total in sums if total)


def test_patches_of_pixels(work, people):
    """Latents of a model without VAE are the pixels, four of them as channels."""
    model, pixels = generate.load_diffusion("m"), torch.rand(2, 3, 8, 4)
    z = model.encode(pixels)
    assert z.shape == (2, 12, 4, 2) and torch.allclose(model.decode(z), pixels, atol=1e-6)
    assert torch.equal(z[:, :, 1, 0], 2 * pixels[:, :, 2:4, 0:2].flatten(1) - 1)


def test_scores_are_read_by_training(work):
    entries = [json.loads(line) for line in Path("p/pairs.jsonl").read_text().splitlines()]
    assert all(-2 < e["scores"]["words"] < 2 and e["source_image"].startswith("toy ") for e in entries)
    best = max(e["scores"]["words"] for e in entries)
    said = run("tbps.py", "--out", "d", "--extra", "p", "--min-score", f"words={best}", "--set", "epochs=1", "batch=4")
    assert "p: 1 of 3 generated pairs have these scores" in said
    page = Path("p/report.html").read_text()
    assert generate.SCORES["words"] in page and generate.SCORES["direction"] in page


def test_finetune_changes_the_unet_only(work):
    options = ["--diffusion", "m", "--finetune", "tuned", "--count", "1"]
    run("generate.py", *options, "--out", "f", *TINY)
    before, tuned = weights("m"), weights("tuned")
    assert any(not torch.equal(before[name].float(), tuned[name]) for name in before)
    a, b = (load_file(f"{folder}/text_encoder/model.safetensors") for folder in ("m", "tuned"))
    assert all(torch.equal(a[name].float(), b[name]) for name in a)
    other = ["generate.py", *options, "--out", "g", *TINY, "train_lr=0.1"]
    assert "train_lr 0.0001 then, 0.1 now): remove it" in error(*other)
    assert "seed 0 then, 1 now" in error("generate.py", *options, "--seed", "1", "--out", "g", *TINY)
    assert "must be multiples of 2" in error("generate.py", "--diffusion", "m", "--out", "g", *TINY, "height=95")


def test_the_text_encoder_is_that_of_the_toy_clip():
    """At the end symbol it gives the text feature before the projection."""
    encoder, tokenizer, _ = tbps.load_model(tbps.TOY_CLIP)
    model, caption = train_diffusion.toy_model(), ["a man in a red coat"]
    tokens = tokenizer(caption)
    hidden = model.encode_text(caption)[0, tokens.argmax()]
    assert torch.allclose(hidden @ encoder.text.proj, encoder.encode_text(tokens)[0], atol=1e-5)


@pytest.mark.parametrize("source", ["c/best.pt", tbps.TOY_CLIP], ids=["checkpoint", "folder"])
def test_the_judge(source, work, people):
    """Its scores if nothing changes, and if all changes as the caption says."""
    judge, edit = generate.Judge(source, "cpu"), dict(caption="a man in a red coat", source="a man in a blue coat")
    one, two = (data.load_image(r["image"]) for r in people[:2])
    still, moved = judge([one, one], [one, two], [edit, edit])
    with torch.no_grad():
        change = judge.embed_texts([edit["caption"]]) - judge.embed_texts([edit["source"]])
        a, b = judge.embed_images([one]), judge.embed_images([two])
    assert a.norm().item() == pytest.approx(1, abs=1e-5)
    assert still["direction"] == pytest.approx(0, abs=1e-4)
    assert still["words"] == pytest.approx((a @ change.T).item(), abs=1e-5)
    assert moved["direction"] == pytest.approx(F.cosine_similarity(b - a, change).item(), abs=1e-4)


def test_words_of_regions():
    captions = ["A man in a red shirt and blue pants", ""]
    tokenizer = tbps.load_model(tbps.TOY_CLIP)[1]
    words = train_diffusion.words_of_regions(captions, tokenizer)
    tokens = tokenizer(captions[:1])[0].tolist()
    found = {region: [tokenizer.bpe.decode([tokens[n]]).removesuffix("</w>") for n in row.nonzero()[:, 0].tolist()]
             for region, row in zip(train_diffusion.REGIONS, words[0]) if row.any()}
    assert found == dict(top=["red", "shirt"], bottom=["blue", "pants"]) and not words[1].any()


def test_the_loss_of_the_attention():
    """0 where the pixels of a garment look at its words only, log(77 / 2) if they look at all alike."""
    words, masks = torch.zeros(1, 6, 77), torch.zeros(1, 6, 8, 4)
    words[0, 2, 5:7], masks[0, 2, :4] = 1, 1
    k = torch.zeros(1, 1, 77, 2)
    k[0, 0, 5:7, 0] = 100
    looks, alike = torch.zeros(1, 1, 8, 2), torch.zeros(1, 1, 8, 2)     # 4 x 2 positions; the upper half is the top
    looks[0, 0, :4, 0] = 1
    assert train_diffusion.attention_loss([(looks, k)], words, masks).item() == pytest.approx(0, abs=1e-5)
    assert train_diffusion.attention_loss([(alike, k)], words, masks).item() == pytest.approx(3.651, abs=1e-3)
    assert train_diffusion.attention_loss([(looks, k)], 0 * words, masks).item() == 0       # a caption without garments
