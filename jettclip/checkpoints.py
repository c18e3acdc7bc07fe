"""Weights on disk: the files that the originals publish, and our model folders.

A model folder holds open_clip's two files, `open_clip_config.json` and `open_clip_model.safetensors`,
and a model card. Other files are read as tensors only (safetensors, or torch.load with
weights_only=True): no pickle is executed.
"""

import hashlib
import json
import math
import pickle
import re
from pathlib import Path

import torch
from open_clip import load_openai_model
from open_clip.convert import convert_state_dict
from open_clip.model import convert_to_custom_text_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from .text import stretch_positions
from .utils import write_json, write_then_rename

CONFIG, WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"


def save_folder(model, folder):
    """Save `model` as an open_clip `local-dir` folder.

    A reparameterised model is a ValueError: save it, load it, then fold it. Models with a plain text
    tower open in open_clip itself, which refuses the `hybrid` and `mask_padding` of our towers.
    """
    if model.folded:
        raise ValueError(f"{model.name} is reparameterised: save the model before folding")
    folder, config = Path(folder), model.config
    state = {key: value.detach().contiguous().cpu() for key, value in model.state_dict().items()}
    write_then_rename(folder / WEIGHTS, lambda path: save_file(state, path))
    vision, text = config["vision_cfg"], config["text_cfg"]
    if "timm_model_name" in vision:  # open_clip knows no other sizes of a timm model
        vision = {k: v for k, v in vision.items() if k.startswith("timm_") or k == "image_size"}
    model_cfg = {
        "embed_dim": config["embed_dim"],
        "vision_cfg": vision,
        "text_cfg": {key: value for key, value in text.items() if value is not False},
        "quick_gelu": config.get("quick_gelu", False),
        "custom_text": True,
    }
    preprocess = {**config["preprocess"], "resize_mode": "shortest", "size": model.image_size}
    ours = {"name": model.name, "config": config}
    write_json(
        folder / CONFIG, {"model_cfg": model_cfg, "preprocess_cfg": preprocess, "jettclip": ours}
    )
    write_then_rename(folder / "README.md", lambda path: path.write_text(model_card(model)))


def model_card(model):
    """The README.md of a model folder, as the Hugging Face Hub shows it."""
    vision, text = model.config["vision_cfg"], model.config["text_cfg"]
    opens = "open_clip opens it too: `open_clip.create_model_and_transforms('local-dir:FOLDER')`"
    if text.get("hybrid") or text.get("mask_padding"):
        opens = "Its text tower is JettCLIP's, so open_clip alone cannot open it"
    elif vision.get("timm_model_name") in ("fastvit_jett", "vit_base_mci_apple"):
        opens += " after `import jettclip.models`, which registers the image tower with timm"
    return f"""---
library_name: open_clip
pipeline_tag: zero-shot-image-classification
tags: [clip, long-clip, mobileclip]
---

# {model.name}, text tower `{model.config["text_tower"]}`

Finds images by descriptions of up to {model.context_length} tokens; images of {model.image_size} pixels,
features of {model.config["embed_dim"]} numbers. Trained by JettCLIP.

```python
import jettclip

model, _, preprocess = jettclip.create_model_and_transforms("{model.name}", pretrained="FOLDER")
tokenizer = jettclip.get_tokenizer("{model.name}", {model.context_length})
model = jettclip.reparameterize(model)  # the same outputs, faster
```

{opens}.
"""


def is_run_folder(path):
    """Whether `path` is a folder of ours. A folder without both files is a FileNotFoundError."""
    is_folder = isinstance(path, (str, Path)) and Path(path).is_dir()
    return is_folder and "jettclip" in folder_config(path)


def folder_config(folder):
    """The open_clip_config.json of a model folder."""
    missing = [name for name in (CONFIG, WEIGHTS) if not (Path(folder) / name).is_file()]
    if missing:
        names = " and no ".join(missing)
        raise FileNotFoundError(f"{folder} has no {names}: it is no (finished) model folder")
    return json.loads((Path(folder) / CONFIG).read_text())


def file_hash(folder):
    """SHA-256 of a model folder's weights."""
    with open(Path(folder) / WEIGHTS, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_state(source):
    """The tensors of a checkpoint, {key: tensor}, in its naming. `source`: see `models.create_model`."""
    if isinstance(source, dict):
        if source.keys() != {"image", "text"}:
            raise ValueError(
                f"pretrained has the keys {', '.join(source)}: a pair of files has image and text"
            )
        return {tower: read_state(file) for tower, file in source.items()}
    if str(source).startswith("openai:"):
        file = str(source).removeprefix("openai:")
        return load_openai_model(file, precision="fp32", device="cpu").state_dict()
    path = Path(source)
    if path.is_dir():
        folder_config(path)
        path = path / WEIGHTS
    if not path.is_file():
        raise FileNotFoundError(f"pretrained {str(source)!r} is neither a file nor a folder here")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is refused, and nothing of it was run: it holds more than tensors, which may run "
            f"code. Ask for a state dict or safetensors ({str(error).splitlines()[0]})"
        ) from None
    except (SafetensorError, EOFError, OSError, RuntimeError) as error:
        problem = f"no whole checkpoint ({str(error).splitlines()[0]}): fetch it again"
        if "TorchScript" in str(error):
            problem = f"a TorchScript archive: if it is OpenAI's, write pretrained='openai:{path}'"
        raise ValueError(f"{path} is {problem}") from None
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    tensors = isinstance(state, dict) and [isinstance(x, torch.Tensor) for x in state.values()]
    if not tensors or not all(tensors):
        raise ValueError(f"{path} holds no state dict: a mapping of names to tensors is needed")
    return {key.removeprefix("module."): value for key, value in state.items()}


