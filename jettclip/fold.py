"""Fold an image tower of timm for inference: the same outputs from fewer, faster layers."""

import torch
from timm.layers import BatchNormAct2d
from timm.models.fastvit import LayerScale2d
from timm.utils import reparameterize_model
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

# Layer scales of timm's FastViT, and the layers before them.
SCALED = {"layer_scale": "mlp.fc2", "layer_scale_1": "token_mixer.proj", "layer_scale_2": "mlp.fc2"}


class Depthwise(nn.Module):
    """A convolution with n outputs for each input channel, as n depthwise ones: the outputs are the
    same, and OpenVINO takes a fifth of the time."""

    def __init__(self, conv):
        super().__init__()
        channels, n = conv.in_channels, conv.out_channels // conv.in_channels
        sizes = channels, channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation
        options = {"groups": channels, "bias": conv.bias is not None}
        self.parts = nn.ModuleList(nn.Conv2d(*sizes, **options) for _ in range(n))
        for i, part in enumerate(self.parts):
            for name, weight in conv.named_parameters():
                setattr(part, name, nn.Parameter(weight[i::n]))

    def forward(self, x):
        y = torch.cat([part(x) for part in self.parts], dim=1)  # (B, C, H, W) -> (B, n C, h, w)
        y = y.unflatten(1, (len(self.parts), -1))  # F.channel_shuffle, which Core ML does not know
        return y.transpose(1, 2).flatten(1, 2)


@torch.no_grad()
def fold_image(trunk):
    """A copy of the tower `trunk`, in which branches, batch norms and layer scales are folded, and
    convolutions with several outputs for each input channel are depthwise ones."""
    trunk = reparameterize_model(trunk)
    for module in trunk.modules():
        for name, scaled in SCALED.items():
            scale = getattr(module, name, None)
            if isinstance(scale, LayerScale2d):
                layer = module.get_submodule(scaled)
                layer.weight.mul_(scale.gamma.view(-1, *[1] * (layer.weight.ndim - 1)))
                layer.bias.mul_(scale.gamma.flatten())
                setattr(module, name, nn.Identity())
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Conv2d):
                conv = name
            elif isinstance(child, BatchNormAct2d):  # of the convolution before it
                setattr(module, conv, fuse_conv_bn_eval(getattr(module, conv), child))
                setattr(module, name, nn.Sequential(child.drop, child.act))
    for name, conv in list(trunk.named_modules()):
        if type(conv) is nn.Conv2d and conv.in_channels == conv.groups < conv.out_channels:
            trunk.set_submodule(name, Depthwise(conv))
    return trunk
