"""Streamed scores against gradients that were stored and multiplied; reduce; what is refused; what is continued."""

import logging

import numpy as np
import pandas
import pyarrow.parquet as pq
import pytest
import torch

import funcattrib as fa
from funcattrib.cli.output import print_store
from funcattrib.data import Columns
from funcattrib.report.scores import scores_table
from funcattrib.runs import best_rows
from funcattrib.runs.collect import collect_gradients
from funcattrib.runs.reduce import reduce_gradients
from funcattrib.runs.score import score_gradients
from tests.support import cases, tiny

COMMON = {"dtype": "float32", "rows_per_shard": 4, "token_batch_size": 40, "quiet": True}


def records(lengths, seed):
    ids = cases.batch(lengths, seed=seed)["input_ids"]
    return [
        {"input_ids": [int(x) for x in row[:n]], "id": f"{seed}-{i}"}
        for i, (row, n) in enumerate(zip(ids, lengths, strict=True))
    ]


TRAIN, QUERY = records((9, 5, 12, 2, 7, 11, 6, 8, 10, 4), 1), records((6, 9, 7), 2)
CHAINS = {
    "projected": {"projection_dim": 4},
    "whole": {"projection_dim": 0},
    "adafactor": {"projection_dim": 4, "normalizer": "adafactor", "fit_documents": 0},
    "whitened": {"projection_dim": 3, "precondition": "parameter", "fit_documents": 0},
    "whitened together": {"projection_dim": 2, "precondition": "all", "fit_documents": 0},
    "sketched": {"sketch_dim": 32},
    "heads": {"projection_dim": 3, "split_heads": True},
}


def dense(tmp_path, settings, unit_norm):
    """Both sides stored, then multiplied."""
    model = cases.causal("llama")
    train = collect_gradients(model, TRAIN, path=tmp_path / "train", **COMMON, **settings)
    query = collect_gradients(model, QUERY, path=tmp_path / "query", state=tmp_path / "train", **COMMON, **settings)
    t, q = (torch.from_numpy(np.asarray(s.matrix()[:])).double() for s in (train, query))
    if unit_norm:
        t, q = (torch.nn.functional.normalize(x, dim=1) for x in (t, q))
    return (t @ q.T).numpy()


@pytest.mark.parametrize("unit_norm", [False, True], ids=["inner", "cosine"])
@pytest.mark.parametrize("name", CHAINS)
def test_streamed_scores_are_those_of_stored_gradients(name, unit_norm, tmp_path) -> None:
    settings = {**COMMON, **CHAINS[name]}
    expected = dense(tmp_path, CHAINS[name], unit_norm)
    scores = score_gradients(
        cases.causal("llama"),
        TRAIN,
        path=tmp_path / "out",
        query_stores=tmp_path / "query",
        unit_norm=unit_norm,
        **settings,
    )
    scale = np.abs(expected).mean()
    assert scores.shape == (10, 3)
    assert [entry["id"] for entry in scores.queries] == ["2-0", "2-1", "2-2"]
    np.testing.assert_allclose(np.asarray(scores), expected, rtol=1e-3, atol=1e-3 * scale)
    assert fa.open_scores(tmp_path / "out").topk(1).rows[:, 0].tolist() == expected.argmax(0).tolist()
    mean = score_gradients(
        cases.causal("llama"),
        TRAIN,
        path=tmp_path / "mean",
        query_stores=[tmp_path / "query"],
        score="mean",
        unit_norm=unit_norm,
        **settings,
    )
    np.testing.assert_allclose(np.asarray(mean)[:, 0], expected.mean(1), rtol=1e-3, atol=1e-3 * scale)
    nearest = score_gradients(
        cases.causal("llama"),
        TRAIN,
        path=tmp_path / "nearest",
        query_stores=tmp_path / "query",
        score="nearest",
        unit_norm=unit_norm,
        **settings,
    )
    np.testing.assert_allclose(np.asarray(nearest)[:, 0], expected.max(1), rtol=1e-3, atol=1e-3 * scale)


