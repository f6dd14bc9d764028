"""Per-example gradients from the user's own batched forward and backward: lifted parameters, no vmap.

Inside ``lifted`` the model's forward runs with lifted leaves whose probes have one slot an example, θ of shape (B, …).
After the user's ``loss.backward()`` a probe's gradient is the batch of coordinates. The leaves stand in the modules
while the forward runs, and again while gradient checkpointing repeats a part of it in backward; everybody else
(optimizer, DDP, ``state_dict``) sees the model as it is, also when an exception passes through.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from funcattrib.chain.chain import Chain
from funcattrib.chain.lowering import lower
from funcattrib.chain.per_example import spec
from funcattrib.chain.transform import State
from funcattrib.errors import FuncattribError
from funcattrib.kernels import register_experts
from funcattrib.lift import Readouts, lift, unpack, zero_probes
from funcattrib.models.functional import device_of
from funcattrib.transforms.leaf_shapes import is_stack
from funcattrib.types import Grads

Probes = Mapping[str, Tensor]
_EXPERTS = "_experts_implementation_internal"


class Reader(NamedTuple):
    """A chain ready to be read: its linear prefix, lowered, and the stages after it with their state."""

    readouts: Readouts
    rest: Chain
    state: tuple[State, ...]


def reader(model: nn.Module, names: Mapping[str, Any] | set[str], chain: Chain, state: State = None) -> Reader:
    """Prepare a chain for a model's parameters ``names``.

    Raises:
        ChainError: a chain that does not fit, or one that must be fitted first and comes without a state.
    """
    params = {name: tensor.detach() for name, tensor in model.named_parameters() if name in names}
    state = chain.ready(spec(params), device_of(params), state)
    readouts, depth = lower(chain.stages, spec(params), state)
    return Reader(readouts, Chain(None, chain.stages[depth:]), state[depth:])


class Pass(NamedTuple):
    """One forward pass: its probes by name, and the weights that had no gradient when it began."""

    probes: Probes
    fresh: Mapping[str, Tensor]

    @property
    def read(self) -> bool:
        """Return whether a backward pass has reached it."""
        return any(probe.grad is not None for probe in self.probes.values())


class Collected:
    """The forward passes inside one ``lifted`` block."""

    def __init__(self, read: Reader) -> None:
        self._read = read
        self.passes: list[Pass] = []

    def begin(self, weights: Mapping[str, Tensor], examples: int) -> Probes:
        """Create probes for a forward pass with these weights."""
        probes = {n: probe.requires_grad_() for n, probe in zero_probes(weights, self._read.readouts, examples).items()}
        self.passes.append(Pass(probes, {name: tensor for name, tensor in weights.items() if tensor.grad is None}))
        return probes

    def coordinates(self) -> Grads:
        """Return name → (B, *coordinates) over all examples that went forward and backward, in order.

        Raises:
            FuncattribError: no forward pass, or no backward pass, happened inside the block; a weight was used where it
                cannot be read.
        """
        if not self.passes:
            raise FuncattribError("there was no forward pass of the model inside the block; call the model in it")
        if not any(each.read for each in self.passes):
            raise FuncattribError("there was no backward pass inside the block; call loss.backward() in it")
        self._check(self.passes)
        parts = [_coordinates(self._read, each) for each in self.passes]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def grads(self, loss_scale: float | Tensor = 1.0) -> Grads:
        """Return rows divided by ``loss_scale``, after all of the chain's stages, name → (B, *shape)."""
        return _behind(self._read, self.coordinates(), loss_scale)

    def take(self, loss_scale: float | Tensor = 1.0) -> list[Grads]:
        """Return the rows of each forward pass that backward has reached; those passes are then dropped."""
        done = [each for each in self.passes if each.read]
        self._check(done)
        self.passes = [each for each in self.passes if not each.read]
        return [_behind(self._read, _coordinates(self._read, each), loss_scale) for each in done]

    def _check(self, passes: Sequence[Pass]) -> None:
        for name, weight in passes[0].fresh.items() if passes else ():
            probe = self._read.readouts[name].probe
            if weight.grad is not None and all(each.probes[probe].grad is None for each in passes):
                raise FuncattribError(
                    f"{name} has a gradient that did not come from the model's forward (activation checkpointing, or "
                    "a call outside forward)\nleave it out, or collect with per_example_grad"
                )


def _coordinates(read: Reader, one: Pass) -> Grads:
    filled = {n: torch.zeros_like(probe) if probe.grad is None else probe.grad for n, probe in one.probes.items()}
    return unpack(read.readouts, filled)


def _behind(read: Reader, coordinates: Grads, loss_scale: float | Tensor) -> Grads:
    if isinstance(loss_scale, Tensor) or loss_scale != 1:
        coordinates = {name: value / loss_scale for name, value in coordinates.items()}
    return read.rest.apply(read.state, coordinates)


