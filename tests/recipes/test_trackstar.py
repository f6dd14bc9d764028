"""TrackStar against a dense float64 computation from its formulas, and its command."""

import numpy as np
import pytest
import torch

import funcattrib as fa
from funcattrib.recipes.trackstar import blocks_and_head, trackstar
from funcattrib.scores import open_scores
from tests.support import cases

TRAIN, QUERY = (9, 5, 12, 2, 7, 11, 6, 8, 10, 4), (6, 9, 7)


def records(lengths, seed):
    ids = cases.batch(lengths, seed=seed)["input_ids"]
    return [{"input_ids": [int(x) for x in row[:n]]} for row, n in zip(ids, lengths, strict=True)]


def padded(rows):
    longest = max(len(row["input_ids"]) for row in rows)
    ids = torch.tensor([row["input_ids"] + [0] * (longest - len(row["input_ids"])) for row in rows])
    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    return {"input_ids": ids, "labels": torch.where(torch.arange(longest) < lengths[:, None], ids, -100)}


def dense(model, loss_kind, k, rank, damping):
    """Every formula on whole gradients in float64, one parameter after the other."""
    loss, params = fa.causal_lm_loss(model, kind=loss_kind, modules=blocks_and_head(model))
    spec = {n: fa.Leaf(tuple(p.shape), p.dtype) for n, p in params.items()}
    sides = fa.project(k).init(spec)[0]
    train, query = (fa.per_example_grad(loss, params, padded(records(*a))) for a in ((TRAIN, 1), (QUERY, 2)))
    rows = {"train": [], "query": []}
    grams = {"train": [], "query": []}
    for name in params:
        g = train[name].double()
        r, c = g.square().mean((0, 2)), g.square().mean((0, 1))
        scale = (r.mean() / torch.outer(r, c)).sqrt()
        for which, grads in (("train", train), ("query", query)):
            scaled = grads[name].double() * scale
            for side, axis in (("left", 1), ("right", 2)):
                if (matrix := sides[name][side]) is not None:
                    scaled = torch.tensordot(scaled, matrix.double(), ([axis], [1])).movedim(-1, axis)
            flat = scaled.flatten(1)
            rows[which].append(flat)
            grams[which].append(flat.T @ flat / len(flat))
    values = {
        which: torch.cat([torch.linalg.eigvalsh(h) for h in grams[which]]).sort(descending=True).values
        for which in grams
    }
    rank = min(rank, *(int((v > v[0] * 1e-12).sum()) for v in values.values()))
    a = values["train"][rank - 1] / (values["train"][rank - 1] + values["query"][rank - 1])
    out = {"train": [], "query": []}
    for i, (h_train, h_query) in enumerate(zip(grams["train"], grams["query"], strict=True)):
        h = a * h_query + (1 - a) * h_train
        w, v = torch.linalg.eigh(h)
        root = v @ torch.diag((w + damping * w.mean()).rsqrt()) @ v.T
        for which in out:
            out[which].append(rows[which][i] @ root)
    unit = {which: torch.nn.functional.normalize(torch.cat(parts, 1), dim=1) for which, parts in out.items()}
    return unit["train"] @ unit["query"].T, float(a)


