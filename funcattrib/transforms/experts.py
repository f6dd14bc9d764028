"""Stacks of experts taken apart: one leaf an expert.

    …experts.gate_up_proj (x, o, i)   becomes   …experts.gate_up_proj#e0 (o, i), …#e1, …

so that experts can be selected (``select("*#e3")``) and are separate leaves to what follows. An expert to which no
token of an example went has a zero gradient.
"""

from funcattrib.chain.transform import State, Transform
from funcattrib.errors import ChainError
from funcattrib.lift import Readout, Readouts, TwoSided, readout
from funcattrib.lift.maps.experts import Parts
from funcattrib.transforms.leaf_shapes import is_stack
from funcattrib.types import Leaf, Spec

_PARAMETER_IS_DIVIDED = -1
"""Along an axis that a leaf no longer has: all that it has are common to the parts, and so are their projections."""


def split_experts() -> Transform:
    """Divide every stack of experts into one leaf an expert; other leaves stay as they are.

    Before or after ``project`` it gives the same: experts share the projection of their stack.

    Raises:
        ChainError: there is no stack.

    Example:
        >>> import torch
        >>> _, spec = split_experts().init({"mlp.experts.down_proj": Leaf((2, 4, 6), torch.float32)})
        >>> {name: leaf.shape for name, leaf in spec.items()}
        {'mlp.experts.down_proj#e0': (4, 6), 'mlp.experts.down_proj#e1': (4, 6)}
    """
    return Transform("split_experts", init=_init, maps=_maps)


def _init(spec: Spec) -> tuple[State, Spec]:
    divided: Spec = {}
    for name, leaf in spec.items():
        if is_stack(name, leaf.shape):
            one = Leaf(leaf.shape[1:], leaf.dtype, _PARAMETER_IS_DIVIDED)
            divided |= dict.fromkeys(_leaves(name, leaf.shape[0]), one)
        else:
            divided[name] = leaf
    if len(divided) == len(spec):
        raise ChainError(f"finds no stack of experts, (experts, out, in), among {len(spec)} leaves")
    return None, divided


def _maps(state: State, spec: Spec) -> Readouts:
    return {
        name: Readout(Parts(leaf.shape[0]), name, _leaves(name, leaf.shape[0]))
        if is_stack(name, leaf.shape)
        else readout(name, TwoSided())
        for name, leaf in spec.items()
    }


def _leaves(name: str, experts: int) -> tuple[str, ...]:
    return tuple(f"{name}#e{number}" for number in range(experts))
