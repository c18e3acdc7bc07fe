"""Losses against the published code's values, exact linear algebra, and batches worked out by hand."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden_values import GOLDEN, drawn, longclip_tokens, state_dict
from golden_values import LONGCLIP_TINY as LONGCLIP

import jettclip
from jettclip.losses import (
    METHODS,
    Heads,
    Part,
    contrastive_loss,
    distill_loss,
    primary_components,
    total_loss,
)

LOSSES = np.load(GOLDEN / "losses_seed0.npz")


def golden(name, file=LOSSES):
    return torch.from_numpy(np.asarray(file[name]))


def relative(value, reference):
    """Length of the difference over length of the reference."""
    return ((value - reference).norm() / reference.norm()).item()


# ---- primary components


def by_svd(features, k):
    mean = features.mean(dim=0, keepdim=True)
    u, s, v = torch.linalg.svd(features - mean, full_matrices=False)
    return mean + (u[:, :k] * s[:k]) @ v[:k]


def test_components_agree_with_long_clip():
    image = F.normalize(golden("image_features", LONGCLIP), dim=1)
    assert (primary_components(image) - golden("pca32", LONGCLIP)).abs().max() < 1e-5


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize("rows, width", [(40, 24), (16, 64), (30, 30)])
def test_components_and_gradient_agree_with_svd(rows, width, dtype, tolerance):
    exact = F.normalize(drawn("rows", rows, width).double(), dim=1).requires_grad_()
    weights = drawn("weights", rows, width).double()
    reference = by_svd(exact, 8)
    (reference * weights).sum().backward()
    features = exact.detach().to(dtype).requires_grad_()
    components = primary_components(features, 8)
    (components * weights.to(dtype)).sum().backward()
    assert components.dtype == dtype
    assert relative(components.detach().double(), reference.detach()) < tolerance
    assert relative(features.grad.double(), exact.grad) < tolerance


DEGENERATE = {
    "duplicated rows": drawn("rows", 10, 12).repeat(2, 1),
    "two rows repeated": drawn("rows", 2, 12).repeat(10, 1),
    "all rows equal": drawn("rows", 1, 12).repeat(20, 1),
    "rank 3": drawn("rows", 20, 3) @ drawn("other", 3, 12),
    "zeros": torch.zeros(20, 12),
    "equal singular values": torch.cat([torch.eye(12), -torch.eye(12)]),
    "all rows equal, wide": drawn("rows", 1, 50).repeat(20, 1),
    "rank 3, wide": drawn("rows", 20, 3) @ drawn("other", 3, 50),
}


@pytest.mark.parametrize("name", DEGENERATE)
def test_gradient_stays_finite(name):
    features = DEGENERATE[name].clone().requires_grad_()
    components = primary_components(features, 5)
    (components * drawn("weights", *features.shape)).sum().backward()
    assert torch.isfinite(components).all() and torch.isfinite(features.grad).all()
    if name not in (
        "equal singular values",
        "duplicated rows",
    ):  # rank below 5: nothing is left out
        assert torch.allclose(components, features, atol=1e-5)
        assert features.grad.norm() < 1e3


@pytest.mark.parametrize("rows, width", [(5, 20), (6, 20), (3, 20), (1, 20), (20, 5), (20, 4)])
def test_few_rows_or_columns_come_back_unchanged(rows, width):
    features = drawn("rows", rows, width).requires_grad_()
    components = primary_components(features, 5)
    assert torch.equal(components, features)
    components.sum().backward()
    assert torch.equal(features.grad, torch.ones_like(features))


@pytest.mark.parametrize("rows, width", [(20, 12), (12, 20)])
def test_a_nan_reaches_the_loss(rows, width):
    features = drawn("rows", rows, width)
    features[3, 4] = float("nan")
    assert torch.equal(primary_components(features, 5).isnan(), features.isnan())
    student = features, drawn("long", rows, width), drawn("short", rows, width)
    assert total_loss(student, None, 10.0, components=5)[0].isnan()


def test_components_of_half_precision():
    features = F.normalize(drawn("rows", 20, 12), dim=1)
    half = primary_components(features.half(), 5)
    assert half.dtype == torch.float16
    assert torch.allclose(half.float(), primary_components(features, 5), atol=2e-3)


# ---- contrastive


def test_contrastive_by_hand():
    """Cosines [[1, 0], [0.6, 0.8]] times 5."""
    image, text = torch.tensor([[2.0, 0.0], [0.6, 0.8]]), torch.tensor([[7.0, 0.0], [0.0, 0.1]])
    by_rows = (math.log(1 + math.exp(0 - 5)) + math.log(1 + math.exp(3 - 4))) / 2
    by_columns = (math.log(1 + math.exp(3 - 5)) + math.log(1 + math.exp(0 - 4))) / 2
    assert contrastive_loss(image, text, 5.0).item() == pytest.approx((by_rows + by_columns) / 2)


def test_label_smoothing_by_hand():
    """Of two classes the right one weighs 1 - 0.1 / 2, the wrong one 0.1 / 2."""
    image = text = torch.eye(2)
    expected = math.log(1 + math.exp(-3)) + 0.05 * 3
    assert contrastive_loss(image, text, 3.0, label_smoothing=0.1).item() == pytest.approx(expected)


def test_contrastive_agrees_with_published_code():
    loss = contrastive_loss(
        drawn("s_img", 24, 32), drawn("s_txt", 24, 32), 1 / 0.07, label_smoothing=0.1
    )
    assert loss.item() == pytest.approx(golden("jett/CRD/contrastive").item(), abs=1e-5)
    loss = contrastive_loss(drawn("s_img", 24, 32), drawn("s_txt", 24, 32), 1 / 0.07)
    assert loss.item() == pytest.approx(golden("clipkd/same/task").item(), abs=1e-5)


# ---- distillation

STUDENT = drawn("s_img", 24, 32), drawn("s_txt", 24, 32)
TEACHER = tuple(F.normalize(drawn(name, 24, 32), dim=1) for name in ("t_img_same", "t_txt_same"))
SCALES = {"student_scale": 1 / 0.07, "teacher_scale": 100.0}


def golden_heads(width, method):
    """The learned maps that the recorded values were computed with; drawn ones are 0 in no place, so they all count."""
    heads = Heads(method, 32, width)
    names = {
        "image": "visual_proj",
        "text": "text_proj",
        "fuse_image": "visual_fusion_proj",
        "fuse_text": "text_fusion_proj",
    }
    for ours, theirs in names.items():
        for part in ("weight", "bias"):
            name = f"clipkd/{'same' if width == 32 else 'wide'}/param/{theirs}.{part}"
            if name in LOSSES and hasattr(getattr(heads, ours, None), part):
                setattr(getattr(heads, ours), part, torch.nn.Parameter(golden(name)))
    return heads


@pytest.mark.parametrize(
    "width, method",
    [(32, method) for method in ("crd", "fd", "icl", "cross_kd", "gd", "afd")]
    + [(48, method) for method in ("crd", "fd", "icl", "cross_kd")],
)
def test_distillation_agrees_with_clip_kd(width, method):
    kind = "same" if width == 32 else "wide"
    teacher = [
        F.normalize(drawn(f"{name}_{kind}", 24, width), dim=1) for name in ("t_img", "t_txt")
    ]
    image = STUDENT[0].clone().requires_grad_()
    loss = distill_loss(
        method, image, STUDENT[1], *teacher, heads=golden_heads(width, method), **SCALES
    )
    loss.backward()
    assert loss.item() == pytest.approx(golden(f"clipkd/{kind}/{method}").item(), abs=1e-5)
    assert relative(image.grad, golden(f"clipkd/{kind}/{method}/grad_s_img")) < 1e-4


def test_cross_entropy_form_agrees_with_mobileclip():
    loss = distill_loss("crd_ce", *STUDENT, *TEACHER, **SCALES)
    assert loss.item() == pytest.approx(golden("mobileclip/distill").item(), abs=1e-5)
    two = [
        torch.cat([F.normalize(part, dim=1) for part in side.split([20, 12], 1)], 1)
        for side in TEACHER
    ]
    loss = distill_loss("crd_ce", *STUDENT, *two, teacher_widths=[20, 12], **SCALES)
    assert loss.item() == pytest.approx(golden("mobileclip/distill_ensemble").item(), abs=1e-5)


@pytest.mark.parametrize("name, method, factor", [("CRD", "crd", 1), ("FD", "fd", 16)])
def test_total_agrees_with_the_first_jettclip(name, method, factor):
    """Its FD is half the summed squares, here it is their mean: 32 / 2 times smaller."""
    image = STUDENT[0].clone().requires_grad_()
    _, terms = total_loss(
        (image, STUDENT[1], None),
        (*TEACHER, None),
        1 / 0.07,
        method=method,
        pairs="long",
        weights=(1, 0, factor, 0),
    )
    terms["distill_long"].backward()
    for term, reference in (("contrastive_long", "contrastive"), ("distill_long", "distill")):
        assert terms[term].item() == pytest.approx(
            golden(f"jett/{name}/{reference}").item(), abs=1e-5
        )
    assert relative(image.grad, golden(f"jett/{name}/grad_s_img")) < 1e-4


def test_sum_of_methods():
    fd, crd = (distill_loss(method, *STUDENT, *TEACHER, **SCALES) for method in ("fd", "crd"))
    assert torch.allclose(distill_loss("crd+fd", *STUDENT, *TEACHER, **SCALES), crd + fd)
    weighted = distill_loss(
        "fd+crd", *STUDENT, *TEACHER, **SCALES, weights={"fd": 10.0, "crd": 0.5}
    )
    assert torch.allclose(weighted, 0.5 * crd + 10 * fd)
    assert distill_loss("none", *STUDENT, *TEACHER, **SCALES) == 0


@pytest.mark.parametrize(
    "method, nearest", [("crdd", "'crd'"), ("crd+fdd", "'fd'"), ("non", "'none'")]
)
def test_unknown_method(method, nearest):
    with pytest.raises(ValueError, match=f"distillation method .* did you mean {nearest}"):
        distill_loss(method, *STUDENT, *TEACHER, **SCALES)


def test_relational_distillation_by_hand():
    """Two pairs in two dimensions, every similarity 0 or 1: the rows are softmax(t, 0) or softmax(0, t), or even."""
    eye, swapped = torch.eye(2), torch.eye(2).flip(0)

    def kl(one, other):
        one, other = torch.tensor(one).log_softmax(0), torch.tensor(other).log_softmax(0)
        return (one.exp() * (one - other)).sum().item()

    apart = (kl([3.0, 0.0], [0.0, 3.0]) + kl([0.0, 3.0], [3.0, 0.0])) / 2
    scales = {"student_scale": 3.0, "teacher_scale": 1.0}
    assert distill_loss("rd", eye, eye, eye, eye, **scales).item() == pytest.approx(0, abs=1e-6)
    # the text side is swapped: its rows find the other teacher, of image and of text
    assert distill_loss("rd", eye, swapped, eye, eye, **scales).item() == pytest.approx(
        2 * apart, rel=1e-5
    )
    # the teacher's text as well: texts agree with texts as images do with images, and both cross ways are swapped alike
    assert distill_loss("rd", eye, swapped, eye, swapped, **scales).item() == pytest.approx(
        0, abs=1e-6
    )


def test_what_is_needed_is_asked_for():
    wide = [F.normalize(drawn(name, 24, 48), dim=1) for name in ("a", "b")]
    with pytest.raises(
        ValueError, match="width 32 and teacher features of width 48: give distill_loss heads"
    ):
        distill_loss("fd", *STUDENT, *wide, **SCALES)
    assert torch.isfinite(distill_loss("crd", *STUDENT, *wide, **SCALES))
    with pytest.raises(ValueError, match="afd learns to fuse features: give distill_loss heads"):
        distill_loss("afd", *STUDENT, *TEACHER, **SCALES)


def test_two_equal_teachers_are_one():
    twice = [torch.cat([side, side], 1) for side in TEACHER]
    one = distill_loss("crd", *STUDENT, *TEACHER, **SCALES)
    assert distill_loss(
        "crd", *STUDENT, *twice, teacher_widths=[32, 32], **SCALES
    ).item() == pytest.approx(one.item(), rel=1e-5)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_parts_of_a_batch_average_to_the_whole(method):
    """Three processes of 8 rows each; what they would send each other is worked out beforehand."""
    heads = Heads(method, 32, 32)
    whole = distill_loss(method, *STUDENT, *TEACHER, heads=heads, **SCALES)
    normalisers = iter([])
    if method == "gd":  # asks for the normalisers of all rows: student's and teacher's, both ways
        sides = [F.normalize(f, dim=1) for f in STUDENT]
        pairs = [
            (a[::way], scale)
            for way in (1, -1)
            for a, scale in ((sides, SCALES["student_scale"]), (list(TEACHER), 100.0))
        ]
        normalisers = iter([(scale * q @ k.T).logsumexp(1) for (q, k), scale in pairs] * 3)
    parts = [Part(slice(i, i + 8), lambda local: next(normalisers)) for i in (0, 8, 16)]
    losses = [
        distill_loss(method, *STUDENT, *TEACHER, heads=heads, part=part, **SCALES) for part in parts
    ]
    assert torch.stack(losses).mean().item() == pytest.approx(whole.item(), rel=1e-5)


def test_a_second_teacher_for_short_captions():
    """It replaces the primary components of the first one's image features, and its short captions."""
    settings = {"method": "crd", "components": 6}
    image, short = F.normalize(drawn("i", 24, 20), dim=1), F.normalize(drawn("s", 24, 20), dim=1)
    _, terms = total_loss(LONG_AND_SHORT, TAUGHT, 10.0, short_teacher=(image, short), **settings)
    _, before = total_loss(LONG_AND_SHORT, TAUGHT, 10.0, **settings)
    components = primary_components(F.normalize(LONG_AND_SHORT[0], dim=1), 6)
    expected = 0.5 * distill_loss(
        "crd", components, LONG_AND_SHORT[2], image, short, student_scale=10.0, teacher_scale=100.0
    )
    assert terms["distill_short"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert (
        terms["distill_long"] == before["distill_long"]
        and terms["distill_short"] != before["distill_short"]
    )


def test_masked_feature_distillation_is_of_the_long_side():
    masked = drawn("masked", 24, 32)
    _, terms = total_loss(LONG_AND_SHORT, TAUGHT, 10.0, method="mfd", masked_image=masked)
    assert terms.keys() == {"contrastive_long", "contrastive_short", "distill_long"}
    assert terms["distill_long"].item() == pytest.approx(
        1.5 * F.mse_loss(F.normalize(masked, dim=1), TAUGHT[0]).item(), rel=1e-5
    )


@pytest.mark.parametrize("method", ["fd", "crd", "crd+fd", "cross_kd", "gd"])
def test_a_perfect_student_has_no_distillation_loss(method):
    """At equal scales, whatever the lengths of its features."""
    image, text = (3 * f for f in TEACHER)
    image.requires_grad_()
    loss = distill_loss(method, image, text, *TEACHER, student_scale=50.0, teacher_scale=50.0)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-6) and image.grad.abs().max() < 1e-5


