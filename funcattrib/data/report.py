"""The findings of tokenising, for people."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class TokenizeReport(NamedTuple):
    """The findings of tokenising: counts of documents and tokens.

    `labelled_tokens` are those whose loss counts: labelled, and not a document's first, which nothing predicts.
    `empty` documents have fewer than 2 tokens; `unlabelled` ones have more, but none that counts. Both give zero rows.
    """

    documents: int = 0
    tokens: int = 0
    labelled_tokens: int = 0
    empty: int = 0
    unlabelled: int = 0
    truncated: int = 0

    def lines(self) -> list[str]:
        """Return the report for people: a line of totals, and one for each thing to know.

        Example:
            >>> TokenizeReport(documents=2, tokens=1200, labelled_tokens=1199, empty=1).lines()
            ['2 documents, 1,200 tokens, 1,199 of them counted in the loss',
             '1 document has fewer than 2 tokens: kept, with a zero gradient']
        """
        lines = [
            f"{count_of(self.documents, 'document')}, {count_of(self.tokens, 'token')}, "
            f"{self.labelled_tokens:,} of them counted in the loss"
        ]
        for number, has, what in (
            (self.empty, ("has", "have"), "fewer than 2 tokens: kept, with a zero gradient"),
            (self.unlabelled, ("has", "have"), "no token that counts in the loss: kept, with a zero gradient"),
            (self.truncated, ("was", "were"), "cut to the longest length allowed"),
        ):
            if number:
                lines.append(f"{count_of(number, 'document')} {has[number > 1]} {what}")
        return lines


def count_of(number: int, noun: str) -> str:
    """Format a number with its noun, in the plural where it takes one."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def some_rows(rows: Sequence[int] | np.ndarray) -> str:
    """Format the number of rows, and the first of them.

    Example:
        >>> some_rows([3, 5, 8, 9, 10, 11])
        '6 rows: 3, 5, 8, 9, 10, …'
    """
    return f"{count_of(len(rows), 'row')}: {', '.join(map(str, rows[:5]))}{', …' if len(rows) > 5 else ''}"
