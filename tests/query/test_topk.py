"""Exact top-k against the dense product in float64."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from funcattrib.errors import FuncattribError
from funcattrib.query.topk import TopK, store_blocks, topk
from tests.support.sweeps import crossed

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]


def in_blocks(matrix: Tensor, rows: int) -> Iterator[tuple[int, Tensor]]:
    for start in range(0, len(matrix), rows):
        yield start, matrix[start : start + rows]


def dense(matrix: Tensor, queries: Tensor, k: int, largest: bool = True, unit_norm: bool = False) -> TopK:
    """The oracle: every score in float64, rounded to float32, sorted with the lower row first."""
    x, q = matrix.double(), queries.double()
    if unit_norm:
        x, q = (m / m.norm(dim=1, keepdim=True).where(m.norm(dim=1, keepdim=True) > 0, 1.0) for m in (x, q))
    scores = torch.stack([(x * one).sum(1) for one in q]).float()
    order = scores.argsort(dim=1, descending=largest, stable=True)[:, :k]
    return TopK(scores.gather(1, order), order)


def assert_same(found: TopK, expected: TopK) -> None:
    torch.testing.assert_close(found.values, expected.values, rtol=1e-5, atol=0, equal_nan=True)
    # where rows differ, their scores must be equal to a rounding
    differ = found.rows != expected.rows
    assert not differ.any() or torch.allclose(found.values[differ], expected.values[differ], rtol=3e-7, atol=0)
    assert found.values.dtype == torch.float32
    assert found.rows.dtype == torch.int64
    assert all(len(set(row)) == len(row) for row in found.rows.tolist())


DTYPES = [torch.float16, torch.bfloat16, torch.float32]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("dtype", "largest", "unit_norm"), crossed(DTYPES, [True, False], [True, False]))
def test_agrees_with_dense_float64(dtype: torch.dtype, largest: bool, unit_norm: bool, device: str) -> None:
    generator = torch.Generator().manual_seed(0)
    matrix = (torch.randn(1500, 77, generator=generator) * torch.rand(1500, 1, generator=generator)).to(dtype)
    queries = torch.randn(5, 77, generator=generator)
    for rows, k in [(1, 3), (64, 1), (700, 10), (5000, 7), (333, 5000)]:
        found = topk(in_blocks(matrix, rows), queries, k, largest=largest, unit_norm=unit_norm, device=device)
        assert_same(found, dense(matrix, queries, k, largest, unit_norm))


def test_rows_wider_than_the_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["funcattrib.query.topk"], "_CPU_TILE_BYTES", 4096)
    generator = torch.Generator().manual_seed(1)
    matrix, queries = torch.randn(200, 20_000, generator=generator).half(), torch.randn(3, 20_000, generator=generator)
    for unit_norm in (False, True):
        assert_same(
            topk([(0, matrix)], queries, 5, unit_norm=unit_norm), dense(matrix, queries, 5, unit_norm=unit_norm)
        )


def test_the_answer_does_not_depend_on_the_block_size() -> None:
    matrix, queries = torch.randn(999, 300).half(), torch.randn(4, 300)
    whole = topk([(0, matrix)], queries, 20)
    for rows in (1, 13, 256, 998):
        parts = topk(in_blocks(matrix, rows), queries, 20)
        assert torch.equal(whole.rows, parts.rows)
        assert torch.equal(whole.values, parts.values)


@pytest.mark.parametrize("rows", [3, 50, 1000])
def test_equal_rows_come_in_order(rows: int) -> None:
    """Duplicate documents have duplicate gradients; a matrix product may round them differently by position."""
    distinct = torch.randn(7, 301).half()
    matrix = distinct.repeat(60, 1)
    query = distinct[3:4].float() + 0.1 * torch.randn(1, 301)
    found = topk(in_blocks(matrix, rows), query, 70)
    assert found.rows[0, :60].tolist() == list(range(3, 420, 7))
    assert found.values[0, :60].unique().numel() == 1


def test_close_scores_beside_a_large_common_direction() -> None:
    """All scores nearly equal: rounding of a float32 product alone would shuffle them."""
    generator = torch.Generator().manual_seed(2)
    matrix = 100 + torch.randn(3000, 512, generator=generator) * 1e-3
    query = torch.rand(1, 512, generator=generator)
    assert_same(topk(in_blocks(matrix, 512), query, 25), dense(matrix, query, 25))
    assert torch.equal(topk(in_blocks(matrix, 512), query, 25).rows, dense(matrix, query, 25).rows)


def test_a_coarse_matrix_product_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """TF32 or bfloat16 products, which a user may have switched on, must not change the answer."""
    true_mm = torch.mm

    def coarse(a: Tensor, b: Tensor, *, out: Tensor) -> Tensor:
        return true_mm(a.bfloat16().float(), b.bfloat16().float(), out=out)

    matrix, queries = torch.randn(4000, 256), torch.randn(6, 256)
    expected = dense(matrix, queries, 10)
    monkeypatch.setattr(torch, "mm", coarse)
    assert torch.equal(topk(in_blocks(matrix, 512), queries, 10).rows, expected.rows)


@pytest.mark.parametrize("unit_norm", [True, False])
def test_zero_rows_and_zero_queries_score_zero(unit_norm: bool) -> None:
    matrix = torch.zeros(2000, 8)
    matrix[1500, 0], matrix[1700, 0] = 2.0, -3.0
    queries = torch.tensor([[1.0] + [0.0] * 7, [0.0] * 8])
    found = topk(in_blocks(matrix, 100), queries, 3, unit_norm=unit_norm)
    assert found.rows.tolist() == [[1500, 0, 1], [0, 1, 2]]
    assert found.values.tolist() == [[1.0 if unit_norm else 2.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
    assert not torch.signbit(topk(in_blocks(matrix, 100), queries, 3, largest=False).values[1]).any()


@pytest.mark.parametrize("unit_norm", [True, False])
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_squares_that_leave_float32(scale: float, unit_norm: bool) -> None:
    matrix = torch.randn(700, 16).mul(scale).bfloat16()
    matrix[5] = 0
    queries = torch.randn(3, 16)
    assert_same(
        topk(in_blocks(matrix, 99), queries, 9, unit_norm=unit_norm), dense(matrix, queries, 9, True, unit_norm)
    )


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("unit_norm", [True, False])
def test_rows_that_are_not_finite_come_last(largest: bool, unit_norm: bool) -> None:
    matrix = torch.rand(50, 4)
    matrix[7, 2] = torch.nan
    matrix[9, 1], matrix[11, 0] = torch.inf, -torch.inf
    search = {"largest": largest, "unit_norm": unit_norm}
    found = topk(in_blocks(matrix, 8), torch.ones(1, 4), 50, **search)
    assert found.rows[0, -3:].tolist() == [7, 9, 11]
    assert found.values[0].isnan().nonzero().flatten().tolist() == [47, 48, 49]
    finite = [row for row in range(50) if row not in (7, 9, 11)]
    expected = topk(in_blocks(matrix[finite], 8), torch.ones(1, 4), 10, **search)
    few = topk(in_blocks(matrix, 8), torch.ones(1, 4), 10, **search)
    assert few.rows[0].tolist() == [finite[row] for row in expected.rows[0]]
    assert torch.equal(few.values, expected.values)


def test_scores_beyond_float32_of_finite_rows_are_scores() -> None:
    matrix = torch.tensor([[1e30], [1.0], [torch.nan], [-1e30]])
    found = topk([(0, matrix)], torch.tensor([[1e30]]), 4)
    assert found.rows.tolist() == [[0, 1, 3, 2]]
    assert topk([(0, 1e270 * matrix.double())], torch.tensor([[1.0]]), 4).rows.tolist() == [[0, 1, 3, 2]]


def test_gaps_and_short_inputs() -> None:
    rows = torch.eye(2)
    assert topk([(10, rows), (40, 2 * rows)], torch.ones(1, 2), 9).rows.tolist() == [[40, 41, 10, 11]]
    assert topk([], torch.ones(3, 2), 4).rows.shape == (3, 0)
    assert topk([(0, rows[:0]), (0, rows)], torch.ones(3, 2), 4).rows.shape == (3, 2)


def test_many_queries() -> None:
    matrix, queries = torch.randn(500, 24).half(), torch.randn(700, 24)
    assert_same(topk(in_blocks(matrix, 200), queries, 4), dense(matrix, queries, 4))


def test_memory_does_not_grow_with_the_number_of_blocks() -> None:
    """Peak resident memory after 8 blocks and after 100 of the same size (0.3 GB of rows in float32)."""
    program = """
