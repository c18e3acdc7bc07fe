"""Sources give equal tables, bad rows are named, and a stored crop shows the same pixels again."""

import hashlib
import io
import pickle
from itertools import islice, product
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import tiny_model
from PIL import Image

import jettclip
from jettclip import data
from jettclip.data import COLUMNS, PairDataset, clean_pairs, draw_crops, load_pairs, read_image
from jettclip.datasets.published import encoded
from jettclip.inputs import digest
from jettclip.models import transforms

FIVE = ["A dog runs .", "a brown dog", "Two dogs", "The dog jumps over a log.", "A wet dog "]


def jpeg(size=(20, 16), colour=(200, 30, 30)):
    return encoded(Image.new("RGB", size, colour), "JPEG")


@pytest.fixture
def flickr8k(tmp_path):
    """A folder of images at two sizes, of which the smaller are read, with five captions each."""
    for size, (split, n) in product((160, 128), {"train": 8, "test": 12}.items()):
        images = [jpeg((size, size), (20 * i, 0, 0)) for i in range(n)]
        table = pd.DataFrame({"image": images, "split": split}, index=range(n))
        table["filename"] = [f"{i}.jpg" for i in range(n)]
        table["captions"] = [[f"{i} {text}" for text in FIVE] for i in range(n)]
        table.to_parquet(tmp_path / f"flickr8k_{size}px_{split}.parquet")
    return tmp_path


def test_scenes():
    draws = product((3, 4), ("train", "val", "test"))
    tables = [load_pairs("scenes", None, split, 5, seed, image_size=32) for seed, split in draws]
    assert list(tables[0].columns) == COLUMNS and set(tables[1].split) == {"val"}
    assert pd.concat(tables).long.nunique() == 30
    with pytest.raises(ValueError, match="data source 'scene' is unknown: did you mean 'scenes'"):
        load_pairs("scene")
    with pytest.raises(ValueError, match="scenes has one caption of each image"):
        load_pairs("scenes", n=3, draws=2)


def test_details_where_the_source_knows_of_them(flickr8k):
    scenes = data.load_details("scenes", n=5, seed=1, image_size=32)
    assert read_image(scenes.other_image[0]).shape == (3, 32, 32)
    collages = data.load_details("collage", flickr8k, 5, image_size=48)
    assert set(scenes.columns) == set(collages.columns) and len(scenes) == len(collages) == 5
    assert data.load_details("flickr8k", flickr8k) is None


def test_flickr8k(flickr8k, monkeypatch):
    pairs = load_pairs("flickr8k", flickr8k)
    assert list(pairs.columns) == [*COLUMNS, "captions"] and set(pairs.split) == {"train"}
    assert list(pairs.key) == [f"{i}.jpg" for i in range(8)] and len(pairs.captions[3]) == 5
    assert read_image(pairs.image[0]).shape == (3, 128, 128)
    sentences = ["3 A dog runs", "3 A wet dog", "3 The dog jumps over a log", "3 Two dogs"]
    assert sorted(pairs.long[3].removesuffix(".").split(". ")) == [*sentences, "3 a brown dog"]
    assert pairs.long[3].startswith(pairs.short[3] + ". ") and not pairs.short[3].endswith(".")
    assert len({short.split(" ", 1)[1] for short in pairs.short}) > 1  # orders differ
    monkeypatch.setenv("JETTCLIP_DATA", str(flickr8k))
    assert load_pairs("flickr8k").equals(pairs) and load_pairs("flickr8k", root="").equals(pairs)
    assert load_pairs("flickr8k", n=3).equals(pairs.head(3))
    assert not load_pairs("flickr8k", seed=1).long.equals(pairs.long)


