"""From result rows to figures: every picture of the notebooks and the report, legible in grey and to the colour-blind."""

import re
import textwrap
from itertools import cycle

import matplotlib as mpl
import matplotlib.pyplot as plt

from .files import write_then_rename

# Okabe and Ito's colour-blind safe palette, ordered by lightness, each with a line style and marker for grey print.
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
]


def style():
    """Matplotlib settings of every figure: small, vector, the same file for the same numbers."""
    mpl.rcParams.update(
        {
            "figure.figsize": (6.3, 3.2),
            "figure.constrained_layout.use": True,
            "font.size": 9,
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
    """Write `figure` as SVG (under a temporary name, then renamed)."""
    write_then_rename(path, lambda temporary: figure.savefig(temporary, metadata={"Date": None}))


def label(model):
    """A run's name as figures show it: "crd+fd-both-context_length77-s0" -> "crd+fd both 77 tokens"."""
    name = re.sub(r"context_length(\d+)", r"\1 tokens", model).removesuffix("-s0")
    return name if " " in model else name.replace("-", " ")


def contact_sheet(images, titles, columns=4, width=6.3):
    """Images (each uint8 (3, H, W)) in a grid with a caption each -> figure."""
    rows = -(-len(images) // columns)
    titles = [textwrap.wrap(title, int(19 * width / columns)) for title in titles]
    lines = max(map(len, titles))
    figure, axes = plt.subplots(
        rows, columns, figsize=(width, rows * (width / columns + 0.12 * lines)), squeeze=False
    )
    for axis in axes.flat:
        axis.axis("off")
    for axis, image, title in zip(axes.flat, images, titles):
        axis.imshow(
            image.permute(1, 2, 0).numpy(), interpolation="nearest"
        )  # (3, H, W) -> (H, W, 3)
        axis.set_title("\n".join(title), fontsize=6, loc="left")
    return figure


def lengths(long, short):
    """Histogram of caption lengths in tokens, with the marks of a 77- and a 248-token model -> figure."""
    figure, axis = plt.subplots()
    bins = range(0, 256, 8)
    axis.hist(short, bins, color="#bbbbbb", label="short captions")
    axis.hist(long, bins, color="#0072B2", alpha=0.8, label="long captions")
    for mark in (77, 248):
        axis.axvline(mark, color="black", linestyle="--", linewidth=1)
        axis.text(
            mark - 2,
            axis.get_ylim()[1],
            f"{mark} tokens",
            rotation=90,
            va="top",
            ha="right",
            fontsize=8,
        )
    axis.set(xlabel="tokens (start and end included)", ylabel="captions", xlim=(0, 256))
    axis.legend(loc="upper center")
    return figure


def spectrum(variance, k):
    """Share of variance kept by the first components, one line per feature set {name: (d,) shares} -> figure."""
    figure, axis = plt.subplots()
    for (name, shares), (colour, line, _) in zip(variance.items(), STYLES):
        axis.plot(range(1, len(shares) + 1), shares, color=colour, linestyle=line, label=name)
    axis.axvline(k, color="black", linewidth=1, linestyle=":")
    axis.text(k + 1, 0.05, f"k = {k}", fontsize=8)
    axis.set(xlabel="principal components kept", ylabel="share of variance", ylim=(0, 1.02))
    axis.legend(loc="lower right")
    return figure


def curves(history, value, ylabel, axis=None, x="step", xlabel="training steps"):
    """One line per model of `history` (columns model, `x`, `value`) -> figure."""
    axis = axis or plt.subplots()[1]
    for (name, rows), (colour, line, marker) in zip(
        history.groupby("model", sort=False), cycle(STYLES)
    ):
        axis.plot(
            rows[x],
            rows[value],
            color=colour,
            linestyle=line,
            marker=marker,
            markersize=4,
            label=label(name),
        )
    axis.set(xlabel=xlabel, ylabel=ylabel, xlim=(0, None), ylim=(0, None))
    axis.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return axis.figure


def dynamics(history, value, ylabel, target=None):
    """`value` against steps and against seconds, side by side, and a line at the undistilled student's end -> figure."""
    names = [label(name) for name in history.model.unique()]
    columns = max(1, 100 // (8 + max(map(len, names))))
    figure, (steps, seconds) = plt.subplots(
        1, 2, sharey=True, figsize=(6.3, 2.9 + 0.18 * -(-len(names) // columns))
    )
    for axis, x, xlabel in ((steps, "step", "training steps"), (seconds, "seconds", "seconds")):
        curves(history, value, ylabel if x == "step" else None, axis, x, xlabel)
        axis.get_legend().remove()
        if target is not None:
            axis.axhline(target, color="black", linestyle=":", linewidth=1)
    if target is not None:
        seconds.text(
            1.01,
            target,
            "none,\nin the end",
            fontsize=7,
            va="center",
            transform=seconds.get_yaxis_transform(),
        )
    figure.legend(*steps.get_legend_handles_labels(), loc="outside lower center", ncols=columns)
    return figure


def bars(table, xlabel, reference=None):
    """Horizontal bars of table.value with intervals low..high, one per table.model -> figure.

    reference: (value, name) of a vertical line.
    """
    table = table.iloc[::-1]
    figure, axis = plt.subplots(figsize=(6.3, 0.6 + 0.28 * len(table)))
    axis.barh(
        table.model.map(label),
        table.value,
        color="#8fbcd9",
        edgecolor="black",
        linewidth=0.6,
        xerr=[table.value - table.low, table.high - table.value],
        error_kw={"linewidth": 1, "capsize": 2},
    )
    for y, (value, high) in enumerate(zip(table.value, table.high)):
        axis.text(high, y, f"  {value:.3f}", va="center", fontsize=8)
    if reference:
        axis.axvline(reference[0], color="black", linestyle=":", linewidth=1)
        axis.text(reference[0], len(table) - 0.4, f" {reference[1]}", fontsize=7, va="bottom")
    axis.set(xlabel=xlabel, xlim=(0, min(1.12, 1.18 * table.high.max())))
    axis.grid(axis="y", visible=False)
    return figure


def positions(table):
    """Where-is-the-detail: accuracy with interval against token position, a line per model -> figure."""
    figure, axis = plt.subplots(figsize=(6.3, 3.6))
    models = list(table.groupby("model", sort=False))
    for number, ((name, rows), (colour, line, marker)) in enumerate(zip(models, STYLES)):
        place = rows.position + 1.6 * (
            number - (len(models) - 1) / 2
        )  # side by side, so that intervals stay apart
        axis.errorbar(
            place,
            rows.value,
            yerr=[rows.value - rows.low, rows.high - rows.value],
            color=colour,
            linestyle=line,
            marker=marker,
            markersize=4,
            capsize=2,
            linewidth=1.2,
            label=label(name),
        )
    axis.axhline(0.5, color="black", linewidth=0.8)
    axis.axvline(77, color="black", linestyle="--", linewidth=1)
    axis.text(78, 1.01, "77 tokens", fontsize=8)
    axis.text(1.01, 0.5, "chance", fontsize=8, va="center", transform=axis.get_yaxis_transform())
    axis.set(
        xlabel="token position of the only differing detail",
        ylabel="accuracy",
        ylim=(min(0.35, table.low.min() - 0.03), 1.05),
    )
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=3)
    return figure


def attributes(table):
    """Accuracy for each attribute of a detail, a marker per model (columns attribute, model, value, low, high) -> figure."""
    names, models = list(table.attribute.unique()), list(table.groupby("model", sort=False))
    figure, axis = plt.subplots(figsize=(6.3, 0.8 + 0.13 * len(names) * (len(models) + 1)))
    for number, ((name, rows), (colour, _, marker)) in enumerate(zip(models, STYLES)):
        place = [
            names.index(one) + (number - (len(models) - 1) / 2) * 0.8 / len(models)
            for one in rows.attribute
        ]
        axis.errorbar(
            rows.value,
            place,
            xerr=[rows.value - rows.low, rows.high - rows.value],
            color=colour,
            linestyle="none",
            marker=marker,
            markersize=4,
            capsize=2,
            linewidth=1,
            label=label(name),
        )
    axis.set_yticks(range(len(names)), names)
    axis.axvline(0.5, color="black", linewidth=0.8)
    axis.set(xlabel="accuracy (chance 0.5)", ylim=(len(names) - 0.5, -0.5))
    axis.grid(axis="y", visible=False)
    axis.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def failures(queries, wanted, found):
    """A row for each query: its caption, the wanted image, the three images that the model likes best -> figure.

    queries: captions, cut to what fits; wanted: images (uint8 (3, H, W)); found: lists of three.
    """
    figure, axes = plt.subplots(
        len(queries),
        5,
        figsize=(6.3, 1.25 * len(queries) + 0.25),
        squeeze=False,
        width_ratios=[2.1, 1, 1, 1, 1],
    )
    for row, (query, right, best) in enumerate(zip(queries, wanted, found)):
        lines = textwrap.wrap(query, 38)
        shown = lines if len(lines) <= 9 else [*lines[:8], lines[8] + " ..."]
        axes[row, 0].text(
            0, 1, "\n".join(shown), fontsize=6.5, va="top", transform=axes[row, 0].transAxes
        )
        for axis, image in zip(axes[row, 1:], [right, *best]):
            axis.imshow(
                image.permute(1, 2, 0).numpy(), interpolation="nearest"
            )  # (3, H, W) -> (H, W, 3)
    for axis, title in zip(axes[0], ("caption", "wanted", "first", "second", "third")):
        axis.set_title(title, fontsize=8, loc="left")
    for axis in axes.flat:
        axis.axis("off")
    return figure


def speed(table):
    """Ratios to a teacher's latency (rows of `latency`): a panel per tower, captions and batch, a bar per form -> figure."""
    table = table.assign(form=table.model + ", " + table.backend)
    groups, forms = (
        list(table.groupby(["tower", "captions", "batch"], sort=False)),
        list(table.form.unique())[::-1],
    )
    height = -(-len(groups) // 2)
    figure, axes = plt.subplots(
        height, 2, figsize=(6.3, height * (0.6 + 0.17 * len(forms))), sharey=True, squeeze=False
    )
    for axis in axes.flat[len(groups) :]:
        axis.axis("off")
    for axis, ((tower, captions, batch), rows) in zip(axes.flat, groups):
        ratios = rows.set_index("form").ratio_to_teacher.reindex(forms)
        colours = ["#8fbcd9" if ratio >= 1 else "#e0a080" for ratio in ratios]
        axis.barh(range(len(forms)), ratios, color=colours, edgecolor="black", linewidth=0.6)
        for y, ratio in enumerate(ratios):
            axis.text(ratio, y, f" {ratio:.1f}", va="center", fontsize=7)
        axis.axvline(1, color="black", linewidth=0.8)
        what = [tower.replace("both", "image + text"), captions, f"batch {batch}"]
        axis.set_title(", ".join(filter(None, what)), fontsize=7, loc="left")
        axis.set_yticks(range(len(forms)), forms, fontsize=7)
        axis.set_xlim(0, 1.18 * ratios.max())
        axis.grid(axis="y", visible=False)
    figure.supxlabel("times as fast as the teacher", fontsize=9)
    return figure


def layers(table):
    """Where the time goes (rows of bench.layer_times): a panel per tower, bars per part before and after folding -> figure."""
    names = [column.removesuffix(" ms") for column in table if column.endswith(" ms")]
    figure, axes = plt.subplots(1, 2, figsize=(6.3, 2.8))
    for axis, (tower, rows) in zip(axes, table.groupby("tower", sort=False)):
        for number, (name, (colour, *_)) in enumerate(zip(names, STYLES)):
            places = [y + (number - 0.5) * 0.4 for y in range(len(rows))]
            axis.barh(
                places,
                rows[f"{name} ms"],
                0.4,
                color=colour,
                edgecolor="black",
                linewidth=0.6,
                label=name,
            )
        axis.set_yticks(range(len(rows)), rows.part, fontsize=7)
        axis.invert_yaxis()
        axis.set(xlabel="ms", title=f"{tower} tower")
        axis.grid(axis="y", visible=False)
    axes[0].legend(loc="lower right")
    return figure


def tradeoff(table, xlabel, ylabel):
    """Accuracy against latency: table.value with its interval against table.p50_ms, a point per table.model -> figure."""
    figure, axis = plt.subplots()
    for row, (colour, _, marker) in zip(table.itertuples(), STYLES):
        axis.errorbar(
            row.p50_ms,
            row.value,
            yerr=[[row.value - row.low], [row.high - row.value]],
            color=colour,
            marker=marker,
            markersize=5,
            capsize=2,
            linestyle="none",
            label=row.model,
        )
    axis.set(xlabel=xlabel, ylabel=ylabel, xlim=(0, None), ylim=(0, None))
    axis.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return figure
