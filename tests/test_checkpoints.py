"""Published files compute what their authors' code computes, folders give back what was saved, bad files are refused."""

import io
import json
import os

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from clip_benchmark.metrics import zeroshot_classification, zeroshot_retrieval
from conftest import MODELS_AND_TOWERS, TINY, randomise, tiny_model
from golden_values import GOLDEN, drawn, longclip_tokens, state_dict
from PIL import Image
from safetensors.torch import save_file
from torch.utils.data import DataLoader, TensorDataset

import jettclip
from jettclip import evaluate
from jettclip.models import load_folder
from jettclip.checkpoints import file_hash, save_folder, write_json, write_then_rename
from jettclip.evaluate import retrieval
from jettclip.models import transforms
from jettclip.datasets.scenes import make_pairs
from jettclip.text import stretch_positions


def outputs(model):
    torch.manual_seed(0)
    size = model.image_size
    tokens = jettclip.get_tokenizer(model.name)(["a red ring", "a large blue star, " * 20])
    with torch.inference_mode():
        return (*model(torch.rand(2, 3, size, size), tokens),)


@pytest.mark.parametrize("name, tower", MODELS_AND_TOWERS)
def test_round_trip(name, tower, tmp_path):
    model = tiny_model(text_tower=tower) if name == "JettCLIP-T" else jettclip.create_model(name)
    model = randomise(model)
    model.logit_scale.data.fill_(3)
    save_folder(model, tmp_path / "some/student")
    loaded = load_folder(tmp_path / "some/student")
    assert (loaded.name, loaded.config, loaded.training) == (name, model.config, False)
    assert loaded.logit_scale.item() == 3
    for one, other in zip(outputs(model), outputs(loaded), strict=True):
        assert torch.equal(one, other)
    names = ["README.md", "open_clip_config.json", "open_clip_model.safetensors"]
    assert sorted(path.name for path in (tmp_path / "some/student").iterdir()) == names


def test_config_is_what_open_clip_expects(tmp_path):
    save_folder(tiny_model(), tmp_path)
    saved = json.loads((tmp_path / "open_clip_config.json").read_text())
    assert (
        saved["model_cfg"]["embed_dim"] == TINY["embed_dim"] and saved["model_cfg"]["custom_text"]
    )
    assert saved["preprocess_cfg"]["mean"] == [0, 0, 0]
    assert saved["preprocess_cfg"]["size"] == TINY["image_size"]


def test_channels_last_weights_are_saved_as_they_are(tmp_path):
    model = randomise(tiny_model()).to(memory_format=torch.channels_last)
    save_folder(model, tmp_path)
    for key, value in load_folder(tmp_path).state_dict().items():
        assert torch.equal(value, model.state_dict()[key])


@pytest.mark.parametrize("missing", ["open_clip_config.json", "open_clip_model.safetensors"])
def test_incomplete_folder(missing, tmp_path):
    save_folder(tiny_model(), tmp_path)
    (tmp_path / missing).unlink()
    with pytest.raises(FileNotFoundError, match=f"has no {missing}: it is no"):
        load_folder(tmp_path)
    with pytest.raises(FileNotFoundError, match="elsewhere' is neither a file nor a folder here"):
        jettclip.create_model("JettCLIP-T", tmp_path / "elsewhere")


def test_hash_follows_the_weights(tmp_path):
    model = tiny_model()
    hashes = set()
    for step in (0, 0, 1):
        model.logit_scale.data += step
        save_folder(model, tmp_path / str(step))
        hashes.add(file_hash(tmp_path / str(step)))
    assert len(hashes) == 2


def test_a_failing_write_leaves_nothing(tmp_path):
    def write_half(path):
        path.write_text("half")
        raise OSError("disk full")

    for _ in range(2):
        with pytest.raises(OSError, match="disk full"):
            write_then_rename(tmp_path / "new/file.txt", write_half)
        assert not list((tmp_path / "new").iterdir())


def test_a_failing_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "file.json"
    write_json(path, {"step": 1})
    with pytest.raises(TypeError):
        write_json(path, {"step": object()})
    assert json.loads(path.read_text()) == {"step": 1} and list(tmp_path.iterdir()) == [path]
    write_json(path, {"step": 2})
    assert json.loads(path.read_text()) == {"step": 2} and list(tmp_path.iterdir()) == [path]


# ---- files of other people

SMALL_TEXT = {
    "text_width": 64,
    "text_heads": 1,
    "text_layers": 2,
}  # image towers at full size, text towers cut down


