"""Pytrees as names and arrays: ``{"layers": [{"kernel": …}]}`` has the leaf ``layers.0.kernel``."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import GetAttrKey, PyTreeDef, keystr, tree_flatten_with_path
from torch import Tensor

from funcattrib.errors import FuncattribError
from funcattrib.jax.dlpack import to_torch

_HINT = "pass what is differentiated alone: nnx.split(model, nnx.Param, …), eqx.partition(model, eqx.is_inexact_array)"


class Named(NamedTuple):
    """A pytree taken apart: its structure, and name → array in the order of its leaves."""

    structure: PyTreeDef
    arrays: dict[str, jax.Array]


def take_apart(tree: Any, what: str = "the parameters", traced: bool = False) -> Named:
    """Return the leaves by name.

    A name is the path, its parts joined by dots, without the ``value`` under which Flax NNX keeps a variable's array.

    Args:
        what: what the tree is called in errors.
        traced: arrays may stand for values that are not there yet, inside ``jit``.

    Raises:
        FuncattribError: a leaf that is no array, not of floating point, or on several devices; names that coincide.

    Example:
        >>> list(take_apart({"layers": [{"kernel": jnp.ones((2, 3))}], "scale": jnp.ones(2)}).arrays)
        ['layers.0.kernel', 'scale']
    """
    paths, structure = tree_flatten_with_path(tree)
    arrays: dict[str, jax.Array] = {}
    for path, leaf in paths:
        name = name_of(path)
        if not isinstance(leaf, jax.Array | np.ndarray):
            raise FuncattribError(f"expected arrays in {what}, found a {type(leaf).__name__} at {name}\n{_HINT}")
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise FuncattribError(f"expected floating-point arrays in {what}, found {leaf.dtype} at {name}\n{_HINT}")
        if not traced and isinstance(leaf, jax.core.Tracer):
            raise FuncattribError(
                f"{name} of {what} has no value while it is traced; call this outside jit, grad and vmap, or use "
                "as_jax with callback=True"
            )
        if not traced and len(devices := jnp.asarray(leaf).devices()) > 1:
            raise FuncattribError(
                f"expected {what} on one device, found {name} on {len(devices)}; bring them together with device_put"
            )
        if name in arrays:
            raise FuncattribError(f"two leaves of {what} are named {name}; rename one")
        arrays[name] = jnp.asarray(leaf)
    if not arrays:
        raise FuncattribError(f"there are no arrays in {what}\n{_HINT}")
    return Named(structure, arrays)


def tensors_of(tree: Any) -> dict[str, Tensor]:
    """Return the leaves by name as tensors, in the same memory."""
    return {name: to_torch(array) for name, array in take_apart(tree).arrays.items()}


def name_of(path: tuple[Any, ...]) -> str:
    """Return a path as a name."""
    if len(path) > 1 and path[-1] == GetAttrKey("value"):
        path = path[:-1]
    return keystr(path, simple=True, separator=".")
