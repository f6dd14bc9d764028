"""Lifting a functional parameter dict: W becomes W + C*(θ) for every parameter that is read."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from funcattrib.lift.lifted import Lifted
from funcattrib.lift.maps.base import Reading
from funcattrib.lift.maps.composed import is_wide
from funcattrib.lift.maps.heads import each
from funcattrib.lift.rules import RULES


class Lowering(NamedTuple):
    """How one parameter is read.

    Attributes:
        reading: the linear map.
        probe: the probe that receives its coordinates: the parameter's own, or one that parameters share and which
            then receives their sum.
        leaves: what its coordinates are called; more than one where their first axis counts leaves.
    """

    reading: Reading
    probe: str
    leaves: tuple[str, ...]


Lowered = Mapping[str, Lowering]
"""Parameter → how it is read; those left out are not differentiated."""
Params = Mapping[str, Tensor]


def own(name: str, reading: Reading) -> Lowering:
    """The usual lowering: a probe and a leaf of the parameter's own name."""
    return Lowering(reading, name, (name,))


def lift(
    params: Params, lowered: Lowered, probes: Mapping[str, Tensor], tokens: int | None = None
) -> dict[str, Tensor]:
    """``params`` with a lifted leaf for every name in ``lowered``.

    Args:
        tokens: of every example, where a batch of them is known to be the model's input.
    """

    def leaf(name: str, weight: Tensor) -> Tensor:
        reading, probe, _ = lowered[name]
        return Lifted(weight, probes[probe], reading, RULES, tokens)

    return {name: leaf(name, weight) if name in lowered else weight for name, weight in params.items()}


def zero_probes(params: Params, lowered: Lowered, examples: int = 1) -> dict[str, Tensor]:
    """θ₀ = 0, (E, *coordinates), one for every probe that ``lowered`` names, in the weight's type.

    Statistics and scores have at least float32: squares of what float16 can just hold are nothing there.
    """
    probes: dict[str, Tensor] = {}
    for name, (reading, probe, _) in lowered.items():
        if probe not in probes:
            weight = params[name]
            shape = reading.coordinates_shape(tuple(weight.shape))
            dtype = torch.promote_types(weight.dtype, torch.float32) if is_wide(reading) else weight.dtype
            probes[probe] = torch.zeros(examples, *shape, dtype=dtype, device=weight.device)
    return probes


def unpack(lowered: Lowered, coordinates: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Coordinates by probe, (B, …) each, as leaves in the parameters' order."""
    leaves: dict[str, Tensor] = {}
    for _, probe, names in lowered.values():
        parts = (coordinates[probe],) if len(names) == 1 else coordinates[probe].unbind(1)
        leaves |= dict(zip(names, parts, strict=True))
    return leaves


def extend(maps: Mapping[str, Lowering], stage: Lowered) -> dict[str, Lowering] | None:
    """Every parameter's map with a stage's behind it; None where the two do not combine.

    Args:
        maps: parameter → its map so far.
        stage: leaf → its map; parameters none of whose leaves are in it are left out.
    """
    extended = {}
    for name, how in maps.items():
        if how.probe != name:
            return None
        seconds = {leaf: stage[leaf] for leaf in how.leaves if leaf in stage}
        if len(how.leaves) == 1:
            for leaf, second in seconds.items():
                probe = name if second.probe == leaf else second.probe
                extended[name] = second._replace(reading=second.reading.after(how.reading), probe=probe)
        elif any(second.probe != leaf or second.leaves != (leaf,) for leaf, second in seconds.items()):
            return None
        elif seconds:
            behind = [seconds[leaf].reading if leaf in seconds else None for leaf in how.leaves]
            extended[name] = Lowering(each(how.reading, behind), name, tuple(seconds))
    return extended
