"""Why a model is good or bad: swapped words and perturbed captions, its teacher's geometry, its
training."""

import math
import re

import numpy as np
import pandas as pd
import scipy  # loads scipy.stats, which takes half a second, when it is used
import torch

from .datasets.published import sentences
from .evaluate import difference_interval, interval, ranks
from .text import first_difference

COLOURS = "red blue green yellow black white brown pink purple grey gray"
NUMBERS = "two three four five six seven eight nine ten"
PAIRS = ("small large", "big little", "tiny huge", "tall short", "wide narrow")
# word -> (attribute, the words that may replace it)
KINDS = [("colour", COLOURS), ("number", NUMBERS), *(("size", pair) for pair in PAIRS)]
SWAPS = {
    word: (kind, [w for w in words.split() if w != word and {w, word} != {"grey", "gray"}])
    for kind, words in KINDS
    for word in words.split()
}


def swap_attribute(caption, rng):
    """Swap a colour, size or number word for another -> (caption, attribute, position) or None.

    After SugarCrepe (Hsieh et al., 2023): the sentence stays as likely as it was, and is wrong.
    Only a lower-case word (no names) that the caption holds once is swapped, as a second one would
    give the answer away. position: the first token that differs.
    """
    words = set(re.findall(r"(?<![\w-])[a-z]+(?![\w-])", caption)) & set(SWAPS)
    words = sorted(w for w in words if len(re.findall(rf"\b{w}\b", caption, re.I)) == 1)
    if not words:
        return None
    word = words[rng.integers(len(words))]
    attribute, others = SWAPS[word]
    swapped = re.sub(rf"\b{word}\b", others[rng.integers(len(others))], caption)
    return swapped, attribute, first_difference(caption, swapped)


def swapped_details(table, seed=0):
    """Where-is-the-detail pairs from the long captions that have a word to swap -> table: image,
    long, other_long, attribute, position, key."""
    rows = []
    for i, (image, long, key) in enumerate(zip(table.image, table.long, table.key, strict=True)):
        if swap := swap_attribute(long, np.random.default_rng([seed, i])):
            rows.append((image, long, *swap, key))
    columns = ["image", "long", "other_long", "attribute", "position", "key"]
    return pd.DataFrame(rows, columns=columns)


def _kept(items, share, rng):
    """A random share of items in their order."""
    return [items[i] for i in np.sort(rng.permutation(len(items))[: math.ceil(share * len(items))])]


PERTURBATIONS = {  # name: (sentences, rng) -> sentences
    "as written": lambda s, rng: s,
    "first removed": lambda s, rng: s[1:],
    "first last": lambda s, rng: s[1:] + s[:1],
    "detail last": lambda s, rng: s[:1] + s[2:] + s[1:2],
    "shuffled": lambda s, rng: [s[i] for i in rng.permutation(len(s))],
    "half kept": lambda s, rng: _kept(s, 0.5, rng),
    "words dropped": lambda s, rng: [" ".join(_kept(". ".join(s).split(), 0.7, rng))],
}


def perturb(caption, perturbation, rng):
    """A caption "A. B. C." under one of PERTURBATIONS; one of a single sentence stays as it is."""
    parts = sentences(caption)
    if perturbation == "as written" or len(parts) < 2:
        return caption
    return ". ".join(PERTURBATIONS[perturbation](parts, rng)).rstrip(".") + "."


def perturbed_captions(captions, seed=0):
    """Captions (N,) -> table (N rows) with a column for each of PERTURBATIONS."""
    rows = [
        [perturb(text, name, np.random.default_rng([seed, i])) for name in PERTURBATIONS]
        for i, text in enumerate(captions)
    ]
    return pd.DataFrame(rows, columns=[*PERTURBATIONS])


def perturbed_recall(image, texts):
    """Text-to-image recall at 1 of image (N, d) by texts {perturbation: (N, d)}, normalised.

    -> table: perturbation, metric ("t2i_r1", or "change": paired, minus that "as written"), value,
    low, high, n, p (of a change); and the hits {perturbation: (N,)}, 0 or 1.
    """
    hits = {name: (ranks(image, text)[0] < 1).long().numpy() for name, text in texts.items()}
    rows = [(name, "t2i_r1", interval(found)) for name, found in hits.items()]
    changed = [name for name in hits if name != "as written"]
    rows += [(k, "change", difference_interval(hits[k], hits["as written"])) for k in changed]
    return pd.DataFrame({"perturbation": k, "metric": m, **x} for k, m, x in rows), hits


