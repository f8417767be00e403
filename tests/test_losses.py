"""Losses: golden values of the released code (float64), formulas by hand, slow loops."""

import functools
import math

import numpy as np
import pytest
import torch
import torch.multiprocessing
import torch.nn.functional as F

import losses
from conftest import sines

IMAGE, TEXT, TEACHER_IMAGE, TEACHER_TEXT = (
    sines(1.0, 0.5, 0.1), sines(0.9, 0.6, 0.2), sines(1.1, 0.4, 0.3), sines(0.8, 0.7, 0.4),
)
PID, SCALE = torch.tensor([7, 7, 2, 5]), 10


@pytest.mark.parametrize(
    "alpha, teacher, golden",
    [
        (0.0, (), 0.5498112900547281),
        (0.25, (), 0.5177729456145578),
        (0.25, (TEACHER_IMAGE, TEACHER_TEXT), 0.5197544479173546),
        (0.5, (), 0.4857346011743874),
        (0.5, (TEACHER_IMAGE, TEACHER_TEXT), 0.4896976057799811),
    ],
)
def test_nitc(alpha, teacher, golden):
    assert losses.nitc(IMAGE, TEXT, PID, SCALE, alpha, *teacher).item() == pytest.approx(golden, rel=1e-12)


def test_ritc():
    assert losses.ritc(IMAGE, TEXT, PID, SCALE, eps=0.01).item() == pytest.approx(0.1959548894888226, rel=1e-12)


def test_ritc_minimum():
    # 320 lonely pairs, belief p = (q + eps) / (1 + 320 eps): the loss is -log(1 + 320 * 0.01) = -1.435
    logit = math.log(1.01 / 0.01)                                       # of the right pair over a wrong one
    eye = torch.eye(320, dtype=torch.float64)
    assert losses.ritc(eye, eye, torch.arange(320), logit).item() == pytest.approx(-math.log(1 + 320 * 0.01), abs=1e-9)


def test_citc():
    assert losses.citc(IMAGE, TEXT, 1, 0).item() == pytest.approx(0.02098163504514564, rel=1e-12)
    assert losses.citc(IMAGE, TEXT, 0, 1).item() == pytest.approx(0.010310926924320675, rel=1e-12)
    assert losses.citc(IMAGE, TEXT).item() == pytest.approx(0.007823140492366579, rel=1e-12)


def test_nt_xent():
    assert losses.nt_xent(TEACHER_IMAGE, TEACHER_TEXT, tau=0.1).item() == pytest.approx(0.31931483503194735, rel=1e-12)


def test_nt_xent_is_the_formula_of_the_paper():
    a, b, tau = F.normalize(IMAGE, dim=1), F.normalize(TEXT, dim=1), 0.1
    total = 0
    for x, y in ((a, b), (b, a)):
        for i in range(4):
            positive = math.exp(x[i] @ y[i] / tau)
            others = sum(math.exp(x[i] @ y[j] / tau) for j in range(4)) + sum(
                math.exp(x[i] @ x[j] / tau) for j in range(4) if j != i
            )
            total -= math.log(positive / others) / 4 / 2
    assert losses.nt_xent(IMAGE, TEXT, tau).item() == pytest.approx(total, rel=1e-12)


def test_itc_by_hand():
    # two pairs, image_0 = text_0 = x, image_1 = text_1 = y, at scale 2: each row is softmax of (2, 0)
    eye = torch.eye(2)
    assert losses.itc(3 * eye, eye, 2.0).item() == pytest.approx(math.log(1 + math.exp(-2)), rel=1e-6)


def test_itc_is_nitc_of_strangers():
    assert losses.itc(IMAGE, TEXT, SCALE).item() == pytest.approx(
        losses.nitc(IMAGE, TEXT, torch.arange(4), SCALE).item(), rel=1e-12
    )
    assert losses.itc(IMAGE, TEXT, SCALE).item() != pytest.approx(losses.nitc(IMAGE, TEXT, PID, SCALE).item(), rel=1e-3)


