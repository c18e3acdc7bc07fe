"""The report: its PDF from the committed results, pages of notebooks, counts of the models."""

import html
import importlib.util
import json
import re
import shutil
from itertools import product
from pathlib import Path

import nbformat
import pandas as pd
import pytest
import typst
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from nbformat import v4
from test_plots import NASTY, plots

from jettclip.models import MODELS
from jettclip.utils import save_csv

ROOT = Path(__file__).resolve().parents[1]
spec = importlib.util.spec_from_file_location("report_build", ROOT / "report/build.py")
build = importlib.util.module_from_spec(spec)
spec.loader.exec_module(build)


FIXTURES_OK = [HealthCheck.function_scoped_fixture]


@pytest.fixture
def report(tmp_path, monkeypatch):
    """A copy of the report and the results, and a function: its elements that a selector finds."""
    for folder in ("report", "results"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=lambda *_: ["build"])
    monkeypatch.setattr(build, "ROOT", tmp_path)
    options = {"root": tmp_path}

    def found(selector):
        options["sys_inputs"] = build.inputs()
        return json.loads(typst.query(tmp_path / "report/report.typ", selector, **options))

    return tmp_path / "results", found


PARTS = ("text", "caption", "body", "child", "children")


def words(element):
    """The text of an element of the report."""
    if isinstance(element, list):
        return "".join(map(words, element))
    if not isinstance(element, dict):
        return element or ""
    space = " " if element.get("func") == "space" else ""
    return space + "".join(words(element.get(key)) for key in PARTS)


def test_every_model_is_counted():
    """After a change of a model: python report/build.py --models."""
    table = pd.read_csv(ROOT / "results/models.csv")
    ours = sorted(name for name in MODELS if MODELS[name]["text_tower"] != "open_clip")
    assert table.model.tolist() == ours
    fresh = build.count_models(["JettCLIP-T", "LongCLIP-T"]).set_index("model")
    pd.testing.assert_frame_equal(table.set_index("model").loc[fresh.index], fresh, rtol=1e-4)


