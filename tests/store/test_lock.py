"""One writer at a time; a lock that a killed process left is taken over."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from funcattrib.errors import StoreError
from funcattrib.store import create_store, open_store
from tests.store.test_resume import ROOT, start
from tests.support.store_run import manifest, write
from tests.support.waiting import OUTER_LIMIT, until


def test_a_second_writer_is_refused_while_the_first_lives(tmp_path: Path) -> None:
    process = start(tmp_path / "run", "--delay", str(OUTER_LIMIT))
    assert process.stdout
    assert process.stdout.readline() == "ready\n"
    for overwrite in (False, True):
        with pytest.raises(StoreError, match=rf"run is being written by process {process.pid} on .*\nwait for"):
            create_store(tmp_path / "run", manifest(), overwrite=overwrite)
    with pytest.warns(UserWarning, match="unfinished"):
        open_store(tmp_path / "run")  # reading needs no lock
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert (tmp_path / "run/lock").exists()
    write(tmp_path / "run")
    assert not (tmp_path / "run/lock").exists()


def test_a_second_writer_in_the_same_process(tmp_path: Path) -> None:
    with create_store(tmp_path / "run", manifest()):
        with pytest.raises(StoreError, match="is being written by this process"):
            create_store(tmp_path / "run", manifest())
        assert (tmp_path / "run/lock").exists()
    create_store(tmp_path / "run", manifest()).close()


def test_the_lock_is_given_up_when_the_body_fails(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), create_store(tmp_path / "run", manifest()):
        _ = 1 / 0
    assert not (tmp_path / "run/lock").exists()


def _lock(path: Path, **changes: object) -> None:
    owner = {"pid": os.getpid(), "host": socket.gethostname(), "started": "", "since": "2000-01-01T00:00:00+00:00"}
    (path / "lock").write_text(json.dumps({**owner, **changes}))


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc to tell processes apart")
def test_a_process_number_that_was_given_again_is_no_owner(tmp_path: Path) -> None:
    create_store(tmp_path / "run", manifest()).close()
    _lock(tmp_path / "run", started="an-earlier-boot:1")
    create_store(tmp_path / "run", manifest()).close()


def test_a_lock_that_was_never_written_whole_is_stale(tmp_path: Path) -> None:
    create_store(tmp_path / "run", manifest()).close()
    for text in ("", '{"pid": 12', "[]"):
        (tmp_path / "run/lock").write_text(text)
        create_store(tmp_path / "run", manifest()).close()


def test_a_lock_of_another_host_is_respected(tmp_path: Path) -> None:
    create_store(tmp_path / "run", manifest()).close()
    _lock(tmp_path / "run", host="elsewhere")
    with pytest.raises(StoreError, match=r"on elsewhere \(since 2000.*\)\nwait for it, or delete .*lock if"):
        create_store(tmp_path / "run", manifest())
    (tmp_path / "run/lock").unlink()
    create_store(tmp_path / "run", manifest()).close()


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc to tell processes apart")
def test_a_process_that_ended_but_was_not_reaped_is_no_owner(tmp_path: Path) -> None:
    process = start(tmp_path / "run", "--delay", str(OUTER_LIMIT))
    assert process.stdout
    assert process.stdout.readline() == "ready\n"
    os.kill(process.pid, signal.SIGKILL)
    until(lambda: Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z")
    create_store(tmp_path / "run", manifest()).close()
    process.communicate()


@pytest.mark.slow
def test_of_many_that_start_at_once_one_writes(tmp_path: Path) -> None:
    program = f"""
import sys, time
from funcattrib.errors import StoreError
from funcattrib.store.lock import acquire
from pathlib import Path
print("ready", flush=True); sys.stdin.readline()
for _ in range(200):
    try:
        lock = acquire(Path({str(tmp_path)!r}))
    except StoreError:
        continue
    own = Path({str(tmp_path / "alone")!r})
    own.touch(exist_ok=False)
    own.unlink()
    lock.release()
"""
    (tmp_path / "lock").write_text("stale")
    command = [sys.executable, "-c", program]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    many = [subprocess.Popen(command, cwd=ROOT, text=True, **pipes) for _ in range(4)]
    for process in many:
        assert process.stdout
        process.stdout.readline()
    for process in many:
        assert process.stdin
        process.stdin.write("go\n")
        process.stdin.flush()
    assert [process.communicate()[1] for process in many] == [""] * 4
    assert not (tmp_path / "lock").exists()
