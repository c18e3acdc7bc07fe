"""What the tests of training share: tiny data, and processes that start at once.

They fork from a server that has imported PyTorch.
"""

import multiprocessing
import os
import socket

from conftest import tiny_model

from jettclip.data import PairDataset, draw_crops
from jettclip.datasets.scenes import make_pairs
from jettclip.features import FeatureCache

FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload(["jettclip.train", "jettclip.datasets.scenes"])


def quiet(line):
    """A `report` that prints nothing."""


def make_data(folder, n, width=16):
    """`n` pairs of two crops each, and a teacher's features of them."""
    table = make_pairs(n, seed=1, size=32)
    dataset = PairDataset(table, 32, crops=draw_crops(n, 2, seed=0, smallest=0.5, flip=True))
    build = folder / str(width), tiny_model(seed=1, embed_dim=width), "t", table, dataset
    return dataset, FeatureCache.build(*build, report=quiet)


def _call(environment, run, *arguments):
    os.environ.update(environment)
    run(*arguments)


def fork(run, *arguments, **environment):
    """Start run(*arguments) with additional environment variables -> the process."""
    process = FORK.Process(target=_call, args=(environment, run, *arguments), daemon=True)
    process.start()
    return process


def run_group(processes, run, *arguments):
    """run(*arguments) in as many processes as a torchrun would start."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    group["WORLD_SIZE"] = str(processes)
    group = [fork(run, *arguments, RANK=str(rank), **group) for rank in range(processes)]
    for process in group:
        process.join(300)
    assert not any(process.exitcode for process in group), group
