"""Benchmarks: towers, losses and a training step against what they replace, in one run each.

    python -m jettclip.bench models --captions long_captions.parquet   # full-size towers beside Long-CLIP-B (make bench-models)
    python -m jettclip.bench losses                                    # each loss, and a step of training (make bench-losses)
    python -m jettclip.bench train --model JettCLIP-S0 --teacher LongCLIP-B --batch 256     # training (make bench-train)

Ratios of one run mean something where milliseconds of a shared machine do not.
"""
import argparse
import itertools
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import open_clip
import pandas as pd
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from .checkpoints import write_json
from .data import PairDataset, draw_crops, epoch_batches, in_order, loader
from .deploy import benchmark, pack, parameters_m
from .features import FeatureCache
from .losses import METHODS, Heads, primary_components, total_loss
from .models import create_model, reparameterize
from .scenes import make_pairs
from .text import CONTEXT, tokenizer
from .train import Config, backward, optimizer_of

PEAK = {"H100 PCIe": 756, "H100": 989, "H200": 989, "A100": 312, "L40S": 362, "L4": 121}  # dense bf16 TFLOP/s, NVIDIA's data sheets


@torch.inference_mode()
def latency(models, images, tokens, batches=(1, 32), repeats=20):
    """Time both towers of {name: model}, the first being the teacher that ratios refer to.

    images {name: (N, 3, S, S)} and tokens (N, L) hold at least max(batches) rows of real inputs, decoded beforehand.
    -> table: model, tower, backend, precision, batch, tokens (longest of the batch), p50_ms, p90_ms, ratio_to_teacher,
    params_m.
    """
    rows = []
    teacher = next(iter(models))
    for batch in batches:
        for tower in ("image", "text"):
            if tower == "image":
                calls = {name: lambda m=m, x=images[name][:batch]: m.encode_image(x) for name, m in models.items()}
            else:
                calls = {name: lambda m=m, t=tokens[:batch]: m.encode_text(t) for name, m in models.items()}
            table = benchmark(calls, repeats).set_index("name")
            for name, model in models.items():
                part = model.visual if tower == "image" else model.text
                rows.append({"model": name, "tower": tower, "backend": "pytorch", "precision": "fp32", "batch": batch,
                             "tokens": int(tokens[:batch].argmax(dim=1).max()) + 1 if tower == "text" else 0,
                             **table.loc[name].to_dict(),
                             "ratio_to_teacher": table.p50_ms[teacher] / table.p50_ms[name],
                             "params_m": parameters_m(part)})
    return pd.DataFrame(rows)


# ---- full-size towers

def caption_tokens(file, shortest, longest, n=32, seed=0):
    """Tokens (n, 248) of `n` real captions of `shortest` to `longest` tokens: texts of a Parquet file, or their first
    sentences; without a file, captions of scenes."""
    texts = pd.read_parquet(file).text if file else make_pairs(500, seed).long
    texts = pd.concat([texts, texts.str.split(". ", regex=False).str[0], texts.str.split(",", regex=False).str[0]]).drop_duplicates()
    tokens = tokenizer()(list(texts.sample(min(2000, len(texts)), random_state=seed)))
    lengths = tokens.argmax(dim=1) + 1
    fitting = tokens[(lengths >= shortest) & (lengths <= longest)]
    if len(fitting) < n:
        raise ValueError(f"only {len(fitting)} captions of {shortest} to {longest} tokens in {file or 'scenes'}; {n} are needed")
    return fitting[:n]


@torch.inference_mode()
def benchmark_models(names, captions=None, batches=(1, 32), repeats=3):
    """Each model of `names` (random weights), folded and packed, beside Long-CLIP-B as its code runs it, in fp32 PyTorch.

    That reference is open_clip's ViT-B-16-quickgelu with text untrimmed at 248 tokens. All towers of a row group take turns.
    -> table: tower, captions, batch, model, p50_ms, p90_ms, ratio (reference time / this time).
    """
    config = open_clip.get_model_config("ViT-B-16-quickgelu")
    config["text_cfg"]["context_length"] = CONTEXT
    reference = open_clip.CLIP(**config).eval()
    models = {name: pack(reparameterize(create_model(name))) for name in names}
    texts = {"60 to 180 tokens": caption_tokens(captions, 60, 180), "12 to 20 tokens": caption_tokens(captions, 12, 20)}
    rows = []
    for batch in batches:
        image = {name: torch.rand(batch, 3, model.image_size, model.image_size) for name, model in models.items()}
        pixels = torch.rand(batch, 3, 224, 224)
        groups = {("image", ""): {"Long-CLIP-B, reference": lambda x=pixels: reference.encode_image(x),
                                  **{name: lambda m=m, x=image[name]: m.encode_image(x) for name, m in models.items()}}}
        for caption, tokens in texts.items():
            groups["text", caption] = {"Long-CLIP-B, reference": lambda t=tokens: reference.encode_text(t[:batch]),
                                       **{name: lambda m=m, t=tokens: m.encode_text(t[:batch]) for name, m in models.items()}}
        for (tower, caption), calls in groups.items():
            table = benchmark(calls, repeats, warmup=1)
            rows.append(table.rename(columns={"name": "model"}).assign(
                tower=tower, captions=caption, batch=batch, ratio=table.p50_ms[0] / table.p50_ms))
    return pd.concat(rows)[["tower", "captions", "batch", "model", "p50_ms", "p90_ms", "ratio"]]


