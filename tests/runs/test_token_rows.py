"""Rows (document, token): stores and scores whose parts add up to those of documents."""

import numpy as np
import pytest

import funcattrib as fa
from funcattrib.runs.collect import collect_gradients
from funcattrib.runs.score import score_gradients
from tests.runs.test_score import COMMON, QUERY, TRAIN
from tests.support import cases

LENGTHS = [len(row["input_ids"]) for row in TRAIN]


def added_up(rows):
    return np.add.reduceat(np.asarray(rows, dtype=np.float64), np.cumsum([0, *LENGTHS[:-1]]))


@pytest.mark.parametrize("settings", [{"projection_dim": 4}, {"projection_dim": 4, "normalizer": "adafactor"}], ids=str)
def test_a_documents_rows_add_up_to_its_gradient(settings, tmp_path) -> None:
    model, settings = cases.causal("llama"), {**COMMON, **settings}
    whole = collect_gradients(model, TRAIN, path=tmp_path / "whole", **settings)
    tokens = collect_gradients(
        model, TRAIN, path=tmp_path / "tokens", granularity="token", **{**settings, "rows_per_shard": 7}
    )
    assert len(tokens) == sum(LENGTHS)
    expected = np.asarray(whole.matrix()[:])
    np.testing.assert_allclose(added_up(tokens.matrix()[:]), expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())
    told = tokens.examples[LENGTHS[0] + 2]
    assert (told["id"], told["document"], told["position"]) == ("1-1:2", 1, 2)
    one_shard = collect_gradients(
        model, TRAIN, path=tmp_path / "one", granularity="token", **{**settings, "rows_per_shard": 100}
    )
    np.testing.assert_allclose(one_shard.matrix()[:], tokens.matrix()[:], rtol=1e-4, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("score", ["individual", "mean"])
@pytest.mark.parametrize("projection", [0, 4])
def test_a_documents_token_scores_add_up_to_its_score(projection, score, tmp_path) -> None:
    model, settings = cases.causal("llama"), {**COMMON, "projection_dim": projection, "score": score}
    whole = score_gradients(model, TRAIN, path=tmp_path / "whole", query_data=QUERY, **settings)
    tokens = score_gradients(
        model,
        TRAIN,
        path=tmp_path / "tokens",
        query_stores=tmp_path / "whole/gradients/query",
        granularity="token",
        **settings,
    )
    expected = np.asarray(whole)
    np.testing.assert_allclose(added_up(tokens), expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


def test_parts_that_would_not_add_up_are_refused(tmp_path) -> None:
    model = cases.causal("llama")
    with pytest.raises(fa.FuncattribError, match="`unit_norm` and `granularity='token'` cannot be combined"):
        score_gradients(model, TRAIN, path=tmp_path, query_data=QUERY, granularity="token", unit_norm=True)
    chain = fa.compose(fa.per_example_grad, fa.project(4), fa.unit_norm)
    with pytest.raises(fa.FuncattribError, match="requires linear stages, and unit_norm is not linear"):
        collect_gradients(model, TRAIN, path=tmp_path / "a", chain=chain, granularity="token", quiet=True)
