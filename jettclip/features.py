"""Teacher features, computed once and read by every student.

    python -m jettclip.features JOB.json                        # one process
    torchrun --nproc-per-node 8 -m jettclip.features JOB.json   # one per GPU, on shares of the rows

A cache folder holds `image.npy` (N, K, d), `long.npy`, `short.npy` (N, D, d), normalised, in fp16,
and `crops.npy` (N, K, 4). With crop k goes caption draw k, and round again. Primary components are
not in it: they belong to the student's batch.
"""

import hashlib
import json
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from . import distributed
from .checkpoints import file_hash
from .data import dataset_for, draw_crops, fingerprint, in_order, loader
from .distributed import is_first, rank, wait_for_all, world_size
from .models import load_folder
from .runs import code_hash, disk_space
from .utils import progress, read_json, sha256, write_json, write_then_rename

FILES = ("image", "long", "short", "crops")
SEEN = ("image_size", "context_length", "preprocess", "padding_front")  # how a row is read
CODE = ("inputs", "data", "text", "models", "features")  # modules that decide the features


class Stale(ValueError):
    """A feature cache is damaged, or of another teacher, data or crops: `build` replaces it."""


class FeatureCache:
    """Cached features of a teacher over a pairs table: `build` it once, `open` it for training."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.manifest = read_json(self.folder / "manifest.json")
        try:  # not "r": PyTorch warns of read-only arrays
            files = [np.load(self.folder / f"{name}.npy", mmap_mode="c") for name in FILES]
        except (OSError, ValueError, EOFError) as error:
            problem = f"the files of {folder} are damaged ({error})"
            raise Stale(f"{problem}: notebook 01 builds it again") from None
        self.image, self.long, self.short, self.crops = files
        # (N K, d), (N D, d), (N D, d): PyTorch gathers rows with all threads
        self.flat = [torch.from_numpy(file).flatten(0, -2) for file in files[:3]]

    def verify(self):
        """Compare every file with the manifest's SHA-256; Stale names those that differ."""
        sums = {name: sha256(self.folder / f"{name}.npy") for name in FILES}
        if differs := ", ".join(x for x in FILES if sums[x] != self.manifest["sha256"][x]):
            problem = f"the files {differs} of {self.folder} are not what was written"
            raise Stale(f"{problem}: notebook 01 builds it again")

    @classmethod
    def build(cls, folder, teacher, teacher_hash, table, dataset, batch_size=128, report=print):
        """Fill `folder` with the features of `teacher` over `dataset` and its crops, and open it.

        Resumes a killed run, with the same bytes. Processes of one torchrun share the batches. A
        cache that is damaged or of other inputs is replaced.
        """
        folder, (n, k, _), draws = Path(folder), dataset.crops.shape, dataset.draws
        if not n:
            raise ValueError("there are no pairs, and no features to store")
        width, text_width = getattr(teacher, "widths", None) or [teacher.config["embed_dim"]] * 2
        source = {"teacher": teacher_hash, "data": fingerprint(table), "code": code_hash(*CODE)}
        source["crops"] = hashlib.sha256(dataset.crops.tobytes()).hexdigest()
        source |= {"rows": n, "augmentations": k, "draws": draws, "width": width}
        source |= {x: getattr(dataset, x) for x in SEEN}
        if is_first() and (folder / "manifest.json").exists():
            try:
                cls.open(folder, **source).verify()
            except Stale as error:
                report(f"{error}: building it again")
                for name in ("progress.json", "manifest.json"):  # what is damaged is not done
                    (folder / name).unlink(missing_ok=True)
        wait_for_all()  # the first process has decided for all
        if (folder / "manifest.json").exists():
            return cls(folder)
        manifest = {**source, "batch_size": batch_size}
        batches = _batches(table.long, k, draws, batch_size)
        shapes = {"image": (n, k, width)} | dict.fromkeys(("long", "short"), (n, draws, text_width))
        if is_first():
            _prepare(folder, manifest, {**shapes, "done": (len(batches),)})
        wait_for_all()
        _fill(folder, teacher, dataset, batches, report)
        wait_for_all()
        if is_first():
            write_then_rename(folder / "crops.npy", lambda path: np.save(path, dataset.crops))
            manifest["sha256"] = {name: sha256(folder / f"{name}.npy") for name in FILES}
            write_json(folder / "manifest.json", {**manifest, "torch": torch.__version__})
            for name in ("done.npy", "progress.json"):
                (folder / name).unlink()
        wait_for_all()
        return cls(folder)

    @classmethod
    def open(cls, folder, **source):
        """Open a finished cache whose manifest has the values of `source` (rows=, data=, ...).

        Only `verify` reads all of its bytes.
        """
        if not (Path(folder) / "manifest.json").exists():
            raise FileNotFoundError(f"{folder} holds no finished feature cache: run notebook 01")
        cache = cls(folder)
        both = {key: (cache.manifest.get(key), value) for key, value in source.items()}
        differs = [f"{k} (cached {x!r}, asked {y!r})" for k, (x, y) in both.items() if x != y]
        if differs:
            raise Stale(f"the feature cache {folder} is of other inputs: {'; '.join(differs)}")
        return cache

    def rows(self, index, k):
        """Normalised image, long, short features (B, d) of rows `index` (B,) in crops `k` (B,)."""
        index, k = (torch.as_tensor(x, dtype=torch.long) for x in (index, k))
        crops, draws = self.image.shape[1], self.long.shape[1]
        if outside := k[(k < 0) | (k >= crops)].tolist():  # another row's; PyTorch checks the index
            raise IndexError(f"{self.folder} has crops 0 to {crops - 1}, not {outside[:5]}")
        text = index * draws + k % draws
        places = index * crops + k, text, text
        return tuple(x.index_select(0, i).float() for x, i in zip(self.flat, places, strict=True))


