"""Builds the report and counts the models.

python report/build.py scenes    # results/ -> report/build/report.pdf, and the executed notebooks
                                 # in runs/scenes -> report/build/scenes/*.html
python report/build.py smoke     # runs/smoke/results -> report/build/report-smoke.pdf, and pages
python report/build.py --models  # size and cost of each model -> results/models.csv (two minutes)
"""

import argparse
import json
import sys
from pathlib import Path

from jettclip.utils import nearest, save_csv, write_then_rename

ROOT = Path(__file__).resolve().parents[1]
# The results that report.typ shows; it says which of the others are missing.
NEEDED = ("scenes", "flickr8k")
OPTIONAL = ("collage", "ablation", "settings", "flickr8k_settings", "sharegpt4v")
BENCHMARKS = ("data", "training")


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
    files = [path for folder in {*folders.values()} for path in ROOT.glob(f"{folder[1:]}/*")]
    files = json.dumps(sorted(f"/{path.relative_to(ROOT)}" for path in files))
    machines = sorted(path.stem for path in ROOT.glob("results/latency/*.csv"))
    latency = {"latency": f"/results/latency/{machines[0]}"} if machines else {}
    return {**folders, **latency, "files": files}


def pdf(profile):
    """Compile report/report.typ, whose numbers all come from results -> path of the PDF."""
    import typst

    smoke = profile == "smoke"
    output = ROOT / "report/build" / ("report-smoke.pdf" if smoke else "report.pdf")
    options = {"root": ROOT, "sys_inputs": inputs(smoke)}
    write_then_rename(
        output, lambda path: typst.compile(ROOT / "report/report.typ", output=path, **options)
    )
    return output


def executed(notebook):
    """Whether papermill ran all cells of the notebook without an error."""
    cells = (cell.metadata.get("papermill", {}) for cell in notebook.cells)
    return all(cell.get("exception") is False for cell in cells)  # None: not run


def html(profile):
    """The executed notebooks of `profile` as pages of report/build/<profile>/ -> their paths."""
    import nbformat
    from nbconvert import HTMLExporter

    exporter, pages = HTMLExporter(), []
    for path in sorted((ROOT / "runs" / profile).glob("*/0?_*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        if executed(notebook):
            name = f"{path.stem}-{path.parent.name}" if path.stem == "02_train" else path.stem
            text, _ = exporter.from_notebook_node(notebook, {"metadata": {"name": name}})
            pages.append(ROOT / "report/build" / profile / f"{name}.html")
            write_then_rename(pages[-1], lambda page, text=text: page.write_text(text, "utf-8"))
    return pages


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
            save_csv(count_models(sorted(MODELS)), written[0])
        else:
            profiles = sorted(path.stem for path in ROOT.glob("notebooks/profiles/*.yaml"))
            if args.profile not in profiles:
                raise ValueError(nearest(args.profile, profiles, "profile"))
            written = [pdf(args.profile), *html(args.profile)]
    except (OSError, RuntimeError, ValueError) as error:
        sys.exit(f"error: {error}")
    for path in written:
        print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
