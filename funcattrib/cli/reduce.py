"""``funcattrib reduce``: a data set's gradient as one query row."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from funcattrib.cli.config_file import settings
from funcattrib.cli.output import print_store, reports_on_stderr
from funcattrib.cli.settings import DataConfig, ModelConfig, RunConfig
from funcattrib.runs.config import GradientConfig


@dataclass(frozen=True)
class Reduce:
    """Reduce a data set's gradients to one row, a query for `funcattrib score`.

    The same command continues a run that was interrupted.
    """

    output: RunConfig
    model: ModelConfig
    data: DataConfig
    method: Literal["mean", "sum"] = "mean"
    """Mean or sum of the documents' gradients."""
    unit_norm: Annotated[bool, tyro.conf.arg(aliases=["--unit-normalize"])] = False
    """Scale each document's gradient to unit length before it is added."""
    gradients: GradientConfig = field(default_factory=GradientConfig)
    state: Path | None = None
    """A fitted state, of `funcattrib fit` or a build; by default statistics are fitted here."""


@reports_on_stderr
def run(config: Reduce) -> int | None:
    """Reduce, and say what the row holds."""
    from funcattrib.cli.load import load_from, source_of
    from funcattrib.runs.reduce import reduce_gradients

    loaded = load_from(config.model)
    store = reduce_gradients(
        loaded.model,
        config.data.dataset,
        path=config.output.run,
        method=config.method,
        unit_norm=config.unit_norm,
        state=config.state,
        source=source_of(loaded, config.data),
        gradients=config.gradients,
        overwrite=config.output.overwrite,
        config=settings(config, command="reduce"),
    )
    print_store(store)
    return None
