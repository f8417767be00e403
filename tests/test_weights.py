"""CLIP weights in every file format give the features of the original; what is wrong with a file is said."""

import argparse
import collections
import math
import pathlib
import sys
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

import data
import tbps
from conftest import error
from gallery import checkpoint                                          # noqa: F401
from tiny_clip import (FORMATS, IMAGE, TEXT, TOKENS, assert_features, features, hugging_face, openai_tiny, write)


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_gives_the_features_of_the_original(kind, tmp_path, capsys):
    model = tbps.load_clip(write(kind, tmp_path))
    assert_features(model)
    assert model.logit_scale.item() == pytest.approx(math.log(50))
    assert model.arch["image_size"] == (24, 24) and model.arch["vocab"] == 100
    out = capsys.readouterr().out
    names = tbps.HF_NAMES if kind.startswith("Hugging Face") else tbps.OPENAI_NAMES
    assert f"clip: {len(tbps.named_tensors(model, names))} tensors" in out
    assert "3x3 positions, of images of 24x24" in out


def test_half_precision_becomes_fp32(tmp_path):
    model = tbps.load_clip(write("torchscript in half precision", tmp_path))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert features(model)[0][:, :6].sub(torch.tensor(IMAGE)).abs().max() < 3e-3


KINDS_OF_TENSORS = sorted({n.replace("resblocks.0", "resblocks.1") for n in openai_tiny()} - {"logit_scale"})


@pytest.mark.parametrize("name", KINDS_OF_TENSORS)
def test_every_kind_of_tensor_matters(name, tmp_path):
    """A change in the file changes the features. Softmax ignores the bias of k, so that part stays as it is."""
    weights = openai_tiny()
    change = torch.randn(weights[name].shape, generator=torch.Generator().manual_seed(0))
    if name.endswith("in_proj_bias"):
        change.chunk(3)[1].zero_()
    weights[name] = weights[name] + change
    torch.save(weights, tmp_path / "clip.pt")
    image, text = features(tbps.load_clip(tmp_path / "clip.pt"))
    moved = [(x[:, :6] - torch.tensor(y)).abs().max() > 1e-4 for x, y in ((image, IMAGE), (text, TEXT))]
    assert moved == ([True, False] if name.startswith("visual.") else [False, True])


# ---- what people wrap weights in ------------------------------------------------------------------------------------

CONSTANTS = {
    "input_resolution": torch.tensor(24), "visual.attn_mask": torch.zeros(2, 2), "attn_mask": torch.zeros(2, 2),
    "text_model.embeddings.position_ids": torch.arange(77)[None]}


@pytest.mark.parametrize("prefix", [
    "module.", "_orig_mod.", "clip.", "model.", "_orig_mod.module.", "module._orig_mod.", "module.clip."])
@pytest.mark.parametrize("layout", ["OpenAI's names", "Hugging Face's names"])
@pytest.mark.parametrize("key", [None, "model", "state_dict"])
def test_known_wrappers_and_constants_are_removed(prefix, layout, key, tmp_path):
    weights = (openai_tiny() if layout == "OpenAI's names" else hugging_face(openai_tiny())) | CONSTANTS
    weights = {prefix + name: w for name, w in weights.items()}
    torch.save(weights if key is None else {key: weights, "epoch": 3}, tmp_path / "clip.pt")
    assert_features(tbps.load_clip(tmp_path / "clip.pt"))


def test_torch_compile_may_wrap_one_tower_alone(tmp_path):
    weights = {n.replace("visual.", "visual._orig_mod."): w for n, w in openai_tiny().items()}
    torch.save(weights, tmp_path / "clip.pt")
    assert_features(tbps.load_clip(tmp_path / "clip.pt"))


def test_two_models_in_one_file_are_refused(tmp_path):
    weights = openai_tiny()
    torch.save(weights | {f"module.{n}": w for n, w in weights.items()}, tmp_path / "clip.pt")
    with pytest.raises(ValueError, match="holds more than one encoder"):
        tbps.load_clip(tmp_path / "clip.pt")


def numpy_values():
    return dict(
        best=np.float64(1), epoch=np.int64(3), done=np.bool_(True), name=np.str_("a"),
        curve=np.arange(6.0).reshape(2, 3), counts=np.array([1, 2], dtype=np.int32), half=np.float16([1.5]))


def test_numpy_values_beside_the_weights(tmp_path):
    torch.save(dict(model=openai_tiny(), log=numpy_values()), tmp_path / "best.pth")
    assert_features(tbps.load_clip(tmp_path / "best.pth"))
    for name, value in tbps.read_file(tmp_path / "best.pth")["log"].items():
        assert np.array_equal(value, numpy_values()[name]) and value.dtype == numpy_values()[name].dtype