@pytest.fixture(scope="module")
def tiny_file(tmp_path_factory):
    """A Long-CLIP checkpoint as published: a plain state dict."""
    path = tmp_path_factory.mktemp("longclip") / "longclip-tiny.pt"
    torch.save(state_dict("longclip_tiny"), path)
    return path


def cosine(features, reference):
    return (
        F.cosine_similarity(features.double(), torch.from_numpy(reference).double(), dim=1)
        .min()
        .item()
    )


@pytest.mark.parametrize("size, tolerance", [("s0", 1e-5), ("s1", 1e-4), ("s2", 1e-4), ("b", 1e-5)])
def test_mobileclip_computes_what_apples_code_computes(size, tolerance, tmp_path):
    golden, name = np.load(GOLDEN / "mobileclip_seed0.npz"), f"mobileclip_{size}"
    torch.save(state_dict(name), tmp_path / "apple.pt")
    model = jettclip.create_model(f"MobileCLIP-{size.upper()}", tmp_path / "apple.pt")
    folded = jettclip.reparameterize(model)
    images = drawn(f"{name}/image", 2, 3, model.image_size, model.image_size)
    tokens = torch.from_numpy(golden[f"{name}/tokens"])
    with torch.inference_mode():
        assert cosine(model.encode_image(images), golden[f"{name}/image_features"]) > 1 - tolerance
        assert cosine(model.encode_text(tokens), golden[f"{name}/text_features"]) > 1 - 1e-5
        assert (
            cosine(folded.encode_image(images), golden[f"{name}/reparam_image_features"]) > 1 - 1e-4
        )
        assert (
            cosine(folded.encode_text(tokens), golden[f"{name}/reparam_text_features"]) > 1 - 1e-4
        )
    if size == "s2":
        return  # no values were recorded at 248 tokens
    golden = np.load(GOLDEN / "jettclip_text248_seed0.npz")
    student = jettclip.create_model(
        f"JettCLIP-{size.upper()}", tmp_path / "apple.pt", text_tower="stretched"
    )
    with torch.inference_mode():
        features = student.encode_text(torch.from_numpy(golden[f"{name}/tokens248"]))
        assert torch.equal(student.encode_image(images), model.encode_image(images))
    assert cosine(features, golden[f"{name}/stretched_text_features"]) > 1 - 1e-5


@pytest.mark.parametrize("name", ["LongCLIP-B", "LongCLIP"])
def test_longclip_computes_what_the_published_code_computes(name, tmp_path):
    golden = np.load(GOLDEN / "longclip_B_seed0.npz")
    torch.save(state_dict("longclip_B"), tmp_path / "longclip-B.pt")
    model = jettclip.create_model(name, tmp_path / "longclip-B.pt")
    assert model.config["vision_cfg"]["image_size"] == 224 and model.context_length == 248
    with torch.inference_mode():
        assert (
            cosine(model.encode_image(drawn("image", 2, 3, 224, 224)), golden["image_features"])
            > 1 - 1e-5
        )
        for caption in ("long", "short"):
            features = model.encode_text(longclip_tokens(caption, 2))
            assert cosine(features, golden[f"{caption}_features"]) > 1 - 1e-5


def test_openai_archive_is_read_when_it_is_named_as_such(tmp_path):
    """OpenAI's files are TorchScript of 77 tokens; Long-CLIP starts from one with its positions stretched."""

    class Node(torch.nn.Module):
        def forward(self, x):
            return x

    state, root = state_dict("longclip_tiny"), Node()
    del state["positional_embedding_res"]
    state["positional_embedding"] = state["positional_embedding"][:77]
    for key, value in state.items():
        *parents, leaf = key.split(".")
        node = root
        for part in parents:
            if part not in dict(node.named_children()):
                node.add_module(part, Node())
            node = getattr(node, part)
        node.register_parameter(leaf, torch.nn.Parameter(value.half().float()))
    path = tmp_path / "ViT-tiny.pt"
    torch.jit.script(root).save(path)
    with pytest.raises(
        ValueError,
        match=f"TorchScript archive: if it is OpenAI's, write pretrained='openai:{path}'",
    ):
        jettclip.create_model("LongCLIP", path)
    original = jettclip.create_model("LongCLIP", f"openai:{path}")
    assert original.context_length == 77 and not original.training
    for key in ("visual.proj", "token_embedding.weight"):
        ours = original.state_dict()[key if key.startswith("visual") else f"text.{key}"]
        assert torch.allclose(ours, state[key], atol=1e-3)