def test_the_committed_pdf_is_of_the_committed_sources():
    found = build.fingerprint(build.inputs()).encode() in (ROOT / "report/report.pdf").read_bytes()
    assert found, "report/report.pdf is of other sources: python report/build.py scenes"


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder with nothing but the start page."""
    monkeypatch.setattr(build, "ROOT", tmp_path)
    (tmp_path / "notebooks").mkdir()
    shutil.copy(ROOT / "notebooks/README.ipynb", tmp_path / "notebooks")
    return tmp_path


def test_only_finished_notebooks_become_pages(site, tmp_path):
    index = tmp_path / "report/build/index.html"
    assert build.pages("tiny") == [index]
    index.with_name("report.pdf").touch()
    output = v4.new_output("execute_result", {"text/plain": "42"}, execution_count=1)
    for name, exceptions in {  # of each cell, as papermill leaves them; None: not run
        "data/00_data": (False, False),
        "fd-s0/02_train": (False,),
        "crd-s1/02_train": (False, True, None),  # failed
        "teacher/01_teacher_features": (False, None),  # killed
    }.items():
        marks = [{"papermill": {"exception": exception}} for exception in exceptions]
        cells = [v4.new_code_cell("6 * 7", outputs=[output], metadata=mark) for mark in marks]
        path = tmp_path / f"runs/tiny/{name}.ipynb"
        path.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(v4.new_notebook(cells=cells), path)
    *pages, _ = build.pages("tiny")
    names = ["00_data.html", "02_train-fd-s0.html"]
    assert pages == [tmp_path / "report/build/tiny" / name for name in names]
    assert all("42" in page.read_text(encoding="utf-8") for page in pages)
    links = re.findall('href="([^":#]+)"', index.read_text(encoding="utf-8"))
    assert links == ["report.pdf", *(f"tiny/{name}" for name in names)]


def test_a_page_loads_nothing_and_shows_formulas(site, tmp_path):
    done = {"papermill": {"exception": False}}
    text = "# Title\n\n$V'$, $\\frac{1}{2}$ and $\\nonsense$: `$HOME`\n\n$$\\sigma(\nx) < 1$$"
    path = tmp_path / "runs/tiny/data/00_data.ipynb"
    path.parent.mkdir(parents=True)
    nbformat.write(v4.new_notebook(cells=[v4.new_markdown_cell(text, metadata=done)]), path)
    (results := tmp_path / "results/scenes").mkdir(parents=True)
    shutil.copy(ROOT / "results/scenes/positions.svg", results)
    for page in build.pages("tiny"):
        page = page.read_text(encoding="utf-8")
        assert "<script" not in page and "@import" not in page
        assert {*re.findall(r"""(?:src=|<link |url\()["']?([^"')]{5})""", page)} <= {"data:"}
        pictures = re.findall('<img alt="([^"]+)" src="data:image/svg', page)
        assert pictures
        if "<title>Title</title>" in page:
            formulas = ["V'", "\\frac{1}{2}", "\\sigma(\nx) < 1"]
            assert list(map(html.unescape, pictures)) == formulas
            assert "<code>\\nonsense</code>" in page and "<code>$HOME</code>" in page


TEXT = st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1, max_size=30)


@given(texts=st.lists(TEXT, min_size=1, max_size=9))
@example(texts=NASTY[:2])
@settings(max_examples=1, deadline=None, suppress_health_check=FIXTURES_OK)
def test_text_in_pages_is_never_parsed(texts, site, tmp_path):
    """Tables and printed lines of notebooks; JupyterLab's mathematics leaves both alone."""
    plots.style()
    table = pd.DataFrame({"caption": texts})._repr_html_()
    outputs = [v4.new_output("display_data", {"text/html": table})]
    outputs += [v4.new_output("stream", text="\n".join(texts))]
    done = {"papermill": {"exception": False}}
    cell = v4.new_code_cell("captions", outputs=outputs, metadata=done, execution_count=1)
    (tmp_path / "runs/tiny/data").mkdir(parents=True, exist_ok=True)
    nbformat.write(v4.new_notebook(cells=[cell]), tmp_path / "runs/tiny/data/00_data.ipynb")
    page = build.pages("tiny")[0].read_text(encoding="utf-8")
    found = re.findall(r"(?s)<(td|pre)>(.*?)</\1>", page)
    shown = [(tag, html.unescape(text).strip()) for tag, text in found]  # the first: the code
    assert shown[1:] == [*(("td", text) for text in texts), ("pre", "\n".join(texts))]
    assert "tex2jax_ignore" in page.partition("<table")[2].partition(">")[0]


def test_the_report_compiles_from_the_committed_results(tmp_path, monkeypatch):
    """From the needed ones alone too: it says what was not run."""
    shutil.copytree(ROOT / "report", tmp_path / "report", ignore=lambda *_: ["build"])
    monkeypatch.setattr(build, "ROOT", tmp_path)
    for needed in (True, False):
        for folder in ROOT.glob("results/*/"):
            if (folder.name in build.NEEDED) == needed:
                shutil.copytree(folder, tmp_path / "results" / folder.name)
        assert build.pdf("scenes").read_bytes().startswith(b"%PDF")


def test_mistakes_and_missing_results_are_named(tmp_path, monkeypatch):
    shutil.copytree(ROOT / "notebooks/profiles", tmp_path / "notebooks/profiles")
    monkeypatch.setattr(build, "ROOT", tmp_path)
    for profile, problem in (
        ("scens", "did you mean 'scenes'"),
        ("scenes", "run make report PROFILE=scenes and make report PROFILE=flickr8k"),
        ("smoke", "run make report PROFILE=smoke$"),
    ):
        monkeypatch.setattr("sys.argv", ["build.py", profile])
        with pytest.raises(SystemExit, match=f"error: .*{problem}"):
            build.main()


@given(texts=st.lists(TEXT, min_size=4, max_size=4))
@example(texts=[*NASTY, "\r = heading\n#panic()"])
@settings(max_examples=1, deadline=None, suppress_health_check=FIXTURES_OK)
def test_text_in_the_report_is_never_parsed(texts, report):
    results, found = report
    for name, column, values in (
        ("scenes/drift", "backend", texts),
        ("flickr8k/failures", "model", texts[:1]),
        ("flickr8k/failures", "caption", texts[3:]),
        ("collage/differences", "family", texts[1:2]),
        ("data/speed", "what", texts),
    ):
        table = pd.read_csv(results / f"{name}.csv", keep_default_na=False)
        table[column] = (values * len(table))[: len(table)]
        save_csv(table, results / f"{name}.csv")
    shown = {element["text"] for element in found("raw")}
    written = pd.read_csv(results / "scenes/drift.csv", keep_default_na=False, dtype=str).backend
    assert {*written} <= shown and texts[0] in shown
    assert f"family: {texts[1]}." in words(found("figure"))


def test_the_abstract_claims_three_seeds_or_says_one(report):
    """Student's t on paired differences over three seeds or more if there are, else "one seed"."""
    results, found = report

    def abstract(**seeds):
        """Its texts on photographs and on scenes, after runs of so many seeds."""
        row = {"task": "long", "value": 0.5, "low": 0.4, "high": 0.6}
        pairs = product(("", "-T"), ("t2i_r1", "t2i_r10"))  # JettCLIP-T on photographs
        names = [{"model": f"fd-both{x}", "against": f"none{x}", "metric": y} for x, y in pairs]
        for profile, n in seeds.items():
            kept = names if profile == "flickr8k_seeds" else names[:2]
            rows = [{**row, **name, "n": n} for name in kept]
            save_csv(pd.DataFrame(rows), results / profile / "seeds.csv")
        return words(found("<abstract>")).split("On drawn scenes")

    over_three = "+50.0 [+40.0, +60.0] points over 3 seeds (Student"
    flickr, scenes = abstract(scenes=2, ablation=3, flickr8k_seeds=2)
    assert "points (one seed; over its queries" in scenes and "points (one seed;" in flickr
    assert f"fd-both gains {over_three}" in scenes and over_three not in flickr
    assert scenes.count("(one seed)") == 2  # longer training, details
    flickr, scenes = abstract(scenes=3, flickr8k_seeds=3)
    assert f"without distillation: {over_three}" in scenes and " gains " not in scenes
    assert over_three in flickr and "one seed" not in flickr


EFFICIENCY = """model,against,target,step_before,step,seconds_before,seconds,\
step_ratio_low,step_ratio_high,second_ratio_low,second_ratio_high
none-s0,none-s0,0.25,80,100,8,10,1,1,1,1
fd-both-s0,none-s0,0.25,40,60,4,6,1.33,2.5,1.33,2.5
icl-s0,none-s0,0.25,0,20,0,2,4,inf,4,inf
crd-s0,none-s0,0.25,,,,,,,,
"""


def test_tables_of_students(report):
    """Each pair once, with its family; efficiency and growth as far as they were measured."""
    results, found = report

    def table_in(elements, start):
        """Caption and rows of the only figure whose caption begins so."""
        (figure,) = (e for e in elements if words(e.get("caption")).startswith(start))
        cells = [words(cell) for cell in figure["body"]["child"]["children"]][3:]
        width = len(figure["body"]["child"]["columns"])
        return words(figure["caption"]), [cells[i : i + width] for i in range(0, len(cells), width)]

    path = results / "flickr8k/differences.csv"
    table = pd.read_csv(path)
    family = "9 comparisons, " + table.task + " " + table.metric
    save_csv(table.assign(family=family), path)
    (results / "scenes/efficiency.csv").write_text(EFFICIENCY)
    figures = found("figure")
    caption, shown = table_in(figures, "Flickr8k: paired")
    assert "p is corrected for its family: 9 comparisons, long t2i_r10." in caption
    pairs = table.drop_duplicates(["model", "against"])[["model", "against"]].values.tolist()
    assert [row[:2] for row in shown if len(row) == 5] == pairs
    assert table_in(figures, "Scenes: steps and seconds")[1][:4] == [
        ["none-s0", "0.250", "80 to 100", "8 to 10", "1", "1"],
        ["fd-both-s0", "0.250", "40 to 60", "4 to 6", "1.3 to 2.5", "1.3 to 2.5"],
        ["icl-s0", "0.250", "0 to 20", "0 to 2", "over 4.0", "over 4.0"],
        ["crd-s0", "0.250", "not reached", "–", "–", "–"],
    ]

    (results / "scenes/efficiency.csv").unlink()  # no target beyond chance
    # 1 GB of overhead and 5 bytes for a pair: a billion pairs more take 5 GB, not 6.
    scale = pd.DataFrame({"pairs": [10**3, 10**6, 2 * 10**6], "worker_mb": ""})  # not measured
    scale = scale.assign(cache_bytes=10**9 + 5 * scale.pairs, table_bytes=10**9 + 5 * scale.pairs)
    scale = scale.assign(bytes_per_pair=5, open_seconds=1, rows_per_second=1)
    save_csv(scale, results / "data/scale.csv")
    figures = found("selector(figure).or(<growth>)")
    assert not any(words(e.get("caption")).startswith("Scenes: steps and") for e in figures)
    assert "a billion pairs take 0.0 TB and 5 GB." in " ".join(map(words, figures))
