"""Run an exported model without PyTorch, in ONNX Runtime or OpenVINO: NumPy arrays in and out."""

import importlib.util
import json
import os
from contextlib import suppress
from functools import cache, cached_property, partial
from pathlib import Path

import numpy as np
import tokenizers

from ..inputs import Tokenizer, transform
from ..utils import cache_folder, read_json, sha256

CONFIG = "deploy.json"
BACKENDS = ("onnxruntime", "openvino", "openvino-bf16")
IMAGE_KEYS = ("image_weights", "image_size", "preprocess", "precision", "embed_dim")
# open_clip's: no regular expression is read from a file.
TOKEN_PATTERN = r"<start_of_text>|<end_of_text>|'s|'t|'re|'ve|'m|'ll|'d|"
TOKEN_PATTERN += r"[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
IMAGE_BATCH, TEXT_BATCH = 8, 32  # larger batches take memory and gain nothing
KEPT_GRAPHS = 8  # of S0, four take 0.4 GB


def load(folder, backend="onnxruntime"):
    """The exported model of `folder`, run by `backend`, one of BACKENDS, in OMP_NUM_THREADS threads
    or on all cores. openvino-bf16 multiplies in bfloat16 if the CPU can.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} is unknown: use one of {', '.join(BACKENDS)}")
    return ExportedModel(Path(folder), backend)


def installed_backends():
    """Those of BACKENDS whose package is installed."""
    return [backend for backend in BACKENDS if importlib.util.find_spec(backend.split("-")[0])]


class DamagedExport(ValueError):
    """A file of an export folder is not what `export` writes today."""

    def __init__(self, path):
        problem = "is missing, damaged, changed since or of another version"
        super().__init__(f"{path.absolute()} {problem}: delete the folder and export again")


class ExportedModel:
    """Both towers of an export folder. Features are normalised float32 (N, embed_dim).

    config: the folder's deploy.json. tokenizer, transform: those of the PyTorch model, in NumPy.
    identity: all that the features of an image depend on.
    """

    def __init__(self, folder, backend):
        self.folder, path = folder, folder / CONFIG
        try:
            self.config = read_json(path)
            made_of = [self.config[key] for key in IMAGE_KEYS]
            self.context_length, self.hashes = self.config["context_length"], self.config["sha256"]
        except (ValueError, TypeError, KeyError):
            raise DamagedExport(path) from None
        if self.config["precision"] == "int8-static":  # the ranges of activations count
            made_of.append(self.hashes["image.onnx"])
        self.identity = json.dumps([*made_of, backend == "openvino-bf16"])
        if self.config["precision"] == "int8" and backend != "onnxruntime":
            other = f"{backend} runs fp32 and int8-static exports"
            raise ValueError(f"{folder} is int8 for onnxruntime; {other}")
        self.image_size = self.config["image_size"]
        self.transform = partial(transform, image_size=self.image_size, **self.config["preprocess"])
        # Opens "image" or "text" when it is first used.
        self.tower = cache(lambda name, *many: open_graph(self.checked(name), backend, *many))
        self.streams = backend != "onnxruntime"

    @cached_property
    def tokenizer(self):
        bpe = tokenizers.Tokenizer.from_file(str(self.checked("tokenizer.json")))
        return Tokenizer(bpe, TOKEN_PATTERN, self.context_length)

    def checked(self, name):
        """Path of a file of the folder, which is the one that was exported."""
        path = self.folder / name
        if path.is_file() and sha256(path) == self.hashes.get(name):
            return path
        raise DamagedExport(path)

    def encode_image(self, images):
        """Pixels (N, 3, S, S) from `transform`, or a list of paths, bytes or PIL images."""
        if not hasattr(images, "shape"):
            images = [self.transform(image) for image in images]
        images = np.asarray(images, dtype=np.float32)
        starts = range(0, len(images), IMAGE_BATCH)
        return self.features("image", [images[i : i + IMAGE_BATCH] for i in starts])

    def features(self, name, batches):
        """Features (N, d) of batches of pixels or tokens, in order."""
        many = [True] if self.streams and len(batches) > 1 else []
        empty = np.empty((0, self.config["embed_dim"]), dtype=np.float32)
        return np.concatenate([empty, *self.tower(f"{name}.onnx", *many)(batches)])

    def encode_text(self, texts):
        """Texts, or 0-padded tokens (N, up to context_length) -> features.

        Where padding has no influence, texts of similar length form a batch and are cut to its
        longest.
        """
        tokens = texts if hasattr(texts, "shape") else self.tokenizer(texts)
        tokens = np.asarray(tokens, dtype=np.int64)
        if not self.config["trims"]:
            tokens = np.pad(tokens, ((0, 0), (0, self.context_length - tokens.shape[1])))
        end = tokens.argmax(axis=1)  # (N, L) -> (N,): the end token has the highest id
        order, batches = end.argsort(), []
        for start in range(0, len(order), TEXT_BATCH):
            rows = order[start : start + TEXT_BATCH]
            length = end[rows[-1]] + 1 if self.config["trims"] else self.context_length
            batches.append(tokens[rows, :length])
        return self.features("text", batches)[order.argsort()]


@cache
def openvino_core(openvino):
    """One for the process: when several end, the next signal that Python handles kills it."""
    return openvino.Core()


def open_graph(path, backend, many=False):
    """image.onnx or text.onnx -> function from batches of its input to those of its features.

    many: OpenVINO computes as many batches side by side as there are cores. That is as fast on a
    quiet machine, and 1.4 times as fast beside two busy processes.
    """
    threads = int(os.environ.get("OMP_NUM_THREADS", 0))  # 0: all cores
    if backend == "onnxruntime":
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        # Idle threads sleep and leave the cores to others.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        # Weights that are stored in 8 bits become fp32 once, when the graph is opened.
        options.add_session_config_entry("session.disable_quant_qdq", "1")
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        return lambda batches: [session.run(None, {path.stem: x})[0] for x in batches]
    try:
        import openvino
    except ImportError:
        raise ImportError(f"{backend} needs OpenVINO: pip install 'jettclip[openvino]'") from None
    options = {"INFERENCE_NUM_THREADS": threads, **keep_compiled()}
    options["INFERENCE_PRECISION_HINT"] = "bf16" if backend.endswith("bf16") else "f32"
    streams = (threads or os.cpu_count()) if many else 1
    options |= {"NUM_STREAMS": streams} if many else {"PERFORMANCE_HINT": "LATENCY"}
    compiled = openvino_core(openvino).compile_model(path, "CPU", options)
    queue = openvino.AsyncInferQueue(compiled, streams)

    def run(batches):
        features = {}

        def finished(request, i):
            features[i] = request.get_output_tensor(0).data.copy()

        queue.set_callback(finished)
        for i, x in enumerate(batches):
            queue.start_async(x, i)
        queue.wait_all()
        return [features[i] for i in range(len(batches))]

    return run


def keep_compiled():
    """OpenVINO's option for a folder of compiled graphs, with which the next start is faster."""
    folder = cache_folder() / "openvino"
    with suppress(OSError):  # where nothing can be kept, it works all the same
        folder.mkdir(parents=True, exist_ok=True)
        for old in sorted(folder.glob("*.blob"), key=os.path.getmtime)[:-KEPT_GRAPHS]:
            old.unlink()
        return {"CACHE_DIR": str(folder)} if os.access(folder, os.W_OK) else {}
    return {}
