"""A killed run ends with the weights of one that was not; what cannot be trained is refused."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from conftest import MODELS_AND_TOWERS, tiny_model

from jettclip import create_model, runs, train
from jettclip.data import PairDataset, draw_crops
from jettclip.datasets.scenes import make_pairs
from jettclip.distributed import torchrun
from jettclip.features import FeatureCache
from jettclip.models import load_folder
from jettclip.train import Config, finished, fit, hide_patches, learning_rate, optimizer_of, start
from jettclip.utils import write_json

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
SETTINGS = {"steps": 8, "batch_size": 6, "warmup": 2, "save_every": 2, "eval_every": 3}


def make_data(folder):
    """20 pairs of two crops each (3 batches of 6 in an epoch), and a teacher's features of them."""
    table = make_pairs(20, seed=1, size=32)
    dataset = PairDataset(table, 32, crops=draw_crops(20, 2, seed=0, smallest=0.5, flip=True))
    build = folder, tiny_model(seed=1), "t", table, dataset
    return dataset, FeatureCache.build(*build, report=lambda line: None)


def run(folder, data, report=lambda line: None, validate=None, model=None, **changes):
    config = Config(**{**SETTINGS, "components": 4, "method": "crd+fd", **changes})
    return fit(model or tiny_model(), config, data[0], folder, data[1], validate, report)


def stop_at(text):
    """A `report` that interrupts the run at the line with `text`."""

    def report(line):
        if text in line:
            raise KeyboardInterrupt

    return report


def interrupted(folder, data, at="step 6/8", **changes):
    with pytest.raises(KeyboardInterrupt):
        run(folder, data, report=stop_at(at), **changes)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """The folder of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("runs") / "student"
    run(folder, data)
    return folder


def weights(folder):
    return (folder / "student/open_clip_model.safetensors").read_bytes()


def history(folder):
    return pd.read_csv(folder / "history.csv").drop(columns="seconds")


def same(folder, reference):
    return weights(folder) == weights(reference) and history(folder).equals(history(reference))


# ---- resume

KILLED = """
import os, signal, sys
from pathlib import Path
from test_train import make_data, run

def report(line):
    print(line, flush=True)
    if "step 3/8" in line:
        sys.stdin.readline()
    if "step 6/8" in line:
        os.kill(os.getpid(), signal.SIGKILL)

run(Path(sys.argv[1]), make_data(Path(sys.argv[2])), report=report)
"""


def test_killed_run_ends_with_the_same_weights(whole, data, tmp_path, monkeypatch):
    """While it lives, no second process may train in its folder."""
    monkeypatch.setattr(runs, "LOCK_SECONDS", 0)
    folder, lines = tmp_path / "student", []
    command = [sys.executable, "-c", KILLED, folder, tmp_path / "cache"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=ENVIRONMENT, **pipes) as process:
        assert "student step 3/8" in process.stdout.readline()
        with pytest.raises(
            RuntimeError, match="another process trains in .*student: wait, or stop"
        ):
            run(folder, data)
        process.communicate("go on\n")
    assert process.returncode == -signal.SIGKILL
    assert not (folder / "student").exists()  # step 6 was reported, and step 4 saved last

    run(folder, data, report=lines.append)
    steps = [line.split(" loss")[0] for line in lines]
    assert steps == ["resumed student at step 4 of 8", "student step 6/8", "student step 8/8"]
    assert same(folder, whole) and history(folder).step.tolist() == [3, 6, 8]


def test_heads_masks_and_random_numbers_resume(data, tmp_path):
    """A model with dropout, interrupted in the middle of an epoch."""

    def with_dropout():
        model = tiny_model()
        hook = lambda module, tokens, out: F.dropout(out, 0.5, module.training)  # noqa: E731
        model.text.register_forward_hook(hook)
        return model

    run(tmp_path / "whole", data, model=with_dropout(), method="afd+mfd+crd")
    interrupted(tmp_path / "parts", data, model=with_dropout(), method="afd+mfd+crd")
    run(tmp_path / "parts", data, model=with_dropout(), method="afd+mfd+crd")
    assert same(tmp_path / "parts", tmp_path / "whole")


def test_a_finished_run_is_not_trained_again(whole, data):
    before, lines = weights(whole), []
    (whole / "student/open_clip_model.safetensors").unlink()  # as if killed before it was written
    model = run(whole, data, report=lines.append)
    assert lines == ["resumed student at step 8 of 8"]
    assert weights(whole) == before and not model.training


def test_a_new_start_clears_the_folder(data, tmp_path):
    run(tmp_path, data, steps=1)
    for name in ("last.ckpt", "previous.ckpt"):
        (tmp_path / name).unlink(missing_ok=True)
    interrupted(tmp_path, data, at="step 1/2", steps=2, eval_every=1)
    assert not (tmp_path / "student").exists()


def test_numbers_of_numpy_can_be_resumed(data, tmp_path):
    """`evaluate` returns numpy's numbers; a checkpoint that held them could not be loaded."""

    def validate(model):
        assert not model.training
        return {"recall": np.float64(0.25), "n": np.int64(3)}

    changes = {"steps": 4, "eval_every": 1, "validate": validate}
    interrupted(tmp_path, data, at="step 2/4", **changes)
    run(tmp_path, data, **changes)
    assert history(tmp_path).recall.tolist() == [0.25] * 4


