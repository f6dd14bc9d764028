"""What processes that hold a model together do when memory is short on one.

python -m torch.distributed.run --nproc_per_node=N tests/support/memory_run.py all FOLDER
    figures as JSON from every rank
python tests/support/memory_run.py CASE FOLDER
    a run of its own, most of which end
"""

import gc
import json
import logging
import os
import resource
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

import funcattrib as fa
from funcattrib.cli.load import shards_of
from funcattrib.cli.main import main as command_line
from funcattrib.models.functional import sharing
from funcattrib.models.loading import load_model
from funcattrib.runs import token_budget, workload
from funcattrib.runs.oom_retry import Pieces
from funcattrib.runtime import memory
from funcattrib.runtime.signals import Terminated, terminating
from funcattrib.weights import lockstep
from funcattrib.weights.sharded import Sharded
from tests.support import cases, tiny
from tests.support.sharded_rows import difference
from tests.support.sharded_run import by_fsdp
from tests.support.short_memory import Short

CPU = torch.device("cpu")
NAMES = ["gpt_neox", "qwen3_moe", cases.TIED]
LENGTHS = (9, 5, 12, 2)
TEXTS = tiny.texts()
LONGEST = max(len(text.split()) for text in TEXTS)
MOST = 2 * LONGEST
SIZES = ["--projection-dim", "4", "--device", "cpu", "--dtype", "float32"]
SHARDS = ["--rows-per-shard", "5"]
FEW = 7
FITTED = ["--normalizer", "adafactor", "--fit-documents", "0"]


def halved(model: torch.nn.Module, name: str, every: int) -> dict[str, object]:
    """Each of some gathers of a batch fails, on rank 1; then on both ranks, each at another."""
    rank = dist.get_rank()
    loss, params = fa.causal_lm_loss(model)
    plain = fa.compose(fa.per_example_grad, fa.project(4))
    # Rank 0 has one batch, rank 1 two; one that fails takes two rounds more.
    mine = [cases.batch(LENGTHS, seed=10 * rank + number) for number in range(1 + rank % 2)]
    wanted = [plain(*fa.causal_lm_loss(cases.causal(name)), batch) for batch in mine]

    gathers = len(step_order(loss, params, plain))
    never, found = 10**9, {"gathers": gathers}
    for at, last in (("use", gathers), ("gather", gathers + 1)):  # a pass's first round also begins its own first
        moments = sorted({*range(0, last, every), last - 2, last - 1, last})
        short, worst, failed, together = Short(never, at, 0), 0.0, [], []
        with short():
            step = lockstep.Lockstep(sharing(params), lambda: cases.batch((1,)))
            compute = step.of(plain.bind(loss, params))
            sweep = [(never if rank % 2 == 0 else 24, moment, failed) for moment in moments]
            sweep += [(24, (moment + 5 * rank) % gathers, together) for moment in range(0, gathers, 7)]
            for short.most, short.moment, counts in sweep:
                before, pieces = short.failed, Pieces(str)
                for number, batch in enumerate(step.through(mine)):
                    parts = [part.grads for part in pieces(compute, batch, range(len(LENGTHS)), CPU)]
                    ours = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
                    worst = max(worst, difference(ours, wanted[number]))
                counts.append(short.failed - before)
        found[at] = {"worst": worst, "kept": short.kept, "failed": failed, "failed together": together}
    return found


def step_order(loss: object, params: dict, chain: fa.Chain) -> Sequence[Sharded]:
    """The weights of a round, in order."""
    step = lockstep.Lockstep(sharing(params), lambda: cases.batch((1,)))
    compute = step.of(chain.bind(loss, params))
    for batch in step.through([cases.batch((3,))]):
        compute(batch)
    assert step._function is not None
    assert step._function.order
    return step._function.order


def told_to_end(model: torch.nn.Module) -> dict[str, object]:
    """SIGTERM comes to rank 1 inside a batch that memory is short for: the round is finished, the others go on."""
    rank = dist.get_rank()
    loss, params = fa.causal_lm_loss(model)
    rows = fa.compose(fa.per_example_grad, fa.project(4)).bind(loss, params)
    done, told = 0, False

    def compute(batch: dict) -> object:
        if rank == 1 and done == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return rows(batch)

    with Short(24 if rank == 1 else 10**9, "use", 20)() as short, terminating():
        step = lockstep.Lockstep(sharing(params), lambda: cases.batch((1,)))
        together, pieces = step.of(compute), Pieces(str)
        try:
            for batch in step.through([cases.batch(LENGTHS, seed=seed) for seed in range(3)]):
                list(pieces(together, batch, range(len(LENGTHS)), CPU))
                done += 1
        except Terminated:
            told = True
    return {"done": done, "terminated": told, "failed": short.failed}


