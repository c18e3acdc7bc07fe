"""The training loop of teachers and students, with checkpoints and exact resume.

    python -m jettclip.train runs/scenes/fd-both-s0/job.json                             # one process
    torchrun --nproc-per-node 2 -m jettclip.train runs/scenes/fd-both-s0/job.json        # gloo on CPUs, nccl on GPUs

Notebook 02 writes the job. `fit` trains one model into a run folder: `config.json`, `history.csv`, `last.ckpt`, and at
the end `student/`. A killed run goes on from `last.ckpt` and ends with the very weights it would have had (on one machine).

Several processes share each batch and compute the loss of the whole of it (see `jettclip.parallel`). So do several chunks of a
batch that does not fit the memory (Gao et al., GradCache, 2021): features of all chunks first, then the loss and its
gradient by the features, then each chunk again with that gradient. Batch norm alone sees its own chunk or process.
"""

import contextlib
import math
import os
import signal
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.distributed as dist
from torch import nn

from . import distributed
from . import features as caches
from .checkpoints import fill, load_checkpoint, save_checkpoint, save_folder
from .data import PairDataset, epoch_batches, loader
from .distributed import Stopped, average_gradients, is_first, stop_signal, stoppable, this_part
from .evaluate import embed, ranks
from .losses import Heads, parse_method, total_loss
from .models import create_model, model_config
from .utils import nearest, write_json, write_then_rename

MASKED, MASK_GRID = 0.75, 8  # mfd hides this share of 8 x 8 patches (CLIP-KD)


@dataclass
class Config:
    """Settings of one run. Weights: contrastive long and short, distillation long and short (JettCLIP: 0.8 0.4 1.5 0.5)."""

    steps: int
    batch_size: int = 128  # of all processes together
    chunk: int = 0  # rows in memory at once; 0: all of a process's share
    lr: float = 1e-3
    warmup: int = 20
    weight_decay: float = 0.1
    seed: int = 0
    method: str = "none"
    pairs: str = "both"
    weights: tuple = (0.8, 0.4, 1.5, 0.5)
    method_weights: dict = field(
        default_factory=dict
    )  # factor of each distillation method, 1 where absent
    components: int = 32
    label_smoothing: float = 0.1
    teacher_scale: float = 100.0
    learn_scale: bool = True
    frozen_positions: int = (
        0  # first rows of the text position table that stay as they are (Long-CLIP: 20)
    )
    bf16: bool = False
    eval_every: int = 50
    save_every: int = 50

    def __post_init__(self):
        for name in (
            *parse_method(self.method),
            *parse_method("+".join(self.method_weights) or "none"),
        ):
            if name not in parse_method(self.method):
                raise ValueError(
                    f"method_weights has {name!r}, which is no part of the method {self.method!r}"
                )
        if self.pairs not in ("long", "both"):
            raise ValueError(nearest(self.pairs, ("long", "both"), "pairs"))
        self.weights = tuple(self.weights)


def learning_rate(step, config):
    """Linear warm-up, then a cosine to zero."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    return (
        config.lr
        * 0.5
        * (1 + math.cos(math.pi * (step - config.warmup) / max(1, config.steps - config.warmup)))
    )


def optimizer_of(model, config, heads=None):
    """AdamW; norms, biases, scales and positions carry no weight decay."""
    named = [
        *model.named_parameters(),
        *([] if heads is None else heads.named_parameters(prefix="heads")),
    ]
    plain = {
        name for name, p in named if p.ndim < 2 or "positional" in name or "layer_scale" in name
    }
    groups = [
        {
            "params": [p for name, p in named if (name in plain) == is_plain],
            "weight_decay": 0.0 if is_plain else config.weight_decay,
        }
        for is_plain in (False, True)
    ]
    return torch.optim.AdamW(
        groups, lr=config.lr, betas=(0.9, 0.98), eps=1e-6, fused=model.logit_scale.is_cuda or None
    )


# ---- one step


@contextlib.contextmanager
def frozen_statistics(model):
    """Batch norms take their batch's statistics as ever, and do not remember them."""
    norms = [
        module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)
    ]
    saved = [(module.momentum, module.num_batches_tracked.clone()) for module in norms]
    for module in norms:
        module.momentum = 0.0
    try:
        yield
    finally:
        for module, (momentum, tracked) in zip(norms, saved):
            module.momentum, module.num_batches_tracked = momentum, tracked


