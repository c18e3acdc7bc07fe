"""Find photos by a long description.

python -m jettclip.search PHOTOS "two dogs, one brown, ..." --model runs/flickr8k/fd-both-s0
python -m jettclip.search PHOTOS "..." --html found.html  # thumbnails; the last model again
python -m jettclip.search PHOTOS --web                    # a page in the browser
"""

import argparse
import base64
import hashlib
import html
import io
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import zip_longest
from pathlib import Path

import numpy as np
from PIL import Image

from .deploy import runtime
from .utils import write_then_rename

INDEX = ".jettclip/index.npz"
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"}
CHUNK = 32  # photos decoded while as many are embedded
SAVE_EVERY = 256  # photos, or a tenth of the index if that is more: writing stays cheap
PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>Photos found</title><style>
body { font: 1em sans-serif } figure { display: inline-block; width: 14em; vertical-align: top }
img { width: 100% } figcaption { overflow-wrap: anywhere }</style><h1>Photos found</h1>"""


class PhotoIndex:
    """Features of the photos below `folder`, kept in `file`: `update()` looks for new, changed and
    deleted photos, `search(text)` ranks. model: a `runtime.ExportedModel`; report: called with
    sentences. An index of another model, or a damaged one, is built again.
    """

    def __init__(self, folder, model, file=None, report=print):
        self.folder, self.model, self.report = Path(folder), model, report
        if not self.folder.is_dir():
            raise FileNotFoundError(f"{folder} is not a folder")
        self.file = Path(file or self.folder / INDEX)
        self.identity = model.config["sha256"]["image.onnx"]
        self.rows = {}  # path below the folder -> ((size, modification time), feature (d,))
        self.features = np.zeros((0, model.config["embed_dim"]), np.float32)  # (N, d), of the rows
        for leftover in self.file.parent.glob(f".{self.file.name}.tmp*"):  # of a killed process
            leftover.unlink(missing_ok=True)
        saved = read_index(self.file, report)
        if saved and saved["model"] == self.identity:
            self.features = saved["features"]
            rows = zip(map(tuple, saved["stamps"].tolist()), self.features, strict=True)
            self.rows = dict(zip(saved["paths"], rows, strict=True))
        elif saved:
            report(f"{self.file} is of model {shown(saved['folder'])}: indexing all photos again")

    def update(self):
        """Index new and changed photos -> counts: new, changed, gone, unreadable, seconds."""
        start, photos, known = time.perf_counter(), dict(self.photos()), set(self.rows)
        self.rows = {path: row for path, row in self.rows.items() if photos.get(path) == row[0]}
        todo = [path for path in photos if path not in self.rows]
        added, removed, due = [], len(known) - len(self.rows), SAVE_EVERY
        chunks = [todo[i : i + CHUNK] for i in range(0, len(todo), CHUNK)]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            ahead = pool.map(self.pixels, todo[:CHUNK])
            try:
                for chunk, following in zip_longest(chunks, chunks[1:], fillvalue=()):
                    pixels = dict(zip(chunk, ahead, strict=True))
                    ahead = pool.map(self.pixels, following)  # while this chunk is embedded
                    if good := [path for path in chunk if pixels[path] is not None]:
                        batch = np.stack([pixels[path] for path in good])
                        rows = zip(good, self.model.encode_image(batch), strict=True)
                        self.rows |= {path: (photos[path], feature) for path, feature in rows}
                    added += good
                    if len(added) >= due:
                        self.save()
                        due = len(added) + max(SAVE_EVERY, len(self.rows) // 10)
            finally:  # interrupted, too: the next update resumes from here
                if added or removed:
                    self.save()
        changed, unreadable = len(known.intersection(added)), len(todo) - len(added)
        counts = {"new": len(added) - changed, "changed": changed, "gone": len(known - set(photos))}
        return counts | {"unreadable": unreadable, "seconds": time.perf_counter() - start}

    def photos(self):
        """(path below the folder, (size, modification time)) of each photo that is not hidden."""
        for parent, folders, names in os.walk(self.folder, onerror=lambda e: self.report(str(e))):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for path in (Path(parent, name) for name in sorted(names) if not name.startswith(".")):
                if path.suffix.lower() in SUFFIXES and os.path.isfile(path):
                    stat = path.stat()
                    yield str(path.relative_to(self.folder)), (stat.st_size, stat.st_mtime_ns)

    def pixels(self, path):
        """A photo as the model reads it (3, S, S), or None, reported, where it is unreadable."""
        try:
            photo = runtime.read_photo(self.folder / path, at_least=self.model.image_size)
            return self.model.transform(photo)
        except Exception as error:  # decoders raise anything, and one file must not stop the rest
            self.report(f"unreadable, skipped: {shown(path)} ({shown(error)})")

    def save(self):
        stamps = np.array([stamp for stamp, _ in self.rows.values()], np.int64).reshape(-1, 2)
        features = np.array([feature for _, feature in self.rows.values()], np.float32)
        self.features = features.reshape(-1, self.model.config["embed_dim"])
        facts = {"model": self.identity, "folder": str(self.model.folder.resolve())}
        facts = np.frombuffer(json.dumps({**facts, "paths": list(self.rows)}).encode(), np.uint8)
        arrays = {"facts": facts, "stamps": stamps, "features": self.features}
        write_then_rename(self.file, lambda temporary: np.savez(temporary, **arrays))

    def search(self, text, top=5):
        """The `top` photos nearest to `text` -> [(path, cosine similarity)], best first."""
        scores, paths = self.features @ self.model.encode_text([text])[0], list(self.rows)
        best = np.argsort(-scores, kind="stable")[:top]
        return [(self.folder / paths[row], float(scores[row])) for row in best]


def read_index(file, report=print):
    """What `PhotoIndex.save` wrote, as a dictionary, or None. Reports a damaged file."""
    if not os.path.exists(file):
        return None
    try:
        with np.load(file) as saved:
            return {**saved, **json.loads(saved["facts"].tobytes())}
    except Exception as error:  # half a file fails in many ways
        report(f"{file} is damaged ({error}): indexing all photos again")


def shown(value):
    """`value` as text that any terminal can print, whatever bytes a file's name has."""
    return str(value).encode(errors="replace").decode()


