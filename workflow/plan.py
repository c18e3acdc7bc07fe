"""The steps of a profile, checked before any work: `python workflow/plan.py scenes` prints them.

A profile, notebooks/profiles/<name>.yaml, gives values to parameters of the notebooks' cells tagged
`parameters`, and in `variants` lists the students to train; a list as a value makes a product:

    - {method: [fd, crd], pairs: both, seed: 0}  # fd-both-s0, crd-both-s0
    - {method: fd, weights: [[1, 0, 1, 0]]}      # fd-weights1_0_1_0: one value that is a list
    - {method: fd, name: small, lr: 0.1, image_size: 32}  # fd-small

The comment beside a parameter in its notebook says which values it takes:

    # one of: a, b     # sum of: a, b                   # of a dict: of its keys
    # at least 1       # above 0      # from 0 to 1     # of a list or dict: each of its numbers
    # path             # path below data_root           # of a dict: each of its values
    # [source, path]                                    # of a dict: each value is such a list
"""

import ast
import hashlib
import io
import itertools
import math
import os
import re
import sys
from collections import namedtuple
from contextlib import suppress
from functools import cache
from modulefinder import ModuleFinder
from pathlib import Path

import yaml

from jettclip.utils import nearest, read_json

# One execution of a notebook. It runs again when its parameters, its code or the files at or below
# the paths that it reads, (parameter, path), change.
Step = namedtuple("Step", "notebook parameters code_hash reads")
ROOT = Path(__file__).resolve().parents[1]
RANGE = re.compile(r"# .*?\b((at least|above|from) ([\d.]*\d)(?: to ([\d.]*\d))?)")


def code_cells(notebook, tag=""):
    """Sources of a notebook's code cells (of this tag); lines like `%time` or `!ls` do nothing."""
    for cell in read_json(notebook)["cells"]:
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


def check(key, value, default, line="", declarations=None):
    """`value` in the type of `default` and as the comment of its line says; else a ValueError."""
    if isinstance(default, float) and type(value) in (int, str):
        with suppress(ValueError):
            value = float(value)  # to YAML, 1e5 without a point is a string
    if type(value) is not type(default):
        raise ValueError(f"{key}: {value!r} is not of the type of its default, {default!r}.")
    if isinstance(value, dict):
        entries = value.items()
        return {name: check_entry(key, name, x, line, declarations or {}) for name, x in entries}
    if isinstance(value, list) and default:
        if len(value) != len(default) > 1:
            raise ValueError(f"{key}: {value!r} has to have {len(default)} items, as {default!r}.")
        return [check(key, item, default[0], line) for item in value]
    if isinstance(value, str) and (listed := re.search(r"# .*?(one|sum) of: ([\w, .-]+)", line)):
        words = [value] if listed[1] == "one" else value.split("+")
        for word in words:
            if word not in listed[2].split(", "):
                raise ValueError(f"{key}: " + nearest(word, listed[2].split(", "), "choice"))
        check_sum(key, words)
    if isinstance(value, int | float):
        check_range(key, value, line)
    return value


def check_batch(batch_size=1, processes=1, train_pairs=0, **others):
    if batch_size % processes:
        raise ValueError(f"batch_size: {batch_size} does not divide among {processes} processes.")
    if 0 < train_pairs < batch_size:
        raise ValueError(f"train_pairs: {train_pairs} do not fill a batch_size of {batch_size}.")


def check_sum(key, words):
    if len({*words}) < len(words) or ("none" in words and len(words) > 1):
        raise ValueError(f"{key}: {'+'.join(words)!r} names one twice, or none beside another.")


def check_range(key, value, line):
    if not math.isfinite(value):
        raise ValueError(f"{key}: {value!r} is not finite.")
    if limits := RANGE.search(line):
        text, word, low, high = limits.groups()
        too_low = value <= float(low) if word == "above" else value < float(low)
        if too_low or value > float(high or "inf"):
            raise ValueError(f"{key}: {value!r} is not {text}.")


def check_entry(key, name, value, line, declarations):
    """`value` of a dict's `name`; items of a list are checked as the parameters of their names."""
    entry = f"{key}, {name}"
    if names := re.search(r"# .*?\[(\w+), (\w+)", line):
        pairs = zip(names.groups(), check(entry, value, ["", ""]), strict=True)
        return [check(entry, item, *declarations.get(of, ("", ""))) for of, item in pairs]
    check(key, name, "", line)
    return check(entry, value, 0.0, line) if RANGE.search(line) else check(entry, value, "")