@pytest.mark.parametrize("name", ["projected", "whole", "adafactor"])
def test_queries_computed_in_the_same_process(name, tmp_path) -> None:
    expected = dense(tmp_path, CHAINS[name], False)
    scores = score_gradients(
        cases.causal("llama"), TRAIN, path=tmp_path / "out", query_data=QUERY, **COMMON, **CHAINS[name]
    )
    np.testing.assert_allclose(np.asarray(scores), expected, rtol=1e-3, atol=1e-3 * np.abs(expected).mean())


@pytest.mark.parametrize("unit_norm", [False, True])
@pytest.mark.parametrize("name", ["projected", "whole", "heads"])
def test_parts_by_module_add_up(name, unit_norm, tmp_path) -> None:
    expected = dense(tmp_path, CHAINS[name], unit_norm)
    scores = score_gradients(
        cases.causal("llama"),
        TRAIN,
        path=tmp_path / "out",
        query_stores=tmp_path / "query",
        unit_norm=unit_norm,
        granularity="module",
        **COMMON,
        **CHAINS[name],
    )
    assert scores.shape == (10, 3)
    tolerance = {"rtol": 1e-3, "atol": 1e-3 * np.abs(expected).mean()}
    np.testing.assert_allclose(np.asarray(scores), expected, **tolerance)
    np.testing.assert_allclose(scores[2:5, 1], expected[2:5, 1], **tolerance)
    np.testing.assert_allclose(sum(np.asarray(scores.part(m)[:]) for m in scores.modules), expected, **tolerance)
    assert scores.topk(2).rows[:, 0].tolist() == expected.argmax(0).tolist()
    with pytest.raises(fa.FuncattribError, match="the scores have no module 'nothing'"):
        scores.part("nothing")


@pytest.mark.parametrize("name", ["projected", "whole"])
def test_self_influence(name, tmp_path) -> None:
    train = collect_gradients(cases.causal("llama"), TRAIN, path=tmp_path / "train", **COMMON, **CHAINS[name])
    scores = score_gradients(
        cases.causal("llama"), TRAIN, path=tmp_path / "out", score="self", **COMMON, **CHAINS[name]
    )
    expected = np.square(np.asarray(train.matrix()[:])).sum(1)
    np.testing.assert_allclose(np.asarray(scores)[:, 0], expected, rtol=1e-4)


@pytest.mark.parametrize("method", ["mean", "sum"])
@pytest.mark.parametrize("unit", [False, True])
def test_reduced_gradients(method, unit, tmp_path) -> None:
    settings = {**COMMON, "projection_dim": 4}
    model = cases.causal("gpt2")
    rows = np.asarray(collect_gradients(model, TRAIN, path=tmp_path / "train", **settings).matrix()[:])
    reduced = reduce_gradients(model, TRAIN, path=tmp_path / "one", method=method, unit_norm=unit, **settings)
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True) if unit else rows
    expected = rows.sum(0) / (len(rows) if method == "mean" else 1)
    np.testing.assert_allclose(reduced.matrix()[:][0], expected, rtol=1e-4, atol=1e-5)
    scores = score_gradients(model, TRAIN, path=tmp_path / "out", query_stores=tmp_path / "one", **settings)
    stored = np.asarray(fa.open_store(tmp_path / "train").matrix()[:])
    np.testing.assert_allclose(np.asarray(scores)[:, 0], stored @ expected, rtol=1e-3, atol=1e-4)


def test_the_best_alone_are_kept(tmp_path) -> None:
    expected = dense(tmp_path, CHAINS["projected"], False)
    settings = {**COMMON, **CHAINS["projected"]}
    best = score_gradients(
        cases.causal("llama"), TRAIN, path=tmp_path / "out", query_stores=tmp_path / "query", top_k=3, **settings
    )
    order = np.argsort(-expected, 0)[:3].T
    assert best.shape == (10, 3)
    assert best.topk(3).rows.tolist() == order.tolist()
    np.testing.assert_allclose(best.topk(2).values.numpy(), np.take_along_axis(expected.T, order[:, :2], 1), rtol=1e-3)
    table = pq.read_table(tmp_path / "out" / "best.parquet").to_pydict()
    assert [table["example_row"][0] if "example_row" in table else table["id"][0]] == [f"1-{order[0, 0]}"]
    assert best.example(int(order[1, 0]))["id"] == f"1-{order[1, 0]}"
    assert not list((tmp_path / "out" / "shards").iterdir())
    with pytest.raises(fa.FuncattribError, match="has the best 3 scores of each query only"):
        best[0]
    with pytest.raises(fa.FuncattribError, match="only the best 3 rows of each query were kept, and 4 were asked for"):
        best.topk(4)


