"""The library's messages as a command's reader knows its settings: by their flags.

Messages of the library put the names of arguments in backticks (`token_batch_size`); on the command line the same
setting is a flag (--token-batch-size). The columns of a data set, one object in Python, are flags each:
`columns=Columns(prompt_column=…)` is --prompt-column.
"""

import re
from collections.abc import Collection
from dataclasses import fields, is_dataclass
from typing import Any, get_type_hints

import tyro

_CALLED = {
    "query_data": "query_dataset",
    "query_stores": "query_path",
    "checkpoints": "checkpoint",
    "models": "checkpoint",
    "learning_rates": "learning_rate",
    "data": "dataset",
}
"""Arguments that have another name as a flag."""
_ARGUMENT = re.compile(r"`(?P<columns>columns=Columns\()?(?P<name>[a-z_]+)(?:=(?P<value>[^`]+?))?(?(columns)\))`")


def with_flags(message: str, settings: Collection[str]) -> str:
    """Return a message with the names of a command's settings as flags.

    Args:
        message: with names in backticks, `name` or `name=value`, or `columns=Columns(name=value)`; a value `…` is
            the reader's to choose.
        settings: of the command; other names stay as they are.

    Example:
        >>> with_flags("use a smaller `projection_dim`, or `dtype='int8'`; see `docs`", {"projection_dim", "dtype"})
        'use a smaller --projection-dim, or --dtype int8; see `docs`'
        >>> with_flags("name it with `columns=Columns(prompt_column=…)`", {"prompt_column"})
        'name it with --prompt-column'
    """

    def flag(found: re.Match[str]) -> str:
        name = _CALLED.get(found["name"], found["name"])
        if name not in settings:
            return found[0]
        value = (found["value"] or "True").strip("'\"")
        return f"--{name.replace('_', '-')}" + ("" if value in ("True", "…") else f" {value}")

    return _ARGUMENT.sub(flag, message)


def setting_names(config_type: type) -> list[str]:
    """Return the names of a command's settings, those of its groups among them.

    Example:
        >>> from funcattrib.cli.settings import RunConfig
        >>> setting_names(RunConfig)
        ['run', 'overwrite']
    """
    hints: dict[str, Any] = get_type_hints(config_type)
    names: list[str] = []
    for each in fields(config_type):
        inner = hints[each.name]
        if isinstance(inner, type) and is_dataclass(inner):
            names += setting_names(inner)
        elif not in_python_alone(config_type, each.name):
            names.append(each.name)
    return names


def in_python_alone(config_type: type, name: str) -> bool:
    """Return whether a field is no setting of the command line: its type has no form there.

    Example:
        >>> from funcattrib.runs.config import GradientConfig
        >>> in_python_alone(GradientConfig, "attention_cfgs"), in_python_alone(GradientConfig, "seed")
        (True, False)
    """
    hint = get_type_hints(config_type, include_extras=True)[name]
    return tyro.conf.Fixed in getattr(hint, "__metadata__", ())
