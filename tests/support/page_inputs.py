"""What the pages take for granted: the models, data sets and checkpoints that they name, all of them tiny.

Every page runs in a folder of its own, laid out by ``lay_out``: a page that says ``--model M --dataset D`` finds a
model and a data set of those names, and one that says ``EleutherAI/pythia-14m`` a folder of that name in the place of
the hub's model. What a page's Python has at hand beside it is the function of that page in ``NAMES``.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import peft
import torch
from torch import Tensor, nn
from transformers import TrainingArguments, default_data_collator

import funcattrib as fa
from tests.support import cases, other_tasks, saved_runs, store_run, tiny


def lay_out(folder: Path) -> None:
    """Put every model, data set and checkpoint that the pages name into ``folder``."""
    for name in ("M", "M2", "EleutherAI/pythia-14m"):
        tiny.save_model(folder / name)
    for name, seed in (("D", 0), ("Q", 1), ("NeelNanda/pile-10k", 2)):
        datasets.Dataset.from_list(rows(seed)).save_to_disk(folder / name)
    for name, seed in (("corpus", 0), ("questions", 1), ("task", 2)):
        tiny.write_jsonl(folder / f"{name}.jsonl", rows(seed))
    for number, checkpoint in enumerate(saved_runs.save_run(folder, "gpt_neox"), 1):
        checkpoint.rename(folder / f"C{number}")


def rows(seed: int) -> list[dict[str, Any]]:
    """Twelve documents, with an id."""
    return [{"text": text, "id": f"{seed}-{i}"} for i, text in enumerate(tiny.texts(12, seed=seed))]


def batches() -> list[dict[str, Tensor]]:
    """Three batches of tokens."""
    return [cases.batch((9, 7, 5), seed=seed) for seed in range(3)]


def readme() -> dict[str, Any]:
    """A model, and batches of tokens."""
    return {"model": copy.deepcopy(cases.causal("gpt_neox")), "batches": batches(), "batch": batches()[0]}


def store() -> dict[str, Any]:
    """A gradient store, at the place where the quickstart leaves one."""
    fa.collect_gradients("M", "D", path="runs/facts/store", quiet=True)
    return {}


def training() -> dict[str, Any]:
    """What a Trainer is given, and what a loop of one's own has: a model, its loss, and a loader."""
    arguments = TrainingArguments(
        output_dir="out", per_device_train_batch_size=4, num_train_epochs=1, save_strategy="no", report_to=[]
    )
    data = datasets.Dataset.from_list([{"input_ids": [2 + i, 3, 4, 5], "labels": [2 + i, 3, 4, 5]} for i in range(8)])

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return model(**batch).logits.float().logsumexp(-1).sum()

    return {
        "model": copy.deepcopy(cases.causal("gpt_neox")),
        "arguments": arguments,
        "data": data,
        "collator": default_data_collator,
        "loss": loss,
        "loader": batches(),
        "batch": batches()[0],
    }


def parts() -> dict[str, Any]:
    """What two machines without a shared folder leave."""
    fa.collect_gradients("M", "D", path="whole", quiet=True, rows_per_shard=3)
    store_run.take_apart(Path("whole"), [Path("part-of-machine-a"), Path("part-of-machine-b")])
    return {}


def models() -> dict[str, Any]:
    """An adapter, a model to shard inside a process group of one, and batches."""
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=["query_key_value"], init_lora_weights=False)
    adapted = peft.get_peft_model(copy.deepcopy(cases.causal("gpt_neox")), config)
    adapted.peft_config["default"].base_model_name_or_path = "M"
    adapted.save_pretrained("my-adapter")
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    return {"sharded": copy.deepcopy(cases.causal("gpt_neox")), "batches": batches(), "batch": batches()[0]}


def losses() -> dict[str, Any]:
    """Models of other tasks, and their data."""
    for name, model in (("my-bert-classifier", other_tasks.classifier("bert")), ("my-t5", other_tasks.pair("t5"))):
        model.save_pretrained(name)
        tiny.make_tokenizer().save_pretrained(name)
    texts = tiny.texts(6)
    tiny.write_jsonl(Path("reviews.jsonl"), [{"review": text, "stars": at % 3} for at, text in enumerate(texts)])
    tiny.write_jsonl(Path("pairs.jsonl"), [{"de": text, "en": text[:20]} for text in texts])
    return {}


NAMES: dict[str, Callable[[], dict[str, Any]]] = {
    "README.md": readme,
    "docs/index.md": readme,
    "docs/losses.md": losses,
    "docs/models.md": models,
    "docs/multi-process.md": parts,
    "docs/store.md": store,
    "docs/training.md": training,
}
"""Page → the names that its Python blocks take for granted; called in the page's folder."""
