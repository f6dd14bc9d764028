"""A dense layer whose kernel may carry a probe.

    y = x W + b,   W (I, O)        G = Σ_n x_n g_nᵀ        C(G) = L G Rᵀ = (x Lᵀ)ᵀ (g Rᵀ)

Where ``per_example_grad`` reads coordinates of a kernel, it puts a ``Lifted`` in the kernel's place: y is computed as
ever, and the backward pass gives the probe θ (P, Q) its coordinates from what came in and what comes back. G, (I, O)
for every example, is never formed.

Shapes: N tokens, I/O what comes in and goes out, P/Q coordinates.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from funcattrib.errors import FuncattribError

Side = jax.Array | None
"""A linear map along one axis: None (identity), a vector (diagonal) or a matrix."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Lifted:
    """A kernel with its probe and the two sides of its map; and what a loss may ask of it before it calls the layer."""

    kernel: jax.Array
    probe: jax.Array
    left: Side
    right: Side

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the kernel's shape."""
        return self.kernel.shape

    @property
    def ndim(self) -> int:
        """Return the kernel's number of axes."""
        return self.kernel.ndim

    @property
    def dtype(self) -> Any:
        """Return the kernel's dtype."""
        return self.kernel.dtype

    def __jax_array__(self) -> jax.Array:
        raise FuncattribError(
            f"the kernel of shape {self.shape} was converted to an array before it was passed to lifted_dense\n"
            "pass it as it is, without jnp.asarray around it"
        )

    def __getitem__(self, key: Any) -> "Lifted":
        assert key is Ellipsis, "uses must have excluded a kernel that is used otherwise"
        return self

    def astype(self, dtype: Any) -> "Lifted":
        """Return itself, in its own type."""
        assert dtype == self.dtype, "uses must have excluded a kernel that is used otherwise"
        return self


def lifted_dense(
    x: jax.Array, kernel: "jax.Array | Lifted", bias: jax.Array | None = None, *, out_first: bool = False
) -> jax.Array:
    """Compute x W + b, written so that projected gradients of W can be read without forming them in full.

    Args:
        x: (…, I).
        kernel: W (I, O), the parameter itself: a cast or transposed one is an array like any other.
        bias: b (O,).
        out_first: W is (O, I), as Equinox and torch keep it: x Wᵀ + b.

    Returns:
        (…, O).

    Example:
        >>> lifted_dense(jnp.ones((1, 2)), jnp.full((2, 3), 2.0), jnp.ones(3))
        Array([[5., 5., 5.]], dtype=float32)
    """
    if isinstance(kernel, Lifted):
        y = funcattrib_product(x, kernel.kernel, out_first=out_first)
        of_x, of_y = (kernel.right, kernel.left) if out_first else (kernel.left, kernel.right)
        kept, of_y = jax.lax.stop_gradient((along(of_x, x), of_y))
        y = _tap(out_first, y, kernel.probe, kept, of_y)
    else:
        y = funcattrib_product(x, kernel, out_first=out_first)
    return y if bias is None else y + bias


@partial(jax.jit, static_argnames="out_first")
def funcattrib_product(x: jax.Array, kernel: jax.Array, out_first: bool) -> jax.Array:
    """Compute x W; see ``PRODUCT``."""
    return x @ (kernel.T if out_first else kernel)


PRODUCT = "funcattrib_product"
"""Name of the product in a jaxpr, a separate compiled function, by which ``uses`` recognises it."""


def along(side: Side, x: jax.Array) -> jax.Array:
    """Apply ``side`` to the last axis."""
    if side is None:
        return x
    return x * side if side.ndim == 1 else x @ side.T


def two_sided(left: Side, right: Side, gradient: jax.Array) -> jax.Array:
    """Compute L G Rᵀ of formed gradients (B, …, …), L g of (B, …)."""
    if gradient.ndim == 2:
        return along(left, gradient)
    return along(left, along(right, gradient).mT).mT


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _tap(out_first: bool, y: jax.Array, probe: jax.Array, kept: jax.Array, of_y: Side) -> jax.Array:
    """Return y; in backward g goes to y, and the probe receives its coordinates."""
    return y


def _forward(out_first: bool, y: jax.Array, probe: jax.Array, kept: jax.Array, of_y: Side) -> tuple[jax.Array, Any]:
    return y, (probe, kept, of_y)


def _backward(out_first: bool, residuals: Any, g: jax.Array) -> tuple[Any, ...]:
    probe, kept, of_y = residuals
    tokens = tuple(range(g.ndim - 1))
    rows, cols = (along(of_y, g), kept) if out_first else (kept, along(of_y, g))
    return g, jnp.tensordot(rows, cols, (tokens, tokens)).astype(probe.dtype), None, None


_tap.defvjp(_forward, _backward)
