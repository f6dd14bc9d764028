"""``funcattrib reduce``: a data set's gradient as one query row."""

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

import tyro

from funcattrib.cli.config_file import settings
from funcattrib.cli.output import print_store, reports_on_stderr
from funcattrib.cli.settings import DataConfig, ModelConfig
from funcattrib.runs.config import GradientConfig


@dataclass(frozen=True)
class Reduce:
    """Reduce a data set's gradients to one row, a query for `funcattrib score`.

    The same command continues a run that was interrupted.
    """

    out: tyro.conf.Positional[Path]
    """The folder to write."""
    model: ModelConfig
    data: DataConfig
    method: Literal["mean", "sum"] = "mean"
    """Mean or sum of the documents' gradients."""
    unit_normalize: bool = False
    """Scale each document's gradient to unit length before it is added."""
    gradients: GradientConfig = field(default_factory=GradientConfig)
    state: Path | None = None
    """A fitted state, of `funcattrib fit` or a build; by default statistics are fitted here."""
    overwrite: bool = False
    """Start over where OUT holds another run."""


@reports_on_stderr()
def run(config: Reduce) -> int | None:
    """Reduce, and say what the row holds."""
    from funcattrib.cli.load import load_from, source_of
    from funcattrib.runs.reduce import reduce_gradients

    loaded = load_from(config.model)
    store = reduce_gradients(
        loaded.model,
        config.data.dataset,
        path=config.out,
        method=config.method,
        unit_normalize=config.unit_normalize,
        state=config.state,
        overwrite=config.overwrite,
        config=settings(replace(config, overwrite=False), command="reduce"),
        **source_of(loaded, config.data),
        **asdict(config.gradients),
    )
    print_store(store)
    return None
