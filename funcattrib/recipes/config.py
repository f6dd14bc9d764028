"""The settings that commands share. Importing this file imports no torch."""

from dataclasses import dataclass
from typing import Literal

from funcattrib.errors import FuncattribError


@dataclass(frozen=True)
class ModelConfig:
    """Which model, and how it is loaded."""

    model: str
    """A hub id or a folder with a Hugging Face model."""
    tokenizer: str | None = None
    """Hub id or folder of the tokenizer, if it is not the model's."""
    revision: str | None = None
    """Branch, tag or commit of the model on the hub."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "fp32"
    """Type of the weights; auto takes the checkpoint's own."""
    device: str = "auto"
    """cpu, cuda or cuda:N; auto takes a GPU where there is one."""
    trust_remote_code: bool = False
    """Run model code that comes with the checkpoint."""


@dataclass(frozen=True)
class DataConfig:
    """Which documents, and which of their tokens count in the loss."""

    dataset: str
    """A hub id, a save_to_disk folder, or a csv, json, jsonl, parquet, arrow or txt file or glob."""
    split: str | None = None
    """A split, which may be sliced: train[:1%]."""
    subset: str | None = None
    """The hub data set's configuration."""
    prompt_column: str = "text"
    """Column of text; its tokens count in the loss unless there is a completion."""
    completion_column: str | None = None
    """Column of text that continues the prompt; its tokens alone count in the loss."""
    conversation_column: str | None = None
    """Column of messages (role, content); the assistant's turns alone count in the loss."""
    truncation: bool = False
    """Cut documents that are longer than the model's context (or --max-length) instead of stopping."""
    max_length: int | None = None
    """Longest document in tokens; by default the model's context."""

    def __post_init__(self) -> None:
        """Check what a type cannot say."""
        if self.max_length is not None and self.max_length < 1:
            raise FuncattribError(f"expected --max-length of at least 1, found {self.max_length}")


@dataclass(frozen=True)
class GradientConfig:
    """What is computed of each example's gradient, and how it is kept."""

    projection_dim: int = 16
    """Coordinates a side of each projected matrix; 0 keeps whole gradients."""
    projection_type: Literal["rademacher", "normal"] = "rademacher"
    """Distribution of the projections' entries."""
    normalizer: Literal["adafactor", "none"] = "none"
    """Divide by the root of second moments before projecting; fitted in a pass of its own."""
    fit_documents: int = 1024
    """Documents on which the normalizer is fitted, spread evenly over the data set; 0 takes all."""
    loss: Literal["ce", "log_odds"] = "ce"
    """Cross-entropy, or the negative log-odds of each token."""
    loss_reduction: Literal["sum", "mean"] = "sum"
    """Sum or mean over an example's labelled tokens."""
    label_smoothing: float = 0.0
    """Smoothing of the cross-entropy."""
    modules: tuple[str, ...] = ()
    """Globs of parameter names to attribute; all takes everything. By default the matrices of the model's blocks."""
    exclude: tuple[str, ...] = ()
    """Globs of parameter names to leave out."""
    token_batch_size: int = 4096
    """Tokens in a batch, padding included; not tied to the model's context."""
    dtype: Literal["float16", "bfloat16", "float32", "int8"] = "float16"
    """How rows are stored; int8 with one scale a row."""
    rows_per_shard: int | None = None
    """Examples in a shard, the unit of work that is kept; by default at most 1024, and at most 256 MiB in float32."""
    seed: int = 0
    """Seed of the projections."""

    def __post_init__(self) -> None:
        """Check what a type cannot say."""
        for name, least in (
            ("projection_dim", 0),
            ("token_batch_size", 1),
            ("fit_documents", 0),
            ("rows_per_shard", 1),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise FuncattribError(f"expected --{name.replace('_', '-')} of at least {least}, found {value}")
        if not 0 <= self.label_smoothing < 1:
            raise FuncattribError(f"expected --label-smoothing in [0, 1), found {self.label_smoothing}")
