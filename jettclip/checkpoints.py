"""Weights on disk. A model folder holds open_clip's two files: `open_clip_config.json` + `open_clip_model.safetensors`."""
import hashlib
import json
import os
from pathlib import Path

from safetensors.torch import load_file, save_file


def write_json(path, value):
    """Write JSON under a temporary name, then rename: a reader never sees half a file."""
    write_then_rename(path, lambda temporary: temporary.write_text(json.dumps(value, indent=2) + "\n"))


def write_then_rename(path, write):
    """Call `write(temporary path)`, then rename the result to `path`."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp{os.getpid()}{path.suffix}")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_folder(model, folder):
    """Save `model` as an open_clip `local-dir` folder. Reparameterised models cannot be saved: save, load, then fold."""
    state = {key: value.detach().contiguous().cpu() for key, value in model.state_dict().items()}
    write_then_rename(Path(folder) / "open_clip_model.safetensors", lambda path: save_file(state, path))
    write_json(Path(folder) / "open_clip_config.json", {
        "model_cfg": {**model.config, "custom_text": True, "quick_gelu": model.config["text_cfg"]["tower"] == "longclip"},
        "preprocess_cfg": {"mean": [0, 0, 0], "std": [1, 1, 1], "interpolation": "bilinear",
                           "resize_mode": "shortest", "size": model.image_size},
        "jettclip": {"name": model.name},
    })


def load_folder(folder):
    """The model of a folder that `save_folder` wrote, in evaluation mode."""
    from .models import CLIP  # models needs this module at import

    folder = Path(folder)
    missing = [name for name in ("open_clip_config.json", "open_clip_model.safetensors")
               if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{folder} has no {' and no '.join(missing)}: it is no (finished) model folder")
    saved = json.loads((folder / "open_clip_config.json").read_text())
    config = {key: saved["model_cfg"][key] for key in ("embed_dim", "vision_cfg", "text_cfg")}
    model = CLIP(config)
    model.load_state_dict(load_file(folder / "open_clip_model.safetensors"))
    model.name = saved["jettclip"]["name"]
    return model.eval()


def file_hash(folder):
    """SHA-256 of a model folder's weights."""
    return hashlib.sha256((Path(folder) / "open_clip_model.safetensors").read_bytes()).hexdigest()
