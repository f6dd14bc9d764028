"""The folder of a run, as every command that writes one begins and ends it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from funcattrib.runs.error_hints import explained
from funcattrib.runtime.world import World
from funcattrib.store import Manifest, StoreWriter, share_store


@contextmanager
def run_folder(
    path: str | Path,
    manifest: Manifest,
    world: World,
    *,
    overwrite: bool = False,
    config: Mapping[str, Any] | None = None,
) -> Iterator[StoreWriter]:
    """Begin the run at ``path`` or continue it, and seal it after the block; what is finished outlives an error.

    Args:
        path: the folder.
        manifest: of what the run writes; another run's in the folder is refused.
        world: the processes, all of which enter.
        overwrite: start over where the folder holds another run.
        config: what ``config.yaml`` keeps, to repeat the run.

    Yields:
        A writer; its ``pending`` shards are those still to be computed.

    Raises:
        FuncattribError: the folder holds another run; memory was short; a model that draws random numbers.

    Example:
        >>> import tempfile, torch
        >>> from funcattrib.runtime.world import SINGLE_PROCESS
        >>> from funcattrib.store import lay_out, open_store
        >>> manifest = Manifest(
        ...     model={"id": "m", "fingerprint": "f"}, data={"id": "d"}, loss={}, computed_with={}, chain=[], seed=0,
        ...     leaves=lay_out({"w": (2,)}), dtype="float32", rows=1, rows_per_shard=1,
        ... )
        >>> with tempfile.TemporaryDirectory() as path:
        ...     with run_folder(path, manifest, SINGLE_PROCESS) as writer:
        ...         for shard in writer.claims():
        ...             writer.put(shard, torch.ones(1, 2), {"id": ["a"]})
        ...     open_store(path).gradients("w")
        tensor([[1., 1.]])
    """
    with share_store(path, manifest, world, overwrite=overwrite) as writer:
        if config is not None:
            writer.save_config(config)
        with explained():
            yield writer
        writer.finish()
