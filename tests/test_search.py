"""Photo search: the index follows the folder, survives a kill, and no file stops it."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from http.client import HTTPConnection
from importlib.machinery import ModuleSpec
from multiprocessing import get_context
from types import SimpleNamespace
from unittest.mock import MagicMock
from urllib.parse import urlencode, urlsplit

import numpy as np
import pytest
import torch
from PIL import Image
from test_runtime import photo

import jettclip
from jettclip import checkpoints, nearest, photos, search, web
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


def test_the_best_photos_by_hand(folder, exported, update):
    index, text = update()[0], "a red ring left of a blue star " * 8
    model, paths = exported[0], sorted(folder.rglob("*.png"))
    prepare, tokens = transforms(model.config)[1], jettclip.get_tokenizer("JettCLIP-T")([text])
    with torch.inference_mode():
        images = torch.stack([prepare(read_photo(path)) for path in paths])
        scores = model.encode_image(images, True) @ model.encode_text(tokens, True)[0]  # (20,)
    found, score_of = index.search(text, 3), dict(zip(paths, scores.tolist(), strict=True))
    expected = scores.sort(descending=True)[0][:3].tolist()
    assert [score for _, score in found] == pytest.approx(expected, abs=1e-3)  # kept in float16
    assert all(score == pytest.approx(score_of[path], abs=1e-3) for path, score in found)


COLOURS = {"red": (255, 0, 0), "purple": (255, 0, 255), "blue": (0, 0, 255), "green": (0, 255, 0)}


def unit(rows):
    rows = np.array(rows, np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.fixture
def coloured(tmp_path):
    """Index of photos of one colour each, by a model whose features are colours."""
    for name, colour in COLOURS.items():
        (tmp_path / "album" / name).mkdir(parents=True)
        Image.new("RGB", (9, 9), colour).save(tmp_path / f"album/{name}/{name}.png")

    def pixels(image):
        return np.asarray(image, np.float32).mean(axis=(0, 1))

    model = SimpleNamespace(identity="colours", config={"embed_dim": 3}, image_size=9)
    model.context_length, model.tokenizer = 9, SimpleNamespace(encode=str.split)
    model.transform, model.folder = pixels, tmp_path
    model.encode_text = lambda texts: unit([COLOURS.get(text, (1, 1, 1)) for text in texts])
    seen = lambda image: image if hasattr(image, "shape") else pixels(image)  # noqa: E731
    model.encode_image = lambda images: unit([*map(seen, images)])
    index = search.PhotoIndex(tmp_path / "album", model, tmp_path / "index.npz")
    index.update()
    return index


def stems(found):
    return [path.stem for path, _ in found]


def test_text_and_photo_and_not(coloured):
    found, half = coloured.search("red", 2), 0.5**0.5
    assert stems(found) == ["red", "purple"] and found[1][1] == pytest.approx(half, abs=1e-3)
    blue = coloured.folder / "blue/blue.png"
    assert stems(coloured.search(image=blue, top=2)) == ["blue", "purple"]
    ((path, score),) = coloured.search("red", 1, image=blue)
    assert path.stem == "purple" and score == pytest.approx(1, abs=1e-3)
    assert stems(coloured.search("red", 4, without="blue")) == ["red", "purple", "green", "blue"]
    assert coloured.search(without="blue") == coloured.search(" ") == []
    for top in (0, -1):
        with pytest.raises(ValueError, match=f"top is {top}: ask for at least 1 photo"):
            coloured.search("red", top)
    (coloured.folder / "red/red.png").unlink()  # of one photo, too
    assert stems(coloured.search("red", rows=coloured.select("blue"))) == ["blue"]


def test_filters_by_folder_and_day(coloured):
    folder = coloured.folder
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9003] = "2024:05:31 23:59:59"
    Image.new("RGB", (9, 9), "red").save(folder / "red/dated.jpg", exif=exif)
    exif.get_ifd(0x8769)[0x9003] = "0000:00:00 00:00:00"  # a camera whose clock is not set
    Image.new("RGB", (9, 9), "blue").save(folder / "blue/undated.jpg", exif=exif)
    noon = time.mktime((2023, 1, 2, 12, 0, 0, 0, 0, -1))
    os.utime(folder / "blue/undated.jpg", (noon, noon))
    coloured.update()
    for again in (coloured, search.PhotoIndex(folder, coloured.model, coloured.file)):
        again.update()
        for limits, names in (
            (("red",), {"red", "dated"}),
            (("red/", "2024-05-31", "2024-05-31"), {"dated"}),
            (("", "", "2024-05"), {"dated", "undated"}),
            (("", "2023-02", "2024"), {"dated"}),
            (("", "", "2023"), {"undated"}),
            (("", "2023-12-31", "2023"), set()),
            (("", "2024-06"), set(COLOURS)),
            ((".", "", "2024"), {"dated", "undated"}),
            ((folder / "blue/../red", "", "2024"), {"dated"}),
        ):
            rows = again.select(*limits)
            assert {os.path.basename(again.photos[row]).split(".")[0] for row in rows} == names
    (folder / "out").symlink_to(folder.parent)
    for below in ("re", "red/red.png", "..", "/", "out", folder.parent):
        with pytest.raises(ValueError, match=f"--below {below}: {folder} has no such subfolder"):
            coloured.select(below)
    for since, until in (("2024", "2023"), ("2024-06", "2024-05-31"), ("2024-05-02", "2024-05-01")):
        with pytest.raises(ValueError, match=f"--since {since} is after --until {until}"):
            coloured.select("", since, until)


def test_groups_of_near_duplicates(coloured, monkeypatch):
    angles = np.radians([0, 90, 10, 180, 20, 91])
    features = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    for pairs in (nearest.PAIRS, 1):  # in one block, and row by row
        monkeypatch.setattr(nearest, "PAIRS", pairs)
        groups = nearest.groups(features, 0.98)  # cos 10 degrees is 0.985, cos 20 is 0.94
        assert [rows.tolist() for rows in groups] == [[0, 2, 4], [1, 5]]
    Image.new("RGB", (99, 99), "red").save(coloured.folder / "large.bmp")
    coloured.update()
    ((first, second),) = coloured.duplicates(0.99, coloured.select())
    assert (first[0].name, second[0].name) == ("large.bmp", "red.png")
    assert second[1] == pytest.approx(1, abs=1e-3)


def test_cosines_are_at_most_1(coloured):
    """Features in float16 have other lengths than 1: copies are alike to 1 all the same."""
    coloured.features = coloured.features * np.float16(1.001)
    coloured.features[2] = coloured.features[3] * np.float16(0.998)
    assert max(score for _, score in coloured.search("red")) == 1
    (group,) = coloured.duplicates(1, coloured.select())
    assert [score for _, score in group] == [1, pytest.approx(1, abs=1e-6)]
    assert max(score for _, score in group) <= 1


@pytest.mark.parametrize("width", [48, 200])
def test_a_large_index_is_searched_in_8_bits_and_ranked_exactly(width, coloured, monkeypatch):
    rng = np.random.default_rng(0)
    features, query = unit(rng.normal(size=(3000, width))), unit(rng.normal(size=(1, width)))
    approximate = nearest.coarse(features)(query[0])
    assert 1e-5 < np.abs(approximate - features @ query[0]).max() < 0.01
    coloured.photos, coloured.features = [str(row) for row in range(3000)], features
    coloured.model.encode_text = lambda texts: query
    found = [int(path.name) for path, _ in coloured.search("red", 20)]
    assert coloured.coarse and found == (-features @ query[0]).argsort()[:20].tolist()
    among = np.arange(1, 3000, 2)
    found = [int(path.name) for path, _ in coloured.search("red", 20, rows=among)]
    assert found == among[(-features[among] @ query[0]).argsort()[:20]].tolist()


def raw_photo(monkeypatch, jpeg):
    """A stand-in for rawpy, whose files embed `jpeg`."""
    raw = MagicMock(__spec__=ModuleSpec("rawpy", None))
    raw.imread.return_value.__enter__.return_value.extract_thumb.return_value.data = jpeg
    monkeypatch.setitem(sys.modules, "rawpy", raw)


def test_raw_files_are_read_by_their_preview(coloured, monkeypatch):
    path = coloured.folder / "raw.NEF"
    path.write_bytes(b"RAW")
    assert coloured.update()["new"] == 0
    raw_photo(monkeypatch, photo(coloured.folder.parent / "a.jpg", 6).read_bytes())
    assert read_photo(path).size == (480, 640)
    assert coloured.update()["new"] == 1
    raw_photo(monkeypatch, np.zeros((9, 9, 3), np.uint8))  # a preview without compression
    with pytest.raises(ValueError, match="raw.NEF: no image in a known format"):
        read_photo(path)


def test_heic_is_read_where_pillow_heif_is_installed(coloured):
    pytest.importorskip("pillow_heif")
    Image.new("RGB", (64, 32), "red").save(coloured.folder / "phone.HEIC", "HEIF")
    assert read_photo(coloured.folder / "phone.HEIC").size == (64, 32)
    assert coloured.update()["new"] == 1


@pytest.fixture
def site(coloured):
    """Function from a path and queries to the page's answer: status, content."""
    server, address = web.server(coloured)
    host, root = urlsplit(address).netloc, urlsplit(address).path
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def get(path="", root=root, **query):
        connection = HTTPConnection(host)
        connection.request("GET", f"{root}{path}?{urlencode(query)}")
        response = connection.getresponse()
        return response.status, response.read()

    yield get
    server.shutdown()
    server.server_close()


