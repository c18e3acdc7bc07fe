"""The profile `smoke` through a real Slurm: the same results as without. `make test-cluster`

As root in a Debian container; about 9 minutes on two processors. It installs Slurm if need be and
starts it with this machine as its only node. Snakemake is killed and started again, the job of a
student is cancelled, and that of another, in two processes, is killed while it trains.
"""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from subprocess import DEVNULL

import pandas as pd

ROOT = Path(__file__).resolve().parents[2]
CONF = Path("/etc/slurm/slurm.conf")
TWO = "fd-both-processes2-steps150-eval_every50-s0"  # writes a checkpoint every 50 steps
VARIANT = "  - {method: fd, pairs: both, processes: 2, steps: 150, eval_every: 50, seed: 0}\n"
TIMED_TABLES = {"timings.csv", "latency.csv", "layers.csv", "efficiency.csv"}
TIMED_COLUMNS = "second|minutes|speed|ratio|_ms$|_s$"
FLAGS = "--workflow-profile workflow/profiles/slurm --cores 1 --default-resources mem_mb=2000"
FLAGS += " runtime=60 --slurm-init-seconds-before-status-checks 5"
SETTINGS = """\
ClusterName=jettclip SlurmctldHost={host} SlurmUser=root AuthType=auth/munge ReturnToService=2
StateSaveLocation={folder}/state SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log SlurmdSpoolDir={folder}/spool
SlurmdPidFile={folder}/slurmd.pid SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc TaskPlugin=task/none JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none JobContainerType=job_container/none MpiDefault=none
SelectType=select/cons_tres SelectTypeParameters=CR_Core_Memory SlurmdParameters=config_overrides
"""
NODE = "NodeName={host} CPUs=2 RealMemory=8000 State=UNKNOWN\n"
NODE += "PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP\n"


def shell(*command, **options):
    return subprocess.run(list(map(str, command)), check=True, text=True, **options)


def output(*command):
    return shell(*command, capture_output=True).stdout


def wait_until(what, condition, seconds=900):
    for _ in range(2 * seconds):
        if found := condition():
            return found
        time.sleep(0.5)
    sys.exit(f"error: waited {seconds} s for {what}")


def end(pid_file):
    os.kill(int(pid_file.read_text()), signal.SIGTERM)


@contextlib.contextmanager
def slurm(folder):
    """A Slurm of one node."""
    if os.getuid() or not shutil.which("apt-get"):
        sys.exit("error: run this as root in a Debian container; it installs and starts Slurm")
    if CONF.exists():
        sys.exit(f"error: {CONF} is there: this machine has a Slurm already, which is left alone")
    if not all(map(shutil.which, ("slurmctld", "slurmd", "munged", "squeue"))):
        shell("apt-get", "update", "-qq")
        packages = ("slurmctld", "slurmd", "slurm-client", "munge")
        quiet = {"env": {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}, "stdout": DEVNULL}
        shell("apt-get", "install", "-y", "-qq", "--no-install-recommends", *packages, **quiet)
    munge = Path("/run/munge/munged.pid")
    with contextlib.ExitStack() as stack:
        if not munge.exists():
            munge.parent.mkdir(exist_ok=True)
            shutil.chown(munge.parent, "munge", "munge")
            shell("setpriv", "--reuid=munge", "--regid=munge", "--clear-groups", "munged")
            stack.callback(end, munge)
        (folder / "state").mkdir()
        (folder / "spool").mkdir()
        stack.callback(CONF.unlink)
        settings = SETTINGS.replace(" ", "\n") + NODE
        CONF.write_text(settings.format(host=os.uname().nodename, folder=folder))
        for daemon in ("slurmctld", "slurmd"):
            shell(daemon)
            pid = folder / f"{daemon}.pid"
            wait_until(f"{daemon}, whose log is {pid.with_suffix('.log')}", pid.exists, 30)
            stack.callback(end, pid)
        stack.callback(time.sleep, 5)
        stack.callback(subprocess.run, ["scancel", "--user=root", "--full"])
        wait_until("an idle node", lambda: "idle" in output("sinfo", "-h"), 60)
        print(output("sinfo", "--version").strip())
        yield


def clone(folder):
    """A copy of the working tree, with one more student in its profile `smoke`."""
    files = output("git", "-C", ROOT, "ls-files", "--cached", "--others", "--exclude-standard")
    for file in files.splitlines():
        if (ROOT / file).exists():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / file, folder / file)
    with open(folder / "notebooks/profiles/smoke.yaml", "a") as profile:
        profile.write("\n" + VARIANT)
    return folder


def snakemake(folder, flags):
    command = [sys.executable, "-m", "snakemake", *flags.split(), "--config", "profile=smoke"]
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    with open(folder / "snakemake.log", "a") as log:
        return subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)


def finish(process, folder):
    if process.wait():
        log = (folder / "snakemake.log").read_text()[-6000:]
        sys.exit(f"error: Snakemake ended with {process.returncode} in {folder}:\n{log}")


def job_of(variant):
    """The number of a variant's running job, or None."""
    jobs = output("squeue", "-h", "-t", "RUNNING", "-o", "%i|%k")
    found = re.search(rf"^(\w+)\|rule_train_wildcards_{re.escape(variant)}$", jobs, re.M)
    return found and found[1]


def by_slurm(folder):
    """All steps as jobs, with the three faults."""
    run = folder / "runs/smoke"
    driver = snakemake(folder, FLAGS)
    wait_until("the teacher", (run / "teacher/01_teacher_features.ipynb.lock").exists)
    driver.kill()
    driver.wait()
    print("killed Snakemake while the teacher is trained; started again", flush=True)
    driver = snakemake(folder, FLAGS)

    job = wait_until("a job of none-s0", lambda: job_of("none-s0"))
    shell("scancel", job)
    print(f"cancelled job {job} of none-s0", flush=True)
    wait_until(f"a checkpoint of {TWO}", (run / TWO / "last.ckpt").exists)
    job = job_of(TWO)
    shell("scancel", "--full", "--signal=KILL", job)
    print(f"killed job {job} of {TWO} while it trains", flush=True)
    finish(driver, folder)
    assert "resumed" in (run / TWO / "02_train.ipynb").read_text(), f"{TWO} did not resume"


def timeless(path):
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    return table[[column for column in table if not re.search(TIMED_COLUMNS, column)]]


def compare(local, cluster):
    """Every table but for its times, and every student's weights."""
    paths = sorted(path.relative_to(local) for path in local.rglob("*.csv"))
    tables = [path for path in paths if path.name not in TIMED_TABLES]
    different = [t for t in tables if not timeless(local / t).equals(timeless(cluster / t))]
    weights = sorted(path.relative_to(local) for path in local.rglob("*.safetensors"))
    different += [w for w in weights if (local / w).read_bytes() != (cluster / w).read_bytes()]
    if different:
        sys.exit(f"error: {local} and {cluster} differ in {', '.join(map(str, different))}")
    print(f"equal: {len(tables)} tables but for their times, the weights of {len(weights)} models")


def main():
    folder = Path(tempfile.mkdtemp(prefix="jettclip-cluster-"))  # stays after a failure, for a look
    local, cluster = clone(folder / "local"), clone(folder / "cluster")
    with slurm(folder):
        by_slurm(cluster)
    print("now the same without Slurm", flush=True)
    finish(snakemake(local, "--cores 1"), local)
    compare(local / "runs/smoke", cluster / "runs/smoke")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
