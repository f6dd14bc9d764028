"""Okapi BM25, the lexical baseline that an attribution method should beat.

    score(q, d) = Σ_{t in q} idf(t) · f(t, d) (k₁ + 1) / (f(t, d) + k₁ (1 - b + b |d| / mean |d|))
    idf(t)      = ln(1 + (N - n(t) + ½) / (n(t) + ½))

f(t, d): how often term t stands in document d; |d|: its terms; n(t): documents with t, of N. A term that stands in the
query twice counts twice. Terms are runs of letters and digits, in lower case.

Reference: Robertson and Zaragoza, The Probabilistic Relevance Framework: BM25 and Beyond, 2009; the idf is Lucene's,
which is never negative.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from funcattrib.errors import FuncattribError


def bm25(queries: Sequence[str], documents: Sequence[str], *, k1: float = 1.5, b: float = 0.75) -> Float[Tensor, "K N"]:
    """Score every document for every query.

    Args:
        queries: K texts.
        documents: N texts.
        k1: how soon repetitions of a term stop to count.
        b: how much long documents are held back, 0 to 1.

    Returns:
        (K, N) float64, not negative, higher is better; 0 where no term is shared.

    Raises:
        FuncattribError: no documents.

    Example:
        >>> bm25(["who was born in Rome"], ["Ada was born in Oslo", "Bea lives in Rome", "rain"]).argmax(1)
        tensor([0])
    """
    if not documents:
        raise FuncattribError("there are no documents to rank; give at least one")
    counts = [Counter(_terms(document)) for document in documents]
    length = torch.tensor([counted.total() for counted in counts], dtype=torch.float64)
    relative = length / length.mean().clamp(min=1e-30)
    saturation = k1 * (1 - b + b * relative)

    postings: dict[str, tuple[list[int], list[int]]] = defaultdict(lambda: ([], []))
    for row, counted in enumerate(counts):
        for term, times in counted.items():
            postings[term][0].append(row)
            postings[term][1].append(times)

    scores = torch.zeros(len(queries), len(documents), dtype=torch.float64)
    for query, row_scores in zip(queries, scores, strict=True):
        for term, asked in Counter(_terms(query)).items():
            if term not in postings:
                continue
            rows, frequency = torch.tensor(postings[term][0]), torch.tensor(postings[term][1], dtype=torch.float64)
            idf = torch.log1p(torch.tensor((len(documents) - len(rows) + 0.5) / (len(rows) + 0.5), dtype=torch.float64))
            row_scores[rows] += asked * idf * frequency * (k1 + 1) / (frequency + saturation[rows])
    return scores


def _terms(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())
