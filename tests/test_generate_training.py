"""Training the diffusion model of generate.py: resume from within an epoch, progress without a terminal."""

import pytest
import torch
from safetensors.torch import load_file

import data
import tbps
from conftest import error, run

QUICK = ["--count", "1", "--edits", "1", "--set", "height=32", "width=32", "steps=2", "train_epochs=2", "train_batch=4"]


def finetune(cuhk, diffusion, *options):
    return ["generate.py", "--dataset", "cuhk", "--data-root", cuhk, "--diffusion", diffusion, *options, *QUICK]


@pytest.mark.parametrize("stop", [2, 3, 5])
def test_resume_within_an_epoch_is_exact(stop, cuhk, diffusion, tmp_path, monkeypatch):
    """12 images in batches of 4 are 3 steps per epoch. Saving after every step and stopping changes no weight."""
    run(*finetune(cuhk, diffusion, "--finetune", tmp_path / "whole", "--out", tmp_path / "a"))
    command = finetune(cuhk, diffusion, "--finetune", tmp_path / "stopped", "--out", tmp_path / "b")
    command[1:1] = ["--save-minutes", "0"]
    saved = []

    def save_then_stop(path, content):
        torch.save(content, path)
        saved.append((content["epoch"], content["step"]))
        if len(saved) == stop:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tbps, "save", save_then_stop)
        run(*command, code=130)
    assert saved[-1] == {2: (0, 2), 3: (0, 3), 5: (1, 1)}[stop]
    assert f"epoch   {saved[-1][0] + 1}/2" in run(*command)
    folders = [tmp_path / "whole", tmp_path / "stopped"]
    whole, stopped = (load_file(folder / "unet/diffusion_pytorch_model.safetensors") for folder in folders)
    assert all(torch.equal(whole[name], stopped[name]) for name in whole)
    assert torch.equal(*(torch.load(folder / "last.pt")["optimizer"]["state"][0]["exp_avg"] for folder in folders))


def test_a_loss_that_is_not_finite_stops_before_it_is_saved(cuhk, diffusion, tmp_path):
    paths = ["--finetune", tmp_path / "model", "--out", tmp_path / "pairs"]
    command = finetune(cuhk, diffusion, *paths, "--save-minutes", "0")
    assert "is not finite in epoch" in error(*command, "train_lr=1e30", "train_epochs=9")
    weights = torch.load(tmp_path / "model/last.pt")["weights"]
    assert all(w.isfinite().all() for w in weights.values())


def test_progress_without_a_terminal(cuhk, diffusion, tmp_path, monkeypatch):
    """What takes long runs under data.progress_bar: a line a minute in a log file. Here the minute is 0 seconds."""
    bar = data.progress_bar
    hurry = dict(delay=0, mininterval=0, maxinterval=0)

    def impatient(*items, **options):
        made = bar(*items, **options)
        for name, value in hurry.items():
            setattr(made, name, value)
        return made

    monkeypatch.setattr(data, "progress_bar", impatient)
    said = run(*finetune(cuhk, diffusion, "--finetune", tmp_path / "model", "--out", tmp_path / "pairs"))
    assert "diffusion model: 12 of 24" in said and "pairs: 1 of 1" in said