def test_the_page_searches_and_shows_photos(site, coloured):
    status, answer = site("search", text="red", top=2)
    first, second = json.loads(answer)["photos"]
    assert (status, first["name"], second["name"]) == (200, "red/red.png", "purple/purple.png")
    status, jpeg = site("photo", number=first["number"], size=4)
    assert status == 200 and Image.open(io.BytesIO(jpeg)).size == (4, 4)
    like = json.loads(site("search", like=second["number"], without="red", top=1)[1])["photos"]
    assert [found["name"] for found in like] == ["blue/blue.png"]
    sentence = "the description has 22 tokens: the model reads the first 9"
    assert json.loads(site("search", text="red " * 20)[1])["notes"] == [sentence]


def test_the_page_answers_404_to_wrong_numbers(site, coloured, capfd):
    site("search", text="red")
    wrong = ["-1", "-4", "4", "9" * 30, "9" * 5000, "nan", "inf", "1e0", "0.5", "red", "\0", " "]
    for number in wrong:
        assert site("photo", number=number, size=9)[0] == 404, number
        assert site("search", text="red", like=number)[0] == 404, number
    for size in ("0", "-9", "-" + "9" * 30, "nan", "red", " "):
        assert site("photo", number=0, size=size)[0] == 404, size
        assert site("search", text="red", top=size)[0] == 404, size
    for query in ({}, {"number": 0}, {"size": 9}, {"number": "", "size": 9}):
        assert site("photo", **query)[0] == 404, query
    assert site(root="ftp://[/")[0] == 404
    assert len(json.loads(site("search", text="red", top="9" * 30)[1])["photos"]) == 4
    assert Image.open(io.BytesIO(site("photo", number=0, size="9" * 30)[1])).size == (9, 9)
    assert capfd.readouterr().err == ""  # no traceback


