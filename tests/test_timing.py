"""Counts agree with counting by hand, and every call that is timed gets its turn and its row."""

import pytest
import torch
from conftest import tiny_model

import jettclip
from jettclip.deploy import timing

TOKENS = jettclip.get_tokenizer("JettCLIP-T")(["a red ring", "a blue star " * 20])


def test_costs_by_hand():
    def layer(length, width, queries):
        """Keys and values of all tokens, the rest of `queries` tokens only."""
        keys_and_values, attention = 2 * length * width**2, 2 * queries * length * width
        return keys_and_values + attention + queries * (2 * width**2 + 8 * width**2)

    assert timing.parameters_m(torch.nn.Linear(10, 5)) == pytest.approx(55e-6)
    sizes = {"vision_width": 128, "vision_layers": 2, "embed_dim": 32}
    sizes |= {"text_width": 64, "text_heads": 1, "text_layers": 3}
    image, text = timing.gmacs(jettclip.create_model("LongCLIP-B", **sizes).eval(), tokens=50)
    patches = (224 // 16) ** 2
    embedding, length = patches * 3 * 16**2 * 128, patches + 1
    assert image * 1e9 == pytest.approx(embedding + 2 * layer(length, 128, length) + 128 * 32)
    assert text * 1e9 == pytest.approx(2 * layer(50, 64, 50) + layer(50, 64, queries=1) + 64 * 32)
    # Work follows the length where padding is cut.
    short, long = (timing.gmacs(tiny_model().eval(), tokens)[1] for tokens in (20, 200))
    stretched = timing.gmacs(tiny_model(text_tower="stretched").eval(), 20)[1]
    assert 5 * short < long < stretched


def test_calls_take_turns():
    turns = []
    calls = {"one": lambda: turns.append(1), "two": lambda: turns.append(2)}
    table = timing.benchmark(calls, repeats=5, warmup=2)
    assert turns == [1, 2] * 7 and table.name.tolist() == ["one", "two"]
    assert ((table.p50_ms >= 0) & (table.p50_ms <= table.p90_ms)).all()


def test_latency_rows():
    models = {(name, "pytorch"): tiny_model().eval() for name in ("teacher", "student")}
    images = {32: torch.rand(2, 3, 32, 32)}
    table = timing.latency(models, images, {"mixed": TOKENS}, batches=(1, 2), repeats=2)
    columns = "model backend tower captions batch tokens p50_ms p90_ms ratio_to_teacher"
    assert len(table) == 2 * 2 * 2 and " ".join(table.columns) == columns
    assert (table[table.model == "teacher"].ratio_to_teacher == 1).all()
    assert table[table.tower == "text"].tokens.tolist() == [5, 5, 62, 62]
    both = timing.both_towers(table, "mixed")
    expected = table[(table.model == "student") & (table.batch == 2)].p50_ms.sum()
    row = both.set_index(["model", "batch"]).loc[("student", 2)]
    assert row.p50_ms == pytest.approx(expected) and row.tokens == 62
    assert (both[both.model == "teacher"].ratio_to_teacher == 1).all()
