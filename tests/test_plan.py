"""A wrong profile is refused before any work, and Snakemake runs exactly what changed."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "workflow"))
import plan as workflow  # noqa: E402

PARAMETERS = {path.stem: "" for path in sorted(ROOT.glob("notebooks/0*.ipynb"))}
PARAMETERS["00_data"] = """\
size = 64  # pixels = height = width, at least 1
source = "scenes"  # one of: scenes, folder
data_root = ""  # path of the data"""
PARAMETERS["01_teacher_features"] = """\
rate = 0.1  # above 0
file = ""  # path
more = {}  # path of each"""
PARAMETERS["02_train"] = """\
variant = ""
method = "none"  # sum of: none, fd, crd
pairs = "both"  # one of: long, both
rate = 1.0
seed = 0
context = 248
long = True
weights = [1.0, 0.5]  # at least 0
share = 0.5  # of all, from 0.1 to 1
factors = {}  # each at least 0; one of: fd, crd"""
PARAMETERS["04_retrieval"] = """\
variants = []
data_root = ""  # path of the data
test_sets = {}  # name: [source, path below data_root]
results = ""  # path to write
against = ["none"]"""
PROFILE = "size: 32\nrate: 1e-5\nvariants:\n- {method: [fd, crd], pairs: both, seed: 0}\n"
STEPS = ["data", "teacher", "fd-both-s0", "crd-both-s0"]
STEPS += ["deploy", "retrieval", "details", "report", "search"]
# In place of papermill: the same arguments, but without the seconds that a kernel takes to start.
PAPERMILL = """
import json, os, sys, yaml
notebook, output = map(os.path.abspath, sys.argv[1:3])
print("started", output.split("/")[-2], flush=True)
os.chdir(sys.argv[sys.argv.index("--cwd") + 1])
values = yaml.safe_load(sys.argv[sys.argv.index("-y") + 1])
for cell in json.load(open(notebook))["cells"][1:2]:
    exec(cell["source"], values)
open(output, "w")
"""


