"""A killed run ends with the weights of one that was not; what cannot be trained is refused."""

import copy
import os
import re
import shutil
import signal
import sys
import time
from functools import partial
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from conftest import largest, tiny_model
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from training import first_step, fork, make_data, quiet, run_group

from jettclip import create_model, runs, train
from jettclip.data import PairDataset, epoch_batches, loader
from jettclip.datasets.scenes import make_pairs
from jettclip.distributed import in_processes
from jettclip.features import FeatureCache
from jettclip.losses import METHODS
from jettclip.models import MODELS, TEXT_TOWERS, load_folder
from jettclip.train import Config, finished, fit, hide_patches, learning_rate, optimizer_of
from jettclip.utils import write_json

NOTEBOOK_03 = Path(__file__).resolve().parents[1] / "notebooks/03_reparameterize.ipynb"
SETTINGS = {"steps": 8, "batch_size": 6, "warmup": 2, "eval_every": 3}


def run(folder, data, report=quiet, validate=None, model=None, **changes):
    config = Config(**{**SETTINGS, "components": 4, "method": "crd+fd", **changes})
    return fit(model or tiny_model(), config, data[0], folder, data[1], validate, report)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """3 batches of 6 in an epoch."""
    return make_data(tmp_path_factory.mktemp("teacher"), 20)


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """The folder of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("run")
    run(folder, data)
    return folder


def weights(folder):
    return (folder / "student/open_clip_model.safetensors").read_bytes()


def history(folder):
    return pd.read_csv(folder / "history.csv").drop(columns="seconds")


def same(folder, reference):
    return weights(folder) == weights(reference) and history(folder).equals(history(reference))


def train_with_dropout(folder, data, report=quiet):
    """With all that a checkpoint holds: random numbers, masks, learned maps, numbers of numpy."""
    model = tiny_model(embed_dim=12)
    hook = lambda module, tokens, out: F.dropout(out, 0.5, module.training)  # noqa: E731
    model.text.register_forward_hook(hook)

    def validate(model):
        assert not model.training
        return {"recall": np.float64(0.25), "n": np.int64(3)}

    run(folder, data, report, validate, model, method="fd+afd+mfd+crd")


def train_and_die(folder, cache):
    runs.SAVE_SECONDS = 0  # a checkpoint each step

    def report(line):
        if "step 6/8" in line:
            os.kill(os.getpid(), signal.SIGKILL)

    train_with_dropout(folder, make_data(cache.parent, 20), report)


def test_a_killed_run_ends_with_the_same_weights(data, tmp_path):
    """In the middle of an epoch. The learned maps are no part of the student."""
    whole, killed, lines = tmp_path / "whole", tmp_path / "killed", []
    process = fork(train_and_die, killed, data[1].folder)
    train_with_dropout(whole, data)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not (killed / "student").exists()  # step 6 was reported, and step 5 saved last
    before = torch.load(killed / "last.ckpt", weights_only=True)["heads"]
    train_with_dropout(killed, data, lines.append)
    steps = [line.split(" loss")[0] for line in lines]
    assert steps == ["resumed killed at step 5 of 8", "killed step 6/8", "killed step 8/8"]
    assert same(killed, whole) and history(killed).step.tolist() == [3, 6, 8]
    assert history(killed).recall.tolist() == [0.25] * 3

    saved = torch.load(whole / "last.ckpt", weights_only=True)["heads"]
    assert saved["image.weight"].shape == (16, 12) and saved["fuse_text.weight"].shape == (12, 28)
    assert all((saved[key] != before[key]).any() for key in saved)
    assert load_folder(whole / "student").state_dict().keys() == tiny_model().state_dict().keys()


def test_the_best_evaluation_is_kept(data, whole, tmp_path):
    """Of steps 3, 6 and 8 the second is the best: the student is that of a run of 6 steps."""
    scores, kept = iter([0.2, 0.5, 0.4]), []

    def validate(model):
        kept.append({key: value.clone() for key, value in model.state_dict().items()})
        return {"recall": next(scores)}

    model = run(tmp_path, data, validate=validate, keep_best=True)
    assert all(torch.equal(value, kept[1][key]) for key, value in model.state_dict().items())
    assert weights(tmp_path) != weights(whole)


def test_a_finished_run_is_not_trained_again(whole, data):
    before, lines = weights(whole), []
    (whole / "student/open_clip_model.safetensors").unlink()  # as if killed before it was written
    assert not run(whole, data, report=lines.append).training
    assert lines == [f"resumed {whole.name} at step 8 of 8"] and weights(whole) == before

    table = pd.read_csv(whole / "history.csv")
    terms = ["contrastive_long", "contrastive_short", "distill_long", "distill_short"]
    assert list(table.columns) == ["step", "seconds", "loss", *terms, "scale"]
    assert np.allclose(table[terms].sum(axis=1), table.loss) and table.scale.nunique() == 3


def test_other_inputs_start_again(data, tmp_path, monkeypatch):
    """Settings, the start, data, teachers and the code are what a checkpoint is made of."""
    (dataset, cache), lines = map(copy.copy, data), []
    cleared = lambda model: {"cleared": not (tmp_path / "student").exists()}  # noqa: E731

    def again(lr=1e-4, seed=7):
        model = tiny_model(seed)
        run(tmp_path, (dataset, cache), lines.append, cleared, model, steps=1, lr=lr)
        assert history(tmp_path).cleared.all()

    again(lr=1e-3, seed=0)
    again(seed=0)
    again()
    dataset.fingerprint = PairDataset(make_pairs(20, seed=2, size=32), 32).fingerprint
    again()
    cache.manifest = {**cache.manifest, "sha256": {}}
    again()
    monkeypatch.setattr(runs, "code_hash", lambda: "edited")
    again()
    changed = "|".join(line for line in lines if "; training starts again" in line)
    assert re.findall(r": (\S+) changed", changed) == ["lr", "start", "data", "teachers", "code"]


def test_a_damaged_checkpoint_is_not_used(whole, data, tmp_path):
    """Training starts again, and ends with the same weights."""
    folder, lines = shutil.copytree(whole, tmp_path / "cut"), []
    (folder / "last.ckpt").write_bytes((whole / "last.ckpt").read_bytes()[:5000])
    run(folder, data, report=lines.append)
    assert "last.ckpt is damaged and not used" in lines[0] and "cut step 3/8" in lines[1]
    assert same(folder, whole)


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """The job of a small student, with its data and cache."""
    folder, table = tmp_path_factory.mktemp("job"), make_pairs(24, seed=1, size=64)
    for split in ("train", "val"):
        table.to_parquet(folder / f"{split}.parquet")
    torch.manual_seed(0)  # the teacher's weights
    build = folder / "cache", create_model("LongCLIP-T"), "t", table, PairDataset(table, 64)
    FeatureCache.build(*build, report=quiet)
    settings = {"steps": 6, "batch_size": 8, "method": "crd", "components": 4, "eval_every": 1}
    job = {"data": str(folder), "caches": [str(folder / "cache")], "config": settings}
    job |= {"model": "JettCLIP-T", "text_tower": "length_aware", "image_size": 64}
    return job | {"context_length": 248, "crops": 0, "rows": 0}


def test_a_job_is_trained(job, tmp_path, capsys):
    job = {**job, "folder": str(tmp_path / "run"), "config": {**job["config"], "steps": 2}}
    write_json(tmp_path / "job.json", job)
    train.start(tmp_path / "job.json")
    out = capsys.readouterr().out
    assert "run step 2/2 loss" in out and "long_t2i_r10" in out
    assert len(history(tmp_path / "run")) == 2
    assert load_folder(tmp_path / "run/student").context_length == 248
    (tmp_path / "run/metrics.csv").touch()
    assert finished(tmp_path, ["run", "cache"]) == ["run"]


def test_a_student_of_the_first_rows(job, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "fit", lambda model, config, dataset, *_: (config, dataset))
    table = pd.read_parquet(f"{job['data']}/train.parquet")
    for rows, n in ((0, 24), (16, 16)):
        config, dataset = train.run({**job, "folder": str(tmp_path), "rows": rows})
        assert dataset.keys == table.key[:n].tolist()
        train.check(config, dataset, [FeatureCache(job["caches"][0])])  # its cache may have more


def start_two(folder):
    sys.stdout = open(folder / "lines", "w")  # noqa: SIM115
    train.start(folder / "job.json", 2)


def resume(job, report):
    lines = []
    train.run(job, lines.append)
    assert job["folder"].endswith("whole") or "resumed killed at step" in lines[0]


def test_two_processes_are_killed_and_resume(job, tmp_path, monkeypatch):
    """As a requeued job does."""
    whole, killed, lines = tmp_path / "whole", tmp_path / "killed", tmp_path / "lines"
    write_json(tmp_path / "job.json", {**job, "folder": str(killed)})
    process = fork(start_two, tmp_path)
    while not lines.exists() or "killed step 2/6" not in lines.read_text():  # step 1 is saved
        assert process.is_alive()
        time.sleep(0.02)
    with (
        monkeypatch.context() as patch,
        pytest.raises(RuntimeError, match="another process trains"),
    ):
        patch.setattr(runs, "LOCK_SECONDS", 0)
        runs.lock(killed)
    process.kill()
    with runs.lock(killed):  # the workers, which torchrun has started, have ended, too
        assert not (killed / "student").exists()
    for folder in (killed, whole):
        run_group(2, in_processes, resume, {**job, "folder": str(folder)})
    assert same(killed, whole)


REFUSED = {
    "8 steps of 1 pairs: train at least 1 step of 2 pairs": {"method": "none", "batch_size": 1},
    "needs a feature cache": {},
    "20 training pairs do not fill a batch_size of 21": {"method": "none", "batch_size": 21},
    "batch_size 9 does not divide among 2 processes": {"method": "none", "batch_size": 9},
    "did you mean 'both'": {"pairs": "bot"},
    "distillation method 'df' is unknown": {"method": "crd+df"},
    "names gd; the method is 'crd.fd'": {"method_weights": {"gd": 2}},
}


@pytest.mark.parametrize("error", REFUSED)
def test_what_cannot_be_trained(error, data, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "world_size", lambda: 2)
    with pytest.raises(ValueError, match=error):
        run(tmp_path, (data[0], None), **REFUSED[error])
    assert not list(tmp_path.iterdir())


def test_a_cache_of_other_crops_or_rows_teaches_nobody(data, tmp_path):
    dataset, cache = data
    other = copy.copy(dataset)
    for crops in (dataset.crops[:, ::-1], dataset.crops[:19], dataset.crops.repeat(2, axis=1)):
        other.crops = crops
        with pytest.raises(ValueError, match="is of other rows or crops than the data: run note"):
            run(tmp_path, (other, [cache]))
    other.crops = dataset.crops[:, :1]  # some of those stored
    run(tmp_path, (other, cache), steps=1)


@pytest.mark.parametrize("what, chunk", [("loss", 0), ("gradient", 0), ("gradient", 4)])
def test_a_nan_is_named_and_not_applied(what, chunk, whole, data, tmp_path, monkeypatch):
    """It is that of the batch's fifth long caption. Training resumes from before it."""
    monkeypatch.setattr(runs, "SAVE_SECONDS", 0)
    losses, steps = train.total_loss, []

    def broken(features, teacher, *arguments, **settings):
        steps.append(1)
        if len(steps) == 3 and what == "loss":
            teacher[1][4] = torch.nan
        elif len(steps) == 3:
            features[1].register_hook(lambda g: g.index_fill(0, torch.tensor([4]), torch.nan))
        return losses(features, teacher, *arguments, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(train, "total_loss", broken)
        key = data[0].keys[epoch_batches(20, 6, seed=0, epoch=0, crops=2)[2, 4, 0]]
        with pytest.raises(FloatingPointError, match=f"step 3 .* not finite: {key}; weights are"):
            run(tmp_path, data, chunk=chunk)
    assert torch.load(tmp_path / "not-finite.ckpt", weights_only=True)["keys"] == [key]
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert saved["step"] == 2 and all(x.isfinite().all() for x in saved["model"].values())
    assert not (tmp_path / "student").exists()
    if not chunk:
        run(tmp_path, data)
        assert same(tmp_path, whole)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux has a disk that is always full")
def test_a_full_disk_is_named_and_training_goes_on_when_there_is_room(whole, data, tmp_path):
    new = f".last.ckpt.tmp{os.getpid()}.ckpt"

    def fill_disk(line):
        if "step 3/8" in line:
            (tmp_path / new).symlink_to("/dev/full")

    with pytest.raises(OSError, match=r"cannot write to .* GB are free .*: make room"):
        run(tmp_path, data, fill_disk)
    assert not (tmp_path / new).is_symlink() and not (tmp_path / "student").exists()
    run(tmp_path, data)
    assert same(tmp_path, whole)


def make_tower(name):
    """A small model with the text tower `name`."""
    if name in TEXT_TOWERS:
        return tiny_model(text_tower=name, image_size=64)
    sizes = {"vision_patch_size": 16, "vision_width": 64, "vision_layers": 1, "text_width": 64}
    sizes |= {"embed_dim": 16, "image_size": 64, "text_heads": 1, "text_layers": 1}
    torch.manual_seed(0)
    model = create_model("LongCLIP-B", **sizes)
    model.text.causal = False  # as in the larger students
    return model


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("large"), 16, size=64)


