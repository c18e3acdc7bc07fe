"""Names -> models. Every model has `encode_image`, `encode_text` and a logit scale, as open_clip's do.

    model, preprocess_train, preprocess_val = jettclip.create_model_and_transforms("JettCLIP-T", pretrained="runs/.../student")
    tokenizer = jettclip.get_tokenizer("JettCLIP-T")
    features = model.encode_text(tokenizer(["a long description ..."]), normalize=True)
"""
import copy
import difflib
import math

import timm
import torch
import torch.nn.functional as F
from open_clip.transformer import QuickGELU, VisionTransformer
from timm.utils import reparameterize_model
from torch import nn
from torchvision.transforms import v2

from . import checkpoints
from .text import CausalText, HybridText, tokenizer

# Sizes as open_clip's configuration files name them. `tower` says which class reads the text.
MODELS = {
    # a FastViT of MobileCLIP's MCi0 family, cut to about a million parameters, for miniature runs on a CPU
    "JettCLIP-T": {
        "embed_dim": 128,
        "vision_cfg": {"image_size": 64, "timm_model_name": "fastvit_mci0", "layers": [1, 1, 2, 1],
                       "embed_dims": [24, 48, 96, 192], "layer_scale_init_value": 0.3},
        "text_cfg": {"tower": "length_aware", "context_length": 248, "vocab_size": 49408, "width": 96, "heads": 3,
                     "layers": 2},
    },
    # the miniature teacher. From scratch, transformers learn too little from thousands of images: a ViT next to
    # nothing, a causal text transformer a bag of words. Convolutions in both towers bind what stands side by side.
    "LongCLIP-T": {
        "embed_dim": 128,
        "vision_cfg": {"image_size": 64, "timm_model_name": "fastvit_mci0", "layers": [1, 1, 2, 1],
                       "embed_dims": [32, 64, 128, 256], "layer_scale_init_value": 0.3},
        "text_cfg": {"tower": "length_aware", "context_length": 248, "vocab_size": 49408, "width": 128, "heads": 4,
                     "layers": 2},
    },
}
TEXT_TOWERS = ("length_aware", "stretched", "longclip")


class CLIP(nn.Module):
    """An image tower, a text tower and the logarithm of the logit scale; losses live in `jettclip.losses`."""

    def __init__(self, config):
        super().__init__()
        self.config = config
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
        """Images (B, 3, image_size, image_size), scaled to [0, 1] -> features (B, embed_dim)."""
        features = self.visual(image)
        return F.normalize(features, dim=1) if normalize else features

    def encode_text(self, tokens, normalize=False):
        """Tokens (B, up to context_length), 0-padded -> features (B, embed_dim), read at the end token."""
        features = self.text(tokens)
        return F.normalize(features, dim=1) if normalize else features

    def forward(self, image, tokens):
        """-> normalised image features, normalised text features (both (B, embed_dim)), logit scale."""
        return self.encode_image(image, True), self.encode_text(tokens, True), self.logit_scale.exp()


class TimmImage(nn.Module):
    """A timm model as image tower; named as in open_clip's TimmModel, so that state dicts agree."""

    def __init__(self, embed_dim, image_size, timm_model_name, **timm_args):
        super().__init__()
        self.trunk = timm.create_model(timm_model_name, num_classes=embed_dim, global_pool="avg", **timm_args)
        self.folded = False

    def forward(self, image):
        return self.trunk(image)  # (B, 3, H, W) -> (B, embed_dim)


def image_tower(config):
    vision = config["vision_cfg"]
    if "timm_model_name" in vision:
        return TimmImage(config["embed_dim"], **vision)
    return VisionTransformer(mlp_ratio=4, output_dim=config["embed_dim"], act_layer=QuickGELU, **vision)


def text_tower(config):
    args = dict(config["text_cfg"])
    tower = args.pop("tower")
    if tower == "longclip":
        return CausalText(output_dim=config["embed_dim"], act_layer=QuickGELU, **args)
    return HybridText(output_dim=config["embed_dim"], mask_padding=tower == "length_aware", **args)


