"""README.md and report.typ: their numbers are those of results/ and of the code, links lead on."""

import re
import tomllib
from pathlib import Path

import pandas as pd
import pytest

from jettclip.checkpoints import save_folder
from jettclip.datasets import collage, scenes
from jettclip.models import MODELS, create_model
from jettclip.text import CONTEXT

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
NUMBERS = re.findall(r'\[([\d.]+)\]\((\S+\.csv) "(.+?)"\)', README)


@pytest.mark.parametrize("printed, file, cell", NUMBERS, ids=[cell for *_, cell in NUMBERS])
def test_number_is_in_the_table(printed, file, cell):
    """A number links to its table; the link's title names the row and then the column."""
    *conditions, column = cell.split("; ")
    table = pd.read_csv(ROOT / file)
    for name, value in (condition.split(": ") for condition in conditions):
        table = table[table[name].astype(str) == value]
    assert len(table) == 1, f"{file} has {len(table)} rows with {conditions}"
    assert f"{table[column].iloc[0]:.{len(printed.partition('.')[2])}f}" == printed


def result(profile, name):
    return pd.read_csv(ROOT / f"results/{profile}/{name}.csv")


def tokens(profile):
    lengths = result(profile, "lengths").query("long > 0").tokens
    return lengths.min(), lengths.max()


def minutes(profile):
    """What the profile's comment says; training alone took less, of two runs at a time."""
    comment = (ROOT / f"notebooks/profiles/{profile}.yaml").read_text(encoding="utf-8")
    said = int(re.search(r"(\d+)\s(?:# )?minutes", comment)[1])
    if (ROOT / f"results/{profile}").exists():
        runs = pd.concat([result(profile, name) for name in ("history", "teacher")])
        assert runs.groupby("model").seconds.max().sum() / 2 < 60 * said
    return said


def setting(notebook, name):
    text = (ROOT / f"notebooks/{notebook}.ipynb").read_text(encoding="utf-8")
    return re.search(rf"\b{name}(?:, BATCH)? = (\d+)", text)[1]


MODEL, MAKEFILE = ROOT / "results/flickr8k/model", (ROOT / "Makefile").read_text("utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
PYTHONS = [line.rpartition(" ")[2] for line in PROJECT["classifiers"] if ":: Python ::" in line]
CLIP, TINY = MODELS["MobileCLIP-S0"]["text_cfg"], MODELS["JettCLIP-T"]
PHOTOGRAPHS = ("flickr8k", "flickr8k_methods", "flickr8k_noise")
PHOTOGRAPHS += ("lite1", "labelled", "own_start", "own")
FACTS = [  # words of README.md, and their numbers
    ("to read {}-token captions", CONTEXT),
    ("A model of {} tokens guesses", CLIP["context_length"]),
    ("Python {} to {}, two cores, up to {} minutes", PYTHONS[0], PYTHONS[-1], minutes("scenes")),
    ("finds its image first among {:,}", result("scenes", "captions").test[0]),
    ("among the first ten of {:,}", result("flickr8k", "captions").test[0]),
    ("the model, of {:.0f} MB, is in", sum(f.stat().st_size for f in MODEL.iterdir()) / 1e6),
    ("pretrained parts ({} MB more)", re.search(r"(\d+) MB", MAKEFILE)[1]),
    ("the spot, captions of {} to {} tokens | {} min", *tokens("scenes"), minutes("scenes")),
    ("toy size | {} min", minutes("smoke")),
    ("add `THREADS=1` | {}, {}, {} min", *map(minutes, ("ablation", "settings", "debias"))),
    ("dogs | {} min; hours, {}, {} min; {}, {} min; {}, {} min", *map(minutes, PHOTOGRAPHS)),
    ("picture, captions of {} to {} tokens | {} min", *tokens("collage"), minutes("collage")),
    ("(77 tokens), `JettCLIP-S0` ({})", CONTEXT),
    ("`MobileCLIP-S0` ({} tokens)", CLIP["context_length"]),
]
FACTS_OF_REPORT = [
    ("{} to {} objects of several", min(scenes.COUNTS), max(scenes.COUNTS)),
    ("has {} to {} photographs", min(collage.COUNTS), max(collage.COUNTS)),
    ("on features of {} numbers", setting("benchmarks/training", "width")),
    ("synthetic features, three of {} numbers", setting("benchmarks/data", "WIDTH")),
]


def test_every_other_number_is_right():
    """README.md has one more number than links, code and facts: Long-CLIP-B's time is 1."""
    prose, report = README, (ROOT / "report/report.typ").read_text(encoding="utf-8")
    assert [w for w, *numbers in FACTS_OF_REPORT if w.format(*numbers) not in report] == []
    for words, *numbers in FACTS:
        assert words.format(*numbers) in README
        prose = prose.replace(words.format(*numbers), "")
    prose = re.sub(r"(?s)```.*?```|`[^`]*`|\[[^]]*\]\([^)]*\)", "", prose)
    assert re.findall(r"(?<![\w-])\d[\d.,]*", prose) == ["1"]
    counts = pd.read_csv(ROOT / "results/models.csv").set_index("model").loc["JettCLIP-T"]
    embeddings = TINY["text_cfg"]["vocab_size"] * TINY["text_cfg"]["width"] / 1e6
    assert 0.5 < counts.image_params_m + counts.text_params_m - embeddings < 2  # a million


def test_links_and_length():
    links = re.findall(r"\]\(([^)#\s]+)", README)
    missing = [link for link in links if "://" not in link and not (ROOT / link).exists()]
    assert not missing and len(NUMBERS) >= 3 and len(README.splitlines()) <= 120


def test_library_example(tmp_path, monkeypatch, table, capsys):
    monkeypatch.chdir(tmp_path)
    save_folder(create_model("JettCLIP-T"), "runs/scenes/fd-both-s0/student")
    Path("photo.jpg").write_bytes(table.image[0])
    exec(re.search(r"```python\n(.+?)```", README, re.DOTALL)[1], {})
    assert "tensor" in capsys.readouterr().out
