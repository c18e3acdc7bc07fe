"""A collage shows the photographs that its caption names, where it names them."""
import io

import numpy as np
import pytest
from open_clip.tokenizer import SimpleTokenizer
from PIL import Image

from jettclip.collage import GRIDS, collage, make_pairs

N = 30


@pytest.fixture(scope="module")
def photos():
    """Plain photographs, each of its own grey, and captions that name it."""
    encoded = []
    for i in range(N):
        file = io.BytesIO()
        Image.new("RGB", (40, 50), (8 * i,) * 3).save(file, "PNG")
        encoded.append(file.getvalue())
    captions = [[f"Photo number {i} shows a brown dog that jumps over a low wooden fence, version {k} ." for k in range(5)] for i in range(N)]
    return encoded, captions


@pytest.mark.parametrize("index", range(12))
def test_the_caption_says_what_is_where(index, photos):
    picture, long, short, used = collage(*photos, seed=1, index=index, size=72)
    places = {name: (grid, cell) for grid, names in GRIDS.items() for cell, name in enumerate(names) if len(names) == len(used)}
    assert picture.size == (72, 72) and len(set(used)) == len(used) and long.startswith(short + ". ")
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
    long, short = (np.array([len(encode(caption)) + 2 for caption in pairs[column]]) for column in ("long", "short"))
    assert long.min() > 77 and long.max() <= 248 and short.max() < 40
    assert pairs.image.is_unique and pairs.long.is_unique and pairs.key.is_unique
    splits = [set(make_pairs(*photos, n=20, seed=seed, size=24, split=split).long) for seed in (0, 1) for split in ("train", "val", "test")]
    assert len(set.union(*splits)) == 120
