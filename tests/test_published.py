"""Each source is read from a small tree in exactly the layout that its authors publish."""

import json
import shutil
import tempfile
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.datasets import CIFAR100

from jettclip.data import COLUMNS, clean_pairs, load_pairs, read_image
from jettclip.datasets import published, rulers
from jettclip.datasets.published import classes, encoded


@pytest.fixture
def tree(tmp_path):
    """-> function(path, content) that writes a file: text or JSON, without content a picture."""
    picture = encoded(Image.new("RGB", (20, 16), (200, 30, 30)), "JPEG")

    def write(path, content=None):
        data = content if isinstance(content, str | bytes) else json.dumps(content)
        data = picture if content is None else data.encode() if isinstance(data, str) else data
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(data)

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
    images = ["coco/train2017/000000000009.jpg", "sam/sa_545504.jpg"]
    texts = [f"Row {i} shows a dog. It runs\n\nover grass." for i in range(2002)]
    tree(path, [conversation(images[i % 2], text) for i, text in enumerate(texts)])
    for image in images:
        tree(f"data/{image}")
    train = usable(load_pairs("sharegpt4v", tmp_path), 2)
    short = "Row 2000 shows a dog"
    assert (train.long[0], train.short[0]) == (f"{short}. It runs  over grass.", short)
    assert train.key.tolist() == images and set(train.split) == {"train"}
    for split, first in (("test", 0), ("val", 1000)):  # Long-CLIP's test rows, and others
        rows = load_pairs("sharegpt4v", tmp_path, split).long.str.split().str[1].astype(int)
        assert rows.tolist() == list(range(first, first + 1000))
    usable(load_pairs("sharegpt4v", tmp_path, "test", n=5), 5)


def test_coco(tree, tmp_path):
    for subset, n in (("train2017", 11), ("val2017", 2)):
        images = [{"id": 10 + i, "file_name": f"{i:012}.jpg"} for i in range(n)]
        annotations = [
            {"id": 5 * i + k, "image_id": 10 + i, "caption": f"Image {i},\ncaption {k} "}
            for k, i in product(range(5), range(n))
        ]
        content = {"info": {}, "images": images, "annotations": annotations}
        tree(f"annotations/captions_{subset}.json", content)
        for image in images:
            tree(f"{subset}/{image['file_name']}")
    pairs = usable(load_pairs("coco", tmp_path), 10)
    captions = sorted(pairs.long[0].removesuffix(".").split(". "))
    assert captions == [f"Image 1, caption {k}" for k in range(5)]
    assert pairs.long[0].startswith(pairs.short[0] + ".")
    assert pairs.captions[0] == [f"Image 1,\ncaption {k} " for k in range(5)]
    images = [*usable(load_pairs("coco", tmp_path, "test"), 2).image, *pairs.image]
    assert len({*images, *usable(load_pairs("coco", tmp_path, "val"), 1).image}) == 13


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
    for name in ("caption/2.txt", "image/10.jpg"):  # the others stay
        (tmp_path / name).unlink()
    good, report = clean_pairs(load_pairs("urban1k", tmp_path, "test"))
    assert good.key.tolist() == ["1"] and report.key.tolist() == ["2", "10"]
    for problem, missing in zip(report.problem, ("caption/2", "image/10"), strict=True):
        assert problem.startswith(f"unreadable row, left out: there is no {missing}.* (")


