"""The steps of a profile: check all of it before any work, then execute its notebooks one by one.

    python -m jettclip.pipeline check scenes       # validate, print the steps; `make report` runs them all
    python -m jettclip.pipeline run 02_train --profile scenes --variant fd-both-s0

A profile, `notebooks/profiles/<name>.yaml`, is one flat mapping of notebook parameters; each notebook gets
those that it declares in its cell tagged `parameters`, one per line:

    epochs = 3          # the default fixes the type: 3 takes whole numbers, 3.0 any number, None anything
    method = "fd"       # one of: none, fd, crd        (`sum of: ...` allows crd+fd too)

Its key `variants` lists the students to train; a list as a value expands as a product:

    variants:
      - {method: [fd, crd], pairs: both, seed: [0, 1]}      # fd-both-s0, fd-both-s1, crd-both-s0, crd-both-s1
      - {method: fd, weights: [[1, 0, 1, 0]]}               # fd-weights1_0_1_0: one value that is a list

`profile`, `variant`, `variants` (all run folders' names) and `failed` (those without a student) are given to the
notebooks that declare them.

A step that is told to end (SIGTERM, SIGUSR1) tells its notebook, where training saves a checkpoint. Slurm sends SIGUSR1 before
a job's time limit; the job is then put back into the queue and goes on from there.
"""

import argparse
import ast
import contextlib
import difflib
import hashlib
import itertools
import json
import logging
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import yaml

from .locks import Lock

# notebook -> (its folder in runs/<profile>, the notebooks it needs)
NOTEBOOKS = {
    "00_data": ("data", []),
    "01_teacher_features": ("teacher", ["00_data"]),
    "02_train": ("{variant}", ["01_teacher_features"]),
    "03_reparameterize": ("deploy", ["02_train"]),
    "04_evaluate": ("evaluate", ["02_train"]),
    "05_report": ("report", ["03_reparameterize", "04_evaluate"]),
    "06_search": ("search", ["02_train"]),
}
GIVEN = {"profile", "variant", "variants", "failed"}  # parameters set here, never by a profile


@dataclass(frozen=True)
class Step:
    """One execution of one notebook."""

    label: str  # "00_data", "02_train fd-both-s0"
    notebook: str
    done: Path  # written after success, in the folder of the executed notebook
    parameters: dict
    made_by: (
        str  # hash of the code cells, and the parameters: if it changes, the step has to run again
    )


def results_folder(profile, root="."):
    """Where the report's tables go; `smoke` is a test and must not touch the committed results."""
    return Path(root) / ("runs/smoke/results" if profile == "smoke" else f"results/{profile}")


def report_pdf(profile):
    """The PDF of a profile: one report on all committed results, and another one for the smoke test."""
    return "report/build/report-smoke.pdf" if profile == "smoke" else "report/build/report.pdf"


def _nearest(value, choices):
    nearest = difflib.get_close_matches(str(value), map(str, choices), n=1, cutoff=0.0)
    return f"did you mean {nearest[0]!r}?" if nearest else "there is none."


def _code_cells(path):
    cells = json.loads(Path(path).read_text(encoding="utf-8"))["cells"]
    return [
        ("".join(c["source"]), c["metadata"].get("tags", []))
        for c in cells
        if c["cell_type"] == "code"
    ]


def code_hash(path):
    """Hash of a notebook's code cells; prose, outputs and metadata do not change it."""
    sources = [source.strip() for source, _ in _code_cells(path) if source.strip()]
    return hashlib.sha256(json.dumps(sources).encode()).hexdigest()[:16]


def notebook_parameters(path):
    """{name: (default, comment)} of the cell tagged `parameters`.

    Read with Python's own parser: papermill's pattern skips a line whose comment holds a second `=`.
    """
    sources = [source for source, tags in _code_cells(path) if "parameters" in tags]
    if len(sources) != 1:
        raise ValueError(f"{path.name} has {len(sources)} cells tagged `parameters`; it needs one.")
    lines, parameters = sources[0].encode().splitlines(), {}  # bytes, as ast counts them
    for node in ast.parse(sources[0]).body:
        try:
            comment = (
                lines[node.end_lineno - 1][node.end_col_offset :].decode().partition("#")[2].strip()
            )
            parameters[node.targets[0].id] = (ast.literal_eval(node.value), comment)
        except (AttributeError, ValueError):
            line = lines[node.lineno - 1].decode()
            raise ValueError(f"{path.name}: write the parameter {line!r} as `name = 3`.") from None
    return parameters


