"""What a model in shards costs: memory of a rank, and time beside the same ranks with a whole model each.

share               rows of every weight on rank 0
gathered            most bytes of gathered weights alive at once, while gradients are projected
reading             most anonymous memory more than before, while the model is read from its files

python -m benchmarks.sharded [--size 14m] [--processes 2] [--token-batch-size 2048] [--documents 48] [--rounds 5]
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn

import funcattrib as fa
from benchmarks.anonymous import most_memory
from benchmarks.inputs import PYTHIA, pythia
from benchmarks.paired import Batch, batches_of, beside, speed
from benchmarks.report import write_result
from funcattrib.cli.load import shards_of
from funcattrib.models.functional import parameters_of, sharing
from funcattrib.models.loading import load_model
from funcattrib.models.sharded_loading import load_sharded
from funcattrib.weights.lockstep import Lockstep
from funcattrib.weights.sharded import Gathers, Sharded

_FOLDER = "BENCHMARK_FOLDER"
_MIB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=PYTHIA, default="14m")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--token-batch-size", type=int, default=2048)
    parser.add_argument("--projection-dim", type=int, default=16)
    parser.add_argument("--documents", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", help="name of the result file under benchmarks/results")
    a = parser.parse_args()
    if _FOLDER in os.environ:
        measure(a, os.environ[_FOLDER])
        return
    with tempfile.TemporaryDirectory() as folder:
        model = pythia(a.size)
        model.save_pretrained(f"{folder}/whole")
        model.gpt_neox.layers = model.gpt_neox.layers[:1]
        model.config.num_hidden_layers, model.config.vocab_size = 1, 32
        model.resize_token_embeddings(32)
        model.save_pretrained(f"{folder}/small")
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={a.processes}"]
        environment = {"OMP_NUM_THREADS": "1", **os.environ, _FOLDER: folder}
        subprocess.run(
            [sys.executable, *launch, "-m", "benchmarks.sharded", *sys.argv[1:]], env=environment, check=True
        )


def measure(a: argparse.Namespace, folder: str) -> None:
    """One of the processes."""
    dist.init_process_group("cpu:gloo,cuda:nccl" if a.device != "cpu" else "gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    device = torch.device("cpu" if a.device == "cpu" else f"cuda:{rank}")
    shards = shards_of(device)
    load_model(f"{folder}/small", device=str(device), shards=shards)  # imports, and what libraries keep
    with most_memory() as readout:
        sharded = load_sharded(f"{folder}/whole", torch.float32, shards, {})
    whole = load_model(f"{folder}/whole", device=str(device)).model
    batches, tokens = batches_of(a.documents, a.token_batch_size, str(device))
    mine = batches[rank::size]

    computes = {name: projecting(model, a.projection_dim) for name, model in (("sharded", sharded), ("whole", whole))}
    gathers = sharing(parameters_of(sharded))
    steps = {"sharded": Lockstep(gathers, lambda: batches[-1]), "whole": Lockstep()}
    together = {name: steps[name].of(compute) for name, compute in computes.items()}
    seconds: dict[str, list[float]] = {name: [] for name in computes}
    for name, compute in together.items():
        passed(steps[name], compute, mine[:2], device)
    for number in range(a.rounds):
        for name in list(computes)[:: 1 if number % 2 else -1]:
            seconds[name].append(passed(steps[name], together[name], mine, device))
    with gathered(gathers) as alive:
        passed(steps["sharded"], together["sharded"], mine[:2], device)

    params = parameters_of(sharded)
    sizes = sorted(tensor.numel() * tensor.element_size() for tensor in params.values())
    share = sum(tensor.held.rows.nbytes for tensor in params.values() if isinstance(tensor.held, Sharded))
    if rank == 0:
        write_result(
            a.out,
            task=f"Pythia-{a.size} in shards on {size} processes beside whole models",
            figures={
                "documents": a.documents,
                "tokens": tokens,
                "threads of each process": torch.get_num_threads(),
                "whole model, MiB": round(sum(sizes) / _MIB, 1),
                "share, MiB": round(share / _MIB, 1),
                "gathered, MiB": round(max(alive) / _MIB, 1),
                "share and gathered, MiB": round((share + max(alive)) / _MIB, 1),
                "share and the two largest weights, MiB": round((share + sum(sizes[-2:])) / _MIB, 1),
                "reading, MiB": round(readout[0] / _MIB, 1),
                **speed(seconds, tokens),
                **beside(seconds, "sharded", "whole"),
            },
            device=str(device),
        )
    dist.barrier()
    dist.destroy_process_group()


def projecting(model: nn.Module, dimension: int) -> Callable[[Batch], object]:
    """Projected gradients of a batch."""
    loss, params = fa.causal_lm_loss(model)
    return fa.compose(fa.per_example_grad, fa.project(dimension)).bind(loss, params)


def passed(step: Lockstep, compute: Callable[[Batch], object], batches: list[Batch], device: torch.device) -> float:
    """Seconds until all processes have computed their batches."""
    dist.barrier()
    start = time.perf_counter()
    for batch in step.through(batches):
        compute(batch)
    if device.type != "cpu":
        torch.cuda.synchronize()
    dist.barrier()
    return time.perf_counter() - start


@contextmanager
def gathered(gathers: Gathers) -> Iterator[list[int]]:
    """Bytes of gathered weights alive, each time that a gather begins."""
    alive, seen, begin = [0], [0], gathers._begin

    def counted(weight: Sharded):
        flying = begin(weight)
        size = flying.whole.nbytes
        alive[0] += size
        seen.append(alive[0])
        weakref.finalize(flying.whole.untyped_storage(), lambda: alive.__setitem__(0, alive[0] - size))
        return flying

    gathers._begin = counted
    try:
        yield seen
    finally:
        del gathers._begin


if __name__ == "__main__":
    main()