def test_nitc_by_slow_loop():
    image, text = F.normalize(IMAGE, dim=1), F.normalize(TEXT, dim=1)
    total = 0
    for x, y in ((image, text), (text, image)):
        for i in range(4):
            p = torch.softmax(SCALE * torch.stack([x[i] @ y[j] for j in range(4)]), 0)
            right = [j for j in range(4) if PID[j] == PID[i]]
            total -= sum(math.log(p[j]) / len(right) for j in right) / 4 / 2
    assert losses.nitc(IMAGE, TEXT, PID, SCALE).item() == pytest.approx(total, rel=1e-12)


# ---- IRRA and UIT ---------------------------------------------------------------------------------------------------

V, T = (
    torch.tensor([[1, 0], [0, 1], [1, 1], [2, 1]]).double(),
    torch.tensor([[1, 0.5], [0.2, 1], [1, -1], [0.5, 1]]).double(),
)
ID = torch.tensor([0, 1, 0, 2])


@pytest.mark.parametrize("scale, sdm, itc", [(1, 18.77321, 1.36443), (10, 14.72684, 3.01292), (50, 15.95410, 13.29432)])
def test_sdm_and_itc_of_irra(scale, sdm, itc):
    assert losses.sdm(V, T, ID, scale).item() == pytest.approx(sdm, abs=5e-6)
    assert losses.itc(V, T, scale).item() == pytest.approx(itc, abs=5e-6)


def test_cmpm():
    assert losses.cmpm(V, T, ID).item() == pytest.approx(18.48476, abs=5e-6)


def test_sdm_divides_the_rows():
    """With features that tell persons apart exactly, only the 1e-8 is left. A column-normalised q is the same, because
    rows of one person have equal sums; the order of the batch does not matter."""
    pid = torch.tensor([3, 3, 3, 5])
    eye = torch.eye(2, dtype=torch.float64)[[0, 0, 0, 1]]
    assert losses.sdm(eye, eye, pid, 60).item() == pytest.approx(0, abs=1e-6)
    order = torch.tensor([2, 0, 3, 1])
    assert losses.sdm(V[order], T[order], ID[order]).item() == pytest.approx(losses.sdm(V, T, ID).item(), rel=1e-12)


def test_triplet():
    assert losses.triplet(V, T, ID).item() == pytest.approx(0.49229, abs=5e-6)
    image, text = F.normalize(V, dim=1), F.normalize(T, dim=1)
    by_hand = [0, 0]                                                    # negatives as the specification lists them
    for i, (n, m) in enumerate(zip([3, 2, 3, 2], [3, 3, 3, 0])):
        by_hand[0] += max(0, (text[i] @ image[n] - text[i] @ image[i] + 0.05).item()) / 4
        by_hand[1] += max(0, (image[i] @ text[m] - image[i] @ text[i] + 0.05).item()) / 4
    assert by_hand == pytest.approx([0.18012, 0.31217], abs=5e-6)


def test_triplet_of_one_person_is_zero():
    v = V.clone().requires_grad_()
    loss = losses.triplet(v, T, torch.zeros(4))
    loss.backward()
    assert loss.item() == 0 and not v.grad.any()


def test_id_mlm_and_restoration_by_hand():
    # uniform logits over 4 classes: log 4 on either side; a certain and right one: 0
    sure = 1e3 * F.one_hot(ID, 4).double()
    assert losses.id_loss(torch.zeros(4, 4), torch.zeros(4, 4), ID).item() == pytest.approx(math.log(4), rel=1e-6)
    assert losses.id_loss(sure, torch.zeros(4, 4).double(), ID).item() == pytest.approx(math.log(4) / 2, rel=1e-6)
    # of three tokens one was asked for
    logits = torch.tensor([[[0.0, 0, 0], [5, 5, 5 + math.log(2)], [9, 0, 0]]])
    assert losses.mlm(logits, torch.tensor([[-1, 2, -1]])).item() == pytest.approx(math.log(2), rel=1e-6)
    # two patches of two values, the second dropped: (1 + 9) / 2
    assert (
        losses.restoration(
            torch.tensor([[[7.0, 7], [1, 3]]]), torch.zeros(1, 2, 2), torch.tensor([[False, True]])
        ).item()
        == 5
    )


# ---- distillation ---------------------------------------------------------------------------------------------------

