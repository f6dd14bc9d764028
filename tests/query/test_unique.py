"""Identical texts fill the top k once; further columns are kept and shown; how a query was asked is recorded."""

import csv
import logging
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

import funcattrib as fa
from funcattrib.data import Columns
from funcattrib.query.topk import TopK
from funcattrib.query.unique import unique_topk
from funcattrib.report.scores import scores_table
from funcattrib.scores.top_k import best_of, keep_best, nothing
from tests.support import tiny

FIVE = tiny.texts(5, seed=3)
TEXTS = [FIVE[0], FIVE[1], f"  {FIVE[0]} ", FIVE[2], FIVE[0].replace(" ", "\n"), FIVE[3], FIVE[1], FIVE[4]]
DATA = [{"text": text, "url": f"https://x.org/{row}", "label": row % 2} for row, text in enumerate(TEXTS)]
SETTINGS = {"columns": Columns(keep_columns=("url", "label")), "projection_dim": 4, "dtype": "float32", "quiet": True}
DISTINCT = 5


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Path:
    path = tmp_path_factory.mktemp("unique") / "run"
    fa.collect_gradients(str(model_folder), DATA, path=path, **SETTINGS)
    return path


def group(row: int) -> str:
    return " ".join(TEXTS[row].split())


def test_a_query_finds_each_text_once(run: Path) -> None:
    attributor = fa.Attributor(run)
    rows = attributor.gradients([TEXTS[0], TEXTS[5]])
    for reverse in (False, True):
        plain = attributor.search(rows, len(TEXTS), reverse=reverse).rows.tolist()
        for k in (1, 3, DISTINCT, 8):
            hits = attributor.best(rows, k, reverse=reverse, unique=True)
            for found, order in zip(hits, plain, strict=True):
                first = [row for at, row in enumerate(order) if group(row) not in map(group, order[:at])]
                assert [hit.row for hit in found] == first[:k]
                assert [hit.rank for hit in found] == list(range(1, len(found) + 1))
                if k >= DISTINCT:
                    assert sum(hit.copies for hit in found) == len(TEXTS) - DISTINCT
    assert [len(each) for each in attributor.ask(TEXTS[:2], 8, unique=True)] == [DISTINCT] * 2


def test_rows_without_text_are_all_different() -> None:
    values = torch.tensor([[3.0, 2.0, 1.0]])
    found = unique_topk(lambda n: TopK(values[:, :n], torch.arange(n)[None]), lambda row: "", 3, 3)
    assert found.rows.tolist() == [[0, 1, 2]]


def test_the_best_of_groups_among_scores_that_stream_by() -> None:
    draw = torch.Generator().manual_seed(0)
    scores, groups = torch.randn(60, 3, generator=draw), torch.randint(0, 9, (60,), generator=draw)
    scores[7] = torch.nan
    best = nothing(3)
    for start in range(0, 60, 13):
        best = keep_best(best, scores[start : start + 13], start, 5, groups)
    halves = [keep_best(nothing(3), scores[at : at + 30], at, 5, groups) for at in (0, 30)]
    for query in range(3):
        by_group = {int(g): [r for r in range(60) if groups[r] == g and r != 7] for g in groups.unique()}
        firsts = [max(rows, key=lambda row: float(scores[row, query])) for rows in by_group.values()]
        expected = sorted(firsts, key=lambda row: -float(scores[row, query]))[:5]
        assert best.rows[query].tolist() == expected
        assert best_of(halves, 5, groups).rows[query].tolist() == expected


def test_scores_and_what_is_kept_of_them(tmp_path: Path, model_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = {**SETTINGS, "query_data": [{"text": TEXTS[1]}], "query_columns": Columns()}
    every = fa.score_gradients(str(model_folder), DATA, path=tmp_path / "every", **settings)
    expected = every.topk(3, unique=True)
    with caplog.at_level(logging.INFO, "funcattrib"):
        kept = fa.score_gradients(
            str(model_folder), DATA, path=tmp_path / "kept", top_k=3, unique=True, **{**settings, "quiet": False}
        )
    assert kept.topk(3).rows.tolist() == expected.rows.tolist()
    groups = [group(row) for row in expected.rows[0].tolist()]
    assert len({*groups}) == 3
    repeated = sum(group(row) in groups for row in range(len(TEXTS))) - 3
    assert f"{repeated} rows are left out because they have the text of one that is kept" in caplog.text
    table = pq.read_table(tmp_path / "kept/best.parquet").to_pydict()
    assert table["url"] == [DATA[row]["url"] for row in table["row"]]
    shown = scores_table(every, 5, unique=True, width=120)
    assert shown.endswith("left out: 3 examples with a text that is shown")
    assert f"[url={DATA[int(expected.rows[0, 0])]['url']}, label=" in shown
    assert len(scores_table(every, 5, width=120).split("left out")) == 1
    with pytest.raises(fa.FuncattribError, match="`unique` requires `top_k`"):
        fa.score_gradients(str(model_folder), DATA, path=tmp_path / "no", unique=True, **settings)


def test_columns_are_kept_beside_rows(run: Path, tmp_path: Path, model_folder: Path) -> None:
    store = fa.open_store(run)
    assert store.examples["url"][:] == [row["url"] for row in DATA]
    assert store.examples["label"][:] == [row["label"] for row in DATA]
    assert store.manifest.data["keep_columns"] == ["url", "label"]
    with pytest.raises(fa.FuncattribError, match="has no column 'place' to keep; its columns are text, url, label"):
        fa.collect_gradients(
            str(model_folder), DATA, path=tmp_path, **{**SETTINGS, "columns": Columns(keep_columns=("place",))}
        )


def test_the_command_shows_and_records(funcattrib, run: Path, tmp_path: Path) -> None:
    record = tmp_path / "found.csv"
    words = ("query", "--index", run, "--text", TEXTS[0], "--top-k", 5, "--record", record)
    ran = funcattrib(*words, "--unique", "--unit-norm")
    assert ran.code == 0, ran.err
    assert "left out: 3 examples with a text that is shown" in ran.out
    assert "[url=https://x.org/0, label=0]" in ran.out
    assert ran.err.count("`funcattrib trackstar`, or a store built with `--loss log_odds`") == 1
    assert funcattrib(*words, "--reverse").code == 0
    rows = list(csv.DictReader(record.open(encoding="utf-8")))
    assert [(row["reverse"], row["unit_norm"]) for row in rows] == [("False", "True")] * 5 + [("True", "False")] * 5
    assert rows[0]["url"] == "https://x.org/0"
