"""The profile `smoke` through a real Slurm, against a local run: the same results to the last digit. `make test-cluster`

Root in a Debian container; about 20 minutes on two processors. It installs Slurm (slurmctld, slurmd, munge) if need be, starts
it with this machine as its only node, trains one student in two processes, tells that one to stop as before a time limit (it
requeues itself), cancels another one's job (Snakemake sends it again), kills Snakemake and starts it again. It stops what it started.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).resolve().parents[2]
CONF = Path("/etc/slurm/slurm.conf")
TWO = "fd-both-processes2-steps16-s0"
VARIANT = "  - {method: fd, pairs: both, processes: 2, steps: 16, seed: 0}\n"
TIMES = {"seconds", "p50_ms", "p90_ms", "ratio_to_teacher"}  # columns that no two runs share
SETTINGS = """\
ClusterName=jettclip
SlurmctldHost={host}
SlurmUser=root
AuthType=auth/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobContainerType=job_container/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SlurmdParameters=config_overrides
ReturnToService=2
NodeName={host} CPUs=2 RealMemory=8000 State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""
NODE_FLAGS = [
    "--cores",
    "1",
    "--default-resources",
    "mem_mb=2000",
    "runtime=60",
    "--slurm-init-seconds-before-status-checks",
    "5",
]


def shell(*command, **options):
    return subprocess.run(list(map(str, command)), check=True, text=True, **options)


def output(*command):
    return shell(*command, capture_output=True).stdout


def wait_until(what, condition, seconds=900):
    end = time.monotonic() + seconds
    while not (found := condition()):
        if time.monotonic() > end:
            sys.exit(f"error: waited {seconds} s for {what}")
        time.sleep(0.5)
    return found


@contextlib.contextmanager
def slurm(folder):
    """A Slurm of one node."""
    if os.getuid() or not shutil.which("apt-get"):
        sys.exit("error: run this as root in a Debian container; it installs and starts Slurm")
    if CONF.exists():
        sys.exit(f"error: {CONF} is there: this machine has a Slurm already, which is left alone")
    if not all(map(shutil.which, ("slurmctld", "slurmd", "munged", "squeue"))):
        shell("apt-get", "update", "-qq")
        shell(
            "apt-get",
            "install",
            "-y",
            "-qq",
            "--no-install-recommends",
            "slurmctld",
            "slurmd",
            "slurm-client",
            "munge",
            env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"},
            stdout=subprocess.DEVNULL,
        )
    munge = Path("/run/munge/munged.pid")
    with contextlib.ExitStack() as stack:
        if not munge.exists():
            munge.parent.mkdir(exist_ok=True)
            shutil.chown(munge.parent, "munge", "munge")
            shell("setpriv", "--reuid=munge", "--regid=munge", "--clear-groups", "munged")
            stack.callback(lambda: os.kill(int(munge.read_text()), signal.SIGTERM))
        for name in ("state", "spool"):
            (folder / name).mkdir()
        stack.callback(CONF.unlink)
        CONF.write_text(SETTINGS.format(host=os.uname().nodename, folder=folder))
        for daemon in ("slurmctld", "slurmd"):
            shell(daemon)
            pid = folder / f"{daemon}.pid"
            wait_until(f"{daemon}, whose log is {pid.with_suffix('.log')}", pid.exists, 30)
            stack.callback(lambda pid=pid: os.kill(int(pid.read_text()), signal.SIGTERM))
        stack.callback(
            lambda: subprocess.run(["scancel", "--user=root", "--full"]) and time.sleep(5)
        )
        wait_until("an idle node", lambda: "idle" in output("sinfo", "-h"), 60)
        print(output("sinfo", "--version").strip())
        yield


def clone(folder):
    """A copy of the working tree, with one more student in its profile `smoke`."""
    files = output(
        "git", "-C", ROOT, "ls-files", "--cached", "--others", "--exclude-standard"
    ).splitlines()
    for file in files:
        if (ROOT / file).exists():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / file, folder / file)
    profile = folder / "notebooks/profiles/smoke.yaml"
    profile.write_text(profile.read_text().rstrip() + "\n" + VARIANT)
    return folder


