"""The benchmark notebooks run at toy size and measure every row."""

import json
import shutil
from pathlib import Path

import matplotlib
import pandas as pd
import psutil
import pytest
from conftest import TINY

from jettclip import data, models
from jettclip.checkpoints import save_folder
from jettclip.deploy import runtime
from jettclip.losses import METHODS

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"


@pytest.fixture
def run(table, tmp_path, monkeypatch):
    """Function that executes a benchmark as papermill does, without a kernel -> tables by name."""
    monkeypatch.chdir(NOTEBOOKS)
    monkeypatch.syspath_prepend(NOTEBOOKS)
    create = models.create_model
    monkeypatch.setattr(models, "create_model", lambda *_, **options: create("JettCLIP-T", **TINY))
    monkeypatch.setattr(data, "IN_MEMORY", data.IN_MEMORY)  # put back what a notebook sets
    table[["long"]].rename(columns={"long": "text"}).to_parquet(tmp_path / "captions.parquet")

    def executed(name, **parameters):
        parameters |= {"results": str(tmp_path), "repeats": 2}
        values = {"__name__": "__main__"}
        text = (NOTEBOOKS / f"benchmarks/{name}.ipynb").read_text("utf-8")
        for cell in json.loads(text)["cells"]:
            if cell["cell_type"] == "code":
                exec("".join(cell["source"]), values)
            if "parameters" in cell["metadata"].get("tags", ()):
                assert parameters.keys() <= values.keys()
                values |= parameters
        return {path.stem: pd.read_csv(path) for path in tmp_path.glob("*.csv")}

    with matplotlib.rc_context():
        yield executed


@pytest.fixture
def copied(exported, monkeypatch):
    """The tiny model, whose export is copied: test_export exports."""
    copy = lambda _, to: shutil.copytree(exported[1], to)  # noqa: E731
    monkeypatch.setattr("jettclip.deploy.export.export", copy)
    return exported[0]


def test_latency(run, copied, tmp_path, monkeypatch):
    monkeypatch.setattr(models, "create_model", lambda *_, **options: copied)
    monkeypatch.setattr("jettclip.deploy.runtime.installed_backends", lambda: [])
    start = psutil.Popen  # for the reference, which takes seconds, a process that does nothing

    def fake(command, **options):
        code = "import time; print(time.time())" if command[3].endswith(".pt") else command[2]
        return start([*command[:2], code, *command[3:]], **options)

    monkeypatch.setattr(psutil, "Popen", fake)
    small = {"models": ["JettCLIP-T"], "batches": [1], "reference": ["ViT-S", "ViT-S-32-alt"]}
    (table,) = run("latency", **small, captions=str(tmp_path / "captions.parquet")).values()
    reference, *backends = table[["model", "backend"]].drop_duplicates().backend
    assert (reference, *backends) == ("pytorch", "pytorch", "onnxruntime-int8")
    assert set(table.tower) == {"image", "text", "both"} and (table.ratio_to_teacher > 0).all()
    assert (table[["gmacs", "params_m", "start_s", "peak_mb"]] > 0).all().all()
    drift = table.groupby("backend").drift_text.max()
    assert drift.pytorch == 0 < drift["onnxruntime-int8"] and len([*tmp_path.glob("*.svg")]) == 1


def test_int8(run, copied, table, tmp_path):
    save_folder(copied, tmp_path / "run/student")
    (tmp_path / "data").mkdir()
    for split in ("train", "val", "test"):
        table.to_parquet(tmp_path / f"data/{split}.parquet")
    sizes = {"runs": [str(tmp_path / "run")], "untrained": [], "calibration": 4, "batches": [1, 2]}
    found = run("int8", **sizes)["int8"].set_index(["tower", "form"])
    for tower in ("image", "text"):
        plain = found.loc[tower, "onnxruntime"]
        assert plain.r1_value == plain.r10_value == 0 and plain.cosine == pytest.approx(1)
        for form in ("int8", "int8-static"):
            stored = found.loc[tower, f"onnxruntime, {form}"]
            assert 0.9 < stored.cosine < 1 and stored.file_mb < plain.file_mb
    assert (found[["ms_1", "ms_2"]] > 0).all().all() and (found.n == len(table)).all()


def test_training(run):
    sizes = {"batch_size": 4, "pairs": 8, "loss_batches": [40], "width": 36}
    tables = run("training", **sizes, methods=["afd", "mfd"])
    ratio = tables["losses"].set_index("what").ratio
    assert {"svd", "primary_components", "none", *METHODS} <= {*ratio.index}
    assert ratio.svd == ratio.none == 1 and (ratio > 0).all()
    table = tables["train"].fillna({"teacher": ""})
    steps = [("none", ""), ("afd", "cached"), ("mfd", "cached"), ("mfd", "online"), ("none", "")]
    assert list(zip(table.method, table.teacher, strict=True)) == steps
    assert list(table.precision) == ["fp32"] * 4 + ["bf16"]
    assert table.ratio[0] == 1 and (table.samples_s > 0).all() and table.waiting.between(0, 1).all()


def test_gpu(run, capsys):
    """Here the CPU is compared with itself; the notebook itself asserts its tolerances."""
    tables = run("gpu", models=["JettCLIP-T"], timed="JettCLIP-T", pairs=4, batches=[1, 2])
    error = tables["agreement"].set_index(["precision", "what"]).error
    assert (error["fp32"] == 0).all() and (error["bf16"] > 0).all()
    assert set(tables["autocast"].method) == {*METHODS} and (tables["optimizer"].error == 0).all()
    assert len(tables["inference"]) == 16 and len(tables["memory"]) == 2
    assert "All within the tolerances." in capsys.readouterr().out


def test_data(run, copied, tmp_path, capsys, monkeypatch):
    memory, asked = psutil.Process.memory_full_info, []

    def answer(process):
        """As on macOS, then as of a process that has just ended, then as it is."""
        asked.append(process.pid)
        if len(asked) <= 2:
            raise (psutil.AccessDenied, psutil.NoSuchProcess)[len(asked) - 1](process.pid)
        return memory(process)

    monkeypatch.setattr(psutil.Process, "memory_full_info", answer)
    sizes = {"sizes": [64, 96, 128], "cached_pairs": 500, "built_pairs": 16}
    sizes |= {"photos": 4, "batch_size": 8}
    tables = run("data", **sizes, captions=str(tmp_path / "captions.parquet"))
    speed = tables["speed"].groupby("what", sort=False)
    assert speed.ngroups == 6 and (speed.ratio.first() == 1).all()
    backends = runtime.installed_backends()
    engines = len(backends) + ("openvino-bf16" in backends)  # in 8 bits
    assert tables["speed"].per_second.notna().sum() == 2 + 2 * engines
    scale = tables["scale"].set_index("pairs")
    assert list(scale.index) == [64, 96, 128] and scale.worker_mb.iloc[-1] > 0
    assert (scale.drop(columns="worker_mb") > 0).all().all()
    assert (scale.bytes_per_pair < 3200).all()
    assert (scale.cache_bytes.diff()[1:] / 32 == 3 * 512 * 2 + 16).all()
    told = "cache_bytes: {0:.4g} at the largest, {0:.4g} by the line of those before it; 3.09e+03"
    assert told.format(scale.cache_bytes.iloc[-1]) in capsys.readouterr().out
    assert (tables["processes"].step_ms > 0).all() and list(tables["processes"].processes) == [1, 2]
    assert list(tables["photographs"].photographs) == [64, 96, 128]
    assert (tables["photographs"].search_ms > 0).all() and (tmp_path / "growth.svg").exists()
