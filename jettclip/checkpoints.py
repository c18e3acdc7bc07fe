"""Weights on disk: the files that the originals publish, and our run folders.

A model folder holds open_clip's two files, `open_clip_config.json` + `open_clip_model.safetensors`, and a model card.
Other people's files are read as tensors only (safetensors, or torch.load with weights_only=True): no pickle is executed.
"""

import hashlib
import json
import math
import os
import pickle
import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from timm.models import fastvit, vision_transformer_hybrid

from .text import stretch_positions
from .utils import write_json, write_then_rename

CONFIG, WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"


# ---- our own folders


def save_folder(model, folder):
    """Save `model` as an open_clip `local-dir` folder. A reparameterised model is refused: save, load, then fold.

    Models with a plain text tower open in open_clip itself; it refuses the `hybrid` and `mask_padding` of our own towers.
    """
    if model.folded:
        raise ValueError(
            f"{model.name} is reparameterised and cannot be trained on: save the model before folding"
        )
    folder, config = Path(folder), model.config
    state = {key: value.detach().contiguous().cpu() for key, value in model.state_dict().items()}
    write_then_rename(folder / WEIGHTS, lambda path: save_file(state, path))
    vision = {
        key: value
        for key, value in config["vision_cfg"].items()
        if "timm_model_name" not in config["vision_cfg"]
        or key.startswith("timm_")
        or key == "image_size"
    }  # `fastvit_jett` has the sizes of JettCLIP-T by itself
    text = {key: value for key, value in config["text_cfg"].items() if value is not False}
    write_json(
        folder / CONFIG,
        {
            "model_cfg": {
                "embed_dim": config["embed_dim"],
                "vision_cfg": vision,
                "text_cfg": text,
                "quick_gelu": config.get("quick_gelu", False),
                "custom_text": True,
            },
            "preprocess_cfg": {
                **config["preprocess"],
                "resize_mode": "shortest",
                "size": model.image_size,
            },
            "jettclip": {"name": model.name, "config": config},
        },
    )
    write_then_rename(folder / "README.md", lambda path: path.write_text(model_card(model)))


def model_card(model):
    """The README.md of a model folder, as the Hugging Face Hub shows it."""
    plain = "hybrid" not in model.config["text_cfg"] and not model.config["text_cfg"].get(
        "mask_padding"
    )
    registered = model.config["vision_cfg"].get("timm_model_name") in (
        "fastvit_jett",
        "vit_base_mci_apple",
    )
    opens = (
        "It also opens in open_clip itself: `open_clip.create_model_and_transforms('local-dir:FOLDER')`"
        + (
            " after `import jettclip.models`, which registers the image tower with timm."
            if registered
            else "."
        )
        if plain
        else "Its text tower is JettCLIP's own, so open_clip alone cannot open it."
    )
    return f"""---
library_name: open_clip
pipeline_tag: zero-shot-image-classification
tags: [clip, long-clip, mobileclip]
---

# {model.name}, text tower `{model.config["text_tower"]}`

Finds images by descriptions of up to {model.context_length} tokens; images of {model.image_size} pixels, features of
{model.config["embed_dim"]} numbers. Trained by JettCLIP.

```python
import jettclip

model, _, preprocess = jettclip.create_model_and_transforms("{model.name}", pretrained="FOLDER")
tokenizer = jettclip.get_tokenizer("{model.name}", {model.context_length})
model = jettclip.reparameterize(model)  # the same outputs, faster
```

{opens}
"""


def is_run_folder(path):
    """Whether `path` is a folder; one that is not ours is told apart, and refused, by `load_folder`."""
    return (
        isinstance(path, (str, Path)) and Path(path).is_dir() and "jettclip" in folder_config(path)
    )


def folder_config(folder):
    folder = Path(folder)
    missing = [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{folder} has no {' and no '.join(missing)}: it is no (finished) model folder"
        )
    return json.loads((folder / CONFIG).read_text())


def file_hash(folder):
    """SHA-256 of a model folder's weights."""
    return hashlib.sha256((Path(folder) / WEIGHTS).read_bytes()).hexdigest()


# ---- training goes on from these


def save_checkpoint(folder, state):
    """Write last.ckpt; the one before stays as previous.ckpt, in case the disk fails this one."""

    def write(path):
        torch.save(state, path)
        if (folder / "last.ckpt").exists():
            os.replace(folder / "last.ckpt", folder / "previous.ckpt")

    write_then_rename(folder / "last.ckpt", write)