def cosines(x, y):
    return [[(a @ b / a.norm() / b.norm()).item() for b in y] for a in x]


def test_distillation_by_slow_loops():
    weight = torch.tensor([1.0, 0.0, 0.5, 1.0])
    away = [2 - 2 * cosines([s], [t])[0][0] for s, t in zip(IMAGE, TEACHER_IMAGE)]
    assert losses.distil_features(IMAGE, TEACHER_IMAGE).item() == pytest.approx(sum(away) / 4, rel=1e-9)
    assert losses.distil_features(IMAGE, TEACHER_IMAGE, weight).item() == pytest.approx(
        (away[0] + away[2] / 2 + away[3]) / 2.5, rel=1e-9
    )
    assert losses.distil_features(IMAGE, TEACHER_IMAGE, 0 * weight).item() == 0
    R, rich = cosines(IMAGE, TEXT), cosines(TEACHER_IMAGE, TEACHER_TEXT)
    want = sum((R[i][j] - rich[i][j]) ** 2 for i in range(4) for j in range(4)) / 4
    assert losses.distil_relations(IMAGE, TEXT, TEACHER_IMAGE, TEACHER_TEXT).item() == pytest.approx(want, rel=1e-9)
    total = 0
    for student, teacher in ((R, rich), ([list(r) for r in zip(*R)], [list(r) for r in zip(*rich)])):
        for i in range(4):
            exp_s, exp_t = [math.exp(x / 0.1) for x in student[i]], [math.exp(x / 0.1) for x in teacher[i]]
            for j in range(4):
                target = 0.7 * exp_t[j] / sum(exp_t) + 0.3 * (i == j)
                total += target * math.log(target / (exp_s[j] / sum(exp_s))) / 4
    assert losses.distil_affinity(IMAGE, TEXT, TEACHER_IMAGE, TEACHER_TEXT, tau=0.1, alpha=0.3).item() == pytest.approx(
        total, rel=1e-9
    )


def test_a_student_like_its_teacher_has_nothing_to_learn():
    order = torch.tensor([2, 0, 3, 1])
    for loss in (
        losses.distil_relations,
        functools.partial(losses.distil_affinity, alpha=0.0),
        lambda i, t, ri, rt: losses.distil_features(i, ri),
    ):
        assert loss(IMAGE, TEXT, 3 * IMAGE, 0.1 * TEXT).item() == pytest.approx(0, abs=1e-12)  # whatever the norms
        some = loss(IMAGE, TEXT, TEACHER_IMAGE, TEACHER_TEXT).item()
        assert loss(*(x[order] for x in (IMAGE, TEXT, TEACHER_IMAGE, TEACHER_TEXT))).item() == pytest.approx(
            some, rel=1e-9
        )
        assert some > 0.01
        teacher = TEACHER_IMAGE.clone().requires_grad_()
        student = IMAGE.clone().requires_grad_()
        loss(student, TEXT, teacher, TEACHER_TEXT).backward()
        assert student.grad.any() and teacher.grad is None


def test_the_teacher_gets_no_gradient():
    image, text, scale = (
        IMAGE.clone().requires_grad_(),
        TEXT.clone().requires_grad_(),
        torch.tensor(10.0, dtype=torch.float64, requires_grad=True),
    )
    teachers = [t.clone().requires_grad_() for t in (TEACHER_IMAGE, TEACHER_TEXT)]
    losses.nitc(image, text, PID, scale, 0.5, *teachers).backward()
    assert all(t.grad is None for t in teachers) and scale.grad != 0
    # the scale in the targets is constant: the gradient equals that with frozen targets, by finite differences
    with torch.no_grad():
        belief = 10.0 * F.normalize(TEACHER_IMAGE, dim=1) @ F.normalize(TEACHER_TEXT, dim=1).T
        q = losses.identity_labels(PID, torch.float64)
        target = [0.5 * b.softmax(1) + 0.5 * q for b in (belief, belief.T)]

        def value(s):
            logits = s * F.normalize(IMAGE, dim=1) @ F.normalize(TEXT, dim=1).T
            return (losses.soft_cross_entropy(logits, target[0]) + losses.soft_cross_entropy(logits.T, target[1])) / 2
        assert scale.grad.item() == pytest.approx(((value(10.001) - value(9.999)) / 0.002).item(), rel=1e-5)


