"""Pairs of an image and its two captions: one table for every source, and the data set that serves it to training.

A pairs table has the columns image (encoded bytes or a path), long, short, split, key.
"""

import io
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as transform

from .datasets import collage, published, scenes
from .datasets.published import SPLITS
from .models import PLAIN
from .text import tokenizer
from .utils import nearest

COLUMNS = ["image", "long", "short", "split", "key"]
MOST_PIXELS = 100_000_000  # a larger image is taken for a decompression bomb
IN_MEMORY = 2 << 30  # bytes of decoded images that a PairDataset keeps
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def load_pairs(source, root=None, split="train", n=None, seed=0, image_size=64, draws=1):
    """The pairs of `split` ("train", "val" or "test") of `source`, at most `n`: a pandas table with COLUMNS.

    `scenes` are drawn on the spot at `image_size`; `collage` is put together from Flickr8k's photographs. The others are
    read from the folder `root` (or the environment variable JETTCLIP_DATA), laid out as `jettclip.sources` says. Where an
    image has several captions, `draws` > 1 adds the list columns longs and shorts: so many other orders of them.
    """
    known = ["scenes", "collage", *published.SOURCES]
    if source not in known:
        raise ValueError(nearest(source, known, "data source"))
    if split not in SPLITS:
        raise ValueError(nearest(split, SPLITS, "split"))
    if source in ("scenes", "collage") and n is None:
        raise ValueError(f"{source} are drawn without end: say how many with n")
    if draws > 1 and source not in ("flickr8k", "coco", "karpathy"):
        raise ValueError(
            f"{source} has no several captions of an image, so no {draws} orders of them: set caption_draws to 1"
        )
    if source == "scenes":
        return scenes.make_pairs(
            n, seed=3 * seed + SPLITS.index(split), size=image_size, split=split
        )
    root = root or os.environ.get("JETTCLIP_DATA")
    if source == "collage":
        photos = published.read_flickr8k(root, split)
        return collage.make_pairs(
            list(photos.image), list(photos.captions), n, seed, image_size, split
        )
    table = published.SOURCES[source](root, split, seed)
    if draws > 1:
        others = [published.SOURCES[source](root, split, [seed, draw]) for draw in range(draws)]
        table["longs"], table["shorts"] = (
            list(map(list, zip(*(other[side] for other in others)))) for side in ("long", "short")
        )
    return table.head(n) if n else table


def load_details(source, root=None, n=1000, seed=0, image_size=64):
    """The where-is-the-detail pairs of `source`, made of its test images, or None: only scenes and collages know where a detail is."""
    if source == "scenes":
        return scenes.make_details(n, 3 * seed + SPLITS.index("test"), image_size)
    if source == "collage":
        photos = published.read_flickr8k(root or os.environ.get("JETTCLIP_DATA"), "test")
        return collage.make_details(
            list(photos.image),
            list(photos.captions),
            n,
            3 * seed + SPLITS.index("test"),
            image_size,
        )
    return None


def read_image(image):
    """Encoded bytes or a path -> uint8 tensor (3, H, W), upright.

    Plain JPEG and PNG files go through torchvision, which is fast; whatever is rare (CMYK, palette, alpha, 16 bits, other
    formats) through Pillow. Raises ValueError, OSError or RuntimeError where there is no whole image.
    """
    data = Path(image).read_bytes() if isinstance(image, (str, Path)) else image
    with Image.open(io.BytesIO(data)) as picture:  # reads the header alone
        if picture.width * picture.height > MOST_PIXELS:
            raise ValueError(
                f"{picture.width} x {picture.height} pixels are more than {MOST_PIXELS:,}"
            )
        if picture.format in ("JPEG", "PNG") and picture.mode in ("RGB", "L"):
            return decode_image(
                torch.frombuffer(bytearray(data), dtype=torch.uint8),
                mode=ImageReadMode.RGB,
                apply_exif_orientation=True,
            )
        picture = ImageOps.exif_transpose(picture)
        if picture.mode.startswith("I"):  # 16 bits, which Pillow's own conversion would clip
            picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
        return transform.pil_to_tensor(picture.convert("RGB"))


