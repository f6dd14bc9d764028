"""The tokens of a batch found by trial: the search on made-up costs, and for real on tiny models."""

import json
import logging
import sys
from pathlib import Path

import pytest
import torch

import funcattrib as fa
from funcattrib.runs import token_budget, workload
from funcattrib.runs.collect import fit_chain
from funcattrib.runs.reduce import reduce_gradients
from funcattrib.runs.score import score_gradients
from funcattrib.runs.token_budget import Cost, search_batch_size
from funcattrib.runtime import memory
from tests.support import cases, tiny

TEXTS = tiny.texts(14)
LONGEST = max(len(text.split()) for text in TEXTS)
SMALL = {"projection_dim": 4, "dtype": "float32", "token_batch_size": "auto"}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "funcattrib" / "token_budgets.json"


def run(recipe, path: Path, **settings: object):
    common = {"tokenizer": tiny.make_tokenizer(), **SMALL, **settings}
    return recipe(cases.causal("gpt_neox"), [{"text": text} for text in TEXTS], path=path, **common)


def number(path: Path) -> int:
    return fa.store.read_manifest(path).computed_with["token_batch_size"]


def forbid(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on a trial is a failure."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a trial was made")

    monkeypatch.setattr(token_budget, "search_batch_size", refuse)


# The search


def curve(overhead: float, each: float, bytes_each: int, holds: int = 1 << 30):
    """A device: fixed seconds a batch, seconds and bytes a document; it fails beyond some documents."""
    asked: list[int] = []

    def measure(documents: int) -> Cost | None:
        asked.append(documents)
        return Cost(overhead + each * documents, bytes_each * documents) if documents <= holds else None

    return measure, asked


@pytest.mark.parametrize(
    ("overhead", "room", "holds", "documents", "ended", "asked"),
    [
        (0.0, 10**9, 10**9, 1, "speed", [1, 2, 4]),  # a CPU: one document is as fast as many
        (1.0, 10**9, 10**9, 32, "speed", [1, 2, 4, 8, 16, 32, 64, 128]),  # 1 + n: 97 % at 32
        (1.0, 100, 10**9, 8, "memory", [1, 2, 4, 8]),  # 10 bytes each: 16 would take 160
        (1.0, 10**9, 5, 4, "memory", [1, 2, 4, 8]),  # the device fails at 8
        (1.0, 5, 10**9, 1, "memory", [1]),  # one takes more than its share; there is nothing smaller
    ],
)
def test_search(overhead, room, holds, documents, ended, asked) -> None:
    measure, seen = curve(overhead, 1.0, 10, holds)
    found = search_batch_size(measure, room)
    speeds = {n: n / (overhead + n) for n in seen if n <= holds}
    assert (found.documents, found.ended, seen) == (documents, ended, asked)
    assert speeds[documents] >= (1 - token_budget.WITHIN) * max(speeds.values())
    assert all(speeds[n] < (1 - token_budget.WITHIN) * max(speeds.values()) for n in speeds if n < documents)
    assert found.cost == Cost(overhead + documents, 10 * documents)


def test_search_where_not_even_one_fits() -> None:
    assert search_batch_size(curve(1.0, 1.0, 10, holds=0)[0], 1000) == (1, None, "memory")


def test_search_ends_at_the_most() -> None:
    found = search_batch_size(curve(1e6, 1.0, 1)[0], 10**12, most=64)
    assert (found.documents, found.ended) == (64, "size")


