"""Write one shard: rows (encoded piece by piece), scales and examples, then the side file that makes it finished."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from funcattrib.store import shards
from funcattrib.store.atomic import Sink, write_file
from funcattrib.store.encode import STORAGE, encode
from funcattrib.store.layout import Shard
from funcattrib.store.manifest import Manifest
from funcattrib.store.metadata import to_bytes

# Entries encoded at once. Torch splits larger pieces over its threads, which would take them from the computation
# that this runs beside; and a piece of this size stays in the cache from the cast to the hash.
_PIECE = 2**15 - 1


class Job(NamedTuple):
    """A shard to write: number, rows (rows, D) in any float dtype on the CPU, examples (one entry a row)."""

    number: int
    matrix: Tensor
    examples: pa.Table


def write_shard(path: Path, manifest: Manifest, job: Job) -> Shard:
    """Write the files of one shard into the store at `path`.

    Raises:
        StoreError: They cannot be written; the shard is then as if it had never been begun.
    """
    number, matrix, examples = job
    rows = _Rows(matrix, manifest.dtype)
    rows_facts = write_file(path, shards.rows_file(number), rows.fill)
    scale_facts = None
    if manifest.dtype == "int8":
        scale = np.concatenate(rows.scales)
        scale_facts = write_file(path, shards.scale_file(number), lambda sink: np.save(sink, scale, allow_pickle=False))
    examples_facts = write_file(
        path, shards.examples_file(number), lambda sink: sink.write(memoryview(to_bytes(examples)))
    )
    span = manifest.shard_range(number)
    shard = Shard(
        file=rows_facts.file,
        start=span.start,
        stop=span.stop,
        bytes=rows_facts.bytes,
        sha256=rows_facts.sha256,
        examples=examples_facts,
        scale=scale_facts,
        clipped=rows.clipped,
        nonfinite=rows.nonfinite,
    )
    shards.record(path, number, shard)
    return shard


class _Rows:
    """Rows on their way to the file, and what was counted on the way."""

    def __init__(self, matrix: Tensor, dtype: str) -> None:
        self.matrix, self.dtype = matrix, dtype
        self.scales: list[np.ndarray] = []
        self.clipped = self.nonfinite = 0

    def fill(self, sink: Sink) -> None:
        header = {"descr": STORAGE[self.dtype], "fortran_order": False, "shape": tuple(self.matrix.shape)}
        np.lib.format.write_array_header_1_0(sink, header)
        for piece in torch.split(self.matrix, max(1, _PIECE // self.matrix.shape[1])):
            encoded = encode(piece, self.dtype)
            sink.write(encoded.array.data)
            self.clipped += encoded.clipped
            self.nonfinite += encoded.nonfinite
            if encoded.scale is not None:
                self.scales.append(encoded.scale)
