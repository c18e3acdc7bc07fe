"""Train a teacher or a student, with checkpoints and exact resume.

    python -m jettclip.train runs/scenes/fd-both-s0/job.json                       # one process
    torchrun --nproc-per-node 2 -m jettclip.train runs/scenes/fd-both-s0/job.json  # or several

Notebook 02 calls `fit` or writes the job. A run folder holds `config.json`, `history.csv`,
`last.ckpt` and at the end `student/`. A killed run resumes and ends with the very same bytes.
"""

import math
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

from . import distributed
from .checkpoints import save_folder
from .data import dataset_for, epoch_batches, fingerprint, loader
from .distributed import average_gradients, gather, is_first, rank, world_size
from .evaluate import recall
from .features import FeatureCache
from .losses import Heads, parse_method, total_loss
from .models import create_model
from .runs import Run, lock
from .utils import nearest, progress, require


@dataclass
class Config:
    """Settings of a run. weights: contrastive long and short, distillation long and short."""

    steps: int
    batch_size: int = 128  # of all processes together
    chunk: int = 0  # rows in memory at once; 0: all
    lr: float = 1e-3
    image_lr: float = 0.0  # of an image tower that is pretrained; 0: lr
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
    frozen_positions: int = 0  # first rows of the text's position table (Long-CLIP: 20)
    bf16: bool = False  # see `in_bf16`
    keep_best: bool = False  # the student is that of the best evaluation, not of the last step
    eval_every: int = 50  # a checkpoint is written then, and every minute

    def __post_init__(self):
        if unused := ", ".join(sorted({*self.method_weights} - {*parse_method(self.method)})):
            raise ValueError(f"method_weights names {unused}; the method is {self.method!r}")
        if self.pairs not in ("long", "both"):
            raise ValueError(nearest(self.pairs, ("long", "both"), "pairs"))
        self.weights = tuple(self.weights)


def learning_rate(step, config):
    """Linear warm-up, then a cosine to zero."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    done = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.lr * 0.5 * (1 + math.cos(math.pi * done))


def optimizer_of(model, config, heads=None):
    """AdamW. Only kernels, matrices and word embeddings decay: no norms, biases, scales, positions
    or class tokens."""
    # (factor of the learning rate, weight decay): parameters
    groups = {(1.0, config.weight_decay): [], (1.0, 0.0): []}
    for name, p in (*model.named_parameters(), *(heads.named_parameters() if heads else ())):
        decays = p.ndim > 1 and name.endswith(("weight", "proj", "projection"))
        slower = config.image_lr and name.startswith("visual.")
        key = config.image_lr / config.lr if slower else 1.0, config.weight_decay * decays
        if p.requires_grad:
            groups.setdefault(key, []).append(p)
    groups = [{"params": ps, "rate": r, "weight_decay": d} for (r, d), ps in groups.items()]
    fused = model.logit_scale.is_cuda or None
    return torch.optim.AdamW(groups, config.lr, betas=(0.9, 0.98), eps=1e-6, fused=fused)


@contextmanager
def keep_statistics(model):
    """Batch norms go by the statistics of their batch and do not remember them for evaluation."""
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


class LinearInBf16(TorchFunctionMode):
    """Linear layers multiply in bfloat16, all else computes in float32."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.linear:
            args = [x if x is None else x.bfloat16() for x in args]
        elif function is F.scaled_dot_product_attention:
            args = [*(x.float() for x in args[:3]), *args[3:]]
        return function(*args, **(kwargs or {}))


def in_bf16(device):
    """Autocast, but on a CPU, where it makes a step no faster, `LinearInBf16`: attention and
    depthwise convolutions take two to four times as long there in bfloat16."""
    return LinearInBf16() if device.type == "cpu" else torch.autocast(device.type, torch.bfloat16)


def encode(model, inputs, bf16=False):
    """Images, long and short captions, perhaps masked images -> features of each, float (B, d)."""
    images, long, short, *masked = inputs
    with in_bf16(images.device) if bf16 else nullcontext():
        image = model.encode_image(images)
        # Both captions at once: batch norm has one set of statistics for them in evaluation, too.
        text = model.encode_text(torch.cat([long, short])).split(len(long))  # (2B, d) -> 2 x (B, d)
        with keep_statistics(model):  # in evaluation nothing is masked
            return [f.float() for f in (image, *text, *map(model.encode_image, masked))]


