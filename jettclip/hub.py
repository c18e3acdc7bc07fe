"""Published weights by name, fetched once from the Hugging Face hub into its own cache.

The hub's environment variables hold, such as HF_HUB_OFFLINE=1 or HF_HOME.
"""

import hashlib
import re
from pathlib import Path

import open_clip
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import LocalEntryNotFoundError
from tqdm import tqdm

from .checkpoints import CONFIG, WEIGHTS

LONGCLIP = {
    f"LongCLIP-{size}": (f"BeichenZhang/LongCLIP-{size}", (f"longclip-{size}.pt",)) for size in "BL"
}
FOLDER = (CONFIG, WEIGHTS)


def published(name, word="published"):
    """Path of weights of model `name` in the hub's cache, fetched once; None if `word` is no name.

    word: "published", by the model's authors; a name of open_clip's for them, such as
    "datacompdr"; or hf-hub:AUTHOR/MODEL, a folder of ours or of open_clip on the hub.
    """
    original = name.replace("JettCLIP-S0", "MobileCLIP2-S0").replace("JettCLIP", "MobileCLIP")
    tags = open_clip.list_pretrained_tags_by_model(original)
    if word.startswith("hf-hub:"):
        repository, files = word.removeprefix("hf-hub:"), FOLDER
    elif word == "published" and name in LONGCLIP:
        repository, files = LONGCLIP[name]
    elif tags and word in (*tags, "published"):
        tag = tags[0] if word == "published" else word
        repository, files = open_clip.get_pretrained_cfg(original, tag)["hf_hub"], (WEIGHTS,)
    elif word == "published":
        raise ValueError(f"nobody publishes weights of {name} that are known here")
    else:
        return None
    repository = repository.strip("/")
    try:
        path = Path([fetch(repository, file) for file in files][-1])
    except Exception as error:  # no network, no such repository: of several libraries
        reason = str(error).strip().splitlines()[0][:200]
        problem = f"cannot fetch {' and '.join(files)} of {repository} from the hub ({reason})"
        raise OSError(f"{problem}: download by hand, and name the file or its folder") from None
    return path.parent if files == FOLDER else path


def fetch(repository, file):
    """Path of a file in the hub's cache, with the SHA-256 that the hub says if it is large."""
    try:
        return hf_hub_download(repository, file, local_files_only=True)
    except LocalEntryNotFoundError:
        tqdm.write(f"fetching {file}; for its licence see https://huggingface.co/{repository}")
        path = hf_hub_download(repository, file)
    blob = Path(path).resolve()  # where links work, it is named by what it holds
    if re.fullmatch("[0-9a-f]{64}", blob.name):
        with open(blob, "rb") as content:
            if hashlib.file_digest(content, "sha256").hexdigest() != blob.name:
                blob.unlink()
                raise OSError(f"{file} has another SHA-256 than the hub says")
    return path
