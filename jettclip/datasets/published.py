"""Captioned photographs as their authors publish them -> one table of pairs.

A source is a function (root, split, seed) -> table with the columns image (path or encoded bytes),
long, short, split, key; seed is a number or several. An image with several short captions has them
in the column captions: long is all of them in a random order, short the first of these.
"""

import io
import json
import os
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
from open_clip import IMAGENET_CLASSNAMES
from PIL import Image
from torchvision.datasets import CIFAR10, CIFAR100, ImageFolder

SPLITS = ("train", "val", "test")


def sentence(caption):
    """A caption that ends with one full stop, without line breaks."""
    return " ".join(caption.split()).rstrip(" .") + "."


def first_sentence(caption):
    """The text before the first ". ", as Long-CLIP takes its short captions."""
    return caption.split(". ")[0].rstrip(".")


def encoded(picture, kind):
    """A PIL picture as the bytes of a file of `kind` ("PNG" or "JPEG")."""
    picture.save(file := io.BytesIO(), kind, compress_level=1, quality=92)  # of PNG, of JPEG
    return file.getvalue()


def _find(root, *patterns, holds):
    """The first file below `root` that fits a pattern; if there is none, the error names them."""
    for pattern in patterns if root else ():
        if found := list(Path(root).expanduser().glob(pattern)):
            return min(found, key=lambda path: (len(path.name), path.name))
    names = " or ".join(patterns).replace("*px", "<size>px")
    raise FileNotFoundError(
        f"no {names} in {str(root or '')!r}: set the parameter data_root or the environment "
        f"variable JETTCLIP_DATA to the folder that holds {holds}"
    )


def _inside(root, *path):
    """`path` below `root`, as text. A path that leads out of it is refused; links are followed."""
    root = os.path.abspath(root)
    image = os.path.normpath(os.path.join(root, *path))
    if not image.startswith(root + os.sep):
        raise ValueError(f"the image {'/'.join(path)!r} lies outside of the data folder {root}")
    return image


@contextmanager
def _json(file, number=None, line=None):
    """JSON of `file` or of its `line`; inside, reading what it lacks is an error that says so."""
    where = f"line {number} of {file}" if number else f"{file} is not laid out as published"
    try:
        yield json.loads(line if number else file.read_text(encoding="utf-8"))
    except (KeyError, IndexError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"{where}: {type(error).__name__} {error}") from None


def _table(images, longs, split, keys):
    """Rows whose short caption is the first sentence of the long one."""
    shorts = [first_sentence(long) for long in longs]
    columns = {"image": images, "long": longs, "short": shorts, "split": split, "key": keys}
    return pd.DataFrame(columns)


def _several(images, captions, split, keys, seed):
    """Rows of images with several short captions each."""
    rng = np.random.default_rng([*np.atleast_1d(seed), SPLITS.index(split)])
    shuffled = [[sentence(texts[i]) for i in rng.permutation(len(texts))] for texts in captions]
    shorts = [texts[0].rstrip(".") if texts else "" for texts in shuffled]
    table = _table(images, [" ".join(texts) for texts in shuffled], split, keys)
    return table.assign(short=shorts, captions=[list(texts) for texts in captions])


def read_flickr8k(root, split):
    """Flickr8k with the smallest images there are: image (JPEG bytes), filename, captions (5)."""
    holds = "Flickr8k as Parquet files with the columns image (JPEG bytes), filename, captions"
    file = _find(root, f"flickr8k_*px_{split}.parquet", holds=holds)
    table = pd.read_parquet(file)
    if lacks := ", ".join(sorted({"image", "filename", "captions"} - set(table))):
        raise ValueError(f"{file} lacks the column(s) {lacks}; it has {', '.join(table)}")
    return table


def flickr8k(root, split, seed):
    """Flickr8k (Hodosh et al., 2013)."""
    table = read_flickr8k(root, split)
    return _several(table.image, table.captions, split, table.filename, seed)


def sharegpt4v(root, split, seed):
    """ShareGPT4V: a list of conversations, images below data/; val, test: the first 1,000 rows."""
    patterns = "share-captioner*.json", "sharegpt4v*.json", "data/sharegpt4v/*.json"
    file = _find(root, *patterns, holds="ShareGPT4V: its JSON file and data/ with coco/, sam/, ...")
    images = Path(root) / "data" if (Path(root) / "data").is_dir() else file.parent
    with _json(file) as items:
        items = items[1000:] if split == "train" else items[:1000]  # as in Long-CLIP
        longs = [item["conversations"][1]["value"].replace("\n", " ").strip() for item in items]
        keys = [item["image"] for item in items]
        return _table([_inside(images, key) for key in keys], longs, split, keys)


