"""A run that is killed, or fails, is continued by the same command, and ends bit-identical to one left alone."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from funcattrib.errors import StoreError
from funcattrib.store import atomic, create_store, open_store, verify
from tests.support.store_run import contents, examples, fill, manifest, rows, write
from tests.support.waiting import until

ROOT = Path(__file__).parents[2]
PROGRAM = [sys.executable, "-m", "tests.support.store_run"]


def start(path: Path, *options: str) -> subprocess.Popen:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [*PROGRAM, str(path), *options]
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_killed_at_five_random_moments(tmp_path: Path) -> None:
    count = 16 * 150
    whole = contents(write(tmp_path / "whole", rows=count, dtype="int8"))
    moments = random.Random(0)
    finished = [0]
    for _ in range(5):
        # So many shards later, and then some: in the middle of a shard, whatever the machine's speed.
        target, pause = finished[-1] // 16 + moments.randint(0, 24), moments.uniform(0.0, 0.02)
        # However late it is killed, it stops five shards later.
        held = str(target - finished[-1] // 16 + 5)
        settings = ("--rows", str(count), "--dtype", "int8", "--delay", "0.003", "--hold-after", held)
        process = start(tmp_path / "killed", *settings)
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
        shards = tmp_path / "killed/shards"
        until(lambda: len(list(shards.glob("*.json"))) >= target or process.poll() is not None, 0.001)  # noqa: B023
        time.sleep(pause)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        with pytest.warns(UserWarning, match="unfinished"):
            finished.append(len(open_store(tmp_path / "killed")))
    assert finished == sorted(finished)
    assert 0 < finished[-1] < count
    process = start(tmp_path / "killed", "--rows", str(count), "--dtype", "int8")
    assert process.communicate()[1] == ""
    assert process.returncode == 0
    assert contents(tmp_path / "killed") == whole
    assert verify(tmp_path / "killed") == []


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_a_failure_at_every_write_can_be_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    whole = contents(write(tmp_path / "whole", dtype=dtype))
    replace, messages = os.replace, []
    for step in range(100):
        run, calls = tmp_path / f"run{step}", 0

        def fail_once(source: Path, target: Path, step: int = step) -> None:
            nonlocal calls
            calls += 1
            if calls == step + 1:
                raise OSError(28, "No space left on device")
            replace(source, target)

        with monkeypatch.context() as patched:
            patched.setattr(atomic.os, "replace", fail_once)
            try:
                write(run, dtype=dtype)
                messages.append("")
            except StoreError as error:
                messages.append(str(error))
        assert not list(run.rglob("*.tmp"))
        assert not (run / "lock").exists()
        write(run, dtype=dtype)
        assert contents(run) == whole
        if calls <= step:
            break
    # manifest, state, the manifest with its hash, configuration, five shards, the manifest again
    assert len(messages) - 1 == 4 + 5 * (4 if dtype == "int8" else 3) + 1
    assert messages.pop() == ""
    assert all("the disk is full" in message and "run the same command again" in message for message in messages)


def test_shards_in_any_order_and_only_the_pending_ones(tmp_path: Path) -> None:
    whole = write(tmp_path / "whole")
    with create_store(tmp_path / "run", manifest()) as writer:
        assert writer.pending == [0, 1, 2, 3, 4]
        assert writer.shard_range(4) == range(64, 70)
        for shard in (3, 1):
            writer.put(shard, rows(writer.shard_range(shard)), examples(writer.shard_range(shard)))
    with pytest.warns(UserWarning, match=r"32 of 70 rows are there \(2 of 5 shards\)"):
        store = open_store(tmp_path / "run")
    assert len(store) == 32
    assert store.examples["id"][:] == [*range(16, 32), *range(48, 64)]
    assert (store.matrix()[:] == rows(range(70)).numpy()[store.examples["id"][:]]).all()
    write(tmp_path / "run")
    assert contents(tmp_path / "run") == contents(whole)


def test_a_complete_store_is_left_alone(tmp_path: Path) -> None:
    run = write(tmp_path / "run")
    before = {file: file.stat().st_mtime_ns for file in run.rglob("*")}
    with create_store(run, manifest(funcattrib_version="another", extra={"note": 1})) as writer:
        assert writer.pending == []
        assert writer.finished == [0, 1, 2, 3, 4]
        state = writer.load_state()
        assert state is not None
        assert state["moments"].tolist() == [0, 1, 2, 3, 4]
        writer.save_config({"other": 1})
        writer.save_state({})
        assert writer.finish().complete
    assert {file: file.stat().st_mtime_ns for file in run.rglob("*")} == before


def test_another_run_is_refused_naming_what_differs(tmp_path: Path) -> None:
    write(tmp_path / "run")
    before = contents(tmp_path / "run")
    model = {"id": "other", "revision": "abc", "architecture": "GPT2", "dtype": "float32", "fingerprint": "f" * 64}
    other = manifest(model=model, seed=1, chain=[{"name": "project", "dim": 8}])
    with pytest.raises(StoreError) as caught:
        create_store(tmp_path / "run", other)
    message = str(caught.value)
    assert "model: expected other (float32, fff" in message
    assert "seed: expected 1, found 0" in message
    assert "chain: expected project(dim=8), found project(dim=8, shape=[3, 4]) → unit_norm()" in message
    assert "use `overwrite` to replace it, or another RUN" in message
    assert message.count("\n") == 1
    assert contents(tmp_path / "run") == before


def test_an_unfinished_run_of_another_version_is_refused(tmp_path: Path) -> None:
    create_store(tmp_path / "run", manifest()).close()
    with pytest.raises(StoreError, match="funcattrib_version: expected"):
        create_store(tmp_path / "run", manifest(funcattrib_version="another"))


def test_overwrite_begins_anew(tmp_path: Path) -> None:
    run = write(tmp_path / "run", rows=100, dtype="int8", seed=7)
    (run / "faiss" / "key").mkdir(parents=True)
    (run / "notes.txt").write_text("mine")
    with create_store(run, manifest(), overwrite=True) as writer:
        assert writer.pending == [0, 1, 2, 3, 4]
        assert writer.load_state() is None
    assert not (run / "faiss").exists()
    assert (run / "notes.txt").read_text() == "mine"
    (run / "notes.txt").unlink()
    write(run)
    assert contents(run) == contents(write(tmp_path / "whole"))


def test_overwrite_of_an_unfinished_run_counts_none_of_its_shards(tmp_path: Path) -> None:
    with create_store(tmp_path / "run", manifest(seed=1)) as writer:
        writer.put(0, rows(range(16)) + 1, examples(range(16)))
    with create_store(tmp_path / "run", manifest(), overwrite=True) as writer:
        assert writer.pending == [0, 1, 2, 3, 4]
        fill(writer)
    assert (open_store(tmp_path / "run").matrix()[:] == rows(range(70)).numpy()).all()


def test_a_shard_that_went_missing_is_written_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = write(tmp_path / "run")
    whole = contents(run)
    (run / "shards/00002.npy").write_bytes(whole["shards/00002.npy"][:-5])
    (run / "examples/00004.arrow").unlink()
    with create_store(run, manifest()) as writer:
        assert writer.pending == [2, 4]
        assert "shard 2 is written again" in caplog.text
    with create_store(run, manifest()) as writer:
        assert writer.pending == [2, 4]
        fill(writer)
    assert contents(run) == whole


def test_a_broken_side_file_costs_its_shard_alone(tmp_path: Path) -> None:
    with (
        create_store(tmp_path / "run", manifest()) as writer,
        pytest.raises(StoreError, match="2 of 5 shards are not written yet: 3, 4"),
    ):
        for shard in (0, 1, 2):
            writer.put(shard, rows(writer.shard_range(shard)), examples(writer.shard_range(shard)))
        writer.finish()
    (tmp_path / "run/shards/00001.json").write_text("{")
    (tmp_path / "run/shards/00002.json").write_text((tmp_path / "run/shards/00000.json").read_text())
    assert create_store(tmp_path / "run", manifest()).pending == [1, 2, 3, 4]


def test_an_empty_store(tmp_path: Path) -> None:
    store = open_store(write(tmp_path / "run", rows=0), verify=True)
    assert len(store) == 0
    assert store.matrix()[:].shape == (0, 64)
    assert store.gradients("1.weight").shape == (0, 3, 8)
    assert list(store.matrix().blocks(4)) == []
    assert len(store.examples) == 0
