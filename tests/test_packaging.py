"""What is installed, pinned and asked for agrees, and no notebook is committed with outputs."""

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
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
ASKED = [
    Requirement(line) for line in PROJECT["dependencies"] + PROJECT["optional-dependencies"]["test"]
]
LINES = [
    line
    for line in (ROOT / "requirements.txt").read_text().splitlines()
    if not line.startswith("#")
]
PINS = [Requirement(line) for line in LINES]


@pytest.mark.parametrize("asked", ASKED, ids=lambda requirement: requirement.name)
def test_each_dependency_is_pinned_once_within_its_range(asked):
    pins = [pin for pin in PINS if canonicalize_name(pin.name) == canonicalize_name(asked.name)]
    assert len(pins) == 1 and pins[0].marker is None, (
        f"requirements.txt: {asked.name} has {len(pins)} lines"
    )
    version = re.fullmatch(r"==([\w.]+)", str(pins[0].specifier))[1]
    assert version in asked.specifier, (
        f"requirements.txt has {pins[0]}, pyproject.toml asks for {asked}"
    )


def test_requirements_hold_pins_only():
    """No options, addresses or paths of the machine on which it was made."""
    for line in LINES:
        assert re.fullmatch(r"[a-z0-9-]+==[\w.]+( ; .+)?", line), line


def test_installed_versions_are_the_pinned_ones():
    here = [pin for pin in PINS if pin.marker is None or pin.marker.evaluate()]
    installed = {canonicalize_name(d.name): d.version for d in importlib.metadata.distributions()}
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


@pytest.mark.parametrize("path", sorted(ROOT.glob("notebooks/*.ipynb")), ids=lambda path: path.name)
def test_notebooks_are_stripped(path):
    """A fresh clone may lack the filter of .gitattributes; `make setup` defines it."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    for part in [notebook, *notebook["cells"]]:
        assert not part.get("outputs") and part.get("execution_count") is None, (
            "run nbstripout on it"
        )
        assert "papermill" not in part["metadata"], "this is an executed copy"
    # As the filter would write it: else a fresh clone shows changes that nobody made.
    verified = subprocess.run(
        [sys.executable, "-m", "nbstripout", "--verify", path], capture_output=True, text=True
    )
    assert verified.returncode == 0, verified.stdout
