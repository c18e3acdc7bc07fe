"""Names -> models with `encode_image`, `encode_text` and a logit scale, as open_clip's have.

    model, preprocess_train, preprocess_val = jettclip.create_model_and_transforms("JettCLIP-T")
    texts = jettclip.get_tokenizer("JettCLIP-T")(["a long description ..."])
    features = model.encode_text(texts, normalize=True)  # (1, 128)

A configuration is open_clip's `model_cfg` with `text_tower` and `preprocess`; its `text_cfg` has
the flags `hybrid` and `mask_padding` of our text towers.
"""

import copy
import math
from functools import partial
from pathlib import Path

import open_clip
import timm
import torch
import torch.nn.functional as F
from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from open_clip.transformer import QuickGELU, VisionTransformer
from timm.layers import LayerNorm
from timm.models import fastvit_mci0, register_model, vit_base_mci_224
from torch import nn
from torchvision.transforms import v2

from . import checkpoints, hub, openclip
from .fold import fold_image
from .inputs import read_photo
from .text import CONTEXT, HybridText, TransformerText, tokenizer
from .utils import absolute, nearest

TEXT_TOWERS = ("length_aware", "stretched", "longclip")
PIXELS_AT_ONCE = 4 * 256**2  # of a CPU in evaluation: the activations of more do not fit its cache

# MobileCLIP scales pixels to [0, 1] and does no more.
PLAIN = {"mean": [0.0] * 3, "std": [1.0] * 3, "interpolation": "bilinear"}
OPENAI = {"mean": [*OPENAI_DATASET_MEAN], "std": [*OPENAI_DATASET_STD], "interpolation": "bicubic"}
MOBILECLIP2 = OPENAI | {"interpolation": "bilinear"}  # S3, S4
LONG = {"context_length": CONTEXT}
MASKED = LONG | {"mask_padding": True}
HYBRID = {"hybrid": True, "layers": 4, "no_causal_mask": None}


def _tiny(embed_dims, width, heads):
    """Towers of a million parameters, with convolutions in both: from scratch, transformers learn
    too little from thousands of images, a causal text transformer no more than a bag of words."""
    vision = {"timm_model_name": "fastvit_jett", "timm_pool": "avg", "timm_proj": None}
    vision |= {"image_size": 64, "layers": [1, 1, 2, 1], "embed_dims": embed_dims}
    text = {"vocab_size": 49408, "width": width, "heads": heads, "layers": 2, "hybrid": True}
    config = {"embed_dim": 128, "vision_cfg": vision, "text_cfg": {**text, **MASKED}}
    return {**config, "text_tower": "length_aware", "preprocess": PLAIN}


def _open_clip(name, tower, preprocess=PLAIN, text=None):
    """open_clip's configuration `name` with `text` put into its text_cfg; None removes a key."""
    config = open_clip.get_model_config(name)
    text = config["text_cfg"] | (text or {})
    config["text_cfg"] = {key: value for key, value in text.items() if value is not None}
    return {**config, "text_tower": tower, "preprocess": preprocess}


LITE = {"timm_model_name": "tf_efficientnet_lite0", "timm_pool": "avg", "timm_proj": None}
LITE |= {"image_size": 128}