def absolute(value, folder, found):
    """Each path in `value` (of a list the last item) absolute, if relative below `folder` or here;
    `found` gets them all."""
    if isinstance(value, dict):
        return {name: absolute(item, folder, found) for name, item in value.items()}
    if isinstance(value, list):
        return [*value[:-1], absolute(value[-1], folder, found)]
    prefix = "openai:" * value.startswith("openai:")
    path = value.removeprefix(prefix)
    if path in ("", "pip", "published") or path.startswith("hf-hub:"):  # names of weights
        return value
    found.append(os.path.abspath(os.path.join(folder, os.path.expanduser(path))))
    return prefix + found[-1]


def make_absolute(parameters, declarations):
    """Make the paths among `parameters` absolute -> [(parameter, path)] of those that are read."""
    if parameters.get("data_root") == "":
        needed = "name the folder of the data, or set the environment variable JETTCLIP_DATA"
        raise ValueError(f"data_root: {needed}.")
    reads = []
    for key in (key for key in declarations if key in parameters):  # data_root before test_sets
        if kind := re.search(r"# .*?\bpath\b( below data_root)?( to write)?", declarations[key][1]):
            folder, found = parameters["data_root"] if kind[1] else "", []
            parameters[key] = absolute(parameters[key], folder, found)
            reads += [] if kind[2] else [(key, path) for path in found]
    return reads


def stamp(reads):
    """Hash of the paths, sizes and times of all files that a step reads; a path that is not there
    is an error."""
    if missing := [f"{key}: there is no {path}" for key, path in reads if not os.path.exists(path)]:
        raise ValueError("; ".join(missing))
    if not reads:
        return ""
    paths = {path for _, path in reads}
    outermost = [path for path in sorted(paths) if not paths & {*map(str, Path(path).parents)}]
    return hashlib.sha256("".join(map(listing, outermost)).encode()).hexdigest()[:16]


@cache
def listing(path):
    """Hash of all files at or below `path` but hidden ones; a million on a local disk take 5 s."""
    digest, seen = hashlib.sha256(), {str(ROOT / "runs"), str(ROOT / "results")}
    folders = [path] if os.path.isdir(path) else []

    def add(path, stat):
        digest.update(os.fsencode(f"{path} {stat.st_size} {stat.st_mtime_ns}\n"))

    if not folders:
        add(path, os.stat(path))
    while folders:
        if (folder := os.path.realpath(path := folders.pop())) in seen:  # links may form a circle
            continue
        seen.add(folder)
        with suppress(PermissionError):
            for entry in sorted(os.scandir(path), key=lambda entry: entry.name):
                if entry.is_dir():
                    folders += [] if entry.name[0] == "." else [entry.path]
                elif entry.is_file() and entry.name[0] != ".":
                    add(entry.path, entry.stat())
    return digest.hexdigest()


def expand_variants(variants):
    """{run folder: {parameter: value}} of a profile's list of variants."""
    if not isinstance(variants, list) or {*map(type, variants)} != {dict}:
        raise ValueError("write variants as a list such as `- {method: fd, seed: [0, 1]}`.")
    runs = {}
    for entry in map(dict, variants):
        if [] in entry.values():
            raise ValueError(f"variants: {entry} has an empty list, so it trains nothing.")
        label = entry.pop("name", "")
        choices = [value if isinstance(value, list) else [value] for value in entry.values()]
        for values in itertools.product(*choices):
            run = dict(zip(entry, values, strict=True))
            if run.get("method") == "none":
                run.pop("pairs", None)  # nothing is distilled, so there are no pairs to distil from
            lists = {str(k): v if isinstance(v, list) else [v] for k, v in run.items()}
            words = {key: "_".join(map(str, items)) for key, items in lists.items()}
            name = [words.pop(key) for key in ("method", "pairs") if key in words]
            seed = ["s" + words.pop("seed")] if "seed" in words else []
            if label:  # in place of all values that are not listed
                words = {key: word for key, word in words.items() if type(entry[key]) is list}
                name.append(str(label))
            name = "-".join([*name, *(key + word for key, word in words.items()), *seed])
            if name in runs or not re.fullmatch(r"[\w.+-]+", name):
                raise ValueError(f"variant {name!r} is there twice or cannot name a folder.")
            runs[name] = run
    return runs


