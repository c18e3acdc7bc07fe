"""The benchmark notebooks run at toy size and measure every row."""

from pathlib import Path

import pandas as pd
import papermill

from jettclip.losses import METHODS

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"


def run(name, folder, **parameters):
    """Execute a benchmark -> its tables by name."""
    papermill.execute_notebook(
        NOTEBOOKS / f"benchmarks/{name}.ipynb",
        folder / f"{name}.ipynb",
        parameters | {"results": str(folder), "repeats": 2},
        cwd=NOTEBOOKS,
        progress_bar=False,
    )
    return {path.stem: pd.read_csv(path) for path in folder.glob("*.csv")}


def test_latency(tmp_path):
    small = {"models": ["JettCLIP-T"], "batches": [1], "reference": ["ViT-S", "ViT-S-32-alt"]}
    (table,) = run("latency", tmp_path, **small).values()
    reference, *backends = table[["model", "backend"]].drop_duplicates().backend
    assert reference == "pytorch" and {"pytorch", "onnxruntime", "onnxruntime-int8"} <= {*backends}
    assert set(table.tower) == {"image", "text", "both"} and (table.ratio_to_teacher > 0).all()
    assert (table[["gmacs", "params_m", "start_s", "peak_mb"]] > 0).all().all()
    exact = table[(table.model == "JettCLIP-T") & table.backend.isin(["pytorch", "onnxruntime"])]
    assert (exact.drift_text < 1e-5).all() and len(list(tmp_path.glob("*.svg"))) == 1


def test_training(tmp_path):
    sizes = {"batch_size": 4, "loss_batches": [40], "width": 36, "methods": ["afd", "mfd"]}
    tables = run("training", tmp_path, **sizes)
    ratio = tables["losses"].set_index("what").ratio
    assert {"svd", "primary_components", "none", *METHODS} <= {*ratio.index}
    assert ratio.svd == ratio.none == 1 and (ratio > 0).all()
    table = tables["train"].fillna({"teacher": ""})
    steps = [("none", ""), ("afd", "cached"), ("mfd", "cached"), ("mfd", "online")]
    assert list(zip(table.method, table.teacher, strict=True)) == steps
    assert table.ratio[0] == 1 and (table.samples_s > 0).all() and table.waiting.between(0, 1).all()


def test_data(tmp_path):
    sizes = {"sizes": [1000, 2000], "cached_pairs": 500, "built_pairs": 16}
    tables = run("data", tmp_path, **sizes)
    speed = tables["speed"].groupby("what", sort=False)
    assert speed.ngroups == 4 and (speed.ratio.first() == 1).all()
    assert tables["speed"].per_second.notna().sum() == 2
    scale = tables["scale"].set_index("pairs")
    assert list(scale.index) == [1000, 2000] and (scale > 0).all().all()
    assert (scale.bytes_per_pair < 3200).all()
