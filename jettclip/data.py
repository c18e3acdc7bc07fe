"""Pairs of an image and its two captions: one table for every source, and the data set that serves it to training.

A pairs table has the columns image (encoded bytes or a path), long, short, split, key.
"""
import os
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch.utils.data import DataLoader, Dataset
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms.v2 import functional as transform

from . import scenes
from .models import nearest
from .text import tokenizer

COLUMNS = ["image", "long", "short", "split", "key"]
SPLITS = ("train", "val", "test")


def load_pairs(source, root=None, split="train", n=None, seed=0, image_size=64):
    """The pairs of `split` ("train", "val" or "test") of `source`, at most `n`: a pandas table with COLUMNS.

    scenes: drawn on the spot at `image_size`. flickr8k: `root` (or the environment variable JETTCLIP_DATA) names the
    folder of flickr8k_*.parquet; long = the five captions in an order shuffled per image, short = the first of them.
    """
    if source not in SOURCES:
        raise ValueError(nearest(source, SOURCES, "data source"))
    if split not in SPLITS:
        raise ValueError(nearest(split, SPLITS, "split"))
    return SOURCES[source](root, split, n, seed, image_size)


def _scenes(root, split, n, seed, image_size):
    if n is None:
        raise ValueError("scenes are drawn without end: say how many with n")
    return scenes.make_pairs(n, seed=3 * seed + SPLITS.index(split), size=image_size, split=split)


def _flickr8k(root, split, n, seed, image_size):
    root = root or os.environ.get("JETTCLIP_DATA")
    files = sorted(Path(root).expanduser().glob(f"flickr8k_*_{split}.parquet") if root else [],
                   key=lambda f: int(f.name.split("_")[1].removesuffix("px")))
    if not files:
        raise FileNotFoundError(
            f"no flickr8k_<size>px_{split}.parquet in {str(root or '')!r}: set the parameter data_root or the environment "
            "variable JETTCLIP_DATA to the folder that holds Flickr8k (Hodosh et al., 2013) as Parquet files with the "
            "columns image (JPEG bytes), filename, captions (list of 5), split")
    table = pd.read_parquet(files[0])  # the smallest size
    missing = {"image", "filename", "captions"} - set(table.columns)
    if missing:
        raise ValueError(f"{files[0]} lacks the column(s) {', '.join(sorted(missing))}; it has {', '.join(table.columns)}")
    table = table.head(n) if n else table
    rng = np.random.default_rng([seed, SPLITS.index(split)])
    orders = [rng.permutation(len(captions)) for captions in table.captions]
    captions = [[_sentence(five[i]) for i in order] for five, order in zip(table.captions, orders)]
    return pd.DataFrame({"image": table.image, "long": [" ".join(five) for five in captions],
                         "short": [five[0].rstrip(".") for five in captions], "split": split, "key": table.filename})


def _sentence(caption):
    return caption.strip().rstrip(" .") + "."


SOURCES = {"scenes": _scenes, "flickr8k": _flickr8k}


def read_image(image):
    """Encoded bytes or a path -> uint8 tensor (3, H, W)."""
    data = Path(image).read_bytes() if isinstance(image, (str, Path)) else image
    image = decode_image(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB,
                         apply_exif_orientation=True)
    return transform.to_dtype(image, torch.uint8, scale=True)  # a 16-bit PNG comes as uint16


