"""Find photos by a long description.

    python -m jettclip.search PHOTOS "two dogs, one of them brown, run along a beach ..." --model runs/flickr8k/fd-both-s0
    python -m jettclip.search PHOTOS "..." --html found.html        # thumbnails; the model is the one of the last time
    python -m jettclip.search PHOTOS --web                          # a page in the browser; pip install 'jettclip[web]'

The features of all photos are kept in PHOTOS/.jettclip/index.npz. New, changed and deleted photos are noticed each time.
"""

import argparse
import base64
import hashlib
import html
import io
import json
import os
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from .deploy import runtime
from .utils import write_then_rename

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"}
CHUNK = 32  # photos decoded while as many are embedded
SAVE_EVERY = 256  # new photos, or a tenth of the index if that is more: writing it stays cheap


class PhotoIndex:
    """Features of the photos below `folder`: `update()` brings them up to date, `search(text)` ranks them.

    model: `runtime.ExportedModel`; file: where the index is kept; report: called with sentences.
    An index of another model, or a damaged one, is made anew.
    """

    def __init__(self, folder, model, file=None, report=print):
        self.folder, self.model, self.report = Path(folder), model, report
        if not self.folder.is_dir():
            raise FileNotFoundError(f"{folder} is no folder")
        self.file = index_file(folder, file)
        self.rows = {}  # path below the folder -> (size and modification time, feature (d,))
        self.features = (
            self.stack()
        )  # (N, d), in the order of `rows`, as they were after the last update
        for abandoned in self.file.parent.glob(
            f".{self.file.name}.tmp*"
        ):  # by a process that was killed in writing
            abandoned.unlink(missing_ok=True)
        if saved := read_index(self.file, report):
            if saved["model"] == self.identity:
                self.rows = dict(
                    zip(saved["paths"], zip(map(tuple, saved["stamps"]), saved["features"]))
                )
                self.features = saved["features"]
            else:
                report(
                    f"{self.file} was made by another model ({shown(saved['folder'])}): all photos are indexed anew"
                )

    @property
    def identity(self):
        return self.model.config["sha256"]["image.onnx"]

    def update(self):
        """Bring the index up to date with the folder -> counts: new, changed, gone, unreadable, seconds."""
        start, there, known = time.perf_counter(), dict(self.photos()), set(self.rows)
        self.rows = {path: row for path, row in self.rows.items() if there.get(path) == row[0]}
        todo = [path for path in there if path not in self.rows]
        added, unsaved = [], len(known) - len(self.rows)
        chunks = [todo[i : i + CHUNK] for i in range(0, len(todo), CHUNK)]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            decoding = [pool.submit(self.pixels, path) for path in chunks[0]] if chunks else []
            try:
                for chunk, following in zip(chunks, [*chunks[1:], []]):
                    decoded, decoding = (
                        decoding,
                        [pool.submit(self.pixels, path) for path in following],
                    )
                    pixels = {path: future.result() for path, future in zip(chunk, decoded)}
                    if good := [path for path in chunk if pixels[path] is not None]:
                        features = self.model.encode_image(
                            np.stack([pixels[path] for path in good])
                        )
                        self.rows |= {
                            path: (there[path], feature) for path, feature in zip(good, features)
                        }
                    added += good
                    unsaved += len(good)
                    if unsaved >= max(SAVE_EVERY, len(self.rows) // 10):
                        self.save()
                        unsaved = 0
            finally:  # interrupted, too
                pool.shutdown(cancel_futures=True)
                if unsaved:
                    self.save()
        self.features = self.stack()
        changed = len(known.intersection(added))
        return {
            "new": len(added) - changed,
            "changed": changed,
            "gone": len(known - there.keys()),
            "unreadable": len(todo) - len(added),
            "seconds": time.perf_counter() - start,
        }

    def photos(self):
        """(path below the folder, (size, modification time)) of each photo; hidden ones are left out."""
        for parent, folders, names in os.walk(
            self.folder, onerror=lambda error: self.report(f"skipped: {shown(error)}")
        ):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for name in sorted(names):
                if Path(name).suffix.lower() in SUFFIXES and not name.startswith("."):
                    try:
                        stat = os.stat(os.path.join(parent, name))
                    except OSError as error:
                        self.report(f"skipped: {shown(error)}")
                        continue
                    yield (
                        os.path.relpath(os.path.join(parent, name), self.folder),
                        (stat.st_size, stat.st_mtime_ns),
                    )

    def pixels(self, path):
        """A photo as the model wants it (3, S, S), or None, reported, where it cannot be read."""
        try:
            return self.model.transform(
                runtime.read_photo(self.folder / path, at_least=self.model.image_size)
            )
        except (
            Exception
        ) as error:  # decoders fail in many ways, and one bad file must not stop the others
            self.report(f"unreadable, skipped: {shown(path)} ({shown(error)})")
            return None

    def save(self):
        facts = json.dumps(
            {
                "model": self.identity,
                "folder": str(self.model.folder.resolve()),
                "paths": list(self.rows),
            }
        )
        stamps = np.array([stamp for stamp, _ in self.rows.values()], dtype=np.int64).reshape(-1, 2)
        write_then_rename(
            self.file,
            lambda temporary: np.savez(
                temporary,
                facts=np.frombuffer(facts.encode(), dtype=np.uint8),
                stamps=stamps,
                features=self.stack(),
            ),
        )

    def stack(self):
        return np.array([feature for _, feature in self.rows.values()]).reshape(
            len(self.rows), self.model.config["embed_dim"]
        )

    def search(self, text, top=5):
        """The `top` photos nearest to `text` -> [(path, cosine similarity)], best first."""
        scores, paths = self.features @ self.model.encode_text([text])[0], list(self.rows)
        return [
            (self.folder / paths[row], float(scores[row]))
            for row in np.argsort(-scores, kind="stable")[:top]
        ]


def index_file(folder, file=None):
    return Path(file or Path(folder) / ".jettclip/index.npz")


def read_index(file, report=print):
    """What `PhotoIndex.save` wrote, as a dictionary; None where there is nothing, or nothing whole, which is reported."""
    try:
        with np.load(file) as saved:
            return {
                **json.loads(saved["facts"].tobytes()),
                "stamps": saved["stamps"].tolist(),
                "features": saved["features"],
            }
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        report(f"{file} is damaged ({error}): all photos are indexed anew")
        return None


def shown(value):
    """`value` as text that any terminal can print, whatever bytes a file's name has."""
    return str(value).encode(errors="replace").decode()


def open_model(source, name=None, backend=None):
    """The model `source`: an export folder, or a run folder or published checkpoint (of model `name`), exported once into
    the user's cache."""
    path = Path(str(source).removeprefix("openai:"))
    if not path.exists():
        raise FileNotFoundError(f"model {source} is not here")
    if (path / runtime.CONFIG).exists():
        return runtime.load(path, backend)
    path = path / "student" if (path / "student").is_dir() else path
    weights = path / "open_clip_model.safetensors" if path.is_dir() else path
    if not weights.exists():
        raise FileNotFoundError(
            f"{path} has no {runtime.CONFIG} and no {weights.name}: it is no export and no model folder"
        )
    stat, cache = weights.stat(), Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    key = hashlib.sha256(
        repr((str(weights.resolve()), stat.st_size, stat.st_mtime_ns, name)).encode()
    ).hexdigest()[:16]
    exported = cache / "jettclip" / key
    if not exported.exists():
        from . import checkpoints, models
        from .deploy import export

        ours = checkpoints.is_run_folder(path)
        if not (ours or name):
            raise ValueError(
                f"{source} is a published checkpoint: say with --name which model it holds, such as JettCLIP-S0"
            )
        print(f"exporting {source} once, to {exported}", flush=True)
        model = (
            models.load_folder(path)
            if ours
            else models.create_model(name, path if path.is_dir() else source)
        )
        export.export(model, exported)
    return runtime.load(exported, backend)


# ---- answers to look at


def thumbnail(path, size=320):
    """-> RGB PIL image of at most `size` pixels a side, or None where it cannot be read any more."""
    try:
        image = runtime.read_photo(path, at_least=size)
    except Exception:  # deleted or damaged since it was indexed
        return None
    image.thumbnail((size, size))
    return image


def page(text, found):
    """A self-contained HTML page: the description, and the photos found with their scores."""
    figures = []
    for path, score in found:
        data = io.BytesIO()
        if image := thumbnail(path):
            image.save(data, "JPEG", quality=85)
        source = "data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode()
        name = html.escape(shown(path))
        figures.append(
            f'<figure><a href="{path.resolve().as_uri()}"><img src="{source}" alt="{name}"></a>'
            f"<figcaption>{score:.3f} {name}</figcaption></figure>"
        )
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>Photos found</title>
<style>
body {{ font: 16px sans-serif; margin: 2em auto; max-width: 72em; padding: 0 1em }}
main {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(14em, 1fr)); gap: 1.5em }}
figure {{ margin: 0 }} img {{ width: 100%; height: 14em; object-fit: contain; background: #eee }}
figcaption {{ font-size: 0.8em; overflow-wrap: anywhere }}
</style>
<h1>Photos found</h1><p>{html.escape(text)}</p>
<main>{"".join(figures)}</main></html>
"""


def web(index):
    """A page of Gradio's for `index`, to `launch()`."""
    import gradio

    def answer(text, top):
        found = index.search(text, int(top)) if text.strip() else []
        images = [(thumbnail(path), f"{score:.3f} {shown(path.name)}") for path, score in found]
        return [(image, label) for image, label in images if image]

    with gradio.Blocks(title="Photo search", analytics_enabled=False) as blocks:
        gradio.Markdown(
            f"# Photo search\n{len(index.rows):,} photos in `{shown(index.folder)}`. "
            "Describe what you remember; the longer, the better."
        )
        text = gradio.Textbox(label="Description", lines=4)
        top = gradio.Slider(1, 50, value=12, step=1, label="Photos to show")
        button = gradio.Button("Search", variant="primary")
        gallery = gradio.Gallery(
            label="Found, best first", columns=4, object_fit="contain", height="auto"
        )
        gradio.on([button.click, text.submit], answer, [text, top], gallery, api_name="search")
    return blocks


def main(argv=None):
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m jettclip.search",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", help="photos, in subfolders too")
    parser.add_argument(
        "text",
        nargs="?",
        help="the description; without one, the index is brought up to date and no more",
    )
    parser.add_argument(
        "--model",
        help="export folder, run folder or published checkpoint; default: that of the index",
    )
    parser.add_argument(
        "--name", help="name of the model in a published checkpoint, such as JettCLIP-S0"
    )
    parser.add_argument("--backend", choices=runtime.BACKENDS, help="default: onnxruntime")
    parser.add_argument("--top", type=int, default=5, help="photos to show (default: %(default)s)")
    parser.add_argument("--index", help="file of the index; default: FOLDER/.jettclip/index.npz")
    parser.add_argument("--html", help="write a page with thumbnails to this file")
    parser.add_argument(
        "--web", action="store_true", help="serve a page on this machine: http://127.0.0.1:7860"
    )
    args = parser.parse_args(argv)
    try:
        source = args.model
        if not source:
            saved = read_index(index_file(args.folder, args.index), report=lambda sentence: None)
            if not saved:
                raise ValueError(f"{args.folder} has no index yet: name a model with --model")
            source = saved["folder"]
        index = PhotoIndex(args.folder, open_model(source, args.name, args.backend), args.index)
        counts = index.update()
        done = counts["new"] + counts["changed"]
        print(
            f"{len(index.rows):,} photos; "
            + ", ".join(f"{counts[c]} {c}" for c in ("new", "changed", "gone", "unreadable"))
            + (f"; indexed {done / counts['seconds']:.0f} a second" if done > 0 else "")
        )
        if args.text:
            index.search(args.text)  # opens the text tower
            start = time.perf_counter()
            found = index.search(args.text, args.top)
            print(f"answered in {1e3 * (time.perf_counter() - start):.1f} ms")
            for path, score in found:
                print(f"{score:.3f}  {shown(path)}")
            if args.html:
                content = page(args.text, found)
                write_then_rename(
                    args.html, lambda temporary: temporary.write_text(content, encoding="utf-8")
                )
        if args.web:
            web(index).launch(server_name="127.0.0.1")
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on from here")
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        sys.exit(f"error: {shown(error)}")


if __name__ == "__main__":
    main()
