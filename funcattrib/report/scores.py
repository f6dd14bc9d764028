"""Scores as tables: the best training examples of the first queries."""

from funcattrib.query.attributor import Hit
from funcattrib.report.table import hits_table
from funcattrib.scores import Scores
from funcattrib.store.metadata import example_text

_SHOWN = 5


def scores_table(scores: Scores, top_k: int, *, width: int | None = None) -> str:
    """Format a line on the scores, and the ``top_k`` proponents of the first five queries."""
    rows, queries = scores.shape
    parts = [f"{scores.path}: scores of {rows:,} examples for {queries:,} {'query' if queries == 1 else 'queries'}"]
    found = scores.topk(top_k)
    for query, values, best in zip(scores.queries[:_SHOWN], found.values, found.rows, strict=False):
        hits = []
        for rank, (value, row) in enumerate(zip(values.tolist(), best.tolist(), strict=True), 1):
            if row >= 0:
                example = scores.example(row)
                hits.append(Hit(rank, value, row, example, example_text(example, scores.manifest.text_columns)))
        asked = example_text(query, scores.query_text_columns) or str(query.get("id", ""))
        parts.append(f"\n{asked[:160]}\n{hits_table(hits, asked, width=width)}")
    return "\n".join(parts)