# ---- total

LONG_AND_SHORT = *STUDENT, drawn("s_short", 24, 32)
TAUGHT = *TEACHER, F.normalize(drawn("t_short", 24, 32), dim=1)


def published_loss(logits):
    target = torch.arange(len(logits))
    return sum(F.cross_entropy(one, target, label_smoothing=0.1) for one in (logits, logits.T)) / 2


def test_total_by_its_terms():
    loss, terms = total_loss(
        LONG_AND_SHORT,
        TAUGHT,
        10.0,
        method="crd+fd",
        weights=(0.8, 0.4, 1.5, 0.5),
        components=6,
        teacher_scale=30.0,
        method_weights={"fd": 20.0},
    )
    image, long, short = LONG_AND_SHORT
    components, taught = (
        primary_components(F.normalize(image, dim=1), 6),
        primary_components(TAUGHT[0], 6),
    )
    short_logits = (
        10.0 * components @ F.normalize(short, dim=1).T
    )  # what was rebuilt is not normalised again
    scales = {"student_scale": 10.0, "teacher_scale": 30.0, "weights": {"fd": 20.0}}
    expected = {
        "contrastive_long": 0.8 * contrastive_loss(image, long, 10.0, 0.1),
        "contrastive_short": 0.4 * published_loss(short_logits),
        "distill_long": 1.5 * distill_loss("crd+fd", image, long, *TAUGHT[:2], **scales),
        "distill_short": 0.5
        * distill_loss("crd+fd", components, short, taught, TAUGHT[2], **scales),
    }
    assert terms.keys() == expected.keys()
    for name, term in terms.items():
        assert term.item() == pytest.approx(expected[name].item(), rel=1e-5)
    assert loss.item() == pytest.approx(sum(term.item() for term in terms.values()), rel=1e-6)


