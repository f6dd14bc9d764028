"""What two or four processes compute together: figures as JSON from every rank.

python -m torch.distributed.run --nproc_per_node=N tests/support/sharded_run.py FOLDER
"""

import copy
import gc
import io
import json
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

import funcattrib as fa
from funcattrib.checkpoints.adam_state import adam_state
from funcattrib.cli.load import shards_of
from funcattrib.models.functional import sharing
from funcattrib.models.loading import LoadOptions, load_model
from funcattrib.models.sharded_loading import Shards
from funcattrib.runs.prepare import load_named
from funcattrib.runs.settings import Source
from funcattrib.runtime.signals import Terminated
from funcattrib.weights.lockstep import Lockstep
from funcattrib.weights.sharded import Gathers
from tests.support import cases, tiny
from tests.support.saved_runs import save_run
from tests.support.sharded_rows import compared, difference

TWO = ["gpt_neox", "gpt2", "llama", cases.TIED, "qwen3_moe"]
FOUR = ["gpt_neox", cases.TIED]
CPU = torch.device("cpu")


def by_fsdp(name: str, mesh: object, **settings: object) -> nn.Module:
    model = copy.deepcopy(cases.causal(name))
    blocks = next(module for module in model.modules() if isinstance(module, nn.ModuleList))
    for block in blocks:
        fully_shard(block, mesh=mesh, **settings)
    fully_shard(model, mesh=mesh, **settings)
    return model


def left_alone(name: str, mesh: object) -> bool:
    """The caller's model computes as before, and its tree is what it was."""
    model, batch = by_fsdp(name, mesh), cases.batch((9, 5, 12))
    before = [type(module) for module in model.modules()]
    loss, params = fa.causal_lm_loss(model)  # while no forward pass has gathered anything
    fa.per_example_grad(loss, params, batch)
    logits = model(input_ids=batch["input_ids"]).logits
    same = torch.equal(logits, cases.causal(name)(input_ids=batch["input_ids"]).logits)
    after = fa.compose(fa.per_example_grad, fa.project(4))(*fa.causal_lm_loss(model), batch)  # while it has
    plain = fa.compose(fa.per_example_grad, fa.project(4))(*fa.causal_lm_loss(cases.causal(name)), batch)
    return same and before == [type(module) for module in model.modules()] and difference(after, plain) < 1e-6


@contextmanager
def watched(gathers: Gathers) -> Iterator[dict[str, list[int]]]:
    """Bytes of gathered weights alive after each gather has begun, and whether each use was foreseen."""
    alive, seen = [0], {"alive": [], "foreseen": []}
    begin, take = gathers._begin, gathers.take

    def counted(weight):
        flying = begin(weight)
        size = flying.whole.nbytes
        alive[0] += size
        seen["alive"].append(alive[0])
        weakref.finalize(flying.whole.untyped_storage(), lambda: alive.__setitem__(0, alive[0] - size))
        return flying

    def taken(weight):
        seen["foreseen"].append(int(bool(gathers._ahead) and gathers._ahead[0].weight is weight))
        return take(weight)

    gathers._begin, gathers.take = counted, taken
    try:
        yield seen
    finally:
        del gathers._begin, gathers.take


def memory(model: nn.Module) -> dict[str, object]:
    loss, params = fa.causal_lm_loss(model)
    compute = fa.compose(fa.per_example_grad, fa.project(4)).bind(loss, params)
    batches = [cases.batch((9, 5, 12), seed=seed) for seed in range(4)]
    for batch in batches[:2]:
        compute(batch)
    with watched(sharing(params)) as seen:
        for batch in batches[2:]:
            compute(batch)
    return {**seen, "sizes": {name: p.numel() * p.element_size() for name, p in model.named_parameters()}}


