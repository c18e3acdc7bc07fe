"""A killed run ends with the weights of one that was not; what cannot be trained is refused at once."""

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

from jettclip import create_model
from jettclip.models import load_folder
from jettclip.checkpoints import write_json
from jettclip.data import PairDataset, draw_crops
from jettclip.features import FeatureCache
from jettclip.losses import WHOLE, Part
from jettclip.distributed import Stopped
from jettclip.datasets.scenes import make_pairs
from jettclip.train import Config, fit, hide_patches, learning_rate, optimizer_of, start

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = {
    "steps": 8,
    "batch_size": 6,
    "warmup": 2,
    "save_every": 2,
    "eval_every": 3,
    "components": 4,
}


def make_data(folder):
    """20 pairs with two crops each (3 batches of 6 in an epoch), and a teacher's features of them."""
    table = make_pairs(20, seed=1, size=32)
    crops = draw_crops(20, 2, seed=0, smallest=0.5, flip=True)
    dataset = PairDataset(table, 32, crops=crops)
    cache = FeatureCache.build(
        folder, tiny_model(seed=1), "t", table, dataset, report=lambda line: None
    )
    return dataset, cache


def run(
    folder, data, method="crd+fd", report=lambda line: None, validate=None, model=None, **changes
):
    dataset, cache = data
    config = Config(**{**SETTINGS, "method": method, **changes})
    return fit(model or tiny_model(), config, dataset, folder, cache, validate, report)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """The folder of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("runs") / "student"
    run(folder, data)
    return folder


def weights(folder):
    return (folder / "student/open_clip_model.safetensors").read_bytes()


def history(folder):
    return pd.read_csv(folder / "history.csv").drop(columns="seconds")


# ---- resume

KILLED = """
import os, signal, sys
from pathlib import Path
from test_train import make_data, run

def report(line):
    print(line, flush=True)
    if "step 6/8" in line:
        os.kill(os.getpid(), signal.SIGKILL)

run(sys.argv[1], make_data(sys.argv[2]), report=report)
"""


def test_killed_run_ends_with_the_same_weights(finished, data, tmp_path):
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    folder = tmp_path / "student"
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, folder, tmp_path / "cache"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert [
        line.split(" contrastive")[0].split(" loss")[0] for line in killed.stdout.splitlines()
    ] == ["student step 3/8", "student step 6/8"]
    assert not (folder / "student").exists()  # step 6 was reported and not yet saved; step 4 was

    lines = []
    run(folder, data, report=lines.append)
    assert [line.split(" loss")[0] for line in lines] == [
        "resumed student at step 4 of 8",
        "student step 6/8",
        "student step 8/8",
    ]
    assert weights(folder) == weights(finished)
    assert history(folder).equals(history(finished)) and history(folder).step.tolist() == [3, 6, 8]


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_told_to_stop(number, finished, data, tmp_path):
    """It ends at the step of the signal, which no `save_every` would have saved, and goes on to the same weights."""

    def report(line):
        if "step 3/8" in line:
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    with pytest.raises(
        Stopped, match=rf"student stopped by {number.name} at step 4 of 8; its checkpoint is saved"
    ):
        run(tmp_path / "student", data, report=report, save_every=100)
    assert signal.getsignal(number) == before
    lines = []
    run(tmp_path / "student", data, report=lines.append, save_every=100)
    assert lines[0] == "resumed student at step 4 of 8" and weights(
        tmp_path / "student"
    ) == weights(finished)


def test_random_numbers_go_on_where_they_were(data, tmp_path):
    """A model with dropout, interrupted in the middle of an epoch."""

    def with_dropout():
        model = tiny_model()
        model.text.register_forward_hook(
            lambda module, tokens, out: F.dropout(out, 0.5, module.training)
        )
        return model

    def stop(line):
        if "step 6/8" in line:
            raise KeyboardInterrupt

    run(tmp_path / "whole", data, model=with_dropout())
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", data, model=with_dropout(), report=stop)
    run(tmp_path / "parts", data, model=with_dropout())
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")


def test_a_finished_run_is_not_trained_again(data, tmp_path):
    run(tmp_path, data, steps=2)
    before, lines = weights(tmp_path), []
    (
        tmp_path / "student/open_clip_model.safetensors"
    ).unlink()  # as if killed before it was written
    model = run(tmp_path, data, steps=2, report=lines.append)
    assert lines == [f"resumed {tmp_path.name} at step 2 of 2"]
    assert weights(tmp_path) == before and not model.training


def test_numbers_of_numpy_can_be_resumed(data, tmp_path):
    """`evaluate` returns numpy's numbers; a checkpoint that held them could not be loaded."""

    def validate(model):
        assert not model.training
        return {"recall": np.float64(0.25), "n": np.int64(3)}

    def stop(line):
        if "step 2/4" in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, data, steps=4, eval_every=1, report=stop, validate=validate)
    run(tmp_path, data, steps=4, eval_every=1, validate=validate)
    assert history(tmp_path).recall.tolist() == [0.25] * 4


