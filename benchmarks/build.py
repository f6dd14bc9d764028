"""The build step against its floor, paired in one run.

    step    projected gradients of every example of a batch: the chain as ``funcattrib build`` runs it
    floor   forward and activation backward of the same model on the same batches, natively batched, same fused head
    product one square matrix product, the FLOP/s that ``funcattrib plan`` is told of the machine

No method can be below the floor: a projected gradient needs every layer's input and output gradient. Batches are
taken in turn, step then floor then product, so that the machine's drift cancels in the ratios.

    python -m benchmarks.build [--size 14m] [--token-batch-size 2048] [--documents 96] [--rounds 3]
"""

import argparse
import statistics
import time

import torch
from torch import Tensor

import funcattrib as fa
from benchmarks.flops import SQUARE, flops, product
from benchmarks.inputs import PYTHIA, pythia
from benchmarks.paired import batches_of, beside, speed, timed
from benchmarks.report import write_result
from funcattrib.kernels import linear_cross_entropy

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=PYTHIA, default="14m")
    parser.add_argument("--token-batch-size", type=int, default=2048)
    parser.add_argument("--projection-dim", type=int, default=16)
    parser.add_argument("--documents", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument(
        "--clock",
        choices=CLOCKS,
        default="wall",
        help="cpu counts this process's own seconds: with one thread, fit for a machine that has other work",
    )
    parser.add_argument("--out", help="name of the result file under benchmarks/results")
    a = parser.parse_args()

    model = pythia(a.size, getattr(torch, a.dtype)).to(a.device)
    batches, tokens = batches_of(a.documents, a.token_batch_size, a.device)

    loss, params = fa.causal_lm_loss(model)
    step = fa.compose(fa.per_example_grad, fa.project(a.projection_dim)).bind(loss, params)
    described = loss.model
    weights = {**described.parts.frozen, **described.parts.params}
    base = described.parts.skeleton.get_submodule(described.prefix)
    inside = {n.removeprefix(f"{described.prefix}."): w for n, w in weights.items() if n.startswith(described.prefix)}
    embed = model.get_input_embeddings()

    def floor(batch: dict[str, Tensor]) -> None:
        embedded = embed(batch["input_ids"]).detach().requires_grad_()
        hidden = torch.func.functional_call(base, inside, (), {"inputs_embeds": embedded})[0]
        target = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
        linear_cross_entropy(hidden, weights[described.weight], target).sum().backward()

    multiply = product(SQUARE, a.device, getattr(torch, a.dtype))
    functions = {"step": step, "floor": floor, "product": lambda batch: multiply()}
    seconds = timed(functions, batches, a.rounds, a.device, CLOCKS[a.clock])
    products = [flops(SQUARE) * len(batches) / each for each in seconds.pop("product")]
    write_result(
        a.out,
        task=f"Build step of Pythia-{a.size} against its floor (forward and activation backward, same fused head)",
        figures={
            "documents": a.documents,
            "tokens": tokens,
            "threads, clock": f"{torch.get_num_threads()}, {a.clock}",
            **speed(seconds, tokens),
            **beside(seconds, "step", "floor"),
            "matrix product FLOP/s (median)": f"{statistics.median(products):.4g}",
        },
        device=a.device,
    )


if __name__ == "__main__":
    main()
