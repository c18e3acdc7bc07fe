"""A text tower reads a caption's real tokens and nothing else; stretching and folding are exact."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import largest, randomise
from golden_values import GOLDEN
from open_clip.tokenizer import SimpleTokenizer
from open_clip.transformer import QuickGELU, TextTransformer

from jettclip import text
from jettclip.data import pad_front

SIZES = {"context_length": 248, "vocab_size": 100, "heads": 2, "layers": 2, "output_dim": 8}
END = 99  # the highest id


def captions(lengths, seed=0, context=248):
    """Random captions of `lengths` tokens: (B, context), the end token last, zeros after it."""
    random = np.random.default_rng(seed)
    tokens = torch.zeros(len(lengths), context, dtype=torch.long)
    for row, length in zip(tokens, lengths, strict=True):
        row[: length - 1] = torch.from_numpy(random.integers(1, END, length - 1))
        row[length - 1] = END
    return tokens


def hybrid(mask_padding=True):
    torch.manual_seed(0)
    return randomise(text.HybridText(width=16, mask_padding=mask_padding, **SIZES))


def causal(**changes):
    torch.manual_seed(0)
    return text.TransformerText(width=32, act_layer=QuickGELU, **SIZES, **changes).eval()


def bidirectional():
    return causal(no_causal_mask=True, mask_padding=True)


def encode(tower, tokens):
    with torch.inference_mode():
        return F.normalize(tower(tokens), dim=1)


def test_stretching_agrees_with_long_clip():
    golden = np.load(GOLDEN / "losses_seed0.npz")
    stretched = text.stretch_positions(torch.from_numpy(golden["stretch/in"]))
    assert stretched.shape == (248, 16)
    assert largest(stretched, torch.from_numpy(golden["stretch/longclip"])) < 1e-6


@pytest.mark.parametrize("mode, kept, last", [("longclip", 20, 76.75), ("exact", 19, 76.0)])
def test_a_line_stays_a_line(mode, kept, last):
    """A table that counts 0, 1, 2, ... then counts in quarters."""
    slopes = torch.tensor([1.0, -2.0])
    table = torch.arange(77.0)[:, None] * slopes
    stretched = text.stretch_positions(table, mode=mode)
    assert torch.equal(stretched[:kept], table[:kept]) and stretched[-1, 0] == last
    quarters = kept + torch.arange(248.0 - kept) / 4
    assert torch.allclose(stretched[kept:], quarters[:, None] * slopes)


def test_impossible_stretching():
    for arguments, problem in (
        ({"mode": "linear"}, "'linear' is unknown: use 'longclip' or 'exact'"),
        ({"length": 250}, "cannot stretch 77 - 20 positions evenly to 250 - 20"),
    ):
        with pytest.raises(ValueError, match=problem):
            text.stretch_positions(torch.zeros(77, 4), **arguments)


# Whatever may break a tokenizer: words, Unicode, controls, HTML, special tokens, all cases.
WORDS = (
    "the small red ring|isn't|I'LL|don't|ΑΣ ΟΔΟΣ|İstanbul|ß|漢字|🙂👩‍👩‍👧|é|ﬁ|“quoted”|â€™|&amp;"
    "|&lt;b&gt;|&|&amp;amp;|<end_of_text>|<START_OF_TEXT>|1234|½|³|a_b|...|--|\n|\t|\r\n|\x00|\x1b[31m|\x1c"
    "|\x85|\xa0|\u2028|\u200b|\u3000|\ufeff|\x7f|'s|'|Ａ|𝔘|e\u0301|%|$5|" + "x" * 60
)
PIECES = WORDS.split("|")


def random_text(random):
    text = ""
    for _ in range(random.integers(1, 9)):
        code = int(random.random() ** 4 * 0x110000)
        known = random.random() < 0.7 or 0xD800 <= code < 0xE000
        text += PIECES[random.integers(len(PIECES))] if known else chr(code)
        text += " " * random.integers(2)
    return text


def test_tokens_are_open_clips(monkeypatch):
    monkeypatch.setattr(text.Tokenizer, "MEMORY", 1000)  # it is emptied on the way
    ours, theirs = text.tokenizer(), SimpleTokenizer(context_length=248)
    random = np.random.default_rng(0)
    for _ in range(3000):
        words = random_text(random)
        assert ours.encode(words) == theirs.encode(words), ascii(words)
    texts = ["", "!", "\x00", "long " * 400, "x" * 5000, "ß 漢字 🙂" * 100, "a <end_of_text> b"]
    texts += [random_text(random) * 30 for _ in range(50)]
    tokens = ours(texts)
    assert torch.equal(tokens, theirs(texts)) and torch.equal(ours(texts, 77), theirs(texts, 77))
    assert tokens[3, 0] == 49406 and tokens[3, -1] == 49407  # cut, with its end token


@pytest.mark.parametrize("make", [hybrid, causal, bidirectional])
def test_features_do_not_depend_on_padding_or_batch_mates(make):
    tower = make()
    lengths = [3, 248, 4, 77, 78, 247, *np.random.default_rng(1).integers(3, 120, 28)]
    tokens = captions(lengths)
    together = encode(tower, tokens)
    alone = [encode(tower, row[None]) for row in tokens]
    unpadded = [encode(tower, row[None, :n]) for row, n in zip(tokens, lengths, strict=True)]
    for features in (torch.cat(alone), torch.cat(unpadded), encode(tower, tokens.flip(0)).flip(0)):
        assert largest(together, features) < 1e-6
    assert largest(together[0], together[2]) > 0.01  # features do differ


@pytest.mark.parametrize("make", [hybrid, causal])
def test_padding_in_front_moves_the_positions_alone(make):
    tower, shifted = make(), make()
    lengths = [9, 248, 40]
    tokens = captions(lengths)
    front = encode(tower, pad_front(tokens))
    for row, length in enumerate(lengths):
        positions = tower.positional_embedding.roll(length - 248, 0)  # the last are the first
        shifted.load_state_dict(tower.state_dict() | {"positional_embedding": positions})
        assert largest(front[row], encode(shifted, tokens[row, None])[0]) < 1e-6
    assert largest(front[1], encode(tower, tokens)[1]) < 1e-6 < 0.01 < largest(front[0], front[2])


@pytest.mark.parametrize("no_causal_mask", [False, True])
def test_transformer_agrees_with_open_clip(no_causal_mask):
    tower = causal(no_causal_mask=no_causal_mask)
    sizes = {"width": 32, "act_layer": QuickGELU, "no_causal_mask": no_causal_mask, **SIZES}
    reference = TextTransformer(**sizes).eval()
    reference.load_state_dict(tower.state_dict())
    tokens = captions([3, 248, 20, 100, 77])
    assert largest(encode(tower, tokens), encode(reference, tokens)) < 1e-6


@pytest.mark.parametrize("mask_padding", [True, False])
def test_window_around_the_end_token_and_folding_are_exact(mask_padding):
    """Evaluation against the path of training, which computes every token; before and after."""
    tower, tokens = hybrid(mask_padding), captions([3, 248, 4, 11, 12, 77, 238, 247])
    before, parameters = encode(tower, tokens), sum(p.numel() for p in tower.parameters())
    for fold in (False, True):
        if fold:
            tower.first.fold()
            tower.last.fold()
        tower.training = False
        fast = encode(tower, tokens)
        tower.training = True  # the tower's flag alone: its batch norms stay in evaluation mode
        assert largest(fast, encode(tower, tokens)) < 1e-6
    assert largest(fast, before) < 1e-5
    assert sum(p.numel() for p in tower.parameters()) < parameters
    assert not any(isinstance(module, text.TokenBatchNorm) for module in tower.modules())


@pytest.mark.parametrize("n, multiple", [(44, 1), (32, 512)])  # in groups; as on a GPU
def test_packed_training_is_that_of_the_padded_batch(n, multiple, monkeypatch):
    """Features, gradients and batch norm statistics, against `encode` on the whole padded batch."""
    monkeypatch.setattr(text, "MULTIPLE", {"cpu": multiple})
    packed, padded = hybrid().train(), hybrid().train()
    tokens = captions([3, 248, 4, 77, *np.random.default_rng(1).integers(3, 120, n - 4)])
    x, end = packed.token_embedding(tokens) + packed.positional_embedding, tokens.argmax(dim=1)
    results = []
    for tower, features in ((packed, packed(tokens)), (padded, padded.encode(x.detach(), end))):
        (features * torch.arange(8.0)).square().sum().backward()
        layers = [p for name, p in tower.named_parameters() if "embedding" not in name]
        results.append([features, *(p.grad for p in layers), *(b.float() for b in tower.buffers())])
    assert packed.first.norm.num_batches_tracked == 1
    for result, expected in zip(*results, strict=True):
        assert largest(result, expected) < 1e-4 * max(1, expected.abs().max())


def test_stretched_tower_uses_the_full_context():
    """It reads a caption without padding as the masked tower does, and a padded one otherwise."""
    masked, stretched = hybrid(), hybrid(mask_padding=False)
    full, padded = captions([248, 248]), captions([20, 100])
    assert largest(encode(masked, full), encode(stretched, full)) < 1e-6
    assert largest(encode(masked, padded), encode(stretched, padded)) > 1e-3
    assert largest(encode(stretched, padded[:, :100]), encode(stretched, padded)) < 1e-6
    before = encode(masked, padded), encode(stretched, padded)
    for tower in (masked, stretched):
        tower.token_embedding.weight.data[0] += 1  # id 0 is padding
    assert torch.equal(encode(masked, padded), before[0])
    assert largest(encode(stretched, padded), before[1]) > 1e-3


def test_too_many_tokens():
    with pytest.raises(ValueError, match=r"\(2, 249\): this model reads \(B, up to 248\)"):
        hybrid()(torch.ones(2, 249, dtype=torch.long))


@pytest.mark.parametrize("make", [hybrid, causal, bidirectional])
def test_no_captions_and_one_of_one_token(make):
    tower = make().train()
    assert tower(torch.zeros(0, 248, dtype=torch.long)).shape == (0, 8)
    assert tower(torch.full((1, 1), END)).isfinite().all()
    assert all(buffer.isfinite().all() for buffer in tower.buffers())


def test_batch_norm_sees_real_tokens_only():
    torch.manual_seed(0)
    norm, reference = text.TokenBatchNorm(6), torch.nn.BatchNorm1d(6)
    x = torch.randn(3, 5, 6)
    mask = torch.arange(5) < torch.tensor([[2], [5], [3]])
    x[~mask] = 1000
    assert torch.allclose(norm(x, mask)[mask], reference(x[mask]), atol=1e-6)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert torch.allclose(getattr(norm, name), getattr(reference, name))

    def gradients(module, normalise):
        z = x.clone().requires_grad_()
        loss = (normalise(z) * torch.arange(6.0)).square().sum()
        return torch.autograd.grad(loss, (z, module.weight, module.bias))

    ours = gradients(norm, lambda z: norm(z, mask)[mask])
    theirs = gradients(reference, lambda z: reference(z[mask]))
    for gradient, expected in zip(ours, theirs, strict=True):
        assert torch.allclose(gradient, expected, atol=1e-3, rtol=1e-4)
    assert torch.allclose(norm.eval()(x, mask)[mask], reference.eval()(x[mask]))


def test_training_branches_follow_the_equation():
    """x + s (BN(x) + BN(conv(x)) - BN(x)), with the three norms apart; folding gives the same."""
    block, x = randomise(text.RepMixerBlock(8, kernel_size=3)), torch.randn(2, 7, 8)
    kernel = block.conv.weight.squeeze(2)
    conv = F.conv1d(x.transpose(1, 2), kernel, padding=1, groups=8).transpose(1, 2)
    skip, mixed, norm = (
        F.batch_norm(y.flatten(0, 1), n.running_mean, n.running_var, n.weight, n.bias).view_as(x)
        for y, n in ((x, block.skip_norm), (conv, block.conv_norm), (x, block.norm))
    )
    torch.nn.init.zeros_(block.fc2.weight)
    torch.nn.init.zeros_(block.fc2.bias)
    expected = x + block.mixer_scale * (skip + mixed - norm)
    assert torch.allclose(block(x), expected, atol=1e-5)
    block.fold()
    assert torch.allclose(block(x), expected, atol=1e-5)