def list_models():
    """Names that `create_model` knows."""
    return list(MODELS)


def nearest(word, words, what):
    """A ValueError's text for an unknown `word`, naming the nearest of `words`."""
    close = difflib.get_close_matches(str(word), [str(w) for w in words], n=1, cutoff=0.3)
    hint = f"did you mean {close[0]!r}?" if close else ""
    return f"{what} {word!r} is unknown: {hint} Known: {', '.join(map(str, words))}".replace(":  ", ": ")


def model_config(name, text_tower=None, **overrides):
    """The configuration of model `name` (a nested dictionary), with single sizes overridden by `overrides`.

    Overrides are named as in open_clip's files: embed_dim, image_size, context_length, text_width, ...
    (a `vision_` or `text_` prefix picks the tower where both have the size).
    """
    if name not in MODELS:
        raise ValueError(nearest(name, MODELS, "model"))
    config = copy.deepcopy(MODELS[name])
    if text_tower is not None:
        if text_tower not in TEXT_TOWERS:
            raise ValueError(nearest(text_tower, TEXT_TOWERS, "text tower"))
        config["text_cfg"]["tower"] = text_tower
    places = {"embed_dim": (config, "embed_dim")}
    for prefix in ("vision", "text"):
        part = config[f"{prefix}_cfg"]
        places |= {f"{prefix}_{key}": (part, key) for key in part}
    places |= {"image_size": places["vision_image_size"], "context_length": places["text_context_length"]}
    for key, value in overrides.items():
        if key not in places:
            raise ValueError(nearest(key, places, f"override of {name}"))
        part, place = places[key]
        part[place] = value
    return config


def create_model(name, pretrained=None, device="cpu", text_tower=None, **overrides):
    """Build model `name` with random weights, or with those of the run folder `pretrained`.

    text_tower: "length_aware", "stretched" or "longclip" (students only); overrides: see `model_config`.
    A run folder brings its own sizes; a model name or setting that contradicts them is refused.
    """
    config = model_config(name, text_tower, **overrides)
    if pretrained is None:
        model = CLIP(config)
    else:
        model = checkpoints.load_folder(pretrained)
        asked = {"text_tower": text_tower, **overrides}
        if model.name != name or any(v is not None for v in asked.values()) and model.config != config:
            raise ValueError(f"{pretrained} holds {model.name} with {model.config}, not {name} with {asked}: "
                             "ask for what it holds, or train anew")
    model.name = name
    return model.to(device)


def transforms(image_size):
    """(train, validation) transforms: PIL image or uint8 tensor -> float tensor (3, S, S) in [0, 1], MobileCLIP's scaling."""
    end = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]  # RGB comes first: it knows PIL's modes
    train = v2.Compose([v2.RGB(), v2.RandomResizedCrop(image_size, scale=(0.6, 1.0), antialias=True), *end])
    val = v2.Compose([v2.RGB(), v2.Resize(image_size, antialias=True), v2.CenterCrop(image_size), *end])
    return train, val


def create_model_and_transforms(name, pretrained=None, device="cpu", text_tower=None, **overrides):
    """-> (model, preprocess_train, preprocess_val), as open_clip's function of the same name."""
    model = create_model(name, pretrained, device, text_tower, **overrides)
    return model, *transforms(model.image_size)


def get_tokenizer(name, context_length=None):
    """-> tokenizer(texts) -> LongTensor (B, L) with the context length of model `name` (or the one given)."""
    return tokenizer(context_length or model_config(name)["text_cfg"]["context_length"])


def reparameterize(model):
    """A new model in evaluation mode with the same outputs, its foldable branches folded; `model` stays as it is."""
    model = copy.deepcopy(model).eval()
    if isinstance(model.visual, TimmImage) and not model.visual.folded:
        model.visual.trunk, model.visual.folded = reparameterize_model(model.visual.trunk), True
    if isinstance(model.text, HybridText):
        model.text.fold()
    return model
