"""Convert a model to Core ML, for iPhones and Macs: image.mlpackage and text.mlpackage.

    pip install 'jettclip[coreml]'
    python examples/coreml/convert.py runs/scenes/fd-both-s0/student coreml

Converts on Linux and macOS. Core ML itself runs on Apple's systems alone, so here only the shapes
of inputs and outputs are checked, not the numbers.
"""

import shutil
import sys
from pathlib import Path

import coremltools as ct
import numpy as np
import torch

from jettclip.deploy.export import Graph
from jettclip.models import load_folder, reparameterize


def image_input(model):
    """RGB photo of the model's size -> pixels as its transform gives them."""
    mean, std = (np.array(model.config["preprocess"][key]) for key in ("mean", "std"))
    if np.ptp(std):
        raise ValueError(f"{model.name} scales colours by {std.tolist()}: Core ML by one number")
    size = 1, 3, model.image_size, model.image_size
    return ct.ImageType("image", size, scale=1 / (255 * std[0]), bias=list(-mean / std))


def convert(model, folder):
    """Write image.mlpackage (a photo) and text.mlpackage (tokens (1, L), int32, 0-padded) into
    `folder`; both give normalised `features` (1, embed_dim), computed in fp16."""
    model, folder = reparameterize(model).cpu(), Path(folder)
    tokens = model.tokenizer(["a long description"]).int()
    pixels = torch.rand(1, 3, model.image_size, model.image_size)
    text_input = ct.TensorType("tokens", tuple(tokens.shape), np.int32)
    for name, tower, example, read in (
        ("image", model.visual, pixels, image_input(model)),
        ("text", model.text, tokens, text_input),
    ):
        with torch.no_grad():
            traced = torch.jit.trace(Graph(tower).eval(), example)
        converted = ct.convert(
            traced,
            inputs=[read],
            outputs=[ct.TensorType("features")],
            minimum_deployment_target=ct.target.iOS17,
        )
        shutil.rmtree(package := folder / f"{name}.mlpackage", ignore_errors=True)
        converted.save(str(package))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    convert(load_folder(sys.argv[1]), sys.argv[2])
