"""Losses: pure functions of features. Every loss normalises the features it is given.

`contrastive_loss` is CLIP's, `primary_components` and the two-caption total are Long-CLIP's (Zhang et al., ECCV 2024),
the distillation methods carry CLIP-KD's names (Yang et al., CVPR 2024).
"""
import torch
import torch.nn.functional as F

from .models import nearest


def contrastive_loss(image, text, scale, label_smoothing=0.0):
    """CLIP's symmetric cross-entropy: features (B, d) twice, `scale` the factor of the cosines -> scalar."""
    return _both_ways(scale * F.normalize(image, dim=1) @ F.normalize(text, dim=1).T, label_smoothing)  # (B, d) -> (B, B)


def _both_ways(logits, label_smoothing):
    """Cross-entropy of the rows and of the columns of (B, B), the diagonal being right -> scalar."""
    target = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, target, label_smoothing=label_smoothing)
            + F.cross_entropy(logits.T, target, label_smoothing=label_smoothing)) / 2


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
        kept, dropped = vectors[:, -ctx.k:], vectors[:, :-ctx.k]
        gap = values[-ctx.k:, None] - values[None, :-ctx.k]
        gap = gap.clamp(min=float(values[-1]) * torch.finfo(x.dtype).eps * len(values) + torch.finfo(x.dtype).tiny)
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


def _fd(student_image, student_text, teacher_image, teacher_text, student_scale, teacher_scale):
    """Feature distillation: mean squared error of the features, image and text."""
    return F.mse_loss(student_image, teacher_image) + F.mse_loss(student_text, teacher_text)


def _crd(student_image, student_text, teacher_image, teacher_text, student_scale, teacher_scale):
    """Contrastive relational distillation: KL divergence between the softmaxed rows of similarities, both ways."""
    student = student_scale * student_image @ student_text.T  # (B, d) -> (B, B)
    teacher = teacher_scale * teacher_image @ teacher_text.T
    return sum(F.kl_div(F.log_softmax(s, dim=1), F.log_softmax(t, dim=1), reduction="batchmean", log_target=True)
               for s, t in ((student, teacher), (student.T, teacher.T))) / 2


METHODS = {"fd": _fd, "crd": _crd}


def parse_method(method):
    """"crd+fd" -> ["crd", "fd"]; "none" -> []. An unknown name is an error."""
    names = [] if method == "none" else method.split("+")
    for name in names:
        if name not in METHODS:
            raise ValueError(nearest(name, [*METHODS, "none"], "distillation method"))
    return names


def distill_loss(method, student_image, student_text, teacher_image, teacher_text, *, student_scale, teacher_scale,
                 weights=None):
    """Distillation loss `method` ("fd", "crd" or sums, "crd+fd"; weights: method -> factor, 1 where absent) -> scalar.

    Features are (B, d), student's and teacher's of the same d; scales are factors of the cosines.
    """
    features = [F.normalize(f, dim=1) for f in (student_image, student_text, teacher_image, teacher_text)]
    return sum((weights or {}).get(name, 1.0) * METHODS[name](*features, student_scale, teacher_scale)
               for name in parse_method(method))


def total_loss(student, teacher, scale, *, method="none", pairs="both", weights=(0.8, 0.4, 1.5, 0.5), components=32,
               label_smoothing=0.1, teacher_scale=100.0, method_weights=None):
    """Total loss over one global batch -> (scalar, terms by name).

    student, teacher: (image, long, short) features, each (B, d); teacher None where method is "none". The four weights
    are a_long, a_short (contrastive) and d_long, d_short (distillation). Short captions meet the primary components of
    the image features, student's and teacher's of the same batch. pairs="long" distils image + long caption only.
    """
    image, long, short = student
    a_long, a_short, d_long, d_short = weights
    terms = {"contrastive_long": a_long * contrastive_loss(image, long, scale, label_smoothing)}
    if a_short or method != "none" and pairs == "both":
        image_short = primary_components(F.normalize(image, dim=1), components)
    if a_short:
        logits = scale * image_short @ F.normalize(short, dim=1).T  # rebuilt features keep their length, as in Long-CLIP
        terms["contrastive_short"] = a_short * _both_ways(logits, label_smoothing)
    if method != "none":
        scales = {"student_scale": scale, "teacher_scale": teacher_scale, "weights": method_weights}
        terms["distill_long"] = d_long * distill_loss(method, image, long, teacher[0], teacher[1], **scales)
        if pairs == "both":
            teacher_short = primary_components(F.normalize(teacher[0], dim=1), components)
            terms["distill_short"] = d_short * distill_loss(method, image_short, short, teacher_short, teacher[2], **scales)
    return sum(terms.values()), terms