def test_captions_in_other_orders(flickr8k):
    pairs = load_pairs("flickr8k", flickr8k, draws=3)
    assert pairs[COLUMNS].equals(load_pairs("flickr8k", flickr8k)[COLUMNS])
    for longs, shorts in zip(pairs.longs, pairs.shorts, strict=True):
        orders = [sorted(long.removesuffix(".").split(". ")) for long in longs]
        assert len(orders) == 3 and orders[0] == orders[1] == orders[2]
        assert all(long.startswith(short + ".") for long, short in zip(longs, shorts, strict=True))
    assert any(len(set(longs)) > 1 for longs in pairs.longs)
    dataset = PairDataset(pairs, 16, 77, draw_crops(8, 4, seed=0), draws=True)
    second = PairDataset(pairs.assign(long=pairs.longs.str[1], short=pairs.shorts.str[1]), 16, 77)
    for k, expected in ((0, dataset), (1, second), (3, dataset)):  # crop 3 begins again
        assert torch.equal(dataset[5, k][3], expected.long[5])
        assert torch.equal(dataset[5, k][4], expected.short[5])


def test_clean_pairs():
    cases = {
        "truncated": (jpeg()[:-100], "long", "short"),
        "no file": ("there/is/none.jpg", "long", "short"),
        "good": (jpeg(), "long", "short"),
        "empty": (jpeg(), "", "short"),
        "full stops": (jpeg(), "long", " . ."),
        "no caption": (jpeg(), float("nan"), None),
        "exact": (jpeg(), "dog " * 246, "short"),
        "too long": (jpeg(), "dog " * 247, "short"),
    }
    table = pd.DataFrame([(*row, "train", key) for key, row in cases.items()], columns=COLUMNS)
    usable, report = clean_pairs(table)
    assert list(usable.key) == ["good", "exact", "too long"] and list(usable.index) == [0, 1, 2]
    assert list(usable.digest) == [digest(jpeg())] * 3
    assert list(report.key[:2]) == list(cases)[:2]
    assert report.problem[:2].str.startswith("unreadable image, left out: ").all()
    assert (report.key + ": " + report.problem)[2:].tolist() == [
        "empty: empty long caption, left out",
        "full stops: empty short caption, left out",
        "no caption: empty long caption, left out",
        "no caption: empty short caption, left out",
        "too long: long caption of 249 tokens, truncated to 248",
    ]
    nothing, report = clean_pairs(table[:0])
    assert len(nothing) == len(report) == 0 and list(nothing.columns) == [*COLUMNS, "digest"]


def test_fingerprint_is_of_contents(tmp_path):
    """Files in another folder are the same data; other files, captions or orders are not."""
    table = data.load_pairs("scenes", None, n=3, image_size=16)
    names = [[str(tmp_path / f"{folder}{i}.png") for i in range(3)] for folder in "ab"]
    for name, image in zip(sum(names, []), [*table.image] * 2, strict=True):
        Path(name).write_bytes(image)
    here, there = (table.assign(image=images) for images in names)
    expected = data.fingerprint(table)
    digests = [hashlib.blake2b(image, digest_size=16).hexdigest() for image in table.image]
    checked = here.assign(digest=digests, image="is not read again")
    assert {*map(data.fingerprint, (here, there, checked, clean_pairs(there)[0]))} == {expected}
    assert PairDataset(here, 16).fingerprint == PairDataset(there, 16).fingerprint
    changed = [table[::-1], table[:2], table.assign(long=table.short), checked[::-1], there]
    Path(names[1][1]).write_bytes(table.image[0])  # another image under the same name
    assert len({expected, *map(data.fingerprint, changed)}) == 5  # two are in reverse order


def test_a_photograph_without_captions_is_in_no_collage(flickr8k, monkeypatch):
    path = flickr8k / "flickr8k_128px_test.parquet"
    photos = pd.read_parquet(path)
    photos.at[3, "captions"] = None
    photos.at[5, "image"] = b"no image"
    photos.at[7, "captions"] = ["the only caption"]
    photos.to_parquet(path)
    pairs, report = clean_pairs(load_pairs("collage", flickr8k, "test", 20, image_size=48))
    assert len(pairs) == 20 and set(report.key) == {"3.jpg", "5.jpg"}
    shown = " ".join(pairs.long)
    assert "the only caption" in shown and " 3 a" not in shown and " 5 a" not in shown
    assert len(data.load_details("collage", flickr8k, 5, image_size=48)) == 5


