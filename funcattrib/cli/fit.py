"""``funcattrib fit``: a chain's statistics, fitted on a data set."""

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import tyro

from funcattrib.cli.config_file import settings
from funcattrib.cli.output import reports_on_stderr
from funcattrib.cli.settings import DataConfig, ModelConfig
from funcattrib.runs.config import GradientConfig


@dataclass(frozen=True)
class Fit:
    """Fit the statistics of a chain of transforms and keep them in OUT.

    `funcattrib build --state OUT` computes rows with them.
    """

    out: tyro.conf.Positional[Path]
    """The folder to write."""
    model: ModelConfig
    data: DataConfig
    gradients: GradientConfig = field(default_factory=GradientConfig)
    overwrite: bool = False
    """Start over where OUT holds something else."""


@reports_on_stderr()
def run(config: Fit) -> int | None:
    """Fit, and say what was fitted."""
    from funcattrib.cli.load import load_from, source_of
    from funcattrib.runs.collect import fit_chain

    loaded = load_from(config.model)
    fitted = fit_chain(
        loaded.model,
        config.data.dataset,
        path=config.out,
        overwrite=config.overwrite,
        config=settings(replace(config, overwrite=False), command="fit"),
        **source_of(loaded, config.data),
        **asdict(config.gradients),
    )
    chain = " → ".join(stage["name"] for stage in fitted.manifest.chain) or "no transforms"
    print(f"{fitted.path}: the state of {chain}, for {len(fitted.leaves)} leaves")
    return None
