"""Cached features are the teacher's, no cache is taken for another, and a killed build resumes."""

import os
import re
import resource
import shutil
import signal
import socket
from functools import partial
from multiprocessing import get_context

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_model

from jettclip.checkpoints import file_hash, save_folder
from jettclip.data import PairDataset, draw_crops
from jettclip.datasets.scenes import make_pairs
from jettclip.distributed import in_processes
from jettclip.features import FeatureCache, Stale, fingerprint, start
from jettclip.utils import write_json

FILES = ("image.npy", "long.npy", "short.npy", "crops.npy", "manifest.json")


class StubTeacher(torch.nn.Module):
    """Linear maps of pixels and tokens. It counts its image batches; `stop(count)` comes first."""

    def __init__(self, stop=lambda count: None):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.config, self.logit_scale = {"embed_dim": 8}, torch.zeros(())
        self.image_map = torch.randn(3 * 16 * 16, 8, generator=generator)
        self.text_map = torch.randn(49408, 8, generator=generator)
        self.calls, self.stop = 0, stop

    def encode_image(self, images, normalize):
        self.calls += 1
        self.stop(self.calls)
        return F.normalize(images.flatten(1) @ self.image_map, dim=1)

    def encode_text(self, tokens, normalize):
        return F.normalize(self.text_map[tokens].sum(dim=1), dim=1)


@pytest.fixture(scope="module")
def data():
    """23 pairs with two crops each."""
    table = make_pairs(23, seed=7, size=32)
    crops = draw_crops(23, 2, seed=0, smallest=0.4, flip=True)
    return table, PairDataset(table, 16, crops=crops)


def build(folder, data, teacher=None, teacher_hash="t", batch_size=1, report=print):
    teacher = teacher or StubTeacher()
    return FeatureCache.build(folder, teacher, teacher_hash, *data, batch_size, report)


def contents(folder):
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    return {name: (folder / name).read_bytes() for name in FILES}


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """The folder of an uninterrupted build."""
    folder = tmp_path_factory.mktemp("features") / "cache"
    build(folder, data)
    return folder


def test_a_job_stores_the_teachers_features(table, tmp_path):
    files = {name: str(tmp_path / name) for name in ("folder", "data", "teacher")}
    table.to_parquet(files["data"])
    save_folder(teacher := tiny_model().eval(), files["teacher"])
    settings = {"augmentations": 3, "smallest_crop": 0.4, "flip": True, "seed": 3, "batch_size": 7}
    write_json(tmp_path / "job.json", {**files, **settings})
    start(tmp_path / "job.json")
    source = {"teacher": file_hash(files["teacher"]), "data": fingerprint(table), "rows": 24}
    cache = FeatureCache.open(files["folder"], **source)
    assert cache.image.shape == (24, 3, 16) and cache.image.dtype == np.float16
    crops = draw_crops(24, 3, seed=3, smallest=0.4, flip=True)
    dataset = PairDataset(table, 32, crops=crops)
    assert np.array_equal(cache.crops, crops) and len(np.unique(crops[..., 0])) == 72
    rows, ks = torch.tensor([5, 23, 0, 5]), torch.tensor([1, 0, 2, 2])
    images = torch.stack([dataset[int(row), int(k)][2] for row, k in torch.stack([rows, ks], 1)])
    with torch.inference_mode():
        texts = [teacher.encode_text(side[rows], True) for side in (dataset.long, dataset.short)]
        direct = [teacher.encode_image(images, True), *texts]
    for stored, features in zip(cache.rows(rows, ks), direct, strict=True):
        assert stored.dtype == torch.float32 and torch.allclose(stored, features, atol=1e-3)
        assert torch.allclose(stored.norm(dim=1), torch.ones(4), atol=1e-3)


