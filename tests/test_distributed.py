"""Several processes, or one in chunks, have the gradients of one process over the whole batch.

The model has no batch norm, which sees its own process's rows or its chunk. Run as a script, by
torchrun, this file is one of the processes.
"""

import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from conftest import tiny_model

from jettclip import create_model, train
from jettclip.data import PairDataset, draw_crops
from jettclip.datasets.scenes import make_pairs
from jettclip.features import FeatureCache
from jettclip.losses import METHODS
from jettclip.train import Config, fit, optimizer_of

ROWS, ALL = 12, "+".join(METHODS)
SIZES = {"image_size": 32, "vision_patch_size": 16, "vision_width": 64, "vision_layers": 1}
SIZES |= {"embed_dim": 16, "text_width": 64, "text_heads": 1, "text_layers": 2}
# method, pairs, width of the teacher's features (the student's is 16)
FEW = [("none", "both", 16), ("crd+fd", "long", 16), (ALL, "both", 16), (ALL, "both", 24)]
CASES = {2: FEW + [(method, "both", 16) for method in METHODS], 3: FEW}


def make_data(folder):
    table = make_pairs(ROWS, seed=1, size=32)
    dataset = PairDataset(table, 32, crops=draw_crops(ROWS, 2, seed=0, smallest=0.5, flip=True))
    caches = {}
    for width in (16, 24):
        teacher = tiny_model(seed=1, embed_dim=width)
        cache = folder / str(width), teacher, "t", table, dataset
        caches[width] = FeatureCache.build(*cache, report=lambda line: None)
    return dataset, caches


def gradients(data, folder, method, pairs, width, chunk=0):
    """Gradients of model and heads in the first step of a run."""
    (dataset, caches), made = data, {}

    def keep(model, config, heads):
        made.update({"model": model, "heads": heads})
        return optimizer_of(model, config, heads)

    torch.manual_seed(0)
    model, settings = create_model("LongCLIP-B", **SIZES), {"method": method, "pairs": pairs}
    config = Config(1, ROWS, chunk, components=4, teacher_scale=20.0, **settings)
    with mock.patch.object(train, "optimizer_of", keep):
        fit(model, config, dataset, folder, caches[width], report=lambda line: None)
    return {
        f"{module} {name}": torch.zeros_like(p) if p.grad is None else p.grad
        for module in made
        for name, p in made[module].named_parameters()
    }


def largest_difference(a, b):
    """Relative to the length of the gradient of all parameters together."""
    assert a.keys() == b.keys()
    whole = torch.cat([g.flatten() for g in a.values()]).norm()
    return max(((a[name] - b[name]).norm() / whole).item() for name in a)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("caches"))


@pytest.mark.parametrize("processes", [2, 3])
def test_processes(processes, data, tmp_path):
    options = f"-m torch.distributed.run --standalone --nproc-per-node {processes}".split()
    command = [sys.executable, *options, __file__, str(tmp_path), str(processes)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr[-3000:]
    found = torch.load(tmp_path / "gradients.pt", weights_only=True)
    for number, case in enumerate(CASES[processes]):
        alone = gradients(data, tmp_path / f"alone{number}", *case)
        assert largest_difference(alone, found[number]) < 1e-5, case
        assert "model logit_scale" in alone and (
            len(case[0]) < 20 or "heads fuse_text.bias" in alone
        )


@pytest.mark.parametrize("case", FEW)
def test_chunks(case, data, tmp_path):
    """7 + 5 rows at a time, primary components included."""
    whole, chunked = (gradients(data, tmp_path / str(n), *case, chunk=n) for n in (0, 7))
    assert largest_difference(whole, chunked) < 1e-5


def test_batch_norm_remembers_a_chunk_once(data, tmp_path):
    (dataset, caches), model = data, tiny_model()
    config = Config(steps=3, batch_size=ROWS, method="crd", components=4, chunk=4)
    fit(model, config, dataset, tmp_path, caches[16], report=lambda line: None)
    norms = [m for m in model.visual.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert {int(norm.num_batches_tracked) for norm in norms} == {3 * 3}


def process(folder, processes):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    data = make_data(folder / "caches")
    cases = enumerate(CASES[int(processes)])
    found = {number: gradients(data, folder / str(number), *case) for number, case in cases}
    if torch.distributed.get_rank() == 0:
        torch.save(found, folder / "gradients.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    process(Path(sys.argv[1]), sys.argv[2])
