"""The page examples/browser in a headless Chromium: features as Python's. `make test-browser`

python tests/browser/run.py [EXPORT_FOLDER]   # without one, JettCLIP-T and -S0 with random weights

Half a minute. Needs Chromium, and the package onnxruntime-web below examples/browser, which
`make test-browser` installs; where one is absent it says so and tests nothing.
"""

import contextlib
import functools
import http.server
import io
import json
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import urllib.request
from pathlib import Path

import numpy as np
import torch
import websocket
from PIL import Image

import jettclip
from jettclip.datasets.scenes import make_pairs
from jettclip.deploy import runtime
from jettclip.deploy.export import export, quantize

ROOT = Path(__file__).resolve().parents[2]
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
TEXTS = [
    "A dog.",
    "It's 2 o'clock &amp; the café's sign, 北京, glows — “quite” bright! <b>\t¼",
    " ".join(f"A long caption: its sentence {i} names one more blue thing." for i in range(40)),
    "",
]
EMBED = """(async () => {
  while (!window.model) await new Promise(wait => setTimeout(wait, 50));
  const model = await window.model, images = [], texts = [];
  for (const url of PHOTOS) {
    images.push([...await model.encodeImage(await (await fetch(url)).blob())]);
  }
  for (const text of TEXTS) texts.push([...await model.encodeText(text)]);
  return JSON.stringify({images, texts, tokens: TEXTS.map(model.tokens)});
})()"""


def photos(folder):
    """Files: two scenes, and an odd-sized JPEG that EXIF turns, a transparent PNG, a wide one."""
    scenes = [Image.open(io.BytesIO(data)) for data in make_pairs(2, 0, 64, "test").image]
    y, x = np.mgrid[:301, :457]
    wave = np.stack([128 + 90 * np.sin(x / 9), 255 * x / 457, 255 * y / 301], -1).astype(np.uint8)
    turned = Image.Exif()
    turned[0x0112] = 6
    scenes[0].save(folder / "0.png")
    scenes[1].resize((333, 500)).save(folder / "1.jpg", quality=95)
    Image.fromarray(wave).save(folder / "2.jpg", exif=turned, quality=95)
    clear = np.dstack([wave, np.where(x > 200, 255, 0).astype(np.uint8)])
    Image.fromarray(clear).save(folder / "3.png")
    Image.fromarray(wave).resize((900, 97)).save(folder / "4.webp", lossless=True)
    return sorted(folder.iterdir())


@contextlib.contextmanager
def serve(folder):
    """An HTTP server of `folder` on this machine alone -> its address."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=folder)
    handler.log_message = http.server.SimpleHTTPRequestHandler.log_message = lambda *_: None
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@contextlib.contextmanager
def browser(name, folder):
    """A headless browser -> function: what an expression in the page of an address gives."""
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0"]
    flags += [f"--user-data-dir={folder}", "--remote-allow-origins=*", "about:blank"]
    pipes = {"stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([name, *flags], **pipes) as process, contextlib.ExitStack() as stack:
        stack.callback(process.terminate)
        port = next(m[1] for line in process.stderr if (m := re.search(r"ws://[^/]+:(\d+)/", line)))
        threading.Thread(target=process.stderr.read, daemon=True).start()
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json") as answer:
            pages = [page for page in json.load(answer) if page["type"] == "page"]
        page = websocket.create_connection(pages[0]["webSocketDebuggerUrl"], timeout=120)

        def call(method, **params):
            page.send(json.dumps({"id": 1, "method": method, "params": params}))
            while (message := json.loads(page.recv())).get("id") != 1:
                pass
            return message["result"]

        def evaluate(address, expression):
            call("Page.navigate", url=address)
            found = call("Runtime.evaluate", expression=expression, awaitPromise=True)
            return found["result"].get("value") or sys.exit(f"error: {found}")

        yield evaluate


def compare(model, found, files):
    """Smallest cosine of a feature of the browser with Python's; tokens have to be equal."""
    tokens = [row[: row.argmax() + 1].tolist() for row in model.tokenizer(TEXTS)]
    for text, there, here in zip(TEXTS, found["tokens"], tokens, strict=True):
        assert there == here, f"other tokens than Python's, {there} not {here}: {text}"
    image, text = model.encode_image(files), model.encode_text(TEXTS)
    return [
        float((np.float32(there) * here).sum(axis=1).min())
        for there, here in ((found["images"], image), (found["texts"], text))
    ]


def exports(folder):
    if len(sys.argv) > 1:
        return [Path(sys.argv[1])]
    torch.manual_seed(0)
    for name in ("JettCLIP-T", "JettCLIP-S0"):
        export(jettclip.create_model(name), folder / name)
        quantize(folder / name, folder / f"{name}-int8")
    return sorted(folder.iterdir())


def main():
    chromium = next(filter(shutil.which, BROWSERS), None)
    package = ROOT / "examples/browser/node_modules/onnxruntime-web"
    if not chromium or not package.exists():
        print(f"skipped: {'no Chromium' if not chromium else f'no {package}'} on this machine")
        return
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        shutil.copytree(ROOT / "examples/browser", scratch / "page")
        for name in ("photos", "models", "profile"):
            (scratch / name).mkdir()
        files = photos(scratch / "photos")
        addresses = json.dumps([f"/photos/{file.name}" for file in files])
        expression = EMBED.replace("PHOTOS", addresses).replace("TEXTS", json.dumps(TEXTS))
        with serve(scratch) as server, browser(chromium, scratch / "profile") as evaluate:
            for source in exports(scratch / "models"):
                folder = scratch / "models" / source.name
                if not folder.exists():
                    shutil.copytree(source, folder)
                found = evaluate(f"{server}/page/?model=/models/{source.name}", expression)
                cosines = compare(runtime.load(folder), json.loads(found), files)
                size = sum(path.stat().st_size for path in folder.glob("*.onnx")) / 1e6
                image, text = cosines
                near = f"cosine of images {image:.5f}, texts {text:.5f}"
                print(f"{source.name}: {size:.1f} MB, {near}")
                assert min(cosines) > 0.999
    print("the features in the browser are those of Python")


if __name__ == "__main__":
    main()
