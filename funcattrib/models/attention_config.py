"""``AttentionConfig``: how heads lie along an axis of an attention weight. Importing this file imports no torch."""

from dataclasses import dataclass
from typing import Literal, get_args

from funcattrib.errors import ChainError

Order = Literal["head", "head qkv", "qkv head"]


@dataclass(frozen=True)
class AttentionConfig:
    """Layout of the heads along an axis of one weight.

    Attributes:
        num_heads: heads that this weight has: with grouped queries, keys and values have fewer than queries.
        head_size: rows (or columns) of one head; of each of query, key and value where they are fused.
        head_dim: the axis: 0 rows, 1 columns. 2 is rows as well: the last axis of a linear layer's output (example,
            token, feature).
        order: ``head`` (head, size); fused weights have ``head qkv`` (head, 3, size), as GPT-NeoX, or ``qkv head``
            (3, head, size), as GPT-2.

    Example:
        >>> AttentionConfig(num_heads=8, head_size=64, order="head qkv")  # GPT-NeoX's query_key_value
        AttentionConfig(num_heads=8, head_size=64, head_dim=0, order='head qkv')
    """

    num_heads: int
    head_size: int
    head_dim: int = 0
    order: Order = "head"

    def __post_init__(self) -> None:
        """Check what can be checked without a weight."""
        if self.num_heads < 1 or self.head_size < 1:
            raise ChainError(
                f"expected num_heads and head_size of at least 1, found {self.num_heads} and {self.head_size}"
            )
        if self.head_dim not in (0, 1, 2):
            raise ChainError(f"expected head_dim 0 (rows) or 1 (columns), found {self.head_dim}")
        if self.order not in get_args(Order):
            raise ChainError(f"expected an order of {', '.join(map(repr, get_args(Order)))}, found {self.order!r}")
