"""Evaluation: features of a data set, retrieval, noise, zero-shot classification, details."""

import numpy as np
import pandas as pd
import scipy  # loads scipy.stats, which takes half a second, when it is used
import torch
from open_clip import OPENAI_IMAGENET_TEMPLATES, build_zero_shot_classifier

from .data import in_order, loader
from .models import transforms

TIE = 1e-6  # closer similarities are equal: float32 rounding depends on the place in a matrix
# The 18 prompts of OpenAI for CIFAR-10 and CIFAR-100 (openai/CLIP, data/prompts.md).
KINDS = ("", "blurry ", "black and white ", "low contrast ", "high contrast ", "bad ", "good ")
STYLES = [*((kind, "") for kind in KINDS), ("", "small "), ("", "big ")]
CIFAR = [f"a {kind}photo of {noun} {size}{{}}." for noun in ("a", "the") for kind, size in STYLES]
TEMPLATES = {"cifar10": CIFAR, "cifar100": CIFAR, "imagenet": OPENAI_IMAGENET_TEMPLATES}


@torch.inference_mode()
def embed(model, dataset, batch_size=128):
    """Normalised features of a PairDataset -> (image, long, short), each (N, d), on the CPU."""
    order, device = in_order(len(dataset), batch_size), model.eval().logit_scale.device
    features = [
        [model.encode_image(images, True), *(model.encode_text(t, True) for t in (long, short))]
        for _, _, images, long, short in loader(dataset, order, device)
    ]
    if not features:  # no pairs
        return torch.empty(3, 0, model.config["embed_dim"]).unbind()
    return tuple(torch.cat(rows).cpu() for rows in zip(*features, strict=True))


@torch.inference_mode()
def embed_images(model, images, batch_size=128):
    """Normalised features (N, d) of encoded bytes or paths, prepared as the model needs."""
    prepare, images, features = transforms(model.eval().config)[1], list(images), []
    for i in range(0, len(images), batch_size):
        batch = torch.stack([*map(prepare, images[i : i + batch_size])])
        features.append(model.encode_image(batch.to(model.logit_scale.device), True).cpu())
    return torch.cat(features or [torch.empty(0, model.config["embed_dim"])])


@torch.inference_mode()
def embed_texts(model, tokenizer, texts, batch_size=256):
    """Normalised features (N, d) of texts, one or several."""
    texts, device = [texts] if isinstance(texts, str) else list(texts), model.logit_scale.device
    batches = tokenizer(texts).split(batch_size) if texts else ()
    features = [model.eval().encode_text(batch.to(device), True).cpu() for batch in batches]
    return torch.cat(features or [torch.empty(0, model.config["embed_dim"])])


def ranks(image, text, image_of_text=None, chunk=4096):
    """Rank of the right answer to each query, 0 is best -> (t2i (T,), i2t (I,)).

    image (I, d), text (T, d), normalised. Text t describes image image_of_text[t] (default: t).
    t2i[t]: number of wrong images at least as similar to text t as its own image is.
    i2t[i]: number of wrong texts at least as similar to image i as the best of its own texts is.
    So ties and NaN count against the model. Example, rows are texts and columns are images:
    text @ image.T = [[0.9, 0.1], [0.5, 0.5]] -> t2i = [0, 1], i2t = [0, 0]."""
    image, text, device = image.float(), text.float(), image.device
    texts, images = torch.arange(len(text), device=device), torch.arange(len(image), device=device)
    target = texts if image_of_text is None else image_of_text
    target = torch.as_tensor(target, dtype=torch.long, device=device)
    right = torch.cat([(text[t] * image[target[t]]).sum(1) for t in texts.split(chunk)])  # (T,)
    best = torch.full_like(image[:, 0], -torch.inf).scatter_reduce(0, target, right, "amax")  # (I,)
    t2i, i2t = torch.zeros_like(texts), torch.zeros_like(images)
    for t in texts.split(chunk):  # so that memory holds chunk x chunk similarities, not T x I
        for i in images.split(chunk):
            similarity = text[t] @ image[i].T  # (t, d) -> (t, i)
            wrong = target[t][:, None] != i  # (t, i)
            t2i[t] += (~(similarity < right[t][:, None] - TIE) & wrong).sum(dim=1)
            i2t[i] += (~(similarity < best[i] - TIE) & wrong).sum(dim=0)
    return t2i.cpu(), i2t.cpu()


def recall(model, dataset, caption="long"):
    """Text-to-image recall by "long" or "short" captions -> {"long_t2i_r1": , "long_t2i_r10": }."""
    image, long, short = embed(model, dataset)
    rank, _ = ranks(image, {"long": long, "short": short}[caption])
    return {f"{caption}_t2i_r{k}": (rank < k).double().mean().item() for k in (1, 10)}