def check_value(where, value, default, comment=""):
    """`value` in the type of `default` and among the choices in `comment`; a ValueError names `where`."""
    if isinstance(default, float) and type(value) in (int, str):
        with contextlib.suppress(ValueError):
            value = float(value)  # to YAML, 1e5 without a point is a string
    if default is not None and type(value) is not type(default):
        raise ValueError(
            f"{where}: {value!r} is of type {type(value).__name__}; "
            f"write a {type(default).__name__}, as its default {default!r} is."
        )
    if isinstance(value, list) and default:
        value = [check_value(where, item, default[0]) for item in value]
    if listed := re.match(r"(one|sum) of: ([\w ,.-]+)", comment):
        choices = [choice.strip() for choice in listed[2].split(",")]
        items = [str(item) for item in (value if isinstance(value, list) else [value])]
        for part in "+".join(items).split("+") if listed[1] == "sum" else items:
            if part not in choices:
                raise ValueError(
                    f"{where}: {part!r} is not one of the choices; {_nearest(part, choices)}"
                )
    return value


def expand_variants(variants):
    """{run folder: {parameter: value}} of a profile's list of variants; a list as a value makes a product."""
    if (
        not isinstance(variants, list)
        or not variants
        or not all(isinstance(v, dict) for v in variants)
    ):
        raise ValueError(
            "variants must be a list of mappings, such as `- {method: fd, seed: [0, 1]}`."
        )
    runs = {}
    for entry in variants:
        for combination in itertools.product(
            *(v if isinstance(v, list) else [v] for v in entry.values())
        ):
            run = dict(zip(entry, combination))
            if run.get("method") == "none":
                run.pop("pairs", None)  # nothing is distilled, so there are no pairs to distil from
            shown = {
                key: "_".join(map(str, value)) if isinstance(value, list) else str(value)
                for key, value in run.items()
            }
            parts = [shown[key] for key in ("method", "pairs") if key in run]
            parts += [f"{key}{shown[key]}" for key in run if key not in ("method", "pairs", "seed")]
            name = "-".join(parts + ([f"s{run['seed']}"] if "seed" in run else []))
            if name in runs or not re.fullmatch(r"[\w.+-]+", name):
                raise ValueError(
                    f"variant {name!r} is there twice, or cannot name a folder; change it."
                )
            runs[name] = run
    return runs


def plan(profile, root="."):
    """{label: Step} of a profile, in order, after checking all of it; a ValueError says what is wrong."""
    root = Path(root).resolve()
    paths = {path.stem: path for path in sorted(root.glob("notebooks/profiles/*.yaml"))}
    if profile not in paths:
        raise ValueError(
            f"no notebooks/profiles/{profile}.yaml in {root}; {_nearest(profile, paths)}"
        )
    declared = {name: notebook_parameters(root / f"notebooks/{name}.ipynb") for name in NOTEBOOKS}
    for name, parameters in declared.items():
        for key in {"profile", "variant" if name == "02_train" else "profile"} - parameters.keys():
            raise ValueError(f"{name}.ipynb needs the parameter {key!r} in its tagged cell.")
    try:
        values = yaml.safe_load(paths[profile].read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError("write one mapping of parameters to values.")
        runs = expand_variants(values.pop("variants", None))
        of_any, steps = set().union(*declared.values()) - GIVEN, {}
        of_train = declared["02_train"].keys() - GIVEN
        for key in values.keys() - of_any:
            raise ValueError(f"no notebook has a parameter {key!r}; {_nearest(key, of_any)}")
        for key in set().union(*runs.values()) - of_train:
            raise ValueError(
                f"variants: 02_train has no parameter {key!r}; {_nearest(key, of_train)}"
            )
        for notebook, (folder, _) in NOTEBOOKS.items():
            for variant in runs if notebook == "02_train" else [None]:
                label = f"{notebook} {variant}" if variant else notebook
                own = runs[variant] | {"variant": variant} if variant else {}
                passed = values | own | {"profile": profile, "variants": list(runs)}
                parameters = {
                    key: check_value(f"{label}, {key}", passed[key], default, comment)
                    for key, (default, comment) in declared[notebook].items()
                    if key in passed
                }
                done = root / "runs" / profile / folder.format(variant=variant) / "done.json"
                code = code_hash(root / f"notebooks/{notebook}.ipynb")
                counted = {
                    key: value for key, value in parameters.items() if key != "profile"
                }  # a name changes no result
                made_by = json.dumps({"code": code, "parameters": counted}, sort_keys=True)
                steps[label] = Step(label, notebook, done, parameters, made_by)
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"notebooks/profiles/{profile}.yaml: {error}") from None
    return steps


