"""Published weights by name, fetched once from the Hugging Face hub into its own cache.

The hub's environment variables hold, such as HF_HUB_OFFLINE=1 or HF_HOME.
"""

import re
from contextlib import suppress
from pathlib import Path
from textwrap import shorten

import open_clip
from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from tqdm import tqdm

from .checkpoints import CONFIG, WEIGHTS
from .utils import absolute, nearest, sha256

LONGCLIP = {f"LongCLIP-{x}": (f"BeichenZhang/LongCLIP-{x}", (f"longclip-{x}.pt",)) for x in "BL"}
FILE, FOLDER = (WEIGHTS,), (CONFIG, WEIGHTS)


def words(name):
    """{word: (repository, files)} of weights of model `name`: open_clip's tags, "published"."""
    name = name.replace("JettCLIP-S0", "MobileCLIP2-S0").replace("JettCLIP", "MobileCLIP")
    tags = open_clip.list_pretrained_tags_by_model(name)
    known = {t: (open_clip.get_pretrained_cfg(name, t)["hf_hub"].strip("/"), FILE) for t in tags}
    known["published"] = LONGCLIP.get(name) or next(iter(known.values()), None)
    return known if known["published"] else {}


def file(name, word):
    """The absolute path of a file `word`; where there is none, the error names the nearest word."""
    path = absolute(str(word).removeprefix("openai:"))
    if (path := path / WEIGHTS if path.is_dir() else path).is_file():
        return str(path)
    hint = nearest(word, [*words(name), *["pip"] * ("Lite" in name)], f"for {name}, the word")
    raise FileNotFoundError(f"pretrained {str(path)!r} is neither a file nor a folder here; {hint}")


def repository(name):
    """AUTHOR/MODEL of hf-hub:AUTHOR/MODEL."""
    place = name.removeprefix("hf-hub:").strip("/")
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", place):
        raise ValueError(f"{name!r} names no repository of the hub: write hf-hub:AUTHOR/MODEL")
    return place


def find(source, models):
    """Path of weights that search can use: of hf-hub:AUTHOR/MODEL, or published for a model of
    `models` {name: configuration}. The error for another `source` names the nearest of them."""
    usable = [*filter(words, models)]
    if source in usable or source.startswith("hf-hub:"):
        return published(source, "published" if source in usable else source)
    problem = f"{absolute(source.removeprefix('openai:'))} is no export folder, run folder or"
    hint = nearest(source, usable, "as a name that search can use,")
    raise FileNotFoundError(f"{problem} checkpoint; {hint}")


def published(name, word="published"):
    """Path of weights of model `name` in the hub's cache, fetched once. word: one of `words`, or
    hf-hub:AUTHOR/MODEL, a folder of ours or of open_clip on the hub."""
    if word.startswith("hf-hub:"):
        place, files = repository(word), FOLDER
    elif word in (known := words(name)):
        place, files = known[word]
    else:
        return Path(file(name, word))
    try:
        path = Path([fetch(place, file) for file in files][-1])
    except Exception as error:  # no network, no such repository: of several libraries
        problem = f"cannot fetch {' and '.join(files)} of {place} from the hub ({reason(error)})"
        raise OSError(f"{problem}: download by hand, and name the file or its folder") from None
    return path.parent if files == FOLDER else path


def reason(error):
    """What is wrong, in one line: the hub's answer or the first cause, not what hides it."""
    link = error  # libraries wrap the hub's errors, some without naming the cause
    while link and not isinstance(link, HfHubHTTPError | LocalEntryNotFoundError):
        link = link.__cause__ or link.__context__
    error = link or error
    while error.__cause__ and not isinstance(error, HfHubHTTPError):
        error = error.__cause__
    offline = constants.HF_HUB_OFFLINE and isinstance(error, LocalEntryNotFoundError)
    told = shorten(str(error) or repr(error), 2000)  # a longer one lists a checkpoint's keys
    return f"HF_HUB_OFFLINE is set: {told}" if offline else told


def fetch(repository, file):
    """Path of a file in the hub's cache, with the SHA-256 that the hub says if it is large."""
    with suppress(LocalEntryNotFoundError):
        return hf_hub_download(repository, file, local_files_only=True)
    if not constants.HF_HUB_OFFLINE:
        tqdm.write(f"fetching {file}; for its licence see https://huggingface.co/{repository}")
    path = hf_hub_download(repository, file)
    blob = Path(path).resolve()  # where links work, it is named by what it holds
    if re.fullmatch("[0-9a-f]{64}", blob.name) and sha256(blob) != blob.name:
        blob.unlink()
        raise OSError(f"{file} has another SHA-256 than the hub says")
    return path
