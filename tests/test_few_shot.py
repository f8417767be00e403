"""CoOp and CLIP-Adapter: a prompt is words before the caption, an adapter makes a part of the feature."""

import pytest
import torch

import data
import tbps
from conftest import error, run
from lab import few_shot

COOP, ADAPTER = few_shot.METHODS["coop"][0], few_shot.METHODS["adapter"][0]


def small_model(people):
    torch.manual_seed(0)
    tokenizer = data.train_tokenizer([c for r in people for c in r["captions"]], vocab=700)
    arch = dict(embed=64, image_size=(32, 16), patch=8, image_width=64, image_layers=2, text_width=64, text_layers=2,
                vocab=tokenizer.vocab, head_width=32)
    return few_shot.FewShotEncoder(**arch).eval(), tokenizer


def learned(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def test_a_prompt_is_words_before_the_caption(people):
    model, tokenizer = small_model(people)
    prompt, too_long = "a pedestrian photo of", " ".join(["a black bag"] * 40)
    captions = ["a man in a red coat", "a woman", too_long]
    M = len(tokenizer.bpe.encode(prompt).ids)
    want = model.encode_text(tokenizer([f"{prompt} {c}" for c in captions]))
    few_shot.add_learned_parts(model, COOP, tokenizer)
    assert list(learned(model)) == ["text.tok.prompt"] and model.text.tok.prompt.shape == (M, 64)
    found = model.encode_text(tokenizer(captions))                      # the last caption loses words, not its EOT
    assert torch.allclose(found, want, atol=1e-6)
    assert torch.allclose(found[:2], model.encode_text(tokenizer(captions[:2])), atol=1e-6)
    assert torch.allclose(found[0], model.text_tokens(tokenizer(captions[:1]))[0, -1], atol=1e-6)
    model.text.tok.prompt.mul_(2)
    assert not torch.allclose(model.encode_text(tokenizer(captions)), want, atol=1e-3)
    with pytest.raises(ValueError, match="makes 0 tokens"):
        few_shot.add_learned_parts(small_model(people)[0], COOP | dict(prompt=" "), tokenizer)


@torch.no_grad()
def test_an_adapter_makes_a_fraction_of_the_feature(people):
    model, tokenizer = small_model(people)
    pixels = torch.randn(3, 3, 32, 16)
    feature = model.encode_image(pixels)
    few_shot.add_learned_parts(model, ADAPTER, tokenizer)
    down, up = learned(model).values()
    assert down.shape == (16, 64)
    want = 0.4 * (feature @ down.T).relu() @ up.T + 0.6 * feature
    assert torch.allclose(model.encode_image(pixels), want, atol=1e-6)


@pytest.mark.parametrize("recipe", [COOP, ADAPTER])
def test_micro_batches_give_the_same_gradient(recipe, people):
    model, tokenizer = small_model(people)
    few_shot.add_learned_parts(model.double(), recipe, tokenizer)
    model.double()
    pixels, tokens = torch.randn(4, 3, 32, 16).double(), tokenizer([r["captions"][0] for r in people[:4]])

    def gradients(micro_batch):
        model.micro_batch = micro_batch
        model.zero_grad()
        (model.encode_image(pixels) @ model.encode_text(tokens).T).sin().sum().backward()
        return [p.grad.clone() for p in learned(model).values()]
    for whole, micro in zip(gradients(0), gradients(3)):
        assert whole.abs().sum() > 0 and torch.allclose(whole, micro, rtol=1e-9, atol=1e-12)


NEW = {"coop": {"text.tok.prompt"}, "adapter": {"adapter.0.weight", "adapter.2.weight"}}


@pytest.mark.parametrize("method", few_shot.METHODS)
def test_a_run_trains_nothing_else(method, cuhk, tmp_path):
    options = ["--dataset", "cuhk", "--data-root", cuhk, "--workers", "0"]
    small = ["--set", "batch=8", "epochs=1", "height=96", "width=48", "warmup=0"]
    run("tbps.py", *options, "--method", "baseline", "--clip", "none", "--size", "toy", "--out", tmp_path / "a", *small)

    def train(start, out, *more):
        folders = ["--clip", tmp_path / start / "best.pt", "--out", tmp_path / out]
        return run("lab/few_shot.py", *options, "--method", method, *folders, *small, *more)

    def weights(name):
        return torch.load(tmp_path / name / "best.pt", weights_only=True)["weights"]
    said, before, after = train("a", "b"), weights("a"), weights("b")
    assert after.keys() - before.keys() == NEW[method] and all(torch.equal(before[n], after[n]) for n in before)
    count = f"{method}: {sum(after[n].numel() for n in NEW[method]):,} parameters trained"
    assert count in said and "test R@1" in said
    assert count in train("b", "c", "lr=0", "lr_start=0", "lr_end=0")    # a run may start from what another has learned
    assert all(torch.equal(w, weights("c")[n]) for n, w in after.items()) and weights("c").keys() == after.keys()
    for command in (["tbps.py", *options, "--clip", tmp_path / "b/best.pt", "--out", tmp_path / "d", *small],
                    ["eval.py", "--checkpoint", tmp_path / "b/best.pt"]):
        assert "only lab/few_shot.py knows those" in run(*command, code=2)


def test_a_checkpoint_of_the_first_edition(cuhk, tmp_path):
    """Its architecture names a prompt and an adapter, both off unless a few-shot method wrote it."""
    small = ["--size", "toy", "--set", "batch=8", "epochs=1", "height=96", "width=48", "warmup=0"]
    run("tbps.py", "--dataset", "cuhk", "--data-root", cuhk, "--workers", "0", "--clip", "none", "--method", "baseline",
        "--out", tmp_path / "a", *small)
    saved = torch.load(tmp_path / "a/best.pt", weights_only=True)
    torch.save(saved | dict(arch=saved["arch"] | dict(prompt=0, adapter=0.0)), tmp_path / "old.pt")
    model = tbps.load_checkpoint(tmp_path / "old.pt")[0]
    assert all(torch.equal(w, saved["weights"][n]) for n, w in model.state_dict().items())
    torch.save(saved | dict(arch=saved["arch"] | dict(prompt=4, adapter=0.0)), tmp_path / "old.pt")
    with pytest.raises(ValueError, match="lab/few_shot.py"):
        tbps.load_checkpoint(tmp_path / "old.pt")


def test_mistakes(cuhk, tmp_path):
    command = ["lab/few_shot.py", "--dataset", "cuhk", "--data-root", cuhk, "--out", tmp_path / "r"]
    assert "learn around trained encoders" in error(*command, "--method", "coop", "--clip", "none")
    assert "--method is coop or adapter here" in error(*command)
    assert "adapter=2.0 must be" in error(*command, "--method", "adapter", "--set", "adapter=2")
