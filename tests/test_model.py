"""The dual encoder and its weights: outputs equal to stored ones of open_clip and transformers, in every file format; what is wrong
with a file is said."""

import json
import math
import types

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

import data
import tbps
from conftest import run

# ---- a tiny CLIP by formula -----------------------------------------------------------------------------------------


def openai_tiny():
    """A tiny CLIP with OpenAI's names, weights by a formula: image 24x24 in patches of 8, widths 128 and 64, 2 + 2 layers, vocab 100."""
    shapes = {"logit_scale": (), "positional_embedding": (77, 64), "text_projection": (64, 32), "token_embedding.weight": (100, 64),
              "ln_final.weight": (64,), "ln_final.bias": (64,), "visual.class_embedding": (128,), "visual.conv1.weight": (128, 3, 8, 8),
              "visual.positional_embedding": (10, 128), "visual.proj": (128, 32)}
    for ln in ("pre", "post"):
        shapes |= {f"visual.ln_{ln}.weight": (128,), f"visual.ln_{ln}.bias": (128,)}
    for tower, c in (("visual.", 128), ("", 64)):
        for i in range(2):
            b = f"{tower}transformer.resblocks.{i}."
            shapes |= {b + "attn.in_proj_weight": (3 * c, c), b + "attn.in_proj_bias": (3 * c,), b + "attn.out_proj.weight": (c, c),
                       b + "attn.out_proj.bias": (c,), b + "ln_1.weight": (c,), b + "ln_1.bias": (c,), b + "mlp.c_fc.weight": (4 * c, c),
                       b + "mlp.c_fc.bias": (4 * c,), b + "mlp.c_proj.weight": (c, 4 * c), b + "mlp.c_proj.bias": (c,),
                       b + "ln_2.weight": (c,), b + "ln_2.bias": (c,)}
    weights = {}
    for j, name in enumerate(sorted(shapes)):
        v = torch.sin(0.7 * torch.arange(math.prod(shapes[name]), dtype=torch.float64) ** 2 + j).reshape(shapes[name])
        if name == "logit_scale":
            v = torch.tensor(math.log(50))
        elif v.ndim == 1:                                               # far from default: else swapped norms and biases would not show
            v = 1 + 0.3 * v if "ln_" in name and name.endswith("weight") else 0.3 * v
        else:
            v = 0.2 * v
        weights[name] = v.float()
    return weights


PIXELS = torch.sin(0.37 * torch.arange(2 * 3 * 24 * 24, dtype=torch.float64) ** 2).reshape(2, 3, 24, 24).float()
TOKENS = torch.tensor([[98, 5, 17, 3, 99] + [0] * 72, [98, 42, 7, 61, 12, 9, 99] + [0] * 70])
# The first 6 numbers of the normalised features by open_clip 3.3.0 and transformers 5.23.0, which agree to 5e-7 (torch 2.15.0)
IMAGE = [[-0.072438, 0.270198, -0.176082, 0.021714, 0.227601, 0.019013], [-0.076739, -0.010217, 0.045138, -0.061305, 0.286021, 0.018479]]
TEXT = [[0.244224, 0.018627, -0.036235, 0.414016, -0.024884, -0.048382], [0.309104, -0.078431, -0.066777, 0.190527, -0.288913, 0.069183]]


