"""Implementations of attention and experts that a copied model computes with: ours, where it stays the same function.

A model may read the name of its attention, hand it arguments of its own, or expect another form of mask. So the two are
tried on short documents, padded and not, and where outputs differ the model's own take their place.
"""

import itertools
import logging
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from funcattrib.kernels import register_attention, register_experts
from funcattrib.kernels.attention_interface import set_attention
from funcattrib.models.limits import vocabulary
from funcattrib.models.output_difference import output_difference, same_outputs

log = logging.getLogger(__name__)

_LENGTHS = (9, 5)
"""Tokens of the two documents."""


class _Switch(NamedTuple):
    """A model whose implementations can be set, and the names that it was configured with (None: it has no choice)."""

    model: PreTrainedModel
    attention: str | None
    experts: str | None


def choose_implementations(skeleton: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Set the attention and experts implementations of every transformers model in a copy that may be changed.

    Args:
        weights: name → parameter or buffer, to call it with.
    """
    switches = [_switch(each) for each in skeleton.modules() if isinstance(each, PreTrainedModel)]
    if all(each.attention is None and each.experts is None for each in switches):
        return
    theirs = _outputs(skeleton, switches[0].model, weights)
    attention, experts = register_attention(), register_experts()
    _set(switches, attention, experts)
    if not theirs:  # its inputs are not token ids alone, or it does not run here: nothing to compare with
        return
    difference = _difference(_outputs(skeleton, switches[0].model, weights), theirs)
    if difference is None:
        return
    for mixture, name in [*itertools.product((experts, None), (attention, "eager", None))][1:]:
        try:
            _set(switches, name, mixture)
        except (ValueError, ImportError):
            continue
        if _difference(_outputs(skeleton, switches[0].model, weights), theirs) is None:
            break
    taken = [name or switches[0].attention, *([mixture or switches[0].experts] if switches[0].experts else [])]
    log.info(
        "%s is computed with the implementations %s, as with faster ones %s",
        *(type(switches[0].model).__name__, " and ".join(map(repr, taken)), difference),
    )


def _switch(model: PreTrainedModel) -> _Switch:
    return _Switch(
        model,
        model.config._attn_implementation if model._can_set_attn_implementation() else None,
        model.config._experts_implementation if model._can_set_experts_implementation() else None,
    )


def _set(switches: list[_Switch], attention: str | None, experts: str | None) -> None:
    """Set implementations by name; None stands for the one that a model was configured with."""
    for each in switches:
        if each.attention is not None:
            set_attention(each.model, attention or each.attention)
        if each.experts is not None:
            each.model.set_experts_implementation(experts or each.experts)


@torch.no_grad()
def _outputs(skeleton: nn.Module, model: PreTrainedModel, weights: Mapping[str, Tensor]) -> list[Tensor]:
    """Return the first output for two documents, of which one is padded, or for the first; nothing where both fail.

    A causal model is given no mask, as its loss gives none.
    """
    tokens = vocabulary(model) if getattr(model, "main_input_name", "input_ids") == "input_ids" else None
    if tokens is None:
        return []
    device = next(iter(weights.values())).device
    ids = (torch.arange(sum(_LENGTHS), device=device) * 31 + 7) % tokens
    documents = ids.split(_LENGTHS)
    inputs = {"input_ids": torch.nn.utils.rnn.pad_sequence(documents, batch_first=True)}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = inputs["input_ids"]
    if model.config.is_encoder_decoder or not model.can_generate():
        inputs["attention_mask"] = torch.nn.utils.rnn.pad_sequence([torch.ones_like(d) for d in documents], True)
    for tried in (inputs, {name: tensor[:1] for name, tensor in inputs.items()}):
        try:
            with torch.random.fork_rng(devices=[]):
                output = torch.func.functional_call(skeleton, dict(weights), (), tried, strict=True)
                tensor = output if isinstance(output, Tensor) else output[0]
        except Exception:  # whatever code of others raises on these inputs; a head that knows no padding, on two
            continue
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            return []
        if tensor.shape[:2] != tried["input_ids"].shape:  # not by token
            return [tensor]
        return [tensor[at, : _LENGTHS[at]] for at in range(len(tensor))]
    return []


def _difference(ours: list[Tensor], theirs: list[Tensor]) -> str | None:
    """Say how outputs differ by more than rounding; None where they do not."""
    if not ours:
        return "it fails"
    if all(map(same_outputs, ours, theirs)):
        return None
    return f"outputs differ by {max(map(output_difference, ours, theirs)):.0e} of their spread"
