"""Noise: intervals, paired tests, families of tests and seeds, worked out by hand."""

from functools import partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import nbformat
import numpy as np
import pandas as pd
import pytest
import scipy

from jettclip import evaluate
from jettclip.utils import save_csv

NOTEBOOK_04 = Path(__file__).resolve().parent.parent / "notebooks/04_retrieval.ipynb"
TASKS = ("long", "short")


def test_intervals_are_those_of_a_plain_bootstrap_of_groups():
    rng = np.random.default_rng(0)
    groups, level = rng.integers(0, 80, 300), rng.uniform(size=80)
    hits, ranks = rng.uniform(size=300) < level[groups], rng.geometric(0.02 + 0.1 * level[groups])
    members = [np.flatnonzero(groups == name) for name in np.unique(groups)]
    draws = [rng.integers(0, len(members), len(members)) for _ in range(2000)]
    draws = [np.concatenate([members[i] for i in drawn]) for drawn in draws]
    for function, statistic, values, tolerance in (
        (evaluate.interval, np.mean, hits, 0.015),
        (evaluate.median_interval, partial(np.quantile, q=0.5, method="lower"), ranks, 2),
    ):
        ends = np.quantile([statistic(values[rows]) for rows in draws], [0.025, 0.975])
        grouped = function(values.astype(float), groups=groups)
        assert grouped["n"] == 300 and grouped["value"] == pytest.approx(statistic(values))
        assert [grouped["low"], grouped["high"]] == pytest.approx(ends, abs=tolerance)
    # The captions of an image are alike: without groups the interval is too narrow.
    wide, narrow = (evaluate.interval(hits, groups=g) for g in (groups, None))
    assert wide["high"] - wide["low"] > 1.2 * (narrow["high"] - narrow["low"])
    assert evaluate.interval([0.5, 0.5]) == {"value": 0.5, "low": 0.5, "high": 0.5, "n": 2}
    assert evaluate.median_interval([4, 1, 3, 2])["value"] == 2  # the lower one


