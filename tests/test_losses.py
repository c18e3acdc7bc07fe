"""Losses against the values of published code, exact linear algebra, and sums by hand."""

import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden_values import GOLDEN, drawn, longclip_tokens, state_dict
from golden_values import LONGCLIP_TINY as LONGCLIP
from torch import nn

import jettclip
from jettclip import losses
from jettclip.losses import METHODS, Heads, contrastive_loss, distill_loss, total_loss

LOSSES = np.load(GOLDEN / "losses_seed0.npz")
STUDENT = drawn("s_img", 24, 32), drawn("s_txt", 24, 32)
TEACHER = tuple(F.normalize(drawn(name, 24, 32), dim=1) for name in ("t_img_same", "t_txt_same"))
SCALES = {"student_scale": 1 / 0.07, "teacher_scale": 100.0}
LONG_AND_SHORT = *STUDENT, drawn("s_short", 24, 32)
WIDE = [torch.cat([side, side], dim=1) for side in TEACHER]
TAUGHT = *(2 * f for f in TEACHER), drawn("t_short", 24, 32)  # lengths should not matter


def golden(name, file=LOSSES):
    return torch.from_numpy(np.asarray(file[name]))


def near(value, reference, **tolerance):
    """Whether two scalars agree to 1e-5, or to a given tolerance."""
    return value.item() == pytest.approx(float(reference), **(tolerance or {"abs": 1e-5}))


def relative(value, reference):
    """Length of the difference over length of the reference."""
    return ((value - reference).norm() / reference.norm()).item()


@pytest.mark.parametrize("bits, tolerance", [(64, 1e-9), (32, 1e-4), (16, 2e-2)])
@pytest.mark.parametrize("rows, width", [(40, 24), (16, 64), (30, 30)])
def test_components_and_gradient_agree_with_svd(rows, width, bits, tolerance):
    dtype = getattr(torch, f"float{bits}")
    exact = F.normalize(drawn("rows", rows, width).double(), dim=1).requires_grad_()
    weights, mean = drawn("weights", rows, width).double(), exact.mean(dim=0, keepdim=True)
    u, s, v = torch.linalg.svd(exact - mean, full_matrices=False)
    reference = mean + (u[:, :8] * s[:8]) @ v[:8]
    (reference * weights).sum().backward()
    features = exact.detach().to(dtype).requires_grad_()
    components = losses.primary_components(features, 8)
    (components * weights.to(dtype)).sum().backward()
    assert components.dtype == dtype
    assert relative(components.detach().double(), reference.detach()) < tolerance
    assert relative(features.grad.double(), exact.grad) < tolerance


DEGENERATE = {
    "duplicated rows": drawn("rows", 10, 12).repeat(2, 1),
    "equal singular values": torch.cat([torch.eye(12), -torch.eye(12)]),
    "low rank: 3": drawn("rows", 20, 3) @ drawn("columns", 3, 12),
    "low rank: zeros": torch.zeros(20, 12),
    "low rank: 3, wide": drawn("rows", 20, 3) @ drawn("columns", 3, 50),
}


@pytest.mark.parametrize("name", DEGENERATE)
def test_gradient_stays_finite(name):
    features = DEGENERATE[name].clone().requires_grad_()
    components = losses.primary_components(features, 5)
    (components * drawn("weights", *features.shape)).sum().backward()
    assert torch.isfinite(components).all() and torch.isfinite(features.grad).all()
    if "low rank" in name:  # nothing is left out
        assert torch.allclose(components, features, atol=1e-5) and features.grad.norm() < 1e3


@pytest.mark.parametrize("rows, width", [(6, 20), (1, 20), (20, 5)])
def test_few_rows_or_columns_come_back_unchanged(rows, width):
    features = drawn("rows", rows, width).requires_grad_()
    components = losses.primary_components(features, 5)
    components.sum().backward()
    assert torch.equal(components, features) and (features.grad == 1).all()