def hugging_face(weights):
    """OpenAI's names -> those of transformers' CLIPModel, written down independently of tbps.py."""
    out = {}
    for name, w in weights.items():
        tower, rest = ("vision_model", name.removeprefix("visual.")) if name.startswith("visual.") else ("text_model", name)
        if ".resblocks." in rest:
            _, _, i, part = rest.split(".", 3)
            base = f"{tower}.encoder.layers.{i}."
            if part.startswith("attn.in_proj_"):
                for letter, third in zip("qkv", w.chunk(3)):
                    out[f"{base}self_attn.{letter}_proj.{part.removeprefix('attn.in_proj_')}"] = third.clone()
            else:
                module, kind = part.rsplit(".", 1)
                out[base + {"attn.out_proj": "self_attn.out_proj", "ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1",
                            "mlp.c_proj": "mlp.fc2"}[module] + "." + kind] = w
        else:
            turned = w.T.contiguous() if w.ndim == 2 else w
            out |= {"class_embedding": {"vision_model.embeddings.class_embedding": w}, "conv1.weight": {"vision_model.embeddings.patch_embedding.weight": w},
                    "positional_embedding": {f"{tower}.embeddings.position_embedding.weight": w}, "proj": {"visual_projection.weight": turned},
                    "token_embedding.weight": {"text_model.embeddings.token_embedding.weight": w}, "logit_scale": {"logit_scale": w},
                    "text_projection": {"text_projection.weight": turned}, "ln_final.weight": {"text_model.final_layer_norm.weight": w},
                    "ln_final.bias": {"text_model.final_layer_norm.bias": w}, "ln_pre.weight": {"vision_model.pre_layrnorm.weight": w},
                    "ln_pre.bias": {"vision_model.pre_layrnorm.bias": w}, "ln_post.weight": {"vision_model.post_layernorm.weight": w},
                    "ln_post.bias": {"vision_model.post_layernorm.bias": w}}[rest]
    return out


def torchscript(weights):
    """An archive as OpenAI's: a scripted module with these tensors, and three integers."""
    root = torch.nn.Module()
    integers = dict(input_resolution=torch.tensor(24), context_length=torch.tensor(77), vocab_size=torch.tensor(100))
    for name, w in (weights | integers).items():
        *path, leaf = name.split(".")
        module = root
        for part in path:
            if not hasattr(module, part):
                module.add_module(part, torch.nn.Module())
            module = getattr(module, part)
        module.register_buffer(leaf, w)
    root.forward = types.MethodType(lambda self: torch.zeros(1), root)
    return torch.jit.trace_module(root, {"forward": ()}, check_trace=False)


def write(kind, folder):
    """Saves the tiny CLIP in one of the formats; -> what to give to load_clip."""
    w = openai_tiny()
    if kind == "torchscript":
        torchscript(w).save(str(folder / "ViT.pt"))
        return folder / "ViT.pt"
    if kind == "torchscript in half precision":
        torchscript({n: t.half() for n, t in w.items()}).save(str(folder / "ViT.pt"))
        return folder / "ViT.pt"
    if kind == "state dict":
        torch.save(w, folder / "clip.pt")
        return folder / "clip.pt"
    if kind == "open_clip checkpoint":
        torch.save(dict(epoch=3, state_dict={f"module.{n}": t for n, t in w.items()}), folder / "epoch_3.pt")
        return folder / "epoch_3.pt"
    if kind == "open_clip safetensors":
        save_file(w, folder / "open_clip_model.safetensors")
        (folder / "open_clip_config.json").write_text(json.dumps(dict(model_cfg=dict(quick_gelu=True))))
    if kind == "open_clip bin":
        torch.save(w, folder / "open_clip_pytorch_model.bin")
    if kind == "Hugging Face safetensors":
        save_file(hugging_face(w), folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(dict(vision_config=dict(hidden_act="quick_gelu"))))
    if kind == "Hugging Face bin":
        torch.save(hugging_face(w) | {"text_model.embeddings.position_ids": torch.arange(77)[None]}, folder / "pytorch_model.bin")
    return folder


FORMATS = ["torchscript", "state dict", "open_clip checkpoint", "open_clip safetensors", "open_clip bin", "Hugging Face safetensors", "Hugging Face bin"]


