"""What is installed, pinned and asked for agrees; the package needs none of the report's extras."""

import ast
import importlib.metadata
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name as canonical

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PACKAGE = [Requirement(line) for line in PROJECT["dependencies"]]
EXTRAS = {
    name: [Requirement(line) for line in lines]
    for name, lines in PROJECT["optional-dependencies"].items()
}
TEXT = (ROOT / "requirements.txt").read_text()
LINES = [line for line in TEXT.splitlines() if not line.startswith("#")]
PINS = [Requirement(line) for line in LINES]
NOTEBOOKS = sorted(ROOT.glob("notebooks/**/*.ipynb"))
BLOCKED = ["IPython", "matplotlib", "nbconvert", "papermill", "psutil", "snakemake", "typst"]
IMPORT_ALL = """
import importlib, sys
from pathlib import Path
sys.modules.update(dict.fromkeys(sys.argv[1].split(",")))  # None: an import of it fails
for path in sorted(Path("jettclip").rglob("*.py")):
    importlib.import_module(".".join(path.with_suffix("").parts).removesuffix(".__init__"))
"""


@pytest.mark.parametrize("asked", PACKAGE + EXTRAS["report"] + EXTRAS["test"], ids=str)
def test_each_dependency_is_pinned_within_its_range(asked):
    pins = [pin for pin in PINS if canonical(pin.name) == canonical(asked.name)]
    here = [pin for pin in pins if pin.marker is None or pin.marker.evaluate()]
    assert len(here) == 1, f"requirements.txt has {len(here)} lines for {asked.name}"
    for pin in pins:
        assert re.fullmatch(r"==([\w.]+)", str(pin.specifier))[1] in asked.specifier


def test_requirements_hold_pins_only():
    """No options, addresses or paths of the machine on which it was made."""
    for line in LINES:
        assert re.fullmatch(r"[a-z0-9-]+==[\w.]+( ; .+)?", line), line


def test_installed_versions_are_the_pinned_ones():
    here = [pin for pin in PINS if pin.marker is None or pin.marker.evaluate()]
    installed = {canonical(d.name): d.version for d in importlib.metadata.distributions()}
    wrong = [
        f"{pin} (installed: {installed.get(pin.name)})"
        for pin in here
        if pin.name not in installed or installed[pin.name] not in pin.specifier
    ]
    assert not wrong, "run `make setup`; not installed as pinned: " + ", ".join(wrong)


def test_conda_environment():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    python, pip, packages = environment["dependencies"]
    assert environment["name"] == "jettclip"
    assert pip == "pip" and packages == {"pip": ["-r requirements.txt", "-e ."]}
    asked = Requirement("python" + PROJECT["requires-python"]).specifier
    assert python.removeprefix("python=") in asked
    assert ".".join(map(str, sys.version_info[:2])) in asked


def test_the_package_imports_without_the_extras():
    blocked = ",".join(BLOCKED)
    subprocess.run([sys.executable, "-c", IMPORT_ALL, blocked], cwd=ROOT, check=True)


def test_the_package_asks_for_what_it_imports():
    asked = {canonical(r.name) for r in PACKAGE + EXTRAS["openvino"] + EXTRAS["web"]}
    names = set()
    for path in ROOT.glob("jettclip/**/*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names.add(node.module.partition(".")[0])
    distributions = importlib.metadata.packages_distributions()
    for name in names - sys.stdlib_module_names - {"jettclip"}:
        assert {canonical(d) for d in distributions.get(name, [name])} & asked, name


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebooks_are_stripped(path):
    """A fresh clone may lack the filter of .gitattributes; `make setup` defines it."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    for item in [notebook, *notebook["cells"]]:
        assert not item.get("outputs") and item.get("execution_count") is None, "run nbstripout"
        assert "papermill" not in item["metadata"], "this is an executed copy"


def test_notebooks_are_as_the_filter_writes_them():
    """Else a fresh clone shows changes that nobody made."""
    verify = [sys.executable, "-m", "nbstripout", "--verify", *NOTEBOOKS]
    verified = subprocess.run(verify, capture_output=True, text=True)
    assert verified.returncode == 0, verified.stdout
