"""Train a teacher or a student, with checkpoints and exact resume.

    python -m jettclip.train runs/scenes/fd-both-s0/job.json                       # one process
    torchrun --nproc-per-node 2 -m jettclip.train runs/scenes/fd-both-s0/job.json  # or several

Notebook 02 calls `fit`, or writes the job file. A run folder holds `config.json`, `history.csv`,
`last.ckpt` and at the end `student/`. A killed run resumes and ends with the very same bytes.
"""

import contextlib
import json
import math
import os
import pickle
import shutil
import time
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from filelock import FileLock, Timeout
from torch import nn
from tqdm import tqdm

from . import distributed
from .checkpoints import fill, save_folder
from .data import dataset_for, epoch_batches, loader
from .distributed import average_gradients, gather, is_first, rank, world_size
from .evaluate import recall
from .features import FeatureCache, fingerprint
from .losses import Heads, parse_method, total_loss
from .models import create_model
from .utils import nearest, progress, write_json, write_then_rename

LOCK_SECONDS, SAVE_SECONDS = 10, 60  # longest wait for a run folder, time between checkpoints


@dataclass
class Config:
    """Settings of a run. weights: contrastive long and short, distillation long and short."""

    steps: int
    batch_size: int = 128  # of all processes together
    chunk: int = 0  # rows in memory at once; 0: all
    lr: float = 1e-3
    warmup: int = 20
    weight_decay: float = 0.1
    seed: int = 0
    method: str = "none"
    pairs: str = "both"
    weights: tuple = (0.8, 0.4, 1.5, 0.5)
    method_weights: dict = field(default_factory=dict)  # factor of a method, 1 where absent
    components: int = 32
    label_smoothing: float = 0.1
    teacher_scale: float = 100.0
    learn_scale: bool = True
    frozen_positions: int = 0  # first rows of the text's position table (Long-CLIP: 20)
    bf16: bool = False
    eval_every: int = 50
    save_every: int = 50  # and every minute

    def __post_init__(self):
        parse_method("+".join(self.method_weights) or "none")
        if unused := {*self.method_weights} - {*parse_method(self.method)}:
            raise ValueError(f"method_weights has {unused}, the method {self.method!r} has not")
        if self.pairs not in ("long", "both"):
            raise ValueError(nearest(self.pairs, ("long", "both"), "pairs"))
        self.weights = tuple(self.weights)

    def loss(self):
        """The arguments of `total_loss`."""
        names = "method pairs weights components label_smoothing teacher_scale method_weights"
        return {name: getattr(self, name) for name in names.split()}


