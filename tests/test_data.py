"""Every source gives the same table, bad rows are named, and a stored crop shows the same pixels again."""

import io
import zlib

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import tiny_model
from PIL import Image

import jettclip
from jettclip import data
from jettclip.data import (
    COLUMNS,
    PairDataset,
    _extent,
    clean_pairs,
    crop,
    dataset_for,
    draw_crops,
    epoch_batches,
    in_order,
    load_details,
    load_pairs,
    loader,
    read_image,
)
from jettclip.models import transforms

FIVE = ["A dog runs .", "a brown dog", "Two dogs", "The dog jumps over a log.", "A wet dog "]


def encoded(image, form="PNG", **options):
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def jpeg(size=(20, 16), colour=(200, 30, 30)):
    return encoded(Image.new("RGB", size, colour), "JPEG")


# ---- sources


def test_scenes():
    pairs = load_pairs("scenes", split="val", n=5, seed=3, image_size=32)
    assert list(pairs.columns) == COLUMNS and len(pairs) == 5 and set(pairs.split) == {"val"}
    assert pairs.equals(load_pairs("scenes", split="val", n=5, seed=3, image_size=32))
    assert read_image(pairs.image[0]).shape == (3, 32, 32)
    captions = [
        set(load_pairs("scenes", split=split, n=5, seed=seed).long)
        for seed in (3, 4)
        for split in ("train", "val", "test")
    ]
    assert len(set.union(*captions)) == 30


def test_details_where_the_source_knows_of_them(tmp_path):
    scenes = load_details("scenes", n=5, seed=1, image_size=32)
    assert read_image(scenes.other_image[0]).shape == (3, 32, 32) and len(scenes) == 5
    photos = [
        (jpeg(colour=(20 * i, 0, 0)), f"{i}.jpg", [f"{i} {caption}" for caption in FIVE], "test")
        for i in range(12)
    ]
    pd.DataFrame(photos, columns=["image", "filename", "captions", "split"]).to_parquet(
        tmp_path / "flickr8k_128px_test.parquet"
    )
    collages = load_details("collage", tmp_path, 5, image_size=48)
    assert set(scenes.columns) == set(collages.columns) and len(collages) == 5
    assert load_details("flickr8k", tmp_path) is None


@pytest.mark.parametrize(
    "arguments, problem",
    [
        ({"source": "scene"}, "data source 'scene' is unknown: did you mean 'scenes'"),
        ({"source": "flikr8k"}, "did you mean 'flickr8k'"),
        ({"source": "scenes", "split": "valid"}, "split 'valid' is unknown: did you mean 'val'"),
        ({"source": "scenes"}, "say how many with n"),
    ],
)
def test_wrong_source_or_split(arguments, problem):
    with pytest.raises(ValueError, match=problem):
        load_pairs(**arguments)


@pytest.fixture
def flickr8k(tmp_path):
    """Eight images at two sizes, of which the smaller are to be read; -> the folder."""
    for pixels in (160, 128):
        rows = [
            (jpeg((pixels, pixels)), f"{i}.jpg", [f"{i} {caption}" for caption in FIVE], "train")
            for i in range(8)
        ]
        table = pd.DataFrame(rows, columns=["image", "filename", "captions", "split"])
        table.to_parquet(tmp_path / f"flickr8k_{pixels}px_train.parquet")
    return tmp_path


@pytest.fixture(autouse=True)
def no_data_folder(monkeypatch):
    monkeypatch.delenv("JETTCLIP_DATA", raising=False)


def test_flickr8k(flickr8k, monkeypatch):
    pairs = load_pairs("flickr8k", flickr8k)
    assert (
        list(pairs.columns) == [*COLUMNS, "captions"]
        and len(pairs) == 8
        and len(pairs.captions[3]) == 5
        and set(pairs.split) == {"train"}
    )
    assert read_image(pairs.image[0]).shape == (3, 128, 128)
    assert list(pairs.key) == [f"{i}.jpg" for i in range(8)]
    assert sorted(pairs.long[3].removesuffix(".").split(". ")) == [
        "3 A dog runs",
        "3 A wet dog",
        "3 The dog jumps over a log",
        "3 Two dogs",
        "3 a brown dog",
    ]
    assert pairs.long[3].startswith(pairs.short[3] + ". ") and not pairs.short[3].endswith(".")
    assert (
        len({short.split(" ", 1)[1] for short in pairs.short}) > 1
    )  # each image has its own order

    monkeypatch.setenv("JETTCLIP_DATA", str(flickr8k))
    assert load_pairs("flickr8k").equals(pairs) and load_pairs("flickr8k", root="").equals(pairs)
    assert load_pairs("flickr8k", n=3).equals(pairs.head(3))
    assert not load_pairs("flickr8k", seed=1).long.equals(pairs.long)


