"""The dual encoder: one token equals all tokens, any size and stride, dropout; a full-size run on real layouts (slow)."""

import pytest
import torch
from safetensors.torch import save_file

import data
import tbps
from conftest import run
from tiny_clip import TOKENS, hugging_face, torchscript, write

# ---- the encoder itself ---------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return tbps.DualEncoder(**tbps.SIZES["toy"] | dict(vocab=100)).double().eval()


def test_one_token_equals_all_tokens(model):
    """encode_* compute the last block for one token only; image_tokens and text_tokens for all. The padding changes nothing."""
    pixels, tokens = torch.randn(2, 3, 96, 48, dtype=torch.float64), TOKENS
    torch.testing.assert_close(model.encode_image(pixels), model.image_tokens(pixels)[:, 0])
    torch.testing.assert_close(model.encode_text(tokens), model.text_tokens(tokens)[range(2), [4, 6]])
    assert model.text_tokens(tokens).shape[1] == 7
    whole = (model.text.ln_post(model.text(tokens)) @ model.text.proj)[range(2), [4, 6]]                  # all 77 positions
    torch.testing.assert_close(model.encode_text(tokens), whole)
    later = tokens.clone()
    later[0, 5:7] = 50                                                  # behind EOT, where nothing can look
    torch.testing.assert_close(model.encode_text(later)[0], model.encode_text(tokens)[0])


@pytest.mark.parametrize("size, stride, grid", [((384, 128), 16, (24, 8)), ((384, 128), 12, (31, 10)), ((224, 224), 16, (14, 14)), ((50, 40), 16, (3, 2))])
def test_any_size_and_stride(size, stride, grid):
    model = tbps.DualEncoder(embed=16, image_size=size, patch=16, stride=stride, image_width=64, image_layers=1, text_width=64, text_layers=1, vocab=50)
    assert model.image.grid == grid and model.image_tokens(torch.zeros(1, 3, *size)).shape == (1, 1 + grid[0] * grid[1], 16)


def test_positions_are_stretched(tmp_path, capsys):
    path = write("state dict", tmp_path)
    model = tbps.load_clip(path, image_size=(48, 16), stride=4)
    assert model.image.grid == (11, 3) and "positions from 3x3 to 11x3" in capsys.readouterr().out
    pos = torch.cat([torch.full((1, 2), 7.0), torch.arange(9.0).reshape(9, 1).repeat(1, 2)])             # rows 0 1 2 / 3 4 5 / 6 7 8
    tall = tbps.resize_pos(pos, (3, 3), (6, 3))
    assert tall[0].tolist() == [7, 7] and tall.shape == (19, 2)
    assert tall[1:, 0].reshape(6, 3)[:, 1].tolist() == pytest.approx([1, 1.75, 3.25, 4.75, 6.25, 7])      # bilinear, half-pixel centres
    assert torch.equal(tbps.resize_pos(pos, (3, 3), (3, 3)), pos)


def test_dropout_is_on_the_texts_attention_only():
    torch.manual_seed(0)
    model = tbps.DualEncoder(**tbps.SIZES["toy"] | dict(vocab=100), text_dropout=0.5).train()
    pixels = torch.randn(2, 3, 96, 48)
    assert torch.equal(model.encode_image(pixels), model.encode_image(pixels))
    assert not torch.equal(model.encode_text(TOKENS), model.encode_text(TOKENS))
    model.eval()
    assert torch.equal(model.encode_text(TOKENS), model.encode_text(TOKENS))
    assert not any(isinstance(m, torch.nn.Dropout) for m in model.modules())


def test_patches_are_dropped_in_training_only(monkeypatch):
    torch.manual_seed(0)
    model = tbps.DualEncoder(**tbps.SIZES["toy"] | dict(vocab=100), patch_drop=0.75).train()
    pixels, seen = torch.randn(2, 3, 96, 48), []
    model.image.blocks[0].register_forward_pre_hook(lambda block, x: seen.append(x[0].shape))
    torch.manual_seed(1)
    features = model.encode_image(pixels)
    torch.manual_seed(1)
    chosen = torch.rand(2, 72).argsort(dim=1)[:, :18]
    with monkeypatch.context() as m:
        m.setattr(model.image, "patch_drop", 0.0)
        assert torch.allclose(model.image.project(model.image(pixels, keep=chosen)[:, 0]), features, atol=1e-5)
        assert not torch.allclose(model.encode_image(pixels), features, atol=1e-2)
    assert not torch.allclose(model.encode_image(pixels), features, atol=1e-2)                          # another draw
    model.eval()
    assert torch.equal(model.encode_image(pixels), model.encode_image(pixels))
    assert seen == [(2, 19, 128), (2, 19, 128), (2, 73, 128), (2, 19, 128), (2, 73, 128), (2, 73, 128)]


# ---- full size ------------------------------------------------------------------------------------------------------

