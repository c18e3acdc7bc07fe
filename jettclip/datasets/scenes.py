"""Procedural scenes with long captions: a data set drawn on the spot, without a download.

A scene is 5 to 8 objects at different places of a 3 x 3 grid, and follows from (seed, index) alone.
Its caption starts with the short one, which names two objects, and describes each object in random
order: "Five shapes on a grey ground, with a green circle at the top left and a red circle at the
bottom right. Looking closely, the bottom centre holds a small dotted red cross. One sees at ..."
Every word and punctuation mark is one CLIP token: positions are known without a tokenizer.
"""

import re
from collections import namedtuple
from functools import cache

import numpy as np
import pandas as pd
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from .published import encoded

GROUNDS = {  # RGB: all are light or muted, so that every object stands out
    "grey": (168, 168, 168),
    "pale blue": (178, 208, 236),
    "beige": (226, 208, 170),
    "lilac": (206, 194, 228),
    "pale green": (186, 222, 184),
    "brown": (142, 112, 88),
}
WHITE, DARK = (255, 255, 255), (50, 25, 15)
COLOURS = {  # RGB of the object and of the marks (stripes, dots) on it
    "red": ((215, 25, 30), WHITE),
    "yellow": ((255, 232, 30), DARK),
    "green": ((0, 135, 50), WHITE),
    "blue": ((30, 70, 225), WHITE),
    "purple": ((125, 30, 150), WHITE),
    "black": ((20, 20, 20), WHITE),
}
STAR = np.pi * (np.arange(10) / 5 - 0.5), np.where(np.arange(10) % 2, 0.24, 0.53)  # angles, radii
LOBES = [(0, 0.05), (0.54, 0.59)], [(0.46, 0.05), (1, 0.59)]
BAR = [(0.32, 0), (0.68, 0), (0.68, 1), (0.32, 1)]
SHAPES = {  # outlines in fractions of the width: two corners of an ellipse's box, or a polygon
    "circle": [[(0, 0), (1, 1)]],
    "square": [[(0.06, 0.06), (0.94, 0.06), (0.94, 0.94), (0.06, 0.94)]],
    "triangle": [[(0.5, 0), (1, 0.95), (0, 0.95)]],
    "star": [[(0.5 + r * np.cos(a), 0.53 + r * np.sin(a)) for a, r in zip(*STAR, strict=True)]],
    "cross": [BAR, [(y, x) for x, y in BAR]],
    "heart": [*LOBES, [(0.04, 0.45), (0.5, 0.3), (0.96, 0.45), (0.5, 1)]],
}
ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "centre", "right")
SIZES = {"small": 0.6, "large": 0.88}  # width as a fraction of a cell
ATTRIBUTES = {
    "size": tuple(SIZES),
    "pattern": ("plain", "striped", "dotted"),
    "colour": tuple(COLOURS),
    "shape": tuple(SHAPES),
    "place": tuple(f"{row} {column}" for row in ROWS for column in COLUMNS),
}
COUNTS = {5: "five", 6: "six", 7: "seven", 8: "eight"}
OPENINGS = (
    "{count} shapes on a {ground} ground, with {named}",
    "on a {ground} ground lie {count} shapes, with {named}",
    "a {ground} ground with {count} shapes, among them {named}",
)
THING = "a {size} {pattern} {colour} {shape}"  # "a" before a size: no attribute decides on "an"
SENTENCES = (  # from short to long (9 to 21 tokens), the place always beside the other attributes
    "{place}: {thing}.",
    "the {place} holds {thing}.",
    "at the {place} is {thing}.",
    "one sees at the {place} {thing}.",
    "looking closely, the {place} holds {thing}.",
    "then there is, at the {place}, {thing}.",
    "whoever turns to the {place} will find {thing} lying on the ground.",
    "the picture also shows, at the {place}, {thing}, which nothing else touches.",
    "it is just as easy to see that the {place} holds {thing} and nothing else.",
)
OVERSAMPLING = 4  # the canvas is this many times larger than the picture

Scene = namedtuple("Scene", "ground objects opening order")  # order of objects in the caption
Object = namedtuple("Object", [*ATTRIBUTES, "shift", "sentence"])  # shift: (x, y) in cells


def scene(seed, index):
    """The scene number `index` of the data set `seed` (both non-negative)."""
    rng = np.random.default_rng([seed, index])

    def pick(words):
        return tuple(words)[rng.integers(len(words))]

    ground, count, opening = pick(GROUNDS), pick(COUNTS), pick(OPENINGS)
    # Three templates of like length, so that most captions are terse and others wordy.
    shortest = int((len(SENTENCES) - 2) * rng.uniform() ** 2)
    *attributes, places = ATTRIBUTES.values()
    objects = []
    for cell in rng.permutation(len(places))[:count]:
        words = *map(pick, attributes), places[cell]
        shift = tuple(rng.uniform(-0.04, 0.04, 2).tolist())
        objects.append(Object(*words, shift, pick(SENTENCES[shortest : shortest + 3])))
    objects.sort(key=lambda thing: thing.size != "large")  # the short caption names large objects
    return Scene(ground, tuple(objects), opening, tuple(rng.permutation(count).tolist()))


def short_caption(scene):
    """The first sentence of the caption, without its full stop (25 or 26 CLIP tokens)."""
    named = [f"a {thing.colour} {thing.shape} at the {thing.place}" for thing in scene.objects[:2]]
    words = {"count": COUNTS[len(scene.objects)], "ground": scene.ground}
    return scene.opening.format(**words, named=" and ".join(named)).capitalize()


