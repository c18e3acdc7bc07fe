"""Exported graphs are written whole, and only where they agree with PyTorch."""

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from conftest import tiny_model
from test_runtime import TEXTS, TOKENIZE

from jettclip.deploy.export import drift, export, quantize, write_graph
from jettclip.deploy.runtime import installed_backends, load


@pytest.mark.parametrize("tower", ["stretched", "longclip"])
def test_text_towers(tower, exported, monkeypatch, tmp_path):
    def write(tower, example, dynamic, path):
        if path.name == "text.onnx":
            return write_graph(tower, example, dynamic, path)
        shutil.copy(exported[1] / "image.onnx", path)

    monkeypatch.setattr("jettclip.deploy.export.write_graph", write)
    model = tiny_model(text_tower=tower).eval()
    model.visual = exported[0].visual
    features = load(export(model, tmp_path / "export")).encode_text(TEXTS)
    expected = model.encode_text(TOKENIZE(TEXTS), True).detach()
    np.testing.assert_allclose(features, expected, atol=1e-5)


def test_int8_is_near_and_for_onnxruntime_alone(exported, tmp_path):
    model, folder = exported
    small = quantize(folder, tmp_path / "int8")
    change = drift(model, load(small), torch.rand(2, 3, 32, 32), TOKENIZE(TEXTS))
    assert min(change) > 1e-5 and max(change) < 0.1
    assert load(small).identity != load(folder).identity
    sizes = [sum(file.stat().st_size for file in path.glob("*.onnx")) for path in (small, folder)]
    assert sizes[0] < 0.4 * sizes[1]
    with pytest.raises(ValueError, match="is int8 for onnxruntime; openvino runs fp32 and int8-st"):
        load(small, "openvino")


def test_static_int8_is_near_and_for_all(exported, tmp_path):
    model, folder = exported
    images, tokens = torch.rand(6, 3, 32, 32), TOKENIZE(TEXTS)
    small = quantize(folder, tmp_path / "int8", (images, tokens))
    for backend in installed_backends():
        loaded = load(small, backend)
        change = drift(model, loaded, images, tokens)
        assert min(change) > 1e-5 and max(change) < 0.1, backend
        assert loaded.identity not in (load(folder).identity, load(folder, backend).identity)
    for graph in ("image", "text"):
        nodes = onnx.load(small / f"{graph}.onnx").graph.node
        read = {
            name for node in nodes if node.op_type == "DequantizeLinear" for name in node.output
        }
        products = [node for node in nodes if node.op_type in ("Conv", "Gemm", "MatMul")]
        in_8_bits = [{*node.input[:2]} <= read for node in products]
        depthwise = [
            node.op_type == "Conv" and onnx.helper.get_node_attr_value(node, "group") > 1
            for node in products
        ]
        stays = [i == 0 or d for i, d in enumerate(depthwise)]  # the first one reads pixels
        assert [not x for x in in_8_bits] == stays and 0 < sum(stays) < len(stays)
        # The embedding is most of the tiny text tower.
        assert (small / f"{graph}.onnx").stat().st_size < (folder / f"{graph}.onnx").stat().st_size


def test_static_int8_depends_on_its_pairs(exported, tmp_path):
    folder, tokens = exported[1], TOKENIZE(TEXTS)
    made = [
        quantize(folder, tmp_path / name, (images, tokens.numpy().astype(np.int32)))
        for name, images in (
            ("a", torch.rand(2, 3, 32, 32).double()),
            ("b", np.ones((1, 3, 32, 32))),
        )
    ]
    assert load(made[0]).identity != load(made[1]).identity
    for wrong in ((tokens,), (tokens, []), np.ones(3)):
        with pytest.raises(ValueError, match=r"must be pixels \(N, 3, S, S\) and tokens"):
            quantize(folder, tmp_path / "wrong", wrong)
    assert not (tmp_path / "wrong").exists()


def test_files_name_no_path_of_the_machine(exported):
    for file in exported[1].iterdir():
        content = file.read_bytes()
        for path in (Path(__file__).parents[1], sys.prefix, Path(torch.__file__).parent, ".py"):
            assert str(path).encode() not in content, file


def test_identity_is_that_of_the_image_features(exported, monkeypatch, tmp_path):
    model, folder = exported
    write = lambda *a: shutil.copy(folder / a[3].name, a[3])  # noqa: E731
    monkeypatch.setattr("jettclip.deploy.export.write_graph", write)
    monkeypatch.setattr("jettclip.deploy.export.drift", lambda *_: (0,))

    def identity(model):
        return load(export(model, tmp_path / "again")).identity

    for tower, same in ((model.text, True), (model.visual, False)):
        parameter = next(tower.parameters()).data
        kept = parameter.clone()
        parameter += 1
        assert (identity(model) == load(folder).identity) == same
        parameter.copy_(kept)
    exact, rounded = (load(folder, backend).identity for backend in ("openvino", "openvino-bf16"))
    assert exact == load(folder).identity != rounded


def test_refuses_graphs_that_differ(exported, monkeypatch, tmp_path):
    def write(program, input_names, **options):
        return SimpleNamespace(model_proto=onnx.load(exported[1] / f"{input_names[0]}.onnx"))

    (tmp_path / "kept").mkdir()
    (tmp_path / "kept/notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="kept holds other files than an export"):
        export(exported[0], tmp_path / "kept")
    shutil.copytree(exported[1], tmp_path / "old")
    monkeypatch.setattr(torch.export, "export", lambda *_, **options: None)  # takes seconds
    monkeypatch.setattr(torch.onnx, "export", write)
    with pytest.raises(RuntimeError, match="JettCLIP-T differs from PyTorch by .*nothing was writ"):
        export(tiny_model(seed=1), tmp_path / "old")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept", "old"]
    config, kept = (f / "deploy.json" for f in (exported[1], tmp_path / "old"))
    assert kept.read_bytes() == config.read_bytes()
    kept.write_text("{}")
    export(exported[0], tmp_path / "old")  # replaces an export
    files = {path.name for path in (tmp_path / "old").iterdir()}
    assert files == {"deploy.json", "image.onnx", "text.onnx", "tokenizer.json"}
    assert json.loads(kept.read_text()) == json.loads(config.read_text())
