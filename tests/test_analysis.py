"""Geometry, swapped words, data efficiency and failures, on small cases worked out by hand."""

from itertools import product

import numpy as np
import pandas as pd
import pytest
import torch
from torch.nn.functional import normalize

from jettclip import analysis
from jettclip.text import tokenizer

CAPTION = "A man in a red shirt, two large dogs, the Red Lion, a White-ish van, a black-haired boy."


def features(n, d, seed=0):
    return normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(seed)), dim=1)


def test_a_swap_replaces_one_word_by_another_of_its_kind():
    seen, tokenize = set(), tokenizer()
    for seed in range(60):
        swapped, attribute, position = analysis.swap_attribute(CAPTION, np.random.default_rng(seed))
        words = zip(CAPTION.split(), swapped.split(), strict=True)
        ((old, new),) = [(a, b) for a, b in words if a != b]
        assert analysis.SWAPS[old][0] == attribute == analysis.SWAPS[new][0]
        ids, changed = tokenize([CAPTION, swapped])
        assert ids[:position].equal(changed[:position]) and ids[position] != changed[position]
        seen.add(old)
    assert seen == {"two", "large"}  # not "red" (twice), "White-ish", "black-haired"


def test_every_swap_makes_the_caption_wrong():
    for caption in ("", "A man on a bench.", "The Red Lion.", "A red bus, a red car.", "an orange"):
        assert analysis.swap_attribute(caption, np.random.default_rng(0)) is None
    assert all(others and word not in others for word, (_, others) in analysis.SWAPS.items())
    assert analysis.first_difference("a bus", "a bus stop") == 3
    assert analysis.first_difference("A bus", "a  bus") is None
    assert "gray" not in analysis.SWAPS["grey"][1] and "big" not in analysis.SWAPS["large"][1]


def test_swapped_details_holds_the_usable_captions():
    captions = ["A red bus.", "A bus.", "Two dogs and three small cats."]
    table = pd.DataFrame({"image": [b"0", b"1", b"2"], "long": captions, "key": list("abc")})
    details = analysis.swapped_details(table)
    assert [*details] == ["image", "long", "other_long", "attribute", "position", "key"]
    assert details.key.tolist() == ["a", "c"] and details.image.tolist() == [b"0", b"2"]
    assert details.position[0] == 2  # start, "a", "red"
    assert len(analysis.swapped_details(table[1:2])) == 0


WRITTEN = "Ten things. A 1.5 m red dog. B. C? D."
BY_HAND = {
    "as written": WRITTEN,
    "first removed": "A 1.5 m red dog. B. C? D.",  # a sentence ends at ". "
    "first last": "A 1.5 m red dog. B. C? D. Ten things.",
    "detail last": "Ten things. B. C? D. A 1.5 m red dog.",
}


def test_perturbations_by_hand():
    captions = [WRITTEN, "One sentence only.", "a b. c", WRITTEN]
    table = analysis.perturbed_captions(captions, seed=3)
    assert {name: table[name][0] for name in BY_HAND} == BY_HAND
    assert (table.loc[1] == captions[1]).all()  # nothing else can be done to it
    assert table.loc[2, ["first removed", "first last"]].tolist() == ["c.", "c. a b."]
    sentences = {name: table[name][0].rstrip(".").split(". ") for name in table}
    whole = sentences["as written"]
    assert sorted(sentences["shuffled"]) == sorted(whole)
    kept = sentences["half kept"]
    assert len(kept) == 2 and kept == [x for x in whole if x in kept]
    words, rest = WRITTEN.rstrip(".").split(), iter(WRITTEN.rstrip(".").split())
    left = table["words dropped"][0].rstrip(".").split()
    assert len(left) == 7 and len(words) == 10 and all(word in rest for word in left)  # in order
    assert table.equals(analysis.perturbed_captions(captions, seed=3))
    others = [analysis.perturbed_captions([WRITTEN], seed).loc[0, "shuffled"] for seed in range(9)]
    assert len({*others}) > 3 and (table.loc[0] != table.loc[3]).any()  # by seed, by row


def test_perturbed_recall_by_hand():
    """Four images; without its first sentence a caption finds the next one."""
    image = torch.eye(4)
    texts = {"as written": image, "first removed": image.roll(1, 0), "shuffled": image.clone()}
    texts["shuffled"][0] = torch.tensor([0.0, 1, 0, 0])
    table, hits = analysis.perturbed_recall(image, texts)
    assert [*table] == ["perturbation", "metric", "value", "low", "high", "n", "p"]
    assert hits["shuffled"].tolist() == [0, 1, 1, 1]
    values = table.set_index(["perturbation", "metric"])
    assert values.value.to_dict() == {
        ("as written", "t2i_r1"): 1.0,
        ("first removed", "t2i_r1"): 0.0,
        ("shuffled", "t2i_r1"): 0.75,
        ("first removed", "change"): -1.0,
        ("shuffled", "change"): -0.25,
    }
    assert values.p["first removed", "change"] == 2 / 16 and values.p["shuffled", "change"] == 1


