"""Metrics against a slow reference, by hand, with ties, many captions and single images; embedding order."""

import pytest
import torch

import eval as evaluation
from eval import retrieval_metrics


def slow_metrics(query, gallery, q_pid, g_pid, own=None):
    """One query at a time, by a full stable sort."""
    query, gallery = (x / x.norm(dim=1, keepdim=True) for x in (query, gallery))
    ranks_of = []
    for i in range(len(query)):
        order = sorted(range(len(gallery)), key=lambda j: (-(query[i] @ gallery[j]).item(), j))
        order = [j for j in order if own is None or j != own[i]]
        ranks_of.append([n + 1 for n, j in enumerate(order) if g_pid[j] == q_pid[i]])
    ranks_of = [r for r in ranks_of if r]
    ap = [sum((k + 1) / rank for k, rank in enumerate(r)) / len(r) for r in ranks_of]
    out = {f"R@{k}": 100 * sum(r[0] <= k for r in ranks_of) / len(ranks_of) for k in (1, 5, 10)}
    return out | {"mAP": 100 * sum(ap) / len(ap), "mINP": 100 * sum(len(r) / r[-1] for r in ranks_of) / len(ranks_of)}


def test_by_hand():
    # one query of person 7, gallery ranked 7 3 7: hits at ranks 1 and 3
    query, gallery = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.9, 0.1], [0.5, 0.5], [0.1, 0.9]])
    got = retrieval_metrics(query, gallery, torch.tensor([7]), torch.tensor([7, 3, 7]))
    assert got["R@1"] == 100
    assert got["mAP"] == pytest.approx(100 * (1 / 1 + 2 / 3) / 2)
    assert got["mINP"] == pytest.approx(100 * 2 / 3)


def test_golden_of_irra():
    # unit features with exactly these cosines: sqrt(1 - s^2) on an axis of its own for each gallery image
    sims = torch.tensor([[0.9, 0.8, 0.7, 0.6, 0.5], [0.1, 0.9, 0.3, 0.8, 0.2]], dtype=torch.float64)
    query = torch.eye(2, 7)
    gallery = torch.cat([sims.T / 2, torch.diag((1 - (sims.T / 2).square().sum(1)).sqrt())], dim=1)
    got = retrieval_metrics(query, gallery, torch.tensor([7, 8]), torch.tensor([7, 9, 7, 8, 7]))
    want = {"R@1": 50, "R@5": 100, "mAP": pytest.approx(62.7778, abs=1e-4), "mINP": pytest.approx(55.0)}
    assert {name: got[name] for name in want} == want


@pytest.mark.parametrize("persons, per_person, captions", [(40, 1, 2), (15, 4, 1), (9, 7, 10), (1, 5, 2)])
@pytest.mark.parametrize("ties", [False, True])
def test_equals_slow_reference(persons, per_person, captions, ties):
    g = torch.Generator().manual_seed(persons)
    g_pid = torch.arange(persons).repeat_interleave(per_person) * 3 + 5
    g_pid = g_pid[torch.randperm(persons * per_person, generator=g)]
    own = torch.arange(len(g_pid)).repeat_interleave(captions)
    gallery = torch.randn(len(g_pid), 8, generator=g)
    query = gallery[own] + 1.5 * torch.randn(len(own), 8, generator=g)
    if ties:                                                            # three axes: all scores are exactly 0 or 1
        gallery, query = (torch.eye(3)[x[:, :3].argmax(dim=1)] for x in (gallery, query))
    got = retrieval_metrics(query, gallery, g_pid[own], g_pid)
    assert got == pytest.approx(slow_metrics(query, gallery, g_pid[own], g_pid))
    if per_person > 1:
        got = retrieval_metrics(query, gallery, g_pid[own], g_pid, own)
        assert got == pytest.approx(slow_metrics(query, gallery, g_pid[own], g_pid, own))


