"""Evaluation on features: retrieval, zero-shot classification, where-is-the-detail, each with what noise does to it."""

import numpy as np
import open_clip
import pandas as pd
import torch

from .data import in_order, loader, read_image
from .models import transforms

TIE = 1e-6  # similarities of unit vectors that differ by less are equal: float32 rounding depends on the place in a matrix
# The 18 prompts of OpenAI for CIFAR-10 and CIFAR-100 (openai/CLIP, data/prompts.md).
CIFAR_TEMPLATES = tuple(
    f"a {kind}photo of {article} {size}{{}}."
    for article in ("a", "the")
    for kind, size in (
        ("", ""),
        ("blurry ", ""),
        ("black and white ", ""),
        ("low contrast ", ""),
        ("high contrast ", ""),
        ("bad ", ""),
        ("good ", ""),
        ("", "small "),
        ("", "big "),
    )
)
TEMPLATES = {
    "cifar10": CIFAR_TEMPLATES,
    "cifar100": CIFAR_TEMPLATES,
    "imagenet": open_clip.OPENAI_IMAGENET_TEMPLATES,
}


@torch.inference_mode()
def embed(model, dataset, batch_size=128):
    """Normalised features of every row of a PairDataset -> (image, long, short), each (N, d) on the CPU."""
    model.eval()
    parts = [
        (
            model.encode_image(images, True),
            model.encode_text(long, True),
            model.encode_text(short, True),
        )
        for _, _, images, long, short in loader(
            dataset, in_order(len(dataset), batch_size), model.logit_scale.device
        )
    ]
    return tuple(torch.cat(part).cpu() for part in zip(*parts))


@torch.inference_mode()
def embed_images(model, images, batch_size=128):
    """Normalised features (N, d) of `images` (encoded bytes or paths), prepared as the model wants, a batch at a time."""
    prepare, device = transforms(model.config)[1], next(model.parameters()).device
    images, parts = list(images), []
    for i in range(0, len(images), batch_size):
        batch = torch.stack(
            [prepare(read_image(image)) for image in images[i : i + batch_size]]
        ).to(device)  # (B, 3, S, S)
        parts.append(model.eval().encode_image(batch, normalize=True).cpu())
    return torch.cat(parts)


@torch.inference_mode()
def embed_texts(model, tokenizer, texts, batch_size=256):
    """Normalised features (N, d) of texts, a batch at a time."""
    texts, device = list(texts), next(model.parameters()).device
    return torch.cat(
        [
            model.eval()
            .encode_text(tokenizer(texts[i : i + batch_size]).to(device), normalize=True)
            .cpu()
            for i in range(0, len(texts), batch_size)
        ]
    )


# ---- retrieval


def ranks(image, text, image_of_text=None, chunk=4096):
    """Rank of the right answer for each query: (rank of text t's image (T,), rank of image i's best text (I,)).

    image (I, d), text (T, d), normalised; text t describes image image_of_text[t] (default: t). Rank 0 is best; ties
    and NaN count against the model. Example: one text, two equal images, either right -> rank 1.
    At most chunk x chunk similarities are in memory at once, so a million images and texts need no more than a thousand.
    """
    image, text, device = image.float(), text.float(), image.device
    texts, images = torch.arange(len(text), device=device), torch.arange(len(image), device=device)
    owner = texts if image_of_text is None else torch.as_tensor(image_of_text, device=device)
    right = torch.cat([(text[t] * image[owner[t]]).sum(1) for t in texts.split(chunk)])  # (T,)
    best = torch.full((len(image),), -torch.inf, device=device).scatter_reduce(
        0, owner, right, "amax"
    )  # (I,)
    of_text, of_image = torch.zeros_like(texts), torch.zeros_like(images)
    for t in texts.split(chunk):
        for i in images.split(chunk):
            similarity = text[t] @ image[i].T  # (t, d) -> (t, i)
            other = owner[t][:, None] != i  # (t, i)
            of_text[t] += (~(similarity < right[t][:, None] - TIE) & other).sum(dim=1)
            of_image[i] += (~(similarity < best[i] - TIE) & other).sum(dim=0)
    return of_text.cpu(), of_image.cpu()


