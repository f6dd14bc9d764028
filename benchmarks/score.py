"""Scores of whole gradients against fixed queries, beside a training step; paired in one run.

step      forward and backward of the same model on the same batch, natively batched, same fused head, with the
          gradients of every parameter that is scored (blocks), or of every parameter of the model (all)
K         `funcattrib score --projection-dim 0` of that batch against K queries, of the blocks' matrices
K cosine  the same with --unit-norm
writing   a whole run against 2,048 queries at projection 16, and the part of it that the writer of shards worked

python -m benchmarks.score [--size 70m] [--documents 4] [--length 1024] [--rounds 5]
"""

import argparse
import statistics
import tempfile
import time
from dataclasses import replace

import torch
from torch import Tensor

import funcattrib as fa
from benchmarks import inputs
from benchmarks.inputs import PYTHIA, pythia
from benchmarks.report import write_result
from funcattrib.data import collate
from funcattrib.kernels import linear_cross_entropy
from funcattrib.store import create_store, writer
from funcattrib.store.write_shard import write_shard


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=PYTHIA, default="70m")
    parser.add_argument("--documents", type=int, default=4)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--queries", type=int, nargs="*", default=[1, 8, 64])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", help="name of the result file under benchmarks/results")
    a = parser.parse_args()

    model = pythia(a.size).to(a.device)
    rows = inputs.documents(a.documents, median=10**6, longest=a.length)
    batch = collate([{**row, "labels": row["input_ids"]} for row in rows], pad_id=0)
    batch = {name: tensor.to(a.device) for name, tensor in batch.items()}
    loss, params = fa.causal_lm_loss(model)
    largest = max(a.queries)
    queries = {name: torch.randn(largest, *p.shape, device=a.device) for name, p in params.items()}

    def scorer(count: int, unit_norm: bool):
        some = {name: query[:count] for name, query in queries.items()}
        chain = fa.compose(fa.per_example_grad, fa.inner_products(some, unit_norm=unit_norm))
        return chain.bind(loss, params, chain.init(fa.per_example_grad.spec(params))[0])

    whole = dict(model.named_parameters())
    tasks = {"step, blocks": (training_step, {n: whole[n] for n in params}), "step, all": (training_step, whole)}
    run = {name: lambda batch, how=how, names=names: how(model, names, batch) for name, (how, names) in tasks.items()}
    run |= {f"{count}": scorer(count, False) for count in a.queries}
    run |= {f"{count} cosine": scorer(count, True) for count in a.queries}

    seconds: dict[str, list[float]] = {name: [] for name in run}
    for name in run:
        run[name](batch)
    for number in range(a.rounds):
        order = list(run) if number % 2 else list(run)[::-1]
        for name in order:
            start = time.perf_counter()
            run[name](batch)
            if a.device != "cpu":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
    figures = {
        "documents × tokens": f"{a.documents} × {a.length}",
        "threads": torch.get_num_threads(),
        **{f"{name}: seconds (median)": round(statistics.median(each), 3) for name, each in seconds.items()},
    }
    for name in [name for name in run if name not in tasks]:
        for step in tasks:
            ratios = [x / y for x, y in zip(seconds[name], seconds[step], strict=True)]
            figures[f"{name} / {step} (median)"] = round(statistics.median(ratios), 3)
    figures |= writing(model, rows)
    write_result(
        a.out,
        task=f"Scores of Pythia-{a.size}'s whole gradients beside a training step",
        figures=figures,
        device=a.device,
    )


def writing(model: torch.nn.Module, rows: list[dict[str, list[int]]], count: int = 2048) -> dict[str, float]:
    """Seconds of a run that scores and writes, and of the writing alone."""
    spent = []

    def timed(*args):
        start = time.perf_counter()
        result = write_shard(*args)
        spent.append(time.perf_counter() - start)
        return result

    with tempfile.TemporaryDirectory() as folder:
        one = fa.collect_gradients(model, rows[:1], path=f"{folder}/one", quiet=True, dtype="float32")
        manifest = replace(one.manifest, rows=count, rows_per_shard=count, data={**one.manifest.data, "id": "drawn"})
        with create_store(f"{folder}/queries", manifest) as store:
            store.save_state(one.state())
            store.put(0, torch.randn(count, manifest.width), {"id": [str(i) for i in range(count)]})
            store.finish()
        writer.write_shard = timed
        start = time.perf_counter()
        fa.score_gradients(
            model, rows, path=f"{folder}/out", query_stores=f"{folder}/queries", quiet=True, dtype="float32"
        )
        whole = time.perf_counter() - start
        writer.write_shard = write_shard
    return {
        "2,048 queries, projection 16: seconds": round(whole, 3),
        "of which writing, in a thread beside": round(sum(spent), 4),
        "writing / run": round(sum(spent) / whole, 5),
    }


def training_step(model: torch.nn.Module, trained: dict[str, Tensor], batch: dict[str, Tensor]) -> None:
    """Forward and backward with the gradients of ``trained``."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for parameter in trained.values():
        parameter.requires_grad_(True).grad = None
    hidden = model.base_model(input_ids=batch["input_ids"], use_cache=False)[0]
    target = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    linear_cross_entropy(hidden, model.get_output_embeddings().weight, target).sum().backward()


if __name__ == "__main__":
    main()
