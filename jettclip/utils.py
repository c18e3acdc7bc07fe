"""Files that are either whole or not there."""

import difflib
import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path


def write_json(path, value):
    """Write JSON under a temporary name, then rename: a reader never sees half a file."""
    write_then_rename(
        path, lambda temporary: temporary.write_text(json.dumps(value, indent=2) + "\n")
    )


def write_then_rename(path, write):
    """Call `write(temporary path)`, then rename the result to `path`."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp{os.getpid()}{path.suffix}")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def nearest(word, words, what):
    """A ValueError's text for an unknown `word`, naming the nearest of `words`."""
    close = difflib.get_close_matches(str(word), [str(w) for w in words], n=1, cutoff=0.3)
    hint = f"did you mean {close[0]!r}?" if close else ""
    return f"{what} {word!r} is unknown: {hint} Known: {', '.join(map(str, words))}".replace(
        ":  ", ": "
    )


def save_csv(table, path):
    """Write `table` as CSV with 6 significant digits (under a temporary name, then renamed)."""
    write_then_rename(
        path, lambda temporary: table.to_csv(temporary, index=False, float_format="%.6g")
    )


def provenance():
    """What produced a result: commit, versions, hardware, threads."""

    def git(*arguments):
        return subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True
        ).stdout.strip()

    changed = git(
        "status", "--porcelain", "--untracked-files=no", "--", ".", ":!results"
    )  # results change by being made anew
    import pandas as pd
    import torch

    packages = ("torch", "torchvision", "timm", "open_clip_torch", "numpy", "pandas")
    cpu = [line.split(":")[1].strip() for line in _cpu_lines() if line.startswith("model name")]
    return {
        "commit": git("rev-parse", "--short=12", "HEAD") + ("-dirty" if changed else "")
        or "unknown",
        "python": platform.python_version(),
        **{package: importlib.metadata.version(package) for package in packages},
        "cpu": cpu[0] if cpu else platform.processor(),
        "cores": len(cpu) or None,
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "date": pd.Timestamp.now(tz="UTC").strftime("%Y-%m-%d"),
    }


def _cpu_lines():
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []
