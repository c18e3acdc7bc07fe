"""From result rows to the PDF, its provenance, and the tables of README.md.

python -m jettclip.report pdf --profile scenes      # report/report.typ -> report/build/report.pdf
python -m jettclip.report models                    # counts every model -> results/models.csv (two minutes)
python -m jettclip.report readme                    # results/ -> the tables in README.md
"""

import argparse
import json
import re
import sys
from pathlib import Path

import pandas as pd

from .figures import label
from .files import write_then_rename
from .pipeline import report_pdf, results_folder

ROOT = Path(__file__).resolve().parent.parent
# The profiles that the report tells of; it says which of the optional ones were not run.
NEEDED, OPTIONAL = (
    ("scenes", "flickr8k"),
    ("collage", "ablation", "settings", "flickr8k_settings", "data", "training", "sharegpt4v"),
)


def pdf(profile):
    """Compile report/report.typ; its numbers come from results/*/*.csv (for `smoke`, all from runs/smoke/results)."""
    import typst

    folders = {
        name: results_folder(profile if profile == "smoke" else name)
        for name in (*NEEDED, *OPTIONAL)
    }
    folders = {
        name: folder
        for name, folder in folders.items()
        if (ROOT / folder / "provenance.json").exists()
    }
    if missing := sorted({*NEEDED} - {*folders}):
        raise FileNotFoundError(
            f"the report needs results/{' and results/'.join(missing)}: "
            "run `make report PROFILE=...` for it first"
        )
    files = [
        f"/{path.relative_to(ROOT)}"
        for folder in folders.values()
        for path in sorted((ROOT / folder).iterdir())
    ]
    inputs = {
        **{name: f"/{folder}" for name, folder in folders.items()},
        "files": json.dumps(files),
    }
    if machine := measured_machine():
        inputs["latency"] = f"/results/latency/{machine}"
    output = ROOT / report_pdf(profile)
    write_then_rename(
        output,
        lambda path: typst.compile(
            ROOT / "report/report.typ", output=path, root=ROOT, sys_inputs=inputs
        ),
    )
    return output


def measured_machine():
    """The machine (the first by name) whose results/latency/<machine>.csv the report and README.md show, or None."""
    return min((path.stem for path in ROOT.glob("results/latency/*.csv")), default=None)


def html(profile):
    """Every executed notebook of `profile` as a page of report/build/<profile>/ -> the pages."""
    import nbformat
    from nbconvert import HTMLExporter

    exporter, pages = HTMLExporter(), []
    for path in sorted((ROOT / "runs" / profile).glob("*/0?_*.ipynb")):
        if path.name.endswith((".partial.ipynb", ".failed.ipynb")):
            continue
        name = path.stem if path.stem != "02_train" else f"02_train-{path.parent.name}"
        page, _ = exporter.from_notebook_node(
            nbformat.read(path, as_version=4), {"metadata": {"name": name}}
        )
        pages.append(ROOT / "report/build" / profile / f"{name}.html")
        write_then_rename(pages[-1], lambda temporary: temporary.write_text(page, encoding="utf-8"))
    return pages


def count_models(names):
    """Size and cost of models, random weights, folded -> table: one row per model."""
    from .deploy import gmacs, parameters_m
    from .models import create_model, reparameterize

    rows = []
    for name in names:
        model = reparameterize(create_model(name))
        image, text = gmacs(model)
        rows.append(
            {
                "model": name,
                "image_params_m": parameters_m(model.visual),
                "text_params_m": parameters_m(model.text),
                "image_gmacs": image,
                "text_gmacs": text,
                "image_size": model.image_size,
                "text_tower": model.config["text_tower"],
                "context": model.context_length,
            }
        )
    return pd.DataFrame(rows)


def markdown(table, heads):
    """A Markdown table of the columns that `heads` {column: head} names."""
    rows = [
        [f"{v:.3g}" if isinstance(v, float) else str(v) for v in row]
        for row in table[list(heads)].itertuples(index=False)
    ]
    return "\n".join(
        "| " + " | ".join(row) + " |" for row in [list(heads.values()), ["---"] * len(heads), *rows]
    )


