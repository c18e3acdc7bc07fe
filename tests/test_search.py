"""Photo search: the index follows the folder, survives a kill, and no file stops it."""

import json
import os
import shutil
import subprocess
import sys
import time
from multiprocessing import get_context
from types import ModuleType
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from PIL import Image
from test_runtime import photo

import jettclip
from jettclip import checkpoints, search
from jettclip.datasets.scenes import make_pairs
from jettclip.deploy import runtime
from jettclip.inputs import read_photo
from jettclip.models import transforms

NO_TORCH = "import sys; sys.modules['torch'] = None; from jettclip.search import main; main()"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """20 scenes as photos, some in a subfolder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "photos/more").mkdir(parents=True)
    for row, image in enumerate(make_pairs(20, seed=1, size=48).image):
        (tmp_path / f"photos/{'more/' if row % 3 == 0 else ''}{row:02}.png").write_bytes(image)
    return tmp_path / "photos"


@pytest.fixture(scope="module")
def loaded(exported):
    return runtime.load(exported[1])


@pytest.fixture
def update(folder, loaded):
    """Function that opens and updates the index of `folder` -> (index, counts, its sentences)."""

    def updated(model=loaded, file=None):
        sentences = []
        index = search.PhotoIndex(folder, model, file, sentences.append)
        counts = list(index.update().values())[:5]  # new, changed, gone, unseen, unreadable
        return index, counts, sentences

    return updated


def test_the_best_photos_by_hand(folder, exported, update, monkeypatch):
    index, text = update()[0], "a red ring left of a blue star " * 8
    model, paths = exported[0], sorted(folder.rglob("*.png"))
    prepare, tokens = transforms(model.config)[1], jettclip.get_tokenizer("JettCLIP-T")([text])
    with torch.inference_mode():
        images = torch.stack([prepare(read_photo(path)) for path in paths])
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
    assert not gradio.Warning.called
    answer("a red ring " * 100, 3)
    sentence = "the description has 302 tokens: the model reads the first 248"
    gradio.Warning.assert_called_once_with(sentence)


def test_the_index_follows_the_folder(folder, update, monkeypatch):
    assert update()[1] == [20, 0, 0, 0, 0]
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
    assert counts == [1, 2, 1, 0, 0] and sum(calls) == 3
    found = dict(index.search("a star", 100))
    assert len(found) == 20 and found[folder / "copy.PNG"] == found[folder / "01.png"]
    assert found[folder / "04.png"] == found[folder / "02.png"] and folder / "07.png" not in found
    assert update()[1] == [0, 0, 0, 0, 0]


def test_no_file_stops_it_and_what_is_not_read_is_said(folder, update):
    whole, outside = (folder / "01.png").read_bytes(), folder.parent / "outside"
    (folder / "half.png").write_bytes(whole[: len(whole) // 2])
    (folder / "text.jpg").write_text("not a photo")
    (folder / "empty.jpeg").touch()
    Image.new("1", (13000, 13000)).save(folder / "bomb.png")  # of 20 kB
    Image.open(folder / "01.png").save(folder / "good.avif")
    photo(os.fsencode(folder) + b"/bytes-\xff\n\x1b[31m.jpg", orientation=6)
    (folder / "phone.HEIC").touch()
    os.mkfifo(folder / "pipe.jpg")
    shutil.copytree(folder / "more", outside)
    (folder / "gone.png").symlink_to(folder / "nowhere.png")
    (folder / "out.png").symlink_to(outside / "00.png")
    (folder / "in.png").symlink_to(folder / "01.png")
    (folder / "folder").symlink_to(outside)
    index, counts, (*sentences, last) = update()
    assert counts == [23, 0, 0, 0, 4] and len(found := index.search("a", 100)) == 23
    assert not [path for path, _ in found if path.name == "out.png" or outside in path.parents]
    names = sorted(sentence.split("skipped: ")[1].split(" ")[0] for sentence in sentences)
    assert names == ["bomb.png", "empty.jpeg", "half.png", "text.jpg"]
    assert last.startswith("not read: 1 link(s) to folders, 2 link(s) that lead out of the folder")
    for reason in ("1 .heic file(s)", "1 pipe(s)", "4 unreadable photo(s)"):
        assert f", {reason}" in last
    (folder / "02.png").unlink()  # after the search: a grey thumbnail
    page = search.page("a", index.search("a", 100)).encode()
    assert page.count(b"<img") == 23 and rb"bytes-\udcff\n\x1b[31m.jpg" in page
    (folder / "half.png").write_bytes(whole)
    assert update()[1] == [1, 0, 1, 0, 3]  # tries the unreadable ones each time


@pytest.mark.parametrize("lost", ["missing", "empty", "all"])
def test_photos_that_cannot_be_seen_stay_in_the_index(lost, folder, update, tmp_path):
    """As on a disk that is not mounted: nothing is embedded again when it is back."""
    file, disk = tmp_path / "index.npz", folder if lost == "all" else folder / "more"
    update(file=file)
    disk.rename(tmp_path / "disk")
    if lost != "missing":
        disk.mkdir()
    unseen = 20 if lost == "all" else 7
    index, counts, sentences = update(file=file)
    assert counts == [0, 0, 0, unseen, 0] and len(index.search("a", 100)) == 20 - unseen
    assert sentences == [
        f"not read: {unseen} photo(s) of folders that are missing or empty now, kept"
    ]
    if lost != "all":
        (folder / "01.png").unlink()
        assert update(file=file)[1] == [0, 0, 1, unseen, 0]
    shutil.rmtree(disk, ignore_errors=True)
    (tmp_path / "disk").rename(disk)
    assert update(file=file)[1] == [0, 0, 0, 0, 0]


def hostile(index, **changed):
    """Write an index with other arrays, or other paths among its facts."""
    with np.load(index.file) as saved:
        arrays = dict(saved)
    facts = json.loads(arrays["facts"].tobytes())
    facts["paths"] = changed.pop("paths", facts["paths"])
    facts = {"facts": np.frombuffer(json.dumps(facts).encode(), np.uint8)}
    np.savez(index.file, **arrays | facts | changed)


def test_a_damaged_or_hostile_index_is_built_again(update):
    index = update()[0]
    data = index.file.read_bytes()
    nothing, nan = np.zeros((20, 5), np.float32), np.full((20, 16), np.nan, np.float32)
    changes = [{"features": nothing}, {"features": nan}, {"features": np.array([print] * 20)}]
    damaged = data[:-4] + b"\x85" + data[-3:]  # zipfile seeks before its start: an OSError
    for change in (b"", data[: len(data) // 2], damaged, *changes, {"paths": ["../a.png"] * 3}):
        if isinstance(change, dict):
            hostile(index, **change)
        else:
            index.file.write_bytes(change)
        _, counts, (sentence,) = update()
        assert counts == [20, 0, 0, 0, 0] and f"{index.file} is not used (" in sentence


def test_nothing_in_the_folder_is_trusted(folder, update, tmp_path):
    (tmp_path / "secret.png").write_bytes((folder / "01.png").read_bytes())
    names = ["../secret.png", str(tmp_path / "secret.png"), *map(str, range(18))]
    hostile(update()[0], paths=names)
    index, counts, _ = update()
    assert counts[0] == 20 and all(path.is_relative_to(folder) for path, _ in index.search("a", 40))
    (folder / ".jettclip").rename(tmp_path / "elsewhere")
    (folder / ".jettclip").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="is a link out of the folder: name a file with --index"):
        update()
    os.mkfifo(tmp_path / "pipe")  # as the index: nothing waits for it
    assert update(file=tmp_path / "pipe")[1][0] == 20


def test_another_model_means_indexing_again(exported, update, tmp_path):
    index, other = update()[0], shutil.copytree(exported[1], tmp_path / "other")
    config = json.loads((other / "deploy.json").read_text())
    same = {**config, "versions": {}}  # another export of the same weights
    for changed, counted in ((same, 0), ({**config, "image_weights": "0"}, 20)):
        (other / "deploy.json").write_text(json.dumps(changed))
        problem = f"{index.file} is not used (it is of another model): indexing photos again"
        _, counts, sentences = update(runtime.load(other))
        assert (counts, sentences) == ([counted, 0, 0, 0, 0], [problem] * (counted > 0))


def test_killed_indexing_resumes(folder, update):
    def slowly():
        search.CHUNK, search.SAVE_EVERY = 2, 4
        pixels = search.PhotoIndex.pixels
        search.PhotoIndex.pixels = lambda self, path: (time.sleep(0.05), pixels(self, path))[1]
        update()

    file, saved = folder / ".jettclip/index.npz", []
    process = get_context("fork").Process(target=slowly)
    process.start()
    while process.is_alive() and not saved:
        time.sleep(0.01)
        if file.exists():
            with np.load(file) as arrays:
                saved = json.loads(arrays["facts"].tobytes())["paths"]
    process.kill()
    process.join()
    writes = folder / ".jettclip/.index.npz.tmp1.npz"  # another search, now
    writes.touch()
    (index, counts, _), (fresh, *_) = update(), update(file=folder.parent / "fresh.npz")
    assert counts == [20 - len(saved), 0, 0, 0, 0] and 0 < len(saved) < 20
    best = [(path, pytest.approx(score, abs=1e-5)) for path, score in fresh.search("a star", 20)]
    assert index.search("a star", 20) == best
    assert writes.exists()


def test_the_command_line_needs_no_torch(folder, exported, update, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.html").touch()
    (tmp_path / "locked").touch()
    monkeypatch.setitem(sys.modules, "gradio", ModuleType("gradio"))  # a folder of that name
    update()  # its index names no model
    with monkeypatch.context() as patch:  # before any work
        patch.setattr(search.PhotoIndex, "embed", lambda *_: pytest.fail("embeds"))
        for arguments, message in (
            ("photos x", "error: no model was used for photos before: name one with --model"),
            (f"~/nowhere --model {exported[1]}", f"{tmp_path}/nowhere is not a folder"),
            ("photos --model ~/nothing", f"{tmp_path}/nothing is no export folder, run folder or"),
            ("photos --model notes.html", "--name which model notes.html holds"),
            (f"photos --model {exported[1]} --web", "--web needs Gradio: pip install 'jettclip"),
            ("photos --html locked/x.html", "cannot write .*locked/x.html .*use another --html"),
            ("photos --html photos", "photos .it is a folder.: use another --html"),
            (
                f"photos --model {exported[1]} --index locked/x",
                "cannot write .*: use another --index",
            ),
        ):
            with pytest.raises(SystemExit, match=message):
                search.main(arguments.split())
    text = "<i>it's ½ a star</i>"
    search.main(["~/photos", "--model", str(exported[1])])  # the model is now the folder's last
    index, arguments = update()[0], ["photos", text, "--top", "2", "--html", "found.html"]
    command = [sys.executable, "-c", NO_TORCH, *arguments]
    finished = subprocess.run(command, capture_output=True, text=True)
    lines = finished.stdout.splitlines() or pytest.fail(finished.stderr)
    assert lines[0] == "20 photos; 0 new, 0 changed, 0 gone, 0 unseen, 0 unreadable"
    assert lines[1].startswith("answered in ") and len(lines) == 4
    html = (tmp_path / "found.html").read_text()
    assert html.count("data:image/jpeg;base64,/9j/") == 2 and "&lt;i&gt;it&#x27;s ½ a star" in html
    for line, (path, score) in zip(lines[2:], index.search(text, 2), strict=True):
        assert line == f"{score:.3f}  {path.relative_to(tmp_path)}" and str(path.name) in html


def test_a_run_folder_is_exported_once(exported, tmp_path, monkeypatch, capsys):
    def export(model, target):  # in a moment; test_export tests the real one
        assert model is exported[0]
        return shutil.copytree(exported[1], target, dirs_exist_ok=True)

    monkeypatch.setattr("jettclip.deploy.export.export", export)
    monkeypatch.setattr("jettclip.models.load_folder", lambda path: exported[0])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    checkpoints.save_folder(exported[0], tmp_path / "run/student")
    for turn in range(3):
        loaded = search.open_model(tmp_path / "run")
        assert loaded.folder.parent == tmp_path / "cache/jettclip"
        assert ("exporting" in capsys.readouterr().out) == (turn != 1)
        if turn == 1:
            (loaded.folder / "deploy.json").write_text("{}")  # of another version
    os.utime(tmp_path / "run/student/open_clip_model.safetensors", ns=(0, 0))  # trained again
    assert search.open_model(tmp_path / "run").folder != loaded.folder
