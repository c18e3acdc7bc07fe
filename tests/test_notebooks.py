"""The notebooks: what a committed one looks like, and all of them in a row at the size `smoke`."""

import ast
import contextlib
import json
import re
import shutil
import sys
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import nbformat
import pandas as pd
import pytest
import torch
import yaml
from PIL import Image

from jettclip import data, evaluate, features, train
from jettclip.models import load_folder

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"
sys.path[:0] = [str(NOTEBOOKS.parent / "workflow"), str(NOTEBOOKS)]
import plan  # noqa: E402

STORY = sorted(path.stem for path in NOTEBOOKS.glob("0*.ipynb"))
ALL = sorted(str(path.relative_to(NOTEBOOKS)) for path in NOTEBOOKS.glob("**/[0-9a-z]*.ipynb"))
PROFILES = {
    path.stem: yaml.safe_load(path.read_text("utf-8")) for path in NOTEBOOKS.glob("profiles/*.yaml")
}
SMALLER = {"train_pairs": 64, "test_pairs": 32, "detail_pairs": 48, "photos": 16, "image_size": 32}
SMALLER |= {"steps": 2, "clip_steps": 2, "teacher_steps": 2, "batch_size": 16, "eval_every": 1}
SMALLER |= {"repeats": 2}
STUDENTS = {
    "none-s0": {"method": "none"},
    "crd+fd-both-s0": {"method": "crd+fd"},
    "fd-long-context_length77-s0": {"method": "fd", "pairs": "long", "context_length": 77},
}


def read_notebook(name):
    return nbformat.read((NOTEBOOKS / name).with_suffix(".ipynb"), nbformat.NO_CONVERT)


def is_parameters(cell):
    return "parameters" in cell.metadata.get("tags", [])


def parameters(name):
    """Names of the parameters of a notebook."""
    source = next(cell.source for cell in read_notebook(name).cells if is_parameters(cell))
    return [node.targets[0].id for node in ast.parse(source).body]


@pytest.mark.parametrize("name", ALL)
def test_it_is_committed_without_outputs_and_begins_with_its_parameters(name):
    notebook = read_notebook(name)
    nbformat.validate(notebook)  # ids are there and unique
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    marks = {mark for x in (notebook, *notebook.cells) for mark in x.metadata}
    assert not marks & {"papermill", "execution"}
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not [cell for cell in code if cell.outputs or cell.execution_count]
    lines = [line for cell in code for line in cell.source.splitlines()]
    assert all(len(line) <= 100 or "# one of: JettCLIP-T" in line for line in lines)
    assert [is_parameters(cell) for cell in code] == [True] + [False] * (len(code) - 1)


@pytest.mark.parametrize("name", STORY)
def test_it_opens_with_a_question_and_ends_with_what_was_seen(name):
    first, second, *_, last = read_notebook(name).cells
    title = re.match(rf"# {name[:2]} · .+\?\n\n\w", first.source)
    seen = last.source.split("**What was seen.**")[1]
    assert title and "{" in seen and seen.count(".") >= 2  # numbers, in two or more sentences
    lines = second.source.splitlines()  # a parameter on each line, as plan.py reads them
    assert all(re.fullmatch(r"[a-z]\w* = [^#]+?(  # \S.*)?", line) for line in lines)
    assert len(parameters(name)) == len(lines)


@pytest.mark.parametrize("name", STORY)
def test_every_number_has_its_range_and_every_file_is_a_path(name):
    """plan.py refuses a profile's other values, and makes its paths absolute."""
    for key, (default, line) in plan.declared(NOTEBOOKS / f"{name}.ipynb").items():
        numbers = default if isinstance(default, list) else [default]
        if {*map(type, numbers)} & {int, float} or key == "method_weights":
            assert plan.RANGE.search(line), line
        if key.endswith(("_file", "_root")) or default == {} and key != "method_weights":
            assert re.search(r"# .*\bpath\b", line), line
        assert plan.check(key, default, default, line) == default


def test_the_start_page_asks_each_notebook_s_question():
    page = "\n".join(cell.source for cell in read_notebook("README").cells)
    rows = {path: row for row, path in re.findall(r"\| (.+) \| \[.+]\((.+)\) \|", page)}
    assert sorted(rows) == sorted(ALL)
    for name, question in rows.items():
        assert read_notebook(name).cells[0].source.partition("\n")[0].endswith(question)
    links = re.findall(r"\]\(([^)]+)\)", page)
    assert all("://" in link or (NOTEBOOKS / link).exists() for link in links)


# ---- all notebooks at the size `smoke`, in this process: a kernel for each would take minutes


def execute(root, name, **values):
    """Run the code cells of a notebook with these parameters, as if it lay in root/notebooks."""
    namespace = {}
    with contextlib.chdir(root / "notebooks"):
        for cell in read_notebook(name).cells:
            if cell.cell_type == "code":
                exec(compile(cell.source, f"{name} {cell.id}", "exec"), namespace)
            if is_parameters(cell):
                namespace |= {key: value for key, value in values.items() if key in namespace}
    plt.close("all")


