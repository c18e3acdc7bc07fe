"""Pairs of an image and its two captions: a table for every source, and its rows as tensors."""

import copy
import hashlib
import multiprocessing
import os
import shutil
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import torch
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as transform

from .datasets import collage, published, rulers, scenes
from .inputs import Unreadable, digest, read_checked, read_photo
from .models import CLIP, PLAIN
from .text import tokenizer
from .utils import nearest

SOURCES = published.SOURCES | rulers.SOURCES  # read from a folder
COLUMNS = ["image", "long", "short", "split", "key"]  # image: encoded bytes or a path
IN_MEMORY = 2 << 30  # bytes of decoded images that a PairDataset keeps
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
SEVERAL = ("flickr8k", "coco", "karpathy")  # sources with several captions of an image


def load_pairs(source, root=None, split="train", n=None, seed=0, image_size=64, draws=1):
    """Pairs of a `split` ("train", "val" or "test") of `source`, at most `n`: a table with COLUMNS.

    `scenes` are drawn and `collage` is put together from Flickr8k, both at `image_size`. The others
    are read from the folder `root` (or JETTCLIP_DATA), laid out as `datasets.published` and
    `rulers` say. Where an image has several captions, `draws` > 1 adds longs and shorts: lists of
    so many orders. A row that cannot be read has a `problem`, a column that only such tables have:
    see `clean_pairs`.
    """
    sources = ["scenes", "collage", *SOURCES]
    for word, words, what in ((source, sources, "data source"), (split, published.SPLITS, "split")):
        if word not in words:
            raise ValueError(nearest(word, words, what))
    if source in rulers.SOURCES and split != "test":
        raise ValueError(f"{source} has no split {split!r}: it is a test set")
    if draws > 1 and source not in SEVERAL:
        raise ValueError(f"{source} has one caption of each image: there are no other orders")
    if source == "scenes":
        return scenes.make_pairs(n, 3 * seed + published.SPLITS.index(split), image_size, split)
    if source == "collage":
        photos, report = clean_pairs(load_pairs("flickr8k", root, split))
        table = collage.make_pairs(photos.image, photos.captions, n, seed, image_size, split)
        bad = report[report.problem.str.contains("left out")].drop_duplicates("key")
        return pd.concat([table, bad.assign(split=split)], ignore_index=True) if len(bad) else table
    root, read = published.data_folder(root), SOURCES[source]
    table = read(root, split, seed)
    if draws > 1:
        orders = [read(root, split, [seed, draw]) for draw in range(draws)]
        for column in ("long", "short"):
            table[column + "s"] = np.stack([order[column] for order in orders], axis=1).tolist()
    return table.head(n) if n else table


def random_subset(caption, rng):
    """DeBias-CLIP's short caption (arXiv 2602.22419): not the first sentence, and of the others a
    random number in their order. A caption of one sentence stays as it is."""
    rest = published.sentences(caption)[1:]
    kept = np.sort(rng.permutation(len(rest))[: rng.integers(len(rest) or 1) + 1])
    return ". ".join(rest[i] for i in kept).rstrip(".") + "." if rest else caption


def with_subsets(table, draws, seed=0):
    """A pairs table whose `shorts` are `draws` of `random_subset` of each row's long caption, or of
    its `longs`, which stay. The draws follow from (seed, row, draw)."""
    longs = table.longs if "longs" in table else table.long.map(lambda long: [long] * draws)
    shorts = [
        [random_subset(x, np.random.default_rng([seed, row, k])) for k, x in enumerate(orders)]
        for row, orders in enumerate(longs)
    ]
    return table.assign(longs=longs, shorts=shorts)


def load_details(source, root=None, n=1000, seed=0, image_size=64):
    """Where-is-the-detail pairs from test images, or None: scenes and collages alone have them."""
    seed = 3 * seed + published.SPLITS.index("test")
    if source == "scenes":
        return scenes.make_details(n, seed, image_size)
    if source == "collage":
        photos, _ = clean_pairs(load_pairs("flickr8k", root, "test"))
        return collage.make_details(photos.image, photos.captions, n, seed, image_size)


def read_image(source):
    """A photo that `inputs.read_photo` reads -> uint8 tensor (3, H, W)."""
    return transform.pil_to_tensor(read_photo(source))


