"""Text side: tokenizer, position stretching, and the two text towers of this project.

`HybridText` is MobileCLIP-S0's tower (Vasu et al., CVPR 2024, section 4.1): a convolutional RepMixer block, attention
layers, a second RepMixer block. `CausalText` is CLIP's own tower as open_clip builds it. Both read the feature at the
end token, which has the highest id of all.
"""
import torch
import torch.nn.functional as F
from open_clip.tokenizer import SimpleTokenizer
from open_clip.transformer import TextTransformer
from torch import nn

CONTEXT = 248  # tokens that Long-CLIP reads, start and end token included


def tokenizer(context_length=CONTEXT):
    """CLIP's byte-pair tokenizer: `tokenizer(texts) -> LongTensor (B, context_length)`; truncates, keeps the end token."""
    return SimpleTokenizer(context_length=context_length)


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
        raise ValueError(f"cannot stretch {rows} positions to {length} with {keep} kept: "
                         f"{length - keep} is not a multiple of {rows - keep}")
    factor = (length - keep) // (rows - keep)
    start = keep if mode == "longclip" else keep - 1
    place = start + torch.arange(length - start, dtype=torch.float64) / factor  # where each new row lies in the old table
    low = place.floor().long().clamp(max=rows - 2)
    part = (place - low).to(weight).unsqueeze(1)  # above 1 beyond the last row: extrapolates
    return torch.cat([weight[:start], (1 - part) * weight[low] + part * weight[low + 1]])


def check_tokens(tokens, context_length):
    if tokens.ndim != 2 or tokens.shape[1] > context_length:
        raise ValueError(f"tokens of shape {tuple(tokens.shape)}: this model reads (B, up to {context_length}); "
                         "use jettclip.get_tokenizer(name)")


def embed(tower, tokens):
    """Tokens (B, L) -> their embeddings with positions (B, L, d), places of the end tokens (B,).

    The whole batch in one look-up: its gradient is as large as the vocabulary, so groups share it.
    """
    return tower.token_embedding(tokens) + tower.positional_embedding[:tokens.shape[1]], tokens.argmax(dim=1)


def at_end(x, end):
    """(B, L, d) at the end tokens -> (B, d)."""
    return x[torch.arange(len(x), device=x.device), end]


def trim(tokens):
    """Cut (B, L) to the longest caption of the batch: (B, longest)."""
    return tokens[:, :int(tokens.argmax(dim=1).max()) + 1]


def in_length_groups(encode, x, end, rows=32):
    """`encode(x, end)` on groups of `rows` captions of similar length, each cut to its longest -> features (B, d).

    x (B, L, d) are embedded tokens, end (B,) the places of the end tokens. Half the padding of a mixed batch goes, and
    a group's activations fit a CPU's cache. A GPU gets one group.
    """
    rows = rows if x.device.type == "cpu" else len(x)
    order = end.argsort()
    return torch.cat([encode(x[part, :int(end[part[-1]]) + 1], end[part]) for part in order.split(rows)])[order.argsort()]


class CausalText(TextTransformer):
    """CLIP's causal text tower. Padding comes after the end token, so cutting it to the longest caption is exact."""

    def forward(self, tokens):
        check_tokens(tokens, self.context_length)
        return in_length_groups(self.encode, *embed(self, trim(tokens)))

    def encode(self, x, end):
        length = x.shape[1]
        x = self.transformer(x, attn_mask=self.attn_mask[:length, :length])
        return self.ln_final(at_end(x, end)) @ self.text_projection


class TokenBatchNorm(nn.BatchNorm1d):
    """Batch norm of (B, L, d) over its real tokens: padding has no part in the statistics.

    In training these are the statistics of one length group (see `in_length_groups`).
    """

    def forward(self, x, mask=None):
        if mask is None or not self.training:
            return super().forward(x.flatten(0, 1)).view_as(x)
        real = super().forward(x[mask])  # (B, L, d) -> (real tokens, d)
        return torch.zeros_like(x, dtype=real.dtype).masked_scatter(mask.unsqueeze(2), real)