def test_a_finished_cache_is_opened_or_built_again(finished, data, tmp_path):
    teacher, (table, dataset) = StubTeacher(), data
    assert build(finished, data, teacher).manifest["rows"] == 23 and teacher.calls == 0
    longer = table.assign(long=table.long + " More.")
    for asked, teacher_hash, problem in [
        ((table[::-1], dataset), "t", "data "),
        ((longer, dataset), "t", "data "),
        ((table, PairDataset(table, 16, crops=1 - dataset.crops)), "t", "crops "),
        ((table[:9], PairDataset(table[:9], 16)), "t", "data .*; rows .cached 23, asked 9"),
        (data, "u", r"teacher \(cached 't', asked 'u'\)"),
    ]:
        folder, lines = shutil.copytree(finished, tmp_path / "cache", dirs_exist_ok=True), []
        cache = build(folder, asked, teacher_hash=teacher_hash, report=lines.append)
        assert re.search(f"of other inputs: {problem}.*building it again", lines[0]), lines
        assert cache.manifest["rows"] == len(asked[0]) and cache.manifest["teacher"] == teacher_hash
        cache.verify()
    with pytest.raises(Stale, match="of other inputs: teacher"):
        FeatureCache.open(finished, teacher="u")
    with pytest.raises(FileNotFoundError, match="no finished feature cache: run notebook 01"):
        FeatureCache.open(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
def test_broken_features_are_refused(value, data, tmp_path):
    teacher = StubTeacher()
    teacher.text_map[:] = value
    for _ in range(2):
        with pytest.raises(ValueError, match=r"long features of scenes-7-\d+ are not finite unit"):
            build(tmp_path, data, teacher)
        assert not (tmp_path / "manifest.json").exists()


@pytest.mark.parametrize("name", ["image", "long", "crops"])
def test_damaged_files_are_refused(name, finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "cache")
    file = folder / f"{name}.npy"
    FeatureCache.open(folder).verify()
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ValueError, match=f"the files {name} of .* are not what was written: "):
        FeatureCache.open(folder).verify()
    for damage in (lambda: file.write_bytes(whole[:-1]), file.unlink):
        damage()
        with pytest.raises(ValueError, match=f"{name}.npy is missing or cut short: delete the"):
            FeatureCache.open(folder)


def exit_codes(*functions):
    """Run functions side by side, in copies of this process."""
    processes = [get_context("fork").Process(target=function) for function in functions]
    for step in ("start", "join"):
        for process in processes:
            getattr(process, step)()
    return [process.exitcode for process in processes]


def interrupt(folder, data):
    """Start a build that is killed in its 31st image batch, after 20 are done."""

    def stop(count):
        if count == 31:
            os.kill(os.getpid(), signal.SIGKILL)

    assert exit_codes(lambda: build(folder, data, StubTeacher(stop))) == [-signal.SIGKILL]
    assert not (folder / "manifest.json").exists()


# Image batches 21 to 46 are missing; without one of its files the list of done batches is not used,
# and not where they had another size or teacher.
RESUMED = [("nothing", {}, 26), ("long.npy", {}, 46), ("done.npy", {}, 46)]
RESUMED += [("nothing", {"batch_size": 2}, 24), ("nothing", {"teacher_hash": "u"}, 46)]


@pytest.mark.parametrize("lost, change, calls", RESUMED)
def test_a_killed_build_resumes(lost, change, calls, finished, data, tmp_path):
    interrupt(tmp_path, data)
    (tmp_path / lost).unlink(missing_ok=True)
    teacher = StubTeacher()
    build(tmp_path, data, teacher, **change)
    assert teacher.calls == calls and (change or contents(tmp_path) == contents(finished))
    for name in FILES[:3]:
        assert np.allclose(np.load(tmp_path / name), np.load(finished / name), atol=1e-3)


def test_processes_share_the_work(finished, data, tmp_path):
    interrupt(tmp_path, data)  # one process begins, two resume

    def run(job, report=print):
        teacher = StubTeacher()
        build(tmp_path, data, teacher, report=report)
        assert teacher.calls == 13

    def process(rank):
        group = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
        os.environ.update(RANK=rank, **group)
        in_processes(run, None)

    with socket.create_server(("localhost", 0)) as server:
        port = str(server.getsockname()[1])
    assert exit_codes(partial(process, "0"), partial(process, "1")) == [0, 0]
    assert contents(tmp_path) == contents(finished)


def test_full_disk(finished, data, tmp_path):
    """Every file stops at 700 bytes, as on a full disk."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (700, limit[1]))
    try:
        with pytest.raises(OSError, match=f"no room for 0.000 GB of .* in {tmp_path}.*; free some"):
            build(tmp_path, data)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert list(tmp_path.iterdir()) == []
    build(tmp_path, data)
    assert contents(tmp_path) == contents(finished)
