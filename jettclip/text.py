"""Text side: tokenizer, stretching of positions, and the two kinds of text tower.

`HybridText` is MobileCLIP-S0's (Vasu et al., CVPR 2024, section 4.1), `TransformerText` that of the
others: causal in CLIP and MobileCLIP-B, bidirectional in MobileCLIP-S1 and S2. Both read the
feature at the end token, which has the highest id, and skip what cannot reach it.
Shapes: B captions of L tokens with d numbers each; b, l and t are of a group of captions.
"""

from functools import cache
from itertools import zip_longest

import tokenizers
import torch
import torch.nn.functional as F
from open_clip.tokenizer import SimpleTokenizer
from open_clip.transformer import ResidualAttentionBlock, TextTransformer
from torch import nn

from . import inputs

CONTEXT = 248  # tokens that Long-CLIP reads, start and end token included
# Packed captions fill a multiple of so many places: cuDNN plans its convolutions anew for each new
# length, and that takes longer than they do.
MULTIPLE = {"cuda": 2048}


@cache
def byte_pairs():
    """open_clip's byte pairs -> `tokenizers.Tokenizer`, the pattern that splits words."""
    known = SimpleTokenizer()
    model = tokenizers.models.BPE(known.encoder, [*known.bpe_ranks], end_of_word_suffix="</w>")
    bpe = tokenizers.Tokenizer(model)
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.add_special_tokens(["<start_of_text>", "<end_of_text>"])
    return bpe, known.pat.pattern


class Tokenizer(inputs.Tokenizer):
    """`inputs.Tokenizer` for PyTorch."""

    def __call__(self, texts, context_length=None):
        return torch.from_numpy(super().__call__(texts, context_length))


@cache  # it reads a vocabulary, and remembers words
def tokenizer(context_length=CONTEXT):
    """-> tokenizer(texts) -> LongTensor (B, context_length); truncates, keeps the end token."""
    return Tokenizer(*byte_pairs(), context_length)


def first_difference(text, changed):
    """Position of the first token in which two texts differ, if any; the start token is 0."""
    tokens = zip_longest(*map(tokenizer().encode, (text, changed)))
    return next((i for i, (a, b) in enumerate(tokens, start=1) if a != b), None)


def stretch_positions(weight, length=CONTEXT, keep=20, mode="longclip"):
    """Stretch positions P (n, d) to (length, d) as Long-CLIP (ECCV 2024, section 3.2) does.

    mode="longclip", its code: row keep + 4i + j is (1 - j/4) P[keep+i] + (j/4) P[keep+i+1] for 77
    to 248, extrapolated at the end. mode="exact": rows 0..keep-2 stay, and the last row is P[n-1].
    """
    rows = weight.shape[0]
    if mode not in ("longclip", "exact"):
        raise ValueError(f"stretch mode {mode!r} is unknown: use 'longclip' or 'exact'")
    if not 1 <= keep < rows or (length - keep) % (rows - keep):
        raise ValueError(f"cannot stretch {rows} - {keep} positions evenly to {length} - {keep}")
    start, factor = keep - (mode == "exact"), (length - keep) // (rows - keep)
    place = start + torch.arange(length - start, dtype=torch.float64) / factor  # in the old table
    low = place.floor().long().clamp(max=rows - 2)
    share = (place - low).to(weight).unsqueeze(1)  # above 1 beyond the last row: extrapolates
    return torch.cat([weight[:start], (1 - share) * weight[low] + share * weight[low + 1]])


