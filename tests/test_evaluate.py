"""Ranks and intervals on matrices worked out by hand, against a plain double loop and against clip_benchmark."""

import io
import json
from pathlib import Path

import clip_benchmark.datasets
import numpy as np
import open_clip
import pandas as pd
import pytest
import torch
from clip_benchmark.metrics.zeroshot_retrieval import recall_at_k
from conftest import randomise, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import jettclip
from jettclip.data import PairDataset
from jettclip.evaluate import (
    CIFAR_TEMPLATES,
    TEMPLATES,
    by_attribute,
    by_position,
    clear_best,
    detail_choices,
    difference_interval,
    embed,
    embed_images,
    embed_texts,
    holm,
    interval,
    median_interval,
    over_seeds,
    ranks,
    retrieval,
    zero_shot,
)
from jettclip.datasets.scenes import make_details


def ranks_of(similarity, image_of_text=None):
    """Ranks for a matrix (texts, images) of similarities: the images are unit vectors."""
    similarity = torch.tensor(similarity, dtype=torch.float32)
    of_text, of_image = ranks(torch.eye(similarity.shape[1]), similarity, image_of_text)
    return of_text.tolist(), of_image.tolist()


@pytest.mark.parametrize(
    "similarity, of_text, of_image",
    [
        ([[0.9, 0.1, 0.2], [0.3, 0.8, 0.1], [0.2, 0.3, 0.7]], [0, 0, 0], [0, 0, 0]),
        ([[0.9, 0.1, 0.0], [0.2, 0.3, 0.8], [0.4, 0.5, 0.6]], [0, 1, 0], [0, 1, 1]),
        ([[0.1, 0.9, 0.5], [0.9, 0.1, 0.5], [0.9, 0.5, 0.1]], [2, 2, 2], [2, 2, 2]),
        (
            [[0.5, 0.5, 0.1], [0.2, 0.5, 0.1], [0.5, 0.1, 0.6]],
            [1, 0, 0],
            [1, 1, 0],
        ),  # ties count against the model
        ([[0.5, 0.5, 0.5], [0.5, 0.5, 0.5], [0.5, 0.5, 0.5]], [2, 2, 2], [2, 2, 2]),
    ],
)
def test_ranks_by_hand(similarity, of_text, of_image):
    assert ranks_of(similarity) == (of_text, of_image)


def test_several_captions_for_an_image():
    """Four texts, of images 0, 0, 1, 1; an image is found by the best of its own texts."""
    similarity = [[0.9, 0.1, 0.3], [0.2, 0.6, 0.1], [0.5, 0.4, 0.3], [0.8, 0.7, 0.9]]
    assert ranks_of(similarity, [0, 0, 1, 1]) == (
        [0, 1, 1, 2],
        [0, 0, 4],
    )  # nothing describes image 2


def test_not_a_number_is_no_hit():
    nan = float("nan")
    assert ranks_of([[nan] * 3] * 3) == ([2, 2, 2], [2, 2, 2])
    assert ranks_of([[nan] * 3, [0.1, 0.9, 0.1], [0.1, 0.1, 0.9]]) == ([2, 0, 0], [2, 1, 1])


@given(data=st.data(), images=st.integers(1, 6), texts=st.integers(1, 9))
@settings(max_examples=200, deadline=None)
def test_ranks_agree_with_a_double_loop(data, images, texts):
    levels = st.sampled_from([0.0, 0.25, 0.5, 1.0])
    similarity = [[data.draw(levels) for _ in range(images)] for _ in range(texts)]
    owner = [data.draw(st.integers(0, images - 1)) for _ in range(texts)]
    of_text = [
        sum(similarity[t][i] >= similarity[t][owner[t]] for i in range(images) if i != owner[t])
        for t in range(texts)
    ]
    of_image = []
    for i in range(images):
        best = max((similarity[t][i] for t in range(texts) if owner[t] == i), default=-1)
        of_image.append(sum(similarity[t][i] >= best for t in range(texts) if owner[t] != i))
    assert ranks_of(similarity, owner) == (of_text, of_image)
    chunk = data.draw(st.integers(1, 5))
    in_chunks = ranks(torch.eye(images), torch.tensor(similarity), owner, chunk)
    assert [one.tolist() for one in in_chunks] == [of_text, of_image]