def caption(scene):
    """The long caption: the short one, then a sentence for every object (70 to 200 tokens)."""
    sentences = [short_caption(scene) + "."]
    for thing in (scene.objects[i] for i in scene.order):
        words = THING.format(**thing._asdict())
        sentences.append(thing.sentence.format(place=thing.place, thing=words).capitalize())
    return " ".join(sentences)


@cache
def _shape_mask(shape, width):
    """Mask of `shape` that fills width x width pixels (mode L, 0 or 255)."""
    mask = Image.new("L", (width, width))
    pen = ImageDraw.Draw(mask)
    for points in SHAPES[shape]:
        if len(points) == 2:
            (left, top), (right, bottom) = np.multiply(points, width)
            pen.ellipse([left, top, right - 1, bottom - 1], fill=255)
        else:
            pen.polygon([(x * (width - 1), y * (width - 1)) for x, y in points], fill=255)
    return mask


@cache
def _mark_mask(shape, pattern, width, cell):
    """Mask of the marks of `pattern` on `shape`, where a grid cell has `cell` pixels."""
    period = cell * (0.21 if pattern == "dotted" else 0.28)  # small objects show several dots
    steps = (np.arange(width) + 0.5 - width / 2) / period
    x, y = np.meshgrid(steps, steps)  # (width, width) each, in periods from the middle
    slant = 0.8 * (x + y)
    marks = {
        "plain": np.zeros_like(x),
        "striped": np.abs(slant - np.round(slant)) > 0.28,
        "dotted": np.hypot(x - np.round(x), y - np.round(y)) < 0.29,
    }[pattern]
    inner, rim = _shape_mask(shape, width), width // 30  # a rim keeps the outline visible
    if rim:  # a filter of size 1 does nothing, and crashes Pillow 12.3
        inner = inner.filter(ImageFilter.MinFilter(2 * rim + 1))
    return ImageChops.multiply(inner, Image.fromarray(np.uint8(marks) * 255))


def draw(scene, size=64):
    """The picture of a scene: RGB, size x size pixels."""
    cell = OVERSAMPLING * size / 3
    canvas = Image.new("RGB", (OVERSAMPLING * size,) * 2, GROUNDS[scene.ground])
    for thing in scene.objects:
        width = round(SIZES[thing.size] * cell)
        row, column = divmod(ATTRIBUTES["place"].index(thing.place), 3)
        left = round((column + 0.5 + thing.shift[0]) * cell - width / 2)
        top = round((row + 0.5 + thing.shift[1]) * cell - width / 2)
        fill, mark = COLOURS[thing.colour]
        canvas.paste(fill, (left, top), _shape_mask(thing.shape, width))
        canvas.paste(mark, (left, top), _mark_mask(thing.shape, thing.pattern, width, cell))
    return canvas.reduce(OVERSAMPLING)


def make_pairs(n, seed, size=64, split="train"):
    """Scenes 0 to n - 1 of `seed`: columns image (PNG bytes), long, short, split and key."""
    rows = []
    for index in range(n):
        drawn, key = scene(seed, index), f"scenes-{seed}-{index}"
        image = encoded(draw(drawn, size), "PNG")
        rows.append((image, caption(drawn), short_caption(drawn), split, key))
    return pd.DataFrame(rows, columns=["image", "long", "short", "split", "key"])


def _change(scene, attribute, rng):
    """The scene with `attribute` changed in an object that the short caption does not name."""
    objects = list(scene.objects)
    i = rng.integers(2, len(objects))
    avoid = objects if attribute == "place" else [objects[i]]  # an object moves to a free cell
    used = {getattr(thing, attribute) for thing in avoid}
    value = rng.choice([word for word in ATTRIBUTES[attribute] if word not in used])
    objects[i] = objects[i]._replace(**{attribute: str(value)})
    return scene._replace(objects=tuple(objects))


def make_details(n, seed, size=64):
    """n pairs of scenes that differ in one attribute of one object, not named in the short caption.

    Columns image and other_image (PNG bytes), long and other_long (captions), attribute, position
    (the first token in which the captions differ; the start token is 0) and key. Chosen from scenes
    0 to 12 n - 1 of `seed`, spread over attributes and positions as captions' lengths allow.
    """
    pool = []
    for index in range(12 * n):
        attribute = tuple(ATTRIBUTES)[index % len(ATTRIBUTES)]
        drawn = scene(seed, index)
        changed = _change(drawn, attribute, np.random.default_rng([seed, index, 1]))
        captions = caption(drawn), caption(changed)
        tokens = [re.findall(r"\w+|[^\w\s]", text) for text in captions]  # as CLIP's tokens
        position = 1 + [a != b for a, b in zip(*tokens, strict=True)].index(True)
        pool.append((drawn, changed, *captions, attribute, position, f"scenes-{seed}-{index}"))
    return choose_details(pool, n, lambda drawn: encoded(draw(drawn, size), "PNG"), lowest=20)


def choose_details(pool, n, encode, lowest=0):
    """n of the pairs in `pool`, in turn from groups of equal attribute and nearly equal position.

    encode: what `pool` has in place of an image -> the image's bytes.
    """
    columns = ["image", "other_image", "long", "other_long", "attribute", "position", "key"]
    pairs = pd.DataFrame(pool, columns=columns)
    turn = pairs.groupby(["attribute", pairs.position.clip(lowest) // 20]).cumcount()
    pairs = pairs.loc[turn.sort_values(kind="stable").index[:n]].reset_index(drop=True)
    return pairs.assign(**{name: list(map(encode, pairs[name])) for name in columns[:2]})
