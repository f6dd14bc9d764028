"""Scores on disk: one row a training example, in the data set's order, one float32 column a query.

They are kept as a store is (shards, manifest, resume, lock; ``docs/store.md``): one leaf ``scores`` with the queries as
its columns, or by module one leaf a parameter, whose sum over leaves is the score. Where only the best rows of each
query were kept, they are the store's state and ``best.parquet``. Positive means proponent: a step that unlearns the
training example raises the query's loss.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
from torch import Tensor

from funcattrib.data.columns import shown_name
from funcattrib.errors import FuncattribError, StoreError
from funcattrib.query.topk import TopK
from funcattrib.query.unique import UniqueTopK, unique_topk
from funcattrib.scores import top_k as kept_best
from funcattrib.scores.top_k import keep_best, nothing
from funcattrib.store import GradientStore, Manifest, lay_out, open_store
from funcattrib.store.compatibility import check_kind, check_queries
from funcattrib.store.metadata import example_text
from funcattrib.store.row_text import row_text

if TYPE_CHECKING:
    import pandas
    from datasets import Dataset

_BLOCK = 8192


class Scores:
    """Scores that are open for reading; ``open_scores`` makes it. Slices like an array (rows, queries).

    Attributes:
        path: the folder.
        manifest: how they were made.
        queries: metadata of each query, one dict a column.
        query_text_columns: which entries of ``queries`` hold text; None in scores written before this was kept.
        kept: how many rows of each query were kept, best first; None where all were.
        modules: leaf names, where each one's part was kept; else none.
    """

    def __init__(self, store: GradientStore) -> None:
        self._store = store
        self.path, self.manifest = store.path, store.manifest
        self.queries: list[dict[str, Any]] = list(store.manifest.extra["queries"])
        self.query_text_columns: list[str] | None = store.manifest.extra.get("query_text_columns")
        self.kept: int | None = store.manifest.computed_with.get("top_k")
        self.modules = [] if list(store.leaves) == ["scores"] else list(store.leaves)

    @property
    def shape(self) -> tuple[int, int]:
        """Return (rows, queries)."""
        rows = len(self._store) if self.kept is None else int(self.manifest.computed_with["scored"])
        return rows, len(self.queries)

    @property
    def unit(self) -> str:
        """Return what a row is: an ``example``, or a ``token`` of one."""
        return "token" if self.manifest.by_token else "example"

    @property
    def examples(self) -> "Dataset":
        """Return the metadata of each row's example, memory-mapped."""
        self._whole()
        return self._store.examples

    def __len__(self) -> int:
        return self.shape[0]

    def __repr__(self) -> str:
        kept = f", the best {self.kept} of each" if self.kept is not None else ""
        parts = f", by {len(self.modules)} modules" if self.modules else ""
        name = str(self.manifest.computed_with.get("method", {}).get("name", "scores"))
        rows, queries = self.shape
        return f"Scores({str(self.path)!r}, {name}: {rows:,} {self.unit}s × {queries:,} queries{kept}{parts})"

    def __getitem__(self, key: Any) -> np.ndarray:
        self._whole()
        if not self.modules:
            return self._store.matrix()[key]
        rows, *columns = key if isinstance(key, tuple) else (key,)
        summed = sum(self._store[name][rows] for name in self.modules)
        return np.asarray(summed)[(..., *columns)] if columns else np.asarray(summed)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[:], dtype)

    def part(self, module: str) -> Any:
        """Return one parameter's (or head's) part of the scores, (rows, queries), which slices like an array."""
        if module not in self.modules:
            has = f"{', '.join(self.modules[:3])}, …" if self.modules else "none: score with `granularity='module'`"
            raise FuncattribError(f"the scores have no module {module!r}; their modules are {has}")
        return self._store[module]

    def example(self, row: int) -> dict[str, Any]:
        """Return the metadata of one row's example."""
        if self.kept is None:
            return dict(self._store.examples[row])
        return kept_best.load_example(self.path, row)

    def text(self, row: int) -> str:
        """Return the text of one row's example; of a token's row, the token in brackets inside its sentence."""
        if self.kept is not None:
            return example_text(self.example(row), self.manifest.text_columns)
        return row_text(self._store.examples, row, self.manifest.text_columns, by_token=self.manifest.by_token)

    def unique_topk(self, k: int = 10, *, reverse: bool = False) -> UniqueTopK:
        """Return the same as ``topk`` with each text once, whatever its case, white space and unicode form; ``copies``
        counts the rows that were left out after each.
        """
        most = len(self) if self.kept is None else self.kept
        return unique_topk(partial(self.topk, reverse=reverse), self.text, k, most)

    def topk(self, k: int = 10, *, reverse: bool = False, unique: bool = False) -> TopK:
        """Return the k highest (``reverse``: lowest) scoring rows of each query, values and rows (queries, k).

        Rows whose score is NaN or infinite are left out, with ``unique`` those whose text is that of a better one too;
        a place that stays empty has NaN and row -1.
        """
        if unique:
            return TopK(*self.unique_topk(k, reverse=reverse)[:2])
        if k < 1:
            raise FuncattribError(f"expected k of at least 1, found {k}")
        if self.kept is not None:
            if reverse or k > self.kept:
                raise FuncattribError(
                    f"only the best {self.kept} rows of each query were kept, and "
                    f"{'the lowest' if reverse else k} were asked for; score again with a larger `top_k`, or without"
                )
            return kept_best.load_best(self.path, len(self.queries)).found(k)
        best, start, sign = nothing(len(self.queries)), 0, -1.0 if reverse else 1.0
        for block in self.blocks():
            best = keep_best(best, sign * block, start, k)
            start += len(block)
        return best.found(k, sign)

    def blocks(self, rows: int = _BLOCK) -> Iterator[Tensor]:
        """Yield the scores in blocks of rows (n, queries), float32."""
        self._whole()
        count = len(self.queries)
        for block in self._store.matrix().blocks(rows):
            yield block.unflatten(1, (-1, count)).sum(1) if self.modules else block

    def to_parquet(self, path: str | Path) -> None:
        """Write the examples with a column ``score_K`` for every query K.

        Raises:
            FuncattribError: a path with the suffix of another format, or one that cannot be written.
        """
        if Path(path).suffix.lower() not in ("", ".parquet", ".pq"):
            raise FuncattribError(f"{path} is no name of a Parquet file\nend it in .parquet")
        self._write(pyarrow.parquet.write_table, path)

    def to_csv(self, path: str | Path) -> None:
        """Write the same table as ``to_parquet`` as a csv file with a header; a column of lists is written as JSON.

        Raises:
            FuncattribError: a path that cannot be written.
        """

        def write(table: pa.Table, path: str | Path) -> None:
            pyarrow.csv.write_csv(_flat(table), path)

        self._write(write, path)

    def to_pandas(self) -> "pandas.DataFrame":
        """Return the same table as ``to_parquet``: a row an example, its metadata, and ``score_K`` for every query K.

        Where only the best rows were kept, a row for each of them: query, rank, row, score and the example's metadata.
        """
        return self._table().to_pandas()

    def _write(self, write: Callable[[pa.Table, str | Path], None], path: str | Path) -> None:
        table = self._table()
        try:
            write(table, path)
        except OSError as error:
            raise FuncattribError(f"{path} cannot be written: {error}; choose another file") from error

    def _table(self) -> pa.Table:
        if self.kept is not None:
            return pyarrow.parquet.read_table(self.path / kept_best.BEST_FILE)
        matrix = np.asarray(self)
        scored = {f"score_{number}": matrix[:, number] for number in range(matrix.shape[1])}
        columns = {shown_name(name, scored): self.examples[name][:] for name in self.examples.column_names} | scored
        return pa.table(columns)

    def _whole(self) -> None:
        if self.kept is not None:
            raise FuncattribError(
                f"{self.path} has the best {self.kept} scores of each query only; use topk, or read "
                f"{kept_best.BEST_FILE}"
            )