def test_00_counts_the_rows_that_it_leaves_out_and_names_them(tmp_path, capsys):
    names = ["train"] * 5 + ["val", "test"]  # of files with a control character
    rows = [{"file_name": f"{x}\x1b.png", "text": "a\x1b dog", "split": x} for x in names]
    rows += [{**rows[0], "text": None}, {**rows[0], "short": "\ud800"}]  # one name, two rows
    for folder in ("data", "notebooks"):
        (tmp_path / folder).mkdir()
    (tmp_path / "data/metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n{")
    for row in rows:
        Image.new("RGB", (8, 8)).save(tmp_path / "data" / row["file_name"])
    values = {"source": "folder", "data_root": "../data", "train_pairs": 0, "profile": "folder"}
    problem = "3 of 10 rows are unusable, more than most_left_out=25%. The first is "
    with pytest.raises(ValueError, match=re.escape(rf"{problem}train\x1b.png: ")):
        execute(tmp_path, "00_data", **values, most_left_out=0.25)
    skipped = pd.read_csv(tmp_path / "runs/folder/data/skipped.csv")
    assert skipped.key.tolist()[:2] == ["train\x1b.png"] * 2 and len(skipped) == 3
    assert skipped.problem.str.contains(f"of {tmp_path}/data/metadata.jsonl").all()
    execute(tmp_path, "00_data", **values, most_left_out=0.5)
    printed = capsys.readouterr().out
    assert r"long:  a\x1b dog" in printed and "\x1b" not in printed


@pytest.mark.parametrize("name", STORY[1:])
def test_without_a_run_it_says_what_to_run_first(name, tmp_path):
    """And leaves the committed results as they are."""
    for folder in ("notebooks", "results/scenes"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "results/scenes/provenance.json").touch()
    with pytest.raises(FileNotFoundError, match="first run `make report` or notebook 0"):
        execute(tmp_path, name)
    assert (tmp_path / "results/scenes/provenance.json").exists()


@pytest.fixture(scope="session")
def smoke(tmp_path_factory):
    """A run of every notebook -> (its run folder, parameters)."""
    root = tmp_path_factory.mktemp("smoke")
    shutil.copytree(NOTEBOOKS, root / "notebooks", ignore=shutil.ignore_patterns("*.ipynb"))
    values = {**PROFILES["smoke"], "profile": "smoke", **SMALLER}
    values["variants"] = [*STUDENTS, "unfinished-s0"]
    matplotlib.use("agg")
    exported = root / "runs/smoke/deploy/onnx"
    with pytest.MonkeyPatch.context() as patch:
        for name in STORY:
            if name == "07_search":  # it exports again what 03 has exported
                copy = lambda model, folder: shutil.copytree(exported, folder)  # noqa: E731
                patch.setattr("jettclip.deploy.export.export", copy)
            students = STUDENTS if name == "02_train" else {None: {}}
            for variant, changed in students.items():
                execute(root, name, **values, variant=variant, **changed)
    return root, values


def read(smoke, name, **columns):
    """Rows of a result table in which the columns have these values."""
    table = pd.read_csv(smoke[0] / "runs/smoke/results" / name, keep_default_na=False)
    for column, value in columns.items():
        table = table[table[column] == value]
    return table


def test_every_model_has_intervals_and_comparisons_are_corrected(smoke):
    rows = read(smoke, "retrieval.csv", task="long", metric="t2i_r10")
    assert list(rows.model) == ["CLIP at 77 tokens", "teacher", *STUDENTS]
    assert ((rows.low <= rows.value) & (rows.value <= rows.high)).all()
    rows = read(smoke, "differences.csv", task="long", metric="t2i_r10")
    assert list(rows.model) == list(STUDENTS)[1:] and set(rows.against) == {"none-s0"}
    assert (rows.p <= rows.p_holm).all() and rows.p_holm.max() <= min(1, 2 * rows.p.max())


def test_a_77_token_model_has_to_guess_what_it_does_not_read(smoke):
    late = read(smoke, "details.csv", attribute="all", part="from 77").set_index("model").value
    assert late["CLIP at 77 tokens"] == late["fd-long-context_length77-s0"] == 0.5


def test_folding_and_export_change_nothing_but_rounding(smoke):
    fold = read(smoke, "fold.csv").iloc[0]
    assert max(fold.image_max_difference, fold.text_max_difference) < 1e-4
    layers = read(smoke, "layers.csv").set_index("part")[["branches layers", "folded layers"]]
    assert list(layers.loc["first RepMixer"]) == [8, 4]  # four batch norms fold away
    assert list(layers.loc["attention 1"]) == [6, 6]  # norms, attention and the MLP have two each
    drift = read(smoke, "drift.csv").set_index("backend")
    assert drift.text_max_difference["onnxruntime"] < 1e-5 and "onnxruntime-int8" in drift.index
    assert (smoke[0] / "runs/smoke/search/found.svg").exists()