def test_same_seed_same_weights(finished, data, tmp_path):
    run(tmp_path / "student", data)
    assert weights(tmp_path / "student") == weights(finished)
    run(tmp_path / "other", data, seed=1)
    assert weights(tmp_path / "other") != weights(finished)


@pytest.mark.parametrize("damage", ["truncated", "missing", "garbage"])
def test_a_damaged_checkpoint_is_not_used(damage, finished, data, tmp_path):
    """The one before it is; the run ends with the same weights."""

    def stop(line):
        if "step 6/8" in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, data, report=stop, save_every=1)
    last = tmp_path / "last.ckpt"
    if damage == "missing":  # killed between the two renames
        last.unlink()
    else:
        last.write_bytes(last.read_bytes()[:5000] if damage == "truncated" else b"garbage")
    lines = []
    run(tmp_path, data, report=lines.append, save_every=1)
    if damage != "missing":
        assert "last.ckpt is damaged and not used" in lines.pop(0)
    assert lines[0] == f"resumed {tmp_path.name} at step 4 of 8"
    assert weights(tmp_path) == weights(finished) and history(tmp_path).equals(history(finished))


# ---- what a loss learns, masks, jobs


def test_learned_maps_are_trained_and_not_part_of_the_student(data, tmp_path):
    narrow = {"model": tiny_model(embed_dim=12)}
    names = set(narrow["model"].state_dict())
    run(tmp_path, data, method="fd+afd", steps=4, **narrow)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["heads"]
    assert saved["image.weight"].shape == (16, 12) and saved["fuse_text.weight"].shape == (12, 28)
    assert set(load_folder(tmp_path / "student").state_dict()) == names
    before = torch.load(tmp_path / "previous.ckpt", weights_only=True)["heads"]
    assert all((saved[key] != before[key]).any() for key in saved)


def test_killed_run_with_heads_and_masks_goes_on(data, tmp_path):
    def stop(line):
        if "step 6/8" in line:
            raise KeyboardInterrupt

    run(tmp_path / "whole", data, method="afd+mfd+crd")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", data, method="afd+mfd+crd", report=stop)
    run(tmp_path / "parts", data, method="afd+mfd+crd")
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")


def test_masks_follow_from_seed_step_and_row():
    images = torch.rand(6, 3, 64, 64) + 0.1
    masked = hide_patches(images, 0, 3, WHOLE, 6)
    hidden = (masked == 0).all(dim=1)
    assert torch.equal(
        masked[~hidden[:, None].expand_as(masked)], images[~hidden[:, None].expand_as(images)]
    )
    assert 0.65 < hidden.float().mean() < 0.85
    patches = hidden.unflatten(1, (8, 8)).unflatten(3, (8, 8)).float().mean(dim=(2, 4))
    assert set(patches.unique().tolist()) == {0.0, 1.0}
    part = Part(slice(2, 4), WHOLE.gather)
    assert torch.equal(hide_patches(images[2:4], 0, 3, part, 6), masked[2:4])
    assert not torch.equal(hide_patches(images, 0, 4, WHOLE, 6), masked)


def test_several_teachers_and_one_for_short_captions(data, tmp_path):
    dataset, cache = data
    lines = []
    fit(
        tiny_model(),
        Config(**{**SETTINGS, "method": "crd+fd", "steps": 2}),
        dataset,
        tmp_path,
        [cache, cache],
        report=lines.append,
        short_cache=cache,
    )
    assert "distill_short" in lines[-1]


