"""Inverse powers of a Gram matrix, damped.

    H = V diag(λ) Vᵀ, m = mean(λ) = trace(H) / D

    relative        V diag((λ + δ m)^p) Vᵀ
    absolute        V diag((λ + δ)^p) Vᵀ
    pseudoinverse   V diag(λ^p where λ > δ m, else 0) Vᵀ

References: damping relative to the mean eigenvalue, EK-FAC influence functions, arXiv 2308.03296.
"""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

Damping = Literal["relative", "absolute", "pseudoinverse"]


def inverse_power(
    gram: Float[Tensor, "D D"], power: float, damping: float = 0.1, kind: Damping = "relative"
) -> Float[Tensor, "D D"]:
    """Compute the damped ``power`` of a symmetric positive semi-definite matrix, in float64.

    A direction that is numerically zero and not damped gets 0, as in a pseudoinverse; so does all of a zero matrix,
    damped or not: what no gradient was seen in stays zero, and nothing is ever infinite.

    Args:
        gram: H; any floating-point type.
        power: -1 or -0.5.
        damping: δ ≥ 0.
        kind: as above.

    Example:
        >>> inverse_power(torch.diag(torch.tensor([4.0, 0.0])), -0.5, damping=0.0)
        tensor([[0.5000, 0.0000],
                [0.0000, 0.0000]], dtype=torch.float64)
    """
    values, vectors = torch.linalg.eigh(gram.to(torch.float64))
    values = without_rounding(values)
    added = damping if kind == "absolute" else damping * values.mean()
    base = torch.where(values > added, values, 0.0) if kind == "pseudoinverse" else values + added
    powers = torch.where((base > 0) & (values.amax() > 0), base**power, 0.0)
    powered: Tensor = (vectors * powers) @ vectors.T
    return powered


def without_rounding(eigenvalues: Float[Tensor, "D"]) -> Float[Tensor, "D"]:
    """Return eigenvalues of a semi-definite matrix, those below D ε λ_max (a rounded zero) set to 0."""
    tolerance = len(eigenvalues) * torch.finfo(torch.float64).eps * eigenvalues.amax()
    return torch.where(eigenvalues > tolerance, eigenvalues, 0.0)