def test_chunks_do_not_matter():
    # 12,000 queries on 300 images are four chunks of 3,495; scored 1,200 at a time each part is one
    g = torch.Generator().manual_seed(0)
    gallery, g_pid = torch.randn(300, 16, generator=g), torch.randint(0, 60, (300,), generator=g)
    query, q_pid = torch.randn(12_000, 16, generator=g), g_pid[torch.randint(0, 300, (12_000,), generator=g)]
    parts = [retrieval_metrics(q, gallery, p, g_pid) for q, p in zip(query.split(1200), q_pid.split(1200))]
    mean = {k: sum(p[k] for p in parts) / len(parts) for k in parts[0]}
    assert retrieval_metrics(query, gallery, q_pid, g_pid) == pytest.approx(mean, rel=1e-6)


def test_own_image_left_out():
    # person 1 has two images, person 2 one: the query for person 2 has nobody left and is dropped
    gallery = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.7, 0.7]])
    pid = torch.tensor([1, 1, 2])
    got = retrieval_metrics(gallery, gallery, pid, pid, own=torch.tensor([0, 1, 2]))
    assert got["dropped"] == 1 and got["R@1"] == 0 and got["mAP"] == pytest.approx(50)
    with pytest.raises(ValueError, match="besides its source image"):
        retrieval_metrics(gallery[2:], gallery[2:], torch.tensor([2]), torch.tensor([2]), own=torch.tensor([0]))


def test_queries_without_a_match_are_named():
    x = torch.eye(3)
    with pytest.raises(ValueError, match=r"1 queries .* query 2 \(pid 9\)"):
        retrieval_metrics(x, x, torch.tensor([1, 2, 9]), torch.tensor([1, 2, 3]))
    with pytest.raises(ValueError, match="0 queries"):
        retrieval_metrics(x[:0], x, torch.tensor([]), torch.tensor([1, 2, 3]))
    with pytest.raises(ValueError, match="0 gallery images"):
        retrieval_metrics(x, x[:0], torch.tensor([1, 2, 3]), torch.tensor([]))


def test_norm_does_not_matter_and_half_is_scored_in_fp32():
    g = torch.Generator().manual_seed(1)
    x, y, pid = torch.randn(50, 8, generator=g), torch.randn(50, 8, generator=g), torch.arange(50) // 2
    want = retrieval_metrics(x, y, pid, pid)
    assert retrieval_metrics(7 * x, 0.1 * y, pid, pid) == want
    x, y = x.half(), y.half()
    assert retrieval_metrics(x, y, pid, pid) == retrieval_metrics(x.float(), y.float(), pid, pid)


def test_texts_come_back_in_order():
    class Lengths(torch.nn.Module):                                     # the "feature" of a caption is its length
        def encode_text(self, tokens):
            return torch.stack([torch.ones(len(tokens)), tokens.argmax(dim=1).float()], dim=1)
    lengths = [5, 2, 9, 1, 7]
    tokens = torch.zeros(5, 77, dtype=torch.int64)
    tokens[range(5), lengths] = 99
    text = evaluation.embed_texts(Lengths(), tokens, batch=2)
    assert (text[:, 1] / text[:, 0]).tolist() == pytest.approx(lengths)


def test_numpy_features_and_ids():
    g = torch.Generator().manual_seed(2)
    query, gallery, pid = torch.randn(30, 8, generator=g), torch.randn(30, 8, generator=g), torch.arange(30) // 3
    want = retrieval_metrics(query, gallery, pid, pid, own=torch.arange(30))
    arrays = [x.numpy() for x in (query, gallery, pid, pid)]
    assert retrieval_metrics(*arrays, own=torch.arange(30).numpy()) == want
    assert retrieval_metrics(query.double().numpy(), gallery, pid.numpy(), pid, own=list(range(30))) == want


def test_scores_on_a_line():
    assert evaluation.format_scores({"R@1": 62.049, "mAP": 5.0}) == "R@1 62.05 mAP 5.00"
    assert evaluation.format_scores({"R@1": 1.0, "dropped": 3}) == "R@1 1.00 (3 queries dropped)"