def close(found, exact):
    """To bfloat16: the gradient within 10 % of its length, the statistics within 1 %."""
    limits = zip(found, exact, (0.1, 0.01), strict=True)
    return all((a - b).norm() < limit * b.norm() for a, b, limit in limits)


EVERY = "+".join(METHODS)


@pytest.mark.parametrize("name", [*TEXT_TOWERS, "transformers that read both ways"])
def test_bfloat16_agrees_with_float32(name, large, tmp_path):
    step = partial(first_step, data=large, method=EVERY)
    steps = [step(tmp_path / str(x), model=make_tower(name), bf16=x) for x in (True, False)]
    assert close(*steps) and not torch.equal(steps[0][0], steps[1][0])
    assert {x.dtype for x in steps[0]} == {torch.float32}


def test_on_a_cpu_only_linear_layers_multiply_in_bfloat16():
    x = torch.rand(1, 2, 8, 8)
    attend, conv = F.scaled_dot_product_attention, F.conv2d
    with train.in_bf16(x.device):
        y = F.linear(x, x[0, 0], x[0, 0, 0])
        found = attend(y, y, y, x > 0), conv(x, x)
    assert y.dtype == torch.bfloat16 and (y.float() - F.linear(x, x[0, 0], x[0, 0, 0])).norm() > 0
    assert torch.equal(found[0], attend(y.float(), y.float(), y.float(), x > 0))
    assert torch.equal(found[1], conv(x, x))


