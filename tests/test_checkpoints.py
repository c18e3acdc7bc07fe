"""Published files compute what their authors' code computes; files that do not fit are refused."""

import io
import json
import os
from unittest.mock import Mock

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from clip_benchmark.metrics import zeroshot_classification, zeroshot_retrieval
from conftest import TINY, largest, randomise, tiny_model
from golden_values import GOLDEN, drawn, longclip_tokens, state_dict
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch.utils.data import DataLoader, TensorDataset

import jettclip
from jettclip import checkpoints, evaluate, train
from jettclip.checkpoints import CONFIG, WEIGHTS, file_hash, longclip_sizes, save_folder
from jettclip.datasets.scenes import make_pairs
from jettclip.models import PLAIN, TEXT_TOWERS, load_folder, model_config, transforms
from jettclip.text import stretch_positions


def equal(model, other):
    state = other.state_dict()
    return all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("tower", TEXT_TOWERS)
def test_round_trip(tower, tmp_path):
    model, folder = randomise(tiny_model(text_tower=tower)), tmp_path / "new/student"
    save_folder(model.to(memory_format=torch.channels_last), folder)
    loaded, hashes = load_folder(folder), {file_hash(folder)}
    assert equal(loaded, model)
    assert (loaded.name, loaded.config, loaded.training) == (model.name, model.config, False)
    assert {path.name for path in folder.iterdir()} == {"README.md", CONFIG, WEIGHTS}
    saved = json.loads((folder / CONFIG).read_text())
    assert saved["model_cfg"]["custom_text"] and saved["preprocess_cfg"]["mean"] == [0, 0, 0]
    model.logit_scale.data += 1
    for mean in (0, 0.5):  # with it, the same weights read other pixels
        model.config = {**model.config, "preprocess": {**PLAIN, "mean": [mean] * 3}}
        save_folder(model, folder)
        hashes.add(file_hash(folder))
    assert len(hashes) == 3
    with pytest.raises(ValueError, match="is reparameterised: save the model before folding"):
        save_folder(jettclip.reparameterize(model), tmp_path)


def test_a_full_disk_is_named(tmp_path, monkeypatch):
    full = Mock(side_effect=SafetensorError("I/O error: No space left on device (os error 28)"))
    monkeypatch.setattr(checkpoints, "save_file", full)
    with pytest.raises(OSError, match=f"write to {tmp_path}/new, .* GB .*No space .*make room"):
        save_folder(tiny_model(), tmp_path / "new")


@pytest.mark.parametrize("missing", [CONFIG, WEIGHTS])
def test_incomplete_folder(missing, tmp_path):
    save_folder(tiny_model(), tmp_path)
    (tmp_path / missing).unlink()
    with pytest.raises(FileNotFoundError, match=f"has no {missing}: it is no"):
        jettclip.create_model("JettCLIP-T", tmp_path)


@pytest.fixture
def no_random_weights(monkeypatch):
    """New weights are what lies in memory: a published file replaces all of them."""
    for draw in ("normal_", "uniform_", "erfinv_"):
        monkeypatch.setattr(torch.Tensor, draw, lambda tensor, *args, **kwargs: tensor)


@pytest.fixture(scope="session")
def tiny_file(tmp_path_factory):
    """A Long-CLIP checkpoint as published: a plain state dict."""
    path = tmp_path_factory.mktemp("longclip") / "longclip-tiny.pt"
    torch.save(state_dict("longclip_tiny"), path)
    return path


@pytest.fixture
def tiny_open_clip():
    """A model with OpenAI's keys and 77 tokens."""
    torch.manual_seed(0)
    vision = {"image_size": 64, "patch_size": 16, "width": 128, "layers": 2}
    text = {"context_length": 77, "width": 64, "heads": 1, "layers": 2}
    return open_clip.CLIP(48, vision, text, quick_gelu=True).eval()


