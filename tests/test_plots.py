"""Every figure is drawn from rows; the same rows give the same file."""

import pandas as pd
import pytest
import torch

from jettclip import figures


@pytest.mark.parametrize("images", [1, 4, 5])
def test_contact_sheet(images, tmp_path):
    figure = figures.contact_sheet(
        [torch.zeros(3, 8, 8, dtype=torch.uint8)] * images, ["a title"] * images
    )
    figures.save(figure, tmp_path / "sheet.svg")
    assert (tmp_path / "sheet.svg").read_text().lstrip().startswith("<?xml")


def test_every_model_has_a_style_of_its_own():
    """As many as the longest profile has students of one seed."""
    assert len(set(figures.STYLES)) == len(figures.STYLES) >= 16
    history = pd.DataFrame(
        [(f"m{i}-s0", step, 2 * step, 0.1 * i) for i in range(16) for step in (1, 2)],
        columns=["model", "step", "seconds", "r1"],
    )
    figure = figures.dynamics(history, "r1", "R@1", target=0.3)
    assert [len(axis.lines) for axis in figure.axes] == [17, 17] and len(
        figure.legends[0].texts
    ) == 16


def test_attributes_and_failures(tmp_path):
    table = pd.DataFrame(
        [
            (model, attribute, 0.7, 0.6, 0.8)
            for model in ("a-s0", "b-s0")
            for attribute in ("colour", "size", "place")
        ][:-1],
        columns=["model", "attribute", "value", "low", "high"],
    )  # too few cases of one
    figure = figures.attributes(table)
    assert [one.get_text() for one in figure.axes[0].get_yticklabels()] == [
        "colour",
        "size",
        "place",
    ]
    image = torch.zeros(3, 8, 8, dtype=torch.uint8)
    figure = figures.failures(["a long caption " * 50, "short"], [image] * 2, [[image] * 3] * 2)
    texts = [one.get_text() for axis in figure.axes for one in axis.texts]
    assert texts[0].endswith(" ...") and texts[0].count("\n") == 8 and texts[1] == "short"
    figures.save(figure, tmp_path / "failures.svg")


def test_same_numbers_same_file(tmp_path):
    figures.style()
    for name in "ab":
        figures.save(figures.lengths([20, 25], [80, 120, 200]), tmp_path / f"{name}.svg")
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
