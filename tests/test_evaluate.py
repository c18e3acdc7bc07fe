"""Ranks, zero-shot and details: cases worked out by hand, a plain double loop, clip_benchmark."""

import io
import json
from pathlib import Path
from types import SimpleNamespace

import clip_benchmark.datasets
import numpy as np
import open_clip
import pandas as pd
import pytest
import torch
from conftest import randomise, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.nn.functional import normalize, pad

import jettclip
from jettclip import evaluate
from jettclip.data import PairDataset
from jettclip.datasets.scenes import make_details
from jettclip.models import transforms

nan = float("nan")


def ranks_of(similarity, image_of_text=None, chunk=4096):
    """Ranks of a matrix of similarities, rows are texts: the images are unit vectors."""
    similarity = torch.tensor(similarity, dtype=torch.float32)
    t2i, i2t = evaluate.ranks(torch.eye(similarity.shape[1]), similarity, image_of_text, chunk)
    return t2i.tolist(), i2t.tolist()


@pytest.mark.parametrize(
    "similarity, t2i, i2t",
    [
        ([[0.9, 0.1], [0.5, 0.5]], [0, 1], [0, 0]),  # the docstring's
        ([[0.9, 0.1, 0.0], [0.2, 0.3, 0.8], [0.4, 0.5, 0.6]], [0, 1, 0], [0, 1, 1]),
        ([[0.5, 0.5, 0.1], [0.2, 0.5, 0.1], [0.5, 0.1, 0.6]], [1, 0, 0], [1, 1, 0]),  # ties
        ([[nan] * 3, [0.1, 0.9, 0.1], [0.1, 0.1, 0.9]], [2, 0, 0], [2, 1, 1]),
    ],
)
def test_ranks_by_hand(similarity, t2i, i2t):
    assert ranks_of(similarity) == (t2i, i2t)


@given(data=st.data(), images=st.integers(1, 6), texts=st.integers(1, 9))
@settings(max_examples=50, deadline=None)
def test_ranks_are_those_of_a_double_loop(data, images, texts):
    levels = st.sampled_from([0.0, 0.25, 0.5, 1.0])
    similarity = [[data.draw(levels) for _ in range(images)] for _ in range(texts)]
    target = [data.draw(st.integers(0, images - 1)) for _ in range(texts)]
    t2i, i2t = [], []
    for row, right in zip(similarity, target, strict=True):
        t2i.append(sum(row[i] >= row[right] for i in range(images) if i != right))
    for i in range(images):
        best = max((similarity[t][i] for t in range(texts) if target[t] == i), default=-1)
        i2t.append(sum(similarity[t][i] >= best for t in range(texts) if target[t] != i))
    for chunk in (4096, data.draw(st.integers(1, 5))):
        assert ranks_of(similarity, target, chunk) == (t2i, i2t)


@pytest.fixture
def features():
    """-> images (200, 32), texts (1000, 32) near them in random order, the image of each text."""
    generator = torch.Generator().manual_seed(0)
    target = torch.randperm(1000, generator=generator) % 200
    image = normalize(torch.randn(200, 32, generator=generator), dim=1)
    noise = torch.randn(1000, 32, generator=generator)
    return image, normalize(image[target] + 0.6 * noise, dim=1), target


def test_equal_images_tie_in_every_chunk(features):
    image, text, target = features
    image[150:] = image[:50]  # in other chunks, and at other places in them
    t2i, i2t = evaluate.ranks(image, text, target)
    for chunk in (7, 64, 449):
        assert all(map(torch.equal, evaluate.ranks(image, text, target, chunk), (t2i, i2t)))
    twin = (target < 50) | (target >= 150)
    assert (t2i[twin] >= 1).all() and (t2i[~twin] == 0).any()


def test_retrieval_by_hand():
    similarity = torch.eye(12)
    similarity[[0, 1, 2], [1, 2, 3]] = 2  # three texts are nearest to the next image
    table = evaluate.retrieval(torch.eye(12), similarity).set_index("metric")
    metrics = "t2i_r1 t2i_r5 t2i_r10 t2i_median i2t_r1 i2t_r5 i2t_r10 i2t_median"
    assert " ".join(table.index) == metrics and (table.n == 12).all()
    assert table.value.tolist() == pytest.approx([9 / 12, 1, 1, 1, 9 / 12, 1, 1, 1])
    assert table.high["t2i_r5"] == 1 and table.low["t2i_r5"] == pytest.approx(0.757506)  # Wilson

    # Five equal texts of an image are one query, not five.
    target = torch.arange(12).repeat_interleave(5)
    texts = similarity.repeat_interleave(5, dim=0)
    five = evaluate.retrieval(torch.eye(12), texts, target).set_index("metric")
    assert five.n.tolist() == [60] * 4 + [12] * 4
    assert five.value["i2t_r5"] == pytest.approx(9 / 12)  # five wrong texts come first
    assert five.loc["t2i_r1", ["low", "high"]].tolist() == [0.5, 1]  # k of 12 hits: a bootstrap
    assert five.low["t2i_r5"] == table.low["t2i_r5"] and five.high["t2i_r5"] == 1

    # Three more images, without a text.
    more = evaluate.retrieval(torch.eye(15), pad(similarity, (0, 3)), torch.arange(12))
    assert more.n.tolist() == [12] * 8 and more.value.tolist() == pytest.approx([*table.value])


