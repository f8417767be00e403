"""The folder of a diffusion model is checked before anything is trained or drawn: other models, damaged files."""

import json
import shutil

import pytest
import torch
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
    ("unet/config.json", dict(in_channels=9), "in_channels is 9, wanted is 4"),
    ("unet/config.json", dict(out_channels=8), "out_channels is 8, wanted is 4"),
    ("unet/config.json", dict(in_channels="four"), "in_channels is 'four', wanted is 4"),
    ("unet/config.json", dict(cross_attention_dim=[32, 32]), "cross_attention_dim is .32, 32., wanted is 32"),
    ("unet/config.json", dict(cross_attention_dim=64), "cross_attention_dim is 64, wanted is 32"),
    ("unet/config.json", dict(addition_embed_type="text_time"), "addition_embed_type is 'text_time', wanted is None"),
    ("unet/config.json", dict(num_class_embeds=1000), "num_class_embeds is 1000, wanted is None"),
    ("unet/config.json", dict(_class_name="Transformer2DModel"), "_class_name is 'Transformer2DModel'"),
    ("unet/config.json", dict(block_out_channels=[8, 16]), "unet cannot be read as UNet2DConditionModel"),
    ("unet/config.json", dict(layers_per_block=3), "unet cannot be read as .* size mismatch for"),
    ("vae/config.json", dict(_class_name="VQModel"), "_class_name is 'VQModel', wanted is 'AutoencoderKL'"),
    ("unet/config.json", dict(in_channels=16), "in_channels is 16, wanted is 4"),
    ("text_encoder/config.json", dict(hidden_act="relu"), "hidden_act is 'relu', wanted is 'quick_gelu' or 'gelu'"),
    ("text_encoder/config.json", dict(max_position_embeddings=248), "max_position_embeddings is 248, wanted is 77"),
    ("text_encoder/config.json", dict(num_attention_heads=5), "5 heads do not divide the hidden_size 32"),
    ("scheduler/scheduler_config.json", dict(prediction_type="sample"), "prediction_type is 'sample', wanted is"),
    ("scheduler/scheduler_config.json", dict(beta_schedule="cosine"), "beta_schedule is 'cosine'"),
    ("scheduler/scheduler_config.json", dict(num_train_timesteps=100), "num_train_timesteps is 100, wanted is 1000"),
]


@pytest.mark.parametrize("file, values, says", CHANGES, ids=[f"{file[:4]}-{[*keys][0]}" for file, keys, _ in CHANGES])
def test_another_kind_of_model(file, values, says, copy):
    change(copy / file, **values)
    with pytest.raises(ValueError, match=says) as e:
        generate.load_diffusion(copy)
    assert str(copy / file.split("/")[0]) in str(e.value)


@pytest.mark.parametrize("text", ["{}", "[]", "", '{"hidden_size": 32', "null"])
@pytest.mark.parametrize("part", ["text_encoder", "unet"])
def test_a_broken_configuration(part, text, copy):
    file = copy / part / "config.json"
    file.write_text(text)
    if (part, text) == ("unet", "{}"):                                  # diffusers' defaults: valid, of another width
        with pytest.raises(ValueError, match="cross_attention_dim is 1280, wanted is 32"):
            generate.find_diffusion(copy)
        return
    with pytest.raises(ValueError) as e:
        generate.find_diffusion(copy)
    assert str(file) in str(e.value)


def test_a_byte_order_mark_is_no_mistake(copy):
    file = copy / "text_encoder/config.json"
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    generate.load_diffusion(copy)


@pytest.mark.parametrize("missing, says", [
    ("vae", "wanted is 3; without vae/"),
    ("unet", "a part of the diffusion model should be at"),
    ("tokenizer", "a part of the diffusion model should be at"),
    ("unet/config.json", "configuration"),
    ("unet/diffusion_pytorch_model.safetensors", "no file named diffusion_pytorch_model"),
    ("text_encoder/model.safetensors", "or pytorch_model.bin"),
])
def test_a_missing_part(missing, says, copy):
    path = copy / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises((FileNotFoundError, ValueError), match=says) as e:
        generate.load_diffusion(copy)
    assert str(copy) in str(e.value)


@pytest.mark.parametrize("part", ["unet", "vae"])
def test_damaged_weights(part, copy):
    file = copy / part / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=f"{part} cannot be read as"):
        generate.load_diffusion(copy)
    del weights[sorted(weights)[0]]
    save_file(weights, file)
    with pytest.raises(ValueError, match=f"{part} lacks 1 weights"):    # diffusers would draw it at random and go on
        generate.load_diffusion(copy)


def test_a_single_file(tmp_path):
    torch.save({}, tmp_path / "v1-5-pruned.ckpt")
    with pytest.raises(ValueError, match="v1-5-pruned.ckpt is a file"):
        generate.find_diffusion(tmp_path / "v1-5-pruned.ckpt")


def test_the_folder_is_checked_before_the_data_are_read(copy, tmp_path):
    change(copy / "unet/config.json", in_channels=9)
    options = ["--dataset", "cuhk", "--data-root", tmp_path / "nowhere", "--out", tmp_path / "pairs"]
    assert "in_channels is 9" in error("generate.py", *options, "--diffusion", copy)
    assert "in_channels is 9" in error("generate.py", *options, "--diffusion", copy, "--finetune", tmp_path / "tuned")
    assert not (tmp_path / "pairs").exists() and not (tmp_path / "tuned").exists()


def test_text_encoder_of_another_size(copy):
    change(copy / "text_encoder/config.json", num_hidden_layers=3)
    with pytest.raises(ValueError, match="model.safetensors does not fit its config.json: .*Missing key"):
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
