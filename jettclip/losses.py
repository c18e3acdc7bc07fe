"""Losses: functions of features. Every loss normalises the features it is given.

`contrastive_loss` is CLIP's, `primary_components` and the two-caption total are Long-CLIP's (Zhang et al., ECCV 2024),
the distillation methods carry CLIP-KD's names (Yang et al., CVPR 2024).

Features are those of the global batch. With several processes each one answers for its own rows (`Part`): logits are
(local, global), and the mean of all processes' losses is the loss of one process over the whole batch.
"""

import math
from dataclasses import dataclass
from typing import Callable

import torch
import torch.nn.functional as F
from torch import nn

from .utils import nearest


@dataclass(frozen=True)
class Part:
    """The rows of the global batch that this process answers for; `gather` joins all processes' rows, with gradient."""

    rows: slice
    gather: Callable  # (local, ...) -> (global, ...)


WHOLE = Part(slice(None), lambda local: local)


def contrastive_loss(image, text, scale, label_smoothing=0.0, part=WHOLE):
    """CLIP's symmetric cross-entropy: features (B, d) twice, `scale` the factor of the cosines -> scalar."""
    return _cross_entropy(
        F.normalize(image, dim=1), F.normalize(text, dim=1), scale, part, label_smoothing
    )


def _logits(one, other, scale, part):
    """Similarities of this part's rows to all of the other side, both ways -> 2 x (local, B)."""
    return scale * one[part.rows] @ other.T, scale * other[part.rows] @ one.T


def _find(query, key, scale, part, label_smoothing=0.0):
    """Cross-entropy of this part's queries, each of which belongs to the key of its own row -> scalar."""
    target = torch.arange(len(key), device=key.device)[part.rows]
    return F.cross_entropy(
        scale * query[part.rows] @ key.T, target, label_smoothing=label_smoothing
    )


def _cross_entropy(one, other, scale, part, label_smoothing=0.0):
    return (
        _find(one, other, scale, part, label_smoothing)
        + _find(other, one, scale, part, label_smoothing)
    ) / 2


class _Project(torch.autograd.Function):
    """Centred X (B, d) -> its projection onto its k leading principal directions.

    Works on the smaller of X X^T and X^T X. The gradient through the projector P of A divides only by gaps between a
    kept and a dropped eigenvalue, never by gaps inside either group, so duplicated rows and equal singular values
    leave it finite (the gap is floored); an SVD's backward is NaN there.
    """

    @staticmethod
    def forward(ctx, x, k):
        tall = x.shape[0] > x.shape[1]
        a = x.T @ x if tall else x @ x.T
        values, vectors = torch.linalg.eigh(a)  # ascending
        ctx.save_for_backward(x, values, vectors)
        ctx.k, ctx.tall = k, tall
        kept = vectors[:, -k:]
        return (x @ kept) @ kept.T if tall else kept @ (kept.T @ x)

    @staticmethod
    def backward(ctx, grad):
        x, values, vectors = ctx.saved_tensors
        kept, dropped = vectors[:, -ctx.k :], vectors[:, : -ctx.k]
        gap = values[-ctx.k :, None] - values[None, : -ctx.k]
        gap = gap.clamp(
            min=float(values[-1]) * torch.finfo(x.dtype).eps * len(values)
            + torch.finfo(x.dtype).tiny
        )
        through = (grad @ kept) @ kept.T if ctx.tall else kept @ (kept.T @ grad)
        p = x.T @ grad if ctx.tall else grad @ x.T  # gradient of P
        p = (p + p.T) / 2
        m = (kept.T @ p @ dropped) / gap  # (k, rest)
        a = kept @ m @ dropped.T
        a = 2 * (a + a.T)  # gradient of A, doubled because A is quadratic in X
        return through + (x @ a if ctx.tall else a @ x), None