def backward(model, inputs, objective, config):
    """Gradients of objective(features of inputs) -> (loss, terms, features with gradients)."""
    if 0 < config.chunk < len(inputs[0]):
        return grad_cache(model, inputs, objective, config)
    features = encode(model, inputs, config.bf16)
    for f in features:
        f.retain_grad()
    loss, terms = objective(features)
    loss.backward()
    return loss, terms, features


def grad_cache(model, inputs, objective, config):
    """`backward` in equal chunks of rows (Gao et al., GradCache, 2021), as batch norm sees them.

    First all features, then the gradients of the loss with respect to them, then each chunk again,
    through which its gradients flow back.
    """
    n = math.ceil(len(inputs[0]) / config.chunk)
    chunks = list(zip(*(x.tensor_split(n) for x in inputs), strict=True))
    with torch.random.fork_rng(devices=[]), torch.no_grad(), keep_statistics(model):
        features = zip(*(encode(model, chunk, config.bf16) for chunk in chunks), strict=True)
        features = [torch.cat(f).requires_grad_() for f in features]
    loss, terms = objective(features)
    loss.backward()  # reaches the features, the logit scale and the heads
    gradients = (torch.zeros_like(f) if f.grad is None else f.grad for f in features)
    gradients = zip(*(g.tensor_split(n) for g in gradients), strict=True)
    for chunk, gradient in zip(chunks, gradients, strict=True):
        torch.autograd.backward(encode(model, chunk, config.bf16), gradient)
    return loss, terms, features


def channels_last(images):
    """Images in the format that convolutions are fastest in; cached features (B, w) as they are."""
    return images.contiguous(memory_format=torch.channels_last) if images.ndim == 4 else images


def hide_patches(images, seed, step, first=0):
    """Images, from row `first` of a batch on, with 3/4 of their 8 x 8 patches black (CLIP-KD)."""
    drawn = np.random.default_rng([seed, step]).random((first + len(images), 1, 8, 8))
    seen = torch.from_numpy(drawn[first:] >= 0.75).to(images)
    return images * F.interpolate(seen, images.shape[2:])


