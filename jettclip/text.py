"""Text side: tokenizer, position stretching, and the two kinds of text tower.

`HybridText` is MobileCLIP-S0's tower (Vasu et al., CVPR 2024, section 4.1): a convolutional RepMixer block, attention
layers, a second RepMixer block. `TransformerText` is open_clip's transformer: causal in CLIP, Long-CLIP and
MobileCLIP-B, bidirectional in MobileCLIP-S1 and S2. Both read the feature at the end token, which has the highest id
of all, and skip whatever cannot reach it: padding where it is masked, and most of the last layers.
"""

from functools import cache

import tokenizers
import torch
import torch.nn.functional as F
from open_clip.tokenizer import SimpleTokenizer
from open_clip.transformer import ResidualAttentionBlock, TextTransformer
from torch import nn

from .deploy import runtime

CONTEXT = 248  # tokens that Long-CLIP reads, start and end token included


@cache
def byte_pairs():
    """CLIP's byte pairs, from open_clip's vocabulary -> `tokenizers.Tokenizer`, pattern that splits words."""
    known = SimpleTokenizer()
    bpe = tokenizers.Tokenizer(
        tokenizers.models.BPE(known.encoder, list(known.bpe_ranks), end_of_word_suffix="</w>")
    )
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.add_special_tokens(["<start_of_text>", "<end_of_text>"])
    return bpe, known.pat.pattern


class Tokenizer(runtime.Tokenizer):
    """`runtime.Tokenizer` for PyTorch."""

    def __init__(self, context_length=CONTEXT):
        super().__init__(*byte_pairs(), context_length)

    def __call__(self, texts, context_length=None):
        return torch.from_numpy(super().__call__(texts, context_length))


def tokenizer(context_length=CONTEXT):
    """CLIP's byte-pair tokenizer: `tokenizer(texts) -> LongTensor (B, context_length)`; truncates, keeps the end token."""
    return Tokenizer(context_length)


def stretch_positions(weight, length=CONTEXT, keep=20, mode="longclip"):
    """Stretch a position table (n, d) to (length, d), leaving the first, best trained rows as they are.

    Long-CLIP (Zhang et al., ECCV 2024, section 3.2), knowledge-preserved stretching: rows beyond `keep` are spread
    4 times as wide and interpolated. The factor is (length - keep) / (n - keep), 4 for 77 -> 248.
    mode="longclip": as the published code does it: row keep + 4i + j = (1 - j/4) P[keep+i] + (j/4) P[keep+i+1], the
    last factor rows extrapolated beyond P[n-1]. mode="exact": rows 0..keep-2 kept, the rest interpolated so that the
    new last row is exactly P[n-1].
    """
    rows = weight.shape[0]
    if mode not in ("longclip", "exact"):
        raise ValueError(f"stretch mode {mode!r} is unknown: use 'longclip' or 'exact'")
    if not 1 <= keep < rows or (length - keep) % (rows - keep):
        raise ValueError(
            f"cannot stretch {rows} positions to {length} with {keep} kept: "
            f"{length - keep} is not a multiple of {rows - keep}"
        )
    factor = (length - keep) // (rows - keep)
    start = keep if mode == "longclip" else keep - 1
    place = (
        start + torch.arange(length - start, dtype=torch.float64) / factor
    )  # where each new row lies in the old table
    low = place.floor().long().clamp(max=rows - 2)
    part = (place - low).to(weight).unsqueeze(1)  # above 1 beyond the last row: extrapolates
    return torch.cat([weight[:start], (1 - part) * weight[low] + part * weight[low + 1]])


class TextTower(nn.Module):
    """What both towers share: a subclass has token_embedding, positional_embedding and `encode(x, end)`.

    trims: whether padding has no influence, so that it can be cut; otherwise every text costs `context_length` tokens.
    """

    def forward(self, tokens):
        """Tokens (B, up to context_length), 0-padded -> features (B, output_dim)."""
        if tokens.ndim != 2 or tokens.shape[1] > self.context_length:
            raise ValueError(
                f"tokens of shape {tuple(tokens.shape)}: this model reads (B, up to {self.context_length}); "
                "use jettclip.get_tokenizer(name)"
            )
        end = tokens.argmax(dim=1)
        if self.trims:
            tokens = tokens[:, : int(end.max()) + 1]
        else:
            tokens = F.pad(tokens, (0, self.context_length - tokens.shape[1]))
        # The whole batch in one look-up: the gradient of each is as large as the vocabulary.
        x = (
            self.token_embedding(tokens) + self.positional_embedding[: tokens.shape[1]]
        )  # (B, L) -> (B, L, d)
        return self.encode_batch(x, end)

    def encode_batch(self, x, end):
        return in_length_groups(self.encode, x, end) if self.trims else self.encode(x, end)