def retrieval(image, text, image_of_text=None, resamples=1000, seed=0):
    """Recall at 1, 5 and 10 and the median rank, both ways, with 95 % bootstrap intervals.

    Features as in `ranks` -> table with the columns metric ("t2i_r1": text to image, recall at 1; "t2i_median": the rank,
    1 is best, within which half of the queries are answered), value, low, high, n. Queries are resampled; where an image
    has several texts, they are drawn together, as they are not independent. Images without a text ask for none.
    """
    owner = torch.arange(len(text)) if image_of_text is None else torch.as_tensor(image_of_text)
    of_text, of_image = ranks(image, text, owner)
    asks = torch.bincount(owner, minlength=len(image)) > 0
    rows = []
    for way, rank, groups in (("t2i", of_text, owner.numpy()), ("i2t", of_image[asks], None)):
        for k in (1, 5, 10):
            rows.append(
                {"metric": f"{way}_r{k}", **interval((rank < k).numpy(), resamples, seed, groups)}
            )
        rows.append(
            {
                "metric": f"{way}_median",
                **median_interval(rank.numpy() + 1, resamples, seed, groups),
            }
        )
    return pd.DataFrame(rows)


# ---- noise


def _means(values, resamples, seed, groups=None):
    """Bootstrap means (resamples,) of `values` (n,), resampled by group (n,).

    Groups with the same sum and number are alike, so it is enough to draw how often each kind comes: for hits and misses
    that is a binomial draw, whatever n.
    """
    _, groups = np.unique(np.arange(len(values)) if groups is None else groups, return_inverse=True)
    sums = np.stack(
        [np.bincount(groups, values), np.bincount(groups)]
    )  # (2, groups): sum and number of each group
    kinds, count = np.unique(sums, axis=1, return_counts=True)
    drawn = np.random.default_rng(seed).multinomial(
        count.sum(), count / count.sum(), resamples
    )  # (resamples, kinds)
    total, number = kinds @ drawn.T
    return total / number


def interval(values, resamples=1000, seed=0, groups=None):
    """Mean of `values` (n,) and its 95 % bootstrap interval -> value, low, high, n. groups (n,): resampled together."""
    values = np.asarray(values, dtype=np.float64)
    low, high = np.quantile(_means(values, resamples, seed, groups), [0.025, 0.975])
    return {"value": values.mean(), "low": low, "high": high, "n": len(values)}


def median_interval(values, resamples=1000, seed=0, groups=None):
    """Lower median of `values` (n,), the smallest that half of them do not pass, and its interval, as in `interval`."""
    values = np.asarray(values)
    _, groups = np.unique(np.arange(len(values)) if groups is None else groups, return_inverse=True)
    order, n, rng = values.argsort(), groups.max() + 1, np.random.default_rng(seed)

    def median(times):
        """The median if group g is there times[g] times."""
        weight = times[groups[order]].cumsum()
        return values[order[np.searchsorted(weight, weight[-1] / 2)]]

    drawn = [median(np.bincount(rng.integers(0, n, n), minlength=n)) for _ in range(resamples)]
    low, high = np.quantile(drawn, [0.025, 0.975])
    return {"value": median(np.ones(n, dtype=int)), "low": low, "high": high, "n": len(values)}


def difference_interval(values, others, resamples=10000, seed=0, groups=None):
    """Mean difference of paired `values` - `others` (n,), its 95 % bootstrap interval and test -> value, low, high, n, p.

    p, two-sided: twice the share of resamples on the other side of zero (Efron and Tibshirani, 1993), never below
    2 / (resamples + 1).
    """
    difference = np.asarray(values, np.float64) - np.asarray(others, np.float64)
    drawn = _means(difference, resamples, seed, groups)
    beyond = min((drawn <= 0).sum(), (drawn >= 0).sum())
    return {
        **interval(difference, resamples, seed, groups),
        "p": min(1.0, 2 * (beyond + 1) / (resamples + 1)),
    }


def holm(p):
    """Holm's (1979) adjusted p values: below 0.05 if the test holds with all of the family's errors kept below 5 %."""
    p = np.asarray(p, dtype=np.float64)
    order = p.argsort(kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(1, np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)))
    return adjusted


