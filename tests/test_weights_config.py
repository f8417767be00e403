"""What is beside the weights: their config, shards, the hub; and the grid of positions, which tensors do not tell."""

import json
import re
import shutil

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file

import data
import tbps
from conftest import run
from tiny_clip import (OTHER_HF_CONFIG, OTHER_HF_VIEWS, OTHER_IMAGE, OTHER_OPEN_CLIP_CONFIG, OTHER_TEXT, PICTURE,
                       assert_features, hugging_face, openai_tiny, write_json)

MERGES = "#version: 0.2\na b\n"


def open_clip_pair(folder):
    save_file(openai_tiny(), folder / "open_clip_model.safetensors")
    write_json(folder / "open_clip_config.json", OTHER_OPEN_CLIP_CONFIG)


def hugging_face_pair(folder):
    save_file(hugging_face(openai_tiny()), folder / "model.safetensors")
    write_json(folder / "config.json", OTHER_HF_CONFIG)
    write_json(folder / "preprocessor_config.json", OTHER_HF_VIEWS)


def timm_pair(folder):
    """A vision transformer of timm, in files of the same names as Hugging Face's."""
    save_file({"patch_embed.proj.weight": torch.ones(8, 3, 4, 4)}, folder / "model.safetensors")
    config = dict(architecture="vit_base_patch16_clip_224", pretrained_cfg=dict(mean=[0, 0, 0]))
    write_json(folder / "config.json", config)


def transformers_5_pair(folder):
    hugging_face_pair(folder)
    (folder / "preprocessor_config.json").unlink()
    write_json(folder / "processor_config.json", dict(image_processor=OTHER_HF_VIEWS))


def config_of(source):
    return tbps.read_config(tbps.find_weights(source))


PAIRS = {"open_clip": open_clip_pair, "Hugging Face": hugging_face_pair, "transformers 5": transformers_5_pair}


@pytest.mark.parametrize("pair", PAIRS)
def test_config_and_preprocessing_belong_to_the_weights(pair, tmp_path, capsys):
    """Head widths, activation, mean and std of the config give the features of the original with its preprocessing."""
    PAIRS[pair](tmp_path)
    model, config = tbps.load_clip(tmp_path), config_of(tmp_path)
    preprocessing = data.Preprocessing(model.arch["image_size"], config["norm"], config["resize"])
    assert_features(model, OTHER_IMAGE, OTHER_TEXT, preprocessing.image(PICTURE)[None])
    assert model.arch["head_width"] == 32 and model.arch["text_head_width"] == 16 and config["norm"] == "half"
    assert re.search(r"heads of 32, GELU \((open_clip_)?config.json\)", capsys.readouterr().out)


def test_timms_files_beside_open_clips_are_not_taken(tmp_path):
    timm_pair(tmp_path)
    open_clip_pair(tmp_path)
    model = tbps.load_clip(tmp_path)
    assert model.arch["head_width"] == 32 and config_of(tmp_path)["norm"] == "half"
    (tmp_path / "open_clip_config.json").unlink()                       # a config of timm is none of a CLIP
    with pytest.raises(ValueError, match="/config.json is not the configuration of a CLIP"):
        tbps.load_clip(tmp_path / "open_clip_model.safetensors")


def test_each_weights_file_has_its_own_config(tmp_path):
    """Two pairs in one folder that differ in the activation: each file goes with its own config."""
    hugging_face_pair(tmp_path)
    open_clip_pair(tmp_path)
    write_json(tmp_path / "open_clip_config.json", dict(model_cfg=dict(quick_gelu=True)))
    assert_features(tbps.load_clip(tmp_path / "open_clip_model.safetensors"))
    assert config_of(tmp_path / "open_clip_model.safetensors")["norm"] == "clip"
    for source in (tmp_path / "model.safetensors", tmp_path):
        assert not tbps.load_clip(source).arch["quick_gelu"] and config_of(source)["norm"] == "half"
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(config, encoding="utf-8-sig")  # a byte-order mark
    assert not tbps.load_clip(tmp_path).arch["quick_gelu"]


def test_a_broken_config_is_named(tmp_path):
    hugging_face_pair(tmp_path)
    relu = dict(hidden_act="relu")
    no_heads = dict(num_attention_heads=0)
    broken = [dict(vision_config=[]), dict(vision_config=no_heads), dict(vision_config=relu, text_config=relu)]
    for content in ("[]", "{", *map(json.dumps, broken)):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(ValueError, match="config.json is not"):
            tbps.load_clip(tmp_path)
    write_json(tmp_path / "config.json", OTHER_HF_CONFIG)
    nearest = OTHER_HF_VIEWS | dict(resample=0)                         # is not supported
    write_json(tmp_path / "preprocessor_config.json", nearest)
    with pytest.raises(ValueError, match="config.json is not"):
        tbps.load_clip(tmp_path)


