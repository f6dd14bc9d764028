"""One file a family of operations; ``RULES`` maps each operation to its rule."""

from typing import Any

from funcattrib.lift.lifted import Rule
from funcattrib.lift.rules import conv, cross_entropy, embedding, experts, linear, norm

RULES: dict[Any, Rule] = {
    **linear.RULES,
    **conv.RULES,
    **embedding.RULES,
    **norm.RULES,
    **experts.RULES,
    **cross_entropy.RULES,
}

__all__ = ["RULES"]
