"""``funcattrib less``: the examples to select for a task, by LESS."""

from dataclasses import dataclass, field
from typing import Literal

from funcattrib.cli.config_file import settings
from funcattrib.cli.output import reports_on_stderr
from funcattrib.cli.settings import CheckpointConfig, DataConfig, QueryColumns, RunConfig
from funcattrib.runs.config import RowConfig, at_least


@dataclass(frozen=True)
class Less:
    """Score training examples by LESS, and select those that a task's queries ask for.

    Each checkpoint is a folder with its optimizer.pt (Adam, AdamW), as transformers' Trainer writes them.
    RUN/selected is the data set of the best examples, which datasets.load_from_disk loads. The same command continues a
    run that was interrupted.
    """

    output: RunConfig
    checkpoints: CheckpointConfig
    data: DataConfig
    query_dataset: str
    """The task's queries: whatever --dataset takes."""
    queries: QueryColumns = field(default_factory=QueryColumns)
    learning_rate: tuple[float, ...] = ()
    """Each checkpoint's weight; by default the mean learning rate that its trainer_state.json logged."""
    fraction: float = 0.05
    """Part of the examples to select."""
    score: Literal["nearest", "mean"] = "nearest"
    """An example's score: that of the nearest query (or subtask), or the mean over queries."""
    subtask_column: str | None = None
    """Column of the queries; those with the same value are one subtask, and their scores are averaged."""
    gradients: RowConfig = field(default_factory=lambda: RowConfig(loss_reduction="mean"))
    show: int = 3
    """Number of the selected examples that are shown."""
    unique: bool = True
    """Select the best alone of examples with the same text, whatever its case, white space and unicode form."""

    def __post_init__(self) -> None:
        """Check what a type cannot say."""
        at_least(self, show=1)


@reports_on_stderr
def run(config: Less) -> int | None:
    """Score and select, and show the best."""
    from funcattrib.cli.load import query_columns, source_of_checkpoints
    from funcattrib.recipes.less import less
    from funcattrib.recipes.less_selected import SELECTED
    from funcattrib.report.scores import scores_table

    scores = less(
        config.checkpoints.checkpoint,
        config.data.dataset,
        config.query_dataset,
        path=config.output.run,
        query_columns=query_columns(config.data, config.queries),
        query_split=config.queries.query_split,
        learning_rates=config.learning_rate,
        fraction=config.fraction,
        score=config.score,
        subtask_column=config.subtask_column,
        unique=config.unique,
        source=source_of_checkpoints(config.checkpoints, config.data),
        gradients=config.gradients,
        overwrite=config.output.overwrite,
        config=settings(config, command="less"),
    )
    print(scores_table(scores, config.show, unique=config.unique))
    print(f"\nselected: {config.output.run / SELECTED}")
    return None
