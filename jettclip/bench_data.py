"""Benchmark of the data path: decoding, tokenizing, the feature cache, and how all of it grows with the number of pairs.

python -m jettclip.bench_data --captions long_captions.parquet      # make bench-data
"""

import argparse
import io
import shutil
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from open_clip.tokenizer import SimpleTokenizer
from PIL import Image
from torchvision import transforms

from . import data
from .checkpoints import write_json, write_then_rename
from .data import PairDataset, draw_crops, epoch_batches, in_order, loader
from .deploy import benchmark
from .features import FeatureCache
from .models import create_model
from .report import provenance
from .scenes import make_pairs
from .text import CONTEXT, Tokenizer

WIDTH, BATCH = 512, 256


def photograph(width=500, height=400, seed=0):
    """A JPEG file with a photograph's smooth areas, edges and noise, about 60 kB."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (12, 15, 3), dtype=np.uint8)).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    noisy = np.clip(np.asarray(coarse) + rng.normal(0, 6, (height, width, 3)), 0, 255).astype(
        np.uint8
    )
    file = io.BytesIO()
    Image.fromarray(noisy).save(file, "JPEG", quality=90)
    return file.getvalue()


def compare(what, calls, repeats):
    """-> rows what, way, p50_ms and ratio: how many times as fast as the first way."""
    table = benchmark(calls, repeats, warmup=1)
    return [
        {"what": what, "way": row.name, "p50_ms": row.p50_ms, "ratio": table.p50_ms[0] / row.p50_ms}
        for row in table.itertuples(index=False)
    ]


def decoding(repeats):
    files, box = [photograph(seed=seed) for seed in range(16)], draw_crops(1, 1, 0)[0, 0]
    usual = transforms.Compose(
        [transforms.Resize((256, 256), antialias=True), transforms.ToTensor()]
    )
    return compare(
        "16 JPEG files of 500 x 400 to 256 pixels",
        {
            "Pillow and torchvision": lambda: [
                usual(Image.open(io.BytesIO(file)).convert("RGB")) for file in files
            ],
            "jettclip": lambda: [
                data.crop(data.read_image(file), box, 256) / 255 for file in files
            ],
        },
        repeats,
    )


def tokenizing(captions, repeats):
    texts, theirs, ours = list(captions), SimpleTokenizer(context_length=CONTEXT), Tokenizer()
    if not torch.equal(theirs(texts), ours(texts)):
        raise AssertionError("the tokenizer's ids are not open_clip's")
    return compare(
        f"{len(texts)} captions to ids",
        {"open_clip": lambda: theirs(texts), "jettclip": lambda: ours(texts)},
        repeats,
    )


def synthetic_cache(folder, n, width=WIDTH):
    """A finished cache of `n` pairs with random unit features."""
    folder.mkdir(parents=True)
    block = np.random.default_rng(0).normal(size=(1000, width)).astype(np.float32)
    block = (block / np.linalg.norm(block, axis=1, keepdims=True)).astype(np.float16)
    for name, shape in (("image", (n, 1, width)), ("long", (n, width)), ("short", (n, width))):
        file = np.lib.format.open_memmap(folder / f"{name}.npy", "w+", np.float16, shape)
        for start in range(0, n, 1000):
            rows = file[start : start + 1000]
            rows[:] = block[: len(rows)].reshape(rows.shape)
    np.save(folder / "crops.npy", draw_crops(n, 1, 0))
    write_json(folder / "manifest.json", {"rows": n})
    return FeatureCache(folder)


def reading(folder, repeats, n=100_000, members=2000):
    """Random batches from the cache against a tar archive with one npz for each pair, both from a warm page cache."""
    cache, rng = synthetic_cache(folder / "rows", n), np.random.default_rng(0)
    with tarfile.open(folder / "pairs.tar", "w") as tar:
        for row in range(members):
            file = io.BytesIO()
            np.savez(file, image=cache.image[row], long=cache.long[row], short=cache.short[row])
            entry = tarfile.TarInfo(f"{row}.npz")
            entry.size = file.tell()
            file.seek(0)
            tar.addfile(entry, file)
    tar = tarfile.open(folder / "pairs.tar")
    tar.getmembers()

    def from_tar():
        for row in rng.integers(0, members, BATCH):
            with np.load(io.BytesIO(tar.extractfile(f"{row}.npz").read())) as one:
                [one[name] for name in ("image", "long", "short")]

    def from_cache():
        cache.rows(rng.integers(0, n, BATCH), np.zeros(BATCH, int))

    def epoch():
        """Batch after batch, as training reads them: one alone, after something else, finds the processor's caches cold."""
        for _ in range(50):
            from_cache()

    warm(cache)
    table = benchmark({"tar of npz": from_tar, "jettclip": epoch}, repeats, warmup=1)
    table.loc[1, "p50_ms"] /= 50
    return [
        {
            "what": f"{BATCH} random rows of 3 features",
            "way": row.name,
            "p50_ms": row.p50_ms,
            "ratio": table.p50_ms[0] / row.p50_ms,
            "per_second": BATCH / row.p50_ms * 1000,
        }
        for row in table.itertuples(index=False)
    ]


def warm(cache):
    """Read one byte of each page, so that all of the files is in the page cache and mapped."""
    return sum(
        int(file.reshape(-1).view(np.uint8)[::4096].sum())
        for file in (cache.image, cache.long, cache.short)
    )


