"""A command run by several processes: rank 0 speaks for all, the others write a log of their own."""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from io import TextIOBase
from pathlib import Path
from typing import Any, TextIO

from funcattrib.distributed import joined
from funcattrib.errors import FuncattribError
from funcattrib.launcher import rank
from funcattrib.signals import EXIT_CODE, Terminated
from funcattrib.store.create import LOGS
from funcattrib.store.manifest import FILE


def together(run: Callable[[Any], int | None], config: Any) -> int:
    """Run a command as one of the processes that a launcher started.

    Of one error that all of them meet, the first alone tells.
    """
    folder = Path(getattr(config, "run", None) or config.out)
    with joined() as world, ExitStack() as apart:
        if not world.leads:
            log: Any = apart.enter_context(Log(folder / LOGS / f"rank-{world.rank}.log"))
            apart.enter_context(redirect_stdout(log))
            apart.enter_context(redirect_stderr(log))
        try:
            return run(config) or 0
        except FuncattribError as error:
            if not world.fail(str(error)):
                return 2
            raise FuncattribError(str(error) if world.leads else f"rank {world.rank}: {error}") from error
        except Terminated:
            if world.leads:
                raise
            return EXIT_CODE
        except BaseException as error:
            world.fail(f"{type(error).__name__}: {error}")
            raise


@contextmanager
def first_tells() -> Iterator[None]:
    """For what goes wrong in all processes alike, before they know of each other: rank 0 says it, the others end."""
    if rank() == 0:
        yield
        return
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        try:
            yield
        except FuncattribError:
            raise SystemExit(2) from None


class Log(TextIOBase):
    """A text file that is made when something is written to it, beside a run: never in a folder of something else."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: TextIO | None = None

    def write(self, text: str) -> int:
        if self._file is None:
            run = self.path.parents[1]
            if run.exists() and not (run / FILE).exists() and any(run.iterdir()):
                return len(text)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a", encoding="utf-8", buffering=1)
        return self._file.write(text)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        super().close()
