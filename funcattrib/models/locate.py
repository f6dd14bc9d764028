"""Locating a checkpoint, in a folder or on the hub, and reading what others wrote there.

Quietly, without waiting for a hub that does not answer, and with an error in words for whatever is wrong with it.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from transformers.utils import logging as transformers_logging

from funcattrib.errors import FuncattribError
from funcattrib.runtime.hub import hub_reachable, offline, why

log = logging.getLogger(__name__)


def locate(name: str) -> Path | str:
    """Return a folder's path, or a hub id as it is."""
    folder = Path(name).expanduser()
    if os.path.exists(folder):  # False too where the name is one that the system refuses
        if not folder.is_dir() or not any(folder.glob("*.json")):
            found = "no config.json there" if folder.is_dir() else "a file"
            raise FuncattribError(f"expected a Hugging Face model in {name}, found {found}; give its folder")
        return folder
    if name.startswith((".", "~", os.path.sep)) or name.count("/") > 1:
        raise FuncattribError(f"the model folder {name} does not exist; check `model`")
    return name


@contextmanager
def quietly(source: Path | str) -> Iterator[None]:
    """Silence transformers, and use the cache alone where the hub does not answer."""
    progress_bars, level = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        with ExitStack() as stack:
            if unreachable := isinstance(source, str) and not hub_reachable():
                stack.enter_context(offline())
            yield
            if unreachable:
                log.warning("the hub does not answer; using the cached copy of %s", source)
    finally:
        transformers_logging.set_verbosity(level)
        if progress_bars:
            transformers_logging.enable_progress_bar()


@contextmanager
def readable(name: str, source: Path | str, files: str = "config.json and model.safetensors") -> Iterator[None]:
    """Raise, in words, whatever a file written by others makes its reader raise; ``files`` are what is read."""
    try:
        with quietly(source):
            yield
    except FuncattribError:
        raise
    except Exception as error:
        raise FuncattribError(
            f"the model {name!r} cannot be loaded: {why(error)}\n"
            f"check the name and the connection to the hub, or give a folder with {files}"
        ) from error
