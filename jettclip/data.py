"""Pairs of an image and its two captions: a table for every source, and its rows as tensors."""

import hashlib
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
from .models import PLAIN
from .text import tokenizer
from .utils import nearest

COLUMNS = ["image", "long", "short", "split", "key"]  # image: encoded bytes or a path
MOST_PIXELS = 100_000_000  # a larger image is taken for a decompression bomb
UNREADABLE = (OSError, RuntimeError, TypeError, ValueError, Image.DecompressionBombError)
IN_MEMORY = 2 << 30  # bytes of decoded images that a PairDataset keeps
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def load_pairs(source, root=None, split="train", n=None, seed=0, image_size=64, draws=1):
    """Pairs of a `split` ("train", "val" or "test") of `source`, at most `n`: a table with COLUMNS.

    `scenes` are drawn and `collage` is put together from Flickr8k, both at `image_size`. The others
    are read from the folder `root` (or JETTCLIP_DATA), laid out as `datasets.published` says. Where
    an image has several captions, `draws` > 1 adds longs and shorts: lists of so many orders. A row
    that cannot be read has a `problem`, a column that only such tables have: see `clean_pairs`.
    """
    sources = ["scenes", "collage", *published.SOURCES]
    for word, words, what in ((source, sources, "data source"), (split, published.SPLITS, "split")):
        if word not in words:
            raise ValueError(nearest(word, words, what))
    if source in ("scenes", "collage") and n is None:
        raise ValueError(f"{source} are drawn without end: say how many with n")
    if draws > 1 and source not in ("flickr8k", "coco", "karpathy"):
        raise ValueError(f"{source} has one caption of each image: set caption_draws to 1")
    if source == "scenes":
        return scenes.make_pairs(n, 3 * seed + published.SPLITS.index(split), image_size, split)
    if source == "collage":
        photos, report = clean_pairs(load_pairs("flickr8k", root, split))
        table = collage.make_pairs(photos.image, photos.captions, n, seed, image_size, split)
        bad = report[report.problem.str.contains("left out")].drop_duplicates("key")
        return pd.concat([table, bad.assign(split=split)], ignore_index=True) if len(bad) else table
    root, read = published.data_folder(root), published.SOURCES[source]
    table = read(root, split, seed)
    if draws > 1:
        orders = [read(root, split, [seed, draw]) for draw in range(draws)]
        for column in ("long", "short"):
            table[column + "s"] = np.stack([order[column] for order in orders], axis=1).tolist()
    return table.head(n) if n else table


def load_details(source, root=None, n=1000, seed=0, image_size=64):
    """Where-is-the-detail pairs from test images, or None: scenes and collages alone have them."""
    seed = 3 * seed + published.SPLITS.index("test")
    if source == "scenes":
        return scenes.make_details(n, seed, image_size)
    if source == "collage":
        photos, _ = clean_pairs(load_pairs("flickr8k", root, "test"))
        return collage.make_details(photos.image, photos.captions, n, seed, image_size)


def read_image(image):
    """Encoded bytes or a path -> uint8 tensor (3, H, W), upright.

    torchvision reads plain JPEG and PNG files, fast; Pillow whatever is rare (CMYK, palette, alpha,
    16 bits, other formats). Raises one of UNREADABLE where there is no whole image.
    """
    data = Path(image).read_bytes() if isinstance(image, (str, Path)) else image
    with Image.open(io.BytesIO(data)) as picture:  # reads the header alone
        if picture.width * picture.height > MOST_PIXELS:
            raise ValueError(f"size {picture.size} exceeds {MOST_PIXELS:,} pixels")
        if picture.format in ("JPEG", "PNG") and picture.mode in ("RGB", "L"):
            data = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            return decode_image(data, ImageReadMode.RGB, apply_exif_orientation=True)
        picture = ImageOps.exif_transpose(picture)
        if picture.mode.startswith("I"):  # 16 bits, which Pillow's conversion would clip
            picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
        return transform.pil_to_tensor(picture.convert("RGB"))


