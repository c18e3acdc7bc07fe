"""The pipeline on tiny notebooks: a wrong profile is refused before any work, a step leaves everything or
nothing behind, and Snakemake runs exactly what changed."""

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from jettclip import pipeline

REPOSITORY = Path(__file__).resolve().parents[1]
PARAMETERS = {
    "00_data": "size = 64  # pixels = height = width",
    "01_teacher_features": "rate = 0.1\nteacher_file = None",
    "02_train": 'variant = "none-s0"\nmethod = "none"  # sum of: none, fd, crd\nrate = 1.0\nlong = True\n'
    'pairs = "both"  # one of: long, both\nseed = 0\ncontext = 248',
    "03_reparameterize": 'precisions = ["fp32"]  # one of: fp32, bf16',
    "04_evaluate": "variants = []\nfailed = []\n",
    "05_report": "",
    "06_search": "",
}
PROFILE = "size: 32\nrate: 1e5\nvariants:\n  - {method: [fd, crd], pairs: both, seed: 0}\n"


def write_notebook(root, name, code="print('hello from', profile)", prose="Some prose."):
    """A notebook with a parameters cell, `prose` and `code`; the code runs with `profile` defined."""

    def cell(kind, source, **metadata):
        parts = {
            "cell_type": kind,
            "id": f"{kind}-{len(source)}",
            "metadata": metadata,
            "source": source,
        }
        return parts | ({"outputs": [], "execution_count": None} if kind == "code" else {})

    parameters = f'profile = "none"\n{PARAMETERS[name]}'
    cells = [
        cell("markdown", prose),
        cell("code", parameters, tags=["parameters"]),
        cell("code", code),
    ]
    path = root / f"notebooks/{name}.ipynb"
    path.write_text(
        json.dumps({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5})
    )
    return path


@pytest.fixture
def root(tmp_path):
    (tmp_path / "notebooks/profiles").mkdir(parents=True)
    for name in PARAMETERS:
        write_notebook(tmp_path, name)
    (tmp_path / "notebooks/profiles/tiny.yaml").write_text(PROFILE)
    return tmp_path


