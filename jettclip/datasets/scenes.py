"""Procedural scenes with long captions: a data set drawn on the spot, without a download.

A scene is 5 to 8 objects on a plain ground, each in its own cell of a 3 x 3 grid, and follows from
(seed, index) alone. Its caption is a short summary, which is the short caption and names two objects, then one
sentence per object in random order. `caption(scene(0, 31))` has 94 CLIP tokens:

    Five shapes on a grey ground, with a green circle at the top left and a red circle at the bottom right. Looking
    closely, the bottom centre holds a small dotted red cross. One sees at the bottom left a small plain yellow
    circle. Looking closely, the top right holds a small striped yellow triangle. Then there is, at the top left, a
    large dotted green circle. Then there is, at the bottom right, a large dotted red circle.

Every word and every punctuation mark is one CLIP token, so positions are known without a tokenizer.
"""

import io
import re
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import pandas as pd
from PIL import Image, ImageChops, ImageDraw, ImageFilter

# Ground name -> RGB. All are light or muted, so that every object stands out.
GROUNDS = {
    "grey": (168, 168, 168),
    "pale blue": (178, 208, 236),
    "beige": (226, 208, 170),
    "lilac": (206, 194, 228),
    "pale green": (186, 222, 184),
    "brown": (142, 112, 88),
}
WHITE, DARK = (255, 255, 255), (50, 25, 15)
# Colour name -> RGB of the object and RGB of the marks (stripes, dots) on it.
COLOURS = {
    "red": ((215, 25, 30), WHITE),
    "yellow": ((255, 232, 30), DARK),
    "green": ((0, 135, 50), WHITE),
    "blue": ((30, 70, 225), WHITE),
    "purple": ((125, 30, 150), WHITE),
    "black": ((20, 20, 20), WHITE),
}
SIZES = {"small": 0.6, "large": 0.88}  # width as a fraction of a cell
PLACES = tuple(
    f"{row} {column}"
    for row in ("top", "middle", "bottom")
    for column in ("left", "centre", "right")
)
PATTERNS = ("plain", "striped", "dotted")
SHAPES = ("circle", "square", "triangle", "star", "cross", "heart")
ATTRIBUTES = {
    "size": tuple(SIZES),
    "pattern": PATTERNS,
    "colour": tuple(COLOURS),
    "shape": SHAPES,
    "place": PLACES,
}
COUNTS = {5: "five", 6: "six", 7: "seven", 8: "eight"}

OPENINGS = (
    "{count} shapes on a {ground} ground, with {first} and {second}",
    "on a {ground} ground lie {count} shapes, with {first} and {second}",
    "a {ground} ground with {count} shapes, among them {first} and {second}",
)
# From short to long (9 to 21 tokens), the place always beside the other attributes. An article never stands before
# a colour, so no attribute decides between "a" and "an".
SENTENCES = (
    "{place}: a {size} {pattern} {colour} {shape}.",
    "the {place} holds a {size} {pattern} {colour} {shape}.",
    "at the {place} is a {size} {pattern} {colour} {shape}.",
    "one sees at the {place} a {size} {pattern} {colour} {shape}.",
    "looking closely, the {place} holds a {size} {pattern} {colour} {shape}.",
    "then there is, at the {place}, a {size} {pattern} {colour} {shape}.",
    "whoever turns to the {place} will find a {size} {pattern} {colour} {shape} lying on the ground.",
    "the picture also shows, at the {place}, a {size} {pattern} {colour} {shape}, which nothing else touches.",
    "it is just as easy to see that the {place} holds a {size} {pattern} {colour} {shape} and nothing else.",
)
OVERSAMPLING = 4  # the canvas is this many times larger than the picture


@dataclass(frozen=True)
class Object:
    """One object: five attribute words, its shift (x, y) in cells and the form of its sentence."""

    size: str
    pattern: str
    colour: str
    shape: str
    place: str
    shift: tuple[float, float]
    sentence: str


@dataclass(frozen=True)
class Scene:
    """A ground and its objects; the short caption names `objects[0]` and `objects[1]`.

    `opening` is the form of the short caption; `order` has the objects' indices as they are told.
    """

    ground: str
    objects: tuple[Object, ...]
    opening: str
    order: tuple[int, ...]


