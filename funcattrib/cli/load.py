"""The model and the documents that a command's flags ask for."""

from dataclasses import fields, replace

import torch
import torch.distributed as dist

from funcattrib.cli.settings import CheckpointConfig, DataConfig, ModelConfig, QueryColumns, ShardConfig
from funcattrib.data import Columns
from funcattrib.errors import FuncattribError
from funcattrib.models.identity import model_identity
from funcattrib.models.loading import Loaded, LoadOptions, load_model
from funcattrib.models.sharded_loading import Shards
from funcattrib.runs.settings import Source
from funcattrib.runtime.devices import pick_device
from funcattrib.runtime.world import world
from funcattrib.weights.sharded import Gathers


def load_from(config: ModelConfig) -> Loaded:
    """Load the model of ``config``, and the reference in the same way."""
    options = load_options(config)._asdict()
    loaded = load_model(config.model, tokenizer=config.tokenizer, revision=config.revision, **options)
    if config.reference_model is None:
        return loaded
    return loaded._replace(reference=load_model(config.reference_model, **options))


def load_options(config: ModelConfig | CheckpointConfig) -> LoadOptions:
    """Return how models are loaded; process groups are made here, once."""
    shards = shards_from(config.shards, config.device)
    return LoadOptions(config.precision, config.device, config.trust_remote_code, shards)


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
    group = None
    if ranks > 1:  # each process takes part in making every group
        groups = [dist.new_group(list(range(first, first + ranks))) for first in range(0, size, ranks)]
        group = groups[world().rank // ranks]
    return Shards(Gathers(group, device), device, offload)


def source_of(loaded: Loaded, data: DataConfig) -> Source:
    """Return which documents are read, and what of the loaded model belongs to them."""
    reference = loaded.reference
    return replace(
        _documents(data),
        tokenizer=loaded.tokenizer,
        model_name=loaded.name,
        revision=loaded.revision,
        identity=model_identity(loaded.model, loaded.name, loaded.revision, loaded.stamps),
        reference_model=None if reference is None else reference.model,
        reference_identity=None if reference is None else model_identity(reference.model, stamps=reference.stamps),
    )


def source_of_checkpoints(checkpoints: CheckpointConfig, data: DataConfig) -> Source:
    """Return which documents are read, and how the checkpoints are loaded."""
    return replace(_documents(data), tokenizer=checkpoints.tokenizer, loading=load_options(checkpoints))


def _documents(data: DataConfig) -> Source:
    return Source(
        columns=Columns(**{field.name: getattr(data, field.name) for field in fields(Columns)}),
        split=data.split,
        subset=data.subset,
        truncation=data.truncation,
        max_length=data.max_length,
    )


def query_columns(data: DataConfig, queries: QueryColumns) -> Columns:
    """Return which columns of the queries are read: those named for them, or else those of ``data``."""
    return Columns(
        queries.query_prompt_column or data.prompt_column,
        queries.query_completion_column or data.completion_column,
        data.conversation_column,
        label_column=data.label_column,
    )
