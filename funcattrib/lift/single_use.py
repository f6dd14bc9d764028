"""Weights that reach the loss through exactly one tapped operation.

A statistic of a gradient is not linear: where a weight is used twice (tied, or a module called twice) or through an
operation without a rule, its statistic must be taken of the summed gradient, not summed over uses.
"""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from funcattrib.lift.maps.two_sided import TwoSided
from funcattrib.lift.probes import lift, readout, zero_probes

_TAPS = ("_TapBackward", "_FrozenLinearBackward")
"""Names of the graph nodes that read a probe."""


def single_use(
    loss: Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], Tensor],
    params: Mapping[str, Tensor],
    names: Iterable[str],
    example: Mapping[str, Tensor],
) -> set[str]:
    """Find the names whose probe has one consumer in the loss's graph, a tap. One forward pass over ``example``."""
    readouts = {name: readout(name, TwoSided()) for name in names}
    probes = {name: probe.requires_grad_() for name, probe in zero_probes(params, readouts).items()}
    with torch.enable_grad():
        value = loss(lift(params, readouts, probes), example)
    consumers: dict[int, list[str]] = {id(probe): [] for probe in probes.values()}
    pending, seen = [value.grad_fn], set()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        for following, _ in node.next_functions:
            variable = getattr(following, "variable", None)
            if variable is not None and id(variable) in consumers:
                consumers[id(variable)].append(node.name())
            pending.append(following)
    return {
        name for name, probe in probes.items() if len(consumers[id(probe)]) == 1 and consumers[id(probe)][0] in _TAPS
    }