def test_total_does_not_depend_on_lengths():
    settings = {"method": "crd+fd", "components": 6}
    one, _ = total_loss(LONG_AND_SHORT, TAUGHT, 10.0, **settings)
    other, _ = total_loss(
        [3 * f for f in LONG_AND_SHORT], [0.5 * f for f in TAUGHT], 10.0, **settings
    )
    longer = [torch.linspace(0.5, 2, 24)[:, None] * f for f in TAUGHT]
    third, _ = total_loss(LONG_AND_SHORT, longer, 10.0, **settings)
    assert [other.item(), third.item()] == pytest.approx([one.item()] * 2, rel=1e-5)


@pytest.mark.parametrize(
    "settings, names",
    [
        ({"method": "none"}, ["contrastive_long", "contrastive_short"]),
        ({"method": "none", "weights": (1, 0, 0, 0)}, ["contrastive_long"]),
        (
            {"method": "crd", "pairs": "long"},
            ["contrastive_long", "contrastive_short", "distill_long"],
        ),
        (
            {"method": "crd", "pairs": "long", "weights": (1, 0, 1, 1)},
            ["contrastive_long", "distill_long"],
        ),
        (
            {"method": "fd", "weights": (1, 0, 1, 1)},
            ["contrastive_long", "distill_long", "distill_short"],
        ),
    ],
)
def test_which_terms_there_are(settings, names):
    loss, terms = total_loss(LONG_AND_SHORT, TAUGHT, 10.0, components=6, **settings)
    assert list(terms) == names and torch.isfinite(loss)


