"""Captioned photographs as their authors publish them -> one table of pairs.

A source is a function (root, split, seed) -> table with the columns image (path or encoded bytes),
long, short, split, key; root is as `data_folder` gives it, seed a number or several. An image with
several short captions has them in the column captions: long is all of them in a random order, short
the first of these. A row that cannot be read has its reason in the column problem.
"""

import csv
import io
import json
import os
import re
import zlib
from collections import defaultdict
from contextlib import contextmanager
from operator import itemgetter

import numpy as np
import pandas as pd
from open_clip import IMAGENET_CLASSNAMES
from PIL import Image
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.datasets.folder import IMG_EXTENSIONS

from ..utils import absolute, nearest

SPLITS = ("train", "val", "test")
OTHER_SPLITS = {"restval": "train", "validation": "val"}  # Karpathy's, Hugging Face's
# What Windows, macOS, Jupyter and network drives put into folders of data.
JUNK = re.compile(r"\.|(__MACOSX|Thumbs\.db|desktop\.ini|@eaDir)$", re.IGNORECASE)


def sentence(caption):
    """A caption that ends with one full stop, without line breaks."""
    return " ".join(caption.split()).rstrip(" .") + "."


def first_sentence(caption):
    """The text before the first ". ", as Long-CLIP takes its short captions."""
    return caption.split(". ")[0].rstrip(".")


def sentences(caption):
    """A caption "A. B. C." as a list."""
    return caption.strip().rstrip(".").split(". ")


def encoded(picture, kind):
    """A PIL picture as the bytes of a file of `kind` ("PNG" or "JPEG")."""
    picture.save(file := io.BytesIO(), kind, compress_level=1, quality=92)  # of PNG, of JPEG
    return file.getvalue()


def data_folder(root):
    """The absolute path of `root`, else of JETTCLIP_DATA, else None."""
    root = root or os.environ.get("JETTCLIP_DATA")
    return absolute(root) if root else None


def _files(root, pattern):
    """Sorted paths below `root` that fit `pattern`, without what systems and editors put there."""
    found = ((path, path.relative_to(root).parts) for path in sorted(root.glob(pattern)))
    return [path for path, parts in found if not any(map(JUNK.match, parts))]


def _find(root, *patterns, holds):
    """The first file below `root` that fits a pattern; if there is none, the error names them."""
    for pattern in patterns if root else ():
        if found := _files(root, pattern):
            return min(found, key=lambda path: (len(path.name), path.name))
    names = " or ".join(patterns).replace("*px", "<size>px")
    todo = "set the parameter data_root or the environment variable JETTCLIP_DATA to the folder"
    raise FileNotFoundError(f"no {names} in {str(root or '')!r}: {todo} that holds {holds}")


def _inside(root, *path):
    """`path` below `root`, as text. A path that leads out of it is refused; links are followed."""
    image = os.path.normpath(os.path.join(root, *path))
    if not image.startswith(os.path.join(root, "")):
        raise ValueError(f"the image {'/'.join(path)!r} lies outside of the data folder {root}")
    return image


def _reason(error):
    return str(error) if type(error) is ValueError else f"{type(error).__name__} {error}"