def made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device on which two documents are as fast as many."""
    curves = {1: Cost(2.0, 10), 2: Cost(2.01, 20), 4: Cost(4.0, 40), 8: Cost(8.0, 80)}
    monkeypatch.setattr(token_budget, "_trial", lambda *_: curves.__getitem__)


# What was found is kept


def test_what_was_found_is_kept(tmp_path, cache, caplog, monkeypatch) -> None:
    made_up(monkeypatch)
    run(fa.collect_gradients, tmp_path / "run")
    assert number(tmp_path / "run") == 2 * LONGEST
    assert list(json.loads(cache.read_text())["budgets"].values()) == [[2 * LONGEST, 2 * LONGEST / 2.01, 20]]
    forbid(monkeypatch)
    with caplog.at_level(logging.INFO):
        run(fa.collect_gradients, tmp_path / "again")
    assert number(tmp_path / "again") == 2 * LONGEST
    assert f"token batch size {2 * LONGEST} (as found before): " in caplog.text
    for other in ({"projection_dim": 3}, {"loss": "log_odds"}, {"normalizer": "adafactor"}):
        with pytest.raises(AssertionError, match="a trial"):
            run(fa.collect_gradients, tmp_path / "other", quiet=True, **other)
    monkeypatch.setattr(memory, "available", lambda device: 30)  # of which the half is not enough now
    with pytest.raises(AssertionError, match="a trial"):
        run(fa.collect_gradients, tmp_path / "other", quiet=True)


DAMAGED = ["", "{", "[1]", '{"version": 1, "budgets": {"a": 3}}', '{"version": 9}', "\x00\xff"]


@pytest.mark.parametrize("content", DAMAGED)
def test_a_damaged_cache_is_written_anew(content, tmp_path, cache, monkeypatch) -> None:
    made_up(monkeypatch)
    cache.parent.mkdir(parents=True)
    cache.write_text(content, encoding="latin-1")
    run(fa.collect_gradients, tmp_path / "run", quiet=True)
    kept = json.loads(cache.read_text())
    assert [tokens for tokens, *_ in kept["budgets"].values()] == [number(tmp_path / "run")]


def test_a_cache_that_cannot_be_written_is_no_matter(tmp_path, monkeypatch) -> None:
    made_up(monkeypatch)
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    run(fa.collect_gradients, tmp_path / "run", quiet=True)
    assert number(tmp_path / "run") == 2 * LONGEST


def test_what_ended_with_the_documents_is_not_kept(tmp_path, cache, monkeypatch) -> None:
    monkeypatch.setattr(token_budget, "_trial", lambda *_: curve(1e6, 1.0, 1)[0])
    run(fa.collect_gradients, tmp_path / "run", quiet=True)
    in_a_shard = sum(len(text.split()) for text in TEXTS)
    assert in_a_shard / 2 < number(tmp_path / "run") < in_a_shard + LONGEST
    assert not cache.exists()


def test_a_run_goes_on_with_its_own_number(tmp_path, cache, monkeypatch) -> None:
    whole = run(fa.collect_gradients, tmp_path / "whole", token_batch_size=33, quiet=True, rows_per_shard=5)
    rows_of = workload.rows_of

    def stop(tried, compute, rows, count):
        if rows[0] == 10:
            raise KeyboardInterrupt
        return rows_of(tried, compute, rows, count)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(token_budget, "token_budget", lambda *_, **__: 33)
        patch.setattr(workload, "rows_of", stop)
        run(fa.collect_gradients, tmp_path / "run", quiet=True, rows_per_shard=5)
    with monkeypatch.context() as patch:
        forbid(patch)
        store = run(fa.collect_gradients, tmp_path / "run", quiet=True, rows_per_shard=5)
        run(fa.collect_gradients, tmp_path / "run", quiet=True, rows_per_shard=5)  # and a finished one is left alone
    assert number(tmp_path / "run") == 33
    assert torch.equal(store.matrix().tensor(), whole.matrix().tensor())
    assert not cache.exists()
    made_up(monkeypatch)
    run(fa.collect_gradients, tmp_path / "run", quiet=True, overwrite=True)  # begins anew, with a trial
    assert number(tmp_path / "run") == 2 * LONGEST


# For real


def test_a_build_finds_it_and_says_so_once(tmp_path, caplog) -> None:
    with caplog.at_level(logging.INFO):
        store = run(fa.collect_gradients, tmp_path / "run")
    tokens = number(tmp_path / "run")
    said = [line for line in caplog.messages if line.startswith("token batch size")]
    assert len(said) == 1
    assert f"token batch size {tokens:,} ({tokens // LONGEST} of the longest, {LONGEST} tokens; " in said[0]
    assert tokens % LONGEST == 0
    given = run(fa.collect_gradients, tmp_path / "given", token_batch_size=tokens, quiet=True)
    assert torch.equal(given.matrix().tensor(), store.matrix().tensor())
    assert fa.store.differences(given.manifest, store.manifest) == []


@pytest.mark.parametrize(
    "settings",
    [
        {"normalizer": "adafactor", "precondition": "all"},
        {"normalizer": "adam"},
        {"projection_dim": 0},
        {"granularity": "token"},
    ],
    ids=lambda settings: ",".join(settings),
)
def test_every_chain_can_be_tried(settings, tmp_path) -> None:
    store = run(fa.collect_gradients, tmp_path / "run", quiet=True, **settings)
    assert number(tmp_path / "run") % LONGEST == 0
    given = run(
        fa.collect_gradients, tmp_path / "given", quiet=True, **{**settings, "token_batch_size": number(store.path)}
    )
    assert torch.equal(given.matrix().tensor(), store.matrix().tensor())


def test_the_other_recipes(tmp_path, monkeypatch) -> None:
    query = run(reduce_gradients, tmp_path / "query", quiet=True)
    scores = run(score_gradients, tmp_path / "scores", quiet=True, query_stores=query.path, unit_norm=True)
    dense = run(fa.collect_gradients, tmp_path / "rows", quiet=True, token_batch_size=64).matrix().tensor()
    cosines = torch.nn.functional.cosine_similarity(dense, query.matrix().tensor())[:, None]
    torch.testing.assert_close(torch.tensor(scores[:]), cosines, rtol=1e-4, atol=1e-5)
    made_up(monkeypatch)
    run(fit_chain, tmp_path / "fit", quiet=True, normalizer="adafactor")
    run(score_gradients, tmp_path / "tokens", quiet=True, query_stores=query.path, granularity="token", top_k=None)
    for name in ("query", "scores", "fit", "tokens"):
        assert number(tmp_path / name) % LONGEST == 0, name


def test_on_the_command_line(model_folder, tmp_path, funcattrib, monkeypatch) -> None:
    data = tiny.write_jsonl(tmp_path / "d.jsonl", [{"text": text} for text in TEXTS])
    words = ("build", tmp_path / "run", "--model", model_folder, "--dataset", data, "--projection-dim", 4)
    made_up(monkeypatch)
    ran = funcattrib(*words, "--token-batch-size", "auto")
    assert ran.code == 0, ran.err
    assert ran.err.count("token batch size") == 1
    forbid(monkeypatch)
    ran = funcattrib("build", tmp_path / "replayed", "--config", tmp_path / "run" / "config.yaml")
    assert ran.code == 0, ran.err
    assert "as found before" in ran.err
    assert number(tmp_path / "replayed") == number(tmp_path / "run")
    assert funcattrib(*words, "--token-batch-size", "most").code == 2
    with pytest.raises(fa.FuncattribError, match="a number or auto, found 'most'"):
        run(fa.collect_gradients, tmp_path / "wrong", token_batch_size="most")


# Memory


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the peak is that of the whole process")
def test_the_peak_counts_from_where_it_was_asked() -> None:
    cpu = torch.device("cpu")
    torch.ones(60 << 20)  # 240 MB that are gone before
    before = memory.in_use(cpu)
    assert memory.peak(cpu) - before < 32 << 20
    torch.ones(30 << 20)
    assert 110 << 20 < memory.peak(cpu) - before < 160 << 20
    assert 0 < memory.available(cpu) < memory.total(cpu)


@pytest.mark.parametrize(("name", "said"), [("LOCAL_WORLD_SIZE", "4"), ("SLURM_STEP_TASKS_PER_NODE", "4(x2),3")])
def test_ranks_side_by_side_divide_the_memory(name, said, monkeypatch) -> None:
    alone = memory.available(torch.device("cpu"))
    monkeypatch.setenv(name, said)
    assert memory.available(torch.device("cpu")) == pytest.approx(alone / 4, rel=0.2)