def command(root, *arguments):
    """A python -m ... command in `root`, as Makefile and Snakefile start it."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    environment.pop("JETTCLIP_STARTED", None)
    return subprocess.Popen(
        [sys.executable, "-m", *arguments],
        cwd=root,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def left(root):
    """What the first step left behind."""
    return sorted(path.name for path in (root / "runs/tiny/data").iterdir())


def step(root, *arguments):
    """(exit code, output) of `pipeline run`."""
    process = command(root, "jettclip.pipeline", "run", *arguments, "--profile", "tiny")
    output = process.communicate(timeout=120)[0]
    return process.returncode, output


# ---- profiles


def test_variants_by_hand():
    runs = pipeline.expand_variants(
        [
            {"method": ["none", "fd"], "pairs": "long", "seed": [0, 1]},
            {"context": 77, "seed": 3, "pairs": "both", "method": "crd+fd"},
            {"seed": 2},
        ]
    )
    assert runs == {
        "none-s0": {"method": "none", "seed": 0},
        "none-s1": {"method": "none", "seed": 1},
        "fd-long-s0": {"method": "fd", "pairs": "long", "seed": 0},
        "fd-long-s1": {"method": "fd", "pairs": "long", "seed": 1},
        "crd+fd-both-context77-s3": {"method": "crd+fd", "pairs": "both", "context": 77, "seed": 3},
        "s2": {"seed": 2},
    }


@pytest.mark.parametrize(
    "variants",
    [None, [], {"seed": 0}, ["fd"], [{"seed": 0}, {"seed": [1, 0]}], [{"method": "a/b"}]],
)
def test_bad_variants(variants):
    with pytest.raises(ValueError, match="variant"):
        pipeline.expand_variants(variants)


def test_plan(root):
    steps = pipeline.plan("tiny", root)
    assert list(steps) == [
        "00_data",
        "01_teacher_features",
        "02_train fd-both-s0",
        "02_train crd-both-s0",
        "03_reparameterize",
        "04_evaluate",
        "05_report",
        "06_search",
    ]
    assert steps["00_data"].parameters == {"profile": "tiny", "size": 32}
    assert steps["01_teacher_features"].parameters == {"profile": "tiny", "rate": 100000.0}
    assert steps["02_train crd-both-s0"].parameters == {
        "profile": "tiny",
        "variant": "crd-both-s0",
        "method": "crd",
        "pairs": "both",
        "seed": 0,
        "rate": 1e5,
    }
    assert steps["04_evaluate"].parameters == {
        "profile": "tiny",
        "variants": ["fd-both-s0", "crd-both-s0"],
    }
    assert steps["02_train crd-both-s0"].done == root / "runs/tiny/crd-both-s0/done.json"


@pytest.mark.parametrize(
    "line, nearest",
    [
        ("sise: 32", "no notebook has a parameter 'sise'; did you mean 'size'"),
        ("variant: fd", "no notebook has a parameter 'variant'"),
        ("size: 1e5", "00_data, size: '1e5' is of type str; write a int"),
        ("size: 3.0", "00_data, size: 3.0 is of type float; write a int"),
        ("size: yes", "00_data, size: True is of type bool; write a int"),
        ("rate: yes", "rate: True is of type bool; write a float"),
        ("rate: fast", "rate: 'fast' is of type str; write a float"),
        ("long: 1", "long: 1 is of type int; write a bool"),
        ("precisions: fp32", "precisions: 'fp32' is of type str; write a list"),
        ("precisions: [fp32, 3]", "precisions: 3 is of type int; write a str"),
        (
            "precisions: [fp32, fb16]",
            "precisions: 'fb16' is not one of the choices; did you mean 'bf16'",
        ),
        ("pairs: boht", "pairs: 'boht' is not one of the choices; did you mean 'both'"),
        ("pairs: long+both", "pairs: 'long\\+both' is not one of the choices"),
        (
            "variants: [{method: crd+df, pairs: both}]",
            "crd\\+df-both, method: 'df' is not .* did you mean 'fd'",
        ),
        ("variants: [{metod: fd}]", "02_train has no parameter 'metod'; did you mean 'method'"),
        ("variants: [{size: 3}]", "variants: 02_train has no parameter 'size'"),
        ("size: [", "while parsing"),
    ],
)
def test_refused_before_any_work(root, line, nearest):
    lines = [
        old for old in PROFILE.splitlines() if not old.startswith((line.split(":")[0] + ":", "  -"))
    ]
    old = [] if line.startswith("variants") else ["  - {method: fd}"]
    (root / "notebooks/profiles/tiny.yaml").write_text("\n".join([*lines, *old, line]))
    with pytest.raises(ValueError, match="tiny.yaml: .*" + nearest):
        pipeline.plan("tiny", root)


def test_accepted(root):
    (root / "notebooks/profiles/tiny.yaml").write_text(
        "variants: [{method: crd+fd}]\nrate: 1\nteacher_file: 3\nprecisions: [bf16, fp32]\n"
    )
    steps = pipeline.plan("tiny", root)
    assert repr(steps["01_teacher_features"].parameters["rate"]) == "1.0"
    assert steps["01_teacher_features"].parameters["teacher_file"] == 3
    assert steps["03_reparameterize"].parameters["precisions"] == ["bf16", "fp32"]


@pytest.mark.parametrize("profile", ["../tiny", "tyni", "profiles/tiny.yaml", ""])
def test_unknown_profile(root, profile):
    with pytest.raises(ValueError, match="did you mean 'tiny'"):
        pipeline.plan(profile, root)


def test_unknown_steps(root):
    for arguments, nearest in [
        (["02_trian", "--variant", "fd-both-s0"], "'02_train fd-both-s0'"),
        (["02_train", "--variant", "crd-bth-s0"], "'02_train crd-both-s0'"),
        (["00_data", "--variant", "fd-both-s0"], "did you mean"),
    ]:
        code, output = step(root, *arguments)
        assert code == 1 and output.startswith("error: tiny has no step") and nearest in output
        assert output.count("\n") == 1


def test_parameters_cell_is_read_as_python_reads_it(root):
    path = write_notebook(root, "00_data")
    assert pipeline.notebook_parameters(path) == {
        "profile": ("none", ""),
        "size": (64, "pixels = height = width"),
    }
    path.write_text(path.read_text().replace("size = 64", "size = int(64)"))
    with pytest.raises(ValueError, match="00_data.ipynb: .*int\\(64\\)"):
        pipeline.notebook_parameters(path)


def test_hash_follows_code_only(root):
    path = write_notebook(root, "00_data")
    before = pipeline.code_hash(path)
    notebook = json.loads(path.read_text())
    notebook["cells"][0]["source"] = ["Other ", "prose."]
    stream = {"output_type": "stream", "name": "stdout", "text": "x"}
    notebook["cells"][2] |= {"execution_count": 3, "outputs": [stream]}
    notebook["cells"][2]["source"] = [
        notebook["cells"][2]["source"] + "\n"
    ]  # as JupyterLab writes it: lines
    notebook["metadata"] = {"papermill": {}}
    path.write_text(json.dumps(notebook))
    assert pipeline.code_hash(path) == before
    assert pipeline.code_hash(write_notebook(root, "00_data", code="print()")) != before


# ---- one step


def test_step_succeeds(root, tmp_path, monkeypatch):
    # A kernel of the same name in the user's home folder, of another interpreter, must not be taken.
    spec = tmp_path / "home/kernels/python3/kernel.json"
    spec.parent.mkdir(parents=True)
    spec.write_text(
        json.dumps({"argv": ["/bin/false"], "display_name": "other", "language": "python"})
    )
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "home"))
    write_notebook(
        root, "00_data", "import os, sys\nprint(profile, size, sys.executable, os.getcwd())"
    )
    code, output = step(root, "00_data")
    assert code == 0, output
    assert f"tiny 32 {sys.executable} {root / 'notebooks'}\n" in output
    assert re.search(
        r"^\[ 1/8\] 00_data done in \d+ s; \d+ s gone, time left unknown$", output, re.M
    ), output
    done = json.loads((root / "runs/tiny/data/done.json").read_text())
    steps = pipeline.plan("tiny", root)
    assert (
        done["step"] == "00_data"
        and done["seconds"] > 0
        and done["made_by"] == steps["00_data"].made_by
    )
    executed = json.loads((root / "runs/tiny/data/00_data.ipynb").read_text())
    assert "tiny 32" in str(executed["cells"][-1]["outputs"])
    assert left(root) == ["00_data.ipynb", "done.json"]
    assert pipeline.finished(steps["00_data"], steps) and not pipeline.finished(
        steps["05_report"], steps
    )


def test_step_fails(root):
    write_notebook(root, "00_data", "print('before')\nassert size == 33, 'a wrong size'")
    code, output = step(root, "00_data")
    assert code == 1 and "before" in output and "AssertionError: a wrong size" in output
    failed = root / "runs/tiny/data/00_data.failed.ipynb"
    assert output.rstrip().endswith(f"00_data.ipynb failed; its executed copy is {failed}")
    assert "a wrong size" in failed.read_text() and "\x1b" not in output
    assert left(root) == ["00_data.failed.ipynb"]


def test_step_killed(root):
    """A kill leaves nothing that looks finished, and what was finished before counts no longer."""
    assert step(root, "00_data")[0] == 0
    write_notebook(root, "00_data", "import time\nprint('sleeping')\ntime.sleep(600)")
    process = command(root, "jettclip.pipeline", "run", "00_data", "--profile", "tiny")
    read_until(process, "sleeping")
    process.kill()
    process.wait()
    assert left(root) == [".lock", "00_data.partial.ipynb"]
    write_notebook(root, "00_data")
    code, output = step(root, "00_data")
    assert code == 0 and "hello from tiny" in output and "waiting" not in output
    assert left(root) == ["00_data.ipynb", "done.json"]


TRAINING = """
import time
from jettclip import parallel
with parallel.stoppable():
    print('training')
    while not parallel.stop_signal():
        time.sleep(0.05)
    raise parallel.Stopped(f'stopped by {parallel.stop_signal()}')"""


@pytest.mark.parametrize("number, asked", [(signal.SIGUSR1, "requeue 7"), (signal.SIGTERM, None)])
def test_step_told_to_stop(root, monkeypatch, number, asked):
    """The signal reaches the notebook; before a time limit the job is put back into Slurm's queue."""
    (root / "scontrol").write_text(f"#!/bin/sh\necho $* > {root}/asked")
    (root / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", str(root), prepend=":")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    write_notebook(root, "00_data", TRAINING)
    process = command(root, "jettclip.pipeline", "run", "00_data", "--profile", "tiny")
    read_until(process, "training")
    process.send_signal(number)
    output = process.communicate(timeout=60)[0]
    assert (
        process.returncode == 1
        and f"Stopped: stopped by {int(number)}" in output
        and "00_data.ipynb was stopped" in output
    )
    assert left(root) == ["00_data.failed.ipynb"]
    assert ((root / "asked").read_text().strip() if (root / "asked").exists() else None) == asked


def test_step_outside_training_goes_on(root):
    """SIGUSR1 is a warning; who has nothing to save works on."""
    write_notebook(root, "00_data", "import time\nprint('working')\ntime.sleep(1)\nprint('end')")
    process = command(root, "jettclip.pipeline", "run", "00_data", "--profile", "tiny")
    read_until(process, "working")
    process.send_signal(signal.SIGUSR1)
    assert "end" in process.communicate(timeout=60)[0] and process.returncode == 0


def test_full_disk(root):
    """Limited to files of 3 kB: the step says what is wrong, loses nothing and succeeds when there is space."""
    write_notebook(root, "00_data", "open('kept.txt', 'w').write('x' * 1000)\nprint('y' * 4000)")
    limited = [
        "-c",
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000)); from jettclip.pipeline import main; main()",
    ]
    process = subprocess.run(
        [sys.executable, *limited, "run", "00_data", "--profile", "tiny"],
        cwd=root,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )
    said = process.stderr.rpartition("error: ")[
        2
    ]  # the kernel, which has no room either, may have complained before
    assert process.returncode == 1 and "File too large" in said and "Traceback" not in said
    assert (
        not (root / "runs/tiny/data/done.json").exists()
        and not (root / "runs/tiny/data/.lock").exists()
    )
    assert step(root, "00_data")[0] == 0 and left(root) == ["00_data.ipynb", "done.json"]


