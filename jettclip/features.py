"""Teacher features, computed once and read by every student.

A cache folder holds `image.npy` (N, K, d), `long.npy` and `short.npy` (N, d), all fp16, `crops.npy` (N, K, 5) that say
which pixels the teacher saw, and `manifest.json`. The features are normalised. Primary components are *not* cached:
they belong to the student's batch (`losses.primary_components`).
"""
import hashlib
import json
from pathlib import Path

import numpy as np
import torch

from .checkpoints import write_json
from .data import in_order, loader


def fingerprint(table):
    """SHA-256 of a pairs table: its images, captions and their order."""
    digest = hashlib.sha256()
    for row in zip(table.image, table.long, table.short):
        for field in row:
            digest.update(hashlib.sha256(field if isinstance(field, bytes) else str(field).encode()).digest())
    return digest.hexdigest()


class FeatureCache:
    """Cached features of one teacher over one pairs table; `build` it once, `open` it for training."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.manifest = json.loads((self.folder / "manifest.json").read_text())
        self.image, self.long, self.short, self.crops = (
            np.load(self.folder / f"{name}.npy", mmap_mode="r") for name in ("image", "long", "short", "crops"))

    @classmethod
    def build(cls, folder, teacher, teacher_hash, table, dataset, batch_size=128, report=print):
        """Fill `folder` from `teacher` over `dataset` (its crops are the stored augmentations) and open it.

        Goes on where a killed run stopped; a finished cache of the same teacher and data is opened as it is.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        n, k, width = len(dataset), dataset.crops.shape[1], teacher.config["embed_dim"]
        asked = {"teacher": teacher_hash, "data": fingerprint(table), "crops": hashlib.sha256(dataset.crops.tobytes()).hexdigest(),
                 "rows": n, "augmentations": k, "width": width, "dtype": "float16"}
        if (folder / "manifest.json").exists():
            return cls.open(folder, **asked)
        progress = folder / "progress.json"
        asked_now = {**asked, "batch_size": batch_size}  # batches are counted, so their size belongs to the progress
        done = json.loads(progress.read_text()) if progress.exists() else {"asked": asked_now, "batches": 0}
        shapes = {"image": (n, k, width), "long": (n, width), "short": (n, width)}
        if done["asked"] != asked_now or not all((folder / f"{name}.npy").exists() for name in shapes):
            done = {"asked": asked_now, "batches": 0}
        mode = "r+" if done["batches"] else "w+"
        files = {name: np.lib.format.open_memmap(folder / f"{name}.npy", mode, np.float16, shape)
                 for name, shape in shapes.items()}
        batches = [batch for j in range(k) for batch in in_order(n, batch_size, j)]
        teacher.eval()
        for number, (rows, ks, images, long, short) in enumerate(loader(dataset, batches[done["batches"]:]), done["batches"] + 1):
            with torch.inference_mode():
                rows, j = rows.numpy(), int(ks[0])
                files["image"][rows, j] = teacher.encode_image(images, normalize=True).half().numpy()
                if j == 0:
                    files["long"][rows] = teacher.encode_text(long, normalize=True).half().numpy()
                    files["short"][rows] = teacher.encode_text(short, normalize=True).half().numpy()
            if number % 20 == 0 or number == len(batches):
                for file in files.values():
                    file.flush()
                write_json(progress, {"asked": asked_now, "batches": number})
                report(f"teacher features: batch {number} of {len(batches)}")
        for name, file in files.items():
            norms = np.linalg.norm(file.astype(np.float32), axis=-1)
            if not np.allclose(norms, 1, atol=1e-2):  # NaN and zero rows fail this too
                raise ValueError(f"{int((~np.isclose(norms, 1, atol=1e-2)).sum())} rows of the teacher's {name} features are "
                                 f"not finite unit vectors: check the teacher; {folder} stays unfinished")
        np.save(folder / "crops.npy", dataset.crops)
        write_json(folder / "manifest.json", asked)
        progress.unlink()
        return cls(folder)

    @classmethod
    def open(cls, folder, **asked):
        """Open a finished cache; each keyword (rows=, data=, teacher=, ...) must agree with its manifest."""
        folder = Path(folder)
        if not (folder / "manifest.json").exists():
            raise FileNotFoundError(f"{folder} holds no finished feature cache: run notebook 01 first")
        cache = cls(folder)
        differs = [f"{key} (cached {cache.manifest.get(key)!r}, asked {value!r})" for key, value in asked.items()
                   if cache.manifest.get(key) != value]
        if differs:
            raise ValueError(f"the feature cache {folder} was made for another {'; another '.join(differs)}: "
                             "delete the folder to build it anew")
        return cache

    def rows(self, index, k):
        """Features of rows `index` (B,) seen through crops `k` (B,): normalised float (B, d) image, long, short."""
        index, k = np.asarray(index), np.asarray(k)
        return tuple(torch.nn.functional.normalize(torch.from_numpy(part).float(), dim=1)
                     for part in (self.image[index, k], self.long[index], self.short[index]))
