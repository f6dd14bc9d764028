"""Begin a store, or continue one that the same command began."""

import logging
import os
import shutil
from dataclasses import replace
from pathlib import Path

from funcattrib.errors import StoreError
from funcattrib.store import lock, progress_files, shards
from funcattrib.store.atomic import TEMPORARY, explain
from funcattrib.store.compatibility import check_continues
from funcattrib.store.manifest import MANIFEST_FILE, Manifest, check_manifest, read_manifest, unfinished
from funcattrib.store.verify import check_state_file
from funcattrib.store.writer import CONFIG, PROGRESS, STATE, StoreWriter, save_manifest

log = logging.getLogger(__name__)

# Sub-folder of a run for the stores it is made from, such as the gradients that scores were computed of.
PARTS = "gradients"
# Sub-folder of a run for what its processes but the first report.
LOGS = "logs"


def create_store(path: str | Path, manifest: Manifest, *, overwrite: bool = False) -> StoreWriter:
    """Begin the store of a run in folder `path`, or continue it.

    An unfinished store of the same run is continued: the writer's `pending` are the shards to compute. One that
    is complete has none pending, unless a shard went missing or was cut short since: that one is pending again.

    Args:
        path: a new or empty folder, or a store.
        manifest: what the store is to hold; its shards and counts are not looked at.
        overwrite: start over. Of a folder that is no store nothing is ever removed.

    Raises:
        StoreError: Another run's store (naming what differs), a folder that holds something else, a store of a newer
            format, another process that writes, or a disk that cannot be written.

    Example:
        >>> import tempfile, torch
        >>> from funcattrib.store.layout import lay_out
        >>> from funcattrib.store.reader import open_store
        >>> about = {"model": {"id": "m"}, "data": {"id": "d"}, "loss": {"kind": "ce"}, "chain": [], "seed": 0}
        >>> manifest = Manifest(**about, leaves=lay_out({"w": (2,)}), rows=3, rows_per_shard=2)
        >>> with tempfile.TemporaryDirectory() as run:
        ...     with create_store(run, manifest) as writer:
        ...         for shard in writer.pending:
        ...             rows = torch.ones(len(writer.shard_range(shard)), 2)
        ...             writer.put(shard, rows, {"id": [f"{shard}-{row}" for row in range(len(rows))]})
        ...         _ = writer.finish()
        ...     open_store(run).examples["id"][:]
        ['0-0', '0-1', '1-0']
    """
    path = Path(path)
    manifest = unfinished(manifest)
    check_manifest(manifest)
    manifest.to_json()  # settings that are no JSON values are refused before a folder is made
    found = _existing(path)
    if found and found.complete and not overwrite:
        check_continues(path, manifest, found)
        if not shards.misfits(path, shards.recorded(path, found)):
            return StoreWriter(path, found, shards.recorded(path, found), None)
    try:
        for folder in shards.FOLDERS:
            (path / folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(explain(error, path)) from error
    held = lock.acquire(path)
    try:
        return _begin(path, manifest, overwrite, held)
    except BaseException:
        held.release()
        raise


def check_free(path: str | Path, kind: str, *, overwrite: bool = False) -> None:
    """Check, before anything is computed, that a run that writes a store of this kind can have a folder.

    Raises:
        StoreError: the folder holds something else, or a store of another kind that is not to be overwritten.
    """
    found = _existing(Path(path))
    if found is not None and found.kind != kind and not overwrite:
        raise StoreError(
            f"{path} holds another run: of {found.kind}, not of {kind}\n"
            "choose another RUN, or start over with `overwrite`"
        )


def _begin(path: Path, wanted: Manifest, overwrite: bool, held: lock.Lock) -> StoreWriter:
    found = _existing(path)  # once more: before the lock was ours, another writer may have changed it
    if found is None or overwrite:
        if found is not None:
            _forget(path)
        save_manifest(path, wanted)
        found = wanted
    else:
        check_continues(path, wanted, found)
        if found.state is not None and not (path / STATE).exists():  # it is fitted again
            found = replace(found, state=None)
        check_state_file(path, found)
    finished = shards.recorded(path, found)
    for number, wrong in shards.misfits(path, finished).items():
        log.warning("%s; shard %d is written again", wrong, number)
        del finished[number]
    if found.complete:
        if len(finished) == found.shard_count:  # another writer finished it in the meantime
            held.release()
            return StoreWriter(path, found, finished, None)
        # Back to unfinished: first the side files that then count, the manifest last.
        for number, shard in finished.items():
            shards.record(path, number, shard)
        found = replace(unfinished(found), state=found.state)
        save_manifest(path, found)
    keep = [facts.file for shard in finished.values() for facts in shards.files_of(shard)]
    shards.sweep(path, keep=[*keep, *(shards.side_file(number) for number in finished)])
    return StoreWriter(path, found, finished, held)


def _existing(path: Path) -> Manifest | None:
    """Read the manifest of the store at `path`; None for a folder that is new, or that a run stopped in before its
    manifest.
    """
    if os.path.exists(path / MANIFEST_FILE):
        return read_manifest(path)
    if os.path.isfile(path):
        raise StoreError(f"{path} is a file; choose another folder as RUN")
    known = {lock.LOCK_FILE, MANIFEST_FILE + TEMPORARY, "lost+found", PARTS, LOGS}
    others = [entry.name for entry in path.iterdir()] if os.path.isdir(path) else []
    others = sorted(name for name in others if name not in known and not name.startswith("."))
    others = [name for name in others if name not in shards.FOLDERS or any((path / name).iterdir())]
    if others:
        more = f" and {len(others) - 1} more" if others[1:] else ""
        raise StoreError(f"{path} is no store: it has {others[0]}{more} and no {MANIFEST_FILE}\nchoose another RUN")
    return None


def _forget(path: Path) -> None:
    """Remove all of the old run that could count for the new one, before the new one's manifest is written."""
    old = [name for name in shards.sizes(path) if name.startswith("shards/") and name.endswith(".json")]
    for name in (*old, STATE, PROGRESS, CONFIG, *(file.name for file in path.glob(progress_files.FILES))):
        (path / name).unlink(missing_ok=True)
    shutil.rmtree(path / "faiss", ignore_errors=True)  # indices made from the old rows