def run(folder: Path, name: str, out: str, *words: str, most: int = 10**9, at: str = "use", moment: int = 25) -> dict:
    """A command whose batches above ``most`` tokens fail on rank 1."""
    settings = [name, folder / out, "--model", folder / "gpt_neox", "--dataset", folder / "data.jsonl", *SIZES]
    with Short(most if dist.get_rank() == 1 else 10**9, at, moment)() as short:
        code = command_line([*map(str, settings), "--shard-params", *words])
    return {"code": code, "failed": short.failed, "kept": short.kept}


def of_python(folder: Path, mesh: object) -> dict[str, object]:
    """A model under FSDP2 with a reference, in its recipe; the loss goes through both."""
    data = [{"text": text} for text in TEXTS]
    common = {"tokenizer": tiny.make_tokenizer(), "projection_dim": 4, "dtype": "float32", "rows_per_shard": 5}
    settings = {**common, "loss": "kl", "token_batch_size": 60, "quiet": True}
    model, reference = by_fsdp("gpt_neox", mesh), by_fsdp(cases.TIED, mesh)
    with Short(30 if dist.get_rank() == 1 else 10**9, "use", 30)() as short:
        store = fa.collect_gradients(model, data, path=folder / "kl", reference_model=reference, **settings)
    dist.barrier()
    return {"rows": len(store), "failed": short.failed}


def tried(folder: Path) -> dict[str, object]:
    """Trials in lockstep: one of a device that holds no more than two documents on rank 1, and one that is left."""
    auto, found = ["--token-batch-size", "auto"], {}
    for name, words in (("auto", FITTED), ("auto rows", [])):
        found[name] = run(folder, "build", name, *auto, *words, most=MOST, at="gather")
    asked: list[int] = []
    curve = fake_cost(asked)
    with mock.patch.object(token_budget, "_trial", return_value=curve):
        found["made up"] = run(folder, "build", "made up", *auto, "--loss", "log_odds")
    found["asked"] = asked
    found["again"] = untried(folder, "again", *auto, "--loss", "log_odds")
    return found


def fake_cost(asked: list[int]) -> Callable[[int], token_budget.Cost]:
    """Two documents are as fast as many."""

    def cost(documents: int) -> token_budget.Cost:
        asked.append(documents)
        return token_budget.Cost(documents if documents > 1 else 2.0, 10 * documents)

    return cost


def untried(folder: Path, out: str, *words: str) -> dict:
    """The command, which makes no trial."""
    with mock.patch.object(token_budget, "search_batch_size", side_effect=AssertionError("a trial was made")):
        return run(folder, "build", out, *words)


def continued(folder: Path) -> dict[str, object]:
    """A run that SIGTERM ends goes on with its number, which is another than a trial would find."""
    auto = ["--token-batch-size", "auto", "--loss", "log_odds", *SHARDS]
    calls, rows_of = [], workload.rows_of

    def told(*args: object) -> object:
        calls.append(1)
        if len(calls) == 2:  # in each process's second shard
            os.kill(os.getpid(), signal.SIGTERM)
        return rows_of(*args)

    with mock.patch.object(token_budget, "token_budget", return_value=33), mock.patch.object(workload, "rows_of", told):
        begun = run(folder, "build", "continued", *auto)
    dist.barrier()
    shards = len(list((folder / "continued/shards").glob("*.json")))
    after = untried(folder, "continued", *auto)
    return {"codes": [begun["code"], after["code"]], "shards": shards}


