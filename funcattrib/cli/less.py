"""``funcattrib less``: the examples to select for a task, by LESS."""

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

import tyro

from funcattrib.cli.config_file import settings
from funcattrib.cli.output import reports_on_stderr
from funcattrib.cli.settings import DataConfig, LoadConfig, QueryColumns
from funcattrib.runs.config import RowConfig


@dataclass(frozen=True)
class Less:
    """Score training examples by LESS, and select those that a task's queries ask for.

    OUT/selected is the data set of the best examples, which datasets.load_from_disk loads. The same command continues a
    run that was interrupted.
    """

    out: tyro.conf.Positional[Path]
    """The folder to write: the scores, and the selected examples in a sub-folder."""
    checkpoint: tyro.conf.UseAppendAction[tuple[Path, ...]]
    """A checkpoint of the training run, with its optimizer.pt (Adam, AdamW). Repeated for each."""
    data: DataConfig
    query_dataset: str
    """The task's queries: whatever --dataset takes."""
    queries: QueryColumns = field(default_factory=QueryColumns)
    loading: LoadConfig = field(default_factory=LoadConfig)
    learning_rate: tuple[float, ...] = ()
    """Each checkpoint's weight; by default the mean learning rate that its trainer_state.json logged."""
    fraction: float = 0.05
    """Part of the examples to select."""
    score: Literal["nearest", "mean"] = "nearest"
    """An example's score: that of the nearest query (or subtask), or the mean over queries."""
    subtask_column: str | None = None
    """Column of the queries; those with the same value are one subtask, and their scores are averaged."""
    gradients: RowConfig = field(default_factory=lambda: RowConfig(loss_reduction="mean"))
    overwrite: bool = False
    """Start over where OUT holds another run."""
    show: int = 3
    """Selected examples to show."""


@reports_on_stderr()
def run(config: Less) -> int | None:
    """Score and select, and show the best."""
    from funcattrib.cli.load import documents_of, load_options, queries_of
    from funcattrib.recipes.less import SELECTED, less
    from funcattrib.report.scores import scores_table

    options = load_options(config.loading)
    scores = less(
        config.checkpoint,
        config.data.dataset,
        config.query_dataset,
        path=config.out,
        rates=config.learning_rate,
        fraction=config.fraction,
        score=config.score,
        subtask_column=config.subtask_column,
        tokenizer=options.pop("tokenizer"),
        load_options=options,
        overwrite=config.overwrite,
        config=settings(replace(config, overwrite=False), command="less"),
        **queries_of(config.data, config.queries),
        **documents_of(config.data),
        **asdict(config.gradients),
    )
    print(scores_table(scores, config.show))
    print(f"\nselected: {config.out / SELECTED}")
    return None
