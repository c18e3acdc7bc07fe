"""Captioned photographs as their authors publish them -> one table of pairs.

Each source is a function (root, split, seed) -> table with the columns image (path or encoded bytes), long, short, split,
key; seed is a number or several. Where an image has several short captions, they are
in the column captions, long is all of them in an order shuffled per image, and short the first of that.
"""

import io
import json
import os
from pathlib import Path

import numpy as np
import pandas as pd
from open_clip import IMAGENET_CLASSNAMES
from PIL import Image

SPLITS = ("train", "val", "test")
SHAREGPT4V_VALIDATION = 1000  # its first rows, as in Long-CLIP


def sentence(caption):
    """A caption that ends with one full stop, without line breaks."""
    return " ".join(caption.split()).rstrip(" .") + "."


def first_sentence(caption):
    """The text before the first ". ", as Long-CLIP takes its short captions."""
    return caption.split(". ")[0].rstrip(".")


def _wanted(root, *patterns, what):
    """The first file below `root` that fits a pattern; a FileNotFoundError says what was looked for."""
    for pattern in patterns if root else ():
        if found := sorted(
            Path(root).expanduser().glob(pattern), key=lambda path: (len(path.name), path.name)
        ):
            return found[0]
    names = " or ".join(patterns).replace("*px", "<size>px")
    raise FileNotFoundError(
        f"no {names} in {str(root or '')!r}: set the parameter data_root or the environment variable "
        f"JETTCLIP_DATA to the folder that holds {what}"
    )


def _inside(root, path):
    """`path` below `root`, as text; one that leads out of it is refused. Links inside are the user's own and are followed."""
    root = os.path.abspath(root)
    whole = os.path.normpath(os.path.join(root, path))
    if not whole.startswith(root + os.sep):
        raise ValueError(f"the image {str(path)!r} lies outside of the data folder {root}")
    return whole


def _read(file, rows):
    """rows(JSON of `file`); a file of another layout is an error that names what it lacks."""
    try:
        return rows(json.loads(file.read_text(encoding="utf-8")))
    except (KeyError, IndexError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{file} is not laid out as published: {type(error).__name__} {error}"
        ) from None


def _table(images, longs, shorts, split, keys):
    return pd.DataFrame(
        {"image": images, "long": longs, "short": shorts, "split": split, "key": keys}
    )


def _several(images, captions, split, keys, seed):
    """Rows of images with several short captions each."""
    rng = np.random.default_rng([*np.atleast_1d(seed), SPLITS.index(split)])
    shuffled = [[sentence(each[i]) for i in rng.permutation(len(each))] for each in captions]
    table = _table(
        images,
        [" ".join(each) for each in shuffled],
        [each[0].rstrip(".") if each else "" for each in shuffled],
        split,
        keys,
    )
    return table.assign(captions=[list(each) for each in captions])


def read_flickr8k(root, split):
    """Flickr8k's own table, of the smallest photographs there are: image (JPEG bytes), filename, captions (list of 5)."""
    file = _wanted(
        root,
        f"flickr8k_*px_{split}.parquet",
        what="Flickr8k (Hodosh et al., 2013) as Parquet files with the columns "
        "image (JPEG bytes), filename, captions (list of 5), split",
    )
    table = pd.read_parquet(file)
    if missing := {"image", "filename", "captions"} - set(table.columns):
        raise ValueError(
            f"{file} lacks the column(s) {', '.join(sorted(missing))}; it has {', '.join(table.columns)}"
        )
    return table


def flickr8k(root, split, seed):
    """Flickr8k (Hodosh et al., 2013)."""
    table = read_flickr8k(root, split)
    return _several(table.image, table.captions, split, table.filename, seed)


def sharegpt4v(root, split, seed):
    """ShareGPT4V: a JSON list of conversations, images below data/; "val" and "test" are the first 1,000 rows."""
    file = _wanted(
        root,
        "share-captioner*.json",
        "sharegpt4v*.json",
        "data/sharegpt4v/*.json",
        what="ShareGPT4V: its JSON file and data/ with coco/, llava/, sam/, ...",
    )
    base = file.parent if not (Path(root) / "data").is_dir() else Path(root) / "data"

    def rows(items):
        items = items[SHAREGPT4V_VALIDATION:] if split == "train" else items[:SHAREGPT4V_VALIDATION]
        longs = [item["conversations"][1]["value"].replace("\n", " ").strip() for item in items]
        return _table(
            [_inside(base, item["image"]) for item in items],
            longs,
            [first_sentence(long) for long in longs],
            split,
            [item["image"] for item in items],
        )

    return _read(file, rows)


def coco(root, split, seed):
    """COCO 2017 captions: train2017 for training, val2017 for "val" and "test" (Karpathy's splits: source `karpathy`)."""
    part = "train2017" if split == "train" else "val2017"
    file = _wanted(
        root, f"annotations/captions_{part}.json", what=f"COCO 2017: annotations/ and {part}/"
    )

    def rows(data):
        captions = {image["id"]: [] for image in data["images"]}
        for annotation in data["annotations"]:
            captions[annotation["image_id"]].append(annotation["caption"])
        names = [image["file_name"] for image in data["images"]]
        return _several(
            [_inside(root, f"{part}/{name}") for name in names],
            list(captions.values()),
            split,
            names,
            seed,
        )

    return _read(file, rows)