def test_captions_in_other_orders(flickr8k):
    pairs = load_pairs("flickr8k", flickr8k, draws=3)
    assert pairs[COLUMNS].equals(load_pairs("flickr8k", flickr8k)[COLUMNS])
    parts = [
        [sorted(long.removesuffix(".").split(". ")) for long in longs] for longs in pairs.longs
    ]
    assert all(len(each) == 3 and each[0] == each[1] == each[2] for each in parts)
    assert any(len(set(longs)) > 1 for longs in pairs.longs)
    assert all(
        long.startswith(short + ".")
        for row in pairs.itertuples()
        for long, short in zip(row.longs, row.shorts)
    )
    dataset = PairDataset(pairs, 16, 77, draw_crops(8, 4, seed=0), draws=True)
    encode = PairDataset(pairs.assign(long=[longs[1] for longs in pairs.longs]), 16, 77)
    assert torch.equal(dataset[2, 1][3], encode.long[2])
    assert torch.equal(dataset[5, 3][3], dataset[5, 0][3]) and torch.equal(
        dataset[5, 3][4], dataset.short[5]
    )
    with pytest.raises(ValueError, match="scenes has no several captions of an image"):
        load_pairs("scenes", n=3, draws=2)


def test_flickr8k_missing(flickr8k, monkeypatch):
    with pytest.raises(
        FileNotFoundError, match="flickr8k_<size>px_test.parquet .*JETTCLIP_DATA.*columns"
    ):
        load_pairs("flickr8k", flickr8k, split="test")
    monkeypatch.chdir(flickr8k)
    with pytest.raises(FileNotFoundError, match="JETTCLIP_DATA"):
        load_pairs("flickr8k")  # files that lie around are not taken for what was asked
    path = flickr8k / "flickr8k_128px_train.parquet"
    pd.read_parquet(path).drop(columns="captions").to_parquet(path)
    with pytest.raises(
        ValueError, match=r"lacks the column\(s\) captions; it has image, filename, split"
    ):
        load_pairs("flickr8k", flickr8k)


# ---- cleaning


def test_clean_pairs():
    cases = {
        "good": (jpeg(), "a long caption", "a caption"),
        "truncated": (jpeg()[:-100], "a long caption", "a caption"),
        "zero bytes": (b"", "a long caption", "a caption"),
        "text": (b"<html>404 not found</html>", "a long caption", "a caption"),
        "none": (None, "a long caption", "a caption"),
        "no file": ("there/is/none.jpg", "a long caption", "a caption"),
        "empty": (jpeg(), "", "a caption"),
        "full stops": (jpeg(), "a long caption", " . ."),
        "no caption": (jpeg(), float("nan"), None),
        "exact": (jpeg(), "dog " * 246, "a caption"),
        "too long": (jpeg(), "dog " * 247, "a caption"),
        "short too long": (jpeg(), "a long caption", "dog " * 300),
    }
    table = pd.DataFrame([(*row, "train", key) for key, row in cases.items()], columns=COLUMNS)
    usable, report = clean_pairs(table)
    assert list(usable.key) == ["good", "exact", "too long", "short too long"]
    assert list(usable.index) == [0, 1, 2, 3]
    problems = report.groupby("key").problem.apply(list).to_dict()
    assert {
        key for key, problem in problems.items() if "unreadable image, left out" in problem[0]
    } == {"truncated", "zero bytes", "text", "none", "no file"}
    del (
        problems["truncated"],
        problems["zero bytes"],
        problems["text"],
        problems["none"],
        problems["no file"],
    )
    assert problems == {
        "empty": ["empty long caption, left out"],
        "full stops": ["empty short caption, left out"],
        "no caption": ["empty long caption, left out", "empty short caption, left out"],
        "too long": ["long caption of 249 tokens, truncated to 248"],
        "short too long": ["short caption of 302 tokens, truncated to 248"],
    }
    assert len(PairDataset(usable, 32)) == 4
    assert clean_pairs(usable.iloc[:1])[1].columns.tolist() == ["key", "problem"]


def test_clean_pairs_needs_all_columns(table):
    with pytest.raises(
        ValueError, match=r"lacks the column\(s\) short, key; it has image, long, split"
    ):
        clean_pairs(table.drop(columns=["short", "key"]))


