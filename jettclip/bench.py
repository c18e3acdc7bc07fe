"""The clock: full-size towers, in every form that is installed, beside Long-CLIP-B as its code runs it, in one run.

    python -m jettclip.bench --captions long_captions.parquet          # make bench-latency; rows go to results/latency/<machine>.csv

Ratios of one run mean something where milliseconds of a shared machine do not.
"""

import argparse
import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import open_clip
import pandas as pd
import torch

from . import checkpoints, deploy, figures, report, runtime
from .deploy import benchmark, gmacs, pack, parameters_m
from .models import create_model, reparameterize
from .scenes import make_pairs
from .text import CONTEXT, HybridText, tokenizer

REFERENCE = "Long-CLIP-B, reference"


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


# ---- full-size towers


def caption_tokens(file, shortest, longest, n=32, seed=0):
    """Tokens (n, 248) of `n` real captions of `shortest` to `longest` tokens: texts of a Parquet file, or single
    sentences of them; without a file, captions of scenes."""
    texts = pd.read_parquet(file).text if file else make_pairs(500, seed).long
    texts = pd.concat([texts, texts.str.split(". ", regex=False).explode()]).drop_duplicates()
    tokens = tokenizer()(list(texts.sample(min(2000, len(texts)), random_state=seed)))
    lengths = tokens.argmax(dim=1) + 1
    fitting = tokens[(lengths >= shortest) & (lengths <= longest)]
    if len(fitting) < n:
        raise ValueError(
            f"only {len(fitting)} captions of {shortest} to {longest} tokens in {file or 'scenes'}; {n} are needed"
        )
    return fitting[:n]


def reference():
    """Long-CLIP-B as its code runs it, random weights: open_clip's ViT-B-16-quickgelu with text untrimmed at 248 tokens."""
    config = open_clip.get_model_config("ViT-B-16-quickgelu")
    config["text_cfg"]["context_length"] = CONTEXT
    model = open_clip.CLIP(**config).eval()
    model.image_size, model.config = config["vision_cfg"]["image_size"], config
    return model


def open_torch(folder, backend):
    """A model folder, or "reference", as PyTorch runs it: folded, and with packed weights where `backend` says so."""
    if folder == "reference":
        return reference()
    model = reparameterize(checkpoints.load_folder(folder))
    return pack(model) if backend == "pytorch-packed" else model