def test_progress_line(root, monkeypatch):
    steps = pipeline.plan("tiny", root)

    def finish(label):
        steps[label].done.parent.mkdir(parents=True, exist_ok=True)
        steps[label].done.write_text(json.dumps({"made_by": steps[label].made_by}))

    (root / "results/tiny").mkdir(parents=True)
    (root / "results/tiny/timings.csv").write_text(
        "02_train s0,900\n03_reparameterize,100\n04_evaluate,90\n"
    )
    for label in ["00_data", "01_teacher_features", "02_train fd-both-s0"]:
        finish(label)
    (root / "runs/tiny/timings.csv").write_text(
        "00_data,5\n02_train fd-both-s0,60\n02_train fd-both-s1,71\n02_train fd-both-s2,500\n"
    )
    monkeypatch.setenv("JETTCLIP_STARTED", str(time.time() - 250.4))
    # left: the other variant (median 71 here), 100 and 90 (committed), and 05_report and 06_search, never timed
    assert pipeline.progress_line(steps["02_train fd-both-s0"], 71.2, steps) == (
        "[ 3/8] 02_train fd-both-s0 done in 71 s; 4 min 10 s gone, about 4 min 21 s left and 2 never timed"
    )
    for label in list(steps)[3:]:
        finish(label)
    line = pipeline.progress_line(steps["05_report"], 2, steps)
    assert line == "[ 8/8] 05_report done in 2 s; 4 min 10 s gone"
    os.utime(steps["00_data"].done)  # made again: all that follows is out of date
    assert pipeline.progress_line(steps["00_data"], 5, steps).startswith("[ 1/8] 00_data")


