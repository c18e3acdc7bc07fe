"""Every figure is drawn from a small table, holds any text, and is the same file each time."""

import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

sys.path.append(str(Path(__file__).resolve().parent.parent / "notebooks"))
import plots  # noqa: E402

IMAGE = torch.zeros(3, 8, 8, dtype=torch.uint8)
LABELS = {
    "CLIP at 77 tokens": "CLIP at 77 tokens",
    "crd+fd-both-context_length77-s0": "crd+fd both 77 tokens",
    "fd-both-text_towerlongclip-start_steps40-s0": "fd both text_tower longclip start_steps 40",
}


# What matplotlib's mathematics, HTML and Markdown would read as markup, and what XML cannot hold.
NASTY = ["$5 # $6", "\\$x_1^{$ <b>&amp; --> *a* #x [", "\0\x1b[31m\ufffe\r\u2028\U0001f642"]


def rows(models=tuple(LABELS), **columns):
    """A row for each model and each value of the columns."""
    table = pd.DataFrame({"model": [*models], "value": 0.5, "low": 0.4, "high": 0.7})
    for name, values in columns.items():
        table = table.merge(pd.DataFrame({name: values}), how="cross")
    return table


def speed(models, captions="long"):
    columns = {"tower": ["image", "text"], "batch": [1, 32], "ratio_to_teacher": [2]}
    table = rows(models, backend=models[:1], **columns)
    return plots.speed(table.assign(captions=table.tower.map({"image": "", "text": captions})))


def layers(parts):
    table = pd.DataFrame({"tower": ["image", "text"], "part": parts[:2]})
    return plots.layers(table.assign(**{"branches ms": 2.0, "folded ms": 1.0}))


DRAW = {  # name: (function of three texts, number of axes)
    "contact_sheet": (lambda t: plots.contact_sheet([IMAGE] * 5, [f"{s} " * 9 for s in t] * 2), 8),
    "contact_sheet of nothing": (lambda t: plots.contact_sheet([], []), 4),
    "found": (lambda t: plots.found([t[0] * 99, t[1]], [IMAGE] * 2, [[IMAGE] * 3, [IMAGE]]), 10),
    "curves": (lambda t: plots.curves(rows(t, step=[1, 2]), "value", "R@1"), 1),
    "dynamics": (lambda t: plots.dynamics(rows(t, step=[1, 2], seconds=[3]), "value", "y", 0.3), 2),
    "no target": (lambda t: plots.dynamics(rows(t, step=[1, 2], seconds=[3]), "value", "y"), 2),
    "bars": (lambda t: plots.bars(rows(t), "R@1", reference=(0.1, "chance")), 1),
    "positions": (lambda t: plots.positions(rows(t, position=[10, 90])), 1),
    "dots": (lambda t: plots.dots(rows(t, attribute=t[:2])[:-1], "attribute", "accuracy", 0.5), 1),
    "speed": (lambda t: speed(t, t[0]), 4),
    "layers": (layers, 2),
}


def test_models_are_told_apart_and_labelled():
    assert {model: plots.label(model) for model in LABELS} == LABELS
    assert len(set(plots.STYLES)) >= 17  # students of the longest profile


@pytest.mark.parametrize("name", DRAW)
@given(texts=st.lists(st.text(min_size=1), min_size=3, max_size=3, unique=True))
@example(texts=NASTY)
@settings(max_examples=1, deadline=None)
@pytest.mark.filterwarnings("ignore:Glyph", "ignore:More than 20", "ignore:.*constrained_layout")
def test_text_in_figures_is_never_parsed_and_the_same_file_each_time(name, texts, tmp_path_factory):
    plots.style()
    draw, axes = DRAW[name]
    files = [tmp_path_factory.mktemp("figure") / "a.svg" for _ in range(2)]
    for file in files:
        figure = draw(texts)
        assert len(figure.axes) == axes
        plots.save(figure, file)
        plt.close("all")
    assert files[0].read_bytes() == files[1].read_bytes()
    # The file is well-formed, and matplotlib writes each text in a comment.
    parser = ET.XMLParser(target=ET.TreeBuilder(insert_comments=True))
    shown = [e.text for e in ET.parse(files[0], parser).iter() if e.tag is ET.Comment]
    if texts == NASTY and "nothing" not in name:
        assert any("$5 # $6" in text for text in shown)


@given(st.text(st.characters()))
def test_printable_keeps_what_xml_holds(text):
    shown = plots.printable(text)
    ET.fromstring(f"<a>{shown.replace('&', '').replace('<', '')}</a>")
    assert len(shown) == len(text) and plots.printable(shown) == shown
    assert text.isprintable() is False or shown == text


def test_rounding_makes_no_bar_negative():
    table = pd.DataFrame({"value": [1.0, 0.0], "low": [0.9, 1e-17], "high": [1 - 1e-16, 0.1]})
    below, above = plots.error_bars(table)
    assert below.tolist() == [pytest.approx(0.1), 0] and above.tolist() == [0, 0.1]