def test_other_mean_and_std_are_carried_as_numbers(tmp_path):
    open_clip_pair(tmp_path)
    odd = dict(mean=[0.1, 0.2, 0.3], std=[0.4, 0.5, 0.6], interpolation="bilinear")
    write_json(tmp_path / "open_clip_config.json", OTHER_OPEN_CLIP_CONFIG | dict(preprocess_cfg=odd))
    config = config_of(tmp_path)
    assert config["norm"] == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6)) and config["resize"] == "bilinear"
    white = data.Preprocessing((24, 24), config["norm"], config["resize"]).image(255 * (PICTURE >= 0).astype("uint8"))
    assert white[:, 0, 0].tolist() == pytest.approx([0.9 / 0.4, 0.8 / 0.5, 0.7 / 0.6])


# ---- from the weights to scores and to training ---------------------------------------------------------------------

@pytest.fixture
def small(tmp_path):
    """A folder with a CLIP of 515 tokens and mean and std 0.5."""
    torch.manual_seed(0)
    weights = openai_tiny() | {"token_embedding.weight": 0.02 * torch.randn(515, 64)}
    (tmp_path / "clip").mkdir()
    save_file(weights, tmp_path / "clip/open_clip_model.safetensors")
    write_json(tmp_path / "clip/open_clip_config.json", OTHER_OPEN_CLIP_CONFIG)
    (tmp_path / "clip/merges.txt").write_text(MERGES)
    return tmp_path / "clip"


def test_zero_shot_scores_use_the_norm_beside_the_weights(small):
    model, _, preprocessing = tbps.load_model(small)
    assert preprocessing.settings == dict(size=(24, 24), norm="half", resize="bicubic", clean=False)
    assert model.arch["head_width"] == 32


def test_a_run_says_where_its_norm_is_not_that_of_the_weights(small, cuhk, tmp_path):
    command = ["tbps.py", "--dataset", "cuhk", "--data-root", cuhk, "--clip", small, "--method", "baseline",
               "--workers", "0", "--set", "epochs=1", "batch=8", "height=24", "width=24", "warmup=0"]
    said = run(*command, "--out", tmp_path / "a")
    assert "norm=imagenet, as the recipe says; the weights were trained with norm=half (open_clip_config.json)" in said
    assert "normalised with" not in run(*command, "norm=half", "--out", tmp_path / "b")
    (small / "open_clip_config.json").unlink()
    assert "normalised with" not in run(*command, "--out", tmp_path / "c")               # nothing says otherwise


def test_a_missing_vocabulary_is_said_with_its_address(small):
    (small / "merges.txt").unlink()
    with pytest.raises(FileNotFoundError, match="the vocabulary of the tokenizer should be at .*clip/") as e:
        tbps.tokenizer_for(small)
    assert data.OPENAI_VOCABULARY in str(e.value) and "--tokenizer" in str(e.value)


# ---- shards and the hub ---------------------------------------------------------------------------------------------

def write_shards(folder):
    """The Hugging Face pair with its weights in three files and an index, as transformers writes large models."""
    hugging_face_pair(folder)
    names = sorted(weights := load_file(folder / "model.safetensors"))
    (folder / "model.safetensors").unlink()
    files = {}
    for i in range(3):
        file = f"model-0000{i + 1}-of-00003.safetensors"
        save_file({n: weights[n] for n in names[i::3]}, folder / file)
        files |= {n: file for n in names[i::3]}
    write_json(folder / "model.safetensors.index.json", dict(metadata=dict(total_size=1), weight_map=files))


def test_weights_in_shards(tmp_path):
    write_shards(tmp_path)
    model, config = tbps.load_clip(tmp_path), config_of(tmp_path)
    preprocessing = data.Preprocessing(model.arch["image_size"], config["norm"], config["resize"])
    assert_features(model, OTHER_IMAGE, OTHER_TEXT, preprocessing.image(PICTURE)[None])
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model-00002-of-00003.safetensors"):
        tbps.load_clip(tmp_path)
    for index in ({}, dict(weight_map=[]), dict(weight_map=dict(a="../b.safetensors")), dict(weight_map=dict(a=1))):
        write_json(tmp_path / "model.safetensors.index.json", index)
        with pytest.raises(ValueError, match="index.json does not list the files of a model"):
            tbps.load_clip(tmp_path)


