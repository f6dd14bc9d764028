"""Memory that is short on one of the processes that hold a model together: the run goes on, or all of them end."""

import json
import re
import socket
import sys
from pathlib import Path

import numpy as np
import pytest

import funcattrib as fa
from funcattrib.runs.reduce import reduce_gradients
from funcattrib.store import GradientStore
from tests.support import cases, processes, tiny
from tests.support.memory_run import FEW, LONGEST, NAMES, TEXTS

pytestmark = pytest.mark.slow

SMALL = {"projection_dim": 4, "dtype": "float32", "rows_per_shard": 5, "token_batch_size": 60, "quiet": True}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name in NAMES:
        tiny.save_model(folder / name, name)
    tiny.write_jsonl(folder / "data.jsonl", [{"text": text} for text in TEXTS])
    return folder


def start(folder: Path, models: Path, ranks: int) -> list[dict]:
    for each in models.iterdir():
        (folder / each.name).symlink_to(each)
    code, out = processes.torchrun(ranks, "tests/support/memory_run.py", "all", folder)
    assert code == 0, out
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(ranks)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("two")


@pytest.fixture(scope="module")
def two(folder: Path, models: Path) -> list[dict]:
    return start(folder, models, 2)


def check_halved(ranks: list[dict], name: str) -> None:
    for number, rank in enumerate(ranks):
        found = rank["halved"][name]
        for at in ("use", "gather"):
            here = found[at]
            assert here["worst"] <= 1e-6
            assert here["kept"] == 0, "what the batch had taken is given back before the others' gathers are made"
            # Its first batch fails, at each of its gathers; the second is computed in halves from the start.
            assert set(here["failed"][:-1]) == {number % 2}
            assert here["failed"][-1] == 0, "beyond the last gather"
            assert set(here["failed together"]) == {1}


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_is_halved_wherever_it_fails(name: str, two: list[dict]) -> None:
    check_halved(two, name)
    for rank in two:
        found = rank["halved"][name]
        assert found["gathers"] > 30
        assert len(found["use"]["failed"]) >= (found["gathers"] + 1 if name == NAMES[0] else 6)


def test_each_copy_by_itself(tmp_path: Path, models: Path) -> None:
    """Two copies of two shards, in each of which one process is short of memory; a trial of all four."""
    four = start(tmp_path, models, 4)
    check_halved(four, NAMES[0])
    assert [rank["auto"] for rank in four] == [{"code": 0, "failed": n, "kept": 0} for n in (0, 1, 0, 0)]
    assert budget_of(tmp_path / "auto") in (LONGEST, 2 * LONGEST)
    same(tmp_path / "auto", alone(tmp_path / "alone", token_batch_size=budget_of(tmp_path / "auto")))


def test_sigterm_in_a_batch_that_fails(two: list[dict]) -> None:
    first, second = (rank["told to end"] for rank in two)
    assert first == {"done": 3, "terminated": False, "failed": 0}
    assert second == {"done": 1, "terminated": True, "failed": 1}


def alone(path: Path, recipe=fa.collect_gradients, **settings: object) -> GradientStore:
    data = [{"text": text} for text in TEXTS]
    common = {"tokenizer": tiny.make_tokenizer(), **SMALL, **settings}
    return recipe(cases.causal("gpt_neox"), data, path=path, **common)


def same(ours: Path, whole: GradientStore) -> None:
    found, wanted = np.asarray(fa.open_store(ours, verify=True).matrix()[:]), np.asarray(whole.matrix()[:])
    assert np.abs(found - wanted).max() <= 1e-6 * np.abs(wanted).max()


def test_runs(two: list[dict], folder: Path, tmp_path: Path) -> None:
    """A fit and its rows, a sum, and rows of a model and its reference under FSDP2."""
    for number, rank in enumerate(two):
        for name in ("build", "reduce"):
            assert rank[name]["code"] == rank[name]["kept"] == 0
            assert (rank[name]["failed"] > 0) == (number == 1)
        assert rank["of python"]["rows"] == len(TEXTS)
        assert (rank["of python"]["failed"] > 0) == (number == 1)
    same(folder / "build", alone(tmp_path / "build", normalizer="adafactor", fit_documents=0))
    same(folder / "reduce", alone(tmp_path / "reduce", reduce_gradients))
    same(folder / "kl", alone(tmp_path / "kl", loss="kl", reference_model=cases.causal(cases.TIED)))
    assert "did not fit in memory: it is computed in halves" in (folder / "build/logs/rank-1.log").read_text()


