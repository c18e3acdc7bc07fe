"""The steps of a profile, checked before any work: `python workflow/plan.py scenes` prints them.

A profile, notebooks/profiles/<name>.yaml, gives values to parameters of the notebooks' cells tagged
`parameters`, and in `variants` lists the students to train; a list as a value makes a product:

    - {method: [fd, crd], pairs: both, seed: 0}  # fd-both-s0, crd-both-s0
    - {method: fd, weights: [[1, 0, 1, 0]]}      # fd-weights1_0_1_0: one value that is a list
"""

import ast
import hashlib
import io
import itertools
import json
import re
import sys
from modulefinder import ModuleFinder
from pathlib import Path
from typing import NamedTuple

import yaml

from jettclip.utils import nearest


class Step(NamedTuple):
    """One execution of a notebook. It runs again when its parameters or its code change."""

    notebook: str
    parameters: dict
    code_hash: str


def code_cells(notebook):
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def declared(notebook):
    """{parameter: (default, line)}; papermill.inspect_notebook skips lines with a second `=`."""
    tagged = [c for c in code_cells(notebook) if "parameters" in c["metadata"].get("tags", [])]
    source = "".join(tagged[0]["source"])
    lines = zip(ast.parse(source).body, source.splitlines(), strict=True)
    return {node.targets[0].id: (ast.literal_eval(node.value), line) for node, line in lines}


def check(key, value, default, line=""):
    """`value` in the type of `default` and among the choices of its line; else a ValueError."""
    if isinstance(default, float) and re.fullmatch(r"-?[\d.]+(e[-+]?\d+)?", str(value)):
        value = float(value)  # to YAML, 1e5 without a point is a string
    if type(value) is not type(default):
        raise ValueError(f"{key}: {value!r} is not of the type of its default, {default!r}.")
    if isinstance(value, list) and default:
        value = [check(key, item, default[0]) for item in value]
    if listed := re.search(r"# (one|sum) of: ([\w, .-]+)", line):
        for word in [value] if listed[1] == "one" else value.split("+"):
            if word not in listed[2].split(", "):
                raise ValueError(f"{key}: " + nearest(word, listed[2].split(", "), "choice"))
    return value


def expand_variants(variants):
    """{run folder: {parameter: value}} of a profile's list of variants."""
    if not isinstance(variants, list) or not all(isinstance(entry, dict) for entry in variants):
        raise ValueError("write variants as a list such as `- {method: fd, seed: [0, 1]}`.")
    runs = {}
    for entry in variants:
        lists = [value if isinstance(value, list) else [value] for value in entry.values()]
        for values in itertools.product(*lists):
            run = dict(zip(entry, values, strict=True))
            if run.get("method") == "none":
                run.pop("pairs", None)  # nothing is distilled, so there are no pairs to distil from
            words = {
                key: "_".join(map(str, value)) if isinstance(value, list) else str(value)
                for key, value in run.items()
            }
            name = [words.pop(key) for key in ("method", "pairs") if key in words]
            seed = ["s" + words.pop("seed")] if "seed" in words else []
            name = "-".join([*name, *(key + word for key, word in words.items()), *seed])
            if name in runs or not re.fullmatch(r"[\w.+-]+", name):
                raise ValueError(f"variant {name!r} is there twice or cannot name a folder.")
            runs[name] = run
    return runs


class WithoutDocstrings(ast.NodeTransformer):
    def visit_Expr(self, node):
        return None if isinstance(node.value, ast.Constant) else node


def code_hash(notebook, root):
    """Hash of a notebook's code and of what it imports from jettclip/ and notebooks/."""
    source = "\n".join("".join(cell["source"]) for cell in code_cells(notebook))
    finder = ModuleFinder([str(root), str(root / "notebooks")])
    finder.load_module("__main__", io.StringIO(source), "", ("", "r", 1))
    finder.import_hook("jettclip.models")  # jettclip.create_model imports it when it is called
    files = sorted(module.__file__ for module in finder.modules.values() if module.__file__)
    code = [ast.parse(text) for text in [source, *(Path(file).read_text() for file in files)]]
    code = [ast.unparse(WithoutDocstrings().visit(tree)) for tree in code]
    return hashlib.sha256("\n".join(code).encode()).hexdigest()[:16]


def plan(profile, root="."):
    """{name of the notebook, or of the variant: Step} of a profile, in order."""
    root = Path(root).resolve()
    paths = {path.stem: path for path in sorted(root.glob("notebooks/profiles/*.yaml"))}
    if profile not in paths:
        raise ValueError(nearest(profile, paths, "profile"))
    notebooks = {path.stem: path for path in sorted(root.glob("notebooks/0*.ipynb"))}
    defaults = {name: declared(path) for name, path in notebooks.items()}
    values = yaml.safe_load(paths[profile].read_text(encoding="utf-8"))
    runs, steps = expand_variants(values.pop("variants", None)), {}
    given = {"profile": profile, "variant": None, "variants": list(runs)}  # not by the profile
    for keys, names in [(values, notebooks), *((run, ["02_train"]) for run in runs.values())]:
        known = sorted(set().union(*(defaults[name] for name in names)) - given.keys())
        for key in keys.keys() - {*known}:
            raise ValueError(nearest(key, known, "parameter"))
    for notebook, path in notebooks.items():
        code = code_hash(path, root)
        for variant in runs if notebook == "02_train" else [notebook]:
            chosen = values | runs.get(variant, {}) | given | {"variant": variant}
            keys = chosen.keys() & defaults[notebook]
            parameters = {key: check(key, chosen[key], *defaults[notebook][key]) for key in keys}
            steps[variant] = Step(notebook, parameters, code)
    return steps


if __name__ == "__main__":
    for name, step in plan(sys.argv[1]).items():
        print(f"{step.notebook:20} {name}: {step.parameters}")