def clean_pairs(table, context_length=248):
    """Check every row -> (usable rows, report with the columns key, problem).

    Rows with an unreadable image or an empty caption are left out. Captions over `context_length`
    tokens stay and are reported: reading truncates them. Usable rows get the column digest: of the
    encoded image, so that a later change is noticed.
    """
    table, encode = table.reset_index(drop=True), tokenizer(context_length).encode

    def check(known, image, *captions):
        """-> problems of a row, digest of its image"""
        if isinstance(known, str):  # `load_pairs` could not read it
            return [known], None
        problems, hashed = [], None
        for name, text in zip(("long", "short"), captions, strict=True):
            if not isinstance(text, str) or not text.replace(".", "").strip():
                problems.append(f"empty {name} caption, left out")
            elif (n := len(encode(text)) + 2) > context_length:
                problems.append(f"{name} caption of {n} tokens, truncated to {context_length}")
        try:
            _, hashed = read_checked(image)
        except Unreadable as error:
            problems.append(f"unreadable image, left out: {error}")
        return problems, hashed

    known = table.pop("problem") if "problem" in table else [None] * len(table)
    with ThreadPoolExecutor(CORES) as pool:
        checked = list(pool.map(check, known, table.image, table.long, table.short))
    table["digest"] = [hashed for _, hashed in checked]
    problems = pd.Series([problems for problems, _ in checked], dtype=object)
    report = table[["key"]].assign(problem=problems).explode("problem").dropna(subset="problem")
    left_out = report.index[report.problem.str.contains("left out")]
    return table.drop(left_out).reset_index(drop=True), report.reset_index(drop=True)


