"""Cached features are the teacher's, no cache is taken for another, and a killed build resumes."""

import os
import re
import resource
import shutil
import signal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_model
from training import fork, run_group

from jettclip import features
from jettclip.checkpoints import file_hash, save_folder
from jettclip.data import PairDataset, draw_crops, with_subsets
from jettclip.datasets.scenes import make_pairs
from jettclip.distributed import in_processes
from jettclip.features import FeatureCache, Stale, fingerprint, start
from jettclip.models import PLAIN
from jettclip.text import tokenizer
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


def make_data():
    """23 pairs with two crops each."""
    table = make_pairs(23, seed=7, size=32)
    crops = draw_crops(23, 2, seed=0, smallest=0.4, flip=True)
    return table, PairDataset(table, 16, crops=crops)


data = pytest.fixture(scope="module", name="data")(make_data)


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
    for stored, expected in zip(cache.rows(rows, ks), direct, strict=True):
        assert stored.dtype == torch.float32 and torch.allclose(stored, expected, atol=1e-3)
        assert torch.allclose(stored.norm(dim=1), torch.ones(4), atol=1e-3)


def test_a_finished_cache_is_opened_or_built_again(finished, data, tmp_path, monkeypatch):
    teacher, (table, dataset) = StubTeacher(), data
    assert build(finished, data, teacher).manifest["rows"] == 23 and teacher.calls == 0
    longer, scaled = table.assign(long=table.long + " More."), {**PLAIN, "mean": [0.5] * 3}
    for asked, teacher_hash, problem in [
        ((longer, dataset), "t", "data "),
        ((table, PairDataset(table, 16, crops=1 - dataset.crops)), "t", "crops "),
        ((table[:9], PairDataset(table[:9], 16)), "t", "data .*; rows .cached 23, asked 9"),
        ((table, PairDataset(table, 16, 248, dataset.crops, False, scaled)), "t", "preprocess "),
        (data, "u", r"teacher \(cached 't', asked 'u'\)"),
    ]:
        folder, lines = shutil.copytree(finished, tmp_path / "cache", dirs_exist_ok=True), []
        reader = FeatureCache.open(folder)  # of a student that trains meanwhile
        before = reader.image.copy()
        cache = build(folder, asked, teacher_hash=teacher_hash, report=lines.append)
        assert re.search(f"of other inputs: {problem}.*building it again", lines[0]), lines
        assert cache.manifest["rows"] == len(asked[0]) and cache.manifest["teacher"] == teacher_hash
        cache.verify()
        assert np.array_equal(reader.image, before)
    monkeypatch.setattr(features, "code_hash", lambda *modules: "edited")
    build(folder, data, report=lines.append)
    assert "asked 'edited'): building it again" in lines[-1]
    with pytest.raises(Stale, match="of other inputs: teacher"):
        FeatureCache.open(finished, teacher="u")
    with pytest.raises(FileNotFoundError, match="no finished feature cache: run notebook 01"):
        FeatureCache.open(tmp_path)


def test_broken_features_are_refused(data, tmp_path):
    teacher = StubTeacher()
    teacher.text_map[:] = float("nan")
    with pytest.raises(ValueError, match=r"long features of scenes-7-\d+ are zero or not"):
        build(tmp_path, data, teacher)
    assert not (tmp_path / "manifest.json").exists()


@pytest.mark.parametrize("crops", [1, 3])
def test_with_each_crop_goes_a_draw_of_the_captions(crops, tmp_path):
    """Crops 0, 1 and 2 go with draws 0, 1 and 0; with a single crop there is a single draw."""
    table = with_subsets(make_pairs(5, seed=7, size=32), 2)
    dataset = PairDataset(table, 16, crops=draw_crops(5, crops, 0), draws=True, padding_front=True)
    cache, teacher = build(tmp_path / "cache", (table, dataset)), StubTeacher()
    assert cache.manifest["draws"] == min(2, crops) and cache.manifest["padding_front"]
    for k in range(crops):
        _, long, short = cache.rows(range(5), [k] * 5)
        for found, captions in ((long, table.longs), (short, table.shorts)):
            tokens = tokenizer(248)([draws[k % 2] for draws in captions])
            expected = teacher.encode_text(tokens, True)
            torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)


