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

from . import collage, scenes, sources
from .models import nearest
from .sources import SPLITS
from .text import tokenizer

COLUMNS = ["image", "long", "short", "split", "key"]


def load_pairs(source, root=None, split="train", n=None, seed=0, image_size=64, draws=1):
    """The pairs of `split` ("train", "val" or "test") of `source`, at most `n`: a pandas table with COLUMNS.

    `scenes` are drawn on the spot at `image_size`; `collage` is put together from Flickr8k's photographs. The others are
    read from the folder `root` (or the environment variable JETTCLIP_DATA), laid out as `jettclip.sources` says. Where an
    image has several captions, `draws` > 1 adds the list columns longs and shorts: so many other orders of them.
    """
    known = ["scenes", "collage", *sources.SOURCES]
    if source not in known:
        raise ValueError(nearest(source, known, "data source"))
    if split not in SPLITS:
        raise ValueError(nearest(split, SPLITS, "split"))
    if source in ("scenes", "collage") and n is None:
        raise ValueError(f"{source} are drawn without end: say how many with n")
    if draws > 1 and source not in ("flickr8k", "coco", "karpathy"):
        raise ValueError(f"{source} has no several captions of an image, so no {draws} orders of them: set caption_draws to 1")
    if source == "scenes":
        return scenes.make_pairs(n, seed=3 * seed + SPLITS.index(split), size=image_size, split=split)
    root = root or os.environ.get("JETTCLIP_DATA")
    if source == "collage":
        photos = sources.read_flickr8k(root, split)
        return collage.make_pairs(list(photos.image), list(photos.captions), n, seed, image_size, split)
    table = sources.SOURCES[source](root, split, seed)
    if draws > 1:
        others = [sources.SOURCES[source](root, split, [seed, draw]) for draw in range(draws)]
        table["longs"], table["shorts"] = (list(map(list, zip(*(other[side] for other in others)))) for side in ("long", "short"))
    return table.head(n) if n else table


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

    `dataset[row, k]` is the row seen through its k-th crop; without `crops` the whole image, resized. draws: take the
    captions from the table's longs and shorts, those of crop k in the k-th order (and round again).
    """

    def __init__(self, table, image_size, context_length=248, crops=None, draws=False):
        self.image_size = image_size
        self.images = [read_image(image) for image in table.image]
        tokenize = tokenizer(context_length)
        longs, shorts = (table.longs, table.shorts) if draws else ([[long] for long in table.long], [[short] for short in table.short])
        self.longs, self.shorts = (torch.stack([tokenize(list(draw)) for draw in zip(*each)], 1) for each in (longs, shorts))  # (N, J, L)
        self.keys = list(table.key)
        self.sizes = np.array([image.shape[1:] for image in self.images])
        self.crops = draw_crops(self.sizes, 1, seed=0) if crops is None else crops

    @property
    def long(self):
        """Tokens of the long captions (N, L), in their first order."""
        return self.longs[:, 0]

    @property
    def short(self):
        """Tokens of the short captions (N, L), those of the first order."""
        return self.shorts[:, 0]

    def __len__(self):
        return len(self.images)

    def __getitem__(self, row_and_crop):
        row, k = row_and_crop
        draw = k % self.longs.shape[1]
        return row, k, crop(self.images[row], self.crops[row, k], self.image_size), self.longs[row, draw], self.shorts[row, draw]


def epoch_batches(n, batch_size, seed, epoch, crops=1):
    """Batches of (row, crop) for one epoch: a permutation drawn from (seed, epoch); an incomplete last batch is dropped."""
    rng = np.random.default_rng([seed, epoch])
    rows, ks = rng.permutation(n), rng.integers(0, crops, n)
    return [list(zip(rows[i:i + batch_size].tolist(), ks[i:i + batch_size].tolist()))
            for i in range(0, n - batch_size + 1, batch_size)]


def loader(dataset, batches):
    """Iterate over `batches` of (row, crop): rows (B,), crops (B,), images (B, 3, S, S), long and short tokens (B, L)."""
    # Its own generator: a DataLoader draws from the global one otherwise, and a resumed run would draw once more.
    return DataLoader(dataset, batch_sampler=batches, generator=torch.Generator(), pin_memory=torch.cuda.is_available())


def in_order(n, batch_size, k=0):
    """Batches of (row, k) that go once through rows 0..n-1."""
    return [[(row, k) for row in range(i, min(i + batch_size, n))] for i in range(0, n, batch_size)]