def open_scores(path: str | Path) -> Scores:
    """Open the scores in folder ``path``.

    Raises:
        StoreError: no scores there, or files that are missing or cut short.

    Returns:
        The scores, (rows, queries) float32, memory-mapped; positive is a proponent.

    Example:
        >>> import tempfile, torch
        >>> from funcattrib.runs.score import score_gradients
        >>> loss = lambda params, example: (params["w"] * example["x"]).sum() ** 2
        >>> model, data = (loss, {"w": torch.ones(2)}), [{"x": [1.0, 0.0]}, {"x": [1.0, 2.0]}]
        >>> with tempfile.TemporaryDirectory() as out:
        ...     _ = score_gradients(model, data, path=out, query_data=data[:1], quiet=True)
        ...     scores = open_scores(out)
        ...     scores.shape, scores[:, 0]
        ((2, 1), array([ 4., 12.], dtype=float32))
    """
    store = open_store(path)
    check_kind(store.manifest, path, "scores")
    if not store.manifest.complete:
        raise StoreError(f"the scores at {path} are unfinished; run the same command again to finish them")
    return Scores(store)


def scores_manifest(
    train: Manifest,
    *,
    method: Mapping[str, Any],
    queries: Sequence[Mapping[str, Any]],
    of: Sequence[Manifest] = (),
    modules: Sequence[str] = (),
) -> Manifest:
    """Return the manifest of the scores of ``train``'s rows against ``queries``, which came from the stores ``of``.

    Args:
        method: how the scores were made, for people and for a resume to compare.
        modules: leaf names, where each one's part is kept.

    Raises:
        FuncattribError: the gradients were made by different models, chains or states; the message names which.
    """
    for query in of:
        check_queries(train, query)
    leaves = lay_out(dict.fromkeys(modules or ["scores"], (len(queries),)))
    convention = train.score_convention
    if method.get("unit_norm"):
        convention = convention.replace("inner product", "cosine", 1)
    return replace(
        train,
        kind="scores",
        leaves=leaves,
        dtype="float32",
        score_convention=convention,
        computed_with={
            **train.computed_with,
            "method": {**method, "columns": len(queries)},
            "query_data": [query.data["fingerprint"] for query in of],
        },
        extra={"queries": [dict(entry) for entry in queries], "query_text_columns": _text_columns(of)},
        shards=[],
        complete=False,
        clipped=0,
        nonfinite=0,
        state=None,
    )


def _flat(table: pa.Table) -> pa.Table:
    """Return the table with its nested columns as JSON, as csv has no others."""
    for number, field in enumerate(table.schema):
        if pa.types.is_nested(field.type):
            values = [None if value is None else json.dumps(value) for value in table[field.name].to_pylist()]
            table = table.set_column(number, field.name, pa.array(values, pa.string()))
    return table


def _text_columns(of: Sequence[Manifest]) -> list[str] | None:
    """Return the columns of text of any of the stores; None where one of them does not state them."""
    found: dict[str, None] = {}
    for manifest in of:
        if manifest.text_columns is None:
            return None
        found |= dict.fromkeys(manifest.text_columns)
    return list(found)
