"""Benchmarks of training: each loss, and whole steps with and without a teacher.

python -m jettclip.bench_train losses                                                   # make bench-losses
python -m jettclip.bench_train train --model JettCLIP-S0 --teacher LongCLIP-B --batch 256     # make bench-train
"""

import argparse
import itertools
import statistics
import tempfile
import time
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from .bench_data import synthetic_cache
from .checkpoints import write_json
from .data import PairDataset, epoch_batches, loader
from .deploy import benchmark
from .losses import METHODS, Heads, primary_components, total_loss
from .models import create_model
from .report import ROOT, provenance, save_csv
from .scenes import make_pairs
from .train import Config, backward, optimizer_of

PEAK = {
    "H100 PCIe": 756,
    "H100": 989,
    "H200": 989,
    "A100": 312,
    "L40S": 362,
    "L4": 121,
}  # dense bf16 TFLOP/s, NVIDIA's data sheets


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
        student, teacher = (
            [F.normalize(torch.randn(batch, width), dim=1) for _ in range(3)] for _ in range(2)
        )
        leaves, scale = (
            [f.requires_grad_() for f in student],
            torch.tensor(14.3, requires_grad=True),
        )

        def components(compute):
            compute(leaves[0]).sum().backward()

        def total(method):
            heads = Heads(method, width, width) if method == "afd" else None
            return lambda: total_loss(
                leaves, teacher, scale, method=method, heads=heads, masked_image=leaves[0]
            )[0].backward()

        for base, calls in (
            (
                "svd",
                {
                    "svd": lambda: components(_by_svd),
                    "primary_components": lambda: components(primary_components),
                },
            ),
            ("none", {method: total(method) for method in ("none", *METHODS, "crd+fd")}),
        ):
            table = benchmark(calls, repeats).set_index("name")
            rows += [
                {"batch": batch, "what": name, **row, "ratio": row.p50_ms / table.p50_ms[base]}
                for name, row in table.iterrows()
            ]
    return pd.DataFrame(rows)