@pytest.mark.parametrize("top_k", [None, 2])
def test_tables_show_text_of_any_column(top_k, tmp_path) -> None:
    texts = tiny.texts(3)
    data = [{"query": text} for text in texts]
    settings = {**COMMON, "columns": Columns("query"), "tokenizer": tiny.make_tokenizer(), "top_k": top_k}
    scores = score_gradients(
        cases.causal("gpt_neox"), data, path=tmp_path / "out", query_data=data[:1], projection_dim=4, **settings
    )
    assert scores.manifest.text_columns == ("query",)
    best = int(scores.topk(1).rows[0, 0])
    assert scores.example(best)["query"] == texts[best]
    asked, *_, last = scores_table(scores, 1, width=200).split("\n")[2:]
    assert asked == texts[0]
    assert last.endswith(texts[best])


@pytest.mark.parametrize("top_k", [None, 4])
def test_an_interrupted_pass_is_continued(top_k, tmp_path, monkeypatch) -> None:
    settings = {**COMMON, **CHAINS["projected"], "query_stores": tmp_path / "query", "top_k": top_k}
    dense(tmp_path, CHAINS["projected"], False)
    model, computed = cases.causal("llama"), []
    whole = score_gradients(model, TRAIN, path=tmp_path / "whole", **settings)
    module = best_rows if top_k else __import__("funcattrib.runs.workload", fromlist=["rows_of"])
    rows_of = module.rows_of

    def twice(work, compute, rows, count):
        computed.append(rows[0])
        if computed.count(8) == 1 and rows[0] == 8:
            raise KeyboardInterrupt
        return rows_of(work, compute, rows, count)

    monkeypatch.setattr(module, "rows_of", twice)
    with pytest.raises(KeyboardInterrupt):
        score_gradients(model, TRAIN, path=tmp_path / "out", **settings)
    again = score_gradients(model, TRAIN, path=tmp_path / "out", **settings)
    assert computed == [0, 4, 8, 8]
    assert torch.equal(again.topk(3).values, whole.topk(3).values)
    assert torch.equal(again.topk(3).rows, whole.topk(3).rows)


@pytest.mark.parametrize(
    ("other", "found"),
    [
        ({"projection_dim": 5}, r"differ in their chain: .*project\(.*k=4"),
        ({"seed": 1}, "differ in their chain"),
        ({"normalizer": "adafactor"}, "differ in their chain"),
        ({"modules": ["*.mlp.*"]}, "differ in their leaves"),
    ],
)
def test_queries_of_another_kind_are_refused(other, found, tmp_path) -> None:
    collect_gradients(cases.causal("llama"), QUERY, path=tmp_path / "query", projection_dim=4, **COMMON)
    settings = {**COMMON, "projection_dim": 4, **other}
    with pytest.raises(fa.FuncattribError, match=found):
        score_gradients(
            cases.causal("llama"), TRAIN, path=tmp_path / "out", query_stores=tmp_path / "query", **settings
        )
    assert not (tmp_path / "out").exists()