def finished(step, steps):
    """Whether done.json is there, of the same code and parameters, and no older than what the step needs."""
    if (
        not step.done.exists()
        or json.loads(step.done.read_text(encoding="utf-8"))["made_by"] != step.made_by
    ):
        return False
    needed = [s for s in steps.values() if s.notebook in NOTEBOOKS[step.notebook][1]]
    return all(
        finished(s, steps) and s.done.stat().st_mtime <= step.done.stat().st_mtime for s in needed
    )


def without_student(steps):
    """Folders of the variants that are not trained: failed, cancelled, or not yet run."""
    return [
        step.done.parent.name
        for step in steps.values()
        if step.notebook == "02_train" and not finished(step, steps)
    ]


def execute(notebook, output, parameters):
    """Execute a notebook with papermill in the interpreter that runs this; its prints appear as they come.

    The executed copy is `<output>.partial.ipynb` until it succeeds, `<output>.failed.ipynb` after a failure. Signals that ask
    to stop are passed on to the kernel.
    """
    import papermill  # takes a second, and nothing else here needs it
    from jupyter_client import AsyncKernelManager
    from jupyter_client.kernelspec import KernelSpecManager

    class MyKernel(AsyncKernelManager):
        def _kernel_spec_manager_default(self):  # no folders to search: no other "python3" can win
            return KernelSpecManager(kernel_dirs=[])

        async def _async_post_start_kernel(self, **kwargs):
            await super()._async_post_start_kernel(**kwargs)

            def pass_on(number, frame):
                came.append(number)
                with contextlib.suppress(ProcessLookupError):  # it has ended already
                    os.kill(self.provisioner.pid, number)

            for number in (signal.SIGTERM, signal.SIGUSR1):
                signal.signal(number, pass_on)

    logging.getLogger("papermill").setLevel(
        "ERROR"
    )  # it warns of parameters that its pattern cannot read
    came = []
    signal.signal(
        signal.SIGUSR1, signal.SIG_IGN
    )  # the kernel inherits that: it has no answer to it but in training
    partial, failed = output.with_suffix(".partial.ipynb"), output.with_suffix(".failed.ipynb")
    output.unlink(missing_ok=True)
    failed.unlink(missing_ok=True)
    try:
        papermill.execute_notebook(
            notebook,
            partial,
            parameters,
            cwd=notebook.parent,
            language="python",
            kernel_name="python3",
            kernel_manager_class=MyKernel,
            extra_arguments=["--log-level=CRITICAL"],
            progress_bar=False,
            stdout_file=sys.stdout,
            stderr_file=sys.stderr,
        )
    except Exception as error:  # of the notebook's code, or of a kernel that died
        if partial.exists():
            partial.replace(failed)
        message = "\n".join(str(error).strip().splitlines()[-25:])
        stopped = getattr(error, "ename", None) == "Stopped"
        if stopped and signal.SIGUSR1 in came and "SLURM_JOB_ID" in os.environ:
            subprocess.run(["scontrol", "requeue", os.environ["SLURM_JOB_ID"]])
        raise RuntimeError(
            f"{message}\n{notebook.name} {'was stopped' if stopped else 'failed'}; "
            f"its executed copy is {failed}"
        ) from None
    partial.replace(output)


