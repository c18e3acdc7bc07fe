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
from collections import namedtuple
from contextlib import suppress
from modulefinder import ModuleFinder
from pathlib import Path

import yaml

from jettclip.utils import nearest

# One execution of a notebook. It runs again when its parameters or its code change.
Step = namedtuple("Step", "notebook parameters code_hash")


def code_cells(notebook, tag=""):
    """Sources of a notebook's code cells (of this tag); lines like `%time` or `!ls` do nothing."""
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code" and tag in [*cell["metadata"].get("tags", []), ""]:
            yield re.sub(r"(?m)^([ \t]*)(%%?\w|!).*", r"\1pass", "".join(cell["source"]))


def declared(notebook):
    """{parameter: (default, line)}; papermill.inspect_notebook skips lines with a second `=`."""
    if not (tagged := [*code_cells(notebook, "parameters")]):
        raise ValueError("no cell is tagged `parameters`. Not a step? Name it without the 0.")
    parameters, lines = {}, tagged[0].split("\n")
    for node in ast.parse(tagged[0]).body:
        line = lines[node.end_lineno - 1]
        try:
            parameters[node.targets[0].id] = ast.literal_eval(node.value), line
        except (AttributeError, ValueError):
            raise ValueError(f"among the parameters, {line!r} is not `name = constant`.") from None
    return parameters


def check(key, value, default, line=""):
    """`value` in the type of `default` and among the choices of its line; else a ValueError."""
    if isinstance(default, float) and type(value) in (int, str):
        with suppress(ValueError):
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
    if not isinstance(variants, list) or {*map(type, variants)} != {dict}:
        raise ValueError("write variants as a list such as `- {method: fd, seed: [0, 1]}`.")
    runs = {}
    for entry in variants:
        if [] in entry.values():
            raise ValueError(f"variants: {entry} has an empty list, so it trains nothing.")
        choices = [value if isinstance(value, list) else [value] for value in entry.values()]
        for values in itertools.product(*choices):
            run = dict(zip(entry, values, strict=True))
            if run.get("method") == "none":
                run.pop("pairs", None)  # nothing is distilled, so there are no pairs to distil from
            lists = {str(k): v if isinstance(v, list) else [v] for k, v in run.items()}
            words = {key: "_".join(map(str, items)) for key, items in lists.items()}
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
    source = "\n".join(code_cells(notebook))
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
    defaults, codes = {}, {}
    try:
        for path in sorted(root.glob("notebooks/0*.ipynb")):
            defaults[path.stem], codes[path.stem] = declared(path), code_hash(path, root)
        values = yaml.safe_load((path := paths[profile]).read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError("a profile consists of lines such as `steps: 100`.")
        runs, steps = expand_variants(values.pop("variants", None)), {}
        given = {"profile": profile, "variant": None, "variants": list(runs)}  # not by the profile
        for keys, names in [(values, defaults), *((run, ["02_train"]) for run in runs.values())]:
            known = sorted(set().union(*(defaults[name] for name in names)) - given.keys())
            for key in keys.keys() - {*known}:
                raise ValueError(nearest(key, known, "parameter"))
        for notebook, declarations in defaults.items():
            for variant in runs if notebook == "02_train" else [notebook]:
                chosen = values | runs.get(variant, {}) | given | {"variant": variant}
                keys = chosen.keys() & declarations
                parameters = {key: check(key, chosen[key], *declarations[key]) for key in keys}
                steps[variant] = Step(notebook, parameters, codes[notebook])
    except (ValueError, SyntaxError, yaml.YAMLError) as error:
        raise ValueError(f"{path.name}: {error}") from error
    return steps


if __name__ == "__main__":
    for name, step in plan(sys.argv[1]).items():
        print(f"{step.notebook:20} {name}: {step.parameters}")