# ---- images


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "LA", "1"])
def test_read_image(mode, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).convert(mode)
    data = encoded(image)
    expected = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    assert read_image(data).dtype == torch.uint8 and torch.equal(read_image(data), expected)
    (tmp_path / "image.png").write_bytes(data)
    assert torch.equal(read_image(tmp_path / "image.png"), expected)
    assert torch.equal(read_image(str(tmp_path / "image.png")), expected)


def test_read_image_of_16_bits():
    grey = np.array([[0, 257, 30000, 65535]], dtype=np.uint16)
    image = read_image(encoded(Image.fromarray(grey)))
    assert image.dtype == torch.uint8 and image[0].tolist() == image[2].tolist() == [
        [0, 1, 117, 255]
    ]


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_read_jpeg_as_pillow_does(mode):
    """Smooth pictures, as photographs are: all pixels within 1/255."""
    ramp = np.linspace(0, 255, 60)
    pixels = np.stack(
        [
            np.add.outer(ramp, ramp) / 2,
            np.add.outer(255 - ramp, ramp) / 2,
            np.add.outer(ramp, 255 - ramp) / 2,
        ],
        axis=2,
    )
    data = encoded(Image.fromarray(pixels.astype(np.uint8)).convert(mode), "JPEG", quality=95)
    expected = np.array(Image.open(io.BytesIO(data)).convert("RGB")).astype(int).transpose(2, 0, 1)
    assert np.abs(read_image(data).numpy().astype(int) - expected).max() <= 1


def test_decompression_bombs_are_refused_unread():
    chunk = lambda kind, body: (
        len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")
    )
    bomb = (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", (60_000).to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0]))
        + chunk(b"IDAT", b"")
    )
    with pytest.raises(
        (ValueError, Image.DecompressionBombError), match="60000 x 60000|exceeds limit"
    ):
        read_image(bomb)
    assert (
        clean_pairs(pd.DataFrame([(bomb, "a dog", "a dog", "train", "bomb")], columns=COLUMNS))[1]
        .problem[0]
        .startswith("unreadable image")
    )


def test_read_image_stands_upright():
    image = Image.new("RGB", (20, 10))
    exif = image.getexif()
    exif[0x0112] = 6  # orientation: turn by a quarter
    assert read_image(encoded(image, "JPEG", exif=exif)).shape == (3, 20, 10)


# ---- crops


def test_the_default_crop_is_the_whole_image():
    boxes = draw_crops(2, 3, seed=0)
    assert boxes.shape == (2, 3, 4) and boxes.dtype == np.float32
    image = torch.randint(256, (3, 30, 30), dtype=torch.uint8)
    assert all(torch.equal(crop(image, box, 30), image) for box in boxes.reshape(-1, 4))


@pytest.mark.parametrize("size", [(1, 1), (1, 10_000), (3, 2), (100, 57)])
def test_crops_lie_inside_the_image(size):
    boxes = draw_crops(400, 3, seed=1, smallest=0.3, flip=True)
    side, place, flips = boxes[..., 0], boxes[..., 1:3], boxes[..., 3]
    assert (
        0.3 <= (side**2).min() < 0.32
        and 0.98 < side.max() <= 1
        and 0 <= place.min()
        and place.max() <= 1
    )
    assert 0.45 < flips.mean() < 0.55 and set(flips.flat) == {0, 1}
    assert np.array_equal(boxes, draw_crops(400, 3, seed=1, smallest=0.3, flip=True))
    assert not np.array_equal(boxes, draw_crops(400, 3, seed=2, smallest=0.3, flip=True))
    for length in size:
        for share, at in [*zip(side.flat, place[..., 0].flat), (1.0, 1.0), (0.5, 1.0), (1.0, 0.0)]:
            extent, first = _extent(length, float(share), float(at))
            assert extent >= 1 and 0 <= first and first + extent <= length
    assert crop(torch.zeros(3, *size, dtype=torch.uint8), boxes[0, 0], 8).shape == (3, 8, 8)


def test_crop_by_hand():
    image = torch.arange(12, dtype=torch.uint8).view(1, 3, 4).expand(3, 3, 4) * 20
    seen = crop(image, (0.5, 0.5, 0.99, 0), 2)  # 2 x 2 of 3 x 4 pixels, from row 1 and column 2
    assert torch.equal(
        seen, torch.tensor([[120, 140], [200, 220]], dtype=torch.uint8).expand(3, 2, 2)
    )
    flipped = crop(image, np.array([0.5, 0.5, 0.99, 1], np.float32), 2)
    assert torch.equal(
        flipped, torch.tensor([[140, 120], [220, 200]], dtype=torch.uint8).expand(3, 2, 2)
    )


