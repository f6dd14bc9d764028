"""List every error and warning of the package, from its source, below the fold of docs/troubleshooting.md.

python docs/messages.py
"""

import ast
import itertools
import re
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import NamedTuple, get_type_hints

from funcattrib.cli.flags import setting_names, with_flags
from funcattrib.cli.main import COMMANDS

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/troubleshooting.md"
PACKAGE = ROOT / "funcattrib"
BEGIN, END = "<!-- messages.py: begin -->\n", "<!-- messages.py: end -->\n"
MADE_BY = {"FuncattribError", "DataError", "StoreError", "ChainError", "ImportError", "IndexError", "warning", "warn"}
"""Calls whose first argument is a message."""
HOLE = "\0"
"""Stands in a message for a value."""


class Message(NamedTuple):
    """A text that a reader may meet, and the file and line that make it."""

    file: str
    line: int
    text: str


@cache
def messages() -> tuple[Message, ...]:
    """Return each text once: what is given to an error or a warning, and every other literal ``expected …``."""
    found: dict[str, Message] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        for line, text in _Source(ast.parse(path.read_text(encoding="utf-8"))).texts():
            text = with_flags(re.sub(r"%(?:\.\d+)?[sd]", HOLE, text), _settings())
            if re.search("[a-z]", text):
                found.setdefault(text, Message(str(path.relative_to(PACKAGE)), line, text))
    return tuple(found.values())


@cache
def _settings() -> frozenset[str]:
    """Return the names of all commands' settings, which messages name by their flags."""
    runs = [import_module(command.module).run for command in COMMANDS.values()]
    return frozenset(name for run in runs for name in setting_names(get_type_hints(run)["config"]))


class _Source:
    """One file's tree, in which a message is followed from the call back to its literals."""

    def __init__(self, tree: ast.Module) -> None:
        self.tree = tree
        self.parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
        self.functions = {
            node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        }

    def texts(self) -> Iterator[tuple[int, str]]:
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Call) and node.args and _called(node) in MADE_BY:
                yield from ((node.lineno, text) for text in self.literals(node.args[0]))
            elif isinstance(node, ast.Call) and _called(node) == "refuse":  # a table of (condition, message)
                rules = [rule.elts[1] for rule in node.args if isinstance(rule, ast.Tuple)]
                yield from ((rule.lineno, text) for rule in rules for text in self.literals(rule))
            elif isinstance(node, ast.Constant | ast.JoinedStr | ast.BinOp) and not isinstance(
                self.parents.get(node), ast.JoinedStr | ast.BinOp
            ):
                yield from (
                    (node.lineno, text) for text in self.literals(node) if re.match(f"({HOLE}: )?expected ", text)
                )

    def literals(self, node: ast.AST | None, seen: frozenset[ast.AST] = frozenset()) -> list[str]:
        """Return the strings that an expression may be, with a hole for each value."""
        if node in seen:
            return []
        seen |= {node} if node is not None else set()
        match node:
            case ast.Constant(value=str(text)):
                return [text]
            case ast.JoinedStr(values=parts):
                return ["".join(part.value if isinstance(part, ast.Constant) else HOLE for part in parts)]
            case ast.BinOp(left=left, op=ast.Add(), right=right):
                pairs = itertools.product(self.literals(left, seen), self.literals(right, seen))
                return [first + second for first, second in pairs]
            case ast.IfExp(body=body, orelse=orelse):
                return self.literals(body, seen) + self.literals(orelse, seen)
            case ast.Name(id=name):
                return [text for value in self.values(name, node) for text in self.literals(value, seen)] or [HOLE]
            case ast.Call(func=ast.Name(id=name)) if name in self.functions:
                returned = [part.value for part in ast.walk(self.functions[name]) if isinstance(part, ast.Return)]
                return [text for value in returned for text in self.literals(value, seen)] or [HOLE]
        return [HOLE]

    def values(self, name: str, node: ast.AST) -> Iterator[ast.AST]:
        """Find what a name is bound to in its function: by assignment, by a loop over a table, or by the callers."""
        while node in self.parents and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            node = self.parents[node]
        for part in ast.walk(node):
            match part:
                case ast.Assign(targets=[ast.Name(id=target)], value=value) if target == name:
                    yield value
                case ast.For(target=ast.Tuple(elts=names), iter=ast.Tuple() | ast.List() as table):
                    place = next((at for at, each in enumerate(names) if getattr(each, "id", "") == name), None)
                    if place is not None:
                        yield from (row.elts[place] for row in _rows(table) if len(row.elts) == len(names))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            given = [each.arg for each in node.args.args]
            if name in given:
                place = given.index(name) - ("self" in given[:1])
                for call in ast.walk(self.tree):
                    if isinstance(call, ast.Call) and _called(call) == node.name:
                        yield from call.args[place : place + 1]


def _rows(table: ast.Tuple | ast.List) -> Iterator[ast.Tuple]:
    for row in table.elts:
        if isinstance(row, ast.Starred) and isinstance(row.value, ast.GeneratorExp):
            row = row.value.elt
        if isinstance(row, ast.Tuple):
            yield row


def _called(node: ast.Call) -> str:
    function = node.func
    return function.id if isinstance(function, ast.Name) else getattr(function, "attr", "")


def shown(text: str) -> str:
    """Return a message as the page has it: one line, and `…` for values."""
    return re.sub(f"(?:{HOLE}|…)+", "…", "; ".join(text.split("\n")))


def listed() -> str:
    """Return the complete list as Markdown, folded, by room and file."""
    lines = ['??? note "Every error and warning, by the file that makes it"', ""]
    for file, of_file in itertools.groupby(messages(), key=lambda message: message.file):
        lines += [f"    **{file}**", ""]
        lines += [f"    - {_code(text)}" for text in dict.fromkeys(shown(message.text) for message in of_file)]
        lines.append("")
    return "\n".join(lines)


def _code(text: str) -> str:
    fence = "``" if "`" in text else "`"
    space = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{space}{text}{space}{fence}"


def parts(page: str) -> tuple[str, str, str]:
    """Split the page: what is written, what is generated, and what follows."""
    front, rest = page.split(BEGIN)
    generated, after = rest.split(END)
    return front, generated, after


def patterns(front: str) -> dict[str, re.Pattern[str]]:
    """Return the messages in the first column of the tables in front, `…` standing for anything."""
    rows = re.findall(r"^\| (`.*?`) \| ", front, re.MULTILINE)
    spans = [span for row in rows for span in re.findall(r"`([^`]+)`", row)]
    return {span: re.compile(re.escape(span).replace("…", ".*?"), re.DOTALL) for span in spans}


if __name__ == "__main__":
    front, _, after = parts(PAGE.read_text(encoding="utf-8"))
    PAGE.write_text(front + BEGIN + listed() + END + after, encoding="utf-8")
    print(PAGE)
