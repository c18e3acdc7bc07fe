"""Several processes, one batch: each answers for its share of the rows, and all of them for the same loss.

The mean over the processes of their losses is the loss of one process over the whole batch, and so are the gradients.
"""
import os
import subprocess
import sys
from collections import deque

import torch
import torch.distributed as dist

from .losses import WHOLE, Part


class _Gather(torch.autograd.Function):
    """Local rows (b, ...) of each process -> all rows; the gradient is summed over the processes' losses."""

    @staticmethod
    def forward(ctx, local):
        parts = [torch.empty_like(local) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, local.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous().clone()
        dist.all_reduce(grad)
        return grad.chunk(dist.get_world_size())[dist.get_rank()]


def this_part(batch_size):
    """-> the `losses.Part` of this process."""
    if not dist.is_initialized():
        return WHOLE
    rank, share = dist.get_rank(), batch_size // dist.get_world_size()
    return Part(slice(rank * share, (rank + 1) * share), _Gather.apply)


def average_gradients(parameters):
    """Mean of the gradients over all processes. Not DDP: its hooks want one forward and one backward pass per step."""
    parameters = [p for p in parameters if p.requires_grad]
    for p in parameters:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    together = torch.cat([p.grad.flatten() for p in parameters])
    dist.all_reduce(together)
    for p, grad in zip(parameters, together.div_(dist.get_world_size()).split([p.numel() for p in parameters])):
        p.grad.copy_(grad.view(p.shape))


def is_first():
    """Whether this process writes files and reports."""
    return not dist.is_initialized() or dist.get_rank() == 0


def wait_for_all():
    """Return when every process has come here."""
    if dist.is_initialized():
        dist.barrier()


def in_processes(run, job):
    """run(job) in this process; where torchrun started it, in its group, of which the first process alone reports."""
    if "RANK" not in os.environ:  # torchrun sets it
        return run(job)
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        run(job, print if is_first() else lambda line: None)
    finally:
        dist.destroy_process_group()


def launch(module, job, processes):
    """`python -m module job` in `processes` processes of torchrun, whose lines are printed as they come."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m", module, str(job)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as workers:
        tail = deque(maxlen=100)
        for line in workers.stdout:
            print(line, end="", flush=True)
            tail.append(line)
    if workers.returncode:
        raise RuntimeError(f"torchrun ended with {workers.returncode}:\n{''.join(tail)}")