def karpathy(root, split, seed):
    """Karpathy's splits of COCO, Flickr30k or Flickr8k: dataset_*.json, images by filepath or in the one folder there is."""
    file = _wanted(
        root,
        "dataset_*.json",
        what="one of Karpathy's dataset_coco.json, dataset_flickr30k.json, dataset_flickr8k.json "
        "and its images",
    )
    folders = sorted(path.name for path in Path(root).iterdir() if path.is_dir())

    def rows(data):
        items = [
            item
            for item in data["images"]
            if ("train" if item["split"] == "restval" else item["split"]) == split
        ]
        paths = [
            f"{item.get('filepath') or (folders[0] if len(folders) == 1 else '')}/{item['filename']}".lstrip(
                "/"
            )
            for item in items
        ]
        return _several(
            [_inside(root, path) for path in paths],
            [[s["raw"] for s in item["sentences"]] for item in items],
            split,
            [item["filename"] for item in items],
            seed,
        )

    return _read(file, rows)


def urban1k(root, split, seed):
    """Urban-1k (Long-CLIP): image/*.jpg and caption/*.txt with the same stem, first line; a test set only."""
    if split != "test":
        raise ValueError(f"urban1k has no split {split!r}: it is a test set")
    _wanted(root, "caption/*.txt", what="Urban-1k: image/ and caption/")
    captions = {
        path.stem: path.read_text(encoding="utf-8").split("\n")[0].strip()
        for path in sorted(Path(root).glob("caption/*.txt"))
    }
    images = {path.stem: str(path.resolve()) for path in sorted(Path(root).glob("image/*"))}
    if alone := sorted(captions.keys() ^ images.keys()):
        raise ValueError(
            f"{root} has an image without caption or a caption without image: {', '.join(alone[:5])}"
        )
    return _table(
        [images[key] for key in captions],
        list(captions.values()),
        [first_sentence(c) for c in captions.values()],
        split,
        list(captions),
    )


def folder(root, split, seed):
    """A folder of images with metadata.jsonl: file_name and long (or text), if it likes short and split (else train)."""
    file = _wanted(
        root,
        "metadata.jsonl",
        what="a metadata.jsonl with lines such as "
        '{"file_name": "a.jpg", "long": "...", "short": "...", "split": "train"}',
    )
    items = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        try:
            item = json.loads(line)
            if item.get("split", "train") == split:
                long = item["long"] if "long" in item else item["text"]
                items.append(
                    (
                        _inside(root, item["file_name"]),
                        long,
                        item.get("short") or first_sentence(long),
                        split,
                        item["file_name"],
                    )
                )
        except (KeyError, AttributeError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"line {number} of {file}: {type(error).__name__} {error}") from None
    return pd.DataFrame(items, columns=["image", "long", "short", "split", "key"])


# ---- images of classes, for zero-shot classification


def _cifar(root, folder, files, names, label_bytes):
    """CIFAR's binary version: rows of labels (the last is wanted) and 3 x 32 x 32 bytes -> as `classes`; images become PNGs."""
    paths = [
        _wanted(root, f"{folder}/{file}", what=f"the binary version of CIFAR, {folder}/")
        for file in files
    ]
    rows = np.concatenate(
        [np.fromfile(path, np.uint8).reshape(-1, label_bytes + 3072) for path in paths]
    )
    images = []
    for pixels in rows[:, label_bytes:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1):
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        images.append(file.getvalue())
    words = (
        _wanted(root, f"{folder}/{names}", what=f"the binary version of CIFAR, {folder}/")
        .read_text()
        .split()
    )
    return pd.DataFrame({"image": images, "label": rows[:, label_bytes - 1].astype(int)}), [
        word.replace("_", " ") for word in words
    ]


def classes(source, root, split="test"):
    """Images of classes -> (table with the columns image and label, list of class names).

    cifar10, cifar100: the binary version; imagenet: <root>/val/<wnid>/*.JPEG (or train), with open_clip's class names.
    """
    train = split == "train"
    if source == "cifar10":
        files = [f"data_batch_{i}.bin" for i in range(1, 6)] if train else ["test_batch.bin"]
        return _cifar(root, "cifar-10-batches-bin", files, "batches.meta.txt", 1)
    if source == "cifar100":
        return _cifar(
            root,
            "cifar-100-binary",
            ["train.bin" if train else "test.bin"],
            "fine_label_names.txt",
            2,
        )
    if source != "imagenet":
        raise ValueError(f"source {source!r} has no classes: cifar10, cifar100 and imagenet have")
    folders = sorted(
        path for path in (Path(root) / ("train" if train else "val")).glob("n*") if path.is_dir()
    )
    if len(folders) != len(IMAGENET_CLASSNAMES):
        raise FileNotFoundError(
            f"{root} has {len(folders)} class folders {'train' if train else 'val'}/n*, not ImageNet's {len(IMAGENET_CLASSNAMES)}"
        )
    rows = [
        (str(path), label)
        for label, folder in enumerate(folders)
        for path in sorted(folder.glob("*.JPEG"))
    ]
    return pd.DataFrame(rows, columns=["image", "label"]), list(IMAGENET_CLASSNAMES)


SOURCES = {
    "flickr8k": flickr8k,
    "sharegpt4v": sharegpt4v,
    "coco": coco,
    "karpathy": karpathy,
    "urban1k": urban1k,
    "folder": folder,
}


def encoded(picture, kind):
    """The bytes of a PIL picture as a file of `kind` ("PNG", "JPEG")."""
    file = io.BytesIO()
    picture.save(file, kind, compress_level=1, quality=92)  # a PNG's and a JPEG's option
    return file.getvalue()