ALONE = """
import sys, time
import numpy as np
folder, backend, size = sys.argv[1:]
if backend.startswith("pytorch"):
    import torch
    from jettclip.bench import open_torch as load
    torch.set_grad_enabled(False)
    array = torch.from_numpy
else:
    from jettclip.runtime import load
    array = np.asarray
model, pixels = load(folder, backend), np.random.rand(32, 3, int(size), int(size)).astype(np.float32)
tokens = np.zeros((32, 248), dtype=np.int64)
tokens[:, :119], tokens[:, 119] = 7, 49407
model.encode_image(array(pixels[:1]))
print(time.time())
model.encode_image(array(pixels)), model.encode_text(array(tokens))
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def alone(folder, backend, image_size):
    """A form in a process of its own -> start_s (to the first embedded photo) and peak_mb (32 photos, 32 texts of 120 tokens)."""
    start = time.time()
    finished = subprocess.run(
        [sys.executable, "-c", ALONE, str(folder), backend, str(image_size)],
        capture_output=True,
        text=True,
        check=True,
    )
    embedded, peak = finished.stdout.split()
    return {"start_s": float(embedded) - start, "peak_mb": int(peak) / 1024}


def benchmark_latency(names, captions=None, batches=(1, 32), repeats=20, say=lambda line: None):
    """Each model of `names` (random weights) in every form that is installed, beside Long-CLIP-B as its code runs it.

    "MobileCLIP-S0 at 248" is S0 with its own text tower, stretched, which attends to padding. Columns of `latency`; params_m and
    gmacs (of one input, of `tokens` tokens) of the row's towers; of the whole form file_mb, start_s and peak_mb (`alone`), and the
    largest change of normalised features against folded PyTorch, drift_image and drift_text.
    """
    backends = runtime.installed_backends()
    texts = {
        "60 to 180 tokens": caption_tokens(captions, 60, 180),
        "12 to 20 tokens": caption_tokens(captions, 12, 20),
    }
    plain = {REFERENCE: reference()}
    forms = {(REFERENCE, "pytorch"): plain[REFERENCE]}
    facts = [
        {
            "model": REFERENCE,
            "backend": "pytorch",
            **alone("reference", "pytorch", plain[REFERENCE].image_size),
        }
    ]
    with tempfile.TemporaryDirectory() as scratch:
        for name in names:
            tower = {"text_tower": "stretched"} if name == "MobileCLIP-S0 at 248" else {}
            say(f"exporting {name}")
            folder = Path(scratch) / name.replace(" ", "-")
            model = create_model("JettCLIP-S0" if tower else name, **tower).eval()
            checkpoints.save_folder(model, folder / "pytorch")
            plain[name] = reparameterize(model)
            exported = deploy.export(model, folder / "fp32")
            places = {
                "pytorch": folder / "pytorch",
                "pytorch-packed": folder / "pytorch",
                **{backend: exported for backend in backends},
                "onnxruntime-int8": deploy.quantize(exported, folder / "int8"),
            }
            images = torch.rand(4, 3, model.image_size, model.image_size)
            for backend, place in places.items():
                torch_form = backend.startswith("pytorch")
                form = (
                    open_torch(place, backend)
                    if torch_form
                    else runtime.load(place, backend.removesuffix("-int8"))
                )
                forms[name, backend] = form
                drift = (deploy.max_difference if torch_form else deploy.drift)(
                    plain[name], form, images, texts["60 to 180 tokens"]
                )
                files = (
                    [place / checkpoints.WEIGHTS] * 2
                    if torch_form
                    else [place / "image.onnx", place / "text.onnx"]
                )
                facts.append(
                    {
                        "model": name,
                        "backend": backend,
                        "drift_image": drift[0],
                        "drift_text": drift[1],
                        "file_mb": sum(file.stat().st_size for file in set(files)) / 1e6,
                        **alone(place, backend.removesuffix("-int8"), model.image_size),
                    }
                )
        say("timing")
        sizes = {form.image_size for form in forms.values()}
        table = latency(
            forms,
            {size: torch.rand(max(batches), 3, size, size) for size in sizes},
            texts,
            batches,
            repeats,
        )
    table = pd.concat([table, both_towers(table, "60 to 180 tokens")], ignore_index=True)
    macs = {
        (name, tokens): gmacs(model, CONTEXT if name == REFERENCE else tokens)
        for name, model in plain.items()
        for tokens in table.tokens.unique()
        if tokens
    }
    costs = {
        name: {"image": parameters_m(model.visual), "both": parameters_m(model)}
        for name, model in plain.items()
    }
    for row in table.itertuples():
        image, text = (
            macs[row.model, row.tokens] if row.tokens else (*gmacs(plain[row.model])[:1], 0)
        )
        table.loc[row.Index, "gmacs"] = {"image": image, "text": text, "both": image + text}[
            row.tower
        ]
        cost = costs[row.model]
        table.loc[row.Index, "params_m"] = cost.get(row.tower, cost["both"] - cost["image"])
    return table.merge(pd.DataFrame(facts), on=["model", "backend"])


def machine():
    """A file name for this machine, and what its numbers depend on."""
    facts = report.provenance()
    packages = {
        name: importlib.metadata.version(name)
        for name in ("onnxruntime", "openvino")
        if importlib.util.find_spec(name)
    }
    allocator = os.environ.get("LD_PRELOAD") or "the system's"
    return re.sub(r"\W+", "-", f"{facts['cpu']} {facts['cores']} cores").lower(), {
        **facts,
        **packages,
        "allocator": allocator,
    }


def main():
    parser = argparse.ArgumentParser(
        prog="python -m jettclip.bench", description=benchmark_latency.__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--models",
        nargs="+",
        default=[
            "JettCLIP-S0",
            "MobileCLIP-S0 at 248",
            "JettCLIP-S1",
            "JettCLIP-S2",
            "JettCLIP-B",
            "LongCLIP-B",
        ],
    )
    parser.add_argument(
        "--captions", help="Parquet file with a column `text`; default: captions of scenes"
    )
    parser.add_argument(
        "--output",
        default=report.ROOT / "results/latency",
        type=Path,
        help="folder of the table (default: %(default)s)",
    )
    parser.add_argument(
        "--repeats", type=int, default=20, help="timings of each call (default: %(default)s)"
    )
    args = parser.parse_args()
    name, facts = machine()
    print(f"{facts['cpu']}, {facts['threads']} threads, allocator: {facts['allocator']}")
    table = benchmark_latency(
        args.models, args.captions, repeats=args.repeats, say=lambda line: print(line, flush=True)
    )
    report.save_csv(table, args.output / f"{name}.csv")
    figures.style()
    drawn = table.model.isin([REFERENCE, args.models[0]]) | (
        (table.model == "MobileCLIP-S0 at 248") & (table.backend == "pytorch")
    )
    figures.save(figures.speed(table[drawn]), args.output / f"{name}.svg")
    checkpoints.write_json(
        args.output / f"{name}.json",
        {**facts, "captions": Path(args.captions).name if args.captions else "scenes"},
    )
    print(
        f"wrote {args.output / name}.csv; ratio = time of Long-CLIP-B's reference form / this time"
    )
    print(
        table[
            [
                "tower",
                "captions",
                "batch",
                "model",
                "backend",
                "p50_ms",
                "p90_ms",
                "ratio_to_teacher",
            ]
        ].to_string(index=False, float_format=lambda value: f"{value:.2f}")
    )


if __name__ == "__main__":
    main()
