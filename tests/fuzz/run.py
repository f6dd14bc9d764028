"""Runs attempts in child processes, so that one that dies is found, and says what went wrong."""

import contextlib
import io
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import traceback
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import NamedTuple

from tests.fuzz.targets import TARGETS, Command, prepare

SECONDS = 120
MEMORY = 10 << 30


class Finding(NamedTuple):
    """What went wrong with one input: of which target, its number, and the last lines."""

    target: str
    number: int
    what: str


class _TooLong(BaseException):
    """Not to be caught by what is fuzzed."""


def run_command(command: Command) -> tuple[int, str]:
    """Run a command in this process; return its exit code and its output without times."""
    from funcattrib.cli.main import main

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main([str(word) for word in command])
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 2
    return int(code or 0), out.getvalue()


def fuzz(base: Path, target: str, numbers: Sequence[int], seed: int = 0) -> Iterator[Finding]:
    """Yield what goes wrong on the inputs of these numbers, in children that each take as many as they survive."""
    remaining = list(numbers)
    while remaining:
        with tempfile.TemporaryDirectory() as folder:
            log = Path(folder) / "log"
            child = os.fork()
            if not child:
                _child(base, target, remaining, seed, log, Path(folder))
            _, status = os.waitpid(child, 0)
            lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
        done = [line["number"] for line in lines if "what" in line]
        yield from (Finding(target, line["number"], line["what"]) for line in lines if line.get("what"))
        begun = lines[-1]["number"] if lines else remaining[0]
        if begun not in done:
            yield Finding(target, begun, f"the process died: status {status}")
            done.append(begun)
        remaining = [number for number in remaining if number not in done]


def made(base: Path) -> None:
    """Make the good inputs in a child, so that no thread of a library is alive when others are forked."""
    child = os.fork()
    if not child:
        try:
            prepare(base, run_command)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, "the good inputs could not be made"


def _child(base: Path, target: str, numbers: Sequence[int], seed: int, log: Path, folder: Path) -> None:
    """Try the inputs, with a line before and after each; never returns."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.chdir(folder)
    signal.signal(signal.SIGALRM, _stop)
    with log.open("a") as out:
        for number in numbers:
            print(json.dumps({"number": number}), file=out, flush=True)
            here = folder / str(number)
            here.mkdir()
            what = _attempt(base, target, number, seed, here)
            print(json.dumps({"number": number, "what": what}), file=out, flush=True)
            shutil.rmtree(here, ignore_errors=True)
    os._exit(0)


def _attempt(base: Path, target: str, number: int, seed: int, here: Path) -> str:
    """Return what went wrong with one input, or nothing."""
    draw = Random(zlib.crc32(f"{seed} {target} {number}".encode()))
    attempt = TARGETS[target](base, here, draw)
    said, code, command = "", 0, attempt.commands[0]
    signal.alarm(SECONDS)
    try:
        for command in attempt.commands:
            code, said = run_command(command)
            if code:
                break
    except _TooLong:
        return f"{_shown(command)}: more than {SECONDS} s"
    except BaseException as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return f"{_shown(command)}: {type(error).__name__}: {error!s:.200} ({where.filename}:{where.lineno})"
    finally:
        signal.alarm(0)
    if (here / "mark").exists():
        return f"{_shown(command)}: code was run"
    another = not code and attempt.verify and said != (base / "answer.txt").read_text()
    if another and not run_command(("inspect", attempt.verify, "--verify"))[0]:
        return f"{_shown(command)}: succeeds with another answer:\n{said}"
    return ""


def _shown(command: Command) -> str:
    return " ".join(Path(str(word)).name if os.path.sep in str(word) else repr(str(word)) for word in command)


def _stop(*_: object) -> None:
    raise _TooLong


def main() -> None:
    """Fuzz as many inputs as asked for: ``python -m tests.fuzz 20000 [SEED] [TARGET …]``."""
    count, seed = int(sys.argv[1]), int(sys.argv[2]) if sys.argv[2:] else 0
    targets = sys.argv[3:] or list(TARGETS)
    found = 0
    with tempfile.TemporaryDirectory() as folder:
        made(Path(folder))
        for target in targets:
            for finding in fuzz(Path(folder), target, range(count // len(targets)), seed):
                found += 1
                print(f"{finding.target} {finding.number}: {finding.what}", flush=True)
            print(f"{target}: {count // len(targets)} inputs", flush=True)
    print(f"{found} findings")
    raise SystemExit(bool(found))
