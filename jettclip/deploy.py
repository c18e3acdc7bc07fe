"""A trained model where people use it: what it costs, how fast it is, the same outputs sooner, and without PyTorch.

    deploy.export(model, "exported")                   # ONNX towers and all that they need, checked
    deploy.quantize("exported", "exported-int8")       # smaller
    model = deploy.load("exported", "openvino-bf16")   # from jettclip.runtime, which does not import PyTorch

Latencies of several calls are interleaved in one run, after a warm-up, on a synchronised device.
"""
import contextlib
import copy
import hashlib
import importlib.metadata
import logging
import os
import shutil
import statistics
import time
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from . import runtime
from .files import write_json
from .models import reparameterize
from .runtime import load  # noqa: F401
from .text import CONTEXT, byte_pairs

OPSET = 20
TOLERANCE = 1e-5  # of normalised features, between PyTorch and the exported fp32 graphs


class PackedWeights(TorchFunctionMode):
    """Runs linear layers and convolutions by oneDNN, with weights that it puts into its own order once, not at each call.

    PyTorch gives linear layers to MKL, which is slow on AMD processors, and reorders a convolution's weights each time.
    """

    def __init__(self):
        super().__init__()
        self.packed = {}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.linear and not kwargs and args[0].shape[:-1].numel() > 1:  # oneDNN gains nothing for one row
            return self.linear(*args)
        if function is F.conv2d and not kwargs and args[0].is_contiguous(memory_format=torch.channels_last):
            return self.conv2d(*args)
        return function(*args, **(kwargs or {}))

    def linear(self, x, weight, bias=None):
        packed = self.once(weight, 0, lambda: torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None))
        return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")

    def conv2d(self, x, weight, bias=None, stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1):
        sizes = list(padding), list(stride), list(dilation), groups
        packed = self.once(weight, x.shape, lambda: torch._C._nn.mkldnn_reorder_conv2d_weight(
            weight.to_mkldnn(), *sizes, list(x.shape)))
        return torch.ops.mkldnn._convolution_pointwise(x, packed, bias, *sizes, "none", [], "")

    def once(self, weight, shape, pack):
        key = weight.data_ptr(), weight.shape, shape
        if key not in self.packed:
            self.packed[key] = pack(), weight  # held, so that its address stays its own
        return self.packed[key][0]


def pack(model):
    """A copy of `model` for fp32 inference on this CPU, with the same outputs sooner; without oneDNN, just a copy.

    Its weights are packed at first use and must not change any more. It takes their memory a second time.
    """
    model = copy.deepcopy(model).eval()
    if torch.backends.mkldnn.is_available():
        mode = PackedWeights()

        def packed(encode):
            @torch.inference_mode()
            def run(*args, **kwargs):
                with mode:
                    return encode(*args, **kwargs)
            return run
        model.encode_image, model.encode_text = packed(model.encode_image), packed(model.encode_text)
    return model


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
    for encode, one in ((model.encode_image, torch.zeros(1, 3, model.image_size, model.image_size)), (model.encode_text, text)):
        # The counter knows nothing of fused attention; the plain kernel is two matrix products.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            encode(one)
        counts.append(counter.get_total_flops() / 2e9)
    torch.backends.mha.set_fastpath_enabled(fast_path)
    return tuple(counts)


def max_difference(model, folded, images, tokens):
    """Largest absolute difference of the normalised features of two models -> (image, text)."""
    with torch.inference_mode():
        return tuple((a - b).abs().max().item() for a, b in (
            (model.encode_image(images, True), folded.encode_image(images, True)),
            (model.encode_text(tokens, True), folded.encode_text(tokens, True))))


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
        embedded = tower.token_embedding(x) + tower.positional_embedding[:x.shape[1]]  # (B, L) -> (B, L, d)
        return F.normalize(tower.encode(embedded, x.argmax(dim=1)), dim=1)


@contextlib.contextmanager
def new_export(folder):
    """A temporary folder that becomes `folder` if all goes well; an earlier export there is replaced, anything else is not."""
    folder = Path(folder)
    if folder.exists() and not (folder / runtime.CONFIG).exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} holds something else than an export: choose another folder")
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
        for name, graph, example, dynamic in (("image", ImageGraph(model), images, (0,)),
                                              ("text", TextGraph(model), tokens, (0, 1) if model.text.trims else (0,))):
            shapes = {axis: torch.export.Dim.DYNAMIC for axis in dynamic}
            program = torch.export.export(graph.eval(), (example,), dynamic_shapes=(shapes,))
            torch.onnx.export(program, f=temporary / f"{name}.onnx", input_names=[name], output_names=["features"],
                              opset_version=OPSET, external_data=False, verbose=False)
        bpe.save(str(temporary / "tokenizer.json"))
        _describe(temporary, {
            "model": model.name, "text_tower": model.config["text_tower"], "precision": "fp32", "opset": OPSET,
            "image_size": model.image_size, "embed_dim": model.config["embed_dim"], "preprocess": model.config["preprocess"],
            "context_length": model.context_length, "trims": model.text.trims, "token_pattern": pattern})
        difference = max(drift(model, load(temporary), images, tokens))
        if not difference <= TOLERANCE:  # NaN too
            raise RuntimeError(f"the exported {model.name} differs from PyTorch's by {difference:.1e}, more than {TOLERANCE}: "
                               "nothing was written")
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
            quantize_dynamic(Path(folder) / name, temporary / name, op_types_to_quantize=["MatMul"],
                             weight_type=QuantType.QInt8, per_channel=True)
        logging.disable(logging.NOTSET)
        _describe(temporary, {**config, "precision": "int8"})
    return Path(output)


def _describe(folder, config):
    """Write deploy.json: `config` and what the folder was made with."""
    write_json(folder / runtime.CONFIG, config | {
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "onnx", "onnxruntime")},
        "sha256": {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in ("image.onnx", "text.onnx")}})


def example_tokens(model):
    """Six texts of random words: the shortest, the longest, and between."""
    tokens = torch.randint(1, 40000, (6, model.context_length), generator=torch.Generator().manual_seed(0))
    for row, end in zip(tokens, torch.linspace(1, model.context_length - 1, 6).long()):
        row[end], row[end + 1:] = model.config["text_cfg"]["vocab_size"] - 1, 0
    return tokens


def drift(model, exported, images, tokens):
    """Largest absolute difference of normalised features, PyTorch's `model` against an exported one -> (image, text)."""
    with torch.inference_mode():
        return tuple(float(np.abs(a.numpy() - b).max()) for a, b in (
            (model.encode_image(images, True), exported.encode_image(images)),
            (model.encode_text(tokens, True), exported.encode_text(tokens))))