def load_checkpoint(folder, report):
    """The newest whole checkpoint of a run folder, or None where it has none."""
    for name in ("last.ckpt", "previous.ckpt"):
        if (folder / name).exists():
            try:
                return torch.load(folder / name, weights_only=True)
            except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
                report(
                    f"{folder / name} is damaged and not used: {str(error).splitlines()[0][:100]}"
                )
    return None


# ---- everybody's files


def read_state(source):
    """The tensors of a checkpoint, {key: tensor}, in its own naming. `source`: see `models.create_model`."""
    if isinstance(source, dict):
        if source.keys() != {"image", "text"}:
            raise ValueError(
                f"pretrained has the keys {', '.join(source)}: a pair of files has image and text"
            )
        return {tower: read_state(file) for tower, file in source.items()}
    if str(source).startswith("openai:"):
        from open_clip import load_openai_model

        return load_openai_model(
            str(source).removeprefix("openai:"), precision="fp32", device="cpu"
        ).state_dict()
    path = Path(source)
    if path.is_dir():  # an open_clip folder of someone else's
        folder_config(path)
        path = path / WEIGHTS
    if not path.is_file():
        raise FileNotFoundError(f"pretrained {str(source)!r} is neither a file nor a folder here")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, EOFError, OSError) as error:
        raise ValueError(f"{path} is no whole checkpoint ({error}): fetch it again") from None
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is refused: it holds more than tensors, and unpickling that may run code of its author's; "
            f"nothing of it was run. Ask for a state dict or safetensors ({str(error).splitlines()[0]})"
        ) from None
    except RuntimeError as error:
        if "TorchScript" in str(error):
            raise ValueError(
                f"{path} is a TorchScript archive: if it is OpenAI's, write pretrained='openai:{path}'"
            ) from None
        raise ValueError(
            f"{path} is no whole checkpoint ({str(error).splitlines()[0]}): fetch it again"
        ) from None
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    if (
        not isinstance(state, dict)
        or not state
        or not all(isinstance(value, torch.Tensor) for value in state.values())
    ):
        raise ValueError(f"{path} holds no state dict: a mapping of names to tensors is wanted")
    return {key.removeprefix("module."): value for key, value in state.items()}


def longclip_sizes(state):
    """embed_dim, vision_cfg and text_cfg of a Long-CLIP (or OpenAI CLIP) state dict, read off its shapes."""

    def layers(prefix):
        return sum(
            re.fullmatch(rf"{prefix}transformer\.resblocks\.\d+\.ln_1\.weight", key) is not None
            for key in state
        )

    try:
        (width, _, patch, _), patches = (
            state["visual.conv1.weight"].shape,
            len(state["visual.positional_embedding"]) - 1,
        )
        vocabulary, text_width = state["token_embedding.weight"].shape
        return {
            "embed_dim": state["text_projection"].shape[1],
            "vision_cfg": {
                "image_size": patch * math.isqrt(patches),
                "layers": layers(r"visual\."),
                "width": width,
                "patch_size": patch,
            },
            "text_cfg": {
                "context_length": len(state["positional_embedding"]),
                "vocab_size": vocabulary,
                "width": text_width,
                "heads": text_width // 64,
                "layers": layers(""),
            },
        }
    except KeyError as error:
        raise ValueError(f"this is no Long-CLIP checkpoint: it has no {error}") from None


def to_our_keys(state, model):
    """Rename a checkpoint's keys to those of our CLIP; which of the published formats it has shows in its keys."""
    if state.keys() == {"image", "text"}:
        image, text = (to_our_keys(part, model) for part in state.values())
        return {
            key: value
            for part, of_text in ((image, False), (text, True))
            for key, value in part.items()
            if key.startswith("text.") == of_text
        }
    if any(key.startswith("image_encoder.") for key in state):
        return _from_apple(state, model)
    if "text_projection" in state:  # OpenAI, Long-CLIP: the text tower has no prefix
        state = {
            key: value
            for key, value in state.items()
            if key not in ("input_resolution", "context_length", "vocab_size")
        }
        if (
            "positional_embedding_res" in state
        ):  # Long-CLIP reads 20 kept rows here and the others there
            kept, rest = state.pop("positional_embedding"), state.pop("positional_embedding_res")
            state["positional_embedding"] = torch.cat([kept[:20], rest[20:]])
        return {
            key if key.startswith(("visual.", "logit_scale")) else f"text.{key}": value
            for key, value in state.items()
        }
    return state


