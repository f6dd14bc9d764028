"""Lifting a functional parameter dict: W becomes W + C*(θ) for every parameter that is read."""

from collections.abc import Mapping, Sequence
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from funcattrib.lift.lifted import Lifted
from funcattrib.lift.maps.base import GradientMap
from funcattrib.lift.maps.heads import each
from funcattrib.lift.rules import RULES


class Readout(NamedTuple):
    """The readout of one parameter.

    Attributes:
        map: the gradient map.
        probe: the probe that receives its coordinates: the parameter's own, or one that parameters share and which
            then receives their sum.
        leaves: what its coordinates are called; more than one where their first axis counts leaves.
    """

    map: GradientMap
    probe: str
    leaves: tuple[str, ...]


Readouts = Mapping[str, Readout]
"""Parameter → its readout; parameters without one are not differentiated."""
Params = Mapping[str, Tensor]


def readout(name: str, gradient_map: GradientMap) -> Readout:
    """Return the usual readout: a probe and a leaf of the parameter's own name."""
    return Readout(gradient_map, name, (name,))


def lift(
    params: Params, lowered: Readouts, probes: Mapping[str, Tensor], tokens: int | None = None
) -> dict[str, Tensor]:
    """Return ``params`` with a lifted leaf for every name in ``lowered``.

    Args:
        tokens: of every example, where a batch of them is known to be the model's input.
    """

    def leaf(name: str, weight: Tensor) -> Tensor:
        gradient_map, probe, _ = lowered[name]
        return Lifted(weight, probes[probe], gradient_map, RULES, tokens)

    return {name: leaf(name, weight) if name in lowered else weight for name, weight in params.items()}


def zero_probes(params: Params, lowered: Readouts, examples: int = 1) -> dict[str, Tensor]:
    """Return θ₀ = 0, (E, *coordinates), one for every probe that ``lowered`` names, in the weight's type.

    Statistics and scores have at least float32: squares of what float16 can just hold are nothing there.
    """
    probes: dict[str, Tensor] = {}
    for name, (gradient_map, probe, _) in lowered.items():
        if probe not in probes:
            weight = params[name]
            shape = gradient_map.coordinates_shape(tuple(weight.shape))
            dtype = torch.promote_types(weight.dtype, torch.float32) if gradient_map.wide else weight.dtype
            probes[probe] = torch.zeros(examples, *shape, dtype=dtype, device=weight.device)
    return probes


def unpack(lowered: Readouts, coordinates: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert coordinates by probe, (B, …) each, to leaves in the parameters' order."""
    leaves: dict[str, Tensor] = {}
    for _, probe, names in lowered.values():
        parts = (coordinates[probe],) if len(names) == 1 else coordinates[probe].unbind(1)
        leaves |= dict(zip(names, parts, strict=True))
    return leaves


def from_gradients(maps: Readouts, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the leaves that maps read of formed gradients, name → (B, …): what no operation was tapped for.

    Parameters that share a probe add up in it, in the widest of their types.
    """
    read: dict[str, list[Tensor]] = {}
    for name, (gradient_map, probe, _) in maps.items():
        read.setdefault(probe, []).append(gradient_map.from_gradient(gradients[name]))
    return unpack(maps, {probe: _added(parts) for probe, parts in read.items()})


def _added(parts: Sequence[Tensor]) -> Tensor:
    if len(parts) == 1:
        return parts[0]
    widest = reduce(torch.promote_types, (part.dtype for part in parts))
    return torch.stack([part.to(widest) for part in parts]).sum(0)


def extend(maps: Mapping[str, Readout], stage: Readouts) -> dict[str, Readout] | None:
    """Compose every parameter's map with a stage's after it, linear or not; None where the two do not combine.

    Args:
        maps: parameter → its map so far.
        stage: leaf → its map; parameters none of whose leaves are in it are dropped.
    """
    extended = {}
    for name, how in maps.items():
        if how.probe != name:
            return None
        seconds = {leaf: stage[leaf] for leaf in how.leaves if leaf in stage}
        if len(how.leaves) == 1:
            for leaf, second in seconds.items():
                probe = name if second.probe == leaf else second.probe
                extended[name] = second._replace(map=second.map @ how.map, probe=probe)
        elif any(second.probe != leaf or second.leaves != (leaf,) for leaf, second in seconds.items()):
            return None
        elif seconds:
            behind = [seconds[leaf].map if leaf in seconds else None for leaf in how.leaves]
            extended[name] = Readout(each(how.map, behind), name, tuple(seconds))
    return extended