def open_model(source, name=None, backend="onnxruntime"):
    """The exported model of `source`; exports a run folder or a checkpoint of model `name` once."""
    path = Path(str(source).removeprefix("openai:"))
    if (path / runtime.CONFIG).exists():
        return runtime.load(path, backend)
    path = path / "student" if (path / "student").is_dir() else path
    weights = path / "open_clip_model.safetensors" if path.is_dir() else path
    if not weights.exists():
        raise FileNotFoundError(f"{source} is no export folder, run folder or checkpoint")
    cache, stat = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", weights.stat()
    key = repr((str(weights.resolve()), stat.st_size, stat.st_mtime_ns, name))
    exported = Path(cache, "jettclip", hashlib.sha256(key.encode()).hexdigest()[:16])
    if not exported.exists():
        from . import checkpoints, models
        from .deploy.export import export

        if not (name or checkpoints.is_run_folder(path)):
            raise ValueError(f"say with --name which model {source} holds, such as JettCLIP-S0")
        print(f"exporting {source} once, to {exported}", flush=True)
        pretrained = path if path.is_dir() else source
        model = models.create_model(name, pretrained) if name else models.load_folder(path)
        export(model, exported)
    return runtime.load(exported, backend)


def thumbnail(path, size=320):
    """RGB PIL image of at most `size` pixels a side; grey where the photo is unreadable by now."""
    try:
        image = runtime.read_photo(path, at_least=size)
    except Exception:  # deleted or damaged since it was indexed
        return Image.new("RGB", (size, size), "lightgrey")
    image.thumbnail((size, size))
    return image


def page(text, found):
    """A self-contained HTML page: the description, and the photos found with their scores."""
    figures = ""
    for path, score in found:
        thumbnail(path).save(jpeg := io.BytesIO(), "JPEG", quality=85)
        source = "data:image/jpeg;base64," + base64.b64encode(jpeg.getvalue()).decode()
        link, name = path.resolve().as_uri(), html.escape(shown(path))
        figures += f'<figure><a href="{link}"><img src="{source}" alt="{name}"></a>'
        figures += f"<figcaption>{score:.3f} {name}</figcaption></figure>\n"
    return f"{PAGE}<p>{html.escape(text)}</p>\n{figures}</html>\n"


def web(index):
    """A Gradio page for `index`, to `launch()`."""
    try:
        import gradio
    except ImportError:
        raise ImportError("--web needs Gradio: pip install 'jettclip[web]'") from None

    def answer(text, top):
        found = index.search(text, int(top)) if text.strip() else []
        return [(thumbnail(path), f"{score:.3f} {shown(path.name)}") for path, score in found]

    text = gradio.Textbox(label="Describe a photo: the longer, the better", lines=4)
    top = gradio.Slider(1, 50, value=12, step=1, label="Photos to show")
    gallery = gradio.Gallery(label="Found, best first", columns=4, object_fit="contain")
    options = {"api_name": "search", "flagging_mode": "never", "analytics_enabled": False}
    return gradio.Interface(answer, [text, top], gallery, title="Photo search", **options)


def main(argv=None):
    parser = argparse.ArgumentParser("python -m jettclip.search", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("folder", help="photos, in subfolders too")
    add("text", nargs="?", help="the description; without one, only the index is updated")
    add("--model", help="export folder, run folder or checkpoint; default: the index's model")
    add("--name", help="the model that a published checkpoint holds, such as JettCLIP-S0")
    add("--backend", choices=runtime.BACKENDS, default="onnxruntime", help="default: onnxruntime")
    add("--top", type=int, default=5, help="photos to show (default: %(default)s)")
    add("--index", help="file of the index; default: FOLDER/.jettclip/index.npz")
    add("--html", help="write a page with thumbnails to this file")
    add("--web", action="store_true", help="serve a page on this machine: http://127.0.0.1:7860")
    args = parser.parse_args(argv)
    try:
        saved = None if args.model else read_index(args.index or Path(args.folder) / INDEX)
        if not (args.model or saved):
            raise ValueError(f"{args.folder} has no index yet: name a model with --model")
        model = open_model(args.model or saved["folder"], args.name, args.backend)
        index = PhotoIndex(args.folder, model, args.index)
        counts = index.update()
        done, seconds = counts["new"] + counts["changed"], counts.pop("seconds")
        summary = ", ".join(f"{count} {what}" for what, count in counts.items())
        speed = f"; indexed {done / seconds:.0f} a second" if done else ""
        print(f"{len(index.rows):,} photos; {summary}{speed}")
        if args.text:
            index.search(args.text)  # opens the text tower
            start = time.perf_counter()
            found = index.search(args.text, args.top)
            print(f"answered in {1e3 * (time.perf_counter() - start):.1f} ms")
            for path, score in found:
                print(f"{score:.3f}  {shown(path)}")
            if args.html:
                content = page(args.text, found)
                write_then_rename(args.html, lambda file: file.write_text(content, "utf-8"))
        if args.web:
            web(index).launch(server_name="127.0.0.1")
    except KeyboardInterrupt:
        raise SystemExit("interrupted: run the same command again to resume") from None
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise SystemExit(f"error: {shown(error)}") from None


if __name__ == "__main__":
    main()