@pytest.mark.parametrize("chunk", [0, 8])
def test_masked_images_leave_the_statistics_alone(chunk, data, tmp_path):
    """After a step they are those of the student's own view: as without masked images."""
    step = partial(first_step, data=data, chunk=chunk)
    steps = [step(tmp_path / x, model=tiny_model(), method=x) for x in ("fd+mfd", "fd")]
    assert torch.equal(steps[0][1], steps[1][1]) and not torch.equal(steps[0][0], steps[1][0])


def test_statistics_are_kept_and_estimated(data):
    """By notebook 03. Those of two batches are the mean of those of each; other weights stay."""
    cells = nbformat.read(NOTEBOOK_03, nbformat.NO_CONVERT).cells
    space = {"copy": copy, "torch": torch, "train": train, "_BatchNorm": _BatchNorm}
    exec(next(cell.source for cell in cells if "def reestimate" in cell.source), space)
    reestimate = space["reestimate"]
    batches = list(loader(data[0], epoch_batches(20, 10, 0, 0)))
    model = tiny_model().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with train.keep_statistics(model):
        train.encode(model, batches[0][2:])
    assert all(value.equal(before[key]) for key, value in model.state_dict().items())
    first, second, both = (reestimate(model, some) for some in (batches[:1], batches[1:], batches))
    assert model.training and not both.training
    for key, value in both.state_dict().items():
        if "running" in key:
            mean = (first.state_dict()[key] + second.state_dict()[key]) / 2
            assert torch.allclose(value, mean, atol=1e-5) and largest(value, before[key]) > 1e-3
        elif "batches" not in key:
            assert value.equal(before[key])


