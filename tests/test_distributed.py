"""Two processes, or one in chunks, have the gradients of one process over the whole batch.

The model has no batch norm: that one sees its own process's rows, as it does everywhere.
Run as a script, by torchrun, this file is one of the processes.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import tiny_model

from jettclip import create_model
from jettclip.data import PairDataset, draw_crops
from jettclip.features import FeatureCache
from jettclip.losses import METHODS
from jettclip.datasets.scenes import make_pairs
from jettclip.train import Config, fit

ROWS = 12
CASES = [
    ("none", "both"),
    *((method, "both") for method in METHODS),
    ("crd+fd", "long"),
    ("crd+mfd", "both"),
]
WIDE = [("crd+fd+icl+cross_kd+rd", "both")]  # the teacher's features are wider than the student's


def make_data(folder):
    table = make_pairs(ROWS, seed=1, size=32)
    crops = draw_crops(ROWS, 2, seed=0, smallest=0.5, flip=True)
    dataset = PairDataset(table, 32, crops=crops)
    quiet = {"report": lambda line: None}
    return dataset, {
        width: FeatureCache.build(
            folder / str(width), tiny_model(seed=1, embed_dim=width), "t", table, dataset, **quiet
        )
        for width in (16, 24)
    }


def gradients(method, pairs, data, folder, width=16, chunk=0):
    """Every parameter's gradient in the first step of a run."""
    dataset, cache = data
    torch.manual_seed(0)
    model = create_model(
        "LongCLIP-B",
        embed_dim=16,
        image_size=32,
        vision_patch_size=16,
        vision_width=64,
        vision_layers=1,
        text_width=64,
        text_heads=1,
        text_layers=2,
    )
    config = Config(
        steps=1,
        batch_size=ROWS,
        method=method,
        pairs=pairs,
        components=4,
        chunk=chunk,
        teacher_scale=20.0,
    )
    fit(model, config, dataset, folder, cache[width], report=lambda line: None)
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("caches"))


@pytest.fixture(scope="module")
def by_two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        __file__,
        str(folder),
    ]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr[-3000:]
    return torch.load(folder / "gradients.pt", weights_only=True)


def largest_difference(one, other):
    """Relative to the length of the gradient of all parameters together."""
    assert one.keys() == other.keys()
    whole = torch.cat([g.flatten() for g in one.values()]).norm()
    return max(((one[name] - other[name]).norm() / whole).item() for name in one)


@pytest.mark.parametrize(
    "method, pairs, width", [(*case, 16) for case in CASES] + [(*case, 24) for case in WIDE]
)
def test_two_processes(method, pairs, width, data, by_two_processes, tmp_path):
    alone = gradients(method, pairs, data, tmp_path, width)
    assert largest_difference(alone, by_two_processes[f"{method} {pairs} {width}"]) < 1e-5


@pytest.mark.parametrize("method, pairs", CASES)
def test_chunks(method, pairs, data, tmp_path):
    """7 + 5 rows at a time, primary components included."""
    alone, chunked = (
        gradients(method, pairs, data, tmp_path / str(chunk), chunk=chunk) for chunk in (0, 7)
    )
    assert largest_difference(alone, chunked) < 1e-5


def test_batch_norm_remembers_a_chunk_once(data, tmp_path):
    dataset, cache = data
    model = tiny_model()
    fit(
        model,
        Config(steps=3, batch_size=ROWS, method="crd", components=4, chunk=4),
        dataset,
        tmp_path,
        cache[16],
        report=lambda line: None,
    )
    norms = [
        module for module in model.visual.modules() if isinstance(module, torch.nn.BatchNorm2d)
    ]
    assert {int(module.num_batches_tracked) for module in norms} == {3 * 3} and {
        module.momentum for module in norms
    } == {0.1}


def process():
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    folder = Path(sys.argv[1])
    data = make_data(folder / "caches")
    found = {
        f"{method} {pairs} {width}": gradients(
            method, pairs, data, folder / f"{method}-{pairs}-{width}", width
        )
        for cases, width in ((CASES, 16), (WIDE, 24))
        for method, pairs in cases
    }
    if dist.get_rank() == 0:
        torch.save(found, folder / "gradients.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    process()