def scene(seed: int, index: int) -> Scene:
    """The scene number `index` of the data set `seed` (both non-negative)."""
    rng = np.random.default_rng([seed, index])

    def pick(words):
        return tuple(words)[rng.integers(len(words))]

    ground, count, opening = pick(GROUNDS), pick(COUNTS), pick(OPENINGS)
    # Three forms of like length, so that some captions are terse (most of them) and others wordy.
    terse = int((len(SENTENCES) - 2) * rng.uniform() ** 2)
    forms = SENTENCES[terse : terse + 3]
    objects = [
        Object(
            pick(SIZES),
            pick(PATTERNS),
            pick(COLOURS),
            pick(SHAPES),
            PLACES[cell],
            shift=tuple(rng.uniform(-0.04, 0.04, 2).tolist()),
            sentence=pick(forms),
        )
        for cell in rng.permutation(len(PLACES))[:count]
    ]
    objects.sort(key=lambda thing: thing.size != "large")  # the short caption names large ones
    return Scene(ground, tuple(objects), opening, tuple(rng.permutation(count).tolist()))


@cache
def _shape_mask(shape: str, width: int) -> Image.Image:
    """Mask of `shape` that fills width x width pixels (mode L, 0 or 255)."""
    mask = Image.new("L", (width, width))
    pen = ImageDraw.Draw(mask)

    def ellipse(left, top, right, bottom, fill=255):  # as fractions of the width
        pen.ellipse([left * width, top * width, right * width - 1, bottom * width - 1], fill=fill)

    def polygon(*corners):
        pen.polygon([(x * (width - 1), y * (width - 1)) for x, y in corners], fill=255)

    if shape == "circle":
        ellipse(0, 0, 1, 1)
    elif shape == "square":
        polygon((0.06, 0.06), (0.94, 0.06), (0.94, 0.94), (0.06, 0.94))
    elif shape == "triangle":
        polygon((0.5, 0), (1, 0.95), (0, 0.95))
    elif shape == "cross":
        polygon((0.32, 0), (0.68, 0), (0.68, 1), (0.32, 1))
        polygon((0, 0.32), (1, 0.32), (1, 0.68), (0, 0.68))
    elif shape == "heart":
        ellipse(0, 0.05, 0.54, 0.59)
        ellipse(0.46, 0.05, 1, 0.59)
        polygon((0.04, 0.45), (0.5, 0.3), (0.96, 0.45), (0.5, 1))
    else:  # star
        angles = np.pi * (np.arange(10) / 5 - 0.5)
        radii = np.where(np.arange(10) % 2, 0.24, 0.53)
        polygon(*zip(0.5 + radii * np.cos(angles), 0.53 + radii * np.sin(angles), strict=True))
    return mask


@cache
def _mark_mask(shape: str, pattern: str, width: int, cell: float) -> Image.Image:
    """Mask of the marks of `pattern` on `shape`, where a grid cell has `cell` pixels."""
    # Dots are closer, so that a small object shows more than the one in its middle.
    period = cell * (0.21 if pattern == "dotted" else 0.28)
    steps = (np.arange(width) + 0.5 - width / 2) / period
    x, y = np.meshgrid(steps, steps)
    if pattern == "plain":
        marks = np.zeros_like(x)
    elif pattern == "striped":
        slant = 0.8 * (x + y)
        marks = np.abs(slant - np.round(slant)) > 0.28
    else:  # dotted
        marks = np.hypot(x - np.round(x), y - np.round(y)) < 0.29
    # The marks leave a rim of the object's colour, which keeps its outline.
    inner, rim = _shape_mask(shape, width), width // 30
    if rim:  # a filter of size 1 does nothing, and crashes Pillow 12.3
        inner = inner.filter(ImageFilter.MinFilter(2 * rim + 1))
    return ImageChops.multiply(inner, Image.fromarray(np.uint8(marks) * 255))