class CachedFeatures:
    """The rows of a FeatureCache in place of pixels and tokens: what heads learn from and read."""

    in_memory = True

    def __init__(self, cache, table):
        self.cache, self.crops, self.keys = cache, cache.crops, list(table.key)
        self.draws = cache.long.shape[1]
        for name in SEEN:
            setattr(self, name, cache.manifest[name])
        sums = json.dumps(cache.manifest["sha256"], sort_keys=True)
        self.fingerprint = hashlib.sha256(sums.encode()).hexdigest()

    def __len__(self):
        return len(self.crops)

    def scaled(self, features):
        return features

    def batch(self, rows_and_crops):
        """Features (B, w) of images, long and short captions."""
        return self.cache.rows(*np.asarray(rows_and_crops).T)

    def tokens(self, rows, k=0):
        """Features (B, w) of the long and short captions of `rows` (B,), as crop `k` has them."""
        return self.cache.rows(rows, np.full(len(rows), k))[1:]


def _prepare(folder, manifest, shapes):
    """Create the files of a cache, unless a killed run of the same left them."""
    folder.mkdir(parents=True, exist_ok=True)
    started, paths = folder / "progress.json", [folder / f"{name}.npy" for name in shapes]
    left = started.exists() and read_json(started)
    if left == manifest and all(map(Path.exists, paths)):
        return
    started.unlink(missing_ok=True)
    for path in paths:
        path.unlink(missing_ok=True)  # not cut: a student may still read the cache before
    with disk_space(folder), ExitStack() as on_error:
        for path, shape in zip(paths, shapes.values(), strict=True):
            on_error.callback(path.unlink, missing_ok=True)
            array = np.lib.format.open_memmap(path, "w+", np.float16, shape)
            with open(path, "r+b") as file:  # a full disk shows here, not as a crash in writing
                file.seek(array.offset)
                for start in range(0, array.nbytes, 1 << 20):
                    file.write(bytes(min(1 << 20, array.nbytes - start)))
        on_error.pop_all()
    write_json(started, manifest)


def _batches(captions, crops, draws, batch_size):
    """("image" or "text", (b, 2) of row and crop or draw): all that a teacher reads."""
    n, batches = len(captions), []
    for k in range(crops):
        batches += [("image", batch) for batch in in_order(n, batch_size, k)]
    order = np.argsort(captions.str.len().to_numpy(), kind="stable")  # less padding
    for k in range(draws):
        for batch in in_order(n, batch_size, k):
            batches.append(("text", np.stack([order[batch[:, 0]], batch[:, 1]], axis=1)))
    return batches


@torch.inference_mode()
def _fill(folder, teacher, dataset, batches, report):
    """Compute this process's share of the batches, without those that a killed run has done."""
    files = {name: np.load(folder / f"{name}.npy", mmap_mode="r+") for name in (*FILES[:3], "done")}
    done, device = files["done"], teacher.eval().logit_scale.device
    missing, pending = [i for i in range(rank(), len(batches), world_size()) if not done[i]], []
    images = loader(dataset, [batches[i][1] for i in missing if batches[i][0] == "image"], device)
    for i in progress(missing, len(missing), "teacher features", report=report):
        kind, (rows, ks) = batches[i][0], batches[i][1].T
        if kind == "image":
            _, _, pixels, *_ = next(images)
            features = {"image": teacher.encode_image(pixels, normalize=True)}
        else:
            tokens = (side.to(device) for side in dataset.tokens(rows, ks[0]))
            long, short = (teacher.encode_text(side, normalize=True) for side in tokens)
            features = {"long": long, "short": short}
        _store(files, (rows, ks), dataset.keys, features)
        pending.append(i)
        if len(pending) == 20 or i == missing[-1]:
            for file in files.values():  # features are on the disk before they are marked as done
                file.flush()
            done[pending] = 1
            pending.clear()


def _store(files, place, keys, features):
    """Write features (b, d) at `place`, their rows and crops or draws; refuse broken ones."""
    for name, x in features.items():
        x = x.half().cpu().numpy()
        broken = ~(np.linalg.norm(x.astype(np.float32), axis=1) > 0) | np.isinf(x).any(axis=1)
        if broken.any():  # NaN too
            rows = ", ".join(str(keys[row]) for row in place[0][broken][:5])
            raise ValueError(f"the teacher's {name} features of {rows} are zero or not finite")
        files[name][place] = x


def run(job, report=tqdm.write):
    """Build the cache of `job`: folder, data (Parquet), teacher (run folder), crops, batch_size."""
    teacher = load_folder(job["teacher"]).to(distributed.device())
    table = pd.read_parquet(job["data"])
    options = (job[key] for key in ("augmentations", "seed", "smallest_crop", "flip"))
    crops = draw_crops(len(table), *options)
    draws, padding_front = "longs" in table, job.get("padding_front", False)
    dataset = dataset_for(teacher, table, crops, draws, padding_front)
    source = teacher, file_hash(job["teacher"]), table, dataset
    return FeatureCache.build(job["folder"], *source, job["batch_size"], report)


start = partial(distributed.start, "jettclip.features", run)  # (job file, processes=1)


if __name__ == "__main__":
    distributed.command_line(__doc__, run)
