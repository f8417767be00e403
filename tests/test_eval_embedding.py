"""Embedding and evaluation without tbps or data: what goes in, in which order, and what comes out."""

import pytest
import torch
import torch.nn.functional as F
import tqdm

import eval as evaluation
from eval import retrieval_metrics


class Linear(torch.nn.Module):
    """The feature of an image is its mean colour; that of a caption is the mean of one-hot tokens 1, 2, 3."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))

    def encode_image(self, pixels):
        return self.scale * pixels.mean(dim=(2, 3))

    def encode_text(self, tokens):
        return F.one_hot(tokens, 100)[..., 1:4].float().mean(dim=1)


class Preprocessing:
    """Stands in for data.Preprocessing: an image is (r, g, b), a caption a string."""

    def image(self, image):
        return torch.tensor(image)[:, None, None].expand(3, 4, 2)

    def text(self, caption):
        return caption.lower()


def tokenize(captions):
    """Red 1, green 2, blue 3, then the end of text, 99."""
    tokens = torch.zeros(len(captions), 8, dtype=torch.int64)
    for row, caption in zip(tokens, captions):
        words = [("red", "green", "blue").index(word) + 1 for word in caption.split()] + [99]
        row[:len(words)] = torch.tensor(words)
    return tokens


RECORDS = [
    dict(image=(1.0, 0.1, 0.0), captions=["Red", "red red green"], pid=7),
    dict(image=(0.0, 1.0, 0.2), captions=["green"], pid=3),
    dict(image=(0.8, 0.6, 0.0), captions=["red GREEN"], pid=7),
    dict(image=(0.0, 0.1, 1.0), captions=["blue", "blue green blue blue"], pid=5),
]


def test_an_evaluation_set_keeps_the_order_of_the_records():
    images, tokens, pid, source = evaluation.evaluation_set(RECORDS, Preprocessing(), tokenize)
    assert pid.tolist() == [7, 3, 7, 5] and source.tolist() == [0, 0, 1, 2, 3, 3]
    assert len(images) == 4 and images[1].shape == (3, 4, 2)
    assert images[1][:, 0, 0].tolist() == pytest.approx([0, 1, 0.2])
    assert tokens[3].tolist() == [1, 2, 99, 0, 0, 0, 0, 0]              # the caption went through Preprocessing.text


@pytest.mark.parametrize("batch", [1, 3, 256])
def test_features_come_in_order_and_of_unit_length(batch):
    images, tokens, *_ = evaluation.evaluation_set(RECORDS, Preprocessing(), tokenize)
    image = evaluation.embed_images(Linear(), images, batch=batch, progress=False)
    text = evaluation.embed_texts(Linear(), tokens, batch=batch)
    want = F.normalize(torch.tensor([r["image"] for r in RECORDS]), dim=1)
    assert torch.allclose(image, want) and image.dtype == torch.float32
    assert torch.allclose(text[1], F.normalize(torch.tensor([2.0, 1.0, 0.0]), dim=0))
    assert torch.allclose(text.norm(dim=1), torch.ones(6)) and not image.requires_grad and not text.requires_grad


def test_workers_do_not_change_the_order():
    images, *_ = evaluation.evaluation_set(RECORDS * 20, Preprocessing(), tokenize)
    alone, shared = (evaluation.embed_images(Linear(), images, workers=n, batch=7, progress=False) for n in (0, 2))
    assert torch.equal(alone, shared)


def test_nothing_to_embed_is_no_error():
    """As in one of many processes."""
    assert len(evaluation.embed_images(Linear(), evaluation.Images([], None), progress=False)) == 0
    assert len(evaluation.embed_texts(Linear(), torch.zeros(0, 8, dtype=torch.int64))) == 0


def test_scores_of_a_split():
    inputs = evaluation.evaluation_set(RECORDS, Preprocessing(), tokenize)
    model = Linear().train()
    rows, image, text = evaluation.evaluate(model, *inputs, progress=False)
    assert list(rows) == ["text to image", "image to text", "text to image, excluding the source image"]
    assert not model.training
    pid, source = inputs[2:]
    assert rows["text to image"] == retrieval_metrics(text, image, pid[source], pid)
    assert rows["text to image"]["R@1"] == 100
    assert rows["image to text"] == retrieval_metrics(image, text, pid, pid[source])
    # Persons 3 and 5 have one image each: three captions have nobody left to find
    assert rows[evaluation.EXCLUDED]["dropped"] == 3 and rows[evaluation.EXCLUDED]["R@1"] == 100


def test_without_a_second_image_of_anybody_there_are_two_rows():
    rows, *_ = evaluation.evaluate(Linear(), *evaluation.evaluation_set(RECORDS[1:], Preprocessing(), tokenize))
    assert list(rows) == ["text to image", "image to text"]


def test_weights_that_diverged_are_named():
    model = Linear()
    model.scale.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="not finite.* diverged: lower its --lr"):
        evaluation.evaluate(model, *evaluation.evaluation_set(RECORDS, Preprocessing(), tokenize))


def gather(rank, file, out):
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=3)
    part = torch.arange(8.0).view(4, 2)[rank::3]
    few = torch.ones(1, 2) if rank == 0 else torch.empty(0, 0)          # two of three have nothing
    torch.save((evaluation.all_gather_rows(part), evaluation.all_gather_rows(few)), f"{out}{rank}")
    torch.distributed.destroy_process_group()


def test_rows_of_all_processes_in_order(tmp_path):
    torch.multiprocessing.spawn(gather, (str(tmp_path / "meet"), str(tmp_path / "out")), nprocs=3)
    for rank in range(3):
        whole, few = torch.load(tmp_path / f"out{rank}")
        assert torch.equal(whole, torch.arange(8.0).view(4, 2)) and torch.equal(few, torch.ones(1, 2))


def test_captions_show_progress_without_a_terminal(monkeypatch, capsys):
    """Like images: embedding many captions on a CPU takes minutes."""
    now, linear = [0], Linear()

    def slow(tokens):
        now[0] += 40
        return Linear().encode_text(tokens)
    monkeypatch.setattr(tqdm.std, "time", lambda: now[0])
    monkeypatch.setattr(linear, "encode_text", slow, raising=False)
    tokens = torch.zeros(6, 8, dtype=torch.int64)
    tokens[:, 1] = 99
    evaluation.embed_texts(linear, tokens, batch=1)
    assert capsys.readouterr().err == ""
    evaluation.embed_texts(linear, tokens, batch=1, progress=True)
    assert "captions: 2 of 6, 01:20 elapsed" in capsys.readouterr().err
