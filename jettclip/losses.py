"""Losses: functions of the features of a whole batch. Several processes gather them first.

The contrastive loss is CLIP's, primary components are Long-CLIP's (Zhang et al., ECCV 2024), and
the distillation methods have the names and equations of CLIP-KD (Yang et al., CVPR 2024).
"""

import math
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .utils import nearest


class Features(NamedTuple):
    """Normalised features of a batch. Those of several teachers lie side by side."""

    image: Tensor  # (B, d)
    text: Tensor  # (B, d)
    scale: Tensor  # factor of the cosines
    teachers: tuple = ()  # the Features of each

    def logits(self):
        return self.scale * self.image @ self.text.T  # (B, B): rows are images

    def log_probs(self):
        """Log-softmax of the rows of logits (B, B); several teachers' probabilities averaged."""
        logs = [F.log_softmax(f.logits(), dim=1) for f in self.teachers or [self]]
        return torch.stack(logs).logsumexp(dim=0) - math.log(len(logs))

    def across(self, teacher):
        """These images with the teacher's texts."""
        return self._replace(text=teacher.text)

    def flip(self):
        """Images and texts swapped: the rows of the logits are texts."""
        return Features(self.text, self.image, self.scale, tuple(f.flip() for f in self.teachers))


def single(x):
    """x in float32 at least: bfloat16 would round logits by up to a quarter."""
    return x.float() if x.itemsize < 4 else x


def normalised(image, text, scale):
    if not len(image) == len(text) > 0:
        raise ValueError(f"a loss of {len(image)} images and {len(text)} texts: pair at least one")
    return Features(F.normalize(single(image), dim=1), F.normalize(single(text), dim=1), scale)


def both_ways(loss, *features):
    """The mean of a loss from images to texts and the same from texts to images."""
    return (loss(*features) + loss(*(f.flip() for f in features))) / 2


def cross_entropy(features, label_smoothing=0.0):
    """Each row of the logits should find the column of its own index."""
    target = torch.arange(len(features.image), device=features.image.device)
    return F.cross_entropy(features.logits(), target, label_smoothing=label_smoothing)


def contrastive_loss(image, text, scale, label_smoothing=0.0):
    """CLIP's loss of features (B, d) of any length -> scalar; `scale` is the factor of cosines."""
    loss = partial(cross_entropy, label_smoothing=label_smoothing)
    return both_ways(loss, normalised(image, text, scale))


class _Project(torch.autograd.Function):
    """Centred X (B, d) -> its projection onto its k leading principal directions.

    The gradient divides only by gaps, at least a floor, between a kept and a dropped eigenvalue:
    equal rows and singular values leave it finite, unlike that of an SVD.
    """

    @staticmethod
    def forward(ctx, x, k):
        tall = x.shape[0] > x.shape[1]
        a = x.T @ x if tall else x @ x.T  # A, the smaller of the two: (d, d) or (B, B)
        values, vectors = torch.linalg.eigh(a)  # ascending
        ctx.save_for_backward(x, values, vectors)
        ctx.k, ctx.tall = k, tall
        kept = vectors[:, -k:]
        return (x @ kept) @ kept.T if tall else kept @ (kept.T @ x)

    @staticmethod
    def backward(ctx, grad):
        (x, values, vectors), k = ctx.saved_tensors, ctx.k
        kept, dropped = vectors[:, -k:], vectors[:, :-k]
        floor = float(values[-1]) * torch.finfo(x.dtype).eps * len(values)
        gap = values[-k:, None] - values[None, :-k]  # (k, rest)
        gap = gap.clamp(min=floor + torch.finfo(x.dtype).tiny)
        through = (grad @ kept) @ kept.T if ctx.tall else kept @ (kept.T @ grad)
        p = x.T @ grad if ctx.tall else grad @ x.T  # gradient of the projector
        m = (kept.T @ ((p + p.T) / 2) @ dropped) / gap  # (k, rest)
        a = kept @ m @ dropped.T
        a = 2 * (a + a.T)  # gradient of A, doubled because A is quadratic in X
        return through + (x @ a if ctx.tall else a @ x), None