def clean_pairs(table, context_length=248):
    """Check every row -> (usable rows, report with the columns key, problem).

    Rows with an unreadable image or an empty caption are left out; captions over `context_length` tokens stay, are
    truncated in reading, and are reported. A missing column is an error.
    """
    missing = [c for c in COLUMNS if c not in table.columns]
    if missing:
        raise ValueError(
            f"the pairs table lacks the column(s) {', '.join(missing)}; it has {', '.join(table.columns)}"
        )
    encode = tokenizer(context_length).encode

    def check(row):
        image, long, short = row
        captions = ("long", long), ("short", short)
        fatal = [
            f"empty {name} caption, left out"
            for name, caption in captions
            if not isinstance(caption, str) or not caption.strip(" .")
        ]
        try:
            read_image(image)
        except (
            RuntimeError,
            ValueError,
            TypeError,
            OSError,
            Image.DecompressionBombError,
        ) as error:
            fatal.append(f"unreadable image, left out: {str(error).splitlines()[0]}")
        lengths = (
            [(name, len(encode(caption)) + 2) for name, caption in captions] if not fatal else []
        )
        return fatal, [
            f"{name} caption of {n} tokens, truncated to {context_length}"
            for name, n in lengths
            if n > context_length
        ]

    with ThreadPoolExecutor(CORES) as pool:
        checked = list(pool.map(check, zip(table.image, table.long, table.short)))
    usable = np.array([not fatal for fatal, _ in checked], dtype=bool)
    problems = [
        (key, problem) for key, found in zip(table.key, checked) for problem in found[0] + found[1]
    ]
    return table[usable].reset_index(drop=True), pd.DataFrame(problems, columns=["key", "problem"])


def draw_crops(n, k, seed, smallest=1.0, flip=False):
    """K crops for each of N images: (N, K, 4) float32 of side, y, x in [0, 1] and flip (0 or 1).

    side: a share of height and width, for an area uniform in [smallest, 1]; y, x: where the crop lies between the edges.
    smallest=1 and flip=False is the whole image.
    """
    rng = np.random.default_rng(seed)
    side = np.sqrt(rng.uniform(smallest, 1.0, (n, k, 1)))
    place = rng.uniform(size=(n, k, 2))
    flips = rng.integers(0, 2, (n, k, 1)) * int(flip)
    return np.concatenate([side, place, flips], axis=2).astype(np.float32)


def crop(image, box, image_size, interpolation="bilinear"):
    """uint8 (3, H, W), (4,) -> uint8 (3, image_size, image_size): a row of `draw_crops` replayed."""
    side, y, x, flip = (float(v) for v in box)
    (height, top), (width, left) = (
        _extent(size, side, place) for size, place in zip(image.shape[1:], (y, x))
    )
    image = transform.resized_crop(
        image,
        top,
        left,
        height,
        width,
        [image_size, image_size],
        interpolation=InterpolationMode(interpolation),
        antialias=True,
    )
    return image.flip(2) if flip else image


def _extent(size, side, place):
    """-> pixels of a crop along a side of `size` pixels, and its first pixel."""
    extent = max(1, round(size * side))
    return extent, min(int(place * (size - extent + 1)), size - extent)


