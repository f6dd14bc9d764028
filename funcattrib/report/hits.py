"""An ``Attributor``'s hits as a table."""

from collections.abc import Sequence

from funcattrib.query.attributor import Hit
from funcattrib.report import table


def hits_table(hits: Sequence[Hit], query: str, *, width: int | None = None) -> str:
    """Rank, score, example id and text, each text cut around what it shares with ``query``."""
    lines = [table.Hit(hit.rank, hit.score, str(hit.example.get("id", hit.row)), hit.text) for hit in hits]
    return table.render(lines, query=query, width=width)
