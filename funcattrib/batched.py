"""Per-example gradients from the user's own batched forward and backward: lifted parameters, no vmap.

Inside ``collecting`` the model's forward runs with lifted leaves whose probes have one slot an example,
θ of shape (B, …). After the user's ``loss.backward()`` a probe's gradient is the batch of coordinates. The model is as
it was afterwards, also when an exception passes through.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from funcattrib.compose import Chain, State, lower
from funcattrib.errors import FuncattribError
from funcattrib.lift import Lowered, lift, unpack, zero_probes
from funcattrib.per_example import Grads, spec


class Collected:
    """Probes of the forward passes inside one ``collecting`` block."""

    def __init__(self, lowered: Lowered) -> None:
        self._lowered = lowered
        self.probes: list[dict[str, Tensor]] = []

    def coordinates(self) -> Grads:
        """Name → (B, *coordinates) over all examples that went forward and backward, in order.

        Raises:
            FuncattribError: no forward pass, or no backward pass, happened inside the block.
        """
        if not self.probes:
            raise FuncattribError("expected a forward pass of the model inside the block, found none")
        if all(probe.grad is None for probes in self.probes for probe in probes.values()):
            raise FuncattribError("expected a backward pass inside the block, found none; call loss.backward()")
        filled = [{name: _grad(probe) for name, probe in probes.items()} for probes in self.probes]
        return unpack(self._lowered, {name: torch.cat([each[name] for each in filled]) for name in filled[0]})


@contextmanager
def collecting(model: nn.Module, names: Mapping[str, Any], chain: Chain, state: State) -> Iterator[Collected]:
    """Run the model's forward with lifted leaves for ``names``; yields what the backward passes fill.

    Args:
        names: the parameters to attribute.
        chain, state: their longest linear prefix is read in the backward pass.

    Example:
        >>> from funcattrib.compose import compose
        >>> from funcattrib.transforms import project
        >>> model, chain = nn.Linear(4, 3), compose(project(2))
        >>> state, _ = chain.init(spec({"weight": model.weight}))
        >>> with collecting(model, ["weight"], chain, state) as collected:
        ...     model(torch.ones(5, 4)).sum().backward()
        >>> collected.coordinates()["weight"].shape
        torch.Size([5, 2, 2])
    """
    forward, had_own = model.forward, "forward" in vars(model)
    within = _Forward(model, forward)
    lowered, _ = lower(chain, spec({n: p for n, p in model.named_parameters() if n in names}), state)
    collected = Collected(lowered)

    def lifted_forward(*args: Any, **kwargs: Any) -> Any:
        if any(module.training and getattr(module, "gradient_checkpointing", False) for module in model.modules()):
            raise FuncattribError(
                "expected gradient checkpointing off, found it on: what it repeats of the forward would not be lifted\n"
                "call model.gradient_checkpointing_disable() around the block"
            )
        current = {name: tensor for name, tensor in model.named_parameters() if name in lowered}
        examples, *rest = _batch_shape(args, kwargs)
        probes = {name: probe.requires_grad_() for name, probe in zero_probes(current, lowered, examples).items()}
        collected.probes.append(probes)
        lifted = lift(current, lowered, probes, tokens=rest[0] if rest else None)
        leaves = {f"model.{name}": leaf for name, leaf in lifted.items()}
        return torch.func.functional_call(within, leaves, args, kwargs)

    model.forward = lifted_forward
    try:
        yield collected
    finally:
        if had_own:
            model.forward = forward
        else:
            vars(model).pop("forward", None)


class _Forward(nn.Module):
    """A model's own forward without its hooks, which have run when the lifted forward is called in its place."""

    def __init__(self, model: nn.Module, forward: Callable[..., Any]) -> None:
        super().__init__()
        self.model = model
        self._own = forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._own(*args, **kwargs)


def _grad(probe: Tensor) -> Tensor:
    return torch.zeros_like(probe) if probe.grad is None else probe.grad


def _batch_shape(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.Size:
    """Of the model's first input: examples, and tokens where it has them."""
    named = [kwargs[name] for name in ("input_ids", "inputs_embeds") if name in kwargs]
    for value in (*args, *named, *kwargs.values()):
        if isinstance(value, Tensor) and value.ndim:
            return value.shape
    raise FuncattribError("expected a tensor with a batch axis among the model's arguments, found none")
