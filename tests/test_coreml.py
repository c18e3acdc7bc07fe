"""The example that converts to Core ML, which runs on Apple's systems alone: shapes are checked."""

import sys
from pathlib import Path

import pytest
from conftest import tiny_model

ct = pytest.importorskip("coremltools")
sys.path.append(str(Path(__file__).resolve().parents[1] / "examples/coreml"))
import convert  # noqa: E402


def test_both_towers_convert(tmp_path):
    model = tiny_model()
    (tmp_path / "coreml/text.mlpackage/old").mkdir(parents=True)
    convert.convert(model, tmp_path / "coreml")
    assert not (tmp_path / "coreml/text.mlpackage/old").exists()
    width, size = model.config["embed_dim"], model.image_size
    for name in ("image", "text"):
        spec = ct.models.MLModel(str(tmp_path / f"coreml/{name}.mlpackage")).get_spec()
        (read,), (written,) = spec.description.input, spec.description.output
        assert list(written.type.multiArrayType.shape) == [1, width] and written.name == "features"
        if name == "image":
            assert (read.type.imageType.width, read.type.imageType.height) == (size, size)
        else:
            assert list(read.type.multiArrayType.shape) == [1, model.context_length]


def test_colours_that_core_ml_cannot_scale_are_refused():
    model = tiny_model()
    model.config = {**model.config, "preprocess": {"mean": [0.5] * 3, "std": [0.5, 0.4, 0.5]}}
    with pytest.raises(ValueError, match="scales colours by .0.5, 0.4, 0.5.: Core ML by one"):
        convert.image_input(model)
