"""Outputs of the published code, recorded on weights and inputs that follow from their names.

A tensor is a function of its key, so a checkpoint is a table of keys and shapes.
"""

import json
import math
import zlib
from functools import cache
from pathlib import Path

import numpy as np
import torch

GOLDEN = Path(__file__).parent / "golden"
LONGCLIP_TINY = np.load(GOLDEN / "longclip_tiny_seed0.npz")


def random_state(name):
    return np.random.RandomState(zlib.crc32(f"0:{name}".encode()))


def drawn(name, *shape):
    """The standard normal input that goes by `name`."""
    return torch.from_numpy(random_state(name).standard_normal(shape)).float()


def _weight(key, *shape):
    if key.endswith("num_batches_tracked"):
        return torch.zeros(shape, dtype=torch.long)
    z = random_state(key).standard_normal(shape)
    if key.endswith("logit_scale"):
        z = math.log(1 / 0.07)
    elif key.endswith("running_var"):
        z = 0.5 + abs(z)
    elif key.endswith("running_mean"):
        z = 0.1 * z
    elif "layer_scale" in key:
        z = 0.3 + 0.1 * z
    elif "embedding" in key or "pos_embed" in key:
        z = 0.02 * z
    elif len(shape) == 1:
        z = 1 + 0.1 * z if key.endswith("weight") else 0.02 * z
    else:
        z = z / math.sqrt(np.prod(shape[1:]))
    return torch.tensor(z, dtype=torch.float32)


_text_weight = cache(_weight)  # all MobileCLIPs but S0 have the same


def state_dict(name):
    """The checkpoint `name` as its authors publish it: {key: tensor}."""
    shapes = json.loads((GOLDEN / f"{name}.keys.json").read_text())
    return {
        key: (_text_weight if key.startswith("text_encoder.") else _weight)(key, *shape)
        for key, shape in shapes.items()
    }


def longclip_tokens(name, n):
    """(n, 248) tokens of the "long" or "short" captions."""
    random, (shortest, longest) = random_state(name), {"long": (30, 249), "short": (6, 24)}[name]
    tokens = torch.zeros(n, 248, dtype=torch.long)
    for row in tokens:
        length = random.randint(shortest, longest)
        row[0], row[length - 1] = 49406, 49407
        row[1 : length - 1] = torch.from_numpy(random.randint(1, 49000, length - 2))
    return tokens
