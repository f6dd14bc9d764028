"""The files of a shard: their names, the side file that makes a shard finished, and the remains of unfinished ones.

A shard is finished when `shards/NNNNN.json` exists: it is written last and holds the facts that the manifest will
list. So writing a shard never touches a file that another shard's writer touches.
"""

import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from funcattrib.errors import StoreError
from funcattrib.store.atomic import TEMPORARY, write_file
from funcattrib.store.json_values import check_checksum, typed, with_checksum
from funcattrib.store.layout import FileFacts, Shard, shard_to_json
from funcattrib.store.manifest import Manifest

FOLDERS = ("shards", "examples")
_OWN = re.compile(r"shards/\d{5,}(\.npy|\.scale\.npy|\.json)|examples/\d{5,}\.arrow")


def rows_file(shard: int) -> str:
    """Return the relative name of a shard's rows."""
    return f"shards/{shard:05d}.npy"


def scale_file(shard: int) -> str:
    """Return the relative name of the scale per row of an int8 shard."""
    return f"shards/{shard:05d}.scale.npy"


def examples_file(shard: int) -> str:
    """Return the relative name of the metadata of the rows' examples."""
    return f"examples/{shard:05d}.arrow"


def side_file(shard: int) -> str:
    """Return the relative name of the facts that make a shard finished."""
    return f"shards/{shard:05d}.json"


def files_of(shard: Shard) -> list[FileFacts]:
    """List every file of a finished shard."""
    facts = [FileFacts(shard.file, shard.bytes, shard.sha256), shard.examples]
    return facts if shard.scale is None else [*facts, shard.scale]


def record(path: Path, number: int, shard: Shard) -> None:
    """Mark a shard finished: its files are in place, now its side file is written."""
    text = json.dumps(with_checksum(shard_to_json(shard)), ensure_ascii=False) + "\n"
    write_file(path, side_file(number), lambda sink: sink.write(text.encode()))


def recorded(path: Path, manifest: Manifest) -> dict[int, Shard]:
    """Read the finished shards by number, in order: from the manifest of a complete store, else from the side files."""
    if manifest.complete:
        for i, shard in enumerate(manifest.shards):
            if not _names_its_own(shard, i):
                raise StoreError(f"expected shard {i} in {rows_file(i)}, found {shard.file}; build the store again")
        return dict(enumerate(manifest.shards))
    names = sizes(path)
    shards = {i: _read_side_file(path, manifest, i) for i in range(manifest.shard_count) if side_file(i) in names}
    return {i: shard for i, shard in shards.items() if shard is not None}


def misfits(path: Path, shards: Mapping[int, Shard]) -> dict[int, str]:
    """Find the finished shards whose files are missing or of the wrong size, by number, with what is wrong."""
    present = sizes(path)
    wrong = {}
    for number, shard in shards.items():
        for file in files_of(shard):
            size = present.get(file.file)
            if size != file.bytes:
                found = "no file" if size is None else f"{size:,} bytes"
                wrong[number] = f"{file.file}: expected {file.bytes:,} bytes, found {found}"
                break
    return wrong


def sizes(path: Path) -> dict[str, int]:
    """List relative name -> bytes of the files in the store's folders, from one listing of each."""
    found = {}
    for folder in FOLDERS:
        if (path / folder).is_dir():
            with os.scandir(path / folder) as entries:
                found.update({f"{folder}/{entry.name}": entry.stat().st_size for entry in entries})
    return found


def sweep(path: Path, keep: Iterable[str]) -> None:
    """Remove the remains of unfinished writes: the store's own files, by their names, except those to keep."""
    kept = set(keep)
    for name in sizes(path):
        if name not in kept and _OWN.fullmatch(name.removesuffix(TEMPORARY)):
            (path / name).unlink()
    for leftover in path.glob(f"*{TEMPORARY}"):
        if leftover.name.removesuffix(TEMPORARY) in ("manifest.json", "state.safetensors", "config.yaml"):
            leftover.unlink()


def _read_side_file(path: Path, manifest: Manifest, number: int) -> Shard | None:
    """Read the facts, or None where they cannot be this shard's: it is then written again."""
    try:
        values = json.loads((path / side_file(number)).read_text(encoding="utf-8"))
        shard: Shard = typed(Shard, values, side_file(number))
        check_checksum(values)
    except (ValueError, RecursionError):
        return None
    right = range(shard.start, shard.stop) == manifest.shard_range(number) and _names_its_own(shard, number)
    return shard if right else None


def _names_its_own(shard: Shard, number: int) -> bool:
    """Return whether the facts have this shard's file names; a name that was read could point anywhere."""
    names = [rows_file(number), examples_file(number), scale_file(number)]
    return [facts.file for facts in files_of(shard)] == (names if shard.scale else names[:2])
