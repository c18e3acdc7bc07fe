"""Names become models of the promised sizes, mistakes name the nearest word, folding keeps the outputs."""

import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import MODELS_AND_TOWERS, TINY, randomise, tiny_model
from PIL import Image

import jettclip
from jettclip import checkpoints
from jettclip.models import MODELS

SENTENCES = ["a red ring", "a large blue star on a grey ground, " * 8]


def largest(difference):
    return difference.abs().max().item()


def features(model, size=64):
    """Normalised features of two images and two captions."""
    images = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    tokens = jettclip.get_tokenizer("JettCLIP-T")(SENTENCES)
    with torch.inference_mode():
        return model.encode_image(images, True), model.encode_text(tokens, True)


def test_list_models():
    assert {"JettCLIP-T", "LongCLIP-T"} <= set(jettclip.list_models())


@pytest.mark.parametrize(
    "arguments, nearest",
    [
        (("JetCLIP-T",), "model 'JetCLIP-T' is unknown: did you mean 'JettCLIP-T'"),
        (("longclip-T",), "did you mean 'LongCLIP-T'"),
        (
            ("JettCLIP-T", None, "cpu", "lenght_aware"),
            "tower 'lenght_aware' is unknown: .* 'length_aware'",
        ),
    ],
)
def test_unknown_names(arguments, nearest):
    with pytest.raises(ValueError, match=nearest):
        jettclip.create_model(*arguments)


def test_unknown_override():
    with pytest.raises(
        ValueError, match="of JettCLIP-T 'imagesize' is unknown: did you mean 'image_size'"
    ):
        jettclip.create_model("JettCLIP-T", imagesize=32)
    with pytest.raises(ValueError, match="did you mean 'text_width'"):
        jettclip.create_model("LongCLIP-T", textwidth=64)


@pytest.mark.parametrize("name, tower", MODELS_AND_TOWERS)
def test_encoding(name, tower):
    model = jettclip.create_model(name, text_tower=tower).eval()
    images, tokens = torch.rand(2, 3, 64, 64), jettclip.get_tokenizer(name)(SENTENCES)
    with torch.inference_mode():
        image, text = model.encode_image(images), model.encode_text(tokens)
        normal_image, normal_text, scale = model(images, tokens)
    assert tokens.shape == (2, 248) and model.context_length == 248 and model.image_size == 64
    assert image.shape == text.shape == (2, model.config["embed_dim"])
    assert torch.allclose(normal_image, F.normalize(image, dim=1))
    assert torch.allclose(normal_text, F.normalize(text, dim=1))
    assert torch.allclose(normal_text.norm(dim=1), torch.ones(2))
    assert scale.item() == pytest.approx(1 / 0.07)
    with pytest.raises(ValueError, match=r"\(2, 249\): this model reads \(B, up to 248\)"):
        model.encode_text(torch.ones(2, 249, dtype=torch.long))


def test_overrides():
    model = jettclip.create_model("JettCLIP-T", **{**TINY, "context_length": 77}).eval()
    tokens = torch.tensor([[49406, 5, 49407]])
    image, text = model.encode_image(torch.rand(1, 3, 32, 32)), model.encode_text(tokens)
    assert image.shape == text.shape == (1, 16)
    assert model.text.positional_embedding.shape == (77, 16) and model.image_size == 32
    with pytest.raises(ValueError, match="up to 77"):
        model.encode_text(torch.ones(1, 78, dtype=torch.long))
    untouched = MODELS["JettCLIP-T"]
    assert untouched["embed_dim"] != 16 and untouched["text_cfg"]["context_length"] == 248
    assert jettclip.get_tokenizer("JettCLIP-T", 77)("a ring").shape == (1, 77)


def test_the_student_is_small():
    assert (
        0.5e6
        < sum(p.numel() for p in jettclip.create_model("JettCLIP-T").visual.parameters())
        < 1.5e6
    )


def test_run_folder_must_agree_with_what_is_asked(tmp_path):
    saved = tiny_model()
    checkpoints.save_folder(saved, tmp_path)
    for asked in ({}, TINY, {"text_tower": "length_aware", **TINY}):
        loaded = jettclip.create_model("JettCLIP-T", tmp_path, **asked)
        assert torch.equal(loaded.text.text_projection, saved.text.text_projection)
    for name, asked in (
        ("LongCLIP-T", {}),
        ("JettCLIP-T", {"image_size": 64}),
        ("JettCLIP-T", {"text_tower": "stretched", **TINY}),
    ):
        with pytest.raises(ValueError, match="holds JettCLIP-T with"):
            jettclip.create_model(name, tmp_path, **asked)


@pytest.mark.parametrize("name, tower", MODELS_AND_TOWERS)
def test_reparameterize(name, tower):
    model = randomise(jettclip.create_model(name, text_tower=tower))
    before = features(model)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    model.train()

    folded = jettclip.reparameterize(model)
    assert model.training and model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert not folded.training
    for one, other in zip(before, features(folded)):
        assert largest(one - other) < 1e-5
    if name == "JettCLIP-T":
        parameters = [sum(p.numel() for p in one.visual.parameters()) for one in (folded, model)]
        assert parameters[0] < parameters[1] and len(folded.state_dict()) < len(state)

    again = jettclip.reparameterize(folded)
    for one, other in zip(features(folded), features(again)):
        assert torch.equal(one, other)


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "LA", "P", "1", "CMYK"])
@pytest.mark.parametrize("size", [(80, 50), (20, 33)])
def test_preprocessing(mode, size):
    _, train, val = jettclip.create_model_and_transforms("JettCLIP-T", **TINY)
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).convert(mode)
    for transform in (train, val):
        tensor = transform(image)
        assert tensor.shape == (3, 32, 32) and tensor.dtype == torch.float32
        assert 0 <= tensor.min() and 0.3 < tensor.max() <= 1
    assert torch.equal(val(image), val(image.convert("RGB")))


def test_pixels_are_scaled_and_nothing_else():
    _, _, val = jettclip.create_model_and_transforms("JettCLIP-T", **TINY)
    tensor = val(Image.new("RGB", (50, 80), (255, 0, 51)))
    assert torch.allclose(tensor, torch.tensor([1, 0, 0.2]).view(3, 1, 1).expand(3, 32, 32))
    square = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8)
    assert torch.allclose(val(square), square / 255)


@pytest.mark.parametrize("size", [64, 96, 128])
def test_sizes_at_which_a_channels_last_stem_crashed(size):
    """In a process of its own, as that is what oneDNN's bug would end; and with the plain format's gradient."""
    code = f"""
import torch, jettclip
gradients = []
for memory_format in (torch.contiguous_format, torch.channels_last):
    torch.manual_seed(0)
    model = jettclip.create_model("JettCLIP-T").to(memory_format=memory_format).train()
    images = torch.rand(4, 3, {size}, {size}, generator=torch.Generator().manual_seed(0)).contiguous(memory_format=memory_format)
    model.encode_image(images).square().sum().backward()
    gradients.append(model.visual.trunk.stem[0].conv_scale.conv.weight.grad)
print(torch.allclose(*gradients, rtol=1e-3, atol=1e-4 * gradients[0].abs().max().item()))
"""
    step = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert step.returncode == 0 and step.stdout.strip() == "True", step.stderr + step.stdout