def test_a_perfect_student_has_only_contrastive_loss():
    _, terms = total_loss(TAUGHT, TAUGHT, 40.0, method="crd+fd", components=6, teacher_scale=40.0)
    assert terms["distill_long"].item() == pytest.approx(0, abs=1e-6)
    assert terms["distill_short"].item() == pytest.approx(0, abs=1e-6)
    assert terms["contrastive_short"] > 0.1


# ---- a Long-CLIP model from weights to gradients


@pytest.fixture(scope="module")
def longclip(tmp_path_factory):
    """A small Long-CLIP of known weights and its features of 40 images, long and short captions."""
    file = tmp_path_factory.mktemp("longclip") / "longclip-tiny.pt"
    torch.save(state_dict("longclip_tiny"), file)
    model = jettclip.create_model("LongCLIP", file)
    return model, (
        model.encode_image(drawn("image", 40, 3, 64, 64)),
        model.encode_text(longclip_tokens("long", 40)),
        model.encode_text(longclip_tokens("short", 40)),
    )


def test_longclip_features(longclip):
    for name, features in zip(("image", "long", "short"), longclip[1]):
        reference = golden(f"{name}_features", LONGCLIP)
        assert F.cosine_similarity(features, reference).min() > 0.99999
        assert relative(features.detach(), reference) < 1e-5


def test_longclip_losses(longclip):
    model, features = longclip
    _, terms = total_loss(features, None, model.logit_scale.exp(), weights=(1, 1, 0, 0))
    assert terms["contrastive_long"].item() == pytest.approx(LONGCLIP["loss_long"].item(), abs=1e-5)
    assert terms["contrastive_short"].item() == pytest.approx(
        LONGCLIP["loss_short"].item(), abs=1e-5
    )


def test_longclip_gradients(longclip):
    """Through all towers and the primary components."""
    model, features = longclip
    total_loss(features, None, model.logit_scale.exp(), weights=(1, 1, 0, 0))[0].backward()
    parameters = {
        "text_projection": model.text.text_projection,
        "visual_proj": model.visual.proj,
        "logit_scale": model.logit_scale,
    }
    for name, parameter in parameters.items():
        assert relative(parameter.grad, golden(f"grad_{name}", LONGCLIP)) < 1e-4