def test_same_seed_same_weights(whole, data, tmp_path):
    run(tmp_path / "student", data)
    assert same(tmp_path / "student", whole)
    run(tmp_path / "other", data, seed=1)
    assert weights(tmp_path / "other") != weights(whole)


@pytest.mark.parametrize("damage", ["truncated", "missing", "garbage"])
def test_a_damaged_checkpoint_is_not_used(damage, whole, data, tmp_path):
    """The one before it is; the run ends with the same weights."""
    interrupted(tmp_path, data, save_every=1)
    last, lines = tmp_path / "last.ckpt", []
    if damage == "missing":  # killed between the two renames
        last.unlink()
    else:
        last.write_bytes(last.read_bytes()[:5000] if damage == "truncated" else b"garbage")
    run(tmp_path, data, report=lines.append, save_every=1)
    if damage != "missing":
        assert "last.ckpt is damaged and not used" in lines.pop(0)
    assert lines[0] == f"resumed {tmp_path.name} at step 4 of 8"
    assert same(tmp_path, whole)


def test_checkpoints_by_the_clock(data, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "SAVE_SECONDS", 0)
    interrupted(tmp_path, data, save_every=100)
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["step"] == 5


# ---- what a loss learns, masks, jobs


def test_learned_maps_are_no_part_of_the_student(data, tmp_path):
    model = tiny_model(embed_dim=12)
    names = set(model.state_dict())
    run(tmp_path, data, method="fd+afd", steps=4, model=model)
    saved, before = (
        torch.load(tmp_path / f"{name}.ckpt", weights_only=True)["heads"]
        for name in ("last", "previous")
    )
    assert saved["image.weight"].shape == (16, 12) and saved["fuse_text.weight"].shape == (12, 28)
    assert all((saved[key] != before[key]).any() for key in saved)
    assert set(load_folder(tmp_path / "student").state_dict()) == names


