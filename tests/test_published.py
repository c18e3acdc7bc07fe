"""Each source is read from a small tree in exactly the layout that its authors publish."""

import io
import json

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from jettclip.data import COLUMNS, clean_pairs, load_pairs, read_image
from jettclip.datasets.published import classes


def picture(path, colour=(200, 30, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 16), colour).save(path, "JPEG")


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value))


def usable(pairs, n):
    """The table as asked for, every image of it readable."""
    assert list(pairs.columns)[:5] == COLUMNS and len(pairs) == n
    good, problems = clean_pairs(pairs)
    assert len(good) == n and problems.empty
    return pairs


@pytest.fixture(autouse=True)
def no_data_folder(monkeypatch):
    monkeypatch.delenv("JETTCLIP_DATA", raising=False)


@pytest.mark.parametrize(
    "place",
    [
        "share-captioner_coco_lcs_sam_1246k_1107.json",
        "data/sharegpt4v/sharegpt4v_instruct_gpt4-vision_cap100k.json",
    ],
)
def test_sharegpt4v(place, tmp_path):
    images = [
        "coco/train2017/000000000009.jpg",
        "llava/llava_pretrain/images/00453/004539375.jpg",
        "sam/images/sa_545504.jpg",
        "gqa/images/2407890.jpg",
    ]
    items = [
        {
            "id": str(i),
            "image": images[i % 4],
            "conversations": [
                {"from": "human", "value": "<image>\nDescribe the image."},
                {"from": "gpt", "value": f"Row {i} shows a dog. It runs\n\nover grass."},
            ],
        }
        for i in range(1003)
    ]
    write(tmp_path / place, items)
    for image in images:
        picture(tmp_path / "data" / image)
    train = usable(load_pairs("sharegpt4v", tmp_path), 3)
    assert (
        train.long[0] == "Row 1000 shows a dog. It runs  over grass."
        and train.short[0] == "Row 1000 shows a dog"
    )
    assert train.key.tolist() == images[:3] and set(train.split) == {"train"}
    assert load_pairs("sharegpt4v", tmp_path, "val").long[999].startswith("Row 999 ")
    usable(load_pairs("sharegpt4v", tmp_path, "test", n=5), 5)


def test_coco(tmp_path):
    for part, n in (("train2017", 3), ("val2017", 2)):
        images = [
            {"id": 10 + i, "file_name": f"{i:012}.jpg", "height": 16, "width": 20} for i in range(n)
        ]
        write(
            tmp_path / f"annotations/captions_{part}.json",
            {
                "info": {},
                "licenses": [],
                "images": images,
                "annotations": [
                    {"id": 5 * i + k, "image_id": 10 + i, "caption": f"Image {i},\ncaption {k} "}
                    for k in range(5)
                    for i in range(n)
                ],
            },
        )
        for image in images:
            picture(tmp_path / part / image["file_name"])
    pairs = usable(load_pairs("coco", tmp_path), 3)
    assert sorted(pairs.long[1].removesuffix(".").split(". ")) == [
        f"Image 1, caption {k}" for k in range(5)
    ]
    assert pairs.long[1].startswith(pairs.short[1] + ".")
    assert (
        len(usable(load_pairs("coco", tmp_path, "test"), 2)) == 2
        and load_pairs("coco", tmp_path, seed=1).long.ne(pairs.long).any()
    )


@pytest.mark.parametrize(
    "kind, filepath, images",
    [
        ("coco", "train2014", "train2014"),
        ("flickr30k", None, "flickr30k-images"),
        ("flickr8k", None, "Flicker8k_Dataset"),
    ],
)
def test_karpathy(kind, filepath, images, tmp_path):
    splits = ["train", "restval" if kind == "coco" else "train", "val", "test"]
    items = [
        {
            "filename": f"{i}.jpg",
            "imgid": i,
            "split": split,
            "sentids": [],
            "sentences": [
                {"raw": f"Photo {i} caption {k} .", "tokens": [], "imgid": i, "sentid": k}
                for k in range(5)
            ],
            **({"filepath": filepath, "cocoid": i} if filepath else {}),
        }
        for i, split in enumerate(splits)
    ]
    write(tmp_path / f"dataset_{kind}.json", {"images": items, "dataset": kind})
    for i in range(4):
        picture(tmp_path / images / f"{i}.jpg")
    assert usable(load_pairs("karpathy", tmp_path), 2).key.tolist() == ["0.jpg", "1.jpg"]
    assert (
        usable(load_pairs("karpathy", tmp_path, "test"), 1).short[0].startswith("Photo 3 caption")
    )