@contextmanager
def _published(file):
    """Inside, reading what `file` lacks is an error that names the file."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{file} is not laid out as published: {_reason(error)}") from None


def _text(file):
    """The text of a file in any Unicode encoding; other bytes become lone surrogates."""
    data = file.read_bytes()
    return data.decode(json.detect_encoding(data), "surrogateescape")


def _items(items, file, what="item", first=0):
    """Each item with its place in the file."""
    return ((f"{what} {i} of {file}", item) for i, item in enumerate(items, first))


def _lines(file):
    """Lines of a text file, but for empty ones, each with its place."""
    lines = _items(_text(file).split("\n"), file, "line", first=1)
    return ((place, line) for place, line in lines if line.strip())


def _each(items, read):
    """The place of each item, and what `read` makes of it, if anything, or its error."""
    for place, item in items:
        try:
            if isinstance(item, Exception):
                raise item
            if found := read(json.loads(item) if isinstance(item, str) else item):
                yield place, found
        except Exception as error:
            yield place, error


def _of_split(items, split):
    """Items of a `split`. What has no valid split counts once, in train."""
    for place, item in items:
        try:
            if isinstance(item, Exception):
                raise item
            found = (item.get("split") or "train").lower()
            found = OTHER_SPLITS.get(found, found)
            if found not in SPLITS:
                raise ValueError(nearest(found, SPLITS, "split"))
        except Exception as error:
            item, found = error, "train"
        if found == split:
            yield place, item


def _valid(text):
    if not isinstance(text, str):
        raise ValueError(f"{text!r:.60} is no text")
    try:
        text.encode()  # fails for a lone surrogate, which no table file can hold
    except UnicodeEncodeError:
        raise ValueError(f"{text!r:.60} is not Unicode: save the file as UTF-8") from None
    return text


def _row(place, item, split, name, read, rng):
    """A row of the table; `item` is an error if it is unreadable."""
    row = {"image": None, "long": "", "short": "", "split": split, "key": place}
    try:
        if isinstance(item, Exception):
            raise item
        row["key"] = _valid(item[name])
        image, captions = read(item)
        texts = [] if isinstance(captions, str) else list(map(_valid, captions))
        if not texts or "." in map(sentence, texts):
            raise ValueError(f"a caption is missing or empty: {captions!r:.60}")
    except Exception as error:
        return row | {"problem": f"unreadable row, left out: {_reason(error)} ({place})"}
    if rng is None:
        short = texts[1] if texts[1:] else first_sentence(texts[0])
        return row | {"image": image, "long": texts[0], "short": short}
    shuffled = [sentence(texts[i]) for i in rng.permutation(len(texts))]
    long, short = " ".join(shuffled), shuffled[0].rstrip(".")
    return row | {"image": image, "long": long, "short": short, "captions": texts}


def _table(items, split, name, read, seed=None):
    """The table of `items`, pairs of a place and what is there.

    `read(item)` gives an image and its captions, the item's `name` is the key. seed: captions are
    several short ones, in an order that it draws; without, they are the long and perhaps the short.
    """
    rng = seed
    if seed is not None:
        rng = np.random.default_rng([*np.atleast_1d(seed), SPLITS.index(split)])
    rows = [_row(place, item, split, name, read, rng) for place, item in items]
    if all("problem" in row for row in rows):
        first = f": {rows[0]['problem']}" if rows else ""
        raise ValueError(f"it has no readable row of the split {split}{first}")
    return pd.DataFrame(rows)


def flickr8k(root, split, seed):
    """Flickr8k (Hodosh et al., 2013) with images of 224 pixels, or the smallest there are."""
    holds = "Flickr8k as Parquet files with the columns image (JPEG bytes), filename, captions"
    names = (f"flickr8k_{size}px_{split}.parquet" for size in (224, "*"))
    file = _find(root, *names, holds=holds)
    with _published(file):
        items = _items(pd.read_parquet(file).to_dict("records"), file, "row")
        return _table(items, split, "filename", itemgetter("image", "captions"), seed)


def sharegpt4v(root, split, seed):
    """ShareGPT4V, images below data/: 1,000 rows of test, as in Long-CLIP, 1,000 of val, train."""
    patterns = "share-captioner*.json", "sharegpt4v*.json", "data/sharegpt4v/*.json"
    file = _find(root, *patterns, holds="ShareGPT4V: its JSON file and data/ with coco/, sam/, ...")
    images = root / "data" if (root / "data").is_dir() else file.parent
    first, end = {"test": (0, 1000), "val": (1000, 2000), "train": (2000, None)}[split]

    def read(item):
        long = _valid(item["conversations"][1]["value"])
        return _inside(images, item["image"]), [long.replace("\n", " ").strip()]

    with _published(file):
        items = _items(json.loads(_text(file))[first:end], file, first=first)
        return _table(items, split, "image", read)


def coco(root, split, seed):
    """COCO 2017 captions: val2017 is test; val: 1,000 images of train2017, at most a tenth."""
    subset = "val2017" if split == "test" else "train2017"
    name, holds = f"annotations/captions_{subset}.json", f"COCO 2017: annotations/ and {subset}/"
    file, captions = _find(root, name, holds=holds), defaultdict(list)

    def add(annotation):
        captions[annotation["image_id"]].append(annotation["caption"])

    def read(image):
        return _inside(root, subset, image["file_name"]), captions[image["id"]]

    with _published(file):
        data = json.loads(_text(file))
        bad = list(_each(_items(data["annotations"], file, "annotation"), add))
        images = list(_items(data["images"], file, "image"))
        val = min(1000, len(images) // 10)
        images = {"train": images[val:] + bad, "val": images[:val], "test": images + bad}[split]
        return _table(images, split, "file_name", read, seed)


def karpathy(root, split, seed):
    """Karpathy's splits of COCO, Flickr30k, Flickr8k: images by filepath or in the only folder."""
    file = _find(root, "dataset_*.json", holds="one of Karpathy's dataset_*.json and its images")
    folders = [path.name for path in _files(root, "*") if path.is_dir()]
    folder = folders[0] if len(folders) == 1 else ""

    def read(item):
        image = _inside(root, item.get("filepath") or folder, item["filename"])
        return image, [text["raw"] for text in item["sentences"]]

    with _published(file):
        items = _items(json.loads(_text(file))["images"], file, "image")
        return _table(_of_split(items, split), split, "filename", read, seed)