class Hub:
    """huggingface_hub.snapshot_download for a model whose files are in a folder."""

    def __init__(self, files, cache):
        self.files, self.cache, self.fetched, self.reachable = files, cache, [], True

    def download(self, hub_id, allow_patterns):
        if not self.reachable and not any(self.cache.iterdir()):
            raise LocalEntryNotFoundError("no network")
        for name in allow_patterns:
            if self.reachable and (self.files / name).exists() and not (self.cache / name).exists():
                self.fetched.append(name)
                shutil.copy(self.files / name, self.cache / name)
        return str(self.cache)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    (tmp_path / "files").mkdir()
    (tmp_path / "cache").mkdir()
    hub = Hub(tmp_path / "files", tmp_path / "cache")
    monkeypatch.setattr("huggingface_hub.snapshot_download", hub.download)
    return hub


def test_from_the_hub_in_shards(hub):
    write_shards(hub.files)
    model = tbps.load_clip("someone/clip")
    shards = [f for f in hub.fetched if "-of-" in f]
    assert model.arch["head_width"] == 32 and shards == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    hub.reachable = False                                               # all is in the cache
    assert tbps.load_clip("someone/clip").arch["head_width"] == 32


def test_of_a_model_on_the_hub_only_the_pair_is_fetched(hub):
    timm_pair(hub.files)
    open_clip_pair(hub.files)
    assert tbps.load_clip("timm/vit_base_patch16_clip_224.openai").arch["head_width"] == 32
    assert "open_clip_model.safetensors" in hub.fetched and "model.safetensors" not in hub.fetched


def test_a_model_without_weights_on_the_hub(hub):
    write_json(hub.files / "config.json", {})
    with pytest.raises(FileNotFoundError, match="no CLIP weights from a/b: it has none of"):
        tbps.load_clip("a/b")


# ---- the grid of positions ------------------------------------------------------------------------------------------

def write_positions(folder, n, name="best.pth"):
    weights = openai_tiny() | {"visual.positional_embedding": torch.randn(1 + n, 128)}
    torch.save(weights, folder / name)
    return folder / name


@pytest.mark.parametrize("n, size", [
    (24 * 8, (192, 64)), (28 * 28, (224, 224)), (15 * 15, (120, 120)), (18 * 9, (144, 72))])
def test_a_grid_that_only_one_ratio_fits_is_read_and_printed(n, size, tmp_path, capsys):
    assert tbps.load_clip(write_positions(tmp_path, n)).arch["image_size"] == size
    assert f"{size[0] // 8}x{size[1] // 8} positions, of images of {size[0]}x{size[1]}" in capsys.readouterr().out


def test_a_grid_that_several_ratios_fit_is_asked_for(tmp_path, capsys):
    path = write_positions(tmp_path, 256)                               # 32 x 8, as IRRA's 512x128 has it, or 16 x 16
    with pytest.raises(ValueError, match="256 positions of 8x8 patches, .* of 256x64 or 128x128\n  Name the size"):
        tbps.load_clip(path)
    with pytest.raises(ValueError, match="may be images of 256x64 or 128x128"):
        tbps.load_clip(path, image_size=(192, 64))                      # a size to resize to does not tell
    assert tbps.load_clip(path, image_size=(256, 64)).image.grid == (32, 8)
    assert "32x8 positions, of images of 256x64" in capsys.readouterr().out
    assert tbps.load_clip(path, image_size=(128, 128)).image.grid == (16, 16)
    config = dict(model_cfg=dict(quick_gelu=True, vision_cfg=dict(image_size=[256, 64])))
    write_json(tmp_path / "open_clip_config.json", config)
    assert tbps.load_clip(path).image.grid == (32, 8)
    assert tbps.load_clip(path, image_size=(128, 128)).image.grid == (16, 16)
    assert "positions from 32x8 to 16x16" in capsys.readouterr().out


def test_the_size_in_openais_archive_tells_the_grid(tmp_path):
    positions = {"visual.positional_embedding": torch.randn(257, 128)}
    torch.save(openai_tiny() | positions | {"input_resolution": torch.tensor(128)}, tmp_path / "clip.pt")
    assert tbps.load_clip(tmp_path / "clip.pt").image.grid == (16, 16)


def test_overlapping_patches_are_asked_for(tmp_path):
    path = write_positions(tmp_path, 31 * 10)
    with pytest.raises(ValueError, match="fit no usual image size"):
        tbps.load_clip(path)
    model = tbps.load_clip(path, image_size=(188, 62), stride=6)
    assert model.image.grid == (31, 10) and model.arch["stride"] == 6
