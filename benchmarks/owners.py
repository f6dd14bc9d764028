"""What a process holds of TrackStar's second moments when several share them: memory of scoring finished gradients.

A store of made-up rows with wide leaves stands for a large model. Each process sums, mixes, decomposes and applies the
moments of the leaves that it owns.

    python -m benchmarks.owners [--leaves 24] [--side 40] [--rows 512] [--processes 1 2]
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks.report import own_peak, write_result
from funcattrib.curvature import mix, owned
from funcattrib.distributed import world
from funcattrib.recipes.trackstar import gram_of_store
from funcattrib.store import Manifest, create_store, lay_out, open_store
from funcattrib.transforms import precondition


def make(path: Path, a: argparse.Namespace) -> None:
    """A store of normal numbers."""
    leaves = lay_out({f"layers.{i}.weight": (a.side, a.side) for i in range(a.leaves)})
    facts = {"model": {"id": "made-up"}, "data": {"id": "made-up"}, "loss": {}, "chain": [], "seed": 0}
    manifest = Manifest(**facts, leaves=leaves, rows=a.rows, rows_per_shard=128, dtype="float16")
    generator = torch.Generator().manual_seed(0)
    with create_store(path, manifest) as writer:
        for shard in writer.pending:
            writer.put(shard, torch.randn(len(writer.shard_range(shard)), manifest.width, generator=generator), {})
        writer.finish()


def work(path: Path) -> None:
    """One of the processes: prints the bytes of moments that it holds, and its memory over what it had before."""
    if int(os.environ["WORLD_SIZE"]) > 1:
        dist.init_process_group("gloo")
    here, store = world(), open_store(path)
    names = owned({name: leaf.stop - leaf.start for name, leaf in store.leaves.items()}, here)
    before = own_peak()
    gram = gram_of_store(store, names)
    mixed = mix(gram, gram_of_store(store, names), 1000, here)
    precondition(gram=mixed.gram)
    held = sum(matrix.numel() * matrix.element_size() for matrix in gram.values()) / 1e6
    print(f"rank {here.rank} holds {held:.0f} MB, peak {own_peak() - before:.0f} MB")
    if dist.is_initialized():
        dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--leaves", type=int, default=24)
    parser.add_argument("--side", type=int, default=40)
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--worker", metavar="STORE", type=Path, help="be one of the processes")
    parser.add_argument("--out", help="name of the result file under benchmarks/results")
    a = parser.parse_args()
    if a.worker:
        work(a.worker)
        return
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder) / "store", a)
        for processes in a.processes:
            launch = ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
            words = [sys.executable, "-m", *launch, "-m", "benchmarks.owners", "--worker", f"{folder}/store"]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            run = subprocess.run(words, capture_output=True, text=True, check=True, env=environment)
            told = sorted(line for line in run.stdout.splitlines() if line.startswith("rank"))
            figures[f"{processes} processes"] = "; ".join(told)
    width = a.side**2
    write_result(
        a.out,
        task=f"Second moments of {a.leaves} leaves of {width:,} coordinates ({width**2 * 8 / 1e6:.0f} MB each), shared",
        figures=figures,
    )


if __name__ == "__main__":
    main()
