"""From the words of a command line to a configuration dataclass."""

import inspect
from collections.abc import Sequence
from dataclasses import replace
from functools import reduce
from operator import or_
from pathlib import Path
from typing import Any, TypeVar, get_args

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from funcattrib.cli.config_file import load_defaults
from funcattrib.cli.flags import setting_names, with_flags
from funcattrib.errors import FuncattribError

_Config = TypeVar("_Config")

_CONFIG_HELP = (  # begins with a letter: tyro sets other lines apart by one blank line more
    "With --config FILE the settings of an earlier run (its config.yaml) are the defaults; what is given here wins. "
    "Words in a flag may be joined by hyphens or underscores."
)
_TYPES = ConstructorRegistry()
"""Changes to how tyro shows types: no ``{None}|`` before what may be left out, and no empty default."""


def parse(config_type: type[_Config], args: Sequence[str], *, command: str) -> _Config:
    """Read flags into a frozen dataclass; groups nested in it are flat on the command line.

    Args:
        config_type: The dataclass. A field without a default is required; `tyro.conf.Positional[...]` takes its place
            by position; a field that is itself a dataclass is a group, whose flags carry no prefix.
        args: The words after the command's name. `--config FILE` among them takes defaults from a file.
        command: The command's name, for messages and to recognise its own config files.

    Returns:
        An instance of `config_type`.

    Raises:
        FuncattribError: `--config` names no file, or one that does not fit.
        SystemExit: After `--help` (0), or for flags that do not parse (2); tyro has said why.
    """
    args, file = _take_config(args)
    prog = f"funcattrib {command}"
    description = "\n\n".join([_description(config_type), _CONFIG_HELP])
    config = (tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes, tyro.conf.PositionalMetavarFromFieldName)
    given: dict[str, Any] = {} if file is None else {"default": load_defaults(config_type, file, command=command)}
    try:
        return tyro.cli(
            config_type, args=args, prog=prog, description=description, config=config, registry=_TYPES, **given
        )
    except FuncattribError as error:  # of a dataclass's own check
        raise FuncattribError(with_flags(str(error), setting_names(config_type))) from error


@_TYPES.primitive_rule
def _optional(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """Read ``X | None`` as X, and the word None as None."""
    kinds = get_args(info.type)
    if type(None) not in kinds:
        return None
    given: Any = reduce(or_, (kind for kind in kinds if kind is not type(None)))
    spec = ConstructorRegistry.get_primitive_spec(PrimitiveTypeInfo.make(given, info.markers))
    if not isinstance(spec, PrimitiveConstructorSpec) or spec.nargs != 1:
        return None
    return replace(
        spec,
        instance_from_str=lambda words: None if words == ["None"] else spec.instance_from_str(words),
        is_instance=lambda value: value is None or spec.is_instance(value),
        str_from_instance=lambda value: ["None"] if value is None else spec.str_from_instance(value),
        choices=None if spec.choices is None else (*spec.choices, "None"),
    )


@_TYPES.primitive_rule
def _words(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """Show an empty list of words as none."""
    if info.type != tuple[str, ...] or tyro.conf.UseAppendAction in info.markers:
        return None
    return PrimitiveConstructorSpec(
        nargs="*",
        metavar="[STR [STR ...]]",
        instance_from_str=tuple,
        is_instance=lambda value: isinstance(value, tuple) and all(isinstance(each, str) for each in value),
        str_from_instance=lambda value: list(value) or ["none"],
    )


def _description(config_type: type) -> str:
    """Return the docstring up to its Args, which tyro shows beside the flags."""
    return (inspect.getdoc(config_type) or "").partition("\n\nArgs:")[0]


def _take_config(args: Sequence[str]) -> tuple[list[str], Path | None]:
    rest: list[str] = []
    file: Path | None = None
    words = iter(args)
    for word in words:
        flag, equals, value = word.partition("=")
        if flag != "--config":
            rest.append(word)
            continue
        path = value if equals else next(words, "")
        if not path or file is not None:
            found = "none" if not path else "two"
            raise FuncattribError(f"--config takes one file, found {found}; give RUN/config.yaml.")
        file = Path(path)
    return rest, file