def unequal(model: nn.Module) -> dict[str, object]:
    """Rank r has r + 1 batches of its own; then one where the second rank is told to end after its first."""
    rank = dist.get_rank()
    loss, params = fa.causal_lm_loss(model)
    compute = fa.compose(fa.per_example_grad, fa.project(4)).bind(loss, params)
    small: list[int] = []

    def shortest() -> dict:
        small.append(1)
        return cases.batch((2,))

    step = Lockstep(sharing(params), shortest)
    mine = [cases.batch((9, 5), seed=10 * rank + number) for number in range(1 + 2 * rank)]
    together = step.of(compute)
    found = [together(batch).grads for batch in step.through(mine)]
    plain = fa.compose(fa.per_example_grad, fa.project(4))
    theirs = [plain(*fa.causal_lm_loss(cases.causal("gpt_neox")), batch) for batch in mine]
    worst = max(difference(ours, wanted) for ours, wanted in zip(found, theirs, strict=True))
    made = len(small)

    def ended() -> Iterator[dict]:
        for number in range(3):
            if rank == 1 and number == 1:
                raise Terminated
            yield cases.batch((4,))

    done, told = 0, False
    try:
        for batch in step.through(ended()):
            together(batch)
            done += 1
    except Terminated:
        told = True
    return {"worst": worst, "small": made, "done": done, "terminated": told, "small after": len(small) - made}


def without_any(model: nn.Module) -> int:
    """A pass that only rank 0 has work in: the others compute all the same, and fit a stage with it."""
    loss, params = fa.causal_lm_loss(model)
    step = Lockstep(sharing(params), lambda: cases.batch((2,)))
    from funcattrib.chain.fitting import passes

    chain = fa.compose(fa.per_example_grad, fa.adafactor_norm)
    batches = [cases.batch((9, 5)), cases.batch((12, 2), seed=2)] if dist.get_rank() == 0 else []
    try:
        return len(list(passes(*chain, loss, params, batches, step=step)))
    except fa.FuncattribError:  # nothing to fit on here
        return -1


