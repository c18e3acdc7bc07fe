"""Files whole or absent, progress lines, provenance on any machine."""

import pandas as pd
import pytest

from jettclip import utils


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a/t.csv"
    utils.save_csv(pd.DataFrame({"a": [1 / 3, 1e-9], "b": [1, 2]}), path)

    def fail(path):
        path.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        utils.write_then_rename(path, fail)
    assert [*path.parent.iterdir()] == [path]
    assert path.read_text() == "a,b\n0.333333,1\n1e-09,2\n"  # six digits


@pytest.mark.parametrize("word, found", [("FD", "fd"), ("rD", "rd"), ("longclip-b", "LongCLIP-B")])
def test_the_nearest_name_ignores_case(word, found):
    error = utils.nearest(word, ["rd", "crd", "fd", "LongCLIP-L", "LongCLIP-B"], "name")
    assert error.startswith(f"name {word!r} is unknown: did you mean {found!r}?")
    assert utils.nearest(7, [], "name") == "name 7 is unknown: Known: none"


def test_what_is_printed_cannot_control_the_terminal():
    text = "a\x1b[31m\r\n\u2028\u202e\udcff é\u00a0犬"
    assert utils.shown(text) == "a\\x1b[31m\\r\\n\\u2028\\u202e\\udcff é\u00a0犬"


def test_of_many_names_the_nearest_are_listed():
    error = utils.nearest("ViT-B-33", [f"ViT-B-{i}" for i in range(32, 80)], "model")
    assert "did you mean 'ViT-B-3" in error and error.endswith("... (48 in all)")
    assert error.count("ViT-B-") <= 7


def test_progress_reports_once_a_minute(monkeypatch):
    """Items of 25 seconds each, after 10 that were done before."""
    now, lines = 0, []
    monkeypatch.setattr(utils.time, "monotonic", lambda: now)
    for _ in utils.progress("abcdef", 16, "cache", start=10, report=lines.append):
        now += 25
    assert lines == ["cache: 13 of 16, about 75 s left", "cache: 16 of 16, about 0 s left"]


def test_progress_is_a_bar_in_a_notebook_and_lines_in_batch(monkeypatch):
    bars = []
    bar = lambda items, *_, disable, **k: bars.append(not disable) or items  # noqa: E731
    monkeypatch.setattr("tqdm.auto.tqdm", bar)
    monkeypatch.setitem(utils.sys.modules, "ipykernel", utils)
    for batch in ("", "1"):
        monkeypatch.setenv("TQDM_DISABLE", batch)
        assert list(utils.progress("ab", 2, "cache")) == ["a", "b"]
    assert bars == [True, False]


def test_provenance(monkeypatch):
    """Also where there is no git and no /proc."""
    keys = {"commit", "python", "torch", "cpu", "cores", "threads", "gpu", "date"}
    assert keys <= utils.provenance().keys()
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(utils.Path, "exists", lambda path: False)
    found = utils.provenance()
    assert keys <= found.keys() and found["commit"] == "unknown"