APPLE_TEXT = [  # in this order: pattern -> replacement
    (r"projection_layer", "text_projection"),
    (r"embedding_layer", "token_embedding"),
    (r"final_layer_norm", "ln_final"),
    (r"positional_embedding\.pos_embed\.pos_embed", "positional_embedding"),
    (r"pre_norm_mha\.0", "ln_1"),
    (r"pre_norm_mha\.1\.qkv_proj\.", "attn.in_proj_"),
    (r"pre_norm_mha\.1", "attn"),
    (r"pre_norm_ffn\.0", "ln_2"),
    (r"pre_norm_ffn\.1", "mlp.c_fc"),
    (r"pre_norm_ffn\.4", "mlp.c_proj"),
    (r"token_mixer\.layer_scale", "mixer_scale"),
    (r"(\d)\.layer_scale", r"\1.ffn_scale"),
    (r"token_mixer\.norm\.rbr_skip", "norm"),
    (r"token_mixer\.mixer\.rbr_skip", "skip_norm"),
    (r"token_mixer\.mixer\.rbr_conv\.0\.conv", "conv"),
    (r"token_mixer\.mixer\.rbr_conv\.0\.bn", "conv_norm"),
    (r"convffn\.conv\.conv", "ffn_conv"),
    (r"convffn\.conv\.bn", "ffn_norm"),
    (r"convffn\.", ""),
]


def is_apple_vit(state):
    """Whether this is Apple's own file of a MobileCLIP with a ViT image tower (B), in one file or for the image tower."""
    return "image_encoder.model.patch_emb.0.block.conv.weight" in state.get("image", state)


def _from_apple(state, model):
    """Apple's MobileCLIP files: the image tower by timm's own filters, the text tower by renaming."""
    image = {key: value for key, value in state.items() if key.startswith("image_encoder.")}
    image = (vision_transformer_hybrid if is_apple_vit(state) else fastvit).checkpoint_filter_fn(
        image, model.visual.trunk
    )
    ours = {
        "logit_scale": state["logit_scale"],
        **{f"visual.trunk.{key}": value for key, value in image.items()},
    }
    hybrid = any("token_mixer" in key for key in state if key.startswith("text_encoder."))
    last = max(
        int(key.split(".")[2]) for key in state if key.startswith("text_encoder.transformer.")
    )
    for key, value in state.items():
        if not key.startswith("text_encoder."):
            continue
        name = key.removeprefix("text_encoder.")
        for pattern, replacement in APPLE_TEXT:
            name = re.sub(pattern, replacement, name)
        if hybrid:
            name = re.sub(
                r"transformer\.(\d+)",
                lambda m: {0: "first", last: "last"}.get(int(m[1]), f"layers.{int(m[1]) - 1}"),
                name,
            )
        else:
            name = name.replace("transformer.", "transformer.resblocks.")
        if name == "positional_embedding" or name.endswith(("_scale", "fc1.weight", "fc2.weight")):
            value = value.squeeze()  # (1, 1, 77, d), (d, 1, 1), (4d, d, 1, 1)
        ours[f"text.{name}"] = value
    return ours


def fill(model, state, source, stretch="longclip"):
    """Load a checkpoint's `state` into `model`; positions are stretched to the model's context.

    A key that is missing, left over or of another shape is an error that names it.
    """
    state = to_our_keys(state, model)
    positions = "text.positional_embedding"
    if positions in state and len(state[positions]) < model.context_length:
        state = {
            **state,
            positions: stretch_positions(
                state[positions].float(), model.context_length, mode=stretch
            ),
        }
    wanted = model.state_dict()
    problems = [
        f"{what} {', '.join(sorted(keys)[:5])}{f' and {len(keys) - 5} more' if len(keys) > 5 else ''}"
        for what, keys in (
            ("it lacks", wanted.keys() - state.keys()),
            ("it has, left over,", state.keys() - wanted.keys()),
            (
                "of another shape is",
                [
                    f"{key} {tuple(state[key].shape)}, here {tuple(wanted[key].shape)}"
                    for key in wanted.keys() & state.keys()
                    if state[key].shape != wanted[key].shape
                ],
            ),
        )
        if keys
    ]
    if problems:
        raise ValueError(
            f"{source} does not fit {model.name} (text tower {model.config['text_tower']}): {'; '.join(problems)}"
        )
    model.load_state_dict(state)