def retrieval(image, text, image_of_text=None, resamples=1000, seed=0):
    """Recall at 1, 5, 10 and median rank, both ways, with 95 % intervals over queries.

    Features as in `ranks` -> table, a row per metric: metric, value, low, high, n (queries).
    "t2i_r1": text-to-image recall at 1; "i2t_median": lower median of the ranks, here 1 is best.
    Texts of one image are resampled together. An image without a text is no query."""
    target = np.asarray(range(len(text)) if image_of_text is None else image_of_text)
    t2i, i2t = ranks(image, text, target)
    i2t = i2t[np.unique(target).astype(int)]
    rows = []
    for direction, rank, groups in (("t2i", t2i, target), ("i2t", i2t, None)):
        rank, noise = rank.numpy(), (resamples, seed, groups)
        rows += [{"metric": f"{direction}_r{k}", **interval(rank < k, *noise)} for k in (1, 5, 10)]
        rows.append({"metric": f"{direction}_median", **median_interval(rank + 1, *noise)})
    return pd.DataFrame(rows)


def _numbered(groups, n):
    """Groups of n values (default: each its own), numbered from 0 -> (n,), and their number."""
    groups = np.arange(n) if groups is None else np.unique(groups, return_inverse=True)[1]
    return groups, groups.max(initial=-1) + 1


def _means(values, resamples, seed, groups):
    """Bootstrap means (resamples,) of values (n,), resampled by group (n,)."""
    # scipy.stats.bootstrap makes other draws, resamples no groups and holds n x resamples values.
    # Groups of equal sum and size are alike: it is enough to draw how often each kind comes.
    sums = np.stack([np.bincount(groups, values), np.bincount(groups)])  # (2, G): sum, size
    if sums.shape[1] < 2:
        return np.full(resamples, np.nan)  # of one group nothing can be said
    kinds, count = np.unique(sums, axis=1, return_counts=True)  # (2, K), (K,)
    rng, share = np.random.default_rng(seed), count / count.sum()
    total, size = kinds @ rng.multinomial(count.sum(), share, resamples).T  # (2, resamples)
    return total / size


def interval(values, resamples=1000, seed=0, groups=None):
    """Mean of values (n,), each of a group (n,), with a 95 % interval -> {value, low, high, n}.

    Hits (0 or 1): Wilson's (1927), as a bootstrap of few hits or misses is too narrow. Hits in
    groups, and other values: percentile bootstrap of groups; Wilson's for so many groups if none or
    all hit. NaN: there is too little to tell."""
    values, n = np.asarray(values, dtype=np.float64), len(values)
    groups, count = _numbered(groups, n)
    value = values.mean() if n else np.nan
    if n and np.isin(values, (0, 1)).all() and (count == n or value in (0, 1)):
        test = scipy.stats.binomtest(round(value * count), count)
        low, high = test.proportion_ci(method="wilson")
    else:
        low, high = np.quantile(_means(values, resamples, seed, groups), [0.025, 0.975])
    return {"value": value, "low": low, "high": high, "n": n}


def median_interval(values, resamples=1000, seed=0, groups=None):
    """Lower median of values (n,), 2 of 1, 2, 3, 4, and percentile bootstrap, as `interval`."""
    order, rng, drawn = np.argsort(values), np.random.default_rng(seed), []
    groups, n = _numbered(groups, len(values))
    groups, values = groups[order], np.asarray(values)[order]
    for _ in range(resamples if n > 1 else 0):
        times = np.bincount(rng.integers(0, n, n), minlength=n)  # (G,): how often a group comes
        weight = times[groups].cumsum()  # (n,)
        drawn.append(values[np.searchsorted(weight, weight[-1] / 2)])
    low, high = np.quantile(drawn or [np.nan], [0.025, 0.975])
    value = values[(len(values) - 1) // 2] if len(values) else np.nan
    return {"value": value, "low": low, "high": high, "n": len(values)}


def difference_interval(values, baseline, resamples=10000, seed=0):
    """Mean of paired differences values - baseline (n,), as `interval`, and its two-sided "p".

    Hits (0 or 1): McNemar's exact test, of the pairs that differ (5 to 0: 0.0625), and the interval
    of Bonett and Price (2012). Other values: bootstrap, p twice the share of resamples beyond 0
    (Efron and Tibshirani, 1993), but no less than flipping the signs of m differences can give."""
    values, baseline = np.stack([values, baseline]).astype(np.float64)
    n, better, worse = len(values), int((values > baseline).sum()), int((values < baseline).sum())
    value, differ = (values - baseline).mean() if n else np.nan, better + worse
    if np.isin([values, baseline], (0, 1)).all():
        p = scipy.stats.binomtest(better, differ).pvalue if differ else 1.0
        shift = (better - worse) / (n + 2)  # as if one pair more had differed each way
        half = 1.96 * np.sqrt(((differ + 2) / (n + 2) - shift**2) / (n + 2))
        low, high = max(-1.0, shift - half), min(1.0, shift + half)
    else:
        drawn = _means(values - baseline, resamples, seed, np.arange(n))
        low, high = np.quantile(drawn, [0.025, 0.975])
        p = 2 * (min((drawn <= 0).sum(), (drawn >= 0).sum()) + 1) / (resamples + 1)
        p = min(1.0, max(p, 2.0 ** (1 - differ)))
    return {"value": value, "low": low, "high": high, "n": n, "p": p}


def holm(p):
    """Holm's (1979) adjusted p values of a family: [0.01, 0.04, 0.03] -> [0.03, 0.06, 0.06]."""
    p = np.asarray(p, dtype=np.float64)
    order, adjusted = p.argsort(kind="stable"), np.empty_like(p)
    adjusted[order] = np.minimum(1, np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)))
    return adjusted