def test_dataset(table):
    boxes = draw_crops(len(table), 3, seed=0, smallest=0.5, flip=True)
    dataset = PairDataset(table, 16, context_length=77, crops=boxes)
    row, k, image, long, short = dataset[4, 2]
    assert (row, k) == (4, 2) and dataset.keys[4] == table.key[4]
    assert torch.allclose(image, crop(read_image(table.image[4]), boxes[4, 2], 16) / 255)
    assert long.shape == short.shape == (77,) and long[-1] == 49407  # cut
    assert torch.equal(long[1:12], short[1:12])  # begins with the same words
    whole = PairDataset(table, 32)
    assert torch.allclose(whole[4, 0][2], read_image(table.image[4]) / 255)


def test_a_models_own_pixels(table):
    """The cache's view of an image is that of the model's own transform."""
    model = tiny_model()
    teacher = jettclip.create_model("LongCLIP-B", vision_layers=1, text_layers=1)
    for one in (model, teacher):
        transform = transforms(one.config)[1]
        image = dataset_for(one, table)[3, 0][2]
        assert torch.allclose(
            image, transform(Image.open(io.BytesIO(table.image[3]))), atol=2 / 255 / 0.26
        )


@pytest.mark.parametrize("draws", [False, True])
def test_a_large_table_is_read_row_by_row(flickr8k, draws, monkeypatch, tmp_path):
    pairs = load_pairs("flickr8k", flickr8k, draws=2)
    pairs["image"] = [
        str(path)
        for path in (tmp_path / f"{i}.jpg" for i in range(8))
        if path.write_bytes(pairs.image[0])
    ]
    crops = draw_crops(8, 3, seed=0, smallest=0.5)
    kept = PairDataset(pairs, 16, 77, crops, draws)
    monkeypatch.setattr(data, "IN_MEMORY", 1000)
    read = PairDataset(pairs, 16, 77, crops, draws)
    assert kept.in_memory and not read.in_memory
    batches = epoch_batches(8, 4, 0, 0, crops=3)
    for one, other in zip(
        loader(kept, batches), loader(read, batches), strict=True
    ):  # by worker processes
        assert all(torch.equal(a, b) for a, b in zip(one, other))
    for one, other in zip(kept[5, 2], read[5, 2]):
        assert np.array_equal(one, other)
    (tmp_path / "0.jpg").unlink()
    with pytest.raises(
        RuntimeError, match="the image of '0.jpg' was readable when the data was checked"
    ):
        list(loader(read, in_order(8, 8)))


# ---- batches


def test_epoch_batches():
    batches = epoch_batches(50, 8, seed=1, epoch=2, crops=3)
    assert batches.shape == (6, 8, 2)
    pairs = [tuple(pair) for pair in batches.reshape(-1, 2).tolist()]
    assert len({row for row, _ in pairs}) == 48 and {row for row, _ in pairs} <= set(range(50))
    assert {k for _, k in pairs} == {0, 1, 2}
    torch.manual_seed(5)
    np.random.seed(5)
    assert np.array_equal(batches, epoch_batches(50, 8, seed=1, epoch=2, crops=3))
    assert not np.array_equal(batches, epoch_batches(50, 8, seed=1, epoch=3, crops=3))
    assert not np.array_equal(batches, epoch_batches(50, 8, seed=2, epoch=2, crops=3))
    assert sorted(row for batch in epoch_batches(48, 8, 1, 2) for row, _ in batch) == list(
        range(48)
    )


def test_loader_follows_its_batches(dataset):
    assert [batch.tolist() for batch in in_order(5, 2, k=1)] == [
        [[0, 1], [1, 1]],
        [[2, 1], [3, 1]],
        [[4, 1]],
    ]
    batches = [[(3, 0), (1, 0)], [(20, 0)]]
    seen = list(loader(dataset, batches))
    assert [rows.tolist() for rows, *_ in seen] == [[3, 1], [20]]
    rows, ks, images, long, short = seen[0]
    assert ks.tolist() == [0, 0] and images.shape == (2, 3, 32, 32)
    assert torch.equal(images[1], dataset[1, 0][2])
    assert torch.equal(long, dataset.long[[3, 1]]) and torch.equal(short, dataset.short[[3, 1]])
