"""Why a model is good or bad: details that a swapped word hides, its teacher's geometry, its training, its failures."""

import re
from functools import cache

import numpy as np
import pandas as pd
import torch

from .text import tokenizer

COLOURS = (
    "red",
    "blue",
    "green",
    "yellow",
    "black",
    "white",
    "brown",
    "pink",
    "purple",
    "grey",
    "gray",
)
NUMBERS = ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
OPPOSITES = {
    "small": "large",
    "large": "small",
    "big": "little",
    "little": "big",
    "tiny": "huge",
    "huge": "tiny",
    "tall": "short",
    "short": "tall",
    "wide": "narrow",
    "narrow": "wide",
}
# word -> its kind, and what may stand in its place: another colour, another number, the opposite size
SWAPS = {
    **{
        word: ("colour", [w for w in COLOURS if w != word and {w, word} != {"grey", "gray"}])
        for word in COLOURS
    },
    **{word: ("number", [w for w in NUMBERS if w != word]) for word in NUMBERS},
    **{word: ("size", [other]) for word, other in OPPOSITES.items()},
}


encoder = cache(lambda: tokenizer().encode)  # reads its vocabulary once


def first_difference(one, other):
    """The first token in which two texts differ; the start token is 0."""
    one, other = encoder()(one), encoder()(other)
    return 1 + next(
        (i for i, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other))
    )


def swap_attribute(caption, rng):
    """Swap one colour, size or number word for another of its kind -> (caption, attribute, token position), or None.

    After SugarCrepe's attribute swaps (Hsieh et al., 2023): the sentence stays as likely as it was, and wrong. Only a word
    that stands once in the caption, in lower case (no names), is taken, so that nothing else in it gives the answer.
    """
    words = re.findall(r"(?<![\w-])[a-z]+(?![\w-])", caption)
    usable = sorted(
        {
            word
            for word in words
            if word in SWAPS and len(re.findall(rf"\b{word}\b", caption, re.I)) == 1
        }
    )
    if not usable:
        return None
    word = usable[rng.integers(len(usable))]
    attribute, others = SWAPS[word]
    swapped = re.sub(rf"\b{word}\b", others[rng.integers(len(others))], caption)
    return swapped, attribute, first_difference(caption, swapped)


def swapped_details(table, seed=0):
    """A where-is-the-detail table of the pairs whose long caption has a word to swap: image, long, other_long, attribute,
    position, key. Its length is the number of usable captions."""
    rows = []
    for row, (image, long, key) in enumerate(zip(table.image, table.long, table.key)):
        if swap := swap_attribute(long, np.random.default_rng([seed, row])):
            rows.append((image, long, *swap, key))
    return pd.DataFrame(
        rows, columns=["image", "long", "other_long", "attribute", "position", "key"]
    )


# ---- what the student kept of its teacher's geometry


def linear_cka(x, y, keep=None):
    """Linear centred kernel alignment of features x (N, d) and y (N, e) of the same rows, 1 for a rotation of each other.

    Kornblith et al. (2019), with the unbiased estimator of HSIC (Song et al., 2012), which is 0 on average for unrelated
    features; the plain one grows with d / N. keep (B, N) of zeros and ones: one value for each choice of rows, at least 4, -> (B,).
    """
    keep = torch.ones(1, len(x), dtype=torch.double) if keep is None else keep.double()
    k, l = (
        centred @ centred.T for centred in (f.double() - f.double().mean(dim=0) for f in (x, y))
    )  # (N, N)
    k.fill_diagonal_(0)
    l.fill_diagonal_(0)
    n = keep.sum(dim=1)

    def hsic(k, l):
        k_sums, l_sums, both = (keep * (keep @ one) for one in (k, l, k * l))  # (B, N)
        pairs = (
            both.sum(1)
            + k_sums.sum(1) * l_sums.sum(1) / ((n - 1) * (n - 2))
            - 2 * (k_sums * l_sums).sum(1) / (n - 2)
        )
        return pairs / (n * (n - 3))

    return hsic(k, l) / (hsic(k, k) * hsic(l, l)).sqrt()


def cka_interval(x, y, blocks=20):
    """`linear_cka` and its 95 % block jackknife interval (rows drawn twice would bias a bootstrap) -> value, low, high, n."""
    left_out = 1 - torch.nn.functional.one_hot(torch.arange(len(x)) % blocks).T  # (blocks, N)
    value, *others = linear_cka(x, y, torch.cat([torch.ones(1, len(x)), left_out])).tolist()
    half = 1.96 * np.sqrt((blocks - 1) * np.var(others))
    return {"value": value, "low": value - half, "high": value + half, "n": len(x)}


def neighbour_overlap(x, y, k=10, chunk=4096):
    """Share of each row's k nearest neighbours in x (N, d) that are among its k nearest in y (N, e): (N,) in [0, 1].

    Normalised features of the same rows; unrelated ones share k / (N - 1).
    """
    shares = []
    for rows in torch.arange(len(x)).split(chunk):
        near = []
        for features in (x, y):
            similarity = features[rows] @ features.T  # (B, N)
            similarity[torch.arange(len(rows)), rows] = -torch.inf
            near.append(similarity.topk(k, dim=1).indices)  # (B, k)
        shares.append((near[0][:, :, None] == near[1][:, None, :]).any(dim=2).double().mean(dim=1))
    return torch.cat(shares).numpy()


# ---- training


def efficiency(history, base, metric="long_t2i_r1"):
    """Steps and seconds after which each run reaches what the run `base` has in the end.

    history: columns model, step, seconds, `metric`, a row per evaluation; the first one that reaches it counts, for the base
    too, so numbers are rounded up to evaluations. -> table: model, against, target, steps, seconds, step_ratio and second_ratio
    (how many times fewer than the base took), NaN where a run never reaches it.
    """
    target = history[history.model == base][metric].iloc[-1]
    first = (
        history[history[metric] >= target]
        .groupby("model")
        .first()
        .rename(columns={"step": "steps"})
    )
    table = first.reindex(pd.Index(history.model.unique(), name="model"))[["steps", "seconds"]]
    ratios = (table.loc[base] / table).rename(
        columns={"steps": "step_ratio", "seconds": "second_ratio"}
    )
    return (
        table.join(ratios)
        .assign(against=base, target=target)
        .reset_index()[
            ["model", "against", "target", "steps", "seconds", "step_ratio", "second_ratio"]
        ]
    )


# ---- failures


def failures(image, text, rank, n=4, seed=0):
    """n of the texts whose image is not found first, drawn at random -> table: query (row), rank (from 1), first, second, third.

    image and text (N, d): row i of each belong together; rank (N,) as `evaluate.ranks` gives it.
    """
    missed = np.flatnonzero(np.asarray(rank) > 0)
    chosen = np.sort(np.random.default_rng(seed).permutation(missed)[:n])
    best = (text[chosen] @ image.T).topk(3, dim=1).indices.numpy()  # (n, 3)
    return pd.DataFrame(
        {
            "query": chosen,
            "rank": np.asarray(rank)[chosen] + 1,
            "first": best[:, 0],
            "second": best[:, 1],
            "third": best[:, 2],
        }
    )