def clean_pairs(table, context_length=248):
    """Check every row -> (usable rows, report with the columns key, problem).

    Rows with an unreadable image or an empty caption are left out; captions over `context_length` tokens stay, are
    truncated in reading, and are reported. A missing column is an error.
    """
    missing = [c for c in COLUMNS if c not in table.columns]
    if missing:
        raise ValueError(f"the pairs table lacks the column(s) {', '.join(missing)}; it has {', '.join(table.columns)}")
    encode = tokenizer(context_length).encode
    problems, usable = [], np.ones(len(table), dtype=bool)
    for row, (image, long, short, key) in enumerate(zip(table.image, table.long, table.short, table.key)):
        for name, caption in (("long", long), ("short", short)):
            if not isinstance(caption, str) or not caption.strip(" ."):
                problems.append((key, f"empty {name} caption, left out"))
                usable[row] = False
        try:
            read_image(image)
        except (RuntimeError, ValueError, TypeError, OSError) as error:
            problems.append((key, f"unreadable image, left out: {str(error).splitlines()[0]}"))
            usable[row] = False
        for name, caption in (("long", long), ("short", short)) if usable[row] else ():
            if (tokens := len(encode(caption)) + 2) > context_length:
                problems.append((key, f"{name} caption of {tokens} tokens, truncated to {context_length}"))
    return table[usable].reset_index(drop=True), pd.DataFrame(problems, columns=["key", "problem"])


def draw_crops(sizes, k, seed, smallest=1.0, flip=False):
    """K crops for each image: (N, K, 5) int16 of top, left, height, width (pixels) and flip (0 or 1).

    sizes: (N, 2) heights and widths. The area is uniform in [smallest, 1] of the image, its aspect ratio kept;
    smallest=1 and flip=False is the whole image.
    """
    rng = np.random.default_rng(seed)
    sizes = np.asarray(sizes)[:, None, :]  # (N, 2) -> (N, 1, 2)
    side = np.sqrt(rng.uniform(smallest, 1.0, (len(sizes), k, 1)))
    extent = np.maximum(1, np.round(sizes * side))
    corner = np.floor(rng.uniform(size=(len(sizes), k, 2)) * (sizes - extent + 1))
    flips = rng.integers(0, 2, (len(sizes), k, 1)) * int(flip)
    return np.concatenate([corner, extent, flips], axis=2).astype(np.int16)


def crop(image, box, image_size):
    """uint8 (3, H, W), (5,) -> float (3, image_size, image_size) in [0, 1]: a row of `draw_crops` replayed."""
    top, left, height, width, flip = (int(v) for v in box)
    image = transform.resized_crop(image, top, left, height, width, [image_size, image_size], antialias=True)
    return transform.to_dtype(image.flip(2) if flip else image, torch.float32, scale=True)


class PairDataset(Dataset):
    """Rows of a pairs table as tensors; decoded images and token ids are kept in memory.

    `dataset[row, k]` is the row seen through its k-th crop; without `crops` the whole image, resized.
    """

    def __init__(self, table, image_size, context_length=248, crops=None):
        self.image_size = image_size
        self.images = [read_image(image) for image in table.image]
        tokenize = tokenizer(context_length)
        self.long, self.short = tokenize(list(table.long)), tokenize(list(table.short))  # (N, context_length)
        self.keys = list(table.key)
        self.sizes = np.array([image.shape[1:] for image in self.images])
        self.crops = draw_crops(self.sizes, 1, seed=0) if crops is None else crops

    def __len__(self):
        return len(self.images)

    def __getitem__(self, row_and_crop):
        row, k = row_and_crop
        return row, k, crop(self.images[row], self.crops[row, k], self.image_size), self.long[row], self.short[row]


def epoch_batches(n, batch_size, seed, epoch, crops=1):
    """Batches of (row, crop) for one epoch: a permutation drawn from (seed, epoch); an incomplete last batch is dropped."""
    rng = np.random.default_rng([seed, epoch])
    rows, ks = rng.permutation(n), rng.integers(0, crops, n)
    return [list(zip(rows[i:i + batch_size].tolist(), ks[i:i + batch_size].tolist()))
            for i in range(0, n - batch_size + 1, batch_size)]


def loader(dataset, batches):
    """Iterate over `batches` of (row, crop): rows (B,), crops (B,), images (B, 3, S, S), long and short tokens (B, L)."""
    # Its own generator: a DataLoader draws from the global one otherwise, and a resumed run would draw once more.
    return DataLoader(dataset, batch_sampler=batches, generator=torch.Generator())


def in_order(n, batch_size, k=0):
    """Batches of (row, k) that go once through rows 0..n-1."""
    return [[(row, k) for row in range(i, min(i + batch_size, n))] for i in range(0, n, batch_size)]
