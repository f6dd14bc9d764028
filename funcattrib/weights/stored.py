"""``Stored``: a leaf of the functional parameter dict whose weight is made dense for its use, and dropped after it.

Where the weight lives is its storage's business: in shards (``sharded.py``), quantised (``quantised.py``).
Any operation works; a product (``F.linear``, ``addmm``, ``matmul``, stacks of experts) keeps the storage instead of W,
and makes W again in backward. Storage knows nothing of coordinates: a lifted leaf may stand on a stored weight.

    y = x Wᵀ + b, W made and dropped        backward: dx = g W, W made again

Shapes: S tokens, O/I output and input width.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from funcattrib.kernels.experts import expert_linear
from funcattrib.kernels.fold import fold, unfold


class Storage(Protocol):
    """The storage of a weight."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape of the dense weight."""

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of the dense weight."""

    @property
    def device(self) -> torch.device:
        """Return the device on which the dense weight is made."""

    def dense(self) -> Tensor:
        """Return the weight, for one operation."""


WeightSource = Tensor | Storage
"""A dense weight, or what makes one."""


class Stored(Tensor):
    """A frozen weight that answers for its shape, type and device, and is made by whatever uses it.

    Example:
        >>> class Half:
        ...     shape, dtype, device = (2, 2), torch.float32, torch.device("cpu")
        ...     def dense(self):
        ...         return torch.full((2, 2), 0.5)
        >>> weight = Stored(Half())
        >>> weight.shape, torch.nn.functional.linear(torch.ones(1, 2), weight)
        (torch.Size([2, 2]), tensor([[1., 1.]]))
    """

    @staticmethod
    def __new__(cls, held: Storage) -> "Stored":
        """Create the leaf with one number in place of all entries: what reads them past ``__torch_function__`` finds
        NaN.
        """
        metadata = torch.full((), torch.nan, dtype=held.dtype, device=held.device).expand(held.shape)
        return Tensor._make_subclass(cls, metadata, False)

    def __init__(self, held: Storage) -> None:
        super().__init__()
        self.held = held

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.detach:
            return Stored(args[0].held)
        if func in METADATA or func in _FLAGS:
            with torch._C.DisableTorchFunctionSubclass():
                result = func(*args, **kwargs)
            return args[0] if func is Tensor.requires_grad_ else result
        if (rule := _RULES.get(func)) is not None:
            result = rule(args, kwargs)
            if result is not NotImplemented:
                return result
        return func(*dense(args), **dense(kwargs))

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Stored({tuple(self.held.shape)}, {type(self.held).__name__})"


def dense(value: Any) -> Any:
    """Return ``value`` with every stored weight in it made dense; anything else as it is.

    Example:
        >>> dense([None, 3])
        [None, 3]
    """
    if isinstance(value, Stored):
        return value.held.dense()
    if isinstance(value, dict):
        return {key: dense(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        items = [dense(item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def source(weight: Tensor) -> WeightSource:
    """Return what an ``autograd.Function`` keeps of a weight in place of the dense one."""
    return weight.held if isinstance(weight, Stored) else weight


def made(weight: WeightSource) -> Tensor:
    """Return the dense weight of a source."""
    return weight if isinstance(weight, Tensor) else weight.dense()


class _Product(torch.autograd.Function):
    """x Wᵀ + b, or x W + b where W is stored (I, O)."""

    @staticmethod
    def forward(x: Tensor, bias: Tensor | None, weight: Storage, in_out: bool) -> Tensor:
        w = weight.dense()
        return F.linear(x, w.T if in_out else w, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.weight, ctx.in_out = inputs[2:]

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        d_x = d_bias = None
        if ctx.needs_input_grad[0]:
            w = ctx.weight.dense()
            d_x = g @ (w.T if ctx.in_out else w)
        if ctx.needs_input_grad[1]:
            d_bias = g.sum(tuple(range(g.ndim - 1)))
        return d_x, d_bias, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], x: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, int]:
        x = x.movedim(in_dims[0], 0) if in_dims[0] is not None else x.expand(info.batch_size, *x.shape)
        if in_dims[1] is None:
            return _Product.apply(x, bias, *rest), 0
        y = _Product.apply(x, None, *rest)
        assert bias is not None
        return y + bias.movedim(in_dims[1], 0).unflatten(0, (-1, *[1] * (y.ndim - 2))), 0


class _Experts(torch.autograd.Function):
    """Each token times its expert's matrix, as ``kernels/experts.py`` does it."""

    @staticmethod
    def forward(x: Tensor, expert: Tensor, weight: Storage, transposed: bool) -> Tensor:
        return expert_linear(x, weight.dense(), expert, transposed)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, expert, ctx.weight, ctx.transposed = inputs
        ctx.save_for_backward(expert)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        (expert,) = ctx.saved_tensors
        wanted = ctx.needs_input_grad[0]
        d_x = expert_linear(g, ctx.weight.dense(), expert, not ctx.transposed) if wanted else None
        return d_x, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], x: Tensor, expert: Tensor, *rest: Any) -> tuple[Tensor, int]:
        size = info.batch_size
        return unfold(_Experts.apply(fold(x, in_dims[0], size), fold(expert, in_dims[1], size), *rest), size), 0