def test_the_page_needs_its_secret_and_nothing_from_elsewhere(site, coloured):
    status, page = site()
    assert status == 200 and not re.findall(rb"(?i)https?:|//\w|@import|url\(", page)
    assert b"default-src 'none'" in page and b"NONCE" not in page
    site("search", text="red")
    for path, root, query in (
        ("search", "/", {"text": "red"}),
        ("search", "/wrong/", {"text": "red"}),
        ("photo", "/%ff/", {"number": 0, "size": 9}),
        ("photo", None, {"number": 4, "size": 9}),  # was not found yet
        ("photo", None, {"number": "../../secret.png", "size": 9}),
        ("photo", None, {"file": "/etc/passwd"}),
        ("../web.py", None, {}),
    ):
        root = {} if root is None else {"root": root}
        status, content = site(path, **root, **query)
        assert status == 404 and b"red" not in content, path


def test_the_index_follows_the_folder(folder, update, monkeypatch):
    assert update()[1] == [20, 0, 0, 0, 0]
    shutil.copy(folder / "01.png", folder / "copy.PNG")
    shutil.copy(folder / "02.png", folder / "04.png")
    os.utime(folder / "05.png", ns=(0, 0))
    (folder / "07.png").unlink()
    (folder / ".hidden.png").write_bytes(b"")
    (folder / "notes.txt").write_text("no photo")
    calls, encode = [], runtime.ExportedModel.encode_image
    count = lambda *a: (calls.append(len(a[1])), encode(*a))[1]  # noqa: E731
    monkeypatch.setattr(runtime.ExportedModel, "encode_image", count)
    index, counts, _ = update()
    assert counts == [1, 2, 1, 0, 0] and sum(calls) == 3
    found = dict(index.search("a star", 100))
    assert len(found) == 20 and found[folder / "copy.PNG"] == found[folder / "01.png"]
    assert found[folder / "04.png"] == found[folder / "02.png"] and folder / "07.png" not in found
    assert update()[1] == [0, 0, 0, 0, 0]


