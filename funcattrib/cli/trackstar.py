"""``funcattrib trackstar``: scores of a data set against queries, by TrackStar."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from funcattrib.cli.config_file import settings
from funcattrib.cli.output import reports_on_stderr
from funcattrib.cli.settings import DataConfig, ModelConfig, QueryColumns, RunConfig
from funcattrib.runs.config import FittedConfig, at_least


@dataclass(frozen=True)
class Trackstar:
    """Score every training example against a data set of queries, by TrackStar.

    The same command continues a run that was interrupted.
    """

    output: RunConfig
    model: ModelConfig
    data: DataConfig
    query_dataset: str
    """The queries: whatever --dataset takes."""
    queries: QueryColumns = field(default_factory=QueryColumns)
    score: Literal["individual", "mean"] = "individual"
    """A column for every query, or one for their mean gradient."""
    mixing_rank: int = 1000
    """Directions common to the queries that the mixed preconditioner weighs down."""
    damping: float = 0.1
    """Damping of the preconditioner, in units of the mean eigenvalue."""
    optimizer_state: Path | None = None
    """An optimizer's saved state: its second moments take the place of a pass over the data."""
    gradients: FittedConfig = field(default_factory=lambda: FittedConfig(loss="log_odds"))
    show: int = 3
    """Number of training examples that are shown for the first queries."""
    unique: bool = False
    """Show each text once, whatever its case, white space and unicode form."""

    def __post_init__(self) -> None:
        """Check what a type cannot say."""
        at_least(self, show=1, mixing_rank=1, damping=0)


@reports_on_stderr
def run(config: Trackstar) -> int | None:
    """Score, and show the first queries' proponents."""
    from funcattrib.cli.load import load_from, query_columns, source_of
    from funcattrib.recipes.trackstar import trackstar
    from funcattrib.report.scores import scores_table

    loaded = load_from(config.model)
    moments = None
    if config.optimizer_state is not None:
        from funcattrib.checkpoints.optimizer_state import optimizer_state

        moments = optimizer_state(config.optimizer_state, loaded.model)
    scores = trackstar(
        loaded.model,
        config.data.dataset,
        config.query_dataset,
        path=config.output.run,
        query_columns=query_columns(config.data, config.queries),
        query_split=config.queries.query_split,
        score=config.score,
        mixing_rank=config.mixing_rank,
        damping=config.damping,
        moments=moments,
        source=source_of(loaded, config.data),
        gradients=config.gradients,
        overwrite=config.output.overwrite,
        config=settings(config, command="trackstar"),
    )
    print(scores_table(scores, config.show, unique=config.unique))
    return None
