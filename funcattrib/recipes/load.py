"""The model and the documents that a command's flags ask for."""

from dataclasses import asdict, fields
from typing import Any

import torch
import torch.distributed as dist

from funcattrib.data import Columns
from funcattrib.distributed import world
from funcattrib.errors import FuncattribError
from funcattrib.lift.sharded import Gathers
from funcattrib.load_sharded import Shards
from funcattrib.loading import Loaded, load_model, pick_device
from funcattrib.recipes.config import DataConfig, ModelConfig, QueryColumns


def load_from(config: ModelConfig) -> Loaded:
    """Load the model of ``config``, and the reference in the same way."""
    settings = asdict(config)
    name, reference = settings.pop("model"), settings.pop("reference_model")
    sharded, ranks, offload = (settings.pop(name) for name in ("shard_params", "shard_ranks", "offload_params"))
    if sharded:
        settings["shards"] = shards_of(pick_device(config.device), ranks, offload)
    loaded = load_model(name, **settings)
    if reference is None:
        return loaded
    return loaded._replace(reference=load_model(reference, **{**settings, "tokenizer": None, "revision": None}).model)


def shards_of(device: torch.device, ranks: int | None = None, offload: bool = False) -> Shards:
    """Which processes hold a model together: each with its ``ranks`` neighbours, or all of them.

    Every process of the run calls this.

    Raises:
        FuncattribError: ``ranks`` does not divide the number of processes.
    """
    size = world().size
    ranks = ranks or size
    if size % ranks:
        raise FuncattribError(f"expected --shard-ranks that divides the {size} processes of this run, found {ranks}")
    own = None
    if ranks > 1:  # each process takes part in making every group
        groups = [dist.new_group(list(range(first, first + ranks))) for first in range(0, size, ranks)]
        own = groups[world().rank // ranks]
    return Shards(Gathers(own, device), device, offload)


def source_of(loaded: Loaded, data: DataConfig) -> dict[str, Any]:
    """Keyword settings of ``collect_gradients`` that say which documents, and what belongs to them."""
    return {
        **documents_of(data),
        "tokenizer": loaded.tokenizer,
        "model_name": loaded.name,
        "revision": loaded.revision,
        "reference_model": loaded.reference,
    }


def documents_of(data: DataConfig) -> dict[str, Any]:
    """Keyword settings of ``collect_gradients`` that say which documents, without what comes from a model."""
    return {
        "columns": Columns(**{field.name: getattr(data, field.name) for field in fields(Columns)}),
        "split": data.split,
        "subset": data.subset,
        "truncation": data.truncation,
        "max_length": data.max_length,
    }


def queries_of(data: DataConfig, own: QueryColumns) -> dict[str, Any]:
    """Keyword settings that say how the queries' data set is read: its own columns, or else those of ``data``."""
    columns = Columns(
        own.query_prompt_column or data.prompt_column,
        own.query_completion_column or data.completion_column,
        data.conversation_column,
    )
    return {"query_columns": columns, "query_split": own.query_split}
