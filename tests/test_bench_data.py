"""The benchmark of the data path runs at toy size, and its growth law is the one that the numbers follow."""

import numpy as np
import pandas as pd
import pytest
import torch

from jettclip import bench_data
from jettclip.datasets.scenes import make_pairs


def test_growth_law():
    n = np.array([1e3, 1e5, 1e6])
    table = pd.DataFrame(
        {
            "pairs": n,
            "bytes_per_pair": 3.0,
            "cache_bytes": 3 * n,
            "worker_mb": 40.0,
            "open_seconds": 0.01 * n**0.5,
        }
    )
    law = bench_data.growth(table).set_index("what")
    assert law.exponent.to_dict() == pytest.approx(
        {"cache_bytes": 1, "worker_mb": 0, "open_seconds": 0.5}, abs=1e-9
    )
    assert law.value.to_dict() == pytest.approx(
        {"cache_bytes": 3e9, "worker_mb": 40, "open_seconds": 0.01 * 1e9**0.5}
    )


def test_every_row_is_measured(tmp_path):
    captions = make_pairs(20, 0).long
    assert bench_data.tokenizing(captions, 2)[0]["ratio"] == 1 and len(bench_data.decoding(2)) == 2
    rows = pd.DataFrame(bench_data.scale(tmp_path, captions, (1000, 2000)))
    assert (
        rows.pairs.tolist() == [1000, 2000]
        and (rows[["cache_bytes", "open_seconds", "rows_per_second", "worker_mb"]] > 0).all().all()
    )
    assert (rows.bytes_per_pair < 3200).all()
    assert not list(tmp_path.glob("scale*"))


def test_synthetic_features_are_unit_vectors(tmp_path):
    cache = bench_data.synthetic_cache(tmp_path / "cache", 1500, width=64)
    for features in cache.rows([0, 999, 1000, 1499], np.zeros(4, int)):
        assert features.shape == (4, 64) and torch.allclose(
            features.norm(dim=1), torch.ones(4), atol=1e-3
        )


def test_photographs_are_of_the_usual_size():
    assert 30_000 < len(bench_data.photograph()) < 120_000
