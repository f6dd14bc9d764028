"""Scores as tables: the best training examples of the first queries."""

from collections.abc import Mapping
from typing import Any

from funcattrib.query.attributor import Hit
from funcattrib.report.table import hits_table
from funcattrib.scores import Scores

_SHOWN = 5


def scores_table(scores: Scores, top_k: int, *, width: int | None = None) -> str:
    """Format a line on the scores, and the ``top_k`` proponents of the first five queries."""
    rows, queries = scores.shape
    parts = [f"{scores.path}: scores of {rows:,} examples for {queries:,} {'query' if queries == 1 else 'queries'}"]
    found = scores.topk(top_k)
    for query, values, best in zip(scores.queries[:_SHOWN], found.values, found.rows, strict=False):
        hits = [
            Hit(i, float(v), int(r), scores.example(int(r)))
            for i, (v, r) in enumerate(zip(values, best, strict=True), 1)
            if r >= 0
        ]
        asked = _text(query)
        parts.append(f"\n{asked[:160]}\n{hits_table(hits, asked, width=width)}")
    return "\n".join(parts)


def _text(query: Mapping[str, Any]) -> str:
    return Hit(0, 0.0, 0, query).text or str(query.get("id", ""))
