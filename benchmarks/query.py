"""Exact top-10 of 32 queries over 200,000 × 2,304 float16 rows, beside a plain matrix product of that size.

    python -m benchmarks.query [--rounds 9]

Every round runs each measurement once, in turn; ratios are taken within a round. The store is written to a temporary
folder (0.9 GB) and is in the page cache when it is measured; the float32 matrix of the plain product takes 1.8 GB.
"""

from __future__ import annotations

import argparse
import datetime
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.report import header
from funcattrib.query import store_blocks, topk
from funcattrib.store import GradientStore, Manifest, create_store, lay_out, open_store

TILE = 512  # rows: the float32 tile stays in the cache


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rows", type=int, default=200_000)
    options.add_argument("--width", type=int, default=2304)
    options.add_argument("--queries", type=int, default=32)
    options.add_argument("--k", type=int, default=10)
    options.add_argument("--rounds", type=int, default=9)
    options.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    asked = options.parse_args()
    with tempfile.TemporaryDirectory(prefix="funcattrib-query-") as folder:
        store = write_store(Path(folder) / "store", asked.rows, asked.width)
        queries = torch.randn(asked.queries, asked.width, generator=torch.Generator().manual_seed(1))
        report = describe(asked) + measure(store, queries, asked.k, asked.rounds)
    print(report)
    asked.results.mkdir(exist_ok=True)
    (asked.results / f"{datetime.date.today()}-query.md").write_text(report + "\n", encoding="utf-8")


def write_store(path: Path, rows: int, width: int) -> GradientStore:
    manifest = Manifest(
        model={}, data={}, loss={}, chain=[], seed=0, leaves=lay_out({"w": (width,)}), rows=rows, rows_per_shard=16_384
    )
    with create_store(path, manifest) as writer:
        for shard in writer.pending:
            count = len(writer.shard_range(shard))
            generator = torch.Generator().manual_seed(shard)
            writer.put(shard, torch.randn(count, width, generator=generator), {"id": list(range(count))})
        writer.finish()
    return open_store(path)


def measure(store: GradientStore, queries: Tensor, k: int, rounds: int) -> str:
    resident = store.matrix().tensor()
    buffer, tile_scores = torch.empty(TILE, store.width), torch.empty(TILE, len(queries))

    def tiles(multiply: bool) -> None:
        for _, block in store_blocks(store):
            for part in block.split(TILE):
                rows = buffer[: len(part)].copy_(part)
                if multiply:
                    torch.mm(rows, queries.T, out=tile_scores[: len(part)])

    def simple() -> Tensor:
        scores = torch.cat([block.float() @ queries.T for _, block in store_blocks(store)])
        return scores.topk(k, dim=0).indices.T

    plain = "plain product, rows resident in float32"
    convert = "float16 → float32 alone, tile by tile"
    floor = "both of them, tile by tile"
    exact = f"**exact top-{k}**"
    work: dict[str, Callable[[], object]] = {
        plain: lambda: torch.mm(resident, queries.T),
        convert: lambda: tiles(multiply=False),
        floor: lambda: tiles(multiply=True),
        exact: lambda: topk(store_blocks(store), queries, k),
        f"exact top-{k}, unit norm": lambda: topk(store_blocks(store), queries, k, unit_norm=True),
        f"exact top-{k}, opponents": lambda: topk(store_blocks(store), queries, k, largest=False),
        "the simple way: `block.float() @ queries.T`, all scores, `torch.topk`": simple,
    }
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for number in range(rounds + 1):
        for name, run in work.items():
            start = time.perf_counter()
            run()
            if number:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)
    lines = [
        "| | median s | / plain product | / (plain product + conversion) | / both tile by tile |",
        "|---|--:|--:|--:|--:|",
    ]
    both = [a + b for a, b in zip(seconds[plain], seconds[convert], strict=True)]
    for name, taken in seconds.items():
        ratios = [
            statistics.median(a / b for a, b in zip(taken, other, strict=True))
            for other in (seconds[plain], both, seconds[floor])
        ]
        lines.append(f"| {name} | {statistics.median(taken):.3f} | " + " | ".join(f"{r:.2f}" for r in ratios) + " |")
    return "\n".join([*lines, "", check(resident, store, queries, k)])


def check(resident: Tensor, store: GradientStore, queries: Tensor, k: int) -> str:
    """The same search in float64, all scores at once."""
    scores = torch.cat([rows.double() @ queries.double().T for rows in resident.split(8192)]).T
    values, rows = scores.topk(k, dim=1)
    found = topk(store_blocks(store), queries, k)
    error = ((found.values - values) / values).abs().max()
    same = int((found.rows == rows).sum())
    return f"Against all scores in float64: {same} of {rows.numel()} rows equal, values within {error:.1e} relative."


def describe(asked: argparse.Namespace) -> str:
    load = ", ".join(f"{load:.1f}" for load in os.getloadavg())
    lines = [
        f"# Exact top-{asked.k} of {asked.queries} queries over {asked.rows:,} × {asked.width:,} float16 rows",
        "",
        *header(),
        f"* {torch.get_num_threads()} threads; load average at the start {load}",
        f"* medians over {asked.rounds} rounds; ratios are medians of the ratios within a round; page cache warm",
    ]
    return "\n".join([*lines, "", ""])


if __name__ == "__main__":
    main()