# ---- all steps, with the real Snakefile and the flags of the Makefile


def snakemake(root, *more, config=()):
    flags = re.search(r"SNAKEMAKE_FLAGS = (.*)\\\n(.*)", (REPOSITORY / "Makefile").read_text())
    flags = (
        (flags[1] + flags[2])
        .replace("$${OMP_NUM_THREADS:-all}", "1")
        .replace("$(QUIET)", "--quiet all")
    )
    return command(
        root,
        "snakemake",
        "notebooks",
        "--snakefile",
        str(REPOSITORY / "Snakefile"),
        *flags.split(),
        *more,
        "--config",
        "profile=tiny",
        *config,
    )


def executed(root, *more, config=()):
    """Run Snakemake; (exit code, the steps that it ran in their order, its output)."""
    process = snakemake(root, *more, config=config)
    output = process.communicate(timeout=300)[0]
    return process.returncode, re.findall(r"^(\d\d_.*) started$", output, re.M), output


def read_until(process, last):
    """The lines that a process prints up to `last`."""
    lines = []
    while not lines or lines[-1] != last:
        line = process.stdout.readline()
        assert line, "\n".join(lines)
        lines.append(line.rstrip())
    return lines


def test_snakemake(root):
    """One history: a failed variant, a killed Snakemake, new prose, new code."""
    write_notebook(root, "02_train", "assert method != 'crd', 'no crd today'")
    code, steps, output = executed(root)
    assert code != 0 and "AssertionError: no crd today" in output
    assert f"its executed copy is {root}/runs/tiny/crd-both-s0/02_train.failed.ipynb" in output
    assert steps == [
        "00_data",
        "01_teacher_features",
        "02_train fd-both-s0",
        "02_train crd-both-s0",
    ]

    # Its code changed, so both variants have to run; training resumes from what else the run folder holds.
    write_notebook(root, "02_train", "pass")
    (root / "runs/tiny/crd-both-s0/last.ckpt").write_text("half trained")
    # 04 kills Snakemake, and runs on until it is told to end.
    write_notebook(
        root,
        "04_evaluate",
        textwrap.dedent("""
        import pathlib, psutil, time
        psutil.Process().parents()[1].kill()
        while not pathlib.Path("end").exists():
            time.sleep(0.1)"""),
    )
    first = snakemake(root)
    steps = read_until(first, "04_evaluate started")
    assert first.wait() == -signal.SIGKILL
    assert [line for line in steps if line.endswith(" started")][:2] == [
        "02_train fd-both-s0 started",
        "02_train crd-both-s0 started",
    ]
    assert (root / "runs/tiny/crd-both-s0/last.ckpt").read_text() == "half trained"

    # Started again, it waits for 04, which is not run twice, and goes on from there.
    second = snakemake(root)
    steps += read_until(second, "04_evaluate is being run by another process; waiting for it")
    (root / "notebooks/end").touch()
    steps += second.communicate(timeout=120)[0].splitlines()
    assert second.returncode == 0
    assert [
        step for step in pipeline.plan("tiny", root) if steps.count(f"{step} started") != 1
    ] == ["00_data", "01_teacher_features"]  # both were finished before
    assert steps[-1].startswith("[ 8/8] 06_search done in")
    assert not [line for line in steps if re.match("rule|localrule|Job|Building DAG", line)]
    assert (root / "results/tiny/timings.csv").read_text().count("\n") == 8  # fd was trained twice

    # Prose, with it the notebooks' modification times, and then nothing at all.
    for name in ["00_data", "01_teacher_features", "03_reparameterize", "05_report"]:
        write_notebook(root, name, prose="Better prose.")
    assert executed(root)[:2] == (0, [])

    # Code: this step and what follows, also if it takes two attempts.
    write_notebook(root, "03_reparameterize", "1 / 0")
    assert executed(root)[:2] == (1, ["03_reparameterize"])
    write_notebook(root, "03_reparameterize", "1 / 1")
    assert executed(root)[:2] == (0, ["03_reparameterize", "05_report"])


