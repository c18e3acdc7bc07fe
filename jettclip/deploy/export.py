"""Write a model as ONNX graphs that `jettclip.deploy.runtime` runs without PyTorch."""

import importlib.metadata
import logging
import shutil
import tempfile
import warnings
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from onnx.numpy_helper import from_array, to_array
from onnxscript.optimizer import fold_constants

from ..models import reparameterize
from ..runs import weights_hash
from ..text import byte_pairs, tokenizer
from ..utils import sha256, write_json
from . import runtime

ONNX = {"opset_version": 20, "external_data": False, "verbose": False}
TOLERANCE = 1e-5  # of normalised features, between PyTorch and the exported fp32 graphs
# In 8 bits: which input of an operator holds the weight, and the axis of the weight's channels.
STORED = {"Conv": (1, 0), "Gather": (0, 1)}
PRODUCTS = ["Conv", "Gemm", "MatMul"]
# Zero points make OpenVINO slower. Outputs of products are not rounded to 8 bits.
RANGES = {"ActivationSymmetric": True, "OpTypesToExcludeOutputQuantization": PRODUCTS}
GRAPHS = ("image.onnx", "text.onnx")


class Graph(torch.nn.Module):
    """Pixels (B, 3, S, S) or tokens (B, L), whichever `tower` reads -> normalised features."""

    def __init__(self, tower):
        super().__init__()
        self.tower, self.reads_text = tower, hasattr(tower, "token_embedding")

    def forward(self, x):
        if not self.reads_text:
            return F.normalize(self.tower(x), dim=1)
        # The tower's own `forward` cuts the padding; here the caller has done it.
        embedded = self.tower.token_embedding(x) + self.tower.positional_embedding[: x.shape[1]]
        return F.normalize(self.tower.encode(embedded, x.argmax(dim=1)), dim=1)


def export(model, folder):
    """Write `model`, folded, to `folder`: image.onnx, text.onnx, tokenizer.json and deploy.json.

    Raises RuntimeError, and writes nothing, if the graphs differ from PyTorch by over TOLERANCE.
    """
    if model.config["text_tower"] == "open_clip":
        raise ValueError(f"cannot export {model.name}: only JettCLIP, MobileCLIP and LongCLIP")
    size, length, trims = model.image_size, model.context_length, model.text.trims
    config = {key: model.config[key] for key in ("text_tower", "embed_dim", "preprocess")}
    config |= {"model": model.name, "precision": "fp32", "opset": ONNX["opset_version"]}
    config |= {"image_size": size, "context_length": length, "trims": trims}
    config["image_weights"] = weights_hash(model.visual)  # before folding, which rounds
    model = reparameterize(model).cpu()
    images = torch.rand(3, 3, size, size)
    tokens = tokenizer(length)(["a long description " * n for n in (0, 1, 5, 25, 125)])
    no_warnings = warnings.catch_warnings(action="ignore", category=FutureWarning)  # of PyTorch's
    with new_export(folder) as temporary, torch.no_grad(), no_warnings:
        write_graph(model.visual, images, (0,), temporary / "image.onnx")
        write_graph(model.text, tokens, (0, 1) if trims else (0,), temporary / "text.onnx")
        byte_pairs()[0].save(str(temporary / "tokenizer.json"), pretty=False)
        write_config(temporary, config)
        difference = max(drift(model, runtime.load(temporary), images, tokens))
        if not difference <= TOLERANCE:  # refuses NaN too
            error = f"the exported {model.name} differs from PyTorch by {difference:.1e}"
            raise RuntimeError(f"{error}, more than {TOLERANCE}: nothing was written")
    return Path(folder)


def write_graph(tower, example, dynamic, path):
    """Export `tower` as ONNX; the axes `dynamic` of its input may have any size."""
    shapes = {axis: torch.export.Dim.DYNAMIC for axis in dynamic}
    program = torch.export.export(Graph(tower).eval(), (example,), dynamic_shapes=(shapes,))
    names = {"input_names": [path.stem], "output_names": ["features"]}
    model = torch.onnx.export(program, **names, **ONNX).model_proto
    fold_constants(model, input_size_limit=2**24, output_size_limit=2**24)  # slices of weights
    for fields in (model.graph.node, model.graph.value_info, model.graph.input, [model.graph]):
        for field in fields:  # they name source files of this machine
            field.ClearField("metadata_props")
    onnx.save(model, path)


