"""Preconditioning: gradients times an inverse power of their second moments.

    H = E[c cᵀ] over the coordinates c of one block,        c ↦ H^p c

A block is one parameter's coordinates, flattened, or those of several parameters one after the other. Which power:

* inner products   ⟨a, H⁻¹ b⟩: ``power=-1`` on the query alone, the training gradients as they are;
* cosines          ``power=-0.5`` on both sides, *then* ``unit_norm``: normalising a gradient that H⁻¹ was not applied
                   to would undo the geometry. The products are the same: ⟨H^-½ a, H^-½ b⟩ = ⟨a, H⁻¹ b⟩.

H is summed and decomposed in float64; H^p is applied in float32, or in the gradients' own type where that is wider.

References: TrackStar, arXiv 2410.17413; LoGra, arXiv 2405.13954.
"""

import fnmatch
import glob
import math
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from funcattrib.chain.transform import Transform, apply_nothing, observe_nothing
from funcattrib.errors import ChainError
from funcattrib.kernels.safe_norm import as_rows
from funcattrib.lift import Readouts, readout
from funcattrib.lift.maps.dense import Dense, times
from funcattrib.transforms.damping import Damping, inverse_power
from funcattrib.types import Grads, Spec

Gram = Mapping[str, Tensor]
"""Block name → H, (D, D): a block of one parameter has its name, the joint block of all is called ``all``."""
Groups = Literal["parameter", "all"] | Mapping[str, str | Sequence[str]]

_POWERS = (-1.0, -0.5)
_WIDEST = 32_768  # coordinates in a block: H alone has 8 GiB


class Preconditioner(NamedTuple):
    """The state: sums while it is being fitted, means afterwards.

    Attributes:
        gram: block → Σ c cᵀ, then H, (D, D) float64.
        power: block → zeros, then H^p, (D, D) in the type it is applied in.
        seen: how many gradients ``gram`` is a sum over: () float64, 1 once it is a mean.
    """

    gram: dict[str, Tensor]
    power: dict[str, Tensor]
    seen: Tensor


def precondition(
    power: float = -0.5,
    groups: Groups = "parameter",
    damping: float = 0.1,
    damping_kind: Damping = "relative",
    gram: Gram | None = None,
) -> Transform:
    """Multiply each block of coordinates by H^power.

    A block in which no gradient was ever seen gives zeros.

    Args:
        power: -0.5 (both sides of a cosine) or -1 (one side of an inner product).
        groups: what is a block: ``parameter`` (each by itself), ``all`` (one joint block), or name → globs of
            parameter names, each group a joint block; parameters in no group are blocks by themselves.
        damping: δ ≥ 0, in units of the mean eigenvalue except where ``damping_kind`` is absolute.
        damping_kind: ``relative`` adds δ mean(λ) to every eigenvalue λ, ``absolute`` adds δ; ``pseudoinverse`` adds
            nothing and drops the eigenvalues up to δ mean(λ).
        gram: H of each block, as ``gram_matrices`` and ``mix_grams`` return it; fitted in a pass over data when
            not given. It is part of the state, not of the settings.

    Raises:
        ChainError: an unknown power or kind of damping, a damping below zero; groups that overlap or match nothing;
            blocks of more than 32,768 coordinates; a Gram that is missing, of another shape, or not finite.

    Example:
        >>> from funcattrib.types import Leaf
        >>> stage = precondition(power=-1, damping=0.0, gram={"w": torch.diag(torch.tensor([4.0, 2.0]))})
        >>> state, _ = stage.init({"w": Leaf((2,), torch.float32)})
        >>> stage(state, {"w": torch.ones(1, 2)})["w"]
        tensor([[0.2500, 0.5000]])
    """
    if power not in _POWERS:
        raise ChainError(f"expected a power of -1 or -0.5, found {power}")
    if damping_kind not in get_args(Damping):
        raise ChainError(f"expected damping of kind {', '.join(get_args(Damping))}, found {damping_kind!r}")
    if not 0 <= damping < math.inf:
        raise ChainError(f"expected a damping of at least 0, found {damping}")
    groups = _plain(groups)
    given = None if gram is None else _powered(gram, float(power), damping, damping_kind)
    return Transform(
        "precondition",
        settings={"groups": groups, "power": float(power), "damping": damping, "damping_kind": damping_kind},
        init=partial(_init, given, groups=groups),
        observe=partial(_observe, groups=groups) if given is None else observe_nothing,
        finalize=partial(_finalize, power=float(power), damping=damping, damping_kind=damping_kind),
        maps=_maps if groups == "parameter" else None,
        apply=apply_nothing if groups == "parameter" else partial(_apply, groups=groups),
        parts=partial(_parts, groups=groups, power=power, damping=damping, damping_kind=damping_kind),
    )


