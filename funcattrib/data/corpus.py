"""The documents of a run, as the computation of rows needs them."""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch

from funcattrib.types import Batch


class Corpus(Protocol):
    """The source of rows: ``Documents`` of tokens, or ``Examples`` for a user's loss."""

    @property
    def lengths(self) -> np.ndarray:
        """Return the tokens of each document, (rows,)."""

    def batch(self, indices: Sequence[int], device: torch.device | str = "cpu") -> Batch:
        """Stack and pad documents."""

    @property
    def text_columns(self) -> tuple[str, ...]:
        """Return the columns of ``metadata`` that hold text."""

    def metadata(self, rows: range) -> dict[str, Any]:
        """Return what a store keeps of each document to show it."""

    def identity(self) -> dict[str, Any]:
        """Return the manifest's entry for the data: a content fingerprint and counts."""

    def notes(self) -> dict[str, Any]:
        """Return further metadata of the data, which is not compared."""