def test_positions_of_a_77_token_file_are_stretched(tmp_path):
    torch.save(state_dict("mobileclip_s0"), tmp_path / "s0.pt")
    short = jettclip.create_model("MobileCLIP-S0", tmp_path / "s0.pt").text.positional_embedding
    for mode in ("longclip", "exact"):
        model = jettclip.create_model("JettCLIP-S0", tmp_path / "s0.pt", stretch=mode)
        assert torch.equal(model.text.positional_embedding, stretch_positions(short, mode=mode))


def test_two_files_one_for_each_tower(tmp_path, tiny_file):
    torch.save(state_dict("mobileclip_s0"), tmp_path / "s0.pt")
    with pytest.raises(ValueError, match="of another shape is text.text_projection"):
        jettclip.create_model(
            "JettCLIP-S0",
            {"image": tmp_path / "s0.pt", "text": tiny_file},
            text_tower="longclip",
            text_width=64,
            text_heads=1,
            text_layers=3,
        )
    state = state_dict("longclip_tiny")
    state["text_projection"] = torch.randn(64, 512)
    torch.save(state, tmp_path / "text.pt")
    student = jettclip.create_model(
        "JettCLIP-S0",
        {"image": tmp_path / "s0.pt", "text": tmp_path / "text.pt"},
        text_tower="longclip",
        text_width=64,
        text_heads=1,
        text_layers=3,
    )
    alone = jettclip.create_model("MobileCLIP-S0", tmp_path / "s0.pt")
    assert torch.equal(student.text.text_projection, state["text_projection"])
    assert torch.equal(student.visual.trunk.head.fc.weight, alone.visual.trunk.head.fc.weight)
    with pytest.raises(
        ValueError, match="pretrained has the keys image, txt: a pair of files has image and text"
    ):
        jettclip.create_model("JettCLIP-S0", {"image": tmp_path / "s0.pt", "txt": tiny_file})


class Malicious:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_a_pickle_is_never_executed(tmp_path):
    torch.save({"text_projection": Malicious(tmp_path / "was-here")}, tmp_path / "bad.pt")
    with pytest.raises(
        ValueError, match="is refused: it holds more than tensors.*nothing of it was run"
    ):
        jettclip.create_model("LongCLIP", tmp_path / "bad.pt")
    assert not (tmp_path / "was-here").exists()
    torch.load(tmp_path / "bad.pt", weights_only=False)
    assert (tmp_path / "was-here").exists()  # it would have


@pytest.mark.parametrize(
    "name, content, problem",
    [
        ("a.pt", b"", "no whole checkpoint"),
        ("a.safetensors", b"\x00" * 20, "no whole checkpoint"),
        ("a.pt", "half", "no whole checkpoint"),
        ("a.pt", [1, 2], "holds no state dict"),
        ("a.pt", {}, "holds no state dict"),
        ("a.pt", {"step": 3}, "holds no state dict"),
        (
            "a.pt",
            {"weight": torch.ones(1)},
            "no Long-CLIP checkpoint: it has no 'visual.conv1.weight'",
        ),
    ],
)
def test_files_that_are_no_checkpoint(name, content, problem, tmp_path, tiny_file):
    path = tmp_path / name
    if content == "half":
        content = tiny_file.read_bytes()[:100_000]
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(ValueError, match=problem):
        jettclip.create_model("LongCLIP", path)


def test_keys_that_do_not_fit_are_named(tmp_path, tiny_file):
    state = state_dict("longclip_tiny")
    del state["ln_final.bias"], state["visual.proj"]
    torch.save(
        {**state, "visual.proj": torch.ones(2, 2), "text_head": torch.ones(1)}, tmp_path / "odd.pt"
    )
    with pytest.raises(
        ValueError,
        match=r"does not fit LongCLIP .*it lacks text.ln_final.bias; it has, left over, text.text_head; "
        r"of another shape is visual.proj \(2, 2\), here \(128, 48\)",
    ):
        jettclip.create_model("LongCLIP", tmp_path / "odd.pt")
    with pytest.raises(
        ValueError,
        match="does not fit JettCLIP-T .*it lacks .* and [0-9]+ more; it has, left over, .* and [0-9]+ more",
    ):
        jettclip.create_model("JettCLIP-T", tiny_file)
    with pytest.raises(ValueError, match="LongCLIP has the sizes of its file"):
        jettclip.create_model("LongCLIP")


# ---- open_clip and clip_benchmark read what we write