def test_no_texts_no_images_one_row(table):
    """A result of the right shape."""
    model, words = randomise(tiny_model()), jettclip.get_tokenizer("JettCLIP-T")
    none, one = (PairDataset(table[:n], 32) for n in (0, 1))
    for n, dataset in ((0, none), (1, one)):
        found = [*evaluate.embed(model, dataset), evaluate.embed_images(model, table.image[:n])]
        found.append(evaluate.embed_texts(model, words, table.long[:n]))
        assert [tuple(features.shape) for features in found] == [(n, 16)] * 5
        rows = evaluate.retrieval(*found[:2], resamples=10)  # recall at 10 of one image
        assert len(rows) == 8 and (rows.n == n).all() and (rows.value == 1).all() == n
        assert evaluate.detail_choices(model, dataset, dataset).tolist() == [0.5] * n
        rank = evaluate.zero_shot(model, words, table.image[:n], [0] * n, ["cat"], ["a {}"])
        assert rank.tolist() == [0] * n and rank.dtype == np.int64
    assert np.isnan(list(evaluate.recall(model, none).values())).all()
    assert evaluate.embed_texts(model, words, "a dog").shape == (1, 16)  # not a letter a row
    for function in (evaluate.interval, evaluate.median_interval):
        assert function([])["n"] == 0 and np.isnan([*function([]).values()][:3]).all()
        assert function([0.3])["value"] == 0.3 and np.isnan(function([0.3])["low"])
    for pair in (([], []), ([0.3], [0.2]), ([1], [0])):
        assert evaluate.difference_interval(*pair)["p"] == 1
    assert evaluate.clear_best({}) is None and evaluate.clear_best({"a": [], "b": []}) is None
    empty = pd.DataFrame({"position": [], "attribute": []})
    assert len(evaluate.by_attribute(np.empty(0), empty)) == 0
    assert len(evaluate.by_position(np.empty(0), [])) == 0


def test_features_keep_the_order_of_rows(table, dataset):
    model = randomise(tiny_model())
    image, long, short = evaluate.embed(model, dataset, batch_size=7)
    assert len(image) == len(long) == len(short) == 24
    tokenizer, texts = jettclip.get_tokenizer("JettCLIP-T"), list(table.long[:3])
    with torch.inference_mode():
        for found, expected in (
            (image[9], model.encode_image(dataset[9, 0][2][None], True)[0]),
            (long[23], model.encode_text(dataset.long[23:], True)[0]),
            (short[0], model.encode_text(dataset.short[:1], True)[0]),
            (evaluate.embed_images(model, table.image[:5], batch_size=2), image[:5]),
            (evaluate.embed_texts(model, tokenizer, texts, batch_size=2), long[:3]),
        ):
            assert torch.allclose(found, expected, atol=1e-5)
    for caption, text in (("long", long), ("short", short)):
        value = evaluate.retrieval(image, text, resamples=2).set_index("metric").value
        expected = value[["t2i_r1", "t2i_r10"]].add_prefix(f"{caption}_").to_dict()
        assert evaluate.recall(model, dataset, caption) == expected


def test_templates_are_the_published_ones():
    folder = Path(clip_benchmark.datasets.__file__).parent
    published = json.loads((folder / "en_zeroshot_classification_templates.json").read_text())
    for name, templates in evaluate.TEMPLATES.items():
        filled = [t("{c}") if callable(t) else t.format("{c}") for t in templates]
        assert sorted(published[name.replace("imagenet", "imagenet1k")]) == sorted(filled)