def test_masks_follow_from_seed_step_and_row():
    images = torch.rand(6, 3, 64, 64) + 0.1
    masked = hide_patches(images, 0, 3)
    hidden = (masked == 0).all(dim=1)
    assert torch.equal(masked, images * ~hidden[:, None]) and 0.65 < hidden.float().mean() < 0.85
    patches = hidden.unflatten(1, (8, 8)).unflatten(3, (8, 8)).float().mean(dim=(2, 4))
    assert set(patches.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(hide_patches(images[2:4], 0, 3, first=2), masked[2:4])
    assert not torch.equal(hide_patches(images, 0, 4), masked)


def test_several_teachers_and_a_frozen_scale(data, tmp_path):
    lines, before = [], tiny_model().logit_scale.item()
    run(tmp_path / "a", (data[0], [data[1]] * 2), steps=2, report=lines.append, learn_scale=False)
    assert "distill_short" in lines[-1]
    assert load_folder(tmp_path / "a/student").logit_scale.item() == before
    assert run(tmp_path / "b", data, steps=2).logit_scale.item() != before


def make_job(folder, **config):
    """job.json of a small student in `folder`, with its data and cache."""
    table = make_pairs(24, seed=1, size=64)
    for split in ("train", "val"):
        table.to_parquet(folder / f"{split}.parquet")
    torch.manual_seed(0)  # the teacher's weights
    build = folder / "cache", create_model("LongCLIP-T"), "t", table, PairDataset(table, 64)
    FeatureCache.build(*build, report=lambda line: None)
    settings = {"steps": 2, "batch_size": 8, "method": "crd", "components": 4, "eval_every": 1}
    job = {"folder": str(folder / "run"), "data": str(folder), "caches": [str(folder / "cache")]}
    job |= {"model": "JettCLIP-T", "text_tower": "length_aware", "image_size": 64, "crops": 0}
    job |= {"context_length": 248, "config": {**settings, **config}}
    write_json(folder / "job.json", job)
    return job


def test_a_job_is_trained(tmp_path, capsys):
    """With a start on short captions at 77 tokens."""
    job = make_job(tmp_path)
    write_json(tmp_path / "job.json", {**job, "start": {"steps": 1, "stretch": "exact"}})
    start(tmp_path / "job.json")
    out = capsys.readouterr().out
    assert "clip77 step 1/1 loss" in out and "run step 2/2 loss" in out and "long_t2i_r10" in out
    assert len(history(tmp_path / "run")) == 2
    assert load_folder(tmp_path / "run/student").context_length == 248
    (tmp_path / "run/metrics.csv").touch()
    assert finished(tmp_path, ["run", "cache"]) == ["run"]


STARTED = "import sys; from jettclip.train import start; start(sys.argv[1], 2)"
SRUN = """#!/bin/sh
# Two nodes that are this machine; its own options end where those of torchrun begin.
while [ "$1" != "$PYTHON" ]; do shift; done
"$@" & "$@" & wait
"""


def test_two_processes_are_killed_and_resume_on_two_nodes(tmp_path, capsys, monkeypatch):
    """As a requeued job does; srun is a stand-in, the rendezvous of two torchruns is not."""
    for name, value in {"PROCID": "0", "LOCALID": "0", "NTASKS": "1", "JOB_NUM_NODES": "1"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)  # torchrun's own variables win
    for folder in (tmp_path / "whole", tmp_path / "parts"):
        folder.mkdir()
        make_job(folder, steps=6)
    start(tmp_path / "whole/job.json", 2)
    assert "run step 6/6 loss" in capsys.readouterr().out
    with pytest.raises(RuntimeError, match="No such file or directory: '.*/missing'"):
        torchrun("json.tool", str(tmp_path / "missing"), 2)

    command = [sys.executable, "-c", STARTED, tmp_path / "parts/job.json"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, env=ENVIRONMENT, **pipes) as process:
        for line in process.stdout:  # until the workers have ended, too
            if "run step 2/6" in line:  # step 1 is saved
                process.kill()
    assert not (tmp_path / "parts/run/student").exists()

    (tmp_path / "srun").write_text(SRUN)
    (tmp_path / "srun").chmod(0o755)
    cluster = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NUM_NODES": "2"}
    cluster |= {"PYTHON": sys.executable, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    resumed = subprocess.run(
        command, env={**ENVIRONMENT, **cluster}, capture_output=True, text=True
    )
    assert "resumed run at step" in resumed.stdout, resumed.stdout + resumed.stderr
    assert same(tmp_path / "parts/run", tmp_path / "whole/run")


# ---- refusals


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"lr": 1e-4}, "lr"),
        ({"method": "fd", "steps": 9}, "steps, method"),
        ({"weights": (1, 0, 1, 0)}, "weights"),
        ({"model": "stretched"}, "model_config"),
    ],
)
def test_other_settings_in_the_same_folder(changes, named, whole, data):
    if "model" in changes:
        changes = {"model": tiny_model(text_tower=changes["model"])}
    with pytest.raises(ValueError, match=rf"holds a run with other settings \({named}\)"):
        run(whole, data, **changes)


