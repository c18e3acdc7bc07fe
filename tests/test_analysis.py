"""Geometry, word swaps, data efficiency and failures on small things worked out by hand."""

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize

from jettclip.analysis import (
    SWAPS,
    cka_interval,
    efficiency,
    failures,
    first_difference,
    linear_cka,
    neighbour_overlap,
    swap_attribute,
    swapped_details,
)
from jettclip.text import tokenizer


def features(n, d, seed=0):
    return normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(seed)), dim=1)


# ---- swapped words

CAPTION = "A man in a red shirt stands beside two large dogs. The Red Lion is closed, a White-ish van and a black-haired boy wait."


def test_a_swap_changes_one_word_for_another_of_its_kind():
    seen, tokenize = set(), tokenizer()
    for seed in range(60):
        swapped, attribute, position = swap_attribute(CAPTION, np.random.default_rng(seed))
        one, other = CAPTION.split(), swapped.split()
        differ = [i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b]
        assert (
            len(differ) == 1 and SWAPS[one[differ[0]]][0] == attribute == SWAPS[other[differ[0]]][0]
        )
        ids, other_ids = tokenize([CAPTION, swapped])
        assert ids[:position].equal(other_ids[:position]) and ids[position] != other_ids[position]
        seen.add(one[differ[0]])
    assert seen == {
        "two",
        "large",
    }  # "red" is there twice, "White" and "black-haired" are no colour words


@pytest.mark.parametrize(
    "caption",
    ["", "A man on a bench.", "The Red Lion.", "A red bus and a red car.", "an orange kite"],
)
def test_nothing_to_swap(caption):
    assert swap_attribute(caption, np.random.default_rng(0)) is None


@given(
    st.lists(
        st.sampled_from(
            ["a", "red", "Two", "two", "tall", "dog,", "grey", "gray.", "(blue)", "x-white"]
        ),
        max_size=12,
    ),
    st.integers(0, 99),
)
@settings(max_examples=200, deadline=None)
def test_a_swap_differs_where_it_says(words, seed):
    caption = " ".join(words)
    swap = swap_attribute(caption, np.random.default_rng(seed))
    if swap:
        assert swap[2] == first_difference(caption, swap[0]) >= 1 and len(swap[0].split()) == len(
            words
        )


def test_no_swap_is_still_true():
    for word, (_, others) in SWAPS.items():
        assert word not in others and others
    assert "gray" not in SWAPS["grey"][1] and "big" not in SWAPS["large"][1]


def test_swapped_details_counts_usable_captions():
    table = pd.DataFrame(
        {
            "image": [b"0", b"1", b"2"],
            "long": ["A red bus.", "A bus.", "Two dogs and three small cats."],
            "key": list("abc"),
        }
    )
    details = swapped_details(table)
    assert details.columns.tolist() == [
        "image",
        "long",
        "other_long",
        "attribute",
        "position",
        "key",
    ]
    assert details.key.tolist() == ["a", "c"] and details.image.tolist() == [b"0", b"2"]
    assert details.position[0] == 2  # start, "a", "red"
    assert swapped_details(table).equals(details)
    assert len(swapped_details(table[1:2])) == 0


def test_first_difference():
    assert (
        first_difference("a red bus", "a blue bus") == 2
        and first_difference("a bus", "a bus stop") == 3
    )


# ---- geometry


