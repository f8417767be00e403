"""Losses for text-based person search, each a function of tensors: this file needs torch and nothing else, so copy it.

    from losses import nitc, ritc
    loss = nitc(image, text, pid, scale) + ritc(image, text, pid, scale)

    image, text  features of B pairs, (B, D) each, not normalised: every loss here does that itself
    pid          (B,) int, who is in the picture: two pairs with the same number show the same person
    scale        1 / temperature, a number or a 0-dim tensor that learns

Numbers to expect of 320 pairs of unrelated features: itc and nitc 6.0 at scale 14, near log(B) = 5.8, and some 13.5 at scale 100; ritc -1.0 and
sdm 25.6 at scale 14, for what they put under the labels, so that their logarithm exists, is 1e-2 and 1e-8.

All of it is computed in fp32 at least, whatever autocast says: at scale 100 a logit in fp16 is only good to 1/16. float64 stays
float64. With several processes, `gather` the features and ids first and let every rank compute the same global loss: the average
that DistributedDataParallel takes of the gradients is then exactly the gradient of one process with the whole batch."""

import functools

import torch
import torch.nn.functional as F


def full_precision(loss):
    """Decorator: run a loss outside autocast, on floating-point arguments of at least fp32."""

    @functools.wraps(loss)
    def run(*args, **kwargs):
        def raised(x):
            return x.float() if torch.is_tensor(x) and x.dtype in (torch.float16, torch.bfloat16) else x

        device = next(x.device for x in (*args, *kwargs.values()) if torch.is_tensor(x))
        with torch.autocast(device.type, enabled=False):
            return loss(*map(raised, args), **{name: raised(x) for name, x in kwargs.items()})

    return run


# ---- contrast: which text belongs to which image --------------------------------------------------------------------

def soft_cross_entropy(logits, target):
    """Cross-entropy against a distribution per row: mean_i -sum_j target_ij log softmax_j(logits_ij). Both (B, B)."""
    return -(target * logits.log_softmax(dim=1)).sum(dim=1).mean()


def reversed_kl(logits, log_q):
    """mean_i KL(softmax_j(logits_ij) || q_i) from the logarithm of q: what is believed, priced by the labels. Both (B, B)."""
    log_p = logits.log_softmax(dim=1)
    return (log_p.exp() * (log_p - log_q)).sum(dim=1).mean()


def same_person(pid, dtype=torch.float32):
    """The identity targets: q_ij = [pid_i == pid_j] / #{k: pid_i == pid_k}, (B, B). Each row is a distribution over the texts
    (or images) that are right for pair i: its own, and those of the same person that happen to be in the batch."""
    same = (pid[:, None] == pid[None, :]).to(dtype)
    return same / same.sum(dim=1, keepdim=True)


@full_precision
def itc(image, text, scale):
    """Image-text contrast as CLIP was trained with (arXiv 2103.00020, Fig. 3): cross-entropy of scale * cos(image_i, text_j)
    against the diagonal, both directions averaged. Other pairs of the same person count as wrong. image, text (B, D)."""
    logits = scale * F.normalize(image, dim=1) @ F.normalize(text, dim=1).T                             # (B, B)
    diagonal = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, diagonal) + F.cross_entropy(logits.T, diagonal)) / 2


@full_precision
def nitc(image, text, pid, scale, alpha=0.0, teacher_image=None, teacher_text=None):
    """Normalised image-text contrast, N-ITC of TBPS-CLIP (arXiv 2308.10045, Sec. "Loss functions"), with its soft labels:

        p_ij = softmax_j(scale * cos(image_i, text_j))
        target_ij = alpha * softmax_j(scale * cos(teacher_image_i, teacher_text_j)) + (1 - alpha) * q_ij,    q as in `same_person`
        loss = mean_i -sum_j target_ij log p_ij,   image -> text and text -> image averaged

    image, text (B, D), pid (B,). alpha in [0, 1] is how much the model believes itself rather than the labels. The teacher is
    the model itself, detached; None means these very features. The mix has no gradient, the scale in it neither."""
    image, text = F.normalize(image, dim=1), F.normalize(text, dim=1)
    logits = scale * image @ text.T                                                                     # (B, B)
    with torch.no_grad():
        target = target_t = same_person(pid, logits.dtype)                                           # symmetric
        if alpha > 0:
            teacher_image = image if teacher_image is None else F.normalize(teacher_image, dim=1)
            teacher_text = text if teacher_text is None else F.normalize(teacher_text, dim=1)
            belief = scale * teacher_image @ teacher_text.T
            target, target_t = (alpha * b.softmax(dim=1) + (1 - alpha) * target for b in (belief, belief.T))
    return (soft_cross_entropy(logits, target) + soft_cross_entropy(logits.T, target_t)) / 2


