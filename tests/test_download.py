"""Archives are fetched, checked and unpacked; what cannot be fetched is said in a sentence."""
import hashlib
import zipfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest

from jettclip import download


@pytest.fixture
def archive(tmp_path):
    """An address, and the MD5 of what lies there."""
    with zipfile.ZipFile(tmp_path / "captions.zip", "w") as file:
        file.writestr("annotations/captions.json", "[]")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=tmp_path))
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/captions.zip", hashlib.md5((tmp_path / "captions.zip").read_bytes()).hexdigest()
    server.shutdown()


def test_fetch(archive, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(download.FILES, "coco", [archive])
    for _ in range(2):  # the second time it is there already
        download.fetch("coco", tmp_path / "data/coco")
        assert (tmp_path / "data/coco/annotations/captions.json").read_text() == "[]"
    assert "coco is ready: data_root: " in capsys.readouterr().out


def test_wrong_checksum_is_refused(archive, tmp_path, monkeypatch):
    monkeypatch.setitem(download.FILES, "coco", [(archive[0], "0" * 32)])
    with pytest.raises(SystemExit, match="captions.zip could not be fetched .*File not found or corrupted.*unpack it in"):
        download.fetch("coco", tmp_path / "data")
    assert not (tmp_path / "data/annotations").exists()


def test_no_network(tmp_path, monkeypatch):
    monkeypatch.setitem(download.FILES, "coco", [("http://127.0.0.1:9/none.zip", None)])
    with pytest.raises(SystemExit, match="none.zip could not be fetched .*Where there is no network, fetch http://127.0.0.1:9/none.zip"):
        download.fetch("coco", tmp_path / "data")


def test_by_hand(tmp_path, capsys):
    download.fetch("flickr8k", tmp_path)
    assert "Flickr8k's authors send a link" in capsys.readouterr().out