def test_cka_of_rotated_shifted_and_unrelated_features():
    x = features(200, 16)
    rotation = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(1)))[0]
    assert linear_cka(x, x) == pytest.approx(1) and linear_cka(
        x, 3 * x @ rotation + 0.5
    ) == pytest.approx(1, abs=1e-6)
    flat = x.double() * 1e-7 + torch.ones(
        16
    )  # nearly the same feature everywhere, as of a model that has hardly begun
    assert linear_cka(flat, x) == pytest.approx(1, abs=1e-3)
    unrelated = [
        linear_cka(features(60, 32, seed), features(60, 48, seed + 100)).item()
        for seed in range(20)
    ]
    assert abs(np.mean(unrelated)) < 0.02  # the biased estimator is at 0.4 here
    one = cka_interval(x, normalize(x + 0.5 * features(200, 16, 3), dim=1))
    assert (
        one["low"] < one["value"] < one["high"]
        and one["high"] - one["low"] < 0.2
        and one["n"] == 200
    )
    y = normalize(x + features(200, 16, 3), dim=1)
    keep = torch.arange(200) % 3 != torch.tensor([[0], [1]])
    assert linear_cka(x, y, keep).tolist() == pytest.approx(
        [linear_cka(x[rows], y[rows]).item() for rows in keep]
    )


def test_cka_against_all_quadruples():
    """HSIC's unbiased estimator is a mean over quadruples of different rows (Song et al., 2012)."""
    x, y = features(6, 3, 0).double(), features(6, 4, 1).double()

    def hsic(k, l):
        total, n = 0, len(k)
        for i in range(n):
            for j in range(n):
                for q in range(n):
                    for r in range(n):
                        if len({i, j, q, r}) == 4:
                            total += k[i, j] * (l[i, j] + l[q, r] - 2 * l[i, q])
        return total / (n * (n - 1) * (n - 2) * (n - 3))

    k, l = x @ x.T, y @ y.T
    assert linear_cka(x, y).item() == pytest.approx(
        (hsic(k, l) / (hsic(k, k) * hsic(l, l)).sqrt()).item()
    )


def test_neighbour_overlap():
    x = features(50, 8)
    assert (neighbour_overlap(x, x) == 1).all()
    circle = torch.tensor([[np.cos(a), np.sin(a)] for a in np.radians([0, 10, 30, 60])])
    swapped = circle[[0, 2, 1, 3]]  # rows 1 and 2 change places
    assert neighbour_overlap(circle, swapped, k=1).tolist() == [0, 0, 0, 0]
    assert neighbour_overlap(circle, swapped, k=2).tolist() == [1, 0.5, 0.5, 1]
    y = features(50, 8, 1)
    assert np.array_equal(neighbour_overlap(x, y, 5, chunk=7), neighbour_overlap(x, y, 5))
    assert neighbour_overlap(features(500, 8), features(500, 8, 2), 20).mean() == pytest.approx(
        20 / 499, abs=0.01
    )


# ---- training and failures


def test_efficiency_by_hand():
    history = pd.DataFrame(
        [
            (model, step, 2.0 * step, value)
            for model, values in (
                ("none-s0", (0.1, 0.2, 0.3)),
                ("fd-s0", (0.2, 0.3, 0.5)),
                ("crd-s0", (0.1, 0.1, 0.2)),
            )
            for step, value in zip((10, 20, 30), values)
        ],
        columns=["model", "step", "seconds", "long_t2i_r1"],
    )
    table = efficiency(history, "none-s0").set_index("model")
    assert table.target.eq(0.3).all() and table.against.eq("none-s0").all()
    assert table.steps.fillna(0).tolist() == [30, 20, 0] and table.seconds.fillna(0).tolist() == [
        60,
        40,
        0,
    ]
    assert table.step_ratio.fillna(0).tolist() == [1, 1.5, 0] and table.second_ratio["fd-s0"] == 1.5


def test_failures_are_failures():
    image = torch.eye(4)
    text = torch.tensor([[1.0, 0, 0, 0], [0.9, 0.5, 0.3, 0.1], [0.1, 0.2, 0.3, 0.9], [0, 0, 0, 1]])
    table = failures(image, text, rank=[0, 1, 1, 0], n=4)
    assert table.values.tolist() == [[1, 2, 0, 1, 2], [2, 2, 3, 2, 1]]
    assert (
        len(failures(image, text, rank=[0, 1, 1, 0], n=1)) == 1
        and len(failures(image, text, rank=[0] * 4)) == 0
    )