class TextTower(nn.Module):
    """A subclass has token_embedding, positional_embedding and `encode(x, end)`.

    trims: padding has no influence, so it is cut; otherwise every text costs the whole context.
    """

    def forward(self, tokens):
        """Tokens (B, up to context_length), 0-padded -> features (B, output_dim)."""
        shape, longest = tuple(tokens.shape), self.context_length
        if shape[1] > longest:
            raise ValueError(f"tokens of shape {shape}: this model reads (B, up to {longest})")
        if not len(tokens):
            return self.text_projection.new_empty(0, self.text_projection.shape[1])
        positions = self.positional_embedding
        if self.trims and not tokens[:, 0].all():  # padding in front has no influence either
            start = (tokens.cumsum(dim=1) == 0).sum(dim=1, keepdim=True)  # (B, 1)
            places = (torch.arange(shape[1], device=tokens.device) + start) % shape[1]  # (B, L)
            tokens, positions = tokens.gather(1, places), positions[places]  # text first, (B, L, d)
        end = tokens.argmax(dim=1)  # (B, L) -> (B,)
        length = int(end.max()) + 1 if self.trims else longest
        tokens = F.pad(tokens, (0, length - shape[1]))  # cuts where this is negative
        # One look-up for all groups: the gradient of each would be as large as the vocabulary.
        x = self.token_embedding(tokens) + positions[..., :length, :]  # (B, L, d)
        return self.encode_batch(x, end) if self.trims else self.encode(x, end)

    def encode_batch(self, x, end):
        """`encode` by groups, each cut to its longest caption: half the padding goes."""
        groups = length_groups(end)
        features = [self.encode(x[g, : int(end[g[-1]]) + 1], end[g]) for g in groups]
        return torch.cat(features)[torch.cat(groups).argsort()]


def length_groups(end, rows=32):
    """Row numbers, shortest caption first, in groups that fit a CPU's cache; one group on a GPU."""
    return end.argsort().split(rows if end.device.type == "cpu" else len(end))


def real_tokens(x, end):
    """Mask (B, L) of the places of x (B, L, ...) up to the end token."""
    return torch.arange(x.shape[1], device=x.device) <= end.unsqueeze(1)


def pack(x, end, gap):
    """Captions (B, L, d) in one sequence (1, T, d), without padding but with gaps.

    a . . . .
    b c . . .    gap 2:  a _ _ b c _ _ d e f g h _ _
    d e f g h
    """
    x = F.pad(x, (0, 0, 0, gap))  # (B, L, d) -> (B, L + gap, d)
    x = x[real_tokens(x, end + gap)].unsqueeze(0)  # -> (1, t, d)
    return F.pad(x, (0, 0, 0, -x.shape[1] % MULTIPLE.get(x.device.type, 1)))  # -> (1, T, d)


def attend(block, x, mask=None, at=None, causal=False):
    """open_clip's layer `block` on x (B, L, d), where the places of mask (B, L) may be attended,
    at the places `at` (B, w) -> (B, w, d), or at all -> (B, L, d)."""
    weight, bias, width = block.attn.in_proj_weight, block.attn.in_proj_bias, x.shape[2]
    h = block.ln_1(x)
    if at is None:
        q, k, v = F.linear(h, weight, bias).chunk(3, dim=2)  # (B, L, d) each
    else:  # not len(x) rows: an export would fix their number
        rows = torch.arange(x.shape[0], device=x.device).unsqueeze(1)  # (B, 1)
        q = F.linear(h[rows, at], weight[:width], bias[:width])  # (B, w, d)
        k, v = F.linear(h, weight[width:], bias[width:]).chunk(2, dim=2)
        x = x[rows, at]
    # (B, L, d) -> (B, heads, L, d / heads)
    q, k, v = (y.unflatten(2, (block.attn.num_heads, -1)).transpose(1, 2) for y in (q, k, v))
    mask = None if mask is None else mask[:, None, None, :]
    if torch.compiler.is_exporting() and not causal:  # as a third of the operators
        scores = (q * q.shape[3] ** -0.5) @ k.transpose(2, 3)  # (B, heads, w, L)
        scores = scores if mask is None else scores + torch.where(mask, 0.0, -torch.inf)
        y = scores.softmax(dim=3) @ v
    else:
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal)
    x = x + block.attn.out_proj(y.transpose(1, 2).flatten(2))  # -> (B, w, d)
    return x + block.mlp(block.ln_2(x))


