"""``funcattrib score``: scores of a data set against query gradients, in one pass."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import tyro

from funcattrib.cli.config_file import settings
from funcattrib.cli.output import reports_on_stderr
from funcattrib.cli.settings import DataConfig, ModelConfig, QueryColumns, RunConfig
from funcattrib.runs.config import GradientConfig, at_least


@dataclass(frozen=True)
class Score:
    """Score every training example against query gradients, in one pass; none are stored.

    The same command continues a run that was interrupted.
    """

    output: RunConfig
    model: ModelConfig
    data: DataConfig
    query_path: tyro.conf.UseAppendAction[tuple[Path, ...]] = ()
    """Query gradients: a folder of build or reduce. May be repeated."""
    query_dataset: str | None = None
    """Or the queries' data set, whatever --dataset takes: their gradients are computed first."""
    queries: QueryColumns = field(default_factory=QueryColumns)
    score: Literal["individual", "mean", "nearest", "self"] = "individual"
    """A column for every query, for their mean, or for the nearest of them; self scores each example with itself."""
    unit_norm: bool = False
    """Cosine in place of inner product."""
    granularity: Literal["example", "module", "token"] = "example"
    """One score an example and query, or its parts by module (or head) or by token, which add up to it."""
    top_k: int | None = None
    """Number of examples of each query that are kept, the best; by default the scores of all."""
    unique: bool = False
    """Show, and with --top-k keep, each text once, whatever its case, white space and unicode form."""
    gradients: GradientConfig = field(default_factory=GradientConfig)
    state: Path | None = None
    """A fitted state; by default that of the queries, or one fitted here."""
    show: int = 3
    """Number of training examples that are shown for the first queries."""

    def __post_init__(self) -> None:
        """Check what a type cannot say."""
        at_least(self, show=1, top_k=1)


@reports_on_stderr
def run(config: Score) -> int | None:
    """Score, and show the first queries' proponents."""
    from funcattrib.cli.load import load_from, query_columns, source_of
    from funcattrib.report.scores import scores_table
    from funcattrib.runs.score import score_gradients

    loaded = load_from(config.model)
    scores = score_gradients(
        loaded.model,
        config.data.dataset,
        path=config.output.run,
        query_stores=config.query_path,
        query_data=config.query_dataset,
        query_columns=query_columns(config.data, config.queries),
        query_split=config.queries.query_split,
        score=config.score,
        unit_norm=config.unit_norm,
        granularity=config.granularity,
        top_k=config.top_k,
        unique=config.unique and config.top_k is not None,
        state=config.state,
        source=source_of(loaded, config.data),
        gradients=config.gradients,
        overwrite=config.output.overwrite,
        config=settings(config, command="score"),
    )
    print(scores_table(scores, min(config.show, config.top_k or config.show), unique=config.unique))
    return None
