"""Names become models of the promised sizes, mistakes name the nearest word, folding is exact."""

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, largest, randomise
from PIL import Image

import jettclip
from jettclip.fold import Depthwise
from jettclip.models import TEXT_TOWERS

SENTENCES = ["a red ring", "a large blue star on a grey ground, " * 8]


def outputs(model):
    """Normalised features of two images and two captions."""
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        return model(images, jettclip.get_tokenizer("JettCLIP-T")(SENTENCES))[:2]


@pytest.mark.parametrize(
    "name, asked, problem",
    [
        ("JetCLIP-T", {}, "model 'JetCLIP-T' is unknown: did you mean 'JettCLIP-T'"),
        ("ViT-B-33", {}, r"did you mean 'ViT-B-32'\? Known: .{9,150}\(1.. in all\)$"),
        ("foo:bar", {}, "model 'foo:bar' is unknown"),
        ("JettCLIP-T", {"text_tower": "lenght_aware"}, "tower 'lenght_aware' .* 'length_aware'"),
        ("LongCLIP-B", {"text_tower": "stretched"}, "has its published text tower, longclip"),
        ("JettCLIP-T", {"imagesize": 32}, "of JettCLIP-T 'imagesize' .* did you mean 'image_size'"),
        ("LongCLIP", {}, "LongCLIP has the sizes of its file"),
    ],
)
def test_mistakes_are_named(name, asked, problem):
    with pytest.raises(ValueError, match=problem):
        jettclip.create_model(name, **asked)


@pytest.mark.parametrize("name", ["JettCLIP-T", "LongCLIP-T"])
def test_encoding(name):
    model = jettclip.create_model(name).eval()
    images, tokens = torch.rand(2, 3, 64, 64), jettclip.get_tokenizer(name)(SENTENCES)
    with torch.inference_mode():
        image, text = model.encode_image(images), model.encode_text(tokens)
        normal_image, normal_text, scale = model(images, tokens)
    assert tokens.shape == (2, 248) and model.context_length == 248 and model.image_size == 64
    assert image.shape == text.shape == (2, model.config["embed_dim"])
    assert torch.allclose(normal_image, F.normalize(image, dim=1))
    assert torch.allclose(normal_text, F.normalize(text, dim=1))
    assert scale.item() == pytest.approx(1 / 0.07)
    assert model.encode_image(images[:0]).shape == (0, model.config["embed_dim"])
    assert jettclip.get_tokenizer(name, 77)("a ring").shape == (1, 77)
    assert 5e5 < sum(p.numel() for p in model.visual.parameters()) < 1.5e6


@pytest.mark.parametrize("tower", TEXT_TOWERS)
def test_reparameterize(tower):
    model = randomise(jettclip.create_model("JettCLIP-T", text_tower=tower))
    before = outputs(model)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    folded = jettclip.reparameterize(model.train())
    assert model.training and not folded.training and model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    for features, expected in zip(outputs(folded), before, strict=True):
        assert largest(features, expected) < 1e-5
    parameters = [sum(p.numel() for p in m.visual.parameters()) for m in (folded, model)]
    assert parameters[0] < parameters[1] and len(folded.state_dict()) < len(state)
    again = jettclip.reparameterize(folded)
    for features, expected in zip(outputs(again), outputs(folded), strict=True):
        assert torch.equal(features, expected)


@pytest.mark.parametrize("options", [{}, {"bias": False, "stride": 2, "dilation": 2}])
def test_depthwise_parts_give_the_outputs_of_the_whole(options):
    conv = torch.nn.Conv2d(4, 12, 3, groups=4, padding=1, **options)
    x = torch.rand(2, 4, 9, 9)
    with torch.inference_mode():
        torch.testing.assert_close(Depthwise(conv)(x), conv(x))


@pytest.mark.parametrize("mode", ["RGB", "P", "CMYK"])
def test_pixels_are_scaled_and_nothing_else(mode):
    _, *transforms = jettclip.create_model_and_transforms("JettCLIP-T", **TINY)
    for prepare in transforms:  # for training, for evaluation
        tensor = prepare(Image.new("RGB", (50, 80), (255, 0, 51)).convert(mode))
        expected = torch.tensor([1, 0, 0.2]).view(3, 1, 1).expand(3, 32, 32)
        assert tensor.dtype == torch.float32 and torch.allclose(tensor, expected, atol=0.02)


@pytest.mark.parametrize("size", [64, 96])
def test_sizes_at_which_a_channels_last_stem_crashed(size):
    """oneDNN's bug would end the process; the gradient must be that of the plain format."""
    gradients = []
    for layout in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        model = jettclip.create_model("JettCLIP-T").to(memory_format=layout).train()
        images = torch.rand(4, 3, size, size).contiguous(memory_format=layout)
        model.encode_image(images).square().sum().backward()
        gradients.append(model.visual.trunk.stem[0].conv_scale.conv.weight.grad)
    assert torch.allclose(*gradients, rtol=1e-3, atol=1e-4 * gradients[0].abs().max().item())
