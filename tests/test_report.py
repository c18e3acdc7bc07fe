"""README's tables are those of results/, and what the report needs is asked for by name."""
from pathlib import Path

import nbformat
import pandas as pd
import pytest
import torch

from jettclip import report
from jettclip.models import MODELS

ROOT = Path(__file__).resolve().parents[1]


def test_readme_tells_the_results():
    """After new results: make readme."""
    text = (ROOT / "README.md").read_text()
    assert report.readme(text) == text
    with pytest.raises(ValueError, match="one pair of markers <!-- results -->"):
        report.readme(text.replace("<!-- results -->", ""))


def test_every_model_is_counted():
    """After a change of a model: python -m jettclip.report models."""
    table = pd.read_csv(ROOT / "results/models.csv")
    assert table.model.tolist() == sorted(MODELS)
    fresh = report.count_models(["JettCLIP-T", "LongCLIP-T", "MobileCLIP-S0"]).set_index("model")
    kept = table.set_index("model").loc[fresh.index]
    pd.testing.assert_frame_equal(kept, fresh, rtol=1e-4)


def test_markdown():
    table = pd.DataFrame({"a": ["x", "y"], "b": [0.12345, 12.0], "c": [1, 2]})
    assert report.markdown(table, {"a": "name", "b": "value"}).splitlines() == [
        "| name | value |", "| --- | --- |", "| x | 0.123 |", "| y | 12 |"]


@pytest.mark.parametrize("images", [1, 4, 5])
def test_contact_sheet(images, tmp_path):
    figure = report.contact_sheet([torch.zeros(3, 8, 8, dtype=torch.uint8)] * images, ["a title"] * images)
    report.save(figure, tmp_path / "sheet.svg")
    assert (tmp_path / "sheet.svg").read_text().lstrip().startswith("<?xml")


def test_every_model_has_a_style_of_its_own():
    """As many as the longest profile has students of one seed."""
    assert len(set(report.STYLES)) == len(report.STYLES) >= 16
    history = pd.DataFrame([(f"m{i}-s0", step, 2 * step, 0.1 * i) for i in range(16) for step in (1, 2)], columns=["model", "step", "seconds", "r1"])
    figure = report.dynamics(history, "r1", "R@1", target=0.3)
    assert [len(axis.lines) for axis in figure.axes] == [17, 17] and len(figure.legends[0].texts) == 16


def test_attributes_and_failures(tmp_path):
    table = pd.DataFrame([(model, attribute, 0.7, 0.6, 0.8) for model in ("a-s0", "b-s0") for attribute in ("colour", "size", "place")][:-1],
                         columns=["model", "attribute", "value", "low", "high"])  # too few cases of one
    figure = report.attributes(table)
    assert [one.get_text() for one in figure.axes[0].get_yticklabels()] == ["colour", "size", "place"]
    image = torch.zeros(3, 8, 8, dtype=torch.uint8)
    figure = report.failures(["a long caption " * 50, "short"], [image] * 2, [[image] * 3] * 2)
    texts = [one.get_text() for axis in figure.axes for one in axis.texts]
    assert texts[0].endswith(" ...") and texts[0].count("\n") == 8 and texts[1] == "short"
    report.save(figure, tmp_path / "failures.svg")


def test_executed_notebooks_as_html(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "ROOT", tmp_path)
    assert report.html("tiny") == []
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("6 * 7", outputs=[nbformat.v4.new_output(
        "execute_result", {"text/plain": "forty-two"}, execution_count=1)])])
    for name in ("data/00_data", "fd-s0/02_train", "crd-s0/02_train", "crd-s1/02_train.failed"):
        path = tmp_path / f"runs/tiny/{name}.ipynb"
        path.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(notebook, path)
    pages = report.html("tiny")
    assert sorted(page.name for page in pages) == ["00_data.html", "02_train-crd-s0.html", "02_train-fd-s0.html"]
    assert all(page.parent == tmp_path / "report/build/tiny" and "forty-two" in page.read_text() for page in pages)


def test_the_report_of_the_committed_results_compiles(tmp_path, monkeypatch):
    """Tables that the committed results lack are told as not run."""
    monkeypatch.setattr(report, "report_pdf", lambda profile: tmp_path / "report.pdf")
    assert report.pdf("scenes").read_bytes().startswith(b"%PDF")


def test_same_numbers_same_file(tmp_path):
    report.style()
    for name in "ab":
        report.save(report.lengths([20, 25], [80, 120, 200]), tmp_path / f"{name}.svg")
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_a_missing_result_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "ROOT", tmp_path)
    with pytest.raises(FileNotFoundError, match="the report needs results/flickr8k and results/scenes: run `make report PROFILE"):
        report.pdf("scenes")


def test_provenance_names_versions_and_machine():
    facts = report.provenance()
    assert facts["torch"] == torch.__version__.split("+")[0] and facts["threads"] == torch.get_num_threads()
    assert facts["commit"] and facts["python"] and facts["date"].startswith("20")
