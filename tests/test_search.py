"""Photo search: the index follows the folder, survives a kill, and no file stops it."""

import os
import shutil
import subprocess
import sys
import time
from multiprocessing import get_context
from unittest.mock import MagicMock

import pytest
import torch
from test_runtime import photo

import jettclip
from jettclip import checkpoints, search
from jettclip.datasets.scenes import make_pairs
from jettclip.deploy import runtime
from jettclip.models import transforms

NO_TORCH = "import sys; sys.modules['torch'] = None; from jettclip.search import main; main()"


@pytest.fixture
def folder(tmp_path):
    """20 scenes as photos, some in a subfolder."""
    (tmp_path / "photos/more").mkdir(parents=True)
    for row, image in enumerate(make_pairs(20, seed=1, size=48).image):
        (tmp_path / f"photos/{'more/' if row % 3 == 0 else ''}{row:02}.png").write_bytes(image)
    return tmp_path / "photos"


@pytest.fixture
def update(folder, exported):
    """Function that opens and updates the index of `folder` -> (index, counts, its sentences)."""

    def updated(export=exported[1], file=None):
        sentences = []
        index = search.PhotoIndex(folder, runtime.load(export), file, sentences.append)
        counts = list(index.update().values())[:4]  # new, changed, gone, unreadable
        return index, counts, sentences

    return updated


def test_the_best_photos_by_hand(folder, exported, update, monkeypatch):
    index, text = update()[0], "a red ring left of a blue star " * 8
    model, paths = exported[0], sorted(folder.rglob("*.png"))
    prepare, tokens = transforms(model.config)[1], jettclip.get_tokenizer("JettCLIP-T")([text])
    with torch.inference_mode():
        images = torch.stack([prepare(runtime.read_photo(path)) for path in paths])
        scores = model.encode_image(images, True) @ model.encode_text(tokens, True)[0]  # (20,)
    best, found = scores.sort(descending=True), index.search(text, 3)
    assert [path for path, _ in found] == [paths[row] for row in best.indices[:3]]
    expected = best.values[:3].tolist()
    assert [score for _, score in found] == pytest.approx(expected, abs=1e-5)

    monkeypatch.setitem(sys.modules, "gradio", gradio := MagicMock())  # the web page
    search.web(index)
    answer = gradio.Interface.call_args.args[0]
    captions = [f"{score:.3f} {path.name}" for path, score in found]
    assert [caption for _, caption in answer(text, 3)] == captions and answer(" ", 3) == []


def test_the_index_follows_the_folder(folder, update, monkeypatch):
    assert update()[1] == [20, 0, 0, 0]
    shutil.copy(folder / "01.png", folder / "copy.PNG")
    shutil.copy(folder / "02.png", folder / "04.png")
    os.utime(folder / "05.png", ns=(0, 0))
    (folder / "07.png").unlink()
    (folder / ".hidden.png").write_bytes(b"")
    (folder / "notes.txt").write_text("no photo")
    calls, encode = [], runtime.ExportedModel.encode_image
    monkeypatch.setattr(
        runtime.ExportedModel, "encode_image", lambda *a: (calls.append(len(a[1])), encode(*a))[1]
    )
    index, counts, _ = update()
    assert counts == [1, 2, 1, 0] and sum(calls) == 3
    found = dict(index.search("a star", 100))
    assert len(found) == 20 and found[folder / "copy.PNG"] == found[folder / "01.png"]
    assert found[folder / "04.png"] == found[folder / "02.png"] and folder / "07.png" not in found
    assert update()[1] == [0, 0, 0, 0]


