"""Search results as rows of a csv file."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from funcattrib.data.columns import shown_name
from funcattrib.errors import FuncattribError

_FIRST = ["query", "rank", "score", "row", "reverse", "unit_norm"]


def append_csv(path: Path, query: str, hits: Sequence[Any], *, reverse: bool = False, unit_norm: bool = False) -> None:
    """Append one row a hit: query, rank, score, row, how it was searched, and the example's columns; a new file gets a
    header.

    Args:
        reverse: the hits are the lowest scores, not the highest.
        unit_norm: the scores are cosines, not inner products.

    Raises:
        FuncattribError: the file cannot be written, or begins with another header.
    """
    columns = [*_FIRST, *(shown_name(name, _FIRST) for name in (hits[0].example if hits else []))]
    try:
        fresh = not path.exists() or path.stat().st_size == 0
        if not fresh:
            with path.open(newline="", encoding="utf-8") as existing:
                if (found := next(csv.reader(existing), [])) != columns:
                    raise FuncattribError(
                        f"expected the columns {columns} in {path}, found {found}; record to another file"
                    )
        with path.open("a", newline="", encoding="utf-8") as sink:
            writer = csv.writer(sink)
            if fresh:
                writer.writerow(columns)
            for hit in hits:
                writer.writerow([query, hit.rank, hit.score, hit.row, reverse, unit_norm, *hit.example.values()])
    except OSError as error:
        raise FuncattribError(f"{path} cannot be written: {error.strerror}; record to another file") from error
