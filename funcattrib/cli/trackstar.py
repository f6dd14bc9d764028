"""``funcattrib trackstar``: scores of a data set against queries, by TrackStar."""

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

import tyro

from funcattrib.cli.config_file import settings
from funcattrib.cli.output import reports_on_stderr
from funcattrib.cli.settings import DataConfig, ModelConfig, QueryColumns
from funcattrib.runs.config import FittedConfig, at_least


@dataclass(frozen=True)
class Trackstar:
    """Score every training example against a data set of queries, by TrackStar.

    The same command continues a run that was interrupted.
    """

    out: tyro.conf.Positional[Path]
    """The folder to write: the scores, and the gradients in a sub-folder."""
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
    overwrite: bool = False
    """Start over where OUT holds another run."""
    top_k: int = 3
    """Training examples to show for the first queries."""

    def __post_init__(self) -> None:
        """Check what a type cannot say."""
        at_least(self, top_k=1, mixing_rank=1, damping=0)


@reports_on_stderr()
def run(config: Trackstar) -> int | None:
    """Score, and show the first queries' proponents."""
    from funcattrib.cli.load import load_from, queries_of, source_of
    from funcattrib.recipes.trackstar import trackstar
    from funcattrib.report.scores import scores_table

    loaded = load_from(config.model)
    source = source_of(loaded, config.data)
    gradients = asdict(config.gradients)
    if not gradients["modules"]:
        del gradients["modules"]
    moments = None
    if config.optimizer_state is not None:
        from funcattrib.checkpoints.optimizer_state import optimizer_state

        moments = optimizer_state(config.optimizer_state, loaded.model)
    scores = trackstar(
        loaded.model,
        config.data.dataset,
        config.query_dataset,
        path=config.out,
        score=config.score,
        mixing_rank=config.mixing_rank,
        damping=config.damping,
        moments=moments,
        config=settings(replace(config, overwrite=False), command="trackstar"),
        overwrite=config.overwrite,
        **queries_of(config.data, config.queries),
        **source,
        **gradients,
    )
    print(scores_table(scores, config.top_k))
    return None
