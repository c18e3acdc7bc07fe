"""Shared: a small table of scenes, tiny models, and parameters away from their initial values."""

import os

import pytest
import torch
from torch.nn.modules.batchnorm import _BatchNorm

import jettclip
from jettclip.data import PairDataset
from jettclip.datasets.scenes import make_pairs

# One thread for this process (a worker of pytest-xdist) and for those that its tests start.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"

TINY = {"embed_dim": 16, "image_size": 32, "text_width": 16, "text_heads": 2, "text_layers": 1}
TINY |= {"vision_layers": [1, 1, 1, 1], "vision_embed_dims": [16, 16, 32, 32]}


def tiny_model(seed=0, **sizes):
    """JettCLIP-T with a hundredth of its arithmetic."""
    torch.manual_seed(seed)
    return jettclip.create_model("JettCLIP-T", **{**TINY, **sizes})


def largest(a, b):
    """The largest absolute difference of two tensors."""
    return (a - b).abs().max().item()


@torch.no_grad()
def randomise(model, seed=0):
    """Draw norms and layer scales, which start as constants -> the model, in evaluation mode."""
    torch.manual_seed(seed)
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
            module.weight.normal_(1, 0.1)
            module.bias.normal_(0, 0.1)
    for name, parameter in model.named_parameters():
        if name.endswith(("gamma", "mixer_scale", "ffn_scale")):
            parameter.normal_(0.3, 0.1)
    return model.eval()


@pytest.fixture(autouse=True)
def no_data_folder(monkeypatch):
    monkeypatch.delenv("JETTCLIP_DATA", raising=False)


@pytest.fixture(scope="session")
def table():
    """24 pairs of scenes, 32 pixels wide."""
    return make_pairs(24, seed=5, size=32)


@pytest.fixture(scope="session")
def dataset(table):
    return PairDataset(table, 32)


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    """A tiny model with drawn norms, and its export folder."""
    from jettclip.deploy.export import export  # here, so that most tests start without ONNX

    model = randomise(tiny_model())
    return model, export(model, tmp_path_factory.mktemp("export") / "tiny")