def _product(x: Any, weight: Any, bias: Any, in_out: bool) -> Any:
    if type(x) is not Tensor or not isinstance(weight, Stored) or weight.ndim != 2 or x.ndim < 1:
        return NotImplemented
    inside = bias if bias is None or type(bias) is Tensor else dense(bias)
    if inside is not None and type(inside) is not Tensor:  # a lifted bias is tapped when it is added
        return _Product.apply(x, None, weight.held, in_out) + inside
    return _Product.apply(x, inside, weight.held, in_out)


def _linear(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x, weight, bias = bind_arguments(("input", "weight", "bias"), args, kwargs)
    return _product(x, weight, bias, False)


def _addmm(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    bias, x, weight = bind_arguments(("input", "mat1", "mat2"), args, kwargs)
    if kwargs.get("beta", 1) != 1 or kwargs.get("alpha", 1) != 1 or bias.ndim != 1:
        return NotImplemented
    return _product(x, weight, bias, True)


def _matmul(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    first, second = args[:2]
    if isinstance(first, Stored):  # W x with x (…, I, S)
        product = NotImplemented if second.ndim < 3 else _product(second.mT, first, None, False)
        return product if product is NotImplemented else product.mT
    return _product(first, second, None, True)


def _expert_linear(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x, weight, expert, transposed = args
    return _Experts.apply(x, expert, weight.held, transposed) if type(x) is Tensor else NotImplemented


def _to(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return the weight itself where it is converted to its own type and device."""
    weight, *wanted = (*args, *kwargs.values())
    return weight if all(each in (weight.dtype, weight.device) for each in wanted) else NotImplemented


def bind_arguments(names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """Return positional and keyword arguments in the order of ``names``, None where absent.

    Example:
        >>> bind_arguments(("input", "weight", "bias"), ("x",), {"weight": "w"})
        ['x', 'w', None]
    """
    return [args[i] if i < len(args) else kwargs.get(name) for i, name in enumerate(names)]


_RULES: dict[Any, Callable[[tuple[Any, ...], dict[str, Any]], Any]] = {
    F.linear: _linear,
    torch.addmm: _addmm,
    torch.matmul: _matmul,
    Tensor.matmul: _matmul,
    Tensor.__matmul__: _matmul,
    expert_linear: _expert_linear,
    Tensor.to: _to,
}

_ATTRIBUTES = "shape dtype device ndim layout requires_grad is_leaf is_cuda is_cpu is_meta is_sparse itemsize nbytes"
_METHODS = "size dim numel nelement ndimension is_floating_point is_complex stride is_contiguous element_size __len__"
METADATA = frozenset(getattr(Tensor, name).__get__ for name in _ATTRIBUTES.split()) | frozenset(
    getattr(Tensor, name) for name in _METHODS.split()
)
"""Attributes that may be asked of a leaf without meaning its value."""

_FLAGS = frozenset({Tensor.requires_grad_, Tensor.requires_grad.__set__, Tensor.grad.__get__})  # type: ignore[attr-defined,union-attr]
"""Flags set on the parameters of a module."""
