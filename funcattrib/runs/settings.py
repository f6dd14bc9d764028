"""The settings of the functions that read a data set: two frozen dataclasses, or keywords that change them.

``Source`` says which documents are read, and what belongs to them; ``RowConfig`` and its kin (``runs/config.py``) say
what is computed. Either is passed whole (``source=``, ``gradients=``), as commands do, or set by keyword: the
``TypedDict`` below list the keywords for editors and type checkers.
"""

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, TypedDict, TypeVar

from torch import nn
from transformers import PreTrainedTokenizerBase

from funcattrib.data import Columns
from funcattrib.errors import FuncattribError
from funcattrib.losses.resolve import Own, loss_name
from funcattrib.models.attention_config import AttentionConfig
from funcattrib.models.loading import LoadOptions
from funcattrib.runs.config import GradientConfig, RowConfig

_Config = TypeVar("_Config", bound=RowConfig)

_GLOBS = ("modules", "exclude", "split_attention_modules")


@dataclass(frozen=True)
class Source:
    """Documents to read, and what belongs to them.

    Attributes:
        tokenizer: a tokenizer, or its hub id or folder; by default that of the model, where it has a name.
        columns: which columns to read; ``text`` by default.
        split, subset: of the data, where it has a name.
        truncation: cut documents longer than ``max_length``.
        max_length: by default the model's context.
        model_name, revision: what the manifest calls the model.
        identity, reference_identity: what ``model_identity`` gave of the model and the reference model, where that is
            known; they are computed once a run.
        loading: how models given by name are loaded.
        reference_model: the model that the loss ``kl`` compares with, or its name.
        loss_function: a function in place of the loss that the settings name.
        quiet: no report, no progress.

    Example:
        >>> Source(split="train").for_queries(Columns("question"))
        Source(..., columns=Columns(prompt_column='question', ...), split=None, ...)
    """

    tokenizer: PreTrainedTokenizerBase | str | None = None
    columns: Columns | None = None
    split: str | None = None
    subset: str | None = None
    truncation: bool = False
    max_length: int | None = None
    model_name: str | None = None
    revision: str | None = None
    identity: Mapping[str, Any] | None = None
    loading: LoadOptions = field(default_factory=LoadOptions)
    reference_model: nn.Module | str | None = None
    reference_identity: Mapping[str, Any] | None = None
    loss_function: Own | None = None
    quiet: bool = False

    def for_queries(self, columns: Columns | None = None, split: str | None = None) -> "Source":
        """Return the same for a second data set, the queries: its own columns (by default these) and split."""
        return replace(self, columns=columns or self.columns, split=split, subset=None)


class SourceSettings(TypedDict, total=False):
    """Keywords that set the fields of ``Source``."""

    tokenizer: PreTrainedTokenizerBase | str | None
    columns: Columns | None
    split: str | None
    subset: str | None
    truncation: bool
    max_length: int | None
    model_name: str | None
    revision: str | None
    loading: LoadOptions
    reference_model: nn.Module | str | None
    quiet: bool


class RowSettings(SourceSettings, total=False):
    """Keywords that set the fields of ``Source`` and ``RowConfig``; ``loss`` may be a function."""

    projection_dim: int
    projection_type: Literal["rademacher", "normal"]
    loss: str | Callable[..., Any]
    loss_reduction: Literal["sum", "mean"]
    label_smoothing: float
    modules: Sequence[str] | str | None
    exclude: Sequence[str] | str | None
    token_batch_size: int | Literal["auto"]
    dtype: Literal["float16", "bfloat16", "float32", "int8"]
    rows_per_shard: int | None
    seed: int


class FittedSettings(RowSettings, total=False):
    """Keywords that set the fields of ``Source`` and ``FittedConfig``."""

    fit_documents: int


class GradientSettings(FittedSettings, total=False):
    """Keywords that set the fields of ``Source`` and ``GradientConfig``."""

    normalizer: Literal["adafactor", "adam", "none"]
    optimizer_state: Path | None
    precondition: Literal["none", "parameter", "all"]
    damping: float
    sketch_dim: int | None
    split_heads: bool
    split_attention_modules: Sequence[str] | str | None
    num_heads: int | None
    head_size: int | None
    head_dim: int | None
    attention_cfgs: Mapping[str, AttentionConfig]
    split_experts: bool


def resolve(source: Source | None, gradients: _Config, keywords: Mapping[str, Any]) -> tuple[Source, _Config]:
    """Return the two settings objects with what the keywords change.

    Raises:
        FuncattribError: an unknown keyword, or a value out of range.

    Example:
        >>> source, rows = resolve(None, RowConfig(), {"split": "train", "modules": "*.mlp.*", "seed": 1})
        >>> source.split, rows.modules, rows.seed
        ('train', ('*.mlp.*',), 1)
    """
    of_source: dict[str, Any] = {}
    of_rows: dict[str, Any] = {}
    source_names, row_names = ({each.name for each in fields(kind)} for kind in (Source, type(gradients)))
    for name, value in keywords.items():
        if name == "loss" and callable(value):
            of_rows["loss"], of_source["loss_function"] = loss_name(value), value
        elif name in _GLOBS and name in row_names:
            of_rows[name] = (value,) if isinstance(value, str) else tuple(value or ())
        elif name in row_names:
            of_rows[name] = value
        elif name in source_names:
            of_source[name] = value
        else:
            known = sorted(source_names | row_names)
            near = difflib.get_close_matches(name, known, n=1)
            cure = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}"
            raise FuncattribError(f"unknown setting {name!r}; {cure}")
    return replace(source or Source(), **of_source), replace(gradients, **of_rows)


def as_gradient_config(rows: RowConfig) -> GradientConfig:
    """Return the same settings as a ``GradientConfig``, for functions that are given their chain."""
    return GradientConfig(**{each.name: getattr(rows, each.name) for each in fields(rows)})
