"""Several processes, or one in chunks, have the gradients of one process over the whole batch.

The model has no batch norm, which sees its own process's rows or its chunk.
"""

import sys
from unittest import mock

import pytest
import torch
from conftest import tiny_model
from training import make_data, quiet, run_group

from jettclip import create_model, train
from jettclip.distributed import in_processes, is_first, torchrun
from jettclip.losses import METHODS
from jettclip.train import Config, fit, optimizer_of

ROWS, ALL = 12, "+".join(METHODS)
SIZES = {"image_size": 32, "vision_patch_size": 16, "vision_width": 64, "vision_layers": 1}
SIZES |= {"embed_dim": 16, "text_width": 64, "text_heads": 1, "text_layers": 2}
# method, pairs, width of the teacher's features (the student's is 16)
CASES = [("none", "both", 16), ("crd+fd", "long", 16), (ALL, "both", 16), (ALL, "both", 24)]


def make_all(folder):
    """{width: (dataset, the teacher's cache)}"""
    return {width: make_data(folder, ROWS, width) for width in (16, 24)}


def gradients(data, folder, case, chunk=0):
    """Gradients of model and heads in the first step of a run."""
    (method, pairs, width), made = case, {}
    dataset, cache = data[width]

    def keep(model, config, heads):
        made.update({"model": model, "heads": heads})
        return optimizer_of(model, config, heads)

    torch.manual_seed(0)
    model, settings = create_model("LongCLIP-B", **SIZES), {"method": method, "pairs": pairs}
    config = Config(1, ROWS, chunk, components=4, teacher_scale=20.0, **settings)
    with mock.patch.object(train, "optimizer_of", keep):
        fit(model, config, dataset, folder, cache, report=quiet)
    parameters = {f"{module} {n}": p for module in made for n, p in made[module].named_parameters()}
    return {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in parameters.items()}


def largest_difference(a, b):
    """Relative to the length of the gradient of all parameters together."""
    assert a.keys() == b.keys()
    whole = torch.cat([g.flatten() for g in a.values()]).norm()
    return max(((a[name] - b[name]).norm() / whole).item() for name in a)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_all(tmp_path_factory.mktemp("caches"))


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory):
    """The gradients of every case in one process."""
    return {case: gradients(data, tmp_path_factory.mktemp("run"), case) for case in CASES}


def compute(job, report):
    """What a process of the group does."""
    caches, result = job
    data = make_all(caches)  # opens them
    found = [gradients(data, result / str(number), case) for number, case in enumerate(CASES)]
    if is_first():
        torch.save(found, result / "gradients.pt")


def test_processes(data, alone, tmp_path):
    run_group(3, in_processes, compute, (data[16][1].folder.parent, tmp_path))
    found = torch.load(tmp_path / "gradients.pt", weights_only=True)
    for case, gradient in zip(CASES, found, strict=True):
        assert largest_difference(alone[case], gradient) < 1e-5, case
        assert "model logit_scale" in gradient
        assert case[0] != ALL or "heads fuse_text.bias" in gradient


@pytest.mark.parametrize("case", CASES)
def test_chunks(case, data, alone, tmp_path):
    """7 + 5 rows at a time, primary components included."""
    assert largest_difference(alone[case], gradients(data, tmp_path, case, chunk=7)) < 1e-5


def test_batch_norm_remembers_a_chunk_once(data, tmp_path):
    (dataset, cache), model = data[16], tiny_model()
    config = Config(steps=3, batch_size=ROWS, method="crd", components=4, chunk=4)
    fit(model, config, dataset, tmp_path, cache, report=quiet)
    norms = [m for m in model.visual.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert {int(norm.num_batches_tracked) for norm in norms} == {3 * 3}


def test_the_error_of_a_process_is_shown(tmp_path, monkeypatch):
    (tmp_path / "python").write_text("#!/bin/sh\necho $@ fails; exit 3\n")
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(RuntimeError, match="with 3:\n.*-node 2 --standalone -m x a.json fails"):
        torchrun("x", "a.json", 2)
