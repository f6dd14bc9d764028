"""Per-example gradients of a JAX loss, as the source of a chain.

    plain     C(∂ loss(W, example_b) / ∂W)                a chunk of examples at a time, one compiled call a chunk
    lifted    ∂ loss(W + C*(θ), example_b) / ∂θ at θ = 0    kernels that the loss uses through ``lifted_dense``

What a chain's linear prefix makes of a matrix or vector (L G Rᵀ, L g) is computed in JAX, so that whole gradients
exist for a chunk at a time, or never; what follows is torch's, of the chunk's gradients or coordinates handed over.

Shapes: B examples, I/O sides of a matrix, P/Q coordinates.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax.tree_util import PyTreeDef
from torch import Tensor

from funcattrib.chain.per_example import GradientSource
from funcattrib.errors import FuncattribError
from funcattrib.jax.dense import Lifted, Side, two_sided
from funcattrib.jax.dlpack import to_jax, to_torch
from funcattrib.jax.pytrees import name_of, take_apart, tensors_of
from funcattrib.jax.uses import dense_kernels
from funcattrib.lift import GradientMap, Readouts, TwoSided, readout, unpack
from funcattrib.types import Grads, PerExample

Loss = Callable[[Any, Any], Any]
Pair = tuple[Side, Side]
Arrays = dict[str, jax.Array]


def chunked(examples: int) -> GradientSource:
    """Return a source of per-example gradients of a JAX loss, with a bound on memory: so many examples at a time.

    A chain that begins here takes a loss ``loss(params, example) -> scalar`` in JAX, parameters as a pytree of
    floating-point arrays (Flax NNX's state, Linen's variables, an Equinox module's arrays, dicts), and batches as a
    pytree of arrays or tensors, the examples stacked along the first axis. The loss is compiled once for each shape of
    a chunk, with whatever else it refers to.

    Args:
        examples: of a chunk.

    Raises:
        FuncattribError: no example a chunk.

    Example:
        >>> loss = lambda params, example: (params["w"] * example["x"]).sum() ** 2
        >>> chunked(1)(loss, {"w": jnp.ones(2)}, {"x": jnp.eye(2)})["w"]
        tensor([[2., 0.],
                [0., 2.]])
    """
    if examples < 1:
        raise FuncattribError(f"expected chunks of at least 1 example, found {examples}")
    return GradientSource("jax", partial(_bind, chunk=examples), tensors_of, _measurable)


def _measurable(loss: Loss, params: Any, names: Iterable[str], batch: Any) -> set[str]:
    """Return all: what is not linear is read off whole gradients."""
    return set(names)


def _bind(loss: Loss, params: Any, lowered: Readouts | None, chunk: int) -> Callable[[Any], PerExample]:
    try:
        hash(loss)
    except TypeError as error:
        raise FuncattribError(
            f"the loss must be hashable, and a {type(loss).__name__} is not; wrap it in a def"
        ) from error
    structure, arrays = take_apart(params)
    maps = {name: readout(name, TwoSided()) for name in arrays} if lowered is None else lowered
    device = next(iter(next(iter(arrays.values())).devices()))
    sides: dict[str, Pair] = {}
    behind: dict[str, GradientMap | None] = {}  # what torch reads of what the sides leave
    for name, each in maps.items():
        *pair, behind[name] = each.map.sides_first()
        if any(side is not None for side in pair):
            left, right = (None if side is None else to_jax(side, device) for side in pair)
            sides[name] = left, right
    compute = partial(_gradients, loss, structure, tuple(arrays), tuple(maps), tuple(arrays.values()), sides)
    first: Any = None

    def rows(batch: Any) -> PerExample:
        nonlocal first
        stacked = jax.tree.map(partial(_operand, device), batch)
        size = _examples(stacked)
        found = jax.tree.structure(stacked)
        first = found if first is None else first
        if found != first:
            raise FuncattribError(
                f"expected every batch to have the structure {first}, found {found}; give all batches the same entries"
            )
        if not size:  # of one example made up, nothing
            one = rows(jax.tree.map(lambda a: jnp.zeros((1, *a.shape[1:]), a.dtype), stacked))
            return PerExample({name: grad[:0] for name, grad in one.grads.items()}, one.losses[:0])
        parts = []
        for start in range(0, size, chunk):
            part = stacked if size <= chunk else jax.tree.map(lambda a, at=start: a[at : at + chunk], stacked)
            losses, coordinates = compute(part)
            parts.append(PerExample(_read(maps, behind, coordinates), to_torch(losses)))
        return parts[0] if len(parts) == 1 else _joined(parts)

    return rows


@partial(jax.jit, static_argnames=("loss", "structure", "names", "read"))
def _gradients(
    loss: Loss,
    structure: PyTreeDef,
    names: tuple[str, ...],
    read: tuple[str, ...],
    leaves: tuple[jax.Array, ...],
    sides: Mapping[str, Pair],
    batch: Any,
) -> tuple[jax.Array, Arrays]:
    """Compute losses (B,), and name → G of each parameter in ``read``, as L G Rᵀ where it has ``sides``.

    ``names`` and ``leaves`` are in the order of ``structure``: a dict would reach a compiled function sorted by name.
    """
    arrays = dict(zip(names, leaves, strict=True))
    kernels = _kernels(loss, structure, leaves, batch)
    lifted = {name for at, name in enumerate(names) if at in kernels and name in sides}
    wanted = {name: _probe(arrays[name], sides[name]) if name in lifted else arrays[name] for name in read}

    def of_wanted(wanted: Arrays, example: Any) -> Any:
        given = [
            Lifted(array, wanted[name], *sides[name]) if name in lifted else wanted.get(name, array)
            for name, array in arrays.items()
        ]
        return loss(jax.tree.unflatten(structure, given), example)

    losses, grads = jax.vmap(jax.value_and_grad(of_wanted), in_axes=(None, 0))(wanted, batch)
    projected = {name: two_sided(*sides[name], grads[name]) for name in sides if name not in lifted}
    return losses, {**grads, **projected}


def _kernels(loss: Loss, structure: PyTreeDef, leaves: tuple[jax.Array, ...], batch: Any) -> set[int]:
    """Find the places of the parameters that the loss uses as kernels of ``lifted_dense`` alone."""
    example = jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape[1:], array.dtype), batch)
    traced = jax.make_jaxpr(lambda given, one: loss(jax.tree.unflatten(structure, given), one))(leaves, example)
    (value, *others) = traced.out_avals or [None]
    if others or value is None or value.shape or not jnp.issubdtype(value.dtype, jnp.floating):
        raise FuncattribError(
            f"expected a loss(params, example) that returns one floating-point number, found "
            f"{', '.join(str(aval) for aval in traced.out_avals) or 'nothing'}; an example has no batch axis"
        )
    return dense_kernels(traced.jaxpr, traced.jaxpr.invars[: len(leaves)])


def _probe(kernel: jax.Array, sides: Pair) -> jax.Array:
    """Return θ₀ = 0, (P, Q)."""
    shape = [n if side is None else side.shape[0] for side, n in zip(sides, kernel.shape, strict=True)]
    return jnp.zeros(shape, kernel.dtype)


def _read(maps: Readouts, behind: Mapping[str, GradientMap | None], coordinates: Arrays) -> Grads:
    """Read a chunk's coordinates as leaves; parameters that share a probe add up in it."""
    probes: Grads = {}
    for name, each in maps.items():
        value, rest = to_torch(coordinates[name]), behind[name]
        value = value if rest is None else rest.from_gradient(value)
        probes[each.probe] = probes[each.probe] + value if each.probe in probes else value
    return unpack(maps, probes)


def _joined(parts: list[PerExample]) -> PerExample:
    grads = {name: torch.cat([part.grads[name] for part in parts]) for name in parts[0].grads}
    return PerExample(grads, torch.cat([part.losses for part in parts]))


def _operand(device: jax.Device, value: Any) -> jax.Array:
    if isinstance(value, Tensor):
        return to_jax(value, device)
    if not isinstance(value, jax.Array | np.ndarray):
        raise FuncattribError(f"expected arrays or tensors in a batch, found a {type(value).__name__}; stack examples")
    array = jnp.asarray(value)
    return array if array.devices() == {device} else jax.device_put(array, device)


def _examples(batch: Any) -> int:
    """Count the stacked examples."""
    lengths = {name_of(path): leaf.shape[:1] for path, leaf in jax.tree_util.tree_leaves_with_path(batch)}
    if len(set(lengths.values())) != 1 or () in lengths.values():
        found = ", ".join(f"{name} {shape[0] if shape else 'without an axis'}" for name, shape in lengths.items())
        raise FuncattribError(f"expected arrays of equally many examples in a batch, found {found or 'no arrays'}")
    return next(iter(lengths.values()))[0]


per_example_grad = chunked(32)
"""``per_example_grad(loss, params, batch)``: ``jax.vmap(jax.grad(loss))``, 32 examples at a time.

Example:
    >>> import funcattrib as fa
    >>> loss = lambda params, example: jnp.square(example["x"] @ params["w"]).sum()
    >>> chain = fa.compose(per_example_grad, fa.project(2))
    >>> chain(loss, {"w": jnp.ones((5, 3))}, {"x": jnp.ones((4, 5))})["w"].shape
    torch.Size([4, 2, 2])
"""
