"""The exported model gives PyTorch's features without PyTorch: same tokens, same pixels, any length, any number of rows."""

import io
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import tiny_model
from PIL import Image

import jettclip
from jettclip import deploy, runtime
from jettclip.models import transforms
from jettclip.text import tokenizer

TEXTS = [
    "a red ring",
    "",
    "it's 2 cats &amp; a DOG",
    "a blue star, " * 100,
    "naïve “quotes” 你好 🙂",
    "one",
]
TOKENIZE = tokenizer(248)


def photo(path, size=(90, 60), orientation=None, **options):
    """A photo with a red upper left quarter."""
    image = Image.new("RGB", size, (0, 60, 200))
    image.paste((255, 0, 0), (0, 0, size[0] // 2, size[1] // 2))
    exif = Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    image.save(path, exif=exif, **options)
    return path


@pytest.mark.parametrize(
    "backend, tolerance", [("onnxruntime", 1e-5), ("openvino", 1e-5), ("openvino-bf16", 0.05)]
)
def test_features_are_pytorchs(exported, backend, tolerance):
    if backend.startswith("openvino"):
        pytest.importorskip("openvino")
    model, folder = exported
    loaded = runtime.load(folder, backend)
    images, tokens = torch.rand(9, 3, 32, 32), TOKENIZE([text for text in TEXTS for _ in range(7)])
    for rows in (1, 9, 42):
        assert max(deploy.drift(model, loaded, images[:rows], tokens[:rows])) < tolerance
    features = model.encode_text(TOKENIZE(TEXTS), True).detach()
    np.testing.assert_allclose(loaded.encode_text(TEXTS), features, atol=tolerance)
    longest = int(TOKENIZE(["one"]).argmax()) + 1  # no padding at all
    np.testing.assert_allclose(
        loaded.encode_text(TOKENIZE(["one"])[:, :longest]), features[-1:], atol=tolerance
    )


@pytest.mark.parametrize("tower", ["stretched", "longclip"])
def test_other_text_towers(tower, tmp_path):
    model = tiny_model(text_tower=tower).eval()
    loaded = runtime.load(deploy.export(model, tmp_path / "export"))
    np.testing.assert_allclose(
        loaded.encode_text(TEXTS), model.encode_text(TOKENIZE(TEXTS), True).detach(), atol=1e-5
    )


def test_int8_is_near_and_for_onnxruntime_alone(exported, tmp_path):
    model, folder = exported
    small = deploy.quantize(folder, tmp_path / "int8")
    tokens = TOKENIZE(TEXTS)
    assert (
        1e-5 < deploy.drift(model, runtime.load(small), torch.rand(2, 3, 32, 32), tokens)[1] < 0.1
    )
    with pytest.raises(
        ValueError, match="int8 is int8 for onnxruntime; openvino runs an fp32 export"
    ):
        runtime.load(small, "openvino")
    with pytest.raises(ValueError, match="is int8 already"):
        deploy.quantize(small, tmp_path / "again")


def test_tokens_are_the_models(exported):
    """Read from the export's own file. That the ids are open_clip's is tested in test_text."""
    theirs = runtime.load(exported[1]).tokenizer
    texts = [
        *TEXTS,
        "<start_of_text> !<end_of_text>",
        "&amp;lt; &#8217;",
        "schÃ¶n\n½ ſ\x1b[31m",
        "x" * 100,
    ]
    np.testing.assert_array_equal(theirs(texts), TOKENIZE(texts))
    np.testing.assert_array_equal(theirs("one", 77), TOKENIZE("one", 77))


@pytest.mark.parametrize(
    "mode, size",
    [("RGB", (90, 60)), ("L", (33, 200)), ("RGBA", (32, 32)), ("P", (7, 5)), ("RGB", (640, 481))],
)
@pytest.mark.parametrize("name", ["JettCLIP-T", "LongCLIP-B"])
def test_pixels_are_the_models(mode, size, name):
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(noise).convert(mode)
    config = jettclip.models.model_config(name)
    wanted = transforms(config)[1](image)
    ours = runtime.transform(image, config["vision_cfg"]["image_size"], **config["preprocess"])
    assert np.abs(ours - wanted.numpy()).max() * max(config["preprocess"]["std"]) < 1e-5


@pytest.mark.parametrize(
    "orientation, corner", [(1, (0, 0)), (6, (1, 0)), (3, (1, 1)), (8, (0, 1))]
)
def test_photos_are_turned_as_exif_says(orientation, corner, tmp_path):
    for at_least in (None, 16):
        image = runtime.read_photo(
            photo(tmp_path / "a.jpg", (640, 480), orientation, quality=95), at_least
        )
        width, height = image.size
        assert (width > height) == (orientation in (1, 3)) and (at_least is None) == (width > 400)
        red = [
            place
            for place in ((0, 0), (1, 0), (0, 1), (1, 1))
            if image.getpixel((place[0] * (width - 1), place[1] * (height - 1)))[0] > 200
        ]
        assert red == [corner]


def test_sixteen_bits_are_scaled(tmp_path):
    Image.fromarray(np.full((4, 4), 0x8000, dtype=np.uint16)).save(tmp_path / "a.png")
    assert runtime.read_photo(tmp_path / "a.png").getpixel((0, 0)) == (128, 128, 128)


def test_no_torch_at_run_time(exported, tmp_path):
    code = """
import json, sys, jettclip.deploy.runtime
model = jettclip.deploy.runtime.load(sys.argv[1])
image = model.encode_image([sys.argv[2]])
text = model.encode_text(["it's ½ a photo"])
print(json.dumps(["torch" in sys.modules, image.shape, (text @ image.T).item()]))"""
    path = str(photo(tmp_path / "a.jpg"))
    finished = subprocess.run(
        [sys.executable, "-c", code, str(exported[1]), path], capture_output=True, text=True
    )
    has_torch, shape, score = json.loads(finished.stdout or pytest.fail(finished.stderr))
    model = exported[0]
    image = model.encode_image(transforms(model.config)[1](Image.open(path))[None], True)
    text = model.encode_text(TOKENIZE(["it's ½ a photo"]), True)
    assert (
        not has_torch
        and shape == [1, 16]
        and score == pytest.approx((text @ image.T).item(), abs=1e-5)
    )


def test_what_is_no_export_is_told(exported, tmp_path):
    with pytest.raises(FileNotFoundError, match="has no deploy.json: it is no export folder"):
        runtime.load(tmp_path)
    with pytest.raises(
        ValueError, match="backend 'tensorrt' is unknown; known: onnxruntime, openvino"
    ):
        runtime.load(exported[1], "tensorrt")
    with pytest.raises(
        ValueError, match=r"tokens of shape \(2, 300\): this model reads \(N, up to 248\)"
    ):
        runtime.load(exported[1]).encode_text(np.ones((2, 300), dtype=np.int64))
    with pytest.raises(OSError, match="cannot identify image file"):
        runtime.read_photo(io.BytesIO(b"not a photo"))