def write_notebook(root, name, code="print('hello from', profile)", prose="Some prose."):
    parameters = f'profile = "none"\n{PARAMETERS[name]}'.strip()
    empty = {"cell_type": "code", "outputs": [], "execution_count": None}
    cells = [{**empty, "id": "0", "source": parameters, "metadata": {"tags": ["parameters"]}}]
    cells += [{**empty, "id": "1", "source": code, "metadata": {"tags": []}}]
    cells += [{"cell_type": "markdown", "id": "2", "source": prose, "metadata": {}}]
    notebook = {"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
    (root / f"notebooks/{name}.ipynb").write_text(json.dumps(notebook), "utf-8")


@pytest.fixture
def root(tmp_path):
    """The workflow on notebooks that print a line, with a library of three modules."""
    for folder in ("notebooks/profiles", "jettclip", "report", "papermill"):
        (tmp_path / folder).mkdir(parents=True)
    for module in ("jettclip/models", "jettclip/search", "jettclip/__init__", "papermill/__init__"):
        (tmp_path / f"{module}.py").touch()
    (tmp_path / "jettclip/train.py").write_text("from . import models\n")
    (tmp_path / "notebooks/profiles/tiny.yaml").write_text(PROFILE)
    (tmp_path / "papermill/__main__.py").write_text(PAPERMILL)
    (tmp_path / "report/build.py").write_text("open('report/build/report.pdf', 'w')")
    shutil.copy(ROOT / "jettclip/utils.py", tmp_path / "jettclip")
    shutil.copytree(ROOT / "workflow", tmp_path / "workflow")
    for name in PARAMETERS:
        write_notebook(tmp_path, name)
    write_notebook(tmp_path, "02_train", "from jettclip import train")
    return tmp_path


def test_variants_by_hand():
    entries = [
        {"method": ["none", "fd"], "pairs": "long", "seed": [0, 1]},
        {"seed": 3, "pairs": "both", "method": "crd+fd", "weights": [[1.0, 0.5]]},
        {"method": "fd", "name": "small", "lr": 0.1, "size": [8, 16], "seed": 0},
    ]
    assert workflow.expand_variants(entries) == {
        "none-s0": {"method": "none", "seed": 0},
        "none-s1": {"method": "none", "seed": 1},
        "fd-long-s0": {"method": "fd", "pairs": "long", "seed": 0},
        "fd-long-s1": {"method": "fd", "pairs": "long", "seed": 1},
        "crd+fd-both-weights1.0_0.5-s3": {**entries[1], "weights": [1.0, 0.5]},
        "fd-small-size8-s0": {"method": "fd", "lr": 0.1, "size": 8, "seed": 0},
        "fd-small-size16-s0": {"method": "fd", "lr": 0.1, "size": 16, "seed": 0},
    }


def test_each_step_gets_its_parameters(root):
    steps = workflow.plan("tiny", root)
    assert list(steps) == [*list(PARAMETERS)[:2], *STEPS[2:4], *list(PARAMETERS)[3:]]
    assert steps["00_data"].parameters == {"profile": "tiny", "size": 32}
    assert steps["01_teacher_features"].parameters == {"profile": "tiny", "rate": 1e-5}
    train = {"method": "crd", "pairs": "both", "seed": 0, "rate": 1e-5, "profile": "tiny"}
    assert steps["crd-both-s0"].parameters == train | {"variant": "crd-both-s0"}
    assert steps["04_retrieval"].parameters == {"profile": "tiny", "variants": STEPS[2:4]}


REFUSED = {
    "sise: 32": "parameter 'sise' is unknown: did you mean 'size'",
    "size: 1e5": "size: '1e5' is not of the type of its default, 64",
    "rate: fast": "wrong.yaml: rate: 'fast' is not",
    "size: 0": "size: 0 is not at least 1",
    "rate: 0": "rate: 0.0 is not above 0",
    "rate: .inf": "rate: inf is not finite",
    "share: 0.09": "share: 0.09 is not from 0.1 to 1",
    "weights: [1, -1]": "weights: -1.0 is not at least 0",
    "weights: [1.0]": "weights: \\[1.0\\] has to have 2 items",
    "variants: [{weights: [[1, 1], [1, -1]]}]": "weights: -1.0 is not",
    "variants: [{method: FD}]": "method: choice 'FD' is unknown: did you mean 'fd'",
    "factors: {fd: 1, CRD: 1}": "factors: choice 'CRD' is unknown: did you mean 'crd'",
    "factors: {fd: x}": "factors, fd: 'x' is not of the type",
    "more: {7: a.pt}": "more: 7 is not of the type",
    "test_sets: {A: folder}": "test_sets, A: 'folder' is not of the type",
    "test_sets: {A: [folder]}": "test_sets, A: \\['folder'\\] has to have 2 items",
    "test_sets: {A: [foldr, a]}": "test_sets, A: choice 'foldr' is unknown: did you mean 'folder'",
    "against: [FD-both]": "against: run 'FD-both' is unknown: did you mean 'fd-both'",
    "against: fd-both": "against: 'fd-both' is not of the type",
    "source: folder": "data_root: name the folder of the data, or set .* JETTCLIP_DATA",
    "variants: [{method: []}]": "{'method': \\[\\]} has an empty list",
    "variants: [{method: fd+fd}]": "method: 'fd.fd' names one twice",
    "variants: [{method: crd+df}]": "method: choice 'df' is unknown: did you mean 'fd'",
    "variants: [{size: 3}]": "parameter 'size' is unknown",
    "variants: [{method: a/b}]": "variant 'a/b' .* cannot name a folder",
    "variants: [{seed: 0}, {seed: [1, 0]}]": "variant 's0' is there twice",
    "variants: {seed: 0}": "write variants as a list",
}


@pytest.mark.parametrize("line", REFUSED)
def test_refused_before_any_work(root, line, monkeypatch):
    monkeypatch.setenv("JETTCLIP_DATA", "" if line == "source: folder" else "data")
    values = yaml.safe_load(PROFILE) | yaml.safe_load(line)
    (root / "notebooks/profiles/wrong.yaml").write_text(yaml.safe_dump(values))
    for profile, error in {"wrong": REFUSED[line], "tiny.yaml": "did you mean 'tiny'"}.items():
        with pytest.raises(ValueError, match=error):
            workflow.plan(profile, root)


PROFILES = {  # whole files
    "# later": "a profile consists of lines",
    "- 1": "a profile consists of lines",
    "a: b: c": "mapping values are not allowed",
    "size: 32\nsize: 64": "line 2: 'size' is there twice",
    "variants: [{seed: 0, seed: 1}]": "line 1: 'seed' is there twice",
}


@pytest.mark.parametrize("text", PROFILES)
def test_a_file_that_is_no_profile_is_refused(root, text):
    (root / "notebooks/profiles/tiny.yaml").write_text(text)
    with pytest.raises(ValueError, match="^tiny.yaml: " + PROFILES[text]):
        workflow.plan("tiny", root)


def test_paths_are_absolute_from_where_the_user_stands(root, monkeypatch):
    monkeypatch.chdir(root / "report")
    monkeypatch.setenv("HOME", str(root))
    monkeypatch.setenv("JETTCLIP_DATA", "../the data")
    lines = "file: openai:~/a.pt\nmore: {b: b.pt}\ntest_sets: {A: [folder, a], B: [folder, ~/b]}\n"
    profile = root / "notebooks/profiles/tiny.yaml"
    profile.write_text(PROFILE + lines + "results: out\n")
    steps = workflow.plan("tiny", root)
    data, tests = str(root / "the data"), {"A": str(root / "the data/a"), "B": str(root / "b")}
    teacher, retrieval = steps["01_teacher_features"], steps["04_retrieval"]
    assert teacher.parameters["file"] == f"openai:{root}/a.pt"
    assert teacher.parameters["more"] == {"b": str(root / "report/b.pt")}
    assert teacher.reads == [("file", str(root / "a.pt")), ("more", str(root / "report/b.pt"))]
    assert steps["00_data"].parameters["data_root"] == retrieval.parameters["data_root"] == data
    assert retrieval.parameters["test_sets"] == {n: ["folder", tests[n]] for n in tests}
    assert retrieval.parameters["results"] == str(root / "report/out")
    assert retrieval.reads == [("data_root", data), *(("test_sets", tests[n]) for n in tests)]
    profile.write_text(PROFILE)  # scenes read no data, and with another folder they stay the same
    assert not any("data_root" in step.parameters for step in workflow.plan("tiny", root).values())


def test_a_stamp_follows_files_below_a_path(tmp_path):
    def stamp(*paths):
        workflow.listing.cache_clear()
        return workflow.stamp([("data_root", str(path)) for path in paths])

    data, file = tmp_path / "data", tmp_path / "data/photos/a.jpg"
    file.parent.mkdir(parents=True)
    file.write_text("abc")
    os.utime(file, (0, 0))
    (file.parent / "circle").symlink_to(data)
    before = stamp(data)
    (data / ".DS_Store").touch()
    (data / "gone.jpg").symlink_to("nothing")
    assert stamp(data) == stamp(data, file) == before and stamp() == ""
    file.write_text("xyz")  # the same size, another time
    os.utime(file, (9, 9))
    edited = stamp(data)
    (data / "b.jpg").touch()
    shutil.copytree(data, tmp_path / "other", ignore=shutil.ignore_patterns("gone*", "circle"))
    assert len({before, edited, stamp(data), stamp(tmp_path / "other")}) == 4
    with pytest.raises(ValueError, match=f"data_root: there is no {data}/c; data_root: .*/d"):
        stamp(data / "c", data, data / "d")


def test_plausible_edits_of_a_notebook(root, monkeypatch):
    text = "# How fast\n\nrate = (\n    0.1\n)\nkind = 'a'  # one of: a, b"
    monkeypatch.setitem(PARAMETERS, "01_teacher_features", text)
    code = "%matplotlib inline\nif rate:\n    !ls\nprint(7\n % 4)"
    write_notebook(root, "01_teacher_features", code)
    profile = root / "notebooks/profiles/tiny.yaml"
    profile.write_text(PROFILE.replace("1e-5", "1E-3") + "kind: b")
    parameters = workflow.plan("tiny", root)["01_teacher_features"].parameters
    assert parameters == {"profile": "tiny", "rate": 1e-3, "kind": "b"}
    profile.write_text(PROFILE + "kind: c")
    with pytest.raises(ValueError, match="kind: choice 'c' is unknown"):
        workflow.plan("tiny", root)


@pytest.mark.parametrize(
    "old, new, error",
    [
        ('["parameters"]', "[]", "no cell is tagged `parameters`"),
        ("print(", "print((", "never closed"),
        ("{", "", "Extra data"),
    ],
)
def test_errors_name_the_notebook(root, old, new, error):
    text = (root / "notebooks/00_data.ipynb").read_text().replace(old, new, 1)
    (root / "notebooks/08_x.ipynb").write_text(text)
    with pytest.raises(ValueError, match="^08_x.ipynb: .*" + error):
        workflow.plan("tiny", root)


WITHOUT_DATA = {"debias", "ablation", "scenes", "settings", "smoke"}
WEIGHTS = dict.fromkeys(("sharegpt4v", "sharegpt4v_ablation"), "weights/longclip-B.pt")
FROM_FLICKR8K = ("labelled", "flickr8k_methods", "flickr8k_noise")
WEIGHTS |= dict.fromkeys(FROM_FLICKR8K, "runs/flickr8k/teacher/longclip/student")
WEIGHTS |= {"own": "runs/own_start/fd-both-s0/student"}


def test_the_profiles_of_this_repository(monkeypatch, tmp_path):
    """In a clone without data, without weights, with both: what is missing is named."""

    def stamped(name):
        for step in workflow.plan(name, ROOT).values():
            workflow.stamp(step.reads)

    monkeypatch.setattr(workflow, "code_hash", lambda notebook, root: "")
    monkeypatch.chdir(tmp_path)
    names = {path.stem for path in ROOT.glob("notebooks/profiles/*.yaml")}
    for folder, problem, needy in (
        ("", "^{}.yaml: data_root: name the folder of the data", names - WITHOUT_DATA),
        ("nowhere", f"^data_root: there is no {tmp_path}/nowhere", names - WITHOUT_DATA),
        (".", f"^teacher_file: there is no {tmp_path}/{{weights}}", WEIGHTS),
    ):
        monkeypatch.setenv("JETTCLIP_DATA", folder)
        for name in names:
            if name not in needy:
                stamped(name)
                continue
            with pytest.raises(ValueError, match=problem.format(name, weights=WEIGHTS.get(name))):
                stamped(name)
    monkeypatch.setenv("JETTCLIP_DATA", "data")
    models = {"S0=a/s0.pt": ["S0", f"{ROOT}/a/s0.pt"], "runs/x": ["", f"{ROOT}/runs/x"]}
    models["hf-hub:a/b"] = ["hf-hub:a/b", ""]
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("TEACHER", " ".join(models))
    step = workflow.plan("published", ROOT)["04_retrieval"]
    assert step.parameters["more_models"] == models and len(step.reads) == 3


def test_code_hash_follows_what_is_imported(root):
    def code_hash(name, text):
        (root / f"jettclip/{name}.py").write_text(text)
        return workflow.plan("tiny", root)["fd-both-s0"].code_hash

    before = code_hash("search", "x = 1")  # not imported by 02_train
    assert code_hash("search", "x = 2") == before
    assert code_hash("train", "'''Prose.'''\nfrom . import models  # more prose") == before
    hashes = {code_hash(name, "x = 1") for name in ("models", "__init__", "train")}
    assert len(hashes | {before}) == 4


def snakemake(root, *flags, config=()):
    paths = {"PYTHONPATH": str(root), "JUPYTER_PATH": str(root / "home")}
    command = [sys.executable, "-m", "snakemake", "--cores", "1", *flags]
    command += ["--config", "profile=tiny", *config]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=root, env=os.environ | paths, **pipes)


