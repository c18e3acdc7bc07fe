"""Counts agree with counting by hand, and the clock gives every call its turn."""

import json
import shutil

import pytest
import torch
from conftest import tiny_model

import jettclip
from jettclip.deploy import export as deploy
from jettclip.deploy import benchmark, gmacs, max_difference, pack, parameters_m


def layer(length, width, queries=None):
    """Multiply-accumulates of a transformer layer: keys and values of all tokens, the rest of `queries` tokens only."""
    queries = queries or length
    return (
        2 * length * width**2
        + queries * (2 * width**2 + 8 * width**2)
        + 2 * queries * length * width
    )


def test_gmacs_by_hand():
    model = jettclip.create_model(
        "LongCLIP-B",
        vision_width=128,
        vision_layers=2,
        text_width=64,
        text_heads=1,
        text_layers=3,
        embed_dim=32,
    ).eval()
    image, text = gmacs(model, tokens=50)
    patches = (224 // 16) ** 2
    assert image * 1e9 == pytest.approx(
        patches * 3 * 16**2 * 128 + 2 * layer(patches + 1, 128) + 128 * 32
    )
    assert text * 1e9 == pytest.approx(2 * layer(50, 64) + layer(50, 64, queries=1) + 64 * 32)


def test_gmacs_follow_length_where_padding_is_cut():
    model = tiny_model().eval()
    short, long = gmacs(model, 20)[1], gmacs(model, 200)[1]
    assert long > 5 * short and gmacs(tiny_model(text_tower="stretched").eval(), 20)[1] > long


def test_parameters():
    assert parameters_m(torch.nn.Linear(10, 5)) == pytest.approx(55e-6)


def test_calls_take_turns():
    turns = []
    table = benchmark(
        {"one": lambda: turns.append(1), "two": lambda: turns.append(2)}, repeats=5, warmup=2
    )
    assert turns == [1, 2] * 7
    assert (
        table.name.tolist() == ["one", "two"]
        and (table.p50_ms <= table.p90_ms).all()
        and (table.p50_ms >= 0).all()
    )


def test_largest_difference_of_folding():
    model = tiny_model().eval()
    tokens = jettclip.get_tokenizer("JettCLIP-T")(["a red ring", "a blue star " * 20])
    images = torch.rand(2, 3, 32, 32)
    assert max(max_difference(model, jettclip.reparameterize(model), images, tokens)) < 1e-5
    assert max(max_difference(model, tiny_model(seed=1).eval(), images, tokens)) > 0.01


@pytest.mark.parametrize(
    "name, sizes",
    [("JettCLIP-T", {"image_size": 64}), ("LongCLIP-B", {"vision_layers": 2, "text_layers": 2})],
)
def test_packed_weights_change_nothing(name, sizes):
    torch.manual_seed(0)
    model = jettclip.create_model(name, **sizes).eval()
    for one in (model, jettclip.reparameterize(model)):
        packed = pack(one)
        tokens = jettclip.get_tokenizer(name)(["a red ring", "a blue star " * 20, "one " * 300])
        for rows in (3, 1, 3):  # sizes that come again use what is packed
            images = torch.rand(rows, 3, model.image_size, model.image_size)
            assert max(max_difference(one, packed, images, tokens[:rows])) < 1e-5
    assert "encode_image" not in model.__dict__


def test_packed_weights_of_two_models_stay_apart():
    models = [tiny_model(seed=seed).eval() for seed in (0, 1)]
    images, tokens = (
        torch.rand(2, 3, 32, 32),
        jettclip.get_tokenizer("JettCLIP-T")(["a red ring", "a blue star"]),
    )
    packed = [pack(model) for model in models]
    for model, one in [*zip(models, packed)] * 2:
        assert max(max_difference(model, one, images, tokens)) < 1e-5


def test_export_refuses_graphs_that_differ(exported, monkeypatch, tmp_path):
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept/notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="kept holds something else than an export"):
        deploy.export(exported[0], tmp_path / "kept")
    shutil.copytree(exported[1], tmp_path / "old")
    monkeypatch.setattr(
        torch.export, "export", lambda *args, **options: None
    )  # which takes seconds
    monkeypatch.setattr(
        torch.onnx, "export", lambda program, f, **options: shutil.copy(exported[1] / f.name, f)
    )
    with pytest.raises(
        RuntimeError,
        match="the exported JettCLIP-T differs from PyTorch's by .*: nothing was written",
    ):
        deploy.export(tiny_model(seed=1), tmp_path / "old")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept", "old"]
    assert json.loads((tmp_path / "old/deploy.json").read_text()) == json.loads(
        (exported[1] / "deploy.json").read_text()
    )
    deploy.export(exported[0], tmp_path / "old")  # an earlier export is replaced
    files = sorted(path.name for path in (tmp_path / "old").iterdir())
    assert files == ["deploy.json", "image.onnx", "text.onnx", "tokenizer.json"]
