"""A text tower reads a caption's real tokens and nothing else; stretching and folding keep their promises."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import randomise
from hypothesis import example, given, settings
from hypothesis import strategies as st
from open_clip.tokenizer import SimpleTokenizer
from open_clip.transformer import QuickGELU, TextTransformer

from jettclip.text import (
    HybridText,
    RepMixerBlock,
    TokenBatchNorm,
    Tokenizer,
    TransformerText,
    in_length_groups,
    stretch_positions,
    tokenizer,
)

GOLDEN = Path(__file__).parent / "golden"
TOKENIZE = tokenizer()
CAUSAL = {
    "context_length": 248,
    "vocab_size": 100,
    "width": 32,
    "heads": 2,
    "layers": 2,
    "output_dim": 8,
    "act_layer": QuickGELU,
}
END = 99  # the highest id


def captions(lengths, seed=0, context=248):
    """Random captions of `lengths` tokens: (B, context), the end token last, zeros after it."""
    random = np.random.default_rng(seed)
    tokens = torch.zeros(len(lengths), context, dtype=torch.long)
    for row, length in zip(tokens, lengths):
        row[: length - 1] = torch.from_numpy(random.integers(1, END, length - 1))
        row[length - 1] = END
    return tokens


def hybrid(mask_padding=True):
    torch.manual_seed(0)
    return randomise(
        HybridText(
            vocab_size=100, width=16, heads=2, layers=2, output_dim=8, mask_padding=mask_padding
        )
    )


def transformer(**changes):
    torch.manual_seed(0)
    return TransformerText(**CAUSAL, **changes).eval()


def causal():
    return transformer()


def bidirectional():
    return transformer(no_causal_mask=True, mask_padding=True)


def encode(tower, tokens):
    with torch.inference_mode():
        return F.normalize(tower(tokens), dim=1)


def largest(difference):
    return difference.abs().max().item()


# ---- positions


def test_stretching_agrees_with_long_clip():
    golden = np.load(GOLDEN / "losses_seed0.npz")
    stretched = stretch_positions(torch.from_numpy(golden["stretch/in"]))
    assert stretched.shape == (248, 16)
    assert largest(stretched - torch.from_numpy(golden["stretch/longclip"])) < 1e-6


@pytest.mark.parametrize("mode, kept, last", [("longclip", 20, 76.75), ("exact", 19, 76.0)])
def test_a_line_stays_a_line(mode, kept, last):
    """Where the table counts 0, 1, 2, ... it goes on counting, in quarters."""
    table = torch.arange(77.0)[:, None] * torch.tensor([1.0, -2.0])
    stretched = stretch_positions(table, mode=mode)
    assert torch.equal(stretched[:kept], table[:kept])
    quarters = kept + torch.arange(248.0 - kept) / 4
    assert torch.allclose(stretched[kept:], quarters[:, None] * torch.tensor([1.0, -2.0]))
    assert stretched[-1, 0] == last


def test_exact_stretching_passes_through_the_old_rows():
    table = torch.randn(77, 5, generator=torch.Generator().manual_seed(0))
    stretched = stretch_positions(table, mode="exact")
    assert torch.equal(stretched[:19], table[:19]) and torch.equal(stretched[19::4], table[19:])
    assert torch.allclose(stretched[20], 0.75 * table[19] + 0.25 * table[20])


@pytest.mark.parametrize(
    "arguments, problem",
    [
        ({"mode": "linear"}, "'linear' is unknown: use 'longclip' or 'exact'"),
        ({"length": 250}, "230 is not a multiple of 57"),
        ({"keep": 0}, "cannot stretch 77"),
        ({"keep": 77}, "cannot stretch 77"),
    ],
)
def test_impossible_stretching(arguments, problem):
    with pytest.raises(ValueError, match=problem):
        stretch_positions(torch.zeros(77, 4), **arguments)


# ---- tokens


@pytest.mark.parametrize("context", [77, 248])
def test_truncation_keeps_the_end_token(context):
    words = "the small red ring and a blue star " * 60
    whole, cut = tokenizer(1000)(words)[0], tokenizer(context)(words)[0]
    assert len(cut) == context and cut[-1] == 49407
    assert torch.equal(cut[:-1], whole[: context - 1])


@given(texts=st.lists(st.text(max_size=600), min_size=1, max_size=3))
@example(texts=["", "!", "words <end_of_text> more words", "\x00", "ß 漢字 🙂" * 100])
@settings(max_examples=100, deadline=None)
def test_any_text_becomes_tokens(texts):
    tokens = TOKENIZE(texts)
    assert tokens.shape == (len(texts), 248) and tokens.dtype == torch.long
    assert (tokens[:, 0] == 49406).all()
    for row in tokens:
        last = (row == 49407).nonzero().max()
        assert row.max() == 49407 and not row[last + 1 :].any()


def random_text(rng):
    """A text of anything that may break a tokenizer: words, Unicode, controls, HTML, special tokens, all cases."""
    pieces = (
        "the small red ring",
        "isn't",
        "I'LL",
        "don't",
        "ΑΣ ΟΔΟΣ",
        "İstanbul",
        "ß",
        "漢字",
        "🙂👩‍👩‍👧",
        "é",
        "ﬁ",
        "“quoted”",
        "â€™",
        "&amp;",
        "&lt;b&gt;",
        "&",
        "&amp;amp;",
        "<end_of_text>",
        "<START_OF_TEXT>",
        "1234",
        "½",
        "³",
        "a_b",
        "...",
        "--",
        "\n",
        "\t",
        "\r\n",
        "\x00",
        "\x1b[31m",
        "\x1c",
        "\x85",
        "\xa0",
        "\u2028",
        "\u200b",
        "\u3000",
        "\ufeff",
        "\x7f",
        "x" * 60,
        "'s",
        "'",
        "Ａ",
        "𝔘",
        "e\u0301",
        "%",
        "$5",
    )
    parts = [
        pieces[i] if kind < 7 else chr(code) if not 0xD800 <= code < 0xE000 else ""
        for i, kind, code in zip(
            rng.integers(len(pieces), size=8),
            rng.integers(10, size=8),
            (rng.random(8) ** 4 * 0x110000).astype(int),
        )
    ]
    return "".join(
        part + " " * space
        for part, space in zip(parts[: rng.integers(1, 9)], rng.integers(2, size=8))
    )


def test_ids_are_open_clips_on_100000_texts(monkeypatch):
    monkeypatch.setattr(Tokenizer, "MEMORY", 5000)  # the memory is emptied on the way
    ours, theirs, rng = Tokenizer(), SimpleTokenizer(context_length=248), np.random.default_rng(0)
    for _ in range(100_000):
        text = random_text(rng)
        assert ours.encode(text) == theirs.encode(text), ascii(text)
    texts = ["", "long " * 400, "x" * 5000, *(random_text(rng) * 30 for _ in range(50))]
    assert torch.equal(ours(texts), theirs(texts)) and torch.equal(
        ours(texts[1], 77), theirs(texts[1], 77)
    )


# ---- towers


@pytest.mark.parametrize("make", [hybrid, causal, bidirectional])
def test_features_do_not_depend_on_padding_or_batch_mates(make):
    tower = make()
    lengths = [3, 248, 4, 77, 78, 247, *np.random.default_rng(1).integers(3, 249, 34)]
    tokens = captions(lengths)
    together = encode(tower, tokens)
    alone = torch.cat([encode(tower, tokens[i : i + 1]) for i in range(len(tokens))])
    unpadded = torch.cat(
        [encode(tower, tokens[i : i + 1, :length]) for i, length in enumerate(lengths)]
    )
    reversed_ = encode(tower, tokens.flip(0)).flip(0)
    for other in (alone, unpadded, reversed_):
        assert largest(together - other) < 1e-6
    assert largest(together[0] - together[2]) > 0.01  # features do differ


@pytest.mark.parametrize("no_causal_mask", [False, True])
def test_transformer_agrees_with_open_clip(no_causal_mask):
    tower = transformer(no_causal_mask=no_causal_mask)
    reference = TextTransformer(**CAUSAL, no_causal_mask=no_causal_mask).eval()
    reference.load_state_dict(tower.state_dict())
    tokens = captions([3, 248, 20, 100, 77])
    assert largest(encode(tower, tokens) - encode(reference, tokens)) < 1e-6


@pytest.mark.parametrize("mask_padding", [True, False])
@pytest.mark.parametrize("fold", [False, True])
def test_window_around_the_end_token_is_exact(mask_padding, fold):
    """The evaluation path against the training path, which computes every token (with fixed batch norm statistics)."""
    tower = hybrid(mask_padding)
    if fold:
        tower.fold()
    tokens = captions([3, 248, 4, 11, 12, 77, 238, 247])
    fast = encode(tower, tokens)
    tower.training = True  # this module's flag alone: its batch norms stay in evaluation mode
    assert largest(fast - encode(tower, tokens)) < 1e-6


def test_packed_training_is_that_of_the_padded_batch():
    """The packed captions against `encode` on the whole padded batch: features, gradients, batch norm statistics."""
    packed, padded = hybrid().train(), hybrid().train()
    tokens = captions([3, 248, 4, 77, *np.random.default_rng(1).integers(3, 120, 40)])
    x, end = packed.token_embedding(tokens) + packed.positional_embedding, tokens.argmax(dim=1)
    results = []
    for tower, features in ((packed, packed(tokens)), (padded, padded.encode(x.detach(), end))):
        (features * torch.arange(8.0)).square().sum().backward()
        results.append(
            [
                features,
                *(
                    p.grad
                    for name, p in tower.named_parameters()
                    if not name.endswith(("embedding.weight", "embedding"))
                ),
                *(b.float() for b in tower.buffers()),
            ]
        )
    assert packed.first.norm.num_batches_tracked == 1
    for one, other in zip(*results):
        assert largest(one - other) < 1e-4 * max(1, other.abs().max())


def test_stretched_tower_uses_the_full_context():
    """It attends to padding: a caption without any is read as by the masked tower, a padded one is not."""
    masked, stretched = hybrid(), hybrid(mask_padding=False)
    stretched.load_state_dict(masked.state_dict())
    full, padded = captions([248, 248]), captions([20, 100])
    assert largest(encode(masked, full) - encode(stretched, full)) < 1e-6
    assert largest(encode(masked, padded) - encode(stretched, padded)) > 1e-3
    assert largest(encode(stretched, padded[:, :100]) - encode(stretched, padded)) < 1e-6
    before = encode(masked, padded), encode(stretched, padded)
    for tower in (masked, stretched):
        tower.token_embedding.weight.data[0] += 1  # id 0 is padding
    assert torch.equal(encode(masked, padded), before[0])
    assert largest(encode(stretched, padded) - before[1]) > 1e-3


@pytest.mark.parametrize("make", [hybrid, causal])
def test_too_many_tokens(make):
    for tokens in (torch.ones(2, 249, dtype=torch.long), torch.ones(5, dtype=torch.long)):
        with pytest.raises(ValueError, match="up to 248"):
            make()(tokens)


def test_length_groups_keep_the_order():
    tokens = captions([9, 3, 6, 3, 5, 8, 7])
    widths = []

    def lengths_and_first_ids(x, end):
        widths.append(x.shape[1])
        return torch.stack([end + 1, x[:, 0, 0]], dim=1)

    features = in_length_groups(
        lengths_and_first_ids, tokens[:, :, None], tokens.argmax(dim=1), rows=2
    )
    assert features[:, 0].tolist() == [9, 3, 6, 3, 5, 8, 7]
    assert torch.equal(features[:, 1], tokens[:, 0])
    assert widths == [3, 6, 8, 9]


# ---- batch norm over tokens, and folding


def test_batch_norm_sees_real_tokens_only():
    torch.manual_seed(0)
    norm, reference = TokenBatchNorm(6), torch.nn.BatchNorm1d(6)
    x = torch.randn(3, 5, 6)
    mask = torch.arange(5) < torch.tensor([[2], [5], [3]])
    x[~mask] = 1000
    y = norm(x, mask)
    assert torch.allclose(y[mask], reference(x[mask]), atol=1e-6)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert torch.allclose(getattr(norm, name), getattr(reference, name))
    gradients = []
    for one, real in (
        (norm, lambda z: norm(z, mask)[mask]),
        (reference, lambda z: reference(z[mask])),
    ):
        z = x.clone().requires_grad_()
        loss = (real(z) * torch.arange(6.0)).square().sum()
        gradients.append(torch.autograd.grad(loss, (z, one.weight, one.bias)))
    for one, other in zip(*gradients):
        assert torch.allclose(one, other, atol=1e-3, rtol=1e-4)
    assert torch.allclose(norm.eval()(x, mask)[mask], reference.eval()(x[mask]))


@pytest.mark.parametrize("mask_padding", [True, False])
def test_folding_keeps_the_outputs(mask_padding):
    tower = hybrid(mask_padding)
    tokens = captions([3, 248, 60, 20])
    before = encode(tower, tokens)
    parameters = sum(p.numel() for p in tower.parameters())
    tower.fold()
    folded = encode(tower, tokens)
    assert largest(before - folded) < 1e-5
    assert sum(p.numel() for p in tower.parameters()) < parameters
    assert not any(isinstance(module, TokenBatchNorm) for module in tower.modules())
    tower.fold()
    assert torch.equal(encode(tower, tokens), folded)


def test_training_branches_follow_the_equation():
    """x + s (BN(x) + BN(conv(x)) - BN(x)), with the three norms apart."""
    block = RepMixerBlock(8, kernel_size=3)
    randomise(block)
    x = torch.randn(2, 7, 8)
    conv = F.conv1d(x.transpose(1, 2), block.conv.weight.squeeze(2), padding=1, groups=8).transpose(
        1, 2
    )
    skip, mixed, norm = (
        F.batch_norm(y.flatten(0, 1), n.running_mean, n.running_var, n.weight, n.bias).view_as(x)
        for y, n in ((x, block.skip_norm), (conv, block.conv_norm), (x, block.norm))
    )
    block.fc2.weight.data.zero_()
    block.fc2.bias.data.zero_()
    assert torch.allclose(block(x), x + block.mixer_scale * (skip + mixed - norm), atol=1e-5)
