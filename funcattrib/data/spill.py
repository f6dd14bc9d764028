"""A table too large for memory: written batch by batch to a nameless file, then mapped back."""

import contextlib
import mmap
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import pyarrow as pa

from funcattrib.errors import DataError


class ScratchTable:
    """Collects ragged columns on disk; `table()` maps them without reading them.

    The file has no name from the start (where the system allows), so no file remains, whatever ends the process:
    its space is freed when the last array that points into it goes.

    Args:
        folder: where to write; the system's folder for temporary files by default (the variable TMPDIR).
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = Path(folder or tempfile.gettempdir())
        try:
            self._file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115  # closed by __exit__
        except OSError as error:
            raise self._no_room(error) from error
        self._writer: pa.ipc.RecordBatchStreamWriter | None = None

    def write(self, columns: dict[str, pa.Array]) -> None:
        """Append rows; every call brings the same columns."""
        batch = pa.RecordBatch.from_pydict(columns)
        try:
            if self._writer is None:
                self._writer = pa.ipc.new_stream(self._file, batch.schema)
            self._writer.write_batch(batch)
        except OSError as error:
            raise self._no_room(error) from error

    def table(self) -> pa.Table:
        """Return all rows, memory-mapped; call once, after the last `write`."""
        assert self._writer is not None, "nothing was written"
        try:
            self._writer.close()
            self._file.flush()
        except OSError as error:
            raise self._no_room(error) from error
        mapped = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)
        return pa.ipc.open_stream(pa.py_buffer(mapped)).read_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):  # the disk was full: what is still buffered has nowhere to go
            self._file.close()

    def _no_room(self, error: OSError) -> DataError:
        return DataError(
            f"the tokenised data cannot be written to {self._folder}: {error.strerror or error}\n"
            "free some space there, or name another folder in the environment variable TMPDIR"
        )


def ragged(rows: Sequence[np.ndarray]) -> pa.Array:
    """Convert arrays of any length to one Arrow list column, without a Python number per token."""
    lengths = np.fromiter(map(len, rows), dtype=np.int64, count=len(rows))
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    if offsets[-1] > np.iinfo(np.int32).max:
        return pa.LargeListArray.from_arrays(offsets, np.concatenate(rows))
    return pa.ListArray.from_arrays(offsets.astype(np.int32), np.concatenate(rows))