def primary_components(features, k=32):
    """Long-CLIP's primary components (section 3.3): (B, d) rebuilt from its mean and k directions.

    The directions are those of this batch. At most k + 1 rows, or rank k, come back unchanged, and
    so does a batch with NaN, whose loss is then NaN.
    """
    if min(features.shape) <= k or len(features) == k + 1 or not torch.isfinite(features).all():
        return features
    x = single(features)
    mean = x.mean(dim=0, keepdim=True)
    return (mean + _Project.apply(x - mean, k)).to(features.dtype)


def kl(log_probs, target):
    """KL(target || probabilities), mean over the rows; both are given as logarithms (B, B)."""
    return F.kl_div(log_probs, target, reduction="batchmean", log_target=True)


def fd(student, teacher):
    """Feature distillation (equation 6): mean squared error of the features."""
    return F.mse_loss(student.image, teacher.image) + F.mse_loss(student.text, teacher.text)


def mfd(masked, teacher):
    """Masked feature distillation: `fd` of images that the student saw masked."""
    return F.mse_loss(masked.image, teacher.image)


def crd(student, teacher):
    """Contrastive relational distillation (equation 9): KL of the similarities within the batch."""
    return both_ways(lambda s, t: kl(s.log_probs(), t.log_probs()), student, teacher)


def icl(student, teacher):
    """Interactive contrastive learning: the student's features find the teacher's."""
    return both_ways(lambda s, t: cross_entropy(s.across(t)), student, teacher)


def cross_kd(student, teacher):
    """Cross-model distillation: KL of the student's similarities to the teacher's features."""
    return both_ways(lambda s, t: kl(s.across(t).log_probs(), t.log_probs()), student, teacher)


def gd(student, teacher):
    """Gradient distillation: mean squared error of the contrastive loss's gradients."""

    def gradients(f):  # with respect to images and texts, (B, d) each
        logits, n = f.logits(), len(f.image)
        of_image = (logits.softmax(dim=1) @ f.text - f.text) * f.scale / n
        probability = (f.logits() - logits.logsumexp(dim=1, keepdim=True)).exp()
        return of_image, (probability.T @ f.image - f.image) * f.scale / n

    pairs = (student, teacher), (student.flip(), teacher.flip())
    return sum(F.mse_loss(*g) for pair in pairs for g in zip(*map(gradients, pair), strict=True))


def afd(student, teacher, heads):
    """Augmented feature distillation: contrastive loss of learned fusions of both models."""
    image = heads.fuse_image(torch.cat([student.image, teacher.image], dim=1))
    text = heads.fuse_text(torch.cat([student.text, teacher.text], dim=1))
    return contrastive_loss(image, text, student.scale)


def rd(student, teacher, heads):
    """Relational distillation of CLIP-RD (arXiv 2603.25383): VRD + VRD_ce + XRD, learned scales.

    Vertical (VRD): its images are as near to the teacher's images as its texts are to the teacher's
    texts. Anchors (VRD_ce), without which all similarities become equal: each is nearest to the
    teacher's of its own. Cross (XRD): images to the teacher's texts as texts to its images.
    """

    def towards(target, trained):
        return kl(trained.log_probs(), target.log_probs().detach())

    t_v, t_t, t_x = heads.scales
    image = Features(teacher.image, student.image, t_v)  # rows: the teacher's
    text = Features(teacher.text, student.text, t_t)
    cross = Features(teacher.image, student.text, t_x), Features(teacher.text, student.image, t_x)
    vrd = both_ways(towards, text, image)
    anchors = both_ways(cross_entropy, image) + both_ways(cross_entropy, text)
    return vrd + anchors + (both_ways(towards, *cross) + both_ways(towards, *cross[::-1])) / 2


# Functions of a student's and a teacher's Features: of equal width, but for crd and afd. afd and rd
# also take the Heads.
METHODS = {f.__name__: f for f in (fd, crd, icl, cross_kd, gd, afd, mfd, rd)}


def parse_method(method):
    """ "crd+fd" -> ["crd", "fd"]; "none" -> []. An unknown name is an error."""
    names = [] if method == "none" else method.split("+")
    for name in names:
        if name not in METHODS:
            raise ValueError(nearest(name, [*METHODS, "none"], "distillation method"))
    return names


