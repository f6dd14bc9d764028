"""Rows as an optimizer's step weighs them: its second moments and learning rates as they stand at that step.

    Adam        row = lr · C(g ⊙ (√v̂_t + ε)⁻¹),  v̂_t = v_t / (1 − β₂ᵗ) with this step's gradient in v_t
    Adafactor   row = lr · C(diag(r_t)^-½ g diag(c_t)^-½ · √mean(r_t))

v_t is known after the step, so that the factors of each gradient are saved in backward (``lift/maps/deferred.py``) and
read then. For a batch of one, without clipping and with β₁ = 0, the step is −row (times the loss's scale).

References: Adam, arXiv 1412.6980; Adafactor, arXiv 1804.04235.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from funcattrib.checkpoints.optimizer_state import moment_of
from funcattrib.errors import FuncattribError
from funcattrib.lift import GradientMap, Readout, Readouts, Scale, TwoSided, unpack
from funcattrib.lift.maps.deferred import SavedFactors, SavedPart, read_saved
from funcattrib.transforms.adafactor import adafactor_norm
from funcattrib.transforms.adam import adam_norm
from funcattrib.transforms.moments import Moments
from funcattrib.types import Grads, Spec

SavedParts = Mapping[str, list[SavedPart]]
"""Parameter → saved factors of its gradient in one forward and backward pass."""


def save_factors(readouts: Readouts) -> tuple[Readouts, dict[str, list[SavedPart]]]:
    """Return maps that save every parameter's factors, and the lists that they save to."""
    parts: dict[str, list[SavedPart]] = {name: [] for name in readouts}
    return {name: Readout(SavedFactors(parts[name]), name, (name,)) for name in readouts}, parts


def saved_coordinates(readouts: Readouts, parts: SavedParts, examples: int) -> Grads:
    """Compute coordinates by leaf of saved factors, (E, …)."""
    probes: dict[str, Tensor] = {}
    for name, (gradient_map, probe, _) in readouts.items():
        read = read_saved(gradient_map, parts[name], examples)
        if read is not None:
            probes[probe] = probes[probe] + read if probe in probes else read
    if missing := next((each.probe for each in readouts.values() if each.probe not in probes), None):
        raise FuncattribError(f"{missing} had no gradient in a step; leave it out (exclude)")
    return unpack(readouts, probes)


def weighed(
    readouts: Readouts, spec: Spec, optimizer: Any, model: nn.Module, *, moments: bool, rates: bool
) -> Readouts:
    """Return ``readouts`` with the optimizer's normalisation and learning rates before it, as they stand now."""
    names = {id(parameter): name for name, parameter in model.named_parameters() if name in readouts}
    groups = {names[id(p)]: (p, group) for group in optimizer.param_groups for p in group["params"] if id(p) in names}
    if missing := next((name for name in readouts if name not in groups), None):
        raise FuncattribError(f"the optimizer does not train {missing}; leave it out (exclude)")
    norms = _norms(spec, optimizer, groups) if moments else {}
    before = {
        name: _times(norms[name].map if moments else TwoSided(), spec[name].shape, group["lr"] if rates else 1.0)
        for name, (_, group) in groups.items()
    }
    return {name: each._replace(map=each.map @ before[name].to(spec[name].dtype)) for name, each in readouts.items()}


def _norms(spec: Spec, optimizer: Any, groups: Mapping[str, tuple[Tensor, Mapping[str, Any]]]) -> Readouts:
    moments: Moments = {name: moment_of(optimizer.state[p], group, name) for name, (p, group) in groups.items()}
    ordered = {name: leaf for name, leaf in spec.items() if name in groups}
    if any(not isinstance(moment, Tensor) for moment in moments.values()):
        stage = adafactor_norm(moments)
    else:
        found = {group["eps"] if isinstance(group["eps"], float) else 0.0 for _, group in groups.values()}
        if len(found) > 1:
            raise FuncattribError(f"expected one eps for all of the optimizer's parameters, found {sorted(found)}")
        stage = adam_norm(moments, eps=found.pop())
    state, _ = stage.init(ordered)
    assert stage.maps is not None
    return stage.maps(state, ordered)


def _times(gradient_map: GradientMap, shape: tuple[int, ...], factor: float) -> GradientMap:
    if factor == 1.0:
        return gradient_map
    one = TwoSided(torch.full((shape[0],), factor)) if len(shape) < 3 else Scale(torch.tensor(factor))
    return gradient_map @ one