class UniqueKeys(yaml.SafeLoader):
    def construct_mapping(self, node, deep=False):
        keys = set()
        for key, _ in node.value:
            if key.value in keys:
                line = key.start_mark.line + 1
                raise ValueError(f"line {line}: {key.value!r} is there twice; YAML keeps the last")
            keys |= {key.value} if isinstance(key, yaml.ScalarNode) else set()
        return super().construct_mapping(node, deep)


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
    code = [
        ast.parse(text) for text in [source, *(Path(file).read_text("utf-8") for file in files)]
    ]
    code = [ast.unparse(WithoutDocstrings().visit(tree)) for tree in code]
    return hashlib.sha256("\n".join(code).encode()).hexdigest()[:16]


def more_model(text):
    """An entry of more_models: "NAME=FILE", a hub name ("hf-hub:AUTHOR/NAME"), a model folder."""
    name, equals, file = text.partition("=")
    if equals:
        return text, [name, file]
    return text, [text, ""] if ":" in text else ["", text]


def read_profile(path):
    """(parameters of all notebooks, {run folder: parameters of a student}) of a profile's file."""
    values = yaml.load(path.read_text(encoding="utf-8"), UniqueKeys)
    if not isinstance(values, dict):
        raise ValueError("a profile consists of lines such as `steps: 100`.")
    root = values.pop("data_root", "") or os.environ.get("JETTCLIP_DATA", "")
    tested = {"test_sets", "published_sets", "classify"} & values.keys()
    if values.get("source", "scenes") != "scenes" or tested:
        values["data_root"] = root  # else nothing is read from there, and another is no change
    if values.get("published_sets") == "more":
        more = map(more_model, os.environ.get("TEACHER", "").split())
        values["more_models"] = values.get("more_models", {}) | dict(more)
    runs = expand_variants(values.pop("variants", None))
    seeded = sorted({run.rpartition("-s")[0] for run in runs} - {""})
    against = values.get("against", [])
    for name in against if isinstance(against, list) else []:
        if name not in seeded:  # else notebook 04 would compare with nothing, and say nothing
            raise ValueError("against: " + nearest(name, seeded, "run"))
    return values, runs


def plan(profile, root="."):
    """{name of the notebook, or of the variant: Step} of a profile, in order."""
    root = Path(root).resolve()
    paths = {path.stem: path for path in sorted(root.glob("notebooks/profiles/*.yaml"))}
    if profile not in paths:
        raise ValueError(nearest(profile, paths, "profile"))
    defaults, codes, steps = {}, {}, {}
    try:
        for path in sorted(root.glob("notebooks/0*.ipynb")):
            defaults[path.stem], codes[path.stem] = declared(path), code_hash(path, root)
        values, runs = read_profile(path := paths[profile])
        given = {"profile": profile, "variant": None, "variants": list(runs)}  # not by the profile
        for keys, names in [(values, defaults), *((run, ["02_train"]) for run in runs.values())]:
            known = sorted(set().union(*(defaults[name] for name in names)) - given.keys())
            for key in keys.keys() - {*known}:
                raise ValueError(nearest(key, known, "parameter"))
        declarations = {key: x for known in reversed(defaults.values()) for key, x in known.items()}
        for notebook, known in defaults.items():
            for variant in runs if notebook == "02_train" else [notebook]:
                chosen = values | runs.get(variant, {}) | given | {"variant": variant}
                keys = chosen.keys() & known
                parameters = {k: check(k, chosen[k], *known[k], declarations) for k in keys}
                if notebook == "02_train":
                    check_batch(**{k: x for k, (x, _) in declarations.items()} | parameters)
                reads = make_absolute(parameters, known)
                steps[variant] = Step(notebook, parameters, codes[notebook], reads)
    except (ValueError, SyntaxError, yaml.YAMLError) as error:
        raise ValueError(f"{path.name}: {error}") from error
    return steps


if __name__ == "__main__":
    for name, step in plan(sys.argv[1]).items():
        print(f"{step.notebook:20} {name}: {step.parameters}")