def test_draw_crops():
    boxes = draw_crops(400, 3, seed=1, smallest=0.3, flip=True)
    assert boxes.shape == (400, 3, 4) and boxes.dtype == np.float32
    side, place, flips = boxes[..., 0], boxes[..., 1:3], boxes[..., 3]
    assert 0.3 <= (side**2).min() < 0.32 and 0.98 < side.max() <= 1
    assert place.min() >= 0 and place.max() <= 1
    assert 0.45 < flips.mean() < 0.55 and set(flips.flat) == {0, 1}
    for seed in (1, 2):
        again = draw_crops(400, 3, seed, smallest=0.3, flip=True)
        assert np.array_equal(boxes, again) == (seed == 1)


def test_crop_by_hand():
    image = torch.arange(12, dtype=torch.uint8).view(1, 3, 4).expand(3, 3, 4) * 20
    # 2 x 2 of 3 x 4 pixels, from row 1 and column 2, as they are and flipped
    for flip, seen in ((0, [[120, 140], [200, 220]]), (1, [[140, 120], [220, 200]])):
        box = np.array([0.5, 0.5, 0.99, flip], np.float32)
        assert data.crop(image, box, 2).tolist() == [seen] * 3
    assert data.crop(image[:, :1], (0.5, 1, 1, 0), 8).shape == (3, 8, 8)
    for box in draw_crops(2, 3, seed=0).reshape(-1, 4):
        assert torch.equal(data.crop(image, box, 4), data.crop(image, (1, 0, 0, 0), 4))  # the whole


def test_dataset(table):
    boxes = draw_crops(len(table), 3, seed=0, smallest=0.5, flip=True)
    dataset = PairDataset(table, 16, context_length=77, crops=boxes)
    row, k, image, long, short = dataset[4, 2]
    assert (row, k) == (4, 2) and dataset.keys[4] == table.key[4]
    assert torch.allclose(image, data.crop(read_image(table.image[4]), boxes[4, 2], 16) / 255)
    assert long.shape == short.shape == (77,) and long[-1] == 49407  # truncated
    assert torch.equal(long[1:12], short[1:12])  # begins with the same words


def test_pixels_are_those_of_the_models_transform(table):
    teacher = jettclip.create_model("LongCLIP-B", vision_layers=1, text_layers=1)
    for model in (tiny_model(), teacher):
        expected = transforms(model.config)[1](Image.open(io.BytesIO(table.image[3])))
        seen = data.dataset_for(model, table)[3, 0][2]
        assert torch.allclose(seen, expected, atol=2 / 255 / 0.26)


def test_a_large_table_is_read_by_workers(flickr8k, monkeypatch, tmp_path):
    """No worker is a fork of this process, which may have threads, or gets the whole table."""
    pairs = load_pairs("flickr8k", flickr8k, draws=2)
    paths = [tmp_path / f"{i}.jpg" for i in range(8)]
    for path, image in zip(paths, pairs.image, strict=True):
        path.write_bytes(image)
    pairs["image"] = list(map(str, paths))
    crops = draw_crops(8, 3, seed=0, smallest=0.5)
    kept = PairDataset(pairs, 16, 77, crops, draws=True)
    monkeypatch.setattr(data, "IN_MEMORY", 1000)
    monkeypatch.delattr("os.fork", raising=False)
    read = PairDataset(pairs, 16, 77, crops, draws=True)
    assert kept.in_memory and not read.in_memory
    batches = data.epoch_batches(8, 2, 0, 0, crops=3)
    for expected, batch in zip(data.loader(kept, batches), data.loader(read, batches), strict=True):
        assert all(map(torch.equal, expected, batch))
    assert all(map(np.array_equal, kept[5, 2], read[5, 2]))
    assert len(pickle.dumps(read.part(batches[0]))) < 0.7 * len(pickle.dumps(read))