def test_numpy_1_wrote_other_names(tmp_path):
    path = tmp_path / "best.pth"
    torch.save(dict(model=openai_tiny(), log=numpy_values()), path, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    assert b"numpy._core.multiarray" in content
    path.write_bytes(content.replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    assert np.array_equal(tbps.read_file(path)["log"]["curve"], numpy_values()["curve"])


@pytest.mark.parametrize("value, name", [
    (argparse.Namespace(lr=1), "argparse.Namespace"), (pathlib.PosixPath("a"), "pathlib.PosixPath"),
    (collections.defaultdict(list), "collections.defaultdict"), (print, "print"),
    (np.array([print], dtype=object), "print")])
@pytest.mark.parametrize("zipped", [True, False])
def test_other_classes_beside_the_weights_are_named(value, name, zipped, tmp_path):
    torch.save(dict(model=openai_tiny(), args=value), tmp_path / "best.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError) as e:
        tbps.load_clip(tmp_path / "best.pth")
    assert f"best.pth holds an object of {name} beside the weights" in str(e.value)
    assert "torch.save(model.state_dict()" in str(e.value) and "download" not in str(e.value)


class EasyDict(dict):
    """As the package of that name: a dict whose entries are attributes too, which is what gets pickled."""

    def __init__(self, **entries):
        super().__init__(**entries)
        self.__dict__.update(entries)


def test_the_released_checkpoint_of_irra(tmp_path, capsys):
    """And of RDE: 384x128, so 24 x 8 positions, and no logit scale."""
    weights = {n: w for n, w in openai_tiny().items() if n != "logit_scale"}
    weights["visual.positional_embedding"] = torch.randn(1 + 24 * 8, 128)
    heads = {"classifier.weight": torch.ones(9, 32), "cross_attn.in_proj_weight": torch.ones(96, 32),
             "cross_modal_transformer.resblocks.0.ln_1.weight": torch.ones(32)}
    torch.save(dict(model={f"base_model.{n}": w for n, w in weights.items()} | heads, epoch=1), tmp_path / "best.pth")
    model = tbps.load_clip(tmp_path / "best.pth")
    assert model.image.grid == (24, 8) and model.arch["image_size"] == (192, 64)
    said = capsys.readouterr().out
    assert "left out, for they are no encoders: classifier, cross_attn, cross_modal_transformer" in said
    text = F.normalize(model.eval().encode_text(TOKENS), dim=1)
    torch.testing.assert_close(text[:, :6], torch.tensor(TEXT), atol=2e-6, rtol=0)


def test_the_released_checkpoint_of_tbps_clip(tmp_path, capsys, monkeypatch):
    """Its text tower has a prefix, and its configuration is pickled as an EasyDict."""
    released = {n if n.startswith(("visual.", "logit")) else f"encode_text.{n}": w for n, w in openai_tiny().items()}
    released["simclr_mlp.0.weight"] = torch.ones(3)
    module = types.ModuleType("easydict")
    module.EasyDict, EasyDict.__module__ = EasyDict, "easydict"
    monkeypatch.setitem(sys.modules, "easydict", module)
    config = EasyDict(experiment=EasyDict(ss=True), lr=1e-4)
    torch.save(dict(model=released, config=config), tmp_path / "checkpoint_best.pth")
    monkeypatch.delitem(sys.modules, "easydict")
    assert_features(tbps.load_clip(tmp_path / "checkpoint_best.pth"))
    assert "simclr_mlp" in capsys.readouterr().out


# ---- mistakes -------------------------------------------------------------------------------------------------------

SOME = "visual.transformer.resblocks.1.ln_2.bias"


def without(name):
    return {n: w for n, w in openai_tiny().items() if not n.startswith(name)}


@pytest.mark.parametrize("change, sentence", [
    ({"visual.layer1.0.conv1.weight": torch.ones(1), "visual.attnpool.x": torch.ones(1)}, "ResNet image tower"),
    ({"classifier.weight": torch.ones(1)}, "has a tensor classifier.weight for which"),
    ({SOME: torch.ones(127)}, f"{SOME} is (127,) torch.float32, it should be (128,)"),
    ({SOME: torch.ones(128).long()}, "of floating point"),
    ({"text_projection": torch.ones(5)}, "it lacks text_projection of 2 dimensions"),
    ({"visual.positional_embedding": torch.ones(12, 128)}, "11 positions of 8x8 patches, which fit no usual"),
    ({"positional_embedding": torch.ones(32, 64)}, "reads texts of 32 tokens; OpenAI's CLIP and tbps read 77"),
])
def test_a_wrong_tensor_is_named(change, sentence, tmp_path):
    torch.save(openai_tiny() | change, tmp_path / "clip.pt")
    with pytest.raises(ValueError) as e:
        tbps.load_clip(tmp_path / "clip.pt")
    assert str(tmp_path / "clip.pt") in str(e.value) and sentence in str(e.value)


@pytest.mark.parametrize("content, sentence", [
    (without(SOME), f"lacks 1 tensors, e.g. {SOME}"),
    (without("transformer."), "image 2 layers of 128, text 0 layers"),
    ([1], "no dict of named tensors but a list"), (dict(a=1), "not a dict of tensors"),
    ({n: w for n, w in hugging_face(openai_tiny()).items() if "1.self_attn.k_proj.bias" not in n or "text" not in n},
     "e.g. text_model.encoder.layers.1.self_attn.k_proj.bias"),
    (dict(model={f"{p}.{n}": w for n, w in openai_tiny().items() for p in ("base_model", "ema_model")}),
     "more than one encoder"),
])
def test_a_file_without_a_clip_is_refused(content, sentence, tmp_path):
    torch.save(content, tmp_path / "clip.pt")
    with pytest.raises(ValueError) as e:
        tbps.load_clip(tmp_path / "clip.pt")
    assert str(tmp_path / "clip.pt") in str(e.value) and sentence in str(e.value)


def test_a_damaged_file_is_refused(tmp_path):
    torch.save(openai_tiny(), tmp_path / "clip.pt")
    whole = (tmp_path / "clip.pt").read_bytes()
    save_file(openai_tiny(), tmp_path / "clip.safetensors")
    shorter = (tmp_path / "clip.safetensors").read_bytes()[:1000]
    for name, contents in {"clip.pt": (b"", b"hello", whole[:len(whole) // 2], b"\x80\x02", b"PK\x03\x04"),
                           "clip.safetensors": (b"", b"{}", shorter)}.items():
        for content in contents:
            (tmp_path / name).write_bytes(content)
            with pytest.raises(ValueError, match=f"{name} cannot be read as weights"):
                tbps.load_clip(tmp_path / name)
    (tmp_path / "clip.pt").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(ValueError, match="clip.pt is a Git LFS pointer"):
        tbps.load_clip(tmp_path / "clip.pt")


def test_a_missing_file_is_said_with_what_is_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="should be at"):
        tbps.load_clip(tmp_path / "none.pt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="holds: nothing"):
        tbps.load_clip(tmp_path / "empty")


def test_without_network_a_run_says_how_to_fetch_the_weights(tmp_path, cuhk):
    hub_id = "openai/clip-vit-base-patch16"
    said = error("tbps.py", "--dataset", "cuhk", "--data-root", cuhk, "--clip", hub_id, "--out", tmp_path / "r")
    assert f"no CLIP weights from {hub_id}: the hub cannot be reached" in said and "--clip none" in said
    assert "hf download openai/clip-vit-base-patch16" in said and "--local-dir clip-vit-base-patch16" in said
    assert "/ViT-B-16.pt" in said and data.OPENAI_VOCABULARY in said


def test_checkpoints_are_told_without_reading_tensors(checkpoint, tmp_path, monkeypatch):
    torch.save(dict(weight=torch.zeros(3)), tmp_path / "other.pt")
    (tmp_path / "cut.pt").write_bytes(checkpoint.read_bytes()[:5000])
    monkeypatch.setattr(torch, "load", None)
    assert tbps.is_checkpoint(checkpoint)
    assert not tbps.is_checkpoint(tmp_path / "other.pt") and not tbps.is_checkpoint(tmp_path / "cut.pt")


# ---- writing --------------------------------------------------------------------------------------------------------

def test_a_model_is_written_as_a_folder_of_open_clip(people, tmp_path):
    """In fp16, read again by load_clip: architecture, tokenizer and preprocessing come from the folder."""
    torch.manual_seed(0)
    tokenizer = data.train_tokenizer([c for r in people for c in r["captions"]], vocab=700)
    model = tbps.DualEncoder(48, (32, 16), 8, 64, 2, 32, 3, tokenizer.vocab, head_width=16, text_head_width=8,
                             quick_gelu=False).eval()
    preprocessing = data.Preprocessing((32, 16), "half", "bilinear")
    tbps.save_open_clip(model, tokenizer, preprocessing, tmp_path / "m", torch.float16)
    found = tbps.load_clip(tmp_path / "m").eval()
    for p in model.parameters():
        p.data = p.data.half().float()
    captions = people[0]["captions"]
    tokens, again = tokenizer(captions), tbps.tokenizer_for(tmp_path / "m")(captions)
    pixels = torch.randn(2, 3, 32, 16)
    assert found.arch == model.arch and torch.equal(tokens, again)
    assert torch.equal(found.encode_image(pixels), model.encode_image(pixels))
    assert torch.equal(found.encode_text(tokens), model.encode_text(tokens))
    config = tbps.read_config(tbps.find_weights(tmp_path / "m"))
    assert (config["norm"], config["resize"]) == ("half", "bilinear")
    assert all(w.dtype == torch.float16 for w in tbps.read_file(tmp_path / "m/open_clip_model.safetensors").values())
