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
