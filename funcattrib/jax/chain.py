"""Chains of transforms as functions on JAX arrays, run by torch in the same memory."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from funcattrib.chain import state_tree
from funcattrib.chain.chain import Chain
from funcattrib.chain.transform import State
from funcattrib.errors import FuncattribError
from funcattrib.jax.dlpack import to_jax, to_numpy, to_torch
from funcattrib.jax.pytrees import take_apart
from funcattrib.jax.state import state_to_torch
from funcattrib.models.functional import device_of
from funcattrib.types import Leaf, Spec

Arrays = dict[str, jax.Array]


def as_jax(chain: Chain, state: Any = None, *, callback: bool = False) -> Callable[[Any], Arrays]:
    """Return a chain's transforms as a function of gradients that JAX has computed.

    Args:
        chain: transforms; a source in front of them is not called.
        state: of a chain that must be fitted, as tensors or arrays.
        callback: go through ``jax.pure_callback``, so that the function may be called inside ``jit``: the gradients are
            then brought to the CPU. Without it they stay where they are, and the function is for outside.

    Returns:
        Gradients as a pytree of arrays (B, *shape), such as ``jax.vmap(jax.grad(loss), (None, 0))`` gives → name →
        (B, *shape), names as ``per_example_grad`` gives them. Every call takes the same leaves.

    Raises:
        FuncattribError: a state that does not fit; leaves that are no arrays, or others than in the first call; inside
            ``jit`` without ``callback``.

    Example:
        >>> import jax.numpy as jnp
        >>> from funcattrib.chain.chain import compose
        >>> from funcattrib.transforms import unit_norm
        >>> as_jax(compose(unit_norm))({"a": jnp.array([[3.0]]), "b": jnp.array([[4.0]])})
        {'a': Array([[0.6]], dtype=float32), 'b': Array([[0.8]], dtype=float32)}
    """
    restored = None if state is None else state_to_torch(state)
    first: tuple[Spec, State, Spec] | None = None

    def ready(spec: Spec, device: torch.device) -> tuple[State, Spec]:
        nonlocal first
        if first is None:
            template, following = chain.init(spec)
            given = restored if restored is None else state_tree.restore(template, state_tree.flatten(restored))
            first = spec, chain.ready(spec, device, given), following
        if spec != first[0]:
            differing = next(name for name in {**spec, **first[0]} if spec.get(name) != first[0].get(name))
            raise FuncattribError(
                f"expected {differing} as {_described(first[0].get(differing))}, as in the first call, found "
                f"{_described(spec.get(differing))}; make another function for gradients of another structure"
            )
        return first[1], first[2]

    def outside(grads: Any) -> Arrays:
        arrays = take_apart(grads, "the gradients").arrays
        tensors = {name: to_torch(array) for name, array in arrays.items()}
        own_state, _ = ready(_spec(arrays), device_of(tensors))
        rows = chain.apply(own_state, tensors)
        device = next(iter(next(iter(arrays.values())).devices()))
        return {name: to_jax(tensor, device) for name, tensor in rows.items()}

    def inside(grads: Any) -> Arrays:
        arrays = take_apart(grads, "the gradients", traced=True).arrays
        own_state, following = ready(_spec(arrays), torch.device("cpu"))
        examples = len(next(iter(arrays.values())))
        shapes = {n: jax.ShapeDtypeStruct((examples, *leaf.shape), _dtype(leaf)) for n, leaf in following.items()}
        return jax.pure_callback(partial(_called, chain, own_state), shapes, arrays, vmap_method="sequential")

    return inside if callback else outside


def _called(chain: Chain, state: State, arrays: Arrays) -> dict[str, np.ndarray]:
    """Apply the chain inside a callback, where no array of JAX can be made."""
    rows = chain.apply(state, {name: to_torch(array) for name, array in arrays.items()})
    return {name: to_numpy(tensor) for name, tensor in rows.items()}


def _spec(arrays: Arrays) -> Spec:
    for name, array in arrays.items():
        if not array.ndim:
            raise FuncattribError(
                f"expected gradients of shape (examples, …), found {name} without an axis of examples"
            )
    return {name: Leaf(array.shape[1:], getattr(torch, array.dtype.name)) for name, array in arrays.items()}


def _dtype(leaf: Leaf) -> np.dtype:
    return jnp.dtype(str(leaf.dtype).removeprefix("torch."))


def _described(leaf: Leaf | None) -> str:
    return "nothing" if leaf is None else f"{str(leaf.dtype).removeprefix('torch.')} of shape {leaf.shape}"
