"""What a model costs to run: parameters and honest latencies.

Latencies of several towers are interleaved in one run, after a warm-up, on a synchronised device; ratios of one run
mean something where milliseconds of a shared machine do not.
"""
import statistics
import time

import pandas as pd
import torch


def parameters_m(module):
    """Parameters of `module` in millions."""
    return sum(p.numel() for p in module.parameters()) / 1e6


def max_difference(model, folded, images, tokens):
    """Largest absolute difference of the normalised features of two models -> (image, text)."""
    with torch.inference_mode():
        return tuple((a - b).abs().max().item() for a, b in (
            (model.encode_image(images, True), folded.encode_image(images, True)),
            (model.encode_text(tokens, True), folded.encode_text(tokens, True))))


@torch.inference_mode()
def benchmark(calls, repeats=20, warmup=3):
    """Time functions against each other: {name: function} -> table: name, p50_ms, p90_ms.

    The functions take turns, so a slow moment of the machine hits all of them alike.
    """
    times = {name: [] for name in calls}
    for repeat in range(warmup + repeats):
        for name, call in calls.items():
            _synchronize()
            start = time.perf_counter()
            call()
            _synchronize()
            if repeat >= warmup:
                times[name].append(1e3 * (time.perf_counter() - start))
    return pd.DataFrame([{"name": name, "p50_ms": statistics.median(t), "p90_ms": statistics.quantiles(t, n=10)[-1]}
                         for name, t in times.items()])


def _synchronize():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


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
