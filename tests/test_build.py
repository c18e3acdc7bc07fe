"""The report: its PDF from the committed results, pages of notebooks, counts of the models."""

import importlib.util
import shutil
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from nbformat import v4

from jettclip.models import MODELS

ROOT = Path(__file__).resolve().parents[1]
spec = importlib.util.spec_from_file_location("report_build", ROOT / "report/build.py")
build = importlib.util.module_from_spec(spec)
spec.loader.exec_module(build)


def test_every_model_is_counted():
    """After a change of a model: python report/build.py --models."""
    table = pd.read_csv(ROOT / "results/models.csv")
    assert table.model.tolist() == sorted(MODELS)
    fresh = build.count_models(["JettCLIP-T", "LongCLIP-T", "MobileCLIP-S0"]).set_index("model")
    pd.testing.assert_frame_equal(table.set_index("model").loc[fresh.index], fresh, rtol=1e-4)


def test_only_finished_notebooks_become_pages(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "ROOT", tmp_path)
    assert build.html("tiny") == []
    output = v4.new_output("execute_result", {"text/plain": "42"}, execution_count=1)
    for name, exceptions in {  # of each cell, as papermill leaves them; None: not run
        "data/00_data": (False, False),
        "fd-s0/02_train": (False,),
        "crd-s0/02_train": (False,),
        "crd-s1/02_train": (False, True, None),  # failed
        "teacher/01_teacher_features": (False, None),  # killed
    }.items():
        marks = [{"papermill": {"exception": exception}} for exception in exceptions]
        cells = [v4.new_code_cell("6 * 7", outputs=[output], metadata=mark) for mark in marks]
        path = tmp_path / f"runs/tiny/{name}.ipynb"
        path.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(v4.new_notebook(cells=cells), path)
    pages = build.html("tiny")
    names = ["02_train-crd-s0.html", "00_data.html", "02_train-fd-s0.html"]
    assert pages == [tmp_path / "report/build/tiny" / name for name in names]
    assert all("42" in page.read_text() for page in pages)


def test_the_report_compiles_from_the_committed_results(tmp_path, monkeypatch):
    """From the needed ones alone too: it says what was not run."""
    shutil.copytree(ROOT / "report", tmp_path / "report", ignore=lambda *_: ["build"])
    monkeypatch.setattr(build, "ROOT", tmp_path)
    for needed in (True, False):
        for folder in ROOT.glob("results/*/"):
            if (folder.name in build.NEEDED) == needed:
                shutil.copytree(folder, tmp_path / "results" / folder.name)
        assert build.pdf("scenes").read_bytes().startswith(b"%PDF")


def test_mistakes_and_missing_results_are_named(tmp_path, monkeypatch):
    shutil.copytree(ROOT / "notebooks/profiles", tmp_path / "notebooks/profiles")
    monkeypatch.setattr(build, "ROOT", tmp_path)
    for profile, problem in (
        ("scens", "did you mean 'scenes'"),
        ("scenes", "run make report PROFILE=scenes and make report PROFILE=flickr8k"),
        ("smoke", "run make report PROFILE=smoke$"),
    ):
        monkeypatch.setattr("sys.argv", ["build.py", profile])
        with pytest.raises(SystemExit, match=f"error: .*{problem}"):
            build.main()