def features(model):
    with torch.no_grad():
        return F.normalize(model.encode_image(PIXELS), dim=1), F.normalize(model.encode_text(TOKENS), dim=1)


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_gives_the_features_of_the_original(kind, tmp_path, capfd):
    model = tbps.load_clip(write(kind, tmp_path)).eval()
    image, text = features(model)
    torch.testing.assert_close(image[:, :6], torch.tensor(IMAGE), atol=2e-6, rtol=0)
    torch.testing.assert_close(text[:, :6], torch.tensor(TEXT), atol=2e-6, rtol=0)
    assert model.logit_scale.item() == pytest.approx(math.log(50)) and model.arch["image_size"] == (24, 24) and model.arch["vocab"] == 100
    out, err = capfd.readouterr()
    assert f"clip: {len(model.state_dict())} tensors" in out
    assert ("none that OpenAI published" in err) == (kind == "torchscript")


def test_half_precision_becomes_fp32(tmp_path):
    model = tbps.load_clip(write("torchscript in half precision", tmp_path)).eval()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert features(model)[0][:, :6].sub(torch.tensor(IMAGE)).abs().max() < 3e-3


@pytest.mark.parametrize("name", sorted({n.replace("resblocks.0", "resblocks.1") for n in openai_tiny()} - {"logit_scale"}))
def test_every_kind_of_tensor_matters(name, tmp_path):
    """Changed in the file, it changes the features; of the attention biases the part for k may not: softmax takes no notice."""
    weights = openai_tiny()
    change = torch.randn(weights[name].shape, generator=torch.Generator().manual_seed(0))
    if name.endswith("in_proj_bias"):
        change.chunk(3)[1].zero_()
    weights[name] = weights[name] + change
    torch.save(weights, tmp_path / "clip.pt")
    image, text = features(tbps.load_clip(tmp_path / "clip.pt").eval())
    moved = [(x[:, :6] - torch.tensor(y)).abs().max() > 1e-4 for x, y in ((image, IMAGE), (text, TEXT))]
    assert moved == ([True, False] if name.startswith("visual.") else [False, True])


def test_exact_gelu_is_read_from_the_configuration(tmp_path, capsys):
    write("Hugging Face safetensors", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(dict(vision_config=dict(hidden_act="gelu"))))
    model = tbps.load_clip(tmp_path).eval()
    assert not model.arch["quick_gelu"] and ", GELU (config.json)" in capsys.readouterr().out
    assert features(model)[0][:, :6].sub(torch.tensor(IMAGE)).abs().max() > 1e-3
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="config.json is not the configuration of a CLIP"):
        tbps.load_clip(tmp_path)