@pytest.mark.parametrize(
    "call",
    [
        lambda i, t: losses.itc(i, t, 100.0),
        lambda i, t: losses.nitc(i, t, PID, 100.0, 0.5),
        lambda i, t: losses.ritc(i, t, PID, 100.0),
        lambda i, t: losses.citc(i, t),
        lambda i, t: losses.nt_xent(i, t),
        lambda i, t: losses.sdm(i, t, PID),
        lambda i, t: losses.cmpm(i, t, PID),
        lambda i, t: losses.triplet(i, t, PID),
        lambda i, t: losses.id_loss(i, t, torch.arange(4) % 3),
        lambda i, t: losses.distil_features(i, t),
        lambda i, t: losses.distil_relations(i, t, t, i),
        lambda i, t: losses.distil_affinity(i, t, t, i),
        lambda i, t: losses.restoration(i[None], t[None], torch.ones(1, 4, dtype=torch.bool)),
    ],
)
def test_full_precision_whatever_autocast_says(call):
    image, text = IMAGE.float(), TEXT.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = call(image, text)
    assert inside.dtype == torch.float32 and inside.item() == call(image, text).item()
    assert call(image.bfloat16(), text.bfloat16()).dtype == torch.float32
    assert call(IMAGE, TEXT).dtype == torch.float64


def _gathered(rank, port, result):
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    image, text = (x[2 * rank:2 * rank + 2].clone().requires_grad_() for x in (IMAGE, TEXT))
    loss = losses.nitc(losses.gather(image), losses.gather(text), losses.gather(PID[2 * rank:2 * rank + 2]), SCALE)
    (loss / 2).backward()  # DistributedDataParallel averages over the ranks
    result[rank] = [loss.item(), image.grad, text.grad]
    torch.distributed.destroy_process_group()


def test_gather_gives_the_gradient_of_the_whole_batch():
    import socket
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    with torch.multiprocessing.Manager() as manager:
        result = manager.dict()
        torch.multiprocessing.spawn(_gathered, (port, result), nprocs=2)
        image, text = IMAGE.clone().requires_grad_(), TEXT.clone().requires_grad_()
        whole = losses.nitc(losses.gather(image), losses.gather(text), PID, SCALE)  # one process: gather does nothing
        whole.backward()
        for k, x in ((1, image), (2, text)):
            torch.testing.assert_close(torch.cat([result[0][k], result[1][k]]), x.grad, rtol=1e-12, atol=1e-12)
        assert result[0][0] == result[1][0] == pytest.approx(whole.item(), rel=1e-12)


def test_numbers_to_expect():
    """Those of the file's first lines; and losses can be called by keywords."""
    torch.manual_seed(0)
    image, text, pid = torch.randn(320, 512), torch.randn(320, 512), torch.arange(320)
    assert losses.itc(image=image, text=text, scale=14.0).item() == pytest.approx(6.0, abs=0.1)
    assert losses.itc(image, text, 100.0).item() == pytest.approx(13.6, abs=0.5)
    assert losses.nitc(image, text, pid, 14.0).item() == pytest.approx(6.0, abs=0.1)
    assert losses.ritc(image, text, pid, 14.0).item() == pytest.approx(-1.0, abs=0.1)
    assert losses.sdm(image, text, pid, 14.0).item() == pytest.approx(25.6, abs=0.3)


def test_arrays_are_refused_in_words():
    """numpy arrays have no gradient: the sentence says how to convert them, and also where they are given by name."""
    array = np.ones((2, 3), np.float32)
    for loss in (losses.itc, losses.nt_xent, losses.triplet):
        with pytest.raises(
            TypeError, match=f"{loss.__name__} takes tensors and numbers, not ndarray; see torch.as_tensor"
        ):
            loss(array, array, [0, 1])
    with pytest.raises(TypeError, match="nitc takes tensors and numbers, not ndarray"):
        losses.nitc(image=array, text=array, pid=[0, 1], scale=1.0)