def test_no_file_stops_it_and_what_is_not_read_is_said(folder, update, monkeypatch):
    for suffix in (".heic", ".heif"):  # where the extra is installed
        monkeypatch.delitem(Image.registered_extensions(), suffix, raising=False)
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
    heic = "1 .heic file(s) that Pillow cannot read (pip install 'jettclip[photos]')"
    for reason in (heic, "1 pipe(s)", "4 unreadable photo(s)"):
        assert f", {reason}" in last
    (folder / "02.png").unlink()  # after the search: a grey thumbnail
    Image.open(io.BytesIO(web.thumbnail(folder / "02.png"))).verify()
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
    reason = "photo(s) of folders that are missing or empty now, kept"
    assert sentences == [f"not read: {unseen} {reason}"]
    if lost != "all":
        (folder / "01.png").unlink()
        assert update(file=file)[1] == [0, 0, 1, unseen, 0]
    shutil.rmtree(disk, ignore_errors=True)
    (tmp_path / "disk").rename(disk)
    assert update(file=file)[1] == [0, 0, 0, 0, 0]


def hostile(index, **changed):
    """Write an index with other features, or other photos among its facts."""
    with np.load(index.file) as saved:
        arrays = dict(saved)
    facts = json.loads(arrays["facts"].tobytes())
    facts["photos"] = changed.pop("photos", facts["photos"])
    facts = {"facts": np.frombuffer(json.dumps(facts).encode(), np.uint8)}
    np.savez(index.file, **arrays | facts | changed)


