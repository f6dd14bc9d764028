"""``--token-batch-size auto``: the number of tokens in a batch, found by trial.

1, 2, 4, … copies of the longest document go through what the run will compute, until memory or speed says stop:

    memory   the next size would take more than a share of what is available (``SHARE``)
    speed    two doublings in a row did not raise tokens/s by more than ``WITHIN``

The smallest size whose tokens/s are within ``WITHIN`` of the best is taken: a larger batch costs memory and gives
nothing. What was found is kept for the next run (``budget_cache.py``).

Processes that hold the model together try together, each on its device, and what any of them says holds for all: the
most seconds and bytes, the least room. Where memory is short for one it is short.
"""

import logging
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from funcattrib.chain.fitting import bind_observed
from funcattrib.data import plan
from funcattrib.runs.budget_cache import Budget, keep, key_of, known
from funcattrib.runs.error_hints import explained
from funcattrib.runs.prepare import Prepared
from funcattrib.runs.workload import Work, flat, template
from funcattrib.runtime import memory
from funcattrib.runtime.world import SINGLE_PROCESS, World
from funcattrib.store import Manifest, read_manifest
from funcattrib.store.manifest import MANIFEST_FILE
from funcattrib.types import Batch

log = logging.getLogger(__name__)

SHARE = {"cuda": 0.8, "cpu": 0.5}
"""Share of the memory that is available when the trial begins, by kind of device."""
WITHIN = 0.04
"""Differences in speed that count for nothing."""

_MOST_TOKENS = 1 << 20  # of a trial: beyond this no device gains anything
_STEADY = 0.3  # seconds of measuring after which one time is believed


class Cost(NamedTuple):
    """Cost of computing one batch: seconds, and the bytes it took at the most beside what was there."""

    seconds: float
    peak: int


class Found(NamedTuple):
    """Documents of the longest kind in a batch, what they cost (None: not even one fits), and what ended the search."""

    documents: int
    cost: Cost | None
    ended: Literal["speed", "memory", "size"]


def with_budget(
    prepared: Prepared, path: str | Path, *, overwrite: bool = False, tried: Work | None = None
) -> Prepared:
    """Return the same work with the tokens of a batch, found here where the settings say ``auto``; they go into the
    manifest.

    Args:
        path: the folder of the run, which may have been begun with a number.
        tried: the work whose chain is tried, where that is not the one of ``prepared`` (scores after it).
    """
    if prepared.work.budget:
        return prepared
    tried = prepared.work if tried is None else tried
    world, shared = prepared.work.world, prepared.work.step.shared
    find = partial(token_budget, tried, prepared.manifest, path, overwrite=overwrite, fits=prepared.given is None)
    found = find(world) if shared else world.on_rank_zero(find)
    tokens = world.broadcast_object(found)  # rank 0's, for all: with another a rank would compute other bits
    computed_with = {**prepared.manifest.computed_with, "token_batch_size": tokens}
    return prepared._replace(
        work=prepared.work._replace(budget=tokens), manifest=replace(prepared.manifest, computed_with=computed_with)
    )


def token_budget(
    work: Work, manifest: Manifest, path: str | Path, world: World = SINGLE_PROCESS, *, overwrite: bool, fits: bool
) -> int:
    """Return the tokens of a batch: those of the run that is continued, or found before, or found now.

    Args:
        work: what is computed, with the chain that is run.
        manifest: of what comes out.
        path: the folder of the run.
        world: the processes that try together, all of which call this.
        overwrite: what is in the folder does not count.
        fits: the chain's statistics are fitted here too, with the same batches.
    """
    longest = max(1, int(work.corpus.lengths.max()))
    share = SHARE[work.device.type if work.device.type in SHARE else "cpu"]
    room = int(share * min(world.all_gather_object(memory.available(work.device))))
    key = key_of(work, manifest, longest, fits)
    before = world.broadcast_object(world.on_rank_zero(lambda: _before(work, None if overwrite else path, key, room)))
    if before is not None:
        return int(before)
    useful = min(_MOST_TOKENS, int(work.corpus.lengths[: manifest.rows_per_shard].sum()))  # a batch is within a shard
    with explained():
        found = search_batch_size(_trial(work, manifest, longest, fits, world), room, most=math.ceil(useful / longest))
    tokens = found.documents * longest
    if found.cost is None:
        return tokens  # the run will say which document does not fit
    if world.is_rank_zero:
        budget = Budget(tokens, tokens / found.cost.seconds, found.cost.peak)
        if found.ended != "size":  # else with more documents more might be found
            keep(key, budget)
        why = {"speed": "more gain nothing", "memory": "more do not fit", "size": "more are not in a shard"}
        _say(work, budget, room, f"{found.documents} of the longest, {longest:,} tokens; {why[found.ended]}")
    return tokens


def _before(work: Work, path: str | Path | None, key: str, room: int) -> int | None:
    """Return the budget of the run at ``path`` that is continued, or one found in an earlier run that fits now."""
    begun = None if path is None or not os.path.exists(Path(path) / MANIFEST_FILE) else read_manifest(path)
    if begun is not None and isinstance(number := begun.computed_with.get("token_batch_size"), int):
        return number
    found = known(key)
    if found is None or found.peak > room:
        return None
    _say(work, found, room, "as found before")
    return found.tokens