def test_what_is_wrong_with_a_file_is_said(tmp_path):
    weights, path = openai_tiny(), tmp_path / "clip.pt"

    def said(content):
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        with pytest.raises(ValueError) as e:
            tbps.load_clip(path)
        assert str(path) in str(e.value)
        return str(e.value)

    some = "visual.transformer.resblocks.1.ln_2.bias"
    assert "Git LFS pointer" in said(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert "ResNet image tower" in said(weights | {"visual.layer1.0.conv1.weight": torch.ones(1), "visual.attnpool.positional_embedding": torch.ones(1)})
    assert "lacks 1 tensors, e.g. image.blocks.1.ln2.bias" in said({n: w for n, w in weights.items() if n != some})
    assert "has a tensor classifier.weight for which" in said(weights | {"classifier.weight": torch.ones(1)})
    assert "image.blocks.1.ln2.bias is (127,) torch.float32, it should be (128,)" in said(weights | {some: weights[some][1:]})
    assert "of floating point" in said(weights | {some: weights[some].long()})
    assert "should have 2 dimensions" in said(weights | {"text_projection": torch.ones(5)})
    assert "neither a square grid" in said(weights | {"visual.positional_embedding": torch.ones(12, 128)})
    assert "layers" in said({n: w for n, w in weights.items() if not n.startswith("transformer.")})
    assert "no dict of named tensors but a list" in said([1]) and "not a dict of tensors" in said(dict(a=1))
    assert "more than one encoder" in said(dict(model={f"{p}.{n}": w for n, w in weights.items() for p in ("base_model", "ema_model")}))
    torch.save(weights, path)
    whole = path.read_bytes()
    for content in (b"", b"hello", whole[:len(whole) // 2], b"\x80\x02", b"PK\x03\x04"):
        assert "cannot be read as weights" in said(content)
    for content in (b"", b"{}", whole[:100]):
        (tmp_path / "model.safetensors").write_bytes(content)
        with pytest.raises(ValueError, match="cannot be read as weights"):
            tbps.load_clip(tmp_path / "model.safetensors")
    lacking = hugging_face(weights)
    del lacking["text_model.encoder.layers.1.self_attn.k_proj.bias"]
    assert "lacks text_model.encoder.layers.1.self_attn.k_proj.bias" in said(lacking)
    with pytest.raises(FileNotFoundError, match="should be at"):
        tbps.load_clip(tmp_path / "none.pt")
    with pytest.raises(FileNotFoundError, match="holds: nothing"):
        (tmp_path / "empty").mkdir()
        tbps.load_clip(tmp_path / "empty")


def test_without_network_the_hub_is_named(tmp_path, cuhk):
    from conftest import error
    said = error("tbps.py", "--dataset", "cuhk", "--data-root", cuhk, "--clip", "openai/clip-vit-base-patch16", "--out", tmp_path / "r")
    assert "no CLIP weights from openai/clip-vit-base-patch16: the hub cannot be reached" in said and "--clip none" in said


class EasyDict(dict):
    """As the package of that name: a dict whose entries are attributes too, which is what gets pickled."""

    def __init__(self, **entries):
        super().__init__(**entries)
        self.__dict__.update(entries)


def test_released_checkpoints(tmp_path, capsys, monkeypatch):
    """Of IRRA and RDE (384x128: 24 x 8 positions, no logit scale) and of TBPS-CLIP (its configuration pickled as an EasyDict)."""
    import sys
    weights = openai_tiny()
    tall = {n: w for n, w in weights.items() if n != "logit_scale"} | {"visual.positional_embedding": torch.randn(1 + 24 * 8, 128)}
    irra = {f"base_model.{n}": w for n, w in tall.items()} | {"classifier.weight": torch.ones(9, 32), "cross_attn.in_proj_weight": torch.ones(96, 32),
                                                              "cross_modal_transformer.resblocks.0.ln_1.weight": torch.ones(32)}
    torch.save(dict(model=irra, epoch=1), tmp_path / "best.pth")
    model = tbps.load_clip(tmp_path / "best.pth")
    assert model.image.grid == (24, 8) and model.arch["image_size"] == (192, 64)
    assert "left out, for they are no encoders: classifier, cross_attn, cross_modal_transformer" in capsys.readouterr().out
    text = F.normalize(model.eval().encode_text(TOKENS), dim=1)
    torch.testing.assert_close(text[:, :6], torch.tensor(TEXT), atol=2e-6, rtol=0)

    released = {n if n.startswith(("visual.", "logit")) else f"encode_text.{n}": w for n, w in weights.items()} | {"simclr_mlp.0.weight": torch.ones(3)}
    module = types.ModuleType("easydict")
    module.EasyDict, EasyDict.__module__ = EasyDict, "easydict"
    monkeypatch.setitem(sys.modules, "easydict", module)
    torch.save(dict(model=released, config=EasyDict(experiment=EasyDict(ss=True), lr=1e-4)), tmp_path / "checkpoint_best.pth")
    monkeypatch.delitem(sys.modules, "easydict")
    image, text = features(tbps.load_clip(tmp_path / "checkpoint_best.pth").eval())
    torch.testing.assert_close(image[:, :6], torch.tensor(IMAGE), atol=2e-6, rtol=0)
    torch.testing.assert_close(text[:, :6], torch.tensor(TEXT), atol=2e-6, rtol=0)
    assert "simclr_mlp" in capsys.readouterr().out


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
    assert "differ from the checkpoint by" in run("eval.py", "--checkpoint", tmp_path / "b/best.pt", "--export", tmp_path / "e")