def test_learning_rate_by_hand():
    config, steps = Config(steps=12, warmup=4, lr=1.0), (0, 1, 2, 3, 4, 6, 8, 12)
    rates = [learning_rate(step, config) for step in steps]
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1, 1, 0.5 + 0.5**1.5, 0.5, 0])
    assert learning_rate(0, Config(steps=1, warmup=0, lr=0.3)) == 0.3


ARCHITECTURES = {str(config["vision_cfg"]): name for name, config in MODELS.items()}
for name in ("LiT-Lite1", "LiT-Lite2"):  # of parts that pip installs
    ARCHITECTURES.pop(str(MODELS[name]["vision_cfg"]))


@pytest.mark.parametrize("name", ARCHITECTURES.values())
def test_kernels_and_matrices_decay_and_nothing_else(name):
    with torch.device("meta"):
        model = create_model(name, device="meta")
    decay, rest = optimizer_of(model, Config(steps=1, weight_decay=0.2)).param_groups
    assert (decay["weight_decay"], rest["weight_decay"]) == (0.2, 0)
    matrices = nn.modules.conv._ConvNd, nn.Linear, nn.Embedding, nn.MultiheadAttention
    expected = [
        parameter
        for module in model.modules()
        for key, parameter in module.named_parameters(recurse=False)
        if key in ("text_projection", "proj") or isinstance(module, matrices) and "bias" not in key
    ]
    assert {*map(id, decay["params"])} == {*map(id, expected)}
    assert len(decay["params"]) + len(rest["params"]) == len(list(model.parameters()))


