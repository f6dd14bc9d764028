"""What a process holds of second moments when several share them: memory of its own, and how long it takes.

A made-up loss with wide leaves stands for a large model. Two ways to have them are measured:

* ``fit``: a ``precondition`` stage inside a chain, fitted by all with every block (``fit_all_reduced``) and with the
  blocks that it owns (``by_owner``), and then applied to a batch;
* ``trackstar``: moments of finished gradients, each process with the leaves that it owns.

    python -m benchmarks.owners [--leaves 24] [--side 40] [--rows 512] [--processes 1 2]
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.anonymous import anonymous, most_memory
from benchmarks.report import write_result
from funcattrib.chain.chain import compose
from funcattrib.chain.fitting import fit_all_reduced, passes
from funcattrib.chain.per_example import per_example_grad
from funcattrib.chain.state_tree import flatten, restore
from funcattrib.recipes.trackstar import gram_of_store
from funcattrib.runs.blockwise_fit import by_owner
from funcattrib.runtime.assignment import owned
from funcattrib.runtime.memory import release
from funcattrib.runtime.world import world
from funcattrib.store import Manifest, StoreWriter, create_store, lay_out, open_store, share_store
from funcattrib.transforms import precondition
from funcattrib.transforms.mixed_gram import mix_grams

_BATCH = 16


def manifest(a: argparse.Namespace) -> Manifest:
    leaves = lay_out({f"layers.{i}.weight": (a.side, a.side) for i in range(a.leaves)})
    facts = {"model": {"id": "made-up"}, "data": {"id": "made-up"}, "loss": {}, "chain": [], "seed": 0}
    return Manifest(**facts, leaves=leaves, rows=a.rows, rows_per_shard=128, dtype="float16")


def make(path: Path, a: argparse.Namespace) -> None:
    """A store of normal numbers."""
    generator = torch.Generator().manual_seed(0)
    with create_store(path, manifest(a)) as writer:
        for shard in writer.pending:
            rows = torch.randn(len(writer.shard_range(shard)), writer.manifest.width, generator=generator)
            writer.put(shard, rows, {})
        writer.finish()


def of_chain(how: str, path: Path, a: argparse.Namespace) -> None:
    """Fit a preconditioner on every n-th batch of made-up gradients, and apply it."""
    here = world()

    def loss(params: dict[str, Tensor], example: dict[str, Tensor]) -> Tensor:
        return torch.stack([(weight * example["x"]).sum() for weight in params.values()]).sum()

    params = {f"layers.{i}.weight": torch.zeros(a.side, a.side) for i in range(a.leaves)}
    numbers = range(here.rank, a.rows // _BATCH, here.size)
    generator = torch.Generator().manual_seed(here.rank)
    batches = [{"x": torch.randn(_BATCH, a.side, a.side, generator=generator)} for _ in numbers]
    chain = compose(per_example_grad, precondition())
    release(torch.device("cpu"))
    with share_store(path, manifest(a), here) as writer, most_memory() as most:
        before, start = anonymous(), time.perf_counter()
        fold = partial(by_owner, writer) if how == "by_owner" else fit_all_reduced
        (state,) = passes(*chain, loss, params, batches, world=here, fold=fold)
        seconds = time.perf_counter() - start
        state = saved(writer, chain.init(per_example_grad.spec(params))[0], state) if how == "by_owner" else state
        chain(loss, params, batches[0], state)
    tell(before, most, seconds)


def saved(writer: StoreWriter, start: tuple, state: tuple) -> tuple:
    """The state as a run goes on with it: mapped from its folder."""
    writer.save_state(flatten(state))
    return restore(start, writer.load_state() or {})


def of_rows(path: Path) -> None:
    """Sum, mix, decompose the moments of the leaves that this process owns."""
    here, store = world(), open_store(path)
    names = owned({name: leaf.stop - leaf.start for name, leaf in store.leaves.items()}, here)
    release(torch.device("cpu"))
    with most_memory() as most:
        before, start = anonymous(), time.perf_counter()
        mixed = mix_grams(gram_of_store(store, names), gram_of_store(store, names), 1000, here)
        stage = precondition(gram=mixed.gram)
        seconds = time.perf_counter() - start
        del mixed
    tell(before, most, seconds)
    del stage


def tell(before: int, most: list[int], seconds: float) -> None:
    """What this process holds now and held at the most, over what it had before."""
    release(torch.device("cpu"))
    held = (anonymous() - before) / 1e6
    print(f"rank {world().rank} holds {held:.0f} MB, {most[0] / 1e6:.0f} MB at the most, {seconds:.1f} s")


def run(how: str, processes: int, a: argparse.Namespace) -> str:
    """What the processes say of themselves."""
    with tempfile.TemporaryDirectory() as folder:
        if how == "trackstar":
            make(Path(folder) / "store", a)
        launch = ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        sizes = ["--leaves", str(a.leaves), "--side", str(a.side), "--rows", str(a.rows)]
        words = [sys.executable, "-m", *launch, "-m", "benchmarks.owners", *sizes, "--worker", how, f"{folder}/store"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        ended = subprocess.run(words, capture_output=True, text=True, check=True, env=environment)
    return "; ".join(sorted(line for line in ended.stdout.splitlines() if line.startswith("rank")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--leaves", type=int, default=24)
    parser.add_argument("--side", type=int, default=40)
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--worker", nargs=2, metavar=("HOW", "STORE"), help="be one of the processes")
    parser.add_argument("--out", help="name of the result file under benchmarks/results")
    a = parser.parse_args()
    if a.worker:
        if int(os.environ["WORLD_SIZE"]) > 1:
            dist.init_process_group("gloo")
        how, path = a.worker
        of_rows(Path(path)) if how == "trackstar" else of_chain(how, Path(path), a)
        if dist.is_initialized():
            dist.destroy_process_group()
        return
    ways = [(how, n) for how in ("together", "by_owner", "trackstar") for n in a.processes]
    width = a.side**2
    write_result(
        a.out,
        task=f"Second moments of {a.leaves} leaves of {width:,} coordinates (H of each {width**2 * 8 / 1e6:.0f} MB in "
        f"float64, its power {width**2 * 4 / 1e6:.0f}), {a.rows} gradients",
        figures={f"{how}, {n} process{'es' if n > 1 else ''}": run(how, n, a) for how, n in ways},
    )


if __name__ == "__main__":
    main()
