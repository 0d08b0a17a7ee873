"""Checkpoints by their name on the Hugging Face hub."""

import importlib.util
import os
import pathlib
import re

from ._save import COMPANIONS
from ._weight_files import INDEX, WEIGHTS


_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_WANTED = [*COMPANIONS, WEIGHTS, INDEX, "model-*.safetensors"]


def find_checkpoint(name: str | os.PathLike) -> pathlib.Path:
    """Finds a checkpoint's directory, and downloads it first if it is one of the hub.

    **Arguments:**

    - `name`: a directory, or, if there is none of that name, `organisation/model` as the
        hub calls it. What is downloaded is kept in the hub's cache, which the
        environment's `HF_HOME` or `HF_HUB_CACHE` places, and is not loaded again; with
        `HF_HUB_OFFLINE=1` the cache alone is asked.

    **Returns:**

    The directory. A `FileNotFoundError` says why there is none.
    """
    directory = pathlib.Path(name)
    if directory.is_dir():
        return directory
    if not _NAME.fullmatch(str(name)):
        raise FileNotFoundError(f"{name}: no such directory")
    if importlib.util.find_spec("huggingface_hub") is None:
        raise FileNotFoundError(
            f"{name}: no such directory; to ask the hub for it, install huggingface_hub"
        )
    return _download(str(name))


def _download(name: str) -> pathlib.Path:
    # Imported here since it is optional, and takes long.
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return pathlib.Path(huggingface_hub.snapshot_download(name, allow_patterns=_WANTED))
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        reason = str(error).strip().split("\n")[0]
        raise FileNotFoundError(
            f"{name}: no such directory, and the hub's could not be had: {reason}"
        ) from error