def snakemake(folder, *flags):
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    with open(folder / "snakemake.log", "a") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "snakemake", *flags, "--config", "profile=smoke"],
            cwd=folder,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def finish(process, folder):
    if process.wait():
        sys.exit(
            f"error: {' '.join(process.args)} ended with {process.returncode}:\n{(folder / 'snakemake.log').read_text()[-6000:]}"
        )


def job_of(variant):
    """The number of a variant's running job, or None."""
    rows = [
        line.split("|")
        for line in output("squeue", "-h", "-t", "RUNNING", "-o", "%i|%k").splitlines()
    ]
    return next(
        (job for job, comment in rows if comment == f"rule_train_wildcards_{variant}"), None
    )


def by_slurm(folder):
    """All steps as jobs, with the three faults."""
    run, slurm_flags = folder / "runs/smoke", ["--profile", "profiles/slurm", *NODE_FLAGS]
    driver = snakemake(folder, *slurm_flags)
    wait_until("the teacher", lambda: (run / "teacher/.lock").exists())
    driver.kill()
    driver.wait()
    print("killed Snakemake while the teacher is trained; started again", flush=True)
    driver = snakemake(folder, *slurm_flags)

    wait_until(f"a checkpoint of {TWO}", lambda: (run / TWO / "last.ckpt").exists())
    job = job_of(TWO)
    shell("scancel", "--signal=USR1", job)
    wait_until(
        f"job {job} in the queue again",
        lambda: "Restarts=1" in output("scontrol", "show", "job", job),
    )
    copy = run / TWO / "02_train.failed.ipynb"
    assert "its checkpoint is saved" in copy.read_text(), copy
    print(
        f"job {job} of {TWO} was told to stop, saved a checkpoint and is in the queue again",
        flush=True,
    )
    wait_until(
        f"job {job} to be let go on",
        lambda: (
            subprocess.run(
                ["scontrol", "update", f"JobId={job}", "StartTime=now"], capture_output=True
            ).returncode
            == 0
        ),
        120,
    )
    job = wait_until("a job of none-s0", lambda: job_of("none-s0"))
    shell("scancel", job)
    print(f"cancelled job {job} of none-s0", flush=True)
    finish(driver, folder)
    assert "resumed" in (run / TWO / "02_train.ipynb").read_text()
    timings = pd.read_csv(run / "timings.csv", names=["step", "seconds"])
    assert timings.step.is_unique, f"run twice: {timings.step[timings.step.duplicated()].tolist()}"


def compare(local, cluster):
    """Every table and every student's weights."""
    tables = sorted(
        path.relative_to(local) for path in local.rglob("*.csv") if path.name != "timings.csv"
    )
    for table in tables:
        one, other = (
            pd.read_csv(folder / table, dtype=str, keep_default_na=False)
            for folder in (local, cluster)
        )
        assert one.drop(columns=TIMES, errors="ignore").equals(
            other.drop(columns=TIMES, errors="ignore")
        ), table
    weights = sorted(path.relative_to(local) for path in local.rglob("open_clip_model.safetensors"))
    for path in weights:
        assert (local / path).read_bytes() == (cluster / path).read_bytes(), path
    print(
        f"equal to the last digit: {len(tables)} tables without their times, weights of {len(weights)} models"
    )


def main():
    folder = Path(tempfile.mkdtemp(prefix="jettclip-cluster-"))  # stays after a failure, for a look
    local, cluster = clone(folder / "local"), clone(folder / "cluster")
    with slurm(folder):
        by_slurm(cluster)
    print("now the same without Slurm", flush=True)
    finish(snakemake(local, "--cores", "1", "--quiet", "all"), local)
    compare(local / "runs/smoke", cluster / "runs/smoke")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