def finish(process):
    """(exit code, the folders of the steps that were run, the output) of a Snakemake."""
    output = process.communicate(timeout=300)[0]
    return process.returncode, re.findall(r"^started (\S+)$", output, re.M), output


def test_only_what_changed_or_failed_runs_again(root, monkeypatch):
    monkeypatch.setenv("JETTCLIP_DATA", "photos")
    (root / "notebooks/profiles/tiny.yaml").write_text(PROFILE + "source: folder")
    (root / "photos").mkdir()
    write_notebook(root, "00_data", "print('data of', profile, 'in', data_root)")
    code = "from jettclip import train\nassert method != train.fails, 'no fd today'"
    write_notebook(root, "02_train", code)
    (root / "jettclip/train.py").write_text("fails = 'fd'")
    code, steps, output = finish(snakemake(root, "--keep-going"))
    assert code == 1 and output.count("AssertionError: no fd today") == 3  # two retries
    assert f"\ndata of tiny in {root}/photos\n" in output and set(steps) == {*STEPS[:4]}, output
    code, steps, _ = finish(snakemake(root, config=["finished_only=1"]))
    assert code == 0 and sorted(steps) == sorted(STEPS[4:])  # the report without a student

    # Better prose, and with it the time of the file; a module that none imports.
    write_notebook(root, "00_data", "print('data of', profile, 'in', data_root)", "Better prose.")
    (root / "jettclip/search.py").write_text("x = 1")
    assert finish(snakemake(root, config=["finished_only=1"]))[:2] == (0, [])

    (root / "jettclip/train.py").write_text("fails = 'none'")
    write_notebook(root, "03_reparameterize", "1 / 0")
    code, steps, output = finish(snakemake(root))
    assert code == 1 and set(steps) >= {*STEPS[2:4], "deploy"} and not {*STEPS[:2]} & {*steps}
    assert "ZeroDivisionError" in output and "runs/tiny/deploy/03_reparameterize.ipynb" in output
    write_notebook(root, "03_reparameterize", "1 / 1")
    code, again, _ = finish(snakemake(root))  # what follows runs too, though that took two calls
    assert code == 0 and sorted(steps + again) == sorted([*STEPS[2:], "deploy"])
    (root / "photos/a.jpg").touch()
    assert finish(snakemake(root, "runs/tiny/data/done"))[:2] == (0, ["data"])