def random_features(images, texts_of_image, width=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    owner = torch.arange(images).repeat_interleave(texts_of_image)[
        torch.randperm(images * texts_of_image, generator=generator)
    ]
    image = torch.nn.functional.normalize(torch.randn(images, width, generator=generator), dim=1)
    text = torch.nn.functional.normalize(
        image[owner] + 0.6 * torch.randn(len(owner), width, generator=generator), dim=1
    )
    return image, text, owner


def test_chunks_do_not_matter_and_equal_images_tie_wherever_they_lie():
    image, text, owner = random_features(150, 3)
    image[100:] = image[:50]  # in different chunks, and in different places of them
    whole = ranks(image, text, owner)
    for chunk in (7, 64, 449):
        assert all(torch.equal(a, b) for a, b in zip(ranks(image, text, owner, chunk), whole))
    twin = (owner < 50) | (owner >= 100)
    assert (whole[0][twin] >= 1).all() and (whole[0][~twin] == 0).any()


def test_recall_is_that_of_clip_benchmark():
    image, text, owner = random_features(200, 5)
    table = retrieval(image, text, owner, resamples=10).set_index("metric").value
    scores, positive = text @ image.T, owner[:, None] == torch.arange(200)
    for k in (1, 5, 10):
        assert table[f"t2i_r{k}"] == pytest.approx(
            (recall_at_k(scores, positive, k) > 0).float().mean().item()
        )
        assert table[f"i2t_r{k}"] == pytest.approx(
            (recall_at_k(scores.T, positive.T, k) > 0).float().mean().item()
        )
    assert 0.1 < table["t2i_r1"] < 0.9


def test_retrieval_by_hand():
    """Twelve images in a ring: text t is nearest to image t + 1 for t < 3, then to its own."""
    similarity = torch.eye(12)
    similarity[[0, 1, 2], [1, 2, 3]] = 2
    table = retrieval(torch.eye(12), similarity).set_index("metric")
    assert list(table.index) == [
        "t2i_r1",
        "t2i_r5",
        "t2i_r10",
        "t2i_median",
        "i2t_r1",
        "i2t_r5",
        "i2t_r10",
        "i2t_median",
    ]
    assert table.value.tolist() == pytest.approx([9 / 12, 1, 1, 1, 9 / 12, 1, 1, 1])
    assert (table.n == 12).all()
    assert (table.low <= table.value).all() and (table.value <= table.high).all()
    assert table.high["t2i_r5"] == table.low["t2i_r5"] == 1

    five_times, own_image = (
        similarity.repeat_interleave(5, dim=0),
        torch.arange(12).repeat_interleave(5),
    )
    five = retrieval(torch.eye(12), five_times, own_image).set_index("metric")
    assert five.n.tolist() == [60] * 4 + [12] * 4
    assert five.value["i2t_r5"] == pytest.approx(9 / 12)  # five wrong texts come first
    # Five equal texts of an image are one query, not five.
    assert five.low["t2i_r1"] == table.low["t2i_r1"] and five.high["t2i_r1"] == table.high["t2i_r1"]

    gallery = torch.nn.functional.pad(torch.eye(15), (0, 0))  # three more images, without a text
    more = retrieval(
        gallery, torch.nn.functional.pad(similarity, (0, 3)), torch.arange(12)
    ).set_index("metric")
    assert more.n.tolist() == [12] * 8 and more.value.tolist() == pytest.approx(
        table.value.tolist()
    )


def test_interval():
    values = np.random.default_rng(0).integers(0, 2, 4000)
    widths = []
    for n in (40, 400, 4000):
        one = interval(values[:n])
        assert one == interval(values[:n])
        assert one["n"] == n and one["value"] == values[:n].mean()
        assert one["low"] < one["value"] < one["high"]
        widths.append(one["high"] - one["low"])
        assert widths[-1] == pytest.approx(2 * 1.96 * values[:n].std() / np.sqrt(n), rel=0.15)
    assert interval([0.5, 0.5]) == {"value": 0.5, "low": 0.5, "high": 0.5, "n": 2}


def plain_bootstrap(values, groups, statistic, resamples):
    """Draw groups with replacement, one resample after the other."""
    rng, names = np.random.default_rng(1), np.unique(groups)
    members = {name: values[groups == name] for name in names}
    return [
        statistic(np.concatenate([members[name] for name in rng.choice(names, len(names))]))
        for _ in range(resamples)
    ]


@pytest.mark.parametrize("mean", [True, False])
def test_intervals_are_those_of_a_plain_bootstrap_over_groups(mean):
    rng = np.random.default_rng(0)
    groups = rng.integers(0, 80, 300)
    values = (
        (rng.uniform(size=300) < rng.uniform(size=80)[groups]).astype(float)
        if mean
        else rng.geometric(0.02 + 0.1 * rng.uniform(size=80)[groups])
    )
    fast, alone = [
        (interval if mean else median_interval)(values, groups=g) for g in (groups, None)
    ]
    low, high = np.quantile(
        plain_bootstrap(values, groups, np.mean if mean else np.median, 2000), [0.025, 0.975]
    )
    tolerance = 0.015 if mean else 2
    assert (
        fast["value"] == pytest.approx(values.mean() if mean else np.median(values))
        and fast["n"] == 300
    )
    assert fast["low"] == pytest.approx(low, abs=tolerance) and fast["high"] == pytest.approx(
        high, abs=tolerance
    )
    if mean:  # captions of one image are alike: pretending that they are not makes the interval too narrow
        assert fast["high"] - fast["low"] > 1.2 * (alone["high"] - alone["low"])


def test_median_is_the_lower_one():
    assert (
        median_interval([4, 1, 3, 2])["value"] == 2
        and median_interval([4, 1, 3, 2, 5])["value"] == 3
    )


def test_difference_is_paired():
    values = np.random.default_rng(0).normal(size=50)
    one = difference_interval(values + 0.25, values)
    assert [one[key] for key in ("value", "low", "high")] == pytest.approx([0.25] * 3) and one[
        "n"
    ] == 50
    assert one["p"] == 2 / 10001
    assert difference_interval(values, values)["p"] == 1
    assert difference_interval(values, values + 0.25)["p"] == one["p"]  # two-sided


def test_p_is_uniform_where_there_is_no_difference():
    rng = np.random.default_rng(0)
    p = [difference_interval(*rng.integers(0, 2, (2, 400)), resamples=500)["p"] for _ in range(400)]
    assert np.mean(np.array(p) < 0.05) == pytest.approx(0.05, abs=0.03)
    assert (
        0.45 < np.mean(p) < 0.6
    )  # above a half: resamples with a difference of exactly zero count twice


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]).tolist() == pytest.approx(
        [0.03, 0.06, 0.06, 0.02]
    )  # x 3, 2 but no less than 0.06, 2, 4
    assert holm([0.9, 0.4]).tolist() == pytest.approx([0.9, 0.8])
    assert holm([0.7, 0.6]).tolist() == [1, 1] and holm([]).tolist() == []


