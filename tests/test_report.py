"""README's tables are those of results/, and what the report needs is asked for by name."""
from pathlib import Path

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