def test_killed_and_started_again(root):
    """What the run folder holds stays; what outlived the kill is waited for; then all goes on."""
    waiting = "import os, pathlib, time\nopen(f'{variant}.pid', 'w').write('x')\n"
    waiting += "while not pathlib.Path('go').exists():\n    time.sleep(0.05)"
    write_notebook(root, "02_train", waiting)
    checkpoint, student = root / "runs/tiny/fd-both-s0/last.ckpt", "runs/tiny/fd-both-s0/done"
    first = snakemake(root, student)
    while not (root / "notebooks/fd-both-s0.pid").exists():
        time.sleep(0.05)
    checkpoint.write_text("half trained")

    started = snakemake(root), snakemake(root, config=["finished_only=1"])
    errors = "error: a profile runs already", "error: tiny: no student is trained"
    for process, error in zip(started, errors, strict=True):
        code, steps, output = finish(process)
        assert code == 1 and not steps and output.count(error) == 1
    first.kill()
    first.wait()

    second = snakemake(root, student)
    lines = iter(second.stdout.readline, "")
    assert any("waiting for the process that runs this notebook" in line for line in lines)
    (root / "notebooks/go").touch()
    code, steps, output = finish(second)
    assert code == 0 and steps == ["fd-both-s0"], output
    assert checkpoint.read_text() == "half trained"


