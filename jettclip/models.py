"""Names -> models. Every model has `encode_image`, `encode_text` and a logit scale, as open_clip's do.

    model, preprocess_train, preprocess_val = jettclip.create_model_and_transforms("JettCLIP-T", pretrained="runs/.../student")
    tokenizer = jettclip.get_tokenizer("JettCLIP-T")
    features = model.encode_text(tokenizer(["a long description ..."]), normalize=True)

A configuration is open_clip's `model_cfg` with three more keys: `text_tower`, `preprocess`, and in `text_cfg` the flags
`hybrid` and `mask_padding` of our own towers.
"""

import copy
import math
from pathlib import Path

import open_clip
import timm
import torch
import torch.nn.functional as F
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from open_clip.transformer import QuickGELU, VisionTransformer
from safetensors.torch import load_file
from timm.layers import BatchNormAct2d, ConvNormAct
from timm.models import register_model
from timm.models.fastvit import AttentionBlock, LayerScale2d, RepMixerBlock, fastvit_mci0
from timm.models.vision_transformer_hybrid import vit_base_mci_224
from timm.utils import reparameterize_model
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.transforms import v2

from . import checkpoints
from .text import CONTEXT, HybridText, TransformerText, tokenizer
from .utils import nearest


@register_model
def fastvit_jett(pretrained=False, **sizes):
    """A FastViT of MobileCLIP's MCi0 family cut to 0.7 million parameters, under this name in timm's registry."""
    return fastvit_mci0(
        **{
            "layers": [1, 1, 2, 1],
            "embed_dims": [24, 48, 96, 192],
            "layer_scale_init_value": 0.3,
            **sizes,
        }
    )


@register_model
def vit_base_mci_apple(pretrained=False, **sizes):
    """MobileCLIP-B's image tower as Apple's own files want it; timm's pads the first convolution otherwise (0, not 1)."""
    trunk = vit_base_mci_224(**sizes)
    trunk.patch_embed.backbone[0].conv.padding = (1, 1)
    for module in trunk.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-5
    return trunk


PLAIN = {
    "mean": [0.0] * 3,
    "std": [1.0] * 3,
    "interpolation": "bilinear",
}  # MobileCLIP: [0, 1] and no more
OPENAI = {
    "mean": list(OPENAI_DATASET_MEAN),
    "std": list(OPENAI_DATASET_STD),
    "interpolation": "bicubic",
}
LONGCLIP_TEXT = {"width": 512, "heads": 8, "layers": 12}  # the text tower of Long-CLIP-B
PIXELS_AT_ONCE = 4 * 256**2  # in evaluation on a CPU: the activations of more do not fit its cache
TEXT_TOWERS = ("length_aware", "stretched", "longclip")


def _miniature(embed_dims, width, heads):
    return {
        "embed_dim": 128,
        "vision_cfg": {
            "timm_model_name": "fastvit_jett",
            "timm_pool": "avg",
            "timm_proj": None,
            "image_size": 64,
            "layers": [1, 1, 2, 1],
            "embed_dims": embed_dims,
        },
        "text_cfg": {
            "context_length": CONTEXT,
            "vocab_size": 49408,
            "width": width,
            "heads": heads,
            "layers": 2,
            "hybrid": True,
            "mask_padding": True,
        },
        "text_tower": "length_aware",
        "preprocess": PLAIN,
    }


def _mobileclip(name):
    """open_clip's configuration of a MobileCLIP, whose S0 has its own text tower and the image tower of MobileCLIP2-S0."""
    config = open_clip.get_model_config("MobileCLIP2-S0" if name == "MobileCLIP-S0" else name)
    if name == "MobileCLIP-S0":
        config["text_cfg"] = {
            "context_length": 77,
            "vocab_size": 49408,
            "width": 512,
            "heads": 8,
            "layers": 4,
            "hybrid": True,
        }
    preprocess = (
        PLAIN if name[-2:] in ("S0", "S1", "S2", "-B") else {**OPENAI, "interpolation": "bilinear"}
    )
    return {
        **config,
        "text_tower": "stretched",
        "preprocess": {**preprocess, "interpolation": "bicubic"}
        if name == "MobileCLIP2-L-14"
        else preprocess,
    }


