"""An index of the photos of a folder: it follows the folder, and ranks the photos by a query."""

import io
import json
import os
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import date, datetime
from importlib.util import find_spec
from itertools import zip_longest
from pathlib import Path
from stat import S_ISREG

import numpy as np
from PIL import Image

from . import nearest
from .inputs import RAW, read_photo
from .utils import shown, write_then_rename

EXTRA = {".heic", ".heif", *RAW}  # read where the extra `photos` is installed
SUFFIXES = {".jpg", ".jpeg", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif"}
SUFFIXES |= {".jxl", ".jp2", *EXTRA}
CHUNK = 32  # photos decoded while as many are embedded
SAVE_EVERY = 256  # photos, or a tenth of the index if that is more: writing stays cheap
CANDIDATES = 500  # photos beside those asked for, which 8 bits may rank too low


def say(sentence):
    """Print to stderr: what is found has stdout to itself."""
    print(sentence, file=sys.stderr, flush=True)


class PhotoIndex:
    """Features of the photos below `folder`, kept in `file`: `update()` looks for new, changed and
    deleted photos, `search(text)` ranks. model: a `runtime.ExportedModel`; report: called with
    sentences. An index of another model, or a damaged one, is built again.
    """

    def __init__(self, folder, model, file=None, report=say):
        self.folder, self.model, self.report = Path(folder), model, report
        if not self.folder.is_dir():
            raise FileNotFoundError(f"{self.folder.absolute()} is not a folder")
        self.file = Path(file or self.folder / ".jettclip/index.npz")
        if not (file or self.inside(self.file)):
            raise ValueError(f"{self.file} is a link out of the folder: name a file with --index")
        if file and not self.file.parent.is_dir():
            raise FileNotFoundError(f"{self.file.parent} is no folder: use another --index")
        self.rows = self.read()  # path below folder -> ((size, time of change), day, feature (d,))
        self.photos, self.features, self.coarse = [], self.matrix([]), None  # as `update` saw them

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
                features = np.asarray_chkfinite(saved["features"], np.float16)
            features = features.reshape(-1, self.model.config["embed_dim"])
            rows = zip(facts["photos"], features, strict=True)
            return {str(p): ((size, time), str(day), row) for (p, size, time, day), row in rows}
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
        if todo and not (self.rows and os.access(self.file.parent, os.W_OK)):
            self.save()  # fails now, not after the work
        added = self.embed(todo, photos) if gone or todo else []
        self.photos = [path for path in self.rows if path not in unseen]
        self.features, self.coarse = self.matrix(self.photos), None
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
                        batch = np.stack([pixels[path][0] for path in good])
                        for path, feature in zip(good, self.model.encode_image(batch), strict=True):
                            feature = feature.astype(np.float16)
                            self.rows[path] = photos[path], pixels[path][1], feature
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
        readable = Image.registered_extensions().keys() | (RAW if find_spec("rawpy") else set())
        for parent, folders, names in os.walk(self.folder, onerror=locked.append):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            names = sorted(name for name in names if not name.startswith("."))
            below = os.path.relpath(parent, self.folder)
            if folders or names:
                listed.add(below)
            left_out["link(s) to folders"] += sum(Path(parent, f).is_symlink() for f in folders)
            for name in names:
                suffix = os.path.splitext(name)[1].lower()
                try:
                    if suffix in SUFFIXES:
                        stamp = self.stamp(os.path.join(parent, name), suffix, readable)
                        photos[name if below == "." else os.path.join(below, name)] = stamp
                except ValueError as reason:
                    left_out[str(reason)] += 1
                except OSError:  # as in a folder that may be listed, but not entered
                    left_out["file(s) that cannot be opened"] += 1
                    listed.discard(below)
        left_out["folder(s) that cannot be opened"] = len(locked)
        return photos, listed, left_out

    def stamp(self, path, suffix, readable):
        """(size, modification time) of a photo. A reason to leave it out is a ValueError."""
        if suffix not in readable:
            hint = "pip install 'jettclip[photos]'" if suffix in EXTRA else "convert them to JPEG"
            raise ValueError(f"{suffix} file(s) that Pillow cannot read ({hint})")
        if os.path.islink(path) and not (self.inside(path) and os.path.exists(path)):
            raise ValueError("link(s) that lead out of the folder or nowhere")
        if not S_ISREG((status := os.stat(path)).st_mode):
            raise ValueError("pipe(s) or device(s)")
        return status.st_size, status.st_mtime_ns

    def inside(self, path):
        """Whether a path lies in the folder once all links are followed."""
        return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(self.folder))

    def pixels(self, path):
        """A photo as the model reads it (3, S, S), and its day; None, reported, if unreadable."""
        try:
            photo = read_photo(self.folder / path, self.model.image_size)
            return self.model.transform(photo), day_taken(self.folder / path)
        except Exception as error:  # decoders raise anything, and one file must not stop the rest
            self.report(f"unreadable, skipped: {shown(path)} ({shown(error)})")

    def matrix(self, paths):
        features = np.array([self.rows[path][2] for path in paths], np.float16)
        return features.reshape(-1, self.model.config["embed_dim"])  # (N, d), of no paths too

    def save(self):
        photos = [(path, *stamp, day) for path, (stamp, day, _) in self.rows.items()]
        facts = json.dumps({"model": self.model.identity, "photos": photos}).encode()
        arrays = {"facts": np.frombuffer(facts, np.uint8), "features": self.matrix(self.rows)}
        np.savez(saved := io.BytesIO(), **arrays)
        try:
            write_then_rename(self.file, lambda file: file.write_bytes(saved.getbuffer()))
        except OSError as error:
            problem = f"cannot write {self.file} ({error.strerror})"
            raise OSError(f"{problem}: use another --index") from None

    def select(self, below="", since="", until=""):
        """Rows of the photos in the subfolder `below` taken from the day `since` to `until`: these
        are written 2024-05-31, 2024-05 or 2024. Raises ValueError where no photo can be."""
        subfolder = self.folder / below
        if not (subfolder.is_dir() and self.inside(subfolder)):
            raise ValueError(f"--below {below}: {self.folder} has no such subfolder")
        if since > until + "~":  # which sorts after all days of a month or year
            raise ValueError(f"--since {since} is after --until {until}: exchange them")
        below = os.path.relpath(os.path.realpath(subfolder), os.path.realpath(self.folder))
        prefix = "" if below == "." else os.path.join(below, "")
        days = [(path, self.rows[path][1]) for path in self.photos]
        return np.flatnonzero([p.startswith(prefix) and since <= d <= until + "~" for p, d in days])

    def search(self, text="", top=5, image=None, without="", rows=None):
        """The `top` photos nearest to `text` and `image` (what `read_photo` reads), and far from
        the text `without`, among `rows` -> [(path, cosine similarity)], best first."""
        if top < 1:
            raise ValueError(f"top is {top}: ask for at least 1 photo")
        asked, length = [], self.model.context_length
        for sign, words in ((1, text), (-1, without)):
            if (tokens := len(self.model.tokenizer.encode(words)) + 2) > length:
                read = f"the model reads the first {length}"
                self.report(f"the description has {tokens} tokens: {read}")
            if tokens > 2:
                asked.append((sign, self.model.encode_text([words])[0]))
        if image is not None:
            image = read_photo(image, self.model.image_size)
            asked.append((1, self.model.encode_image([image])[0]))
        rows = np.arange(len(self.photos)) if rows is None else rows
        if not (len(rows) and any(sign > 0 for sign, _ in asked)):
            return []
        signs, queries = map(np.float32, zip(*asked, strict=True))  # (Q,), (Q, d)
        query = queries[0]
        if len(queries) > 1:
            # Cosines with photos spread wider than with texts: divided by it, all count alike.
            spread = self.cosines(rows[:: len(rows) // 1000 + 1], queries.T).std(axis=0) + 1e-6
            query = signs / spread @ queries  # (Q,) @ (Q, d) -> (d,)
            query /= np.linalg.norm(query) + 1e-9
        if len(rows) > (count := top + CANDIDATES):
            self.coarse = self.coarse or nearest.coarse(self.features)
            near = self.coarse(query)[rows]
            rows = rows[near >= np.partition(near, -count)[-count]]
        cosines = self.cosines(rows, query)
        best = np.argsort(-cosines, kind="stable")[:top]
        scores = np.minimum(cosines, 1).tolist()  # float16 features may be longer than 1
        return [(self.folder / self.photos[rows[row]], scores[row]) for row in best]

    def cosines(self, rows, queries):
        return self.features[rows].astype(np.float32) @ queries  # (N, d) @ (d, ...) -> (N, ...)

    def duplicates(self, least, rows):
        """Groups of near-duplicates among `rows` (N,), whose cosine is `least` or more ->
        [(path, cosine to the group's first)] of each, the largest file first."""
        rows = sorted(rows, key=lambda row: -self.rows[self.photos[row]][0][0])
        paths = [self.folder / self.photos[row] for row in rows]
        features = self.features[rows].astype(np.float32)
        features /= np.linalg.norm(features, axis=1, keepdims=True) + 1e-9  # not 1 in float16
        return [
            [(paths[row], min(1.0, float(features[row] @ features[group[0]]))) for row in group]
            for group in nearest.groups(features, least - 1e-6)
        ]


def day_taken(path):
    """The day of a photo, such as 2024-05-31: by its EXIF data, else that of its last change."""
    with suppress(Exception), Image.open(path) as image:  # malformed, or none
        text = image.getexif().get_ifd(0x8769)[0x9003]  # DateTimeOriginal
        return datetime.strptime(text[:10], "%Y:%m:%d").date().isoformat()
    return date.fromtimestamp(os.path.getmtime(path)).isoformat()