def benchmark_train(
    name="JettCLIP-T", teacher="LongCLIP-T", batch=64, pairs=512, methods=("crd+fd",), repeats=10
):
    """Whole steps of training `name` on scenes at its image size, loader and optimizer included: without distillation, with each
    of `methods` from cached features, and with the last of them from a teacher that runs in each step. They take turns.

    On a GPU in bfloat16. -> table: method, teacher ("cached", "online" or none), samples_s, waiting (share of the time that goes
    to the loader), step_ms, ratio (of its time to that without distillation), and peak (share of a known GPU's dense bf16 peak;
    the teacher's work counts too).
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    online = create_model(teacher, device=device).eval()
    size, width = create_model(name).image_size, online.config["embed_dim"]
    dataset, waits, flops = PairDataset(make_pairs(pairs, seed=0, size=size), size), {}, {}

    def trainer(method, taught_by, cache):
        config = Config(steps=1, batch_size=batch, method=method, bf16=device == "cuda")
        model = create_model(name, device=device).to(memory_format=torch.channels_last).train()
        heads = Heads(method, model.config["embed_dim"], width).to(device)
        optimizer, key = optimizer_of(model, config, heads), (method, taught_by)
        waits[key] = []
        batches = itertools.chain.from_iterable(
            loader(dataset, epoch_batches(pairs, batch, 0, epoch), device)
            for epoch in itertools.count()
        )

        def features(rows, ks, images, long, short):
            if taught_by == "cached":
                return [feature.to(device) for feature in cache.rows(rows, ks)]
            images = F.interpolate(images, (online.image_size, online.image_size), mode="bilinear")
            with (
                torch.inference_mode(),
                torch.autocast(device, torch.bfloat16, enabled=config.bf16),
            ):
                taught = (
                    online.encode_image(images, True),
                    online.encode_text(long, True),
                    online.encode_text(short, True),
                )
            return [feature.float().clone() for feature in taught]

        def step():
            optimizer.zero_grad(set_to_none=True)
            start = time.perf_counter()
            rows, ks, images, long, short = next(batches)
            waits[key].append(1e3 * (time.perf_counter() - start))
            taught = features(rows, ks, images, long, short) if taught_by else None
            images = images.contiguous(memory_format=torch.channels_last)
            masked = images if "mfd" in method else None  # what is hidden costs nothing
            backward(
                model,
                (images, long, short, masked),
                lambda student: total_loss(
                    student[:3],
                    taught,
                    model.logit_scale.exp(),
                    method=method,
                    heads=heads,
                    masked_image=student[3],
                ),
                config,
            )
            optimizer.step()

        with (
            sdpa_kernel(SDPBackend.MATH),
            FlopCounterMode(display=False) as counter,
        ):  # fused attention is not counted
            step()
        flops[key] = counter.get_total_flops()
        return step

    with tempfile.TemporaryDirectory() as folder:
        cache = synthetic_cache(Path(folder) / "cache", pairs, width)
        forms = [("none", ""), *((method, "cached") for method in methods), (methods[-1], "online")]
        table = benchmark({form: trainer(*form, cache) for form in forms}, repeats)
    gpu = torch.cuda.get_device_name() if device == "cuda" else ""
    peak = next((teraflops for key, teraflops in PEAK.items() if key in gpu), float("nan"))
    return pd.DataFrame(
        {
            "method": [method for method, _ in forms],
            "teacher": [taught_by for _, taught_by in forms],
            "samples_s": 1e3 * batch / table.p50_ms,
            "waiting": table.name.map(lambda form: statistics.median(waits[form][-repeats:]))
            / table.p50_ms,
            "step_ms": table.p50_ms,
            "ratio": table.p50_ms / table.p50_ms[0],
            "peak": table.name.map(flops) / table.p50_ms / 1e9 / peak,
        }
    )


def main():
    parser = argparse.ArgumentParser(
        prog="python -m jettclip.bench_train", description=__doc__.splitlines()[0]
    )
    commands = parser.add_subparsers(dest="command", required=True)
    losses = commands.add_parser("losses", help=benchmark_losses.__doc__.splitlines()[0])
    train = commands.add_parser(
        "train", help="samples per second and time spent waiting, with and without a teacher"
    )
    train.add_argument("--model", default="JettCLIP-T", help="student (default: %(default)s)")
    train.add_argument(
        "--teacher", default="LongCLIP-T", help="the online teacher (default: %(default)s)"
    )
    train.add_argument("--batch", type=int, default=64, help="default: %(default)s")
    train.add_argument("--methods", nargs="+", default=[*METHODS, "crd+fd"], help="default: all")
    for command in (losses, train):
        command.add_argument(
            "--repeats", type=int, default=10, help="timings of each call (default: %(default)s)"
        )
        command.add_argument(
            "--results",
            default=ROOT / "results/training",
            type=Path,
            help="folder of the table (default: %(default)s)",
        )
    args = parser.parse_args()
    print(f"{torch.get_num_threads()} threads, PyTorch {torch.__version__}")
    if args.command == "losses":
        print(
            "forward + backward; ratio = this time / that of svd, of the loss without distillation"
        )
        table = benchmark_losses(repeats=args.repeats)
    else:
        print(
            f"on {torch.cuda.get_device_name() + ' in bfloat16' if torch.cuda.is_available() else 'the CPU'}; ratio = this time / that without distillation"
        )
        table = benchmark_train(
            args.model,
            args.teacher,
            args.batch,
            max(512, 2 * args.batch),
            args.methods,
            args.repeats,
        )
        table = table.assign(model=args.model, batch=args.batch)
    print(table.to_string(index=False, float_format=lambda value: f"{value:.2f}"))
    save_csv(table, args.results / f"{args.command}.csv")
    write_json(args.results / "provenance.json", provenance())


if __name__ == "__main__":
    main()
