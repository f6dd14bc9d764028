"""Random draws that are a function of (seed, name, side) alone.

A draw never touches the global generator and does not depend on the order in which parameters are
visited, on which other parameters were selected, or on the number of processes.
"""

import hashlib

import torch
from torch import Tensor


def generator(seed: int, *names: str) -> torch.Generator:
    """Return a CPU generator seeded by a hash of ``seed`` and ``names``.

    Example:
        >>> a, b = generator(0, "w", "left"), generator(0, "w", "left")
        >>> bool((torch.rand(3, generator=a) == torch.rand(3, generator=b)).all())
        True
    """
    digest = hashlib.sha256("\x1f".join([str(seed), *names]).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def rademacher(rows: int, columns: int, source: torch.Generator) -> Tensor:
    """Draw a (rows, columns) float32 matrix with entries ±1/√rows, so that E[AᵀA] = I."""
    signs = torch.randint(0, 2, (rows, columns), generator=source, dtype=torch.int8)
    return signs.to(torch.float32).mul_(2).sub_(1).div_(rows**0.5)


def normal(rows: int, columns: int, source: torch.Generator) -> Tensor:
    """Draw a (rows, columns) float32 matrix with entries N(0, 1/rows), so that E[AᵀA] = I."""
    return torch.randn(rows, columns, generator=source).div_(rows**0.5)
