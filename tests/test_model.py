"""The dual encoder: one token equals all tokens, any size and stride, dropout; a full-size run (slow)."""

import pytest
import torch
from safetensors.torch import save_file

import tbps
from conftest import run
from tiny_clip import TOKENS, hugging_face, torchscript, write

# ---- the encoder itself ---------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return tbps.DualEncoder(**tbps.SIZES["toy"] | dict(vocab=100)).double().eval()


def test_one_token_equals_all_tokens(model):
    """encode_* compute the last block for one token only, *_tokens for all. The padding changes nothing."""
    pixels, tokens = torch.randn(2, 3, 96, 48, dtype=torch.float64), TOKENS
    torch.testing.assert_close(model.encode_image(pixels), model.image_tokens(pixels)[:, 0])
    torch.testing.assert_close(model.encode_text(tokens), model.text_tokens(tokens)[range(2), [4, 6]])
    assert model.text_tokens(tokens).shape[1] == 7
    all_positions = model.text.ln_post(model.text(tokens)) @ model.text.proj
    whole = all_positions[range(2), [4, 6]]
    torch.testing.assert_close(model.encode_text(tokens), whole)
    later = tokens.clone()
    later[0, 5:7] = 50                                                  # behind EOT, where nothing can look
    torch.testing.assert_close(model.encode_text(later)[0], model.encode_text(tokens)[0])


@pytest.mark.parametrize("size, stride, grid", [
    ((384, 128), 16, (24, 8)), ((384, 128), 12, (31, 10)), ((224, 224), 16, (14, 14)), ((50, 40), 16, (3, 2))])
def test_any_size_and_stride(size, stride, grid):
    model = tbps.DualEncoder(embed=16, image_size=size, patch=16, stride=stride, image_width=64, image_layers=1,
                             text_width=64, text_layers=1, vocab=50)
    assert model.image.grid == grid
    assert model.image_tokens(torch.zeros(1, 3, *size)).shape == (1, 1 + grid[0] * grid[1], 16)


def test_positions_are_stretched(tmp_path, capsys):
    path = write("state dict", tmp_path)
    model = tbps.load_clip(path, image_size=(48, 16), stride=4)
    assert model.image.grid == (11, 3) and "positions from 3x3 to 11x3" in capsys.readouterr().out
    rows = torch.arange(9.0).reshape(9, 1).repeat(1, 2)                 # 0 1 2 / 3 4 5 / 6 7 8
    pos = torch.cat([torch.full((1, 2), 7.0), rows])
    tall = tbps.resize_pos(pos, (3, 3), (6, 3))
    assert tall[0].tolist() == [7, 7] and tall.shape == (19, 2)
    column = tall[1:, 0].reshape(6, 3)[:, 1].tolist()
    assert column == pytest.approx([1, 1.75, 3.25, 4.75, 6.25, 7])      # bilinear, half-pixel centres
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


# ---- full size ------------------------------------------------------------------------------------------------------

@pytest.mark.slow
@pytest.mark.parametrize("name, layout", [
    ("cuhk", "torchscript"), ("icfg", "Hugging Face safetensors"), ("rstp", "state dict")])
def test_vit_b16_trains_on_real_layouts(name, layout, tmp_path, request):
    """All of it at full size: a ViT-B/16 in a file, a data set in its layout, `--clip FILE`, a few steps, scores."""
    root = request.getfixturevalue(name)
    torch.manual_seed(0)
    ours = tbps.DualEncoder(**tbps.SIZES["ViT-B/16"])
    back = [
        (r"^image\.", "visual."), (r"^text\.", ""), (r"blocks\.", "transformer.resblocks."),
        (r"attn\.qkv\.", "attn.in_proj_"), (r"attn\.proj", "attn.out_proj"), (r"\.ln([12])\.", r".ln_\1."),
        (r"fc1", "mlp.c_fc"), (r"fc2", "mlp.c_proj"), (r"patch\.", "conv1."), (r"cls$", "class_embedding"),
        (r"^tok\.", "token_embedding."), (r"(^|\.)pos$", r"\1positional_embedding"), (r"^proj$", "text_projection"),
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
    said = run("tbps.py", "--dataset", name, "--data-root", root, "--clip", source, "--workers", "0",
               "--out", tmp_path / "r", "--set", "batch=6", "epochs=1", "warmup=0.5")
    assert "tbps-clip: 149,162,625 parameters trained of 149,752,449" in said
    assert said.splitlines()[-1].startswith("test R@1")
    assert "test R@1" in said and (tmp_path / "r/best.pt").exists()


def made_up_merges(number):
    """A list of merges as long as CLIP's, for tests without OpenAI's file."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    pairs = [f"{a} {b}" for a in letters for b in letters]
    triples = [f"{a}{b} {c}" for a in letters for b in letters for c in letters]
    quads = [f"{a}{b}{c} {d}" for a in letters for b in letters for c in letters for d in letters]
    return (pairs + triples + quads)[:number]