class Heads(nn.Module):
    """What distillation learns beside the student: maps to the teacher's width, fusions for afd,
    scales for rd."""

    def __init__(self, method, student_width, teacher_width):
        super().__init__()
        self.image, self.text = nn.Identity(), nn.Identity()
        if student_width != teacher_width:
            self.image, self.text = (nn.Linear(student_width, teacher_width) for _ in range(2))
        if "rd" in parse_method(method):
            self.scales = nn.Parameter(torch.full((3,), math.log(1 / 0.07)))  # used as they are
        if "afd" in parse_method(method):
            both = student_width + teacher_width
            self.fuse_image, self.fuse_text = (nn.Linear(both, student_width) for _ in range(2))


def distill_loss(
    method,
    student_image,
    student_text,
    teacher_image,
    teacher_text,
    *,
    student_scale,
    teacher_scale=100.0,
    method_weights=None,
    heads=None,
    teacher_widths=None,
):
    """Distillation loss of features (B, d), by one of METHODS or a sum such as "crd+fd" -> scalar.

    method_weights: factor of a method, 1 where absent. heads: needed where the widths differ, and
    for afd and rd. teacher_widths: those of several teachers, whose features lie side by side.
    """
    names, widths = parse_method(method), teacher_widths or [teacher_image.shape[1]]
    student = aligned = normalised(student_image, student_text, student_scale)
    sides = zip(teacher_image.split(widths, 1), teacher_text.split(widths, 1), strict=True)
    teachers = tuple(normalised(image, text, teacher_scale) for image, text in sides)
    joined = (torch.cat([f[side] for f in teachers], dim=1) for side in (0, 1))
    teacher = normalised(*joined, teacher_scale)._replace(teachers=teachers)
    if heads is not None:  # in the teacher's width
        aligned = normalised(heads.image(student_image), heads.text(student_text), student_scale)
    arguments = {"crd": (student, teacher), "afd": (student, teacher, heads)}
    arguments["rd"] = aligned, teacher, heads
    losses = {name: METHODS[name](*arguments.get(name, (aligned, teacher))) for name in names}
    return sum((method_weights or {}).get(name, 1.0) * loss for name, loss in losses.items())


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
    **distillation,
):
    """Total loss of a batch -> (scalar, terms by name).

    student, teacher: features (image, long, short), (B, d) each; for mfd the student's end with
    those of masked images. weights: contrastive long and short, distillation long and short. Short
    captions meet the primary components of the batch's images; pairs="long" does not distil them.
    Further arguments go to `distill_loss`.
    """
    image, long, short, *masked = map(single, student)
    a_long, a_short, d_long, d_short = weights
    terms = {"contrastive_long": a_long * contrastive_loss(image, long, scale, label_smoothing)}
    image_short = primary_components(F.normalize(image, dim=1), components)
    if a_short:  # the rebuilt features keep their length, as in Long-CLIP
        pair = Features(image_short, F.normalize(short, dim=1), scale)
        loss = both_ways(partial(cross_entropy, label_smoothing=label_smoothing), pair)
        terms["contrastive_short"] = a_short * loss
    if method == "none":
        return sum(terms.values()), terms

    unmasked = "+".join(name for name in parse_method(method) if name != "mfd") or "none"
    if (unmasked != method) != bool(masked):
        raise ValueError("mfd, and mfd alone, needs a fourth student feature: of masked images")
    distill = partial(distill_loss, student_scale=scale, **distillation)
    loss = distill(unmasked, image, long, *teacher[:2])
    loss = loss + sum(distill("mfd", f, long, *teacher[:2]) for f in masked)
    terms["distill_long"] = d_long * loss
    if pairs == "both" and unmasked != "none":
        widths = distillation.get("teacher_widths") or [teacher[0].shape[1]]
        taught = [F.normalize(f, dim=1) for f in teacher[0].split(widths, 1)]
        taught = torch.cat([primary_components(f, components) for f in taught], dim=1)
        loss = distill(unmasked, image_short, short, taught, teacher[2])
        terms["distill_short"] = d_short * loss
    return sum(terms.values()), terms