def quantize(folder, output, calibration=None):
    """Write the fp32 export `folder` to `output` with 8-bit weights, about a quarter of its size.

    calibration: pixels (N, 3, S, S) and tokens (N, L) of some hundred training pairs, which give
    the ranges of activations. OpenVINO then multiplies matrices and convolutions in 8 bits, except
    depthwise ones, which would lose recall; full-size models are fastest so. ONNX Runtime runs this
    form, too, in fp32.
    None: matrix products find the ranges as they run, and convolutions multiply in fp32. Only ONNX
    Runtime runs this form, here and in browsers.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic, quantize_static  # a second

    exported, static = runtime.load(folder), calibration is not None
    if static and not (len(calibration) == 2 and all(map(len, calibration))):
        raise ValueError("calibration must be pixels (N, 3, S, S) and tokens (N, L), N at least 1")
    options = {"per_channel": True, "weight_type": QuantType.QInt8}
    with new_export(output) as temporary, quiet():
        shutil.copy(exported.checked("tokenizer.json"), temporary)
        for graph, rows in zip(GRAPHS, calibration if static else (None, None), strict=True):
            files = exported.checked(graph), temporary / graph
            if static:
                inputs = calibration_inputs(exported, graph, rows)
                reader = SimpleNamespace(get_next=partial(next, inputs, None))
                options["op_types_to_quantize"] = PRODUCTS
                options["nodes_to_exclude"] = left_in_fp32(files[0])
                quantize_static(*files, reader, extra_options=RANGES, **options)
            else:
                quantize_dynamic(*files, ["MatMul"], **options)
            store_in_8_bits(files[1], ["Gather"] if static else STORED)
        precision = "int8-static" if static else "int8"
        write_config(temporary, {**exported.config, "precision": precision})
    return Path(output)


@contextmanager
def quiet():
    """Without warnings of ONNX Runtime, which asks for shape inference: the exporter did that."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def calibration_inputs(exported, graph, rows):
    """Inputs of `graph`, a row of pixels or tokens at a time, which is cut as in `runtime`."""
    for row in rows:
        row = np.asarray(row, np.float32 if graph == "image.onnx" else np.int64)[None]
        cut = graph == "text.onnx" and exported.config["trims"]
        yield {Path(graph).stem: row[:, : row.argmax() + 1] if cut else row}


def left_in_fp32(path):
    """Names of the convolutions of a graph that stay in fp32: the first and all grouped ones."""
    nodes = [node for node in onnx.load(path).graph.node if node.op_type == "Conv"]
    groups = [onnx.helper.get_node_attr_value(node, "group") for node in nodes]
    return [n.name for i, (n, g) in enumerate(zip(nodes, groups, strict=True)) if i == 0 or g > 1]


def store_in_8_bits(path, operators):
    """Store weights of `operators`, convolutions (Conv) and embeddings (Gather), as 8-bit numbers
    with a scale per channel.

    ONNX Runtime turns those of convolutions into fp32 when it opens the graph, and the rows of
    embeddings when it reads them.
    """
    model, nodes = onnx.load(path), []
    dequantize = partial(onnx.helper.make_node, "DequantizeLinear")
    graph, weights = model.graph, {tensor.name: tensor for tensor in model.graph.initializer}
    for node in graph.node:
        nodes.append(node)
        if node.op_type not in operators:
            continue
        operand, axis = STORED[node.op_type]
        tensor = weights.get(node.input[operand])
        if tensor is None or tensor.data_type != onnx.TensorProto.FLOAT or len(tensor.dims) < 2:
            continue
        weight = to_array(tensor)
        others = tuple(i for i in range(weight.ndim) if i != axis)
        scale = np.maximum(np.abs(weight).max(axis=others, keepdims=True), 1e-12) / 127
        small = np.round(weight / scale).astype(np.int8)
        name = tensor.name
        graph.initializer.remove(weights.pop(name))
        graph.initializer.append(from_array(small, f"{name}_int8"))
        graph.initializer.append(from_array(scale.ravel(), f"{name}_scale"))
        if node.op_type == "Conv":
            nodes.insert(-1, dequantize([f"{name}_int8", f"{name}_scale"], [name], axis=axis))
        else:  # first the rows, then their numbers
            rows = [f"{name}_rows", f"{name}_scale"]
            nodes.append(dequantize(rows, [*node.output], axis=-1))
            node.input[0], node.output[0] = f"{name}_int8", f"{name}_rows"
    del graph.node[:]
    graph.node.extend(nodes)
    onnx.save(model, path)


def drift(model, exported, images, tokens):
    """Largest difference of a normalised feature, PyTorch against exported -> (image, text)."""
    with torch.inference_mode():
        image = model.encode_image(images, True) - torch.from_numpy(exported.encode_image(images))
        text = model.encode_text(tokens, True) - torch.from_numpy(exported.encode_text(tokens))
    return image.abs().max().item(), text.abs().max().item()


@contextmanager
def new_export(folder):
    """A temporary folder that becomes `folder` on success. Replaces an export, nothing else."""
    folder = Path(folder)
    if folder.exists() and not (folder / runtime.CONFIG).exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} holds other files than an export: choose another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as scratch:
        temporary = Path(scratch) / folder.name  # unlike `scratch`, readable by other users
        temporary.mkdir()
        yield temporary
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)


def write_config(folder, config):
    """Write deploy.json: `config`, the versions that made the export, and hashes of its files."""
    versions = {p: importlib.metadata.version(p) for p in ("torch", "onnx", "onnxruntime")}
    hashes = {file: sha256(folder / file) for file in (*GRAPHS, "tokenizer.json")}
    write_json(folder / runtime.CONFIG, config | {"versions": versions, "sha256": hashes})