def test_masks_hide_three_quarters_of_the_patches():
    images = torch.rand(6, 3, 64, 64) + 0.1
    masked = hide_patches(images, 0, 3)
    seen = F.avg_pool2d((masked > 0).float(), 8)  # the share of every patch, (6, 3, 8, 8)
    assert set(seen.unique().tolist()) == {0.0, 1.0} and 0.15 < seen.mean() < 0.35
    assert torch.equal(masked, images * F.interpolate(seen[:, :1], 64))
    assert not torch.equal(hide_patches(images, 0, 4), masked)


def test_frozen_positions(data, tmp_path):
    """With two teachers."""
    model, lines = tiny_model(), []
    before = model.text.positional_embedding.detach().clone()
    settings = {"steps": 2, "frozen_positions": 20, "report": lines.append}
    run(tmp_path, (data[0], [data[1]] * 2), model=model, **settings)
    after = model.text.positional_embedding
    assert torch.equal(after[:20], before[:20])
    assert (after[20:60] != before[20:60]).any(dim=1).all() and "distill_short" in lines[-1]


def test_a_student_learns(data, tmp_path):
    """It comes close to its teacher's features where it is asked for nothing else."""
    alone = {"method": "fd", "pairs": "long", "weights": (0, 0, 1, 0)}
    run(tmp_path, data, **alone, steps=25, eval_every=5, lr=5e-3)
    losses = history(tmp_path).distill_long
    assert losses.iloc[-1] < 0.6 * losses.iloc[0]
