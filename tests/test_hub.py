"""Weights by name, from a stand-in of the hub on this machine."""

import hashlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from conftest import tiny_model
from huggingface_hub import constants

from jettclip import hub
from jettclip.checkpoints import save_folder
from jettclip.models import create_model
from jettclip.search import open_model

S1 = "apple/MobileCLIP-S1-OpenCLIP/resolve/main/open_clip_model.safetensors"
LONG = "BeichenZhang/LongCLIP-B/resolve/main/longclip-B.pt"


@pytest.fixture
def served(tmp_path, monkeypatch):
    """{path: content} that the hub has, and faults: {path: function of what it sends instead}."""
    files, faults = {}, {}

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):
            content = files.get(self.path[1:])
            self.send_response(200 if content else 404)
            if content:
                self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
                self.send_header("X-Repo-Commit", "0" * 40)
                self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            return content

        def do_GET(self):
            if content := self.do_HEAD():
                self.wfile.write(faults.get(self.path[1:], bytes)(content))

        def log_message(self, *_):
            """Nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    template = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    yield files, faults
    server.shutdown()
    server.server_close()


def test_a_name_finds_its_file_and_fetches_it_once(served, capsys):
    files, _ = served
    files |= {S1: b"of MobileCLIP-S1", LONG: b"of Long-CLIP"}
    path = hub.published("JettCLIP-S1")
    assert path.read_bytes() == b"of MobileCLIP-S1"
    assert "licence see https://huggingface.co/apple/MobileCLIP-S1" in capsys.readouterr().out
    assert hub.published("LongCLIP-B").read_bytes() == b"of Long-CLIP"
    files.clear()
    assert hub.published("MobileCLIP-S1", "datacompdr") == path
    assert hub.published("MobileCLIP-S1", "weights.pt") is None
    with pytest.raises(ValueError, match="nobody publishes weights of LongCLIP-T"):
        hub.published("LongCLIP-T")


def test_a_folder_of_ours_opens_by_its_name(served, tmp_path, monkeypatch):
    model = tiny_model().eval()
    save_folder(model, tmp_path / "folder")
    for name in hub.FOLDER:
        served[0][f"me/photos/resolve/main/{name}"] = (tmp_path / "folder" / name).read_bytes()
    again = create_model(model.name, "hf-hub:me/photos")
    image = torch.rand(1, 3, model.image_size, model.image_size)
    assert torch.equal(again.encode_image(image), model.encode_image(image))
    with pytest.raises(FileNotFoundError, match="neither a file nor a folder"):
        create_model(model.name, "me/photos")


@pytest.mark.parametrize(
    "fault, reason",
    [
        (lambda content: content[:3], "cannot fetch .* download by hand, and name the file"),
        (lambda content: content[::-1], "another SHA-256 than the hub says"),
    ],
)
def test_a_cut_or_wrong_file_is_refused_and_fetched_again(served, fault, reason):
    files, faults = served
    files[S1], faults[S1] = b"weights", fault
    with pytest.raises(OSError, match=reason):
        hub.published("MobileCLIP-S1")
    faults.clear()
    assert hub.published("MobileCLIP-S1").read_bytes() == b"weights"


def test_without_network_it_says_what_to_put_where(served, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    message = "longclip-B.pt of BeichenZhang/LongCLIP-B .* download by hand, and name the file"
    with pytest.raises(OSError, match=message):
        create_model("LongCLIP-B", "published")
    with pytest.raises(OSError, match="cannot fetch open_clip_model.safetensors"):
        open_model("MobileCLIP2-S0")
    with pytest.raises(FileNotFoundError, match="is no export folder"):
        open_model("photos")