@contextmanager
def collecting(
    model: nn.Module,
    names: Mapping[str, Any] | set[str],
    chain: Chain,
    state: State = None,
    *,
    called: nn.Module | None = None,
) -> Iterator[Collected]:
    """Run the model's forward with lifted leaves for ``names``; yields what the backward passes fill.

    Args:
        names: the parameters to attribute.
        chain, state: their longest linear prefix is read in the backward pass.
        called: the part of the model whose forward is run; by default all of it.

    Example:
        >>> from funcattrib.chain.chain import compose
        >>> from funcattrib.transforms import project
        >>> model = nn.Linear(4, 3)
        >>> with collecting(model, {"weight"}, compose(project(2))) as collected:
        ...     model(torch.ones(5, 4)).sum().backward()
        >>> collected.coordinates()["weight"].shape
        torch.Size([5, 2, 2])
    """
    with lifted(model, reader(model, names, chain, state), called=called) as collected:
        yield collected


@contextmanager
def lifted(
    model: nn.Module,
    read: Reader,
    *,
    called: nn.Module | None = None,
    begun: Callable[[Collected], None] = lambda collected: None,
    seen: Callable[[Any], None] = lambda output: None,
) -> Iterator[Collected]:
    """Run the model's forward with lifted leaves, as ``collecting``, with a chain that was made ready before.

    A forward pass without gradients (evaluation) stays as it is.

    Args:
        called: as in ``collecting``.
        begun: called as each forward pass begins, which is then the last of ``passes``.
        seen: called with what each forward pass returns.
    """
    called = model if called is None else called
    forward, had_own = called.forward, "forward" in vars(called)
    collected = Collected(read)
    inside = False

    def lifted_forward(*args: Any, **kwargs: Any) -> Any:
        nonlocal inside
        if inside or not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        examples, *rest = _batch_shape(args, kwargs)
        weights = {name: tensor for name, tensor in model.named_parameters() if name in read.readouts}
        probes = collected.begin(weights, examples)
        begun(collected)
        leaves = lift(weights, read.readouts, probes, tokens=rest[0] if rest else None)
        within = partial(_standing_in, _places(model, leaves), leaves)
        inside = True
        try:
            with within(), _repeated_alike(model, within):
                output = forward(*args, **kwargs)
        finally:
            inside = False
        seen(output)
        return output

    with _experts(model, read.readouts):
        called.forward = lifted_forward
        try:
            yield collected
        finally:
            if had_own:
                called.forward = forward
            else:
                vars(called).pop("forward", None)


Places = dict[str, list[tuple[dict[str, Any], str]]]


def _places(model: nn.Module, names: Mapping[str, Any]) -> Places:
    """List where each parameter stands: (a module's parameters, its name there); several for a tied one."""
    first: dict[int, str] = {}
    places: Places = {}
    for prefix, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                name = first.setdefault(id(parameter), f"{prefix}.{key}" if prefix else key)
                if name in names:
                    places.setdefault(name, []).append((module._parameters, key))
    return places


@contextmanager
def _standing_in(places: Places, leaves: Mapping[str, Tensor]) -> Iterator[None]:
    """Put the leaves in the parameters' places inside the block."""
    before = [(parameters, key, parameters[key]) for spots in places.values() for parameters, key in spots]
    try:
        for name, spots in places.items():
            for parameters, key in spots:
                parameters[key] = leaves[name]
        yield
    finally:
        for parameters, key, original in before:
            parameters[key] = original


@contextmanager
def _repeated_alike(model: nn.Module, within: Callable[[], Any]) -> Iterator[None]:
    """Repeat with the same leaves what gradient checkpointing repeats of this forward pass in backward."""
    name = "_gradient_checkpointing_func"
    checkpoints = [
        (vars(module), vars(module)[name])
        for module in model.modules()
        if getattr(module, "gradient_checkpointing", False) and name in vars(module)
    ]
    try:
        for attributes, checkpoint in checkpoints:
            attributes[name] = partial(_checkpoint, checkpoint, within)
        yield
    finally:
        for attributes, checkpoint in checkpoints:
            attributes[name] = checkpoint


def _checkpoint(
    original: Callable[..., Any], within: Callable[[], Any], function: Any, *args: Any, **kwargs: Any
) -> Any:
    return original(partial(_call, within, function), *args, **kwargs)


def _call(within: Callable[[], Any], function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with within():
        return function(*args, **kwargs)


@contextmanager
def _experts(model: nn.Module, readouts: Readouts) -> Iterator[None]:
    """Use the experts' forward that can be read, where stacks of experts are."""
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters() if name in readouts}
    models = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    models = [module for module in models if module._can_set_experts_implementation()]
    if not models or not any(is_stack(name, shape) for name, shape in shapes.items()):
        yield
        return
    with ExitStack() as restored:
        for module in models:
            settings = vars(module.config)
            restored.callback(settings.__setitem__, _EXPERTS, settings[_EXPERTS])
        for module in models:
            module.set_experts_implementation(register_experts())
        yield


def _batch_shape(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.Size:
    """Return the shape of the model's first input: examples, and tokens where it has them."""
    named = [kwargs[name] for name in ("input_ids", "inputs_embeds") if name in kwargs]
    for value in (*args, *named, *kwargs.values()):
        if isinstance(value, Tensor) and value.ndim:
            return value.shape
    raise FuncattribError("none of the model's arguments is a tensor with a batch axis")
