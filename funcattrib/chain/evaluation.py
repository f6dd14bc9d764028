"""Ways to evaluate a loss and read its gradients on a batch, the fastest first.

vmap          all examples at once, whatever the loss does with one; needs operations with a batching rule
batched       all examples at once by the loss's own batched form, with one probe an example
one by one    always right, and as slow as batches of one example

The losses of all but the first are plain autograd: code that branches on values, or an operation without a batching
rule, is nothing special there. The batched form might mix examples, so it is compared with one example by itself.
"""

import logging
from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import grad_and_value, vmap

from funcattrib.errors import FuncattribError
from funcattrib.kernels.safe_norm import as_rows
from funcattrib.lift import Readouts, lift, unpack, zero_probes
from funcattrib.runtime.memory import is_short
from funcattrib.types import Batch, BatchedLoss, Example, Loss, Params, PerExample, not_scalar
from funcattrib.weights.stored import dense

log = logging.getLogger(__name__)

Way = Callable[[Any, Params, Readouts | None, Batch], PerExample]

_COMPARED = 4
"""Examples of the first batch that are compared, evenly spaced."""
_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3}
"""Relative difference of a row by itself and in a batched form, which rounding explains; 0.1 in half precision."""


class First(NamedTuple):
    """The way that was found for a first batch, and that batch's result."""

    way: Way
    result: PerExample


