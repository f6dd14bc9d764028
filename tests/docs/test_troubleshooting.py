"""The page on errors: every message of the source matches a pattern on it, and every pattern a message."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import pytest

from tests.support.pages import ROOT, text_of

ERRORS = {"FuncattribError", "DataError", "StoreError", "ChainError"}
HOLE = "\0"
"""What stands in a message for a value."""


class Message(NamedTuple):
    """A text that a reader may meet, and where it is made."""

    where: str
    text: str


def literal(node: ast.AST) -> str:
    """A string as the source writes it, with a hole for each value."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=parts):
            return "".join(map(literal, parts))
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return literal(left) + literal(right)
    return HOLE


def called(node: ast.Call) -> str:
    function = node.func
    return function.id if isinstance(function, ast.Name) else getattr(function, "attr", "")


@cache
def messages() -> tuple[Message, ...]:
    """Every error and warning of the source: what is given to an error or a warning, and each text "expected …"."""
    found = {}
    for path in sorted((ROOT / "funcattrib").rglob("*.py")):
        for line, text in texts_in(ast.parse(path.read_text(encoding="utf-8"))):
            text = re.sub(r"%(?:\.\d+)?[sd]", HOLE, text)
            if text.replace(HOLE, "").strip():
                found.setdefault(text, Message(f"{path.relative_to(ROOT)}:{line}", text))
    return tuple(found.values())


def texts_in(tree: ast.Module) -> Iterator[tuple[int, str]]:
    inside = {part for node in ast.walk(tree) if isinstance(node, ast.JoinedStr | ast.BinOp) for part in children(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and node.args and called(node) in {*ERRORS, "warning", "warn"}:
            yield node.lineno, literal(node.args[0])
        elif node not in inside and re.match(f"({HOLE}: )?expected ", text := literal(node)):
            yield node.lineno, text


def children(node: ast.AST) -> Iterator[ast.AST]:
    return (part for part in ast.walk(node) if part is not node)


@cache
def patterns() -> dict[str, re.Pattern[str]]:
    """Those in the first column of the page's tables, `…` standing for anything."""
    rows = re.findall(r"^\| (`.*?`) \| ", text_of("docs/troubleshooting.md"), re.MULTILINE)
    spans = [span for row in rows for span in re.findall(r"`([^`]+)`", row)]
    assert len(spans) == len(set(spans))
    return {span: re.compile(re.escape(span).replace("…", ".*?"), re.DOTALL) for span in spans}


VAGUE = {
    "…: expected …, found ….": "cli/config_file.py",
    "…: …": "store/manifest.py",
    "stage … (…) …": "chain/chain.py",
    "expected one of …, found …": "losses/causal_lm.py",
    "expected …; found no …": "data/read.py",
    "expected …, found: …": "data/read.py",
    "expected …, found …, which cannot be read": "data/read.py",
    "… is unfinished: …": "store/reader.py",
}
"""Patterns that would match much else: each speaks for one file alone."""


def matching(message: Message) -> list[str]:
    return [
        span
        for span, pattern in patterns().items()
        if pattern.match(message.text) and VAGUE.get(span, "") in message.where
    ]


@pytest.mark.parametrize("message", messages(), ids=lambda message: message.where)
def test_the_page_has(message: Message) -> None:
    assert matching(message), f"{message.where}: put {message.text.replace(HOLE, '…')!r} on docs/troubleshooting.md"


def test_the_source_has_every_pattern() -> None:
    used = {span for message in messages() for span in matching(message)}
    assert not patterns().keys() - used


def test_patterns_say_something() -> None:
    """Apart from a few, each has words of its own."""
    for span in patterns().keys() - VAGUE.keys():
        own = re.sub(r"\b(expected|found|needs|a|an|the|of|in|at|and|or)\b|[^a-z]", "", span)
        assert len(own) >= 5, span


def test_the_collection_sees_errors() -> None:
    """That it would fail: as many as a plain search for their constructors finds, and from every kind of place."""
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "funcattrib").rglob("*.py"))
    assert len(messages()) > 0.9 * len(re.findall(rf"\b(?:{'|'.join(ERRORS)})\(", source))
    texts = [message.text for message in messages()]
    for beginning in ("expected --query-path or", "needs moments of", "expected room to write", "the loss is NaN"):
        assert any(text.startswith(beginning) for text in texts), beginning
