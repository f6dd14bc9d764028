"""``funcattrib trak``: scores of a data set against queries, by TRAK."""

from dataclasses import dataclass, field
from typing import Literal

from funcattrib.cli.config_file import settings
from funcattrib.cli.output import reports_on_stderr
from funcattrib.cli.settings import CheckpointConfig, DataConfig, QueryColumns, RunConfig
from funcattrib.runs.config import RowConfig, at_least


@dataclass(frozen=True)
class Trak:
    """Score every training example against a data set of queries, by TRAK over checkpoints.

    The same command continues a run that was interrupted.
    """

    output: RunConfig
    checkpoints: CheckpointConfig
    data: DataConfig
    query_dataset: str
    """The queries: whatever --dataset takes."""
    queries: QueryColumns = field(default_factory=QueryColumns)
    sketch_dim: int = 4096
    """Length of each checkpoint's sketch of the whole gradient; well below the number of training examples."""
    damping: float = 0.0
    """Added to the eigenvalues of the sketches' Gram matrix, in units of their mean."""
    score: Literal["individual", "mean"] = "individual"
    """A column for every query, or one for their mean."""
    gradients: RowConfig = field(default_factory=lambda: RowConfig(projection_dim=0, loss="log_odds", dtype="float32"))
    show: int = 3
    """Number of training examples that are shown for the first queries."""
    unique: bool = False
    """Show each text once, whatever its case, white space and unicode form."""

    def __post_init__(self) -> None:
        """Check what a type cannot say."""
        at_least(self, show=1)


@reports_on_stderr
def run(config: Trak) -> int | None:
    """Score, and show the first queries' proponents."""
    from funcattrib.cli.load import query_columns, source_of_checkpoints
    from funcattrib.recipes.trak import trak
    from funcattrib.report.scores import scores_table

    scores = trak(
        config.checkpoints.checkpoint,
        config.data.dataset,
        config.query_dataset,
        path=config.output.run,
        query_columns=query_columns(config.data, config.queries),
        query_split=config.queries.query_split,
        sketch_dim=config.sketch_dim,
        damping=config.damping,
        score=config.score,
        source=source_of_checkpoints(config.checkpoints, config.data),
        gradients=config.gradients,
        overwrite=config.output.overwrite,
        config=settings(config, command="trak"),
    )
    print(scores_table(scores, config.show, unique=config.unique))
    return None