def error(features, golden):
    """The largest 1 - cosine of all rows."""
    golden = torch.from_numpy(golden).double()
    return 1 - F.cosine_similarity(features.double(), golden, dim=1).min().item()


@torch.inference_mode()
@pytest.mark.parametrize("size, tolerance", [("s0", 1e-5), ("s1", 1e-4), ("s2", 1e-4), ("b", 1e-5)])
def test_mobileclip_agrees_with_apples_code(size, tolerance, tmp_path, no_random_weights):
    golden, name = np.load(GOLDEN / "mobileclip_seed0.npz"), f"mobileclip_{size}"
    torch.save(state_dict(name), tmp_path / "apple.pt")
    model = jettclip.create_model(f"MobileCLIP-{size.upper()}", tmp_path / "apple.pt")
    images = drawn(f"{name}/image", 2, 3, model.image_size, model.image_size)
    tokens = torch.from_numpy(golden[f"{name}/tokens"])
    assert error(model.encode_image(images), golden[f"{name}/image_features"]) < tolerance
    assert error(model.encode_text(tokens), golden[f"{name}/text_features"]) < 1e-5
    folded = jettclip.reparameterize(model)
    assert error(folded.encode_image(images), golden[f"{name}/reparam_image_features"]) < 1e-4
    assert error(folded.encode_text(tokens), golden[f"{name}/reparam_text_features"]) < 1e-4
    if size == "s2":
        return  # no values were recorded at 248 tokens
    golden, student = np.load(GOLDEN / "jettclip_text248_seed0.npz"), f"JettCLIP-{size.upper()}"
    student = jettclip.create_model(student, tmp_path / "apple.pt", text_tower="stretched")
    features = student.encode_text(torch.from_numpy(golden[f"{name}/tokens248"]))
    assert error(features, golden[f"{name}/stretched_text_features"]) < 1e-5
    same = zip(student.visual.parameters(), model.visual.parameters(), strict=True)
    assert all(torch.equal(weight, expected) for weight, expected in same)


def test_sizes_of_longclip_are_read_from_its_file():
    """Of a small one, test_losses.test_longclip compares the features with the published code's."""
    shapes = json.loads((GOLDEN / "longclip_B.keys.json").read_text())
    state = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    assert longclip_sizes(state).items() <= model_config("LongCLIP-B").items()


def test_an_openai_archive_is_read_when_it_is_named_as_such(tiny_open_clip, tmp_path):
    path, mask = tmp_path / "ViT-tiny.pt", tiny_open_clip.attn_mask
    del tiny_open_clip.attn_mask  # OpenAI's files have no such buffer
    tiny_open_clip.attn_mask = mask
    torch.jit.script(tiny_open_clip).save(path)
    problem = f"TorchScript archive: if it is OpenAI's, write pretrained='openai:{path}'"
    with pytest.raises(ValueError, match=problem):
        jettclip.create_model("LongCLIP", path)
    model = jettclip.create_model("LongCLIP", f"openai:{path}")
    assert model.context_length == 77 and not model.training
    assert largest(model.visual.proj, tiny_open_clip.visual.proj) < 1e-3  # from half precision
    assert largest(model.text.text_projection, tiny_open_clip.text_projection) < 1e-3


def test_a_folder_of_open_clip_only(tiny_open_clip, tmp_path):
    (tmp_path / CONFIG).write_text("{}")
    save_file(tiny_open_clip.state_dict(), tmp_path / WEIGHTS)
    model, tokens = jettclip.create_model("LongCLIP", tmp_path), longclip_tokens("short", 3)[:, :77]
    with torch.inference_mode():
        assert largest(model.encode_text(tokens), tiny_open_clip.encode_text(tokens)) < 1e-5
    with pytest.raises(ValueError, match="is no model folder of JettCLIP: create_model.NAME"):
        load_folder(tmp_path)


