"""eval.py --export: a folder that open_clip and transformers read. lab/LOG.md has a comparison of features
with both. Here: the folder gives back the same model, and the files say what those libraries ask for."""

import json

import pytest
import torch

import data
import tbps
from conftest import error, run

ARCH = dict(embed=64, patch=8, image_width=64, image_layers=2, text_width=64, text_layers=2, head_width=32,
            text_head_width=16)


def checkpoint(path, size, **arch):
    """A file like best.pt, with new weights; its model."""
    torch.manual_seed(0)
    tokenizer = data.train_tokenizer(["a man in a red coat", "a woman with a bag"], vocab=300)
    model = tbps.DualEncoder(**ARCH | dict(image_size=size, vocab=tokenizer.vocab) | arch)
    info = data.Preprocessing(size, "clip", "bicubic", clean=True).settings
    torch.save(dict(
        format="tbps", version=tbps.VERSION, weights=model.state_dict(), arch=model.arch, info=info, method="baseline",
        recipe=tbps.BASELINE, epoch=3, scores={"R@1": 50.0, "mAP": 40.0},
        args=dict(dataset="toy", clip="/home/me/lab/toyclip"),
        tokenizer=dict(merges=[" ".join(m) for m in tokenizer.merges], mask=False)), path)
    return model


def load(path):
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("size", [(16, 16), (32, 16)], ids=["square", "tall"])
def test_the_folder_gives_back_the_same_model(size, tmp_path):
    model, out = checkpoint(tmp_path / "best.pt", size), tmp_path / "out"
    said = run("eval.py", "--checkpoint", tmp_path / "best.pt", "--export", out)
    assert ("and transformers" in said) == (size == (16, 16))
    names = {"open_clip_config.json", "open_clip_model.safetensors", "tokenizer.json", "tokenizer_config.json",
             "README.md"}
    if size == (16, 16):
        names |= {"config.json", "model.safetensors", "preprocessor_config.json"}
    assert {path.name for path in out.iterdir()} == names

    def check():
        again, tokenizer, preprocessing = tbps.load_model(out)
        assert all(torch.equal(w, again.state_dict()[name]) for name, w in model.state_dict().items())
        assert again.arch == model.arch and preprocessing.settings == dict(
            size=size, norm="clip", resize="bicubic", clean=True)
        before = tbps.load_model(tmp_path / "best.pt")[1]
        assert torch.equal(tokenizer(["a man in red"]), before(["a man in red"]))

    check()
    if size == (16, 16):                                                # that was Hugging Face's; now open_clip's
        (out / "config.json").unlink()
        (out / "model.safetensors").unlink()
        check()


def test_what_open_clip_and_transformers_read(tmp_path):
    checkpoint(tmp_path / "best.pt", (16, 16))
    tbps.export(tmp_path / "best.pt", tmp_path / "out")
    config = load(tmp_path / "out/open_clip_config.json")
    image = dict(image_size=[16, 16], patch_size=8, width=64, layers=2, head_width=32)
    assert config["model_cfg"]["vision_cfg"] == image
    text = config["model_cfg"]["text_cfg"]
    assert text["heads"] == 4 and text["hf_tokenizer_name"] and text["context_length"] == 77
    preprocessing = config["preprocess_cfg"]
    assert preprocessing["resize_mode"] == "squash" and preprocessing["interpolation"] == "bicubic"
    config = load(tmp_path / "out/config.json")
    assert config["model_type"] == "clip" and config["text_config"]["eos_token_id"] == text["vocab_size"] - 1
    assert config["vision_config"]["image_size"] == 16 and config["vision_config"]["num_attention_heads"] == 2
    assert load(tmp_path / "out/preprocessor_config.json")["resample"] == 3


def test_the_card(tmp_path):
    checkpoint(tmp_path / "best.pt", (32, 16))
    tbps.export(tmp_path / "best.pt", tmp_path / "validated")
    card = (tmp_path / "validated/README.md").read_text()
    assert "text-based-person-search" in card and "toyclip, fine-tuned on toy with the method baseline" in card
    assert "/home/me" not in card and "R@1 50.0" in card and "validation split" in card
    assert "32x16 pixels" in card and "which only tbps removes" in card and "itc=1.0" in card
    scores = {"best.pt, text to image": {"R@1": 60.0, "mAP": 50.0}, "last.pt, text to image": {"R@1": 10.0, "mAP": 9.0}}
    (tmp_path / "log.jsonl").write_text(json.dumps(dict(test=scores)) + "\n")
    tbps.export(tmp_path / "best.pt", tmp_path / "tested")
    card = (tmp_path / "tested/README.md").read_text()
    assert "R@1 60.0" in card and "R@1 50.0" not in card and "R@1 10.0" not in card
    tbps.export(tmp_path / "tested", tmp_path / "copied")               # the weights of a CLIP, without training
    assert "written in another layout" in (tmp_path / "copied/README.md").read_text()


def test_training_keeps_the_image_size_of_the_folder(cuhk, tmp_path):
    """Unless the command line says another. OpenAI's models get the size of the recipe."""
    checkpoint(tmp_path / "best.pt", (32, 16))
    tbps.export(tmp_path / "best.pt", tmp_path / "clip")
    command = ["tbps.py", "--dataset", "cuhk", "--data-root", cuhk, "--method", "baseline", "--workers", "0"]
    options = ["--set", "epochs=1", "batch=8", "warmup=0"]
    said = run(*command, "--clip", tmp_path / "clip", "--out", tmp_path / "a", *options)
    assert "weights: height=32 width=16" in said and "32x16 pixels" in said
    said = run(*command, "--clip", tmp_path / "best.pt", "--out", tmp_path / "b", *options, "height=16", "width=16")
    assert "16x16 pixels" in said
    config = load(tmp_path / "clip/open_clip_config.json")
    config["model_cfg"]["vision_cfg"]["image_size"] = 224
    (tmp_path / "clip/open_clip_config.json").write_text(json.dumps(config))
    args, recipe = tbps.parse_args(["--dataset", "cuhk", "--method", "irra", "--clip", str(tmp_path / "clip")])
    tbps.keep_image_size(args, recipe)
    assert (recipe["height"], recipe["width"]) == (384, 128)


def test_what_cannot_be_exported(tmp_path):
    checkpoint(tmp_path / "overlap.pt", (16, 16), stride=4)
    command = ["eval.py", "--checkpoint", tmp_path / "overlap.pt"]
    assert "overlapping patches" in error(*command, "--export", tmp_path / "out") and not (tmp_path / "out").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.txt").write_text("mine")
    assert "is not an empty folder" in error(*command, "--export", tmp_path / "full")
    checkpoint(tmp_path / "teacher.pt", (16, 16))
    saved = torch.load(tmp_path / "teacher.pt")
    torch.save(saved | dict(args=saved["args"] | dict(trains="teacher")), tmp_path / "teacher.pt")
    said = error("eval.py", "--checkpoint", tmp_path / "teacher.pt", "--export", tmp_path / "out")
    assert "export its student" in said and not (tmp_path / "out").exists()
    assert "does nothing else" in error(*command, "--export", tmp_path / "out", "--dataset", "toy")
    assert "take one checkpoint" in error(*command, tmp_path / "overlap.pt", "--export", tmp_path / "out")
