"""Every figure is drawn from a small table; the same table gives the same file."""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parent.parent / "notebooks"))
import plots  # noqa: E402

IMAGE = torch.zeros(3, 8, 8, dtype=torch.uint8)
LABELS = {
    "CLIP at 77 tokens": "CLIP at 77 tokens",
    "crd+fd-both-context_length77-s0": "crd+fd both 77 tokens",
    "fd-both-text_towerlongclip-start_steps40-s0": "fd both text_tower longclip start_steps 40",
}


def rows(**columns):
    """A row for each model and each value of the columns."""
    table = pd.DataFrame({"model": [*LABELS], "value": 0.5, "low": 0.4, "high": 0.7})
    for name, values in columns.items():
        table = table.merge(pd.DataFrame({name: values}), how="cross")
    return table


HISTORY = rows(step=[1, 2], seconds=[3])
LATENCY = rows(backend=["pytorch"], tower=["image", "text"], batch=[1, 32], ratio_to_teacher=[2])
LATENCY["captions"] = LATENCY.tower.map({"image": "", "text": "long"})
LAYERS = pd.DataFrame({"tower": ["image", "text"], "part": ["stem", "attention"]})
LAYERS[["branches ms", "folded ms"]] = 2.0
DRAW = {  # name: (function, number of axes)
    "contact_sheet": (lambda: plots.contact_sheet([IMAGE] * 5, ["a title " * 9] * 5), 8),
    "failures": (
        lambda: plots.failures(["long " * 99, "short"], [IMAGE] * 2, [[IMAGE] * 3] * 2),
        10,
    ),
    "curves": (lambda: plots.curves(HISTORY, "value", "R@1"), 1),
    "dynamics": (lambda: plots.dynamics(HISTORY, "value", "R@1", target=0.3), 2),
    "dynamics without target": (lambda: plots.dynamics(HISTORY, "value", "R@1"), 2),
    "bars": (lambda: plots.bars(rows(), "R@1", reference=(0.1, "chance")), 1),
    "positions": (lambda: plots.positions(rows(position=[10, 90])), 1),
    "attributes": (lambda: plots.attributes(rows(attribute=["colour", "size"])[:-1]), 1),
    "speed": (lambda: plots.speed(LATENCY), 4),
    "layers": (lambda: plots.layers(LAYERS), 2),
}


@pytest.mark.parametrize("name", DRAW)
def test_the_same_table_gives_the_same_figure(name, tmp_path):
    plots.style()
    draw, axes = DRAW[name]
    for copy in ("a.svg", "b.svg"):
        figure = draw()
        assert len(figure.axes) == axes
        plots.save(figure, tmp_path / copy)
    plt.close("all")
    assert b"<svg" in (tmp_path / "a.svg").read_bytes()
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_models_are_told_apart_and_labelled():
    assert {model: plots.label(model) for model in LABELS} == LABELS
    assert len(set(plots.STYLES)) >= 17  # students of the longest profile
