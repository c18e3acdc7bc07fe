"""Teacher features, computed once and read by every student.

    python -m jettclip.features runs/scenes/teacher/job.json                          # one process
    torchrun --nproc-per-node 8 -m jettclip.features runs/scenes/teacher/job.json     # one per GPU, each a share of the batches

A cache folder holds `image.npy` (N, K, d), `long.npy` and `short.npy` (N, d), all fp16, `crops.npy` (N, K, 4) that say
which pixels the teacher saw, and `manifest.json` with what it was made of and each file's SHA-256. The features are
normalised. Primary components are *not* cached: they belong to the student's batch (`losses.primary_components`).
"""

import hashlib
import json
import os
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.distributed as dist

from . import distributed
from .checkpoints import file_hash
from .data import dataset_for, draw_crops, in_order, loader
from .distributed import is_first, wait_for_all
from .models import load_folder
from .utils import write_json, write_then_rename


def fingerprint(table):
    """SHA-256 of a pairs table: its images, captions and their order."""
    digest = hashlib.sha256()
    for row in zip(table.image, table.long, table.short):
        for field in row:
            digest.update(
                hashlib.sha256(field if isinstance(field, bytes) else str(field).encode()).digest()
            )
    return digest.hexdigest()


class FeatureCache:
    """Cached features of one teacher over one pairs table; `build` it once, `open` it for training."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.manifest = json.loads((self.folder / "manifest.json").read_text())
        self.image, self.long, self.short, self.crops = (
            self._file(name) for name in ("image", "long", "short", "crops")
        )
        # Seen by PyTorch, which gathers rows with all threads. (N, K, d) -> (N K, d)
        self._rows = [
            torch.from_numpy(file.reshape(-1, file.shape[-1]))
            for file in (self.image, self.long, self.short)
        ]

    def _file(self, name):
        path = self.folder / f"{name}.npy"
        try:
            return np.load(
                path, mmap_mode="c"
            )  # what is written stays in memory; PyTorch warns of read-only files
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{path} of a finished feature cache is missing or cut short ({error}): delete the folder to build it anew"
            ) from None

    def verify(self):
        """Read every file and compare it with the manifest's SHA-256; a ValueError names those that differ."""
        if differs := [
            name
            for name, expected in self.manifest["sha256"].items()
            if file_sum(self.folder / f"{name}.npy") != expected
        ]:
            raise ValueError(
                f"the files {', '.join(differs)} of {self.folder} are not what was written: delete the folder to build it anew"
            )

    @classmethod
    def build(cls, folder, teacher, teacher_hash, table, dataset, batch_size=128, report=print):
        """Fill `folder` from `teacher` over `dataset` (its crops are the stored augmentations) and open it.

        Goes on where a killed run stopped, with the very bytes it would have written; a finished cache of the same teacher
        and data is opened as it is. Processes of one torchrun share the batches, in any number.
        """
        folder = Path(folder)
        n, k, width, device = (
            len(dataset),
            dataset.crops.shape[1],
            teacher.config["embed_dim"],
            teacher.logit_scale.device,
        )
        asked = {
            "teacher": teacher_hash,
            "data": fingerprint(table),
            "crops": hashlib.sha256(dataset.crops.tobytes()).hexdigest(),
            "rows": n,
            "augmentations": k,
            "width": width,
            "dtype": "float16",
            "batch_size": batch_size,
        }
        if (folder / "manifest.json").exists():
            return cls.open(
                folder, **{key: value for key, value in asked.items() if key != "batch_size"}
            )
        # Captions go by length, so that a batch has little padding to cut.
        lengths = table.long.str.len().to_numpy()
        work = [("image", batch) for j in range(k) for batch in in_order(n, batch_size, j)]
        work += [
            ("text", rows)
            for rows in np.split(
                np.argsort(lengths, kind="stable"), range(batch_size, n, batch_size)
            )
        ]
        shapes = {"image": (n, k, width), "long": (n, width), "short": (n, width)}
        if is_first():
            _prepare(folder, asked, shapes, len(work))
        wait_for_all()
        files = {name: np.load(folder / f"{name}.npy", mmap_mode="r+") for name in shapes}
        done = np.load(folder / "done.npy", mmap_mode="r+")
        rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        mine = [number for number in range(rank, len(work), world) if not done[number]]
        teacher.eval()
        pending, shown = [], time.monotonic()

        def store(name, place, rows, features):
            features = features.half().cpu().numpy()
            if (
                bad := ~np.isclose(
                    np.linalg.norm(features.astype(np.float32), axis=1), 1, atol=1e-2
                )
            ).any():  # NaN is bad too
                keys = [dataset.keys[row] for row in rows[bad][:5]]
                raise ValueError(
                    f"{bad.sum()} rows of the teacher's {name} features are not finite unit vectors (of {', '.join(map(str, keys))}): "
                    f"check the teacher; {folder} stays unfinished"
                )
            files[name][place] = features

        def keep():
            """What is marked as done is on the disk before the mark."""
            for file in files.values():
                file.flush()
            done[pending] = 1
            done.flush()
            pending.clear()

        images = loader(
            dataset, [work[number][1] for number in mine if work[number][0] == "image"], device
        )
        with torch.inference_mode():
            for number in mine:
                if work[number][0] == "image":
                    rows, ks, pixels, *_ = next(images)
                    store(
                        "image",
                        (rows.numpy(), ks.numpy()),
                        rows.numpy(),
                        teacher.encode_image(pixels, normalize=True),
                    )
                else:
                    rows = work[number][1]
                    for name, tokens in zip(("long", "short"), dataset.tokens(rows)):
                        store(
                            name, rows, rows, teacher.encode_text(tokens.to(device), normalize=True)
                        )
                pending.append(number)
                if len(pending) == 20 or number == mine[-1]:
                    keep()
                    if time.monotonic() - shown > 5 or number == mine[-1]:
                        report(f"teacher features: batch {int(done.sum())} of {len(work)}")
                        shown = time.monotonic()
        wait_for_all()
        if is_first():
            write_then_rename(folder / "crops.npy", lambda path: _save(path, dataset.crops))
            sums = {name: file_sum(folder / f"{name}.npy") for name in (*shapes, "crops")}
            write_json(
                folder / "manifest.json", {**asked, "sha256": sums, "torch": torch.__version__}
            )
            for name in ("done.npy", "progress.json"):
                (folder / name).unlink()
        wait_for_all()
        return cls(folder)

    @classmethod
    def open(cls, folder, **asked):
        """Open a finished cache; each keyword (rows=, data=, teacher=, ...) must agree with its manifest."""
        folder = Path(folder)
        if not (folder / "manifest.json").exists():
            raise FileNotFoundError(
                f"{folder} holds no finished feature cache: run notebook 01 first"
            )
        cache = cls(folder)
        differs = [
            f"{key} (cached {cache.manifest.get(key)!r}, asked {value!r})"
            for key, value in asked.items()
            if cache.manifest.get(key) != value
        ]
        if differs:
            raise ValueError(
                f"the feature cache {folder} was made for another {'; another '.join(differs)}: "
                "delete the folder to build it anew"
            )
        return cache

    def rows(self, index, k):
        """Features of rows `index` (B,) seen through crops `k` (B,): float (B, d) image, long, short, of length 1 but for rounding."""
        index, k = torch.as_tensor(index), torch.as_tensor(k)
        image, long, short = self._rows
        return tuple(
            file.index_select(0, at).float()
            for file, at in (
                (image, index * self.image.shape[1] + k),
                (long, index),
                (short, index),
            )
        )


