"""Evaluation: retrieval with bootstrap intervals, and where-is-the-detail."""
import numpy as np
import pandas as pd
import torch

from .data import in_order, loader


@torch.inference_mode()
def embed(model, dataset, batch_size=128):
    """Normalised features of every row of a PairDataset -> (image, long, short), each (N, d) on the CPU."""
    model.eval()
    parts = [(model.encode_image(images, True), model.encode_text(long, True), model.encode_text(short, True))
             for _, _, images, long, short in loader(dataset, in_order(len(dataset), batch_size), model.logit_scale.device)]
    return tuple(torch.cat(part).cpu() for part in zip(*parts))


def ranks(image, text, image_of_text=None):
    """Rank of the right answer for each query: (rank of text t's image (T,), rank of image i's best text (I,)).

    image (I, d), text (T, d), normalised; text t describes image image_of_text[t] (default: t). Rank 0 is best; ties
    and NaN count against the model. Example: one text, two equal images, either right -> rank 1.
    """
    image_of_text = torch.arange(len(text)) if image_of_text is None else torch.as_tensor(image_of_text)
    similarity = text @ image.T  # (T, d) -> (T, I)
    right = similarity[torch.arange(len(text)), image_of_text]
    of_text = (~(similarity < right[:, None])).sum(dim=1) - 1
    own = image_of_text[:, None] == torch.arange(len(image))  # (T, I)
    best = similarity.masked_fill(~own, -torch.inf).amax(dim=0)  # (T, I) -> (I,)
    of_image = (~(similarity < best) & ~own).sum(dim=0)
    return of_text, of_image


def retrieval(image, text, image_of_text=None, resamples=1000, seed=0):
    """Recall at 1, 5 and 10, both ways, with 95 % bootstrap intervals over queries.

    Features as in `ranks` -> table with the columns metric ("t2i_r1": text to image, recall at 1), value, low, high, n.
    """
    rows = []
    for way, rank in zip(("t2i", "i2t"), ranks(image, text, image_of_text)):
        for k in (1, 5, 10):
            hits = (rank < k).double().numpy()
            rows.append({"metric": f"{way}_r{k}", **interval(hits, resamples, seed)})
    return pd.DataFrame(rows)


def interval(values, resamples=1000, seed=0):
    """Mean of `values` (n,) and its 95 % bootstrap interval -> value, low, high, n."""
    values = np.asarray(values, dtype=np.float64)
    draws = np.random.default_rng(seed).integers(0, len(values), (resamples, len(values)))
    low, high = np.quantile(values[draws].mean(axis=1), [0.025, 0.975])
    return {"value": values.mean(), "low": low, "high": high, "n": len(values)}


def difference_interval(values, others, resamples=1000, seed=0):
    """Mean difference of paired `values` - `others` (n,) and its 95 % bootstrap interval -> value, low, high, n."""
    return interval(np.asarray(values, np.float64) - np.asarray(others, np.float64), resamples, seed)


@torch.inference_mode()
def detail_choices(model, dataset, other_dataset, batch_size=128):
    """Where-is-the-detail: does each image prefer its own caption to the one that differs in a single detail?

    Two PairDatasets of the same length, row i of each differing in one detail. -> (n,) 1 where the right caption is
    nearer to the first image, 0 where the other is, 0.5 for a tie (a model that cannot read the detail sees a tie).
    """
    model.eval()
    choices = []
    for (_, _, images, long, _), (_, _, _, other, _) in zip(*(
            loader(d, in_order(len(d), batch_size), model.logit_scale.device) for d in (dataset, other_dataset))):
        image = model.encode_image(images, True)
        both = model.encode_text(torch.cat([long, other]), True)  # together: equal texts get equal features
        right, wrong = (image * both[:len(image)]).sum(1), (image * both[len(image):]).sum(1)
        choice = (right > wrong).double() + 0.5 * (right == wrong)
        choice[(long == other).all(dim=1)] = 0.5
        choices.append(choice.cpu())
    return torch.cat(choices).numpy()


def by_position(choices, positions, width=20, last=180):
    """Accuracy of `choices` per bin of token positions -> table: position (middle of the bin), value, low, high, n."""
    rows = []
    for start in range(0, last, width):
        inside = (positions >= start) & (positions < start + width)
        if inside.sum() >= 10:
            rows.append({"position": start + width / 2, **interval(choices[inside])})
    return pd.DataFrame(rows)
