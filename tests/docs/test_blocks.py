"""Every block of code on the pages runs as it stands, in order, a page in one namespace and one folder.

Python is executed, and prints what the ``text`` block behind it says. Commands of `funcattrib` are run, on the tiny
models and data of ``page_inputs``; of other programs it is checked that what they are given exists.
"""

import io
import re
import sys
import tomllib
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch

from funcattrib.cli.arguments import parse
from funcattrib.cli.main import COMMANDS, main
from tests.support.page_inputs import NAMES, lay_out
from tests.support.pages import PAGES, ROOT, Block, blocks_of, commands_of, inline_code, text_of

# Every block with a mark <!-- not run: … -->, as (page, the block's first line).
NOT_RUN: set[tuple[str, str]] = set()

# Read as words beside code, not as programs.
PROSE = {"", "text", "json", "yaml", "mermaid"}

# Given beside what a page says, where the real size would take too long.
SMALLER = {"quickstart": ["--people", "6", "--epochs", "1"], "trak": ["--sketch-dim", "8"]}


@pytest.fixture(scope="module")
def laid_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pages")
    lay_out(folder)
    return folder


WITH_BLOCKS = [page for page in PAGES if any(block.language not in PROSE for block in blocks_of(page))]
COMPILED = "docs/jax.md"
"""The page whose every block JAX compiles."""


@pytest.mark.parametrize(
    "page", [pytest.param(page, marks=pytest.mark.slow if page == COMPILED else ()) for page in WITH_BLOCKS]
)
def test_blocks(page: str, laid_out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for entry in laid_out.iterdir():
        (tmp_path / entry.name).symlink_to(entry)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    names = {"__name__": "page", **NAMES.get(page, dict)()}
    try:
        run_blocks(page, names)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def run_blocks(page: str, names: dict[str, Any]) -> None:
    for block in blocks_of(page):
        if block.language == "python" and block.not_run is None:
            run_python(block, names)
        elif block.language == "bash":
            for words in commands_of(block):
                PROGRAMS[words[0]](words[1:], block.not_run is None)
        else:
            assert block.language in PROSE or block.not_run, f"{page}:{block.line}: a block in {block.language!r}"


def run_python(block: Block, names: dict[str, Any]) -> None:
    """Execute a block; a traceback names the page and its line."""
    code = compile("\n" * (block.line - 1) + block.code, str(ROOT / block.page), "exec")
    with redirect_stdout(io.StringIO()) as printed:
        exec(code, names)
    if block.printed is not None:
        assert printed.getvalue().rstrip() == block.printed.rstrip(), f"{block.page}:{block.line}"


def run_funcattrib(words: list[str], run: bool) -> None:
    command, *flags = words
    if command.startswith("-"):
        assert words in (["--help"], ["--version"])
    elif flags == ["--help"]:
        assert command in COMMANDS
    elif run:
        stdin, sys.stdin = sys.stdin, io.StringIO()
        try:
            assert main([*words, *SMALLER.get(command, [])]) == 0, words
        finally:
            sys.stdin = stdin
    else:
        parse(get_type_hints(import_module(COMMANDS[command].module).run)["config"], flags, command=command)


def check_make(words: list[str], run: bool) -> None:
    targets = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()
    assert words
    assert set(words) <= set(targets)


def check_pip(words: list[str], run: bool) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert words[0] == "install"
    for word in words[1:]:
        name, named = re.fullmatch(r"(\.|funcattrib)(?:\[([\w,]+)\])?", word).groups()
        assert set((named or "cpu").split(",")) <= set(extras), word


def check_python(words: list[str], run: bool) -> None:
    """A file of the repository, or a module that is there (`-m funcattrib` with flags that parse)."""
    while words[0].startswith("--"):  # of torchrun
        words = words[1:] if "=" in words[0] else words[2:]
    if words[0] != "-m":
        assert (ROOT / words[0]).is_file(), words
    elif words[1] == "funcattrib":
        run_funcattrib(words[2:], False)
    else:
        assert find_spec(words[1]), words


PROGRAMS: dict[str, Callable[[list[str], bool], None]] = {
    "funcattrib": run_funcattrib,
    "make": check_make,
    "pip": check_pip,
    "python": check_python,
    "torchrun": check_python,
}


def test_blocks_that_are_not_run() -> None:
    """Few, and each for a reason that a reader of the page's source sees."""
    found = {(page, b.code.splitlines()[0]) for page in PAGES for b in blocks_of(page) if b.not_run is not None}
    assert found == NOT_RUN


@cache
def flags_of(command: str) -> set[str]:
    """Every flag of a command, by hyphens."""
    with redirect_stdout(io.StringIO()) as printed, pytest.raises(SystemExit):
        main([command, "--help"])
    return {word.replace("_", "-") for word in re.findall(r"--[a-z][\w-]*", printed.getvalue())}


@pytest.mark.parametrize("page", [page for page in PAGES if page != "docs/bergson.md"])
def test_flags_in_prose_exist(page: str) -> None:
    every = {command: flags_of(command) for command in COMMANDS}
    anywhere = set().union(*every.values()) | {"--help", "--version", "--config"}
    for span in inline_code(page):
        words = span.split()
        if not re.match(r"funcattrib [a-z]|--[a-z]", span):
            continue
        known = every.get(words[1], anywhere) if words[0] == "funcattrib" else anywhere
        wrong = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", span)) - known - {"--config"}
        assert not wrong, f"{page}: `{span}`"
        assert words[0] != "funcattrib" or words[1] in COMMANDS, f"{page}: `{span}`"


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    """As the repository shows them; the site's own are checked when it is built."""
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", re.sub(r"`[^`\n]*`", "", text_of(page))):
        if not re.match(r"[a-z]+:", target):
            assert ((ROOT / page).parent / target).exists(), f"{page}: {target}"