def file_sum(path):
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _save(path, array):
    with open(path, "wb") as file:
        np.save(file, array)


def _prepare(folder, asked, shapes, batches):
    """Lay out the files of a cache and its list of done batches, unless a killed run of the same left them."""
    folder.mkdir(parents=True, exist_ok=True)
    progress = folder / "progress.json"
    if (
        progress.exists()
        and json.loads(progress.read_text()) == asked
        and all((folder / f"{name}.npy").exists() for name in (*shapes, "done"))
    ):
        return
    progress.unlink(missing_ok=True)
    for name, shape in shapes.items():
        path = folder / f"{name}.npy"
        try:
            file = np.lib.format.open_memmap(path, "w+", np.float16, shape)
            with open(
                path, "r+b"
            ) as own:  # a full disk shows here, not as a crash in the middle of writing
                os.posix_fallocate(own.fileno(), 0, file.offset + file.nbytes)
        except OSError as error:
            for written in shapes:
                (folder / f"{written}.npy").unlink(missing_ok=True)
            size = sum(2 * np.prod(shape) for shape in shapes.values())
            raise OSError(
                error.errno,
                f"no room for {size / 1e9:.3f} GB of teacher features in {folder} ({error.strerror}): free some, "
                "or store fewer augmentations",
            ) from None
    write_then_rename(folder / "done.npy", lambda path: _save(path, np.zeros(batches, np.uint8)))
    write_json(progress, asked)


def run(job, report=print):
    """Build the cache that `job` describes, a mapping that JSON can hold.

    job: folder, data (Parquet), teacher (a run folder), augmentations, smallest_crop, flip, seed, batch_size.
    """
    table, device = (
        pd.read_parquet(job["data"]),
        f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu",
    )
    teacher = load_folder(job["teacher"]).to(device)
    crops = draw_crops(
        len(table), job["augmentations"], job["seed"], job["smallest_crop"], job["flip"]
    )
    return FeatureCache.build(
        job["folder"],
        teacher,
        file_hash(job["teacher"]),
        table,
        dataset_for(teacher, table, crops),
        job["batch_size"],
        report,
    )


def start(job, processes=1):
    """Build the cache of file `job` here, or in `processes` processes of torchrun."""
    return distributed.start("jettclip.features", run, job, processes)


def main():
    distributed.command_line("jettclip.features", __doc__, "01", run)


if __name__ == "__main__":
    main()