def test_urban1k(tmp_path):
    for i in (1, 2, 10):
        picture(tmp_path / f"image/{i}.jpg", (i, 0, 0))
        write(
            tmp_path / f"caption/{i}.txt",
            f"Street {i} is wide. A bus stands there.\nnot this line\n",
        )
    pairs = usable(load_pairs("urban1k", tmp_path, "test"), 3)
    for row in pairs.itertuples():
        assert (
            row.image.endswith(f"/image/{row.key}.jpg")
            and row.long == f"Street {row.key} is wide. A bus stands there."
        )
        assert row.short == f"Street {row.key} is wide"
    with pytest.raises(ValueError, match="urban1k has no split 'train': it is a test set"):
        load_pairs("urban1k", tmp_path)
    (tmp_path / "caption/2.txt").unlink()
    with pytest.raises(ValueError, match="an image without caption or a caption without image: 2"):
        load_pairs("urban1k", tmp_path, "test")


def test_folder(tmp_path):
    lines = [
        {"file_name": "a.jpg", "text": "A dog runs. It is brown."},
        {"file_name": "b/b.jpg", "long": "Long. Text.", "short": "own"},
        {"file_name": "c.jpg", "text": "Another", "split": "test"},
    ]
    write(tmp_path / "metadata.jsonl", "\n".join(map(json.dumps, lines)))
    for line in lines:
        picture(tmp_path / line["file_name"])
    pairs = usable(load_pairs("folder", tmp_path), 2)
    assert pairs.long.tolist() == [
        "A dog runs. It is brown.",
        "Long. Text.",
    ] and pairs.short.tolist() == ["A dog runs", "own"]
    assert usable(load_pairs("folder", tmp_path, "test"), 1).long[0] == "Another"


@pytest.mark.parametrize(
    "source, file, content, problem",
    [
        (
            "sharegpt4v",
            "sharegpt4v.json",
            [{"id": "1", "image": "../../etc/passwd", "conversations": [{}, {"value": "x"}]}]
            * 1001,
            "'../../etc/passwd' lies outside of the data folder",
        ),
        (
            "folder",
            "metadata.jsonl",
            '{"file_name": "/etc/passwd", "text": "x"}',
            "'/etc/passwd' lies outside",
        ),
        (
            "folder",
            "metadata.jsonl",
            '{"file_name": "a.jpg"}',
            "line 1 of .*metadata.jsonl: KeyError 'text'",
        ),
        (
            "folder",
            "metadata.jsonl",
            '{"file_name": "a.jpg", "text": "x"}\n{"file',
            "line 2 of .*metadata.jsonl: JSONDecodeError",
        ),
        (
            "coco",
            "annotations/captions_train2017.json",
            {"images": []},
            "captions_train2017.json is not laid out as published: KeyError 'annotations'",
        ),
        (
            "karpathy",
            "dataset_coco.json",
            "[1, 2",
            "dataset_coco.json is not laid out as published: JSONDecodeError",
        ),
        (
            "sharegpt4v",
            "sharegpt4v.json",
            [{"id": "1", "image": "a.jpg", "conversations": []}] * 1001,
            "not laid out as published: IndexError",
        ),
    ],
)
def test_files_that_are_not_as_published(source, file, content, problem, tmp_path):
    write(tmp_path / file, content)
    with pytest.raises(ValueError, match=problem):
        load_pairs(source, tmp_path)