def test_a_damaged_or_hostile_index_is_built_again(update):
    index = update()[0]
    data = index.file.read_bytes()
    nothing, nan = np.zeros((20, 5), np.float32), np.full((20, 16), np.nan, np.float32)
    changes = [{"features": nothing}, {"features": nan}, {"features": np.array([print] * 20)}]
    damaged = data[:-4] + b"\x85" + data[-3:]  # zipfile seeks before its start: an OSError
    hostile_paths = {"photos": [["../a.png", 1, 2, "3"]] * 3}
    for change in (b"", data[: len(data) // 2], damaged, *changes, hostile_paths):
        if isinstance(change, dict):
            hostile(index, **change)
        else:
            index.file.write_bytes(change)
        _, counts, (sentence,) = update()
        assert counts == [20, 0, 0, 0, 0] and f"{index.file} is not used (" in sentence


def test_nothing_in_the_folder_is_trusted(folder, update, tmp_path):
    (tmp_path / "secret.png").write_bytes((folder / "01.png").read_bytes())
    names = ["../secret.png", str(tmp_path / "secret.png"), *map(str, range(18))]
    hostile(update()[0], photos=[(name, 1, 2, "2024-05-31") for name in names])
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
        photos.CHUNK, photos.SAVE_EVERY = 2, 4
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
                saved = json.loads(arrays["facts"].tobytes())["photos"]
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
    (tmp_path / "more").mkdir()
    update()  # its index names no model
    with monkeypatch.context() as patch:  # before any work
        patch.setattr(search.PhotoIndex, "embed", lambda *_: pytest.fail("embeds"))
        for arguments, message in (
            ("photos x", "error: no model was used for photos before: name one with --model"),
            (f"~/nowhere --model {exported[1]}", f"{tmp_path}/nowhere is not a folder"),
            ("photos --model ~/nothing", f"{tmp_path}/nothing is no export folder, run folder or"),
            ("photos --model notes.html", "--name which model notes.html holds"),
            (f"photos --model {exported[1]} --index more", "write .*: use another --index"),
            (f"photos --model {exported[1]} --index locked/x", "locked is no folder: use another"),
            (
                f"photos --model {exported[1]} --index a/b/c",
                "a/b is no folder: use another --index",
            ),
            (f"photos x --model {exported[1]} --below re", "--below re: photos has no such sub"),
        ):
            with pytest.raises(SystemExit, match=message):
                search.main(arguments.split())
    text = "<i>it's ½ a star</i>"
    search.main(["~/photos", "--model", str(exported[1])])  # the model is now the folder's last
    index, arguments = update()[0], ["photos", text, "--top", "2"]
    command = [sys.executable, "-c", NO_TORCH, *arguments]
    finished = subprocess.run(command, capture_output=True, text=True)
    lines, (summary, time_taken) = finished.stdout.splitlines(), finished.stderr.splitlines()
    assert summary == "20 photos; 0 new, 0 changed, 0 gone, 0 unseen, 0 unreadable"
    assert time_taken.startswith("answered in ") and len(lines) == 2
    assert lines == [str(path.relative_to(tmp_path)) for path, _ in index.search(text, 2)]


def test_what_is_printed_for_pipes_and_scripts(coloured, monkeypatch, capfdbinary):
    monkeypatch.setattr(search, "choose_model", lambda args: coloured.model)
    odd = os.fsencode(coloured.folder / "red") + b"/\xff\n~\x1b.png"
    shutil.copy(coloured.folder / "red/red.png", odd)

    def printed(*arguments):
        command = [coloured.folder, "--index", coloured.file, *arguments]
        with open(os.dup(1), "w") as sys.stdout:
            search.main(list(map(str, command)))
        return capfdbinary.readouterr().out

    paths = {os.fsencode(coloured.folder / "red/red.png"), odd.replace(b"\n", b"\\n")}
    assert set(printed("red", "--top", "2").splitlines()) == paths  # one line each
    assert printed("--image", coloured.folder / "blue/blue.png", "--until", "1999") == b""
    lines = printed("red", "--without", "blue", "--json", "--below", "purple").splitlines()
    facts = [json.loads(line) for line in lines]
    assert [fact["path"] for fact in facts] == [str(coloured.folder / "purple/purple.png")]
    (coloured.folder / "copy.png").write_bytes((coloured.folder / "blue/blue.png").read_bytes())
    assert [len(group.splitlines()) for group in printed("--duplicates").split(b"\n\n")] == [2, 2]
    groups = [json.loads(line)["group"] for line in printed("--duplicates", "--json").splitlines()]
    assert groups == [1, 1, 2, 2]
    with open(os.dup(1), "w") as sys.stdout:
        search.main([*map(str, (coloured.folder, "red", "--index", coloured.file)), "--until=2000"])
    assert b"0 of them until 2000\n" in capfdbinary.readouterr().err


DAYS = ["2024-13", "2024-02-31", "0000", "2024-5", "2024-W01-1", "31.5.2024", ""]
WRONG = {
    "a whole number of at least 1": {"--top": ["0", "-1", "1.5", "x"]},
    "a cosine above 0, at most 1": {"--duplicates": ["0", "2", "-1", "nan", "two dogs"]},
    "a day, month or year, such as 2024-05-31": {"--since": DAYS, "--until": DAYS},
    "a photo: there is no such file": {"--image": ["", "nowhere.jpg"]},
    "a path: it is empty": {"--index": [""], "--below": [""], "--model": [""]},
    "a text: it is empty": {"--without": ["", " "]},
}


def test_wrong_arguments_are_refused_before_any_work(capsys):
    def refused(message, *arguments):
        with pytest.raises(SystemExit, match="2"):
            search.parse(["photos", *arguments])
        assert message in capsys.readouterr().err

    for wanted, options in WRONG.items():
        for option, values in options.items():
            for value in values:
                message = f"argument {option}: {value!r} is not {wanted}"
                refused(message, "x", option, value)
    refused("argument text: '' is not a text: it is empty", "")
    for query in (["x"], ["--image", __file__], ["--without", "x"]):
        message = "--duplicates goes with no description, --image or --without"
        refused(message, *query, "--duplicates")
    for limit in (["--without", "x"], ["--below", "x"], ["--web", "--since", "2024"]):
        message = "--without, --below, --since and --until need a description or --image"
        refused(message, *limit)


def test_right_days_and_numbers():
    for text in ("2024", "2024-02", "2024-02-29"):
        args = search.parse(["photos", "x", "--since", text, "--until", text, "--top", "1"])
        assert (args.since, args.until, args.top) == (text, text, 1)
    given = [[], ["--duplicates"], ["--duplicates", "1"], ["--duplicates", ".01"]]
    found = [search.parse(["photos", *arguments]).duplicates for arguments in given]
    assert found == [None, 0.95, 1, 0.01]


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
        assert ("exporting" in capsys.readouterr().err) == (turn != 1)
        if turn == 1:
            (loaded.folder / "deploy.json").write_text("{}")  # of another version
    os.utime(tmp_path / "run/student/open_clip_model.safetensors", ns=(0, 0))  # trained again
    assert search.open_model(tmp_path / "run").folder != loaded.folder
