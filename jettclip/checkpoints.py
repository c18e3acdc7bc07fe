"""Weights on disk: the files that the originals publish, and our model folders.

A model folder holds open_clip's `open_clip_config.json` and `open_clip_model.safetensors`, and a
model card. Other files are read as tensors only: no pickle is executed.
"""

import hashlib
import json
import math
import pickle
import re
from collections import Counter
from pathlib import Path

import torch
from open_clip import load_openai_model
from open_clip.convert import convert_state_dict
from open_clip.model import convert_to_custom_text_state_dict
from safetensors.torch import load_file, save_file

from .runs import disk_space
from .text import stretch_positions
from .utils import absolute, read_json, write_json, write_then_rename

CONFIG, WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"

MODEL_CARD = """---
library_name: open_clip
pipeline_tag: zero-shot-image-classification
tags: [clip, long-clip, mobileclip]
---

# {model.name}, text tower `{config[text_tower]}`

Finds images by descriptions of up to {model.context_length} tokens. Trained by JettCLIP.

    model, _, preprocess = jettclip.create_model_and_transforms("{model.name}", "FOLDER")
    tokenizer = jettclip.get_tokenizer("{model.name}", {model.context_length})

If the text tower is `longclip`, or the model a -B, open_clip opens it too, after `import
jettclip.models`: `open_clip.create_model_and_transforms("local-dir:FOLDER")`.
"""


def save_folder(model, folder):
    """Save `model` as an open_clip `local-dir` folder. A reparameterised one is a ValueError."""
    if model.folded:
        raise ValueError(f"{model.name} is reparameterised: save the model before folding")
    folder, config = Path(folder), model.config
    state = {key: value.detach().contiguous().cpu() for key, value in model.state_dict().items()}
    clip = {key: value for key, value in config.items() if key not in ("text_tower", "preprocess")}
    clip |= {"quick_gelu": config.get("quick_gelu", False), "custom_text": True}
    if config["text_tower"] != "open_clip":
        vision, text = config["vision_cfg"], config["text_cfg"]
        if "timm_model_name" in vision:  # open_clip knows no other sizes of a timm model
            vision = {k: v for k, v in vision.items() if k.startswith("timm_") or k == "image_size"}
        text = {key: value for key, value in text.items() if value is not False}
        clip |= {"vision_cfg": vision, "text_cfg": text}
    preprocess = {"resize_mode": "shortest", **config["preprocess"], "size": model.image_size}
    ours = {"name": model.name, "config": config}
    saved = {"model_cfg": clip, "preprocess_cfg": preprocess, "jettclip": ours}
    card = MODEL_CARD.format(model=model, config=config)
    with disk_space(folder):
        if config["text_tower"] == "open_clip":
            model.save_tokenizer(folder)
        write_then_rename(folder / WEIGHTS, lambda path: save_file(state, path))
        write_json(folder / CONFIG, saved)
        write_then_rename(folder / "README.md", lambda path: path.write_text(card, "utf-8"))


def folder_config(folder):
    """The open_clip_config.json of a model folder."""
    folder = absolute(folder)
    if missing := " and no ".join(x for x in (CONFIG, WEIGHTS) if not (folder / x).is_file()):
        raise FileNotFoundError(f"{folder} has no {missing}: it is no (finished) model folder")
    return read_json(folder / CONFIG)


def file_hash(folder):
    """SHA-256 of a model folder: of its configuration and its weights."""
    digest = hashlib.sha256(json.dumps(folder_config(folder), sort_keys=True).encode())
    with open(Path(folder) / WEIGHTS, "rb") as file:
        hashlib.file_digest(file, lambda: digest)
    return digest.hexdigest()


