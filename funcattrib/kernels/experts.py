"""Linear layers of a mixture of experts under ``vmap(grad(...))``.

    y_s = W_{x(s)} u_s        x(s) the expert that token s goes to

Which tokens an expert has depends on data, which vmap cannot trace. Here the vmapped axis is folded into the tokens,
and the tokens are gathered by expert inside the ``autograd.Function``, below every transform. ``register_experts``
makes it known to transformers under the name ``funcattrib``; a token that goes to k experts appears k times.

Shapes: E examples, S tokens (each with one expert), X experts, O/I rows and columns of an expert's matrix.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import handle_torch_function, has_torch_function
from transformers.integrations.moe import ExpertsInterface

from funcattrib.errors import FuncattribError
from funcattrib.kernels.fold import fold, unfold

NAME = "funcattrib"

Read = Callable[[Tensor], Tensor]


def expert_linear(
    x: Float[Tensor, "S I"],
    weight: Float[Tensor, "X O I"] | Float[Tensor, "X I O"],
    expert: Int[Tensor, " S"],
    transposed: bool = False,
) -> Float[Tensor, "S O"]:
    """Multiply each token with its expert's matrix, stored (O, I), or (I, O) where ``transposed``.

    Example:
        >>> weight = torch.stack([torch.eye(2), 3 * torch.eye(2)])
        >>> expert_linear(torch.ones(3, 2), weight, torch.tensor([0, 1, 0]))
        tensor([[1., 1.],
                [3., 3.],
                [1., 1.]])
    """
    if has_torch_function((weight,)):
        return handle_torch_function(expert_linear, (weight,), x, weight, expert, transposed)
    return _ExpertLinear.apply(x, weight, expert, transposed, weight.requires_grad)


def expert_outer(
    rows: Float[Tensor, "E S P"], cols: Float[Tensor, "E S Q"], expert: Int[Tensor, "E S"], experts: int
) -> Float[Tensor, "E X P Q"]:
    """Sum rows_s cols_sᵀ over each example's tokens of each expert. Looks at ``expert``: not inside vmap.

    Example:
        >>> expert_outer(torch.ones(1, 3, 1), torch.ones(1, 3, 1), torch.tensor([[0, 2, 0]]), 3).flatten()
        tensor([2., 0., 1.])
    """
    examples = rows.shape[0]
    total = rows.new_zeros(examples, experts, rows.shape[-1], cols.shape[-1])
    for number in expert.unique().tolist():
        example, token = (expert == number).nonzero(as_tuple=True)  # in the order of examples
        counts = torch.bincount(example, minlength=examples)
        within = torch.arange(len(example), device=example.device) - (counts.cumsum(0) - counts)[example]
        longest = int(counts.max())
        padded = []
        for factor in (rows, cols):
            room = factor.new_zeros(examples, longest, factor.shape[-1])
            room[example, within] = factor[example, token]
            padded.append(room)
        total[:, number] = padded[0].mT @ padded[1]
    return total


def read_expert_outer(
    rows: Float[Tensor, "E S P"],
    cols: Float[Tensor, "E S Q"],
    expert: Int[Tensor, "E S"],
    experts: int,
    read: Read | None = None,
) -> Tensor:
    """Return ``read`` of ``expert_outer``, (E, …), also inside vmap; not differentiated again.

    Args:
        read: sums (E, X, P, Q) → (E, …); None gives the sums themselves.

    Example:
        >>> rows, expert = torch.ones(2, 1, 3, 1), torch.tensor([[[0, 2, 0]], [[1, 1, 1]]])
        >>> torch.vmap(read_expert_outer, (0, 0, 0, None))(rows, rows, expert, 3).flatten(1)
        tensor([[2., 0., 1.],
                [0., 3., 0.]])
    """
    return _ExpertOuter.apply(rows, cols, expert, experts, read)


def register_experts() -> str:
    """Register the experts' forward with transformers; return the name for ``experts_implementation``."""
    ExpertsInterface.register(NAME, _interface)
    return NAME


def _interface(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Adapt to the calling convention of transformers: (tokens, width), (tokens, k), (tokens, k) → (tokens, width)."""
    if getattr(module, "_is_expert_parallel", False):
        raise FuncattribError("expert parallelism is not supported; load the model with every expert on each process")
    tokens, k = top_k_index.shape
    expert = top_k_index.reshape(-1)
    x = hidden_states[:, None].expand(-1, k, -1).reshape(tokens * k, -1)
    inner = _layer(module, "gate_up_proj" if module.has_gate else "up_proj", x, expert)
    inner = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)
    outer = _layer(module, "down_proj", inner, expert)
    if getattr(module, "has_post_expert_norm", False):
        outer = module.post_expert_norm(outer)
    weighted = outer * top_k_weights.reshape(-1, 1)
    return weighted.reshape(tokens, k, -1).sum(1).to(hidden_states.dtype)


def _layer(module: Any, name: str, x: Tensor, expert: Tensor) -> Tensor:
    y = expert_linear(x, getattr(module, name), expert, module.is_transposed)
    return y + F.embedding(expert, getattr(module, f"{name}_bias")) if module.has_bias else y


class _ExpertLinear(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, expert: Tensor, transposed: bool, trained: bool) -> Tensor:
        return _by_expert(x, weight if transposed else weight.mT, expert)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, expert, ctx.transposed, ctx.trained = inputs
        ctx.save_for_backward(x if ctx.trained else None, weight, expert)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, expert = ctx.saved_tensors
        d_x = _ExpertLinear.apply(g, weight, expert, not ctx.transposed, False) if ctx.needs_input_grad[0] else None
        d_weight = None
        if ctx.trained and ctx.needs_input_grad[1]:
            rows, cols = (x, g) if ctx.transposed else (g, x)
            d_weight = read_expert_outer(rows[None], cols[None], expert[None], weight.shape[0])[0]
        return d_x, d_weight, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], x: Tensor, weight: Tensor, expert: Tensor, *rest: Any) -> Any:
        assert in_dims[1] is None, "the experts' weights are shared by the examples"
        size = info.batch_size
        y = _ExpertLinear.apply(fold(x, in_dims[0], size), weight, fold(expert, in_dims[2], size), *rest)
        return unfold(y, size), 0


class _ExpertOuter(torch.autograd.Function):
    """``expert_outer``, read by a function, with the vmapped axis folded into the examples."""

    @staticmethod
    def forward(rows: Tensor, cols: Tensor, expert: Tensor, experts: int, read: Read | None) -> Tensor:
        formed = expert_outer(rows, cols, expert, experts)
        return formed if read is None else read(formed)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.mark_non_differentiable(output)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *operands: Any) -> tuple[Tensor, int]:
        size = info.batch_size
        folded = [fold(operand, axis, size) for operand, axis in zip(operands[:3], in_dims, strict=False)]
        return unfold(_ExpertOuter.apply(*folded, *operands[3:]), size), 0


def _by_expert(x: Tensor, weight: Tensor, expert: Tensor) -> Tensor:
    """Multiply by expert, (S, I), (X, I, O) → (S, O): one product an expert that has tokens."""
    order = expert.argsort(stable=True)
    counts = torch.bincount(expert, minlength=weight.shape[0]).tolist()
    parts = x[order].split(counts)
    sorted_y = torch.cat([part @ weight[number] for number, part in enumerate(parts) if len(part)])
    return torch.empty_like(sorted_y).index_copy_(0, order, sorted_y)