def test_queries_of_another_model_or_state_are_refused(tmp_path) -> None:
    settings = {**COMMON, **CHAINS["adafactor"]}
    collect_gradients(cases.causal("gpt2"), QUERY, path=tmp_path / "gpt2", **settings)
    with pytest.raises(fa.FuncattribError, match="training gradients differ in their model"):
        score_gradients(cases.causal("llama"), TRAIN, path=tmp_path / "a", query_stores=tmp_path / "gpt2", **settings)
    for name, data in (("one", QUERY), ("two", TRAIN)):
        collect_gradients(cases.causal("llama"), data, path=tmp_path / name, **settings)
    with pytest.raises(fa.FuncattribError, match="training gradients differ in their fitted state"):
        score_gradients(
            cases.causal("llama"),
            TRAIN,
            path=tmp_path / "b",
            query_stores=[tmp_path / "one", tmp_path / "two"],
            **settings,
        )
    with pytest.raises(fa.FuncattribError, match="training gradients differ in their fitted state"):
        score_gradients(
            cases.causal("llama"),
            TRAIN,
            path=tmp_path / "c",
            query_stores=tmp_path / "one",
            state=tmp_path / "two",
            **settings,
        )


def test_zero_queries_warn_and_score_zero_and_nan_rows_are_left_out(tmp_path, caplog) -> None:
    def loss(params, example):
        return (params["w"] * example["x"]).sum() ** 2 / 2

    params, common = {"w": torch.ones(2)}, {"projection_dim": 0, "dtype": "float32", "quiet": True}
    collect_gradients((loss, params), [{"x": [0.0, 0.0]}, {"x": [1.0, 0.0]}], path=tmp_path / "query", **common)
    train = [{"x": [1.0, 1.0]}, {"x": [float("nan"), 0.0]}, {"x": [2.0, -1.0]}]
    for top_k in (None, 3):
        out = tmp_path / f"out-{top_k}"
        with caplog.at_level(logging.WARNING):
            scores = score_gradients(
                (loss, params), train, path=out, query_stores=tmp_path / "query", top_k=top_k, **common
            )
        assert "the gradients of queries" in caplog.text
        assert scores.topk(3).rows.tolist() == [[0, 2], [0, 2]]
        assert scores.topk(3).values.tolist() == [[0.0, 0.0], [2.0, 2.0]]
    collect_gradients((loss, params), [{"x": [float("inf"), 0.0]}], path=tmp_path / "bad", **common)
    with pytest.raises(fa.FuncattribError, match="are NaN or infinite; check their loss"):
        score_gradients((loss, params), train, path=tmp_path / "no", query_stores=tmp_path / "bad", **common)


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ({}, "queries are required"),
        ({"query_stores": "a", "query_data": QUERY}, "`query_stores` and `query_data` cannot be combined"),
        ({"score": "self", "query_data": QUERY}, "takes no queries"),
        ({"score": "self", "unit_norm": True}, "every score would be 1"),
        ({"query_data": QUERY, "top_k": 0}, "`top_k` of at least 1"),
        ({"query_data": QUERY, "score": "nearest", "granularity": "module"}, "do not add up"),
    ],
)
def test_what_cannot_be_asked_for(asked, found, tmp_path) -> None:
    with pytest.raises(fa.FuncattribError, match=found):
        score_gradients(cases.causal("llama"), TRAIN, path=tmp_path / "out", quiet=True, **asked)


def test_what_is_no_query_is_said_to_be_none(tmp_path, caplog) -> None:
    model, settings = cases.causal("llama"), {**COMMON, "projection_dim": 4}
    score_gradients(model, TRAIN, path=tmp_path / "scores", query_data=QUERY, **settings)
    with pytest.raises(fa.FuncattribError, match=r"expected gradients at .*, found another kind of store: scores"):
        score_gradients(model, TRAIN, path=tmp_path / "again", query_stores=tmp_path / "scores", **settings)
    queries = tmp_path / "scores" / "gradients" / "query"
    with caplog.at_level(logging.WARNING):
        cosines = score_gradients(
            model, TRAIN, path=tmp_path / "other", query_stores=queries, loss="log_odds", unit_norm=True, **settings
        )
    assert "were computed with loss kind ce, the documents with log_odds" in caplog.text
    assert cosines.manifest.score_convention.startswith("cosine")


