"""The attention kernel as an implementation of transformers, under the name ``funcattrib``.

A model calls it as it calls ``sdpa``: queries, keys, values, a mask, and whatever its kind of attention adds. What is
not known here is computed by the model's own formula.
"""

import sys
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from funcattrib.kernels.attention import attention, attention_formula


class _Name(str):
    """A name that equals ``eager`` as well: models that ask for it mean one that adds whatever mask they make."""

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        return other == "eager" or str.__eq__(self, other) is True

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = str.__hash__


NAME = "funcattrib"

_IN_THE_MASK = ("position_ids", "cache_position", "position_embeddings", "sliding_window")
"""Arguments that a mask or the queries and keys contain already."""


def register_attention() -> str:
    """Register the kernel and its mask with transformers; return the name for ``attn_implementation``."""
    AttentionInterface.register(NAME, _interface)
    AttentionMaskInterface.register(NAME, _mask)
    return NAME


def set_attention(model: PreTrainedModel, name: str) -> None:
    """Set a model's attention by name; of this kernel, its code finds that the name equals ``eager`` as well."""
    configs = [each.config for each in model.modules() if isinstance(each, PreTrainedModel)]
    for config in configs:
        if isinstance(config._attn_implementation, _Name):  # equal to what it may be changed to
            config._attn_implementation_internal = NAME
    model.set_attn_implementation(name)
    for config in configs:
        if config._attn_implementation == NAME:
            config._attn_implementation_internal = _Name(NAME)


def _interface(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, Any]:
    """Adapt to the calling convention of transformers; return (E, T, H, D).

    Arguments that are not known here (sinks by another name, sparse indices, packed sequences) are left to the model's
    own formula.
    """
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = bool(causal) and attention_mask is None and query.shape[2] > 1
    if any(_unknown(name, given) for name, given in others.items()):
        known = {"softcap": softcap, "s_aux": s_aux, "position_bias": position_bias}
        known = {name: given for name, given in known.items() if given is not None}
        arguments = {"scaling": scaling, "dropout": dropout, **known, **others}
        return _own_formula(module, (query, key, value), attention_mask, causal, arguments)
    if dropout or softcap is not None or s_aux is not None or position_bias is not None:
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        out = attention_formula(
            query, key, value, attention_mask, scale, causal, softcap, s_aux, position_bias, dropout
        )
    else:
        out = attention(query, key, value, attention_mask, scale=scaling, causal=causal)
    return out.transpose(1, 2), None


def _mask(
    q_length: int,
    kv_length: int,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    **rest: Any,
) -> Tensor | None:
    """Return the mask that transformers asks for, built without looking at the padding's values (vmap forbids that)."""
    whole = attention_mask is None and q_length == kv_length and (local_size is None or kv_length <= local_size)
    if whole and (allow_is_causal_skip or allow_is_bidirectional_skip):
        return None
    return sdpa_mask(
        q_length=q_length,
        kv_length=kv_length,
        attention_mask=attention_mask,
        local_size=local_size,
        allow_is_causal_skip=False,
        allow_is_bidirectional_skip=False,
        **rest,
    )


def _unknown(name: str, value: Any) -> bool:
    """Return whether an argument may change what attention computes."""
    return name not in _IN_THE_MASK and (isinstance(value, Tensor) or callable(value))


def _own_formula(
    module: torch.nn.Module,
    states: tuple[Tensor, Tensor, Tensor],
    mask: Tensor | None,
    causal: bool,
    arguments: dict[str, Any],
) -> tuple[Tensor, Any]:
    """Compute the model's eager attention, which adds a float mask.

    Raises:
        NotImplementedError: its module has none.
    """
    formula = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if formula is None:
        raise NotImplementedError(f"{type(module).__name__} has attention of its own kind and no eager formula")
    query, key, _ = states
    if mask is None and causal:
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()[None, None]
    if mask is not None and mask.dtype == torch.bool:
        lowest = torch.finfo(query.dtype).min
        mask = torch.zeros(mask.shape, dtype=query.dtype, device=query.device).masked_fill(~mask, lowest)
    out, weights = formula(module, *states, mask, **arguments)
    return out, weights
