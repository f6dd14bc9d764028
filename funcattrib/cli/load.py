"""The model and the documents that a command's flags ask for."""

from dataclasses import fields
from typing import Any

import torch
import torch.distributed as dist

from funcattrib.cli.settings import DataConfig, LoadConfig, ModelConfig, QueryColumns, ShardConfig
from funcattrib.data import Columns
from funcattrib.errors import FuncattribError
from funcattrib.models.loading import Loaded, load_model
from funcattrib.models.sharded_loading import Shards
from funcattrib.runtime.devices import pick_device
from funcattrib.runtime.world import world
from funcattrib.weights.sharded import Gathers


def load_from(config: ModelConfig) -> Loaded:
    """Load the model of ``config``, and the reference in the same way."""
    options = load_options(config)
    loaded = load_model(config.model, revision=config.revision, **options)
    if config.reference_model is None:
        return loaded
    return loaded._replace(reference=load_model(config.reference_model, **{**options, "tokenizer": None}).model)


def load_options(config: ModelConfig | LoadConfig) -> dict[str, Any]:
    """Return keyword settings of ``load_model`` beside which model it is; process groups are made here, once."""
    options = {each.name: getattr(config, each.name) for each in fields(LoadConfig)}
    return {**options, "shards": shards_from(config.shards, config.device)}


def shards_from(config: ShardConfig, device: str) -> Shards | None:
    """Return the processes that hold a model together; None where each has all of it. Every process of the run calls
    this.
    """
    return shards_of(pick_device(device), config.shard_ranks, config.offload_params) if config.shard_params else None


def shards_of(device: torch.device, ranks: int | None = None, offload: bool = False) -> Shards:
    """Return the processes that hold a model together: each with its ``ranks`` neighbours, or all of them.

    Every process of the run calls this.

    Raises:
        FuncattribError: ``ranks`` does not divide the number of processes.
    """
    size = world().size
    ranks = ranks or size
    if size % ranks:
        raise FuncattribError(f"expected --shard-ranks to divide the {size} processes of this run, found {ranks}")
    own = None
    if ranks > 1:  # each process takes part in making every group
        groups = [dist.new_group(list(range(first, first + ranks))) for first in range(0, size, ranks)]
        own = groups[world().rank // ranks]
    return Shards(Gathers(own, device), device, offload)


def source_of(loaded: Loaded, data: DataConfig) -> dict[str, Any]:
    """Return keyword settings of ``collect_gradients`` for the documents and what belongs to them."""
    return {
        **documents_of(data),
        "tokenizer": loaded.tokenizer,
        "model_name": loaded.name,
        "revision": loaded.revision,
        "reference_model": loaded.reference,
    }


def documents_of(data: DataConfig) -> dict[str, Any]:
    """Return keyword settings of ``collect_gradients`` for the documents, without those that come from a model."""
    return {
        "columns": Columns(**{field.name: getattr(data, field.name) for field in fields(Columns)}),
        "split": data.split,
        "subset": data.subset,
        "truncation": data.truncation,
        "max_length": data.max_length,
    }


def queries_of(data: DataConfig, own: QueryColumns) -> dict[str, Any]:
    """Return keyword settings of the queries' data set: its own columns, or else those of ``data``."""
    columns = Columns(
        own.query_prompt_column or data.prompt_column,
        own.query_completion_column or data.completion_column,
        data.conversation_column,
    )
    return {"query_columns": columns, "query_split": own.query_split}
