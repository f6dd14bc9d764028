"""A YAML file of settings, ``name: value`` lines, read with the line of whatever is wrong with it."""

from pathlib import Path
from typing import Any

import yaml

from funcattrib.errors import FuncattribError

_DEEPEST = 20  # lists and mappings in one another; YAML's reader calls itself for each


def read_mapping(path: Path) -> dict[str, Any]:
    """Read a file of settings, as plain values.

    Raises:
        FuncattribError: no such file, or not a mapping of names to values that can be read; it names the line.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise FuncattribError(f"{path}: this file cannot be read ({error.strerror}).") from None
    except UnicodeDecodeError as error:
        raise FuncattribError(f"{path}: this file is not valid YAML: {' '.join(str(error).split())}") from None
    try:
        _check_depth(path, text)
        found = _values(path, yaml.compose(text, yaml.SafeLoader))
    except yaml.YAMLError as error:
        raise FuncattribError(f"{path}: this file is not valid YAML: {' '.join(str(error).split())}") from None
    return found


def _check_depth(path: Path, text: str) -> None:
    depth = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        opens = isinstance(event, yaml.CollectionStartEvent)
        depth += opens - isinstance(event, yaml.CollectionEndEvent)
        if depth > _DEEPEST:
            where = path if event.start_mark is None else f"{path}, line {event.start_mark.line + 1}"
            raise FuncattribError(f"{where}: more than {_DEEPEST} lists or mappings are inside one another.")


def _values(path: Path, node: yaml.Node | None) -> dict[str, Any]:
    """Make each value by itself, so that the line of one that cannot be made is known."""
    if not isinstance(node, yaml.MappingNode):
        found = "nothing" if node is None else {"seq": "list"}.get(kind := node.tag.rpartition(":")[2], kind)
        raise FuncattribError(f"{path}: expected lines of `setting: value`, found {found}.")
    values = {}
    loader = yaml.SafeLoader("")
    try:
        for key, value in node.value:
            try:
                values[str(loader.construct_object(key, deep=True))] = loader.construct_object(value, deep=True)
            except (yaml.YAMLError, ValueError, TypeError, OverflowError, RecursionError) as error:
                problem = getattr(error, "problem", None) or error
                line = value.start_mark.line + 1
                raise FuncattribError(f"{path}, line {line}: this value cannot be read: {problem}.") from None
    finally:
        loader.dispose()
    return values
