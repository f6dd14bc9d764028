"""FAISS indexes on disk.

    <cache>/<key>/index.faiss     as faiss.write_index writes it; read by faiss.read_index, so no pickle
    <cache>/<key>/meta.json       the settings, the measured recall, the file's size and hashes

The key is a hash of the store's content and of every setting, so an index of an older store, or of other settings, is
never mistaken for this one. A folder appears whole, by a rename.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from funcattrib.errors import FuncattribError

if TYPE_CHECKING:
    from funcattrib.store import GradientStore

_FORMAT = 1
_ENDS = 1 << 20  # bytes hashed at either end of a memory-mapped file


def key(store: GradientStore, settings: Mapping[str, Any]) -> str:
    """Return 16 hex digits that stand for the store's content (its shards' hashes) and every setting."""
    shards = [[shard.start, shard.stop, shard.sha256, shard.scale and shard.scale.sha256] for shard in store.shards]
    content: dict[str, Any] = {
        "format": _FORMAT,
        "dtype": store.manifest.dtype,
        "width": store.width,
        "shards": shards,
        "settings": dict(settings),
    }
    if any(shard.nonfinite for shard in store.shards):  # an older index has such rows as zeros
        content["left_out"] = True
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def read(folder: Path, store: GradientStore, *, mmap: bool) -> tuple[Any, dict[str, Any]]:
    """Read the cached index, and what ``write`` was given.

    Raises:
        ValueError, KeyError, TypeError, OSError, RuntimeError: it is not what was written.
    """
    import faiss

    file = folder / "index.faiss"
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    if meta["format"] != _FORMAT or file.stat().st_size != meta["bytes"]:
        raise ValueError("it is incomplete")
    whole = "ends" if mmap else "sha256"  # reading all of a mapped file would defeat the mapping
    if _digest(file, ends=mmap) != meta[whole]:
        raise ValueError("its hash does not match")
    flags = getattr(faiss, "IO_FLAG_MMAP_IFC", faiss.IO_FLAG_MMAP) if mmap else 0
    index = faiss.read_index(str(file), flags)
    if (index.d, index.ntotal + len(meta.get("left_out", ()))) != (store.width, len(store)):
        raise ValueError(f"it holds {index.ntotal} rows of width {index.d}")
    return index, meta


def write(index: Any, folder: Path, meta: dict[str, Any]) -> bool:
    """Cache an index in ``folder``: all of it, or nothing. Return whether it could be: a run may be read-only.

    Raises:
        FuncattribError: the disk is full, or the folder is none.
    """
    import faiss

    part = folder.with_name(f"{folder.name}.{os.getpid()}.part")
    try:
        part.mkdir(parents=True, exist_ok=True)
        file = part / "index.faiss"
        faiss.write_index(index, str(file))
        meta = meta | {
            "format": _FORMAT,
            "bytes": file.stat().st_size,
            "sha256": _digest(file),
            "ends": _digest(file, ends=True),
        }
        (part / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
        if not folder.exists():  # otherwise another process was faster
            part.rename(folder)
        return True
    except (OSError, RuntimeError) as error:
        if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            return False
        free = shutil.disk_usage(folder.parent).free >> 20 if folder.parent.exists() else 0
        raise FuncattribError(
            f"the FAISS index could not be written to {folder.parent} ({free:,} MiB free): {reason(error)}; "
            "free some space, or give another cache folder"
        ) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def remove(folder: Path) -> None:
    """Remove what lies at an index's place."""
    if folder.is_dir():
        shutil.rmtree(folder, ignore_errors=True)
    else:
        folder.unlink(missing_ok=True)


def reason(error: Exception) -> str:
    """Return FAISS' own words, without the C++ signature and source line in front."""
    text = " ".join(str(error).split())
    return text.rsplit("failed: ", 1)[-1] if "failed: " in text else text.rsplit(".cpp:", 1)[-1].split(": ", 1)[-1]


def _digest(file: Path, *, ends: bool = False) -> str:
    with file.open("rb") as stream:
        if not ends:
            return hashlib.file_digest(stream, "sha256").hexdigest()
        head = stream.read(_ENDS)
        stream.seek(max(0, file.stat().st_size - _ENDS))
        return hashlib.sha256(head + stream.read()).hexdigest()
