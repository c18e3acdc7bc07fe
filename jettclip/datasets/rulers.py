"""Published test sets of long captions -> one table of pairs, as in `published`.

A source is a function (root, split, seed) -> table; the only split is "test". DOCCI, DCI and IIW
are laid out as their authors publish them, IIW's images and SV-10k as LoTLIP's EVAL_DATASETS.md
says, Urban-1k and all of Flickr30k as in Long-CLIP.
"""

import json
from collections import defaultdict
from functools import partial

from .published import (
    _files,
    _find,
    _inside,
    _items,
    _lines,
    _published,
    _table,
    _text,
    _valid,
    data_folder,
    sentence,
)

# source: ({annotation files: folder of their images}, item -> (image, caption), or nothing where
# the item is not in the set)
DCI = {"densely_captioned_images/annotations/*.json": "densely_captioned_images/photos"}
IIW = {"IIW-400/data.jsonl": "docci_aar", "DOCCI_Test/data.jsonl": "docci"}
IIW |= {"DCI_Test/data.jsonl": "dci"}
LAYOUTS = {
    "docci": (  # Onoe et al., 2024: 5,000
        {"docci_descriptions.jsonlines": "images"},
        lambda x: x["split"] == "test" and (x["image_file"], x["description"]),
    ),
    "dci": (  # Urbanek et al., 2024: 7,805
        DCI,
        lambda x: (x["image"], f"{sentence(x['short_caption'])} {x['extra_caption']}"),
    ),
    "long_dci": (  # TULIP (Najdenkoska et al., 2025): those with a long caption
        DCI,
        lambda x: x["extra_caption"] and (x["image"], x["extra_caption"]),
    ),
    "iiw": (  # ImageInWords (Garg et al., 2024): 612
        IIW,
        lambda x: (f"{x.get('image', x.get('image/key')).removesuffix('.jpg')}.jpg", x["IIW"]),
    ),
    "sv10k": (  # of ShareGPT4V's captions of SA-1B, kept by LoTLIP (Wu et al., 2024): 10,000
        {"share4v_sam_10k.json": ""},
        lambda x: (x["image"], x["conversations"][1]["value"]),
    ),
}


def _test_only(source, split):
    if split != "test":
        raise ValueError(f"{source} has no split {split!r}: it is a test set")


def _row(place, item, folder, describe):
    """[(place, what `describe` finds in an item of JSON)], or the error; [] if it is no row."""
    try:
        item = json.loads(item) if isinstance(item, str) else item
        if not (found := describe(item)):
            return []
        image, caption = found
        item = {"key": image, "image": _inside(folder, image), "caption": caption}
    except Exception as error:
        item = error
    return [(place, item)]


def _layout(source, root, split, seed):
    """The table of a source in LAYOUTS, from files of JSON (a list, an object) or lines of it."""
    _test_only(source, split)
    (folders, describe), rows = LAYOUTS[source], []
    for pattern, images in folders.items():
        _find(root, pattern, holds=f"{source}: {pattern} and its images, in {images or 'folders'}")
        for file in _files(root, pattern):
            with _published(file):
                items = _lines(file)
                if file.suffix == ".json":
                    data = json.loads(_text(file))
                    items = _items(data, file) if isinstance(data, list) else [(str(file), data)]
                for place, item in items:
                    rows += _row(place, item, str(root / images), describe)

    def read(item):
        return item["image"], [" ".join(_valid(item["caption"]).split())]

    with _published(root):
        return _table(rows, split, "key", read)


def flickr30k(root, split, seed):
    """All of Flickr30k (Young et al., 2014): 31,783 images in flickr30k-images/, five captions."""
    _test_only("flickr30k", split)
    name, captions = "results_20130124.token", defaultdict(list)
    file = _find(root, name, holds=f"Flickr30k: {name} and flickr30k-images/")
    with _published(file):
        for _, line in _lines(file):
            image, caption = line.split("\t")
            captions[image.partition("#")[0]].append(caption.strip())

        def read(item):
            return _inside(root, "flickr30k-images", item[0]), item[1]

        return _table(_items(captions.items(), file, "image"), split, 0, read, seed)


def urban1k(root, split, seed):
    """Urban-1k (Long-CLIP): image/*.jpg, caption/*.txt of the same stem, first line."""
    _test_only("urban1k", split)
    _find(root, "caption/*.txt", holds="Urban-1k: image/ and caption/")
    texts = {path.stem: path for path in _files(root, "caption/*.txt")}
    images = {path.stem: str(path.resolve()) for path in _files(root, "image/*")}
    if alone := ", ".join(sorted(texts.keys() ^ images.keys())[:5]):
        raise ValueError(f"{root} has an image without caption or a caption without image: {alone}")

    def read(item):
        return images[item["key"]], [_text(item["file"]).split("\n")[0].strip()]

    items = [(file, {"key": key, "file": file}) for key, file in texts.items()]
    with _published(root):
        return _table(items, split, "key", read)


SOURCES = {source: partial(_layout, source) for source in LAYOUTS}
SOURCES |= {"flickr30k": flickr30k, "urban1k": urban1k}
# source: a file by which a test set is known
FILES = {source: next(iter(folders)) for source, (folders, _) in LAYOUTS.items()}
FILES |= {"urban1k": "caption/*.txt", "flickr30k": "results_20130124.token"}
FILES |= {"coco": "annotations/captions_val2017.json", "sharegpt4v": "share-captioner*.json"}


def below(root):
    """Test sets in the folder `root` (or JETTCLIP_DATA) itself or in one of its folders ->
    {source: that folder, or None}."""
    root = data_folder(root)
    folders = [root, *(path for path in _files(root, "*") if path.is_dir())] if root else []
    return {
        source: next((folder for folder in folders if any(folder.glob(file))), None)
        for source, file in FILES.items()
    }
