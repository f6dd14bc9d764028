"""Scores on disk: one row a training example, in the data set's order, one float32 column a query.

They are kept as a store is (shards, manifest, resume, lock; ``docs/store.md``), with the queries as the columns of a
row. Positive means proponent: a step that unlearns the training example raises the query's loss.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import torch

from funcattrib.errors import FuncattribError, StoreError
from funcattrib.query.topk import TopK, topk
from funcattrib.store import GradientStore, Manifest, lay_out, open_store

if TYPE_CHECKING:
    from datasets import Dataset

_LEAF = "scores"


class Scores:
    """Scores that are open for reading; ``open_scores`` makes it. Slices like an array (rows, queries).

    Attributes:
        path: the folder.
        manifest: how they were made.
        queries: what is told of each query, one dict a column.
    """

    def __init__(self, store: GradientStore) -> None:
        self._store = store
        self.path, self.manifest = store.path, store.manifest
        self.queries: list[dict[str, Any]] = list(store.manifest.extra["queries"])

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, queries)."""
        return len(self._store), self._store.width

    @property
    def examples(self) -> "Dataset":
        """What is told of each row's example, memory-mapped."""
        return self._store.examples

    def __len__(self) -> int:
        return len(self._store)

    def __getitem__(self, key: Any) -> np.ndarray:
        return self._store.matrix()[key]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self._store.matrix(), dtype)

    def topk(self, k: int = 10, *, reverse: bool = False) -> TopK:
        """The k highest (``reverse``: lowest) scoring rows of each query, values and rows (queries, k)."""
        blocks, start = [], 0
        for block in self._store.matrix().blocks(8192):
            blocks.append((start, block))
            start += len(block)
        return topk(blocks, torch.eye(self.shape[1]), k, largest=not reverse)

    def to_parquet(self, path: str | Path) -> None:
        """Write the examples with a column ``score_K`` for every query K."""
        columns = {name: self.examples[name][:] for name in self.examples.column_names}
        matrix = np.asarray(self)
        columns |= {f"score_{number}": matrix[:, number] for number in range(matrix.shape[1])}
        try:
            pyarrow.parquet.write_table(pa.table(columns), path)
        except OSError as error:
            raise FuncattribError(f"expected to write {path}: {error}; choose another file") from error


def open_scores(path: str | Path) -> Scores:
    """Open the scores in folder ``path``.

    Raises:
        StoreError: no scores there, or files that are missing or cut short.
    """
    store = open_store(path)
    if list(store.leaves) != [_LEAF] or "queries" not in store.manifest.extra:
        raise StoreError(f"expected scores at {path}, found a store of gradients; open it with open_store")
    return Scores(store)


def scores_manifest(
    train: Manifest, query: Manifest, *, method: Mapping[str, Any], queries: Sequence[Mapping[str, Any]]
) -> Manifest:
    """The manifest of the scores of ``train``'s rows against ``queries``, which came from ``query``.

    Raises:
        FuncattribError: the two were made by different models, chains or states; the message names which.
    """
    check_comparable(train, query)
    return replace(
        train,
        leaves=lay_out({_LEAF: (len(queries),)}),
        dtype="float32",
        computed_with={"method": dict(method), "query_data": query.data["fingerprint"]},
        extra={"queries": [dict(entry) for entry in queries]},
        shards=[],
        complete=False,
        clipped=0,
        nonfinite=0,
        state=None,
    )


def check_comparable(train: Manifest, query: Manifest) -> None:
    """Refuse gradients whose inner products mean nothing.

    Raises:
        FuncattribError: naming the first difference.
    """
    state_train, state_query = (None if m.state is None else m.state.sha256 for m in (train, query))
    for what, ours, theirs in (
        ("model", train.model["fingerprint"], query.model["fingerprint"]),
        ("chain", train.chain, query.chain),
        ("leaves", train.leaves, query.leaves),
        ("fitted state", state_train, state_query),
    ):
        if ours != theirs:
            raise FuncattribError(
                f"expected queries of the same {what} as the training gradients, found another\n"
                "compute both with the same settings and the same --state"
            )