def test_unfinished_scores_are_not_opened(tmp_path, monkeypatch) -> None:
    model, settings = cases.causal("llama"), {**COMMON, "projection_dim": 4}
    work = __import__("funcattrib.runs.workload", fromlist=["rows_of"])
    rows_of = work.rows_of

    def stop(work, compute, rows, count):
        if len(rows) == 4 and rows[0] == 4:
            raise KeyboardInterrupt
        return rows_of(work, compute, rows, count)

    monkeypatch.setattr(work, "rows_of", stop)
    with pytest.raises(KeyboardInterrupt):
        score_gradients(model, TRAIN, path=tmp_path / "out", query_data=QUERY, **settings)
    with (
        pytest.raises(fa.StoreError, match="are unfinished; run the same command again"),
        pytest.warns(UserWarning, match="unfinished|rows"),
    ):
        fa.open_scores(tmp_path / "out")


def test_kept_rows_that_are_damaged_are_refused(tmp_path) -> None:
    def loss(params, example):
        return (params["w"] * example["x"]).sum() ** 2

    data = [{"x": [float(n), 1.0]} for n in range(6)]
    settings = {"query_data": data[:2], "top_k": 4, "projection_dim": 0, "quiet": True}
    scores = score_gradients((loss, {"w": torch.ones(2)}), data, path=tmp_path / "out", **settings)
    file, found = tmp_path / "out/best.parquet", scores.topk(4)
    good = file.read_bytes()
    for at in range(0, len(good), 37):
        file.write_bytes(good[:at] + bytes([good[at] ^ 0x21]) + good[at + 1 :])
        try:
            again = scores.topk(4)
        except fa.FuncattribError as error:
            assert "best.parquet is damaged" in str(error)  # noqa: PT017
        else:
            assert torch.equal(again.rows, found.rows)
            assert torch.equal(again.values, found.values)


def test_scores_as_tables_and_in_words(tmp_path) -> None:
    texts = tiny.texts(4)
    data = [{"text": text} for text in texts]
    settings = {**COMMON, "tokenizer": tiny.make_tokenizer(), "projection_dim": 2, "query_data": data[:2]}
    scores = score_gradients(cases.causal("gpt_neox"), data, path=tmp_path / "out", **settings)
    assert repr(scores) == f"Scores('{tmp_path}/out', score: 4 examples × 2 queries)"
    frame = scores.to_pandas()
    assert frame["score_1"].to_list() == scores[:, 1].tolist()
    assert frame["text"].to_list() == texts
    scores.to_csv(tmp_path / "scores.csv")
    read = pandas.read_csv(tmp_path / "scores.csv", dtype={"id": str})
    assert read["text"].to_list() == texts
    np.testing.assert_allclose(read["score_0"], scores[:, 0], rtol=1e-6)
    with pytest.raises(fa.FuncattribError, match="cannot be written"):
        scores.to_csv(tmp_path / "no" / "scores.csv")
    best = score_gradients(cases.causal("gpt_neox"), data, path=tmp_path / "best", top_k=1, **settings)
    assert best.to_pandas()["row"].to_list() == scores.topk(1).rows[:, 0].tolist()
    assert "the best 1 of each" in repr(best)


def test_a_token_is_shown_in_its_sentence(tmp_path, capsys) -> None:
    texts = ["w1 w2 w3 w4 w5", "w6 w7 w8"]
    data = [{"text": text, "source": f"s{row}"} for row, text in enumerate(texts)]
    settings = {**COMMON, "tokenizer": tiny.make_tokenizer(), "projection_dim": 2, "granularity": "token"}
    settings["columns"] = Columns(keep_columns=("source",))
    scores = score_gradients(
        cases.causal("gpt_neox"), data, path=tmp_path, query_data=data[:1], query_columns=Columns(), **settings
    )
    assert scores.text(1) == "w1 [w2] w3 w4 w5"
    assert scores.text(5) == "[w6] w7 w8"
    assert scores.examples["source"][:] == ["s0"] * 5 + ["s1"] * 3
    first = scores_table(scores, 1, width=120).split("\n")[0]
    assert first == f"{tmp_path}: scores of 8 tokens for 1 query"
    assert "8 tokens × 1 queries" in repr(scores)
    print_store(fa.open_store(tmp_path))
    assert "scores of 8 tokens for 1 queries" in capsys.readouterr().out
    best = int(scores.topk(1).rows[0, 0])
    assert scores.text(best) in scores_table(scores, 1, width=120)
