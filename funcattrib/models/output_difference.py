"""Comparison of two outputs of a model: of its copy and itself, of parts and whole, padded and not."""

import torch
from torch import Tensor


def output_difference(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference of two outputs of one shape, in units of the spread of the expected one.

    Example:
        >>> output_difference(torch.tensor([1.0, 4.0]), torch.tensor([1.0, 3.0]))  # whose standard deviation is 1
        1.0
    """
    spread = max(float(expected.double().std(correction=0)), 1e-3 * float(expected.double().abs().max()), 1e-30)
    return float((found.double() - expected.double()).abs().max()) / spread


def same_outputs(found: Tensor | None, expected: Tensor) -> bool:
    """Return whether two outputs agree within rounding; None agrees with nothing.

    Example:
        >>> same_outputs(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.00001]))
        True
    """
    if found is None or found.shape != expected.shape:
        return False
    exact = expected.dtype in (torch.float32, torch.float64)
    return output_difference(found, expected) <= (1e-4 if exact else 3e-2)
