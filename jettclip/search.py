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
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import zip_longest
from pathlib import Path

import numpy as np
from PIL import Image

from .deploy import runtime
from .inputs import read_photo
from .utils import shown, write_then_rename

SUFFIXES = {".jpg", ".jpeg", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif"}
SUFFIXES |= {".heic", ".heif", ".jxl", ".jp2", ".dng", ".nef", ".cr2", ".cr3", ".arw", ".raf"}
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
            raise FileNotFoundError(f"{self.folder.absolute()} is not a folder")
        self.file = Path(file or self.folder / ".jettclip/index.npz")
        if not (file or self.inside(self.file)):
            raise ValueError(f"{self.file} is a link out of the folder: name a file with --index")
        self.rows = self.read()  # path below folder -> ((size, modification time), feature (d,))
        self.photos, self.features = [], self.matrix([])  # what `update` saw: paths, (N, d)

    def read(self):
        """The file's rows; reports why it has none."""
        if not self.file.is_file():
            return {}
        opened = self.file.open("rb")  # what cannot be opened now may be whole
        try:
            with opened, np.load(opened) as saved:
                facts = json.loads(saved["facts"].tobytes())
                if facts["model"] != self.model.identity:
                    raise ValueError("it is of another model")
                stamps = map(tuple, saved["stamps"].astype(np.int64).reshape(-1, 2).tolist())
                features = np.asarray_chkfinite(saved["features"], np.float32)
            features = features.reshape(-1, self.model.config["embed_dim"])
            rows = zip(stamps, features, strict=True)
            return dict(zip(map(str, facts["paths"]), rows, strict=True))
        except Exception as error:  # half a file fails in many ways
            self.report(f"{shown(self.file)} is not used ({shown(error)}): indexing photos again")
            return {}

    def update(self):
        """Index new and changed photos -> counts: new, changed, gone, unseen, unreadable, seconds.

        A photo is unseen, and stays in the file, if its folder is missing, empty or locked, as on
        a disk that is not mounted. It is gone if its folder holds something else.
        """
        start, known, (photos, folders, left_out) = time.perf_counter(), self.rows, self.look()
        lost = [path for path in known if path not in photos]
        unseen = {path for path in lost if (os.path.dirname(path) or ".") not in folders}
        self.rows = {p: row for p, row in known.items() if photos.get(p) == row[0] or p in unseen}
        todo = [path for path in photos if path not in self.rows]
        gone = len(lost) - len(unseen)
        if gone or todo:
            check_writable(self.file, "--index")
        added = self.embed(todo, photos) if gone or todo else []
        self.photos = [path for path in self.rows if path not in unseen]
        self.features = self.matrix(self.photos)
        changed, unreadable = len(known.keys() & {*added}), len(todo) - len(added)
        left_out["unreadable photo(s)"] = unreadable
        left_out["photo(s) of folders that are missing or empty now, kept"] = len(unseen)
        if reasons := [f"{count} {reason}" for reason, count in left_out.items() if count]:
            self.report(f"not read: {', '.join(reasons)}")
        counts = dict(new=len(added) - changed, changed=changed, gone=gone, unseen=len(unseen))
        return counts | dict(unreadable=unreadable, seconds=time.perf_counter() - start)

    def embed(self, todo, photos):
        """Add rows of the photos `todo`, saving them now and then -> those that were readable."""
        added, due = [], SAVE_EVERY
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
                self.save()
        return added

    def look(self):
        """-> {photo's path below the folder: (size, modification time)}, folders that hold
        something, and counts of what is left out by reason. Hidden files do not count."""
        photos, listed, left_out, locked = {}, set(), Counter(), []
        for parent, folders, names in os.walk(self.folder, onerror=locked.append):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            names = sorted(name for name in names if not name.startswith("."))
            if folders or names:
                listed.add(below := os.path.relpath(parent, self.folder))
            left_out["link(s) to folders"] += sum(Path(parent, f).is_symlink() for f in folders)
            for path in (Path(parent, name) for name in names):
                try:
                    if path.suffix.lower() in SUFFIXES:
                        photos[str(path.relative_to(self.folder))] = self.stamp(path)
                except ValueError as reason:
                    left_out[str(reason)] += 1
                except OSError:  # as in a folder that may be listed, but not entered
                    left_out["file(s) that cannot be opened"] += 1
                    listed.discard(below)
        left_out["folder(s) that cannot be opened"] = len(locked)
        return photos, listed, left_out

    def stamp(self, path):
        """(size, modification time) of a photo. A reason to leave it out is a ValueError."""
        if (suffix := path.suffix.lower()) not in Image.registered_extensions():
            raise ValueError(f"{suffix} file(s) that Pillow cannot read (convert them to JPEG)")
        if path.is_symlink() and not (self.inside(path) and path.exists()):
            raise ValueError("link(s) that lead out of the folder or nowhere")
        status = path.stat()
        if not path.is_file():
            raise ValueError("pipe(s) or device(s)")
        return status.st_size, status.st_mtime_ns

    def inside(self, path):
        """Whether a path lies in the folder once all links are followed."""
        return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(self.folder))

    def pixels(self, path):
        """A photo as the model reads it (3, S, S), or None, reported, where it is unreadable."""
        try:
            return self.model.transform(read_photo(self.folder / path, self.model.image_size))
        except Exception as error:  # decoders raise anything, and one file must not stop the rest
            self.report(f"unreadable, skipped: {shown(path)} ({shown(error)})")

    def matrix(self, paths):
        features = np.array([self.rows[path][1] for path in paths], np.float32)
        return features.reshape(-1, self.model.config["embed_dim"])  # (N, d), of no paths too

    def save(self):
        stamps = np.array([stamp for stamp, _ in self.rows.values()], np.int64).reshape(-1, 2)
        facts = json.dumps({"model": self.model.identity, "paths": [*self.rows]}).encode()
        arrays = {"facts": np.frombuffer(facts, np.uint8), "stamps": stamps}
        np.savez(saved := io.BytesIO(), **arrays, features=self.matrix(self.rows))
        write_then_rename(self.file, lambda file: file.write_bytes(saved.getbuffer()))

    def search(self, text, top=5):
        """The `top` photos nearest to `text` -> [(path, cosine similarity)], best first."""
        length, tokens = self.model.context_length, len(self.model.tokenizer.encode(text)) + 2
        if tokens > length:
            self.report(f"the description has {tokens} tokens: the model reads the first {length}")
        scores = self.features @ self.model.encode_text([text])[0]  # (N,)
        best = np.argsort(-scores, kind="stable")[:top]
        return [(self.folder / self.photos[row], float(scores[row])) for row in best]