PHOTO = "densely_captioned_images/photos/sa_{}.jpg"
NOTE = "densely_captioned_images/annotations/{}.json"
DCI = [("sa_2.jpg", "A pump", "It is\nred.", {}), ("sa_1.jpg", "A boat.", "", {})]
DCI_KEYS = ("image", "short_caption", "extra_caption", "mask_data")
DCI = [dict(zip(DCI_KEYS, note, strict=True)) for note in DCI]
DCI = {NOTE.format(i): note for i, note in enumerate(DCI)}
DOCCI = {"train": "X", "test": "A wall.  Tiles.", "qual_dev": "Y"}
DOCCI = [{"split": x, "image_file": f"{x}_0.jpg", "description": DOCCI[x]} for x in DOCCI]
DOCCI = {"docci_descriptions.jsonlines": "\n".join(map(json.dumps, DOCCI))}
IIW = {
    "IIW-400": {"image/key": "aar_test_04600", "IIW": "A flower. Blue."},
    "DOCCI_Test": {"image": "test_00731", "IIW": "A toilet.\u00a0\n\n\nTowels.", "DOCCI": "X"},
    "DCI_Test": {"image": "sa_1545038.jpg", "ex_id": "113029-data.json", "IIW": "A balcony."},
}
IIW = {f"{name}/data.jsonl": json.dumps(item) + "\n" for name, item in IIW.items()}
BLUE = ["docci_aar/aar_test_04600.jpg", "dci/sa_1545038.jpg", "docci/test_00731.jpg"]
SAM = [f"sa_00000{i}/images/sa_{i}.jpg" for i in (0, 1)]
TALK = {"share4v_sam_10k.json": [conversation(x, "A dog. It runs\n\nhome.") for x in SAM]}
MEN = ["flickr30k-images/7.jpg", "flickr30k-images/8.jpg"]
TOKEN = "".join(f"{i}.jpg#{k}\tMen {k} .\n" for i in (7, 8) for k in range(5))
RULERS = {  # source: annotations, images below root, long captions in order of the keys
    "docci": (DOCCI, ["images/test_0.jpg"], ["A wall. Tiles."]),
    "dci": (DCI, [PHOTO.format(1), PHOTO.format(2)], ["A boat.", "A pump. It is red."]),
    "long_dci": (DCI, [PHOTO.format(2)], ["It is red."]),
    "iiw": (IIW, BLUE, ["A flower. Blue.", "A balcony.", "A toilet. Towels."]),
    "sv10k": (TALK, SAM, ["A dog. It runs home."] * 2),
    "flickr30k": ({"results_20130124.token": TOKEN}, MEN, None),
}


@pytest.mark.parametrize("source", RULERS)
def test_rulers(source, tree, tmp_path):
    files, images, captions = RULERS[source]
    for file, content in files.items():
        tree(f"set/{file}", content)
    for image in images:
        tree(f"set/{image}")
    assert rulers.below(tmp_path)[source] == rulers.below(tmp_path / "set")[source]
    pairs = usable(load_pairs(source, rulers.below(tmp_path)[source], "test"), len(images))
    pairs = pairs.sort_values("key")
    assert pairs.image.tolist() == [str(tmp_path / "set" / image) for image in images]
    if captions:
        assert pairs.long.tolist() == captions
    else:  # five short ones
        assert pairs.captions.tolist() == [[f"Men {k} ." for k in range(5)]] * 2
    with pytest.raises(ValueError, match=f"{source} has no split 'train': it is a test set"):
        load_pairs(source, tmp_path / "set")


def test_a_ruler_says_what_it_cannot_read(tree, tmp_path):
    assert {*rulers.below(None).values()} == {*rulers.below(tmp_path).values()} == {None}
    with pytest.raises(FileNotFoundError, match="no docci_descriptions.* that holds docci: "):
        load_pairs("docci", tmp_path, "test")
    good = {"split": "test", "image_file": "a.jpg", "description": "A wall."}
    bad = [{**good, "description": None}, {**good, "image_file": "../b.jpg"}, {"split": "test"}]
    tree("docci_descriptions.jsonlines", "\n".join([*map(json.dumps, [good, *bad]), "{"]))
    problems = load_pairs("docci", tmp_path, "test").problem
    reasons = ["no text", "outside", "KeyError", "JSON"]
    for problem, reason in zip(problems[1:], reasons, strict=True):
        assert reason in problem and "docci_descriptions.jsonlines)" in problem
    tree("docci_descriptions.jsonlines", "{")
    with pytest.raises(ValueError, match="not laid out as published: it has no readable row"):
        load_pairs("docci", tmp_path, "test")


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


def test_a_folder_without_splits_is_split_by_name(tree, tmp_path):
    names = [f"{i}.jpg" for i in range(200)]
    for name in names:
        tree(name)
    rows = [f'{name},"A dog, {name}."\n' for name in names]
    tree("metadata.csv", "".join(["image,caption\n", *rows]))
    splits = [load_pairs("folder", tmp_path, split) for split in ("train", "val", "test")]
    assert [len(usable(table, len(table))) for table in splits] == [159, 23, 18]
    assert sorted(sum((table.key.tolist() for table in splits), [])) == sorted(names)
    assert splits[0].long[0] == f"A dog, {splits[0].key[0]}."