def test_a_changed_image_is_noticed(table, tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    path.write_bytes(table.image[0])
    checked, _ = clean_pairs(table[:2].assign(image=str(path)))
    monkeypatch.setattr(data, "IN_MEMORY", 0)
    dataset = PairDataset(checked, 16)
    dataset[1, 0]
    changed = f"the image of {checked.key[1]!r} changed since notebook 00 checked it: run notebook"
    path.write_bytes(table.image[1])
    with pytest.raises(RuntimeError, match=rf"{changed} 00 again \({path}: other contents\)"):
        dataset[1, 0]
    path.unlink()
    with pytest.raises(RuntimeError, match=rf"{changed} 00 again \({path}: No such file"):
        dataset[1, 0]


def test_nothing_and_little(table):
    assert data.epoch_batches(3, 8, 0, 0).shape == (0, 8, 2) and data.in_order(0, 8) == []
    assert draw_crops(0, 2, seed=0).shape == (0, 2, 4)
    for draws in (False, True):
        dataset = PairDataset(table[:0].assign(longs=[], shorts=[]), 32, draws=draws)
        assert len(dataset) == 0 and dataset.long.shape == (0, 248)
        assert list(data.loader(dataset, data.in_order(0, 8))) == []


def test_epoch_batches():
    batches = data.epoch_batches(50, 8, seed=1, epoch=2, crops=3)
    assert batches.shape == (6, 8, 2)
    rows, ks = batches.reshape(-1, 2).T
    assert len(set(rows)) == 48 and set(rows) <= set(range(50)) and set(ks) == {0, 1, 2}
    for seed, epoch in ((1, 2), (1, 3), (2, 2)):
        again = data.epoch_batches(50, 8, seed, epoch, crops=3)
        assert np.array_equal(batches, again) == ((seed, epoch) == (1, 2))
    assert sorted(data.epoch_batches(48, 8, 1, 2)[..., 0].flat) == list(range(48))


def test_loader_follows_its_batches(dataset):
    expected = [[[0, 1], [1, 1]], [[2, 1], [3, 1]], [[4, 1]]]
    assert [batch.tolist() for batch in data.in_order(5, 2, k=1)] == expected
    batches = list(data.loader(dataset, [[(3, 0), (1, 0)], [(20, 0)]]))
    assert [rows.tolist() for rows, *_ in batches] == [[3, 1], [20]]
    for i, row in enumerate((3, 1)):
        assert all(torch.equal(batches[0][j][i], dataset[row, 0][j]) for j in (2, 3, 4))


def test_threads_read_ahead():
    """In order, not all at once, and with the error of one where it belongs."""
    asked = []
    read = data.ahead(lambda x: asked.append(x) or 6 // x, [*range(3, 30), 0, 1], 2)
    assert next(read) == 2 and len(asked) < 8
    assert list(islice(read, 26)) == [1, 1, 1] + [0] * 23
    with pytest.raises(ZeroDivisionError):
        next(read)


def test_subsets_leave_out_the_first_sentence():
    table = data.pd.DataFrame({"long": ["A b. C d. E f. G h.", "Only one."]})
    table = data.with_subsets(table, 20)
    assert table.longs[0] == ["A b. C d. E f. G h."] * 20 and set(table.shorts[1]) == {"Only one."}
    possible = {"C d.", "E f.", "G h.", "C d. E f.", "C d. G h.", "E f. G h.", "C d. E f. G h."}
    assert len(set(table.shorts[0])) > 3 and set(table.shorts[0]) <= possible
    assert table.equals(data.with_subsets(table[["long"]], 20))


def test_padding_in_front():
    tokens = torch.tensor([[5, 1, 9, 0, 0], [5, 9, 0, 0, 0], [5, 1, 2, 3, 9]])
    expected = [[0, 0, 5, 1, 9], [0, 0, 0, 5, 9], [5, 1, 2, 3, 9]]
    assert data.pad_front(tokens).tolist() == expected