def length_groups(end, rows=32):
    """Row numbers of captions in order of their `end` (B,), in groups of `rows` of similar length. A GPU gets one group."""
    return end.argsort().split(rows if end.device.type == "cpu" else len(end))


def in_length_groups(encode, x, end, rows=32):
    """`encode(x, end)` on groups of `rows` captions of similar length, each cut to its longest -> features (B, d).

    x (B, L, d) are embedded tokens, end (B,) the places of the end tokens. Half the padding of a mixed batch goes, and
    a group's activations fit a CPU's cache.
    """
    groups = length_groups(end, rows)
    features = torch.cat([encode(x[part, : int(end[part[-1]]) + 1], end[part]) for part in groups])
    return features[torch.cat(groups).argsort()]


def pack(x, end, gap):
    """Captions (B, L, d) without their padding, one after another with `gap` places between them -> (1, T, d)."""
    used = torch.arange(x.shape[1] + gap, device=x.device) <= (end + gap).unsqueeze(1)
    return F.pad(x, (0, 0, 0, gap))[used].unsqueeze(0)


def real_tokens(x, end):
    """Mask (B, L) of the places up to the end token."""
    return torch.arange(x.shape[1], device=x.device) <= end.unsqueeze(1)


def take(x, at):
    """(B, L, d) at the places (B, w) -> (B, w, d)."""
    return x[
        torch.arange(x.shape[0], device=x.device).unsqueeze(1), at
    ]  # not len(x): it would fix the size in an export


def attend(block, x, mask=None, at=None, causal=False):
    """open_clip's transformer layer `block` on x (B, L, d), computed at the places `at` (B, w) only (default: all).

    mask (B, L): places that may be attended -> (B, w, d).
    """
    attention, width = block.attn, x.shape[2]
    heads, weight, bias = attention.num_heads, attention.in_proj_weight, attention.in_proj_bias
    h = block.ln_1(x)
    if at is None:
        q, k, v = (
            F.linear(h, weight, bias).unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        )  # 3 x (B, h, L, d/h)
    else:
        q = (
            F.linear(take(h, at), weight[:width], bias[:width])
            .unflatten(2, (heads, -1))
            .transpose(1, 2)
        )  # (B, h, w, d/h)
        k, v = (
            F.linear(h, weight[width:], bias[width:])
            .unflatten(2, (2, heads, -1))
            .permute(2, 0, 3, 1, 4)
        )
        x = take(x, at)
    y = F.scaled_dot_product_attention(
        q, k, v, None if mask is None else mask[:, None, None, :], is_causal=causal
    )
    x = x + attention.out_proj(y.transpose(1, 2).flatten(2))  # (B, h, w, d/h) -> (B, w, d)
    return x + block.mlp(block.ln_2(x))


class TransformerText(TextTower, TextTransformer):
    """open_clip's text transformer, with its arguments and state dict; the last layer is computed at the end token only.

    mask_padding: padding is masked (a causal tower never sees it).
    """

    def __init__(self, mask_padding=False, **args):
        super().__init__(**args)
        self.causal = self.attn_mask is not None
        self.attn_mask = None  # `attend` masks
        self.trims = mask_padding or self.causal

    def encode(self, x, end):
        *layers, last = self.transformer.resblocks
        mask = real_tokens(x, end) if self.trims else None
        for layer in layers:
            x = attend(layer, x, None if self.causal else mask, causal=self.causal)
        x = attend(last, x, mask, end.unsqueeze(1)).squeeze(1)  # (B, L, d) -> (B, d)
        return self.ln_final(x) @ self.text_projection


