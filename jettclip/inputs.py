"""What models read, without PyTorch: photos as upright RGB images, their pixels, and tokens."""

import hashlib
import html
import io
import os
import warnings
from contextlib import contextmanager, suppress
from functools import partial

import numpy as np
import regex
from PIL import Image, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

# A larger image is taken for a decompression bomb, and so is one with a side so many times the
# other: scaled to a model's size it would have billions of pixels.
MOST_PIXELS, LARGEST_JPEG, MOST_SIDES = 100_000_000, 250_000_000, 200
warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # from 89 megapixels
# Pillow knows more formats, and starts other programs for some.
FORMATS = {"JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "HEIF", "JPEG2000"}
RAW = {".dng", ".nef", ".cr2", ".cr3", ".arw", ".raf", ".orf", ".rw2", ".pef"}  # by rawpy
TURNS = "FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_270 TRANSVERSE ROTATE_90"
TURNS = {value: Image.Transpose[name] for value, name in enumerate(TURNS.split(), 2)}  # of EXIF

with suppress(ImportError):
    from pillow_heif import register_heif_opener

    register_heif_opener()


class Unreadable(ValueError):
    """There is no whole image. Names the file, where there is one, and the reason."""


def read_photo(source, at_least=None):
    """A path, encoded bytes or a PIL image -> RGB PIL image, for training, evaluation and search.

    It is upright, as EXIF data or XMP say, transparency is over white, and 16 bits are scaled to 8.
    at_least: decodes a JPEG at the smallest scale that keeps both sides at so many pixels, which
    is several times faster and reads larger files. Raises Unreadable.
    """
    with _opened(source) as file:
        photo = _rgb(_loaded(file) if file is source else _decoded(file, at_least))
    photo = photo.copy() if photo is source else photo
    photo.info = {}  # else a second reading turns it again
    return photo


def digest(source):
    """Hash of an image's encoded bytes, or of those of its file: 32 hexadecimal digits."""
    with _opened(source) as file:
        return _hash(file)


def read_checked(source, expected=None):
    """`read_photo` and `digest` of a path or encoded bytes, opened once. Contents of another digest
    than `expected` are Unreadable."""
    with _opened(source) as file:
        if (hashed := _hash(file)) != (expected or hashed):
            raise ValueError("other contents")
        file.seek(0)
        return _rgb(_decoded(file, None)), hashed


def _hash(file):
    return hashlib.file_digest(file, partial(hashlib.blake2b, digest_size=16)).hexdigest()


@contextmanager
def _opened(source):
    """A file of the encoded image, or the PIL image. Whatever a decoder raises gets its name."""
    path = isinstance(source, (str, os.PathLike))
    try:
        if not path:
            yield source if isinstance(source, Image.Image) else io.BytesIO(source)
        elif os.path.exists(source) and not os.path.isfile(source):  # a pipe would wait for ever
            raise ValueError("not a regular file")
        else:
            with open(source, "rb") as file:
                yield file
    except Exception as error:
        problem = getattr(error, "strerror", None) or str(error).split("\n")[0]
        if isinstance(error, UnidentifiedImageError):
            problem = "no image in a known format"
        problem = problem or type(error).__name__
        raise Unreadable(f"{os.path.abspath(source)}: {problem}" if path else problem) from None


def _decoded(file, at_least):
    if os.path.splitext(getattr(file, "name", ""))[1].lower() in RAW:
        from rawpy import imread

        with imread(file) as raw:  # the JPEG that the camera embeds, with its EXIF data
            file = io.BytesIO(raw.extract_thumb().data)
    jpeg = file.read(3) == b"\xff\xd8\xff"
    file.seek(0)
    image = JpegImageFile(file) if jpeg else Image.open(file)  # reads the header alone
    if image.format not in FORMATS:
        raise ValueError(f"{image.format} files are not read: save it as PNG or JPEG")
    if jpeg and at_least and image.width * image.height <= LARGEST_JPEG:
        image.draft("RGB", (at_least, at_least))
    return _loaded(image)


def _loaded(image):
    if image.width * image.height > MOST_PIXELS:
        raise ValueError(f"size {image.width} x {image.height} exceeds {MOST_PIXELS:,} pixels")
    if max(image.size) >= MOST_SIDES * min(image.size):
        raise ValueError(f"size {image.width} x {image.height}: use sides of a ratio below 200")
    image.load()  # before its EXIF data are read: Pillow turns a TIFF, and says so in them
    return image


def _rgb(image):
    kind, bits16 = image.mode, image.mode.startswith("I;16") or image.format == "PPM"
    turn = None
    with suppress(Exception):  # malformed EXIF data beside good pixels
        turn = TURNS.get(image.getexif().get(0x0112))
    image = image if turn is None else image.transpose(turn)
    if kind.startswith("I") and bits16:
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))  # Pillow would clip
    elif kind in ("I", "F"):
        raise ValueError(f"pixels of mode {kind} have no known range: save 8 or 16 bits")
    if image.has_transparency_data:
        image, white = image.convert("RGBA"), Image.new("RGB", image.size, "white")
        white.paste(image, mask=image)
        return white
    return image if image.mode == "RGB" else image.convert("RGB")


def transform(image, image_size, mean, std, interpolation):
    """What `read_photo` reads -> float32 (3, image_size, image_size), as `models.transforms` do."""
    image = read_photo(image)
    width, height = (image_size * side // min(image.size) for side in image.size)
    image = image.resize((width, height), Image.Resampling[interpolation.upper()])
    left, top = round((width - image_size) / 2), round((height - image_size) / 2)
    image = image.crop((left, top, left + image_size, top + image_size))
    pixels = (np.asarray(image, dtype=np.float32) / 255 - np.float32(mean)) / np.float32(std)
    return pixels.transpose(2, 0, 1)  # (S, S, 3) -> (3, S, S)


class Tokenizer:
    """CLIP's byte-pair tokenizer with open_clip's ids, several times as fast: it remembers words.

    No token spans a space, so a word has the same ids everywhere. bpe: a `tokenizers.Tokenizer`
    of the byte pairs; pattern: splits a word into the pieces that they are applied to.
    """

    # ASCII without control characters and "&": ftfy and html.unescape change nothing in it.
    PLAIN = regex.compile(r"[\n\r\t -%'-~]*")
    MEMORY = 1 << 17  # words remembered

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
                pieces = self.pattern.findall(word)
                encoded = self.bpe.encode(pieces, is_pretokenized=True, add_special_tokens=False)
                if len(words) >= self.MEMORY:
                    words.clear()
                words[word] = word_ids = encoded.ids
            ids += word_ids
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