def building(folder, pairs, repeats):
    """Building the cache against the teacher's forward passes over tensors that are ready."""
    table = make_pairs(pairs, seed=0)
    teacher, dataset = create_model("LongCLIP-T").eval(), PairDataset(table, 64)
    by_length = torch.from_numpy(np.argsort(table.long.str.len().to_numpy(), kind="stable"))
    batches = [images for _, _, images, _, _ in loader(dataset, in_order(pairs, 128))]
    texts = [(dataset.long[rows], dataset.short[rows]) for rows in by_length.split(128)]

    @torch.inference_mode()
    def forward():
        for images, (long, short) in zip(batches, texts):
            (
                teacher.encode_image(images, True),
                teacher.encode_text(long, True),
                teacher.encode_text(short, True),
            )

    def build():
        shutil.rmtree(folder / "built", ignore_errors=True)
        FeatureCache.build(folder / "built", teacher, "t", table, dataset, report=lambda line: None)

    return compare(
        f"features of {pairs} pairs",
        {"teacher's forward passes": forward, "building the cache": build},
        repeats,
    )


def private_memory():
    """Bytes of this process that no other process shares."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Private"))


class _Watched(PairDataset):
    """A data set whose workers hand over their memory in place of the rows."""

    def __getitems__(self, batch):
        rows, *rest = super().__getitems__(batch)
        return torch.full_like(rows, private_memory()), *rest


def scale(folder, captions, sizes):
    """One row for each number of pairs: bytes on disk, opening time, rows read in a second, a loader worker's own memory."""
    (folder / "photograph.jpg").write_bytes(photograph())
    rows = []
    for n in sizes:
        cache = synthetic_cache(folder / f"scale{n}", n)
        texts = captions.iloc[np.arange(n) % len(captions)].reset_index(drop=True)
        table = folder / f"{n}.parquet"
        pd.DataFrame(
            {
                "image": str(folder / "photograph.jpg"),
                "long": texts,
                "short": texts.str.slice(0, 60),
                "split": "train",
                "key": pd.Series(np.arange(n)).astype(str),
            }
        ).to_parquet(table)
        start = time.perf_counter()
        opened = pd.read_parquet(table)
        kept, data.IN_MEMORY = data.IN_MEMORY, 0
        dataset = _Watched(opened, 64, crops=cache.crops)
        data.IN_MEMORY = kept
        seconds = time.perf_counter() - start
        batches = epoch_batches(n, 64, 0, 0)[:15]
        worker = max(int(memory[0]) for memory, *_ in loader(dataset, batches))
        warm(cache)
        rng, read = np.random.default_rng(0), []
        for i in range(600):
            index = rng.integers(0, n, BATCH)
            start = time.perf_counter()
            cache.rows(index, np.zeros(BATCH, int))
            read += [time.perf_counter() - start] if i >= 200 else []
        size = sum(path.stat().st_size for path in cache.folder.glob("*.npy"))
        rows.append(
            {
                "pairs": n,
                "cache_bytes": size,
                "bytes_per_pair": size / n,
                "table_bytes": table.stat().st_size,
                "open_seconds": seconds,
                "rows_per_second": BATCH / np.median(read),
                "worker_mb": worker / 1e6,
            }
        )
        shutil.rmtree(cache.folder)
    return rows


def growth(table, to=1_000_000_000):
    """Fit value = c n^exponent to each column of `scale`'s rows (least squares in logarithms), and follow it to `to` pairs."""
    n = np.log(table.pairs)
    fits = {
        column: np.polyfit(n, np.log(table[column]), 1)
        for column in table.columns.drop(["pairs", "bytes_per_pair"])
    }
    return pd.DataFrame(
        [
            {
                "what": column,
                "exponent": slope,
                "pairs": to,
                "value": np.exp(start + slope * np.log(to)),
            }
            for column, (slope, start) in fits.items()
        ]
    )


def main():
    parser = argparse.ArgumentParser(
        prog="python -m jettclip.bench_data", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--captions", help="Parquet file with a column `text`; default: captions of scenes"
    )
    parser.add_argument(
        "--repeats", type=int, default=5, help="timings of each call (default: %(default)s)"
    )
    parser.add_argument(
        "--sizes",
        type=int,
        nargs="+",
        default=[1_000, 100_000, 1_200_000],
        help="numbers of pairs (default: %(default)s)",
    )
    parser.add_argument(
        "--results",
        default="results/data",
        help="folder for speed.csv, scale.csv, growth.csv (default: %(default)s)",
    )
    args = parser.parse_args()
    captions = pd.read_parquet(args.captions).text if args.captions else make_pairs(2000, 0).long
    print(
        f"{torch.get_num_threads()} threads, PyTorch {torch.__version__}; ratio: times as fast as the first way"
    )
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        speed = pd.DataFrame(
            [
                *decoding(args.repeats),
                *tokenizing(captions, args.repeats),
                *reading(folder, args.repeats),
                *building(folder, 1024, args.repeats),
            ]
        )
        print(speed.to_string(index=False, float_format="{:.2f}".format))
        sizes = pd.DataFrame(scale(folder, captions, args.sizes))
        law = growth(sizes)
        print(sizes.to_string(index=False, float_format="{:.1f}".format))
        print(law.to_string(index=False, float_format="{:.3g}".format))
    for name, table in (("speed", speed), ("scale", sizes), ("growth", law)):
        write_then_rename(
            Path(args.results) / f"{name}.csv",
            lambda path, table=table: table.to_csv(path, index=False),
        )
    write_json(Path(args.results) / "provenance.json", provenance())


if __name__ == "__main__":
    main()