@pytest.mark.parametrize("kind", ["log_odds", "ce"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_scores_are_those_of_the_formulas(name, kind, tmp_path) -> None:
    model = cases.causal(name)
    scores = trackstar(
        model,
        records(TRAIN, 1),
        records(QUERY, 2),
        path=tmp_path / "out",
        loss=kind,
        projection_dim=4,
        mixing_rank=5,
        dtype="float32",
        rows_per_shard=4,
        quiet=True,
    )
    expected, a = dense(model, kind, 4, 5, 0.1)
    assert scores.shape == (len(TRAIN), len(QUERY))
    assert scores.manifest.computed_with["method"]["mixing_weight"] == pytest.approx(a, rel=1e-3)
    np.testing.assert_allclose(np.asarray(scores), expected.numpy(), atol=2e-3)
    assert np.argsort(-np.asarray(scores), 0)[0].tolist() == expected.argmax(0).tolist()
    again = open_scores(tmp_path / "out")
    assert again.topk(2).rows[:, 0].tolist() == expected.argmax(0).tolist()
    again.to_parquet(tmp_path / "scores.parquet")
    assert (tmp_path / "scores.parquet").stat().st_size > 0
    with pytest.raises(fa.FuncattribError, match=r"scores\.csv is no name of a Parquet file"):
        again.to_parquet(tmp_path / "scores.csv")
    assert not (tmp_path / "scores.csv").exists()


def test_the_mean_of_the_queries_is_one_column(tmp_path) -> None:
    common = {"projection_dim": 4, "dtype": "float32", "quiet": True}
    model, data, queries = cases.causal("llama"), records(TRAIN, 1), records(QUERY, 2)
    each = trackstar(model, data, queries, path=tmp_path / "each", **common)
    mean = trackstar(model, data, queries, path=tmp_path / "mean", score="mean", **common)
    np.testing.assert_allclose(np.asarray(mean)[:, 0], np.asarray(each).mean(1), atol=1e-6)


def test_a_store_of_gradients_is_no_scores(tmp_path) -> None:
    fa.collect_gradients(cases.causal("llama"), records(QUERY, 2), path=tmp_path / "run", quiet=True)
    with pytest.raises(fa.StoreError, match="found another kind of store: gradients"):
        open_scores(tmp_path / "run")


def test_the_experts_of_a_mixture_are_preconditioned_each_by_itself(tmp_path) -> None:
    common = {"projection_dim": 4, "dtype": "float32", "quiet": True}
    scores = trackstar(cases.causal("mixtral"), records(TRAIN, 1), records(QUERY, 2), path=tmp_path / "out", **common)
    leaves = fa.open_store(tmp_path / "out/gradients/train").leaves
    assert sum("#e" in name for name in leaves) == 2 * 2 * 4
    assert {leaf.shape for leaf in leaves.values()} == {(4, 4)}
    assert np.abs(np.asarray(scores)).max() <= 1 + 1e-5


def test_a_model_by_name_or_as_a_loss_scores_alike(tmp_path) -> None:
    model = cases.causal("llama")
    model.save_pretrained(tmp_path / "model")
    data, queries = records((6,) * 10, 1), records((6,) * 3, 2)
    common = {"projection_dim": 4, "dtype": "float32", "quiet": True}
    expected = np.asarray(trackstar(model, data, queries, path=tmp_path / "module", **common))
    named = trackstar(str(tmp_path / "model"), data, queries, path=tmp_path / "named", **common)
    np.testing.assert_array_equal(np.asarray(named), expected)
    loss, params = fa.causal_lm_loss(model, kind="log_odds", modules=blocks_and_head(model))
    data, queries = ([{**row, "labels": row["input_ids"]} for row in rows] for rows in (data, queries))
    scores = trackstar((loss, params), data, queries, path=tmp_path / "loss", **common)
    np.testing.assert_allclose(np.asarray(scores), expected, atol=1e-5)


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_documents_that_are_not_finite_do_not_change_the_others(tmp_path, caplog, broken) -> None:
    def loss(params, example):
        return ((params["w"] @ example["x"]) ** 2).sum()

    params = {"w": torch.arange(6.0).reshape(2, 3) - 2}
    draw = torch.Generator().manual_seed(0)
    data = [{"x": torch.randn(3, generator=draw).tolist()} for _ in range(6)]
    data[2]["x"][1] = broken
    settings = {"projection_dim": 0, "dtype": "float32", "quiet": False}
    scores = trackstar((loss, params), data, data[:2], path=tmp_path / "all", **settings)
    without = trackstar((loss, params), data[:2] + data[3:], data[:2], path=tmp_path / "without", **settings)
    found = np.asarray(scores)
    np.testing.assert_allclose(np.delete(found, 2, 0), np.asarray(without), rtol=1e-5)
    assert np.isnan(found[2]).all()
    assert "the scores are NaN or infinite in 1 row: 2" in caplog.text
    assert 2 not in scores.topk(6).rows
    with pytest.raises(fa.FuncattribError, match="are NaN or infinite; check their loss"):
        trackstar((loss, params), data, data[1:3], path=tmp_path / "queries", **settings)
    with pytest.raises(fa.FuncattribError, match="finite"):
        trackstar((loss, params), data[2:3], data[:1], path=tmp_path / "none", **settings)
