"""Several processes, one batch: each answers for its share of the rows, and all of them for the same loss.

The mean over the processes of their losses is the loss of one process over the whole batch, and so are the gradients.
Here too: how torchrun starts them, alone or on the nodes of a Slurm job, and how they are told to stop.
"""

import argparse
import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import threading
from collections import deque
from pathlib import Path

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
    for p, grad in zip(
        parameters, together.div_(dist.get_world_size()).split([p.numel() for p in parameters])
    ):
        p.grad.copy_(grad.view(p.shape))


def is_first():
    """Whether this process writes files and reports."""
    return not dist.is_initialized() or dist.get_rank() == 0


def wait_for_all():
    """Return when every process has come here."""
    if dist.is_initialized():
        dist.barrier()


# ---- told to stop: by Slurm before the time limit (SIGUSR1), or by anyone (SIGTERM)

STOP_SIGNALS = signal.SIGTERM, signal.SIGUSR1
_came = []  # numbers of the signals that came


class Stopped(Exception):
    """Training ended on a signal, after it saved a checkpoint."""


def _note(number, frame):
    _came.append(number)


@contextlib.contextmanager
def stoppable():
    """Inside, the signals are noted and no longer end the process: `stop_signal` tells of them."""
    if threading.current_thread() is not threading.main_thread():  # others cannot catch signals
        yield
        return
    before = {number: signal.signal(number, _note) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if before[signal.SIGTERM] is not _note:
            _came.clear()


def stop_signal():
    """-> number of the signal that came to any of the processes, or 0: the same in all, so that all stop at the same step."""
    number = max(_came, default=0)
    if not dist.is_initialized():
        return number
    number = torch.tensor(number, device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(number, dist.ReduceOp.MAX)
    return int(number)


# ---- starting them


def in_processes(run, job):
    """run(job) in this process; where torchrun started it, in its group, of which the first process alone reports."""
    if "RANK" not in os.environ:  # torchrun sets it
        return run(job)
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        run(job, print if is_first() else lambda line: None)
    except Stopped as stopped:
        sys.exit(str(stopped) if is_first() else 1)
    finally:
        dist.destroy_process_group()


def torchrun_command(processes, environment):
    """torchrun for `processes` processes: of this machine, or shared equally among the nodes of the Slurm job of `environment`.

    Several nodes meet at the first of them; srun starts a torchrun on each.
    """
    nodes = int(environment.get("SLURM_JOB_NUM_NODES", 1))
    if processes % nodes:
        raise ValueError(
            f"{processes} processes do not divide among the {nodes} nodes of this Slurm job"
        )
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        str(processes // nodes),
    ]
    if nodes == 1:
        return [*torchrun, "--standalone"]
    names = subprocess.run(
        ["scontrol", "show", "hostnames", environment["SLURM_JOB_NODELIST"]],
        capture_output=True,
        text=True,
        check=True,
    )
    job = environment["SLURM_JOB_ID"]
    cpus = (
        ["--cpus-per-task", environment["SLURM_CPUS_PER_TASK"]]
        if "SLURM_CPUS_PER_TASK" in environment
        else []
    )
    # --overlap: the notebook's own step holds the processors and GPUs of the job already.
    return [
        "srun",
        "--overlap",
        "--nodes",
        str(nodes),
        "--ntasks",
        str(nodes),
        "--ntasks-per-node",
        "1",
        *cpus,
        "--kill-on-bad-exit",
        *torchrun,
        "--nnodes",
        str(nodes),
        "--rdzv-backend",
        "c10d",
        "--rdzv-id",
        job,
        "--rdzv-endpoint",
        f"{names.stdout.split()[0]}:{20000 + int(job) % 10000}",
    ]


def torchrun(module, argument, processes):
    """Run `python -m module argument` in `processes` processes and print their lines as they come.

    Stopped if they stopped on a signal, else RuntimeError with the last lines, which hold the worker's traceback.
    """

    def before_start():  # in the child
        signal.signal(
            signal.SIGUSR1, signal.SIG_IGN
        )  # Slurm signals every process; the workers answer
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(
                1, signal.SIGTERM
            )  # PR_SET_PDEATHSIG: if this process is killed, the workers stop too

    command = [*torchrun_command(processes, os.environ), "-m", module, argument]
    with (
        stoppable(),
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            preexec_fn=before_start,
        ) as workers,
    ):
        for number in STOP_SIGNALS:
            signal.signal(
                number, lambda *_: workers.send_signal(signal.SIGTERM)
            )  # torchrun passes it on
        tail = deque(maxlen=100)
        for line in workers.stdout:
            print(line, end="", flush=True)
            tail.append(line)
    if stopped := [line.strip() for line in tail if "checkpoint is saved" in line]:
        raise Stopped(stopped[0])
    if workers.returncode:
        raise RuntimeError(f"torchrun ended with {workers.returncode}:\n{''.join(tail)}")


def start(module, run, job, processes=1):
    """run(the job of file `job`) here -> its result, or `module` in `processes` processes of torchrun."""
    if processes == 1:
        return run(json.loads(Path(job).read_text()))
    torchrun(module, str(job), processes)


def command_line(module, description, notebook, run):
    """The command line of a `module` that runs one job file, alone or as a process of torchrun."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {module}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("job", help=f"a job.json, as notebook {notebook} writes it")
    in_processes(run, json.loads(Path(parser.parse_args().job).read_text()))