class TransformerText(TextTower, TextTransformer):
    """open_clip's text transformer; computes its last layer at the end token only."""

    def __init__(self, mask_padding=False, **args):
        super().__init__(**args)
        self.causal = self.attn_mask is not None
        self.attn_mask = None  # `attend` masks
        self.trims = mask_padding or self.causal  # a causal tower never sees padding

    def encode(self, x, end):
        *layers, last = self.transformer.resblocks
        mask = real_tokens(x, end) if self.trims else None
        for layer in layers:
            x = attend(layer, x, None if self.causal else mask, causal=self.causal)
        x = attend(last, x, mask, end.unsqueeze(1)).squeeze(1)  # (B, L, d) -> (B, d)
        return self.ln_final(x) @ self.text_projection


class TokenBatchNorm(nn.BatchNorm1d):
    """Batch norm of (B, L, d) with the statistics of real tokens; its output at padding is void."""

    def forward(self, x, mask=None):
        if mask is None or not self.training:
            return super().forward(x.flatten(0, 1)).view_as(x)
        x, real = x.to(self.weight), mask.unsqueeze(2).to(self.weight)  # (B, L, 1); from bfloat16
        n = mask.sum()  # masked sums are twice as fast as x[mask]
        mean = (x * real).sum((0, 1)) / n  # (d,)
        centred = (x - mean) * real
        variance = centred.square().sum((0, 1)) / n
        if self.track_running_stats:
            with torch.no_grad():
                self.num_batches_tracked += 1
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(variance * n / (n - 1).clamp(min=1), self.momentum)
        return torch.addcmul(self.bias, centred, self.weight * (variance + self.eps).rsqrt())

    def fold(self, kernel):
        """Convolution `kernel` (d, 1, 1, k) and the norm after it as one -> kernel, bias (d,)."""
        factor = self.weight / (self.running_var + self.eps).sqrt()
        return kernel * factor.view(-1, 1, 1, 1), self.bias - self.running_mean * factor


class TokenConv(nn.Conv2d):
    """Depthwise convolution over tokens. 2-D, as (B, L, d) is a channels-last image (d, 1, L)."""

    def __init__(self, width, kernel_size):
        super().__init__(width, width, (1, kernel_size), groups=width, bias=False)
        self.half = kernel_size // 2

    def forward(self, x, mask=None, pad=True):
        """(B, L, d), padding zeroed -> (B, L, d), or without `pad` (B, L - 2 half, d)."""
        x = x if mask is None else x * mask.unsqueeze(2)
        x = x.unsqueeze(1).permute(0, 3, 1, 2)  # (B, L, d) -> (B, d, 1, L)
        x = F.conv2d(x, self.weight, self.bias, 1, (0, self.half * pad), groups=self.groups)
        return x.permute(0, 2, 3, 1).squeeze(1)


