"""Mean reciprocal rank, recall at k and BM25, against hand computation and against every order of the ties."""

import math
from itertools import pairwise, permutations

import pytest
import torch

from funcattrib.errors import FuncattribError
from funcattrib.evaluate import bm25, mean_reciprocal_rank, recall_at

YES, NO = True, False


def every_order(scores: list[float], relevant: list[bool], k: int) -> tuple[float, float]:
    """Reciprocal rank and recall at k of one query, averaged over all orders that the scores allow."""
    rank, recall, count = 0.0, 0.0, 0
    for order in permutations(range(len(scores))):
        if all(scores[a] >= scores[b] for a, b in pairwise(order)):
            found = [relevant[row] for row in order]
            rank += 1 / (1 + found.index(True))
            recall += sum(found[:k]) / sum(found)
            count += 1
    return rank / count, recall / count


def test_by_hand():
    scores = torch.tensor([[0.9, 0.8, 0.7, 0.6], [0.1, 0.4, 0.3, 0.2]])
    relevant = torch.tensor([[NO, YES, NO, YES], [YES, NO, NO, YES]])
    assert mean_reciprocal_rank(scores, relevant) == pytest.approx((1 / 2 + 1 / 3) / 2)
    assert recall_at(scores, relevant, 1) == 0
    assert recall_at(scores, relevant, 2) == pytest.approx((1 / 2 + 0) / 2)
    assert recall_at(scores, relevant, 3) == pytest.approx((1 / 2 + 1 / 2) / 2)
    assert recall_at(scores, relevant, 99) == 1


@pytest.mark.parametrize(
    ("scores", "relevant"),
    [
        ([1, 1, 1, 1], [NO, YES, NO, NO]),
        ([1, 1, 1, 1], [YES, YES, YES, YES]),
        ([2, 1, 1, 1, 0], [NO, YES, NO, YES, YES]),
        ([2, 2, 1, 1, 1], [NO, NO, YES, NO, YES]),
        ([-math.inf, -math.inf, 3, -math.inf], [YES, NO, NO, YES]),
        ([1, 1, 0, 0, -1, -1], [NO, YES, YES, NO, YES, NO]),
        ([math.inf, 0, math.inf], [YES, YES, NO]),
    ],
)
def test_ties_are_the_expectation_over_their_orders(scores, relevant):
    for k in range(1, len(scores) + 1):
        expected = every_order(scores, relevant, k)
        one = torch.tensor([scores], dtype=torch.float32), torch.tensor([relevant])
        assert (mean_reciprocal_rank(*one), recall_at(*one, k)) == pytest.approx(expected)


def test_neither_the_order_of_the_rows_nor_that_of_the_queries_matters():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 4, (20, 30), generator=generator).float()
    relevant = torch.rand(20, 30, generator=generator) < 0.2
    rows, queries = torch.randperm(30, generator=generator), torch.randperm(20, generator=generator)
    other = scores[queries][:, rows], relevant[queries][:, rows]
    assert mean_reciprocal_rank(*other) == pytest.approx(mean_reciprocal_rank(scores, relevant))
    assert recall_at(*other, 7) == pytest.approx(recall_at(scores, relevant, 7))


def test_a_constant_score_is_a_random_ranking():
    relevant = torch.zeros(1, 1000, dtype=torch.bool)
    relevant[0, 17] = True
    harmonic = sum(1 / rank for rank in range(1, 1001))
    assert mean_reciprocal_rank(torch.zeros(1, 1000), relevant) == pytest.approx(harmonic / 1000)
    assert recall_at(torch.zeros(1, 1000), relevant, 10) == pytest.approx(10 / 1000)


def test_queries_without_a_relevant_row_are_left_out():
    scores, relevant = torch.tensor([[2.0, 1.0], [2.0, 1.0]]), torch.tensor([[NO, YES], [NO, NO]])
    assert mean_reciprocal_rank(scores, relevant) == 0.5
    assert recall_at(scores, relevant, 1) == 0.0


@pytest.mark.parametrize(
    ("scores", "relevant", "says"),
    [
        (torch.zeros(1, 2), torch.ones(1, 3, dtype=torch.bool), r"found \(1, 2\) and \(1, 3\)"),
        (torch.tensor([[0.0, math.nan]]), torch.ones(1, 2, dtype=torch.bool), "NaN"),
        (torch.zeros(3, 2), torch.zeros(3, 2, dtype=torch.bool), "none of the 3 queries has a relevant row"),
    ],
)
def test_what_cannot_be_measured_is_refused(scores, relevant, says):
    with pytest.raises(FuncattribError, match=says):
        mean_reciprocal_rank(scores, relevant)
    with pytest.raises(FuncattribError, match=says):
        recall_at(scores, relevant, 1)


def test_recall_needs_a_k():
    with pytest.raises(FuncattribError, match="at least 1, found 0"):
        recall_at(torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool), 0)


def test_bm25_by_hand():
    """Three documents of 2, 4 and 3 terms, so 3 on average; k1 = 1.5, b = 0.75."""
    scores = bm25(["a c", "a a", "z"], ["A b", "a a c d", "e, f: g!"])
    idf_a, idf_c = math.log(1 + 1.5 / 2.5), math.log(1 + 2.5 / 1.5)
    first = idf_a * 2.5 / (1 + 1.5 * (0.25 + 0.75 * 2 / 3))
    second_a = idf_a * 2 * 2.5 / (2 + 1.5 * (0.25 + 0.75 * 4 / 3))
    second_c = idf_c * 2.5 / (1 + 1.5 * (0.25 + 0.75 * 4 / 3))
    expected = [[first, second_a + second_c, 0], [2 * first, 2 * second_a, 0], [0, 0, 0]]
    torch.testing.assert_close(scores, torch.tensor(expected, dtype=torch.float64))


def test_bm25_without_length_normalisation_or_saturation():
    scores = bm25(["a"], ["a", "a b c d"], b=0.0)
    assert scores[0, 0] == scores[0, 1] > 0
    scores = bm25(["a"], ["a", "a a a"], k1=0.0)
    assert scores[0, 0] == scores[0, 1] > 0


def test_bm25_of_nothing():
    assert bm25(["a"], ["", "..."]).tolist() == [[0.0, 0.0]]
    assert bm25([], ["a"]).shape == (0, 1)
    with pytest.raises(FuncattribError, match="no documents to rank"):
        bm25(["a"], [])
