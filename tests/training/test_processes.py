"""Trainings that more than one process sees: two of them under torchrun, and one that is killed."""

import signal
from pathlib import Path

import pytest
import torch

import funcattrib as fa
from funcattrib.training import recover
from funcattrib.training.assemble import read_visits
from tests.support.processes import start, torchrun
from tests.support.training import check, examples, make
from tests.support.waiting import until
from tests.training.test_trainer import CHAIN

pytestmark = pytest.mark.slow

SCRIPT = """
import sys, time, torch
from pathlib import Path
from tests.training.test_trainer import callback
from tests.support.training import *
folder, mode = Path(sys.argv[1]), sys.argv[2]
settings = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "data": examples(13)}
if mode == "kill":
    class Wait(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step == 5:
                Path(folder, "now").touch()
                time.sleep(100_000)
    import funcattrib.training.callback as module
    module._SHARD_ROWS = 3
    train(folder, callback(folder), extra=[Wait()], per_device_train_batch_size=2)
ran = train(folder / mode, callback(folder) if mode == "with" else None, **settings)
if ran.trainer.args.process_index == 0:
    torch.save({"final": ran.final, "at": ran.weights, "losses": ran.losses}, folder / f"{mode}.pt")
"""


def test_two_processes(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    for mode in ("without", "with"):
        code, out = torchrun(2, script, tmp_path, mode)
        assert code == 0, out
    a, b = (torch.load(tmp_path / f"{mode}.pt", weights_only=True) for mode in ("without", "with"))
    assert a["losses"] == b["losses"]
    assert all(torch.equal(tensor, b["final"][name]) for name, tensor in a["final"].items())
    data = examples(13)
    ran = make(tmp_path, None, data=data)
    ran.weights = b["at"]
    for epoch in (0, 1):
        store = fa.open_store(tmp_path / f"run/epoch_{epoch}", verify=True)
        assert check(ran, store, CHAIN, data) == 13
        assert set(store.examples["rank"]) == {0, 1}
        assert store.manifest.extra["visits"] >= 13  # the sampler fills up the last step


def test_killed(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    run = start(script, tmp_path, "kill")
    until(lambda: (tmp_path / "now").exists() or run.poll() is not None)
    (journal,) = (tmp_path / "run/epoch_0/gradients").glob("epoch_*")
    # What was handed over is written meanwhile.
    until(lambda: len(list((journal / "shards").glob("*.json"))) == 3 or run.poll() is not None)
    run.send_signal(signal.SIGKILL)
    run.wait()
    with pytest.warns(UserWarning, match="unfinished: 9 of"):
        store = fa.open_store(journal)
    assert sorted(set(store.examples["step"])) == [1, 2, 3, 4, 5]
    assert len(read_visits(tmp_path / "run/epoch_0").at) == 9
    recovered = recover(tmp_path / "run")
    assert [each.manifest.extra["steps"] for each in recovered] == [[1, 5]]
    assert len(recovered[0]) == 11
    assert recovered[0].manifest.extra["unseen"] == 2