TABLES = [  # of a folder, each with one row of train, "a.jpg", "a red, dog"
    "image;caption;split\na.jpg;a red, dog;Train\nb.jpg;x;validation\n",
    "file_name\ttext\ta\tsplit\na.jpg\ta red, dog\t\ttrain\n\nb.jpg\tx\t\tVal",
    '\nimage,caption,file_name,split\nz.jpg,"a red, dog",a.jpg,\nb.jpg,x,b.jpg,val\n',
    'image,caption,split\r\na.jpg,"a red, dog",train,,\r\nb.jpg,x,val,,\r\n',
    '{"image": "a.jpg", "caption": "a red, dog"}\n{"image": "b.jpg", "text": "x", "split": "val"}',
]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("text", TABLES)
def test_a_table_as_people_write_it(text, encoding, tree, tmp_path):
    tree("metadata.jsonl" if "{" in text else "metadata.csv", text.encode(encoding))
    for split, name, caption in (("train", "a.jpg", "a red, dog"), ("val", "b.jpg", "x")):
        table = load_pairs("folder", tmp_path, split)
        assert table[["key", "long"]].to_numpy().tolist() == [[name, caption]]
    with pytest.raises(ValueError, match="no readable row of the split test"):
        load_pairs("folder", tmp_path, "test")


@pytest.mark.parametrize("split", [None, ""])
def test_empty_splits_are_none(split, tree, tmp_path):
    rows = [item(f"{i}.jpg", "A dog.", split=split) for i in (3, 4, 5)]
    tree("metadata.jsonl", "\n".join(map(json.dumps, rows)))
    assert load_pairs("folder", tmp_path).key.tolist() == ["3.jpg"]  # as the names' hashes say
    assert load_pairs("folder", tmp_path, "test").key.tolist() == ["4.jpg", "5.jpg"]
    problem = r"no row has a split, and the names put none of 3 into val: give rows a split \("
    with pytest.raises(ValueError, match=problem):
        load_pairs("folder", tmp_path, "val")


BAD_TABLES = {
    "image,caption\na.jpg,a red, dog\n": "more fields than the header: put a text with ',' in",
    "photo,description\na.jpg,a dog\n": "no file_name or image among its names: photo, description",
    '[{"image": "a.jpg"},\n{"image": "b.jpg"}]': "one array: write one object a line",
    '{"image": "a.jpg", "title": "x"}': "no long or text or caption among its names: image, title",
}


@pytest.mark.parametrize("text", BAD_TABLES)
def test_a_table_says_what_it_lacks(text, tree, tmp_path):
    file = "metadata.jsonl" if "{" in text else "metadata.csv"
    tree(file, text)
    with pytest.raises(ValueError, match=f"{file} .*{BAD_TABLES[text]}"):
        load_pairs("folder", tmp_path)


def test_a_table_that_is_not_unicode_names_the_row(tree, tmp_path):
    tree("metadata.csv", "image,caption\na.jpg,a dog\nb.jpg,un garçon\n".encode("latin-1"))
    table = load_pairs("folder", tmp_path)
    assert table.problem.str.contains(r"not Unicode: save the file as UTF-8 \(row 2").sum() == 1


ITEM = conversation("../../etc/passwd", "x")
COCO, SHARE = "annotations/captions_train2017.json", "sharegpt4v.json"
META = "metadata.jsonl"
BAD_FILES = [
    ("sharegpt4v", SHARE, [ITEM] * 2001, "'../../etc/passwd' lies outside of the data folder"),
    ("sharegpt4v", SHARE, [ITEM] * 2000, "/sharegpt4v.json .*no readable row of the split train"),
    ("folder", META, '{"f', r"JSONDecode.* \(line 1 of /.*/metadata"),
    ("flickr8k", "flickr8k_64px_train.parquet", "PAR1", "_train.parquet is not laid out as publi"),
    ("coco", COCO, {"images": []}, "is not laid out as published: KeyError 'annotations'"),
    ("karpathy", "dataset_coco.json", "[1, 2", "is not laid out as published: JSONDecodeError"),
]


@pytest.mark.parametrize("source, file, content, problem", BAD_FILES)
def test_bad_files(source, file, content, problem, tree, tmp_path, monkeypatch):
    """Missing, or not as published."""
    monkeypatch.chdir(tmp_path)
    missing = (
        r"no .*(dataset_\*|share-.*\*|captions_train2017|metadata).(jsonl?|csv)|flickr8k.*parquet"
    )
    for root, name in ((tmp_path, tmp_path), ("deep/..", tmp_path), (None, "")):
        with pytest.raises(FileNotFoundError, match=f"({missing}) in .{name}.: set the parameter"):
            load_pairs(source, root)
    tree(file, content)
    with pytest.raises(ValueError, match=problem):
        load_pairs(source, tmp_path)


