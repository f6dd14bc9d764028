"""``funcattrib build``: per-example gradients of a data set into a store."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from funcattrib.cli.config_file import settings
from funcattrib.cli.output import print_store, reports_on_stderr
from funcattrib.cli.settings import DataConfig, ModelConfig, RunConfig
from funcattrib.runs.config import GradientConfig


@dataclass(frozen=True)
class Build:
    """Compute every training example's gradient and store it in RUN.

    The same command continues a run that was interrupted.
    """

    output: RunConfig
    model: ModelConfig
    data: DataConfig
    gradients: GradientConfig = field(default_factory=GradientConfig)
    state: Path | None = None
    """A fitted state, of `funcattrib fit`; by default the normalizer is fitted here."""
    granularity: Literal["example", "token"] = "example"
    """A row an example, or a row a token; an example's token rows add up to its gradient."""


@reports_on_stderr
def run(config: Build) -> int | None:
    """Build the store and say what it holds."""
    from funcattrib.cli.load import load_from, source_of
    from funcattrib.runs.collect import collect_gradients

    loaded = load_from(config.model)
    store = collect_gradients(
        loaded.model,
        config.data.dataset,
        path=config.output.run,
        state=config.state,
        granularity=config.granularity,
        source=source_of(loaded, config.data),
        gradients=config.gradients,
        overwrite=config.output.overwrite,
        config=settings(config, command="build"),
    )
    print_store(store)
    return None
