"""Cached features are the teacher's own, a cache is never taken for another, and a killed build goes on."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_model

from jettclip.checkpoints import file_hash, save_folder, write_json
from jettclip.data import PairDataset, draw_crops
from jettclip.features import FeatureCache, fingerprint, start
from jettclip.datasets.scenes import make_pairs

ROOT = Path(__file__).resolve().parents[1]
FILES = ("image.npy", "long.npy", "short.npy", "crops.npy", "manifest.json")


class StubTeacher:
    """Linear maps of pixels and of tokens; `calls` counts image batches, `before_image(calls)` comes first."""

    def __init__(self, before_image=None):
        generator = torch.Generator().manual_seed(0)
        self.config, self.logit_scale = {"embed_dim": 8}, torch.zeros(())
        self.image_map = torch.randn(3 * 16 * 16, 8, generator=generator)
        self.text_map = torch.randn(49408, 8, generator=generator)
        self.calls, self.before_image = 0, before_image

    def eval(self):
        return self

    def encode_image(self, images, normalize):
        self.calls += 1
        if self.before_image:
            self.before_image(self.calls)
        return F.normalize(images.flatten(1) @ self.image_map, dim=1)

    def encode_text(self, tokens, normalize):
        return F.normalize(self.text_map[tokens].sum(dim=1), dim=1)


def make_data():
    """23 pairs with two crops each."""
    table = make_pairs(23, seed=7, size=32)
    crops = draw_crops(23, 2, seed=0, smallest=0.4, flip=True)
    return table, PairDataset(table, 16, crops=crops)


def build(folder, data, teacher=None, teacher_hash="t", **arguments):
    table, dataset = data
    return FeatureCache.build(
        folder,
        teacher or StubTeacher(),
        teacher_hash,
        table,
        dataset,
        **{"batch_size": 1, "report": lambda line: None, **arguments},
    )


@pytest.fixture(scope="module")
def data():
    return make_data()


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """The folder of an uninterrupted build."""
    folder = tmp_path_factory.mktemp("features") / "cache"
    build(folder, data)
    return folder


def test_rows_are_the_teachers_features(table, tmp_path):
    teacher = tiny_model().eval()
    crops = draw_crops(len(table), 3, seed=0, smallest=0.4, flip=True)
    dataset = PairDataset(table, 32, crops=crops)
    lines = []
    FeatureCache.build(tmp_path, teacher, "t", table, dataset, batch_size=7, report=lines.append)
    assert lines == ["teacher features: batch 16 of 16"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(FILES)

    cache = FeatureCache.open(tmp_path, teacher="t", data=fingerprint(table), rows=24)
    assert cache.image.shape == (24, 3, 16) and cache.image.dtype == np.float16
    assert np.array_equal(cache.crops, crops)
    rows, ks = torch.tensor([5, 23, 0, 5]), torch.tensor([1, 0, 2, 2])
    images = torch.stack([dataset[row, k][2] for row, k in zip(rows.tolist(), ks.tolist())])
    with torch.inference_mode():
        direct = (
            teacher.encode_image(images, True),
            teacher.encode_text(dataset.long[rows], True),
            teacher.encode_text(dataset.short[rows], True),
        )
    for stored, own in zip(cache.rows(rows, ks), direct):
        assert stored.dtype == torch.float32 and torch.allclose(stored, own, atol=1e-3)
        assert torch.allclose(stored.norm(dim=1), torch.ones(4), atol=1e-3)


def test_a_finished_cache_is_opened(finished, data):
    teacher = StubTeacher()
    cache = build(finished, data, teacher)
    assert teacher.calls == 0 and cache.manifest["rows"] == 23


def test_another_teacher_or_data_is_refused(finished, data):
    table, dataset = data
    shuffled = table.iloc[::-1].reset_index(drop=True)
    shifted = PairDataset(table, 16, crops=dataset.crops + np.array([0, 0, 0, 1], np.float32))
    recaptioned = table.assign(long=table.long + " More.")
    fewer = table.head(9), PairDataset(table.head(9), 16)
    for refused, problem in (
        (lambda: build(finished, data, teacher_hash="u"), r"teacher \(cached 't', asked 'u'\)"),
        (lambda: build(finished, (shuffled, dataset)), "another data"),
        (lambda: build(finished, (recaptioned, dataset)), "another data"),
        (lambda: build(finished, (table, shifted)), "another crops"),
        (lambda: build(finished, fewer), r"rows \(cached 23, asked 9\)"),
        (lambda: FeatureCache.open(finished, rows=22), r"asked 22\): delete the folder"),
    ):
        with pytest.raises(ValueError, match=problem):
            refused()


def test_no_cache(tmp_path):
    with pytest.raises(FileNotFoundError, match="no finished feature cache: run notebook 01"):
        FeatureCache.open(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
def test_broken_features_are_refused(value, data, tmp_path):
    teacher = StubTeacher()
    teacher.text_map[:] = value
    for _ in range(2):
        with pytest.raises(
            ValueError,
            match=f"1 rows of the teacher's long features are not finite .*of {data[0].key[0][:6]}",
        ):
            build(tmp_path, data, teacher)
        assert not (tmp_path / "manifest.json").exists()


def contents(folder):
    return {name: (folder / name).read_bytes() for name in FILES}


@pytest.mark.parametrize("name", ["image", "long", "crops"])
def test_damaged_files_are_refused(name, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "cache")
    cache, file = FeatureCache.open(tmp_path / "cache"), tmp_path / f"cache/{name}.npy"
    cache.verify()
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(
        ValueError, match=f"the files {name} of .* are not what was written: delete the folder"
    ):
        FeatureCache.open(tmp_path / "cache").verify()
    file.write_bytes(whole[:-1])
    with pytest.raises(
        ValueError, match=f"{name}.npy of a finished feature cache is missing or cut short"
    ):
        FeatureCache.open(tmp_path / "cache")
    file.unlink()
    with pytest.raises(
        ValueError, match=f"{name}.npy of a finished feature cache is missing or cut short"
    ):
        FeatureCache.open(tmp_path / "cache")


FULL = """
import resource, sys
from test_features import build, make_data

