"""The training loop of teachers and students, with checkpoints and exact resume.

`fit` trains one model into a run folder: `config.json`, `history.csv`, `last.ckpt`, and at the end `student/`. A killed
run goes on from `last.ckpt` and ends with the very weights it would have had (on one machine).
"""
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd
import torch

from .checkpoints import save_folder, write_json, write_then_rename
from .data import epoch_batches, loader
from .losses import parse_method, total_loss
from .models import nearest


@dataclass
class Config:
    """Settings of one run. Weights: contrastive long and short, distillation long and short (JettCLIP: 0.8 0.4 1.5 0.5)."""
    steps: int
    batch_size: int = 128
    lr: float = 1e-3
    warmup: int = 20
    weight_decay: float = 0.1
    seed: int = 0
    method: str = "none"
    pairs: str = "both"
    weights: tuple = (0.8, 0.4, 1.5, 0.5)
    fd_weight: float = 1.0
    components: int = 32
    label_smoothing: float = 0.1
    teacher_scale: float = 100.0
    frozen_positions: int = 0  # first rows of the text position table that stay as they are (Long-CLIP: 20)
    bf16: bool = False
    eval_every: int = 50
    save_every: int = 50

    def __post_init__(self):
        parse_method(self.method)
        if self.pairs not in ("long", "both"):
            raise ValueError(nearest(self.pairs, ("long", "both"), "pairs"))
        self.weights = tuple(self.weights)


def learning_rate(step, config):
    """Linear warm-up, then a cosine to zero."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    return config.lr * 0.5 * (1 + math.cos(math.pi * (step - config.warmup) / max(1, config.steps - config.warmup)))


def optimizer_of(model, config):
    """AdamW; norms, biases, scales and positions carry no weight decay."""
    plain = {name for name, p in model.named_parameters() if p.ndim < 2 or "positional" in name or "layer_scale" in name}
    groups = [{"params": [p for name, p in model.named_parameters() if (name in plain) == is_plain],
               "weight_decay": 0.0 if is_plain else config.weight_decay} for is_plain in (False, True)]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.98), eps=1e-6)


def fit(model, config, dataset, folder, cache=None, validate=None, report=print):
    """Train `model` on `dataset` (a PairDataset) and return it in evaluation mode.

    cache: the teacher's FeatureCache over the same rows and crops (needed by distillation). validate(model) -> dict of
    numbers, called every `eval_every` steps and at the end. What is reported is also written to history.csv.
    """
    folder = Path(folder)
    if config.method != "none" and cache is None:
        raise ValueError(f"method {config.method!r} distils: it needs a feature cache (notebook 01 builds it)")
    if len(dataset) < config.batch_size:
        raise ValueError(f"{len(dataset)} training pairs do not fill one batch of {config.batch_size}: lower batch_size")
    settings = {**asdict(config), "weights": list(config.weights), "model": model.name, "model_config": model.config}
    checkpoint = folder / "last.ckpt"
    optimizer = optimizer_of(model, config)
    start, history, seconds = 0, [], 0.0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        if saved["settings"] != settings:
            differs = [key for key in settings if saved["settings"].get(key) != settings[key]]
            raise ValueError(f"{folder} holds a run with other settings ({', '.join(differs)}): delete it or name another folder")
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        torch.set_rng_state(saved["rng"])
        start, history, seconds = saved["step"], saved["history"], saved["seconds"]
        report(f"resumed {folder.name} at step {start} of {config.steps}")
    else:
        write_json(folder / "config.json", settings)
    if config.frozen_positions:
        model.text.positional_embedding.register_hook(
            lambda grad: torch.cat([torch.zeros_like(grad[:config.frozen_positions]), grad[config.frozen_positions:]]))

    model = model.to(memory_format=torch.channels_last)
    clock, began = time.perf_counter(), start
    for step, (rows, ks, images, long, short) in enumerate(_batches(dataset, config, start), start + 1):
        model.train()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step - 1, config)
        images = images.contiguous(memory_format=torch.channels_last)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=config.bf16):
            features = (model.encode_image(images).float(), model.encode_text(long).float(),
                        model.encode_text(short).float())  # each (B, d)
        teacher = cache.rows(rows, ks) if config.method != "none" else None
        loss, terms = total_loss(
            features, teacher, model.logit_scale.exp(), method=config.method, pairs=config.pairs, weights=config.weights,
            components=config.components, label_smoothing=config.label_smoothing, teacher_scale=config.teacher_scale,
            method_weights={"fd": config.fd_weight})
        if not torch.isfinite(loss):
            raise FloatingPointError(f"loss is {loss.item()} at step {step} of {folder}: "
                                     f"{ {name: term.item() for name, term in terms.items()} }; try a lower lr")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))  # CLIP, section 2.5

        evaluate_now = step % config.eval_every == 0 or step == config.steps
        if evaluate_now or step % config.save_every == 0:
            elapsed = seconds + time.perf_counter() - clock
            left = (config.steps - step) * (time.perf_counter() - clock) / (step - began)
            if evaluate_now:
                row = {"step": step, "seconds": round(elapsed, 1), "loss": loss.item(),
                       **{name: term.item() for name, term in terms.items()}, "scale": model.logit_scale.exp().item()}
                if validate:
                    row |= {name: float(value) for name, value in validate(model.eval()).items()}
                history.append(row)
                numbers = " ".join(f"{name} {value:.3f}" for name, value in row.items() if name not in ("step", "seconds"))
                report(f"{folder.name} step {step}/{config.steps} {numbers} | {elapsed:.0f} s, about {left:.0f} s left")
            state = {"settings": settings, "step": step, "model": model.state_dict(), "optimizer": optimizer.state_dict(),
                     "rng": torch.get_rng_state(), "history": history, "seconds": elapsed}
            write_then_rename(checkpoint, lambda path: torch.save(state, path))
            write_then_rename(folder / "history.csv", lambda path: pd.DataFrame(history).to_csv(path, index=False))
    model = model.to(memory_format=torch.contiguous_format).eval()
    save_folder(model, folder / "student")
    return model


def _batches(dataset, config, start):
    """The batches of steps start+1..steps; which rows a step sees depends on (seed, step) alone."""
    per_epoch = len(dataset) // config.batch_size
    for epoch in range(start // per_epoch, math.ceil(config.steps / per_epoch)):
        batches = epoch_batches(len(dataset), config.batch_size, config.seed, epoch, dataset.crops.shape[1])
        first = max(0, start - epoch * per_epoch)
        yield from loader(dataset, batches[first:config.steps - epoch * per_epoch])