def fingerprint(table):
    """SHA-256 of a pairs table: what is in its images, wherever they lie, captions and order."""
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

    crops: of `draw_crops`; by default the whole image. draws: crop k reads the k-th longs and
    shorts (and round again). preprocess: scales pixels. padding_front: of shorts, see `pad_front`.

    Decoded images and token ids are kept while they fit `IN_MEMORY`. A larger table stays encoded,
    in Arrow's buffers, and a row is read when it is asked for.
    """

    def __init__(
        self,
        table,
        image_size,
        context_length=248,
        crops=None,
        draws=False,
        preprocess=PLAIN,
        tokenize=None,
        padding_front=False,
    ):
        self.image_size, self.context_length = image_size, context_length
        self.padding_front = padding_front
        self.tokenize = tokenize  # None: CLIP's own, which a worker makes for itself
        self.preprocess, self.keys = preprocess, list(table.key)
        self.crops = draw_crops(len(table), 1, seed=0) if crops is None else crops
        orders = len(table.longs.iloc[0]) if draws and len(table) else 1
        self.draws = min(orders, self.crops.shape[1])
        self.captions = ["longs", "shorts"] if draws else ["long", "short"]
        columns = ["image", *self.captions, *table.columns.intersection(["digest"])]
        self.table = pa.Table.from_pandas(table[columns], preserve_index=False).combine_chunks()
        hashed = hashlib.sha256(fingerprint(table).encode() + self.crops.tobytes())
        hashed.update(repr((image_size, context_length, preprocess, padding_front)).encode())
        for captions in self.captions if draws else ():
            hashed.update(repr(self.table[captions].to_pylist()).encode())
        self.fingerprint = hashed.hexdigest()  # of all that decides what this data set yields
        self.images = self._tokens = None
        size = len(table) * self.image(0).numel() if len(table) else 0
        if size <= IN_MEMORY:
            orders = [self.tokens(range(len(table)), k) for k in range(self.draws)]
            self._tokens = [torch.stack(side).int() for side in zip(*orders, strict=True)]
            self.images = [self.image(row) for row in range(len(table))]

    in_memory = property(lambda self: self.images is not None)

    def tokens(self, rows, ks=0):
        """Long and short tokens (B, L) of `rows` (B,), in the caption orders of crops `ks` (B,)."""
        rows = np.asarray(rows, dtype=np.int64)
        draws = np.broadcast_to(ks, rows.shape) % self.draws
        if self._tokens:  # (draws, N, L)
            return tuple(tokens[draws, rows].long() for tokens in self._tokens)
        captions = (self.table[name].take(rows).to_pylist() for name in self.captions)
        if self.captions == ["longs", "shorts"]:
            captions = ([texts[i] for texts, i in zip(x, draws, strict=True)] for x in captions)
        long, short = map(self.tokenize or tokenizer(self.context_length), captions)
        return long, pad_front(short) if self.padding_front else short

    long = property(lambda self: self.tokens(range(len(self)))[0])  # (N, L), in their first order
    short = property(lambda self: self.tokens(range(len(self)))[1])

    def image(self, row):
        """The decoded image of a row: uint8 (3, H, W)."""
        if self.in_memory:
            return self.images[row]
        image, hashed = self.table["image"][row].as_py(), None
        if "digest" in self.table.column_names and isinstance(image, str):
            hashed = self.table["digest"][row].as_py()
        try:
            photo = read_checked(image, hashed)[0] if hashed else read_photo(image)
            return transform.pil_to_tensor(photo)
        except Unreadable as error:
            problem = f"the image of {self.keys[row]!r} changed since notebook 00 checked it"
            raise RuntimeError(f"{problem}: run notebook 00 again ({error})") from None

    def pixels(self, row, k):
        """The pixels that a model sees: uint8 (3, image_size, image_size)."""
        interpolation = self.preprocess["interpolation"]
        return crop(self.image(row), self.crops[row, k], self.image_size, interpolation)

    def scaled(self, pixels):
        """uint8 (..., 3, S, S) -> float, as the model wants it."""
        pixels = transform.to_dtype(pixels, torch.float32, scale=True)
        mean, std = self.preprocess["mean"], self.preprocess["std"]
        return pixels if self.preprocess == PLAIN else transform.normalize(pixels, mean, std)

    def __len__(self):
        return len(self.keys)

    def __getitem__(self, row_and_crop):
        row, k = row_and_crop
        long, short = self.tokens([row], k)  # (1, L)
        return row, k, self.scaled(self.pixels(row, k)), long[0], short[0]

    def batch(self, rows_and_crops):
        """Images (B, 3, S, S) as uint8, a quarter of the bytes between processes, and tokens."""
        rows, ks = np.asarray(rows_and_crops).T
        pixels = torch.stack([self.pixels(*place) for place in zip(rows.tolist(), ks, strict=True)])
        return pixels, *self.tokens(rows, ks)

    def part(self, rows_and_crops):
        """A data set of the rows of a batch alone, to send to a worker -> it, its rows and crops"""
        (rows, ks), part = np.asarray(rows_and_crops).T, copy.copy(self)
        part.keys, part.crops = [self.keys[row] for row in rows], self.crops[rows]
        slices = [self.table.slice(row, 1) for row in rows.tolist()]
        part.table = pa.concat_tables(slices).combine_chunks()
        return part, np.stack([np.arange(len(rows)), ks], axis=1)


def pad_front(tokens):
    """Tokens (B, L) with their padding before the text, which then stands at the last places."""
    padding = tokens.shape[1] - 1 - tokens.argmax(dim=1, keepdim=True)  # (B, 1)
    places = (torch.arange(tokens.shape[1]) - padding) % tokens.shape[1]  # (B, L)
    return tokens.gather(1, places)


class Batches(Dataset):
    """Reads whole batches. A worker gets no table, but with each batch its rows."""

    def __getitem__(self, dataset_and_batch):
        dataset, batch = dataset_and_batch
        return dataset.batch(batch)


def dataset_for(model, table, crops=None, draws=False, padding_front=False):
    """A PairDataset of `table` with the pixels and tokens that `model` reads."""
    tokenize = None if isinstance(model, CLIP) else model.tokenizer
    sizes = model.image_size, model.context_length
    preprocess = model.config["preprocess"]
    return PairDataset(table, *sizes, crops, draws, preprocess, tokenize, padding_front)


def epoch_batches(n, batch_size, seed, epoch, crops=1):
    """Batches of an epoch, (n // batch_size, batch_size, 2) of row and crop, from (seed, epoch)."""
    rng = np.random.default_rng([seed, epoch])
    pairs = np.stack([rng.permutation(n), rng.integers(0, crops, n)], axis=1)
    return pairs[: n // batch_size * batch_size].reshape(-1, batch_size, 2)


def in_order(n, batch_size, k=0):
    """Batches (up to batch_size, 2) of (row, k) that go once through rows 0..n-1."""
    pairs = np.stack([np.arange(n), np.full(n, k)], axis=1)
    return [pairs[i : i + batch_size] for i in range(0, n, batch_size)]


def ahead(read, items, threads):
    """read(item) of each of `items`, in order, by threads that are two items each ahead."""
    with ThreadPoolExecutor(threads) as pool:
        waiting = deque()
        for item in items:
            waiting.append(pool.submit(read, item))
            if len(waiting) > 2 * threads:
                yield waiting.popleft().result()
        yield from (done.result() for done in waiting)


def loader(dataset, batches, device="cpu"):
    """Read `batches` (B, 2) of row and crop -> rows (B,), crops (B,) on the CPU, and on `device`
    images (B, 3, S, S), long and short tokens (B, L). Workers read what is not in memory, threads
    the rest, while a GPU computes."""
    workers, context, on_gpu = 0, None, torch.device(device).type == "cuda"
    if len(batches) and not dataset.in_memory:  # fewer where batches would not fit shared memory
        shared = shutil.disk_usage("/dev/shm").free if Path("/dev/shm").exists() else IN_MEMORY
        workers = min(CORES, 8, shared // (9 * len(batches[0]) * dataset.image_size**2))
    if workers:  # from a server without threads: forked beside OpenVINO's they crash or hang
        context = "spawn"
        if "forkserver" in multiprocessing.get_all_start_methods():
            context = "forkserver"
            multiprocessing.set_forkserver_preload([__name__])  # else each imports PyTorch
    loaded = DataLoader(
        Batches(),
        sampler=((dataset.part(batch) if workers else (dataset, batch)) for batch in batches),
        batch_size=None,  # the data set makes whole batches
        num_workers=workers,
        multiprocessing_context=context,
        pin_memory=on_gpu,
        generator=torch.Generator(),  # the global one would move once more in a resumed run
    )
    if on_gpu and dataset.in_memory:
        loaded = ahead(dataset.batch, batches, min(CORES, 4))
    for batch, tensors in zip(batches, loaded, strict=True):
        rows, ks = torch.as_tensor(np.asarray(batch)).T
        pixels, long, short = (x.to(device, non_blocking=True) for x in tensors)
        yield rows, ks, dataset.scaled(pixels), long, short
