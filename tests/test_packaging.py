"""What is installed, pinned, asked for and imported agrees; notebooks are stored stripped."""

import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name as canonical

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PACKAGE = [Requirement(line) for line in PROJECT["dependencies"]]
EXTRAS = PROJECT["optional-dependencies"]
EXTRAS = {name: list(map(Requirement, lines)) for name, lines in EXTRAS.items()}
LINES = (ROOT / "requirements.txt").read_text().splitlines()
PINS = [Requirement(line) for line in LINES if not line.startswith("#")]
HERE = [pin for pin in PINS if pin.marker is None or pin.marker.evaluate()]
BLOCKED = "IPython,matplotlib,nbconvert,papermill,psutil,snakemake,typst"
IMPORT_ALL = """
import importlib, sys
from pathlib import Path
sys.modules.update(dict.fromkeys(sys.argv[1].split(",")))  # None: an import of it fails
for path in sorted(Path("jettclip").rglob("*.py")):
    importlib.import_module(".".join(path.with_suffix("").parts).removesuffix(".__init__"))
"""


def test_pins_are_installed_and_within_the_ranges():
    """The lines hold no options, addresses or paths of the machine on which they were made."""
    assert all(re.fullmatch(r"#.*|[a-z0-9-]+==[\w.]+( ; .+)?", line) for line in LINES)
    for asked in PACKAGE + EXTRAS["report"] + EXTRAS["test"]:
        assert [canonical(pin.name) for pin in HERE].count(canonical(asked.name)) == 1, asked
        for pin in PINS:
            if canonical(pin.name) == canonical(asked.name):
                assert str(pin.specifier).removeprefix("==") in asked.specifier, asked
    installed = {canonical(d.name): d.version for d in importlib.metadata.distributions()}
    wrong = [pin for pin in HERE if installed.get(canonical(pin.name), "0") not in pin.specifier]
    assert not wrong, f"not installed as pinned, run `make setup`: {wrong}"


def test_conda_environment():
    python, *rest = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    asked, here = Requirement("python" + PROJECT["requires-python"]).specifier, sys.version_info
    assert python.removeprefix("python=") in asked and f"{here[0]}.{here[1]}" in asked
    assert rest == ["pip", {"pip": ["-r requirements.txt", "-e ."]}]


def test_the_package_imports_without_the_extras():
    subprocess.run([sys.executable, "-c", IMPORT_ALL, BLOCKED], cwd=ROOT, check=True)


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


def test_notebooks_are_as_the_filter_writes_them():
    """Else a fresh clone, which may lack the filter, shows changes."""
    keys = ["--extra-keys", "metadata.papermill cell.metadata.papermill"]
    verify = [sys.executable, "-m", "nbstripout", "--verify", *keys]
    paths = sorted(ROOT.glob("notebooks/**/*.ipynb"))
    verified = subprocess.run([*verify, *paths], capture_output=True, text=True)
    assert len(paths) > 8 and verified.returncode == 0, verified.stdout + verified.stderr