def test_cifar(tmp_path, monkeypatch):
    missing = f"no complete {CIFAR100.base_folder}/ in '{tmp_path}': unpack http"
    with pytest.raises(FileNotFoundError, match=missing):
        classes("cifar100", tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    found = SimpleNamespace(data=pixels, classes=["aquarium_fish", "bird"], targets=[1, 0])
    monkeypatch.setattr(published, "CIFAR10", lambda root, train: found)
    table, names = classes("cifar10", tmp_path)
    assert names == ["aquarium fish", "bird"] and table.label.tolist() == [1, 0]
    seen = [read_image(image).permute(1, 2, 0) for image in table.image]
    assert np.array_equal(seen, pixels)


def test_imagenet(tree, tmp_path, monkeypatch):
    monkeypatch.setattr(published, "IMAGENET_CLASSNAMES", ["tench", "goldfish"])
    for name in (".DS_Store", "n0/Thumbs.db", "n1/ILSVRC2012_val_00000293.JPEG", "n1/._1.JPEG"):
        tree(f"val/{name}")
    table, names = classes("imagenet", tmp_path)
    assert names == ["tench", "goldfish"] and table.label.tolist() == [1]
    assert table.image.tolist() == [str(tmp_path / "val/n1/ILSVRC2012_val_00000293.JPEG")]
    shutil.rmtree(tmp_path / "val/n0")
    with pytest.raises(FileNotFoundError, match="/val has 1 class folders .*ImageNet's 1000"):
        classes("imagenet", tmp_path)


def item(name, text, **more):
    return {"file_name": name, "text": text, **more}


LINES = [item("a.jpg", "a dog.\u2028It runs"), "", item("b.jpg", None), " \r", '{"text"', "null"]
LINES += [json.dumps(item("f.jpg", "x\u2028y\x85z", split=None), ensure_ascii=False) + "\r"]
LINES += [item("c.jpg", "\ud83d dog"), item("../d.jpg", "x"), item(5, "x")]
LINES += [item("e.jpg", "x", split="dev"), item("h.jpg", " ."), item("i", ["x"])]
LINES = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in LINES)
LINES_BAD = {"b.jpg": "None is no text (line 3 ", "line 5": "JSONDecode", "line 6": "NoneType"}
LINES_BAD |= {
    "c.jpg": "not Unicode: save the file as UTF-8 (line 8 ",
    "../d.jpg": "outside of the data folder",
}
LINES_BAD |= {"line 10": "5 is no text", "line 11": "split 'dev' is unknown"}
LINES_BAD |= {"h.jpg": "empty: [' .'] (line 12 ", "i": "['x'] is no text"}
NOTES = [{"image_id": i, "caption": None if i == 3 else f"a dog {i}"} for i in range(5)] + [5, {}]
IMAGES = [{"id": i, "file_name": f"{i}.jpg"} for i in range(5)] + [{"id": 7}, {"file_name": "8"}]
COCO_BAD = {"3.jpg": "None is no text (image 3 ", "image 5": "KeyError 'file_name'", "8": "'id'"}
COCO_BAD |= {"annotation 5": "TypeError", "annotation 6": "KeyError 'image_id'"}
SAID = {"sentences": [{"raw": "a dog"}], "split": "restval", "filename": "a.jpg"}
ITEMS = [SAID, {**SAID, "sentences": [{}]}, {**SAID, "split": "dev"}, None]
ITEMS_BAD = {"a.jpg": "KeyError 'raw' (image 1 ", "image 2": "'dev' is unknown", "image 3": ""}
TALKS = [{}] * 2000 + [conversation("a.jpg", "A dog."), conversation("b.jpg", None), None]
TALKS_BAD = {"b.jpg": "None is no text (item 2001 ", "item 2002": "TypeError"}
PHOTOS = {"a.jpg": ["a dog"], None: ["x"], "c.jpg": None, "d.jpg": [], "e.jpg": ["a dog", None]}
PHOTOS = pd.DataFrame({"filename": [*PHOTOS], "captions": [*PHOTOS.values()], "image": b"?"})
PHOTOS_BAD = {"row 1": " is no text", "c.jpg": "TypeError", "d.jpg": "empty: ", "e.jpg": "None is"}
BAD_ROWS = {  # file, content, keys of the rows that can be read, key and reason of the others
    "folder": (META, LINES, ["a.jpg", "f.jpg"], LINES_BAD),
    "coco": (COCO, {"images": IMAGES, "annotations": NOTES}, list("0124"), COCO_BAD),
    "karpathy": ("dataset_coco.json", {"images": ITEMS}, ["a.jpg"], ITEMS_BAD),
    "sharegpt4v": (SHARE, TALKS, ["a.jpg"], TALKS_BAD),
    "flickr8k": ("flickr8k_64px_train.parquet", PHOTOS.to_parquet(), ["a.jpg"], PHOTOS_BAD),
}