def test_a_failed_student_is_a_hole(root):
    """The other one is trained and the report made when asked for; the next run mends it."""
    write_notebook(root, "02_train", "assert method != 'fd', 'no fd today'")
    write_notebook(root, "04_evaluate", "print('without', failed)")
    code, steps, output = executed(root, "--keep-going")
    assert code == 1 and steps[2:] == ["02_train fd-both-s0", "02_train crd-both-s0"]
    assert (
        root / "runs/tiny/fd-both-s0/02_train.failed.ipynb"
    ).exists() and "no fd today" in output

    code, steps, output = executed(root, config=["holes=1"])
    assert code == 0 and sorted(steps) == [
        "03_reparameterize",
        "04_evaluate",
        "05_report",
        "06_search",
    ]
    assert (
        "without ['fd-both-s0']" in output
        and "/8] 05_report done" in output
        and "[ 8/8]" not in output
    )  # what follows a hole is unfinished

    write_notebook(root, "02_train", "pass")
    code, steps, output = executed(root, "--keep-going")
    assert code == 0 and len(steps) == 6 and "without []" in output and "[ 8/8]" in output

    for name in ("fd-both-s0", "crd-both-s0"):
        (root / f"runs/tiny/{name}/done.json").unlink()
    code, _, output = executed(root, config=["holes=1"])
    assert code == 1 and "tiny: no student is trained, so there is nothing to report" in output
