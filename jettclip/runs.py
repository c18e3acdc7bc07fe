"""A run folder: its lock, its checkpoints and its history."""

import ast
import hashlib
import pickle
import shutil
import time
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError

from .distributed import is_first, rank, wait_for_all
from .utils import write_json, write_then_rename

LOCK_SECONDS, SAVE_SECONDS = 10, 60  # longest wait for a folder, and between checkpoints


def lock(folder):
    """Hold a run folder; each process of a group holds the lock of its rank."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        return FileLock(folder / f".lock{rank()}").acquire(timeout=LOCK_SECONDS)
    except Timeout:
        raise RuntimeError(f"another process trains in {folder}: wait, or stop it") from None


@contextmanager
def disk_space(folder):
    """What cannot be written to `folder` is an OSError that says so, not PyTorch's own."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        free, reason = shutil.disk_usage(there).free / 1e9, str(error).splitlines()[0]
        problem = f"cannot write to {folder}, where {free:.3f} GB are free ({reason:.100})"
        todo = "make room and try again; what is finished is kept"
        raise OSError(f"{problem}: {todo}") from error


def load_checkpoint(path, report):
    """What a checkpoint holds; None if there is none, or none that is whole."""
    if not path.exists():
        return None
    with open(path, "rb") as file:  # one that may not be read is an error, and not damaged
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
            report(f"{path} is damaged and not used: {str(error).splitlines()[0][:100]}")


def weights_hash(model):
    """SHA-256 of a model's state."""
    digest = hashlib.sha256()
    for tensor in model.state_dict().values():
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def code_hash(*modules):
    """SHA-256 of `modules`, or of all that training imports, as Python reads them: comments do not
    count."""
    folder, unused = Path(__file__).parent, ("search", "photos", "nearest", "web", "analysis")
    paths = [*sorted(folder.glob("*.py")), *sorted(folder.glob("datasets/*.py"))]
    used = [p for p in paths if (p.stem in modules if modules else p.stem not in unused)]
    code = [ast.dump(ast.parse(path.read_text(encoding="utf-8"))) for path in used]
    return hashlib.sha256("".join(code).encode()).hexdigest()


class Run:
    """What a checkpoint holds: step, history, and the states of model, optimizer and heads.

    settings: all that decides what the run computes. A checkpoint of other settings is not resumed.
    """

    def __init__(self, folder, config, model, heads, optimizer, inputs, report):
        self.folder, self.config, self.model, self.report = folder, config, model, report
        self.settings = {**asdict(config), "weights": list(config.weights)}
        self.settings |= {"model": model.name, "model_config": model.config, **inputs}
        self.settings |= {"start": weights_hash(model), "code": code_hash()}
        self.modules = {"model": model, "optimizer": optimizer, "heads": heads}
        self.step, self.history = 0, []
        self.start = self.saved = time.monotonic()

    def resume(self):
        """Load the folder's checkpoint, or clear the folder for a new start."""
        if is_first():
            for half in self.folder.glob(".*.ckpt.tmp*"):  # a killed process left it
                half.unlink()
        saved = load_checkpoint(self.folder / "last.ckpt", self.report)
        old = saved["settings"] if saved else self.settings
        if differs := [key for key, value in self.settings.items() if old.get(key, key) != value]:
            changed = f"{self.folder}: {', '.join(differs)} changed since its checkpoint"
            self.report(f"{changed}; training starts again")
        if saved and not differs:
            for name, module in self.modules.items():
                module.load_state_dict(saved[name])
            torch.set_rng_state(saved["rng"])
            self.step, self.history = saved["step"], saved["history"]
            self.start -= saved["seconds"]
            self.report(f"resumed {self.folder.name} at step {self.step} of {self.config.steps}")
        elif is_first():
            shutil.rmtree(self.folder / "student", ignore_errors=True)
            write_json(self.folder / "config.json", self.settings)

    def state(self):
        state = {"settings": self.settings, "step": self.step, "history": self.history}
        state |= {name: module.state_dict() for name, module in self.modules.items()}
        return {**state, "rng": torch.get_rng_state(), "seconds": time.monotonic() - self.start}

    def save(self):
        """Write last.ckpt and history.csv."""
        table, self.saved = pd.DataFrame(self.history), time.monotonic()
        with disk_space(self.folder):
            write_then_rename(self.folder / "last.ckpt", partial(torch.save, self.state()))
            write_then_rename(self.folder / "history.csv", partial(table.to_csv, index=False))

    def minute_passed(self):  # since the last checkpoint
        return time.monotonic() - self.saved > SAVE_SECONDS

    def log(self, loss, terms, validate):
        """Add a row to the history, and report it."""
        step, steps, seconds = self.step, self.config.steps, time.monotonic() - self.start
        row = {"loss": loss.item(), **{name: term.item() for name, term in terms.items()}}
        row["scale"] = self.model.logit_scale.exp().item()
        if validate:
            found = {name: float(value) for name, value in validate(self.model.eval()).items()}
            if self.config.keep_best:
                self.save_if_best(found)
            row |= found
        self.history.append({"step": step, "seconds": round(seconds, 1), **row})
        numbers = " ".join(f"{name} {value:.3f}" for name, value in row.items())
        times = f"{seconds:.0f} s, about {seconds / step * (steps - step):.0f} s left"
        self.report(f"{self.folder.name} step {step}/{steps} {numbers} | {times}")

    def save_if_best(self, found):
        """Write best.ckpt if the sum of an evaluation's numbers is above that of all before it."""
        earlier = [sum(past[name] for name in found) for past in self.history]
        if sum(found.values()) > max(earlier, default=-1):
            state = self.model.state_dict()
            write_then_rename(self.folder / "best.ckpt", partial(torch.save, state))

    def load_best(self):
        if self.config.keep_best:
            state = torch.load(self.folder / "best.ckpt", map_location="cpu", weights_only=True)
            self.model.load_state_dict(state)

    def not_finite(self, terms, sides, keys):
        """Save what is needed to look into a loss or gradient that is no number -> the error.

        It names rows of features, or if all are finite those of their gradients, (B, d) each.
        """
        broken = (~torch.cat(side, dim=1).isfinite().all(dim=1) for side in sides)  # (B,) each
        bad = next(([str(keys[i]) for i in rows.nonzero()] for rows in broken if rows.any()), [])
        file, state = self.folder / "not-finite.ckpt", {**self.state(), "keys": bad}
        if is_first():
            write_then_rename(file, partial(torch.save, state))
        wait_for_all()  # the first error ends all processes
        problem = f"no finite loss or gradient at step {self.step} of {self.folder}"
        losses = {name: term.item() for name, term in terms.items()}
        rows = f"rows of features or their gradients that are not finite: {', '.join(bad[:5])}"
        return FloatingPointError(f"{problem}: {losses}; {rows}; weights are in {file}")
