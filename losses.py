"""Losses for text-based person search, each a function of tensors. This file needs torch only: copy it into your
project.

    from losses import nitc, ritc
    loss = nitc(image, text, pid, scale) + ritc(image, text, pid, scale)

    image, text  features of B pairs, (B, D) each; they need not be normalised, every loss does that itself
    pid          (B,) int, the person of each pair: two pairs with the same id show the same person
    scale        1 / temperature, a number or a 0-dim tensor that is learned

Values to expect for 320 pairs of random features: itc and nitc 6.0 at scale 14 (log B = 5.8) and about 13.5 at scale
100; ritc -1.0 and sdm 25.6 at scale 14.

All losses are computed outside autocast and at least in fp32, because a logit of size 100 has a rounding error of
1/16 in fp16. float64 stays float64. Arguments that are neither tensors nor numbers raise TypeError.

Several processes: `gather` the features and ids first, and let every rank compute the same global loss. The mean of
the gradients over the ranks, as DistributedDataParallel takes it, is then the gradient of one process with the whole
batch."""

import functools

import torch
import torch.nn.functional as F


def full_precision(loss):
    """Decorator: compute a loss outside autocast, with fp16 and bf16 arguments converted to fp32."""

    def converted(x):
        return x.float() if torch.is_tensor(x) and x.dtype in (torch.float16, torch.bfloat16) else x

    @functools.wraps(loss)
    def run(*args, **kwargs):
        values = [*args, *kwargs.values()]
        for x in values:
            if not (torch.is_tensor(x) or x is None or isinstance(x, (int, float))):
                kind = type(x).__name__
                raise TypeError(f"{loss.__name__} takes tensors and numbers, not {kind}; see torch.as_tensor")
        device = next(x.device for x in values if torch.is_tensor(x))
        with torch.autocast(device.type, enabled=False):
            return loss(*map(converted, args), **{name: converted(x) for name, x in kwargs.items()})

    return run


# ---- contrastive losses: which text belongs to which image ----------------------------------------------------------

def cosines(a, b):
    """Cosine of each row of a (N, D) with each row of b (M, D): (N, M)."""
    return F.normalize(a, dim=1) @ F.normalize(b, dim=1).T


def soft_cross_entropy(logits, target):
    """mean_i -sum_j target_ij log softmax_j(logits_ij): cross-entropy against a distribution per row. Both (B, B)."""
    return -(target * logits.log_softmax(dim=1)).sum(dim=1).mean()


def reversed_kl(logits, log_q):
    """mean_i KL(softmax_j(logits_ij) || q_i), from the logarithm of the labels q. Both (B, B)."""
    log_p = logits.log_softmax(dim=1)
    return (log_p.exp() * (log_p - log_q)).sum(dim=1).mean()


def positives(pid):
    """[pid_i == pid_j] as bool, (B, B): the texts that are right for image i, and the reverse."""
    assert pid.ndim == 1, f"pid has the shape {tuple(pid.shape)}, it should be (B,)"
    return pid[:, None] == pid[None, :]


def identity_labels(pid, dtype=torch.float32):
    """q_ij = [pid_i == pid_j] / #{k: pid_i == pid_k}, (B, B): each row spreads its probability over all positives of
    the batch."""
    same = positives(pid).to(dtype)
    return same / same.sum(dim=1, keepdim=True)


@full_precision
def itc(image, text, scale):
    """Image-text contrast, as CLIP is trained (arXiv 2103.00020, Fig. 3): cross-entropy of scale * cos(image_i,
    text_j) against the diagonal, mean of both directions. Other pairs of the same person count as negatives. image,
    text (B, D)."""
    logits = scale * F.normalize(image, dim=1) @ F.normalize(text, dim=1).T                             # (B, B)
    diagonal = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, diagonal) + F.cross_entropy(logits.T, diagonal)) / 2


@full_precision
def nitc(image, text, pid, scale, alpha=0.0, teacher_image=None, teacher_text=None):
    """Normalised image-text contrast with soft labels: N-ITC of TBPS-CLIP (arXiv 2308.10045).

        p_ij = softmax_j(scale * cos(image_i, text_j))
        target_ij = alpha * softmax_j(scale * cos(teacher_image_i, teacher_text_j)) + (1 - alpha) * q_ij
        loss = mean_i -sum_j target_ij log p_ij,   mean of image -> text and text -> image

    with q as in `identity_labels`. image, text, teacher_image, teacher_text (B, D), pid (B,). alpha in [0, 1] is the
    share of the soft labels. The teacher is the model itself; by default its features are those of image and text.
    Targets have no gradient."""
    image, text = F.normalize(image, dim=1), F.normalize(text, dim=1)
    logits = scale * image @ text.T                                                                     # (B, B)
    with torch.no_grad():
        labels = image_target = text_target = identity_labels(pid, logits.dtype)    # symmetric: labels.T == labels
        if alpha > 0:
            teacher_image = image if teacher_image is None else F.normalize(teacher_image, dim=1)
            teacher_text = text if teacher_text is None else F.normalize(teacher_text, dim=1)
            soft = scale * teacher_image @ teacher_text.T
            image_target = alpha * soft.softmax(dim=1) + (1 - alpha) * labels
            text_target = alpha * soft.T.softmax(dim=1) + (1 - alpha) * labels
    return (soft_cross_entropy(logits, image_target) + soft_cross_entropy(logits.T, text_target)) / 2


