"""Benchmarks time every row that they promise, on inputs of the promised length."""

import shutil

import pandas as pd
import pytest
import torch
from conftest import tiny_model

import jettclip
from jettclip import bench, deploy
from jettclip.bench import both_towers, caption_tokens, latency, layer_times


def test_latency_rows():
    forms = {(name, "pytorch"): tiny_model().eval() for name in ("teacher", "student")}
    tokens = jettclip.get_tokenizer("JettCLIP-T")(["a red ring", "a blue star " * 20])
    table = latency(
        forms, {32: torch.rand(2, 3, 32, 32)}, {"some": tokens}, batches=(1, 2), repeats=2
    )
    assert len(table) == 2 * 2 * 2 and (table[table.model == "teacher"].ratio_to_teacher == 1).all()
    assert table[table.tower == "text"].tokens.tolist() == [5, 5, 62, 62]
    both = both_towers(table, "some")
    of_two = table[(table.model == "student") & (table.batch == 2)].p50_ms.sum()
    assert both[(both.model == "student") & (both.batch == 2)].p50_ms.item() == pytest.approx(
        of_two
    )
    assert (both[both.model == "teacher"].ratio_to_teacher == 1).all()


def test_where_the_time_goes():
    models = {"branches": tiny_model().eval()}
    models["folded"] = jettclip.reparameterize(models["branches"])
    table = layer_times(
        models,
        torch.rand(1, 3, 32, 32),
        jettclip.get_tokenizer("JettCLIP-T")(["a red ring"]),
        repeats=2,
    )
    table = table.set_index(["tower", "part"])
    assert list(table.loc["image"].index) == [
        "stem",
        "stage 1",
        "stage 2",
        "stage 3",
        "stage 4",
        "last convolution",
        "head",
    ]
    assert list(table.loc["text"].index) == [
        "embedding",
        "first RepMixer",
        "attention 1",
        "last RepMixer",
        "projection",
    ]
    assert (table[["branches ms", "folded ms"]] > 0).all(axis=None)
    assert table.loc["text", "first RepMixer"][["branches layers", "folded layers"]].tolist() == [
        8,
        4,
    ]  # four batch norms go


def test_every_form_has_its_row(exported, monkeypatch):
    """At tiny size, one form in a process of its own."""
    model, folder = exported
    monkeypatch.setattr(bench, "create_model", lambda name: model)
    monkeypatch.setattr(
        bench.deploy, "export", lambda model, target: shutil.copytree(folder, target)
    )
    monkeypatch.setattr(bench, "reference", lambda: tiny_model().eval())
    alone = bench.alone
    monkeypatch.setattr(
        bench, "alone", lambda *form: alone(*form) if form[1] == "onnxruntime" else {}
    )
    table = bench.benchmark_latency(["tiny"], batches=(1,), repeats=2)
    backends = [
        "pytorch",
        "pytorch-packed",
        *deploy.runtime.installed_backends(),
        "onnxruntime-int8",
    ]
    assert table.groupby("model").size().to_dict() == {
        bench.REFERENCE: 4,
        "tiny": 4 * len(backends),
    }
    assert set(table[table.model == "tiny"].backend) == set(backends)
    tiny = table[(table.model == "tiny") & (table.backend == "onnxruntime")].set_index(
        ["tower", "captions"]
    )
    image, text, both = (
        tiny.loc[key]
        for key in (("image", ""), ("text", "60 to 180 tokens"), ("both", "60 to 180 tokens"))
    )
    assert both.gmacs == pytest.approx(image.gmacs + text.gmacs) and both.params_m == pytest.approx(
        deploy.parameters_m(jettclip.reparameterize(model))
    )
    assert (tiny[["start_s", "peak_mb", "file_mb", "gmacs"]] > 0).all(
        axis=None
    ) and tiny.drift_text.max() < 1e-5
    assert (table[table.model == bench.REFERENCE].ratio_to_teacher == 1).all()


def test_captions_of_a_length(tmp_path):
    for file, (shortest, longest) in (
        (None, (60, 180)),
        (None, (12, 20)),
        (tmp_path / "captions.parquet", (3, 15)),
    ):
        if file:
            pd.DataFrame(
                {"text": [f"number {i} of some words, and so on" for i in range(40)]}
            ).to_parquet(file)
        lengths = caption_tokens(file, shortest, longest).argmax(dim=1) + 1
        assert len(lengths) == 32 and shortest <= lengths.min() and lengths.max() <= longest
    with pytest.raises(
        ValueError,
        match="only 0 captions of 200 to 248 tokens in .*captions.parquet; 32 are needed",
    ):
        caption_tokens(tmp_path / "captions.parquet", 200, 248)
