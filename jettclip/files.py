"""Files that are either whole or not there."""
import json
import os
from pathlib import Path


def write_json(path, value):
    """Write JSON under a temporary name, then rename: a reader never sees half a file."""
    write_then_rename(path, lambda temporary: temporary.write_text(json.dumps(value, indent=2) + "\n"))


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
