"""What a device makes of plain matrix products: the FLOP/s that ``funcattrib plan --device-flops`` asks for.

Square products, and those of a language model's layers on 2048 tokens. Each is timed many times; the best counts, which
on a machine with other work is that of a quiet moment.

    python -m benchmarks.flops [--device cuda] [--dtype bfloat16] [--seconds 5] [--out flops]
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch

from benchmarks.report import write_result

SQUARE = (2048, 2048, 2048)
SHAPES = {  # rows × inner → columns
    "1024 × 1024 → 1024": (1024, 1024, 1024),
    "2048 × 2048 → 2048": SQUARE,
    "4096 × 4096 → 4096": (4096, 4096, 4096),
    "2048 × 128 → 512": (2048, 128, 512),
    "2048 × 512 → 2048": (2048, 512, 2048),
    "2048 × 2048 → 8192": (2048, 2048, 8192),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--seconds", type=float, default=5.0, help="of timing each product")
    parser.add_argument("--out", help="name of the result file under benchmarks/results")
    a = parser.parse_args()

    figures: dict[str, object] = {"dtype": a.dtype, "threads": torch.get_num_threads()}
    best = 0.0
    for name, shape in SHAPES.items():
        rates = measured(shape, a.device, getattr(torch, a.dtype), a.seconds)
        best = max(best, *rates)
        figures[f"{name}, GFLOP/s (best, median)"] = f"{max(rates) / 1e9:.0f}, {statistics.median(rates) / 1e9:.0f}"
    figures["FLOP/s"] = f"{best:.3g}"
    write_result(a.out, task="Matrix products of this machine", figures=figures, device=a.device)


def measured(shape: tuple[int, int, int], device: str, dtype: torch.dtype, seconds: float) -> list[float]:
    """FLOP/s of each repetition."""
    multiply, rates = product(shape, device, dtype), []
    multiply()
    start = time.perf_counter()
    while time.perf_counter() - start < seconds:
        begin = time.perf_counter()
        multiply()
        if device != "cpu":
            torch.cuda.synchronize()
        rates.append(flops(shape) / (time.perf_counter() - begin))
    return rates


def product(shape: tuple[int, int, int], device: str, dtype: torch.dtype) -> Callable[[], torch.Tensor]:
    """A matrix product into memory of its own."""
    rows, inner, columns = shape
    left = torch.randn(rows, inner).to(device, dtype)
    right = torch.randn(inner, columns).to(device, dtype)
    return partial(torch.mm, left, right, out=torch.empty(rows, columns, device=device, dtype=dtype))


def flops(shape: tuple[int, int, int]) -> int:
    """Of one product."""
    rows, inner, columns = shape
    return 2 * rows * inner * columns


if __name__ == "__main__":
    main()
