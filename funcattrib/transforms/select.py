"""Selection of leaves by name."""

import fnmatch
from collections.abc import Iterable
from functools import partial

from funcattrib.chain.transform import State, Transform
from funcattrib.errors import ChainError
from funcattrib.lift import Readouts, TwoSided, readout
from funcattrib.types import Spec


def select(include: Iterable[str] = ("*",), exclude: Iterable[str] = ()) -> Transform:
    """Keep the leaves whose name matches a glob of ``include`` and none of ``exclude``.

    Raises:
        ChainError: nothing remains.

    Example:
        >>> import torch
        >>> select(["*.weight"])(None, {"a.weight": torch.ones(2, 1), "a.bias": torch.ones(2, 1)})
        {'a.weight': tensor([[1.],
                [1.]])}
    """
    include = (include,) if isinstance(include, str) else tuple(include)
    exclude = (exclude,) if isinstance(exclude, str) else tuple(exclude)
    return Transform(
        "select",
        settings={"include": include, "exclude": exclude},
        init=partial(_init, include=include, exclude=exclude),
        maps=partial(_maps, include=include, exclude=exclude),
    )


def _init(spec: Spec, include: tuple[str, ...], exclude: tuple[str, ...]) -> tuple[State, Spec]:
    kept = {name: leaf for name, leaf in spec.items() if _matches(name, include, exclude)}
    if not kept:
        raise ChainError(f"selects none of the {len(spec)} leaves (include {list(include)}, exclude {list(exclude)})")
    return None, kept


def _maps(state: State, spec: Spec, include: tuple[str, ...], exclude: tuple[str, ...]) -> Readouts:
    return {name: readout(name, TwoSided()) for name in spec if _matches(name, include, exclude)}


def _matches(name: str, include: tuple[str, ...], exclude: tuple[str, ...]) -> bool:
    def any_of(globs: tuple[str, ...]) -> bool:
        return any(fnmatch.fnmatchcase(name, glob) for glob in globs)

    return any_of(include) and not any_of(exclude)
