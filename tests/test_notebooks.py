"""All notebooks at toy size: the profile `smoke`, from nothing to the PDF."""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from jettclip import pipeline

ROOT = Path(__file__).resolve().parent.parent
SNAKEMAKE = [
    sys.executable,
    "-m",
    "snakemake",
    "--cores",
    "all",
    "--nolock",
    "--rerun-incomplete",
    "--rerun-triggers",
    "params",
    "input",
    "mtime",
    "--scheduler",
    "greedy",
    "--quiet",
    "all",
    "--config",
    "profile=smoke",
]
RUN = ROOT / "runs/smoke"


def smoke():
    return subprocess.run(SNAKEMAKE, cwd=ROOT, capture_output=True, text=True)


@pytest.fixture(scope="module")
def first_run():
    shutil.rmtree(RUN, ignore_errors=True)
    (ROOT / "report/build/report-smoke.pdf").unlink(missing_ok=True)
    finished = smoke()
    assert finished.returncode == 0, finished.stdout[-4000:] + finished.stderr[-4000:]
    return finished


def read(name):
    with open(RUN / "results" / name) as file:
        return list(csv.DictReader(file))


def test_every_step_is_done_and_the_report_is_built(first_run):
    for folder in (
        "data",
        "teacher",
        "none-s0",
        "crd+fd-both-s0",
        "deploy",
        "evaluate",
        "report",
        "search",
    ):
        assert json.loads((RUN / folder / "done.json").read_text())["seconds"] > 0
    assert (ROOT / "report/build/report-smoke.pdf").read_bytes().startswith(b"%PDF")
    pages = {path.stem for path in (ROOT / "report/build/smoke").glob("*.html")}
    assert {"00_data", "02_train-crd+fd-both-s0", "04_evaluate", "05_report"} <= pages


def test_progress_is_told_step_by_step(first_run):
    assert "[ 1/9] 00_data done in" in first_run.stdout
    assert "step 4/4" in first_run.stdout


def test_results_have_models_and_intervals(first_run):
    rows = [
        row for row in read("retrieval.csv") if row["task"] == "long" and row["metric"] == "t2i_r10"
    ]
    assert [row["model"] for row in rows] == [
        "CLIP at 77 tokens",
        "teacher",
        "none-s0",
        "crd+fd-both-s0",
        "fd-long-context_length77-s0",
    ]
    assert all(float(row["low"]) <= float(row["value"]) <= float(row["high"]) for row in rows)
    assert {row["context"] for row in rows} == {"77", "248"}


def test_differences_are_corrected_for_their_number(first_run):
    rows = [
        row
        for row in read("differences.csv")
        if row["task"] == "long" and row["metric"] == "t2i_r10"
    ]
    assert len(rows) == 2 and all(
        float(row["p"]) <= float(row["p_holm"]) <= min(1, 2 * float(row["p"]) + 1e-6)
        or float(row["p_holm"]) == max(float(one["p_holm"]) for one in rows)
        for row in rows
    )


def test_cost_geometry_and_failures_are_told(first_run):
    assert {row["model"] for row in read("efficiency.csv")} == {
        "none-s0",
        "crd+fd-both-s0",
        "fd-long-context_length77-s0",
    }
    assert all(-1 < float(row["value"]) <= 1 for row in read("geometry.csv"))
    failures = read("failures.csv")
    assert failures and all(
        row["caption"] and int(row["rank"]) > 1 and row["first"] != row["second"]
        for row in failures
    )
    assert {row["attribute"] for row in read("attributes.csv")} == {
        "colour",
        "pattern",
        "place",
        "shape",
        "size",
    }


def test_a_77_token_model_is_at_chance_for_details_it_cannot_read(first_run):
    late = [
        row for row in read("details.csv") if row["attribute"] == "all" and row["part"] == "from 77"
    ]
    for model in ("CLIP at 77 tokens", "fd-long-context_length77-s0"):
        assert [row["value"] for row in late if row["model"] == model] == ["0.5"]


def test_folding_changes_nothing_but_rounding(first_run):
    row = read("fold.csv")[0]
    assert float(row["image_max_difference"]) < 1e-4 and float(row["text_max_difference"]) < 1e-4


def test_by_hand_the_numbers_are_the_same(first_run):
    """Notebook 02 run by papermill alone, as JupyterLab runs it: in no job of Snakemake, by nobody's step."""
    variant = "crd+fd-both-s0"
    parameters = pipeline.plan("smoke", ROOT)[f"02_train {variant}"].parameters | {
        "variant": "by-hand"
    }
    notebook = [ROOT / "notebooks/02_train.ipynb", RUN / "by-hand/02_train.ipynb"]
    notebook[1].parent.mkdir()
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(len(os.sched_getaffinity(0))),
    }  # as many as `--cores all` gives
    subprocess.run(
        [
            sys.executable,
            "-m",
            "papermill",
            *notebook,
            "--cwd",
            ROOT / "notebooks",
            "-y",
            json.dumps(parameters),
        ],
        check=True,
        env=environment,
        capture_output=True,
    )
    one, other = (
        pd.read_csv(RUN / name / "history.csv").drop(columns="seconds")
        for name in (variant, "by-hand")
    )
    assert one.equals(other) and len(one) == 2


def test_forms_without_pytorch_are_compared(first_run):
    rows = read("drift.csv")
    assert {"pytorch", "onnxruntime", "onnxruntime-int8"} <= {row["backend"] for row in rows}
    assert all(
        float(row["text_max_difference"]) < 1e-5 for row in rows if row["backend"] == "onnxruntime"
    )
    assert (RUN / "search/found.html").read_text().count("<figure>") == 4


def test_a_second_run_does_nothing(first_run):
    before = {path: path.stat().st_mtime_ns for path in RUN.rglob("done.json")}
    again = smoke()
    assert again.returncode == 0 and "started" not in again.stdout
    assert before == {path: path.stat().st_mtime_ns for path in RUN.rglob("done.json")}