NAMES = {"file_name": ("file_name", "image"), "long": ("long", "text", "caption")}
NAMES |= {"short": ("short",), "split": ("split",)}


def _csv(file):
    """Rows of a CSV file with a header, as dictionaries, each with its place."""
    text = _text(file).lstrip()
    separator = max(",;\t", key=text.partition("\n")[0].count)
    rows = csv.DictReader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    for place, row in _items(rows, file, "row", 1):
        if any(row.pop(None, ())):
            problem = f"it has more fields than the header: put a text with {separator!r} in quotes"
            row = ValueError(problem)
        yield place, row


def _named(item):
    """A row of a folder's table with NAMES as keys."""
    row = {key: next(filter(None, map(item.get, NAMES[key])), None) for key in NAMES}
    for key in ("file_name", "long"):
        if not {*NAMES[key]} & {*item}:
            found = ", ".join(map(str, item))
            raise ValueError(f"there is no {' or '.join(NAMES[key])} among its names: {found}")
    return row


def folder(root, split, seed):
    """Images with a metadata.jsonl, or a metadata.csv with a header: file_name (or image), long (or
    text, caption), perhaps short and split. Where no row has a split, names decide: a tenth each is
    for validation and test."""
    example = '{"file_name": "a.jpg", "text": "..."}, or a metadata.csv with such columns'
    holds = f"a metadata.jsonl with lines such as {example}"
    file = _find(root, "metadata.jsonl", "metadata.csv", holds=holds)

    def read(item):
        long, short = item["long"], item["short"]
        return _inside(root, item["file_name"]), [long, short] if short else [long]

    with _published(file):
        found = list((_lines if file.suffix == ".jsonl" else _csv)(file))
        if found and isinstance(found[0][1], str) and found[0][1].lstrip().startswith("["):
            raise ValueError("it is one array: write one object a line, without brackets")
        items = list(_each(found, _named))
        rows = [row for _, row in items if isinstance(row, dict)]
        if not any(row["split"] for row in rows):
            for row in rows:
                tenth = zlib.crc32(str(row["file_name"]).encode()) % 10
                row["split"] = SPLITS[1 + tenth] if tenth < 2 else "train"
            if rows and not any(row["split"] == split for row in rows):
                problem = f"no row has a split, and the names put none of {len(rows)} into {split}"
                raise ValueError(f"{problem}: give rows a split ({', '.join(SPLITS)})")
        return _table(_of_split(items, split), split, "file_name", read)


SOURCES = {read.__name__: read for read in (flickr8k, sharegpt4v, coco, karpathy, folder)}


def classes(source, root, split="test"):
    """Images of classes -> (table with the columns image and label, list of class names).

    cifar10, cifar100: the unpacked "python version"; imagenet: val/<wnid>/*.JPEG (or train/).
    """
    root = data_folder(root)
    if reader := {"cifar10": CIFAR10, "cifar100": CIFAR100}.get(source):
        try:
            data = reader(root, split == "train")
        except RuntimeError:
            missing = f"no complete {reader.base_folder}/ in {str(root)!r}"
            raise FileNotFoundError(f"{missing}: unpack {reader.url} there") from None
        images = [encoded(Image.fromarray(pixels), "PNG") for pixels in data.data]
        names = [name.replace("_", " ") for name in data.classes]
        return pd.DataFrame({"image": images, "label": data.targets}), names
    folder = root / ("train" if split == "train" else "val")
    wnids = [path for path in _files(folder, "*") if path.is_dir()]
    if (count := len(wnids)) != len(IMAGENET_CLASSNAMES):
        raise FileNotFoundError(f"{folder} has {count} class folders <wnid>/, not ImageNet's 1000")
    images = [(path, i) for i, wnid in enumerate(wnids) for path in _files(wnid, "*")]
    samples = [(str(path), i) for path, i in images if path.suffix.lower() in IMG_EXTENSIONS]
    return pd.DataFrame(samples, columns=["image", "label"]), list(IMAGENET_CLASSNAMES)
