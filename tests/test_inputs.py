"""One reader of photos: whatever the file, upright RGB pixels or the file and the reason."""

import io
import os
import struct
import subprocess
import sys
import zlib
from unittest.mock import Mock

import numpy as np
import pytest
from PIL import Image
from test_runtime import photo

from jettclip import inputs
from jettclip.inputs import Unreadable, read_photo
from jettclip.models import model_config, transforms


def encoded(image, kind="PNG", **options):
    image.save(file := io.BytesIO(), kind, **options)
    return file.getvalue()


def chunk(kind, data):
    crc = zlib.crc32(kind + data)
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc)


def png(width, height, bits, colours, *rest):
    header = struct.pack(">IIBBBBB", width, height, bits, colours, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + b"".join(rest) + chunk(b"IEND", b"")


def png16(colours, *values):
    """A pixel of 16-bit `values`."""
    rows = b"\0" + struct.pack(f">{len(values)}H", *values)
    return png(1, 1, 16, colours, chunk(b"IDAT", zlib.compress(rows)))


PIXELS = {  # an image -> its pixel
    "16-bit RGB": (png16(2, 0x8000, 0, 0xFFFF), (128, 0, 255)),
    "16-bit grey": (png16(0, 0x8000), (128,) * 3),
    "16-bit RGBA": (png16(6, 0x8000, 0, 0, 0), (255,) * 3),
    "16-bit grey, PGM": (b"P5 1 1 65535\n\x80\x00", (128,) * 3),
    "RGBA, half": (encoded(Image.new("RGBA", (1, 1), (255, 0, 0, 51))), (255, 204, 204)),
    "LA": (encoded(Image.new("LA", (1, 1), (9, 0))), (255,) * 3),
    "palette, clear": (encoded(Image.new("P", (1, 1)), "GIF", transparency=0), (255,) * 3),
    "CMYK": (encoded(Image.new("CMYK", (1, 1)), "JPEG"), (255,) * 3),
}


@pytest.mark.parametrize("name", PIXELS)
def test_pixels(name):
    file, pixel = PIXELS[name]
    for source in (file, Image.open(io.BytesIO(file))):
        image = read_photo(source)
        assert (image.mode, image.size, image.getpixel((0, 0))) == ("RGB", (1, 1), pixel)


@pytest.mark.parametrize("orientation, red", [(1, (0, 0)), (6, (1, 0)), (3, (1, 1)), (8, (0, 1))])
def test_photos_are_turned_as_exif_says(orientation, red, tmp_path):
    path = photo(tmp_path / "a.jpg", orientation)
    for at_least, scale in ((None, 1), (16, 8)):
        width, height = (image := read_photo(path, at_least)).size
        assert sorted(image.size) == [480 // scale, 640 // scale]
        assert (width > height) == (orientation in (1, 3))
        for x, y in ((0, 0), (1, 0), (0, 1), (1, 1)):
            pixel = image.getpixel((x * (width - 1), y * (height - 1)))
            assert (pixel[0] > 200) == ((x, y) == red)


@pytest.mark.parametrize("kind", sorted(inputs.FORMATS - {"HEIF"}))
def test_a_path_and_a_pil_image_give_the_same_pixels(kind, tmp_path):
    for turn in range(1, 9):
        exif, path = Image.Exif(), tmp_path / str(turn)
        exif[0x0112] = turn
        Image.fromarray(np.arange(72, dtype=np.uint8).reshape(4, 6, 3)).save(path, kind, exif=exif)
        expected = read_photo(path)
        turned = turn > 4 and kind in ("JPEG", "MPO", "PNG", "WEBP", "TIFF", "AVIF")
        assert expected.size == ((4, 6) if turned else (6, 4))
        image = Image.open(path)
        for source in (image, image, expected, path.read_bytes()):  # not loaded, loaded
            assert np.array_equal(read_photo(source), expected)
        assert kind == "TIFF" or image.getexif() == Image.open(path).getexif()  # as it was


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("exif", [b"", b"garbage, no TIFF header", b"II*\0\xff\xff\xff\xff"])
def test_malformed_exif_beside_good_pixels_is_ignored(exif):
    rows = chunk(b"IDAT", zlib.compress(b"\0\x07\x08\x09"))
    file = png(1, 1, 8, 2, chunk(b"eXIf", exif), rows)
    assert read_photo(file).getpixel((0, 0)) == (7, 8, 9)
    assert read_photo(encoded(Image.new("RGB", (2, 1)), "JPEG", exif=exif)).size == (2, 1)


NOTHING = {
    "no image in a known format": [None, b"", b"<html>404 not found</html>", b"\x89PNG\r\n\x1a\n"],
    "truncated": [
        encoded(Image.effect_noise((99, 99), 50), kind)[:-99] for kind in ("JPEG", "PNG")
    ],
    "pixels of mode F have no known range": [Image.new("F", (1, 1))],
    "EPS files are not read": [b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 1 1\n%%EndComments\n"],
    "exceeds": [png(12_000, 12_000, 8, 0), png(60_000, 60_000, 1, 0)],
    "a ratio below 200": [png(1, 200, 8, 0), Image.new("L", (0, 0))],
}


@pytest.mark.filterwarnings("ignore:Image size")
@pytest.mark.parametrize("reason", NOTHING)
def test_what_has_no_pixels_gives_the_reason(reason, tmp_path):
    for source in NOTHING[reason]:
        with pytest.raises(Unreadable, match=reason):
            read_photo(source)
        if reason == "truncated":
            with pytest.raises(Unreadable, match=reason):
                read_photo(Image.open(io.BytesIO(source)))
        if isinstance(source, bytes) and source:
            (tmp_path / "a.jpg").write_bytes(source)
            with pytest.raises(Unreadable, match=f"^{tmp_path / 'a.jpg'}: .*{reason}"):
                read_photo(tmp_path / "a.jpg")


def test_only_regular_files_are_opened(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    missing, folder, pipe = tmp_path / "none.jpg", tmp_path / "folder.jpg", tmp_path / "pipe.jpg"
    folder.mkdir()
    reasons = {missing: "No such file or directory", folder: "not a regular file"}
    if hasattr(os, "mkfifo"):
        os.mkfifo(pipe)
        reasons[pipe] = "not a regular file"
    for path, reason in reasons.items():
        for read in (read_photo, inputs.digest):
            with pytest.raises(Unreadable, match=f"^{path}: {reason}"):
                read(path.name)


@pytest.mark.parametrize("error", [SyntaxError(), RecursionError("deep")])
def test_whatever_a_decoder_raises_is_named(error, monkeypatch):
    monkeypatch.setattr(Image.Image, "convert", Mock(side_effect=error))
    with pytest.raises(Unreadable, match=str(error) or type(error).__name__):
        read_photo(PIXELS["CMYK"][0])


def test_a_jpeg_of_200_megapixels_is_read_at_a_smaller_scale():
    file = encoded(Image.new("L", (20_000, 10_000)), "JPEG")
    assert read_photo(file, at_least=200).size == (2500, 1250)
    with pytest.raises(Unreadable, match="size 20000 x 10000 exceeds 100,000,000 pixels"):
        read_photo(file)


def test_pillow_does_not_warn_below_our_own_limit():
    read = f"from jettclip.inputs import read_photo; read_photo({png(9500, 9500, 1, 0)!r})"
    result = subprocess.run([sys.executable, "-c", read], capture_output=True, text=True)
    assert "Unreadable: cannot load" in result.stderr and "DecompressionBomb" not in result.stderr


def test_digest():
    assert inputs.digest(b"abc") == "cf4ab791c62b8d2b2109c90275287816"  # b2sum -l 128


@pytest.mark.parametrize("mode, size", [("L", (200, 33)), ("P", (5, 7)), ("RGBA", (481, 640))])
def test_pixels_are_the_models(mode, size):
    noise = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    file = encoded(Image.fromarray(noise).convert(mode))
    for config in map(model_config, ("JettCLIP-T", "LongCLIP-B")):
        scaling, size = config["preprocess"], config["vision_cfg"]["image_size"]
        pixels, expected = inputs.transform(file, size, **scaling), transforms(config)[1](file)
        np.testing.assert_allclose(pixels, expected, rtol=0, atol=1e-5 / max(scaling["std"]))
