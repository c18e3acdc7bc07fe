"""Files that are whole or absent, the nearest valid name, progress, and what produced a result."""

import difflib
import hashlib
import json
import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path

import regex


def write_json(path, value):
    """Write `value` as JSON; a reader never sees half a file."""
    text = json.dumps(value, indent=2) + "\n"
    write_then_rename(path, lambda file: file.write_text(text, "utf-8"))


def read_json(path):
    """The value of a JSON file in UTF-8."""
    return json.loads(Path(path).read_text("utf-8"))


def sha256(path):
    """SHA-256 of a file, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def absolute(path):
    """A path that a user gives: `~` expanded, absolute from where the user stands."""
    return Path(os.path.abspath(os.path.expanduser(path)))


def cache_folder():
    """The user's folder for what can be made or fetched again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "jettclip")


def require(path, notebook):
    """`path`, which `notebook` writes. Raises FileNotFoundError, which says what to run first."""
    if not path.exists():
        todo = f"first run `make report` or notebook {notebook}"
        raise FileNotFoundError(f"there is no {path}: {todo}")
    return path


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
    """An error's text: `word` is unknown, the nearest of `words` is this."""
    words = {str(known).casefold(): str(known) for known in words}
    close = difflib.get_close_matches(str(word).casefold(), words, n=5, cutoff=0.3)
    hint = f" did you mean {words[close[0]]!r}?" if close else ""
    if len(words) > 30:
        words = {key: words[key] for key in close} | {"": f"... ({len(words)} in all)"}
    return f"{what} {word!r} is unknown:{hint} Known: {', '.join(words.values()) or 'none'}"


def shown(value):
    """`value` as text that is safe to print: control characters and broken bytes are escaped."""
    return regex.sub(r"[\p{C}\p{Zl}\p{Zp}]", lambda match: ascii(match[0])[1:-1], str(value))


def save_csv(table, path):
    """Write a pandas table as CSV with 6 significant digits, carriage returns as spaces."""
    table = table.replace("\r", " ", regex=True)  # a reader ends the row at one: it is not quoted
    write_then_rename(path, lambda file: table.to_csv(file, index=False, float_format="%.6g"))


def progress(items, total, what, start=0, report=None):
    """Yield `items`, after `start` earlier ones of `total`, and show progress with the time left.

    A bar on a terminal or in JupyterLab, else, or with TQDM_DISABLE, one line a minute by `report`,
    or tqdm.write.
    """
    from tqdm import auto, tqdm  # it takes a tenth of the time in which a search starts

    report = report or tqdm.write
    seen = sys.stderr.isatty() or "ipykernel" in sys.modules
    bar = report == tqdm.write and seen and not os.environ.get("TQDM_DISABLE")
    began = shown = time.monotonic()
    for done, item in enumerate(auto.tqdm(items, what, total, initial=start, disable=not bar), 1):
        yield item
        if not bar and time.monotonic() - shown >= 60:
            shown = time.monotonic()
            left = (total - start - done) * (shown - began) / done
            report(f"{what}: {start + done} of {total}, about {left:.0f} s left")


def provenance():
    """What produced a result: commit, versions, hardware, threads, date."""
    import importlib.metadata

    import torch

    def git(command):  # by a shell: without git there is no output, and no error
        options = {"shell": True, "cwd": Path(__file__).parents[1], "capture_output": True}
        return subprocess.run(f"git {command}", **options).stdout.decode().strip()

    commit = git("rev-parse --short=12 HEAD") or "unknown"
    if git("status --porcelain -uno -- ':!results'"):  # each run rewrites results
        commit += "-dirty"
    packages = ("torch", "torchvision", "timm", "open_clip_torch", "numpy", "pandas")
    versions = {package: importlib.metadata.version(package) for package in packages}
    cpuinfo = Path("/proc/cpuinfo")  # on Linux
    text = cpuinfo.read_text("utf-8") if cpuinfo.exists() else ""
    model = re.search("model name.*: (.+)", text)
    cpu = {"cpu": model[1] if model else platform.processor(), "cores": os.cpu_count()}
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    hardware = {**cpu, "threads": torch.get_num_threads(), "gpu": gpu}
    date = {"date": time.strftime("%Y-%m-%d", time.gmtime())}
    return {"commit": commit, "python": platform.python_version(), **versions, **hardware, **date}