def clean_pairs(table, context_length=248):
    """Check every row -> (usable rows, report with the columns key, problem).

    Rows with an unreadable image or an empty caption are left out. Captions over `context_length`
    tokens stay and are reported: reading truncates them. A missing column is an error.
    """
    if lacks := ", ".join(column for column in COLUMNS if column not in table):
        raise ValueError(f"the pairs table lacks the column(s) {lacks}; it has {', '.join(table)}")
    if "problem" in table:  # rows that `load_pairs` could not read
        known = table.problem.notna()
        usable, report = clean_pairs(table[~known].drop(columns="problem"), context_length)
        return usable, pd.concat([table.loc[known, ["key", "problem"]], report], ignore_index=True)
    encode = tokenizer(context_length).encode

    def check(key, image, long, short):
        """-> problems that leave the row out, problems that do not"""
        fatal, truncated = [], []
        for name, text in (("long", long), ("short", short)):
            if not isinstance(text, str) or not text.strip(" ."):
                fatal.append(f"empty {name} caption, left out")
            elif (n := len(encode(text)) + 2) > context_length:
                truncated.append(f"{name} caption of {n} tokens, truncated to {context_length}")
        try:
            read_image(image)
        except UNREADABLE as error:
            fatal.append(f"unreadable image, left out: {str(error).splitlines()[0]}")
        return [(key, text) for text in fatal], [(key, text) for text in truncated]

    with ThreadPoolExecutor(CORES) as pool:
        checked = list(pool.map(check, table.key, table.image, table.long, table.short))
    usable = np.array([not fatal for fatal, _ in checked], dtype=bool)
    report = [problem for fatal, truncated in checked for problem in fatal or truncated]
    return table[usable].reset_index(drop=True), pd.DataFrame(report, columns=["key", "problem"])


def fingerprint(table):
    """SHA-256 of a pairs table: what is in its images, wherever they lie, captions and order."""

    def digest(image):
        data = image if isinstance(image, bytes) else Path(image).read_bytes()
        return hashlib.blake2b(data, digest_size=16).hexdigest()

    images = table.digest if "digest" in table else map(digest, table.image)
    hashed = hashlib.sha256()
    for row in zip(images, table.long, table.short, strict=True):
        hashed.update(repr(row).encode())
    return hashed.hexdigest()


def draw_crops(n, k, seed, smallest=1.0, flip=False):
    """K crops for each of N images: (N, K, 4) float32 of side, y, x in [0, 1] and flip (0 or 1).

    side: share of height and width, for an area uniform in [smallest, 1]; y, x: where the crop lies
    between the edges. smallest=1 and flip=False is the whole image.
    """
    rng = np.random.default_rng(seed)
    side = np.sqrt(rng.uniform(smallest, 1.0, (n, k, 1)))
    place = rng.uniform(size=(n, k, 2))
    flips = rng.integers(0, 2, (n, k, 1)) * int(flip)
    return np.concatenate([side, place, flips], axis=2).astype(np.float32)


def crop(image, box, image_size, interpolation="bilinear"):
    """uint8 (3, H, W), (4,) -> uint8 (3, image_size, image_size): replay a row of `draw_crops`."""
    side, y, x, flip = (float(value) for value in box)
    height, width = (max(1, round(size * side)) for size in image.shape[1:])
    below, right = image.shape[1] - height, image.shape[2] - width  # what the crop leaves free
    top, left = min(int(y * (below + 1)), below), min(int(x * (right + 1)), right)
    size, mode = [image_size, image_size], InterpolationMode(interpolation)
    image = transform.resized_crop(image, top, left, height, width, size, mode, antialias=True)
    return image.flip(2) if flip else image


class PairDataset(Dataset):
    """Rows of a pairs table as tensors: `dataset[row, k]` is a row seen through its k-th crop.

    crops: of `draw_crops`; by default the whole image. draws: crop k reads the table's longs and
    shorts in their k-th order (and round again). preprocess: how the model scales pixels.

    Decoded images and token ids are kept while they fit `IN_MEMORY`. A larger table stays encoded,
    in Arrow's buffers: the loader's workers share them and read each row when it is asked for.
    """

    def __init__(
        self, table, image_size, context_length=248, crops=None, draws=False, preprocess=PLAIN
    ):
        self.image_size, self.context_length = image_size, context_length
        self.preprocess, self._tokenize = preprocess, tokenizer(context_length)
        self.crops = draw_crops(len(table), 1, seed=0) if crops is None else crops
        self.keys, self.draws = list(table.key), len(table.longs.iloc[0]) if draws else 1
        columns = ["image", *(["longs", "shorts"] if draws else ["long", "short"])]
        arrow = pa.Table.from_pandas(table[columns], preserve_index=False).combine_chunks()
        self.images, *self.captions = arrow.columns
        digest = hashlib.sha256(fingerprint(table).encode() + self.crops.tobytes())
        for captions in self.captions if draws else ():
            digest.update(repr(captions.to_pylist()).encode())
        self.fingerprint = digest.hexdigest()  # of all that decides what this data set yields
        size = len(table) * read_image(table.image.iloc[0]).numel() if len(table) else 0
        self.in_memory, self._tokens = size <= IN_MEMORY, None
        if self.in_memory:
            self.images = [read_image(image) for image in table.image]
            tokens = [self.tokens(range(len(table)), k) for k in range(self.draws)]
            self._tokens = [(long.int(), short.int()) for long, short in tokens]

    def tokens(self, rows, k=0):
        """Long and short tokens (B, L) of `rows` (B,), in the caption order of crop `k`."""
        draw, rows = k % self.draws, torch.as_tensor(rows, dtype=torch.long)
        if self._tokens:
            return tuple(tokens[rows].long() for tokens in self._tokens[draw])
        captions = (column.take(rows.numpy()).to_pylist() for column in self.captions)
        return tuple(
            self._tokenize([text[draw] if isinstance(text, list) else text for text in texts])
            for texts in captions
        )

    long = property(lambda self: self.tokens(range(len(self)))[0])  # (N, L), in their first order
    short = property(lambda self: self.tokens(range(len(self)))[1])

    def pixels(self, row, k):
        """The pixels that a model sees: uint8 (3, image_size, image_size)."""
        try:
            image = self.images[row] if self.in_memory else read_image(self.images[row].as_py())
        except UNREADABLE as error:
            problem = f"the image of {self.keys[row]!r} was readable when the data was checked"
            raise RuntimeError(f"{problem} (notebook 00): {error}") from None
        return crop(image, self.crops[row, k], self.image_size, self.preprocess["interpolation"])

    def scaled(self, pixels):
        """uint8 (..., 3, S, S) -> float, as the model wants it."""
        pixels = transform.to_dtype(pixels, torch.float32, scale=True)
        if self.preprocess == PLAIN:
            return pixels
        return transform.normalize(pixels, self.preprocess["mean"], self.preprocess["std"])

    def __len__(self):
        return len(self.crops)

    def __getitem__(self, row_and_crop):
        row, k = row_and_crop
        long, short = self.tokens([row], k)  # (1, L)
        return row, k, self.scaled(self.pixels(row, k)), long[0], short[0]

    def __getitems__(self, batch):
        """Rows of a batch at once, images as uint8: a quarter of the bytes between processes."""
        rows, ks = np.asarray(batch).T
        pixels = torch.stack([self.pixels(row, k) for row, k in np.asarray(batch).tolist()])
        long, short = torch.empty(2, len(rows), self.context_length, dtype=torch.long)
        draws = ks % self.draws
        for draw in np.unique(draws):
            long[draws == draw], short[draws == draw] = self.tokens(rows[draws == draw], draw)
        return torch.as_tensor(rows), torch.as_tensor(ks), pixels, long, short


def dataset_for(model, table, crops=None, draws=False):
    """A PairDataset of `table` with the pixels and tokens that `model` reads."""
    preprocess = model.config["preprocess"]
    return PairDataset(table, model.image_size, model.context_length, crops, draws, preprocess)


def epoch_batches(n, batch_size, seed, epoch, crops=1):
    """Batches of an epoch, (n // batch_size, batch_size, 2) of row and crop, from (seed, epoch)."""
    rng = np.random.default_rng([seed, epoch])
    pairs = np.stack([rng.permutation(n), rng.integers(0, crops, n)], axis=1)
    return pairs[: n // batch_size * batch_size].reshape(-1, batch_size, 2)


def in_order(n, batch_size, k=0):
    """Batches (up to batch_size, 2) of (row, k) that go once through rows 0..n-1."""
    pairs = np.stack([np.arange(n), np.full(n, k)], axis=1)
    return [pairs[i : i + batch_size] for i in range(0, n, batch_size)]


def loader(dataset, batches, device="cpu"):
    """Read `batches` (B, 2) of row and crop -> rows (B,), crops (B,) on the CPU, and on `device`
    images (B, 3, S, S), long and short tokens (B, L). Workers read what is not in memory."""
    loaded = DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=0 if dataset.in_memory else _workers(dataset, batches),
        collate_fn=tuple,  # the data set makes whole batches
        pin_memory=torch.device(device).type == "cuda",
        generator=torch.Generator(),  # the global one would move once more in a resumed run
    )
    for rows, ks, *tensors in loaded:
        pixels, long, short = (x.to(device, non_blocking=True) for x in tensors)
        yield rows, ks, dataset.scaled(pixels), long, short


def _workers(dataset, batches):
    """Workers, one for each core: fewer where their batches would not fit the shared memory."""
    batch_bytes = max((len(batch) for batch in batches[:1]), default=1) * 3 * dataset.image_size**2
    shared = shutil.disk_usage("/dev/shm").free if Path("/dev/shm").exists() else IN_MEMORY
    return min(CORES, 8, shared // (3 * batch_bytes))
