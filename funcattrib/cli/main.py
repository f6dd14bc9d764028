"""The `funcattrib` command: chooses the command, reads its flags into its configuration, runs it.

A command is one module with a function `run(config: SomeConfig) -> int | None`. The type of that parameter, a frozen
dataclass, is what the flags are read into, and its docstring is the help. This file imports neither torch nor a
command's module until that command is asked for.
"""

import difflib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any, NamedTuple, get_type_hints

from funcattrib.errors import FuncattribError
from funcattrib.runtime.launcher import launched
from funcattrib.runtime.signals import EXIT_CODE as TERMINATED
from funcattrib.runtime.signals import Terminated, terminating
from funcattrib.version import __version__


class Command(NamedTuple):
    """One row of the table of commands.

    Args:
        module: Where `run` is; imported when the command or its help is asked for.
        summary: One line for `funcattrib --help`: the first line of the configuration's docstring.
        resumable: Whether the same command, given again, continues an interrupted run.
        together: Whether the processes that torchrun starts share its work.
    """

    module: str
    summary: str
    resumable: bool = False
    run_distributed: bool = False


COMMANDS: dict[str, Command] = {
    "build": Command(
        "funcattrib.cli.build",
        "Compute every training example's gradient and store it in RUN.",
        resumable=True,
        run_distributed=True,
    ),
    "fit": Command(
        "funcattrib.cli.fit",
        "Fit the statistics of a chain of transforms and keep them in RUN.",
        resumable=True,
        run_distributed=True,
    ),
    "reduce": Command(
        "funcattrib.cli.reduce",
        "Reduce a data set's gradients to one row, a query for `funcattrib score`.",
        resumable=True,
        run_distributed=True,
    ),
    "score": Command(
        "funcattrib.cli.score",
        "Score every training example against query gradients, in one pass; none are stored.",
        resumable=True,
        run_distributed=True,
    ),
    "query": Command(
        "funcattrib.cli.query", "Find the training examples whose gradients align with a text's.", run_distributed=True
    ),
    "trackstar": Command(
        "funcattrib.cli.trackstar",
        "Score every training example against a data set of queries, by TrackStar.",
        resumable=True,
        run_distributed=True,
    ),
    "less": Command(
        "funcattrib.cli.less",
        "Score training examples by LESS, and select those that a task's queries ask for.",
        resumable=True,
        run_distributed=True,
    ),
    "trak": Command(
        "funcattrib.cli.trak",
        "Score every training example against a data set of queries, by TRAK over checkpoints.",
        resumable=True,
        run_distributed=True,
    ),
    "merge": Command(
        "funcattrib.cli.merge", "Join the parts of a run, from machines without a shared folder, into one store."
    ),
    "inspect": Command("funcattrib.cli.inspect", "Say what RUN holds, and whether it is whole."),
    "check": Command("funcattrib.cli.check", "Check that a model's gradients do not depend on their batch."),
    "plan": Command(
        "funcattrib.cli.plan", "Estimate the time, storage and memory of a build from the model's configuration."
    ),
    "quickstart": Command(
        "funcattrib.cli.quickstart",
        "Train a tiny model on invented facts, and find the sentences that its answers come from.",
    ),
}

_LONGEST = 200  # characters of a file's name in an error


def main(argv: Sequence[str] | None = None, commands: Mapping[str, Command] = COMMANDS) -> int:
    """Run one command line.

    Args:
        argv: The words after `funcattrib`; by default those of this process.
        commands: Name -> command.

    Returns:
        The exit code: 0, or what the command returned; 2 for an error that is the reader's to mend, of the operating
        system about a file too (its message goes to stderr); 130 after Ctrl-C; 143 after SIGTERM; 141 when nobody reads
        the output. Any other exception is a bug, and keeps its traceback.

    Raises:
        SystemExit: After `--help` of a command (code 0) and for flags that do not parse (code 2).
    """
    words = sys.argv[1:] if argv is None else argv
    if (wrong := next((word for word in words if not _is_text(word)), None)) is not None:
        print(f"funcattrib: the argument {wrong!a} is no text that a file name may have", file=sys.stderr)
        return 2
    try:
        code = _dispatch(*words, commands=commands)
        sys.stdout.flush()  # here, where a closed pipe is still caught
    except BrokenPipeError:
        # The reader of our output has gone, as in `funcattrib inspect RUN | head`: nothing remains to say.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return code


def _is_text(word: str) -> bool:
    """Return whether the operating system could have handed over this word: not half a character, nor a zero byte."""
    try:
        return b"\0" not in os.fsencode(word)
    except UnicodeEncodeError:
        return False


def _dispatch(name: str = "", *args: str, commands: Mapping[str, Command]) -> int:
    if name in ("-h", "--help"):
        print(_overview(commands))
        return 0
    if name == "--version":
        print(f"funcattrib {__version__}")
        return 0
    if name not in commands:
        print(_not_a_command(name, commands), file=sys.stderr)
        return 2
    cure = " What is finished is kept: the same command continues it." if commands[name].resumable else ""
    try:
        with terminating():
            return _run(name, commands[name], args)
    except FuncattribError as error:
        print(f"funcattrib {name}: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        raise
    except OSError as error:
        if error.filename is None:
            raise
        print(f"funcattrib {name}: {_short(str(error.filename))}: {error.strerror}.{cure}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nfuncattrib {name}: interrupted.{cure}", file=sys.stderr)
        return 130
    except Terminated:
        print(f"funcattrib {name}: ended by SIGTERM.{cure}", file=sys.stderr)
        return TERMINATED


def _run(name: str, command: Command, args: Sequence[str]) -> int:
    run: Callable[[Any], int | None] = import_module(command.module).run
    config_type = get_type_hints(run)["config"]
    from funcattrib.cli.arguments import parse  # tyro: not needed for `funcattrib --help`

    if not (command.run_distributed and launched()):
        return run(parse(config_type, args, command=name)) or 0
    from funcattrib.cli.multi_process import rank_zero_reports, run_distributed

    with rank_zero_reports():
        config = parse(config_type, args, command=name)
    return run_distributed(run, config)


def _overview(commands: Mapping[str, Command]) -> str:
    width = max(map(len, commands))
    return "\n".join(
        [
            "usage: funcattrib COMMAND …",
            "",
            "Which training examples made a model behave as it does? Ask their gradients.",
            "",
            *(f"  {name:{width}}  {command.summary}" for name, command in commands.items()),
            "",
            "`funcattrib COMMAND --help` says more; `--config RUN/config.yaml` repeats an earlier run.",
        ]
    )


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST else f"{name[:_LONGEST]}…"


def _not_a_command(name: str, commands: Mapping[str, Command]) -> str:
    if not name:
        return _overview(commands)
    near = difflib.get_close_matches(name, commands, n=1)
    cure = f"did you mean `{near[0]}`?" if near else f"choose from {', '.join(commands)}."
    return f"funcattrib: unknown command {name!r}; {cure}"