resource.setrlimit(resource.RLIMIT_FSIZE, (700, resource.RLIM_INFINITY))  # every file stops at 700 bytes, as on a full disk
try:
    build(sys.argv[1], make_data())
except OSError as error:
    print(error)
"""


def run_python(code, *arguments):
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
    )


def test_full_disk(finished, data, tmp_path):
    said = run_python(FULL, tmp_path).stdout
    assert (
        f"no room for 0.000 GB of teacher features in {tmp_path}" in said
        and "free some, or store fewer augmentations" in said
    )
    assert list(tmp_path.iterdir()) == []
    build(tmp_path, data)
    assert contents(tmp_path) == contents(finished)


KILLED = """
import os, signal, sys
from test_features import StubTeacher, build, make_data

def kill(call):
    if call == 27:
        os.kill(os.getpid(), signal.SIGKILL)

build(sys.argv[1], make_data(), StubTeacher(kill))
"""


def test_killed_build_goes_on(finished, data, tmp_path):
    killed = run_python(KILLED, tmp_path)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (tmp_path / "manifest.json").exists()
    with pytest.raises(FileNotFoundError, match="no finished feature cache"):
        FeatureCache.open(tmp_path)

    teacher, lines = StubTeacher(), []
    build(tmp_path, data, teacher, report=lines.append)
    assert teacher.calls == 26  # image batches 21 to 46
    assert lines == ["teacher features: batch 69 of 69"]
    assert contents(tmp_path) == contents(finished)


PROCESSES = """
import sys
from pathlib import Path
from jettclip.distributed import in_processes
from test_features import StubTeacher, build, make_data

in_processes(lambda folder, report: build(folder, make_data(), StubTeacher(), report=report), Path(sys.argv[1]))
"""


def test_processes_share_the_work(finished, data, tmp_path):
    interrupt(tmp_path / "cache", data)  # by one process, and goes on in two
    (tmp_path / "job.py").write_text(PROCESSES)
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
            tmp_path / "job.py",
            tmp_path / "cache",
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("teacher features: batch")
    assert contents(tmp_path / "cache") == contents(finished)


def interrupt(folder, data, **arguments):
    """Start a build that stops in its 31st image batch, after 20 are done."""

    def stop(call):
        if call == 31:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(folder, data, StubTeacher(stop), **arguments)


@pytest.mark.parametrize("changes", [{"batch_size": 2}, {"teacher_hash": "u"}])
def test_interrupted_build_of_something_else_starts_anew(changes, finished, data, tmp_path):
    """Finished batches of another size or teacher are not the ones that are needed."""
    interrupt(tmp_path, data)
    teacher = StubTeacher()
    build(tmp_path, data, teacher, **changes)
    assert teacher.calls == (24 if "batch_size" in changes else 46)
    for name in ("image", "long", "short"):
        one, other = np.load(tmp_path / f"{name}.npy"), np.load(finished / f"{name}.npy")
        assert np.allclose(one, other, atol=1e-3)


def test_progress_without_its_files_is_not_trusted(finished, data, tmp_path):
    interrupt(tmp_path, data)
    (tmp_path / "long.npy").unlink()
    build(tmp_path, data)
    assert contents(tmp_path) == contents(finished)


def test_a_job_from_files(table, finished, tmp_path):
    table.to_parquet(tmp_path / "train.parquet")
    save_folder(tiny_model().eval(), tmp_path / "student")
    job = {
        "folder": str(tmp_path / "cache"),
        "data": str(tmp_path / "train.parquet"),
        "teacher": str(tmp_path / "student"),
        "augmentations": 2,
        "smallest_crop": 0.5,
        "flip": True,
        "seed": 3,
        "batch_size": 8,
    }
    write_json(tmp_path / "job.json", job)
    cache = start(tmp_path / "job.json")
    assert cache.image.shape == (24, 2, 16) and len(np.unique(cache.crops[..., 0])) == 48
    assert (
        FeatureCache.open(tmp_path / "cache", teacher=file_hash(tmp_path / "student")).manifest
        == cache.manifest
    )
