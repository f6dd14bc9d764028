"""Folding the axis that ``torch.func.vmap`` hides into the explicit leading example axis.

``fold`` turns an operand with a vmapped axis, logical shape (E, ...), into (V·E, ...), and ``unfold``
undoes it, where V is the size of the vmapped axis and E the number of examples seen inside it.
"""

from torch import Tensor


def fold(tensor: Tensor | None, axis: int | None, size: int) -> Tensor | None:
    """Fold the vmapped axis into the first, (…, V at ``axis``, …) → (V·E, …); an operand without one is repeated V
    times.
    """
    if tensor is None:
        return None
    first = tensor.unsqueeze(0).expand(size, *tensor.shape) if axis is None else tensor.movedim(axis, 0)
    return first.flatten(0, 1)


def unfold(tensor: Tensor, size: int) -> Tensor:
    """Divide the first axis, (V·E, …) → (V, E, …)."""
    return tensor.unflatten(0, (size, tensor.shape[0] // size))