def find_way(loss: Loss, params: Params, lowered: Readouts | None, batch: Batch) -> First:
    """Find the first way that is right for a batch, and compute it.

    Raises:
        FuncattribError: the loss draws random numbers.
        Exception: whatever the loss raises on one example by itself.
    """
    try:
        return First(by_vmap, by_vmap(loss, params, lowered, batch))
    except FuncattribError:
        raise
    except Exception as error:  # whatever an operation, or code that reads values, raises under vmap
        if is_short(error) or is_random(error):
            raise
        refusal = error
    if lowered is not None and isinstance(loss, BatchedLoss):
        size = _size(batch)
        some = sorted({at * (size - 1) // (_COMPARED - 1) for at in range(_COMPARED)})
        singles = one_by_one(loss, params, lowered, {name: value[some] for name, value in batch.items()})
        try:
            result = batched(loss, params, lowered, batch)
        except Exception as error:
            if is_short(error):
                raise
        else:
            if _agree(result, singles, some):
                _say("in batches", "as fast", _brief(refusal))
                return First(batched, result)
    _say("one by one", "slower, by as much as a batch is faster than its documents", _brief(refusal))
    return First(one_by_one, one_by_one(loss, params, lowered, batch))


def by_vmap(loss: Loss, params: Params, lowered: Readouts | None, batch: Batch) -> PerExample:
    """Compute ``vmap(grad(loss))``, or with probes one backward pass after ``vmap(loss)``."""
    if lowered is None:
        # What is differentiated is the dense weight: all of them at a time, which the lowered form never has.
        grads, losses = vmap(grad_and_value(partial(_scalar, loss)), in_dims=(None, 0))(dense(params), dict(batch))
        return PerExample(grads, losses)

    def of_probes(probes: Params, example: Example) -> Tensor:
        return _scalar(loss, lift(params, lowered, probes), example)

    # One probe an example: the losses are independent of each other's probes, so one ordinary backward pass gives
    # every example's gradient, and frees what it has used as it goes (torch.func.grad keeps its graph).
    probes = {
        name: probe.expand(_size(batch), *probe.shape).clone().requires_grad_()
        for name, probe in zero_probes(params, lowered).items()
    }
    with torch.enable_grad():
        losses = vmap(of_probes)(probes, dict(batch))
    return _read(lowered, losses, probes, lambda grad: grad[:, 0])


def batched(loss: BatchedLoss, params: Params, lowered: Readouts | None, batch: Batch) -> PerExample:
    """Compute ``loss.batched`` with one probe an example, in one ordinary backward pass."""
    assert lowered is not None, "whole gradients have no probes"
    tokens = next((value.shape[1] for value in batch.values() if value.ndim == 2), None)
    probes = {
        name: probe.requires_grad_() for name, probe in zero_probes(params, lowered, examples=_size(batch)).items()
    }
    with torch.enable_grad():
        losses = loss.batched(lift(params, lowered, probes, tokens), batch)
    return _read(lowered, losses, probes, lambda grad: grad)


def one_by_one(loss: Loss, params: Params, lowered: Readouts | None, batch: Batch) -> PerExample:
    """Compute every example by itself with plain autograd."""
    each = [_single(loss, params, lowered, _row(batch, at)) for at in range(_size(batch))]
    names = each[0].grads
    grads = {name: torch.cat([result.grads[name] for result in each]) for name in names}
    return PerExample(grads, torch.cat([result.losses for result in each]))


def is_random(error: Exception) -> bool:
    """Return whether this is vmap's refusal of a random operation."""
    return "randomness" in str(error)


def _single(loss: Loss, params: Params, lowered: Readouts | None, example: Example) -> PerExample:
    if lowered is None:
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in dense(params).items()}
        with torch.enable_grad():
            value = _scalar(loss, leaves, example)
        grads = _gradients(value, leaves)
        return PerExample({name: grad[None] for name, grad in grads.items()}, value.detach()[None])
    probes = {name: probe.requires_grad_() for name, probe in zero_probes(params, lowered).items()}
    with torch.enable_grad():
        value = _scalar(loss, lift(params, lowered, probes), example)
    return _read(lowered, value[None], probes, lambda grad: grad)


def _scalar(loss: Loss, params: Params, example: Example) -> Tensor:
    """Compute the loss of one example, which must be one number: of several, gradients would be those of their sum."""
    value = loss(params, example)
    if (found := not_scalar(value)) is not None:
        raise FuncattribError(
            f"expected a loss that returns a scalar tensor of floating point for one example, found {found}\n"
            "add up or average over what it returns"
        )
    return value


def _read(
    lowered: Readouts, losses: Tensor, probes: Mapping[str, Tensor], of_probe: Callable[[Tensor], Tensor]
) -> PerExample:
    grads = {name: of_probe(grad) for name, grad in _gradients(losses, probes).items()}
    return PerExample(unpack(lowered, grads), losses.detach())


def _gradients(losses: Tensor, leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if not losses.requires_grad:  # the loss uses none of them
        return {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    found = torch.autograd.grad(
        losses, list(leaves.values()), torch.ones_like(losses), allow_unused=True, materialize_grads=True
    )
    return dict(zip(leaves, found, strict=True))


def _agree(result: PerExample, singles: PerExample, some: list[int]) -> bool:
    """Return whether losses and gradients of some examples are the same as by themselves, leaf by leaf."""
    tolerance = _TOLERANCE.get(singles.losses.dtype, 0.1)

    def near(found: Tensor, expected: Tensor, floor: Tensor) -> bool:
        difference, size = ((as_rows(x.double()).norm(dim=1)) for x in (found - expected, expected))
        return bool((difference <= tolerance * torch.maximum(size, floor)).all())

    whole = torch.stack([as_rows(grad.double()).norm(dim=1) for grad in singles.grads.values()]).norm(dim=0)
    return near(result.losses[some, None], singles.losses[:, None], torch.zeros(1, device=whole.device)) and all(
        near(result.grads[name][some], grad, 1e-2 * whole) for name, grad in singles.grads.items()
    )


def _size(batch: Batch) -> int:
    return next(iter(batch.values())).shape[0]


def _row(batch: Batch, at: int) -> Example:
    return {name: value[at] for name, value in batch.items()}


def _brief(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:120]


@cache
def _say(way: str, cost: str, refusal: str) -> None:
    """Log once which way is taken, and what vmap refused."""
    log.info("gradients are computed %s (%s), as vmap refuses the loss: %s", way, cost, refusal)
