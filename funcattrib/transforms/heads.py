"""Gradients of attention weights taken apart by head.

    rows      C(G)_h = G[rows of head h]         query, key, value, fused or apart: heads are outputs
    columns   C(G)_h = G[:, columns of head h]   the output projection: heads are inputs

A leaf ``…q_proj.weight`` becomes ``…q_proj.weight#h0``, ``#h1``, …: stages that follow (``project``, ``select``, …) see
each head as a leaf. Weights stored (in, out), as HF ``Conv1D``'s, have rows and columns the other way round.
"""

import fnmatch
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

from funcattrib.chain.transform import State, Transform
from funcattrib.errors import ChainError
from funcattrib.lift import Heads, Readout, Readouts, Split, TwoSided, readout
from funcattrib.models.attention_config import AttentionConfig
from funcattrib.types import Leaf, Spec

_MARK = "#"


def split_heads(config: Mapping[str, AttentionConfig | Mapping[str, Any]]) -> Transform:
    """Divide the weights of attention modules into one leaf a head.

    Before or after ``project`` it gives each head's own projection: ``compose`` moves it before. The side that heads do
    not divide is projected alike for all heads of a weight; each head's own side is drawn from its own name.

    Args:
        config: glob → how heads lie. A glob names modules, and means their ``weight``, or parameters; the leading
            part of a name may be left out. ``attention_configs(model)`` reads it off a model.

    Raises:
        ChainError: nothing matches; a weight whose axis the heads do not fill; a leaf that is divided already.

    Example:
        >>> import torch
        >>> stage = split_heads({"q_proj": AttentionConfig(num_heads=2, head_size=3)})
        >>> _, spec = stage.init({"layer.q_proj.weight": Leaf((6, 4), torch.float32)})
        >>> {name: leaf.shape for name, leaf in spec.items()}
        {'layer.q_proj.weight#h0': (3, 4), 'layer.q_proj.weight#h1': (3, 4)}
    """
    given = {glob: one if isinstance(one, AttentionConfig) else AttentionConfig(**one) for glob, one in config.items()}
    plain = {glob: asdict(one) for glob, one in given.items()}
    return Transform(
        "split_heads",
        settings={"config": plain},
        init=partial(_init, config=plain),
        maps=partial(_maps, config=plain),
        precedes=("project",),
    )


def whole(name: str) -> str:
    """Return the parameter that a leaf is, or is a head of.

    Example:
        >>> whole("layer.q_proj.weight#h3"), whole("layer.q_proj.weight")
        ('layer.q_proj.weight', 'layer.q_proj.weight')
    """
    return name.partition(_MARK)[0]


def names_leaf(glob: str, name: str) -> bool:
    """Return whether a glob over modules or parameters names the leaf; the leading part of a name may be left out.

    Example:
        >>> names_leaf("attention.out_proj", "h.0.attention.out_proj.weight")
        True
    """
    targets = {name, name.removesuffix(".weight")}
    return any(fnmatch.fnmatchcase(target, pattern) for target in targets for pattern in (glob, f"*.{glob}"))


Config = Mapping[str, Mapping[str, Any]]


def _init(spec: Spec, config: Config) -> tuple[State, Spec]:
    divided: Spec = {}
    for name, leaf in spec.items():
        heads = _heads(name, leaf.shape, config)
        if heads is None:
            divided[name] = leaf
            continue
        shape = (*leaf.shape[: heads.axis], heads.size, *leaf.shape[heads.axis + 1 :])
        divided |= {part: Leaf(shape, leaf.dtype, heads.axis) for part in _leaves(name, heads)}
    if divided == spec:
        some = f", e.g. {next(iter(spec))}" if spec else ""
        raise ChainError(f"splits none of the {len(spec)} leaves (globs {', '.join(config)}){some}")
    return None, divided


def _maps(state: State, spec: Spec, config: Config) -> Readouts:
    maps: dict[str, Readout] = {}
    for name, leaf in spec.items():
        heads = _heads(name, leaf.shape, config)
        if heads is None:
            maps[name] = readout(name, TwoSided())
        elif heads.number == 1:  # one head is the whole weight
            maps[name] = Readout(TwoSided(), name, _leaves(name, heads))
        else:
            maps[name] = Readout(Split(heads), name, _leaves(name, heads))
    return maps


def _leaves(name: str, heads: Heads) -> tuple[str, ...]:
    return tuple(f"{name}{_MARK}h{number}" for number in range(heads.number))


def _heads(name: str, shape: tuple[int, ...], config: Config) -> Heads | None:
    """Return how the leaf ``name`` is divided, None where no glob names it."""
    found = next((one for glob, one in config.items() if names_leaf(glob, name)), None)
    if found is None:
        return None
    one = AttentionConfig(**found)
    axis, fused = one.head_dim % 2, 1 if one.order == "head" else 3
    if _MARK in name or len(shape) not in (1, 2):
        what = "is one part of its weight already" if _MARK in name else f"has shape {shape}"
        raise ChainError(f"requires whole matrices or vectors, and {name} {what}")
    n, filled = shape[axis] if axis < len(shape) else 0, one.num_heads * one.head_size * fused
    if n != filled:
        product = f"{one.num_heads} × {one.head_size}{' × 3' if fused == 3 else ''} = {filled}"
        hint = "; order='head qkv' or 'qkv head' is for fused weights" if fused == 1 and n == 3 * filled else ""
        raise ChainError(f"expected {product} {'columns' if axis else 'rows'} in {name}, found shape {shape}{hint}")
    blocks = 3 if one.order == "qkv head" else 1
    return Heads(axis, one.num_heads, one.head_size * fused, blocks)