def primary_components(features, k=32):
    """Long-CLIP's primary components (section 3.3): (B, d) -> (B, d), rebuilt from the mean and k principal directions.

    The directions are those of this very batch; a batch of k + 1 rows or fewer (or of rank k) comes back unchanged.
    So does one with NaN, which has no directions: the loss is NaN then, and whoever computes it can say where.
    """
    if min(features.shape) <= k or len(features) == k + 1 or not torch.isfinite(features).all():
        return features
    x = features.float() if features.dtype in (torch.float16, torch.bfloat16) else features
    mean = x.mean(dim=0, keepdim=True)
    return (mean + _Project.apply(x - mean, k)).to(features.dtype)


# ---- distillation: each method is a function of one `Pair`


@dataclass(frozen=True)
class Pair:
    """Normalised features of one image-text pair of sides, (B, d) each, and the factors of their cosines.

    teachers: one (image, text) for each teacher; teacher_image and teacher_text are the teachers' features side by side.
    aligned_image, aligned_text: the student's in the teacher's width (the student's own where the widths agree).
    """

    image: torch.Tensor
    text: torch.Tensor
    aligned_image: torch.Tensor
    aligned_text: torch.Tensor
    teacher_image: torch.Tensor
    teacher_text: torch.Tensor
    teachers: list
    scale: torch.Tensor
    teacher_scale: float
    part: Part
    heads: nn.Module

    def teacher_log_probabilities(self):
        """Log-softmax of the teacher's similarities, both ways; of several teachers the mean probability."""
        each = [
            [
                F.log_softmax(logits, dim=1)
                for logits in _logits(*teacher, self.teacher_scale, self.part)
            ]
            for teacher in self.teachers
        ]
        return [
            torch.stack(way).logsumexp(0) - math.log(len(way)) for way in zip(*each)
        ]  # 2 x (local, B)


def _kl(logits, log_targets):
    """KL(target || softmax(logits)), mean over the rows."""
    return F.kl_div(
        F.log_softmax(logits, dim=1), log_targets, reduction="batchmean", log_target=True
    )


def _fd(pair):
    """Feature distillation: mean squared error of the features, image and text (equation 6)."""
    rows = pair.part.rows
    return F.mse_loss(pair.aligned_image[rows], pair.teacher_image[rows]) + F.mse_loss(
        pair.aligned_text[rows], pair.teacher_text[rows]
    )


def _mfd(pair):
    """Masked feature distillation: fd of an image of which the student saw a part only (the training loop masks it)."""
    return F.mse_loss(pair.aligned_image[pair.part.rows], pair.teacher_image[pair.part.rows])


def _crd(pair):
    """Contrastive relational distillation: KL divergence between the softmaxed rows of similarities, both ways."""
    logits = _logits(pair.image, pair.text, pair.scale, pair.part)
    return sum(_kl(*both) for both in zip(logits, pair.teacher_log_probabilities())) / 2


def _crd_ce(pair):
    """The same as MobileCLIP writes it: cross-entropy, which is the KL divergence plus the teacher's own entropy."""
    logits = _logits(pair.image, pair.text, pair.scale, pair.part)
    return (
        sum(
            F.cross_entropy(*both)
            for both in zip(logits, (t.exp() for t in pair.teacher_log_probabilities()))
        )
        / 2
    )


def _icl(pair):
    """Interactive contrastive learning: the student's features find the teacher's of the other side."""
    return (
        _find(pair.aligned_image, pair.teacher_text, pair.scale, pair.part)
        + _find(pair.aligned_text, pair.teacher_image, pair.scale, pair.part)
    ) / 2


def _cross_kd(pair):
    """Cross-model distillation: KL from the teacher's similarities to those of the student with the teacher."""
    rows, (of_image, of_text) = pair.part.rows, pair.teacher_log_probabilities()
    return (
        _kl(pair.scale * pair.aligned_image[rows] @ pair.teacher_text.T, of_image)
        + _kl(pair.scale * pair.aligned_text[rows] @ pair.teacher_image.T, of_text)
    ) / 2


def _gradients(query, key, scale, part):
    """Gradients of the cross-entropy of `query` against `key` -> for this part's rows of both, (local, d) each."""
    rows, n = part.rows, len(query)
    logits = scale * query[rows] @ key.T  # (local, B)
    normaliser = part.gather(logits.logsumexp(dim=1))  # (B,)
    of_query = (logits.softmax(dim=1) @ key - key[rows]) * scale / n
    probability = (
        scale * query @ key[rows].T - normaliser[:, None]
    ).exp()  # (B, local): the columns of this part's keys
    return of_query, (probability.T @ query - query[rows]) * scale / n