def batches_after(step, dataset, config, device):
    """This process's rows of the batches after `step`, which depend on (seed, step) alone."""
    share = config.batch_size // world_size()
    rows = slice(rank() * share, (rank() + 1) * share)
    n, crops = len(dataset) // config.batch_size, dataset.crops.shape[1]
    for epoch in range(step // n, math.ceil(config.steps / n)):
        batches = epoch_batches(len(dataset), config.batch_size, config.seed, epoch, crops)
        batches = batches[max(0, step - epoch * n) : config.steps - epoch * n, rows]
        yield from loader(dataset, batches, device)


def check(config, dataset, caches):
    """Refuse what cannot be trained."""
    size, processes = config.batch_size, world_size()
    if config.steps < 1 or size < 2:
        raise ValueError(f"{config.steps} steps of {size} pairs: train at least 1 step of 2 pairs")
    if config.method != "none" and not caches:
        raise ValueError(f"method {config.method!r} distils: it needs a feature cache")
    if len(dataset) < size:
        raise ValueError(f"{len(dataset)} training pairs do not fill a batch_size of {size}")
    if size % processes:
        raise ValueError(f"batch_size {size} does not divide among {processes} processes")
    for cache in caches:
        if not np.array_equal(cache.crops[: len(dataset), : dataset.crops.shape[1]], dataset.crops):
            problem = f"the feature cache {cache.folder} is of other rows or crops than the data"
            raise ValueError(f"{problem}: run notebook 01 again")


def fit(model, config, dataset, folder, cache=None, validate=None, report=tqdm.write):
    """Train `model` on `dataset` (a PairDataset) and return it in evaluation mode.

    cache: for distillation, the teacher's FeatureCache of the same rows and crops, or a list of
    several. validate: model -> numbers, every `eval_every` steps. A killed run resumes.
    """
    folder, device, methods = Path(folder), model.logit_scale.device, parse_method(config.method)
    caches = [cache] if isinstance(cache, FeatureCache) else cache or []
    check(config, dataset, caches)
    width, caches = model.config["embed_dim"], caches if methods else []
    widths = [cache.image.shape[2] for cache in caches]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        heads = Heads(config.method, width, sum(widths) or width).to(device)
    trained = [*model.parameters(), *heads.parameters()]
    optimizer = optimizer_of(model, config, heads)
    teachers = [cache.manifest["sha256"] for cache in caches]
    inputs = {"data": dataset.fingerprint, "teachers": teachers}
    run = Run(folder, config, model, heads, optimizer, inputs, report)
    names = "method pairs weights components label_smoothing teacher_scale method_weights"
    settings = {name: getattr(config, name) for name in names.split()}
    settings |= {"heads": heads, "teacher_widths": widths}

    def objective(features, teacher):
        features, scale = [gather(f) for f in features], model.logit_scale.exp()
        return total_loss(features, teacher, scale, **settings)

    with lock(folder):
        distributed.wait_for_all()
        run.resume()
        model.to(memory_format=torch.channels_last)
        batches = batches_after(run.step, dataset, config, device)
        batches = progress(batches, config.steps, folder.name, run.step, report)
        for rows, ks, images, *captions in batches:
            run.step += 1
            model.train()
            images = channels_last(images)
            inputs = [images, *captions]
            if "mfd" in methods:
                inputs.append(hide_patches(images, config.seed, run.step, rank() * len(images)))
            teacher = zip(*(cache.rows(rows, ks) for cache in caches), strict=True)
            teacher = [gather(torch.cat(f, dim=1).to(device)) for f in teacher]  # 3 x (B, widths)
            optimizer.zero_grad(set_to_none=True)
            loss_of = partial(objective, teacher=teacher)
            loss, terms, features = backward(model, inputs, loss_of, config)

            # update
            if config.frozen_positions:
                model.text.positional_embedding.grad[: config.frozen_positions] = 0
            for group in optimizer.param_groups:
                group["lr"] = group["rate"] * learning_rate(run.step - 1, config)
            average_gradients(trained)
            norm = get_total_norm([p.grad for p in trained if p.grad is not None])
            if not torch.isfinite(loss + norm):  # no weight takes it, no checkpoint holds it
                keys = [dataset.keys[row] for row in gather(rows.to(device)).tolist()]
                gradients = [f.grad for f in features if f.grad is not None]
                sides = [*map(gather, features), *teacher], [*map(gather, gradients)]
                raise run.not_finite(terms, sides, keys)
            clip_grads_with_norm_(trained, 1.0, norm)
            optimizer.step()
            model.logit_scale.data.clamp_(0, math.log(100))  # CLIP, section 2.5

            # evaluate, checkpoint
            evaluate = run.step % config.eval_every == 0 or run.step == config.steps
            if is_first() and evaluate:
                run.log(loss, terms, validate)
            if is_first() and (evaluate or run.minute_passed()):
                run.save()
        model.to(memory_format=torch.contiguous_format).eval()
        run.load_best()
        if is_first():
            save_folder(model, folder / "student")
    return model


def run(job, report=tqdm.write):
    """Train the student that `job` describes, a mapping that JSON can hold, and return it.

    job: folder, data (folder of train.parquet, val.parquet), caches (folders), config, model,
    model_file (weights to start from, or none), text_tower, image_size, context_length, crops (of
    those stored; 0: all), rows (the first so many; 0: all).
    """
    data, folder, config = Path(job["data"]), Path(job["folder"]), Config(**job["config"])
    train, val = (pd.read_parquet(data / f"{split}.parquet") for split in ("train", "val"))
    caches = [FeatureCache.open(cache, data=fingerprint(train)) for cache in job["caches"]]
    train = train.head(job["rows"] or None)
    crops = caches[0].crops[: len(train), : job["crops"] or None]

    torch.manual_seed(config.seed)
    options = job.get("model_file") or None, distributed.device(), job["text_tower"]
    sizes = {name: job[name] for name in ("context_length", "image_size")}
    student = create_model(job["model"], *options, **sizes)
    padding_front = caches[0].manifest["padding_front"]  # as the teacher read the captions
    dataset = dataset_for(student, train, crops, "longs" in train, padding_front)
    val = dataset_for(student, val)
    return fit(student, config, dataset, folder, caches, lambda model: recall(model, val), report)


start = partial(distributed.start, "jettclip.train", run)  # (job file, processes=1)


def finished(run, variants):
    """Those of `variants`, or all, whose folder in `run` holds the last file of notebook 02."""
    found = sorted(path.parent.name for path in Path(run).glob("*/metrics.csv"))
    chosen = [variant for variant in variants or found if variant in found]
    if not chosen:
        require(Path(run) / (variants or ["*"])[0] / "metrics.csv", "02_train")
    return chosen


if __name__ == "__main__":
    distributed.command_line(__doc__, run)