def linear_cka(x, y, keep=None):
    """Linear centred kernel alignment (B,) of features x (N, d) and y (N, e) of the same N rows.

    1: y is a rotation of x (Kornblith et al., 2019). 0: on average for unrelated features, as
    HSIC's estimator is the unbiased one (Song et al., 2012). keep (B, N) of 0 and 1: the rows, at
    least 4, that each of the B values is for (default: one value for all rows); of fewer: NaN.
    """
    keep = torch.ones(1, len(x), dtype=torch.double) if keep is None else keep.double()
    x, y = (f.double() - f.double().mean(dim=0) for f in (x, y))
    x_x, y_y = ((f @ f.T).fill_diagonal_(0) for f in (x, y))  # (N, d) -> (N, N) similarities
    n = keep.sum(dim=1)

    def hsic(k, m):
        k_sums, m_sums, products = (keep * (keep @ matrix) for matrix in (k, m, k * m))  # (B, N)
        total = products.sum(1) + k_sums.sum(1) * m_sums.sum(1) / ((n - 1) * (n - 2))
        return (total - 2 * (k_sums * m_sums).sum(1) / (n - 2)) / (n * (n - 3))

    return hsic(x_x, y_y) / (hsic(x_x, x_x) * hsic(y_y, y_y)).sqrt()


def cka_interval(x, y, blocks=20):
    """`linear_cka` with its 95 % block jackknife interval -> {value, low, high, n}.

    A bootstrap would draw rows twice, and equal rows bias CKA.
    """
    blocks = max(1, min(blocks, len(x)))
    left_out = torch.arange(len(x)) % blocks != torch.arange(blocks)[:, None]  # (blocks, N)
    value, *others = linear_cka(x, y, torch.cat([torch.ones(1, len(x)), left_out])).tolist()
    half = 1.96 * np.sqrt((blocks - 1) * np.var(others))
    return {"value": value, "low": value - half, "high": value + half, "n": len(x)}


def neighbour_overlap(x, y, k=10):
    """Share (N,) of each row's k nearest neighbours in x (N, d) that are so in y (N, e) too.

    x and y are normalised features of the same rows. Unrelated ones share k / (N - 1).
    """
    if not 0 < k < len(x):
        raise ValueError(f"{len(x)} rows have {len(x) - 1} neighbours each: k is {k}")
    similar = ((f @ f.T).fill_diagonal_(-torch.inf) for f in (x, y))  # (N, N) each
    a, b = (s.topk(k, dim=1).indices for s in similar)  # (N, k) each
    return (a[:, :, None] == b[:, None, :]).any(dim=2).double().mean(dim=1).numpy()


def efficiency(history, base, queries, k=1):
    """When each run reaches the target: the final recall at k of the run `base`.

    history: model, step, seconds, long_t2i_r{k} of `queries` queries, a row per evaluation. A run
    reaches the target between two evaluations -> table: model, against, target, step_before, step,
    seconds_before, seconds (NaN: never reached), and how many times as long `base` takes, as far as
    these evaluations tell: step_ratio_low, step_ratio_high (infinite if a run's first evaluation
    reaches it), second_ratio_low, second_ratio_high. No rows if the target may be chance: a random
    ranking has it with a probability of 0.05 or more.
    """
    history = history.reset_index(drop=True)
    recall = history[f"long_t2i_r{k}"]
    target = recall[history.model == base].iloc[-1]
    chance = scipy.stats.binom.sf(round(target * queries) - 1, queries, min(1, k / queries))
    before = history.groupby("model")[["step", "seconds"]].shift(fill_value=0)
    history = history.join(before.add_suffix("_before"))
    reached = history[recall >= target].groupby("model").first()
    columns = ["step_before", "step", "seconds_before", "seconds"]
    models = history.model.unique() if chance < 0.05 else []
    table = reached[columns].reindex(pd.Index(models, name="model")).reset_index()
    table.insert(1, "against", base)
    table.insert(2, "target", target)
    for name, at in (("step_ratio", "step"), ("second_ratio", "seconds")):
        low = reached[f"{at}_before"][base] / table[at]
        high = reached[at][base] / table[f"{at}_before"]
        table[f"{name}_low"] = low.where(table.model != base, 1)
        table[f"{name}_high"] = high.where(table.model != base, 1)
    return table