def _gd(pair):
    """Gradient distillation: mean squared error of the contrastive loss's gradients by the features."""
    student, teacher = (
        (pair.aligned_image, pair.aligned_text),
        (pair.teacher_image, pair.teacher_text),
    )
    return sum(
        F.mse_loss(ours, theirs)
        for way in (1, -1)
        for ours, theirs in zip(
            _gradients(*student[::way], pair.scale, pair.part),
            _gradients(*teacher[::way], pair.teacher_scale, pair.part),
        )
    )


def _afd(pair):
    """Augmented feature distillation: contrastive loss of learned fusions of student's and teacher's features."""
    if pair.heads is None:
        raise ValueError(
            "afd learns to fuse features: give distill_loss heads=Heads('afd', student_width, teacher_width)"
        )
    fused = (
        F.normalize(fuse(torch.cat([ours, theirs], dim=1)), dim=1)
        for fuse, ours, theirs in (
            (pair.heads.fuse_image, pair.image, pair.teacher_image),
            (pair.heads.fuse_text, pair.text, pair.teacher_text),
        )
    )
    return _cross_entropy(*fused, pair.scale, pair.part)


def _rd(pair):
    """Relational distillation after CLIP-RD (Chung et al., arXiv 2603.25383): vertical and cross, weighed alike.

    Vertical: the student's image is as near to all teacher images as its text is to all teacher texts. Cross: the
    student's image is as near to the teacher's texts as its text is to the teacher's images. Both symmetric KL.
    """
    rows = pair.part.rows

    def agree(image_to, text_to):
        one, other = (
            F.log_softmax(pair.scale * ours[rows] @ theirs.T, dim=1)
            for ours, theirs in ((pair.aligned_image, image_to), (pair.aligned_text, text_to))
        )
        return (
            sum(
                F.kl_div(a, b, reduction="batchmean", log_target=True)
                for a, b in ((one, other), (other, one))
            )
            / 2
        )

    return agree(pair.teacher_image, pair.teacher_text) + agree(
        pair.teacher_text, pair.teacher_image
    )


METHODS = {
    "fd": _fd,
    "crd": _crd,
    "crd_ce": _crd_ce,
    "icl": _icl,
    "cross_kd": _cross_kd,
    "gd": _gd,
    "afd": _afd,
    "mfd": _mfd,
    "rd": _rd,
}


class Heads(nn.Module):
    """What a distillation loss learns beside the student: maps to the teacher's width, fusions for afd.

    Trained and checkpointed with the student, and no part of it: what is saved as the student has none.
    """

    def __init__(self, method, student_width, teacher_width, short_width=None):
        super().__init__()
        self.short = (
            None if short_width is None else Heads(method, student_width, short_width)
        )  # for a short_teacher
        if student_width != teacher_width:
            self.image, self.text = (
                nn.Linear(student_width, teacher_width),
                nn.Linear(student_width, teacher_width),
            )
        else:
            self.image, self.text = nn.Identity(), nn.Identity()
        if "afd" in parse_method(method):
            self.fuse_image, self.fuse_text = (
                nn.Linear(student_width + teacher_width, student_width) for _ in range(2)
            )


def parse_method(method):
    """ "crd+fd" -> ["crd", "fd"]; "none" -> []. An unknown name is an error."""
    names = [] if method == "none" else method.split("+")
    for name in names:
        if name not in METHODS:
            raise ValueError(nearest(name, [*METHODS, "none"], "distillation method"))
    return names