def test_contrastive_by_hand_and_published():
    """Cosines [[1, 0], [0.6, 0.8]] times 5; smoothed, the wrong of two classes weighs 0.1 / 2."""
    image, text = torch.tensor([[2.0, 0.0], [0.6, 0.8]]), torch.tensor([[7.0, 0.0], [0.0, 0.1]])
    by_rows = (math.log(1 + math.exp(0 - 5)) + math.log(1 + math.exp(3 - 4))) / 2
    by_columns = (math.log(1 + math.exp(3 - 5)) + math.log(1 + math.exp(0 - 4))) / 2
    assert near(contrastive_loss(image, text, 5.0), (by_rows + by_columns) / 2)
    expected = math.log(1 + math.exp(-3)) + 0.05 * 3
    assert near(contrastive_loss(torch.eye(2), torch.eye(2), 3.0, label_smoothing=0.1), expected)
    assert near(contrastive_loss(*STUDENT, 1 / 0.07), golden("clipkd/same/task"))
    assert near(contrastive_loss(*STUDENT, 1 / 0.07, 0.1), golden("jett/CRD/contrastive"))


CLIP_KD = [name.split("/")[1:] for name in LOSSES.files if name.startswith("clipkd")]


@pytest.mark.parametrize("kind, method", [n for n in CLIP_KD if len(n) == 2 and n[1] in METHODS])
def test_distillation_agrees_with_clip_kd(kind, method):
    """With the learned maps that the recorded values were computed with."""
    width, image = {"same": 32, "wide": 48}[kind], STUDENT[0].clone().requires_grad_()
    teacher = [F.normalize(drawn(f"t_{side}_{kind}", 24, width), dim=1) for side in ("img", "txt")]
    heads, proj = Heads(method, 32, width), {"image": "visual_proj", "text": "text_proj"}
    proj |= {"fuse_image": "visual_fusion_proj", "fuse_text": "text_fusion_proj"}
    for name, parameter in heads.named_parameters():
        module, key = name.split(".")
        parameter.data = golden(f"clipkd/{kind}/param/{proj[module]}.{key}")
    loss = distill_loss(method, image, STUDENT[1], *teacher, heads=heads, **SCALES)
    loss.backward()
    assert near(loss, golden(f"clipkd/{kind}/{method}"))
    assert relative(image.grad, golden(f"clipkd/{kind}/{method}/grad_s_img")) < 1e-4


@pytest.mark.parametrize("widths, name", [([32], "distill"), ([20, 12], "distill_ensemble")])
def test_crd_agrees_with_mobileclip(widths, name):
    """MobileCLIP takes cross-entropy: the KL divergence plus the teacher's own entropy."""
    loss = distill_loss("crd", *STUDENT, *TEACHER, teacher_widths=widths, **SCALES)
    sides = ([F.normalize(f, dim=1) for f in side.split(widths, 1)] for side in TEACHER)
    both = [torch.stack([100 * i @ t.T, 100 * t @ i.T]) for i, t in zip(*sides, strict=True)]
    p = torch.stack(both).softmax(3).mean(0)  # (2, B, B): both ways
    entropy = -(p * p.clamp(min=1e-30).log()).sum(2).mean()
    assert near(loss + entropy, golden(f"mobileclip/{name}"))


def test_sum_of_methods():
    fd, crd = (distill_loss(method, *STUDENT, *TEACHER, **SCALES) for method in ("fd", "crd"))
    assert near(distill_loss("crd", *STUDENT, *WIDE, **SCALES), crd)  # it needs no heads
    assert torch.allclose(distill_loss("crd+fd", *STUDENT, *TEACHER, **SCALES), crd + fd)
    factors = {"fd": 10.0, "crd": 0.5}
    weighted = distill_loss("fd+crd", *STUDENT, *TEACHER, **SCALES, method_weights=factors)
    assert torch.allclose(weighted, 0.5 * crd + 10 * fd)
    assert distill_loss("none", *STUDENT, *TEACHER, **SCALES) == 0


def rd_with(scales, *features):
    heads = Heads("rd", 2, 2)
    heads.scales.data = torch.tensor(scales)
    return distill_loss("rd", *features, heads=heads, student_scale=9.0, teacher_scale=7.0).item()