def main() -> None:
    folder = Path(sys.argv[1])
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    if size == 2:
        mesh: object = init_device_mesh("cpu", (2,))
        names, shards = TWO, shards_of(CPU)
    else:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
        names, shards = FOUR, shards_of(CPU, 2)
    if rank == 0:
        for name in names:
            tiny.save_model(folder / name, name)
    dist.barrier()
    found: dict[str, object] = {}
    loaded = {name: load_model(str(folder / name), device="cpu", shards=shards).model for name in names}
    for name in names:
        found[f"fsdp {name}"] = compared(by_fsdp(name, mesh), cases.causal(name))
        found[f"loaded {name}"] = compared(loaded[name], cases.causal(name))
    found["left alone"] = left_alone("gpt_neox", mesh)
    found["rows"] = {name: p.held.rows.shape[0] for name, p in loaded["gpt_neox"].named_parameters()}
    found["memory"] = memory(loaded["gpt_neox"])
    found["unequal"] = unequal(loaded["gpt_neox"])
    if rank == 0:
        lay_out(folder)
    dist.barrier()
    found["runs"] = {name: command(folder, name) for name in COMMANDS if BUILDS.get(name, names[0]) in names}
    found["let go"] = let_go(folder, shards)
    found["moments"] = moments(folder, shards)
    if size == 2:
        found["fitted"] = without_any(loaded["gpt_neox"])
        half = load_model(str(folder / "llama"), device="cpu", precision="bf16", shards=shards).model
        found["bf16"] = compared(half, load_model(str(folder / "llama"), device="cpu", precision="bf16").model)
        found["offloaded"] = compared(
            by_fsdp("llama", mesh, offload_policy=CPUOffloadPolicy(False)), cases.causal("llama")
        )
        found["refused"] = refused(mesh)
    (folder / f"rank{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


SIZES = ["--projection-dim", "4", "--token-batch-size", "40", "--device", "cpu"]
COMMANDS = {
    "build": ["--normalizer", "adafactor", "--rows-per-shard", "5", "--fit-documents", "0", "--dtype", "float32"],
    "reduce": ["--rows-per-shard", "5", "--modules", "all"],
    "experts": ["--rows-per-shard", "5", "--split-experts", "--normalizer", "adafactor", "--dtype", "float32"],
    "tied": ["--rows-per-shard", "5", "--modules", "all", "--loss", "log_odds", "--dtype", "float32"],
    "less": ["--rows-per-shard", "5", "--fraction", "0.2"],
    "trak": ["--rows-per-shard", "5", "--sketch-dim", "8", "--damping", "0.1"],
    "query": ["--device", "cpu"],
}
BUILDS = {"experts": "qwen3_moe", "tied": cases.TIED}
"""Of other models."""
ASKED = "w1 w2 w3\nw4\n\nw5 w6 w7 w8\n"
"""Texts of the prompt loop; the second has no gradient."""


def lay_out(folder: Path) -> None:
    """What the commands are given: 23 documents, which make five shards, and two checkpoints of a training run."""
    tiny.write_jsonl(folder / "data.jsonl", [{"text": text} for text in tiny.texts()])
    tiny.write_jsonl(folder / "queries.jsonl", [{"text": text} for text in tiny.texts(3, seed=1)])
    save_run(folder / "trained")


def words(name: str, inputs: Path, out: Path) -> list[str]:
    """A command line; ``query`` asks the store that ``build`` made."""
    data = ["--dataset", inputs / "data.jsonl"]
    checkpoints = [word for folder in sorted((inputs / "trained").iterdir()) for word in ("--checkpoint", folder)]
    given: dict[str, list[object]] = {
        "query": ["--index", out / "build", "--record", out / "query.csv"],
        "less": [out / "less", *data, "--query-dataset", inputs / "queries.jsonl", *checkpoints, *SIZES],
        "trak": [out / "trak", *data, "--query-dataset", inputs / "queries.jsonl", *checkpoints, *SIZES],
    }
    words = given.get(name, [out / name, "--model", inputs / BUILDS.get(name, "gpt_neox"), *data, *SIZES])
    return ["build" if name in BUILDS else name, *map(str, words), *COMMANDS[name]]


def command(folder: Path, name: str) -> int:
    """A command as torchrun runs it."""
    from funcattrib.cli.main import main

    ranks = [] if dist.get_world_size() == 2 else ["--shard-ranks", "2"]
    sys.stdin = io.StringIO(ASKED) if dist.get_rank() == 0 else None  # type: ignore[assignment]
    with redirect_stderr(io.StringIO()) as told:
        code = main([*words(name, folder, folder), "--shard-params", *ranks])
    if name == "query":
        (folder / f"told{dist.get_rank()}").write_text(told.getvalue())
    return code


def moments(folder: Path, shards: Shards) -> dict[str, float]:
    """Adam's moments of a checkpoint's embedding: rows on this rank, and how far the gathered ones are off."""
    path = sorted((folder / "trained").iterdir())[0]
    model = load_model(str(path), device="cpu", shards=shards).model
    name, found = next(iter(adam_state(path, model).items()))
    first = adam_state(path, cases.causal("llama"))[name].first
    return {"rows": found.first.held.rows.shape[0], "off": float((found.first.held.dense() - first).abs().max())}


def let_go(folder: Path, shards: Shards) -> list[bool]:
    """Whether the shards of a checkpoint are gone when the next is loaded."""
    seen: list[weakref.ref] = []
    for path in sorted((folder / "trained").iterdir()):
        model, _ = load_named(path, Source(loading=LoadOptions(device="cpu", shards=shards)))
        seen.append(weakref.ref(next(model.parameters()).held))
        del model
        gc.collect()
    return [each() is None for each in seen]


def refused(mesh: object) -> str:
    from torch.distributed.tensor import Shard

    by_column: Callable = lambda parameter: Shard(1) if parameter.ndim == 2 else None  # noqa: E731
    model = nn.Sequential(nn.Linear(4, 6))
    fully_shard(model, mesh=mesh, shard_placement_fn=by_column)
    try:
        fa.functionalize(model)
    except fa.FuncattribError as error:
        return str(error)
    return ""


if __name__ == "__main__":
    main()
