# Runs the notebooks of a profile in order, then builds the report; `make report PROFILE=scenes` starts it.
# By hand, for a look at what would run:
#
#     snakemake --cores all --config profile=scenes --rerun-triggers params input mtime --dry-run
#
# Each step as a Slurm job: `snakemake --profile profiles/slurm --config profile=scenes`.
#
# A step runs again when its notebook's code cells or its parameters change (`made_by`; prose, outputs and
# the notebook's modification time do not count), and when a step that it needs has run again. Changes of
# jettclip/*.py are not seen: `make clean PROFILE=scenes` starts over.
#
# With `--keep-going`, a failed student stops only what needs it. `--config holes=1` then makes the report without the
# students that are missing, trains none, and says in the tables which those are.
#
# The executed notebooks lie beside done.json. They are neither outputs, which Snakemake deletes after a
# failure, nor logs, which it then creates empty.
import os
import re
import signal
import sys
import time
from pathlib import Path

from snakemake.exceptions import WorkflowError

from jettclip import pipeline

P = str(config.get("profile", "scenes"))
try:
    STEPS = pipeline.plan(P)
except ValueError as error:
    raise WorkflowError(str(error)) from None

RUNS = f"runs/{P}"
if config.get("holes"):
    MISSING = pipeline.without_student(STEPS)
    STEPS = {label: step for label, step in STEPS.items() if step.done.parent.name not in MISSING}
VARIANTS = [step.done.parent.name for step in STEPS.values() if step.notebook == "02_train"]
if not VARIANTS:
    sys.exit(f"error: {P}: no student is trained, so there is nothing to report")  # --quiet would hide a WorkflowError
ALL = [os.path.relpath(step.done) for step in STEPS.values()]
TRAINED = expand(RUNS + "/{variant}/done.json", variant=VARIANTS)
PDF = pipeline.report_pdf(P)
# exec: no shell stays between Snakemake and the step, so signals arrive.
RUN = f'exec "{sys.executable}" -m jettclip.pipeline run --profile {P}'
# Slurm signals every process of a job: the step answers, and Snakemake must not end of it.
signal.signal(signal.SIGUSR1, signal.SIG_IGN)
# The lines on progress count from here; jobs inherit it.
os.environ.setdefault("JETTCLIP_STARTED", str(time.time()))
# Each notebook uses all cores, so one runs at a time; with `--config threads=1`, as many students as there are cores are
# trained side by side. Snakemake sets OMP_NUM_THREADS of a job to this number; at its default torch would use a single core.
# In a Slurm job Snakemake calls all cores of the node its own, so there Slurm's number counts.
THREADS = int(os.environ.get("SLURM_CPUS_PER_TASK", workflow.cores or 1))
TRAIN_THREADS = min(THREADS, int(config.get("threads", THREADS)))


localrules:
    all,
    notebooks,
    pdf,


wildcard_constraints:
    variant="|".join(map(re.escape, VARIANTS)),


# Every step is asked for by name: Snakemake accepts a missing file in the middle if the last one is there, so
# after an interrupted second run it would find nothing to do.
rule all:
    input:
        PDF,
        ALL,


rule notebooks:
    input:
        ALL,


rule pdf:
    input:
        RUNS + "/report/done.json",
        sorted(str(path) for path in Path("report").glob("*.*")),
    output:
        PDF,
    params:
        profile=P,
    shell:
        "exec {sys.executable:q} -m jettclip.report pdf --profile {params.profile}"


rule data:
    output:
        RUNS + "/data/done.json",
    params:
        made_by=STEPS["00_data"].made_by,
    threads: THREADS
    shell:
        "{RUN} 00_data"


rule teacher:
    input:
        rules.data.output,
    output:
        RUNS + "/teacher/done.json",
    params:
        made_by=STEPS["01_teacher_features"].made_by,
    threads: THREADS
    shell:
        "{RUN} 01_teacher_features"


rule train:
    input:
        rules.teacher.output,
    output:
        RUNS + "/{variant}/done.json",  # no more: Snakemake deletes outputs first; last.ckpt has to stay
    params:
        made_by=lambda wildcards: STEPS[f"02_train {wildcards.variant}"].made_by,
    threads: TRAIN_THREADS
    priority: lambda wildcards: len(VARIANTS) - VARIANTS.index(wildcards.variant)  # in the profile's order
    shell:
        "{RUN} 02_train --variant {wildcards.variant:q}"


rule reparameterize:
    input:
        TRAINED,
    output:
        RUNS + "/deploy/done.json",
    params:
        made_by=STEPS["03_reparameterize"].made_by,
    threads: THREADS
    shell:
        "{RUN} 03_reparameterize"


rule evaluate:
    input:
        TRAINED,
    output:
        RUNS + "/evaluate/done.json",
    params:
        made_by=STEPS["04_evaluate"].made_by,
    threads: THREADS
    shell:
        "{RUN} 04_evaluate"


rule report_notebook:
    input:
        rules.reparameterize.output,
        rules.evaluate.output,
    output:
        RUNS + "/report/done.json",
    params:
        made_by=STEPS["05_report"].made_by,
    threads: THREADS
    shell:
        "{RUN} 05_report"


rule search:
    input:
        TRAINED,
    output:
        RUNS + "/search/done.json",
    params:
        made_by=STEPS["06_search"].made_by,
    threads: THREADS
    priority: -1  # after the report, which does not need it
    shell:
        "{RUN} 06_search"