def test_relational_distillation_by_hand():
    """Two pairs in two dimensions, every cosine 0 or 1: a row of scale t is softmax(t, 0)."""
    eye, swapped = torch.eye(2), torch.eye(2).flip(0)
    p, q = (1 / (1 + math.exp(-t)) for t in (2, 3))
    anchors = -math.log(q) - math.log(p)
    vrd = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))  # of texts to images
    assert rd_with([3.0, 2.0, 1.0], eye, eye, eye, eye) == pytest.approx(vrd + anchors)
    # the student's texts swapped: they lie at the teacher's other one
    vrd = (1 - p) * math.log((1 - p) / q) + p * math.log(p / (1 - q))
    xrd = math.tanh(0.5)  # softmax(0, 1) to softmax(1, 0): (2 h - 1) * 1 with h = 1 / (1 + 1 / e)
    expected = pytest.approx(vrd + anchors + 2 + xrd)
    assert rd_with([3.0, 2.0, 1.0], eye, swapped, eye, eye) == expected
    # the teacher's too: only the anchors are left
    assert rd_with([3.0, 3.0, 1.0], eye, swapped, eye, swapped) == pytest.approx(-2 * math.log(q))


def test_relational_distillation_agrees_with_a_naive_one_in_float64():
    """Rows of softmax in the order of the paper's equations; targets of KL are fixed."""
    student = [f.double().requires_grad_() for f in STUDENT]
    taught, heads = [F.normalize(f.double()) for f in TEACHER], Heads("rd", 32, 32).double()
    heads.scales.data = torch.tensor([2.0, 3.0, 4.0], dtype=torch.double)
    loss = distill_loss("rd", *student, *taught, heads=heads, **SCALES)
    inputs = [*student, heads.scales]
    gradients = torch.autograd.grad(loss, inputs)
    (v, t), (tv, tt), (t_v, t_t, t_x) = map(F.normalize, student), taught, heads.scales

    def kl(target, trained):
        p, q = target.detach().softmax(1), trained.softmax(1)
        return sum(p[i] @ (p[i].log() - q[i].log()) for i in range(24)) / 24

    def ce(logits):
        return -sum(logits[i].softmax(0)[i].log() for i in range(24)) / 24

    vrd = (kl(t_t * tt @ t.T, t_v * tv @ v.T) + kl(t_t * t @ tt.T, t_v * v @ tv.T)) / 2
    anchors = (ce(t_v * tv @ v.T) + ce(t_v * v @ tv.T)) / 2
    anchors = anchors + (ce(t_t * tt @ t.T) + ce(t_t * t @ tt.T)) / 2
    pairs = (tv @ t.T, tt @ v.T), (v @ tt.T, t @ tv.T)
    xrd = sum(kl(t_x * b, t_x * a) + kl(t_x * a, t_x * b) for a, b in pairs) / 4
    expected = vrd + anchors + xrd
    assert near(loss.detach(), expected.detach(), rel=1e-12)
    for gradient, exact in zip(gradients, torch.autograd.grad(expected, inputs), strict=True):
        assert relative(gradient, exact) < 1e-10


def test_relational_distillation_does_not_collapse():
    """Small towers learn without another loss. Without anchors and fixed targets, all features
    would become one: 0.1 of the images found, not 0.6."""
    torch.manual_seed(0)
    towers = [nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16)) for _ in range(2)]
    maps, heads = torch.randn(3, 8, 16), Heads("rd", 16, 16)
    optimizer = torch.optim.Adam(nn.ModuleList([*towers, heads]).parameters(), 0.01)
    for _ in range(100):
        z = torch.randn(64, 8)
        seen = [z @ m + torch.randn(64, 16) for m in maps[:2]]
        features = [tower(x) for tower, x in zip(towers, seen, strict=True)]
        student = losses.normalised(*features, torch.tensor(14.0))
        teacher = losses.normalised(z @ maps[2], z @ maps[2], torch.tensor(20.0))
        optimizer.zero_grad()
        METHODS["rd"](student, teacher, heads).backward()
        optimizer.step()
    found = (student.logits().argmax(1) == torch.arange(64)).double().mean()
    assert found > 0.6 and 1 - (student.image @ student.image.T).mean() > 0.9


def test_masked_feature_distillation_is_of_the_long_side():
    student = *LONG_AND_SHORT, drawn("masked", 24, 32)
    _, terms = total_loss(student, TAUGHT, 10.0, method="mfd")
    assert terms.keys() == {"contrastive_long", "contrastive_short", "distill_long"}
    expected = 1.5 * F.mse_loss(F.normalize(student[3], dim=1), TEACHER[0])
    assert near(terms["distill_long"], expected, rel=1e-5)
    for features, method in ((LONG_AND_SHORT, "mfd"), (student, "crd")):
        with pytest.raises(ValueError, match="needs a fourth student feature"):
            total_loss(features, TAUGHT, 10.0, method=method)


