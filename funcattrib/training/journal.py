"""Rows in the order of training: stores of consecutive steps, each whole after a checkpoint or at the epoch's end.

A journal lies in the folder of the store that is built from it, `RUN/epoch_0/gradients/epoch_0-rank_0-000`, and is a
store like any other: of a process that was killed, its finished shards open, and their examples say row, step, epoch.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from funcattrib.store import Manifest, StoreWriter, create_store
from funcattrib.store.create import PARTS

_BUFFER = 8 << 20  # bytes of rows, in float32, that are held before they are written
_SEGMENT = re.compile(r"epoch_(\d+)-rank_(\d+)-(\d+)")


class Journal:
    """A writer of one process' rows of one epoch.

    Args:
        folder: of the store that is built from it.
        manifest: whose ``rows`` are the most that can come.
        epoch, rank: of these rows.
        dtype: of the rows until the store is made.
    """

    def __init__(self, folder: Path, manifest: Manifest, epoch: int, rank: int, dtype: str) -> None:
        rows_per_shard = max(1, min(manifest.rows_per_shard, _BUFFER // (4 * manifest.width)))
        self._folder = folder / PARTS
        self._manifest = replace(manifest, dtype=dtype, rows=max(manifest.rows, 1), rows_per_shard=rows_per_shard)
        self._epoch, self._rank = epoch, rank
        self._writer: StoreWriter | None = None
        self._shard = 0
        self._rows = torch.empty(0)
        self._metadata: dict[str, list[Any]] = {}
        self._filled = 0

    def add(self, rows: Tensor, metadata: Mapping[str, list[Any]], step: int) -> None:
        """Add rows (B, D) with their metadata; ``step`` is the first that this segment holds."""
        if self._writer is None:
            self._writer, self._shard = self._begin(step), 0
        done = 0
        while done < len(rows):
            if not len(self._rows):
                self._rows = torch.empty(self._manifest.rows_per_shard, rows.shape[1])
            part = min(len(rows) - done, len(self._rows) - self._filled)
            self._rows[self._filled : self._filled + part] = rows[done : done + part]
            for name, values in metadata.items():
                self._metadata.setdefault(name, []).extend(values[done : done + part])
            self._filled, done = self._filled + part, done + part
            if self._filled == len(self._rows):
                self._put()

    def flush(self) -> None:
        """Write everything so far to disk: the segment is complete, and the next row begins another."""
        if self._writer is None:
            return
        self._writer.resize(self._shard * self._manifest.rows_per_shard + self._filled)
        if self._filled:
            self._put()
        self._writer.finish()
        self._writer.close()
        self._writer = None

    def close(self) -> None:
        """Drop what is not finished."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _put(self) -> None:
        assert self._writer is not None
        end = self._shard * self._manifest.rows_per_shard + self._filled
        if self._filled == self._manifest.rows_per_shard and self._writer.manifest.rows < end:
            # More rows than the epoch has examples: the sampler gives some twice.
            self._writer.resize(end)
        self._writer.put(self._shard, self._rows[: self._filled], self._metadata)
        self._rows, self._metadata, self._filled = torch.empty(0), {}, 0
        self._shard += 1

    def _begin(self, step: int) -> StoreWriter:
        name = f"epoch_{self._epoch}-rank_{self._rank}-"
        number = len(list(self._folder.glob(f"{name}*")))
        extra = {"order": "training", "epoch": self._epoch, "rank": self._rank, "from_step": step}
        return create_store(self._folder / f"{name}{number:03d}", replace(self._manifest, extra=extra))


def segments(folder: Path) -> list[Path]:
    """List the journal's stores in ``folder``, by epoch, process and time."""
    found = [(_SEGMENT.fullmatch(path.name), path) for path in sorted((folder / PARTS).glob("epoch_*"))]
    numbered = [(tuple(map(int, match.groups())), path) for match, path in found if match]
    return [path for _, path in sorted(numbered)]
