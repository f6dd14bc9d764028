"""The page on errors: its complete list is the source's, and every message in front exists."""

import re
import sys
from functools import cache

import pytest

from tests.support.pages import ROOT, text_of

sys.path.insert(0, str(ROOT / "docs"))
import messages as source

PAGE = "docs/troubleshooting.md"


@cache
def front() -> dict[str, re.Pattern[str]]:
    return source.patterns(source.parts(text_of(PAGE))[0])


def test_the_complete_list_is_as_the_source_is() -> None:
    assert source.parts(text_of(PAGE))[1] == source.listed(), "write it again: python docs/messages.py"


@pytest.mark.parametrize("span", front())
def test_the_source_has_what_stands_in_front(span: str) -> None:
    assert any(front()[span].match(source.shown(message.text)) for message in source.messages())


@pytest.mark.parametrize("span", front())
def test_what_stands_in_front_says_something(span: str) -> None:
    """It has words that are not in every message, or it would match any."""
    words = re.sub(r"\b(expected|found|needs|a|an|the|of|in|at|and|or)\b|[^a-z]", "", span)
    assert len(words) >= 5


def test_every_message_is_listed_that_a_plain_search_finds() -> None:
    """The collection would fail if it lost some: nearly as many as there are constructors, from every kind of place."""
    text = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "funcattrib").rglob("*.py"))
    kinds = "|".join(name for name in source.MADE_BY if name.endswith("Error"))
    assert len(source.messages()) > 0.9 * len(re.findall(rf"\b(?:{kinds})\(", text))
    texts = [message.text for message in source.messages()]
    for beginning in (
        "--query-path and --query-dataset",  # from a table of conditions
        "has no moments for",  # a stage's error, which the chain words
        f"{source.HOLE} cannot be written: {source.HOLE} (",  # returned by a function
        "the loss is NaN",  # a warning
        f"{source.HOLE}: `{source.HOLE}` has no setting",  # a function's return, from another function's argument
    ):
        assert any(text.startswith(beginning) for text in texts), beginning