def run(step, steps):
    """Execute one step, write done.json beside its notebook, and say how long the rest may take."""
    folder, _, _, root = step.done.parents[:4]  # root/runs/<profile>/<folder>/done.json
    folder.mkdir(parents=True, exist_ok=True)
    given, waited = {}, []
    if "failed" in notebook_parameters(root / f"notebooks/{step.notebook}.ipynb"):
        given = {"failed": without_student(steps)}

    def waiting():
        waited.append(
            True
        )  # for example: Snakemake was killed, but the notebook it started still runs
        print(f"{step.label} is being run by another process; waiting for it", flush=True)

    def lost():
        print(
            f"{step.label} is being run by another process, which took this one for dead; this one ends",
            flush=True,
        )
        os.kill(os.getpid(), signal.SIGTERM)

    with Lock(folder / ".lock", waiting, lost):
        if waited and finished(step, steps):
            return
        print(f"{step.label} started", flush=True)
        started = time.time()
        step.done.unlink(missing_ok=True)
        execute(
            root / f"notebooks/{step.notebook}.ipynb",
            folder / f"{step.notebook}.ipynb",
            step.parameters | given,
        )
        seconds, partial = round(time.time() - started, 1), folder / "done.partial"
        partial.write_text(
            json.dumps({"step": step.label, "seconds": seconds, "made_by": step.made_by})
        )
        partial.replace(step.done)
    with open(folder.parent / "timings.csv", "a") as file:
        file.write(f"{step.label},{seconds}\n")
    if (
        step.notebook == "05_report"
    ):  # committed with the results, another machine can guess its time by it
        results = results_folder(step.parameters["profile"], root)
        results.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder.parent / "timings.csv", results)
    print(progress_line(step, seconds, steps), flush=True)


def _duration(seconds):
    return (
        f"{seconds:.0f} s" if seconds < 100 else f"{int(seconds // 60)} min {int(seconds % 60)} s"
    )


def _times(path):
    """{notebook: median seconds} of a timings.csv."""
    rows = [line.rsplit(",", 1) for line in path.read_text().splitlines()] if path.exists() else []
    return {
        name: statistics.median(float(value) for label, value in rows if label.split()[0] == name)
        for name in {label.split()[0] for label, _ in rows}
    }


def progress_line(step, seconds, steps):
    """`[ 5/14] 02_train fd-both-s0 done in 71 s; 4 min 10 s gone, about 9 min 0 s left`."""
    results = results_folder(step.parameters["profile"], step.done.parents[3])
    times = _times(results / "timings.csv") | _times(step.done.parents[1] / "timings.csv")
    waiting = [s for s in steps.values() if s != step and not finished(s, steps)]
    left = [times[s.notebook] for s in waiting if s.notebook in times]
    rest = (
        f", about {_duration(sum(left))} left" if left else ", time left unknown" if waiting else ""
    )
    rest += f" and {len(waiting) - len(left)} never timed" if 0 < len(left) < len(waiting) else ""
    gone = time.time() - float(
        os.environ.get("JETTCLIP_STARTED", time.time() - seconds)
    )  # see the Snakefile
    count = f"[{len(steps) - len(waiting):2}/{len(steps)}] {step.label}"
    return f"{count} done in {_duration(seconds)}; {_duration(gone)} gone{rest}"


def main(argv=None):
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m jettclip.pipeline",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser("check", help="validate a profile and print its steps")
    one = commands.add_parser("run", help="execute one notebook of a profile")
    check.add_argument("profile", help="a file in notebooks/profiles, without .yaml")
    one.add_argument("notebook", help=", ".join(NOTEBOOKS))
    one.add_argument("--profile", required=True, help="a file in notebooks/profiles, without .yaml")
    one.add_argument("--variant", help="run folder of the student, for 02_train only")
    args = parser.parse_args(argv)
    try:
        steps = plan(args.profile)
        if args.command == "run":
            label = f"{args.notebook} {args.variant}" if args.variant else args.notebook
            if label not in steps:
                raise ValueError(f"{args.profile} has no step {label!r}; {_nearest(label, steps)}")
            return run(steps[label], steps)
    except (ValueError, RuntimeError, OSError) as error:  # OSError: a full disk, for one
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on from here")
    for step in steps.values():
        shown = ", ".join(
            f"{key}={value}" for key, value in step.parameters.items() if key not in GIVEN
        )
        print(f"{'done ' if finished(step, steps) else 'to do'}  {step.label:30}  {shown}".rstrip())


if __name__ == "__main__":
    main()
