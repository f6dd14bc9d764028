"""Scores as tables: the best training examples of the first queries."""

from torch import Tensor

from funcattrib.query.hits import Hit
from funcattrib.report.table import hits_table
from funcattrib.scores import Scores
from funcattrib.store.metadata import example_text

_SHOWN = 5


def scores_table(scores: Scores, top_k: int, *, unique: bool = False, width: int | None = None) -> str:
    """Format a line on the scores, and the ``top_k`` proponents of the first five queries; ``unique`` shows each text
    once.
    """
    rows, queries = scores.shape
    of = f"{queries:,} {'query' if queries == 1 else 'queries'}"
    parts = [f"{scores.path}: scores of {rows:,} {scores.unit}s for {of}"]
    copies: list[Tensor] | list[None]
    if unique:
        found = scores.unique_topk(top_k)
        best, copies = (found.values, found.rows), list(found.copies)
    else:
        best = scores.topk(top_k)
        copies = [None] * queries
    for number, (query, values, chosen) in enumerate(zip(scores.queries[:_SHOWN], *best, strict=False)):
        hits = [
            Hit(rank, value, row, scores.example(row), scores.text(row))
            for rank, (value, row) in enumerate(zip(values.tolist(), chosen.tolist(), strict=True), 1)
            if row >= 0
        ]
        if (counts := copies[number]) is not None:
            hits = [hit._replace(copies=int(count)) for hit, count in zip(hits, counts, strict=False)]
        asked = example_text(query, scores.query_text_columns) or str(query.get("id", ""))
        shown = hits_table(hits, asked, width=width, kept=scores.manifest.data.get("keep_columns", ()))
        parts.append(f"\n{asked[:160]}\n{shown}")
    return "\n".join(parts)
