"""Join the parts of one run, written by machines that share no folder, into one store.

A part is a store of the same identity that holds some of the shards. Files are linked where they lie on the same file
system and copied otherwise; each is compared with its hash.
"""

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from funcattrib.errors import StoreError
from funcattrib.store import shards
from funcattrib.store.atomic import hash_file, replacing
from funcattrib.store.compatibility import check_parts
from funcattrib.store.create import create_store
from funcattrib.store.layout import Shard
from funcattrib.store.manifest import Manifest, read_manifest
from funcattrib.store.reader import GradientStore, open_store
from funcattrib.store.writer import CONFIG, STATE


def merge_stores(out: str | Path, parts: Sequence[str | Path]) -> GradientStore:
    """Make one store of the parts of a run; an interrupted merge is continued.

    Args:
        out: a new or empty folder, or an unfinished store of the same run, which then counts as a part.
        parts: stores that together hold every shard.

    Raises:
        StoreError: a part of another run or with another state, shards that are in no part or that differ between two,
            a file that does not have its hash. The parts stay as they are.
    """
    folders = [Path(part) for part in parts]
    if not folders:
        raise StoreError("no parts were given; name the folders that the machines wrote")
    manifests = [read_manifest(folder) for folder in folders]
    states = [hash_file(folder / STATE) if (folder / STATE).exists() else None for folder in folders]
    check_parts(folders, manifests, states)
    found = _shards(folders, manifests)
    out = Path(out)
    with create_store(out, manifests[0]) as writer:
        missing = [number for number in writer.pending if number not in found]
        if missing:
            raise StoreError(
                f"{len(missing)} of {writer.manifest.shard_count} shards are in none of the parts "
                f"({', '.join(map(str, missing[:5]))}{', …' if missing[5:] else ''})\n"
                "run the command that made the parts again to finish it, or give the missing part"
            )
        for number in writer.pending:
            folder, shard = found[number]
            for facts in shards.files_of(shard):
                _take(folder / facts.file, out / facts.file, facts.sha256)
            writer.take(number, shard)
        for file in (STATE, CONFIG):
            if (folders[0] / file).exists() and not (out / file).exists():
                _take(folders[0] / file, out / file, hash_file(folders[0] / file))
        writer.finish()
    return open_store(out)


def _shards(folders: Sequence[Path], manifests: Sequence[Manifest]) -> Mapping[int, tuple[Path, Shard]]:
    """Find, for each number, a part that has the shard whole, and its facts."""
    found: dict[int, tuple[Path, Shard]] = {}
    for folder, manifest in zip(folders, manifests, strict=True):
        recorded = shards.recorded(folder, manifest)
        for number in recorded.keys() - shards.misfits(folder, recorded).keys():
            shard = recorded[number]
            where, other = found.setdefault(number, (folder, shard))
            if other.sha256 != shard.sha256:
                raise StoreError(f"shard {number} differs between {where} and {folder}; give only the one to keep")
    return found


def _take(source: Path, target: Path, sha256: str) -> None:
    with replacing(target) as temporary:
        temporary.unlink(missing_ok=True)
        try:
            os.link(source, temporary)
        except OSError:  # another file system, or one without links
            shutil.copyfile(source, temporary)
        if hash_file(temporary) != sha256:
            raise StoreError(f"{source} has changed since it was written; build that part again")
