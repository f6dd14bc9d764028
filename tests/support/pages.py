"""The pages, README.md and docs/, and their code blocks."""

import re
import shlex
import textwrap
from itertools import dropwhile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PAGES = ["README.md", *sorted(str(page.relative_to(ROOT)) for page in (ROOT / "docs").rglob("*.md"))]

_BLOCK = re.compile(
    r"(?:^ *<!-- not run: (?P<reason>[^\n]+?) -->\n)?"
    r"^(?P<indent> *)```(?P<language>\w*)[^\n]*\n(?P<code>.*?)^(?P=indent)```$"
    r"(?:\s*^(?P=indent)```text\n(?P<printed>.*?)^(?P=indent)```$)?",
    re.MULTILINE | re.DOTALL,
)


class Block(NamedTuple):
    """One fenced block of code.

    Attributes:
        page: its path in the repository.
        line: where in the page its first line of code is.
        not_run: why it is not run, from a comment ``<!-- not run: reason -->`` above it.
        printed: what it prints, from a ``text`` block right behind it.
    """

    page: str
    line: int
    language: str
    code: str
    not_run: str | None
    printed: str | None


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks_of(page: str) -> list[Block]:
    """The page's blocks in order."""
    text = text_of(page)
    return [
        Block(
            page,
            text.count("\n", 0, found.start("code")) + 1,
            found["language"],
            textwrap.dedent(found["code"]),
            found["reason"],
            None if found["printed"] is None else textwrap.dedent(found["printed"]),
        )
        for found in _BLOCK.finditer(text)
    ]


def commands_of(block: Block) -> list[list[str]]:
    """The command lines of a bash block, each as its words; comments and leading VARIABLE=value are left out."""
    lines = block.code.replace("\\\n", " ").splitlines()
    commands = [shlex.split(line, comments=True) for line in lines]
    return [list(dropwhile(re.compile("[A-Z_]+=").match, words)) for words in commands if words]


def inline_code(page: str) -> list[str]:
    """The page's `spans` of code, blocks left out."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"^ *```.*?^ *```$", "", text_of(page), flags=re.MULTILINE | re.DOTALL))