# ---- losses

def _by_svd(features, k=32):
    """Primary components as Long-CLIP's code computes them, for comparison."""
    mean = features.mean(dim=0, keepdim=True)
    u, values, v = torch.linalg.svd(features - mean, full_matrices=False)
    return mean + (u[:, :k] * values[:k]) @ v[:k]


def benchmark_losses(batches=(128, 512, 2048), width=512, repeats=10):
    """Forward and backward pass of primary components and of each method's total loss, on random features.

    -> table: batch, what, p50_ms, p90_ms, ratio (to `svd`, and to the contrastive loss on two captions).
    """
    rows = []
    for batch in batches:
        student, teacher = ([F.normalize(torch.randn(batch, width), dim=1) for _ in range(3)] for _ in range(2))
        leaves, scale = [f.requires_grad_() for f in student], torch.tensor(14.3, requires_grad=True)

        def components(compute):
            compute(leaves[0]).sum().backward()

        def total(method):
            heads = Heads(method, width, width) if method == "afd" else None
            return lambda: total_loss(leaves, teacher, scale, method=method, heads=heads, masked_image=leaves[0])[0].backward()

        for base, calls in (("svd", {"svd": lambda: components(_by_svd), "primary_components": lambda: components(primary_components)}),
                            ("none", {method: total(method) for method in ("none", *METHODS, "crd+fd")})):
            table = benchmark(calls, repeats).set_index("name")
            rows += [{"batch": batch, "what": name, **row, "ratio": row.p50_ms / table.p50_ms[base]} for name, row in table.iterrows()]
    return pd.DataFrame(rows)


def benchmark_step(method="crd+fd", batch=128, pairs=512, repeats=5):
    """A step of training JettCLIP-T on cached features with and without distillation -> table: what, p50_ms, p90_ms."""
    dataset = PairDataset(make_pairs(pairs, seed=0), 64)
    teacher = [F.normalize(torch.randn(batch, 128), dim=1) for _ in range(3)]
    _, _, images, long, short = next(iter(loader(dataset, in_order(pairs, batch))))
    model = create_model("JettCLIP-T").to(memory_format=torch.channels_last).train()

    def step(method):
        features = model.encode_image(images), model.encode_text(long), model.encode_text(short)
        total_loss(features, teacher, model.logit_scale.exp(), method=method)[0].backward()

    return benchmark({"without distillation": lambda: step("none"), method: lambda: step(method)}, repeats)


# ---- training

def random_cache(folder, rows, width):
    """A feature cache of random unit vectors with one crop: as fast to read as a teacher's."""
    rng = np.random.default_rng(0)
    for name, shape in (("image", (rows, 1, width)), ("long", (rows, width)), ("short", (rows, width))):
        np.save(folder / f"{name}.npy", rng.standard_normal(shape).astype(np.float16))
    np.save(folder / "crops.npy", draw_crops([(1, 1)] * rows, 1, seed=0))
    write_json(folder / "manifest.json", {})
    return FeatureCache(folder)


