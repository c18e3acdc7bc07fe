"""Photo search: the index follows the folder, survives a kill, and no file stops it."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_model
from test_runtime import photo

import jettclip
from jettclip import checkpoints, runtime, search
from jettclip.data import read_image
from jettclip.models import transforms
from jettclip.datasets.scenes import make_pairs

SLOW = """
import sys, time
from jettclip import runtime, search
search.CHUNK, search.SAVE_EVERY = 2, 4
decode = search.PhotoIndex.pixels
search.PhotoIndex.pixels = lambda self, path: (time.sleep(0.05), decode(self, path))[1]
search.PhotoIndex(sys.argv[1], runtime.load(sys.argv[2])).update()
"""


@pytest.fixture
def folder(tmp_path):
    """20 scenes as photos, some in a subfolder."""
    (tmp_path / "photos/more").mkdir(parents=True)
    for row, image in enumerate(make_pairs(20, seed=1, size=48).image):
        (tmp_path / f"photos/{'more/' if row % 3 == 0 else ''}{row:02}.png").write_bytes(image)
    return tmp_path / "photos"


def index(folder, exported, sentences=None, **options):
    report = (sentences if sentences is not None else []).append
    return search.PhotoIndex(folder, runtime.load(exported[1]), report=report, **options)


def counts(one):
    return list(one.update().values())[:4]  # new, changed, gone, unreadable


def test_the_best_photos_by_hand(folder, exported):
    one = index(folder, exported)
    one.update()
    model, text = exported[0], "a red ring left of a blue star " * 8
    paths = sorted(folder.rglob("*.png"))
    to_pil = [runtime.read_photo(path) for path in paths]
    with torch.inference_mode():
        images = model.encode_image(
            torch.stack([transforms(model.config)[1](image) for image in to_pil]), True
        )
        scores = (
            images @ model.encode_text(jettclip.get_tokenizer("JettCLIP-T")([text]), True).T
        ).squeeze(1)
    found = one.search(text, 3)
    assert [path for path, _ in found] == [
        paths[row] for row in scores.argsort(descending=True)[:3]
    ]
    assert [score for _, score in found] == pytest.approx(
        scores.sort(descending=True).values[:3].tolist(), abs=1e-5
    )
    assert len(one.search(text, 100)) == 20


def test_the_index_follows_the_folder(folder, exported):
    calls = []
    assert counts(index(folder, exported)) == [20, 0, 0, 0]
    shutil.copy(folder / "01.png", folder / "copy.PNG")
    shutil.copy(folder / "02.png", folder / "04.png")
    os.utime(folder / "05.png", ns=(0, 0))
    (folder / "07.png").unlink()
    (folder / ".hidden.png").write_bytes(b"")
    (folder / "notes.txt").write_text("no photo")
    again = index(folder, exported)
    again.model.encode_image = lambda images, encode=again.model.encode_image: (
        calls.append(len(images)),
        encode(images),
    )[1]
    assert counts(again) == [1, 2, 1, 0] and sum(calls) == 3
    found = dict(again.search("a star", 100))
    assert len(found) == 20 and found[folder / "copy.PNG"] == found[folder / "01.png"]
    assert found[folder / "04.png"] == found[folder / "02.png"] and folder / "07.png" not in found
    assert counts(index(folder, exported)) == [0, 0, 0, 0]


def test_no_file_stops_it(folder, exported):
    whole = (folder / "01.png").read_bytes()
    (folder / "half.png").write_bytes(whole[: len(whole) // 2])
    (folder / "text.jpg").write_text("not a photo")
    (folder / "empty.jpeg").touch()
    (folder / "gone.png").symlink_to(folder / "nowhere.png")
    photo(os.fsencode(folder) + b"/bytes-\xff\n.jpg", (640, 480), orientation=6)
    sentences = []
    one = index(folder, exported, sentences)
    assert counts(one) == [21, 0, 0, 3] and len(one.search("a", 100)) == 21
    assert len(sentences) == 4 and all(
        name in "".join(sentences) for name in ("half.png", "text.jpg", "empty.jpeg", "gone.png")
    )
    assert search.page("a", one.search("a", 100)).encode().count(b"<img") == 21
    (folder / "half.png").write_bytes(whole)
    assert counts(index(folder, exported)) == [1, 0, 0, 2]  # tried again each time


def test_another_model_or_a_damaged_file_means_anew(folder, exported, tmp_path):
    one = index(folder, exported)
    one.update()
    other = shutil.copytree(exported[1], tmp_path / "other")
    config = (other / "deploy.json").read_text().replace(one.identity, "0" * 64)
    (other / "deploy.json").write_text(config)
    sentences = []
    assert counts(index(folder, (None, other), sentences)) == [20, 0, 0, 0]
    assert (
        len(sentences) == 1
        and f"was made by another model ({exported[1]}): all photos are indexed anew"
        in sentences[0]
    )
    data = one.file.read_bytes()
    for broken in (b"", data[: len(data) // 2], b"x" * 100):
        one.file.write_bytes(broken)
        sentences.clear()
        assert counts(index(folder, (None, other), sentences)) == [20, 0, 0, 0]
        assert len(sentences) == 1 and "index.npz is damaged" in sentences[0]


def test_a_killed_indexing_goes_on(folder, exported):
    saved = []
    for kill in range(3):
        process = subprocess.Popen([sys.executable, "-c", SLOW, str(folder), str(exported[1])])
        before, file = len(saved), folder / ".jettclip/index.npz"
        while process.poll() is None and len(saved) == before:
            time.sleep(0.01)
            saved = (search.read_index(file, report=pytest.fail) or {"paths": []})["paths"]
        process.send_signal(signal.SIGKILL)
        process.wait()
    (folder / ".jettclip/.index.npz.tmp1.npz").write_bytes(b"half")  # as if killed in writing
    one = index(folder, exported)
    assert counts(one) == [20 - len(saved), 0, 0, 0] and 0 < len(saved) < 20
    fresh = index(folder, exported, file=folder.parent / "fresh.npz")
    fresh.update()
    assert one.search("a star", 20) == [
        (path, pytest.approx(score, abs=1e-5)) for path, score in fresh.search("a star", 20)
    ]
    assert [path.name for path in (folder / ".jettclip").iterdir()] == ["index.npz"]


def test_command_line(folder, exported, tmp_path, capsys, monkeypatch):
    with pytest.raises(
        SystemExit, match="error: .*photos has no index yet: name a model with --model"
    ):
        search.main([str(folder), "a star"])
    search.main([str(folder), "--model", str(exported[1])])
    assert capsys.readouterr().out.startswith(
        "20 photos; 20 new, 0 changed, 0 gone, 0 unreadable; indexed "
    )
    monkeypatch.chdir(tmp_path)
    search.main(["photos", "<i>a star</i>", "--top", "2", "--html", "found.html"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "20 photos; 0 new, 0 changed, 0 gone, 0 unreadable" and lines[1].startswith(
        "answered in "
    )
    assert len(lines) == 4 and Path(lines[2].split("  ")[1]).exists()
    html = Path("found.html").read_text()
    assert (
        html.count("data:image/jpeg;base64,/9j/") == 2
        and "&lt;i&gt;a star" in html
        and lines[2].split("  ")[1] in html
    )
    for arguments, message in (
        (["nowhere", "x"], "nowhere has no index yet"),
        (["nowhere", "--model", str(exported[1])], "is no folder"),
        (["photos", "--model", "photos"], "has no deploy.json and no open_clip_model.safetensors"),
        (["photos", "--model", "found.html"], "say with --name which model it holds"),
    ):
        with pytest.raises(SystemExit, match=message):
            search.main(arguments)


def test_a_run_folder_is_exported_once(folder, tmp_path, monkeypatch, capsys):
    model = tiny_model(seed=3).eval()
    checkpoints.save_folder(model, tmp_path / "run/student")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    image = torch.stack([transforms(model.config)[1](read_image(folder / "01.png"))])
    for turn in range(2):
        loaded = search.open_model(tmp_path / "run")
        np.testing.assert_allclose(
            loaded.encode_image(image), model.encode_image(image, True).detach(), atol=1e-5
        )
        assert ("exporting" in capsys.readouterr().out) == (turn == 0)


def test_web_page(folder, exported):
    pytest.importorskip("gradio")
    one = index(folder, exported)
    one.update()
    page = search.web(one)
    (answer,) = [function.fn for function in page.fns.values() if function.api_name == "search"][:1]
    found = answer("a red ring", 3)
    assert (
        len(found) == 3
        and found[0][0].size == (48, 48)
        and found[0][1].endswith(".png")
        and answer(" ", 3) == []
    )
