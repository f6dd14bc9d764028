"""Processes that start with everything imported: forked from a server that imports it once for all tests.

Each is a process like any other, with a number, signals and an exit code. What a test says of a fresh interpreter
(its imports, its environment at start, a limit before it) starts one with ``subprocess``.
"""

import atexit
import multiprocessing
import os
import runpy
import signal
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

from tests.support.waiting import OUTER_LIMIT

ROOT = Path(__file__).resolve().parents[2]
PRELOADED = "tests.support.preloaded"


@cache
def _server() -> multiprocessing.context.ForkServerContext:
    """Start the server, which takes as long as importing; of this test session alone."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([PRELOADED])
    # With few arenas, a limit on a process's memory is met by what it computes and not by what malloc sets aside.
    given = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "MALLOC_ARENA_MAX": "2"}
    with mock.patch.dict(os.environ, given):
        forkserver.ensure_running()
    return context


class Forked:
    """A process, and what it has written so far."""

    def __init__(self, target: Callable[..., None], words: tuple[object, ...], folder: Path, environment: dict) -> None:
        with tempfile.NamedTemporaryFile(prefix="written", delete=False) as file:
            self._written = Path(file.name)
        given = (target, [str(word) for word in words], str(self._written), str(folder), environment)
        self._process = _server().Process(target=_run, args=given)
        self._process.start()
        assert self._process.pid is not None
        self.pid: int = self._process.pid
        atexit.register(self._process.kill)  # before multiprocessing waits for it

    def poll(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def written(self) -> str:
        return self._written.read_text(encoding="utf-8")

    def wait(self) -> tuple[int, str]:
        """Return its exit code and what it has written, once it has ended."""
        self._process.join(OUTER_LIMIT)
        assert self._process.exitcode is not None, self.written()
        text = self.written()
        self._written.unlink()
        return self._process.exitcode, text


def start(*words: object, folder: Path = ROOT, **environment: str) -> Forked:
    """Start ``python WORDS``: a script and its arguments, or ``-m`` and a module, or ``-c`` and a program."""
    return Forked(_python, words, folder, environment)


def torchrun(processes: int, *words: object, restarts: int = 0, **environment: str) -> tuple[int, str]:
    """Run ``torchrun WORDS`` to its end: torch's own launcher, whose ranks are forked as well."""
    launch = ["--standalone", f"--nproc-per-node={processes}", f"--max-restarts={restarts}"]
    forked = [*launch, "--run-path", "--start-method=fork", "--", *words]
    return Forked(_torchrun, tuple(forked), ROOT, environment).wait()


# In the process


def _run(target: Callable[[list[str]], None], words: list[str], written: str, folder: str, environment: dict) -> None:
    """Write into the file from here on, and run."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    file = os.open(written, os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    os.chdir(folder)
    os.environ.update(environment)
    target(words)


def _python(words: list[str]) -> None:
    first, *rest = words
    if first == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif first == "-c":
        sys.argv = ["-c", *rest[1:]]
        exec(rest[0], {"__name__": "__main__"})
    else:
        sys.argv = words
        runpy.run_path(first, run_name="__main__")


def _rank(*words: str) -> None:
    """Torch's launcher takes a function that returns as one that has ended well."""
    try:
        _python(list(words))
    except SystemExit as stop:
        if stop.code:
            raise
    finally:
        sys.stdout.flush()


def _torchrun(words: list[str]) -> None:
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        with mock.patch.object(run, "run_script_path", _rank):
            run.main(words)
    except ChildFailedError as error:  # which says what became of each rank
        sys.exit(str(error))
