"""Long captions from short ones: several photographs in a picture, and what is where.

Each (seed, index) draws another picture, so a few thousand photographs never run out. The caption
begins with a one-sentence summary, which is the short caption, as in ShareGPT4V.
"""

from collections import namedtuple

import numpy as np
import pandas as pd
from PIL import Image, ImageOps

from ..inputs import read_photo
from ..text import first_difference
from .published import SPLITS, encoded, sentence
from .scenes import ATTRIBUTES, choose_details

GRIDS = {  # rows x columns -> names of the cells, in reading order
    (1, 3): ("on the left", "in the middle", "on the right"),
    (2, 2): ("in the top left", "in the top right", "in the bottom left", "in the bottom right"),
    (3, 3): tuple(f"in the {place}" for place in ATTRIBUTES["place"]),
}
COUNTS = {3: "Three", 4: "Four", 9: "Nine"}
# Of each cell the row of its photograph and its text; the cell that the summary names; cells in the
# order of the caption.
Plan = namedtuple("Plan", "grid photos texts named order")


def _plan(captions, seed, index):
    rng = np.random.default_rng([seed, index])
    grid = list(GRIDS)[rng.integers(len(GRIDS))]
    photos = rng.choice(len(captions), len(GRIDS[grid]), replace=False).tolist()
    texts = [_text(grid, cell, rng.permutation(captions[row])) for cell, row in enumerate(photos)]
    return Plan(grid, photos, texts, rng.integers(len(photos)), rng.permutation(len(texts)))


def _text(grid, cell, captions):
    """What the caption says of a photograph: two of its captions, one where there are nine."""
    text = " ".join(map(sentence, captions[: 1 if grid == (3, 3) else 2]))
    return f"{GRIDS[grid][cell].capitalize()}, {text[0].lower()}{text[1:]}"


def _caption(plan):
    """-> long, short"""
    named = plan.texts[plan.named].split(", ", 1)[1].split(". ")[0].rstrip(".")
    short = f"{COUNTS[len(plan.texts)]} photographs, among them {named}"
    return " ".join([short + ".", *(plan.texts[cell] for cell in plan.order)]), short


def _picture(photos, plan, size):
    picture, (rows, columns) = Image.new("RGB", (size, size)), plan.grid
    for cell, photo in enumerate(plan.photos):
        y, x = divmod(cell, columns)
        left, right = x * size // columns, (x + 1) * size // columns
        top, bottom = y * size // rows, (y + 1) * size // rows
        box = right - left, bottom - top
        photo = ImageOps.fit(read_photo(photos[photo]), box, Image.Resampling.BILINEAR)
        picture.paste(photo, (left, top))
    return picture


def make_pairs(photos, captions, n, seed, size=96, split="train"):
    """Collages 0 to n - 1 of `seed`: columns image (JPEG bytes), long, short, split, key.

    photos: encoded bytes; captions: a list of short captions for each photograph.
    """
    rows, split_seed = [], 3 * seed + SPLITS.index(split)
    for index in range(n):
        plan = _plan(captions, split_seed, index)
        image = encoded(_picture(photos, plan, size), "JPEG")
        rows.append((image, *_caption(plan), split, f"collage-{split}-{seed}-{index}"))
    return pd.DataFrame(rows, columns=["image", "long", "short", "split", "key"])


def make_details(photos, captions, n, seed, size=96):
    """n pairs of collages that differ in a photograph, not named in the summary, and its sentences.

    Columns as in `scenes.make_details`; attribute is "photo". Chosen from 4 n collages of `seed`
    so that positions are spread evenly.
    """
    pool = []
    for index in range(4 * n):
        plan = _plan(captions, seed, index)
        rng = np.random.default_rng([seed, index, 1])
        cell = rng.choice([i for i in range(len(plan.photos)) if i != plan.named])
        row = rng.choice([i for i in range(len(captions)) if i not in plan.photos])
        changed = plan._replace(photos=plan.photos.copy(), texts=plan.texts.copy())
        changed.photos[cell] = int(row)
        changed.texts[cell] = _text(plan.grid, cell, rng.permutation(captions[row]))
        long, other_long = _caption(plan)[0], _caption(changed)[0]
        if position := first_difference(long, other_long):
            key = f"collage-details-{seed}-{index}"
            pool.append((plan, changed, long, other_long, "photo", position, key))
    return choose_details(pool, n, lambda plan: encoded(_picture(photos, plan, size), "JPEG"))
