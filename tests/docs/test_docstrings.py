"""Docstrings of the house form: a line that says what it is, every argument, and an example that runs."""

import ast
import doctest
import importlib
import inspect
import re
from collections.abc import Iterator
from itertools import pairwise

import pytest

import funcattrib
from tests.docs.test_site import PUBLIC
from tests.support.pages import ROOT

VALUES = {
    "Grads",
    "Spec",
    "per_example_grad",
    "per_token_grad",
    "Readouts",
    "IGNORED",
    "SCORE_CONVENTION",
    "__version__",
}
"""Public names that are no functions or classes of this library; a string after the assignment says what they are."""

ERRORS = {"DataError", "StoreError", "ChainError"}
"""Shown by the error that they are kinds of."""

COMMON = {"model", "loss", "params", "data", "overwrite", "config", "path", "settings", "source", "gradients"}
"""Arguments that mean the same wherever they are; ``collect_gradients`` describes them."""

VERBS = """
Add Agree Answer Append Apply Assign Begin Build Cache Call Cast Chain Check Collect Compare Compose Compute Convert
Copy Count Create Cut Decode Defer Dequantise Divide Draw Drop Encode End Estimate Explain Fill Find Fit Fold Format
Gather Give Group Hand Hash Import Invent Join Keep Lay List Load Look Lower Make Map Mark Match Merge Multiply Open
Poll Prepare Print Project Put Quantise Raise Read Rebuild Reduce Refuse Register Release Remove Render Replace
Report Reshape Restrict Return Run Save Scale Score Search Select Set Show Silence Sketch Stack Store Sum Take Tap
Tokenise Train Turn Wait Write Yield
"""
"""First words of the docstrings of public functions; a new one is added here on purpose."""

CONFIGS = {"RowConfig", "FittedConfig", "GradientConfig"}
"""Groups of flags: each field is described by the string after it, which ``--help`` shows too."""

FIRST = sorted(
    {name for package, name in PUBLIC if package in ("funcattrib", "funcattrib.transforms")} - VALUES - CONFIGS
)
REST = sorted({(package, name) for package, name in PUBLIC if name not in VALUES})


@pytest.mark.parametrize(("package", "name"), REST)
def test_begins_with_a_sentence(package: str, name: str) -> None:
    text = inspect.getdoc(getattr(importlib.import_module(package), name)) or ""
    summary = text.partition("\n\n")[0]
    assert summary.endswith((".", ":")), summary
    assert len(summary.splitlines()) <= 5


@pytest.mark.parametrize("name", FIRST)
def test_has_an_example_and_names_its_arguments(name: str) -> None:
    thing = getattr(funcattrib, name, None) or getattr(funcattrib.transforms, name)
    text = inspect.getdoc(thing) or ""
    assert ">>> " in text or name in (*ERRORS, "AdamState"), "an example"
    if name not in (*ERRORS, "FuncattribError"):
        for argument in inspect.signature(thing).parameters.keys() - COMMON:
            assert re.search(rf"\b{argument}\b", text), argument


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_every_field_of_a_group_of_flags_is_described(name: str) -> None:
    tree = ast.parse((ROOT / "funcattrib/runs/config.py").read_text(encoding="utf-8"))
    body = next(node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
    for node, following in pairwise(body):
        if isinstance(node, ast.AnnAssign):
            assert isinstance(getattr(following, "value", None), ast.Constant), ast.unparse(node)
            assert isinstance(following, ast.Expr), ast.unparse(node)


def behind(package: str, name: str) -> tuple[str, dict]:
    """The string behind the assignment of a public name, wherever it is made, and the names around it."""
    for path in sorted((ROOT / "funcattrib").rglob("*.py")):
        body = ast.parse(path.read_text(encoding="utf-8")).body
        for node, following in pairwise(body):
            if (
                isinstance(node, ast.Assign)
                and ast.unparse(node.targets[0]) == name
                and isinstance(following, ast.Expr)
            ):
                module = importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
                return ast.literal_eval(following.value), vars(module)
    raise AssertionError(f"{package}.{name}: nothing behind its assignment")


@pytest.mark.parametrize(("package", "name"), sorted({p for p in PUBLIC if p[1] in VALUES - {"__version__"}}))
def test_values_are_described(package: str, name: str) -> None:
    """By a string behind the assignment, whose examples doctest by itself does not find."""
    text, around = behind(package, name)
    assert text.partition("\n")[0].endswith(".")
    test = doctest.DocTestParser().get_doctest(text, dict(around), name, None, 0)
    failed, _ = doctest.DocTestRunner().run(test)
    assert not failed
    assert test.examples or not name.endswith("_grad")


MODULES = sorted((ROOT / "funcattrib").rglob("*.py"), key=str)


def first_words(node: ast.AST) -> Iterator[tuple[str, str]]:
    """Name and first word of every public function, method and property below ``node`` that has a docstring."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.ClassDef, ast.FunctionDef)) and not child.name.startswith("_"):
            if isinstance(child, ast.ClassDef):
                yield from first_words(child)
            elif text := ast.get_docstring(child):
                yield child.name, text.split()[0].strip(".,:;")
        elif isinstance(child, (ast.If, ast.Try)):
            yield from first_words(child)


def test_functions_begin_with_a_verb() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}: {name}: {word}"
        for path in MODULES
        if not path.stem.startswith("_") or path.stem == "__init__"
        for name, word in first_words(ast.parse(path.read_text(encoding="utf-8")))
        if word not in VERBS.split()
    ]
    assert not wrong


def test_flags_are_described_in_one_line() -> None:
    """``--help`` would keep the line breaks."""
    broken = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in (*(ROOT / "funcattrib/cli").glob("*.py"), ROOT / "funcattrib/runs/config.py")
        for config in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(config, ast.ClassDef)
        for field, node in pairwise(config.body)
        if isinstance(field, ast.AnnAssign) and isinstance(node, ast.Expr) and node.end_lineno != node.lineno
    ]
    assert not broken


def test_no_docstring_begins_with_a_question() -> None:
    """Of modules, classes, fields and values either; private ones too."""
    wrong = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
        and re.match(r"\s*(What|Whether|How|Of|Where|Which|Who|When)\b", node.value.value)
    ]
    assert not wrong