@pytest.mark.parametrize("source", BAD_ROWS)
def test_a_bad_row_is_left_out_by_name(source, tree, tmp_path):
    file, content, good, bad = BAD_ROWS[source]
    tree(file, content)
    pairs = load_pairs(source, tmp_path)
    pairs["image"] = encoded(Image.new("RGB", (8, 8)), "PNG")
    table, report = clean_pairs(pairs)
    assert [key.removesuffix(".jpg") for key in table.key] == [x.removesuffix(".jpg") for x in good]
    assert "problem" not in table and len(pairs) == len(good) + len(bad) == len(good) + len(report)
    problems = report.set_index(report.key.str.removesuffix(f" of {tmp_path / file}")).problem
    for key, reason in bad.items():
        assert problems[key].startswith("unreadable row, left out: ") and reason in problems[key]
        assert problems[key].endswith(f" of {tmp_path / file})")
    if source in ("folder", "karpathy"):  # what has no split counts once
        with pytest.raises(ValueError, match="no readable row of the split val$"):
            load_pairs(source, tmp_path, "val")


JUNK = [".DS_Store", "Thumbs.db", "desktop.ini", "__MACOSX/._x.jpg", ".ipynb_checkpoints/x.txt"]


def test_what_operating_systems_add_is_not_data(tree, tmp_path):
    for folder, name in product(("image", "caption"), [*JUNK, "._1.txt", "._1.jpg"]):
        tree(f"{folder}/{name}")
    tree("image/1.jpg")
    tree("caption/1.txt", "\ufeffA street.")
    pairs = load_pairs("urban1k", tmp_path, "test")
    assert pairs[["key", "long"]].to_numpy().tolist() == [["1", "A street."]]
    for name in ("dataset_coco.json", "._dataset_coco.json"):
        tree(f"karpathy/{name}", {"images": [SAID]})
    for name in ("photos", ".ipynb_checkpoints", "__MACOSX"):
        (tmp_path / "karpathy" / name).mkdir()
    assert load_pairs("karpathy", tmp_path / "karpathy").image[0].endswith("/karpathy/photos/a.jpg")


def test_a_data_root_is_made_absolute_once(tree, tmp_path, monkeypatch):
    tree("home/data/metadata.jsonl", item("a.jpg", "a dog"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "home")
    for root in ("~/data", "../home/data", Path("data")):
        monkeypatch.delenv("JETTCLIP_DATA", raising=False)
        tables = [load_pairs("folder", root)]
        monkeypatch.setenv("JETTCLIP_DATA", str(root))
        for table in (*tables, load_pairs("folder"), load_pairs("folder", "")):
            assert table.image[0] == str(tmp_path / "home/data/a.jpg")
    with pytest.raises(FileNotFoundError, match=f"in '{tmp_path}/home/data'"):
        load_pairs("collage", "~/data", n=1)
    for source, found in (("imagenet", "data/val has 0 class"), ("cifar10", "data': unpack")):
        with pytest.raises(FileNotFoundError, match=f"{tmp_path}/home/{found}"):
            classes(source, "~/data")


text = st.text(st.characters(codec="utf-8") | st.just("\ud83d"), max_size=20)


@given(st.lists(text, max_size=4), st.booleans(), st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]))
@settings(deadline=None, max_examples=40)
def test_a_caption_comes_back_as_written_or_is_left_out(texts, ascii, encoding):
    rows = [item(f"{i}.jpg", text) for i, text in enumerate(["a dog", *texts])]
    rows = [row | {"split": "train"} for row in rows]
    lines = "\n".join(json.dumps(x, ensure_ascii=ascii or encoding == "utf-16") for x in rows)
    with tempfile.TemporaryDirectory() as root:
        (Path(root) / META).write_bytes(lines.encode(encoding, "surrogatepass"))
        pairs = load_pairs("folder", root)
        pairs.to_parquet(Path(root) / "pairs.parquet")
    bad = pairs.get("problem", pd.Series(index=pairs.index, dtype=object)).notna()
    empty = [not row["text"].replace(".", "").strip() for row in rows]
    assert bad.tolist() == [x or "\ud83d" in y["text"] for x, y in zip(empty, rows, strict=True)]
    assert pairs.long[~bad].tolist() == [rows[i]["text"] for i in pairs.index[~bad]]