@full_precision
def ritc(image, text, pid, scale, eps=0.01):
    """Reversed image-text contrast, R-ITC of TBPS-CLIP: KL(p || q + eps) instead of the cross-entropy of p under q, so that
    belief in a wrong pair is what costs, up to -log(eps) = 4.6 for all of it. image, text (B, D), pid (B,).

    q + eps sums to 1 + B eps and is not normalised again: the minimum is -log(1 + B eps), -1.43 for 320 pairs, reached at
    p = (q + eps) / (1 + B eps). eps acts as label smoothing that grows with the batch; negative values are no mistake."""
    logits = scale * F.normalize(image, dim=1) @ F.normalize(text, dim=1).T                             # (B, B)
    log_q = (same_person(pid, logits.dtype) + eps).log()
    return (reversed_kl(logits, log_q) + reversed_kl(logits.T, log_q)) / 2


@full_precision
def citc(image, text, weight_in=0.25, weight_cross=0.25):
    """Cyclic image-text contrast, C-ITC of TBPS-CLIP (after CyCLIP, arXiv 2205.14459): image and text space shall have the same
    geometry, cos(image_i, image_j) = cos(text_i, text_j), and be symmetric, cos(image_i, text_j) = cos(image_j, text_i).

        loss = weight_in * mean_ij (I_i.I_j - T_i.T_j)^2 + weight_cross * mean_ij (I_i.T_j - I_j.T_i)^2

    image, text (B, D). The mean over B^2 and the weights are the released code's; the paper prints a sum over B and weights 1."""
    image, text = F.normalize(image, dim=1), F.normalize(text, dim=1)
    cross = image @ text.T                                                                              # (B, B)
    return weight_in * (image @ image.T - text @ text.T).square().mean() + weight_cross * (cross - cross.T).square().mean()


@full_precision
def sdm(image, text, pid, scale=50.0):
    """Similarity distribution matching, the main loss of IRRA (arXiv 2303.12501, Sec. 3.3):

        p_ij = softmax_j(scale * cos(image_i, text_j)),    q as in `same_person`
        loss = mean_i KL(p_i || q_i + 1e-8),   image -> text plus text -> image

    image, text (B, D), pid (B,), scale = 1 / 0.02 in the paper."""
    logits = scale * F.normalize(image, dim=1) @ F.normalize(text, dim=1).T                             # (B, B)
    log_q = (same_person(pid, logits.dtype) + 1e-8).log()               # belief in a wrong pair costs -log(1e-8) = 18.4
    return reversed_kl(logits, log_q) + reversed_kl(logits.T, log_q)


@full_precision
def cmpm(image, text, pid):
    """Cross-modal projection matching (Zhang and Lu, ECCV 2018): as `sdm`, but each feature is projected on the normalised ones
    of the other side, without temperature, and the labels have unit length instead of unit sum. image, text (B, D), pid (B,)."""
    same = (pid[:, None] == pid[None, :]).to(image.dtype)
    log_q = (F.normalize(same, dim=1) + 1e-8).log()
    return reversed_kl(image @ F.normalize(text, dim=1).T, log_q) + reversed_kl(text @ F.normalize(image, dim=1).T, log_q)


@full_precision
def triplet(image, text, pid, margin=0.05, hardest_positive=False):
    """Cross-modal triplet of UIT (arXiv 2307.09059), with d = 1 - cos:

        loss = mean_i relu(d(text_i, image_i) - d(text_i, image_n) + margin) + the same from images to texts

    n is the nearest of other persons. The positive is the pair's own other half, or with hardest_positive the farthest of the
    same person. image, text (B, D), pid (B,). A batch of one person has no negatives and gives 0."""
    cos = F.normalize(text, dim=1) @ F.normalize(image, dim=1).T                                        # (B, B)
    same = pid[:, None] == pid[None, :]
    if same.all():
        return 0 * cos.sum()
    loss = 0
    for c in (cos, cos.T):                                              # rows: captions that look for images, then the reverse
        positive = c.masked_fill(~same, torch.inf).amin(dim=1) if hardest_positive else c.diagonal()
        loss = loss + F.relu(c.masked_fill(same, -torch.inf).amax(dim=1) - positive + margin).mean()
    return loss


# ---- what else a pair can teach -------------------------------------------------------------------------------------

@full_precision
def id_loss(image_logits, text_logits, pid):
    """Who is it? Cross-entropy of one classifier on both sides, averaged (IRRA). logits (B, P), pid (B,) in 0 ... P-1."""
    return (F.cross_entropy(image_logits, pid) + F.cross_entropy(text_logits, pid)) / 2


@full_precision
def mlm(logits, target):
    """Masked language modelling (IRRA's implicit relation reasoning): cross-entropy over the tokens that were asked for.
    logits (..., vocab), target (...) int, -1 where nothing was; 0 if nothing was anywhere."""
    total = F.cross_entropy(logits.flatten(0, -2), target.flatten(), ignore_index=-1, reduction="sum")
    return total / (target >= 0).sum().clamp(min=1)