def check_writable(file, option):
    """Fail now, not after the work, if `file` cannot be written."""
    file = Path(file).absolute()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=file.parent).close()
        if file.is_dir():
            raise IsADirectoryError(0, "it is a folder")
    except OSError as error:
        raise OSError(f"cannot write {file} ({error.strerror}): use another {option}") from None


def cached(*key):
    """A path in the user's cache folder for what belongs to `key`."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache, "jettclip", hashlib.sha256(repr(key).encode()).hexdigest()[:16])


def open_model(source, name=None, backend="onnxruntime"):
    """The exported model of `source`; exports a run folder or a checkpoint of model `name` once."""
    path = Path(str(source).removeprefix("openai:")).expanduser()
    if (path / runtime.CONFIG).exists():
        return runtime.load(path, backend)
    path = path / "student" if (path / "student").is_dir() else path
    weights = path / "open_clip_model.safetensors" if path.is_dir() else path
    if not weights.is_file():
        raise FileNotFoundError(f"{path.absolute()} is no export folder, run folder or checkpoint")
    status = weights.stat()
    exported = cached(str(weights.resolve()), status.st_size, status.st_mtime_ns, name)
    with suppress(FileNotFoundError, runtime.DamagedExport):
        return runtime.load(exported, backend)
    from . import checkpoints, models
    from .deploy.export import export

    if not (name or checkpoints.is_run_folder(path)):
        raise ValueError(f"say with --name which model {source} holds, such as JettCLIP-S0")
    print(f"exporting {source} once, to {exported}", flush=True)
    pretrained = f"openai:{path}" if str(source).startswith("openai:") else path
    model = models.create_model(name, pretrained) if name else models.load_folder(path)
    return runtime.load(export(model, exported), backend)


def choose_model(args):
    """The model that the user names, now or last for this folder: the folder itself has no say."""
    last = cached("model of", str(Path(args.folder).resolve()))
    if not (args.model or last.is_file()):
        raise ValueError(f"no model was used for {args.folder} before: name one with --model")
    model = open_model(args.model or os.fsdecode(last.read_bytes()), args.name, args.backend)
    with suppress(OSError):  # where nothing can be remembered, search works all the same
        write_then_rename(last, lambda file: file.write_bytes(os.fsencode(model.folder.resolve())))
    return model


def thumbnail(path, size=320):
    """RGB PIL image of at most `size` pixels a side; grey where the photo is unreadable by now."""
    try:
        image = read_photo(path, at_least=size)
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
    try:  # by name: `import gradio` takes any folder called gradio
        from gradio import Gallery, Interface, Slider, Textbox, Warning
    except ImportError:
        raise ImportError("--web needs Gradio: pip install 'jettclip[web]'") from None

    def answer(text, top):
        index.report = Warning  # shown on the page
        found = index.search(text, int(top)) if text.strip() else []
        return [(thumbnail(path), f"{score:.3f} {shown(path.name)}") for path, score in found]

    text = Textbox(label="Describe a photo: the longer, the better", lines=4)
    top = Slider(1, 50, value=12, step=1, label="Photos to show")
    gallery = Gallery(label="Found, best first", columns=4, object_fit="contain")
    options = {"api_name": "search", "flagging_mode": "never", "analytics_enabled": False}
    return Interface(answer, [text, top], gallery, title="Photo search", **options)


def main(argv=None):
    parser = argparse.ArgumentParser("python -m jettclip.search", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("folder", type=os.path.expanduser, help="photos, in subfolders too")
    add("text", nargs="?", help="the description; without one, only the index is updated")
    add("--model", help="export folder, run folder or checkpoint; default: the folder's last")
    add("--name", help="the model that a published checkpoint holds, such as JettCLIP-S0")
    add("--backend", choices=runtime.BACKENDS, default="onnxruntime", help="default: onnxruntime")
    add("--top", type=int, default=5, help="photos to show (default: %(default)s)")
    add("--index", type=os.path.expanduser, help="default: FOLDER/.jettclip/index.npz")
    add("--html", type=os.path.expanduser, help="write a page with thumbnails to this file")
    add("--web", action="store_true", help="serve a page on this machine: http://127.0.0.1:7860")
    args = parser.parse_args(argv)
    sys.stdout.reconfigure(errors="backslashreplace")  # of a terminal that lacks a name's letters
    try:
        if args.html:
            check_writable(args.html, "--html")
        index = PhotoIndex(args.folder, choose_model(args), args.index)
        page_to_serve = web(index) if args.web else None
        counts = index.update()
        done, seconds = counts["new"] + counts["changed"], counts.pop("seconds")
        summary = ", ".join(f"{count} {what}" for what, count in counts.items())
        speed = f"; indexed {done / seconds:.0f} a second" if done else ""
        print(f"{len(index.photos):,} photos; {summary}{speed}")
        if args.text:
            index.search("")  # opens the text tower
            start = time.perf_counter()
            found = index.search(args.text, args.top)
            print(f"answered in {1e3 * (time.perf_counter() - start):.1f} ms")
            for path, score in found:
                print(f"{score:.3f}  {shown(path)}")
            if args.html:
                content = page(args.text, found).encode(errors="replace")
                write_then_rename(args.html, lambda file: file.write_bytes(content))
        if args.web:
            page_to_serve.launch(server_name="127.0.0.1")
    except KeyboardInterrupt:
        raise SystemExit("interrupted: run the same command again to resume") from None
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise SystemExit(f"error: {shown(error)}") from None


if __name__ == "__main__":
    main()
