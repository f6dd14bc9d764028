"""The page on the architecture: its plan is the imports', and what it names exists."""

import ast
import re
import sys

import pytest

from tests.support.pages import ROOT, text_of

sys.path.insert(0, str(ROOT / "docs"))
import plan

PATH = re.compile(r"`((?:\w+/)*\w+\.py)`(?:\s+`(\w+)`)?")
NAMED = sorted(set(PATH.findall(text_of("docs/architecture.md"))))


def test_the_plan_is_as_the_imports_are() -> None:
    assert plan.PLAN.read_text(encoding="utf-8") == plan.draw(), "draw it again: python docs/plan.py"


def test_every_room_is_on_the_plan() -> None:
    assert {path.parent.name for path in (ROOT / "funcattrib").glob("*/__init__.py")} == set(plan.ROOMS)


@pytest.mark.parametrize(("path", "name"), NAMED)
def test_what_the_page_names_exists(path: str, name: str) -> None:
    tree = ast.parse((ROOT / "funcattrib" / path).read_text(encoding="utf-8"))
    kinds = (ast.FunctionDef, ast.ClassDef)
    assert not name or any(isinstance(node, kinds) and node.name == name for node in ast.walk(tree)), (path, name)


def test_the_page_names_the_walk() -> None:
    """That the pattern sees what it is meant to see."""
    assert {("cli/main.py", "main"), ("store/writer.py", "put"), ("report/table.py", "hits_table")} <= set(NAMED)
