"""Compare a store with its manifest, to the last byte."""

from collections.abc import Callable
from pathlib import Path

from funcattrib.errors import StoreError
from funcattrib.store import shards
from funcattrib.store.atomic import hash_file
from funcattrib.store.encode import STORAGE
from funcattrib.store.layout import FileFacts, Shard
from funcattrib.store.manifest import Manifest, read_manifest
from funcattrib.store.matrix import check_header, read_scale
from funcattrib.store.metadata import read_table


def verify(path: str | Path, *, progress: Callable[[int], None] | None = None) -> list[str]:
    """Find what is wrong with the files of a store: presence, size, content hash, header, number of examples.

    Args:
        path: the store; of an unfinished one, the finished shards are looked at.
        progress: called with the bytes of every file that was read.

    Returns:
        One line for every problem; empty for a store that is as it was written.

    Raises:
        StoreError: There is no manifest that can be read.
    """
    path = Path(path)
    manifest = read_manifest(path)
    problems = []
    for number, shard in shards.recorded(path, manifest).items():
        altered = [_altered(path, facts, progress) for facts in shards.files_of(shard)]
        found = [problem for problem in altered if problem]
        problems += found or _inconsistent(path, manifest, number, shard)
    if manifest.state:
        problem = _altered(path, manifest.state, progress)
        problems += [problem] if problem else []
    return problems


def check_state_file(path: Path, manifest: Manifest) -> None:
    """Compare the fitted state of a store, where there is one, with its hash.

    Raises:
        StoreError: it is not as it was written.
    """
    problem = _altered(path, manifest.state, None) if manifest.state else None
    if problem:
        raise StoreError(
            f"the fitted state of {path} is damaged: {problem}\nrestore it, or use `overwrite` to compute the run again"
        )


def _altered(path: Path, facts: FileFacts, progress: Callable[[int], None] | None) -> str | None:
    file = path / facts.file
    try:
        size = file.stat().st_size
        if size != facts.bytes:
            return f"{facts.file}: expected {facts.bytes:,} bytes, found {size:,}"
        digest = hash_file(file)
    except OSError as error:
        return f"{facts.file}: expected {facts.bytes:,} bytes, found: {error.strerror}"
    if progress:
        progress(size)
    if digest != facts.sha256:
        return f"{facts.file}: expected the content hash {facts.sha256[:12]}…, found {digest[:12]}…: it was altered"
    return None


def _inconsistent(path: Path, manifest: Manifest, number: int, shard: Shard) -> list[str]:
    """Find where a shard does not fit the manifest although its files are as they were written."""
    rows, problems = len(manifest.shard_range(number)), []
    try:
        with open(path / shard.file, "rb") as file:
            check_header(file, STORAGE[manifest.dtype], (rows, manifest.width))
        if manifest.dtype == "int8":
            read_scale(path / shards.scale_file(number), rows)
    except (OSError, ValueError, StoreError) as error:
        problems.append(f"{shard.file}: found {error}")
    try:
        examples = read_table(path / shard.examples.file).num_rows
        if examples != rows:
            problems.append(f"{shard.examples.file}: expected {rows} examples, found {examples}")
    except StoreError as error:
        problems.append(str(error))
    return problems
