"""``funcattrib trak``: scores of a data set against queries, by TRAK."""

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

import tyro

from funcattrib.cli.config_file import settings
from funcattrib.cli.output import reports_on_stderr
from funcattrib.cli.settings import DataConfig, LoadConfig, QueryColumns
from funcattrib.runs.config import RowConfig


@dataclass(frozen=True)
class Trak:
    """Score every training example against a data set of queries, by TRAK over checkpoints.

    The same command continues a run that was interrupted.
    """

    out: tyro.conf.Positional[Path]
    """The folder to write: the scores, and the sketches in a sub-folder."""
    checkpoint: tyro.conf.UseAppendAction[tuple[str, ...]]
    """A model of the ensemble: a hub id or a folder. Repeated for each."""
    data: DataConfig
    query_dataset: str
    """The queries: whatever --dataset takes."""
    queries: QueryColumns = field(default_factory=QueryColumns)
    loading: LoadConfig = field(default_factory=LoadConfig)
    sketch_dim: int = 4096
    """Length of each checkpoint's sketch of the whole gradient; well below the number of training examples."""
    damping: float = 0.0
    """Added to the eigenvalues of the sketches' Gram matrix, in units of their mean."""
    score: Literal["individual", "mean"] = "individual"
    """A column for every query, or one for their mean."""
    gradients: RowConfig = field(default_factory=lambda: RowConfig(projection_dim=0, loss="log_odds", dtype="float32"))
    overwrite: bool = False
    """Start over where OUT holds another run."""
    top_k: int = 3
    """Training examples to show for the first queries."""


@reports_on_stderr()
def run(config: Trak) -> int | None:
    """Score, and show the first queries' proponents."""
    from funcattrib.cli.load import documents_of, load_options, queries_of
    from funcattrib.recipes.trak import trak
    from funcattrib.report.scores import scores_table

    options = load_options(config.loading)
    scores = trak(
        config.checkpoint,
        config.data.dataset,
        config.query_dataset,
        path=config.out,
        sketch_dim=config.sketch_dim,
        damping=config.damping,
        score=config.score,
        tokenizer=options.pop("tokenizer"),
        load_options=options,
        overwrite=config.overwrite,
        config=settings(replace(config, overwrite=False), command="trak"),
        **queries_of(config.data, config.queries),
        **documents_of(config.data),
        **asdict(config.gradients),
    )
    print(scores_table(scores, config.top_k))
    return None