class TokenConv(nn.Conv1d):
    """Depthwise convolution over the tokens of (B, L, d); padding is zeroed first, so its length cannot matter."""

    def __init__(self, width, kernel_size, bias):
        super().__init__(width, width, kernel_size, padding=kernel_size // 2, groups=width, bias=bias)

    def forward(self, x, mask=None):
        if mask is not None:
            x = x * mask.unsqueeze(2)
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


class RepMixerBlock(nn.Module):
    """RepMixer (token mixing by convolution) and ConvFFN, both with layer scale; foldable into plain convolutions.

    In training: x + s (BN(x) + BN(conv(x)) - BN(x)), FastViT (Vasu et al., ICCV 2023), equation 2.
    After `fold`: one depthwise convolution.
    """

    def __init__(self, width, kernel_size=11, mlp_ratio=4, scale=0.3):
        super().__init__()
        self.conv = TokenConv(width, kernel_size, bias=False)
        self.conv_norm, self.skip_norm, self.norm = (TokenBatchNorm(width) for _ in range(3))
        self.mixer_scale = nn.Parameter(torch.full((width,), scale))
        self.ffn_conv = TokenConv(width, kernel_size, bias=False)
        self.ffn_norm = TokenBatchNorm(width)
        self.fc1 = nn.Linear(width, int(width * mlp_ratio))
        self.fc2 = nn.Linear(int(width * mlp_ratio), width)
        self.ffn_scale = nn.Parameter(torch.full((width,), scale))
        self.folded = False

    def forward(self, x, mask=None):
        if self.folded:
            x = self.conv(x, mask)
            y = self.ffn_conv(x, mask)
        else:
            branches = self.skip_norm(x, mask) + self.conv_norm(self.conv(x, mask), mask) - self.norm(x, mask)
            x = x + self.mixer_scale * branches
            y = self.ffn_norm(self.ffn_conv(x, mask), mask)
        return x + self.ffn_scale * self.fc2(F.gelu(self.fc1(y)))

    @torch.no_grad()
    def fold(self):
        """Replace the branches by one convolution with the same outputs (in evaluation mode). Safe to call twice."""
        if self.folded:
            return
        kernel, bias = fold_batch_norm(self.conv.weight, self.conv_norm)
        identity = torch.zeros_like(kernel)
        identity[:, :, kernel.shape[2] // 2] = 1
        skip, skip_bias = fold_batch_norm(identity, self.skip_norm)
        norm, norm_bias = fold_batch_norm(identity, self.norm)
        scale = self.mixer_scale.view(-1, 1, 1)
        self.conv.weight = nn.Parameter(identity + scale * (kernel + skip - norm))
        self.conv.bias = nn.Parameter(self.mixer_scale * (bias + skip_bias - norm_bias))
        kernel, bias = fold_batch_norm(self.ffn_conv.weight, self.ffn_norm)
        self.ffn_conv.weight, self.ffn_conv.bias = nn.Parameter(kernel), nn.Parameter(bias)
        del self.conv_norm, self.skip_norm, self.norm, self.ffn_norm, self.mixer_scale
        self.folded = True


def fold_batch_norm(kernel, norm):
    """Kernel (d, 1, k) of a convolution and the batch norm after it -> kernel (d, 1, k) and bias (d,) of both in one."""
    factor = norm.weight / (norm.running_var + norm.eps).sqrt()
    return kernel * factor.view(-1, 1, 1), norm.bias - norm.running_mean * factor


class AttentionBlock(nn.Module):
    """Pre-norm multi-head attention and MLP."""

    def __init__(self, width, heads, mlp_ratio=4):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, int(width * mlp_ratio)), nn.Linear(int(width * mlp_ratio), width)

    def forward(self, x, mask=None):
        q, k, v = self.qkv(self.norm1(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # 3 x (B, h, L, d/h)
        if mask is not None:
            mask = mask[:, None, None, :]  # (B, L) -> (B, 1, 1, L): keys that may be attended
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.proj(y.transpose(1, 2).flatten(2))  # (B, h, L, d/h) -> (B, L, d)
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class HybridText(nn.Module):
    """RepMixer block, `layers` attention layers, RepMixer block; bidirectional.

    mask_padding=True ("length_aware"): padding is masked in attention and zeroed before every convolution, so the
    padding can be cut to the longest caption and cost follows length. False ("stretched"): padding is attended, as
    MobileCLIP-S0 does, and every text costs what `context_length` tokens cost.
    """

    def __init__(self, context_length=CONTEXT, vocab_size=49408, width=512, heads=8, layers=4, output_dim=512,
                 kernel_size=11, mask_padding=True):
        super().__init__()
        self.context_length, self.mask_padding = context_length, mask_padding
        self.token_embedding = nn.Embedding(vocab_size, width)
        self.positional_embedding = nn.Parameter(torch.empty(context_length, width))
        self.blocks = nn.ModuleList([RepMixerBlock(width, kernel_size),
                                     *(AttentionBlock(width, heads) for _ in range(layers)),
                                     RepMixerBlock(width, kernel_size)])
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.empty(width, output_dim))
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        nn.init.normal_(self.text_projection, std=width ** -0.5)

    def forward(self, tokens):
        check_tokens(tokens, self.context_length)
        if self.mask_padding:
            return in_length_groups(self.encode, *embed(self, trim(tokens)))
        return self.encode(*embed(self, F.pad(tokens, (0, self.context_length - tokens.shape[1]))))

    def encode(self, x, end):
        mask = None
        if self.mask_padding:
            mask = torch.arange(x.shape[1], device=x.device) <= end.unsqueeze(1)  # (B, L)
        for block in self.blocks:
            x = block(x, mask)
        return self.ln_final(at_end(x, end)) @ self.text_projection

    def fold(self):
        for block in self.blocks:
            if isinstance(block, RepMixerBlock):
                block.fold()
