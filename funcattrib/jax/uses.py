"""Uses of parameters in a loss's jaxpr: which reach it as the kernel of ``lifted_dense`` and in no other way.

A parameter that is also cast, sliced, transposed or passed to a loop keeps its plain gradient.
"""

from collections.abc import Sequence
from typing import Any

from funcattrib.jax.dense import PRODUCT

_CALLS = ("jit", "pjit", "closed_call", "remat", "remat2", "checkpoint")
"""Primitives that hand their operands to one inner jaxpr, in their order."""


def dense_kernels(jaxpr: Any, parameters: Sequence[Any]) -> set[int]:
    """Find the places in ``parameters`` of those that are used, and only as kernels.

    Args:
        jaxpr: of the loss.
        parameters: its variables that are parameters.
    """
    uses = _uses(jaxpr, {id(variable): place for place, variable in enumerate(parameters)})
    return {place for place in range(len(parameters)) if {kernel for at, kernel in uses if at == place} == {True}}


def _uses(jaxpr: Any, places: dict[int, int]) -> list[tuple[int, bool]]:
    """List (parameter, whether as a kernel) of every use."""
    found = [(places[id(variable)], False) for variable in jaxpr.outvars if id(variable) in places]
    for equation in jaxpr.eqns:
        operands = [places.get(id(variable)) for variable in equation.invars]
        if not any(place is not None for place in operands):
            continue
        inner = equation.params.get("jaxpr") if equation.primitive.name in _CALLS else None
        inner = getattr(inner, "jaxpr", inner)
        if equation.params.get("name") == PRODUCT and inner is not None:
            found += [(place, at == 1) for at, place in enumerate(operands) if place is not None]
        elif inner is not None and len(inner.invars) == len(operands):
            named = zip(inner.invars, operands, strict=True)
            found += _uses(inner, {id(variable): place for variable, place in named if place is not None})
        else:
            found += [(place, False) for place in operands if place is not None]
    return found