class TokenBatchNorm(nn.BatchNorm1d):
    """Batch norm of (B, L, d) over its real tokens: padding has no part in the statistics, and comes out as anything.

    Masked sums, not selected rows: gathering and scattering the real tokens takes twice as long.
    """

    def forward(self, x, mask=None):
        if mask is None or not self.training:
            return super().forward(x.flatten(0, 1)).view_as(x)
        real = mask.unsqueeze(2).to(x.dtype)  # (B, L) -> (B, L, 1)
        n = mask.sum()
        mean = (x * real).sum((0, 1)) / n  # (d,)
        centred = (x - mean) * real
        variance = centred.square().sum((0, 1)) / n
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * n / (n - 1), self.momentum)
        return torch.addcmul(self.bias, centred, self.weight * (variance + self.eps).rsqrt())


class TokenConv(nn.Conv2d):
    """Depthwise convolution over the tokens of (B, L, d); padding is zeroed first, so its length cannot matter.

    Two-dimensional over (d, 1, L), for then (B, L, d) is a channels-last image and needs no copy: 3 times as fast.
    """

    def __init__(self, width, kernel_size, bias=False):
        super().__init__(width, width, (1, kernel_size), groups=width, bias=bias)
        self.half = kernel_size // 2

    def forward(self, x, mask=None, pad=True):
        """-> (B, L, d), or without `pad` only the places that have a whole kernel, (B, L - kernel_size + 1, d)."""
        if mask is not None:
            x = x * mask.unsqueeze(2)
        x = x.transpose(1, 2).unsqueeze(2)  # (B, L, d) -> (B, d, 1, L)
        x = F.conv2d(
            x, self.weight, self.bias, padding=(0, self.half if pad else 0), groups=self.groups
        )
        return x.squeeze(2).transpose(1, 2)


class RepMixerBlock(nn.Module):
    """RepMixer (token mixing by convolution) and ConvFFN, both with layer scale; foldable into plain convolutions.

    In training: x + s (BN(x) + BN(conv(x)) - BN(x)), FastViT (Vasu et al., ICCV 2023), equation 2.
    After `fold`: one depthwise convolution.
    """

    def __init__(self, width, kernel_size=11, mlp_ratio=4, scale=0.3):
        super().__init__()
        self.conv = TokenConv(width, kernel_size)
        self.conv_norm, self.skip_norm, self.norm = (TokenBatchNorm(width) for _ in range(3))
        self.mixer_scale = nn.Parameter(torch.full((width,), scale))
        self.ffn_conv = TokenConv(width, kernel_size)
        self.ffn_norm = TokenBatchNorm(width)
        self.fc1 = nn.Linear(width, int(width * mlp_ratio))
        self.fc2 = nn.Linear(int(width * mlp_ratio), width)
        self.ffn_scale = nn.Parameter(torch.full((width,), scale))
        self.folded = False

    @property
    def reach(self):
        """How many tokens to each side an output depends on."""
        return 2 * self.conv.half

    def forward(self, x, mask=None, pad=True):
        """x (B, L, d), mask (B, L) of real tokens -> (B, L, d), or without `pad` the inner (B, L - 2 reach, d)."""

        def inner(x):
            return x if pad else x[:, self.conv.half : -self.conv.half]

        mixed, x = self.conv(x, mask, pad), inner(x)
        mask = None if mask is None else inner(mask)
        if self.folded:
            x = mixed
        else:
            x = x + self.mixer_scale * (
                self.skip_norm(x, mask) + self.conv_norm(mixed, mask) - self.norm(x, mask)
            )
        y, x = self.ffn_conv(x, mask, pad), inner(x)
        if not self.folded:
            y = self.ffn_norm(y, None if mask is None else inner(mask))
        return x + self.ffn_scale * self.fc2(F.gelu(self.fc1(y)))

    @torch.no_grad()
    def fold(self):
        """Replace the branches by one convolution with the same outputs (in evaluation mode). Safe to call twice."""
        if self.folded:
            return
        kernel, bias = fold_batch_norm(self.conv.weight, self.conv_norm)
        identity = torch.zeros_like(kernel)
        identity[..., self.conv.half] = 1
        skip, skip_bias = fold_batch_norm(identity, self.skip_norm)
        norm, norm_bias = fold_batch_norm(identity, self.norm)
        scale = self.mixer_scale.view(-1, 1, 1, 1)
        self.conv.weight = nn.Parameter(identity + scale * (kernel + skip - norm))
        self.conv.bias = nn.Parameter(self.mixer_scale * (bias + skip_bias - norm_bias))
        kernel, bias = fold_batch_norm(self.ffn_conv.weight, self.ffn_norm)
        self.ffn_conv.weight, self.ffn_conv.bias = nn.Parameter(kernel), nn.Parameter(bias)
        del self.conv_norm, self.skip_norm, self.norm, self.ffn_norm, self.mixer_scale
        self.folded = True