@pytest.mark.parametrize("mode", ["longclip", "exact"])
def test_positions_of_a_77_token_file_are_stretched(mode, tmp_path):
    short, path = tiny_model(context_length=77), tmp_path / "short.safetensors"
    save_file(short.state_dict(), path)
    long = jettclip.create_model("JettCLIP-T", path, stretch=mode, **TINY)
    expected = stretch_positions(short.text.positional_embedding, mode=mode)
    assert torch.equal(long.text.positional_embedding, expected)


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("was-here",)


def test_a_pickle_is_never_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"text_projection": Malicious()}, "bad.pt")
    with pytest.raises(ValueError, match="is refused, as it holds more than tensors"):
        jettclip.create_model("LongCLIP", "bad.pt")
    assert not os.path.exists("was-here")


@pytest.mark.parametrize(
    "name, content, problem",
    [
        ("a.pt", None, "a.pt' is neither a file nor a folder here"),
        ("a.safetensors", b"\x00" * 20, "no whole checkpoint"),
        ("a.pt", "half", "no whole checkpoint"),
        ("a.pt", [1, 2], "holds no state dict"),
        ("a.pt", {"step": 3}, "holds no state dict"),
        ("a.pt", {"x": torch.ones(1)}, "no Long-CLIP checkpoint: KeyError.'visual.conv1.weight'"),
        ("a.pt", b"<html>404", "no whole checkpoint .it begins b'<html>404'; .*again"),
        ("openai:a.pt", b"garbage", "a.pt is no whole checkpoint"),
    ],
)
def test_files_that_are_no_checkpoint(name, content, problem, tmp_path, tiny_file):
    content = tiny_file.read_bytes()[:100_000] if content == "half" else content
    *kind, file = name.rpartition(":")
    if isinstance(content, bytes):
        (tmp_path / file).write_bytes(content)
    elif content is not None:
        torch.save(content, tmp_path / file)
    with pytest.raises((ValueError, FileNotFoundError), match=problem):
        jettclip.create_model("LongCLIP", "".join(kind) + str(tmp_path / file))


@pytest.mark.parametrize("file", ["wrapped.pt", "a.safetensors"])
def test_words_before_the_names_are_left_out(file, tmp_path):
    """DistributedDataParallel and torch.compile put them there, also before those of a tower."""
    model = tiny_model()
    for change in (
        lambda key: f"module._orig_mod.{key}",
        lambda key: key.replace("visual.", "visual._orig_mod.").replace("text.", "text.module."),
    ):
        state = {change(key): value.clone() for key, value in model.state_dict().items()}
        if file == "wrapped.pt":
            torch.save({"state_dict": state}, tmp_path / file)
        else:
            save_file(state, tmp_path / file)
        assert equal(jettclip.create_model("JettCLIP-T", tmp_path / file, **TINY), model)


def test_a_checkpoint_of_ours_is_what_it_says(dataset, tmp_path, monkeypatch):
    """As a folder, as its weights and as last.ckpt, from a folder where the user stands."""
    trained = train.fit(tiny_model(), train.Config(steps=1, batch_size=8), dataset, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for source in ("student", f"student/{WEIGHTS}", "last.ckpt", "~/last.ckpt"):
        sizes = {} if source == "student" else {"text_tower": "length_aware", **TINY}
        model = jettclip.create_model("JettCLIP-T", source, **sizes)
        assert model.config == trained.config and not model.training and equal(model, trained)
        for name, asked in (
            ("LongCLIP-T", {}),
            ("JettCLIP-T", {"text_tower": "stretched", **TINY}),  # the same keys
            ("JettCLIP-T", {"image_size": 64}),
        ):
            with pytest.raises(ValueError, match=f"{source} holds JettCLIP-T with"):
                jettclip.create_model(name, source, **asked)
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}/none.pt' is neither"):
        jettclip.create_model("JettCLIP-T", "none.pt")


