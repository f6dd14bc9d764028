"""A chain's state across frameworks: the same tree of dicts and tuples, with arrays in the place of tensors."""

from typing import Any

import jax

from funcattrib.chain import state_tree
from funcattrib.jax.dlpack import to_jax, to_torch


def state_to_jax(state: Any) -> Any:
    """Convert a chain's state to a pytree of arrays, in the same memory where that can be.

    Statistics are in float64 and stay so, whatever ``jax_enable_x64`` says; what JAX computes of them may be narrower.

    Example:
        >>> import torch
        >>> state_to_jax(({"w": torch.ones(2)}, None))
        ({'w': Array([1., 1.], dtype=float32)}, None)
    """
    with jax.enable_x64(True):
        return state_tree.map_tensors(to_jax, state)


def state_to_torch(state: Any) -> Any:
    """Convert arrays back to tensors; tensors stay as they are.

    Example:
        >>> import jax.numpy as jnp
        >>> state_to_torch({"w": jnp.ones(2)})
        {'w': tensor([1., 1.])}
    """
    return state_tree.map_leaves(to_torch, state, jax.Array)
