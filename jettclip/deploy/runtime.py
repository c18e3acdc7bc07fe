"""A model that `deploy.export` wrote, without PyTorch: NumPy arrays in and out, ONNX Runtime or OpenVINO in between.

model = load("exported")
image, text = model.encode_image(["photo.jpg"]), model.encode_text(["a long description ..."])
print(text @ image.T)
"""

import functools
import html
import importlib.util
import json
import os
from pathlib import Path

import numpy as np
import regex
import tokenizers
from PIL import Image, ImageOps

CONFIG = "deploy.json"
BACKENDS = ("onnxruntime", "openvino", "openvino-bf16")
IMAGES_AT_ONCE, TEXTS_AT_ONCE = 8, 32  # more take memory and gain nothing


def load(folder, backend=None, threads=None):
    """The exported model of `folder`, run by `backend`: one of BACKENDS, ONNX Runtime by default.

    openvino-bf16 multiplies in bfloat16 where the CPU can. threads: default OMP_NUM_THREADS, else all cores.
    """
    backend = backend or BACKENDS[0]
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} is unknown; known: {', '.join(BACKENDS)}")
    return ExportedModel(
        Path(folder), backend, threads or int(os.environ.get("OMP_NUM_THREADS", 0))
    )


def installed_backends():
    """Those of BACKENDS whose package is here."""
    return [backend for backend in BACKENDS if importlib.util.find_spec(backend.split("-")[0])]


class ExportedModel:
    """Both towers of an export folder, each opened when first used. Features are normalised float32 (N, embed_dim).

    config: the folder's deploy.json. tokenizer, transform: as those of the PyTorch model, in NumPy.
    """

    def __init__(self, folder, backend, threads=0):
        if not (folder / CONFIG).is_file():
            raise FileNotFoundError(
                f"{folder} has no {CONFIG}: it is no export folder (jettclip.deploy.export makes one)"
            )
        self.folder, self.backend, self.threads = folder, backend, threads
        self.config = json.loads((folder / CONFIG).read_text())
        if self.config["precision"] == "int8" and backend != "onnxruntime":
            raise ValueError(f"{folder} is int8 for onnxruntime; {backend} runs an fp32 export")
        self.image_size, self.context_length = (
            self.config["image_size"],
            self.config["context_length"],
        )
        bpe = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer = Tokenizer(bpe, self.config["token_pattern"], self.context_length)
        self.transform = functools.partial(
            transform, image_size=self.image_size, **self.config["preprocess"]
        )

    @functools.cached_property
    def image_tower(self):
        return open_graph(self.folder / "image.onnx", self.backend, self.threads)

    @functools.cached_property
    def text_tower(self):
        return open_graph(self.folder / "text.onnx", self.backend, self.threads)

    def encode_image(self, images):
        """Images (N, 3, S, S) from `transform`, or a list of PIL images and paths -> features (N, embed_dim)."""
        if not hasattr(images, "shape"):
            images = np.stack(
                [self.transform(read_photo(i) if isinstance(i, (str, Path)) else i) for i in images]
            )
        images = np.asarray(images, dtype=np.float32)
        return np.concatenate(
            [
                self.image_tower(images[i : i + IMAGES_AT_ONCE])
                for i in range(0, len(images), IMAGES_AT_ONCE)
            ]
        )

    def encode_text(self, texts):
        """Texts, or tokens (N, up to context_length), 0-padded -> features (N, embed_dim).

        Texts of similar length go together, cut to the longest of them, where padding has no influence.
        """
        tokens = np.asarray(
            texts if hasattr(texts, "shape") else self.tokenizer(texts), dtype=np.int64
        )
        if tokens.ndim != 2 or tokens.shape[1] > self.context_length:
            raise ValueError(
                f"tokens of shape {tokens.shape}: this model reads (N, up to {self.context_length})"
            )
        end = tokens.argmax(axis=1)
        order, features = (
            end.argsort(),
            np.empty((len(tokens), self.config["embed_dim"]), dtype=np.float32),
        )
        for part in np.split(order, range(TEXTS_AT_ONCE, len(order), TEXTS_AT_ONCE)):
            if self.config["trims"]:
                some = tokens[part, : end[part[-1]] + 1]
            else:
                some = np.pad(tokens[part], ((0, 0), (0, self.context_length - tokens.shape[1])))
            features[part] = self.text_tower(some)
        return features


