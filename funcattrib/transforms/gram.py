"""The second moments of gradients, H = E[c cᵀ], block by block, and their spectrum."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from funcattrib.errors import ChainError
from funcattrib.transforms.damping import without_rounding
from funcattrib.transforms.precondition import Gram, Preconditioner


def gram_matrices(state: Preconditioner | Sequence[object]) -> dict[str, Tensor]:
    """Return H of every block from the state of ``precondition``, finalized or not.

    Args:
        state: of the stage, or of a chain with one such stage.

    Returns:
        Block → E[c cᵀ], (D, D) float64, undamped: what ``precondition(gram=…)`` and ``mix_grams`` take.

    Raises:
        ChainError: no such stage in the chain, or several; nothing observed yet.

    Example:
        >>> from funcattrib.types import Leaf
        >>> from funcattrib.transforms import precondition
        >>> stage = precondition()
        >>> state, _ = stage.init({"w": Leaf((2,), torch.float32)})
        >>> gram_matrices(stage.observe(state, {"w": torch.tensor([[2.0, 0.0], [0.0, 0.0]])}))["w"]
        tensor([[2., 0.],
                [0., 0.]], dtype=torch.float64)
    """
    found = [state] if isinstance(state, Preconditioner) else [s for s in state if isinstance(s, Preconditioner)]
    if len(found) != 1:
        raise ChainError(f"expected the state of one precondition stage, found {len(found)}")
    preconditioner = found[0]
    if not preconditioner.seen > 0:
        raise ChainError("the state has seen no gradients; fit it first")
    return {block: total / preconditioner.seen.to(total.device) for block, total in preconditioner.gram.items()}


def spectrum(gram: Gram) -> Float[Tensor, "D"]:
    """Return the eigenvalues of all blocks of ``gram``, largest first, float64; a rounded zero is 0.

    Example:
        >>> spectrum({"a": torch.diag(torch.tensor([1.0, 3.0])), "b": torch.tensor([[2.0]])})
        tensor([3., 2., 1.], dtype=torch.float64)
    """
    values = [without_rounding(torch.linalg.eigvalsh(matrix.to(torch.float64))) for matrix in gram.values()]
    none = torch.empty(0, dtype=torch.float64)
    return torch.cat([none, *(value.cpu() for value in values)]).sort(descending=True).values
