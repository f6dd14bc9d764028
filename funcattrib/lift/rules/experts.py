"""Rule for the linear layers of experts: G_x = Σ g_s u_sᵀ over an expert's tokens, in a stack (X, O, I).

Factors are projected token by token; which expert a token went to is looked at when they are summed, below every
transform, with the vmapped axis folded into the examples.
"""

from functools import partial
from typing import Any

from torch import Tensor

from funcattrib.errors import ChainError
from funcattrib.kernels.experts import expert_linear, read_expert_outer
from funcattrib.lift.lifted import Lifted, Rule
from funcattrib.lift.maps.base import GradientMap
from funcattrib.lift.maps.experts import Stack
from funcattrib.lift.tap import tap


def _expert_linear(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x, weight, expert, transposed = args
    if isinstance(x, Lifted):
        return NotImplemented
    y = expert_linear(x, weight.weight, expert, transposed)
    found, rest = weight.map.stack_first()
    stack = found or Stack()
    examples = _in_order(x, weight)
    x_ESI, expert_ES = x.detach().reshape(examples, -1, x.shape[-1]), expert.reshape(examples, -1)
    kept = stack.rows_of(x_ESI, expert_ES) if transposed else stack.cols_of(x_ESI, expert_ES)
    read = partial(_read, stack, rest, weight.weight.shape[0], transposed, examples)
    return tap(y, weight.theta, read, kept, expert_ES)


def _in_order(x: Tensor, leaf: Lifted) -> int:
    """Count the examples that the tokens belong to, which must follow one another, each as many times as it has
    experts.

    Raises:
        ChainError: one probe an example, and tokens that need not be in the examples' order.
    """
    examples = leaf.theta.shape[0]
    if examples > 1 and (not leaf.tokens or x.shape[0] % (examples * leaf.tokens)):
        raise ChainError(
            f"expected the tokens of {examples} examples of equal length for attributed experts, found {x.shape[0]} "
            f"tokens ({leaf.tokens} per row of the input); leave the experts out, or collect with per_example_grad"
        )
    return examples


def _read(
    stack: Stack,
    rest: GradientMap | None,
    experts: int,
    transposed: bool,
    examples: int,
    g: Tensor,
    kept: Tensor,
    expert: Tensor,
) -> Tensor:
    g_ESO = g.reshape(examples, -1, g.shape[-1])
    rows, cols = (kept, stack.cols_of(g_ESO, expert)) if transposed else (stack.rows_of(g_ESO, expert), kept)
    return read_expert_outer(rows, cols, expert, experts, None if rest is None else rest.from_gradient)


RULES: dict[Any, Rule] = {expert_linear: _expert_linear}
