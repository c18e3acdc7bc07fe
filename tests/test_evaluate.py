"""Ranks and intervals on matrices worked out by hand, and against a plain double loop."""
import numpy as np
import pytest
import torch
from conftest import randomise, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from jettclip.data import PairDataset
from jettclip.evaluate import (by_position, detail_choices, difference_interval, embed, interval, ranks,
                               retrieval)
from jettclip.scenes import make_details


def ranks_of(similarity, image_of_text=None):
    """Ranks for a matrix (texts, images) of similarities: the images are unit vectors."""
    similarity = torch.tensor(similarity, dtype=torch.float32)
    of_text, of_image = ranks(torch.eye(similarity.shape[1]), similarity, image_of_text)
    return of_text.tolist(), of_image.tolist()


@pytest.mark.parametrize("similarity, of_text, of_image", [
    ([[.9, .1, .2], [.3, .8, .1], [.2, .3, .7]], [0, 0, 0], [0, 0, 0]),
    ([[.9, .1, .0], [.2, .3, .8], [.4, .5, .6]], [0, 1, 0], [0, 1, 1]),
    ([[.1, .9, .5], [.9, .1, .5], [.9, .5, .1]], [2, 2, 2], [2, 2, 2]),
    ([[.5, .5, .1], [.2, .5, .1], [.5, .1, .6]], [1, 0, 0], [1, 1, 0]),  # ties count against the model
    ([[.5, .5, .5], [.5, .5, .5], [.5, .5, .5]], [2, 2, 2], [2, 2, 2]),
])
def test_ranks_by_hand(similarity, of_text, of_image):
    assert ranks_of(similarity) == (of_text, of_image)


def test_several_captions_for_an_image():
    """Four texts, of images 0, 0, 1, 1; an image is found by the best of its own texts."""
    similarity = [[.9, .1, .3], [.2, .6, .1], [.5, .4, .3], [.8, .7, .9]]
    assert ranks_of(similarity, [0, 0, 1, 1]) == ([0, 1, 1, 2], [0, 0, 4])  # nothing describes image 2


def test_not_a_number_is_no_hit():
    nan = float("nan")
    assert ranks_of([[nan] * 3] * 3) == ([2, 2, 2], [2, 2, 2])
    assert ranks_of([[nan] * 3, [.1, .9, .1], [.1, .1, .9]]) == ([2, 0, 0], [2, 1, 1])


@given(data=st.data(), images=st.integers(1, 6), texts=st.integers(1, 9))
@settings(max_examples=200, deadline=None)
def test_ranks_agree_with_a_double_loop(data, images, texts):
    levels = st.sampled_from([0.0, 0.25, 0.5, 1.0])
    similarity = [[data.draw(levels) for _ in range(images)] for _ in range(texts)]
    owner = [data.draw(st.integers(0, images - 1)) for _ in range(texts)]
    of_text = [sum(similarity[t][i] >= similarity[t][owner[t]] for i in range(images) if i != owner[t])
               for t in range(texts)]
    of_image = []
    for i in range(images):
        best = max((similarity[t][i] for t in range(texts) if owner[t] == i), default=-1)
        of_image.append(sum(similarity[t][i] >= best for t in range(texts) if owner[t] != i))
    assert ranks_of(similarity, owner) == (of_text, of_image)


def test_retrieval_by_hand():
    """Twelve images in a ring: text t is nearest to image t + 1 for t < 3, then to its own."""
    similarity = torch.eye(12)
    similarity[[0, 1, 2], [1, 2, 3]] = 2
    table = retrieval(torch.eye(12), similarity).set_index("metric")
    assert list(table.index) == ["t2i_r1", "t2i_r5", "t2i_r10", "i2t_r1", "i2t_r5", "i2t_r10"]
    assert table.value.tolist() == pytest.approx([9 / 12, 1, 1, 9 / 12, 1, 1])
    assert (table.n == 12).all()
    assert (table.low <= table.value).all() and (table.value <= table.high).all()
    assert table.high["t2i_r5"] == table.low["t2i_r5"] == 1

    five_times, own_image = similarity.repeat_interleave(5, dim=0), torch.arange(12).repeat_interleave(5)
    five = retrieval(torch.eye(12), five_times, own_image).set_index("metric")
    assert five.n.tolist() == [60, 60, 60, 12, 12, 12]
    assert five.value["i2t_r5"] == pytest.approx(9 / 12)  # five wrong texts come first


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


def test_difference_is_paired():
    values = np.random.default_rng(0).normal(size=50)
    one = difference_interval(values + 0.25, values)
    assert [one[key] for key in ("value", "low", "high")] == pytest.approx([0.25] * 3) and one["n"] == 50


def test_embed_keeps_rows_in_order(dataset):
    model = randomise(tiny_model())
    image, long, short = embed(model, dataset, batch_size=7)
    assert len(image) == len(long) == len(short) == 24
    with torch.inference_mode():
        assert torch.allclose(image[9], model.encode_image(dataset[9, 0][2][None], True)[0], atol=1e-5)
        assert torch.allclose(long[23], model.encode_text(dataset.long[23:], True)[0], atol=1e-5)
        assert torch.allclose(short[0], model.encode_text(dataset.short[:1], True)[0], atol=1e-5)


# ---- where is the detail

class Rows(list):
    """A data set whose rows are given, whatever the crop."""
    in_memory = True

    def __getitems__(self, batch):
        return tuple(torch.stack([torch.as_tensor(value) for value in column]) for column in zip(*(self[row] for row, _ in batch)))

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
    rows = [(image, [2, 0, 0], [1, 0, 0], 1), (image, [0, 1, 0], [1, 0, 0], 0),
            (image, [1, 0, 0], [1, 0, 0], 0.5), (image, [1, 0, 5], [1, 5, 0], 0.5),
            (image * float("nan"), [2, 0, 0], [1, 0, 0], 0), (image * 0, [1, 0, 0], [0, 0, 1], 0.5)]
    one, other = (Rows((0, 0, row[0], torch.tensor(row[which]), 0) for row in rows) for which in (1, 2))
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