def readme_tables():
    """{marker: Markdown} for README.md, from results/ alone."""

    def result(profile, metric):
        table = pd.read_csv(ROOT / f"results/{profile}/retrieval.csv").query(
            "task == 'long' and metric == @metric"
        )
        value = table.apply(lambda row: f"{row.value:.3f} [{row.low:.3f}, {row.high:.3f}]", axis=1)
        return table.assign(value=value, model=table.model.map(label)).set_index("model")

    scenes, flickr = result("scenes", "t2i_r1"), result("flickr8k", "t2i_r10")
    late = pd.read_csv(ROOT / "results/scenes/details.csv").query(
        "attribute == 'all' and part == 'from 77'"
    )
    late = late.assign(model=late.model.map(label)).set_index("model").value.map("{:.2f}".format)
    results = pd.DataFrame(
        {"context": scenes.context, "scenes": scenes.value, "late": late, "flickr8k": flickr.value}
    )
    heads = {
        "model": "model",
        "context": "reads (tokens)",
        "scenes": "scenes: long caption finds its image first (R@1 of 1,000)",
        "late": "detail named after token 77 (chance 0.5)",
        "flickr8k": "Flickr8k: image among the first ten (R@10 of 1,000)",
    }
    models = pd.read_csv(ROOT / "results/models.csv")
    counts = {
        "model": "model",
        "image_params_m": "image, M parameters",
        "text_params_m": "text, M parameters",
        "image_gmacs": "image, GMAC",
        "text_gmacs": "text, GMAC",
        "image_size": "pixels",
        "text_tower": "text tower",
        "context": "tokens",
    }
    latency = "Not measured yet: `make bench-latency`."
    if machine := measured_machine():
        table = pd.read_csv(ROOT / f"results/latency/{machine}.csv", keep_default_na=False)
        table = table[
            table.model.isin(["JettCLIP-S0", "MobileCLIP-S0 at 248"])
            & (table.captions != "12 to 20 tokens")
        ]
        table = table.assign(column=table.tower + table.batch.map(" {}".format))
        heads_of = {
            f"{tower} {batch}": f"{what}, batch {batch}"
            for tower, what in (
                ("image", "image"),
                ("text", "long text"),
                ("both", "image + long text"),
            )
            for batch in (1, 32)
        }
        wide = table.pivot_table(
            "ratio_to_teacher", ["model", "backend"], "column", sort=False
        ).reset_index()
        latency = markdown(wide, {"model": "model", "backend": "backend", **heads_of})
    return {
        "latency": latency,
        "results": markdown(results.loc[scenes.index].fillna("–").reset_index(), heads),
        "models": markdown(models, counts),
    }


def readme(text):
    """README.md's `text` with its tables made anew."""
    for marker, table in readme_tables().items():
        text, found = re.subn(
            rf"(<!-- {marker} -->\n).*?(<!-- /{marker} -->)",
            lambda m: f"{m[1]}{table}\n{m[2]}",
            text,
            flags=re.S,
        )
        if found != 1:
            raise ValueError(
                f"README.md needs one pair of markers <!-- {marker} --> and <!-- /{marker} -->, each on its own line"
            )
    return text


def main():
    parser = argparse.ArgumentParser(
        prog="python -m jettclip.report", description=__doc__.splitlines()[0]
    )
    commands = parser.add_subparsers(dest="command", required=True)
    compile_pdf = commands.add_parser(
        "pdf", help="compile the report, and the executed notebooks as HTML"
    )
    compile_pdf.add_argument(
        "--profile",
        default="scenes",
        help="smoke reads runs/smoke/results in place of results/scenes",
    )
    commands.add_parser("models", help="count every model into results/models.csv")
    commands.add_parser("readme", help="make the tables in README.md anew")
    args = parser.parse_args()
    try:
        if args.command == "pdf":
            pages = html(args.profile)
            print(
                f"wrote {pdf(args.profile)}"
                + (f" and {len(pages)} notebooks to {pages[0].parent}" if pages else "")
            )
        elif args.command == "models":
            from .models import MODELS

            save_csv(count_models(sorted(MODELS)), ROOT / "results/models.csv")
        else:
            path = ROOT / "README.md"
            text = readme(path.read_text())
            write_then_rename(path, lambda temporary: temporary.write_text(text))
    except (FileNotFoundError, RuntimeError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
