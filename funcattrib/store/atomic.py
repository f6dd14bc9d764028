"""Files that appear whole or not at all: written under a temporary name, flushed to disk, renamed."""

import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, Protocol

from funcattrib.errors import StoreError
from funcattrib.store.layout import FileFacts

TEMPORARY = ".tmp"


class Sink(Protocol):
    """A destination of a file's content."""

    def write(self, data: bytes | memoryview, /) -> object:
        """Append bytes."""
        ...


def write_file(folder: Path, name: str, fill: Callable[[Sink], object]) -> FileFacts:
    """Write `folder/name` atomically, hashing what goes through.

    Args:
        folder: the store.
        name: the file's name relative to it.
        fill: writes the content.

    Raises:
        StoreError: The disk is full, a limit reached, or the folder not writable. No partial file remains.
    """
    with replacing(folder / name) as temporary, open(temporary, "wb") as file:
        sink = _HashingSink(file)
        fill(sink)
    return FileFacts(name, sink.bytes, sink.sha256.hexdigest())


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path to be filled; on exit, flush it to disk and put it in the place of `path`.

    Raises:
        StoreError: As `write_file`.
    """
    temporary = path.with_name(path.name + TEMPORARY)
    try:
        yield temporary
        _flush(temporary)
        os.replace(temporary, path)
        _flush(path.parent)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise StoreError(explain(error, path)) from error
        raise


def hash_file(path: Path) -> str:
    """Compute the hex SHA-256 of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def explain(error: OSError, path: Path) -> str:
    """Explain a write that failed, in two lines."""
    again = "run the same command again: finished shards are kept"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = shutil.disk_usage(next(folder for folder in path.parents if folder.exists())).free / 1e6
        reason = "the disk is full" if error.errno == errno.ENOSPC else "the disk quota is used up"
        return f"{path} cannot be written: {reason} ({free:,.1f} MB free)\nfree some space, then {again}"
    if error.errno == errno.EFBIG:
        return f"{path} cannot be written: it exceeds the file-size limit\nraise the limit (ulimit -f), then {again}"
    return f"{path} cannot be written: {error.strerror or error}\ncorrect that, then {again}"


class _HashingSink:
    def __init__(self, file: BinaryIO) -> None:
        self.file, self.bytes, self.sha256 = file, 0, hashlib.sha256()

    def write(self, data: bytes | memoryview, /) -> None:
        self.file.write(data)
        self.sha256.update(data)
        self.bytes += memoryview(data).nbytes


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems cannot flush a folder; the rename is then as durable as they make it.
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP)):
            raise
    finally:
        os.close(descriptor)