def clear_best(values):
    """The name in {name: (n,)} with the best mean, if it beats every other one beyond the noise (Holm), else None."""
    best = max(values, key=lambda name: np.mean(values[name]))
    p = holm(
        [difference_interval(values[best], values[name])["p"] for name in values if name != best]
    )
    return best if len(p) and (p < 0.05).all() else None


# Quantiles 0.975 of Student's t with 1, 2, ... degrees of freedom.
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def over_seeds(values):
    """Mean of one number per seed (2 to 10 seeds) and its 95 % t interval: what training again changes -> value, low, high, n."""
    values = np.asarray(values, dtype=np.float64)
    if not 2 <= len(values) <= len(T_975) + 1:
        raise ValueError(f"{len(values)} seeds: an interval over seeds needs 2 to {len(T_975) + 1}")
    half = T_975[len(values) - 2] * values.std(ddof=1) / np.sqrt(len(values))
    return {
        "value": values.mean(),
        "low": values.mean() - half,
        "high": values.mean() + half,
        "n": len(values),
    }


# ---- zero-shot classification


def zero_shot(model, tokenizer, images, labels, names, templates):
    """Zero-shot classification of `images` (encoded bytes or paths) -> (n,) rank of each right class, 0 is best.

    labels: the right class of each image, a row of `names`; templates: prompts with {} or functions, one class is the mean
    of its prompts (Radford et al., 2021, section 3.1.4; the classifier is open_clip's).
    """
    device = next(model.parameters()).device
    classes = open_clip.build_zero_shot_classifier(
        model.eval(), tokenizer, names, templates, device=device
    ).cpu()  # (d, C)
    scores = embed_images(model, images) @ classes  # (N, d) -> (N, C)
    right = scores.gather(1, torch.from_numpy(np.array(labels)).reshape(-1, 1))  # (N, 1)
    return ((~(scores < right)).sum(dim=1) - 1).numpy()  # a tie counts against the model


# ---- where is the detail


@torch.inference_mode()
def detail_choices(model, dataset, other_dataset, batch_size=128):
    """Where-is-the-detail: does each image prefer its own caption to the one that differs in a single detail?

    Two PairDatasets of the same length, row i of each differing in one detail. -> (n,) 1 where the right caption is
    nearer to the first image, 0 where the other is, 0.5 for a tie (a model that cannot read the detail sees a tie).
    """
    model.eval()
    choices = []
    for (_, _, images, long, _), (_, _, _, other, _) in zip(
        *(
            loader(d, in_order(len(d), batch_size), model.logit_scale.device)
            for d in (dataset, other_dataset)
        )
    ):
        image = model.encode_image(images, True)
        both = model.encode_text(
            torch.cat([long, other]), True
        )  # together: equal texts get equal features
        right, wrong = (image * both[: len(image)]).sum(1), (image * both[len(image) :]).sum(1)
        choice = (right > wrong).double() + 0.5 * (right == wrong)
        choice[(long == other).all(dim=1)] = 0.5
        choices.append(choice.cpu())
    return torch.cat(choices).numpy()


def by_attribute(choices, details):
    """Accuracy of `choices` per attribute of the table `details` ("all": of any), for details named before token 77, from it on
    and anywhere -> table: attribute, part, value, low, high, n."""
    position, rows = details.position.to_numpy(), []
    for part, inside in (
        ("before 77", position < 77),
        ("from 77", position >= 77),
        ("any", position >= 0),
    ):
        for attribute in ["all", *sorted(details.attribute.unique())]:
            chosen = choices[
                inside & (details.attribute.to_numpy() == attribute)
                if attribute != "all"
                else inside
            ]
            if len(chosen) >= 10:
                rows.append({"attribute": attribute, "part": part, **interval(chosen)})
    return pd.DataFrame(rows, columns=["attribute", "part", "value", "low", "high", "n"])


def by_position(choices, positions, width=20, last=180):
    """Accuracy of `choices` per bin of token positions -> table: position (middle of the bin), value, low, high, n."""
    rows = []
    for start in range(0, last, width):
        inside = (positions >= start) & (positions < start + width)
        if inside.sum() >= 10:
            rows.append({"position": start + width / 2, **interval(choices[inside])})
    return pd.DataFrame(rows, columns=["position", "value", "low", "high", "n"])