def budget_of(path: Path) -> int:
    return fa.store.read_manifest(path).computed_with["token_batch_size"]


def test_a_budget_is_tried_together(two: list[dict], folder: Path, tmp_path: Path) -> None:
    """Rank 1 has memory for two of the longest documents; rank 0 learns of it, and both compute with one number."""
    for name, settings in (("auto", {"normalizer": "adafactor", "fit_documents": 0}), ("auto rows", {})):
        assert [rank["tried"][name] for rank in two] == [{"code": 0, "failed": n, "kept": 0} for n in (0, 1)]
        assert budget_of(folder / name) in (LONGEST, 2 * LONGEST)
        whole = alone(tmp_path / name, **settings, token_batch_size=budget_of(folder / name))
        same(folder / name, whole)


def test_what_was_found_is_kept_by_rank_0_for_models_in_shards(two: list[dict], folder: Path) -> None:
    assert [rank["tried"]["asked"] for rank in two] == [[1, 2, 4, 8]] * 2
    assert budget_of(folder / "made up") == budget_of(folder / "again") == 2 * LONGEST
    assert all(rank["tried"]["again"]["code"] == 0 for rank in two)
    assert (folder / "cache0/funcattrib/token_budgets.json").exists()
    assert not (folder / "cache1").exists()


def test_a_run_goes_on_with_its_number(two: list[dict], folder: Path, tmp_path: Path) -> None:
    assert [rank["continued"] for rank in two] == [{"codes": [143, 0], "shards": 4}] * 2
    assert budget_of(folder / "continued") == 33
    same(folder / "continued", alone(tmp_path / "run", loss="log_odds", token_batch_size=33))


def ended(case: str, folder: Path, models: Path) -> list[tuple[int, str]]:
    """Exit codes and outputs of two processes that no launcher ends; each ends by itself."""
    for each in models.iterdir():
        (folder / each.name).symlink_to(each)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    words = ["tests/support/memory_run.py", case, folder]
    both = [processes.start(*words, **place, RANK=rank, LOCAL_RANK=rank) for rank in ("0", "1")]
    return [process.wait() for process in both]


def test_a_document_that_cannot_fit_ends_all(tmp_path: Path, models: Path) -> None:
    (first, out), (second, err) = ended("one_document", tmp_path, models)
    assert (first, second) == (2, 2), out + err
    told = re.search(r"rank 1: one document does not fit in memory: row (\d+) of (\d+) tokens", err)
    assert told is not None
    assert len(TEXTS[int(told[1])].split()) == int(told[2]) > FEW
    assert "--truncation and --max-length" in err
    assert "Traceback" not in out + err


def test_an_order_that_differs_is_noticed(tmp_path: Path, models: Path) -> None:
    (first, out), (second, err) = ended("another_order", tmp_path, models)
    assert (first, second) == (2, 2), out + err
    assert "this batch uses the model's weights in another order than earlier ones" in err
    assert "the connection to the other processes of this run was lost" in out


def test_a_killed_rank_is_noticed(tmp_path: Path, models: Path) -> None:
    (first, out), (second, _) = ended("killed", tmp_path, models)
    assert (first, second) == (2, -9), out
    assert "the connection to the other processes of this run was lost" in out


def test_memory_for_nothing(tmp_path: Path, models: Path) -> None:
    """Not even the order can be learnt."""
    (first, out), (second, err) = ended("unlearned", tmp_path, models)
    assert (first, second) == (2, 2), out + err
    assert "the shortest document and two weights do not fit in the memory of one process" in err
    assert "the connection to the other processes of this run was lost" in out


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")
def test_torch_s_own_allocation_fails(tmp_path: Path, models: Path) -> None:
    (first, out), (second, limited) = ended("limited", tmp_path, models)
    assert (first, second) == (0, 0), out + limited
    assert "did not fit in memory" not in out
    assert limited.count("a batch of 64 documents of up to 256 tokens did not fit in memory") == 1
    assert max(float(each.split("difference ")[1]) for each in (out, limited)) < 1e-5