def _longclip(name):
    config = open_clip.get_model_config(name)
    config["text_cfg"]["context_length"] = CONTEXT
    return {**config, "text_tower": "longclip", "preprocess": OPENAI}


MODELS = {
    "JettCLIP-T": _miniature([24, 48, 96, 192], 96, 3),
    # The miniature teacher. From scratch, transformers learn too little from thousands of images: a ViT next to
    # nothing, a causal text transformer a bag of words. Convolutions in both towers bind what stands side by side.
    "LongCLIP-T": _miniature([32, 64, 128, 256], 128, 4),
    "LongCLIP-B": _longclip("ViT-B-16-quickgelu"),
    "LongCLIP-L": _longclip("ViT-L-14-quickgelu"),
    **{f"MobileCLIP-{size}": _mobileclip(f"MobileCLIP-{size}") for size in ("S0", "S1", "S2", "B")},
    **{
        name: _mobileclip(name)
        for name in open_clip.list_models()
        if name.startswith("MobileCLIP2-")
    },
}
for _size in ("S0", "S1", "S2", "B"):
    _config = copy.deepcopy(MODELS[f"MobileCLIP-{_size}"])
    _config["text_cfg"] |= {"context_length": CONTEXT} | (
        {} if _size == "B" else {"mask_padding": True}
    )
    MODELS[f"JettCLIP-{_size}"] = {**_config, "text_tower": "length_aware"}