def fold_batch_norm(kernel, norm):
    """Kernel (d, 1, 1, k) of a convolution and the batch norm after it -> kernel and bias (d,) of both in one."""
    factor = norm.weight / (norm.running_var + norm.eps).sqrt()
    return kernel * factor.view(-1, 1, 1, 1), norm.bias - norm.running_mean * factor


class HybridText(TextTower):
    """RepMixer block, `layers` attention layers, RepMixer block; bidirectional.

    mask_padding=True ("length_aware"): padding is masked in attention and zeroed before every convolution, so the
    padding can be cut to the longest caption and cost follows length. False ("stretched"): padding is attended, as
    MobileCLIP-S0 does.
    """

    def __init__(
        self,
        context_length=CONTEXT,
        vocab_size=49408,
        width=512,
        heads=8,
        layers=4,
        output_dim=512,
        kernel_size=11,
        mask_padding=True,
    ):
        super().__init__()
        self.context_length, self.trims = context_length, mask_padding
        self.token_embedding = nn.Embedding(vocab_size, width)
        self.positional_embedding = nn.Parameter(torch.empty(context_length, width))
        self.first = RepMixerBlock(width, kernel_size)
        self.layers = nn.ModuleList([ResidualAttentionBlock(width, heads) for _ in range(layers)])
        self.last = RepMixerBlock(width, kernel_size)
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.empty(width, output_dim))
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        nn.init.normal_(self.text_projection, std=width**-0.5)

    def encode_batch(self, x, end):
        """In training the batch norms take the statistics of all tokens of the batch, as there is one set of them later.

        In length groups each would have its own: recall in training, and next to none in evaluation. So both RepMixer blocks
        see the captions packed into one sequence, whose gaps a kernel cannot reach over; attention goes by length groups.
        """
        if not (self.training and self.trims):
            return super().encode_batch(x, end)
        gap, groups = self.first.conv.half, length_groups(end)
        order = torch.cat(groups)
        places = end[order] + 1 + gap  # of each caption and the gap after it
        start = torch.empty_like(end).index_copy(
            0, order, places.cumsum(0) - places
        )  # (B,) where each caption begins
        real = pack(real_tokens(x, end)[order].unsqueeze(2), end[order], gap).squeeze(2)  # (1, T)
        packed = self.first(pack(x[order], end[order], gap), real)  # (B, L, d) -> (1, T, d)
        attended = []
        for part in groups:
            at = start[part].unsqueeze(1) + torch.arange(
                int(end[part[-1]]) + 1, device=x.device
            )  # (b, l)
            y, mask = packed[0, at], real_tokens(at, end[part])  # (1, T, d) -> (b, l, d)
            for layer in self.layers:
                y = attend(layer, y, mask)
            attended.append(pack(y, end[part], gap))
        packed = torch.cat(attended, dim=1)
        x = self.last(packed, real)[0, start + end]  # (1, T, d) -> (B, d)
        return self.ln_final(x) @ self.text_projection

    def encode(self, x, end):
        mask = real_tokens(x, end) if self.trims else None
        x = self.first(x, mask)
        for layer in self.layers[:-1]:
            x = attend(layer, x, mask)
        if self.training:
            x = take(self.last(attend(self.layers[-1], x, mask), mask), end.unsqueeze(1))
        else:  # only the window that the last block's convolutions can carry to the end token
            reach = self.last.reach
            at = end.unsqueeze(1) + torch.arange(
                -reach, reach + 1, device=x.device
            )  # (B, 2 reach + 1)
            inside = (at >= 0) & (at <= (end.unsqueeze(1) if self.trims else x.shape[1] - 1))
            window = attend(self.layers[-1], x, mask, at.clamp(0, x.shape[1] - 1))
            x = self.last(window, inside, pad=False)  # (B, 2 reach + 1, d) -> (B, 1, d)
        return self.ln_final(x.squeeze(1)) @ self.text_projection

    def fold(self):
        """Fold both RepMixer blocks."""
        self.first.fold()
        self.last.fold()
