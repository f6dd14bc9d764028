"""``Lifted``: a leaf of the functional parameter dict that stands for W + C*(θ).

The model is called as it is (``torch.func.functional_call``). Operations with a rule run on W and are tapped; any
other operation on the leaf falls back to the dense, differentiable W + C*(θ): slower, and always right.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from funcattrib.errors import ChainError
from funcattrib.lift.maps.base import GradientMap
from funcattrib.weights.stored import METADATA

Rule = Callable[[tuple[Any, ...], dict[str, Any]], Any]


class Lifted(Tensor):
    """W with a probe θ of shape (E, …): one an example, or E = 1 inside ``vmap``, where all tokens are one example's.

    Attributes:
        weight: W itself, a plain tensor or a stored one.
        theta: the zero-valued probe.
        map: C.
        rules: operation → rule.
        tokens: of every example, where known: an input of E · tokens rows is then the examples one after the other.
    """

    weight: Tensor
    theta: Tensor
    map: GradientMap
    rules: Mapping[Any, Rule]
    tokens: int | None

    @staticmethod
    def __new__(
        cls,
        weight: Tensor,
        theta: Tensor,
        gradient_map: GradientMap,
        rules: Mapping[Any, Rule],
        tokens: int | None = None,
    ) -> "Lifted":
        """Create a tensor that shares W's storage and metadata."""
        leaf = Tensor._make_subclass(cls, weight, weight.requires_grad)
        leaf.weight, leaf.theta, leaf.map, leaf.rules, leaf.tokens = weight, theta, gradient_map, rules, tokens
        return leaf

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        leaf = next((a for a in (*args, *kwargs.values()) if isinstance(a, Lifted)), None)
        if leaf is not None and (rule := leaf.rules.get(func)) is not None:
            result = rule(args, kwargs)
            if result is not NotImplemented:
                return result
        return func(*_densify(args, func), **_densify(kwargs, func))

    def dense(self, operation: str = "this operation") -> Tensor:
        """Return W + C*(θ) as a plain tensor.

        Raises:
            ChainError: there is one probe an example (batched autograd) and no single W.
        """
        if self.theta.shape[0] != 1:
            raise ChainError(
                f"{operation} is not supported for attributed parameters outside vmap; "
                "leave this parameter out (select), or collect with per_example_grad"
            )
        return self.weight + self.map.adjoint(self.theta[0]).to(self.weight.dtype)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Lifted({tuple(self.weight.shape)}, theta={tuple(self.theta.shape)})"


def plain(value: Any) -> Any:
    """Return W of a lifted leaf, anything else as it is."""
    return value.weight if isinstance(value, Lifted) else value


def _densify(value: Any, func: Any) -> Any:
    if isinstance(value, Lifted):
        return value.dense(getattr(func, "__name__", str(func)))
    if isinstance(value, dict):
        return {key: _densify(item, func) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        items = [_densify(item, func) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value