class RepMixerBlock(nn.Module):
    """Token mixing, then a ConvFFN, both with layer scale (FastViT, Vasu et al., ICCV 2023).

    Mixing is x + s (BN(x) + BN(conv(x)) - BN(x)), equation 2; after `fold` one convolution.
    """

    def __init__(self, width, kernel_size=11):
        super().__init__()
        self.conv = TokenConv(width, kernel_size)
        self.conv_norm, self.skip_norm, self.norm = (TokenBatchNorm(width) for _ in range(3))
        self.mixer_scale = nn.Parameter(torch.full((width,), 0.3))
        self.ffn_conv = TokenConv(width, kernel_size)
        self.ffn_norm = TokenBatchNorm(width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.ffn_scale = nn.Parameter(torch.full((width,), 0.3))
        self.folded = False

    def forward(self, x, mask=None, pad=True):
        """x (B, L, d), mask (B, L) -> (B, L, d), or without `pad` the inner (B, L - 4 half, d)."""
        inner = slice(None) if pad else slice(self.conv.half, -self.conv.half)
        mixed, x = self.conv(x, mask, pad), x[:, inner]
        mask = None if mask is None else mask[:, inner]
        if not self.folded:
            branches = self.skip_norm(x, mask) + self.conv_norm(mixed, mask) - self.norm(x, mask)
            mixed = x + self.mixer_scale * branches
        y, x = self.ffn_conv(mixed, mask, pad), mixed[:, inner]
        if not self.folded:
            y = self.ffn_norm(y, mask)
        return x + self.ffn_scale * self.fc2(F.gelu(self.fc1(y)))

    @torch.no_grad()
    def fold(self):
        """Replace the branches by one convolution with the same outputs in evaluation mode."""
        identity = nn.init.dirac_(torch.empty_like(self.conv.weight), groups=self.conv.groups)
        kernel, bias = self.conv_norm.fold(self.conv.weight)
        skip, skip_bias = self.skip_norm.fold(identity)
        norm, norm_bias = self.norm.fold(identity)
        scale = self.mixer_scale.view(-1, 1, 1, 1)
        self.conv.weight = nn.Parameter(identity + scale * (kernel + skip - norm))
        self.conv.bias = nn.Parameter(self.mixer_scale * (bias + skip_bias - norm_bias))
        kernel, bias = self.ffn_norm.fold(self.ffn_conv.weight)
        self.ffn_conv.weight, self.ffn_conv.bias = nn.Parameter(kernel), nn.Parameter(bias)
        del self.conv_norm, self.skip_norm, self.norm, self.ffn_norm, self.mixer_scale
        self.folded = True


class HybridText(TextTower):
    """RepMixer block, attention layers, RepMixer block; mask_padding: padding has no influence."""

    def __init__(self, context_length, vocab_size, width, heads, layers, output_dim, mask_padding):
        super().__init__()
        self.context_length, self.trims = context_length, mask_padding
        self.token_embedding = nn.Embedding(vocab_size, width)
        self.positional_embedding = nn.Parameter(torch.empty(context_length, width))
        self.first = RepMixerBlock(width)
        self.layers = nn.ModuleList([ResidualAttentionBlock(width, heads) for _ in range(layers)])
        self.last = RepMixerBlock(width)
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.empty(width, output_dim))
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        nn.init.normal_(self.text_projection, std=width**-0.5)

    def encode_batch(self, x, end):
        """In training: RepMixer blocks on the batch as one sequence, attention on groups of it.

        Batch norm takes the statistics of all tokens then: evaluation fails with those of groups.
        """
        if not self.training:
            return super().encode_batch(x, end)
        gap, groups = self.first.conv.half, length_groups(end)  # a kernel cannot reach over the gap
        order, sizes = torch.cat(groups), [len(g) for g in groups]
        x, end = x[order], end[order]
        start = (end + 1 + gap).cumsum(0) - (end + 1 + gap)  # (B,), in the sequence
        real = pack(real_tokens(x, end).unsqueeze(2), end, gap).squeeze(2)  # (1, T)
        x = self.first(pack(x, end, gap), real)  # (B, L, d) -> (1, T, d)
        attended = []
        for s, e in zip(start.split(sizes), end.split(sizes), strict=True):
            y = x[0, s.unsqueeze(1) + torch.arange(int(e[-1]) + 1, device=x.device)]  # (b, l, d)
            mask = real_tokens(y, e)
            for layer in self.layers:
                y = attend(layer, y, mask)
            attended.append(pack(y, e, gap))  # (b, l, d) -> (1, t, d)
        x = self.last(torch.cat(attended, dim=1), real)[0, start + end]  # (1, T, d) -> (B, d)
        features = self.ln_final(x) @ self.text_projection  # (B, d)
        return features[order.argsort()]

    def encode(self, x, end):
        mask = real_tokens(x, end) if self.trims else None
        x = self.first(x, mask)
        for layer in self.layers[:-1]:
            x = attend(layer, x, mask)
        if self.training:  # batch norm needs every place
            x = self.last(attend(self.layers[-1], x, mask), mask)
            x = x[torch.arange(len(x), device=x.device), end]  # (B, L, d) -> (B, d)
        else:  # only the window from which the last block reaches the end token
            reach, final = 2 * self.last.conv.half, x.shape[1] - 1
            at = end.unsqueeze(1) + torch.arange(-reach, reach + 1, device=x.device)  # (B, w)
            inside = (at >= 0) & (at <= (end.unsqueeze(1) if self.trims else final))
            x = attend(self.layers[-1], x, mask, at.clamp(0, final))  # (B, L, d) -> (B, w, d)
            x = self.last(x, inside, pad=False).squeeze(1)  # (B, w, d) -> (B, d)
        return self.ln_final(x) @ self.text_projection