@pytest.mark.slow
@pytest.mark.parametrize("name, layout", [("cuhk", "torchscript"), ("icfg", "Hugging Face safetensors"), ("rstp", "state dict")])
def test_vit_b16_trains_on_real_layouts(name, layout, tmp_path, request):
    """All of it at full size: a ViT-B/16 in an archive, a directory in the set's layout, `--clip FILE`, a few steps, scores."""
    from conftest import run
    root = request.getfixturevalue(name)
    torch.manual_seed(0)
    ours = tbps.DualEncoder(**tbps.SIZES["ViT-B/16"])
    back = [(r"^image\.", "visual."), (r"^text\.", ""), (r"blocks\.", "transformer.resblocks."), (r"attn\.qkv\.", "attn.in_proj_"),
            (r"attn\.proj", "attn.out_proj"), (r"\.ln([12])\.", r".ln_\1."), (r"fc1", "mlp.c_fc"), (r"fc2", "mlp.c_proj"), (r"patch\.", "conv1."),
            (r"cls$", "class_embedding"), (r"^tok\.", "token_embedding."), (r"(^|\.)pos$", r"\1positional_embedding"), (r"^proj$", "text_projection"),
            (r"^ln_post", "ln_final")]
    weights = {}
    for n, w in ours.state_dict().items():
        for pattern, replacement in back:
            n = tbps.re.sub(pattern, replacement, n)
        weights[n] = w
    assert sum(w.numel() for w in weights.values()) == 149_620_737
    folder = tmp_path / "clip"
    folder.mkdir()
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(made_up_merges(48894)))
    if layout == "torchscript":
        torchscript(weights).save(str(folder / "ViT-B-16.pt"))
    elif layout == "state dict":
        torch.save(weights, folder / "clip.pt")
    else:
        save_file(hugging_face(weights), folder / "model.safetensors")
    source = next(f for f in folder.iterdir() if f.suffix in (".pt", ".safetensors"))
    said = run("tbps.py", "--dataset", name, "--data-root", root, "--clip", source, "--workers", "0", "--out", tmp_path / "r", "--set", "batch=6",
               "epochs=1", "warmup=0.5")
    assert "tbps-clip: 149,162,625 parameters trained of 149,752,449" in said and said.splitlines()[-1].startswith("test R@1")
    assert "test R@1" in said and (tmp_path / "r/best.pt").exists()


def made_up_merges(number):
    """A list of merges as long as CLIP's, for tests without OpenAI's file."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    pairs = [f"{a} {b}" for a in letters for b in letters]
    triples = [f"{a}{b} {c}" for a in letters for b in letters for c in letters]
    quads = [f"{a}{b}{c} {d}" for a in letters for b in letters for c in letters for d in letters]
    return (pairs + triples + quads)[:number]


# ---- small parts around encoders that do not learn --------------------------------------------------------------------

def little(people):
    torch.manual_seed(0)
    tokenizer = data.train_tokenizer([c for r in people for c in r["captions"]], vocab=700)
    return tbps.DualEncoder(64, (32, 16), 8, 64, 2, 64, 2, tokenizer.vocab, head_width=32).eval(), tokenizer


@torch.no_grad()
def test_a_prompt_is_words_before_the_caption(people):
    model, tokenizer = little(people)
    prompt, captions = "a pedestrian photo of", ["a man in a red coat", "a woman", " ".join(["a black bag"] * 40)]
    M = len(tokenizer.bpe.encode(prompt).ids)
    want = model.encode_text(tokenizer([f"{prompt} {c}" for c in captions]))
    tbps.adapt(model, tbps.COOP, tokenizer)
    assert model.text.prompt.shape == (M, 64) and [n for n, p in model.named_parameters() if p.requires_grad] == ["text.prompt"]
    found = model.encode_text(tokenizer(captions))                      # the last one has no room for all of it: its end stays
    assert torch.allclose(found, want, atol=1e-6) and torch.allclose(found[:2], model.encode_text(tokenizer(captions[:2])), atol=1e-6)
    model.text.prompt.data.mul_(2)
    assert not torch.allclose(model.encode_text(tokenizer(captions)), want, atol=1e-3)
    with pytest.raises(ValueError, match="makes 0 tokens"):
        tbps.adapt(little(people)[0], tbps.COOP | dict(prompt=" "), tokenizer)


@torch.no_grad()
def test_an_adapter_is_a_share_of_the_feature(people):
    model, tokenizer = little(people)
    pixels = torch.randn(3, 3, 32, 16)
    f = model.encode_image(pixels)
    tbps.adapt(model, tbps.ADAPTER, tokenizer)
    down, up = (p for n, p in model.named_parameters() if p.requires_grad)
    assert down.shape == (16, 64) and torch.allclose(model.encode_image(pixels), 0.4 * (f @ down.T).relu() @ up.T + 0.6 * f, atol=1e-6)


@pytest.mark.parametrize("method", ["coop", "adapter"])
def test_a_run_trains_nothing_else(method, people, cuhk, tmp_path):
    base = ["tbps.py", "--dataset", "cuhk", "--data-root", cuhk, "--clip", "none", "--size", "toy", "--workers", "0", "--set", "batch=8", "epochs=1", "height=96", "width=48", "warmup=0"]
    run(*base, "--method", "baseline", "--out", tmp_path / "a")
    base[base.index("none")] = tmp_path / "a/best.pt"
    said = run(*base, "--method", method, "--out", tmp_path / "b")
    a, b = (torch.load(tmp_path / f"{n}/best.pt", weights_only=True)["weights"] for n in "ab")
    new = {"coop": {"text.prompt"}, "adapter": {"image.adapter.0.weight", "image.adapter.2.weight"}}[method]
    assert b.keys() - a.keys() == new and all(torch.equal(a[n], b[n]) for n in a)
    assert f"{method}: {sum(b[n].numel() for n in new):,} parameters trained" in said
    start = tbps.load_clip(tmp_path / "b/best.pt")                      # where another run may start
    assert all(torch.equal(w, b[n]) for n, w in start.state_dict().items())
    base[base.index(tmp_path / "a/best.pt")] = tmp_path / "b/best.pt"
    assert f"{method}: {sum(b[n].numel() for n in new):,} parameters trained" in run(*base, "lr=0", "lr_start=0", "lr_end=0", "--method", method, "--out", tmp_path / "c")
    c = torch.load(tmp_path / "c/best.pt", weights_only=True)["weights"]
    assert c.keys() == b.keys() and all(torch.equal(c[n], b[n]) for n in b)
    if method == "coop":
        assert "for which ctlg has no place" in run(*base, "--method", "ctlg", "--out", tmp_path / "d", code=2)

