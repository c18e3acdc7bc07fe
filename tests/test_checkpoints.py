"""A model folder gives back the model that was saved, and a write that fails changes nothing."""
import json

import pytest
import torch
from conftest import MODELS_AND_TOWERS, TINY, randomise, tiny_model

import jettclip
from jettclip.checkpoints import file_hash, load_folder, save_folder, write_json, write_then_rename


def outputs(model):
    torch.manual_seed(0)
    size = model.image_size
    tokens = jettclip.get_tokenizer(model.name)(["a red ring", "a large blue star, " * 20])
    with torch.inference_mode():
        return *model(torch.rand(2, 3, size, size), tokens),


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
    assert saved["model_cfg"]["embed_dim"] == TINY["embed_dim"] and saved["model_cfg"]["custom_text"]
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