MODELS = {
    "JettCLIP-T": _tiny([24, 48, 96, 192], 96, 3),
    "JettCLIP-S0": _open_clip("MobileCLIP2-S0", "length_aware", PLAIN, HYBRID | MASKED),
    "JettCLIP-S1": _open_clip("MobileCLIP-S1", "length_aware", PLAIN, MASKED),
    "JettCLIP-S2": _open_clip("MobileCLIP-S2", "length_aware", PLAIN, MASKED),
    "JettCLIP-B": _open_clip("MobileCLIP-B", "length_aware", PLAIN, LONG),  # causal: needs no mask
    "JettCLIP-Lite": _tiny([], 128, 4)
    | {"vision_cfg": LITE, "embed_dim": 256, "preprocess": openclip.HALF},
    "LiT-Lite1": openclip.LIT1,
    "LiT-Lite2": openclip.LIT,
    "LongCLIP-T": _tiny([32, 64, 128, 256], 128, 4),
    "LongCLIP-B": _open_clip("ViT-B-16-quickgelu", "longclip", OPENAI, LONG),
    "LongCLIP-L": _open_clip("ViT-L-14-quickgelu", "longclip", OPENAI, LONG),
    "MobileCLIP-S0": _open_clip("MobileCLIP2-S0", "stretched", PLAIN, HYBRID),
    **{f"MobileCLIP-{x}": _open_clip(f"MobileCLIP-{x}", "stretched") for x in ("S1", "S2", "B")},
    **{f"MobileCLIP2-{x}": _open_clip(f"MobileCLIP2-{x}", "stretched") for x in ("S0", "S2", "B")},
    "MobileCLIP2-S3": _open_clip("MobileCLIP2-S3", "stretched", MOBILECLIP2),
    "MobileCLIP2-S4": _open_clip("MobileCLIP2-S4", "stretched", MOBILECLIP2),
    "MobileCLIP2-L-14": _open_clip("MobileCLIP2-L-14", "stretched", OPENAI),
}


def list_models():
    """Names that `create_model` knows."""
    return sorted([*MODELS, "LongCLIP"])


def model_config(name, text_tower=None, **sizes):
    """The configuration of model `name` (a nested dictionary) with other `sizes`: embed_dim,
    image_size, context_length, or open_clip's names with the tower: text_width, vision_layers."""
    if name not in MODELS:
        raise ValueError(nearest(name, list_models(), "model"))
    config = copy.deepcopy(MODELS[name])
    if text_tower is not None:
        _set_text_tower(name, config, text_tower)
    towers = {"vision": config["vision_cfg"], "text": config["text_cfg"]}
    places = {f"{tower}_{key}": (table, key) for tower, table in towers.items() for key in table}
    places["embed_dim"], places["image_size"] = (config, "embed_dim"), places["vision_image_size"]
    places["context_length"] = places["text_context_length"]
    for size, value in sizes.items():
        if size not in places:
            raise ValueError(nearest(size, places, f"size of {name}"))
        table, key = places[size]
        table[key] = value
    return config


def _set_text_tower(name, config, tower):
    published, text = config["text_tower"], config["text_cfg"]
    if tower not in TEXT_TOWERS:
        raise ValueError(nearest(tower, TEXT_TOWERS, "text tower"))
    if tower != published and not name.startswith("JettCLIP"):
        raise ValueError(f"{name} has its published text tower, {published}: choose a JettCLIP-...")
    config["text_tower"] = tower
    if tower == "longclip":
        config["quick_gelu"] = True
        text |= {} if name == "JettCLIP-T" else MODELS["LongCLIP-B"]["text_cfg"]
        for key in ("hybrid", "no_causal_mask", "mask_padding"):
            text.pop(key, None)
    elif "mask_padding" in text:
        text["mask_padding"] = tower == "length_aware"


@register_model
def fastvit_jett(pretrained=False, **sizes):
    """A FastViT of MobileCLIP's MCi0 family cut to 0.7 million parameters, in timm's registry."""
    tiny = {"layers": [1, 1, 2, 1], "embed_dims": [24, 48, 96, 192], "layer_scale_init_value": 0.3}
    return fastvit_mci0(**{**tiny, **sizes})


@register_model
def vit_base_mci_apple(pretrained=False, **sizes):
    """MobileCLIP-B's image tower as Apple's files want it; timm does not pad its first layer."""
    trunk = vit_base_mci_224(norm_layer=partial(LayerNorm, eps=1e-5), **sizes)
    trunk.patch_embed.backbone[0].conv.padding = (1, 1)
    return trunk


class StridedPointwise(nn.Conv2d):
    """A strided 1 x 1 convolution that leaves out pixels first. The numbers are the same, but for a
    few channels in the channels-last format oneDNN's own backward pass crashes (its issue 6035)."""

    def forward(self, x):
        x = x[:, :, :: self.stride[0], :: self.stride[1]]
        return F.conv2d(x, self.weight, self.bias, groups=self.groups)


