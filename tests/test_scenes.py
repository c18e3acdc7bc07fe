"""Captions of scenes tell what the pictures show; pairs of details differ in one attribute."""

import hashlib
import io

from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.tokenizer import SimpleTokenizer
from PIL import Image, ImageChops

from jettclip.datasets import scenes
from jettclip.datasets.scenes import ATTRIBUTES, caption, make_details, make_pairs, scene

TOKENIZER = SimpleTokenizer()
NUMBERS = st.integers(0, 2**31)


def tokens(text):
    """CLIP tokens with start and end."""
    return [49406, *TOKENIZER.encode(text), 49407]


def opened(png):
    return Image.open(io.BytesIO(png)).convert("RGB")


@given(seed=NUMBERS, index=NUMBERS)
@settings(max_examples=60, deadline=None)
def test_the_caption_describes_the_whole_scene(seed, index):
    drawn = scene(seed, index)
    assert drawn == scene(seed, index) and 5 <= len(drawn.objects) <= 8
    assert len({thing.place for thing in drawn.objects}) == len(drawn.objects)
    short, *sentences = caption(drawn).removesuffix(".").split(". ")
    assert short == scenes.short_caption(drawn)
    for i, sentence in zip(drawn.order, sentences, strict=True):
        for attribute, words in ATTRIBUTES.items():
            named = [word for word in words if word in sentence.lower()]
            assert named == [getattr(drawn.objects[i], attribute)]
    assert 60 <= len(tokens(caption(drawn))) <= 200 and 24 <= len(tokens(short)) <= 28


def test_pairs_are_reproducible_and_distinct():
    pairs = make_pairs(60, seed=1, split="test")
    assert list(pairs.columns) == ["image", "long", "short", "split", "key"]
    assert pairs.head(9).equals(make_pairs(9, seed=1, split="test"))
    assert set(pairs.split) == {"test"} and pairs.key[7] == "scenes-1-7"
    assert pairs.long.is_unique and pairs.image.is_unique and pairs.key.is_unique
    assert not set(pairs.long) & set(make_pairs(60, seed=2, size=8).long)
    for size in (32, 224):
        assert opened(make_pairs(1, seed=0, size=size).image[0]).size == (size, size)


def test_details_differ_in_one_attribute_and_its_pixels():
    details = make_details(100, seed=3)
    columns = "image other_image long other_long attribute position key"
    assert " ".join(details.columns) == columns and details.key.is_unique
    for row in details.itertuples():
        ids, changed = tokens(row.long), tokens(row.other_long)
        different = [i for i, (a, b) in enumerate(zip(ids, changed, strict=True)) if a != b]
        assert different == list(range(row.position, row.position + len(different)))
        assert len(different) <= (2 if row.attribute == "place" else 1)
        words = [TOKENIZER.decode(ids[i : i + 1]).strip() for i in different]
        assert " ".join(words) in " ".join(ATTRIBUTES[row.attribute])
        assert row.long.split(". ")[0] == row.other_long.split(". ")[0]
        pixels = ImageChops.difference(opened(row.image), opened(row.other_image))
        assert max(high for _, high in pixels.getextrema()) > 40
        left, top, right, bottom = pixels.getbbox()
        assert row.attribute == "place" or max(right - left, bottom - top) <= 23
    # Attributes and positions are spread.
    counts = details.attribute.value_counts()
    assert set(counts.index) == set(ATTRIBUTES) and counts.min() > 0.7 * counts.max()
    by_position = (details.position // 20).value_counts()
    assert all(by_position[group] >= 8 for group in range(2, 8)) and details.position.max() > 150


def test_the_data_set_is_the_published_one():
    captions = [caption(scene(0, index)) for index in range(400)]
    lengths = [len(tokens(text)) for text in captions]
    assert min(lengths) < 85 and max(lengths) > 165 and 100 < sum(lengths) / 400 < 130
    found = hashlib.sha256("\n".join(captions[:20]).encode()).hexdigest()
    assert found == "5e48fd173933f447c299b39a3cafdb38b88e1f59df4daef854545ec198236861"