def encode(model, inputs, bf16=False):
    """(images, long, short, masked images or None) -> their features, float (B, d) each (None where there is no input)."""
    images, long, short, masked = inputs
    with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
        # Both captions at once: batch norm has one set of statistics for them in evaluation, too.
        features = (
            model.encode_image(images),
            *model.encode_text(torch.cat([long, short])).split(len(long)),
        )
        return [f.float() for f in features] + [
            None if masked is None else model.encode_image(masked).float()
        ]


def backward(model, inputs, objective, config):
    """Gradients of objective(features of `inputs`) -> (loss, terms, features); `inputs` in chunks of `config.chunk` rows."""
    rows = len(inputs[0])
    if not 0 < config.chunk < rows:
        features = encode(model, inputs, config.bf16)
        loss, terms = objective(features)
        if torch.isfinite(loss):
            loss.backward()
        return loss, terms, features
    chunks = [
        [None if x is None else x[i : i + config.chunk] for x in inputs]
        for i in range(0, rows, config.chunk)
    ]
    state = torch.get_rng_state()
    with torch.no_grad(), frozen_statistics(model):
        parts = zip(*(encode(model, chunk, config.bf16) for chunk in chunks))
        features = [None if part[0] is None else torch.cat(part).requires_grad_() for part in parts]
    loss, terms = objective(features)
    if torch.isfinite(loss):
        loss.backward()  # by the features, the logit scale and the heads
        torch.set_rng_state(state)  # the same dropout again
        for number, chunk in enumerate(chunks):
            with_grad = [
                (f, all_.grad[number * config.chunk :][: len(f)])
                for f, all_ in zip(encode(model, chunk, config.bf16), features)
                if f is not None and all_.grad is not None
            ]
            torch.autograd.backward([f for f, _ in with_grad], [grad for _, grad in with_grad])
    return loss, terms, features


def hide_patches(images, seed, step, part, batch_size):
    """Images with most of their patches black; what is hidden depends on (seed, step, row of the batch) alone."""
    seen = (
        np.random.default_rng([seed, step]).random((batch_size, 1, MASK_GRID, MASK_GRID)) >= MASKED
    )
    seen = torch.from_numpy(seen[part.rows]).to(images)
    return images * nn.functional.interpolate(seen, images.shape[2:], mode="nearest")