def clear_best(values):
    """The name in {name: (n,)} with the best mean, if it beats all others by `holm`, else None."""
    best = max(values, key=lambda name: np.sum(values[name]), default=None)
    p = holm([difference_interval(values[best], v)["p"] for k, v in values.items() if k != best])
    return best if len(p) and (p < 0.05).all() else None


def over_seeds(values):
    """Mean of one value per seed and its 95 % interval of Student's t -> {value, low, high, n}."""
    values = np.asarray(values, dtype=np.float64)
    mean, error = values.mean(), values.std(ddof=1) / np.sqrt(len(values))
    low, high = mean + scipy.stats.t.ppf([0.025, 0.975], len(values) - 1) * error
    return {"value": mean, "low": low, "high": high, "n": len(values)}


def zero_shot(model, tokenizer, images, labels, names, templates):
    """Rank (N,) of each image's class, `labels` (N,) of `names`: 0 is best, ties count against the
    model. images: bytes or paths. A class is the mean of its prompts: `templates` with {}, or
    functions of a name (Radford et al., 2021, section 3.1.4; open_clip's classifier)."""
    device = model.eval().logit_scale.device
    classes = build_zero_shot_classifier(model, tokenizer, names, templates, device=device)
    scores = embed_images(model, images) @ classes.cpu()  # (N, d) @ (d, C) -> (N, C)
    right = scores.gather(1, torch.as_tensor(np.array(labels, np.int64))[:, None])  # (N, 1)
    return ((~(scores < right - TIE)).sum(dim=1) - 1).numpy()


@torch.inference_mode()
def detail_choices(model, dataset, distractors, batch_size=128):
    """Is an image nearer to its caption than to one with a wrong detail? -> (N,): 1 yes, 0 no, 0.5
    for a tie: it lies beyond the context. Rows of the two PairDatasets differ in this detail."""
    order, device = in_order(len(dataset), batch_size), model.eval().logit_scale.device
    batches = zip(*(loader(d, order, device) for d in (dataset, distractors)), strict=True)
    choices = [torch.empty(0, dtype=torch.double)]
    for (_, _, images, long, _), (_, _, _, changed, _) in batches:
        image = model.encode_image(images, True)  # (B, d)
        text = model.encode_text(torch.cat([long, changed]), True)  # one batch: equal texts tie
        right, wrong = (image * text[: len(image)]).sum(1), (image * text[len(image) :]).sum(1)
        choice = (right > wrong).double() + 0.5 * (right == wrong)
        choice[(long == changed).all(dim=1)] = 0.5
        choices.append(choice.cpu())
    return torch.cat(choices).numpy()


def _accuracy(choices, masks, columns):
    rows = [(*key, *interval(choices[m]).values()) for key, m in masks if m.sum() >= 10]
    return pd.DataFrame(rows, columns=[*columns, "value", "low", "high", "n"])


def by_attribute(choices, details):
    """Accuracy of choices (N,) on `details` (N rows: attribute, token position), if 10 or more ->
    table: attribute (or "all"), part ("before 77", "from 77", "any"), value, low, high, n.
    "from 77": from position 76, counted from 0, where a 77-token model reads its end token."""
    position, names = details.position, sorted(details.attribute.unique())
    parts = {"before 77": position < 76, "from 77": position >= 76, "any": position >= 0}
    kinds = {"all": position >= 0, **{name: details.attribute == name for name in names}}
    masks = [((kind, part), kinds[kind] & parts[part]) for part in parts for kind in kinds]
    return _accuracy(choices, masks, ["attribute", "part"])


def by_position(choices, positions, width=20, last=180):
    """Accuracy of choices (N,) by bins of token positions (N,), for bins of 10 or more ->
    table: position (middle of the bin), value, low, high, n."""
    bins = np.asarray(positions) // width
    masks = [(((i + 0.5) * width,), bins == i) for i in range(last // width)]
    return _accuracy(choices, masks, ["position"])
