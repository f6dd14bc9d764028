"""What a build costs by the weights' precision: tokens a second, and memory, of one model in several.

The model is saved once and loaded in each precision by a process of its own, so that what is held is its own: weights
before the first batch, and the most that was held while batches were computed.

    python -m benchmarks.precision [--size 70m] [--precisions bf16 int8 int4] [--documents 48] [--device cpu]
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import funcattrib as fa
from benchmarks.inputs import PYTHIA, pythia
from benchmarks.paired import batches_of, timed
from benchmarks.report import write_result
from funcattrib.models.loading import load_model
from funcattrib.runtime import memory


def work(folder: str, precision: str, a: argparse.Namespace) -> None:
    """Prints tokens, seconds of each round, and MiB of weights and of all at the most."""
    device = torch.device(a.device)
    memory.release(device)
    before = memory.in_use(device)
    model = load_model(folder, precision=precision, device=a.device).model
    memory.release(device)
    weights = memory.in_use(device) - before
    batches, tokens = batches_of(a.documents, a.token_batch_size, a.device)
    loss, params = fa.causal_lm_loss(model)
    step = fa.compose(fa.per_example_grad, fa.project(a.projection_dim)).bind(loss, params)
    seconds = timed({"step": step}, batches, a.rounds, a.device)["step"]
    held = {"weights": weights / 2**20, "peak": (memory.peak(device) - before) / 2**20}
    print("figures", json.dumps({"tokens": tokens, "seconds": seconds, **held}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=PYTHIA, default="70m")
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16", "int8", "int4"])
    parser.add_argument("--token-batch-size", type=int, default=2048)
    parser.add_argument("--projection-dim", type=int, default=16)
    parser.add_argument("--documents", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--worker", nargs=2, metavar=("FOLDER", "PRECISION"), help="be the process of one precision")
    parser.add_argument("--out", help="name of the result file under benchmarks/results")
    a = parser.parse_args()
    if a.worker:
        work(*a.worker, a)
        return
    figures: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as folder:
        pythia(a.size, torch.bfloat16).save_pretrained(Path(folder) / "model")
        for precision in a.precisions:
            words = [*sys.argv[1:], "--worker", f"{folder}/model", precision]
            run = subprocess.run(
                [sys.executable, "-m", "benchmarks.precision", *words], stdout=subprocess.PIPE, text=True, check=True
            )
            told = json.loads(next(x for x in run.stdout.splitlines() if x.startswith("figures")).split(" ", 1)[1])
            figures["tokens"] = told["tokens"]
            figures[f"{precision}: tokens/s (median)"] = round(told["tokens"] / statistics.median(told["seconds"]))
            figures[f"{precision}: MiB of weights, at the most"] = f"{told['weights']:.0f}, {told['peak']:.0f}"
    write_result(
        a.out,
        task=f"Pythia-{a.size} (saved in bf16) by the precision of its weights, projection {a.projection_dim}",
        figures=figures,
        device=a.device,
    )


if __name__ == "__main__":
    main()
