"""Benchmarks time every row that they promise, on inputs of the promised length."""
import pandas as pd
import pytest
import torch
from conftest import tiny_model

import jettclip
from jettclip.bench import benchmark_losses, benchmark_train, caption_tokens, latency


def test_latency_rows():
    models = {"teacher": tiny_model().eval(), "student": tiny_model().eval()}
    tokens = jettclip.get_tokenizer("JettCLIP-T")(["a red ring", "a blue star " * 20])
    table = latency(models, {name: torch.rand(2, 3, 32, 32) for name in models}, tokens, batches=(1, 2), repeats=2)
    assert len(table) == 2 * 2 * 2 and (table[table.model == "teacher"].ratio_to_teacher == 1).all()
    assert table[table.tower == "text"].tokens.tolist() == [5, 5, 62, 62]


def test_captions_of_a_length(tmp_path):
    for file, (shortest, longest) in ((None, (60, 180)), (None, (12, 30)), (tmp_path / "captions.parquet", (3, 10))):
        if file:
            pd.DataFrame({"text": [f"number {i} of some words, and so on" for i in range(40)]}).to_parquet(file)
        lengths = caption_tokens(file, shortest, longest).argmax(dim=1) + 1
        assert len(lengths) == 32 and shortest <= lengths.min() and lengths.max() <= longest
    with pytest.raises(ValueError, match="only 0 captions of 200 to 248 tokens in .*captions.parquet; 32 are needed"):
        caption_tokens(tmp_path / "captions.parquet", 200, 248)


def test_losses_are_all_timed():
    table = benchmark_losses(batches=(40,), width=36, repeats=2)
    assert {"svd", "primary_components", "none", "gd", "crd+fd"} <= set(table.what) and (table.p50_ms > 0).all()
    assert table.set_index("what").ratio[["svd", "none"]].tolist() == [1, 1]


def test_training_is_timed_with_and_without_a_teacher():
    table = benchmark_train(batch=4, pairs=8, repeats=2).set_index("what")
    assert list(table.index) == ["without distillation", "cached features", "online teacher"] and table.ratio.iloc[0] == 1
    assert (table.samples_s > 0).all() and table.waiting.between(0, 1).all()
