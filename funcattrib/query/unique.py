"""The best rows of a search without repeated texts: of rows with the same text the best is kept.

A search is asked for more rows than are wanted, until enough of them have texts of their own.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from funcattrib.data.normal_text import normal_text
from funcattrib.query.topk import TopK

_GROWTH = 4


class UniqueTopK(NamedTuple):
    """The best rows of each query with different texts, best first.

    Attributes:
        values: (K, k) float32; NaN where there are no more texts.
        rows: (K, k) int64; -1 where there are no more texts.
        copies: (K, k) int64: the rows after each that were left out because they have its text.
    """

    values: Float[Tensor, "K k"]
    rows: Int[Tensor, "K k"]
    copies: Int[Tensor, "K k"]


def unique_topk(search: Callable[[int], TopK], text_of: Callable[[int], str], k: int, most: int) -> UniqueTopK:
    """Return the k best rows of each query whose texts differ (``normal_text``); a row without text counts as one.

    Args:
        search: returns the n best rows of each query, for any n up to ``most``.
        text_of: a row's text.
        k: results a query.
        most: rows that there are.

    Example:
        >>> values, texts = torch.tensor([[3.0, 2.0, 1.0]]), ["A b", "a  B", "c"]
        >>> found = unique_topk(lambda n: TopK(values[:, :n], torch.arange(n)[None]), texts.__getitem__, 2, 3)
        >>> found.rows, found.copies
        (tensor([[0, 2]]), tensor([[1, 0]]))
    """
    texts: dict[int, str] = {}

    def text(row: int) -> str:
        if row not in texts:
            texts[row] = normal_text(text_of(row)) or f"\0{row}"
        return texts[row]

    wanted = min(k, most)
    while True:
        found = search(wanted)
        chosen = [_first_of_each(rows, text, k) for rows in found.rows.tolist()]
        if wanted >= most or all(len(places) >= k for places, _ in chosen):
            break
        wanted = min(most, _GROWTH * wanted)
    width = max((len(places) for places, _ in chosen), default=0)
    shape = (len(chosen), width)
    values, rows = torch.full(shape, torch.nan), torch.full(shape, -1, dtype=torch.int64)
    copies = torch.zeros(shape, dtype=torch.int64)
    for query, (places, counts) in enumerate(chosen):
        values[query, : len(places)] = found.values[query, places]
        rows[query, : len(places)] = found.rows[query, places]
        copies[query, : len(places)] = torch.tensor(counts, dtype=torch.int64)
    return UniqueTopK(values, rows, copies)


def _first_of_each(rows: list[int], text: Callable[[int], str], k: int) -> tuple[list[int], list[int]]:
    """Return the places of the first k texts, and how many rows up to the last of these repeat each."""
    at: dict[str, int] = {}
    counts: list[int] = []
    places: list[int] = []
    for place, row in enumerate(rows):
        if row < 0:
            continue
        if (known := at.get(text(row))) is not None:
            counts[known] += 1
        elif len(places) == k:
            break
        else:
            at[text(row)] = len(places)
            places.append(place)
            counts.append(0)
    return places, counts
