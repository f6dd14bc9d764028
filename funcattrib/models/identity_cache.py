"""Hashes of weights that were loaded from files, kept by the files' paths, sizes and times of change.

An entry is of the weights as they come out of the files in one precision, on one kind of device. It is not of a model
in memory, which may have been changed since it was loaded.
"""

import hashlib
import json
import time
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import try_to_load_from_cache
from torch import Tensor

from funcattrib.runtime.user_cache import UserCache
from funcattrib.weights.content_hash import Hashes

_CACHE = UserCache("weights", "hashes", version=1)
_MOST = 1000
_GLOBS = ("*.safetensors", "*.safetensors.index.json", "config.json", "adapter_config.json", "*.py")
_SETTLED = 2.0  # seconds: a file system may give two changes within so much the same time


class FileStamp(NamedTuple):
    """A file as it was before it was read: path, bytes, and time of change in nanoseconds."""

    path: str
    size: int
    modified: int


def stamps_of(source: Path | str, revision: str | None = None) -> tuple[FileStamp, ...] | None:
    """Return the stamps of a model's files, in a folder or in the hub's cache; None where a change may go unnoticed.

    Example:
        >>> stamps_of(Path("no such folder"))
    """
    folder = source if isinstance(source, Path) else _snapshot(source, revision)
    with suppress(OSError):
        files = [] if folder is None else sorted({file.resolve() for glob in _GLOBS for file in folder.glob(glob)})
        stamps = tuple(FileStamp(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files)
        if stamps and max(stamp.modified for stamp in stamps) < 1e9 * (time.time() - _SETTLED):
            return stamps
    return None


def key_of(stamps: tuple[FileStamp, ...], tensors: Mapping[str, Tensor], dtype: str) -> str:
    """Compute the key of an entry: of the files, and of what the weights became when they were loaded."""
    layout = [[name, list(tensor.shape), str(tensor.dtype), tensor.device.type] for name, tensor in tensors.items()]
    made_by = [version(package) for package in ("torch", "transformers", "safetensors")]
    return hashlib.sha256(json.dumps([stamps, layout, dtype, made_by]).encode()).hexdigest()


def known(key: str) -> Hashes | None:
    """Look up the hashes of an earlier run."""
    try:
        content, sampled = _CACHE.read()[key]
        return Hashes(str(content), str(sampled))
    except (KeyError, TypeError, ValueError):
        return None  # not there, or damaged


def keep(key: str, hashes: Hashes) -> None:
    """Keep hashes for the next run."""
    _CACHE.add(key, hashes, most=_MOST)


def _snapshot(name: str, revision: str | None) -> Path | None:
    """Return the folder of a hub id's files in the hub's cache."""
    try:
        file = try_to_load_from_cache(name, "config.json", revision=revision)
    except ValueError:  # no hub id
        return None
    return Path(file).parent if isinstance(file, str) else None
