"""JettCLIP: small students that read 248 tokens, distilled from cached teacher features."""

import importlib.util

PUBLIC = "create_model create_model_and_transforms get_tokenizer list_models reparameterize"
__all__ = PUBLIC.split()


def __getattr__(name):  # torch takes seconds to import; `jettclip.deploy.runtime` needs none of it
    if name in __all__:
        return getattr(importlib.import_module(".models", __name__), name)
    if importlib.util.find_spec(f"{__name__}.{name}"):  # a module, such as jettclip.losses
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module 'jettclip' has no attribute {name!r}")