def learning_rate(step, config):
    """Linear warm-up, then a cosine to zero."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    done = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.lr * 0.5 * (1 + math.cos(math.pi * done))


def optimizer_of(model, config, heads=None):
    """AdamW; norms, biases, scales and positions carry no weight decay."""
    groups = [{"params": [], "weight_decay": decay} for decay in (config.weight_decay, 0.0)]
    for name, p in (*model.named_parameters(), *(heads.named_parameters() if heads else ())):
        plain = p.ndim < 2 or "positional" in name or "layer_scale" in name
        groups[plain]["params"].append(p)
    fused = model.logit_scale.is_cuda or None
    return torch.optim.AdamW(groups, config.lr, betas=(0.9, 0.98), eps=1e-6, fused=fused)


# ---- one step


def encode(model, inputs, bf16=False):
    """Images, long and short captions, perhaps masked images -> features of each, float (B, d)."""
    images, long, short, *masked = inputs
    with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
        features = [model.encode_image(images)]
        # Both captions at once: batch norm has one set of statistics for them in evaluation, too.
        features += model.encode_text(torch.cat([long, short])).split(len(long))  # (2B, d)
        return [f.float() for f in (*features, *map(model.encode_image, masked))]


def backward(model, inputs, objective, config):
    """Gradients of a loss of features, if it is finite -> (loss, terms, features).

    inputs: as `encode` takes them; objective: features -> (loss, terms).
    """
    if 0 < config.chunk < len(inputs[0]):
        return grad_cache(model, inputs, objective, config)
    features = encode(model, inputs, config.bf16)
    loss, terms = objective(features)
    if torch.isfinite(loss):
        loss.backward()
    return loss, terms, features


def grad_cache(model, inputs, objective, config):
    """`backward` in chunks of `config.chunk` rows (Gao et al., GradCache, 2021).

    First all features, then their gradients, then each chunk again, which passes its gradients on.
    Batch norm alone sees single chunks; the second pass updates its statistics.
    """
    chunks = list(zip(*(x.split(config.chunk) for x in inputs), strict=True))
    statistics = [buffer.clone() for buffer in model.buffers()]
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        features = zip(*(encode(model, chunk, config.bf16) for chunk in chunks), strict=True)
        features = [torch.cat(f).requires_grad_() for f in features]
        for buffer, before in zip(model.buffers(), statistics, strict=True):
            buffer.copy_(before)
    loss, terms = objective(features)
    if torch.isfinite(loss):
        loss.backward()  # reaches the features, the logit scale and the heads
        gradients = (torch.zeros_like(f) if f.grad is None else f.grad for f in features)
        gradients = zip(*(g.split(config.chunk) for g in gradients), strict=True)
        for chunk, gradient in zip(chunks, gradients, strict=True):
            torch.autograd.backward(encode(model, chunk, config.bf16), gradient)
    return loss, terms, features


def hide_patches(images, seed, step, first=0):
    """Images with 3/4 of their 8 x 8 patches black (CLIP-KD); images[0] is row `first` of a batch.

    A mask depends on (seed, step, row) alone.
    """
    drawn = np.random.default_rng([seed, step]).random((first + len(images), 1, 8, 8))
    seen = torch.from_numpy(drawn[first:] >= 0.75).to(images)
    return images * nn.functional.interpolate(seen, images.shape[2:])


def batches_after(step, dataset, config, device):
    """This process's rows of the batches after `step`, which depend on (seed, step) alone."""
    share = config.batch_size // world_size()
    rows = slice(rank() * share, (rank() + 1) * share)
    n, crops = len(dataset) // config.batch_size, dataset.crops.shape[1]
    for epoch in range(step // n, math.ceil(config.steps / n)):
        batches = epoch_batches(len(dataset), config.batch_size, config.seed, epoch, crops)
        batches = batches[max(0, step - epoch * n) : config.steps - epoch * n, rows]
        yield from loader(dataset, batches, device)


# ---- a run folder


def lock(folder):
    """Hold a run folder for this process (of several that train together, for the first)."""
    if not is_first():
        return contextlib.nullcontext()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        return FileLock(folder / ".lock").acquire(timeout=2)
    except Timeout:
        error = f"another process trains in {folder}: stop it, or wait until it has finished"
        raise RuntimeError(error) from None


def save_checkpoint(folder, state):
    """Write last.ckpt; the one before stays as previous.ckpt, in case the disk damages this one."""

    def write(path):
        torch.save(state, path)
        if (folder / "last.ckpt").exists():
            os.replace(folder / "last.ckpt", folder / "previous.ckpt")

    write_then_rename(folder / "last.ckpt", write)


def load_checkpoint(folder, report=print):
    """The newest whole checkpoint of a run folder, or None."""
    for path in (folder / "last.ckpt", folder / "previous.ckpt"):
        try:
            return torch.load(path, weights_only=True)
        except FileNotFoundError:
            continue
        except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
            report(f"{path} is damaged and not used: {str(error).splitlines()[0][:100]}")


class Run:
    """What a checkpoint holds: step, history, and the states of model, optimizer and heads."""

    def __init__(self, folder, config, model, heads, report):
        self.folder, self.config, self.report = folder, config, report
        self.settings = {**asdict(config), "weights": list(config.weights)}
        self.settings |= {"model": model.name, "model_config": model.config}
        self.model, self.optimizer = model, optimizer_of(model, config, heads)
        self.modules = {"model": model, "optimizer": self.optimizer, "heads": heads}
        self.step, self.history, self.start = 0, [], time.monotonic()

    def resume(self):
        """Load the folder's checkpoint, or clear the folder for a new start."""
        self.saved = time.monotonic()
        if saved := load_checkpoint(self.folder, self.report):
            differs = [k for k, v in self.settings.items() if saved["settings"].get(k, self) != v]
            if differs:
                error = f"{self.folder} holds a run with other settings ({', '.join(differs)}): "
                raise ValueError(error + "delete it or name another folder")
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
        save_checkpoint(self.folder, self.state())
        table = pd.DataFrame(self.history)
        write_then_rename(self.folder / "history.csv", lambda path: table.to_csv(path, index=False))
        self.saved = time.monotonic()

    def log(self, loss, terms, validate):
        """Add a row to the history, and report it."""
        step, steps, seconds = self.step, self.config.steps, time.monotonic() - self.start
        row = {"loss": loss.item(), **{name: term.item() for name, term in terms.items()}}
        row["scale"] = self.model.logit_scale.exp().item()
        if validate:
            row |= {name: float(value) for name, value in validate(self.model.eval()).items()}
        self.history.append({"step": step, "seconds": round(seconds, 1), **row})
        numbers = " ".join(f"{name} {value:.3f}" for name, value in row.items())
        times = f"{seconds:.0f} s, about {seconds / step * (steps - step):.0f} s left"
        self.report(f"{self.folder.name} step {step}/{steps} {numbers} | {times}")

    def not_finite(self, terms, features, keys):
        """Save what is needed to look into a loss that is no number -> the error."""
        bad = ~torch.stack([f.isfinite().all(dim=1) for f in features]).all(dim=0)  # (B,)
        bad = [str(key) for key, is_bad in zip(keys, bad.tolist(), strict=True) if is_bad]
        file, state = self.folder / "not-finite.ckpt", {**self.state(), "keys": bad}
        write_then_rename(file, lambda path: torch.save(state, path))
        losses = {name: term.item() for name, term in terms.items()}
        return FloatingPointError(
            f"loss is {sum(losses.values())} at step {self.step} of {self.folder}: {losses}; rows with "
            f"features that are not finite: {', '.join(bad[:5]) or 'none'}; weights are in {file}; "
            "try a lower lr"
        )


def check(config, dataset, caches):
    """Refuse what cannot be trained."""
    size, processes = config.batch_size, world_size()
    if config.method != "none" and not caches:
        raise ValueError(
            f"method {config.method!r} distils: it needs a feature cache (notebook 01)"
        )
    if len(dataset) < size:
        raise ValueError(
            f"{len(dataset)} training pairs do not fill a batch: lower batch_size {size}"
        )
    if size % processes:
        raise ValueError(f"batch_size {size} does not divide among {processes} processes")


def fit(model, config, dataset, folder, cache=None, validate=None, report=tqdm.write):
    """Train `model` on `dataset` (a PairDataset) and return it in evaluation mode.

    cache: for distillation, the teacher's FeatureCache of the same rows and crops, or a list of
    several teachers'. validate: model -> numbers, every `eval_every` steps and at the end.
    A run that was killed resumes from its folder. One more process there is an error.
    """
    # set-up
    folder, device, methods = Path(folder), model.logit_scale.device, parse_method(config.method)
    caches = [cache] if isinstance(cache, FeatureCache) else cache or []
    check(config, dataset, caches)
    width, caches = model.config["embed_dim"], caches if methods else []
    widths = [cache.image.shape[2] for cache in caches]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        heads = Heads(config.method, width, sum(widths) or width).to(device)
    model.logit_scale.requires_grad_(config.learn_scale)
    trained = [*model.parameters(), *heads.parameters()]
    run = Run(folder, config, model, heads, report)
    learned = {"heads": heads, "teacher_widths": widths}

    def objective(features, teacher):
        features, scale = [gather(f) for f in features], model.logit_scale.exp()
        return total_loss(features, teacher, scale, **config.loss(), **learned)

    with lock(folder):
        run.resume()
        model.to(memory_format=torch.channels_last)
        batches = batches_after(run.step, dataset, config, device)
        batches = progress(batches, config.steps, folder.name, run.step, report)
        for rows, ks, images, *captions in batches:
            # gradients
            run.step += 1
            model.train()
            images = images.contiguous(memory_format=torch.channels_last)
            inputs = [images, *captions]
            if "mfd" in methods:
                inputs.append(hide_patches(images, config.seed, run.step, rank() * len(images)))
            teacher = zip(*(cache.rows(rows, ks) for cache in caches), strict=True)
            teacher = [gather(torch.cat(f, dim=1).to(device)) for f in teacher]  # 3 x (B, widths)
            run.optimizer.zero_grad(set_to_none=True)
            loss_of = partial(objective, teacher=teacher)
            loss, terms, features = backward(model, inputs, loss_of, config)
            if not torch.isfinite(loss):
                keys = [dataset.keys[row] for row in gather(rows.to(device)).tolist()]
                raise run.not_finite(terms, [*map(gather, features), *teacher], keys)

            # update
            if config.frozen_positions:
                model.text.positional_embedding.grad[: config.frozen_positions] = 0
            for group in run.optimizer.param_groups:
                group["lr"] = learning_rate(run.step - 1, config)
            average_gradients(trained)
            nn.utils.clip_grad_norm_(trained, 1.0)
            run.optimizer.step()
            with torch.no_grad():
                model.logit_scale.clamp_(0, math.log(100))  # CLIP, section 2.5

            # evaluate, checkpoint
            evaluate = run.step % config.eval_every == 0 or run.step == config.steps
            save = run.step % config.save_every == 0 or time.monotonic() - run.saved > SAVE_SECONDS
            if is_first() and evaluate:
                run.log(loss, terms, validate)
            if is_first() and (evaluate or save):
                run.save()
        model.to(memory_format=torch.contiguous_format).eval()
        if is_first():
            save_folder(model, folder / "student")
    return model


# ---- a student from files


def run(job, report=tqdm.write):
    """Train the student that `job` describes, a mapping that JSON can hold, and return it.

    job: folder, data (folder of train.parquet and val.parquet), caches (folders of the teachers'
    features), model, model_file (weights to start from, or none), text_tower, image_size,
    context_length, crops (stored crops to use; 0: all), config; start: None, or the steps and the
    stretch mode of a student that first learns short captions at 77 tokens, as its teacher did.
    """
    data, folder, config = Path(job["data"]), Path(job["folder"]), Config(**job["config"])
    train, val = (pd.read_parquet(data / f"{split}.parquet") for split in ("train", "val"))
    caches = [FeatureCache.open(cache, data=fingerprint(train)) for cache in job["caches"]]
    crops = caches[0].crops[:, : job["crops"] or None]
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"

    def new(length):
        torch.manual_seed(config.seed)
        file, tower = job.get("model_file") or None, job["text_tower"]
        sizes = {"context_length": length, "image_size": job["image_size"]}
        return create_model(job["model"], file, device, tower, **sizes)

    student = new(job["context_length"])
    if start := job.get("start"):
        clip, steps = new(77), start["steps"]
        short = dataset_for(clip, train.assign(long=train.short), crops)
        plain = replace(
            config, steps=steps, method="none", method_weights={}, weights=(1.0, 0.0, 0.0, 0.0)
        )
        clip = fit(clip, plain, short, folder / "clip77", report=report)
        fill(student, clip.state_dict(), "clip77", start["stretch"])
        torch.manual_seed(config.seed)
    dataset, val = dataset_for(student, train, crops), dataset_for(student, val)
    return fit(student, config, dataset, folder, caches, lambda model: recall(model, val), report)


def start(job, processes=1):
    """Train by the job file `job`: here, or in `processes` processes whose lines are printed."""
    if processes > 1:
        return distributed.torchrun("jettclip.train", job, processes)
    return run(json.loads(Path(job).read_text()))


def finished(run, variants):
    """Those of `variants` whose folder in `run` holds metrics.csv, the last file of notebook 02."""
    return [variant for variant in variants if (Path(run) / variant / "metrics.csv").exists()]


if __name__ == "__main__":
    distributed.command_line(__doc__, run)