def everything(folder: Path) -> None:
    """Each of these goes on, and ends well."""
    rank, size = dist.get_rank(), dist.get_world_size()
    shards = shards_of(CPU, 2)
    names, every = (NAMES, 1) if size == 2 else (NAMES[:1], 9)
    models = {name: load_model(str(folder / name), device="cpu", shards=shards).model for name in names}
    os.environ["XDG_CACHE_HOME"] = str(folder / f"cache{rank}")  # as on machines of their own
    gc.freeze()  # what is collected after each failure is that batch's
    found: dict[str, object] = {
        "halved": {name: halved(models[name], name, 1 if name == names[0] else 5) for name in names}
    }
    if size == 2:
        found["told to end"] = told_to_end(models["gpt_neox"])
        short = {"most": 30, "moment": 25}
        found["build"] = run(folder, "build", "build", "--token-batch-size", "60", *SHARDS, *FITTED, **short)
        found["reduce"] = run(folder, "reduce", "reduce", "--token-batch-size", "60", *SHARDS, **short, at="gather")
        found["of python"] = of_python(folder, init_device_mesh("cpu", (2,)))
        found["tried"] = tried(folder)
        found["continued"] = continued(folder)
    else:
        auto = ["--shard-ranks", "2", "--token-batch-size", "auto"]
        found["auto"] = run(folder, "build", "auto", *auto, most=MOST, at="gather")
    (folder / f"rank{rank}.json").write_text(json.dumps(found))
    dist.barrier()


# What ends a run


def one_document(folder: Path) -> int:
    """Memory of rank 1 holds no document of more than a few tokens, in whatever batch."""
    short = Short(FEW if os.environ["RANK"] == "1" else 10**9, "use", 25)
    words = ["build", folder / "run", "--model", folder / "gpt_neox", "--dataset", folder / "data.jsonl", *SIZES]
    with short():
        return command_line([*map(str, words), "--shard-params", "--token-batch-size", "60", *SHARDS])


def limited(folder: Path) -> int:
    """The system's own limit on rank 1: torch's allocations fail, wherever they happen to be."""
    rank = dist.get_rank()
    logging.basicConfig(level=logging.WARNING, stream=sys.stdout, format="%(message)s")
    sizes = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 512}
    config = GPTNeoXConfig(**sizes, vocab_size=99, max_position_embeddings=256, bos_token_id=0, eos_token_id=0)
    if rank == 0:
        torch.manual_seed(0)
        GPTNeoXForCausalLM(config).save_pretrained(folder / "larger")
    dist.barrier()
    model = load_model(str(folder / "larger"), device="cpu", shards=shards_of(CPU)).model
    data = [{"input_ids": [(7 * row + i) % 99 for i in range(256)]} for row in range(128)]

    def build(name: str, tokens: int) -> torch.Tensor:
        settings = {"token_batch_size": tokens, "rows_per_shard": 64, "projection_dim": 4, "dtype": "float32"}
        return fa.collect_gradients(model, data, path=folder / name, quiet=True, **settings).matrix().tensor()

    before = build("whole", 1024)
    if rank == 1:
        most = memory._status("VmSize") + (150 << 20)
        resource.setrlimit(resource.RLIMIT_AS, (most, resource.RLIM_INFINITY))
    after = build("limited", 64 * 256)
    print("difference", float((after - before).norm() / before.norm()))
    dist.barrier()
    return 0


def main() -> int:
    case, folder = sys.argv[1], Path(sys.argv[2])
    if case == "one_document":
        return one_document(folder)
    dist.init_process_group("gloo")
    if case == "all":
        everything(folder)
        dist.destroy_process_group()
        return 0
    return limited(folder) if case == "limited" else ending(case, folder)


def ending(case: str, folder: Path) -> int:
    """A pass that rank 1 leaves."""
    rank = dist.get_rank()
    model = load_model(str(folder / "gpt_neox"), device="cpu", shards=shards_of(CPU)).model
    loss, params = fa.causal_lm_loss(model)
    rows = fa.compose(fa.per_example_grad, fa.project(4)).bind(loss, params)
    backwards = fa.compose(fa.per_example_grad, fa.project(4)).bind(lambda p, x: loss(p, x) + loss(p, x), params)
    calls = 0

    def compute(batch: dict) -> object:
        nonlocal calls
        calls += 1
        if rank == 1 and case == "unlearned":
            raise torch.OutOfMemoryError("CUDA out of memory.")
        if rank == 1 and case == "killed" and calls == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return (backwards if rank == 1 and case == "another_order" and calls == 4 else rows)(batch)

    step = lockstep.Lockstep(sharing(params), lambda: cases.batch((1,)))
    together = step.of(compute)
    try:
        for batch in step.through([cases.batch(LENGTHS)] * 5):
            together(batch)
    except fa.FuncattribError as error:
        print(error, flush=True)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
