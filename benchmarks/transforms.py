"""What normalising and preconditioning cost beside projected gradients.

project                 L G Rᵀ: project(k)
adafactor               adafactor_norm, project(k)      moments fitted before
adam                    adam_norm, project(k)           likewise
precondition            project(k), precondition        Gram matrices fitted before
gram pass               the pass that fits them: project(k), and each batch folded into the Gram matrices
adafactor pass          the pass that fits Adafactor's moments, read off whole gradients

python -m benchmarks.transforms [--size 14m] [--token-batch-size 2048] [--documents 48] [--rounds 5]
"""

import argparse
import time

import torch

import funcattrib as fa
from benchmarks.inputs import PYTHIA, pythia
from benchmarks.paired import Batch, batches_of, beside, speed, timed
from benchmarks.report import write_result
from funcattrib.chain.fitting import bind_observed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=PYTHIA, default="14m")
    parser.add_argument("--token-batch-size", type=int, default=2048)
    parser.add_argument("--projection-dim", type=int, default=16)
    parser.add_argument("--documents", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", help="name of the result file under benchmarks/results")
    a = parser.parse_args()

    model = pythia(a.size, torch.float32).to(a.device)
    batches, tokens = batches_of(a.documents, a.token_batch_size, a.device)
    loss, params = fa.causal_lm_loss(model)
    project = fa.project(a.projection_dim)
    chains = {
        "project": fa.compose(fa.per_example_grad, project),
        "adafactor": fa.compose(fa.per_example_grad, fa.adafactor_norm, project),
        "adam": fa.compose(fa.per_example_grad, fa.adam_norm, project),
        "precondition": fa.compose(fa.per_example_grad, project, fa.precondition),
    }
    states = {name: chain.fit(loss, params, batches[:3]) for name, chain in chains.items()}
    functions = {name: chain.bind(loss, params, states[name]) for name, chain in chains.items()}

    def fitting(name: str, at: int):
        """One batch's share of the pass that fits stage ``at``."""
        chain, spec = chains[name], fa.per_example_grad.spec(params)
        stage, kept = chain.stages[at], {"state": chain.init(spec)[0][at]}
        read = bind_observed(chain.started(), chain.stages[: at + 1], loss, params, states[name][:at])

        def fold(batch: Batch) -> None:
            kept["state"] = stage.observe(kept["state"], read(batch).grads)

        return fold, kept, stage

    functions["gram pass"], gram, stage = fitting("precondition", 1)
    functions["adafactor pass"], _, _ = fitting("adafactor", 0)
    seconds = timed(functions, batches, a.rounds, a.device)
    start = time.perf_counter()
    stage.finalize(gram["state"])
    write_result(
        a.out,
        task=f"Normalised and preconditioned gradients of Pythia-{a.size} beside projected ones",
        figures={
            "documents": a.documents,
            "tokens": tokens,
            "threads": torch.get_num_threads(),
            **speed(seconds, tokens),
            **{key: value for name in list(functions)[1:] for key, value in beside(seconds, name, "project").items()},
            "decomposing the Gram matrices once, seconds": round(time.perf_counter() - start, 2),
        },
        device=a.device,
    )


if __name__ == "__main__":
    main()
