"""What the processes of a run tell each other, tried by threads on one key-value store; and who is asked to join."""

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.distributed import HashStore

from funcattrib.errors import FuncattribError
from funcattrib.runtime.key_value_store import KeyValueStore
from funcattrib.runtime.launcher import first_host, launched, set_up_from_slurm
from funcattrib.runtime.world import SINGLE_PROCESS, World, agreed
from funcattrib.transforms.precondition import precondition


def together(size: int, work: Callable[[World], Any]) -> list[Any]:
    """``work`` by ``size`` threads, each a process of one world; exceptions are results."""
    store, results = HashStore(), [None] * size

    def run(rank: int) -> None:
        try:
            results[rank] = work(World(rank, size, rank, KeyValueStore(store)))
        except FuncattribError as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    return results


def test_each_number_is_claimed_once_in_each_of_several_loops() -> None:
    for claimed in zip(*together(3, lambda world: [list(world.claims(n)) for n in (0, 1, 40)]), strict=True):
        numbers = [number for each in claimed for number in each]
        assert sorted(numbers) in ([], [0], list(range(40)))
        assert all(list(each) == sorted(each) for each in claimed)


def test_values_are_told_and_gathered_by_rank() -> None:
    said = together(
        3, lambda world: (world.broadcast_object(["a", world.rank]), world.all_gather_object(world.rank * 10))
    )
    assert said == [(["a", 0], [0, 10, 20])] * 3


def test_counts_are_of_all_processes() -> None:
    def work(world: World) -> tuple[int, int]:
        add = world.counter()
        for _ in range(5):
            add(3, 1)
        world.barrier()
        return add(0, 0)

    assert together(4, work) == [(60, 20)] * 4
    add = SINGLE_PROCESS.counter()
    assert (add(3, 1), add(2, 1)) == ((3, 1), (5, 2))


def test_the_first_processs_error_is_everybodys() -> None:
    def refuse() -> None:
        raise FuncattribError("expected room, found none")

    assert {str(error) for error in together(2, lambda world: world.on_rank_zero(refuse))} == {
        "expected room, found none"
    }
    assert together(2, lambda world: world.on_rank_zero(lambda: 7)) == [7, None]


def test_who_waits_for_one_that_failed_is_told_its_rank_and_reason() -> None:
    def work(world: World) -> Any:
        if world.rank == 1:
            return world.report_failure("the disk is full")
        return world.barrier()

    stopped, first = together(2, work)
    assert first is True
    assert "rank 1: the disk is full" in str(stopped)
    assert "finished shards are kept" in str(stopped)


def test_a_lost_connection_is_said_in_words() -> None:
    class Gone:
        def add(self, *_: Any) -> int:
            raise RuntimeError("Connection was likely closed")

    world = World(0, 2, 0, KeyValueStore(Gone()))
    with pytest.raises(FuncattribError, match="the connection to the other processes of this run was lost"):
        world.barrier()
    assert world.report_failure("any")


def test_one_process_needs_nobody() -> None:
    tensors = {"a": torch.ones(2)}
    assert SINGLE_PROCESS.all_reduce(tensors)["a"] is tensors["a"]
    assert SINGLE_PROCESS.broadcast(None) is None
    assert [part.tolist() for part in SINGLE_PROCESS.all_gather(torch.ones(2))] == [[1.0, 1.0]]
    SINGLE_PROCESS.barrier()


@pytest.mark.parametrize(
    ("nodes", "host"), [("node[07-09,12],login1", "node07"), ("a,b", "a"), ("gpu-3", "gpu-3"), ("n[5]", "n5")]
)
def test_the_first_host_of_slurms_list(nodes, host) -> None:
    assert first_host(nodes) == host


def test_an_attempt_is_not_taken_for_the_one_before_on_the_same_store() -> None:
    store, names = HashStore(), []
    for _ in range(3):
        found: dict[int, str] = {}

        def agree(rank: int, found: dict[int, str] = found) -> None:
            found[rank] = agreed(store, rank, 3)

        threads = [threading.Thread(target=agree, args=(rank,), daemon=True) for rank in (1, 2, 0)]
        for thread in threads:
            thread.start()
            time.sleep(0.05)  # rank 0 comes last, when the others have read what an earlier attempt left
        for thread in threads:
            thread.join(30)
        assert len(found) == 3
        assert len(set(found.values())) == 1
        names.append(found[0])
    assert len(set(names)) == 3


def test_what_a_launcher_says(monkeypatch) -> None:
    for name in ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    assert not launched()
    monkeypatch.setenv("SLURM_NTASKS", "4")  # a batch script's own process, not started by srun
    assert not launched()
    slurm = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_STEP_NODELIST": "n[2-3]"}
    for name, value in {**slurm, "SLURM_JOB_ID": "12345"}.items():
        monkeypatch.setenv(name, value)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # so that monkeypatch takes away what is set now
        monkeypatch.delenv(name)
    assert launched()
    set_up_from_slurm()
    environment = {name: __import__("os").environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")}
    assert environment == {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "n2"}


def test_a_fit_dealt_to_several_is_the_sum_of_their_states() -> None:
    stage, rows = precondition(), torch.randn(12, 5, generator=torch.Generator().manual_seed(0))
    from funcattrib.types import Leaf

    start = stage.init({"w": Leaf((5,), torch.float32)})[0]
    whole = stage.observe(start, {"w": rows})
    parts = [stage.observe(start, {"w": rows[i::3]}) for i in range(3)]
    torch.testing.assert_close(sum(part.gram["w"] for part in parts), whole.gram["w"], rtol=1e-12, atol=1e-12)
    assert float(sum(part.seen for part in parts)) == float(whole.seen)