class PairDataset(Dataset):
    """Rows of a pairs table as tensors.

    `dataset[row, k]` is the row seen through its k-th crop; without `crops` the whole image, resized. draws: take the
    captions from the table's longs and shorts, those of crop k in the k-th order (and round again). preprocess: the
    scaling of the model that will look (its config's).

    Decoded images and token ids are kept while they fit `IN_MEMORY`. A larger table is held once, in Arrow's buffers, and
    each row is read when it is asked for, by the loader's workers, which share these buffers.
    """

    def __init__(
        self, table, image_size, context_length=248, crops=None, draws=False, preprocess=PLAIN
    ):
        self.image_size, self.context_length, self.preprocess = (
            image_size,
            context_length,
            preprocess,
        )
        self.crops = draw_crops(len(table), 1, seed=0) if crops is None else crops
        self.keys, self.images = list(table.key), _arrow(table.image)
        self.longs, self.shorts = (
            _arrow(table.longs if draws else table.long),
            _arrow(table.shorts if draws else table.short),
        )
        self.draws = len(table.longs.iloc[0]) if draws else 1
        self._tokenize = tokenizer(context_length)
        self.in_memory = (
            len(table) * (read_image(table.image.iloc[0]).numel() if len(table) else 0) <= IN_MEMORY
        )
        if self.in_memory:
            self.images = [read_image(image) for image in table.image]
            everything = np.arange(len(table))
            self._tokens = [
                [side.int() for side in self.tokens(everything, draw)] for draw in range(self.draws)
            ]

    def tokens(self, rows, k=0):
        """Long and short tokens (B, L) of `rows` (B,), in the caption order of crop `k`."""
        draw = k % self.draws
        if hasattr(self, "_tokens"):
            return tuple(side[torch.as_tensor(rows)].long() for side in self._tokens[draw])
        captions = ([side[int(row)].as_py() for row in rows] for side in (self.longs, self.shorts))
        return tuple(
            self._tokenize([c[draw] if isinstance(c, list) else c for c in side])
            for side in captions
        )

    @property
    def long(self):
        """Tokens of all long captions (N, L), in their first order."""
        return self.tokens(np.arange(len(self)))[0]

    @property
    def short(self):
        """Tokens of all short captions (N, L), those of the first order."""
        return self.tokens(np.arange(len(self)))[1]

    def pixels(self, row, k):
        """The very pixels that a model sees: uint8 (3, image_size, image_size)."""
        try:
            image = self.images[row] if self.in_memory else read_image(self.images[row].as_py())
        except (RuntimeError, ValueError, OSError) as error:
            raise RuntimeError(
                f"the image of {self.keys[row]!r} was readable when the data was checked (notebook 00): {error}"
            ) from None
        return crop(image, self.crops[row, k], self.image_size, self.preprocess["interpolation"])

    def scaled(self, pixels):
        """uint8 (..., 3, S, S) -> float, as the model wants it."""
        pixels = transform.to_dtype(pixels, torch.float32, scale=True)
        return (
            pixels
            if self.preprocess == PLAIN
            else transform.normalize(pixels, self.preprocess["mean"], self.preprocess["std"])
        )

    def __len__(self):
        return len(self.crops)

    def __getitem__(self, row_and_crop):
        row, k = row_and_crop
        long, short = self.tokens([row], k)
        return row, k, self.scaled(self.pixels(row, k)), long[0], short[0]

    def __getitems__(self, batch):
        """Rows of a batch at once, images as uint8: a quarter of the bytes between processes."""
        rows, ks = np.asarray(batch).T
        pixels = torch.stack([self.pixels(row, k) for row, k in zip(rows.tolist(), ks.tolist())])
        long, short = (
            torch.empty(len(rows), self.context_length, dtype=torch.long) for _ in range(2)
        )
        for draw in np.unique(ks % self.draws):
            here = ks % self.draws == draw
            long[here], short[here] = self.tokens(rows[here], draw)
        return torch.as_tensor(rows), torch.as_tensor(ks), pixels, long, short


def dataset_for(model, table, crops=None, draws=False):
    """A PairDataset of `table` with the pixels and tokens that `model` reads."""
    return PairDataset(
        table, model.image_size, model.context_length, crops, draws, model.config["preprocess"]
    )


def _arrow(column):
    """A column as one Arrow array, whose buffers processes share: Python's objects would be copied into each."""
    array = pa.array(column.array if column.dtype != object else list(column))
    return array.combine_chunks() if isinstance(array, pa.ChunkedArray) else array


def epoch_batches(n, batch_size, seed, epoch, crops=1):
    """Batches for one epoch, (n // batch_size, batch_size, 2) of row and crop: a permutation drawn from (seed, epoch)."""
    rng = np.random.default_rng([seed, epoch])
    rows, ks = rng.permutation(n), rng.integers(0, crops, n)
    return np.stack([rows, ks], axis=1)[: n // batch_size * batch_size].reshape(-1, batch_size, 2)


def in_order(n, batch_size, k=0):
    """Batches (up to batch_size, 2) of (row, k) that go once through rows 0..n-1."""
    rows = np.arange(n)
    return [
        np.stack([part, np.full_like(part, k)], axis=1)
        for part in (rows[i : i + batch_size] for i in range(0, n, batch_size))
    ]


def loader(dataset, batches, device="cpu"):
    """Iterate over `batches` (B, 2) of row and crop: rows (B,), crops (B,) on the CPU, and on `device` images
    (B, 3, S, S), long and short tokens (B, L). What is not in memory is read by worker processes."""
    cuda = torch.device(device).type == "cuda"
    # Its own generator: a DataLoader draws from the global one otherwise, and a resumed run would draw once more.
    batches = DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=0 if dataset.in_memory else _workers(dataset, batches),
        collate_fn=_as_it_is,
        pin_memory=cuda,
        generator=torch.Generator(),
    )
    for rows, ks, pixels, long, short in batches:
        pixels, long, short = (x.to(device, non_blocking=True) for x in (pixels, long, short))
        yield rows, ks, dataset.scaled(pixels), long, short


def _as_it_is(batch):
    return batch


def _workers(dataset, batches):
    """Worker processes: one for each core, as long as their batches fit the shared memory, whose lack would kill them."""
    batch_bytes = max((len(batch) for batch in batches[:1]), default=1) * 3 * dataset.image_size**2
    shared = shutil.disk_usage("/dev/shm").free if Path("/dev/shm").exists() else IN_MEMORY
    return max(0, min(CORES, 8, int(shared // (3 * batch_bytes))))
