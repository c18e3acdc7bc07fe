"""Find photos by a long description, by a photo, or by both.

python -m jettclip.search PHOTOS "two dogs, one brown, ..." --model runs/flickr8k/fd-both-s0
python -m jettclip.search PHOTOS "at night" --image like.jpg --without snow --since 2024-05
python -m jettclip.search PHOTOS --duplicates --json
python -m jettclip.search PHOTOS --web  # a page in the browser; the last model again
"""

import argparse
import hashlib
import json
import os
import sys
import time
from contextlib import suppress
from datetime import date
from functools import partial
from pathlib import Path

from . import web
from .deploy import runtime
from .photos import PhotoIndex, say
from .utils import cache_folder, shown, write_then_rename


def cached(*key):
    """A path in the user's cache folder for what belongs to `key`."""
    return cache_folder() / hashlib.sha256(repr(key).encode()).hexdigest()[:16]


def open_model(source, name=None, backend="onnxruntime"):
    """The exported model of `source`; exports a run folder or a checkpoint of model `name` once."""
    path = Path(str(source).removeprefix("openai:")).expanduser()
    told = f"{source} says which model it holds: leave out --name {name}"
    if not path.exists():
        with suppress(ImportError):  # without PyTorch, no name is known
            from . import models  # takes seconds

            path = models.hub.find(str(source), models.MODELS)
            name = name or (source if path.is_file() else None)
    if (path / runtime.CONFIG).exists():
        if name:
            raise ValueError(told)
        return runtime.load(path, backend)
    path = path / "student" if (path / "student").is_dir() else path
    weights = path / "open_clip_model.safetensors" if path.is_dir() else path
    if not weights.is_file():
        raise FileNotFoundError(f"{path.absolute()} is no export folder, run folder or checkpoint")
    status = weights.stat()
    exported = cached(str(weights.resolve()), status.st_size, status.st_mtime_ns, name)
    with suppress(FileNotFoundError, runtime.DamagedExport):
        return runtime.load(exported, backend)
    from . import checkpoints, models
    from .deploy.export import export

    ours = path.is_dir() and "jettclip" in checkpoints.folder_config(path)
    if bool(name) == ours:
        ask = f"say with --name which model {source} holds, such as JettCLIP-S0"
        raise ValueError(told if name else ask)
    say(f"exporting {source} once, to {exported}")
    pretrained = f"openai:{path}" if str(source).startswith("openai:") else path
    model = models.create_model(name, pretrained) if name else models.load_folder(path)
    return runtime.load(export(model, exported), backend)


def choose_model(args):
    """The model that the user names, now or last for this folder: the folder itself has no say."""
    last = cached("model of", str(Path(args.folder).resolve()))
    if not (args.model or last.is_file()):
        raise ValueError(f"no model was used for {args.folder} before: name one with --model")
    model = open_model(args.model or os.fsdecode(last.read_bytes()), args.name, args.backend)
    with suppress(OSError):  # where nothing can be remembered, search works all the same
        write_then_rename(last, lambda file: file.write_bytes(os.fsencode(model.folder.resolve())))
    return model


def check(convert, valid, wanted, text):
    """What `convert` makes of an argument's text, if that is `valid`."""
    with suppress(ValueError):
        if valid(value := convert(text)):
            return value
    raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")


def is_day(text):
    """Whether a text is a day of the calendar, or the month or year that one begins with."""
    return date.fromisoformat((text + "-01-01")[:10]).isoformat().startswith(text)