def test_the_scale_can_be_frozen(data, tmp_path):
    assert (
        run(tmp_path / "a", data, learn_scale=False, steps=3).logit_scale.item()
        == tiny_model().logit_scale.item()
    )
    assert run(tmp_path / "b", data, steps=3).logit_scale.item() != tiny_model().logit_scale.item()


def make_job(folder, **config):
    """job.json of a tiny student in `folder`, with its data and cache."""
    table = make_pairs(24, seed=1, size=64)
    for split in ("train", "val"):
        table.to_parquet(folder / f"{split}.parquet")
    torch.manual_seed(0)  # the teacher's weights
    FeatureCache.build(
        folder / "cache",
        create_model("LongCLIP-T"),
        "t",
        table,
        PairDataset(table, 64),
        report=lambda line: None,
    )
    job = {
        "folder": str(folder / "run"),
        "data": str(folder),
        "caches": [str(folder / "cache")],
        "model": "JettCLIP-T",
        "text_tower": "length_aware",
        "image_size": 64,
        "context_length": 77,
        "crops": 0,
        "config": {
            "steps": 2,
            "batch_size": 8,
            "method": "crd",
            "components": 4,
            "eval_every": 1,
            **config,
        },
    }
    write_json(folder / "job.json", job)
    return job


def test_a_job_is_trained(tmp_path, capsys):
    make_job(tmp_path)
    start(tmp_path / "job.json")
    assert "run step 2/2 loss" in capsys.readouterr().out
    assert (
        len(history(tmp_path / "run")) == 2
        and load_folder(tmp_path / "run/student").name == "JettCLIP-T"
    )


STARTED = "import sys; from jettclip.train import start; start(sys.argv[1], 2)"
SRUN = """#!/bin/sh
# Two nodes that are this machine; its own options end where those of torchrun begin.
while [ "$1" != "$PYTHON" ]; do shift; done
"$@" & "$@" & wait
"""


def test_two_processes_are_stopped_and_go_on_on_two_nodes(tmp_path, capsys, monkeypatch):
    """As a requeued job does; srun is a stand-in, the rendezvous of two torchruns is not."""
    for name, value in {"PROCID": "0", "LOCALID": "0", "NTASKS": "1", "JOB_NUM_NODES": "1"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)  # torchrun's own variables win
    for folder in ("whole", "parts"):
        (tmp_path / folder).mkdir()
        job = make_job(tmp_path / folder, steps=4, save_every=100)
    start(tmp_path / "whole/job.json", 2)
    assert "run step 4/4 loss" in capsys.readouterr().out
    write_json(
        tmp_path / "odd.json",
        {**job, "folder": str(tmp_path / "odd"), "config": {**job["config"], "batch_size": 7}},
    )
    with pytest.raises(RuntimeError, match="batch_size 7 does not divide among 2 processes"):
        start(tmp_path / "odd.json", 2)

    command, environment = (
        [sys.executable, "-c", STARTED, tmp_path / "parts/job.json"],
        {**os.environ, "PYTHONPATH": str(ROOT)},
    )
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        lines = []
        for line in process.stdout:
            lines.append(line)
            if "run step 1/4" in line:
                process.send_signal(signal.SIGUSR1)
    assert process.returncode == 1 and lines[-1].startswith(
        "jettclip.distributed.Stopped: run stopped by SIGTERM at step"
    ), "".join(lines)
    assert not (tmp_path / "parts/run/student").exists()

    for name, script in {
        "srun": SRUN,
        "scontrol": "#!/bin/sh\n[ $3 = 'n[1-2]' ] && printf 'localhost\\nother\\n'",
    }.items():
        (tmp_path / name).write_text(script)
        (tmp_path / name).chmod(0o755)
    environment |= {
        "PYTHON": sys.executable,
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "n[1-2]",
    }
    went_on = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert went_on.returncode == 0 and "resumed run at step" in went_on.stdout, (
        went_on.stdout + went_on.stderr
    )
    assert weights(tmp_path / "parts/run") == weights(tmp_path / "whole/run")
    assert history(tmp_path / "parts/run").equals(history(tmp_path / "whole/run"))


