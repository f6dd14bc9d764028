"""JAX in and out: per-example gradients of JAX losses for every chain, and chains as functions on JAX arrays."""

from importlib.util import find_spec

if find_spec("jax") is None:
    raise ImportError("jax is not installed; pip install 'funcattrib[jax]'")

from funcattrib.jax.chain import as_jax
from funcattrib.jax.dense import lifted_dense
from funcattrib.jax.moments import optimizer_state
from funcattrib.jax.per_example import chunked, per_example_grad
from funcattrib.jax.state import state_to_jax, state_to_torch

__all__ = [
    "as_jax",
    "chunked",
    "lifted_dense",
    "optimizer_state",
    "per_example_grad",
    "state_to_jax",
    "state_to_torch",
]
