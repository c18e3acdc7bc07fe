"""Weights by name, from a stand-in of the hub on this machine."""

import hashlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError

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
            if not content:
                self.send_header("X-Error-Code", "EntryNotFound")
            else:
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


@pytest.mark.parametrize(
    "name, word, problem",
    [
        ("MobileCLIP-S1", "datacompdrr", "datacompdrr' is neither .* did you mean 'datacompdr'?"),
        ("JettCLIP-B", "datacomp-dr", "'/.*datacomp-dr' is neither .* did you mean 'datacompdr'?"),
        ("LongCLIP-B", "Published", "'/.*Published' is neither .* did you mean 'published'?"),
        ("JettCLIP-Lite", "pipp", "for JettCLIP-Lite, .* did you mean 'pip'?"),
        ("LongCLIP-T", "published", "for LongCLIP-T, the word 'published' is unknown: Known: none"),
        ("ViT-B-32", "opnai", "'/.*opnai' is neither .* did you mean 'openai'?"),
        ("JettCLIP-S0", "openai:a.pt", "'/.*/a.pt' is neither a file nor a folder here"),
    ],
)
def test_a_misspelt_word_gets_the_nearest(name, word, problem):
    with pytest.raises(FileNotFoundError, match=problem):
        create_model(name, word)


@pytest.mark.parametrize("name", ["hf-hub:nobody", "hf-hub:", "hf-hub:a b/c", "hf-hub:a/b/c"])
@pytest.mark.parametrize("asks", [create_model, open_model, lambda x: create_model("LongCLIP", x)])
def test_a_repository_has_an_author_and_a_name(name, asks):
    with pytest.raises(ValueError, match=f"'{name}' names no .* write hf-hub:AUTHOR/MODEL"):
        asks(name)


def test_the_reason_is_the_first_cause_whole_and_in_one_line(served):
    error = OSError("retrying\n1 of 5")
    error.__cause__ = ValueError("host unknown,\nas " + "x" * 300)
    assert hub.reason(error) == "host unknown, as " + "x" * 300
    error = ValueError("no such kind of model")
    error.__context__ = KeyError("kind")  # which a library met on its way
    assert hub.reason(error) == "no such kind of model"
    error.__context__ = LocalEntryNotFoundError("not found")  # which it wrapped
    error.__context__.__cause__ = ConnectionError("host unknown")
    assert hub.reason(error) == "host unknown"
    with pytest.raises(OSError) as caught:  # the hub's answer
        hub.published("LongCLIP-B")
    assert "Entry Not Found for url" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "source, problem",
    [
        ("ViT-B-32", "ViT-B-32 is no export .* that search can use, 'ViT-B-32' .* MobileCLIP2-B"),
        ("LiT-Lite2", "'LiT-Lite2' is unknown: .*Known: JettCLIP-S0"),
        ("MobileClip2-S0", "'MobileClip2-S0' is unknown: did you mean 'MobileCLIP2-S0'"),
        ("photos", "/photos is no export folder, run folder or checkpoint"),
    ],
)
def test_search_names_the_models_that_it_can_use(source, problem):
    with pytest.raises(FileNotFoundError, match=problem):
        open_model(source)


def test_a_repository_opens_and_no_name_is_ignored(served, tmp_path, monkeypatch, exported):
    """As a model, and in search."""
    save_folder(model := exported[0], tmp_path / "run/student")
    for name in hub.FOLDER:
        path = tmp_path / "run/student" / name
        served[0][f"me/photos/resolve/main/{name}"] = path.read_bytes()
    again = create_model(model.name, "hf-hub:me/photos")
    image = torch.rand(1, 3, model.image_size, model.image_size)
    assert torch.equal(again.encode_image(image), model.encode_image(image))
    with pytest.raises(FileNotFoundError, match="neither a file nor a folder"):
        create_model(model.name, "me/photos")
    monkeypatch.setattr("jettclip.deploy.export.export", lambda *_: exported[1])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert open_model("hf-hub:me/photos").folder == exported[1]
    for source in ("hf-hub:me/photos", tmp_path / "run", exported[1]):
        with pytest.raises(ValueError, match=f"{source} says .* leave out --name JettCLIP-S0"):
            open_model(source, "JettCLIP-S0")


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


def test_without_network_it_says_what_to_put_where(served, monkeypatch, capsys):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    message = (
        "longclip-B.pt of BeichenZhang/LongCLIP-B .*HF_HUB_OFFLINE.* by hand, and name the file"
    )
    with pytest.raises(OSError, match=message):
        create_model("LongCLIP-B", "published")
    with pytest.raises(OSError, match="cannot fetch open_clip_model.safetensors"):
        open_model("MobileCLIP2-S0")
    for name in ("hf-hub:me/photos", "ViT-B-16-SigLIP"):
        with pytest.raises(
            OSError, match=f"cannot open {name} .*HF_HUB_OFFLINE.* local-dir:FOLDER"
        ):
            create_model(name)
    assert "fetching" not in capsys.readouterr().out
