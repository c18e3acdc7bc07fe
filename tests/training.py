"""What the tests of training share: tiny data, and processes that start at once.

They fork from a server that has imported PyTorch.
"""

import multiprocessing
import os
import socket

import torch
from conftest import tiny_model

from jettclip.data import PairDataset, draw_crops
from jettclip.datasets.scenes import make_pairs
from jettclip.features import FeatureCache
from jettclip.train import Config, fit

FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload(["jettclip.train", "jettclip.datasets.scenes"])


def quiet(line):
    """A `report` that prints nothing."""


def make_data(folder, n, width=16, size=32):
    """`n` pairs of two crops each, and a teacher's features of them."""
    table = make_pairs(n, seed=1, size=size)
    dataset = PairDataset(table, size, crops=draw_crops(n, 2, seed=0, smallest=0.5, flip=True))
    teacher = tiny_model(seed=1, embed_dim=width, image_size=size)
    build = folder / str(width), teacher, "t", table, dataset
    return dataset, FeatureCache.build(*build, report=quiet)


def first_step(folder, data, model, **settings):
    """A step with all pairs -> its clipped gradient, and the statistics of batch norms after it."""
    settings = {"components": 12, "teacher_scale": 20.0, "batch_size": len(data[0]), **settings}
    fit(model, Config(steps=1, **settings), data[0], folder, data[1], report=quiet)
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    statistics = [b for name, b in model.named_buffers() if "running" in name]
    return gradient, torch.cat([*statistics, torch.ones(1)])


def fork(run, *arguments):
    """Start run(*arguments) in a process -> the process."""
    process = FORK.Process(target=run, args=arguments, daemon=True)
    process.start()
    return process


def _in_group(variables, run, *arguments):
    os.environ.update(variables)
    run(*arguments)


def run_group(processes, run, *arguments):
    """run(*arguments) in as many processes as a torchrun would start."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    group["WORLD_SIZE"] = str(processes)
    ranks = ({**group, "RANK": str(rank)} for rank in range(processes))
    started = [fork(_in_group, variables, run, *arguments) for variables in ranks]
    for process in started:
        process.join(300)
    assert all(process.exitcode == 0 for process in started), started
