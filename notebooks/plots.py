"""Figures of result tables, legible in grey print and to the colour-blind.

Notebooks and benchmarks call `style()` once, draw from tables, and `save` each figure as SVG.
A table has a row for each point; `value`, `low` and `high` are a measurement and its interval.
"""

import re
import textwrap
from functools import partial
from itertools import cycle

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.ticker import EngFormatter
from PIL import Image

from jettclip.utils import write_then_rename

# Okabe and Ito's palette for the colour-blind. In grey print, line styles and markers tell the
# models apart.
STYLES = [
    ("#000000", "-", "o"),
    ("#0072B2", "--", "s"),
    ("#D55E00", "-.", "^"),
    ("#009E73", ":", "D"),
    ("#CC79A7", (0, (5, 1)), "v"),
    ("#E69F00", (0, (3, 1, 1, 1)), "P"),
    ("#56B4E9", (0, (1, 1)), "X"),
    ("#555555", "--", "<"),
    ("#0072B2", "-", "*"),
    ("#D55E00", ":", "h"),
    ("#009E73", "-", ">"),
    ("#CC79A7", "-.", "d"),
    ("#999999", "-", "p"),
    ("#000000", ":", "+"),
    ("#56B4E9", "-.", "x"),
    ("#E69F00", "-", "1"),
    ("#CC79A7", "-", "2"),
    ("#555555", ":", "3"),
]
BLUE, ORANGE, GREY, DARK_BLUE = "#8fbcd9", "#e0a080", "#bbbbbb", "#0072B2"  # fills of bars
BAR = {"edgecolor": "black", "linewidth": 0.6}
# What XML, and so SVG, cannot hold: control characters and halves of surrogate pairs.
UNPRINTABLE = re.compile("[^\t\n\r -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def style():
    """Settings of every figure: small, vector, the same file for the same numbers.

    Dollar signs are dollar signs, in figures and in tables that notebooks show: no mathematics.
    """
    pd.options.display.html.use_mathjax = False
    mpl.rcParams.update(
        {
            "figure.figsize": (6.3, 3.2),
            "figure.constrained_layout.use": True,
            "font.size": 9,
            "text.parse_math": False,
            "axes.grid": True,
            "grid.color": "#dddddd",
            "axes.axisbelow": True,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "legend.frameon": False,
            "legend.fontsize": 8,
            "svg.hashsalt": "jettclip",
            "svg.fonttype": "path",
            "savefig.dpi": 150,
        }
    )


def save(figure, path):
    """Write `figure` as SVG, whole or not at all."""
    write_then_rename(path, lambda temporary: figure.savefig(temporary, metadata={"Date": None}))


def printable(text):
    """`text` with a replacement character for each that no figure can hold."""
    return UNPRINTABLE.sub("\ufffd", text)


def label(model):
    """A run's name in figures: "crd+fd-both-context_length77-s0" -> "crd+fd both 77 tokens"."""
    model = printable(model)
    if " " in model:
        return model
    name = re.sub(r"context_length(\d+)", r"\1 tokens", model.removesuffix("-s0"))
    name = re.sub(r"-(text_tower|stretch|[a-z_]{2,}(?=\d))", r" \1 ", name)  # steps200: steps 200
    return name.replace("-", " ")


def by_model(table):
    """Yield (label, rows, line style for matplotlib) of each model in `table`, in its order."""
    models = table.groupby("model", sort=False)
    for (model, rows), (colour, line, marker) in zip(models, cycle(STYLES), strict=False):
        look = {"color": colour, "linestyle": line, "marker": marker, "markersize": 4}
        yield label(model), rows, look


def error_bars(rows):
    """Lengths of the error bars below and above `rows.value`; none is below 0 by rounding."""
    return [(rows.value - rows.low).clip(lower=0), (rows.high - rows.value).clip(lower=0)]


def show_image(axis, image):
    """Draw an image (uint8 (3, H, W)) pixel by pixel, a large one as a thumbnail."""
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())  # -> (H, W, 3)
    picture.thumbnail((160, 160))
    axis.imshow(picture, interpolation="nearest")


# ---- images