def draw(scene: Scene, size: int = 64) -> Image.Image:
    """The picture of a scene: RGB, size x size pixels."""
    cell = OVERSAMPLING * size / 3
    canvas = Image.new("RGB", (OVERSAMPLING * size,) * 2, GROUNDS[scene.ground])
    for thing in scene.objects:
        width = round(SIZES[thing.size] * cell)
        row, column = divmod(PLACES.index(thing.place), 3)
        left = round((column + 0.5 + thing.shift[0]) * cell - width / 2)
        top = round((row + 0.5 + thing.shift[1]) * cell - width / 2)
        box = (left, top, left + width, top + width)
        fill, mark = COLOURS[thing.colour]
        canvas.paste(fill, box, _shape_mask(thing.shape, width))
        canvas.paste(mark, box, _mark_mask(thing.shape, thing.pattern, width, cell))
    return canvas.reduce(OVERSAMPLING)


def short_caption(scene: Scene) -> str:
    """The first sentence of the caption, without its full stop (25 or 26 CLIP tokens)."""
    first, second = (
        f"a {thing.colour} {thing.shape} at the {thing.place}" for thing in scene.objects[:2]
    )
    return scene.opening.format(
        count=COUNTS[len(scene.objects)], ground=scene.ground, first=first, second=second
    ).capitalize()


def caption(scene: Scene) -> str:
    """The long caption: the short one, then a sentence for every object (63 to 188 CLIP tokens)."""
    told = [scene.objects[i] for i in scene.order]
    sentences = [thing.sentence.format(**vars(thing)).capitalize() for thing in told]
    return " ".join([short_caption(scene) + ".", *sentences])


def _png(scene: Scene, size: int) -> bytes:
    file = io.BytesIO()
    draw(scene, size).save(file, "PNG", compress_level=1)
    return file.getvalue()


def make_pairs(n: int, seed: int, size: int = 64, split: str = "train") -> pd.DataFrame:
    """Scenes 0 to n - 1 of `seed`: columns image (PNG bytes), long, short, split and key."""
    scenes = (scene(seed, index) for index in range(n))
    rows = [
        (_png(each, size), caption(each), short_caption(each), split, f"scenes-{seed}-{index}")
        for index, each in enumerate(scenes)
    ]
    return pd.DataFrame(rows, columns=["image", "long", "short", "split", "key"])


def _change(original: Scene, attribute: str, rng: np.random.Generator) -> Scene:
    """The scene with one attribute changed, in an object that the short caption does not name."""
    objects = list(original.objects)
    which = rng.integers(2, len(objects))
    avoid = objects if attribute == "place" else [objects[which]]  # move to a free cell
    used = {getattr(thing, attribute) for thing in avoid}
    value = rng.choice([word for word in ATTRIBUTES[attribute] if word not in used])
    objects[which] = replace(objects[which], **{attribute: str(value)})
    return replace(original, objects=tuple(objects))


def make_details(n: int, seed: int, size: int = 64) -> pd.DataFrame:
    """n pairs of scenes that differ in one attribute of one object, not named in the short caption.

    Columns image and other_image (PNG bytes), long and other_long (captions), attribute, position
    (the first token in which the captions differ; the start token is 0) and key. The pairs are
    chosen from scenes 0 to 12 n - 1 of `seed` so that positions and attributes are spread evenly;
    few captions are long enough for positions above 150, so these remain rarer.
    """
    pool = []
    for index in range(12 * n):
        one = scene(seed, index)
        attribute = tuple(ATTRIBUTES)[index % len(ATTRIBUTES)]
        other = _change(one, attribute, np.random.default_rng([seed, index, 1]))
        tokens, other_tokens = (re.findall(r"\w+|[^\w\s]", caption(each)) for each in (one, other))
        differs = [a != b for a, b in zip(tokens, other_tokens, strict=True)]
        pool.append((one, other, attribute, 1 + differs.index(True), f"scenes-{seed}-{index}"))
    pairs = pd.DataFrame(pool, columns=["one", "other", "attribute", "position", "key"])
    # Take pairs in turn from the groups of equal attribute and nearly equal position.
    turn = pairs.groupby(["attribute", pairs["position"].clip(20) // 20]).cumcount()
    pairs = pairs.loc[turn.sort_values(kind="stable").index[:n]].reset_index(drop=True)
    return pd.DataFrame(
        {
            "image": [_png(each, size) for each in pairs["one"]],
            "other_image": [_png(each, size) for each in pairs["other"]],
            "long": [caption(each) for each in pairs["one"]],
            "other_long": [caption(each) for each in pairs["other"]],
            **pairs[["attribute", "position", "key"]],
        }
    )
