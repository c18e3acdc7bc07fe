"""A trained model where people use it: what it costs, how fast it is, the same outputs sooner, and without PyTorch.

    deploy.export(model, "exported")                   # ONNX towers and all that they need, checked
    deploy.quantize("exported", "exported-int8")       # smaller
    model = deploy.load("exported", "openvino-bf16")   # from jettclip.runtime, which does not import PyTorch

Latencies of several calls are interleaved in one run, after a warm-up, on a synchronised device.
"""

import contextlib
import hashlib
import importlib.metadata
import logging
import os
import shutil
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ..models import reparameterize
from ..text import byte_pairs
from ..utils import write_json
from . import runtime
from .runtime import load  # noqa: F401

OPSET = 20
TOLERANCE = 1e-5  # of normalised features, between PyTorch and the exported fp32 graphs


# ---- export


class ImageGraph(nn.Module):
    """Pixels (B, 3, S, S) -> normalised features (B, embed_dim)."""

    def __init__(self, model):
        super().__init__()
        self.tower = model.visual

    def forward(self, x):
        return F.normalize(self.tower(x), dim=1)


class TextGraph(nn.Module):
    """Tokens (B, L), all of them used -> normalised features (B, embed_dim); cutting and padding are the caller's."""

    def __init__(self, model):
        super().__init__()
        self.tower = model.text

    def forward(self, x):
        tower = self.tower
        embedded = (
            tower.token_embedding(x) + tower.positional_embedding[: x.shape[1]]
        )  # (B, L) -> (B, L, d)
        return F.normalize(tower.encode(embedded, x.argmax(dim=1)), dim=1)


@contextlib.contextmanager
def new_export(folder):
    """A temporary folder that becomes `folder` if all goes well; an earlier export there is replaced, anything else is not."""
    folder = Path(folder)
    if folder.exists() and not (folder / runtime.CONFIG).exists() and any(folder.iterdir()):
        raise FileExistsError(
            f"{folder} holds something else than an export: choose another folder"
        )
    temporary = folder.with_name(f".{folder.name}.tmp{os.getpid()}")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if folder.exists():
            shutil.rmtree(folder)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def export(model, folder):
    """Write `model`, folded, as a folder that `load` opens without PyTorch; any number of rows, any length of text.

    It holds image.onnx, text.onnx, tokenizer.json and deploy.json. The graphs must agree with PyTorch within TOLERANCE, or
    nothing is written.
    """
    model = reparameterize(model).cpu()
    bpe, pattern = byte_pairs()
    images, tokens = torch.rand(3, 3, model.image_size, model.image_size), example_tokens(model)
    with new_export(folder) as temporary, torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of PyTorch about itself
        for name, graph, example, dynamic in (
            ("image", ImageGraph(model), images, (0,)),
            ("text", TextGraph(model), tokens, (0, 1) if model.text.trims else (0,)),
        ):
            shapes = {axis: torch.export.Dim.DYNAMIC for axis in dynamic}
            program = torch.export.export(graph.eval(), (example,), dynamic_shapes=(shapes,))
            torch.onnx.export(
                program,
                f=temporary / f"{name}.onnx",
                input_names=[name],
                output_names=["features"],
                opset_version=OPSET,
                external_data=False,
                verbose=False,
            )
        bpe.save(str(temporary / "tokenizer.json"))
        _describe(
            temporary,
            {
                "model": model.name,
                "text_tower": model.config["text_tower"],
                "precision": "fp32",
                "opset": OPSET,
                "image_size": model.image_size,
                "embed_dim": model.config["embed_dim"],
                "preprocess": model.config["preprocess"],
                "context_length": model.context_length,
                "trims": model.text.trims,
                "token_pattern": pattern,
            },
        )
        difference = max(drift(model, load(temporary), images, tokens))
        if not difference <= TOLERANCE:  # NaN too
            raise RuntimeError(
                f"the exported {model.name} differs from PyTorch's by {difference:.1e}, more than {TOLERANCE}: "
                "nothing was written"
            )
    return Path(folder)


def quantize(folder, output):
    """Write the export `folder` with the weights of its matrix products in 8 bits, activations quantised as they come.

    For ONNX Runtime only. Convolutions stay fp32: in 8 bits they are slower. The drift is for you to measure.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic  # takes a second

    config = load(folder).config
    if config["precision"] != "fp32":
        raise ValueError(f"{folder} is {config['precision']} already: quantize an fp32 export")
    with new_export(output) as temporary:
        shutil.copy(Path(folder) / "tokenizer.json", temporary)
        logging.disable(logging.WARNING)  # it asks for shape inference, which the exporter has done
        for name in ("image.onnx", "text.onnx"):
            quantize_dynamic(
                Path(folder) / name,
                temporary / name,
                op_types_to_quantize=["MatMul"],
                weight_type=QuantType.QInt8,
                per_channel=True,
            )
        logging.disable(logging.NOTSET)
        _describe(temporary, {**config, "precision": "int8"})
    return Path(output)


def _describe(folder, config):
    """Write deploy.json: `config` and what the folder was made with."""
    write_json(
        folder / runtime.CONFIG,
        config
        | {
            "versions": {
                name: importlib.metadata.version(name) for name in ("torch", "onnx", "onnxruntime")
            },
            "sha256": {
                name: hashlib.sha256((folder / name).read_bytes()).hexdigest()
                for name in ("image.onnx", "text.onnx")
            },
        },
    )


def example_tokens(model):
    """Six texts of random words: the shortest, the longest, and between."""
    tokens = torch.randint(
        1, 40000, (6, model.context_length), generator=torch.Generator().manual_seed(0)
    )
    for row, end in zip(tokens, torch.linspace(1, model.context_length - 1, 6).long()):
        row[end], row[end + 1 :] = model.config["text_cfg"]["vocab_size"] - 1, 0
    return tokens


def drift(model, exported, images, tokens):
    """Largest absolute difference of normalised features, PyTorch's `model` against an exported one -> (image, text)."""
    with torch.inference_mode():
        return tuple(
            float(np.abs(a.numpy() - b).max())
            for a, b in (
                (model.encode_image(images, True), exported.encode_image(images)),
                (model.encode_text(tokens, True), exported.encode_text(tokens)),
            )
        )