def coco(root, split, seed):
    """COCO 2017 captions: val and test are both val2017 (Karpathy's splits: source `karpathy`)."""
    subset = "train2017" if split == "train" else "val2017"
    name = f"annotations/captions_{subset}.json"
    with _json(_find(root, name, holds=f"COCO 2017: annotations/ and {subset}/")) as data:
        captions = {image["id"]: [] for image in data["images"]}
        for annotation in data["annotations"]:
            captions[annotation["image_id"]].append(annotation["caption"])
        keys = [image["file_name"] for image in data["images"]]
        images = [_inside(root, subset, key) for key in keys]
        return _several(images, captions.values(), split, keys, seed)


def karpathy(root, split, seed):
    """Karpathy's splits of COCO, Flickr30k, Flickr8k: images by filepath or in the only folder."""
    file = _find(root, "dataset_*.json", holds="one of Karpathy's dataset_*.json and its images")
    folders = [path.name for path in Path(root).iterdir() if path.is_dir()]
    folder = folders[0] if len(folders) == 1 else ""
    with _json(file) as data:
        items = [x for x in data["images"] if x["split"].replace("restval", "train") == split]
        keys = [item["filename"] for item in items]
        images = [_inside(root, item.get("filepath") or folder, item["filename"]) for item in items]
        captions = [[text["raw"] for text in item["sentences"]] for item in items]
        return _several(images, captions, split, keys, seed)


def urban1k(root, split, seed):
    """Urban-1k (Long-CLIP): image/*.jpg, caption/*.txt of the same stem, first line; a test set."""
    if split != "test":
        raise ValueError(f"urban1k has no split {split!r}: it is a test set")
    _find(root, "caption/*.txt", holds="Urban-1k: image/ and caption/")
    texts = {path.stem: path for path in sorted(Path(root).glob("caption/*.txt"))}
    images = {path.stem: str(path.resolve()) for path in sorted(Path(root).glob("image/*"))}
    if alone := ", ".join(sorted(texts.keys() ^ images.keys())[:5]):
        raise ValueError(f"{root} has an image without caption or a caption without image: {alone}")
    longs = [path.read_text(encoding="utf-8").split("\n")[0].strip() for path in texts.values()]
    return _table([images[key] for key in texts], longs, split, list(texts))


def folder(root, split, seed):
    """Images with a metadata.jsonl: file_name, long (or text), perhaps short and split (train)."""
    example = '{"file_name": "a.jpg", "long": "...", "short": "...", "split": "train"}'
    file = _find(root, "metadata.jsonl", holds=f"a metadata.jsonl with lines such as {example}")
    rows = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        with _json(file, number, line) as item:
            if item.get("split", "train") == split:
                key, long = item["file_name"], item["long"] if "long" in item else item["text"]
                short = item.get("short") or first_sentence(long)
                rows.append((_inside(root, key), long, short, split, key))
    return pd.DataFrame(rows, columns=["image", "long", "short", "split", "key"])


SOURCES = {read.__name__: read for read in (flickr8k, sharegpt4v, coco, karpathy, urban1k, folder)}


def classes(source, root, split="test"):
    """Images of classes -> (table with the columns image and label, list of class names).

    cifar10, cifar100: the unpacked "python version"; imagenet: val/<wnid>/*.JPEG (or train/).
    """
    if reader := {"cifar10": CIFAR10, "cifar100": CIFAR100}.get(source):
        try:
            data = reader(root, split == "train")
        except RuntimeError:
            missing = f"no complete {reader.base_folder}/ in {str(root)!r}"
            raise FileNotFoundError(f"{missing}: unpack {reader.url} there") from None
        images = [encoded(Image.fromarray(pixels), "PNG") for pixels in data.data]
        names = [name.replace("_", " ") for name in data.classes]
        return pd.DataFrame({"image": images, "label": data.targets}), names
    if source != "imagenet":
        raise ValueError(f"source {source!r} has no classes: cifar10, cifar100 and imagenet have")
    folder = Path(root) / ("train" if split == "train" else "val")
    if (count := sum(path.is_dir() for path in folder.glob("*"))) != len(IMAGENET_CLASSNAMES):
        raise FileNotFoundError(f"{folder} has {count} class folders <wnid>/, not ImageNet's 1000")
    samples = ImageFolder(folder, allow_empty=True).samples  # paths and labels
    return pd.DataFrame(samples, columns=["image", "label"]), list(IMAGENET_CLASSNAMES)
