"""Open a store for reading: nothing is loaded, rows are mapped when they are asked for."""

import difflib
import warnings
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxtyping import Float32
from torch import Tensor

from funcattrib.errors import StoreError
from funcattrib.runtime.yaml_mapping import read_mapping
from funcattrib.store import shards
from funcattrib.store.layout import LeafColumns, Shard
from funcattrib.store.manifest import Manifest, read_manifest
from funcattrib.store.matrix import LazyMatrix, ShardBlock
from funcattrib.store.metadata import read_examples
from funcattrib.store.tensors import load_tensors
from funcattrib.store.verify import check_state_file
from funcattrib.store.verify import verify as find_problems
from funcattrib.store.writer import CONFIG, STATE

if TYPE_CHECKING:
    from datasets import Dataset


def open_store(path: str | Path, *, verify: bool = False) -> "GradientStore":
    """Open the store in folder `path`.

    An unfinished store opens with a warning; its rows are those of the finished shards, in the data set's order.

    Args:
        path: the folder.
        verify: also compare every file's content with its hash (reads the whole store).

    Raises:
        StoreError: No store, one of a newer format, or a file that is missing, cut short or altered.

    Example:
        >>> import tempfile, torch
        >>> from funcattrib.runs.collect import collect_gradients
        >>> loss = lambda params, example: (params["w"] * example["x"]).sum() ** 2
        >>> with tempfile.TemporaryDirectory() as run:
        ...     _ = collect_gradients((loss, {"w": torch.ones(2)}), [{"x": [1.0, 3.0]}], path=run, quiet=True)
        ...     store = open_store(run, verify=True)
        ...     store.matrix()[0], list(store.leaves), store.examples[0]["loss"]
        (array([ 8., 24.], dtype=float16), ['w'], 16.0)
    """
    path = Path(path)
    manifest = read_manifest(path)
    finished = shards.recorded(path, manifest)
    if not manifest.complete:
        manifest = read_manifest(path)  # a writer that finished just now removed the side files we were looking for
        finished = shards.recorded(path, manifest) if manifest.complete else finished
    wrong = list(shards.misfits(path, finished).values())
    state = path / STATE
    size = state.stat().st_size if state.exists() else None
    if manifest.state and size != manifest.state.bytes and (manifest.complete or size is not None):
        found = "no file" if size is None else f"{size:,} bytes"
        raise StoreError(
            f"the fitted state of {path} is damaged: {STATE}: expected {manifest.state.bytes:,} bytes, found {found}\n"
            "restore it, or use `overwrite` to compute the run again"
        )
    if not wrong and verify:
        wrong = find_problems(path)
    if wrong:
        more = f" (and {len(wrong) - 1} more)" if wrong[1:] else ""
        raise StoreError(
            f"{path}: {wrong[0]}{more}\n"
            "delete that shard's file and run the same build command again: it writes what is missing"
        )
    if not manifest.complete:
        rows = sum(shard.stop - shard.start for shard in finished.values())
        warnings.warn(
            f"{path} is unfinished: {rows:,} of {manifest.rows:,} rows are there ({len(finished)} of "
            f"{manifest.shard_count} shards); run the same build command again to finish it",
            stacklevel=2,
        )
    return GradientStore(path, manifest, list(finished.values()))


class GradientStore:
    """A store that is open for reading; `open_store` makes it.

    Attributes:
        path: its folder.
        manifest: how it was made.
        leaves: leaf name -> its columns and shape, in the order of a row.
        shards: the finished shards, in order.
    """

    def __init__(self, path: Path, manifest: Manifest, finished: list[Shard]) -> None:
        self.path = path
        self.manifest = manifest
        self.leaves: dict[str, LeafColumns] = {leaf.name: leaf for leaf in manifest.leaves}
        self.shards = finished
        self._state_checked = False
        self._parts: list[ShardBlock] = []
        rows = 0
        for shard in finished:
            scale = path / shard.scale.file if shard.scale else None
            self._parts.append(ShardBlock(rows, shard.stop - shard.start, path / shard.file, scale))
            rows += shard.stop - shard.start
        self._rows = rows

    def __len__(self) -> int:
        return self._rows

    def __repr__(self) -> str:
        return f"GradientStore({str(self.path)!r}: {len(self):,} rows × {self.width:,}, {self.manifest.dtype})"

    @property
    def width(self) -> int:
        """Return the columns of a row."""
        return self.manifest.width

    @cached_property
    def examples(self) -> "Dataset":
        """Return the metadata of each row's example, memory-mapped; entry i belongs to row i."""
        return read_examples(self.path, [shard.examples for shard in self.shards])

    @cached_property
    def config(self) -> dict[str, Any]:
        """Return the settings that replay the run; empty where none were saved.

        Raises:
            StoreError: the file is damaged.
        """
        file = self.path / CONFIG
        return dict(read_mapping(file)) if file.exists() else {}

    def matrix(self) -> LazyMatrix:
        """Return all rows, (rows, width), read on demand."""
        return LazyMatrix(self._parts, self.manifest.dtype, self.width, range(self.width), (self.width,))

    def __getitem__(self, name: str) -> LazyMatrix:
        """Return one leaf of every row, (rows, *shape), read on demand: a view of the rows' columns."""
        if name not in self.leaves:
            close = difflib.get_close_matches(name, self.leaves, n=1, cutoff=0.3)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise StoreError(f"expected one of the {len(self.leaves)} leaves of {self.path}, found {name!r}{hint}")
        leaf = self.leaves[name]
        return LazyMatrix(self._parts, self.manifest.dtype, self.width, range(leaf.start, leaf.stop), leaf.shape)

    def __contains__(self, name: object) -> bool:
        return name in self.leaves

    __iter__ = None  # names or rows? say `store.leaves` or `store.matrix()`

    def gradients(self, name: str) -> Float32[Tensor, "R *shape"]:
        """Return one leaf of every row, decoded to float32, in memory."""
        return self[name].tensor()

    def state(self) -> dict[str, Tensor]:
        """Load the chain's fitted state; empty where the chain has none.

        Raises:
            StoreError: it is not as it was written.
        """
        file = self.path / STATE
        if not file.exists():
            return {}
        if not self._state_checked:
            check_state_file(self.path, self.manifest)
            self._state_checked = True
        return load_tensors(file)
