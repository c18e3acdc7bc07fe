"""Long captions from photographs with short ones: several of them in one picture, the caption says what is where.

Drawn afresh for each (seed, index), so a few thousand photographs make pictures without end. The caption begins with a
one-sentence summary, which is the short caption, as in ShareGPT4V.
"""
import io

import numpy as np
import pandas as pd
from PIL import Image, ImageOps

from .sources import SPLITS, sentence

# rows x columns -> the names of its places
GRIDS = {
    (1, 3): ("on the left", "in the middle", "on the right"),
    (2, 2): ("in the top left", "in the top right", "in the bottom left", "in the bottom right"),
    (3, 3): tuple(f"in the {row} {column}" for row in ("top", "middle", "bottom") for column in ("left", "centre", "right")),
}
COUNTS = {3: "Three", 4: "Four", 9: "Nine"}


def collage(photos, captions, seed, index, size):
    """-> picture (PIL, size x size), long caption, short caption, the photographs used (their rows, in reading order).

    photos: encoded bytes; captions: a list of short captions for each photograph.
    """
    rng = np.random.default_rng([seed, index])
    grid = list(GRIDS)[rng.integers(len(GRIDS))]
    places = GRIDS[grid]
    used = rng.choice(len(photos), len(places), replace=False).tolist()
    picture = Image.new("RGB", (size, size))
    told = []
    for cell, (row, place) in enumerate(zip(used, places)):
        y, x = divmod(cell, grid[1])
        left, right = x * size // grid[1], (x + 1) * size // grid[1]
        top, bottom = y * size // grid[0], (y + 1) * size // grid[0]
        photo = Image.open(io.BytesIO(photos[row])).convert("RGB")
        picture.paste(ImageOps.fit(photo, (right - left, bottom - top), Image.Resampling.BILINEAR), (left, top))
        own = [sentence(caption) for caption in rng.permutation(captions[row])]
        first = own[0][0].lower() + own[0][1:]
        told.append(f"{place.capitalize()}, {first}" + ("" if len(places) == 9 else f" {own[1]}"))  # nine are long enough
    named = rng.integers(len(used))
    short = f"{COUNTS[len(used)]} photographs, among them {told[named].split(', ', 1)[1].split('. ')[0].rstrip('.')}"
    order = rng.permutation(len(told))
    return picture, " ".join([short + ".", *(told[i] for i in order)]), short, used


def make_pairs(photos, captions, n, seed, size=96, split="train"):
    """Collages 0 to n - 1 of `seed`: columns image (JPEG bytes), long, short, split, key."""
    rows = []
    for index in range(n):
        picture, long, short, _ = collage(photos, captions, 3 * seed + SPLITS.index(split), index, size)
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=92)
        rows.append((file.getvalue(), long, short, split, f"collage-{split}-{seed}-{index}"))
    return pd.DataFrame(rows, columns=["image", "long", "short", "split", "key"])
