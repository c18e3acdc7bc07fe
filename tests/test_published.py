"""Each source is read from a small tree in exactly the layout that its authors publish."""

import json
import pickle
from itertools import product

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import CIFAR10, CIFAR100

from jettclip.data import COLUMNS, clean_pairs, load_pairs, read_image
from jettclip.datasets.published import classes, encoded


@pytest.fixture(autouse=True)
def no_data_folder(monkeypatch):
    monkeypatch.delenv("JETTCLIP_DATA", raising=False)


@pytest.fixture
def tree(tmp_path):
    """-> function(path, content) that writes a file: text or JSON, without content a picture."""
    picture = encoded(Image.new("RGB", (20, 16), (200, 30, 30)), "JPEG")

    def write(path, content=None):
        text = content if isinstance(content, str) else json.dumps(content)
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(picture if content is None else text.encode())

    return write


def usable(pairs, n):
    """The table, after a check that it has n rows and that every image is readable."""
    assert list(pairs.columns)[:5] == COLUMNS and len(pairs) == n
    good, problems = clean_pairs(pairs)
    assert len(good) == n and problems.empty
    return pairs


def conversation(image, text):
    human = {"from": "human", "value": "<image>\nDescribe the image."}
    return {"id": "1", "image": image, "conversations": [human, {"from": "gpt", "value": text}]}


@pytest.mark.parametrize(
    "path", ["share-captioner_coco_lcs_sam_1246k_1107.json", "data/sharegpt4v/sharegpt4v.json"]
)
def test_sharegpt4v(path, tree, tmp_path):
    images = ["coco/train2017/000000000009.jpg", "llava/00453/004539375.jpg", "sam/sa_545504.jpg"]
    texts = [f"Row {i} shows a dog. It runs\n\nover grass." for i in range(1003)]
    tree(path, [conversation(images[(i + 2) % 3], text) for i, text in enumerate(texts)])
    for image in images:
        tree(f"data/{image}")
    train = usable(load_pairs("sharegpt4v", tmp_path), 3)
    short = "Row 1000 shows a dog"
    assert (train.long[0], train.short[0]) == (f"{short}. It runs  over grass.", short)
    assert train.key.tolist() == images and set(train.split) == {"train"}
    assert load_pairs("sharegpt4v", tmp_path, "val").long[999].startswith("Row 999 ")
    usable(load_pairs("sharegpt4v", tmp_path, "test", n=5), 5)


def test_coco(tree, tmp_path):
    for subset, n in (("train2017", 3), ("val2017", 2)):
        images = [{"id": 10 + i, "file_name": f"{i:012}.jpg"} for i in range(n)]
        annotations = [
            {"id": 5 * i + k, "image_id": 10 + i, "caption": f"Image {i},\ncaption {k} "}
            for k, i in product(range(5), range(n))
        ]
        content = {"info": {}, "images": images, "annotations": annotations}
        tree(f"annotations/captions_{subset}.json", content)
        for image in images:
            tree(f"{subset}/{image['file_name']}")
    pairs = usable(load_pairs("coco", tmp_path), 3)
    captions = sorted(pairs.long[1].removesuffix(".").split(". "))
    assert captions == [f"Image 1, caption {k}" for k in range(5)]
    assert pairs.long[1].startswith(pairs.short[1] + ".")
    assert pairs.captions[1] == [f"Image 1,\ncaption {k} " for k in range(5)]
    usable(load_pairs("coco", tmp_path, "test"), 2)


FOLDERS = {"coco": "train2014", "flickr30k": "flickr30k-images", "flickr8k": "Flicker8k_Dataset"}


@pytest.mark.parametrize("kind, folder", FOLDERS.items())
def test_karpathy(kind, folder, tree, tmp_path):
    items, filepath = [], {"filepath": folder} if kind == "coco" else {}
    for i, split in enumerate(["train", "restval" if filepath else "train", "val", "test"]):
        sentences = [{"raw": f"Photo {i} caption {k} .", "tokens": []} for k in range(5)]
        items.append({"filename": f"{i}.jpg", "split": split, "sentences": sentences, **filepath})
        tree(f"{folder}/{i}.jpg")
    tree(f"dataset_{kind}.json", {"images": items, "dataset": kind})
    assert usable(load_pairs("karpathy", tmp_path), 2).key.tolist() == ["0.jpg", "1.jpg"]
    test = usable(load_pairs("karpathy", tmp_path, "test"), 1)
    assert test.short[0].startswith("Photo 3 caption")


def test_urban1k(tree, tmp_path):
    for i in (1, 2, 10):
        tree(f"image/{i}.jpg")
        tree(f"caption/{i}.txt", f"Street {i} is wide. A bus stands there.\nnot this line\n")
    for row in usable(load_pairs("urban1k", tmp_path, "test"), 3).itertuples():
        assert row.image.endswith(f"/image/{row.key}.jpg")
        assert row.long == f"Street {row.key} is wide. A bus stands there."
        assert row.short == f"Street {row.key} is wide"
    (tmp_path / "caption/2.txt").unlink()
    with pytest.raises(ValueError, match="an image without caption or a caption without image: 2"):
        load_pairs("urban1k", tmp_path, "test")