def test_clear_best():
    rng = np.random.default_rng(0)
    values = {
        name: rng.uniform(size=500) < share for name, share in (("a", 0.5), ("b", 0.8), ("c", 0.55))
    }
    assert clear_best(values) == "b"
    close = values["b"].copy()
    close[np.flatnonzero(close)[:2]] = False  # two hits fewer, of 500
    assert clear_best({**values, "d": close}) is None
    assert clear_best({"a": values["a"]}) is None


def test_over_seeds_by_hand():
    three = over_seeds([1.0, 2.0, 3.0])
    assert [three[key] for key in ("value", "low", "high", "n")] == pytest.approx(
        [2, 2 - 4.303 / 3**0.5, 2 + 4.303 / 3**0.5, 3]
    )
    with pytest.raises(ValueError, match="1 seeds: an interval over seeds needs 2 to 10"):
        over_seeds([1.0])


def test_embed_keeps_rows_in_order(dataset):
    model = randomise(tiny_model())
    image, long, short = embed(model, dataset, batch_size=7)
    assert len(image) == len(long) == len(short) == 24
    with torch.inference_mode():
        assert torch.allclose(
            image[9], model.encode_image(dataset[9, 0][2][None], True)[0], atol=1e-5
        )
        assert torch.allclose(long[23], model.encode_text(dataset.long[23:], True)[0], atol=1e-5)
        assert torch.allclose(short[0], model.encode_text(dataset.short[:1], True)[0], atol=1e-5)


# ---- zero-shot classification


def test_templates_are_the_published_ones():
    published = json.loads(
        (
            Path(clip_benchmark.datasets.__file__).parent
            / "en_zeroshot_classification_templates.json"
        ).read_text()
    )
    for name in ("cifar10", "cifar100"):
        assert sorted(published[name]) == sorted(
            template.format("{c}") for template in TEMPLATES[name]
        )
    assert sorted(published["imagenet1k"]) == sorted(
        template("{c}") for template in TEMPLATES["imagenet"]
    )


@pytest.mark.parametrize("context_length", [77, 248])
def test_zero_shot_is_open_clips(context_length):
    model = randomise(tiny_model(context_length=context_length))
    _, _, prepare = jettclip.create_model_and_transforms("JettCLIP-T", image_size=32)
    tokenizer = jettclip.get_tokenizer("JettCLIP-T", context_length)
    names, rng = ["airplane", "cat", "ship", "oak tree"], np.random.default_rng(0)
    pictures = [
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)) for _ in range(9)
    ]
    files = []
    for picture in pictures:
        file = io.BytesIO()
        picture.save(file, "PNG")
        files.append(file.getvalue())
    labels = rng.integers(0, 4, 9)
    with torch.inference_mode():
        weights = torch.stack(
            [
                torch.nn.functional.normalize(
                    model.encode_text(
                        tokenizer([template.format(name) for template in CIFAR_TEMPLATES]),
                        normalize=True,
                    ).mean(0),
                    dim=0,
                )
                for name in names
            ],
            dim=1,
        )
        assert torch.allclose(
            weights,
            open_clip.build_zero_shot_classifier(model, tokenizer, names, CIFAR_TEMPLATES),
            atol=1e-5,
        )
        scores = (
            model.encode_image(
                torch.stack([prepare(picture) for picture in pictures]), normalize=True
            )
            @ weights
        )
    expected = [
        scores[row].argsort(descending=True).tolist().index(label)
        for row, label in enumerate(labels)
    ]
    assert (
        zero_shot(
            model, tokenizer, pd.Series(files), pd.Series(labels), names, CIFAR_TEMPLATES
        ).tolist()
        == expected
    )


