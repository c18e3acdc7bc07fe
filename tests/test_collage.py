"""A collage shows the photographs that its caption names, where it names them."""

import io
import re
from itertools import product

import numpy as np
import pandas as pd
import pytest
from open_clip.tokenizer import SimpleTokenizer
from PIL import Image, ImageChops

from jettclip.datasets.collage import GRIDS, _caption, _picture, _plan, make_details, make_pairs
from jettclip.datasets.published import encoded

TEXT = "Photo number {} shows a brown dog that jumps over a low wooden fence, version {} ."
encode = SimpleTokenizer().encode


@pytest.fixture(scope="module")
def photos():
    """30 plain photographs of different grey, and captions that name them."""
    images = [encoded(Image.new("RGB", (40, 50), (8 * i,) * 3), "PNG") for i in range(30)]
    return images, [[TEXT.format(i, k) for k in range(5)] for i in range(30)]


def test_the_caption_says_what_is_where(photos):
    for index in range(8):
        plan = _plan(photos[1], 1, index)
        picture, (long, short), used = _picture(photos[0], plan, 72), _caption(plan), plan.photos
        (rows, columns), names = next(grid for grid in GRIDS.items() if len(grid[1]) == len(used))
        assert picture.size == (72, 72) and len(set(used)) == len(used)
        for cell, name in enumerate(names):
            number = int(long.split(f"{name.capitalize()}, photo number ")[1].split(" ")[0])
            y, x = divmod(cell, columns)
            pixel = picture.getpixel((int((x + 0.5) * 72 / columns), int((y + 0.5) * 72 / rows)))
            assert number == used[cell] and pixel == (8 * number,) * 3
        assert long.startswith(short + ". ") and any(f"photo number {i} " in short for i in used)


def test_captions_are_long_and_summaries_short(photos):
    pairs = make_pairs(*photos, n=40, seed=0, size=24)
    assert pairs.head(9).equals(make_pairs(*photos, n=9, seed=0, size=24))
    lengths = pairs[["long", "short"]].map(lambda text: len(encode(text)) + 2)
    assert lengths.long.min() > 77 and lengths.long.max() <= 248 and lengths.short.max() < 40
    assert pairs.image.is_unique and pairs.long.is_unique and pairs.key.is_unique
    draws = product((0, 1), ("train", "val", "test"))
    drawn = [make_pairs(*photos, n=9, seed=seed, size=24, split=split) for seed, split in draws]
    assert pd.concat(drawn).long.nunique() == 54


def test_a_detail_is_a_photograph_and_its_sentences(photos):
    details = make_details(*photos, n=40, seed=2, size=72)
    assert set(details.attribute) == {"photo"}
    for row in details.itertuples():
        ids, changed = encode(row.long), encode(row.other_long)
        first = row.position - 1  # the start token is 0
        assert ids[:first] == changed[:first] and ids[first] != changed[first]
        texts = (re.split(r"(?=In the |On the )", text) for text in (row.long, row.other_long))
        differs = [a != b for a, b in zip(*texts, strict=True)]
        assert not differs[0] and sum(differs) == 1  # the summary is the same
        pixels = (Image.open(io.BytesIO(image)) for image in (row.image, row.other_image))
        share = (np.array(ImageChops.difference(*pixels).convert("L")) > 3).mean()
        assert any(abs(share - 1 / cells) < 0.03 for cells in (3, 4, 9))  # one cell
    assert (details.position < 77).any() and (details.position >= 77).any()
    assert details.key.is_unique and details.equals(make_details(*photos, n=40, seed=2, size=72))
