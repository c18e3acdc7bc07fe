"""Photo search: the index follows the folder, survives a kill, and no file stops it."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from test_runtime import photo

import jettclip
from jettclip import checkpoints, search
from jettclip.datasets.scenes import make_pairs
from jettclip.deploy import runtime
from jettclip.models import transforms

NO_TORCH = "import sys; sys.modules['torch'] = None; from jettclip.search import main; main()"
SLOW = """
import sys, time
from jettclip import search
from jettclip.deploy import runtime
search.CHUNK, search.SAVE_EVERY = 2, 4
pixels = search.PhotoIndex.pixels
search.PhotoIndex.pixels = lambda self, path: (time.sleep(0.05), pixels(self, path))[1]
search.PhotoIndex(sys.argv[1], runtime.load(sys.argv[2])).update()
"""


@pytest.fixture
def folder(tmp_path):
    """20 scenes as photos, some in a subfolder."""
    (tmp_path / "photos/more").mkdir(parents=True)
    for row, image in enumerate(make_pairs(20, seed=1, size=48).image):
        (tmp_path / f"photos/{'more/' if row % 3 == 0 else ''}{row:02}.png").write_bytes(image)
    return tmp_path / "photos"


@pytest.fixture
def open_index(folder, exported):
    """Function that opens the index of `folder`, also again, also with another export."""

    def opened(export=exported[1], file=None):
        sentences = []
        index = search.PhotoIndex(folder, runtime.load(export), file, sentences.append)
        index.sentences = sentences
        return index

    return opened


def counts(index):
    return list(index.update().values())[:4]  # new, changed, gone, unreadable


def test_the_best_photos_by_hand(folder, exported, open_index):
    index, text = open_index(), "a red ring left of a blue star " * 8
    index.update()
    model, paths = exported[0], sorted(folder.rglob("*.png"))
    prepare, tokens = transforms(model.config)[1], jettclip.get_tokenizer("JettCLIP-T")([text])
    with torch.inference_mode():
        images = torch.stack([prepare(runtime.read_photo(path)) for path in paths])
        scores = model.encode_image(images, True) @ model.encode_text(tokens, True)[0]  # (20,)
    best, found = scores.sort(descending=True), index.search(text, 3)
    assert [path for path, _ in found] == [paths[row] for row in best.indices[:3]]
    expected = best.values[:3].tolist()
    assert [score for _, score in found] == pytest.approx(expected, abs=1e-5)
    assert len(index.search(text, 100)) == 20


def test_the_index_follows_the_folder(folder, open_index):
    assert counts(open_index()) == [20, 0, 0, 0]
    shutil.copy(folder / "01.png", folder / "copy.PNG")
    shutil.copy(folder / "02.png", folder / "04.png")
    os.utime(folder / "05.png", ns=(0, 0))
    (folder / "07.png").unlink()
    (folder / ".hidden.png").write_bytes(b"")
    (folder / "notes.txt").write_text("no photo")
    index, calls = open_index(), []
    encode = index.model.encode_image
    index.model.encode_image = lambda images: (calls.append(len(images)), encode(images))[1]
    assert counts(index) == [1, 2, 1, 0] and sum(calls) == 3
    found = dict(index.search("a star", 100))
    assert len(found) == 20 and found[folder / "copy.PNG"] == found[folder / "01.png"]
    assert found[folder / "04.png"] == found[folder / "02.png"] and folder / "07.png" not in found
    assert counts(open_index()) == [0, 0, 0, 0]


def test_no_file_stops_it(folder, open_index):
    whole = (folder / "01.png").read_bytes()
    (folder / "half.png").write_bytes(whole[: len(whole) // 2])
    (folder / "text.jpg").write_text("not a photo")
    (folder / "empty.jpeg").touch()
    (folder / "gone.png").symlink_to(folder / "nowhere.png")
    photo(os.fsencode(folder) + b"/bytes-\xff\n.jpg", (640, 480), orientation=6)
    index = open_index()
    assert counts(index) == [21, 0, 0, 3] and len(index.search("a", 100)) == 21
    for name in ("half.png", "text.jpg", "empty.jpeg"):
        assert sum(f"unreadable, skipped: {name}" in s for s in index.sentences) == 1
    (folder / "02.png").unlink()  # after the search: a grey thumbnail
    assert search.page("a", index.search("a", 100)).encode().count(b"<img") == 21
    (folder / "half.png").write_bytes(whole)
    assert counts(open_index()) == [1, 0, 1, 2]  # tries the unreadable ones each time


def test_another_model_or_a_damaged_file_means_indexing_again(exported, open_index, tmp_path):
    index = open_index()
    index.update()
    other = shutil.copytree(exported[1], tmp_path / "other")
    config = (other / "deploy.json").read_text().replace(index.identity, "0" * 64)
    (other / "deploy.json").write_text(config)
    again = open_index(other)
    assert counts(again) == [20, 0, 0, 0]
    assert again.sentences == [f"{index.file} is of model {exported[1]}: indexing all photos again"]
    data = index.file.read_bytes()
    for broken in (b"", data[: len(data) // 2], b"x" * 100):
        index.file.write_bytes(broken)
        again = open_index(other)
        assert counts(again) == [20, 0, 0, 0]
        assert len(again.sentences) == 1 and "index.npz is damaged" in again.sentences[0]


def test_killed_indexing_resumes(folder, exported, open_index):
    file, saved = folder / ".jettclip/index.npz", []
    for _ in range(2):
        process = subprocess.Popen([sys.executable, "-c", SLOW, str(folder), str(exported[1])])
        before = len(saved)
        while process.poll() is None and len(saved) == before:
            time.sleep(0.01)
            saved = (search.read_index(file, report=pytest.fail) or {"paths": []})["paths"]
        process.send_signal(signal.SIGKILL)
        process.wait()
    (folder / ".jettclip/.index.npz.tmp1.npz").write_bytes(b"half")  # killed while it was writing
    index, fresh = open_index(), open_index(file=folder.parent / "fresh.npz")
    assert counts(index) == [20 - len(saved), 0, 0, 0] and 0 < len(saved) < 20
    fresh.update()
    best = [(path, pytest.approx(score, abs=1e-5)) for path, score in fresh.search("a star", 20)]
    assert index.search("a star", 20) == best
    assert [path.name for path in (folder / ".jettclip").iterdir()] == ["index.npz"]


def test_command_line(folder, exported, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("notes.html").touch()
    monkeypatch.setitem(sys.modules, "gradio", None)
    for arguments, message in (
        (["photos", "x"], "error: photos has no index yet: name a model with --model"),
        (["nowhere", "--model", str(exported[1])], "nowhere is not a folder"),
        (["photos", "--model", "nothing"], "nothing is no export folder, run folder or checkpoint"),
        (["photos", "--model", "notes.html"], "--name which model notes.html holds"),
    ):
        with pytest.raises(SystemExit, match=message):
            search.main(arguments)
    search.main(["photos", "--model", str(exported[1])])
    line = "20 photos; 20 new, 0 changed, 0 gone, 0 unreadable; indexed "
    assert capsys.readouterr().out.startswith(line)
    with pytest.raises(SystemExit, match=r"--web needs Gradio: pip install 'jettclip\[web\]'"):
        search.main(["photos", "--web"])


def test_search_needs_no_torch(folder, exported, open_index, tmp_path):
    """The model is the one of the index; the second call uses it again."""
    index, text = open_index(), "<i>it's ½ a star</i>"
    index.update()
    arguments = ["photos", text, "--top", "2", "--html", "found.html"]
    command = [sys.executable, "-c", NO_TORCH, *arguments]
    finished = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    lines = finished.stdout.splitlines() or pytest.fail(finished.stderr)
    assert lines[0] == "20 photos; 0 new, 0 changed, 0 gone, 0 unreadable"
    assert lines[1].startswith("answered in ") and len(lines) == 4
    html = (tmp_path / "found.html").read_text()
    assert html.count("data:image/jpeg;base64,/9j/") == 2 and "&lt;i&gt;it&#x27;s ½ a star" in html
    for line, (path, score) in zip(lines[2:], index.search(text, 2), strict=True):
        assert line == f"{score:.3f}  {path.relative_to(tmp_path)}" and str(path.name) in html


def test_a_run_folder_is_exported_once(folder, exported, tmp_path, monkeypatch, capsys):
    def export(model, target):  # in a moment; test_export tests the real one
        for encode, batch in (("encode_image", images), ("encode_text", tokens)):
            features = [getattr(m.eval(), encode)(batch) for m in (model, exported[0])]
            assert torch.equal(*features)
        shutil.copytree(exported[1], target)

    images, tokens = torch.rand(2, 3, 32, 32), jettclip.get_tokenizer("JettCLIP-T")(["a star"] * 2)
    monkeypatch.setattr("jettclip.deploy.export.export", export)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    checkpoints.save_folder(exported[0], tmp_path / "run/student")
    for turn in range(2):
        loaded = search.open_model(tmp_path / "run")
        assert loaded.folder.parent == tmp_path / "cache/jettclip"
        assert ("exporting" in capsys.readouterr().out) == (turn == 0)
    os.utime(tmp_path / "run/student/open_clip_model.safetensors", ns=(0, 0))  # trained again
    assert search.open_model(tmp_path / "run").folder != loaded.folder


def test_web_page(open_index):
    pytest.importorskip("gradio")
    index = open_index()
    index.update()
    functions = search.web(index).fns.values()
    answer = next(function.fn for function in functions if function.api_name == "search")
    found = answer("a red ring", 3)
    assert len(found) == 3 and found[0][0].size == (48, 48) and found[0][1].endswith(".png")
    assert answer(" ", 3) == []
