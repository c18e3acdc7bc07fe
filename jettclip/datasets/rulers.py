"""Published test sets of long captions -> one table of pairs, as in `published`.

DOCCI, DCI and IIW are laid out as their authors publish them, IIW's images and SV-10k as LoTLIP's,
Urban-1k and Flickr30k as Long-CLIP's.
"""

import json
from collections import defaultdict
from functools import partial

from . import published
from .published import _files, _find, _inside, _lines, _published, _table, _text, _valid, sentence

# Annotation files -> the folder of their images.
DOCCI = {"docci_descriptions.jsonlines": "images"}
DCI = {"densely_captioned_images/annotations/*.json": "densely_captioned_images/photos"}
IIW = {"IIW-400": "docci_aar", "DOCCI_Test": "docci", "DCI_Test": "dci"}
IIW = {f"{name}/data.jsonl": folder for name, folder in IIW.items()}
LAYOUTS = {  # source: (files, item -> image and caption, or nothing: it is not in the set)
    # Onoe et al., 2024: 5,000
    "docci": (DOCCI, lambda x: x["split"] == "test" and (x["image_file"], x["description"])),
    # Urbanek et al., 2024: 7,805, and the 7,602 with a long caption (TULIP, 2025)
    "dci": (DCI, lambda x: (x["image"], f"{sentence(x['short_caption'])} {x['extra_caption']}")),
    "long_dci": (DCI, lambda x: x["extra_caption"] and (x["image"], x["extra_caption"])),
    # ImageInWords (Garg et al., 2024): 612
    "iiw": (IIW, lambda x: (x.get("image", x.get("image/key")), x["IIW"])),
    # of ShareGPT4V's captions of SA-1B, kept by LoTLIP (Wu et al., 2024): 10,000
    "sv10k": ({"share4v_sam_10k.json": ""}, lambda x: (x["image"], x["conversations"][1]["value"])),
}


def _layout(source, root, split, seed):
    """The table of a source in LAYOUTS, from files of JSON (a list, an object) or lines of it."""
    (folders, describe), rows = LAYOUTS[source], []

    def row(item):
        if found := describe(item):
            image = found[0].removesuffix(".jpg") + ".jpg"
            return {"key": image, "image": _inside(root / images, image), "captions": found[1:]}

    for pattern, images in folders.items():
        _find(root, pattern, holds=f"{source}: {pattern} and its images, in {images or 'folders'}")
        for file in _files(root, pattern):
            with _published(file):
                items = _lines(file)
                if file.suffix == ".json":
                    data = json.loads(_text(file))
                    items = published._items(data if isinstance(data, list) else [data], file)
                rows += published._each(items, row)

    def read(item):
        return item["image"], [" ".join(_valid(text).split()) for text in item["captions"]]

    with _published(root):
        return _table(rows, split, "key", read)


def flickr30k(root, split, seed):
    """All of Flickr30k (Young et al., 2014): 31,783 images in flickr30k-images/, five captions."""
    name, captions = "results_20130124.token", defaultdict(list)
    file = _find(root, name, holds=f"Flickr30k: {name} and flickr30k-images/")
    with _published(file):
        for _, line in _lines(file):
            image, caption = line.split("\t")
            captions[image.partition("#")[0]].append(caption.strip())
        items = published._items(captions.items(), file, "image")
        read = lambda item: (_inside(root, "flickr30k-images", item[0]), item[1])  # noqa: E731
        return _table(items, split, 0, read, seed)


def urban1k(root, split, seed):
    """Urban-1k (Long-CLIP): image/*.jpg, caption/*.txt of the same stem, first line."""
    _find(root, "caption/*.txt", holds="Urban-1k: image/ and caption/")
    texts = {path.stem: path for path in _files(root, "caption/*.txt")}
    images = {path.stem: str(path.resolve()) for path in _files(root, "image/*")}

    def read(item):
        key = item["key"]
        if missing := "image" * (key not in images) or "caption" * (key not in texts):
            raise ValueError(f"there is no {missing}/{key}.*")
        return images[key], [_text(texts[key]).split("\n")[0].strip()]

    items = [(file, {"key": key}) for key, file in (images | texts).items()]
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
    root = published.data_folder(root)
    folders = [root, *(path for path in _files(root, "*") if path.is_dir())] if root else []
    return {
        source: next((folder for folder in folders if any(folder.glob(file))), None)
        for source, file in FILES.items()
    }