def longclip_sizes(state):
    """embed_dim, vision_cfg and text_cfg of a Long-CLIP (or OpenAI CLIP) state dict, by its shapes."""

    def layers(prefix):
        return sum(
            re.fullmatch(rf"{prefix}resblocks\.\d+\.ln_1\.weight", key) is not None for key in state
        )

    try:
        width, _, patch, _ = state["visual.conv1.weight"].shape
        patches = len(state["visual.positional_embedding"]) - 1
        vocabulary, text_width = state["token_embedding.weight"].shape
        return {
            "embed_dim": state["text_projection"].shape[1],
            "vision_cfg": {
                "image_size": patch * math.isqrt(patches),
                "layers": layers(r"visual\.transformer\."),
                "width": width,
                "patch_size": patch,
            },
            "text_cfg": {
                "context_length": len(state["positional_embedding"]),
                "vocab_size": vocabulary,
                "width": text_width,
                "heads": text_width // 64,
                "layers": layers(r"transformer\."),
            },
        }
    except KeyError as error:
        raise ValueError(f"this is no Long-CLIP checkpoint: it has no {error}") from None


def is_apple_vit(state):
    """Whether the image tower is that of Apple's file of a MobileCLIP with a ViT (B)."""
    return "image_encoder.model.patch_emb.0.block.conv.weight" in state.get("image", state)


def to_our_keys(state, model):
    """A published state dict, named as that of our CLIP. open_clip converts what it knows."""
    if state.keys() == {"image", "text"}:
        image, text = (to_our_keys(state[tower], model) for tower in ("image", "text"))
        image = {key: value for key, value in image.items() if not key.startswith("text.")}
        return image | {key: value for key, value in text.items() if key.startswith("text.")}
    sizes = ("input_resolution", "context_length", "vocab_size")  # in OpenAI's files
    state = {key: value for key, value in state.items() if key not in sizes}
    if "positional_embedding_res" in state:  # Long-CLIP reads 20 rows of one table, then the other
        kept, rest = state["positional_embedding"], state.pop("positional_embedding_res")
        state["positional_embedding"] = torch.cat([kept[:20], rest[20:]])
    state = convert_to_custom_text_state_dict(convert_state_dict(model, state))
    return (
        from_apple_hybrid(state)
        if any("token_mixer" in key for key in state if key.startswith("text."))
        else state
    )


APPLE_HYBRID = {  # in this order
    "token_mixer.mixer.rbr_conv.0.conv": "conv",
    "token_mixer.mixer.rbr_conv.0.bn": "conv_norm",
    "token_mixer.mixer.rbr_skip": "skip_norm",
    "token_mixer.norm.rbr_skip": "norm",
    "token_mixer.layer_scale": "mixer_scale",
    "layer_scale": "ffn_scale",
    "convffn.conv.conv": "ffn_conv",
    "convffn.conv.bn": "ffn_norm",
    "convffn.": "",
}


def from_apple_hybrid(state):
    """Finish what open_clip makes of Apple's S0, whose first and last text blocks are RepMixers."""
    pattern = re.compile(r"text\.transformer\.resblocks\.(\d+)\.(.*)")
    last = max(int(match[1]) for match in map(pattern.fullmatch, state) if match)
    renamed = {}
    for key, value in state.items():
        if match := pattern.fullmatch(key):
            number, name = int(match[1]), match[2]
            for theirs, ours in APPLE_HYBRID.items():
                name = name.replace(theirs, ours)
            block = {0: "first", last: "last"}.get(number, f"layers.{number - 1}")
            key = f"text.{block}.{name}"
            if name.endswith(("_scale", "fc1.weight", "fc2.weight")):
                value = value.squeeze()  # (d, 1, 1) -> (d,), (4d, d, 1, 1) -> (4d, d)
        renamed[key] = value
    return renamed


def fill(model, state, source, stretch="longclip"):
    """Load a checkpoint's `state` into `model`; positions are stretched to the model's context.

    A key that is missing, left over or of another shape is a ValueError that names it and `source`.
    """
    state, wanted = to_our_keys(state, model), model.state_dict()
    key = "text.positional_embedding"
    if key in state and len(state[key]) < model.context_length:
        state[key] = stretch_positions(state[key].float(), model.context_length, mode=stretch)
    problems = {
        "it lacks": wanted.keys() - state.keys(),
        "it has, left over,": state.keys() - wanted.keys(),
        "of another shape is": [
            f"{key} {tuple(state[key].shape)}, here {tuple(wanted[key].shape)}"
            for key in wanted.keys() & state.keys()
            if state[key].shape != wanted[key].shape
        ],
    }
    if any(problems.values()):
        text = "; ".join(
            f"{what} {', '.join(sorted(keys)[:5])}"
            + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")
            for what, keys in problems.items()
            if keys
        )
        tower = model.config["text_tower"]
        raise ValueError(f"{source} does not fit {model.name} (text tower {tower}): {text}")
    model.load_state_dict(state)