def distill_loss(
    method,
    student_image,
    student_text,
    teacher_image,
    teacher_text,
    *,
    student_scale,
    teacher_scale,
    weights=None,
    heads=None,
    teacher_widths=None,
    part=WHOLE,
):
    """Distillation loss `method`, one of METHODS or a sum ("crd+fd"; weights: method -> factor, 1 where absent) -> scalar.

    Features are (B, d); scales are factors of the cosines. heads: needed where the widths differ, and for afd.
    teacher_widths: several teachers, their features side by side, of these widths.
    """
    image, text = (F.normalize(f, dim=1) for f in (student_image, student_text))
    widths = teacher_widths or [teacher_image.shape[1]]
    teachers = [
        tuple(F.normalize(f, dim=1) for f in pair)
        for pair in zip(teacher_image.split(widths, 1), teacher_text.split(widths, 1))
    ]
    teacher_image, teacher_text = (
        F.normalize(torch.cat(side, dim=1), dim=1) for side in zip(*teachers)
    )
    aligned = [image, text]
    if heads is not None:
        aligned = [
            F.normalize(head(f), dim=1)
            for head, f in ((heads.image, student_image), (heads.text, student_text))
        ]
    elif image.shape[1] != teacher_image.shape[1] and set(parse_method(method)) - {"crd", "crd_ce"}:
        raise ValueError(
            f"student features of width {image.shape[1]} and teacher features of width {teacher_image.shape[1]}: "
            "give distill_loss heads=Heads(method, student_width, teacher_width)"
        )
    pair = Pair(
        image,
        text,
        *aligned,
        teacher_image,
        teacher_text,
        teachers,
        student_scale,
        teacher_scale,
        part,
        heads,
    )
    return sum(
        (weights or {}).get(name, 1.0) * METHODS[name](pair) for name in parse_method(method)
    )


def total_loss(
    student,
    teacher,
    scale,
    *,
    method="none",
    pairs="both",
    weights=(0.8, 0.4, 1.5, 0.5),
    components=32,
    label_smoothing=0.1,
    teacher_scale=100.0,
    method_weights=None,
    heads=None,
    teacher_widths=None,
    masked_image=None,
    short_teacher=None,
    part=WHOLE,
):
    """Total loss over one global batch -> (scalar, terms by name).

    student, teacher: (image, long, short) features, each (B, d); teacher None where method is "none". The four weights
    are a_long, a_short (contrastive) and d_long, d_short (distillation). Short captions meet the primary components of
    the image features, student's and teacher's of the same batch. pairs="long" distils image + long caption only.
    masked_image: the student's features of masked images, for mfd. short_teacher: another teacher's (image, short)
    features for the short side, such as the 77-token CLIP that knows short captions best (after LongD-CLIP, CVPR 2025).
    """
    image, long, short = student
    a_long, a_short, d_long, d_short = weights
    terms = {
        "contrastive_long": a_long * contrastive_loss(image, long, scale, label_smoothing, part)
    }
    if a_short or method != "none" and pairs == "both":
        image_short = primary_components(F.normalize(image, dim=1), components)
    if a_short:  # rebuilt features keep their length, as in Long-CLIP
        terms["contrastive_short"] = a_short * _cross_entropy(
            image_short, F.normalize(short, dim=1), scale, part, label_smoothing
        )
    if method == "none":
        return sum(terms.values()), terms

    unmasked = "+".join(name for name in parse_method(method) if name != "mfd") or "none"
    settings = {
        "student_scale": scale,
        "teacher_scale": teacher_scale,
        "weights": method_weights,
        "heads": heads,
        "teacher_widths": teacher_widths,
        "part": part,
    }
    distilled = distill_loss(unmasked, image, long, teacher[0], teacher[1], **settings)
    if unmasked != method:
        distilled = distilled + distill_loss(
            "mfd", masked_image, long, teacher[0], teacher[1], **settings
        )
    terms["distill_long"] = d_long * distilled
    if pairs == "both" and unmasked != "none":
        if short_teacher is None:
            each = teacher[0].split(teacher_widths or [teacher[0].shape[1]], 1)
            taught = (
                torch.cat(
                    [primary_components(F.normalize(one, dim=1), components) for one in each], 1
                ),
                teacher[2],
            )
        else:
            taught, settings = (
                short_teacher,
                {**settings, "teacher_widths": None, "heads": heads and heads.short},
            )
        terms["distill_short"] = d_short * distill_loss(
            unmasked, image_short, short, *taught, **settings
        )
    return sum(terms.values()), terms