@pytest.mark.parametrize(
    "changes, error",
    [
        ({}, r"method 'crd\+fd' distils: it needs a feature cache"),
        ({"method": "none", "batch_size": 21}, "20 training pairs do not fill a batch_size of 21"),
        ({"method": "none", "batch_size": 9}, "batch_size 9 does not divide among 2 processes"),
    ],
)
def test_what_cannot_be_trained(changes, error, data, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "world_size", lambda: 2)
    with pytest.raises(ValueError, match=error):
        run(tmp_path, (data[0], None), **changes)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "settings, error",
    [
        ({"method": "crdd"}, "did you mean 'crd'"),
        ({"method_weights": {"icll": 1}}, "did you mean 'icl'"),
        ({"pairs": "bot"}, "did you mean 'both'"),
        ({"method": "crd", "method_weights": {"fd": 2}}, "{'fd'}, the method 'crd' has not"),
    ],
)
def test_unknown_settings(settings, error):
    with pytest.raises(ValueError, match=error):
        Config(steps=1, **settings)


@pytest.mark.parametrize("cause", ["learning rate", "teacher"])
def test_a_loss_that_is_not_a_number(cause, data, tmp_path, monkeypatch):
    (dataset, _), rows, settings = data, FeatureCache.rows, {}

    def with_nan(self, index, k):
        features = rows(self, index, k)
        features[1][np.asarray(index) == 3] = float("nan")
        return features

    if cause == "teacher":
        monkeypatch.setattr(FeatureCache, "rows", with_nan)
        error = f"not finite: {dataset.keys[3]}; weights are in .*not-finite.ckpt; try a lower lr"
    else:
        settings = {"lr": float("inf"), "warmup": 0}
        error = "loss is nan at step 2 of .*contrastive_long.*"
    with pytest.raises(FloatingPointError, match=error):
        run(tmp_path, data, **settings)
    saved = torch.load(tmp_path / "not-finite.ckpt", weights_only=True)
    assert saved["model"].keys() == tiny_model().state_dict().keys()
    assert cause != "teacher" or saved["keys"] == [dataset.keys[3]]
    assert not (tmp_path / "student").exists()


# ---- one step


def test_learning_rate_by_hand():
    config = Config(steps=12, warmup=4, lr=1.0)
    rates = [learning_rate(step, config) for step in range(13)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[6] == pytest.approx(0.5 + 0.5**1.5)
    assert rates[8] == pytest.approx(0.5) and rates[12] == pytest.approx(0)
    assert learning_rate(0, Config(steps=1, warmup=0, lr=0.3)) == 0.3


@pytest.mark.parametrize("name, tower", MODELS_AND_TOWERS)
def test_weight_decay_shrinks_matrices_and_kernels_only(name, tower):
    model = create_model(name, text_tower=tower)
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer_of(model, Config(steps=1, lr=0.5, weight_decay=0.2)).step()
    for key, parameter in model.named_parameters():
        kept = parameter.ndim < 2 or "positional" in key or "layer_scale" in key
        assert torch.allclose(parameter, before[key] * (1 if kept else 0.9)), key
    assert any("positional" in key for key in before)


@pytest.mark.parametrize("tower", ["length_aware", "stretched", "longclip"])
def test_frozen_positions(tower, data, tmp_path):
    model = tiny_model(text_tower=tower)
    before = model.text.positional_embedding.detach().clone()
    after = run(tmp_path, data, model=model, steps=2, frozen_positions=20).text.positional_embedding
    assert torch.equal(after[:20], before[:20])
    assert (after[20:60] != before[20:60]).any(dim=1).all()


def test_a_student_learns(data, tmp_path):
    """It comes close to its teacher's features where it is asked for nothing else."""
    alone = {"method": "fd", "pairs": "long", "weights": (0, 0, 1, 0)}
    run(tmp_path, data, **alone, steps=25, eval_every=5, lr=5e-3)
    losses = history(tmp_path).distill_long
    assert losses.iloc[-1] < 0.6 * losses.iloc[0]


def test_history(whole):
    table = pd.read_csv(whole / "history.csv")
    terms = ["contrastive_long", "contrastive_short", "distill_long", "distill_short"]
    assert list(table.columns) == ["step", "seconds", "loss", *terms, "scale"]
    assert np.allclose(table[terms].sum(axis=1), table.loss) and (table.scale <= 100).all()
    files = [".lock0", "config.json", "history.csv", "last.ckpt", "previous.ckpt", "student"]
    assert sorted(path.name for path in whole.iterdir()) == files
