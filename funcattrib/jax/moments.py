"""Second moments read from an optimizer's state in optax.

    scale_by_adam (adam, adamw, nadam, lamb, …)    ν / (1 − β₂^count)
    scale_by_factored_rms (adafactor)               r and c as they are, or v where a parameter is small: no bias

Optax factors the two longest axes of a parameter and calls the mean over the longest ``v_row``; what is r and what is c
follows from the shape.

References: Adam, arXiv 1412.6980; Adafactor, arXiv 1804.04235.
"""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from funcattrib.errors import FuncattribError
from funcattrib.jax.dlpack import to_torch
from funcattrib.jax.pytrees import Named, take_apart
from funcattrib.transforms.moments import Moment

_ADAM = {"count", "nu"}
_FACTORED = {"count", "v_row", "v_col", "v"}


def optimizer_state(state: Any, params: Any, *, b2: float = 0.999) -> dict[str, Moment]:
    """Read second moments of every parameter that an optimizer of optax has trained, as the normalisations take them.

    Args:
        state: of the optimizer, however its transformations are chained or masked; Flax NNX's ``optimizer.opt_state``.
        params: the parameters, whose names and shapes say which moment is whose.
        b2: Adam's β₂, which its state does not hold.

    Returns:
        Parameter name → v, shaped like the parameter, or Adafactor's (r, c); float32, bias-corrected. Parameters that
        the optimizer does not hold are left out.

    Raises:
        FuncattribError: no second moments in the state, no step made, or moments that do not fit the parameters.

    Example:
        >>> import optax
        >>> params = {"w": jnp.zeros((1, 2))}
        >>> adam = optax.adam(1e-3)
        >>> _, state = adam.update({"w": jnp.array([[1.0, 2.0]])}, adam.init(params))
        >>> optimizer_state(state, params)["w"].round(decimals=3)
        tensor([[1., 4.]])
    """
    shapes = {name: array.shape for name, array in take_apart(params).arrays.items()}
    moments: dict[str, Moment] = {}
    for found in _states(state):
        count = int(_value(found.count))
        if not count:
            raise FuncattribError(
                "the optimizer has made no step and has no second moments; give its state after training"
            )
        moments |= _adam(found, count, b2, shapes) if set(found._fields) >= _ADAM else _factored(found, shapes)
    if not moments:
        raise FuncattribError("the optimizer's state has no second moments; supported are optax's Adam and Adafactor")
    return {name: moments[name] for name in shapes if name in moments}


def _states(state: Any) -> Iterator[Any]:
    """Yield those with second moments, inside whatever chains, masks and schedules hold them."""
    fields = set(getattr(state, "_fields", ()))
    if fields >= _ADAM or fields >= _FACTORED:
        yield state
    elif isinstance(state, tuple | list):
        for part in state:
            yield from _states(part)
    elif isinstance(state, dict):
        for part in state.values():
            yield from _states(part)


def _value(count: Any) -> Any:
    """Return the value of a count, which Flax NNX keeps in a variable."""
    return jax.tree.leaves(count)[0]


def _adam(state: Any, count: int, b2: float, shapes: dict[str, tuple[int, ...]]) -> dict[str, Moment]:
    return {
        name: to_torch(v.astype(jnp.float32) / (1 - b2**count)) for name, v in _fitting(state.nu, "nu", shapes).items()
    }


def _factored(state: Any, shapes: dict[str, tuple[int, ...]]) -> dict[str, Moment]:
    rows, cols, whole = (_named(part).arrays for part in (state.v_row, state.v_col, state.v))
    moments: dict[str, Moment] = {}
    for name, v in whole.items():
        if name not in shapes:
            raise FuncattribError(
                f"the optimizer's state has moments of {name}, which is not among the parameters; give those that it "
                "trained"
            )
        shape, row, col = shapes[name], rows[name].astype(jnp.float32), cols[name].astype(jnp.float32)
        if v.shape == shape and row.shape == (1,):
            moments[name] = to_torch(v.astype(jnp.float32))
            continue
        *_, second, longest = np.argsort(shape)  # as optax sorts them: v_row lacks the longest axis, v_col the second
        if (row.shape, col.shape) != tuple(tuple(np.delete(shape, axis)) for axis in (longest, second)):
            raise FuncattribError(f"expected moments of {name} for shape {shape}, found {row.shape} and {col.shape}")
        if len(shape) == 2:
            r, c = (row, col) if longest == 1 else (col, row)
            moments[name] = to_torch(r), to_torch(c)
        else:
            row = jnp.expand_dims(row, longest)
            moments[name] = to_torch(row / row.mean(second, keepdims=True) * jnp.expand_dims(col, second))
    return moments


def _fitting(tree: Any, what: str, shapes: dict[str, tuple[int, ...]]) -> dict[str, jax.Array]:
    arrays = _named(tree).arrays
    for name, array in arrays.items():
        if shapes.get(name) != array.shape:
            raise FuncattribError(
                f"the optimizer's {what} of {name} has shape {array.shape}, and the parameter has "
                f"{shapes.get(name, 'no entry of that name')}; give the parameters that the optimizer trained"
            )
    return arrays


def _named(tree: Any) -> Named:
    return take_apart(tree, "the optimizer's state")
