"""A command run by several processes: rank 0 speaks for all, each of the others writes a log beside the run."""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from io import TextIOBase
from pathlib import Path
from typing import Any, TextIO

from funcattrib.errors import FuncattribError
from funcattrib.runtime.launcher import rank
from funcattrib.runtime.signals import EXIT_CODE, Terminated
from funcattrib.runtime.world import init_distributed
from funcattrib.store.create import LOGS, PARTS
from funcattrib.store.manifest import MANIFEST_FILE

_EXIT_GRACE_SECONDS = 10.0  # seconds


def run_distributed(run: Callable[[Any], int | None], config: Any) -> int:
    """Run a command as one of the processes that a launcher started.

    Of one error that all of them meet, the first alone reports. Where it came before anything began, no file remains.
    """
    output = getattr(config, "output", None)
    folder = None if output is None else output.run
    above = [] if folder is None else [Path(folder), *Path(folder).parents]
    missing = [each for each in above if not os.path.exists(each)]
    with init_distributed() as world, ExitStack() as apart:
        if world.is_rank_zero:
            apart.callback(_remove_empty, missing)
        else:
            log: Any = Log(Path(folder), world.rank) if folder is not None else open(os.devnull, "w")  # noqa: SIM115
            apart.enter_context(log)
            apart.enter_context(redirect_stdout(log))
            apart.enter_context(redirect_stderr(log))
        try:
            return run(config) or 0
        except FuncattribError as error:
            if not world.report_failure(str(error)):
                return 2
            raise FuncattribError(str(error) if world.is_rank_zero else f"rank {world.rank}: {error}") from error
        except Terminated:
            if world.is_rank_zero:
                raise
            return EXIT_CODE
        except BaseException as error:
            world.report_failure(f"{type(error).__name__}: {error}")
            raise


def _remove_empty(folders: Sequence[Path]) -> None:
    """Remove folders that were made to see whether all processes share them, the innermost first."""
    with suppress(OSError):  # it is not empty, or not there
        for folder in folders:
            folder.rmdir()


@contextmanager
def rank_zero_reports() -> Iterator[None]:
    """Report errors that all processes meet alike, before they know of each other, on rank 0 alone; the others end."""
    if rank() == 0:
        yield
        return
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        try:
            yield
        except (FuncattribError, SystemExit) as error:
            if isinstance(error, SystemExit) and not error.code:
                raise
            time.sleep(_EXIT_GRACE_SECONDS)  # torchrun ends all when one has ended: rank 0 speaks first
            raise SystemExit(2) from None


class Log(TextIOBase):
    """RUN/logs/rank-N.log, made once the run has begun; what is written before that waits, or is dropped with it.

    So nothing remains in the folder of something else, nor where an error came before the first shard.
    """

    def __init__(self, run: Path, rank: int) -> None:
        self.run, self.path = run, run / LOGS / f"rank-{rank}.log"
        self._waiting: list[str] = []
        self._file: TextIO | None = None

    def write(self, text: str) -> int:
        if self._file is not None:
            return self._file.write(text)
        self._waiting.append(text)
        self._begin()
        return len(text)

    def close(self) -> None:
        if self._file is None and self._waiting:
            self._begin()
        if self._file is not None:
            self._file.close()
        super().close()

    def _begin(self) -> None:
        if not os.path.exists(self.run / MANIFEST_FILE) and next((self.run / PARTS).rglob(MANIFEST_FILE), None) is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("a", encoding="utf-8", buffering=1)
        self._file.write("".join(self._waiting))