def open_graph(path, backend, threads):
    """An ONNX file with one input and one output -> function of arrays."""
    if backend == "onnxruntime":
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.add_session_config_entry(
            "session.force_spinning_stop", "1"
        )  # idle threads burn no time of others
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        name = session.get_inputs()[0].name
        return lambda x: session.run(None, {name: x})[0]
    try:
        import openvino
    except ImportError:
        raise ImportError(
            f"backend {backend!r} needs OpenVINO: pip install 'jettclip[openvino]'"
        ) from None
    hints = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "bf16" if backend.endswith("bf16") else "f32",
    }
    compiled = openvino.Core().compile_model(
        path, "CPU", hints | ({"INFERENCE_NUM_THREADS": threads} if threads else {})
    )
    return lambda x: compiled(x)[0]


class Tokenizer:
    """CLIP's byte-pair tokenizer with open_clip's ids, several times as fast: it remembers words, as no token spans a space.

    bpe: a `tokenizers.Tokenizer` of the byte pairs; pattern: splits a word into what they are applied to.
    """

    PLAIN = regex.compile(
        r"[\n\r\t -%'-~]*"
    )  # ASCII without control characters and "&": nothing for ftfy and html to do
    MEMORY, LONGEST = 1 << 17, 40  # words remembered, and the letters of the longest of them

    def __init__(self, bpe, pattern, context_length):
        self.bpe, self.pattern, self.context_length = (
            bpe,
            regex.compile(pattern, regex.IGNORECASE),
            context_length,
        )
        self.start, self.end = map(bpe.token_to_id, ("<start_of_text>", "<end_of_text>"))
        self.words = {}

    def encode(self, text):
        """Text -> list of ids, without start and end token."""
        if not self.PLAIN.fullmatch(text):
            import ftfy

            text = html.unescape(html.unescape(ftfy.fix_text(text)))
        ids, words = [], self.words
        for word in text.lower().split():
            if (of_word := words.get(word)) is None:
                of_word = self._encode_word(word)
            ids += of_word
        return ids

    def _encode_word(self, word):
        ids = self.bpe.encode(
            self.pattern.findall(word), is_pretokenized=True, add_special_tokens=False
        ).ids
        if len(word) <= self.LONGEST:
            if len(self.words) >= self.MEMORY:
                self.words.clear()
            self.words[word] = ids
        return ids

    def __call__(self, texts, context_length=None):
        """A text or several -> int64 (B, context_length), 0-padded; truncates, keeps the end token."""
        texts, length = (
            [texts] if isinstance(texts, str) else texts,
            context_length or self.context_length,
        )
        tokens = np.zeros((len(texts), length), dtype=np.int64)
        for row, text in zip(tokens, texts):
            ids = self.encode(text)[: length - 2]
            row[0], row[1 : len(ids) + 1], row[len(ids) + 1] = self.start, ids, self.end
        return tokens


def read_photo(path, at_least=None):
    """A photo as it is meant to be seen (EXIF orientation) -> RGB PIL image.

    at_least: a JPEG is decoded at the smallest scale that keeps both sides at so many pixels, which is several times faster.
    """
    with Image.open(path) as image:
        if at_least:
            image.draft("RGB", (at_least, at_least))
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I;16"):  # PIL would clip 16 bits at 255
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        return image.convert("RGB")


def transform(image, image_size, mean, std, interpolation):
    """PIL image -> float32 (3, image_size, image_size): shorter side resized, centre cropped, scaled; as models.transforms."""
    image = image.convert("RGB")
    width, height = (image_size * side // min(image.size) for side in image.size)
    image = image.resize((width, height), Image.Resampling[interpolation.upper()])
    left, top = round((width - image_size) / 2), round((height - image_size) / 2)
    pixels = (
        np.asarray(image.crop((left, top, left + image_size, top + image_size)), dtype=np.float32)
        / 255
    )
    return ((pixels - np.float32(mean)) / np.float32(std)).transpose(
        2, 0, 1
    )  # (S, S, 3) -> (3, S, S)