def parse(argv):
    parser = argparse.ArgumentParser("python -m jettclip.search", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add, words = parser.add_argument, partial(check, str, str.strip, "a text: it is empty")
    path = partial(check, os.path.expanduser, bool, "a path: it is empty")
    photo = partial(check, os.path.expanduser, os.path.isfile, "a photo: there is no such file")
    day = partial(check, str, is_day, "a day, month or year, such as 2024-05-31, 2024-05 or 2024")
    count = partial(check, int, lambda value: value >= 1, "a whole number of at least 1")
    cosine = partial(check, float, lambda value: 0 < value <= 1, "a cosine above 0, at most 1")
    add("folder", type=path, help="photos, in subfolders too")
    add("text", nargs="?", type=words, help="the description; without one, the index is updated")
    add("--image", type=photo, help="more like this photo, and as the text says, if there is one")
    add("--without", type=words, metavar="TEXT", help="what the photos shall not show")
    add("--below", type=path, metavar="SUBFOLDER", help="only photos in this folder of FOLDER")
    add("--since", type=day, help="only photos of this day, month, year or later")
    add("--until", type=day, help="only photos of this day, month, year or earlier")
    what = "find groups of near-duplicates (default: %(const)s or more), the largest file first"
    add("--duplicates", type=cosine, nargs="?", const=0.95, metavar="COSINE", help=what)
    add("--model", type=path, help="export, run folder, checkpoint, MobileCLIP2-S0; default: last")
    add("--name", help="the model that a published checkpoint holds, such as JettCLIP-S0")
    add("--backend", choices=runtime.BACKENDS, default="onnxruntime", help="default: onnxruntime")
    add("--top", type=count, default=5, help="photos to show (default: %(default)s)")
    add("--index", type=path, help="default: FOLDER/.jettclip/index.npz")
    add("--json", action="store_true", help="print objects, one a line: path, score")
    add("--web", action="store_true", help="serve a page on this machine")
    args = parser.parse_intermixed_args(argv)
    query = args.text or args.image
    if args.duplicates and (query or args.without):
        parser.error("--duplicates goes with no description, --image or --without")
    if (args.without or args.below or args.since or args.until) and not (query or args.duplicates):
        parser.error("--without, --below, --since and --until need a description or --image")
    return args


def show(groups, as_json):
    """Print photos: with scores on a terminal, else paths alone; an empty line between groups."""
    for number, group in enumerate(groups, 1):
        print(end="\n" if number > 1 and not as_json else "")
        for path, score in group:
            if as_json:
                print(json.dumps({"path": str(path), "score": round(score, 4), "group": number}))
            elif sys.stdout.isatty():
                print(f"{score:.3f}  {shown(path)}")
            else:  # a part of a name must not pass for a path
                print(str(path).replace("\n", "\\n"))


def find(index, args, limits):
    """Groups of photos that the user asks for; a search finds one."""
    rows = index.select(**limits)
    if len(rows) < len(index.photos):
        say(shown(f"{len(rows):,} of them {' '.join(map(' '.join, limits.items()))}"))
    if args.duplicates:
        return index.duplicates(args.duplicates, rows)
    index.search(".")  # opens the text tower
    start = time.perf_counter()
    found = index.search(args.text or "", args.top, args.image, args.without or "", rows)
    say(f"answered in {1e3 * (time.perf_counter() - start):.1f} ms")
    return [found]


def main(argv=None):
    args = parse(argv)
    # A terminal may lack a name's letters; a pipe gets its bytes.
    errors = "backslashreplace" if sys.stdout.isatty() else "surrogateescape"
    sys.stdout.reconfigure(errors=errors)
    try:
        index = PhotoIndex(args.folder, choose_model(args), args.index)
        limits = {k: v for k, v in vars(args).items() if v and k in ("below", "since", "until")}
        index.select(**limits)  # of no photos yet: wrong limits end here, before the work
        counts = index.update()
        done, seconds = counts["new"] + counts["changed"], counts.pop("seconds")
        summary = ", ".join(f"{count} {what}" for what, count in counts.items())
        speed = f"; indexed {done / seconds:.0f} a second" if done else ""
        say(f"{len(index.photos):,} photos; {summary}{speed}")
        if args.text or args.image or args.duplicates:
            show(find(index, args, limits), args.json)
        if args.web:
            server, address = web.server(index)
            say(f"open {address} (Ctrl+C ends it)")
            server.serve_forever()
    except KeyboardInterrupt:
        raise SystemExit("interrupted: run the same command again to resume") from None
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise SystemExit(f"error: {shown(error)}") from None


if __name__ == "__main__":
    main()
