"""What the split by attention heads costs: projected gradients by head against those of whole matrices.

    whole    project(k)                         every attention weight as one leaf
    heads    split_heads(…), project(k)         each head as a leaf with a projection of its own

Batches are taken in turn, whole then heads and the other way round, so that the machine's drift cancels in the ratio.

    python -m benchmarks.heads [--size 14m] [--token-batch-size 2048] [--documents 96] [--rounds 5]
"""

import argparse
import statistics
import time

import torch
from torch import Tensor

import funcattrib as fa
from benchmarks import inputs
from benchmarks.inputs import PYTHIA, pythia
from benchmarks.report import write_result
from funcattrib.data import collate, plan


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
    rows = [{**row, "labels": row["input_ids"]} for row in inputs.documents(a.documents)]
    lengths = [len(row["input_ids"]) for row in rows]
    tokens = sum(lengths)
    batches = [
        {key: value.to(a.device) for key, value in collate([rows[i] for i in batch], pad_id=0).items()}
        for batch in plan(lengths, a.token_batch_size)
    ]

    loss, params = fa.causal_lm_loss(model)
    project, split = fa.project(a.projection_dim), fa.split_heads(fa.attention_configs(model))
    whole = fa.compose(fa.per_example_grad, project).bind(loss, params)
    heads = fa.compose(fa.per_example_grad, split, project).bind(loss, params)

    def timed(function, batch: dict[str, Tensor]) -> float:
        start = time.perf_counter()
        function(batch)
        if a.device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    for batch in batches[:2]:
        timed(whole, batch), timed(heads, batch)
    seconds = {"whole": [], "heads": []}
    for number in range(a.rounds):
        spent = {"whole": 0.0, "heads": 0.0}
        for at, batch in enumerate(batches):
            pair = [("whole", whole), ("heads", heads)]
            for name, function in pair if (number + at) % 2 else pair[::-1]:
                spent[name] += timed(function, batch)
        for name, each in spent.items():
            seconds[name].append(each)
    ratios = [ours / least for ours, least in zip(seconds["heads"], seconds["whole"], strict=True)]
    write_result(
        a.out,
        task=f"Projected gradients of Pythia-{a.size} by attention head against whole matrices",
        figures={
            "documents": a.documents,
            "tokens": tokens,
            "threads": torch.get_num_threads(),
            "whole tokens/s (median)": round(tokens / statistics.median(seconds["whole"])),
            "heads tokens/s (median)": round(tokens / statistics.median(seconds["heads"])),
            "heads / whole (median)": round(statistics.median(ratios), 3),
            "heads / whole (each round)": ", ".join(f"{r:.3f}" for r in ratios),
        },
        device=a.device,
    )


if __name__ == "__main__":
    main()
