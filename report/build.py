"""Builds the report and counts the models.

python report/build.py scenes    # results/ -> report/report.pdf; it and the executed notebooks of
                                 # runs/scenes as a web site -> report/build/index.html
python report/build.py smoke     # runs/smoke/results -> report/build/report-smoke.pdf, and the site
python report/build.py --models  # size and cost of each model -> results/models.csv (two minutes)
"""

import argparse
import base64
import hashlib
import html
import io
import json
import re
import shutil
import sys
from pathlib import Path

from jettclip.utils import nearest, save_csv, write_then_rename

ROOT = Path(__file__).resolve().parents[1]
# The results that report.typ shows; it says which of the others are missing.
NEEDED = ("scenes", "flickr8k")
OPTIONAL = ("collage", "flickr8k_seeds", "flickr8k_methods", "flickr8k_noise", "labelled", "own")
OPTIONAL += ("ablation", "debias", "settings", "sharegpt4v")
BENCHMARKS = ("data", "training", "int8", "gpu")
# JupyterLab's look, without the scripts that a browser would have to fetch, and with a way back.
PAGE = """{% extends "lab/index.html.j2" %}
{% block html_head_js %}{% endblock %}
{% block html_head_js_mathjax %}{% endblock %}
{% block html_head_js_mermaidjs %}{% endblock %}
{% block body_header %}{{ super() }}{% if resources.back %}<a href="../index.html">All notebooks</a>
{% endif %}{% endblock %}"""


def inputs(smoke=False):
    """The inputs of report.typ: folder of each result, names of all files, the timed machine.

    smoke: every folder is that of the smoke profile. Raises FileNotFoundError for missing results.
    """
    folders = {}
    for name in (*NEEDED, *OPTIONAL, *BENCHMARKS):
        folder = "runs/smoke/results" if smoke else f"results/{name}"
        if (ROOT / folder / "provenance.json").exists():  # a run writes this file last
            folders[name] = f"/{folder}"
    if missing := [name for name in NEEDED if name not in folders]:
        runs = [f"make report PROFILE={name}" for name in (["smoke"] if smoke else missing)]
        raise FileNotFoundError(f"the report lacks results: run {' and '.join(runs)}")
    paths = [path for folder in {*folders.values()} for path in ROOT.glob(f"{folder[1:]}/*.*")]
    files = json.dumps(sorted(f"/{path.relative_to(ROOT)}" for path in paths))
    machines = sorted(path.stem for path in ROOT.glob("results/latency/*.csv"))
    latency = {"latency": f"/results/latency/{machines[0]}"} if machines else {}
    return {**folders, **latency, "files": files}


def fingerprint(inputs):
    """Hash of the report's text and of all results that it may show; the PDF holds it."""
    digest = hashlib.sha256()
    shown = [*json.loads(inputs["files"]), "/results/models.csv", f"{inputs.get('latency')}.csv"]
    for path in ("/report/report.typ", "/report/references.bib", *shown):
        if (ROOT / path[1:]).exists():
            digest.update((ROOT / path[1:]).read_bytes())
    return digest.hexdigest()


def pdf(profile):
    """Compile report/report.typ, whose numbers all come from results -> path of the PDF."""
    import typst

    smoke = profile == "smoke"
    output = ROOT / "report/build" / ("report-smoke.pdf" if smoke else "report.pdf")
    values = inputs(smoke)
    options = {"root": ROOT, "sys_inputs": {**values, "fingerprint": fingerprint(values)}}
    write_then_rename(
        output, lambda path: typst.compile(ROOT / "report/report.typ", output=path, **options)
    )
    if not smoke:
        shutil.copy(output, ROOT / "report/report.pdf")  # the committed one
    return output


def executed(notebook):
    """Whether papermill ran all cells of the notebook without an error."""
    cells = (cell.metadata.get("papermill", {}) for cell in notebook.cells)
    return all(cell.get("exception") is False for cell in cells)  # None: not run


