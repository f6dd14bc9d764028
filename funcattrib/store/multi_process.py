"""One store written by several processes: rank 0 begins it and holds the lock, the others join.

Each shard is claimed by one process, and each file written by one. Where the machines do not share the folder, the
first process of each begins one, and every folder is in the end a part of the store, for ``merge``.
"""

import logging
import secrets
from contextlib import suppress
from pathlib import Path

from funcattrib.errors import StoreError
from funcattrib.runtime.world import World
from funcattrib.store import shards
from funcattrib.store.create import create_store
from funcattrib.store.manifest import Manifest, read_manifest
from funcattrib.store.writer import StoreWriter
from funcattrib.store.writer_role import WriterRole

log = logging.getLogger(__name__)


def share_store(path: str | Path, manifest: Manifest, world: World, *, overwrite: bool = False) -> StoreWriter:
    """Begin the store of a run in folder `path`, or continue it, together with the other processes of the run.

    Args:
        path, manifest, overwrite: as in `create_store`, alike in all processes.
        world: the processes; all of them call this.

    Returns:
        A writer for each; `claims` gives each pending shard to one of them.

    Raises:
        StoreError: as `create_store`, in every process.
    """
    path = Path(path)
    if world.size == 1:
        return create_store(path, manifest, overwrite=overwrite)
    writer = world.on_rank_zero(lambda: create_store(path, manifest, overwrite=overwrite))
    try:
        return _place(path, manifest, world, overwrite, writer)
    except BaseException:
        if writer is not None:
            with suppress(Exception):
                writer.close()
        raise


def _place(path: Path, manifest: Manifest, world: World, overwrite: bool, writer: StoreWriter | None) -> StoreWriter:
    here = all_see(path, world)
    begins_folder = not here and world.local_rank == 0  # this machine's own folder
    error = ""
    if begins_folder:
        try:
            writer = create_store(path, manifest, overwrite=overwrite)
        except StoreError as failed:
            error = f"rank {world.rank}: {failed}"
    if errors := [each for each in world.all_gather_object(error) if each]:
        raise StoreError(errors[0])
    if writer is None:
        found = read_manifest(path)
        writer = StoreWriter(path, found, shards.recorded(path, found), None)
    done = set().union(
        *world.all_gather_object(writer.finished if (here and world.is_rank_zero) or begins_folder else [])
    )
    complete = all(world.all_gather_object(writer.manifest.complete))
    if writer.manifest.complete and not complete:
        raise StoreError(f"one machine has a finished store at {path} and others do not; choose another RUN")
    todo = [number for number in range(writer.manifest.shard_count) if number not in done]
    writer.assign(WriterRole(world, holds_lock=world.is_rank_zero or begins_folder, todo=todo, part=not here))
    if begins_folder:
        log.info("%s is not shared between the machines: each has a part, to be joined by `funcattrib merge`", path)
    return writer


def require_shared(path: str | Path, world: World) -> None:
    """Check that all processes see one folder: for work that reads what others have written.

    Raises:
        StoreError: a machine has another folder at `path`.
    """
    if world.size == 1:
        return
    path = Path(path)
    world.on_rank_zero(lambda: path.mkdir(parents=True, exist_ok=True))
    if not all(world.all_gather_object(all_see(path, world))):
        raise StoreError(
            f"{path} is not shared between the machines\n"
            "give a folder on a shared file system, or run this command on one machine"
        )


def all_see(path: Path, world: World) -> bool:
    """Return whether this process sees in `path` what rank 0 writes there: a file of a name never asked for."""
    mark = path / str(world.broadcast_object(f".{secrets.token_hex(8)}"))
    world.on_rank_zero(mark.touch)
    found = mark.exists()
    world.barrier()
    world.on_rank_zero(lambda: mark.unlink(missing_ok=True))
    return found
