"""The documents of a run, as whatever computes rows needs them."""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch

from funcattrib.types import Batch


class Corpus(Protocol):
    """What rows are computed from: ``Documents`` of tokens, or ``Examples`` for a loss of the user's own."""

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each document, (rows,)."""

    def batch(self, indices: Sequence[int], device: torch.device | str = "cpu") -> Batch:
        """Documents stacked and padded."""

    def metadata(self, rows: range) -> dict[str, Any]:
        """What a store keeps of each document to show it."""

    def identity(self) -> dict[str, Any]:
        """What the manifest keeps of the data: a content fingerprint and counts."""

    def notes(self) -> dict[str, Any]:
        """What is told of the data beside that, and not compared."""