@full_precision
def restoration(predicted, target, dropped):
    """Text-guided restoration of UIT: squared error of the patches that were dropped. predicted, target (B, N, patch values),
    dropped (B, N) bool."""
    return (predicted - target).square().mean(dim=2)[dropped].mean()


# ---- distillation: a student learns what a richer teacher sees (LCR2S, arXiv 2310.11210) ----------------------------

@full_precision
def distil_features(student, teacher, weight=None):
    """The student's feature of each sample shall be the teacher's: sum_i w_i |s_i - t_i|^2 / sum_i w_i, both of unit length, so
    2 - 2 cos. student, teacher (B, D), weight (B,) or None; 0 if all weights are 0. Once per modality. ValueError if D differs."""
    if student.shape != teacher.shape:
        raise ValueError(f"the student's features are {tuple(student.shape)}, the teacher's {tuple(teacher.shape)}: they can share relations, not features")
    away = (F.normalize(student, dim=1) - F.normalize(teacher, dim=1).detach()).square().sum(dim=1)     # (B,)
    weight = torch.ones_like(away) if weight is None else weight.to(away.dtype)
    return (weight * away).sum() / weight.sum().clamp(min=1e-12)


@full_precision
def distil_relations(image, text, rich_image, rich_text):
    """The batch's image-text cosines shall be the teacher's: |R - R_rich|_F^2 / B, with R_ij = cos(image_i, text_j). All (B, D)."""
    relation = F.normalize(image, dim=1) @ F.normalize(text, dim=1).T                                   # (B, B)
    rich = (F.normalize(rich_image, dim=1) @ F.normalize(rich_text, dim=1).T).detach()
    return (relation - rich).square().sum() / len(relation)


@full_precision
def distil_affinity(image, text, rich_image, rich_text, tau=0.05, alpha=0.3):
    """The same neighbours instead of the same cosines, with a reminder of which pair belongs together:

        target_ij = (1 - alpha) softmax_j(R_rich_ij / tau) + alpha [i == j]
        loss = mean_i KL(target_i || softmax_j(R_ij / tau)),   image -> text plus text -> image

    All (B, D). Not in the paper: TinyCLIP's affinities with a pair mixed in, for a rich teacher makes a person's images alike and
    the student would forget which of them its caption was written for."""
    relation = F.normalize(image, dim=1) @ F.normalize(text, dim=1).T / tau                             # (B, B)
    rich = (F.normalize(rich_image, dim=1) @ F.normalize(rich_text, dim=1).T).detach() / tau
    eye, loss = torch.eye(len(relation), dtype=relation.dtype, device=relation.device), 0
    for student, teacher in ((relation, rich), (relation.T, rich.T)):
        target = (1 - alpha) * teacher.softmax(dim=1) + alpha * eye
        loss = loss + (torch.special.xlogy(target, target) - target * student.log_softmax(dim=1)).sum(dim=1).mean()
    return loss


# ---- self-supervision: two views of the same thing ------------------------------------------------------------------

@full_precision
def nt_xent(a, b, tau=0.1):
    """NT-Xent of SimCLR (arXiv 2002.05709, Eq. 1), the self-supervision of TBPS-CLIP: row i of `a` shall find row i of `b` among
    the 2B - 1 other rows, and the reverse. a, b (B, D): two views of each sample. Persons play no part: another image of
    the same person is a negative here."""
    z = F.normalize(torch.cat([a, b]), dim=1)                                                           # (2B, D)
    logits = (z @ z.T / tau).masked_fill(torch.eye(len(z), dtype=torch.bool, device=z.device), -torch.inf)
    return F.cross_entropy(logits, torch.arange(len(z), device=z.device).roll(len(a)))                  # i <-> i + B


# ---- many processes -------------------------------------------------------------------------------------------------

def ranks():
    """(number of this process, how many there are): (0, 1) without torch.distributed."""
    on = torch.distributed.is_available() and torch.distributed.is_initialized()
    return (torch.distributed.get_rank(), torch.distributed.get_world_size()) if on else (0, 1)


def gather(x, dim=0):
    """The rows of all ranks along `dim`, in rank order, with gradient: backward sums what every rank wants of these rows. All ranks must have
    as many. With one rank, x itself."""
    if ranks()[1] == 1:
        return x
    from torch.distributed.nn.functional import all_gather
    return torch.cat(all_gather(x.contiguous()), dim=dim)


def share(number):
    """What the mean over this rank's `number` rows weighs in the mean over all ranks' rows: W n / sum n; 1 with one rank."""
    total = torch.as_tensor(float(number))
    if (W := ranks()[1]) == 1:
        return 1.0
    if torch.distributed.get_backend() == "nccl":
        total = total.cuda()
    torch.distributed.all_reduce(total)
    return W * number / max(1.0, total.item())
