"""Run an exported model without PyTorch, in ONNX Runtime or OpenVINO: NumPy arrays in and out."""

import html
import importlib.util
import json
import os
from functools import cache, partial
from pathlib import Path

import numpy as np
import regex
import tokenizers
from PIL import Image, ImageOps

CONFIG = "deploy.json"
BACKENDS = ("onnxruntime", "openvino", "openvino-bf16")
IMAGE_BATCH, TEXT_BATCH = 8, 32  # larger batches take memory and gain nothing


def load(folder, backend="onnxruntime", threads=None):
    """The exported model of `folder`, run by `backend`, one of BACKENDS.

    openvino-bf16 multiplies in bfloat16 if the CPU can. threads: OMP_NUM_THREADS, else all cores.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} is unknown: use one of {', '.join(BACKENDS)}")
    threads = threads or int(os.environ.get("OMP_NUM_THREADS", 0))
    return ExportedModel(Path(folder), backend, threads)


def installed_backends():
    """Those of BACKENDS whose package is installed."""
    return [backend for backend in BACKENDS if importlib.util.find_spec(backend.split("-")[0])]


class ExportedModel:
    """Both towers of an export folder. Features are normalised float32 (N, embed_dim).

    config: the folder's deploy.json. tokenizer, transform: those of the PyTorch model, in NumPy.
    """

    def __init__(self, folder, backend, threads=0):
        if not (folder / CONFIG).is_file():
            raise FileNotFoundError(f"{folder} has no {CONFIG}: name a folder that `export` wrote")
        self.folder, self.config = folder, json.loads((folder / CONFIG).read_text())
        if self.config["precision"] == "int8" and backend != "onnxruntime":
            raise ValueError(f"{folder} is int8 for onnxruntime; {backend} runs an fp32 export")
        self.image_size = self.config["image_size"]
        self.context_length = self.config["context_length"]
        bpe = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer = Tokenizer(bpe, self.config["token_pattern"], self.context_length)
        self.transform = partial(transform, image_size=self.image_size, **self.config["preprocess"])
        # Opens "image" or "text" when it is first used.
        self.tower = cache(lambda name: open_graph(folder / f"{name}.onnx", backend, threads))

    def encode_image(self, images):
        """Images (N, 3, S, S) from `transform`, or a list of PIL images and paths -> features."""
        if not hasattr(images, "shape"):
            opened = (read_photo(i) if isinstance(i, (str, Path)) else i for i in images)
            images = np.stack([self.transform(image) for image in opened])
        images = np.asarray(images, dtype=np.float32)
        tower, starts = self.tower("image"), range(0, len(images), IMAGE_BATCH)
        return np.concatenate([tower(images[i : i + IMAGE_BATCH]) for i in starts])

    def encode_text(self, texts):
        """Texts, or 0-padded tokens (N, up to context_length) -> features.

        Where padding has no influence, texts of similar length form a batch and are cut to its
        longest. Raises ValueError for tokens of another shape.
        """
        tokens = texts if hasattr(texts, "shape") else self.tokenizer(texts)
        tokens = np.asarray(tokens, dtype=np.int64)
        if tokens.ndim != 2 or tokens.shape[1] > self.context_length:
            raise ValueError(f"tokens are {tokens.shape}: use (N, up to {self.context_length})")
        if not self.config["trims"]:
            tokens = np.pad(tokens, ((0, 0), (0, self.context_length - tokens.shape[1])))
        end = tokens.argmax(axis=1)  # (N, L) -> (N,): the end token has the highest id
        order = end.argsort()
        features = np.empty((len(tokens), self.config["embed_dim"]), dtype=np.float32)
        for rows in np.split(order, range(TEXT_BATCH, len(order), TEXT_BATCH)):
            length = end[rows[-1]] + 1 if self.config["trims"] else self.context_length
            features[rows] = self.tower("text")(tokens[rows, :length])
        return features


def open_graph(path, backend, threads):
    """image.onnx or text.onnx -> function from its input to its features, both arrays."""
    if backend == "onnxruntime":
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        # Idle threads sleep and leave the cores to others.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        return lambda x: session.run(None, {path.stem: x})[0]
    try:
        import openvino
    except ImportError:
        raise ImportError(f"{backend} needs OpenVINO: pip install 'jettclip[openvino]'") from None
    options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}
    options["INFERENCE_PRECISION_HINT"] = "bf16" if backend.endswith("bf16") else "f32"
    compiled = openvino.Core().compile_model(path, "CPU", options)
    return lambda x: compiled(x)[0]


class Tokenizer:
    """CLIP's byte-pair tokenizer with open_clip's ids, several times as fast: it remembers words.

    No token spans a space, so a word has the same ids everywhere. bpe: a `tokenizers.Tokenizer`
    of the byte pairs; pattern: splits a word into the pieces that they are applied to.
    """

    # ASCII without control characters and "&": ftfy and html.unescape change nothing in it.
    PLAIN = regex.compile(r"[\n\r\t -%'-~]*")
    MEMORY, LONGEST = 1 << 17, 40  # words remembered, and letters of the longest of them

    def __init__(self, bpe, pattern, context_length):
        self.bpe, self.context_length = bpe, context_length
        self.pattern = regex.compile(pattern, regex.IGNORECASE)
        self.start, self.end = map(bpe.token_to_id, ("<start_of_text>", "<end_of_text>"))
        self.words = {}  # word -> ids

    def encode(self, text):
        """Text -> list of ids, without start and end token."""
        if not self.PLAIN.fullmatch(text):
            import ftfy

            text = html.unescape(html.unescape(ftfy.fix_text(text)))
        ids, words = [], self.words
        for word in text.lower().split():
            if (word_ids := words.get(word)) is None:
                word_ids = self._encode_word(word)
            ids += word_ids
        return ids

    def _encode_word(self, word):
        pieces = self.pattern.findall(word)
        ids = self.bpe.encode(pieces, is_pretokenized=True, add_special_tokens=False).ids
        if len(word) <= self.LONGEST:
            if len(self.words) >= self.MEMORY:
                self.words.clear()
            self.words[word] = ids
        return ids

    def __call__(self, texts, context_length=None):
        """Texts, one or several -> int64 (B, L), 0-padded; truncates, keeps the end token."""
        texts = [texts] if isinstance(texts, str) else texts
        length = context_length or self.context_length
        tokens = np.zeros((len(texts), length), dtype=np.int64)
        for row, text in zip(tokens, texts, strict=True):
            ids = self.encode(text)[: length - 2]
            row[0], row[1 : len(ids) + 1], row[len(ids) + 1] = self.start, ids, self.end
        return tokens


def read_photo(path, at_least=None):
    """A photo, turned upright as its EXIF data say -> RGB PIL image.

    at_least: decodes a JPEG at the smallest scale that keeps both sides at so many pixels, which
    is several times faster. Raises OSError where there is no image.
    """
    with Image.open(path) as image:
        if at_least:
            image.draft("RGB", (at_least, at_least))
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I;16"):  # PIL would clip 16 bits at 255
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        return image.convert("RGB")


def transform(image, image_size, mean, std, interpolation):
    """PIL image -> float32 (3, image_size, image_size); the same steps as `models.transforms`."""
    image = image.convert("RGB")
    width, height = (image_size * side // min(image.size) for side in image.size)
    image = image.resize((width, height), Image.Resampling[interpolation.upper()])
    left, top = round((width - image_size) / 2), round((height - image_size) / 2)
    image = image.crop((left, top, left + image_size, top + image_size))
    pixels = (np.asarray(image, dtype=np.float32) / 255 - np.float32(mean)) / np.float32(std)
    return pixels.transpose(2, 0, 1)  # (S, S, 3) -> (3, S, S)
