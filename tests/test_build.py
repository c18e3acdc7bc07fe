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
        "| name | value |",
        "| --- | --- |",
        "| x | 0.123 |",
        "| y | 12 |",
    ]


def test_executed_notebooks_as_html(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "ROOT", tmp_path)
    assert report.html("tiny") == []
    notebook = nbformat.v4.new_notebook(
        cells=[
            nbformat.v4.new_code_cell(
                "6 * 7",
                outputs=[
                    nbformat.v4.new_output(
                        "execute_result", {"text/plain": "forty-two"}, execution_count=1
                    )
                ],
            )
        ]
    )
    for name in ("data/00_data", "fd-s0/02_train", "crd-s0/02_train", "crd-s1/02_train.failed"):
        path = tmp_path / f"runs/tiny/{name}.ipynb"
        path.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(notebook, path)
    pages = report.html("tiny")
    assert sorted(page.name for page in pages) == [
        "00_data.html",
        "02_train-crd-s0.html",
        "02_train-fd-s0.html",
    ]
    assert all(
        page.parent == tmp_path / "report/build/tiny" and "forty-two" in page.read_text()
        for page in pages
    )


def test_the_report_of_the_committed_results_compiles(tmp_path, monkeypatch):
    """Tables that the committed results lack are told as not run."""
    monkeypatch.setattr(report, "report_pdf", lambda profile: tmp_path / "report.pdf")
    assert report.pdf("scenes").read_bytes().startswith(b"%PDF")


def test_a_missing_result_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "ROOT", tmp_path)
    with pytest.raises(
        FileNotFoundError,
        match="the report needs results/flickr8k and results/scenes: run `make report PROFILE",
    ):
        report.pdf("scenes")


def test_provenance_names_versions_and_machine():
    facts = report.provenance()
    assert (
        facts["torch"] == torch.__version__.split("+")[0]
        and facts["threads"] == torch.get_num_threads()
    )
    assert facts["commit"] and facts["python"] and facts["date"].startswith("20")