def search_batch_size(measure: Callable[[int], Cost | None], room: int, most: int = 1 << 20) -> Found:
    """Find the number of documents in a batch.

    Args:
        measure: documents → what a batch of them costs; None where memory was short.
        room: bytes that a batch may take.
        most: documents to try at the most.

    Example:
        >>> search_batch_size(lambda n: Cost(seconds=0.1 + 0.01 * n, peak=n << 20), room=100 << 20).documents
        64
        >>> search_batch_size(lambda n: Cost(seconds=0.1 * n, peak=n << 20), room=100 << 20).documents
        1
    """
    tried: dict[int, Cost] = {}
    size, ended = 1, "size"
    while size <= most:
        cost = measure(size)
        if cost is None or (tried and cost.peak > room):
            ended = "memory"
            break
        tried[size] = cost
        if _steady(tried):
            ended = "speed"
            break
        if _expected(tried) > room:
            ended = "memory"
            break
        size *= 2
    if not tried:
        return Found(1, None, "memory")
    best = max(_speeds(tried).values())
    chosen = next(size for size, speed in _speeds(tried).items() if speed >= (1 - WITHIN) * best)
    return Found(chosen, tried[chosen], "speed" if chosen < max(tried) else ended)  # type: ignore[arg-type]


def _speeds(tried: dict[int, Cost]) -> dict[int, float]:
    return {size: size / max(cost.seconds, 1e-9) for size, cost in tried.items()}


def _steady(tried: dict[int, Cost]) -> bool:
    """Return whether the last two doublings gained nothing."""
    speeds = [*_speeds(tried).values()]
    return len(speeds) > 2 and max(speeds[-2:]) <= (1 + WITHIN) * max(speeds[:-2])


def _expected(tried: dict[int, Cost]) -> int:
    """Predict the bytes of a batch twice as large, on the line through the last two."""
    *before, last = [cost.peak for cost in tried.values()]
    return last + 2 * max(0, last - before[-1]) if before else last


def _trial(work: Work, manifest: Manifest, longest: int, fits: bool, world: World) -> Callable[[int], Cost | None]:
    """Return a function that measures batches of the longest document, through everything that the run computes of a
    batch.

    Speed is that of the rows. Memory is the most of rows, fitted statistics, and the batch of most documents that the
    first shard will have at this budget, which has most rows where documents are short.
    """
    state, stages = template(work), work.chain.stages
    rows = work.chain.bind(work.loss, work.params, state)  # a state of zeros, which takes the same work
    lengths = work.corpus.lengths
    first = int(np.argmax(lengths))
    shard = lengths[: manifest.rows_per_shard]
    steps: list[Callable[[Batch], Any]] = [rows]
    if fits:
        steps += [
            bind_observed(work.chain.started(), stages[: at + 1], work.loss, work.params, state[:at])
            for at, stage in enumerate(stages)
            if stage.fitted
        ]
    of_rows, *of_stages = [work.step.of(step) for step in steps]

    def run(step: Callable[[Batch], Any], documents: Sequence[int]) -> float | None:
        """Measure seconds; None where memory was short."""
        begin = time.perf_counter()
        try:
            result = step(work.corpus.batch(documents, work.device))
            if step is of_rows:
                flat(result)
            if work.device.type == "cuda":
                torch.cuda.synchronize(work.device)
        except (RuntimeError, MemoryError) as error:
            if not memory.is_short(error):
                raise
            return None
        return time.perf_counter() - begin

    def slowest(step: Callable[[Batch], Any], documents: Sequence[int]) -> float | None:
        """Return the slowest of all who try."""
        seconds = world.all_gather_object(run(step, documents))
        return None if None in seconds else max(seconds)

    def measured(size: int) -> Cost | None:
        memory.release(work.device)
        before = memory.in_use(work.device)
        many = max(plan(shard, size * longest), key=len)
        tried = [(step, [first] * size) for step in of_stages]
        if len(many) > size:
            tried += [(step, many) for step in (of_rows, *of_stages)]
        if any(slowest(*each) is None for each in tried):
            return None
        seconds = _fastest(lambda: slowest(of_rows, [first] * size))
        peak = max(world.all_gather_object(max(0, memory.peak(work.device) - before)))
        return None if seconds is None else Cost(seconds, peak)

    def measure(size: int) -> Cost | None:
        if size == 1:  # the first calls of all kernels are slow
            measured(size)
        return measured(size)

    return measure


def _fastest(run: Callable[[], float | None]) -> float | None:
    """Measure the fastest of a few runs, in seconds; one is enough where it takes long. None where memory was short."""
    all_seconds: list[float] = []
    while len(all_seconds) < 3 and sum(all_seconds) <= _STEADY:
        if (seconds := run()) is None:
            return None
        all_seconds.append(seconds)
    return min(all_seconds)


def _say(work: Work, budget: Budget, room: int, origin: str) -> None:
    if not work.quiet:
        log.info(
            "token batch size %s (%s): %s tokens/s, %.2f GiB a batch of the %.1f GiB that it may take",
            *(f"{budget.tokens:,}", origin, f"{budget.speed:,.0f}", budget.peak / 2**30, room / 2**30),
        )
