"""Random projection of every leaf, on both sides.

    matrix   C(G) = L G Rᵀ, (p, q)        vector   C(g) = L g, (p,)        E⟨C(G), C(G′)⟩ = ⟨G, G′⟩
    kernel   as a matrix (o, i · spatial)     stack of experts   each of its matrices by the same L and R, (x, p, q)

L and R have entries ±1/√p (Rademacher) or N(0, 1/p), drawn from (seed, parameter name, side) alone. A side no longer
than k stays as it is, and a scalar too. Leaves that one parameter was divided into (heads) each have a side of their
own along the axis that was divided, and share the parameter's along the other.

References: LoGra, arXiv 2405.13954; TrackStar, arXiv 2410.17413.
"""

from functools import partial
from typing import Literal

from torch import Tensor

from funcattrib.chain.transform import State, Transform
from funcattrib.errors import ChainError
from funcattrib.lift import GradientMap, Readouts, TwoSided, readout
from funcattrib.transforms import leaf_shapes
from funcattrib.transforms.heads import whole
from funcattrib.transforms.random import generator, normal, rademacher
from funcattrib.types import Leaf, Spec

Distribution = Literal["rademacher", "normal"]
_DRAW = {"rademacher": rademacher, "normal": normal}


def project(k: int = 16, kind: Distribution = "rademacher", seed: int = 0) -> Transform:
    """Project each matrix to (k, k), a convolution's kernel likewise, each vector to (k,), and each expert of a stack.

    Args:
        k: coordinates a side.
        kind: ``rademacher`` (entries ±1/√k) or ``normal`` (N(0, 1/k)).
        seed: of the draws.

    Raises:
        ChainError: k below 1, or an unknown kind.

    Example:
        >>> import torch
        >>> stage = project(2)
        >>> state, spec = stage.init({"w": Leaf((3, 5), torch.float32)})
        >>> stage(state, {"w": torch.ones(7, 3, 5)})["w"].shape
        torch.Size([7, 2, 2])
    """
    if k < 1:
        raise ChainError(f"expected a projection dimension of at least 1, found {k}")
    if kind not in _DRAW:
        raise ChainError(f"expected a projection of kind {' or '.join(_DRAW)}, found {kind!r}")
    return Transform(
        "project",
        settings={"k": k, "kind": kind, "seed": seed},
        init=partial(_init, k=k, kind=kind, seed=seed),
        maps=_maps,
    )


def _init(spec: Spec, k: int, kind: Distribution, seed: int) -> tuple[State, Spec]:
    state: dict[str, dict[str, Tensor | None]] = {}
    projected: Spec = {}
    for name, leaf in spec.items():
        lengths = leaf_shapes.sides(name, leaf.shape)
        for axis, (side, n) in enumerate(zip(("left", "right"), lengths, strict=False)):
            drawn = state.setdefault(_source(name, leaf, axis), {})
            if side not in drawn:
                drawn[side] = _draw(_source(name, leaf, axis), side, n, k, kind, seed)
        shape = leaf_shapes.projected(name, leaf.shape, tuple(min(n, k) for n in lengths))
        projected[name] = leaf._replace(shape=shape)
    return state, projected


def _source(name: str, leaf: Leaf, axis: int) -> str:
    """Return the name that a side is drawn from: the leaf's own, or its parameter's where the leaf is one part along
    another axis.
    """
    return name if leaf.split in (None, axis) else whole(name)


def _draw(name: str, side: str, n: int, k: int, kind: Distribution, seed: int) -> Tensor | None:
    return None if n <= k else _DRAW[kind](k, n, generator(seed, name, side))


def _maps(state: State, spec: Spec) -> Readouts:
    return {name: readout(name, _map(state, name, leaf.shape)) for name, leaf in spec.items()}


def _map(state: State, name: str, shape: tuple[int, ...]) -> GradientMap:
    sides = {**state.get(whole(name), {}), **state.get(name, {})}
    return leaf_shapes.projection(name, shape, TwoSided(sides.get("left"), sides.get("right")))
