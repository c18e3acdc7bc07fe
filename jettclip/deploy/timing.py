"""What a model costs and how fast it runs: parameters, multiply-accumulates, latency in turns."""

import statistics
import time
from functools import partial

import pandas as pd
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ..text import CONTEXT


def parameters_m(module):
    """Parameters of `module` in millions."""
    return sum(p.numel() for p in module.parameters()) / 1e6


@torch.inference_mode()
def gmacs(model, tokens=CONTEXT):
    """Multiply-accumulates done for an image and a text of `tokens` tokens -> both, in 10^9."""
    image = torch.zeros(1, 3, model.image_size, model.image_size)
    text = torch.ones(1, min(tokens, model.context_length), dtype=torch.long)
    text[0, -1] = model.config["text_cfg"]["vocab_size"] - 1
    counts, fast_path = [], torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    for encode, example in ((model.encode_image, image), (model.encode_text, text)):
        # The counter does not know fused attention; the plain kernel is two matrix products.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            encode(example)
        counts.append(counter.get_total_flops() / 2e9)
    torch.backends.mha.set_fastpath_enabled(fast_path)
    return tuple(counts)


def benchmark(calls, repeats=20, warmup=3):
    """Time {name: function} in turns, so that a slow moment hits all -> name, p50_ms, p90_ms."""
    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else (lambda: None)
    times = {name: [] for name in calls}
    for repeat in range(warmup + repeats):
        for name, call in calls.items():
            synchronize()
            start = time.perf_counter()
            call()
            synchronize()
            if repeat >= warmup:
                times[name].append(1e3 * (time.perf_counter() - start))
    rows = [(n, statistics.median(t), statistics.quantiles(t, n=10)[-1]) for n, t in times.items()]
    return pd.DataFrame(rows, columns=["name", "p50_ms", "p90_ms"])


@torch.inference_mode()
def latency(models, images, texts, batches=(1, 32), repeats=20):
    """Time both towers of {(name, backend): model, the teacher first} in turns.

    images {image_size: (N, 3, S, S)} and texts {captions: tokens (N, L)} have at least max(batches)
    rows. A batch above 1 takes a quarter of the repeats. -> table: model, backend, tower, captions,
    batch, tokens (of the longest text), p50_ms, p90_ms, ratio_to_teacher (teacher's time by its).
    """
    rows = []
    for batch in batches:
        turns = (repeats, 2) if batch == 1 else (max(2, repeats // 4), 1)  # repeats, warm-up
        pixels = {size: image[:batch] for size, image in images.items()}
        calls = {key: partial(m.encode_image, pixels[m.image_size]) for key, m in models.items()}
        settings = {("image", "", batch, 0): calls}
        for captions, tokens in texts.items():
            calls = {key: partial(m.encode_text, tokens[:batch]) for key, m in models.items()}
            longest = int(tokens[:batch].argmax(dim=1).max()) + 1
            settings["text", captions, batch, longest] = calls
        for setting, calls in settings.items():
            times = benchmark(calls, *turns)
            for key, p50, p90 in times.to_numpy():
                rows.append((*key, *setting, p50, p90, times.p50_ms[0] / p50))
    columns = ["model", "backend", "tower", "captions", "batch", "tokens"]
    return pd.DataFrame(rows, columns=[*columns, "p50_ms", "p90_ms", "ratio_to_teacher"])


def both_towers(table, captions):
    """Rows of `latency` for one image and one text of `captions`: both towers' medians, added."""
    chosen = table[table.captions.isin(["", captions])]
    groups = chosen.groupby(["model", "backend", "batch"], sort=False, as_index=False)
    both = groups.agg(p50_ms=("p50_ms", "sum"), tokens=("tokens", "max"))
    first = (both.model == table.model[0]) & (both.backend == table.backend[0])
    teacher = both.batch.map(both[first].set_index("batch").p50_ms)
    return both.assign(tower="both", captions=captions, ratio_to_teacher=teacher / both.p50_ms)
