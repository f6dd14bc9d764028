"""Rules for ``F.conv1d``, ``F.conv2d`` and ``F.conv3d``: linear layers on patches.

y[:, n] = W patch_n + b        G_W = Σ_n g_n patch_nᵀ        G_b = Σ_n g_n

Stride, padding, dilation and groups decide what a patch is (``lift/maps/conv.py``). A grouped kernel is small: its G is
formed and read. With one group, G is read from its factors like a linear layer's.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from funcattrib.lift.factors import alike, outer
from funcattrib.lift.lifted import Lifted, Rule, plain
from funcattrib.lift.maps.base import GradientMap
from funcattrib.lift.maps.conv import patches
from funcattrib.lift.rules.linear import by_example
from funcattrib.lift.tap import tap

_NAMES = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")


def _conv(axes: int, convolve: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    options: dict[str, Any] = {"bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1}
    options |= dict(zip(_NAMES, args, strict=False)) | kwargs
    x, weight, bias = (options.pop(name) for name in _NAMES[:3])
    if isinstance(x, Lifted):
        return NotImplemented
    y = convolve(x, plain(weight), plain(bias), **options)
    batched, tapped = (x, y) if x.ndim == 2 + axes else (x[None], y[None])
    if isinstance(weight, Lifted):
        tapped = _tap_weight(batched, tapped, weight, axes, options)
    if isinstance(bias, Lifted):
        tapped = tap(tapped, bias.theta, partial(_read_bias, bias.map, bias.theta.shape[0]))
    return tapped if x.ndim == 2 + axes else tapped[0]


def _tap_weight(x: Tensor, y: Tensor, weight: Lifted, axes: int, options: dict[str, Any]) -> Tensor:
    shape, gradient_map, groups = tuple(weight.weight.shape), weight.map, options["groups"]
    stride, dilation = (_each_axis(options[name], axes) for name in ("stride", "dilation"))
    padding = _padding(options["padding"], shape[2:], dilation)
    # Groups are an axis: (E, N, g, I)
    seen = [patches(part, shape[2:], stride, padding, dilation) for part in x.chunk(groups, 1)]
    cols = by_example(torch.stack(seen, 2).flatten(2), weight).unflatten(-1, (groups, -1))
    if groups == 1 and gradient_map.takes_patches:
        kept: Any = gradient_map.reduce_cols(cols[:, :, 0])
        return tap(y, weight.theta, partial(_read_factors, gradient_map, weight.theta.shape[0]), kept)
    return tap(y, weight.theta, partial(_read_formed, gradient_map, shape), cols)


def _read_factors(gradient_map: GradientMap, examples: int, g: Tensor, cols: Tensor) -> Tensor:
    return gradient_map.from_factors(*alike(gradient_map.reduce_rows(_by_position(g, examples)), cols))


def _read_formed(gradient_map: GradientMap, shape: tuple[int, ...], g: Tensor, cols: Tensor) -> Tensor:
    examples, _, groups, _ = cols.shape
    rows = _by_position(g, examples).unflatten(-1, (groups, -1))
    by_group = alike(rows.movedim(2, 1).flatten(0, 1), cols.movedim(2, 1).flatten(0, 1))
    formed = outer(*by_group)  # (E·g, O/g, I)
    return gradient_map.from_gradient(formed.reshape(examples, *shape))


def _read_bias(gradient_map: GradientMap, examples: int, g: Tensor) -> Tensor:
    return gradient_map.from_factors(gradient_map.reduce_rows(_by_position(g, examples).sum(1, keepdim=True)), None)


def _by_position(g: Tensor, examples: int) -> Tensor:
    """Reshape (B, o, *positions) to (E, N, o)."""
    return g.flatten(2).transpose(1, 2).reshape(examples, -1, g.shape[1])


def _each_axis(value: int | tuple[int, ...], axes: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * axes if len(values) == 1 else values


def _padding(
    value: str | int | tuple[int, ...], kernel: tuple[int, ...], dilation: tuple[int, ...]
) -> tuple[tuple[int, int], ...]:
    """Return the zeros before and after each axis; ``same`` puts the odd one after, as torch does."""
    if value == "valid":
        return ((0, 0),) * len(kernel)
    if value == "same":
        totals = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        return tuple((total // 2, total - total // 2) for total in totals)
    assert not isinstance(value, str), "torch has refused any other word"
    return tuple((n, n) for n in _each_axis(value, len(kernel)))


RULES: dict[Any, Rule] = {
    F.conv1d: partial(_conv, 1, F.conv1d),
    F.conv2d: partial(_conv, 2, F.conv2d),
    F.conv3d: partial(_conv, 3, F.conv3d),
}