def test_folder(tree, tmp_path):
    for name in ("disk", "data"):
        (tmp_path / name).mkdir()
    (tmp_path / "data/links").symlink_to(tmp_path / "disk")  # images are often on another disk
    lines = [
        {"file_name": "links/a.jpg", "text": "A dog runs. It is brown."},
        {"file_name": "b/b.jpg", "long": "Long. Text.", "short": "brief"},
        {"file_name": "c.jpg", "text": "Another", "split": "test"},
    ]
    tree("data/metadata.jsonl", "\n".join(map(json.dumps, lines)))
    for line in lines:
        tree(f"data/{line['file_name']}")
    pairs = usable(load_pairs("folder", tmp_path / "data"), 2)
    assert pairs.long.tolist() == ["A dog runs. It is brown.", "Long. Text."]
    assert pairs.short.tolist() == ["A dog runs", "brief"]
    assert usable(load_pairs("folder", tmp_path / "data", "test"), 1).long[0] == "Another"


ITEM = conversation("../../etc/passwd", "x")
COCO, SHARE = "annotations/captions_train2017.json", "sharegpt4v.json"
META = "metadata.jsonl"
BAD_FILES = [
    ("sharegpt4v", SHARE, [ITEM] * 1001, "'../../etc/passwd' lies outside of the data folder"),
    ("sharegpt4v", SHARE, [{**ITEM, "conversations": []}] * 1001, "as published: IndexError"),
    ("folder", META, '{"file_name": "/etc/passwd", "text": "x"}', "lies outside"),
    ("folder", META, '{"text": "x", "split": "test"}\n{"f', "line 2 of .*: JSONDecode"),
    ("coco", COCO, {"images": []}, "is not laid out as published: KeyError 'annotations'"),
    ("karpathy", "dataset_coco.json", "[1, 2", "is not laid out as published: JSONDecodeError"),
]


@pytest.mark.parametrize("source, file, content, problem", BAD_FILES)
def test_bad_files(source, file, content, problem, tree, tmp_path, monkeypatch):
    """Missing, or not as published."""
    monkeypatch.chdir(tmp_path)
    missing = r"no .*(dataset_\*|share-.*\*|captions_train2017|metadata).json.*: set the parameter"
    for root in (tmp_path, None):
        with pytest.raises(FileNotFoundError, match=missing):
            load_pairs(source, root)
    tree(file, content)
    with pytest.raises(ValueError, match=problem):
        load_pairs(source, tmp_path)


@pytest.mark.parametrize("source, reader", [("cifar10", CIFAR10), ("cifar100", CIFAR100)])
def test_cifar(source, reader, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=f"no complete {reader.base_folder}/.*: unpack "):
        classes(source, tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (4, 3, 32, 32), dtype=np.uint8)
    labels = "labels" if source == "cifar10" else "fine_labels"
    files = [name for name, _ in reader.train_list + reader.test_list]
    contents = dict.fromkeys(files, {"data": pixels.reshape(4, 3072), labels: [0, 1, 2, 3]})
    names = ["airplane", "aquarium_fish", "bird", "cat"]
    contents[reader.meta["filename"]] = {reader.meta["key"]: names}
    (tmp_path / reader.base_folder).mkdir()
    for name, content in contents.items():
        (tmp_path / reader.base_folder / name).write_bytes(pickle.dumps(content))
    for files in ("train_list", "test_list"):  # without the checksums of the published files
        monkeypatch.setattr(reader, files, [[name, None] for name, _ in getattr(reader, files)])
    monkeypatch.setattr(reader, "meta", {**reader.meta, "md5": None})
    table, names = classes(source, tmp_path)
    assert names == ["airplane", "aquarium fish", "bird", "cat"]
    assert table.label.tolist() == [0, 1, 2, 3]
    assert np.array_equal([read_image(image).numpy() for image in table.image], pixels)
    assert len(classes(source, tmp_path, "train")[0]) == 4 * len(reader.train_list)


def test_imagenet(tree, tmp_path):
    for i in range(1000):
        (tmp_path / f"val/n{i:08}").mkdir(parents=True)
    tree("val/n00000001/ILSVRC2012_val_00000293.JPEG")
    table, names = classes("imagenet", tmp_path)
    assert len(names) == 1000 and names[1] == "goldfish" and table.label.tolist() == [1]
    assert read_image(table.image[0]).shape == (3, 16, 20)
    (tmp_path / "val/n00000005").rmdir()
    with pytest.raises(FileNotFoundError, match="/val has 999 class folders .*ImageNet's 1000"):
        classes("imagenet", tmp_path)
    with pytest.raises(ValueError, match="source 'coco' has no classes: cifar10"):
        classes("coco", tmp_path)
