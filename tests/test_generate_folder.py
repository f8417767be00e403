"""The folder of a diffusion model is checked before anything is trained or drawn: other models, damaged files."""

import json
import shutil

import pytest
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

import generate
from conftest import error


@pytest.fixture
def copy(diffusion, tmp_path):
    shutil.copytree(diffusion, tmp_path / "model")
    return tmp_path / "model"


def change(file, **values):
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


CHANGES = [  # file, changed keys, what the sentence says
    ("unet/config.json", dict(in_channels=9), "1 weights are missing or of another shape, e.g. .'conv_in.weight'"),
    ("unet/config.json", dict(layers_per_block=3), "weights are missing or of another shape"),
    ("vae/config.json", dict(block_out_channels=[8, 8, 8, 16]), "weights are missing or of another shape"),
    ("text_encoder/config.json", dict(hidden_act="relu"), "hidden_act is relu, not quick_gelu or gelu"),
    ("scheduler/scheduler_config.json", dict(prediction_type="sample"), "prediction_type is 'sample', the other parts"),
]


@pytest.mark.parametrize("file, values, says", CHANGES, ids=[f"{file[:4]}-{[*keys][0]}" for file, keys, _ in CHANGES])
def test_a_configuration_that_does_not_fit(file, values, says, copy):
    change(copy / file, **values)
    with pytest.raises(ValueError, match=says) as e:
        generate.load_diffusion(copy)
    assert str(copy) in str(e.value) and file.split("/")[0] in str(e.value)


@pytest.mark.parametrize("sizes, says", [
    (dict(in_channels=9), "unet: in_channels is 9, the other parts need 4"),                # a model for inpainting
    (dict(cross_attention_dim=64), "unet: cross_attention_dim is 64, the other parts need 32")])
def test_another_kind_of_model(sizes, says, copy):
    config = UNet2DConditionModel.load_config(copy / "unet")
    UNet2DConditionModel.from_config(dict(config) | sizes).save_pretrained(copy / "unet")
    with pytest.raises(ValueError, match=f"{says}\n  Only models like Stable Diffusion 1.x can be used"):
        generate.load_diffusion(copy)


@pytest.mark.parametrize("text", ["", '{"hidden_size": 32'])
@pytest.mark.parametrize("part", ["text_encoder", "unet", "vae"])
def test_a_broken_configuration(part, text, copy):
    file = copy / part / "config.json"
    file.write_text(text)
    with pytest.raises((OSError, ValueError)) as e:
        generate.load_diffusion(copy)
    assert str(file) in str(e.value)


def test_a_byte_order_mark_is_no_mistake(copy):
    file = copy / "text_encoder/config.json"
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    generate.load_diffusion(copy)


@pytest.mark.parametrize("missing, says", [
    ("vae", r"\(there is no vae/\) is 4, the other parts need 3"),              # without vae/ a UNet works on pixels
    ("unet", "a part of the diffusion model should be at"),
    ("tokenizer", "a part of the diffusion model should be at"),
    ("unet/config.json", "no file named config.json"),
    ("text_encoder/config.json", "the configuration of the text encoder should be at"),
    ("unet/diffusion_pytorch_model.safetensors", "no file named diffusion_pytorch_model"),
    ("text_encoder/model.safetensors", "the weights should be at"),
])
def test_a_missing_part(missing, says, copy):
    path = copy / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises((OSError, ValueError), match=says) as e:
        generate.load_diffusion(copy)
    assert str(copy) in str(e.value)


@pytest.mark.parametrize("part", ["unet", "vae"])
def test_damaged_weights(part, copy):
    file = copy / part / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(OSError, match=f"Unable to load weights from checkpoint file for '.*{part}"):
        generate.load_diffusion(copy)
    del weights[sorted(weights)[0]]
    save_file(weights, file)
    with pytest.raises(ValueError, match=f"{part}: 1 weights are missing"):
        generate.load_diffusion(copy)


def test_a_single_file(tmp_path):
    (tmp_path / "v1-5-pruned.ckpt").write_bytes(b"weights")
    with pytest.raises(FileNotFoundError, match="a diffusion model is a folder in the layout of diffusers"):
        generate.find_diffusion(tmp_path / "v1-5-pruned.ckpt")


def test_the_model_is_read_before_the_data(copy, tmp_path):
    change(copy / "unet/config.json", in_channels=9)
    options = ["--dataset", "cuhk", "--data-root", tmp_path / "nowhere", "--out", tmp_path / "pairs"]
    for more in ([], ["--finetune", tmp_path / "tuned"]):
        assert "weights are missing or of another shape" in error("generate.py", *options, "--diffusion", copy, *more)
    assert not (tmp_path / "pairs").exists() and not (tmp_path / "tuned").exists()


def test_text_encoder_of_another_size(copy):
    change(copy / "text_encoder/config.json", num_hidden_layers=3)
    with pytest.raises(ValueError, match="model.safetensors lacks 16 tensors, e.g. text_model.encoder.layers.2"):
        generate.load_diffusion(copy)


def test_a_model_of_the_hub(diffusion, tmp_path, monkeypatch):
    """From the hub's cache, as the hub leaves it, without network; and what is said if it is not there."""
    import huggingface_hub
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    cached, commit = tmp_path / "models--someone--tiny-sd", "a" * 40
    shutil.copytree(diffusion, cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    (cached / "refs/main").write_text(commit)
    assert generate.find_diffusion("someone/tiny-sd") == cached / "snapshots" / commit
    assert generate.load_diffusion("someone/tiny-sd", steps=3).unet.config.cross_attention_dim == 32
    for source, says in (("someone/else", "the hub cannot give it"), (tmp_path, "layout of diffusers"),
                         ("nobody/nothing", "name its folder with --diffusion")):
        with pytest.raises(FileNotFoundError, match=says):
            generate.find_diffusion(source)
