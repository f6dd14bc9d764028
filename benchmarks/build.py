"""The build step against its floor, paired in one run.

    step    projected gradients of every example of a batch: the chain as ``funcattrib build`` runs it
    floor   forward and activation backward of the same model on the same batches, natively batched, same fused head

No method can be below the floor: a projected gradient needs every layer's input and output gradient. Batches are
taken in turn, step then floor, so that the machine's drift cancels in the ratio.

    python -m benchmarks.build [--size 14m] [--token-batch-size 2048] [--documents 96] [--rounds 3]
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
from funcattrib.data import Columns, plan
from funcattrib.kernels import linear_cross_entropy
from funcattrib.recipes.documents import read_documents


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=PYTHIA, default="14m")
    parser.add_argument("--token-batch-size", type=int, default=2048)
    parser.add_argument("--projection-dim", type=int, default=16)
    parser.add_argument("--documents", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--out", help="name of the result file under benchmarks/results")
    a = parser.parse_args()

    model = pythia(a.size, getattr(torch, a.dtype)).to(a.device)
    documents = read_documents(
        inputs.documents(a.documents), None, Columns(), max_length=1024, truncation=False, vocab_size=None
    )
    batches = [documents.batch(chosen, a.device) for chosen in plan(documents.lengths, a.token_batch_size)]
    tokens = int(documents.lengths.sum())

    loss, params = fa.causal_lm_loss(model)
    step = fa.compose(fa.per_example_grad, fa.project(a.projection_dim)).bind(loss, params)
    described = loss.args[0]
    weights = {**described.parts.frozen, **described.parts.params}
    base = described.parts.skeleton.get_submodule(described.prefix)
    inside = {n.removeprefix(f"{described.prefix}."): w for n, w in weights.items() if n.startswith(described.prefix)}
    embed = model.get_input_embeddings()

    def floor(batch: dict[str, Tensor]) -> None:
        embedded = embed(batch["input_ids"]).detach().requires_grad_()
        hidden = torch.func.functional_call(base, inside, (), {"inputs_embeds": embedded})[0]
        target = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
        linear_cross_entropy(hidden, weights[described.weight], target).sum().backward()

    def timed(function, batch: dict[str, Tensor]) -> float:
        start = time.perf_counter()
        function(batch)
        if a.device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    for batch in batches[:2]:
        timed(step, batch), timed(floor, batch)
    rounds = []
    for _ in range(a.rounds):
        ours = least = 0.0
        for batch in batches:
            ours += timed(step, batch)
            least += timed(floor, batch)
        rounds.append((ours, least))
    ratios = [ours / least for ours, least in rounds]
    seconds = statistics.median(ours for ours, _ in rounds)
    write_result(
        a.out,
        task=f"Build step of Pythia-{a.size} against its floor (forward and activation backward, same fused head)",
        figures={
            "documents": a.documents,
            "tokens": tokens,
            "step tokens/s (median)": round(tokens / seconds),
            "floor tokens/s (median)": round(tokens / statistics.median(least for _, least in rounds)),
            "step / floor (median)": round(statistics.median(ratios), 3),
            "step / floor (each round)": ", ".join(f"{r:.3f}" for r in ratios),
        },
        device=a.device,
    )


if __name__ == "__main__":
    main()