def test_a_seed_draws_the_same_resamples_for_ever():
    """So that new tables can be compared with those in results/."""
    found, values = [], np.arange(60) ** 2 % 97
    for function in (evaluate.interval, evaluate.median_interval):
        for groups in (None, np.arange(60) // 3):
            found += [function(values, groups=groups)[end] for end in ("low", "high")]
    expected = [42.4658333, 57.1045833, 40.1, 58.4170833, 35, 65.025, 32, 66]
    assert found == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize("hits, n, low, high", [(0, 10, 0, 0.277533), (9, 10, 0.59585, 0.982124)])
def test_wilson_by_hand(hits, n, low, high):  # the formula of 1927 with z = 1.959964
    for groups in (None, np.arange(n)[::-1]):  # groups of one value are none
        found = evaluate.interval(np.arange(n) < hits, groups=groups)
        assert found == pytest.approx({"value": hits / n, "low": low, "high": high, "n": n}, 1e-5)


@pytest.mark.parametrize("n", [10, 20])
def test_wilson_holds_the_truth_at_every_size(n):
    """19 of 20 intervals should; the percentile bootstrap's hold 40 and 64 of 100."""
    share = scipy.stats.binom.pmf(np.arange(n + 1), n, 0.95)  # of experiments with so many hits
    ends = [evaluate.interval(np.arange(n) < hits) for hits in range(n + 1)]
    assert share @ [x["low"] <= 0.95 <= x["high"] for x in ends] == pytest.approx(0.95, abs=0.04)


@pytest.mark.parametrize(
    "better, worse, p",  # twice the smaller tail of fair coins
    [(5, 0, 0.0625), (8, 0, 2 / 256), (0, 8, 2 / 256), (3, 1, 0.625), (7, 1, 18 / 256), (4, 4, 1)],
)
def test_hits_are_compared_by_the_exact_mcnemar_test(better, worse, p):
    both = np.arange(150) >= 100
    hits, base = both | (np.arange(150) < better), both.copy()
    base[better : better + worse] = True
    found = evaluate.difference_interval(hits, base)
    assert found["p"] == pytest.approx(p) and found["value"] == (better - worse) / 150
    assert (found["low"] > 0 or found["high"] < 0) == (p < 0.05)  # interval and test agree
    # Quarters are no hits: a bootstrap, whose p is no less than signs can give.
    quarters = evaluate.difference_interval(hits / 4, base / 4)["p"]
    assert min(1, 2.0 ** (1 - better - worse)) <= quarters


def test_the_interval_of_a_difference_of_hits_by_hand():
    found = evaluate.difference_interval([1] * 5 + [0] * 93, [0] * 98)
    half = 1.96 * (0.07 / 100 - 0.05**2 / 100) ** 0.5  # of 6 better and 1 worse in 100
    assert [found["low"], found["high"]] == pytest.approx([0.05 - half, 0.05 + half])
    same = evaluate.difference_interval([1] * 998, [1] * 998)  # no change seen is not no change
    assert same["p"] == 1 and same["high"] == -same["low"] == pytest.approx(1.96 * 2**0.5 / 1000)


def test_difference_is_paired_and_two_sided():
    values = np.random.default_rng(0).normal(size=50)
    shifted = evaluate.difference_interval(values + 0.25, values)
    assert [shifted[key] for key in ("value", "low", "high")] == pytest.approx([0.25] * 3)
    assert shifted["n"] == 50 and shifted["p"] == 2 / 10001
    assert evaluate.difference_interval(values, values)["p"] == 1


@pytest.mark.parametrize("scale", [1, 0.5])  # hits, halves
def test_p_is_uniform_without_a_difference(scale):
    pairs = scale * np.random.default_rng(0).integers(0, 2, (200, 2, 400))
    p = [evaluate.difference_interval(*pair, resamples=300)["p"] for pair in pairs]
    assert np.mean(np.array(p) < 0.05) == pytest.approx(0.04, abs=0.03)
    assert 0.45 < np.mean(p) < 0.6  # above a half: no difference counts on both sides


def test_a_family_holds_each_pair_of_students_once(tmp_path):
    """The cell of notebook 04 that compares."""
    cells = nbformat.read(NOTEBOOK_04, nbformat.NO_CONVERT).cells
    cell = compile(next(c.source for c in cells if "differences.csv" in c.source), "04", "exec")
    names, hits = ["none-s0", "fd-s0", "crd-s0", "fd-s1", "fd-T-s0"], np.random.default_rng(0)
    models = {name: SimpleNamespace(name="T" if "T" in name else "Lite") for name in names}
    ranks = {key: hits.integers(0, 20, 40) for key in product(names, TASKS, ("t2i", "i2t"))}
    space = {"variants": names, "against": ["none", "fd", "none"], "folder": tmp_path, "pd": pd}
    space |= {"configs": {name: {"seed": int(name[-1])} for name in names}, "models": models}
    space |= {"ranks": ranks, "evaluate": evaluate, "display": id, "save_csv": save_csv}
    exec(cell, space)
    table = pd.read_csv(tmp_path / "differences.csv").query("task == 'long' and metric == 't2i_r1'")
    expected = ["fd-s0 none-s0", "crd-s0 none-s0", "crd-s0 fd-s0"]
    assert (table.model + " " + table.against).tolist() == expected
    assert set(table.family) == {"3 comparisons, long t2i_r1"}
    assert table.p_holm.tolist() == pytest.approx(evaluate.holm(table.p), abs=1e-5)
    exec(cell, space | {"variants": ["fd-s1"]})  # nothing to compare: a table of no rows
    assert len(pd.read_csv(tmp_path / "differences.csv")) == 0


def test_holm_by_hand():
    adjusted = [0.03, 0.06, 0.06, 0.02]  # x 3, x 1 but at least 0.06, x 2, x 4
    assert evaluate.holm([0.01, 0.04, 0.03, 0.005]).tolist() == pytest.approx(adjusted)
    assert evaluate.holm([0.9, 0.4]).tolist() == pytest.approx([0.9, 0.8])
    assert evaluate.holm([0.7, 0.6]).tolist() == [1, 1] and evaluate.holm([]).tolist() == []


def test_clear_best():
    rng = np.random.default_rng(0)
    values = {name: rng.uniform(size=500) < p for name, p in (("a", 0.5), ("b", 0.8), ("c", 0.55))}
    assert evaluate.clear_best(values) == "b" and evaluate.clear_best({"a": values["a"]}) is None
    close = values["b"].copy()
    close[np.flatnonzero(close)[:2]] = False  # two hits of 500 fewer
    assert evaluate.clear_best({**values, "d": close}) is None


def test_over_seeds_by_hand():
    for n, t in ((2, 12.7062), (3, 4.30265), (12, 2.20099)):  # Student's t from a printed table
        mean, half = (n - 1) / 2, t * np.arange(n).std(ddof=1) / n**0.5
        expected = {"value": mean, "low": mean - half, "high": mean + half, "n": n}
        assert evaluate.over_seeds(np.arange(n) * 1.0) == pytest.approx(expected, abs=1e-4)
