"""A trained model where people use it: what it costs, how fast it is, and the same outputs sooner.

Latencies of several calls are interleaved in one run, after a warm-up, on a synchronised device.
"""
import copy
import statistics
import time

import pandas as pd
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from .text import CONTEXT


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
