"""The page for those who come from Bergson: what it names on this side exists."""

import importlib
import re

import pytest

import funcattrib
from funcattrib.cli.main import COMMANDS
from tests.docs.test_blocks import flags_of
from tests.support.pages import text_of

ROWS = re.findall(r"^\| (?!Bergson \||---)(.+?) \| (.+?) \| (.*?) ?\|$", text_of("docs/bergson.md"), re.MULTILINE)
OURS = sorted({span for row in ROWS for span in re.findall(r"`([^`]+)`", row[1])})
MENTIONED = sorted({span for row in ROWS for span in re.findall(r"`((?:--|fa\.|funcattrib )[^`]+)`", row[2])})


@pytest.mark.parametrize("span", sorted({*OURS, *MENTIONED}))
def test_counterpart_exists(span: str) -> None:
    if span.startswith("funcattrib "):
        command = span.split()[1]
        assert command in COMMANDS
        assert set(re.findall(r"--[\w-]+", span)) <= flags_of(command) | {"--config"}
    elif span.startswith("--"):
        every = set().union(*(flags_of(command) for command in COMMANDS))
        assert set(re.findall(r"(?<!\S)--[\w-]+", span)) <= every
    else:
        package, *names = span.split(".")
        assert package == "fa", f"{span}: neither a flag, a command nor a name of the package"
        found = funcattrib
        for number, name in enumerate(names):
            if not hasattr(found, name):
                importlib.import_module(".".join(["funcattrib", *names[: number + 1]]))
            found = getattr(found, name)


def test_rows_name_a_counterpart_or_say_that_there_is_none() -> None:
    assert len(ROWS) > 80
    for theirs, ours, _ in ROWS:
        assert "`" in ours or ours in ("none", "keyword arguments"), theirs


def test_every_command_is_named() -> None:
    named = {span.split()[1] for span in OURS if span.startswith("funcattrib ")}
    assert named == set(COMMANDS)
