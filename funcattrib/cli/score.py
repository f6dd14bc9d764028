"""``funcattrib score``: scores of a data set against query gradients, in one pass."""

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

import tyro

from funcattrib.cli.config_file import settings
from funcattrib.cli.output import reports_on_stderr
from funcattrib.cli.settings import DataConfig, ModelConfig, QueryColumns
from funcattrib.runs.config import GradientConfig, at_least


@dataclass(frozen=True)
class Score:
    """Score every training example against query gradients, in one pass; none are stored.

    The same command continues a run that was interrupted.
    """

    out: tyro.conf.Positional[Path]
    """The folder to write."""
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
    """Keep the best so many examples of each query, and no other scores."""
    gradients: GradientConfig = field(default_factory=GradientConfig)
    state: Path | None = None
    """A fitted state; by default that of the queries, or one fitted here."""
    overwrite: bool = False
    """Start over where OUT holds another run."""
    show: int = 3
    """Training examples to show for the first queries."""

    def __post_init__(self) -> None:
        """Check what a type cannot say."""
        at_least(self, show=1, top_k=1)


@reports_on_stderr()
def run(config: Score) -> int | None:
    """Score, and show the first queries' proponents."""
    from funcattrib.cli.load import load_from, queries_of, source_of
    from funcattrib.report.scores import scores_table
    from funcattrib.runs.score import score_gradients

    loaded = load_from(config.model)
    scores = score_gradients(
        loaded.model,
        config.data.dataset,
        path=config.out,
        queries=config.query_path,
        query_data=config.query_dataset,
        score=config.score,
        unit_norm=config.unit_norm,
        granularity=config.granularity,
        top_k=config.top_k,
        state=config.state,
        overwrite=config.overwrite,
        config=settings(replace(config, overwrite=False), command="score"),
        **queries_of(config.data, config.queries),
        **source_of(loaded, config.data),
        **asdict(config.gradients),
    )
    print(scores_table(scores, min(config.show, config.top_k or config.show)))
    return None