def test_no_file_stops_it(folder, update):
    whole = (folder / "01.png").read_bytes()
    (folder / "half.png").write_bytes(whole[: len(whole) // 2])
    (folder / "text.jpg").write_text("not a photo")
    (folder / "empty.jpeg").touch()
    (folder / "gone.png").symlink_to(folder / "nowhere.png")
    photo(os.fsencode(folder) + b"/bytes-\xff\n.jpg", orientation=6)
    index, counts, sentences = update()
    assert counts == [21, 0, 0, 3] and len(index.search("a", 100)) == 21
    names = sorted(sentence.split("skipped: ")[1].split(" ")[0] for sentence in sentences)
    assert names == ["empty.jpeg", "half.png", "text.jpg"]
    (folder / "02.png").unlink()  # after the search: a grey thumbnail
    assert search.page("a", index.search("a", 100)).encode().count(b"<img") == 21
    (folder / "half.png").write_bytes(whole)
    assert update()[1] == [1, 0, 1, 2]  # tries the unreadable ones each time


def test_another_model_or_a_damaged_file_means_indexing_again(exported, update, tmp_path):
    index = update()[0]
    other = shutil.copytree(exported[1], tmp_path / "other")
    config = (other / "deploy.json").read_text().replace(index.identity, "0" * 64)
    (other / "deploy.json").write_text(config)
    problem = f"{index.file} is of model {exported[1]}: indexing all photos again"
    assert update(other)[1:] == ([20, 0, 0, 0], [problem])
    data = index.file.read_bytes()
    for broken in (b"", data[: len(data) // 2], b"x" * 100):
        index.file.write_bytes(broken)
        _, counts, (sentence,) = update(other)
        assert counts == [20, 0, 0, 0] and "index.npz is damaged" in sentence


def test_killed_indexing_resumes(folder, update):
    def slowly():
        search.CHUNK, search.SAVE_EVERY = 2, 4
        pixels = search.PhotoIndex.pixels
        search.PhotoIndex.pixels = lambda self, path: (time.sleep(0.05), pixels(self, path))[1]
        update()

    file, saved = folder / ".jettclip/index.npz", []
    for _ in range(2):
        process, before = get_context("fork").Process(target=slowly), len(saved)
        process.start()
        while process.is_alive() and len(saved) == before:
            time.sleep(0.01)
            saved = (search.read_index(file, report=pytest.fail) or {"paths": []})["paths"]
        process.kill()
        process.join()
    (folder / ".jettclip/.index.npz.tmp1.npz").write_bytes(b"half")  # killed while it was writing
    (index, counts, _), (fresh, *_) = update(), update(file=folder.parent / "fresh.npz")
    assert counts == [20 - len(saved), 0, 0, 0] and 0 < len(saved) < 20
    best = [(path, pytest.approx(score, abs=1e-5)) for path, score in fresh.search("a star", 20)]
    assert index.search("a star", 20) == best
    assert [path.name for path in (folder / ".jettclip").iterdir()] == ["index.npz"]


def test_the_command_line_needs_no_torch(folder, exported, update, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.html").touch()
    monkeypatch.setitem(sys.modules, "gradio", None)
    for arguments, message in (
        ("photos x", "error: photos has no index yet: name a model with --model"),
        (f"nowhere --model {exported[1]}", "nowhere is not a folder"),
        ("photos --model nothing", "nothing is no export folder, run folder or checkpoint"),
        ("photos --model notes.html", "--name which model notes.html holds"),
        (f"photos --model {exported[1]} --web", "--web needs Gradio: pip install 'jettclip"),
    ):
        with pytest.raises(SystemExit, match=message):
            search.main(arguments.split())
    # The model is now that of the index.
    index, text = update()[0], "<i>it's ½ a star</i>"
    arguments = ["photos", text, "--top", "2", "--html", "found.html"]
    command = [sys.executable, "-c", NO_TORCH, *arguments]
    finished = subprocess.run(command, capture_output=True, text=True)
    lines = finished.stdout.splitlines() or pytest.fail(finished.stderr)
    assert lines[0] == "20 photos; 0 new, 0 changed, 0 gone, 0 unreadable"
    assert lines[1].startswith("answered in ") and len(lines) == 4
    html = (tmp_path / "found.html").read_text()
    assert html.count("data:image/jpeg;base64,/9j/") == 2 and "&lt;i&gt;it&#x27;s ½ a star" in html
    for line, (path, score) in zip(lines[2:], index.search(text, 2), strict=True):
        assert line == f"{score:.3f}  {path.relative_to(tmp_path)}" and str(path.name) in html


def test_a_run_folder_is_exported_once(exported, tmp_path, monkeypatch, capsys):
    def export(model, target):  # in a moment; test_export tests the real one
        weights = (m.state_dict().values() for m in (model, exported[0]))
        assert all(map(torch.equal, *weights))
        shutil.copytree(exported[1], target)

    monkeypatch.setattr("jettclip.deploy.export.export", export)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    checkpoints.save_folder(exported[0], tmp_path / "run/student")
    for turn in range(2):
        loaded = search.open_model(tmp_path / "run")
        assert loaded.folder.parent == tmp_path / "cache/jettclip"
        assert ("exporting" in capsys.readouterr().out) == (turn == 0)
    os.utime(tmp_path / "run/student/open_clip_model.safetensors", ns=(0, 0))  # trained again
    assert search.open_model(tmp_path / "run").folder != loaded.folder
