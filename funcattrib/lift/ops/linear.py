"""Rules for matrix products: ``F.linear``, W (out, in), and ``torch.addmm``, W (in, out), which HF ``Conv1D`` uses.

y = x Wᵀ + b        G_W = Σ_n g_n xᵀ_n        G_b = Σ_n g_n
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from funcattrib.lift.coordinates import Reading
from funcattrib.lift.ops.frozen_linear import frozen_linear
from funcattrib.lift.parameter import Lifted, Rule, plain
from funcattrib.lift.tap import tap


def _linear(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x, weight, bias = _bind(("input", "weight", "bias"), args, kwargs)
    if isinstance(x, Lifted):
        return NotImplemented
    if _frozen(weight):
        y = frozen_linear(x, weight.weight, plain(bias), weight.theta, weight.reading, False)
        return tap_bias(y, bias)
    y = F.linear(x, plain(weight), plain(bias))
    if isinstance(weight, Lifted):
        kept: Any = weight.reading.keep_cols(by_example(x, weight))
        y = tap(y, weight.theta, partial(_read_rows, weight.reading, weight.theta.shape[0]), kept)
    return tap_bias(y, bias)


def _addmm(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    bias, x, weight = _bind(("input", "mat1", "mat2"), args, kwargs)
    if isinstance(x, Lifted) or kwargs.get("beta", 1) != 1 or kwargs.get("alpha", 1) != 1:
        return NotImplemented
    if _frozen(weight):
        y = frozen_linear(x, weight.weight, plain(bias), weight.theta, weight.reading, True)
        return tap_bias(y, bias)
    y = torch.addmm(plain(bias), x, plain(weight))
    if isinstance(weight, Lifted):
        kept: Any = weight.reading.keep_rows(by_example(x, weight))
        y = tap(y, weight.theta, partial(_read_cols, weight.reading, weight.theta.shape[0]), kept)
    return tap_bias(y, bias)


def _frozen(weight: Any) -> bool:
    """Lifted and not trained: its own gradient is wanted by nobody."""
    return isinstance(weight, Lifted) and not weight.weight.requires_grad


def tap_bias(y: Tensor, bias: Any) -> Tensor:
    """Taps ``y`` for a bias that was added along its last axis."""
    if not isinstance(bias, Lifted):
        return y
    return tap(y, bias.theta, partial(_read_bias, bias.reading, bias.theta.shape[0]))


def by_example(x: Tensor, leaf: Lifted) -> Tensor:
    """(…, i) → (E, N, i)."""
    return x.reshape(leaf.theta.shape[0], -1, x.shape[-1])


def _read_rows(reading: Reading, examples: int, g: Tensor, cols: Tensor) -> Tensor:
    return reading.read(reading.keep_rows(g.reshape(examples, -1, g.shape[-1])), cols)


def _read_cols(reading: Reading, examples: int, g: Tensor, rows: Tensor) -> Tensor:
    return reading.read(rows, reading.keep_cols(g.reshape(examples, -1, g.shape[-1])))


def _read_bias(reading: Reading, examples: int, g: Tensor) -> Tensor:
    return reading.read(reading.keep_rows(g.reshape(examples, -1, g.shape[-1]).sum(1, keepdim=True)), None)


def _bind(names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """Positional and keyword arguments in order, None where absent."""
    return [args[i] if i < len(args) else kwargs.get(name) for i, name in enumerate(names)]


RULES: dict[Any, Rule] = {F.linear: _linear, torch.addmm: _addmm}