def test_images_and_texts_in_batches(table):
    model = randomise(tiny_model())
    assert torch.allclose(
        embed_images(model, table.image[:5], batch_size=2),
        embed(model, PairDataset(table[:5], 32))[0],
        atol=1e-5,
    )
    tokenizer = jettclip.get_tokenizer("JettCLIP-T")
    texts = ["a cat", "a dog on a mat", "rain"]
    assert torch.allclose(
        embed_texts(model, tokenizer, texts, batch_size=2),
        model.encode_text(tokenizer(texts), True),
        atol=1e-5,
    )


# ---- where is the detail


class Rows(list):
    """A data set whose rows are given, whatever the crop."""

    in_memory = True

    def __getitems__(self, batch):
        return tuple(
            torch.stack([torch.as_tensor(value) for value in column])
            for column in zip(*(self[row] for row, _ in batch))
        )

    def scaled(self, pixels):
        return pixels


class Plain:
    """A model that takes images and tokens for features."""

    logit_scale = torch.zeros(())

    def eval(self):
        return self

    def encode_image(self, image, normalize):
        return image

    def encode_text(self, tokens, normalize):
        return tokens.float()


def test_detail_choices_by_hand():
    image = torch.tensor([1.0, 0.0, 0.0])
    rows = [
        (image, [2, 0, 0], [1, 0, 0], 1),
        (image, [0, 1, 0], [1, 0, 0], 0),
        (image, [1, 0, 0], [1, 0, 0], 0.5),
        (image, [1, 0, 5], [1, 5, 0], 0.5),
        (image * float("nan"), [2, 0, 0], [1, 0, 0], 0),
        (image * 0, [1, 0, 0], [0, 0, 1], 0.5),
    ]
    one, other = (
        Rows((0, 0, row[0], torch.tensor(row[which]), 0) for row in rows) for which in (1, 2)
    )
    for batch_size in (2, 6):
        assert detail_choices(Plain(), one, other, batch_size).tolist() == [row[3] for row in rows]


def test_a_detail_beyond_the_context_is_a_tie():
    details = make_details(40, seed=0, size=32)
    others = details.assign(image=details.other_image, long=details.other_long)
    for table in (details, others):
        table["short"] = "some shapes"
    choices = {}
    for context in (77, 248):
        one, other = (PairDataset(table, 32, context) for table in (details, others))
        model = randomise(tiny_model(context_length=context))
        choices[context] = detail_choices(model, one, other, batch_size=16)
    beyond = details.position.to_numpy() >= 76  # token 76 is the end token of a 77-token model
    assert 5 < beyond.sum() < 35
    assert (choices[77][beyond] == 0.5).all() and (choices[77][~beyond] != 0.5).all()
    assert (choices[248] != 0.5).all()


def test_by_position():
    positions = np.repeat([3, 19, 20, 39, 40, 179, 180], [5, 5, 6, 6, 9, 10, 50])
    choices = np.where(positions < 20, 1.0, 0.0)
    choices[positions == 179] = [1, 0.5] * 5
    table = by_position(choices, positions)
    assert table.position.tolist() == [10, 30, 170] and table.n.tolist() == [10, 12, 10]
    assert table.value.tolist() == [1, 0, 0.75]
    assert table.low[2] < 0.75 < table.high[2]
    assert (
        by_position(choices[:9], positions[:9]).columns.tolist() == table.columns.tolist()
    )  # too few of any


def test_by_attribute():
    details = pd.DataFrame(
        {
            "position": [5] * 10 + [77] * 10 + [90] * 5,
            "attribute": ["size"] * 10 + ["colour"] * 10 + ["size"] * 5,
        }
    )
    table = by_attribute(np.repeat([1.0, 0.5, 0.0], [10, 10, 5]), details).set_index(
        ["part", "attribute"]
    )
    assert table.value.to_dict() == pytest.approx(
        {
            ("before 77", "all"): 1,
            ("before 77", "size"): 1,
            ("from 77", "all"): 1 / 3,
            ("from 77", "colour"): 0.5,
            ("any", "all"): 0.6,
            ("any", "colour"): 0.5,
            ("any", "size"): 2 / 3,
        }
    )
    assert table.n["any", "size"] == 15
