"""What two or three processes compute with a model in codes and in shards.

python -m torch.distributed.run --nproc_per_node=N tests/support/sharded_quantised_run.py FOLDER
"""

import json
import sys
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

import funcattrib as fa
from funcattrib.cli.load import shards_of
from funcattrib.models.functional import parameters_of, sharing
from funcattrib.models.loading import load_model
from funcattrib.weights.sharded import Gathers
from funcattrib.weights.sharded_quantised import ShardedQuantised
from funcattrib.weights.stored import Stored
from tests.support import cases, tiny
from tests.support.sharded_rows import compared
from tests.support.sharded_run import CPU, SIZES, watched

MODELS = {2: ["gpt_neox", "gpt2", "llama", cases.TIED, "qwen3_moe"], 3: ["gpt2"]}
PRECISIONS = ["int8", "int4"]
BUILD = ["--normalizer", "adafactor", "--rows-per-shard", "5", "--fit-documents", "0", "--dtype", "float32"]


def in_codes(model: nn.Module) -> dict[str, ShardedQuantised]:
    stored = {name: p.held for name, p in parameters_of(model).items() if isinstance(p, Stored)}
    return {name: held for name, held in stored.items() if isinstance(held, ShardedQuantised)}


def same_codes(sharded: nn.Module, whole: nn.Module) -> bool:
    """Every block that a rank holds, gathered from all of them, is what bitsandbytes made of the whole weight.

    On some processors bitsandbytes rounds scales to bfloat16, but only in its layers' own forward, which nothing runs.
    """
    own = dict(whole.named_parameters())
    found = True
    for name, held in in_codes(sharded).items():
        blocks, weight = held.blocks.dense(), own[name]
        codes, scale = blocks[:, :-4].reshape(-1), blocks[:, -4:].contiguous().view(torch.float32).flatten()
        wanted = weight.data.view(torch.uint8).flatten()
        scales = weight.SCB if held.precision == "int8" else weight.quant_state.absmax
        found &= torch.equal(codes[: len(wanted)], wanted) and torch.equal(scale, scales)
    return found


@contextmanager
def counted(gathers: Gathers):
    """Bytes of every weight whose gather is begun."""
    begin, seen = gathers._begin, []

    def begun(weight):
        flying = begin(weight)
        seen.append((weight, flying.whole.nbytes))
        return flying

    gathers._begin = begun
    try:
        yield seen
    finally:
        del gathers._begin


def traffic(model: nn.Module) -> dict[str, object]:
    """Bytes gathered for a batch, once the order of uses is known; and how many of them are alive at once."""
    loss, params = fa.causal_lm_loss(model, modules="all")  # by default the first products need no second gather
    compute = fa.compose(fa.per_example_grad, fa.project(4)).bind(loss, params)
    batches = [cases.batch((9, 5, 12), seed=seed) for seed in range(4)]
    for batch in batches[:2]:
        compute(batch)
    gathers = sharing(params)
    with counted(gathers) as seen:
        compute(batches[2])
    blocks = {id(held.blocks) for held in in_codes(model).values()}
    with watched(gathers) as lives:
        compute(batches[3])
    gathered = sum(size for weight, size in seen if id(weight) in blocks)
    return {"codes": gathered, "alive": max(lives["alive"]), "foreseen": all(lives["foreseen"])}


def main() -> None:
    folder = Path(sys.argv[1])
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    shards = shards_of(CPU)
    if rank == 0:
        for name in MODELS[size]:
            tiny.save_model(folder / name, name)
        tiny.write_jsonl(folder / "data.jsonl", [{"text": text} for text in tiny.texts()])
    dist.barrier()
    found: dict[str, object] = {}
    for precision in PRECISIONS:
        for name in MODELS[size]:
            source = {"name": str(folder / name), "device": "cpu", "precision": precision}
            sharded, whole = load_model(**source, shards=shards).model, load_model(**source).model
            found[f"{name} {precision}"] = {
                "rows": compared(sharded, whole),
                "codes": same_codes(sharded, whole),
                "bytes": {name: held.blocks.rows.nbytes for name, held in in_codes(sharded).items()},
                "traffic": traffic(sharded),
            }
        if size == 2:
            moved = load_model(**source, shards=shards._replace(offload=True)).model
            found[f"offloaded {precision}"] = compared(moved, whole)
            found[f"build {precision}"] = build(folder, precision)
    (folder / f"rank{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def build(folder: Path, precision: str) -> int:
    """The command as torchrun runs it; 23 documents make five shards."""
    from funcattrib.cli.main import main

    words = ["build", folder / precision, "--model", folder / "gpt2", "--dataset", folder / "data.jsonl", *SIZES]
    return main([*map(str, words), "--shard-params", "--offload-params", "--precision", precision, *BUILD])


if __name__ == "__main__":
    main()
