"""Functions of a batch timed side by side: batches are taken in turn, so that drift cancels in a ratio."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from benchmarks import inputs
from funcattrib.data import Columns, plan
from funcattrib.data.documents import read_documents

Batch = dict[str, Tensor]


def batches_of(documents: int, token_batch_size: int, device: str = "cpu") -> tuple[list[Batch], int]:
    """Batches of documents with lengths like web text, as ``funcattrib build`` makes them, and their tokens."""
    read = read_documents(
        inputs.documents(documents), None, Columns(), max_length=1024, truncation=False, vocab_size=None
    )
    return [read.batch(chosen, device) for chosen in plan(read.lengths, token_batch_size)], int(read.lengths.sum())


def timed(
    functions: Mapping[str, Callable[[Batch], object]],
    batches: Sequence[Batch],
    rounds: int,
    device: str = "cpu",
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds that each function takes over all batches, a number a round; every other batch in the reverse order."""

    def one(function: Callable[[Batch], object], batch: Batch) -> float:
        start = clock()
        function(batch)
        if device != "cpu":
            torch.cuda.synchronize()
        return clock() - start

    for batch in batches[:2]:
        for function in functions.values():
            one(function, batch)
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for number in range(rounds):
        spent = dict.fromkeys(functions, 0.0)
        for at, batch in enumerate(batches):
            for name in list(functions)[:: 1 if (number + at) % 2 else -1]:
                spent[name] += one(functions[name], batch)
        for name, each in spent.items():
            seconds[name].append(each)
    return seconds


def beside(seconds: Mapping[str, list[float]], name: str, other: str) -> dict[str, str | float]:
    """The ratio of two functions' times: its median, and that of each round."""
    ratios = [ours / theirs for ours, theirs in zip(seconds[name], seconds[other], strict=True)]
    return {
        f"{name} / {other} (median)": round(statistics.median(ratios), 3),
        f"{name} / {other} (each round)": ", ".join(f"{r:.3f}" for r in ratios),
    }


def speed(seconds: Mapping[str, list[float]], tokens: int) -> dict[str, int]:
    """Tokens a second of each function, the median of its rounds."""
    return {f"{name} tokens/s (median)": round(tokens / statistics.median(each)) for name, each in seconds.items()}