@stoppable()
def fit(model, config, dataset, folder, cache=None, validate=None, report=print, short_cache=None):
    """Train `model` on `dataset` (a PairDataset) and return it in evaluation mode.

    cache: the teacher's FeatureCache over the same rows and crops (needed by distillation); a list of several teachers'.
    short_cache: another teacher's, for the short side. validate(model) -> dict of numbers, called every `eval_every`
    steps and at the end. What is reported is also written to history.csv. On SIGTERM or SIGUSR1 the step is finished, a
    checkpoint saved, and parallel.Stopped raised.
    """
    folder, part = Path(folder), this_part(config.batch_size)
    cache = cache if cache is None or isinstance(cache, list) else [cache]
    if config.method != "none" and not cache:
        raise ValueError(
            f"method {config.method!r} distils: it needs a feature cache (notebook 01 builds it)"
        )
    if len(dataset) < config.batch_size:
        raise ValueError(
            f"{len(dataset)} training pairs do not fill one batch of {config.batch_size}: lower batch_size"
        )
    if dist.is_initialized() and config.batch_size % dist.get_world_size():
        raise ValueError(
            f"batch_size {config.batch_size} does not divide among {dist.get_world_size()} processes"
        )
    widths, device, heads = (
        [one.image.shape[2] for one in cache or []],
        model.logit_scale.device,
        None,
    )
    if config.method != "none":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            heads = Heads(
                config.method,
                model.config["embed_dim"],
                sum(widths),
                short_cache and short_cache.image.shape[2],
            ).to(device)
    model.logit_scale.requires_grad_(config.learn_scale)
    settings = {
        **asdict(config),
        "weights": list(config.weights),
        "model": model.name,
        "model_config": model.config,
    }
    optimizer = optimizer_of(model, config, heads)
    start, history, seconds = 0, [], 0.0
    if saved := load_checkpoint(folder, report):
        if saved["settings"] != settings:
            differs = [key for key in settings if saved["settings"].get(key) != settings[key]]
            raise ValueError(
                f"{folder} holds a run with other settings ({', '.join(differs)}): delete it or name another folder"
            )
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        if heads is not None:
            heads.load_state_dict(saved["heads"])
        torch.set_rng_state(saved["rng"])
        start, history, seconds = saved["step"], saved["history"], saved["seconds"]
        report(f"resumed {folder.name} at step {start} of {config.steps}")
    elif is_first():
        write_json(folder / "config.json", settings)
    if config.frozen_positions:
        model.text.positional_embedding.register_hook(
            lambda grad: torch.cat(
                [torch.zeros_like(grad[: config.frozen_positions]), grad[config.frozen_positions :]]
            )
        )
    trained = [*model.parameters(), *([] if heads is None else heads.parameters())]

    model = model.to(memory_format=torch.channels_last)
    clock, began = time.perf_counter(), start
    for step, (rows, ks, *inputs) in enumerate(
        _batches(dataset, config, start, part, device), start + 1
    ):
        model.train()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step - 1, config)
        images, long, short = inputs
        images = images.contiguous(memory_format=torch.channels_last)
        masked = (
            hide_patches(images, config.seed, step, part, config.batch_size)
            if "mfd" in parse_method(config.method)
            else None
        )
        taught = teacher = short_teacher = None
        if config.method != "none":
            taught = [
                torch.cat(side, dim=1).to(device)
                for side in zip(*(one.rows(rows, ks) for one in cache))
            ]
            teacher = [part.gather(f) for f in taught]
            if short_cache is not None:
                image, _, short_text = short_cache.rows(rows, ks)
                short_teacher = part.gather(image.to(device)), part.gather(short_text.to(device))

        def objective(features):
            *student, masked_image = [None if f is None else part.gather(f) for f in features]
            return total_loss(
                student,
                teacher,
                model.logit_scale.exp(),
                method=config.method,
                pairs=config.pairs,
                weights=config.weights,
                components=config.components,
                label_smoothing=config.label_smoothing,
                teacher_scale=config.teacher_scale,
                method_weights=config.method_weights,
                heads=heads,
                teacher_widths=widths,
                masked_image=masked_image,
                short_teacher=short_teacher,
                part=part,
            )

        optimizer.zero_grad(set_to_none=True)
        loss, terms, features = backward(model, (images, long, short, masked), objective, config)
        if not torch.isfinite(loss):
            raise FloatingPointError(
                _not_finite(
                    folder,
                    step,
                    terms,
                    [*features, *(taught or [])],
                    [dataset.keys[r] for r in rows.tolist()],
                    model,
                    optimizer,
                )
            )
        if dist.is_initialized():
            average_gradients(trained)
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))  # CLIP, section 2.5

        evaluate_now, stop = (
            step % config.eval_every == 0 or step == config.steps,
            step < config.steps and stop_signal(),
        )
        if is_first() and (evaluate_now or stop or step % config.save_every == 0):
            elapsed = seconds + time.perf_counter() - clock
            left = (config.steps - step) * (time.perf_counter() - clock) / (step - began)
            if evaluate_now:
                row = {
                    "step": step,
                    "seconds": round(elapsed, 1),
                    "loss": loss.item(),
                    **{name: term.item() for name, term in terms.items()},
                    "scale": model.logit_scale.exp().item(),
                }
                if validate:
                    row |= {name: float(value) for name, value in validate(model.eval()).items()}
                history.append(row)
                numbers = " ".join(
                    f"{name} {value:.3f}"
                    for name, value in row.items()
                    if name not in ("step", "seconds")
                )
                report(
                    f"{folder.name} step {step}/{config.steps} {numbers} | {elapsed:.0f} s, about {left:.0f} s left"
                )
            save_checkpoint(
                folder,
                {
                    "settings": settings,
                    "step": step,
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "heads": None if heads is None else heads.state_dict(),
                    "rng": torch.get_rng_state(),
                    "history": history,
                    "seconds": elapsed,
                },
            )
            write_then_rename(
                folder / "history.csv", lambda path: pd.DataFrame(history).to_csv(path, index=False)
            )
        if stop:
            if dist.is_initialized():
                dist.barrier()  # a process that ends takes the others with it, also one that still saves
            raise Stopped(
                f"{folder.name} stopped by {signal.Signals(stop).name} at step {step} of {config.steps}; its checkpoint is "
                "saved, and the same command goes on from there"
            )
    model = model.to(memory_format=torch.contiguous_format).eval()
    if is_first():
        save_folder(model, folder / "student")
    return model


