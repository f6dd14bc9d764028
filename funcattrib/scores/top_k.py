"""The best N rows of every query among scores that stream by, block after block.

On disk they are ``best.parquet``: query, rank (from 1), row, score, and the metadata of the row's example.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Float, Int
from torch import Tensor

from funcattrib.errors import StoreError
from funcattrib.query.topk import TopK
from funcattrib.store.atomic import replacing

BEST_FILE = "best.parquet"
_PLACE = pa.schema([("query", pa.int64()), ("rank", pa.int64()), ("row", pa.int64()), ("score", pa.float32())])


class Best(NamedTuple):
    """The best rows so far: ``values`` and ``rows`` (K, n), best first, n at most the number wanted.

    A place that no row with a finite score has taken has row -1 and value -inf.
    """

    values: Float[Tensor, "K n"]
    rows: Int[Tensor, "K n"]

    def found(self, k: int, sign: float = 1.0) -> TopK:
        """Return the first k places, without those that no query has filled; an unfilled one has NaN and row -1."""
        filled = int((self.rows >= 0).sum(1).max()) if self.rows.numel() else 0
        values, rows = (part[:, : min(k, filled)] for part in self)
        return TopK(torch.where(rows >= 0, sign * values, torch.nan), rows)


def nothing(queries: int) -> Best:
    """Return no rows, as before the first block."""
    return Best(torch.empty(queries, 0), torch.empty(queries, 0, dtype=torch.int64))


def keep_best(
    best: Best, scores: Float[Tensor, "B K"], start: int, count: int, groups: Int[Tensor, " rows"] | None = None
) -> Best:
    """Merge a block of rows from ``start`` on into ``best``; of a group of rows (its number, by row) the best alone.

    Scores that are NaN or infinite are left out: their gradient says nothing. Of equal scores the lower row is first.

    Example:
        >>> keep_best(nothing(1), torch.tensor([[1.0], [float("nan")], [3.0], [3.0]]), 10, 2).rows
        tensor([[12, 13]])
    """
    columns = scores.T.to(torch.float32)
    values = columns.where(columns.isfinite(), -torch.inf)
    rows = torch.arange(start, start + len(scores)).where(values > -torch.inf, -1)
    return best_of([best, Best(values, rows)], count, groups)


def best_of(parts: Sequence[Best], count: int, groups: Int[Tensor, " rows"] | None = None) -> Best:
    """Select the best ``count`` of several parts, of other rows each; of a group of rows the best alone.

    Example:
        >>> one = Best(torch.tensor([[3.0, 1.0]]), torch.tensor([[7, 8]]))
        >>> best_of([one, Best(torch.tensor([[3.0]]), torch.tensor([[2]]))], 2).rows
        tensor([[2, 7]])
    """
    values, rows = (torch.cat(each, 1) for each in zip(*parts, strict=True))
    by_row = rows.argsort(dim=1, stable=True)  # of equal scores the lower row is first
    kept, order = values.gather(1, by_row).sort(dim=1, descending=True, stable=True)
    ordered = rows.gather(1, by_row).gather(1, order)
    if groups is not None:
        kept, ordered = _first_of_each(kept, ordered, groups)
    return Best(kept[:, :count].contiguous(), ordered[:, :count].contiguous())


def _first_of_each(values: Tensor, rows: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """Empty the places of rows whose group has a better one, and move these to the end; both are (K, n), best first."""
    numbers = torch.where(rows >= 0, groups[rows.clamp(min=0)], -1 - torch.arange(rows.shape[1]))
    by_group, place = numbers.sort(dim=1, stable=True)
    repeated = torch.zeros_like(rows, dtype=torch.bool)
    repeated.scatter_(1, place[:, 1:], by_group[:, 1:] == by_group[:, :-1])
    values, rows = values.masked_fill(repeated, -torch.inf), rows.masked_fill(repeated, -1)
    order = (rows < 0).long().sort(dim=1, stable=True).indices
    return values.gather(1, order), rows.gather(1, order)


def save_best(folder: Path, best: Best, metadata_of: Callable[[int], Mapping[str, Any]]) -> None:
    """Write ``best.parquet``; ``metadata_of`` returns the metadata of a row."""
    query, place = (best.rows >= 0).nonzero().unbind(1)
    rows, values = best.rows[query, place].tolist(), best.values[query, place].tolist()
    examples = {row: dict(metadata_of(row)) for row in sorted(set(rows))}
    table = pa.table(dict(zip(_PLACE.names, [query.tolist(), (place + 1).tolist(), rows, values], strict=True)), _PLACE)
    if rows:
        beside = pa.Table.from_pylist([examples[row] for row in rows])
        for name in beside.column_names:
            table = table.append_column(name if name not in _PLACE.names else f"example_{name}", beside[name])
    with replacing(folder / BEST_FILE) as temporary:
        pq.write_table(table, temporary, write_page_checksum=True)


def load_best(folder: Path, queries: int) -> Best:
    """Read what ``save_best`` wrote.

    Raises:
        StoreError: it is damaged.
    """
    table = _read(folder, columns=_PLACE.names)
    if table.schema.remove_metadata() != _PLACE or any(column.null_count for column in table.columns):
        raise StoreError(f"{folder / BEST_FILE} is damaged: its columns are not those of the best rows")
    query, rank, row, score = (torch.from_numpy(table[name].to_numpy().copy()) for name in _PLACE.names)
    width = int(rank.max()) if len(rank) else 0
    inside = (query >= 0) & (query < queries) & (rank >= 1) & (row >= 0)
    if not bool(inside.all()) or width > len(rank):
        raise StoreError(f"{folder / BEST_FILE} is damaged: a query, rank or row is out of range")
    best = Best(torch.full((queries, width), -torch.inf), torch.full((queries, width), -1))
    best.values[query, rank - 1], best.rows[query, rank - 1] = score, row
    return best


def load_example(folder: Path, row: int) -> dict[str, Any]:
    """Read the metadata of a row that was kept; nothing of one that was not."""
    table = _read(folder, filters=[("row", "==", row)]).slice(0, 1)
    examples = {name: values[0] for name, values in table.to_pydict().items() if values and name not in _PLACE.names}
    ours = {f"example_{name}": name for name in _PLACE.names}
    return {ours.get(name, name): value for name, value in examples.items()}


def _read(folder: Path, **settings: Any) -> pa.Table:
    """Read the file, its pages compared with their checksums where they have any, and check it in full."""
    try:
        table = pq.read_table(folder / BEST_FILE, page_checksum_verification=True, **settings)
        table.validate(full=True)
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise StoreError(f"{folder / BEST_FILE} is damaged: {reason}; score again with `overwrite`") from error
    return table