@full_precision
def ritc(image, text, pid, scale, eps=0.01):
    """Reversed image-text contrast, R-ITC of TBPS-CLIP: KL(p || q + eps), where N-ITC takes the cross-entropy of p
    under q. It penalises probability on wrong pairs, by up to -log(eps) = 4.6. image, text (B, D), pid (B,).

    q + eps is not normalised: it sums to 1 + B eps. So the minimum is negative, -log(1 + B eps) = -1.43 for 320
    pairs, and eps acts as label smoothing that grows with the batch."""
    logits = scale * F.normalize(image, dim=1) @ F.normalize(text, dim=1).T                             # (B, B)
    log_q = (identity_labels(pid, logits.dtype) + eps).log()
    return (reversed_kl(logits, log_q) + reversed_kl(logits.T, log_q)) / 2


@full_precision
def citc(image, text, weight_in=0.25, weight_cross=0.25):
    """Cyclic image-text contrast, C-ITC of TBPS-CLIP (after CyCLIP, arXiv 2205.14459): images and texts should have
    the same geometry, cos(image_i, image_j) = cos(text_i, text_j), and be symmetric, cos(image_i, text_j) =
    cos(image_j, text_i).

        loss = weight_in * mean_ij (I_i.I_j - T_i.T_j)^2 + weight_cross * mean_ij (I_i.T_j - I_j.T_i)^2

    image, text (B, D). Weights and the mean over B^2 are those of the official code; the paper prints a sum over B,
    weight 1."""
    image, text = F.normalize(image, dim=1), F.normalize(text, dim=1)
    cross = image @ text.T                                                                              # (B, B)
    in_modal = (image @ image.T - text @ text.T).square().mean()
    return weight_in * in_modal + weight_cross * (cross - cross.T).square().mean()


@full_precision
def sdm(image, text, pid, scale=50.0):
    """Similarity distribution matching, the main loss of IRRA (arXiv 2303.12501, Sec. 3.3).

        p_ij = softmax_j(scale * cos(image_i, text_j))
        loss = mean_i KL(p_i || q_i + 1e-8),   sum of image -> text and text -> image

    with q as in `identity_labels`. image, text (B, D), pid (B,); scale is 1 / 0.02 in the paper."""
    logits = scale * F.normalize(image, dim=1) @ F.normalize(text, dim=1).T                             # (B, B)
    log_q = (identity_labels(pid, logits.dtype) + 1e-8).log()           # a wrong pair costs up to -log(1e-8) = 18.4
    return reversed_kl(logits, log_q) + reversed_kl(logits.T, log_q)


@full_precision
def cmpm(image, text, pid):
    """Cross-modal projection matching (Zhang and Lu, ECCV 2018). Like `sdm`, but the logits are projections on the
    normalised features of the other side, without a temperature, and labels have unit length instead of unit sum.
    image, text (B, D), pid (B,)."""
    log_q = (F.normalize(positives(pid).to(image.dtype), dim=1) + 1e-8).log()
    image_logits, text_logits = image @ F.normalize(text, dim=1).T, text @ F.normalize(image, dim=1).T
    return reversed_kl(image_logits, log_q) + reversed_kl(text_logits, log_q)


@full_precision
def triplet(image, text, pid, margin=0.05):
    """Cross-modal triplet loss of UIT (arXiv 2307.09059) with the hardest negative n, another person, and d = 1 - cos:

        loss = mean_i relu(d(text_i, image_i) - d(text_i, image_n) + margin),   sum of text -> image and image -> text

    image, text (B, D), pid (B,). A batch of one person has no negatives; its loss is 0."""
    cos, same = cosines(text, image), positives(pid)                                                    # (B, B)
    loss = 0
    for c in (cos, cos.T):
        hardest = c.masked_fill(same, -torch.inf).amax(dim=1)                       # (B,), -inf without negatives
        loss = loss + F.relu(hardest - c.diagonal() + margin).mean()
    return loss


# ---- classification and reconstruction ------------------------------------------------------------------------------

@full_precision
def id_loss(image_logits, text_logits, pid):
    """Identity classification (IRRA): cross-entropy of one classifier on images and texts, mean of both. logits (B,
    P); pid (B,) in 0 ... P-1."""
    return (F.cross_entropy(image_logits, pid) + F.cross_entropy(text_logits, pid)) / 2


@full_precision
def mlm(logits, target):
    """Masked language modelling (IRRA's implicit relation reasoning): mean cross-entropy over the masked tokens.
    logits (..., vocab), target (...) int, where -1 marks tokens that are not masked. 0 if no token is masked."""
    total = F.cross_entropy(logits.flatten(0, -2), target.flatten(), ignore_index=-1, reduction="sum")
    return total / (target >= 0).sum().clamp(min=1)


