"""Long captions from photographs with short ones: several of them in one picture, the caption says what is where.

Drawn afresh for each (seed, index), so a few thousand photographs make pictures without end. The caption begins with a
one-sentence summary, which is the short caption, as in ShareGPT4V.
"""

import io

import numpy as np
import pandas as pd
from PIL import Image, ImageOps

from ..text import tokenizer
from .published import SPLITS, sentence

# rows x columns -> the names of its places
GRIDS = {
    (1, 3): ("on the left", "in the middle", "on the right"),
    (2, 2): ("in the top left", "in the top right", "in the bottom left", "in the bottom right"),
    (3, 3): tuple(
        f"in the {row} {column}"
        for row in ("top", "middle", "bottom")
        for column in ("left", "centre", "right")
    ),
}
COUNTS = {3: "Three", 4: "Four", 9: "Nine"}


def collage(photos, captions, seed, index, size):
    """-> picture (PIL, size x size), long caption, short caption, the photographs used (their rows, in reading order).

    photos: encoded bytes; captions: a list of short captions for each photograph.
    """
    grid, used, told, named, order = _plan(captions, seed, index)
    return (_picture(photos, grid, used, size), *_caption(told, named, order), used)


def _plan(captions, seed, index):
    """-> grid, photographs (rows, in reading order), what is told of each, which of them the summary names, order of telling."""
    rng = np.random.default_rng([seed, index])
    grid = list(GRIDS)[rng.integers(len(GRIDS))]
    used = rng.choice(len(captions), len(GRIDS[grid]), replace=False).tolist()
    told = [_tell(grid, cell, rng.permutation(captions[row])) for cell, row in enumerate(used)]
    return grid, used, told, rng.integers(len(used)), rng.permutation(len(told))


def _tell(grid, cell, captions):
    own = [sentence(caption) for caption in captions]
    first = own[0][0].lower() + own[0][1:]
    return f"{GRIDS[grid][cell].capitalize()}, {first}" + (
        "" if grid == (3, 3) else f" {own[1]}"
    )  # nine are long enough


def _caption(told, named, order):
    short = f"{COUNTS[len(told)]} photographs, among them {told[named].split(', ', 1)[1].split('. ')[0].rstrip('.')}"
    return " ".join([short + ".", *(told[i] for i in order)]), short


def _picture(photos, grid, used, size):
    picture = Image.new("RGB", (size, size))
    for cell, row in enumerate(used):
        y, x = divmod(cell, grid[1])
        left, right = x * size // grid[1], (x + 1) * size // grid[1]
        top, bottom = y * size // grid[0], (y + 1) * size // grid[0]
        photo = Image.open(io.BytesIO(photos[row])).convert("RGB")
        picture.paste(
            ImageOps.fit(photo, (right - left, bottom - top), Image.Resampling.BILINEAR),
            (left, top),
        )
    return picture


def make_pairs(photos, captions, n, seed, size=96, split="train"):
    """Collages 0 to n - 1 of `seed`: columns image (JPEG bytes), long, short, split, key."""
    rows = []
    for index in range(n):
        picture, long, short, _ = collage(
            photos, captions, 3 * seed + SPLITS.index(split), index, size
        )
        rows.append((_jpeg(picture), long, short, split, f"collage-{split}-{seed}-{index}"))
    return pd.DataFrame(rows, columns=["image", "long", "short", "split", "key"])


def _jpeg(picture):
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=92)
    return file.getvalue()


def make_details(photos, captions, n, seed, size=96):
    """n pairs of collages that differ in one photograph, which the short caption does not name, and in what is told of it.

    Columns as in `scenes.make_details`: image, other_image (JPEG bytes), long, other_long, attribute ("photo"), position (the
    first token in which the captions differ; the start token is 0), key. Chosen from 4 n collages of `seed` so that positions
    are spread evenly.
    """
    encode, pool = tokenizer().encode, []
    for index in range(4 * n):
        grid, used, told, named, order = _plan(captions, seed, index)
        rng = np.random.default_rng([seed, index, 1])
        cell = rng.choice([i for i in range(len(used)) if i != named])
        new = rng.choice([row for row in range(len(captions)) if row not in used])
        others, told_other = used.copy(), told.copy()
        others[cell], told_other[cell] = int(new), _tell(grid, cell, rng.permutation(captions[new]))
        long, other_long = (_caption(each, named, order)[0] for each in (told, told_other))
        if long == other_long:
            continue
        position = 1 + next(
            i for i, (a, b) in enumerate(zip(encode(long), encode(other_long))) if a != b
        )
        pool.append(
            (
                grid,
                used,
                others,
                long,
                other_long,
                "photo",
                position,
                f"collage-details-{seed}-{index}",
            )
        )
    pairs = pd.DataFrame(
        pool,
        columns=["grid", "used", "others", "long", "other_long", "attribute", "position", "key"],
    )
    turn = pairs.groupby(
        pairs.position // 20
    ).cumcount()  # in turn from the groups of nearly equal position
    pairs = pairs.loc[turn.sort_values(kind="stable").index[:n]].reset_index(drop=True)
    image, other_image = (
        [_jpeg(_picture(photos, grid, rows, size)) for grid, rows in zip(pairs.grid, pairs[column])]
        for column in ("used", "others")
    )
    return pd.DataFrame(
        {
            "image": image,
            "other_image": other_image,
            **pairs[["long", "other_long", "attribute", "position", "key"]],
        }
    )
