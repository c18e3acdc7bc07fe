"""Imports in jettclip/ go one way, and none of them draws, runs notebooks or makes reports."""

import ast
import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ORDER = ["utils", "distributed", "runs", "losses", "fold", "inputs", "deploy.runtime", "text"]
ORDER += ["checkpoints", "hub", "openclip", "models", "datasets.published", "datasets.rulers"]
ORDER += ["datasets.scenes", "datasets.collage"]
ORDER += ["data", "evaluate", "analysis", "features", "train", "deploy.export", "deploy.timing"]
ORDER += ["nearest", "web", "photos", "search"]
BARRED = {"IPython", "matplotlib", "nbconvert", "papermill", "snakemake", "typst"}


def imported(module):
    """Full names of all that a module imports, in its functions too."""
    for node in ast.walk(ast.parse((ROOT / f"jettclip/{module.replace('.', '/')}.py").read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = f"jettclip.{module}".rpartition(".")[0]
            name = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            yield from (f"{name}.{alias.name}" for alias in node.names)


def test_every_module_has_its_place():
    paths = [path.relative_to(ROOT / "jettclip") for path in ROOT.glob("jettclip/**/*.py")]
    names = {".".join(path.with_suffix("").parts) for path in paths if path.stem != "__init__"}
    assert names == set(ORDER)


@pytest.mark.parametrize("module", ORDER)
def test_a_module_imports_only_those_before_it(module):
    names = set(imported(module))
    ours = {m for m in ORDER if any(f"{name}.".startswith(f"jettclip.{m}.") for name in names)}
    allowed = ORDER[: ORDER.index(module)]
    if module in ("text", "losses"):  # torch and the tokenizer, which needs no torch
        allowed = ["utils", "inputs"]
    assert ours <= set(allowed), f"{module} imports {ours - set(allowed)}"
    assert not BARRED & {name.partition(".")[0] for name in names}
