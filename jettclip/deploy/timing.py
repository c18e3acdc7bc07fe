"""What a model costs and how fast it is: parameters, multiply-accumulates, latency of several forms in turns."""

import statistics
import time

import pandas as pd
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ..text import CONTEXT, HybridText


def parameters_m(module):
    """Parameters of `module` in millions."""
    return sum(p.numel() for p in module.parameters()) / 1e6


@torch.inference_mode()
def gmacs(model, tokens=CONTEXT):
    """Multiply-accumulates of one image and of one text of `tokens` tokens, attention included -> (image, text) in 10^9.

    Counts what the model does, so work that is cut away does not appear.
    """
    text = torch.ones(1, min(tokens, model.context_length), dtype=torch.long)
    text[0, -1] = model.config["text_cfg"]["vocab_size"] - 1
    counts, fast_path = [], torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    for encode, one in (
        (model.encode_image, torch.zeros(1, 3, model.image_size, model.image_size)),
        (model.encode_text, text),
    ):
        # The counter knows nothing of fused attention; the plain kernel is two matrix products.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            encode(one)
        counts.append(counter.get_total_flops() / 2e9)
    torch.backends.mha.set_fastpath_enabled(fast_path)
    return tuple(counts)


def max_difference(model, folded, images, tokens):
    """Largest absolute difference of the normalised features of two models -> (image, text)."""
    with torch.inference_mode():
        return tuple(
            (a - b).abs().max().item()
            for a, b in (
                (model.encode_image(images, True), folded.encode_image(images, True)),
                (model.encode_text(tokens, True), folded.encode_text(tokens, True)),
            )
        )


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
    return pd.DataFrame(
        [
            {
                "name": name,
                "p50_ms": statistics.median(t),
                "p90_ms": statistics.quantiles(t, n=10)[-1],
            }
            for name, t in times.items()
        ]
    )


def _synchronize():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@torch.inference_mode()
def latency(forms, images, texts, batches=(1, 32), repeats=20):
    """Time both towers of {(model, backend): form} in turns; the first form is what ratios refer to.

    A form has encode_image, encode_text and image_size: a model or an exported one. images {image_size: (N, 3, S, S)},
    decoded beforehand, and texts {captions: tokens (N, L)} hold at least max(batches) rows. At larger batches than 1 a quarter of
    the repeats. -> table: model, backend, tower, captions, batch, tokens (longest of the batch), p50_ms, p90_ms, ratio_to_teacher.
    """
    rows, first = [], next(iter(forms))
    for batch in batches:
        for captions, tokens in {"": None, **texts}.items():
            if tokens is None:
                calls = {
                    key: lambda form=form, x=images[form.image_size][:batch]: form.encode_image(x)
                    for key, form in forms.items()
                }
            else:
                calls = {
                    key: lambda form=form, t=tokens[:batch]: form.encode_text(t)
                    for key, form in forms.items()
                }
            table = benchmark(
                calls,
                repeats if batch == 1 else max(2, repeats // 4),
                warmup=2 if batch == 1 else 1,
            ).set_index("name")
            rows += [
                {
                    "model": key[0],
                    "backend": key[1],
                    "tower": "image" if tokens is None else "text",
                    "captions": captions,
                    "batch": batch,
                    "tokens": 0 if tokens is None else int(tokens[:batch].argmax(dim=1).max()) + 1,
                    "p50_ms": table.p50_ms[key],
                    "p90_ms": table.p90_ms[key],
                    "ratio_to_teacher": table.p50_ms[first] / table.p50_ms[key],
                }
                for key in forms
            ]
    return pd.DataFrame(rows)


def both_towers(table, captions):
    """Rows of `latency` for one image and one text of `captions`: the sum of both towers' medians."""
    chosen = table[table.captions.isin(["", captions])]
    both = chosen.groupby(["model", "backend", "batch"], sort=False, as_index=False).agg(
        p50_ms=("p50_ms", "sum"), tokens=("tokens", "max")
    )
    teacher = both.batch.map(
        both[(both.model == table.model[0]) & (both.backend == table.backend[0])]
        .set_index("batch")
        .p50_ms
    )
    return both.assign(tower="both", captions=captions, ratio_to_teacher=teacher / both.p50_ms)


@torch.inference_mode()
def layer_times(models, images, tokens, repeats=20):
    """Where the time goes: {name: model} of one architecture, in turns -> table: tower, part, and of each model `name ms`
    (median, from the part's start to the next one's) and `name layers` (convolutions, matrix products and norms in it)."""
    marks = []

    def timed(model, tower, call):
        marks.clear()
        call(model)
        ends = [start for _, _, start in marks[1:]] + [time.perf_counter()]
        return [(tower, part, 1e3 * (end - start)) for (_, part, start), end in zip(marks, ends)]

    parts, hooks, times = {name: model_parts(model) for name, model in models.items()}, [], []
    for name in models:
        for (tower, part), modules in parts[name].items():
            hooks.append(
                modules[0].register_forward_pre_hook(
                    lambda module, args, tower=tower, part=part: marks.append(
                        (tower, part, time.perf_counter())
                    )
                )
            )
    for repeat in range(repeats + 2):
        for name, model in models.items():
            measured = timed(model, "image", lambda m: m.visual(images)) + timed(
                model, "text", lambda m: m.text(tokens)
            )
            times += (
                [(tower, part, f"{name} ms", ms) for tower, part, ms in measured]
                if repeat >= 2
                else []
            )
    for hook in hooks:
        hook.remove()
    table = pd.DataFrame(times, columns=["tower", "part", "what", "ms"])
    table = (
        table.pivot_table("ms", ["tower", "part"], "what", "median", sort=False)
        .reset_index()
        .rename_axis(columns=None)
    )
    for name in models:
        table[f"{name} layers"] = [
            sum(
                isinstance(layer, LAYERS)
                for module in parts[name][tower, part]
                for layer in module.modules()
            )
            for tower, part in zip(table.tower, table.part)
        ]
    return table


LAYERS = (
    torch.nn.modules.conv._ConvNd,
    torch.nn.Linear,
    torch.nn.MultiheadAttention,
    torch.nn.modules.batchnorm._BatchNorm,
    torch.nn.LayerNorm,
)


def model_parts(model):
    """{(tower, part): modules, the first of which is called first} of a FastViT image tower and either text tower."""
    trunk, text = model.visual.trunk, model.text
    blocks = text.layers if isinstance(text, HybridText) else text.transformer.resblocks
    image = {
        "stem": [trunk.stem],
        **{f"stage {i}": [stage] for i, stage in enumerate(trunk.stages, 1)},
        "last convolution": [trunk.final_conv],
        "head": [trunk.head],
    }
    words = {
        "embedding": [text.token_embedding],
        **({"first RepMixer": [text.first]} if isinstance(text, HybridText) else {}),
        **{
            f"attention {i}": [block.ln_1, block.attn, block.ln_2, block.mlp]
            for i, block in enumerate(blocks, 1)
        },
        **({"last RepMixer": [text.last]} if isinstance(text, HybridText) else {}),
        "projection": [text.ln_final],
    }
    return {
        (tower, part): modules
        for tower, of in (("image", image), ("text", words))
        for part, modules in of.items()
    }
