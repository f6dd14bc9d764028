"""One file a family of operations; ``RULES`` maps each operation to its rule."""

from typing import Any

from funcattrib.lift.ops import conv, cross_entropy, embedding, experts, linear, norm
from funcattrib.lift.parameter import Rule

RULES: dict[Any, Rule] = {
    **linear.RULES,
    **conv.RULES,
    **embedding.RULES,
    **norm.RULES,
    **experts.RULES,
    **cross_entropy.RULES,
}

__all__ = ["RULES"]