@pytest.mark.parametrize(
    "name, tower, sizes",
    [
        ("JettCLIP-S1", "stretched", SMALL_TEXT),
        ("JettCLIP-S2", "longclip", SMALL_TEXT),
        ("JettCLIP-B", "stretched", SMALL_TEXT),
        ("JettCLIP-T", "longclip", {}),
        ("MobileCLIP2-S0", None, SMALL_TEXT),
        ("LongCLIP-B", None, SMALL_TEXT | {"vision_layers": 2}),
    ],
)
def test_folder_opens_in_open_clip(name, tower, sizes, tmp_path):
    model = randomise(jettclip.create_model(name, text_tower=tower, **sizes))
    save_folder(model, tmp_path)
    other, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{tmp_path}")
    texts = ["a red ring", "a large blue star on the left, " * 20]
    tokens = open_clip.get_tokenizer(f"local-dir:{tmp_path}")(texts)
    assert torch.equal(tokens, jettclip.get_tokenizer(name)(texts))
    photo = Image.fromarray(
        np.random.default_rng(0).integers(0, 256, (300, 280, 3), dtype=np.uint8)
    )
    images = torch.stack([preprocess(photo), preprocess(photo.rotate(90))])
    assert (transforms(model.config)[1](photo) - images[0]).abs().max() < 1e-6
    with torch.inference_mode():
        for ours, theirs in zip(model(images, tokens), other.eval()(images, tokens)):
            assert (ours - theirs).abs().max() < 1e-5


@pytest.mark.parametrize("tower", ["length_aware", "stretched"])
def test_open_clip_refuses_a_text_tower_of_ours(tower, tmp_path):
    save_folder(tiny_model(text_tower=tower), tmp_path)
    with pytest.raises(TypeError, match="hybrid"):
        open_clip.create_model_and_transforms(f"local-dir:{tmp_path}")


def test_someone_elses_open_clip_folder(tmp_path):
    other = open_clip.CLIP(
        48,
        {"image_size": 64, "patch_size": 16, "width": 128, "layers": 2},
        {"context_length": 248, "width": 64, "heads": 1, "layers": 2},
        quick_gelu=True,
    )
    (tmp_path / "open_clip_config.json").write_text("{}")
    save_file(other.state_dict(), tmp_path / "open_clip_model.safetensors")
    model = jettclip.create_model("LongCLIP", tmp_path)
    tokens = longclip_tokens("long", 3)
    with torch.inference_mode():
        assert (model.encode_text(tokens) - other.eval().encode_text(tokens)).abs().max() < 1e-5


@pytest.mark.parametrize(
    "name, sizes", [("JettCLIP-T", TINY), ("LongCLIP-T", {}), ("JettCLIP-S0", SMALL_TEXT)]
)
def test_clip_benchmark_evaluates_our_models(name, sizes, monkeypatch):
    monkeypatch.setattr(
        evaluate, "TIE", 0.0
    )  # an untrained model's similarities hardly differ, and clip_benchmark tells them apart
    model, _, preprocess = jettclip.create_model_and_transforms(name, **sizes)
    randomise(model)
    tokenizer, table = jettclip.get_tokenizer(name), make_pairs(12, seed=0)
    photos = torch.stack([preprocess(Image.open(io.BytesIO(image))) for image in table.image])
    batches = [
        (photos[i : i + 4], [[caption] for caption in table.long[i : i + 4]])
        for i in range(0, 12, 4)
    ]
    theirs = zeroshot_retrieval.evaluate(
        model, batches, tokenizer, "cpu", amp=False, recall_k_list=[1, 5]
    )
    with torch.inference_mode():
        ours = retrieval(
            model.encode_image(photos, True), model.encode_text(tokenizer(list(table.long)), True)
        )
    ours = ours.set_index("metric").value
    for metric, key in (
        ("t2i_r1", "image_retrieval_recall@1"),
        ("t2i_r5", "image_retrieval_recall@5"),
        ("i2t_r1", "text_retrieval_recall@1"),
        ("i2t_r5", "text_retrieval_recall@5"),
    ):
        assert ours[metric] == pytest.approx(theirs[key], abs=1e-6)
    labels = DataLoader(TensorDataset(photos, torch.arange(12) % 2), batch_size=4)
    labels.dataset.classes = ["circle", "star"]
    accuracy = zeroshot_classification.evaluate(
        model, labels, tokenizer, labels.dataset.classes, ["a {c}."], "cpu", amp=False
    )
    with torch.inference_mode():
        classes = model.encode_text(tokenizer(["a circle.", "a star."]), True)
        right = (model.encode_image(photos, True) @ classes.T).argmax(dim=1) == torch.arange(12) % 2
    assert accuracy["acc1"] == pytest.approx(right.double().mean().item())