def read_state(source):
    """The tensors {key: tensor} of a checkpoint, and {"name", "config"} of its model, where it is
    a model folder or a last.ckpt of ours (else None). `source`: `pretrained` of `create_model`."""
    is_openai = str(source).startswith("openai:")
    path, ours = absolute(str(source).removeprefix("openai:")), None
    if path.name == WEIGHTS and (path.parent / CONFIG).is_file():
        path = path.parent
    if path.is_dir():
        ours, path = folder_config(path).get("jettclip"), path / WEIGHTS
    if not path.is_file():
        raise FileNotFoundError(f"pretrained {str(path)!r} is neither a file nor a folder here")
    state = read_tensors(path, is_openai)
    settings = state.get("settings") if isinstance(state, dict) else None
    if isinstance(settings, dict):  # of last.ckpt
        ours = {"name": settings.get("model"), "config": settings.get("model_config")}
    for key in ("state_dict", "model"):
        state = state.get(key, state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not any(map(torch.is_tensor, state.values())):
        raise ValueError(f"{path} holds no state dict: a mapping of names to tensors is needed")
    # DistributedDataParallel and torch.compile put a word before the names of what they wrap
    return {re.sub(r"(?<![^.])(module|_orig_mod)\.", "", key): state[key] for key in state}, ours


def read_tensors(path, is_openai=False):
    """What a checkpoint file holds. Whatever a decoder raises gets the file's name."""
    try:
        if is_openai:
            return load_openai_model(str(path), precision="fp32", device="cpu").state_dict()
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        with open(path, "rb") as file:
            start = file.read(32)
        if "TorchScript" in str(error):
            problem = f"a TorchScript archive: if it is OpenAI's, write pretrained='openai:{path}'"
        elif isinstance(error, pickle.UnpicklingError) and start[:1] in (b"P", b"\x80"):
            problem = "refused, as it holds more than tensors: ask its author for a state dict"
        else:
            problem = f"no whole checkpoint (it begins {start!r}; {error!r:.100}): fetch it again"
    raise ValueError(f"{path} is {problem}")


def longclip_sizes(state):
    """embed_dim, vision_cfg and text_cfg of a Long-CLIP or OpenAI state dict, by its shapes."""
    if state is None:
        raise ValueError("LongCLIP has the sizes of its file: name one with pretrained=FILE")
    layers = Counter(key.split("resblocks")[0] for key in state if key.endswith("ln_1.weight"))
    try:
        width, _, patch, _ = state["visual.conv1.weight"].shape
        size = patch * math.isqrt(len(state["visual.positional_embedding"]) - 1)
        vision = {"image_size": size, "patch_size": patch, "width": width}
        tokens = len(state["positional_embedding"])
        words, width = state["token_embedding.weight"].shape
        text = {"context_length": tokens, "vocab_size": words, "width": width, "heads": width // 64}
        return {
            "embed_dim": state["text_projection"].shape[1],
            "vision_cfg": {**vision, "layers": layers["visual.transformer."]},
            "text_cfg": {**text, "layers": layers["transformer."]},
        }
    except (KeyError, IndexError, ValueError) as error:  # of a name or a shape
        raise ValueError(f"this is no Long-CLIP checkpoint: {error!r}") from None


def to_our_keys(state, model):
    """A published state dict with the keys of our CLIP. open_clip converts what it knows."""
    sizes = ("input_resolution", "context_length", "vocab_size")  # in OpenAI's files
    state = {key: value for key, value in state.items() if key not in sizes}
    if "positional_embedding_res" in state:  # Long-CLIP reads 20 rows of one table, then the other
        kept, rest = state["positional_embedding"], state.pop("positional_embedding_res")
        state["positional_embedding"] = torch.cat([kept[:20], rest[20:]])
    return finish_hybrid(convert_to_custom_text_state_dict(convert_state_dict(model, state)))


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


def finish_hybrid(state):
    """Rename what open_clip leaves of Apple's S0: its first and last text blocks are RepMixers."""
    pattern = re.compile(r"text\.transformer\.resblocks\.(\d+)\.(.*)")
    blocks = {key: match for key in state if (match := pattern.fullmatch(key))}
    if not any("token_mixer" in key for key in blocks):
        return state
    last = max(int(match[1]) for match in blocks.values())
    for key, match in blocks.items():
        value, number, name = state.pop(key), int(match[1]), match[2]
        for theirs, ours in APPLE_HYBRID.items():
            name = name.replace(theirs, ours)
        if name.endswith(("_scale", "fc1.weight", "fc2.weight")):
            value = value.squeeze()  # (d, 1, 1) -> (d,), (4d, d, 1, 1) -> (4d, d)
        block = {0: "first", last: "last"}.get(number, f"layers.{number - 1}")
        state[f"text.{block}.{name}"] = value
    return state


def fill(model, state, source, stretch="longclip"):
    """Load a checkpoint's `state` into `model`; positions are stretched to the model's context.
    A key that is missing, left over, of another shape or not finite: a ValueError names it."""
    state, wanted = to_our_keys(state, model), model.state_dict()
    table = state.get("text.positional_embedding")
    if table is not None and len(table) < model.context_length:
        table = stretch_positions(table.float(), model.context_length, mode=stretch)
        state["text.positional_embedding"] = table
    problems, both = {}, wanted.keys() & state.keys()
    problems["it lacks"] = wanted.keys() - state.keys()
    problems["it has, left over,"] = state.keys() - wanted.keys()
    problems["of another shape is"] = [k for k in both if state[k].shape != wanted[k].shape]
    problems["not of finite numbers is"] = [k for k in both if not state[k].isfinite().all()]
    lists = [f"{x} {', '.join(sorted(k)[:5])} ({len(k)} in all)" for x, k in problems.items() if k]
    if lists:
        tower = f"{model.name} (text tower {model.config['text_tower']})"
        raise ValueError(f"{source} does not fit {tower}: {'; '.join(lists)}")
    model.load_state_dict(state)
