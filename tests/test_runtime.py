"""The exported model gives PyTorch's features: same tokens, same pixels, any length, any rows."""

import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from jettclip.deploy import runtime
from jettclip.deploy.export import drift
from jettclip.text import byte_pairs, tokenizer

TEXTS = ["a red ring", "", "it's 2 cats &amp; a DOG", "a blue star, " * 100, "naïve “你好” 🙂"]
TOKENIZE = tokenizer(248)


def photo(path, orientation):
    """A photo of 640 x 480 pixels with a red upper left quarter."""
    image = Image.new("RGB", (640, 480), (0, 60, 200))
    image.paste((255, 0, 0), (0, 0, 320, 240))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(path, exif=exif, quality=95)
    return path


def check_features(model, folder, backends):
    images, tokens = torch.rand(9, 3, 32, 32), TOKENIZE([t for t in TEXTS for _ in range(8)])
    features = model.encode_text(TOKENIZE(TEXTS), True).detach()
    for backend in backends:
        tolerance = 0.05 if backend == "openvino-bf16" else 1e-5
        loaded = runtime.load(folder, backend)
        for rows in (1, 9, 40):
            assert max(drift(model, loaded, images[:rows], tokens[:rows])) < tolerance
        np.testing.assert_allclose(loaded.encode_text(TEXTS), features, atol=tolerance)
        assert loaded.encode_image([]).shape == loaded.encode_text([]).shape == (0, 16)
        unpadded = TOKENIZE(TEXTS)[:1, :5]  # start, three words, end
        np.testing.assert_allclose(loaded.encode_text(unpadded), features[:1], atol=tolerance)


def test_features_are_pytorchs(exported):
    check_features(*exported, ["onnxruntime"])


def test_features_of_openvino_are_pytorchs(exported, monkeypatch):
    """Of one batch, and of several side by side."""
    pytest.importorskip("openvino")
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    check_features(*exported, runtime.BACKENDS[1:])


UNLOAD = """
import faulthandler, gc, signal, sys
from jettclip.deploy import runtime
faulthandler.enable()
signal.signal(signal.SIGCHLD, lambda *_: None)  # as PyTorch's loader does
models = [runtime.load(sys.argv[1], backend) for backend in runtime.BACKENDS[1:]]
for model in models:
    model.encode_text(["a star"])
while models:
    model = models.pop(0) and gc.collect()
    signal.raise_signal(signal.SIGCHLD)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGCHLD"), reason="Windows has no such signal")
def test_a_process_outlives_the_models_of_openvino(exported):
    pytest.importorskip("openvino")
    subprocess.run([sys.executable, "-c", UNLOAD, exported[1]], check=True)


def test_compiled_graphs_are_kept(exported, tmp_path, monkeypatch):
    """The last ones, for the next start; a damaged one is compiled again."""
    pytest.importorskip("openvino")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(runtime, "KEPT_GRAPHS", 2)
    folder = tmp_path / "jettclip/openvino"
    texts = ["a star", "two stars"]
    expected = runtime.load(exported[1]).encode_text(texts)
    for damage in (False, False, True):
        if damage:
            for blob in folder.glob("*.blob"):
                blob.chmod(0o600)
                blob.write_bytes(blob.read_bytes()[:5000])
        found = runtime.load(exported[1], "openvino").encode_text(texts)
        np.testing.assert_allclose(found, expected, atol=1e-5)
        assert len([*folder.glob("*.blob")]) == 1
    for name in "abc":
        (folder / f"{name}.blob").touch()
    assert runtime.keep_compiled() and len([*folder.glob("*.blob")]) == 2
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert runtime.keep_compiled() == {}


def test_tokens_are_the_models(exported):
    """Read from the export's own file. test_text compares the ids with open_clip's."""
    tokenize = runtime.load(exported[1]).tokenizer
    odd = ["<start_of_text> !<end_of_text>", "&amp;lt; &#8217;", "schÃ¶n\n½ ſ\x1b[31m", "x" * 100]
    np.testing.assert_array_equal(tokenize([*TEXTS, *odd]), TOKENIZE([*TEXTS, *odd]))
    np.testing.assert_array_equal(tokenize("one", 77), TOKENIZE("one", 77))
    assert byte_pairs()[1] == runtime.TOKEN_PATTERN


def test_errors(exported, monkeypatch):
    with pytest.raises(ValueError, match="backend 'onnx' is unknown: use one of onnxruntime, open"):
        runtime.load(exported[1], "onnx")
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(ImportError, match=r"openvino needs OpenVINO: pip install 'jettclip\["):
        runtime.load(exported[1], "openvino").encode_text(["a star"])


@pytest.mark.parametrize("file", ["deploy.json", "tokenizer.json", "image.onnx", "text.onnx"])
@pytest.mark.parametrize("content", [b"", b"[]", None])
def test_a_damaged_export_is_named(file, content, exported, tmp_path):
    """None: a whole file, but another one than was exported."""
    folder = shutil.copytree(exported[1], tmp_path / "export")
    other = {"image.onnx": "text.onnx", "text.onnx": "image.onnx"}.get(file, "text.onnx")
    (folder / file).write_bytes((exported[1] / other).read_bytes() if content is None else content)
    with pytest.raises(runtime.DamagedExport, match=f"export/{file} is .*delete the folder and"):
        loaded = runtime.load(folder)
        loaded.encode_text(["a"]), loaded.encode_image(np.zeros((1, 3, 32, 32)))
