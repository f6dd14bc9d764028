"""The settings that commands share. Importing this file imports no torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import tyro

from funcattrib.errors import FuncattribError
from funcattrib.models.attention_config import AttentionConfig


@dataclass(frozen=True)
class RowConfig:
    """Settings of each example's row, whatever the method, and of its storage."""

    projection_dim: int = 16
    """Coordinates a side of each projected matrix; 0 keeps whole gradients."""
    projection_type: Literal["rademacher", "normal"] = "rademacher"
    """Distribution of the projections' entries."""
    loss: str = "ce"
    """ce (cross-entropy), log_odds (negative, of tokens), kl (from --reference-model), or package.module:function."""
    loss_reduction: Literal["sum", "mean"] = "sum"
    """Sum or mean over an example's labelled tokens."""
    label_smoothing: float = 0.0
    """Smoothing of the cross-entropy."""
    modules: tuple[str, ...] = ()
    """Globs of parameter names to attribute; all takes everything. By default the matrices of the model's blocks."""
    exclude: tuple[str, ...] = ()
    """Globs of parameter names to leave out."""
    token_batch_size: int | Literal["auto"] = 4096
    """Tokens in a batch with its padding, whatever the model's context; auto finds the fastest that fits, by trial."""
    dtype: Literal["float16", "bfloat16", "float32", "int8"] = "float16"
    """Type of the stored rows; int8 with one scale a row."""
    rows_per_shard: int | None = None
    """Examples in a shard, the unit of work that is kept; by default at most 1024, and at most 256 MiB in float32."""
    seed: int = 0
    """Seed of the projections."""

    def __post_init__(self) -> None:
        """Check what a type cannot say."""
        at_least(self, projection_dim=0, rows_per_shard=1, seed=0)
        if self.token_batch_size != "auto":
            if not isinstance(self.token_batch_size, int):
                raise FuncattribError(
                    f"expected `token_batch_size` to be a number or auto, found {self.token_batch_size!r}"
                )
            at_least(self, token_batch_size=1)
        refuse(
            (
                not 0 <= self.label_smoothing < 1,
                f"expected `label_smoothing` in [0, 1), found {self.label_smoothing}",
            ),
            (
                self.loss not in ("ce", "kl", "log_odds") and ":" not in self.loss,
                f"expected `loss` of ce, kl, log_odds or package.module:function, found {self.loss!r}",
            ),
        )


@dataclass(frozen=True)
class FittedConfig(RowConfig):
    """The same settings, where statistics are fitted too."""

    fit_documents: int = 1024
    """Documents on which statistics are fitted, spread evenly over the data set; 0 takes all."""

    def __post_init__(self) -> None:
        """Check what a type cannot say."""
        super().__post_init__()
        at_least(self, fit_documents=0)


@dataclass(frozen=True)
class GradientConfig(FittedConfig):
    """Settings of each example's row, step by step, and of its storage."""

    normalizer: Literal["adafactor", "adam", "none"] = "none"
    """Divide by the root of second moments before projecting; they are fitted in a pass before."""
    optimizer_state: Path | None = None
    """An optimizer's saved state, or a Trainer's checkpoint: its second moments take the place of that pass."""
    precondition: Literal["none", "parameter", "all"] = "none"
    """Multiply what was projected by H^-1/2, H fitted for each parameter or for all together: cosines whitened."""
    damping: float = 0.1
    """Damping of the preconditioner, in units of the mean eigenvalue."""
    sketch_dim: int | None = None
    """One sketch of this length of the whole gradient, in place of a projection of each matrix."""
    split_heads: bool = False
    """Take attention weights apart by head, as the model's configuration says that they lie."""
    split_attention_modules: tuple[str, ...] = ()
    """Globs of modules to take apart by head, described by --num-heads, --head-size and --head-dim."""
    num_heads: int | None = None
    """Heads of --split-attention-modules."""
    head_size: int | None = None
    """Rows or columns of one head."""
    head_dim: int | None = None
    """Axis of the heads: 0 rows (also 2, the last axis of the output), 1 columns. By default 0."""
    attention_cfgs: tyro.conf.Fixed[Mapping[str, AttentionConfig]] = field(default_factory=dict)  # no flag has its form
    """Globs of modules to take apart by head, each with how its heads lie; in Python alone."""
    split_experts: bool = False
    """Take stacks of experts apart, a leaf an expert."""

    def __post_init__(self) -> None:
        """Check what a type cannot say."""
        super().__post_init__()
        at_least(self, damping=0, sketch_dim=1, num_heads=1, head_size=1)
        heads, split = self.split_attention_modules, self.split_heads or self.split_experts or self.attention_cfgs
        refuse(
            (
                self.optimizer_state is not None and self.normalizer == "none",
                "`optimizer_state` requires a `normalizer`: adafactor or adam",
            ),
            (
                self.sketch_dim is not None and self.projection_dim not in (0, RowConfig.projection_dim),
                "`projection_dim` and `sketch_dim` cannot be combined: a sketch replaces the projection",
            ),
            (
                self.sketch_dim is not None and (split or heads),
                "`sketch_dim` adds up all leaves, so heads or experts cannot be split; use `projection_dim`",
            ),
            (
                self.split_heads and heads,
                "`split_heads` and `split_attention_modules` cannot be combined; leave one out",
            ),
            (
                self.attention_cfgs and (self.split_heads or heads),
                "`attention_cfgs` says where the heads are; leave `split_heads` and `split_attention_modules` out",
            ),
            (heads and self.num_heads is None, "`split_attention_modules` requires `num_heads`"),
            (heads and self.head_size is None, "`split_attention_modules` requires `head_size`"),
            (not heads and self.num_heads is not None, "`num_heads` requires `split_attention_modules`"),
            (not heads and self.head_size is not None, "`head_size` requires `split_attention_modules`"),
            (not heads and self.head_dim is not None, "`head_dim` requires `split_attention_modules`"),
        )


def refuse(*rules: tuple[object, str]) -> None:
    """Raise the message of the first rule whose condition holds.

    Raises:
        FuncattribError: with that message.

    Example:
        >>> refuse((1 > 2, "one is above two"), (0.0 < 1.5 < 1.0, "not a fraction"))
    """
    for wrong, message in rules:
        if wrong:
            raise FuncattribError(message)


def at_least(config: object, **least: float) -> None:
    """Check fields that have a smallest value; those that are None pass.

    Raises:
        FuncattribError: naming the setting.
    """
    for name, smallest in least.items():
        value = getattr(config, name)
        if value is not None and not value >= smallest:
            raise FuncattribError(f"expected `{name}` of at least {smallest}, found {value}")
