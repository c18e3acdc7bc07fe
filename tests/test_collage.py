"""A collage shows the photographs that its caption names, where it names them."""

import io
import re

import numpy as np
import pytest
from open_clip.tokenizer import SimpleTokenizer
from PIL import Image

from jettclip.datasets.collage import GRIDS, collage, make_details, make_pairs
from jettclip.text import tokenizer

N = 30


@pytest.fixture(scope="module")
def photos():
    """Plain photographs, each of its own grey, and captions that name it."""
    encoded = []
    for i in range(N):
        file = io.BytesIO()
        Image.new("RGB", (40, 50), (8 * i,) * 3).save(file, "PNG")
        encoded.append(file.getvalue())
    captions = [
        [
            f"Photo number {i} shows a brown dog that jumps over a low wooden fence, version {k} ."
            for k in range(5)
        ]
        for i in range(N)
    ]
    return encoded, captions


@pytest.mark.parametrize("index", range(12))
def test_the_caption_says_what_is_where(index, photos):
    picture, long, short, used = collage(*photos, seed=1, index=index, size=72)
    places = {
        name: (grid, cell)
        for grid, names in GRIDS.items()
        for cell, name in enumerate(names)
        if len(names) == len(used)
    }
    assert (
        picture.size == (72, 72) and len(set(used)) == len(used) and long.startswith(short + ". ")
    )
    for place, ((rows, columns), cell) in places.items():
        told = long.split(f"{place.capitalize()}, photo number ")[1].split(" ")[0]
        y, x = divmod(cell, columns)
        pixel = picture.getpixel((int((x + 0.5) * 72 / columns), int((y + 0.5) * 72 / rows)))
        assert int(told) == used[cell] and pixel == (8 * int(told),) * 3
    assert any(f"photo number {row} " in short for row in used)
    other = collage(*photos, seed=1, index=index, size=72)
    assert np.array_equal(picture, other[0]) and other[1:] == (long, short, used)


def test_captions_are_long_and_summaries_short(photos):
    encode = SimpleTokenizer().encode
    pairs = make_pairs(*photos, n=60, seed=0, size=48)
    long, short = (
        np.array([len(encode(caption)) + 2 for caption in pairs[column]])
        for column in ("long", "short")
    )
    assert long.min() > 77 and long.max() <= 248 and short.max() < 40
    assert pairs.image.is_unique and pairs.long.is_unique and pairs.key.is_unique
    splits = [
        set(make_pairs(*photos, n=20, seed=seed, size=24, split=split).long)
        for seed in (0, 1)
        for split in ("train", "val", "test")
    ]
    assert len(set.union(*splits)) == 120


def test_a_detail_is_one_photograph_and_its_sentences(photos):
    details = make_details(*photos, n=40, seed=2, size=72)
    assert details.columns.tolist() == [
        "image",
        "other_image",
        "long",
        "other_long",
        "attribute",
        "position",
        "key",
    ]
    tokenize = tokenizer()
    for row in details.itertuples():
        one, other = tokenize([row.long, row.other_long])
        assert (
            row.attribute == "photo"
            and one[: row.position].equal(other[: row.position])
            and one[row.position] != other[row.position]
        )
        short, *told = re.split(r"(?=In the |On the )", row.long)
        other_short, *other_told = re.split(r"(?=In the |On the )", row.other_long)
        assert (
            short == other_short and sum(a != b for a, b in zip(told, other_told, strict=True)) == 1
        )
        a, b = (
            np.array(Image.open(io.BytesIO(image)).convert("L"), int)
            for image in (row.image, row.other_image)
        )
        changed = (abs(a - b) > 3).mean()
        assert any(
            abs(changed - 1 / n) < 0.03 for n in (3, 4, 9)
        )  # one cell of the grid, and no more
    assert (
        (details.position < 77).any() and (details.position >= 77).any() and details.key.is_unique
    )
    assert details.equals(make_details(*photos, n=40, seed=2, size=72))