def contact_sheet(images, titles, columns=4, width=6.3):
    """A grid of images (uint8 (3, H, W)), each below its title -> figure, `width` inches wide."""
    wrap = partial(textwrap.wrap, width=int(19 * width / columns))
    titles = [sum(map(wrap, printable(title).splitlines()), []) for title in titles]
    rows, title_lines = -(-len(images) // columns) or 1, max(map(len, titles), default=0)
    height = rows * (width / columns + 0.12 * title_lines)
    figure, axes = plt.subplots(rows, columns, figsize=(width, height), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, image, title in zip(axes.flat, images, titles, strict=False):
        show_image(axis, image)
        axis.set_title("\n".join(title), fontsize=6, loc="left")
    return figure


def found(queries, wanted, found):
    """A row for each query: caption, wanted image, the three that the model ranks first -> figure.

    queries: captions, cut to nine lines; wanted: images (uint8 (3, H, W)); found: threes of them,
    or fewer if there are no more.
    """
    size, widths = (6.3, 1.25 * len(queries) + 0.25), [2.1, 1, 1, 1, 1]
    figure, axes = plt.subplots(len(queries), 5, figsize=size, squeeze=False, width_ratios=widths)
    for row, query, image, best in zip(axes, queries, wanted, found, strict=True):
        lines = textwrap.wrap(printable(query), 38)
        lines = lines if len(lines) <= 9 else [*lines[:8], lines[8] + " ..."]
        row[0].text(0, 1, "\n".join(lines), fontsize=6.5, va="top", transform=row[0].transAxes)
        for axis, shown in zip(row[1:], [image, *best], strict=False):
            show_image(axis, shown)
    titles = ("caption", "wanted", "first", "second", "third")
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, fontsize=8, loc="left")
    for axis in axes.flat:
        axis.axis("off")
    return figure


# ---- training


def curves(history, value, ylabel, axis=None, x="step", xlabel="training steps"):
    """A line for each model of `history` (columns model, `x`, `value`) -> figure."""
    axis = axis or plt.subplots()[1]
    for name, rows, look in by_model(history):
        axis.plot(rows[x], rows[value], label=name, **look)
    axis.set(xlabel=xlabel, ylabel=ylabel, xlim=(0, None), ylim=(0, None))
    axis.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return axis.figure


def dynamics(history, value, ylabel, target=None):
    """`value` against steps and against seconds -> figure.

    target: where a dotted line marks the end of the undistilled student.
    """
    longest = max(len(label(model)) for model in history.model.unique())
    columns = max(1, 100 // (8 + longest))  # a row of the legend holds about 100 letters
    legend_rows = -(-history.model.nunique() // columns)
    size = (6.3, 2.9 + 0.18 * legend_rows)
    figure, (steps, seconds) = plt.subplots(1, 2, sharey=True, figsize=size)
    curves(history, value, ylabel, steps)
    curves(history, value, None, seconds, "seconds", "seconds")
    for axis in (steps, seconds):
        axis.get_legend().remove()
        if target is not None:
            axis.axhline(target, color="black", linestyle=":", linewidth=1)
    if target is not None:
        place = {"va": "center", "transform": seconds.get_yaxis_transform()}
        seconds.text(1.01, target, "none,\nat the end", fontsize=7, **place)
    figure.legend(*steps.get_legend_handles_labels(), loc="outside lower center", ncols=columns)
    return figure


# ---- accuracy


def bars(table, xlabel, reference=None):
    """A bar with its interval for each row of `table` (model, value, low, high) -> figure.

    reference: (value, name) of a vertical line.
    """
    table = table.iloc[::-1]
    figure, axis = plt.subplots(figsize=(6.3, 0.6 + 0.28 * len(table)))
    errors = {"xerr": error_bars(table), "error_kw": {"linewidth": 1, "capsize": 2}}
    axis.barh(range(len(table)), table.value, color=BLUE, **BAR, **errors)
    axis.set_yticks(range(len(table)), table.model.map(label))
    for y, (value, high) in enumerate(zip(table.value, table.high, strict=True)):
        axis.text(high, y, f"  {value:.3f}", va="center", fontsize=8)
    if reference:
        axis.axvline(reference[0], color="black", linestyle=":", linewidth=1)
        axis.text(reference[0], len(table) - 0.4, f" {reference[1]}", fontsize=7, va="bottom")
    axis.set(xlabel=xlabel, xlim=(0, min(1.12, 1.18 * table.high.max())))
    axis.grid(axis="y", visible=False)
    return figure


def positions(table):
    """Where is the detail: accuracy against token position, a line for each model -> figure."""
    figure, axis = plt.subplots(figsize=(6.3, 3.6))
    middle = (table.model.nunique() - 1) / 2
    for number, (name, rows, look) in enumerate(by_model(table)):
        x = rows.position + 1.6 * (number - middle)  # side by side, so that intervals stay apart
        errors = {"yerr": error_bars(rows), "capsize": 2, "linewidth": 1.2}
        axis.errorbar(x, rows.value, label=name, **errors, **look)
    axis.axhline(0.5, color="black", linewidth=0.8)
    axis.axvline(75.5, color="black", linestyle="--", linewidth=1)  # the end token is at 76
    axis.text(77, 1.01, "77 tokens", fontsize=8)
    axis.text(1.01, 0.5, "chance", fontsize=8, va="center", transform=axis.get_yaxis_transform())
    axis.set(
        xlabel="token position of the only differing detail",
        ylabel="accuracy",
        ylim=(min(0.35, table.low.min() - 0.03), 1.05),
    )
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=3)
    return figure


def dots(table, by, xlabel, chance):
    """Accuracy for each value of the column `by`, a marker for each model -> figure."""
    names, models = list(table[by].unique()), table.model.nunique()
    figure, axis = plt.subplots(figsize=(6.3, 0.8 + 0.08 * len(names) * (models + 1)))
    for number, (name, rows, look) in enumerate(by_model(table)):
        y = rows[by].map(names.index) + (number - (models - 1) / 2) * 0.8 / models
        errors = {"xerr": error_bars(rows), "capsize": 2, "linewidth": 1}
        axis.errorbar(rows.value, y, label=name, **errors, **{**look, "linestyle": "none"})
    axis.set_yticks(range(len(names)), map(printable, names))
    axis.axvline(chance, color="black", linewidth=0.8)
    axis.set(xlabel=f"{xlabel} (chance {chance:.2g})", ylim=(len(names) - 0.5, -0.5))
    axis.grid(axis="y", visible=False)
    axis.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return figure


# ---- time


def speed(table):
    """How many times as fast as the teacher (rows of `timing.latency`) -> figure.

    A panel for each tower, kind of captions and batch size; a bar for each model and backend.
    """
    table = table.assign(name=table.model + ", " + table.backend)
    panels = list(table.groupby(["tower", "captions", "batch"], sort=False))
    names = list(table.name.unique())[::-1]
    height = -(-len(panels) // 2)
    size = (6.3, height * (0.6 + 0.17 * len(names)))
    figure, axes = plt.subplots(height, 2, figsize=size, sharey=True, squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    for axis, ((tower, captions, batch), rows) in zip(axes.flat, panels, strict=False):
        ratios = rows.set_index("name").ratio_to_teacher.reindex(names)
        colours = [BLUE if ratio >= 1 else ORANGE for ratio in ratios]
        axis.barh(range(len(names)), ratios, color=colours, **BAR)
        axis.set_yticks(range(len(names)), map(printable, names))
        for y, ratio in enumerate(ratios):
            axis.text(ratio, y, f" {ratio:.1f}", va="center", fontsize=7)
        axis.axvline(1, color="black", linewidth=0.8)
        title = [tower.replace("both", "image + text"), printable(captions), f"batch {batch}"]
        axis.set_title(", ".join(filter(None, title)), fontsize=7, loc="left")
        axis.tick_params(axis="y", labelsize=7)
        axis.set_xlim(0, 1.18 * ratios.max())
        axis.grid(axis="y", visible=False)
    figure.supxlabel("times as fast as the teacher", fontsize=9)
    return figure


def line(table, column, few=-2, many=-1):
    """(slope, intercept) of the line through rows `few` and `many`, `column` against pairs."""
    few, many = table.iloc[few], table.iloc[many]
    slope = (many[column] - few[column]) / (many.pairs - few.pairs)
    return slope, many[column] - slope * many.pairs


def growth(pairs, processes, photographs):
    """How cost grows (the tables of benchmarks/data) -> figure.

    Bytes and seconds against pairs, with lines through the two largest to a billion; a training
    step against processes; a search against photographs.
    """
    figure, ((size, opening), (steps, search)) = plt.subplots(2, 2, figsize=(6.3, 4.6))
    lines = [(size, "cache_bytes", "feature cache"), (size, "table_bytes", "table")]
    for (axis, column, name), (colour, _, marker) in zip(
        [*lines, (opening, "open_seconds", None)], STYLES, strict=False
    ):
        slope, intercept = line(pairs, column)
        ends = np.array([pairs.pairs.iloc[-1], 1e9])
        axis.plot(pairs.pairs, pairs[column], color=colour, marker=marker, label=name)
        axis.plot(ends, intercept + slope * ends, color=colour, linestyle="--", linewidth=1)
    search.plot(photographs.photographs, photographs.search_ms / 1e3, color="black", marker="o")
    for axis, unit in ((size, "B"), (opening, "s"), (search, "s")):
        axis.set(xscale="log", yscale="log")
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
        axis.yaxis.set_major_formatter(EngFormatter(unit))
    steps.bar(processes.processes.astype(str), processes.step_ms, 0.5, color=BLUE, **BAR)
    steps.grid(axis="x", visible=False)
    size.set(xlabel="pairs", ylabel="size on disk")
    size.legend()
    opening.set(xlabel="pairs", ylabel="time to open the table")
    steps.set(xlabel="processes that share the cores", ylabel="training step, ms")
    search.set(xlabel="photographs in the index", ylabel="time of a search")
    return figure


def layers(table):
    """Where the time goes (the table of notebook 03) -> figure.

    A panel for each tower; for each layer a bar before and after folding.
    """
    models = [column.removesuffix(" ms") for column in table if column.endswith(" ms")]
    figure, axes = plt.subplots(1, 2, figsize=(6.3, 3))
    for axis, (tower, rows) in zip(axes, table.groupby("tower", sort=False), strict=True):
        for number, (model, colour) in enumerate(zip(models, (GREY, DARK_BLUE), strict=True)):
            y = [row + (number - 0.5) * 0.4 for row in range(len(rows))]
            axis.barh(y, rows[f"{model} ms"], 0.4, color=colour, label=model, **BAR)
        axis.set_yticks(range(len(rows)), rows.part.map(printable), fontsize=7)
        axis.invert_yaxis()
        axis.set(xlabel="ms", title=f"{tower} tower")
        axis.grid(axis="y", visible=False)
    handles = axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=len(models))
    return figure
