"""The parameters that the numbers of an optimizer's state stand for.

A state is numbered in the order in which the optimizer was given the parameters, over its groups: the names that it
recorded, the Trainer's order (weights that decay, then the rest), matrices before vectors, or the model's own; of all
parameters or those that require grad (an adapter's, for one). An order counts where the groups have its sizes and every
shape fits. Where the optimizer had fewer parameters, those whose shapes are the only ones that fit are its own.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from funcattrib.errors import FuncattribError

_NO_DECAY = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")
"""The Trainer's rule by name; layer norms' weights have no decay either."""


def parameters_in_order(model: nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the parameters by name, in the model's order."""
    return dict(model.named_parameters() if isinstance(model, nn.Module) else model)


def match_parameters(
    path: str | Path,
    model: nn.Module | Mapping[str, Tensor],
    groups: list[dict[str, Any]],
    shapes: Mapping[Any, tuple[int, ...] | None],
) -> list[str]:
    """Match the parameter of every number in the groups, by the first order that fits.

    Raises:
        FuncattribError: none fits, or parameters fit in several ways.
    """
    params = parameters_in_order(model)
    numbers = [number for group in groups for number in group["params"]]
    sizes = [len(group["params"]) for group in groups if group["params"]]
    problems: list[tuple[int, str]] = []
    for order in _orders(model, params, groups):
        names = [name for part in order for name in part]
        if [len(part) for part in order if part] != sizes and (len(order) > 1 or len(names) != len(numbers)):
            continue
        problem = _misfit(path, names, numbers, params, shapes)
        if problem is None:
            return names
        problems.append(problem)
    if (some := _only_fit(path, model, params, groups, shapes)) is not None:
        return some
    if problems:  # of the order that fits furthest
        raise FuncattribError(max(problems)[1])
    trained = [name for name, tensor in params.items() if tensor.requires_grad] or list(params)
    beyond = trained[len(numbers) :]
    raise FuncattribError(
        f"expected the state of the model's {len(trained)} parameters, found {len(numbers)} in {path}"
        + (f"; {beyond[0]} would have none" if beyond else f"; the last parameter is {trained[-1]}")
        + "\ngive the model as it was trained, with the same parameters frozen"
    )


def _only_fit(
    path: str | Path,
    model: nn.Module | Mapping[str, Tensor],
    params: Mapping[str, Tensor],
    groups: list[dict[str, Any]],
    shapes: Mapping[Any, tuple[int, ...] | None],
) -> list[str] | None:
    """Return the parameters of an optimizer that had some of them, by the first order in which shapes fit in one way.

    Raises:
        FuncattribError: they fit in several.
    """
    wanted = [[shapes.get(number) for number in group["params"]] for group in groups if group["params"]]
    if any(shape is None for part in wanted for shape in part):
        return None
    several = False
    for order in _orders(model, params, groups):
        parts = [part for part in order if part]
        sought = wanted if len(order) > 1 else [[shape for part in wanted for shape in part]]
        if len(parts) != len(sought) or any(name not in params for part in parts for name in part):
            continue
        found = [
            _placed([tuple(params[name].shape) for name in part], some)
            for part, some in zip(parts, sought, strict=True)
        ]
        if all(ways == 1 for _, ways in found):
            return [part[at] for part, (places, _) in zip(parts, found, strict=True) for at in places]
        several = several or all(found_ways for _, found_ways in found)
    if several:
        raise FuncattribError(
            f"the optimizer in {path} trained {sum(map(len, wanted))} of the model's {len(params)} parameters, and "
            "their shapes do not show which\ngive the model with the others frozen (requires_grad_(False)), or save "
            "the state of an optimizer that was given named_parameters()"
        )
    return None


def _placed(shapes: list[Any], wanted: list[Any]) -> tuple[list[int], int]:
    """Place a sequence in a longer one, in order: the first places, and in how many ways (2 for more than one).

    Example:
        >>> _placed(["a", "b", "c"], ["a", "c"]), _placed(["a", "b", "b"], ["a", "b"])[1], _placed(["a"], ["b"])[1]
        (([0, 2], 1), 2, 0)
    """

    def first(here: list[Any], sought: list[Any]) -> list[int]:
        places, at = [], 0
        for shape in sought:
            while at < len(here) and here[at] != shape:
                at += 1
            places.append(at)
            at += 1
        return places

    early = first(shapes, wanted)
    if early and early[-1] >= len(shapes):
        return [], 0
    late = [len(shapes) - 1 - at for at in reversed(first(shapes[::-1], wanted[::-1]))]
    return early, 1 if early == late else 2


def _orders(
    model: nn.Module | Mapping[str, Tensor], params: Mapping[str, Tensor], groups: list[dict[str, Any]]
) -> Iterator[list[list[str]]]:
    """Yield names as an optimizer may have been given them, by group; a single list goes over all groups."""
    recorded = [group.get("param_names", group["params"]) for group in groups]
    if all(isinstance(name, str) for part in recorded for name in part):
        yield recorded
        return
    norms = {f"{name}." for name, module in _modules(model) if isinstance(module, nn.LayerNorm)}

    def trainer(name: str) -> bool:
        return not _NO_DECAY.search(name.lower()) and name.rpartition(".")[0] + "." not in norms

    def matrix(name: str) -> bool:
        return params[name].ndim >= 2

    trained = [name for name, tensor in params.items() if tensor.requires_grad]
    for names in (trained, list(params)) if 0 < len(trained) < len(params) else (list(params),):
        for decays in (trainer, matrix):
            yield [[name for name in names if decays(name)], [name for name in names if not decays(name)]]
        yield [names]


def _modules(model: nn.Module | Mapping[str, Tensor]) -> Iterable[tuple[str, nn.Module]]:
    return model.named_modules() if isinstance(model, nn.Module) else ()


def _misfit(
    path: str | Path,
    names: list[str],
    numbers: list[Any],
    params: Mapping[str, Tensor],
    shapes: Mapping[Any, tuple[int, ...] | None],
) -> tuple[int, str] | None:
    """Find the first parameter that a state does not fit: its place, and the message."""
    for place, (name, number) in enumerate(zip(names, numbers, strict=True)):
        if name not in params:
            return place, f"{path} has a state of {name}, which the model does not have; give the model it trained"
        shape = shapes.get(number)
        if shape is not None and shape != tuple(params[name].shape):
            return place, (
                f"expected the state of {name} to have shape {tuple(params[name].shape)}, found {shape} in {path}\n"
                "give the model that this optimizer trained"
            )
    return None