def test_total_by_its_terms():
    settings = {"teacher_scale": 30.0, "method_weights": {"fd": 20.0}}
    method = {"method": "crd+fd", "components": 6}
    loss, terms = total_loss(LONG_AND_SHORT, TAUGHT, 10.0, **method, **settings)
    (image, long, short), (t_image, t_long, t_short) = LONG_AND_SHORT, TAUGHT
    normal = (F.normalize(f, dim=1) for f in (image, t_image))
    rebuilt, t_rebuilt = (losses.primary_components(f, 6) for f in normal)
    logits = 10.0 * rebuilt @ F.normalize(short, dim=1).T  # what is rebuilt keeps its length
    both = (F.cross_entropy(x, torch.arange(24), label_smoothing=0.1) for x in (logits, logits.T))
    distill = partial(distill_loss, "crd+fd", student_scale=10.0, **settings)
    expected = {
        "contrastive_long": 0.8 * contrastive_loss(image, long, 10.0, 0.1),
        "contrastive_short": 0.4 * sum(both) / 2,
        "distill_long": 1.5 * distill(image, long, t_image, t_long),
        "distill_short": 0.5 * distill(rebuilt, short, t_rebuilt, t_short),
    }
    assert terms.keys() == expected.keys()
    assert all(near(term, expected[name], rel=1e-5) for name, term in terms.items())
    assert near(loss, sum(expected.values()), rel=1e-5)


def test_losses_are_computed_in_float32():
    """Of features rounded to 16 bits: the loss is that of the same features in 32 bits."""
    rounded = [f.bfloat16() for f in LONG_AND_SHORT], [f.bfloat16() for f in TAUGHT]
    method = {"method": "+".join(name for name in METHODS if name not in ("mfd", "afd"))}
    method["heads"] = Heads("rd", 32, 32)
    loss = total_loss(*rounded, torch.tensor(100.0), components=6, **method)[0]
    exact = [[f.float() for f in side] for side in rounded]
    assert loss.dtype == torch.float32
    whole = total_loss(*exact, torch.tensor(100.0), components=6, **method)[0]
    assert near(loss.detach(), whole.detach(), rel=2e-2)
    assert contrastive_loss(*rounded[0][:2], 100.0) == contrastive_loss(*exact[0][:2], 100.0)


def test_a_loss_needs_pairs():
    with pytest.raises(ValueError, match="a loss of 0 images and 2 texts: pair at least one"):
        contrastive_loss(torch.ones(0, 4), torch.ones(2, 4), 1.0)
    assert contrastive_loss(torch.ones(1, 4), torch.ones(1, 4), 1.0) == 0


def test_which_terms_there_are():
    total = partial(total_loss, LONG_AND_SHORT, TAUGHT, 10.0, components=6)
    assert list(total(weights=(1, 0, 0, 0))[1]) == ["contrastive_long"]
    terms = total(method="crd", pairs="long")[1]
    assert list(terms) == ["contrastive_long", "contrastive_short", "distill_long"]


def test_longclip(tmp_path):
    """A small one of known weights, 40 images, through all towers and the primary components."""
    torch.save(state_dict("longclip_tiny"), tmp_path / "longclip-tiny.pt")
    model = jettclip.create_model("LongCLIP", tmp_path / "longclip-tiny.pt")
    captions = (longclip_tokens(name, 40) for name in ("long", "short"))
    features = model.encode_image(drawn("image", 40, 3, 64, 64)), *map(model.encode_text, captions)
    for name, value in zip(("image", "long", "short"), features, strict=True):
        assert relative(value.detach(), golden(f"{name}_features", LONGCLIP)) < 1e-5
    loss, terms = total_loss(features, None, model.logit_scale.exp(), weights=(1, 1, 0, 0))
    assert near(terms["contrastive_long"], LONGCLIP["loss_long"])
    assert near(terms["contrastive_short"], LONGCLIP["loss_short"])
    loss.backward()
    projections = {"text_projection": model.text.text_projection, "visual_proj": model.visual.proj}
    for name, parameter in {**projections, "logit_scale": model.logit_scale}.items():
        assert relative(parameter.grad, golden(f"grad_{name}", LONGCLIP)) < 1e-4
