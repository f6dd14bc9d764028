"""Rules for the vectors of norm layers.

    layer norm   y = x̂ ⊙ w + b        G_w = Σ_n g_n ⊙ x̂_n        G_b = Σ_n g_n
    product      y = x ⊙ w            (RMSNorm as transformers writes it)

A constant added to a leaf and a change of its dtype leave its gradient's coordinates alone (Gemma's ``1 + w``).
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from funcattrib.lift.lifted import Lifted, Rule, plain
from funcattrib.lift.maps.base import GradientMap
from funcattrib.lift.maps.per_token import summed
from funcattrib.lift.rules.linear import tap_bias
from funcattrib.lift.tap import tap


def _layer_norm(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    options: dict[str, Any] = {"weight": None, "bias": None, "eps": 1e-5}
    options |= dict(zip(("input", "normalized_shape", "weight", "bias", "eps"), args, strict=False)) | kwargs
    x, shape, weight, bias = (options[k] for k in ("input", "normalized_shape", "weight", "bias"))
    if isinstance(x, Lifted) or len(shape) != 1:
        return NotImplemented
    y = F.layer_norm(x, shape, plain(weight), plain(bias), options["eps"])
    if isinstance(weight, Lifted):
        y = _tap_scale(y, F.layer_norm(x, shape, None, None, options["eps"]), weight)
    return tap_bias(y, bias)


def _rms_norm(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    options: dict[str, Any] = {"weight": None, "eps": None}
    options |= dict(zip(("input", "normalized_shape", "weight", "eps"), args, strict=False)) | kwargs
    x, shape, weight = (options[k] for k in ("input", "normalized_shape", "weight"))
    if isinstance(x, Lifted) or len(shape) != 1:
        return NotImplemented
    y = F.rms_norm(x, shape, plain(weight), options["eps"])
    return _tap_scale(y, F.rms_norm(x, shape, None, options["eps"]), weight)


def _mul(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    first, second = args[:2]
    leaf, x = (first, second) if isinstance(first, Lifted) else (second, first)
    if (
        not isinstance(x, Tensor)
        or isinstance(x, Lifted)
        or leaf.ndim != 1
        or x.ndim < 2
        or x.shape[-1] != leaf.shape[0]
    ):
        return NotImplemented
    return _tap_scale(x * leaf.weight, x, leaf)


def _add(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    first, second = args[:2]
    if kwargs:
        return NotImplemented
    leaf, other = (first, second) if isinstance(first, Lifted) else (second, first)
    if isinstance(other, (int, float)):
        return Lifted(leaf.weight + other, leaf.theta, leaf.map, leaf.rules, leaf.tokens)
    if not isinstance(other, Tensor) or isinstance(other, Lifted) or leaf.ndim != 1 or other.ndim < 2:
        return NotImplemented
    return tap_bias(other + leaf.weight, leaf) if other.shape[-1] == leaf.shape[0] else NotImplemented


def _cast(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    leaf, *rest = args
    cast = getattr(leaf.weight, name)(*rest, **kwargs)
    return Lifted(cast, leaf.theta, leaf.map, leaf.rules, leaf.tokens)


def _tap_scale(y: Tensor, x: Tensor, leaf: Lifted) -> Tensor:
    return tap(y, leaf.theta, partial(_read_scale, leaf.map, leaf.theta.shape[0]), x)


def _read_scale(gradient_map: GradientMap, examples: int, g: Tensor, x: Tensor) -> Tensor:
    rows = (g * x).reshape(examples, -1, g.shape[-1])
    return gradient_map.from_factors(gradient_map.reduce_rows(summed(gradient_map, rows)), None)


RULES: dict[Any, Rule] = {
    F.layer_norm: _layer_norm,
    F.rms_norm: _rms_norm,
    Tensor.mul: _mul,
    Tensor.__mul__: _mul,
    Tensor.__rmul__: _mul,
    torch.mul: _mul,
    Tensor.add: _add,
    Tensor.__add__: _add,
    Tensor.__radd__: _add,
    torch.add: _add,
    Tensor.float: partial(_cast, "float"),
    Tensor.to: partial(_cast, "to"),
    Tensor.type_as: partial(_cast, "type_as"),
}