def _batches(dataset, config, start, part, device):
    """This part of the batches of steps start+1..steps; which rows a step sees depends on (seed, step) alone."""
    per_epoch = len(dataset) // config.batch_size
    for epoch in range(start // per_epoch, math.ceil(config.steps / per_epoch)):
        batches = epoch_batches(
            len(dataset), config.batch_size, config.seed, epoch, dataset.crops.shape[1]
        )
        first = max(0, start - epoch * per_epoch)
        yield from loader(
            dataset, batches[first : config.steps - epoch * per_epoch, part.rows], device
        )


def _not_finite(folder, step, terms, features, keys, model, optimizer):
    """Save what is needed to look into a loss that is no number -> the error's text."""
    bad = torch.stack([~torch.isfinite(f).all(dim=1) for f in features if f is not None]).any(dim=0)
    keys = [key for key, is_bad in zip(keys, bad.tolist()) if is_bad]
    state = {
        "step": step,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "keys": list(map(str, keys)),
    }
    write_then_rename(folder / "not-finite.ckpt", lambda path: torch.save(state, path))
    rows = (
        f"features are not finite of the rows {', '.join(map(str, keys[:5]))}{' ...' * (len(keys) > 5)}"
        if keys
        else "all features are finite"
    )
    return (
        f"loss is {sum(terms.values()).item()} at step {step} of {folder}: { {name: term.item() for name, term in terms.items()} }; "
        f"{rows}; weights are in {folder / 'not-finite.ckpt'}; try a lower lr"
    )


# ---- a student from files


@stoppable()
def run(job, report=print):
    """Train the student that `job` describes, a mapping that JSON can hold, and return it.

    job: folder, data (a folder with train.parquet and val.parquet), caches (folders of the teachers' features),
    short_cache (a folder or None), model, model_file (weights to start from, or none), text_tower, image_size, context_length,
    crops (stored crops to use; 0: all), config;
    start: None, or the steps and the stretch mode of a student that first learns short captions at 77 tokens, as its teacher did.
    """
    tables = {
        split: pd.read_parquet(Path(job["data"]) / f"{split}.parquet") for split in ("train", "val")
    }
    fingerprint = caches.fingerprint(tables["train"])
    cache = [caches.FeatureCache.open(one, data=fingerprint) for one in job["caches"]]
    short_cache = (
        caches.FeatureCache.open(job["short_cache"], data=fingerprint)
        if job.get("short_cache")
        else None
    )
    crops = cache[0].crops[:, : job["crops"] or None]
    preprocess = model_config(job["model"])["preprocess"]
    dataset = PairDataset(
        tables["train"], job["image_size"], job["context_length"], crops, preprocess=preprocess
    )
    val = PairDataset(
        tables["val"], job["image_size"], job["context_length"], preprocess=preprocess
    )
    config = Config(**job["config"])
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"

    def new(context_length):
        torch.manual_seed(config.seed)
        return create_model(
            job["model"],
            job.get("model_file") or None,
            device,
            job["text_tower"],
            context_length=context_length,
            image_size=job["image_size"],
        )

    student = new(job["context_length"])
    if job.get("start"):
        short_only = PairDataset(
            tables["train"].assign(long=tables["train"].short),
            job["image_size"],
            77,
            crops,
            preprocess=preprocess,
        )
        plain = replace(
            config,
            steps=job["start"]["steps"],
            method="none",
            method_weights={},
            weights=(1.0, 0.0, 0.0, 0.0),
        )
        original = fit(new(77), plain, short_only, Path(job["folder"]) / "clip77", report=report)
        fill(student, original.state_dict(), "clip77", job["start"]["stretch"])
        torch.manual_seed(config.seed)

    def recall(student):
        image, long, _ = embed(student, val)
        rank, _ = ranks(image, long)
        return {f"long_t2i_r{k}": (rank < k).double().mean().item() for k in (1, 10)}

    return fit(student, config, dataset, job["folder"], cache, recall, report, short_cache)


def start(job, processes=1):
    """Train the job of file `job` here, or in `processes` processes of torchrun, whose lines are printed as they come."""
    return distributed.start("jettclip.train", run, job, processes)


def main():
    distributed.command_line("jettclip.train", __doc__, "02", run)


if __name__ == "__main__":
    main()
