"""What the split by attention heads costs: projected gradients by head against those of whole matrices.

    whole    project(k)                         every attention weight as one leaf
    heads    split_heads(…), project(k)         each head as a leaf with a projection of its own

Batches are taken in turn, whole then heads and the other way round, so that the machine's drift cancels in the ratio.

    python -m benchmarks.heads [--size 14m] [--token-batch-size 2048] [--documents 96] [--rounds 5]
"""

import argparse

import torch

import funcattrib as fa
from benchmarks.inputs import PYTHIA, pythia
from benchmarks.paired import batches_of, beside, speed, timed
from benchmarks.report import write_result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=PYTHIA, default="14m")
    parser.add_argument("--token-batch-size", type=int, default=2048)
    parser.add_argument("--projection-dim", type=int, default=16)
    parser.add_argument("--documents", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", help="name of the result file under benchmarks/results")
    a = parser.parse_args()

    model = pythia(a.size, torch.float32).to(a.device)
    batches, tokens = batches_of(a.documents, a.token_batch_size, a.device)
    loss, params = fa.causal_lm_loss(model)
    project, split = fa.project(a.projection_dim), fa.split_heads(fa.attention_configs(model))
    functions = {
        "whole": fa.compose(fa.per_example_grad, project).bind(loss, params),
        "heads": fa.compose(fa.per_example_grad, split, project).bind(loss, params),
    }
    seconds = timed(functions, batches, a.rounds, a.device)
    write_result(
        a.out,
        task=f"Projected gradients of Pythia-{a.size} by attention head against whole matrices",
        figures={
            "documents": a.documents,
            "tokens": tokens,
            "threads": torch.get_num_threads(),
            **speed(seconds, tokens),
            **beside(seconds, "heads", "whole"),
        },
        device=a.device,
    )


if __name__ == "__main__":
    main()
