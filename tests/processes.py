"""Processes for tests, forked from a server that has imported PyTorch: each starts at once."""

import multiprocessing
import os
import socket

FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload(["jettclip.train", "jettclip.datasets.scenes"])


def _call(environment, run, *arguments):
    os.environ.update(environment)
    run(*arguments)


def fork(run, *arguments, **environment):
    """Start run(*arguments) with additional environment variables -> the process."""
    process = FORK.Process(target=_call, args=(environment, run, *arguments), daemon=True)
    process.start()
    return process


def fork_group(processes, run, *arguments):
    """Start run(*arguments) in as many processes as a torchrun would -> the processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    group["WORLD_SIZE"] = str(processes)
    return [fork(run, *arguments, RANK=str(rank), **group) for rank in range(processes)]


def join(group):
    for process in group:
        process.join(300)
    assert not any(process.exitcode for process in group), group
