"""README.md: its headline numbers are those of results/, its links lead on, its example runs."""

import re
from pathlib import Path

import pandas as pd
import pytest

from jettclip.checkpoints import save_folder
from jettclip.models import create_model

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