import resource, torch
from funcattrib.query.topk import topk
block, queries = torch.randn(512, 1500).half(), torch.randn(16, 1500)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for count in (8, 100):
    topk(((512 * i, block) for i in range(count)), queries, 10)
    print(peak())
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    few, many = (int(line) / 1024 for line in run.stdout.split())
    assert many - few < 32  # MiB


def test_store_blocks_bounds_what_is_decoded() -> None:
    asked: list[int] = []

    def blocks(rows: int) -> Iterator[Tensor]:
        asked.append(rows)
        return iter([torch.zeros(3, 4), torch.ones(2, 4)])

    matrix = SimpleNamespace(blocks=blocks)
    store: Any = SimpleNamespace(width=4, matrix=lambda: matrix, manifest=SimpleNamespace(dtype="float16"))
    assert [(start, len(block)) for start, block in store_blocks(store)] == [(0, 3), (3, 2)]
    store.width = 2**20
    for store.manifest.dtype in ("float16", "int8"):
        list(store_blocks(store))
    list(store_blocks(store, 7))
    assert asked == [16_384, 16_384, 16, 7]


@pytest.mark.parametrize(
    ("blocks", "queries", "k", "message"),
    [
        ([], torch.ones(3), 1, "expected queries of shape"),
        ([], torch.ones(3, 2, dtype=torch.int64), 1, "floating dtype"),
        ([], torch.ones(3, 2), 0, "k of at least 1"),
        ([], torch.tensor([[1.0], [torch.nan]]), 1, r"queries \[1\] are NaN or infinite"),
        ([(0, torch.ones(2, 3))], torch.ones(1, 2), 1, "as wide as the queries"),
        ([(0, torch.ones(2, 2, dtype=torch.int8))], torch.ones(1, 2), 1, "torch.int8"),
        (
            [(2, torch.ones(2, 2)), (3, torch.ones(2, 2))],
            torch.ones(1, 2),
            1,
            "ascending order, found row 3 after row 3",
        ),
    ],
)
def test_refusals(blocks: list[tuple[int, Tensor]], queries: Tensor, k: int, message: str) -> None:
    with pytest.raises(FuncattribError, match=message):
        topk(blocks, queries, k)