def test_damaged_files_are_refused_and_built_again(finished, data, tmp_path):
    folder, lines = shutil.copytree(finished, tmp_path / "cache"), []
    whole = (folder / "long.npy").read_bytes()
    for damaged, problem in (
        (None, "are damaged"),
        (whole[:-1], "are damaged"),
        (whole[:200] + b"?" + whole[201:], "the files long of .* are not what was written"),
    ):
        (folder / "long.npy").unlink(missing_ok=True)
        if damaged:
            (folder / "long.npy").write_bytes(damaged)
        with pytest.raises(Stale, match=f"{problem}.*: notebook 01 builds it again"):
            FeatureCache.open(folder).verify()
    (folder / "progress.json").write_text("{}")  # killed before it was removed: of no use
    build(folder, data, report=lines.append)
    assert "building it again" in lines[0] and contents(folder) == contents(finished)


def test_rows_outside_are_refused(finished):
    """Crop 2 of row 0, where 2 are stored, is not crop 0 of row 1."""
    cache = FeatureCache.open(finished)
    for index, k in ((0, 2), (1, -1), (23, 0), (-1, 0)):
        with pytest.raises(IndexError, match="has crops 0 to 1, not" if k else "out of range"):
            cache.rows([index], [k])
    assert cache.rows([22], [1])[0].equal(torch.from_numpy(cache.image[22:, 1]).float())


def test_one_pair_and_none(data, tmp_path):
    one, none = ((data[0][:n], PairDataset(data[0][:n], 16)) for n in (1, 0))
    assert [x.shape for x in build(tmp_path, one, batch_size=4).rows([0], [0])] == [(1, 8)] * 3
    with pytest.raises(ValueError, match="there are no pairs, and no features to store"):
        build(tmp_path, none)


def die(count):
    if count == 31:
        os.kill(os.getpid(), signal.SIGKILL)


def build_and_die(folder):
    build(folder, make_data(), StubTeacher(die))


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """The folder of a build that is killed in its 31st image batch, after 20 are done."""
    folder = tmp_path_factory.mktemp("interrupted") / "cache"
    process = fork(build_and_die, folder)
    process.join()
    assert process.exitcode == -signal.SIGKILL and not (folder / "manifest.json").exists()
    return folder


# Image batches 21 to 46 are missing; without one of its files the list of done batches is not used,
# and not where they had another size.
RESUMED = [("nothing", {}, 26), ("long.npy", {}, 46), ("nothing", {"batch_size": 2}, 24)]


@pytest.mark.parametrize("lost, change, calls", RESUMED)
def test_a_killed_build_resumes(lost, change, calls, interrupted, finished, data, tmp_path):
    shutil.copytree(interrupted, tmp_path, dirs_exist_ok=True)
    (tmp_path / lost).unlink(missing_ok=True)
    teacher = StubTeacher()
    build(tmp_path, data, teacher, **change)
    assert teacher.calls == calls and (change or contents(tmp_path) == contents(finished))
    for name in FILES[:3]:
        assert np.allclose(np.load(tmp_path / name), np.load(finished / name), atol=1e-3)


def build_share(folder, report):
    """What a process of the group does."""
    for calls in (13, 0):  # and then opens what there is
        teacher = StubTeacher()
        build(folder, make_data(), teacher, report=report)
        assert teacher.calls == calls


def test_processes_share_the_work(interrupted, finished, tmp_path):
    shutil.copytree(interrupted, tmp_path, dirs_exist_ok=True)  # one process began, two resume
    run_group(2, in_processes, build_share, tmp_path)
    assert contents(tmp_path) == contents(finished)


def test_full_disk(finished, data, tmp_path):
    """Every file stops at 700 bytes, as on a full disk."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (700, limit[1]))
    try:
        with pytest.raises(OSError, match=f"write to {tmp_path}, .* GB are free .*: make room"):
            build(tmp_path, data)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert not [*tmp_path.iterdir()]
    build(tmp_path, data)
    assert contents(tmp_path) == contents(finished)