class CLIP(nn.Module):
    """An image tower, a text tower and the logarithm of the logit scale; losses live in `jettclip.losses`."""

    def __init__(self, config, name):
        super().__init__()
        self.config, self.name, self.folded = config, name, False
        self.visual = image_tower(config)
        self.text = text_tower(config)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    @property
    def image_size(self):
        return self.config["vision_cfg"]["image_size"]

    @property
    def context_length(self):
        return self.config["text_cfg"]["context_length"]

    def encode_image(self, image, normalize=False):
        """Images (B, 3, image_size, image_size) from the model's own transform -> features (B, embed_dim)."""
        whole = self.training or image.device.type != "cpu"
        images = len(image) if whole else max(1, PIXELS_AT_ONCE // image[0, 0].numel())
        features = torch.cat([self.visual(part) for part in image.split(images)])
        return F.normalize(features, dim=1) if normalize else features

    def encode_text(self, tokens, normalize=False):
        """Tokens (B, up to context_length), 0-padded -> features (B, embed_dim), read at the end token."""
        features = self.text(tokens)
        return F.normalize(features, dim=1) if normalize else features

    def forward(self, image, tokens):
        """-> normalised image features, normalised text features (both (B, embed_dim)), logit scale."""
        return (
            self.encode_image(image, True),
            self.encode_text(tokens, True),
            self.logit_scale.exp(),
        )


class StridedPointwise(nn.Conv2d):
    """A strided 1 x 1 convolution that leaves out pixels first. The same numbers, without a bug: for a few channels in the
    channels-last format, oneDNN's backward pass of the strided one writes where it must not, and crashes (its issue 6035)."""

    def forward(self, x):
        return F.conv2d(
            x[:, :, :: self.stride[0], :: self.stride[1]],
            self.weight,
            self.bias,
            groups=self.groups,
        )


class TimmImage(nn.Module):
    """A timm model as image tower; named as in open_clip's TimmModel, so that state dicts agree."""

    def __init__(self, name, embed_dim, pool, **sizes):
        super().__init__()
        self.trunk = timm.create_model(name, num_classes=embed_dim, global_pool=pool, **sizes)
        for module in self.trunk.modules():
            if (
                type(module) is nn.Conv2d
                and module.kernel_size == (1, 1)
                and module.stride != (1, 1)
                and module.in_channels < 16
            ):
                module.__class__ = StridedPointwise  # in the stem

    def forward(self, image):
        return self.trunk(image)  # (B, 3, H, W) -> (B, embed_dim)


def image_tower(config):
    vision, activation = config["vision_cfg"], QuickGELU if config.get("quick_gelu") else nn.GELU
    if "timm_model_name" in vision:
        sizes = {key: vision[key] for key in ("layers", "embed_dims") if key in vision}
        return TimmImage(
            vision["timm_model_name"], config["embed_dim"], vision["timm_pool"], **sizes
        )
    return VisionTransformer(
        mlp_ratio=4,
        heads=vision["width"] // 64,
        output_dim=config["embed_dim"],
        act_layer=activation,
        **vision,
    )


def text_tower(config):
    args = dict(config["text_cfg"], output_dim=config["embed_dim"])
    if args.pop("hybrid", False):
        return HybridText(**{"mask_padding": False, **args})
    return TransformerText(act_layer=QuickGELU if config.get("quick_gelu") else nn.GELU, **args)


def list_models():
    """Names that `create_model` knows."""
    return sorted([*MODELS, "LongCLIP"])


def model_config(name, text_tower=None, **overrides):
    """The configuration of model `name` (a nested dictionary), with single sizes overridden by `overrides`.

    Overrides are named as in open_clip's files: embed_dim, image_size, context_length, text_width, ...
    (a `vision_` or `text_` prefix picks the tower where both have the size).
    """
    if name not in MODELS:
        raise ValueError(nearest(name, list_models(), "model"))
    config = copy.deepcopy(MODELS[name])
    if text_tower is not None:
        _set_text_tower(name, config, text_tower)
    places = {"embed_dim": (config, "embed_dim")}
    for prefix in ("vision", "text"):
        part = config[f"{prefix}_cfg"]
        places |= {f"{prefix}_{key}": (part, key) for key in part if not key.startswith("timm_")}
    places |= {
        "image_size": places["vision_image_size"],
        "context_length": places["text_context_length"],
    }
    for key, value in overrides.items():
        if key not in places:
            raise ValueError(nearest(key, places, f"override of {name}"))
        part, place = places[key]
        part[place] = value
    return config


def _set_text_tower(name, config, tower):
    if tower not in TEXT_TOWERS:
        raise ValueError(nearest(tower, TEXT_TOWERS, "text tower"))
    if tower != config["text_tower"] and not name.startswith("JettCLIP"):
        raise ValueError(
            f"{name} has its published text tower, {config['text_tower']}; the students (JettCLIP-...) have a choice"
        )
    text = config["text_cfg"]
    causal = not text.get("hybrid") and not text.get("no_causal_mask")
    if not causal:  # a causal tower never sees padding: stretched and length-aware are one
        text["mask_padding"] = tower == "length_aware"
    if tower == "longclip":
        for key in ("hybrid", "no_causal_mask", "mask_padding"):
            text.pop(key, None)
        config["quick_gelu"] = True
        if name != "JettCLIP-T":
            text |= LONGCLIP_TEXT
    config["text_tower"] = tower


def create_model(
    name, pretrained=None, device="cpu", text_tower=None, stretch="longclip", **overrides
):
    """Build model `name` with random weights, or with those of `pretrained`, in evaluation mode then.

    pretrained: a run folder or a file that the originals publish: Long-CLIP's and Apple's .pt, open_clip's safetensors,
    "openai:ViT-B-16.pt" for OpenAI's TorchScript archives, or {"image": file, "text": file} for towers of two origins.
    Positions of a 77-token file are stretched (`text.stretch_positions`, mode `stretch`) where the model reads more.
    text_tower: "length_aware", "stretched" or "longclip" (students only); overrides: see `model_config`.
    A run folder brings its own sizes; a model name or setting that contradicts them is refused.
    """
    if checkpoints.is_run_folder(pretrained):
        model = load_folder(pretrained)
        asked = {"text_tower": text_tower, **overrides}
        if (
            model.name != name
            or any(v is not None for v in asked.values())
            and model.config != model_config(name, text_tower, **overrides)
        ):
            raise ValueError(
                f"{pretrained} holds {model.name} with {model.config}, not {name} with {asked}: "
                "ask for what it holds, or train anew"
            )
        return model.to(device)
    state = None if pretrained is None else checkpoints.read_state(pretrained)
    if name == "LongCLIP":
        if state is None:
            raise ValueError(
                "LongCLIP has the sizes of its file: name one with pretrained=, or ask for LongCLIP-B or LongCLIP-L"
            )
        config = {**MODELS["LongCLIP-B"], **checkpoints.longclip_sizes(state)}
    else:
        config = model_config(name, text_tower, **overrides)
    if state is not None and checkpoints.is_apple_vit(state):
        config["vision_cfg"]["timm_model_name"] = "vit_base_mci_apple"
    model = CLIP(config, name)
    if state is not None:
        checkpoints.fill(model, state, pretrained, stretch)
        model.eval()
    return model.to(device)


def load_folder(folder):
    """The model of a folder that `save_folder` wrote, in evaluation mode."""
    saved = checkpoints.folder_config(folder)["jettclip"]
    model = CLIP(saved["config"], saved["name"])
    checkpoints.fill(model, load_file(Path(folder) / checkpoints.WEIGHTS), folder)
    return model.eval()


def transforms(config):
    """(train, validation) transforms: PIL image or uint8 tensor -> float tensor (3, S, S), scaled as `config` says."""
    size, preprocess = config["vision_cfg"]["image_size"], config["preprocess"]
    resize = {"interpolation": v2.InterpolationMode(preprocess["interpolation"]), "antialias": True}
    end = [
        v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True),
    ]  # RGB comes first: it knows PIL's modes
    if preprocess["mean"] != PLAIN["mean"] or preprocess["std"] != PLAIN["std"]:
        end.append(v2.Normalize(preprocess["mean"], preprocess["std"]))
    train = v2.Compose([v2.RGB(), v2.RandomResizedCrop(size, scale=(0.6, 1.0), **resize), *end])
    val = v2.Compose([v2.RGB(), v2.Resize(size, **resize), v2.CenterCrop(size), *end])
    return train, val