@pytest.mark.parametrize(
    "source, names",
    [
        ("coco", "annotations/captions_train2017.json"),
        ("karpathy", "dataset_coco.json"),
        ("sharegpt4v", "share-captioner"),
        ("folder", "metadata.jsonl"),
        ("collage", "flickr8k_<size>px"),
    ],
)
def test_a_missing_data_set_is_asked_for(source, names, tmp_path):
    for root in (tmp_path, None):
        with pytest.raises(
            FileNotFoundError,
            match=f"(?s)no .*set the parameter data_root or the environment variable JETTCLIP_DATA.*|{names}",
        ):
            load_pairs(source, root, n=3)


def test_the_smallest_flickr8k_is_taken(tmp_path):
    for pixels in (160, 128, 96):
        file = io.BytesIO()
        Image.new("RGB", (pixels, pixels)).save(file, "JPEG")
        pd.DataFrame(
            {
                "image": [file.getvalue()],
                "filename": ["a.jpg"],
                "captions": [["a", "b", "c", "d", "e"]],
                "split": "val",
            }
        ).to_parquet(tmp_path / f"flickr8k_{pixels}px_val.parquet")
    from jettclip.data import read_image

    assert read_image(load_pairs("flickr8k", tmp_path, "val").image[0]).shape == (3, 96, 96)


# ---- classes


@pytest.mark.parametrize(
    "source, folder, files, names, label_bytes",
    [
        (
            "cifar10",
            "cifar-10-batches-bin",
            {"train": [f"data_batch_{i}.bin" for i in range(1, 6)], "test": ["test_batch.bin"]},
            "batches.meta.txt",
            1,
        ),
        (
            "cifar100",
            "cifar-100-binary",
            {"train": ["train.bin"], "test": ["test.bin"]},
            "fine_label_names.txt",
            2,
        ),
    ],
)
def test_cifar(source, folder, files, names, label_bytes, tmp_path):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (4, 3, 32, 32), dtype=np.uint8)
    rows = b"".join(
        bytes([7] * (label_bytes - 1) + [label]) + one.tobytes() for label, one in enumerate(pixels)
    )
    for file in sum(files.values(), []):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / file).write_bytes(rows)
    write(tmp_path / folder / names, "airplane\naquarium_fish\nbird\ncat\n\n")
    table, words = classes(source, tmp_path)
    assert words == ["airplane", "aquarium fish", "bird", "cat"] and table.label.tolist() == [
        0,
        1,
        2,
        3,
    ]
    assert all(
        np.array_equal(read_image(image).numpy(), one) for image, one in zip(table.image, pixels)
    )
    assert len(classes(source, tmp_path, "train")[0]) == 4 * len(files["train"])


def test_imagenet(tmp_path):
    for i in range(1000):
        (tmp_path / f"val/n{i:08}").mkdir(parents=True)
    picture(tmp_path / "val/n00000001/ILSVRC2012_val_00000293.JPEG")
    table, words = classes("imagenet", tmp_path)
    assert (
        len(words) == 1000
        and words[1] == "goldfish"
        and table.label.tolist() == [1]
        and read_image(table.image[0]).shape == (3, 16, 20)
    )
    (tmp_path / "val/n00000005").rmdir()
    with pytest.raises(
        FileNotFoundError, match="has 999 class folders val/n\\*, not ImageNet's 1000"
    ):
        classes("imagenet", tmp_path)


def test_no_classes(tmp_path):
    with pytest.raises(ValueError, match="source 'coco' has no classes: cifar10"):
        classes("coco", tmp_path)
    with pytest.raises(FileNotFoundError, match="no cifar-10-batches-bin/test_batch.bin"):
        classes("cifar10", tmp_path)


def test_links_inside_are_followed(tmp_path):
    """Large folders of images are often links to another disk."""
    picture(tmp_path / "disk/a.jpg")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/images").symlink_to(tmp_path / "disk")
    write(
        tmp_path / "data/metadata.jsonl",
        json.dumps({"file_name": "images/a.jpg", "text": "A dog. It runs."}),
    )
    usable(load_pairs("folder", tmp_path / "data"), 1)
