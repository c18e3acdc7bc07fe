"""Counts agree with counting by hand, and the clock gives every call its turn."""
import pandas as pd
import pytest
import torch
from conftest import tiny_model

import jettclip
from jettclip.deploy import benchmark, benchmark_losses, caption_tokens, gmacs, latency, max_difference, parameters_m


def layer(length, width, queries=None):
    """Multiply-accumulates of a transformer layer: keys and values of all tokens, the rest of `queries` tokens only."""
    queries = queries or length
    return 2 * length * width ** 2 + queries * (2 * width ** 2 + 8 * width ** 2) + 2 * queries * length * width


def test_gmacs_by_hand():
    model = jettclip.create_model("LongCLIP-B", vision_width=128, vision_layers=2, text_width=64, text_heads=1, text_layers=3,
                                  embed_dim=32).eval()
    image, text = gmacs(model, tokens=50)
    patches = (224 // 16) ** 2
    assert image * 1e9 == pytest.approx(patches * 3 * 16 ** 2 * 128 + 2 * layer(patches + 1, 128) + 128 * 32)
    assert text * 1e9 == pytest.approx(2 * layer(50, 64) + layer(50, 64, queries=1) + 64 * 32)


def test_gmacs_follow_length_where_padding_is_cut():
    model = tiny_model().eval()
    short, long = gmacs(model, 20)[1], gmacs(model, 200)[1]
    assert long > 5 * short and gmacs(tiny_model(text_tower="stretched").eval(), 20)[1] > long


def test_parameters():
    assert parameters_m(torch.nn.Linear(10, 5)) == pytest.approx(55e-6)


def test_calls_take_turns():
    turns = []
    table = benchmark({"one": lambda: turns.append(1), "two": lambda: turns.append(2)}, repeats=5, warmup=2)
    assert turns == [1, 2] * 7
    assert table.name.tolist() == ["one", "two"] and (table.p50_ms <= table.p90_ms).all() and (table.p50_ms >= 0).all()


def test_latency_rows():
    models = {"teacher": tiny_model().eval(), "student": tiny_model().eval()}
    tokens = jettclip.get_tokenizer("JettCLIP-T")(["a red ring", "a blue star " * 20])
    table = latency(models, {name: torch.rand(2, 3, 32, 32) for name in models}, tokens, batches=(1, 2), repeats=2)
    assert len(table) == 2 * 2 * 2 and (table[table.model == "teacher"].ratio_to_teacher == 1).all()
    assert table[table.tower == "text"].tokens.tolist() == [5, 5, 62, 62]


def test_largest_difference_of_folding():
    model = tiny_model().eval()
    tokens = jettclip.get_tokenizer("JettCLIP-T")(["a red ring", "a blue star " * 20])
    images = torch.rand(2, 3, 32, 32)
    assert max(max_difference(model, jettclip.reparameterize(model), images, tokens)) < 1e-5
    assert max(max_difference(model, tiny_model(seed=1).eval(), images, tokens)) > 0.01


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