def test_an_unfinished_student_is_named_and_left_out(smoke):
    assert list(read(smoke, "setup.csv").failed) == ["unfinished-s0"]
    assert set(read(smoke, "history.csv").model) == set(STUDENTS)
    failures, geometry = read(smoke, "failures.csv"), read(smoke, "geometry.csv")
    assert (failures["rank"] > 1).all() and len(failures)
    assert geometry.value.between(-1, 1).all()
    perturbed = read(smoke, "perturbed.csv", metric="t2i_r1", perturbation="first removed")
    assert list(perturbed.model) == ["CLIP at 77 tokens", "teacher", *STUDENTS]


def test_the_cells_of_02_train_what_a_job_file_trains(smoke, monkeypatch):
    root, values = smoke
    run = root / "runs/smoke"
    monkeypatch.setattr(train, "start", lambda job, n: train.run(json.loads(Path(job).read_text())))
    students = []
    for processes in (1, 2):
        variant = f"start-{processes}"
        changed = {"method": "fd", "stretch": "exact", "start_steps": 1}
        execute(root, "02_train", **values, variant=variant, processes=processes, **changed)
        assert (run / variant / "job.json").exists() == (processes > 1)
        students.append(load_folder(run / variant / "student").state_dict())
    from_cells, from_job = students
    assert all(from_cells[name].equal(from_job[name]) for name in from_job)


def test_the_teachers_that_are_named_teach_and_no_others(smoke):
    """The cache of a teacher that was named once is still there."""
    root, values = smoke
    run = root / "runs/smoke"
    shutil.copytree(run / "teacher/cache", run / "teacher/cache-second")
    for teachers in ({}, {"second": "second.pt"}):
        changed = {"variant": f"teachers{len(teachers)}", "method": "fd", "steps": 1}
        execute(root, "02_train", **values | changed, more_teachers=teachers)
        settings = json.loads((run / changed["variant"] / "config.json").read_text())
        assert len(settings["teachers"]) == 1 + len(teachers)


def test_photographs_get_the_captions_that_their_teacher_ranks_first(smoke, tmp_path, monkeypatch):
    for folder in ("teacher", "data"):
        shutil.copytree(smoke[0] / "runs/smoke" / folder, tmp_path / "runs/smoke" / folder)
    (tmp_path / "notebooks").mkdir()
    for split in ("train", "val", "test"):
        table = pd.read_parquet(path := tmp_path / f"runs/smoke/data/{split}.parquet")
        table.assign(captions=table.long.map(lambda caption: [caption])).to_parquet(path)
    photos = table.head(2).rename(columns={"key": "filename"})
    photos.to_parquet(tmp_path / "photos.parquet")
    texts = features.FeatureCache.open(tmp_path / "runs/smoke/teacher/cache").long[[7, 3], 0]
    monkeypatch.setattr(evaluate, "embed_images", lambda *_: torch.from_numpy(texts).float())
    execute(tmp_path, "label_photos", profile="smoke", photos=str(tmp_path / "photos.parquet"))
    root = tmp_path / "runs/labelled-data"
    train, val = (data.load_pairs("flickr8k", root, split) for split in ("train", "val"))
    known = pd.read_parquet(tmp_path / "runs/smoke/data/train.parquet")
    assert train.key.tolist() == [*known.key, *photos.filename] and len(val)
    assert [*train.captions][-2:] == [*known.captions.iloc[[7, 3]]]
    assert train.image.tolist()[-2:] == photos.image.tolist()


def test_photographs_of_ones_own_and_the_others(table, tmp_path):
    """Of one data set, a folder that the source `folder` reads, and Flickr8k's layout again."""
    captions = [["A Dog runs.", "It jumps."], ["A cat."]] * (len(table) // 2)
    known = pd.DataFrame({"image": table.image[: len(captions)], "captions": captions})
    known["filename"] = [f"{i}.jpg" for i in known.index]
    for split in ("train", "val", "test"):
        known.to_parquet(tmp_path / f"flickr8k_128px_{split}.parquet")
    (tmp_path / "notebooks").mkdir()
    execute(tmp_path, "own_photos", data_root=str(tmp_path))
    folder = tmp_path / "runs/own-photos"
    own, others = data.load_pairs("folder", folder), data.load_pairs("flickr8k", folder / "others")
    assert [Path(image).name for image in own.image] == [*known.filename[::2]]
    assert {*own.long.map(len)} == {21} and {*own.short} == {"A Dog runs", "It jumps"}
    assert [*others.key] == [*known.filename[1::2]] and {*others.long} == {"A cat."}