def test_cka_of_rotated_and_shifted_features():
    x, y = features(200, 16), normalize(features(200, 16) + features(200, 16, 3), dim=1)
    rotation = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(1)))[0]
    assert analysis.linear_cka(x, x) == pytest.approx(1)
    assert analysis.linear_cka(x, 3 * x @ rotation + 0.5) == pytest.approx(1, abs=1e-6)
    flat = x.double() * 1e-7 + torch.ones(16)  # nearly equal, as of a model that has hardly begun
    assert analysis.linear_cka(flat, x) == pytest.approx(1, abs=1e-3)
    keep = torch.arange(200) % 3 != torch.tensor([[0], [1]])
    expected = [analysis.linear_cka(x[rows], y[rows]).item() for rows in keep]
    assert analysis.linear_cka(x, y, keep).tolist() == pytest.approx(expected)
    near = analysis.cka_interval(x, y)
    assert near["low"] < near["value"] < near["high"] < near["low"] + 0.2 and near["n"] == 200


def test_cka_is_a_mean_over_all_quadruples():
    """HSIC's unbiased estimator is a mean over quadruples of different rows (Song et al., 2012)."""
    x, y = features(6, 3, 0).double(), features(6, 4, 1).double()

    def hsic(k, m):
        quadruples = [rows for rows in product(range(6), repeat=4) if len({*rows}) == 4]
        terms = [k[i, j] * (m[i, j] + m[q, r] - 2 * m[i, q]) for i, j, q, r in quadruples]
        return sum(terms) / len(terms)

    k, m = x @ x.T, y @ y.T
    expected = hsic(k, m) / (hsic(k, k) * hsic(m, m)).sqrt()
    assert analysis.linear_cka(x, y).item() == pytest.approx(expected.item())


@pytest.mark.parametrize("n", [0, 1, 4, 6])
def test_cka_of_few_rows(n):
    x, y = features(n, 3), features(n, 3, 1)
    found = analysis.cka_interval(x, y)
    assert found["n"] == n and np.isnan(found["value"]) == (n < 4)
    assert np.isnan(found["low"]) == np.isnan(found["high"]) == (n < 5)
    if n == 6:  # the jackknife leaves out a row at a time: as many blocks as rows, not 20
        others = analysis.linear_cka(x, y, 1 - torch.eye(6)).numpy()
        half = 1.96 * (5 / 6 * np.sum((others - others.mean()) ** 2)) ** 0.5
        assert found["high"] - found["value"] == pytest.approx(half)


def test_neighbour_overlap():
    with pytest.raises(ValueError, match="4 rows have 3 neighbours each: k is 4"):
        analysis.neighbour_overlap(features(4, 3), features(4, 3), 4)  # a row is not its own
    x = features(50, 8)
    assert (analysis.neighbour_overlap(x, x) == 1).all()
    circle = torch.tensor([[np.cos(a), np.sin(a)] for a in np.radians([0, 10, 30, 60])])
    for k, expected in ((1, [0, 0, 0, 0]), (2, [1, 0.5, 0.5, 1])):  # rows 1 and 2 change places
        assert analysis.neighbour_overlap(circle, circle[[0, 2, 1, 3]], k).tolist() == expected


def history_of(**recalls):
    rows = [(m, 10 * i, 20.0 * i, r) for m, rs in recalls.items() for i, r in enumerate(rs, 1)]
    return pd.DataFrame(rows, columns=["model", "step", "seconds", "long_t2i_r1"])


def test_efficiency_by_hand():
    """A ratio is as fine as the evaluations: 20 < steps <= 30 against 10 < steps <= 20."""
    recalls = {"none": [0.1, 0.2, 0.3], "fd": [0.2, 0.3, 0.5], "icl": [0.4, 0.4, 0.4]}
    history = history_of(**recalls, crd=[0.1, 0.1, 0.2])
    table = analysis.efficiency(history, "none", queries=100)
    assert [*table] == [
        *("model", "against", "target", "step_before", "step", "seconds_before", "seconds"),
        *("step_ratio_low", "step_ratio_high", "second_ratio_low", "second_ratio_high"),
    ]
    assert table.fillna(0).values.tolist() == [
        ["none", "none", 0.3, 20, 30, 40, 60, 1, 1, 1, 1],
        ["fd", "none", 0.3, 10, 20, 20, 40, 1, 3, 1, 3],
        ["icl", "none", 0.3, 0, 10, 0, 20, 2, np.inf, 2, np.inf],
        ["crd", "none", 0.3, 0, 0, 0, 0, 0, 0, 0, 0],  # never
    ]


@pytest.mark.parametrize("hits, rows", [(0, 0), (1, 0), (3, 0), (4, 1), (500, 1)])
def test_efficiency_needs_a_target_beyond_chance(hits, rows):
    """Of 500 queries a random ranking has 3 hits or more with p 0.080, 4 or more with 0.019."""
    history = history_of(none=[hits / 500])
    assert len(analysis.efficiency(history, "none", queries=500)) == rows
    assert len(analysis.efficiency(history_of(none=[1.0]), "none", queries=1)) == 0
