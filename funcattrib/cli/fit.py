"""``funcattrib fit``: a chain's statistics, fitted on a data set."""

from dataclasses import dataclass, field

from funcattrib.cli.config_file import settings
from funcattrib.cli.output import reports_on_stderr
from funcattrib.cli.settings import DataConfig, ModelConfig, RunConfig
from funcattrib.runs.config import GradientConfig


@dataclass(frozen=True)
class Fit:
    """Fit the statistics of a chain of transforms and keep them in RUN.

    `funcattrib build --state RUN` computes rows with them.
    """

    output: RunConfig
    model: ModelConfig
    data: DataConfig
    gradients: GradientConfig = field(default_factory=GradientConfig)


@reports_on_stderr
def run(config: Fit) -> int | None:
    """Fit, and say what was fitted."""
    from funcattrib.cli.load import load_from, source_of
    from funcattrib.runs.collect import fit_chain

    loaded = load_from(config.model)
    fitted = fit_chain(
        loaded.model,
        config.data.dataset,
        path=config.output.run,
        source=source_of(loaded, config.data),
        gradients=config.gradients,
        overwrite=config.output.overwrite,
        config=settings(config, command="fit"),
    )
    chain = " → ".join(stage["name"] for stage in fitted.manifest.chain) or "no transforms"
    print(f"{fitted.path}: the state of {chain}, for {len(fitted.leaves)} leaves")
    return None