def create_model_and_transforms(
    name, pretrained=None, device="cpu", text_tower=None, stretch="longclip", **overrides
):
    """-> (model, preprocess_train, preprocess_val), as open_clip's function of the same name."""
    model = create_model(name, pretrained, device, text_tower, stretch, **overrides)
    return model, *transforms(model.config)


def get_tokenizer(name, context_length=None):
    """-> tokenizer(texts) -> LongTensor (B, L) with the context length of model `name` (or the one given)."""
    if name == "LongCLIP":
        return tokenizer(context_length or CONTEXT)
    return tokenizer(context_length or model_config(name)["text_cfg"]["context_length"])


def reparameterize(model):
    """A new model in evaluation mode with the same outputs, its foldable branches folded; `model` stays as it is.

    Image: RepMixer, MobileOne, large-kernel and positional branches (timm folds these) the batch norm of every
    other convolution, and layer scales; in the channels-last format. Text: RepMixer blocks.
    """
    model = copy.deepcopy(model).eval()
    if model.folded:  # timm cannot fold twice
        return model
    model.folded = True
    if isinstance(model.visual, TimmImage):
        model.visual.trunk = _fold_image(model.visual.trunk).to(memory_format=torch.channels_last)
    if isinstance(model.text, HybridText):
        model.text.fold()
    return model


def _fold_image(trunk):
    trunk = reparameterize_model(trunk)
    for module in trunk.modules():
        if isinstance(module, RepMixerBlock):
            _fold_scale(module, "layer_scale", module.mlp.fc2)
        elif isinstance(module, AttentionBlock):
            _fold_scale(module, "layer_scale_1", module.token_mixer.proj)
            _fold_scale(module, "layer_scale_2", module.mlp.fc2)
        if isinstance(module, ConvNormAct) and isinstance(module.bn, BatchNormAct2d):
            module.conv = fuse_conv_bn_eval(module.conv, module.bn)
            module.bn = nn.Sequential(module.bn.drop, module.bn.act)
    return trunk


@torch.no_grad()
def _fold_scale(block, name, layer):
    """Multiply the layer scale `name` of `block` into `layer`, which it follows."""
    scale = getattr(block, name)
    if isinstance(scale, LayerScale2d):
        layer.weight.mul_(scale.gamma.view(-1, *[1] * (layer.weight.ndim - 1)))
        layer.bias.mul_(scale.gamma.flatten())
        setattr(block, name, nn.Identity())