def test_keys_that_do_not_fit_are_named(tmp_path, tiny_file):
    state = state_dict("longclip_tiny") | {"visual.proj": torch.ones(2, 2), "head": torch.ones(1)}
    del state["ln_final.bias"]
    state["ln_final.weight"][0] = torch.nan
    torch.save(state, tmp_path / "odd.pt")
    problem = "it lacks text.ln_final.bias .1 in all.; it has, left over, head .*; of another shape"
    problem += " is visual.proj .*; not of finite numbers is text.ln_final.weight"
    with pytest.raises(ValueError, match=f"odd.pt does not fit LongCLIP .*{problem}"):
        jettclip.create_model("LongCLIP", tmp_path / "odd.pt")
    with pytest.raises(ValueError, match="JettCLIP-T .*lacks .* in all.; it has, left over, .* in"):
        jettclip.create_model("JettCLIP-T", tiny_file)


SMALL_TEXT = {"text_width": 64, "text_heads": 1, "text_layers": 2}


@pytest.mark.parametrize(
    "name, tower, sizes",
    [
        ("JettCLIP-S0", "longclip", SMALL_TEXT),
        ("JettCLIP-B", "stretched", SMALL_TEXT),
        ("JettCLIP-T", "longclip", {}),
        ("LongCLIP-B", None, SMALL_TEXT | {"vision_layers": 2}),
    ],
)
def test_folder_opens_in_open_clip(name, tower, sizes, tmp_path):
    model = randomise(jettclip.create_model(name, text_tower=tower, **sizes))
    save_folder(model, tmp_path)
    theirs, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{tmp_path}")
    texts = ["a red ring", "a large blue star on the left, " * 20]
    tokens = open_clip.get_tokenizer(f"local-dir:{tmp_path}")(texts)
    assert torch.equal(tokens, jettclip.get_tokenizer(name)(texts))
    pixels = np.random.default_rng(0).integers(0, 256, (300, 280, 3), dtype=np.uint8)
    images = torch.stack([preprocess(Image.fromarray(x)) for x in (pixels, pixels[::-1])])
    assert largest(transforms(model.config)[1](Image.fromarray(pixels)), images[0]) < 1e-6
    with torch.inference_mode():
        found, expected = model(images, tokens), theirs.eval()(images, tokens)
    assert max(map(largest, found, expected)) < 1e-5


@torch.inference_mode()
def test_clip_benchmark_evaluates_our_models(monkeypatch):
    monkeypatch.setattr(evaluate, "TIE", 0.0)  # similarities of an untrained model hardly differ
    model, _, preprocess = jettclip.create_model_and_transforms("JettCLIP-T", **TINY)
    tokenizer, table = jettclip.get_tokenizer("JettCLIP-T"), make_pairs(12, seed=0)
    model = randomise(model)
    photos = torch.stack([preprocess(Image.open(io.BytesIO(image))) for image in table.image])
    batches = [(photos[i : i + 4], [[text] for text in table.long[i : i + 4]]) for i in (0, 4, 8)]
    cpu = {"device": "cpu", "amp": False}
    theirs = zeroshot_retrieval.evaluate(model, batches, tokenizer, recall_k_list=[1, 5], **cpu)
    image = model.encode_image(photos, True)
    text = model.encode_text(tokenizer([*table.long]), True)
    ours = evaluate.retrieval(image, text).set_index("metric").value
    for k in (1, 5):
        t2i, i2t = theirs[f"image_retrieval_recall@{k}"], theirs[f"text_retrieval_recall@{k}"]
        assert [ours[f"t2i_r{k}"], ours[f"i2t_r{k}"]] == pytest.approx([t2i, i2t], abs=1e-6)
    labels, names = torch.arange(12) % 2, ["circle", "star"]
    loader = DataLoader(TensorDataset(photos, labels), batch_size=4)
    loader.dataset.classes = names
    theirs = zeroshot_classification.evaluate(model, loader, tokenizer, names, ["a {c}."], **cpu)
    classes = model.encode_text(tokenizer(["a circle.", "a star."]), True)
    right = (image @ classes.T).argmax(dim=1) == labels
    assert theirs["acc1"] == pytest.approx(right.double().mean().item())
