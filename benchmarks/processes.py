"""Two processes at one build against one: tokens a second, one thread each.

A build by torchrun is timed inside, from the first batch to the store's end, after a small build that warms everything
up; so start-up is left out, as in a long run. Runs by one process and by several take turns.

    python -m benchmarks.processes [--size 14m] [--documents 128] [--processes 2] [--rounds 5]
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch.distributed as dist

import funcattrib as fa
from benchmarks.inputs import PYTHIA, documents, pythia
from benchmarks.report import write_result

SETTINGS = {"rows_per_shard": 8, "token_batch_size": 2048, "quiet": True}


def work(a: argparse.Namespace) -> None:
    """One of the processes: rank 0 prints the seconds of its build."""
    if int(os.environ["WORLD_SIZE"]) > 1:
        dist.init_process_group("gloo")
    model = pythia(a.size)
    fa.collect_gradients(model, documents(16, seed=1), path=Path(a.out) / "warm", **SETTINGS)
    start = time.perf_counter()
    fa.collect_gradients(model, documents(a.documents), path=Path(a.out) / "run", **SETTINGS)
    if int(os.environ["RANK"]) == 0:
        print("seconds", time.perf_counter() - start)
    if dist.is_initialized():
        dist.destroy_process_group()


def build(a: argparse.Namespace, processes: int) -> float:
    """Seconds of a build by so many processes of one thread."""
    with tempfile.TemporaryDirectory() as folder:
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        words = ["-m", "benchmarks.processes", "--size", a.size, "--documents", str(a.documents), "--worker", folder]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        run = subprocess.run([*launch, *words], capture_output=True, text=True, check=True, env=environment)
    return next(float(line.split()[1]) for line in run.stdout.splitlines() if line.startswith("seconds"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=PYTHIA, default="14m")
    parser.add_argument("--documents", type=int, default=128)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--worker", dest="out", metavar="FOLDER", help="be one of the processes")
    parser.add_argument("--result", help="name of the result file under benchmarks/results")
    a = parser.parse_args()
    if a.out:
        work(a)
        return
    seconds: dict[int, list[float]] = {1: [], a.processes: []}
    for number in range(a.rounds):
        for processes in sorted(seconds, reverse=bool(number % 2)):
            seconds[processes].append(build(a, processes))
    tokens = sum(len(document["input_ids"]) for document in documents(a.documents))
    ratios = [one / several for one, several in zip(seconds[1], seconds[a.processes], strict=True)]
    write_result(
        a.result,
        task=f"A build of Pythia-{a.size}, {tokens:,} tokens, by {a.processes} processes of one thread and by one",
        figures={
            **{f"tokens/s of {n} (median)": round(tokens / statistics.median(each)) for n, each in seconds.items()},
            f"**{a.processes} processes / 1 (median)**": f"{statistics.median(ratios):.2f}",
            "each round": ", ".join(f"{ratio:.2f}" for ratio in ratios),
        },
    )


if __name__ == "__main__":
    main()