def test_papermill_executes_in_this_python(root, monkeypatch):
    """The kernel is this interpreter, in UTF-8 mode whatever the locale; prints appear, numbers
    arrive, a failed copy stays."""
    shutil.rmtree(root / "papermill")
    wrong = {"argv": ["/bin/false"], "display_name": "x", "language": "python"}
    (root / "home/kernels/python3").mkdir(parents=True)
    (root / "home/kernels/python3/kernel.json").write_text(json.dumps(wrong))
    monkeypatch.setenv("PYTHONUTF8", "0")
    monkeypatch.setitem(PARAMETERS, "00_data", PARAMETERS["00_data"] + "\nrate = 0.1")
    code = "import os, sys\nprint(sys.flags.utf8_mode, sys.executable, os.getcwd(), size + 1)\n"
    write_notebook(root, "00_data", code + "assert rate != 0.00001, 'a number'")
    code, _, output = finish(snakemake(root, "runs/tiny/data/done"))
    assert code == 1 and f"\n1 {sys.executable} {root / 'notebooks'} 33\n" in output
    failed = root / "runs/tiny/data/00_data.ipynb"
    assert "AssertionError: a number" in output and str(failed.relative_to(root)) in output
    assert "AssertionError" in failed.read_text() and not failed.with_name("done").exists()
