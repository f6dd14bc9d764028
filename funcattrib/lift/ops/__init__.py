"""One file a family of operations; ``RULES`` maps each operation to its rule."""

from typing import Any

from funcattrib.lift.ops import cross_entropy, embedding, linear, norm
from funcattrib.lift.parameter import Rule

RULES: dict[Any, Rule] = {**linear.RULES, **embedding.RULES, **norm.RULES, **cross_entropy.RULES}

__all__ = ["RULES"]