def _init(given: Preconditioner | None, spec: Spec, groups: Groups) -> tuple[Preconditioner, Spec]:
    gram, power = {}, {}
    for block, names in _blocks(spec, groups).items():
        if not names:
            raise ChainError(f"has a group {block!r} that matches none of the {len(spec)} leaves")
        width = sum(math.prod(spec[name].shape) for name in names)
        if width > _WIDEST:
            raise ChainError(
                f"expected at most {_WIDEST} coordinates in a block, found {width} in {block}; put project before it"
            )
        dtype = torch.float32
        for name in names:
            dtype = torch.promote_types(dtype, spec[name].dtype)
        if given is None:
            gram[block] = torch.zeros((), dtype=torch.float64).expand(width, width)  # takes no memory yet
            power[block] = torch.zeros((), dtype=dtype).expand(width, width)
            continue
        if block not in given.gram:
            raise ChainError(f"has no Gram matrix for {block}")
        if given.gram[block].shape != (width, width):
            raise ChainError(
                f"expected a Gram matrix of {block} of side {width}, found {tuple(given.gram[block].shape)}"
            )
        gram[block], power[block] = given.gram[block], given.power[block].to(dtype)
    return Preconditioner(gram, power, torch.full((), 0.0 if given is None else 1.0, dtype=torch.float64)), spec


def _observe(state: Preconditioner, grads: Grads, groups: Groups) -> Preconditioner:
    """Add Σ c cᵀ; the sums move to where the gradients are."""
    gram = dict(state.gram)
    for block, names in _blocks(grads, groups).items():
        rows = _rows(grads, names).to(torch.float64)
        gram[block] = torch.addmm(gram[block].to(rows.device), rows.T, rows)
    return Preconditioner(gram, state.power, state.seen + len(next(iter(grads.values()))))


def _finalize(state: Preconditioner, power: float, damping: float, damping_kind: Damping) -> Preconditioner:
    mean = {block: total / state.seen.to(total.device) for block, total in state.gram.items()}
    powers = _powered(mean, power, damping, damping_kind).power
    cast = {block: powers[block].to(blank.dtype) for block, blank in state.power.items()}
    return Preconditioner(mean, cast, torch.ones_like(state.seen))


def _powered(given: Gram, power: float, damping: float, damping_kind: Damping) -> Preconditioner:
    """Return H in float64 with its powers, in float64 as well."""
    gram = {block: matrix.detach().to(torch.float64) for block, matrix in given.items()}
    for block, matrix in gram.items():
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
            raise ChainError(f"expected a square Gram matrix of {block}, found the shape {tuple(matrix.shape)}")
        if not bool(torch.isfinite(matrix).all()):
            raise ChainError(f"the gradients of {block} are NaN or infinite and cannot be used for preconditioning")
    powers = {block: inverse_power(matrix, power, damping, damping_kind) for block, matrix in gram.items()}
    return Preconditioner(gram, powers, torch.ones((), dtype=torch.float64))


def _apply(state: Preconditioner, grads: Grads, groups: Groups) -> Grads:
    result = {}
    for block, names in _blocks(grads, groups).items():
        product = times(_rows(grads, names), state.power[block])
        widths = [math.prod(grads[name].shape[1:]) for name in names]
        for name, part in zip(names, torch.split(product, widths, 1), strict=True):
            result[name] = part.reshape(grads[name].shape).to(grads[name].dtype)
    return {name: result[name] for name in grads}


def _parts(names: Iterable[str], groups: Groups, **settings: Any) -> dict[str, tuple[Transform, list[str]]]:
    """Return block → the stage of that block alone, and its leaves."""
    parts = {}
    for block, leaves in _blocks(names, groups).items():
        alone: Groups = "parameter" if leaves == [block] else {block: [glob.escape(leaf) for leaf in leaves]}
        parts[block] = precondition(groups=alone, **settings), leaves
    return parts


def _maps(state: Preconditioner, spec: Spec) -> Readouts:
    return {name: readout(name, Dense(state.power[name])) for name in spec}


def _rows(grads: Grads, names: Sequence[str]) -> Tensor:
    """Join a block's coordinates one after the other, (B, D)."""
    parts = [as_rows(grads[name]) for name in names]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _blocks(names: Iterable[str], groups: Groups) -> dict[str, list[str]]:
    """Return block → its leaves, sorted: a state then fits the same leaves in any order, such as JAX's."""
    if isinstance(groups, str):
        return {name: [name] for name in names} if groups == "parameter" else {"all": sorted(names)}
    blocks: dict[str, list[str]] = {group: [] for group in groups}
    for name in names:
        owners = [group for group, globs in groups.items() if any(fnmatch.fnmatchcase(name, glob) for glob in globs)]
        if len(owners) > 1 or (not owners and name in groups):
            both = f"{owners[0]} and {owners[1]}" if owners else f"the group {name}, which its globs leave out"
            raise ChainError(f"has groups that overlap: {name} belongs to {both}")
        blocks.setdefault(owners[0] if owners else name, []).append(name)
    return {block: sorted(leaves) for block, leaves in blocks.items()}


def _plain(groups: Groups) -> Groups:
    """Return ``groups`` as JSON would give it back."""
    if isinstance(groups, str):
        if groups not in ("parameter", "all"):
            raise ChainError(f"expected groups of 'parameter', 'all' or a mapping, found {groups!r}")
        return groups
    return {group: [globs] if isinstance(globs, str) else list(globs) for group, globs in groups.items()}
