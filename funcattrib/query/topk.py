"""Exact top-k of inner products over rows that do not fit in memory.

    values[q], rows[q] = the k largest of <x_r, query_q> over all rows r

The rows pass by once, in blocks. A float32 matrix product, tile by tile through one reused buffer that stays in
the cache, only *screens* them: a row survives if its score, plus a bound on the product's rounding error, can still
enter the running top-k. The few survivors are scored again in float64 from the stored row, and that decides. So the
answer does not depend on the block size, the device, or the precision the matrix product happens to have, and two
equal rows have equal scores wherever they lie.

Legend: B rows of a block, D row width, K queries, k results a query, C surviving (row, query) pairs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from funcattrib.errors import FuncattribError
from funcattrib.kernels.safe_norm import divisors

if TYPE_CHECKING:
    from funcattrib.store import GradientStore

_ROUNDOFF = 2.0**-24  # of float32
_SMALLEST_NORM = 1e-15  # below it, squares in float32 may vanish
_CPU_TILE_BYTES = 5 << 19  # per thread, about the L2 cache of a present-day core: 512 rows of 2304 on two
_GPU_TILE_BYTES = 64 << 20
_PAIR_BYTES = 16 << 20  # float64 rows rescored at once
_SCORES = 1 << 22  # screened scores held at once
_BLOCK_ROWS = 16_384
_BLOCK_BYTES = 64 << 20  # of a block that is not mapped from the disk


class TopK(NamedTuple):
    """The best rows of each query, best first.

    values: (K, k) float32, the scores; a row that holds NaN or infinity scores NaN and comes last.
    rows: (K, k) int64, row numbers; of equal values the lower row comes first.
    """

    values: Float[Tensor, "K k"]
    rows: Int[Tensor, "K k"]


def topk(
    blocks: Iterable[tuple[int, Tensor]],
    queries: Float[Tensor, "K D"],
    k: int,
    *,
    largest: bool = True,
    unit_norm: bool = False,
    device: str | torch.device = "cpu",
) -> TopK:
    """Find the k rows with the largest inner product with each query, exactly.

    Memory: one block, and about 50 MiB (on a GPU 150 MiB) whatever the number of rows and their width.

    Args:
        blocks: (first row number, (B, D) tensor of any floating dtype), in ascending order of rows; gaps are allowed.
        queries: (K, D), finite.
        k: results per query; where there are fewer rows, all of them are returned.
        largest: True for proponents (highest scores), False for opponents (lowest first).
        unit_norm: divide each score by the norms of row and query (cosine); a zero row or query scores 0.
        device: where the products are computed; blocks are moved there one by one.

    Returns:
        TopK on the CPU: values (K, k) float32, rows (K, k) int64.

    Raises:
        FuncattribError: shapes or dtypes that do not fit, blocks out of order, k < 1, queries with NaN or infinity.

    Example:
        >>> rows = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 0.0]])
        >>> topk([(0, rows)], torch.tensor([[1.0, 0.0]]), k=2).rows
        tensor([[2, 0]])
    """
    device = torch.device(device)
    check_query_rows(queries, k)
    search = _Queries.prepare(queries, largest, unit_norm, device)
    K, D = queries.shape
    best = TopK(torch.empty(K, 0, device=device), torch.empty(K, 0, dtype=torch.int64, device=device))
    screen = _Screen(search, device)
    expected = 0
    for start, block in blocks:
        _check_block(start, block, expected, D)
        expected = start + len(block)
        for offset in range(0, len(block), screen.rows):
            piece = block[offset : offset + screen.rows].detach().to(device)
            best = screen.fold(best, start + offset, piece, k)
    values = best.values if largest else -best.values
    return TopK((values + 0.0).cpu(), best.rows.cpu())  # + 0.0: no negative zeros


def store_blocks(store: GradientStore, rows_per_block: int | None = None) -> Iterator[tuple[int, Tensor]]:
    """Yield the rows of a store as `topk` takes them.

    Args:
        store: an open gradient store.
        rows_per_block: rows at once; by default 16,384 of a store whose blocks are mapped, so that nothing is copied,
            and of one whose blocks are decoded (int8) as many as make 64 MiB.

    Yields:
        (first row number, (B, D) tensor), in order.
    """
    if rows_per_block is None:
        decoded = store.manifest.dtype == "int8"
        rows_per_block = max(1, min(_BLOCK_ROWS, _BLOCK_BYTES // (4 * store.width))) if decoded else _BLOCK_ROWS
    start = 0
    for block in store.matrix().blocks(rows_per_block):
        yield start, block
        start += len(block)


class _Queries(NamedTuple):
    unit: Tensor  # (K, D) float32, norm 1 (a zero query: 0), sign turned so that the largest score is sought
    exact: Tensor  # (K, D) float64, the same with its own norm, or unit norm where the score is a cosine
    norms: Tensor  # (K,) float64: score = norm * <row, unit>
    cosine: bool

    @staticmethod
    def prepare(queries: Tensor, largest: bool, unit_norm: bool, device: torch.device) -> _Queries:
        exact = queries.detach().to(device=device, dtype=torch.float64)
        norms = torch.linalg.vector_norm(exact, dim=1)
        unit = exact / divisors(norms)[:, None]
        sign = 1.0 if largest else -1.0
        if unit_norm:
            exact, norms = unit, (norms > 0).double()
        return _Queries((sign * unit).float(), sign * exact, norms, unit_norm)


class _Screen:
    """The reused buffers of one search, and the error bound learnt so far."""

    def __init__(self, queries: _Queries, device: torch.device) -> None:
        K, D = queries.unit.shape
        self.queries = queries
        budget = _GPU_TILE_BYTES if device.type != "cpu" else _CPU_TILE_BYTES * torch.get_num_threads()
        self.columns = max(1, min(D, 8192))  # wider rows are taken in pieces
        self.tile = 1 << max(64, budget // (4 * self.columns)).bit_length() - 1  # a power of two is faster by a fifth
        self.rows = max(64, min(_BLOCK_ROWS, _SCORES // max(1, K)))
        if device.type != "cpu":  # where a block is copied before it is used
            self.rows = max(64, min(self.rows, _BLOCK_BYTES // (4 * max(1, D))))
        self.tile = min(self.tile, self.rows)
        self.buffer = torch.empty(self.tile * self.columns, device=device)
        self.scores = torch.empty(self.rows, K, device=device)
        self.row_norms = torch.empty(self.rows, device=device)
        # Rounding error of a dot product of length D, relative to the product of the norms: with high probability
        # sqrt(D) roundoffs (Higham and Mary 2019), never more than D of them. Raised where a larger one is seen.
        self.bound = (min(D, 8.0 * D**0.5) + 2) * _ROUNDOFF

    def fold(self, best: TopK, start: int, block: Tensor, k: int) -> TopK:
        """Merge the rows of one block into `best`."""
        scores, row_norms = self._products(block)
        _flag_underflow(row_norms, block)
        if self.queries.cosine:
            scores.div_(divisors(row_norms)[:, None])
        full = best.rows.shape[1] == k
        floor = best.values[:, -1].double() if full else None
        while True:
            row, query = self._survivors(scores, row_norms, floor, k)
            exact, error = self._rescore(block, scores, row_norms, row, query)
            if error <= self.bound:  # otherwise the product is coarser than float32 (TF32, say): screen again
                break
            self.bound = 8 * error
        return _merge(best, exact, row + start, query, k)

    def _products(self, block: Tensor) -> tuple[Tensor, Tensor]:
        """Compute (B, K) inner products with the unit queries, and (B,) norms of the rows, both float32."""
        rows, D = block.shape
        scores, norms = self.scores[:rows], self.row_norms[:rows]
        if self.columns == D:
            for a in range(0, rows, self.tile):
                tile = self._float32(block[a : a + self.tile])
                torch.mm(tile, self.queries.unit.T, out=scores[a : a + self.tile])
                torch.linalg.vector_norm(tile, dim=1, out=norms[a : a + self.tile])
            return scores, norms
        scores.zero_()
        norms.zero_()
        for a in range(0, rows, self.tile):
            for c in range(0, D, self.columns):
                tile = self._float32(block[a : a + self.tile, c : c + self.columns])
                scores[a : a + self.tile].addmm_(tile, self.queries.unit[:, c : c + self.columns].T)
                part = torch.linalg.vector_norm(tile, dim=1)
                norms[a : a + self.tile] = torch.hypot(norms[a : a + self.tile], part)
        return scores, norms

    def _float32(self, tile: Tensor) -> Tensor:
        if tile.dtype == torch.float32:
            return tile
        return self.buffer[: tile.numel()].view(tile.shape).copy_(tile)

    def _survivors(self, scores: Tensor, row_norms: Tensor, floor: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
        """Find row and query of each pair that may belong to the k best: (C,) and (C,)."""
        norms = self.queries.norms
        slack = self.bound * ((row_norms > 0).float() if self.queries.cosine else row_norms)
        slack = slack.where(row_norms.isfinite(), torch.inf)
        if floor is not None:
            # in units of the unit query; nudged down, because the floor was rounded to float32
            cut = ((floor - floor.abs() * 4 * _ROUNDOFF) / divisors(norms)).float()
            # One comparison, with the slack of the longest row, settles nearly every block. Written so that NaN is
            # kept: it may be an overflow of the screen alone.
            few, query = (scores <= cut - slack.max()).logical_not_().nonzero().unbind(1)
            if len(few) <= 4 * k * len(norms) + 64:
                return few, query
        slack = slack[:, None].where(norms > 0, 0.0)
        upper = scores + slack
        keep = ~(upper <= cut) if floor is not None else torch.ones_like(upper, dtype=torch.bool)
        if len(scores) > k:  # the k best lower bounds of the block itself cut off the rest
            lower = scores - slack
            best = lower.where(~lower.isnan(), -torch.inf).topk(k, dim=0).values[-1]
            keep &= ~(upper < best)
        few, query = keep.nonzero().unbind(1)
        return few, query

    def _rescore(
        self, block: Tensor, scores: Tensor, row_norms: Tensor, row: Tensor, query: Tensor
    ) -> tuple[Tensor, float]:
        """Compute the pairs' scores in float64, rounded to float32, (C,); and the screen's largest error among them."""
        exact = torch.empty(len(row), dtype=torch.float64, device=row.device)
        norms = torch.empty_like(exact)
        step = max(1, _PAIR_BYTES // (8 * max(1, block.shape[1])))
        for a in range(0, len(row), step):
            x = block[row[a : a + step]].double()
            norms[a : a + step] = torch.linalg.vector_norm(x, dim=1)
            exact[a : a + step] = x.mul_(self.queries.exact[query[a : a + step]]).sum(1)
        if self.queries.cosine:
            exact = exact / divisors(norms)
        if len(large := (~norms.isfinite()).nonzero().flatten()):  # or the squares of float64 entries overflowed
            exact[large[~block[row[large]].isfinite().all(1)]] = torch.nan
        unit = exact / divisors(self.queries.norms[query])
        error = (unit - scores[row, query]).abs()
        if not self.queries.cosine:
            error = error / norms
        finite = error[error.isfinite() & row_norms[row].isfinite()]
        return exact.float(), float(finite.max()) if len(finite) else 0.0


def _flag_underflow(row_norms: Tensor, block: Tensor) -> None:
    """Set the norm to infinity, "unknown", where squares may have underflowed; rows of zeros keep 0."""
    small = (row_norms < _SMALLEST_NORM).nonzero().flatten()
    if len(small) and block.dtype != torch.float16:  # the squares of float16 numbers are normal in float32
        row_norms[small] = torch.where((block[small] != 0).any(dim=1), torch.inf, 0.0).to(row_norms)


def _merge(best: TopK, values: Tensor, rows: Tensor, query: Tensor, k: int) -> TopK:
    """Select the k best of each query among the old ones and the new pairs."""
    K, held = best.values.shape
    values = torch.cat([best.values.flatten(), values])
    rows = torch.cat([best.rows.flatten(), rows])
    query = torch.cat([torch.arange(K, device=query.device).repeat_interleave(held), query])
    order = rows.argsort(stable=True)
    # NaN below everything; beside it -inf is still a score
    order = order[values[order].nan_to_num(-torch.inf, torch.inf, -torch.inf).argsort(descending=True, stable=True)]
    order = order[values[order].isnan().argsort(stable=True)]
    order = order[query[order].argsort(stable=True)]
    counts = query.bincount(minlength=K)
    kept = min(k, int(counts.min())) if K else 0
    first = counts.cumsum(0) - counts
    pick = order[first[:, None] + torch.arange(kept, device=order.device)]
    return TopK(values[pick], rows[pick])


def check_query_rows(queries: Tensor, k: int) -> None:
    """Refuse what cannot be searched for: a wrong shape or dtype, k < 1, NaN or infinity."""
    if queries.ndim != 2 or not queries.is_floating_point():
        found = f"{tuple(queries.shape)} {queries.dtype}"
        raise FuncattribError(f"expected queries of shape (queries, width) and a floating dtype, found {found}")
    if k < 1:
        raise FuncattribError(f"expected k of at least 1, found {k}")
    bad = (~queries.isfinite().all(dim=1)).nonzero().flatten().tolist()
    if bad:
        raise FuncattribError(f"queries {bad[:5]} are NaN or infinite; check their loss")


def _check_block(start: int, block: Tensor, expected: int, width: int) -> None:
    if block.ndim != 2 or block.shape[1] != width:
        raise FuncattribError(f"expected rows as wide as the queries ({width}), found a block {tuple(block.shape)}")
    if not block.is_floating_point():
        raise FuncattribError(f"expected blocks of a floating dtype, found {block.dtype}; decode its rows first")
    if start < expected:
        raise FuncattribError(f"expected blocks in ascending order, found row {start} after row {expected - 1}")
