"""A disk that is full, and a limit on the size of files: a clear error, and a run that goes on once there is room."""

import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from funcattrib.store import open_store
from tests.store.test_resume import ROOT, start
from tests.support.store_run import contents, write

pytestmark = pytest.mark.slow

# In a mount namespace of its own: no rights are needed where the kernel allows these, and nothing stays mounted.
NAMESPACE = ["unshare", "--user", "--map-root-user", "--mount"]


def namespaces_are_permitted() -> bool:
    if shutil.which("unshare") is None:
        return False
    probe = [*NAMESPACE, "mount", "-t", "tmpfs", "tmpfs", "/tmp"]
    return subprocess.run(probe, capture_output=True, check=False).returncode == 0


def test_a_limit_on_the_size_of_files(tmp_path: Path) -> None:
    whole = write(tmp_path / "whole")
    process = start(tmp_path / "run", "--limit-after", "2")
    _, message = process.communicate()
    assert process.returncode == 2, message  # and not killed by SIGXFSZ
    assert "shards/00002.npy cannot be written: it exceeds the file-size limit\nraise the limit (ulimit -f)" in message
    assert "Traceback" not in message
    assert not list((tmp_path / "run").rglob("*.tmp"))
    with pytest.warns(UserWarning, match="32 of 70 rows"):
        open_store(tmp_path / "run", verify=True)
    write(tmp_path / "run")
    assert contents(tmp_path / "run") == contents(whole)


@pytest.mark.skipif(not namespaces_are_permitted(), reason="mounting a small disk is not permitted here")
def test_a_full_disk(tmp_path: Path) -> None:
    whole = write(tmp_path / "whole", rows=16 * 100)
    (tmp_path / "disk").mkdir()
    python, place, disk = (shlex.quote(str(path)) for path in (sys.executable, tmp_path, tmp_path / "disk"))
    command = f"{python} -m tests.support.store_run {disk}/run --rows {16 * 100}"
    script = f"""
        mount -t tmpfs -o size=300k tmpfs {disk} || exit 99
        {command}; test $? = 2 || exit 98
        test -e {disk}/run/lock && exit 97
        ls {disk}/run/shards/00000.json || exit 96
        {command}; test $? = 2 || exit 95
        mount -o remount,size=50m {disk} && {command} || exit 94
        cp -r {disk}/run {place}/run
    """
    run = subprocess.run([*NAMESPACE, "sh", "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert (
        run.stderr.count(
            "cannot be written: the disk is full (0.0 MB free)\nfree some space, then run the same command again"
        )
        == 2
    )
    assert "Traceback" not in run.stderr
    assert contents(tmp_path / "run") == contents(whole)


def test_a_state_that_does_not_fit(tmp_path: Path) -> None:
    program = f"""
import resource, torch
from funcattrib.store import create_store
from tests.support.store_run import manifest
with create_store({str(tmp_path / "run")!r}, manifest()) as writer:
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
    writer.save_state({{"large": torch.zeros(100_000)}})
"""
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert "state.safetensors cannot be written: it exceeds the file-size limit\nraise the limit" in run.stderr
    assert sorted(file.name for file in (tmp_path / "run").iterdir()) == ["examples", "manifest.json", "shards"]