@full_precision
def restoration(predicted, target, dropped):
    """Text-guided restoration of UIT: mean squared error of the dropped patches. predicted, target (B, N, values of a
    patch), dropped (B, N) bool."""
    error = (predicted - target).square().mean(dim=2)                                                   # (B, N)
    return (error * dropped).sum() / dropped.sum()                      # indexing by `dropped` would wait for the GPU


# ---- distillation: a student copies its teacher (LCR2S, arXiv 2310.11210) -------------------------------------------

@full_precision
def distil_features(student, teacher, weight=None):
    """The student copies the teacher's features: sum_i w_i |s_i - t_i|^2 / sum_i w_i of unit vectors, which is 2 - 2
    cos. Call it once per modality. student, teacher (B, D), weight (B,) or None; 0 if all weights are 0. Raises
    ValueError if D differs."""
    if student.shape != teacher.shape:
        raise ValueError(f"the student's features are {tuple(student.shape)}, the teacher's {tuple(teacher.shape)}: "
                         "use distil_relations or distil_affinity, which compare cosines")
    error = (F.normalize(student, dim=1) - F.normalize(teacher, dim=1).detach()).square().sum(dim=1)    # (B,)
    weight = torch.ones_like(error) if weight is None else weight.to(error.dtype)
    return (weight * error).sum() / weight.sum().clamp(min=1e-12)


@full_precision
def distil_relations(image, text, teacher_image, teacher_text):
    """The student copies the teacher's image-text cosines R_ij of the batch: |R - R_teacher|_F^2 / B. All (B, D)."""
    relation, target = cosines(image, text), cosines(teacher_image, teacher_text).detach()              # (B, B)
    return (relation - target).square().sum() / len(relation)


@full_precision
def distil_affinity(image, text, teacher_image, teacher_text, tau=0.05, alpha=0.3):
    """The student copies the teacher's neighbours instead of its cosines, and is reminded of the pairs:

        target_ij = (1 - alpha) softmax_j(R_teacher_ij / tau) + alpha [i == j]
        loss = mean_i KL(target_i || softmax_j(R_ij / tau)),   sum of image -> text and text -> image

    All (B, D). Not in the paper: these are TinyCLIP's affinities with the pair mixed in. A teacher with support sets
    makes the images of a person alike, and without the pair the student forgets for which of them its caption was
    written."""
    relation = cosines(image, text) / tau                                                               # (B, B)
    teacher_relation = cosines(teacher_image, teacher_text).detach() / tau
    pair, loss = torch.eye(len(relation), dtype=relation.dtype, device=relation.device), 0
    for student, teacher in ((relation, teacher_relation), (relation.T, teacher_relation.T)):
        target = (1 - alpha) * teacher.softmax(dim=1) + alpha * pair
        loss = loss + (torch.special.xlogy(target, target) - target * student.log_softmax(dim=1)).sum(dim=1).mean()
    return loss


# ---- self-supervision -----------------------------------------------------------------------------------------------

@full_precision
def nt_xent(a, b, tau=0.1):
    """NT-Xent of SimCLR (arXiv 2002.05709, Eq. 1), the self-supervision of TBPS-CLIP: row i of `a` has to find row i
    of `b` among the 2B - 1 other rows, and the reverse. a, b (B, D): two views of each sample. Other images of the
    same person are negatives."""
    z = F.normalize(torch.cat([a, b]), dim=1)                                                           # (2B, D)
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    logits = (z @ z.T / tau).masked_fill(itself, -torch.inf)
    return F.cross_entropy(logits, torch.arange(len(z), device=z.device).roll(len(a)))                  # i <-> i + B


# ---- several processes ----------------------------------------------------------------------------------------------

def ranks():
    """(rank of this process, number of processes W): (0, 1) without torch.distributed."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


class GatherRows(torch.autograd.Function):
    """The rows of all ranks, in rank order. Backward sums the gradients that all ranks have for these rows."""

    @staticmethod
    def forward(ctx, x):
        parts = [torch.empty_like(x) for _ in range(ranks()[1])]
        torch.distributed.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad):
        grad, (rank, W) = grad.contiguous(), ranks()
        torch.distributed.all_reduce(grad)
        return grad.chunk(W)[rank]


def gather(x, dim=0):
    """The rows of all ranks along `dim`, in rank order, with gradient. All ranks must have the same number of rows.
    Without several processes, x itself."""
    if ranks()[1] == 1:
        return x
    return GatherRows.apply(x.transpose(0, dim)).transpose(0, dim)


def rank_weight(rows):
    """The weight of a mean over this rank's rows in the mean over the rows of all ranks: W n / sum of n, where n is
    len(rows); 1 with one process."""
    W = ranks()[1]
    if W == 1:
        return 1.0
    total = torch.full((), float(len(rows)), device=rows.device)
    torch.distributed.all_reduce(total)
    return W * len(rows) / total.clamp(min=1)