def formula(renderer, latex):
    """A formula as a picture, since no browser draws LaTeX by itself -> an element of HTML."""
    from matplotlib import rc_context
    from matplotlib.mathtext import math_to_image

    svg, text = io.BytesIO(), html.escape(latex)
    try:
        with rc_context({"svg.fonttype": "path", "mathtext.fontset": "cm", "font.size": 12}):
            depth = math_to_image(f"${' '.join(latex.split())}$", svg, format="svg")
    except ValueError:  # Matplotlib knows the most frequent commands of LaTeX, not all
        return f"<code>{text}</code>"
    data = base64.b64encode(svg.getvalue()).decode()
    style = f"vertical-align: {-depth:.1f}pt"
    return f'<img src="data:image/svg+xml;base64,{data}" alt="{text}" style="{style}">'


def pages(profile):
    """The executed notebooks of `profile` as pages of report/build, and an index -> their paths."""
    import nbformat
    from nbconvert import HTMLExporter
    from nbconvert.filters.markdown_mistune import IPythonRenderer

    IPythonRenderer.inline_math = IPythonRenderer.block_math = formula
    exporter, build, written = HTMLExporter(raw_template=PAGE), ROOT / "report/build", []
    exporter.embed_images = True
    shutil.rmtree(build / profile, ignore_errors=True)  # pages of students that are no more

    def write(path, notebook, **resources):
        title = notebook.cells[0].source.partition("\n")[0].lstrip("# ")
        resources["metadata"] = {"name": title, "path": str(ROOT)}
        text, _ = exporter.from_notebook_node(notebook, resources)
        write_then_rename(path, lambda page: page.write_text(text, "utf-8"))
        written.append(path)

    for path in sorted((ROOT / "runs" / profile).glob("*/0?_*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        if executed(notebook):
            name = f"{path.stem}-{path.parent.name}" if path.stem == "02_train" else path.stem
            write(build / profile / f"{name}.html", notebook, back=True)
    links = ["## The report, and the notebooks as they ran"]
    links += [f"[{path.name}]({path.name})" for path in sorted(build.glob("*.pdf"))]
    for folder in sorted({path.parent for path in build.glob("*/*.html")}):
        links.append(f"### {folder.name}")
        for page in sorted(folder.glob("*.html")):
            title = html.unescape(re.search("<title>(.*)</title>", page.read_text("utf-8"))[1])
            variant = page.stem.removeprefix("02_train-") if "02_train-" in page.stem else ""
            links.append(f"* [{title}]({folder.name}/{page.name}) {variant}")
    index = nbformat.read(ROOT / "notebooks/README.ipynb", as_version=4)
    index.cells[1].source = "\n\n".join(links)
    index.cells[2].source = index.cells[2].source.replace("](../", "](")  # the figure
    write(build / "index.html", index)
    return written


def count_models(names):
    """Parameters (M) and multiply-accumulates (10^9) of folded models -> table, a row per model."""
    import pandas as pd

    from jettclip.deploy.timing import gmacs, parameters_m
    from jettclip.models import create_model, reparameterize

    columns = ["model", "image_params_m", "text_params_m", "image_gmacs", "text_gmacs"]
    columns += ["image_size", "text_tower", "context"]
    rows = []
    for name in names:
        model = reparameterize(create_model(name))  # random weights
        counts = parameters_m(model.visual), parameters_m(model.text), *gmacs(model)
        settings = model.image_size, model.config["text_tower"], model.context_length
        rows.append((name, *counts, *settings))
    return pd.DataFrame(rows, columns=columns)


def main():
    parser = argparse.ArgumentParser(usage=__doc__)
    job = parser.add_mutually_exclusive_group(required=True)
    job.add_argument("profile", nargs="?", help="a file of notebooks/profiles, without .yaml")
    job.add_argument("--models", action="store_true", help="count the models")
    args = parser.parse_args()
    try:
        if args.models:
            from jettclip.models import MODELS

            written = [ROOT / "results/models.csv"]
            ours = sorted(name for name in MODELS if MODELS[name]["text_tower"] != "open_clip")
            save_csv(count_models(ours), written[0])
        else:
            profiles = sorted(path.stem for path in ROOT.glob("notebooks/profiles/*.yaml"))
            if args.profile not in profiles:
                raise ValueError(nearest(args.profile, profiles, "profile"))
            written = [pdf(args.profile), *pages(args.profile)]
    except (OSError, RuntimeError, ValueError) as error:
        sys.exit(f"error: {error}")
    for path in written:
        print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