# ---- refusals


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"lr": 1e-4}, r"\(lr\)"),
        ({"method": "fd"}, r"\(method\)"),
        ({"steps": 9, "seed": 1}, r"\(steps, seed\)"),
        ({"weights": (1, 0, 1, 0)}, r"\(weights\)"),
    ],
)
def test_other_settings_in_the_same_folder(changes, named, finished, data):
    with pytest.raises(ValueError, match="holds a run with other settings " + named):
        run(finished, data, **changes)


def test_another_model_in_the_same_folder(finished, data):
    with pytest.raises(ValueError, match=r"other settings \(model_config\)"):
        run(finished, data, model=tiny_model(text_tower="stretched"))


def test_distillation_needs_a_cache(data, tmp_path):
    with pytest.raises(ValueError, match="method 'crd' distils: it needs a feature cache"):
        run(tmp_path, (data[0], None), method="crd")
    with pytest.raises(ValueError, match="20 training pairs do not fill one batch of 21"):
        run(tmp_path, data, batch_size=21)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "setting, nearest",
    [
        ({"method": "crdd"}, "'crd'"),
        ({"method_weights": {"icll": 1}}, "'icl'"),
        ({"pairs": "bot"}, "'both'"),
    ],
)
def test_unknown_settings(setting, nearest):
    with pytest.raises(ValueError, match=f"did you mean {nearest}"):
        Config(steps=1, **setting)


def test_weight_of_a_method_that_is_not_used():
    with pytest.raises(
        ValueError, match="method_weights has 'fd', which is no part of the method 'crd'"
    ):
        Config(steps=1, method="crd", method_weights={"fd": 2.0})


def test_loss_that_is_not_a_number(data, tmp_path):
    with pytest.raises(
        FloatingPointError, match="loss is nan at step 2 of .*contrastive_long.*a lower lr"
    ):
        run(tmp_path, data, lr=float("inf"), warmup=0)
    assert not (tmp_path / "last.ckpt").exists() and not (tmp_path / "student").exists()


def test_rows_that_are_not_numbers_are_named(data, tmp_path, monkeypatch):
    dataset, cache = data
    rows = FeatureCache.rows

    def with_nan(self, index, k):
        features = rows(self, index, k)
        features[1][np.asarray(index) == 3] = float("nan")
        return features

    monkeypatch.setattr(FeatureCache, "rows", with_nan)
    with pytest.raises(
        FloatingPointError,
        match=f"features are not finite of the rows {dataset.keys[3]}; weights are in .*not-finite.ckpt",
    ):
        run(tmp_path, data)
    saved = torch.load(tmp_path / "not-finite.ckpt", weights_only=True)
    assert (
        saved["keys"] == [dataset.keys[3]]
        and saved["model"].keys() == tiny_model().state_dict().keys()
    )


# ---- one step


def test_learning_rate_by_hand():
    config = Config(steps=12, warmup=4, lr=1.0)
    rates = [learning_rate(step, config) for step in range(13)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[8] == pytest.approx(0.5) and rates[12] == pytest.approx(0)
    assert rates[6] == pytest.approx(0.5 + 0.5**1.5)
    assert rates[4:] == sorted(rates[4:], reverse=True)
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
    model = run(tmp_path, data, model=model, steps=2, frozen_positions=20)
    after = model.text.positional_embedding
    assert torch.equal(after[:20], before[:20])
    assert (after[20:60] != before[20:60]).any(dim=1).all()


def test_a_student_learns(data, tmp_path):
    """It comes close to its teacher's features where it is asked for nothing else."""
    run(
        tmp_path,
        data,
        method="fd",
        pairs="long",
        weights=(0, 0, 1, 0),
        steps=25,
        eval_every=5,
        lr=5e-3,
    )
    losses = history(tmp_path).distill_long
    assert losses.iloc[-1] < 0.6 * losses.iloc[0]


def test_history(finished):
    table = pd.read_csv(finished / "history.csv")
    terms = ["contrastive_long", "contrastive_short", "distill_long", "distill_short"]
    assert list(table.columns) == ["step", "seconds", "loss", *terms, "scale"]
    assert np.allclose(table[terms].sum(axis=1), table.loss) and (table.scale <= 100).all()
    files = ["config.json", "history.csv", "last.ckpt", "previous.ckpt", "student"]
    assert sorted(path.name for path in finished.iterdir()) == files