class TimmImage(nn.Module):
    """A timm model as image tower; named as in open_clip's TimmModel, so that state dicts agree."""

    def __init__(self, vision, embed_dim):
        super().__init__()
        sizes = {key: vision[key] for key in ("layers", "embed_dims") if key in vision}
        sizes |= {"num_classes": embed_dim, "global_pool": vision["timm_pool"]}
        self.trunk = timm.create_model(vision["timm_model_name"], **sizes)
        for conv in self.trunk.modules():
            pointwise = type(conv) is nn.Conv2d and conv.kernel_size == (1, 1)
            if pointwise and conv.stride != (1, 1) and conv.in_channels < 16:
                conv.__class__ = StridedPointwise

    def forward(self, image):
        return self.trunk(image)  # (B, 3, H, W) -> (B, embed_dim)


def image_tower(config, activation):
    vision, width = config["vision_cfg"], config["embed_dim"]
    if "timm_model_name" in vision:
        return TimmImage(vision, width)
    sizes = {"heads": vision["width"] // 64, "mlp_ratio": 4, "output_dim": width, **vision}
    return VisionTransformer(act_layer=activation, **sizes)


def text_tower(config, activation):
    sizes = {"output_dim": config["embed_dim"], "mask_padding": False, **config["text_cfg"]}
    if sizes.pop("hybrid", False):
        return HybridText(**sizes)
    return TransformerText(act_layer=activation, **sizes)


class CLIP(nn.Module):
    """An image tower, a text tower and the logarithm of the logit scale."""

    def __init__(self, config, name):
        super().__init__()
        self.config, self.name, self.folded = config, name, False
        self.image_size = config["vision_cfg"]["image_size"]
        self.context_length = config["text_cfg"]["context_length"]
        activation = QuickGELU if config.get("quick_gelu") else nn.GELU
        self.visual, self.text = image_tower(config, activation), text_tower(config, activation)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def encode_image(self, image, normalize=False):
        """Images (B, 3, image_size, image_size) from the model's transform -> (B, embed_dim)."""
        whole = self.training or image.device.type != "cpu"
        rows = len(image) if whole else max(1, PIXELS_AT_ONCE // math.prod(image.shape[-2:]))
        features = torch.cat([self.visual(batch) for batch in image.split(rows)])
        return F.normalize(features, dim=1) if normalize else features

    def encode_text(self, tokens, normalize=False):
        """Tokens (B, up to context_length), 0-padded -> (B, embed_dim), read at the end token."""
        features = self.text(tokens)
        return F.normalize(features, dim=1) if normalize else features

    @property
    def tokenizer(self):
        return tokenizer(self.context_length)

    def forward(self, image, tokens):
        """-> normalised image and text features (both (B, embed_dim)), logit scale."""
        image, text = self.encode_image(image, True), self.encode_text(tokens, True)
        return image, text, self.logit_scale.exp()


def create_model(name, pretrained=None, device="cpu", text_tower=None, stretch="longclip", **sizes):
    """Build model `name` with random weights, or with those of `pretrained` in evaluation mode.

    pretrained: a run's student/ or last.ckpt; a file that the originals publish: Long-CLIP's and
    Apple's .pt, open_clip's safetensors, "openai:ViT-B-16.pt" (OpenAI's TorchScript archives); a
    word of `hub.published`; or "pip" (see `openclip.fill`). A run of another name or of other sizes
    is a ValueError.
    text_tower: one of TEXT_TOWERS. stretch: see `stretch_positions`. sizes: see `model_config`.
    """
    if name not in list_models():
        if not (name.startswith(("hf-hub:", "local-dir:")) or open_clip.get_model_config(name)):
            raise ValueError(nearest(name, [*list_models(), *open_clip.list_models()], "model"))
        return openclip.create(name, pretrained, text_tower=text_tower, **sizes).to(device)
    if pretrained == "pip":
        return openclip.fill(new(model_config(name, text_tower, **sizes), name)).to(device)
    if isinstance(pretrained, str) and not absolute(pretrained.removeprefix("openai:")).exists():
        pretrained = hub.published(name, pretrained)
    state, ours = (None, None) if pretrained is None else checkpoints.read_state(pretrained)
    if ours:
        model, asked = _ours(state, ours, pretrained), {"text_tower": text_tower, **sizes}
        free = all(value is None for value in asked.values())
        config = model.config if free else model_config(name, text_tower, **sizes)
        if (model.name, model.config) != (name, config):
            held = f"{pretrained} holds {model.name} with {model.config}"
            raise ValueError(f"{held}: ask for that, not for {name} with {asked}")
        return model.to(device)
    if name == "LongCLIP":
        config = {**MODELS["LongCLIP-B"], **checkpoints.longclip_sizes(state)}
    else:
        config = model_config(name, text_tower, **sizes)
    vision, apple_key = config["vision_cfg"], "image_encoder.model.patch_emb.0.block.conv.weight"
    if vision.get("timm_model_name") == "vit_base_mci_224" and apple_key in (state or ()):
        vision["timm_model_name"] = "vit_base_mci_apple"
    model = new(config, name)
    if state is not None:
        checkpoints.fill(model, state, pretrained, stretch)
        model.eval()
    return model.to(device)


def new(config, name, folder=None):
    """The model of a configuration, with random weights. folder: of its Hugging Face files."""
    if config["text_tower"] == "open_clip":
        return openclip.build(config, name, folder)
    return CLIP(config, name)


def load_folder(folder):
    """The model of a folder that `checkpoints.save_folder` wrote, in evaluation mode."""
    state, ours = checkpoints.read_state(folder)
    if not ours:
        raise ValueError(f"{folder} is no model folder of JettCLIP: create_model(NAME, FOLDER)")
    return _ours(state, ours, folder)


def _ours(state, ours, source):
    model = new(**ours, folder=source if Path(source).is_dir() else None)
    checkpoints.fill(model, state, source)
    return model.eval()


def transforms(config):
    """(train, validation) transforms: a path, encoded bytes or a PIL image of the same photo -> the
    same float tensor (3, S, S)."""
    size, preprocess = config["vision_cfg"]["image_size"], config["preprocess"]
    resize = {"interpolation": v2.InterpolationMode(preprocess["interpolation"]), "antialias": True}
    normalize = v2.Normalize(preprocess["mean"], preprocess["std"])
    scale = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), normalize]
    squash = preprocess.get("resize_mode") == "squash"
    train = [read_photo, v2.RandomResizedCrop(size, scale=(0.6, 1.0), **resize)]
    val = [read_photo, v2.Resize([size, size] if squash else size, **resize), v2.CenterCrop(size)]
    return v2.Compose(train + scale), v2.Compose(val + scale)


def create_model_and_transforms(name, *args, **kwargs):
    """`create_model` -> (model, preprocess_train, preprocess_val), as open_clip's function."""
    model = create_model(name, *args, **kwargs)
    return model, *transforms(model.config)


def get_tokenizer(name, context_length=None):
    """-> tokenizer(texts) -> LongTensor (B, L): L is model `name`'s, or `context_length`."""
    longest = CONTEXT if name == "LongCLIP" else model_config(name)["text_cfg"]["context_length"]
    return tokenizer(context_length or longest)


def reparameterize(model):
    """A new model in evaluation mode with the same outputs: branches, batch norms and layer scales
    are folded, and the image tower is in the channels-last format."""
    model = copy.deepcopy(model).eval()
    if model.folded:  # timm cannot fold twice
        return model
    model.folded = True
    if hasattr(model.visual, "trunk"):  # a model of timm
        model.visual.trunk = fold_image(model.visual.trunk).to(memory_format=torch.channels_last)
    if isinstance(model.text, HybridText):
        model.text.first.fold()
        model.text.last.fold()
    return model