def benchmark_train(name="JettCLIP-T", teacher="LongCLIP-T", batch=64, pairs=512, method="crd+fd", repeats=10):
    """Whole steps of training `name` on scenes at its image size, loader and optimizer included: without distillation, from
    cached features, and from the teacher run in each step. They take turns.

    On a GPU in bfloat16. -> table: what, samples_s, waiting (share of the time that goes to the loader), step_ms, ratio (of its
    time to that without distillation), and peak (share of a known GPU's dense bf16 peak; the teacher's work counts too).
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    online = create_model(teacher, device=device).eval()
    size = create_model(name).image_size
    dataset, waits, flops = PairDataset(make_pairs(pairs, seed=0, size=size), size), {}, {}

    def trainer(what, cache):
        config = Config(steps=1, batch_size=batch, method="none" if what == "without distillation" else method, bf16=device == "cuda")
        model = create_model(name, device=device).to(memory_format=torch.channels_last).train()
        optimizer, waits[what] = optimizer_of(model, config), []
        batches = itertools.chain.from_iterable(loader(dataset, epoch_batches(pairs, batch, 0, epoch)) for epoch in itertools.count())

        def features(rows, ks, images, long, short):
            if what == "cached features":
                return [feature.to(device) for feature in cache.rows(rows, ks)]
            images = F.interpolate(images, (online.image_size, online.image_size), mode="bilinear")
            with torch.inference_mode(), torch.autocast(device, torch.bfloat16, enabled=config.bf16):
                taught = online.encode_image(images, True), online.encode_text(long, True), online.encode_text(short, True)
            return [feature.float().clone() for feature in taught]

        def step():
            optimizer.zero_grad(set_to_none=True)
            start = time.perf_counter()
            rows, ks, *inputs = next(batches)
            waits[what].append(1e3 * (time.perf_counter() - start))
            inputs = [x.to(device, non_blocking=True) for x in inputs]
            taught = None if config.method == "none" else features(rows, ks, *inputs)
            backward(model, (inputs[0].contiguous(memory_format=torch.channels_last), *inputs[1:], None), lambda student: total_loss(
                student[:3], taught, model.logit_scale.exp(), method=config.method), config)
            optimizer.step()

        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # fused attention is not counted
            step()
        flops[what] = counter.get_total_flops()
        return step

    with tempfile.TemporaryDirectory() as folder:
        cache = random_cache(Path(folder), pairs, online.config["embed_dim"])
        table = benchmark({what: trainer(what, cache) for what in ("without distillation", "cached features", "online teacher")}, repeats)
    gpu = torch.cuda.get_device_name() if device == "cuda" else ""
    peak = next((teraflops for key, teraflops in PEAK.items() if key in gpu), float("nan"))
    return pd.DataFrame({
        "what": table.name, "samples_s": 1e3 * batch / table.p50_ms,
        "waiting": table.name.map(lambda what: statistics.median(waits[what][-repeats:])) / table.p50_ms,
        "step_ms": table.p50_ms, "ratio": table.p50_ms / table.p50_ms[0], "peak": table.name.map(flops) / table.p50_ms / 1e9 / peak})


def main():
    parser = argparse.ArgumentParser(prog="python -m jettclip.bench", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    models = commands.add_parser("models", help=benchmark_models.__doc__.splitlines()[0])
    models.add_argument("--models", nargs="+", default=["JettCLIP-S0", "JettCLIP-S1", "JettCLIP-S2", "JettCLIP-B", "LongCLIP-B"])
    models.add_argument("--captions", help="Parquet file with a column `text`; default: captions of scenes")
    losses = commands.add_parser("losses", help=benchmark_losses.__doc__.splitlines()[0])
    train = commands.add_parser("train", help="samples per second and time spent waiting, with and without a teacher")
    train.add_argument("--model", default="JettCLIP-T", help="student (default: %(default)s)")
    train.add_argument("--teacher", default="LongCLIP-T", help="the online teacher (default: %(default)s)")
    train.add_argument("--batch", type=int, default=64, help="default: %(default)s")
    for command, repeats in ((models, 3), (losses, 10), (train, 10)):
        command.add_argument("--repeats", type=int, default=repeats, help="timings of each call (default: %(default)s)")
    args = parser.parse_args()
    print(f"{torch.get_num_threads()} threads, fp32 PyTorch {torch.__version__}")
    if args.command == "models":
        print("ratio = time of Long-CLIP-B's reference form / this time")
        tables = [benchmark_models(args.models, args.captions, repeats=args.repeats)]
    elif args.command == "train":
        print(f"on {torch.cuda.get_device_name() + ' in bfloat16' if torch.cuda.is_available() else 'the CPU'}; ratio = this time / that without distillation")
        tables = [benchmark_train(args.model, args.teacher, args.batch, pairs=max(512, 2 * args.batch), repeats=args.repeats)]
    else:
        print("forward + backward; ratio = this time / that of svd, of the loss without distillation")
        tables = [benchmark_losses(repeats=args.repeats), benchmark_step(repeats=args.repeats)]
    for table in tables:
        print(table.to_string(index=False, float_format=lambda value: f"{value:.2f}"))


if __name__ == "__main__":
    main()
