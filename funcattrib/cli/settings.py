"""The settings that commands share: a run's folder, model, checkpoints, data. Importing this file imports no torch."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import tyro

from funcattrib.errors import FuncattribError
from funcattrib.runs.config import at_least


@dataclass(frozen=True)
class RunConfig:
    """The folder of a run."""

    run: tyro.conf.Positional[Path]
    """The run's folder."""
    overwrite: bool = False
    """Start over where RUN holds another run."""


@dataclass(frozen=True)
class ShardConfig:
    """Settings of processes that hold a model together."""

    shard_params: bool = False
    """Under torchrun or srun: each process keeps a part of every weight, and all together make one when it is used."""
    shard_ranks: int | None = None
    """Processes that hold one copy together, the neighbours in rank; by default all."""
    offload_params: bool = False
    """Keep the parts of --shard-params in the CPU's memory, and move them to the device when they are used."""

    def __post_init__(self) -> None:
        """Check what a type cannot say."""
        at_least(self, shard_ranks=1)
        for flag, given in (("--shard-ranks", self.shard_ranks is not None), ("--offload-params", self.offload_params)):
            if given and not self.shard_params:
                raise FuncattribError(f"{flag} requires --shard-params")


@dataclass(frozen=True)
class ModelConfig:
    """The model, and how it is loaded."""

    model: str
    """A hub id or a folder with a Hugging Face model."""
    tokenizer: str | None = None
    """Hub id or folder of the tokenizer, if it is not the model's."""
    revision: str | None = None
    """Branch, tag or commit of the model on the hub."""
    precision: Literal["auto", "fp32", "bf16", "fp16", "int8", "int4"] = "fp32"
    """Type of the weights; auto takes the checkpoint's own. int8 and int4 (nf4) quantise them, with bitsandbytes."""
    device: str = "auto"
    """cpu, cuda or cuda:N; auto takes a GPU where there is one."""
    trust_remote_code: bool = False
    """Run model code that comes with the checkpoint."""
    reference_model: str | None = None
    """The model that --loss kl compares with; by default the model with its adapter off."""
    shards: ShardConfig = field(default_factory=ShardConfig)


@dataclass(frozen=True)
class CheckpointConfig:
    """Settings of loading checkpoints."""

    checkpoint: tyro.conf.UseAppendAction[tuple[str, ...]]
    """A checkpoint of the model: a folder or a hub id. Repeated for each."""
    tokenizer: str | None = None
    """Hub id or folder of the tokenizer, if it is not the checkpoints' own."""
    precision: Literal["auto", "fp32", "bf16", "fp16", "int8", "int4"] = "fp32"
    """Type of the weights; auto takes the checkpoint's own. int8 and int4 (nf4) quantise them, with bitsandbytes."""
    device: str = "auto"
    """cpu, cuda or cuda:N; auto takes a GPU where there is one."""
    trust_remote_code: bool = False
    """Run model code that comes with the checkpoints."""
    shards: ShardConfig = field(default_factory=ShardConfig)


@dataclass(frozen=True)
class DataConfig:
    """The documents, and which of their tokens count in the loss."""

    dataset: str
    """A hub id, a save_to_disk folder, or a csv, json, jsonl, parquet, arrow or txt file or glob."""
    split: str | None = None
    """A split, which may be sliced: train[:1%]."""
    subset: str | None = None
    """The hub data set's configuration."""
    prompt_column: str | None = None
    """Column of text; its tokens count unless there is a completion. By default text, or the tokens of input_ids."""
    completion_column: str | None = None
    """Column that continues the prompt; its tokens alone count in the loss. Of an encoder-decoder, the target."""
    conversation_column: str | None = None
    """Column of messages (role, content); the assistant's turns alone count in the loss."""
    token_weights_column: str | None = None
    """Column of what each token's loss is multiplied by: one number a row, or a list of one a token."""
    reward_column: str | None = None
    """Column of rewards: a row's loss is multiplied by its reward less the mean of the rows with the same prompt."""
    advantage_column: str | None = None
    """Column of what each row's loss is multiplied by."""
    keep_columns: tuple[str, ...] = ()
    """Further columns (url, source, label, …) to keep beside each row and to show with results."""
    label_column: str | None = None
    """Column of labels, of a sequence classification model; by default label."""
    skip_missing_rewards: bool = False
    """Give rows without a reward a zero gradient, and leave them out of the means, instead of stopping."""
    truncation: bool = False
    """Cut documents that are longer than the model's context (or --max-length) instead of stopping."""
    max_length: int | None = None
    """Longest document in tokens; by default the model's context."""

    def __post_init__(self) -> None:
        """Check what a type cannot say."""
        if self.max_length is not None and self.max_length < 1:
            raise FuncattribError(f"expected --max-length of at least 1, found {self.max_length}")


@dataclass(frozen=True)
class QueryColumns:
    """The part and the columns of the queries' data set that are read."""

    query_split: str | None = None
    """A split of the queries."""
    query_prompt_column: str | None = None
    """The queries' column of text; by default --prompt-column."""
    query_completion_column: str | None = None
    """The queries' column whose tokens alone count in their loss; by default --completion-column."""
