"""Several processes share the rows of a batch, gather its features, and compute the loss of it all.

The mean of their gradients is then that of one process with the whole batch.
"""

import ctypes
import importlib
import json
import os
import signal
import subprocess
import sys
from collections import deque
from pathlib import Path

import torch
import torch.distributed as dist


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def device():
    """The GPU of this process, if there are any."""
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"


def is_first():
    """Whether this process writes files and reports."""
    return rank() == 0


def wait_for_all():
    if dist.is_initialized():
        dist.barrier()


class _Gather(torch.autograd.Function):  # the one in torch.distributed.nn is deprecated
    @staticmethod
    def forward(ctx, x):
        rows = [torch.empty_like(x) for _ in range(world_size())]
        dist.all_gather(rows, x.contiguous())
        return torch.cat(rows)  # (b, ...) -> (B, ...)

    @staticmethod
    def backward(ctx, grad):  # the sum over the processes, whose losses are equal
        return grad.chunk(world_size())[rank()] * world_size()


def gather(x):
    """Rows (b, ...) of this process -> rows (B, ...) of all processes, with gradient."""
    return _Gather.apply(x) if dist.is_initialized() else x


def average_gradients(parameters):
    """Mean of the gradients over all processes. Not by DDP: it allows one backward pass a step."""
    if world_size() > 1:
        parameters = [p for p in parameters if p.requires_grad]
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        mean = torch.cat([g.flatten() for g in gradients])
        dist.all_reduce(mean)
        mean = mean.div_(world_size()).split([p.numel() for p in parameters])
        for p, gradient in zip(parameters, mean, strict=True):
            p.grad = torch.empty_like(p).copy_(gradient.view(p.shape))


def end_with_parent():
    """On Linux, end this process when its parent is killed: no worker trains on unnoticed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # 1: PR_SET_PDEATHSIG


def start(module, run, job, processes=1):
    """Do the job file `job` here by `run`, or by `module` in `processes` processes of torchrun."""
    if processes > 1:
        return torchrun(module, job, processes)
    return run(json.loads(Path(job).read_text(encoding="utf-8")))


def in_processes(run, job):
    """run(job); as a process of torchrun, run(job, report) in its group, whose first one prints."""
    if "RANK" not in os.environ:  # torchrun sets it
        return run(job)
    end_with_parent()
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        run(job, print if is_first() else lambda line: None)
    finally:
        dist.destroy_process_group()


def torchrun(module, job, processes):
    """Run `python -m module job` in several processes of this machine.

    Prints their lines as they come; RuntimeError with the last ones if a process fails.
    """
    options = f"--nproc-per-node {processes} --standalone -m {module}"
    # This file starts torchrun: code between fork and exec may hang where threads have run.
    command = [sys.executable, "-P", __file__, *options.split(), job]
    tail, pipes = deque(maxlen=100), {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    pipes |= {"encoding": "utf-8", "errors": "replace"}
    with subprocess.Popen(command, **pipes) as workers:
        for line in workers.stdout:
            print(line, end="", flush=True)
            tail.append(line)
    if workers.returncode:
        raise RuntimeError(f"torchrun ended with {workers.returncode}:\n{''.join(tail)}")


def command_line(description, run):
    """Run the job file that the command line names, alone or as a process of torchrun."""
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit(description)
    in_processes(run, json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))


if __name__ == "__main__":
    end_with_parent()
    importlib.import_module("torch.distributed.run").main()