def test_zero_shot_is_that_of_open_clip(table):
    model, tokenizer = randomise(tiny_model()), jettclip.get_tokenizer("JettCLIP-T")
    prepare = transforms(model.config)[1]
    names, prompts = ["cat", "ship", "oak tree"], evaluate.TEMPLATES["cifar10"][:6]
    files, labels = table.image[:9], pd.Series(np.random.default_rng(0).integers(0, 3, 9))
    with torch.inference_mode():
        tokens = [tokenizer([prompt.format(name) for prompt in prompts]) for name in names]
        means = [normalize(model.encode_text(t, normalize=True).mean(0), dim=0) for t in tokens]
        classes = open_clip.build_zero_shot_classifier(model, tokenizer, names, prompts)  # (d, C)
        assert torch.allclose(torch.stack(means, dim=1), classes, atol=1e-5)
        images = torch.stack([prepare(Image.open(io.BytesIO(file))) for file in files])
        order = (model.encode_image(images, True) @ classes).argsort(dim=1, descending=True)
    expected = [row.index(label) for row, label in zip(order.tolist(), labels, strict=True)]
    found = evaluate.zero_shot(model, tokenizer, files, labels, names, prompts)
    assert found.tolist() == expected


def test_detail_choices_by_hand(monkeypatch):
    """Features are the inputs; a data set is the list of its batches."""
    image = torch.tensor([1.0, 0.0, 0.0])
    rows = [  # image, its caption, the distractor's, choice
        (image, [2, 0, 0], [1, 0, 0], 1),
        (image, [0, 1, 0], [1, 0, 0], 0),
        (image, [1, 0, 0], [1, 0, 0], 0.5),
        (image, [1, 0, 5], [1, 5, 0], 0.5),
        (image * nan, [2, 0, 0], [1, 0, 0], 0),
        (image * 0, [1, 0, 0], [0, 0, 1], 0.5),
    ]
    images, long, changed, expected = zip(*rows, strict=True)
    columns = torch.stack(images), torch.tensor(long), torch.tensor(changed)
    batches = list(zip(*(column.split(4) for column in columns), strict=True))
    pairs = [(0, 0, image, long, 0) for image, long, _ in batches]
    distractors = [(0, 0, image, changed, 0) for image, _, changed in batches]
    model = SimpleNamespace(logit_scale=torch.zeros(()), encode_image=lambda image, _: image)
    model.encode_text, model.eval = lambda tokens, _: tokens.float(), lambda: model
    monkeypatch.setattr(evaluate, "loader", lambda dataset, order, device: dataset)
    assert evaluate.detail_choices(model, pairs, distractors).tolist() == list(expected)


def test_a_detail_beyond_the_context_is_a_tie():
    details = make_details(40, seed=0, size=32).assign(short="some shapes")
    changed = details.assign(image=details.other_image, long=details.other_long)
    choices = {}
    for context in (77, 248):
        pairs, distractors = (PairDataset(table, 32, context) for table in (details, changed))
        model = randomise(tiny_model(context_length=context))
        choices[context] = evaluate.detail_choices(model, pairs, distractors, batch_size=16)
    beyond = details.position.to_numpy() >= 76  # token 76 is the end token of a 77-token model
    assert 5 < beyond.sum() < 35
    assert (choices[77][beyond] == 0.5).all() and (choices[77][~beyond] != 0.5).all()
    assert (choices[248] != 0.5).all()


def test_by_position():
    positions = np.repeat([3, 19, 20, 39, 40, 179, 180], [5, 5, 6, 6, 9, 10, 50])
    choices = np.where(positions < 20, 1.0, 0.0)
    choices[positions == 179] = [1, 0.5] * 5
    table = evaluate.by_position(choices, positions)
    assert table.position.tolist() == [10, 30, 170] and table.n.tolist() == [10, 12, 10]
    assert table.value.tolist() == [1, 0, 0.75] and table.low[2] < 0.75 < table.high[2]
    too_few = evaluate.by_position(choices[:9], positions[:9])
    assert len(too_few) == 0 and too_few.columns.tolist() == table.columns.tolist()


def test_by_attribute():
    details = pd.DataFrame({"position": [75, 76, 90], "attribute": ["size", "colour", "size"]})
    details = details.loc[np.repeat([0, 1, 2], [10, 10, 5])]
    table = evaluate.by_attribute(np.repeat([1.0, 0.5, 0.0], [10, 10, 5]), details)
    rows = table.part + " " + table.attribute
    names = "before 77 all, before 77 size, from 77 all, from 77 colour, any all, any colour, any"
    assert ", ".join(rows) == f"{names} size" and table.n.tolist() == [10, 10, 15, 10, 25, 10, 15]
    assert table.value.tolist() == pytest.approx([1, 1, 1 / 3, 0.5, 0.6, 0.5, 2 / 3])
