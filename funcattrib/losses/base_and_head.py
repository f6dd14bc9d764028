"""A causal language model as its base and its head: hidden states, and the logits that the head computes of them.

    logits = cap(scale · (W h + b)),        h the base model's last hidden states

The head and the loss can then be fused, so that no logits are ever in memory. Whether the two parts give the model's
own logits is tried on a few tokens; where they do not, ``prefix`` is None and the model's logits are used.
"""

import copy
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from funcattrib.errors import FuncattribError
from funcattrib.models.functional import Functional, device_of
from funcattrib.models.limits import vocabulary
from funcattrib.models.output_difference import same_outputs

Inputs = Mapping[str, Tensor]

_LENGTH, _PADDING = 8, 3
"""Tokens of a document that is tried, and of its padding."""


class LanguageModel(NamedTuple):
    """A model taken apart.

    Attributes:
        parts: skeleton and parameters.
        prefix: the name of the base; None where base and head do not give the model's logits.
        weight, bias: names of the head's parameters.
        scale, softcap: what the head does to its products.
        equal_lengths: tokens after a document's last change its logits, as they do where attention runs both ways, so
            documents of a batch must be equally long.
        held: kept alive as long as the model is.
    """

    parts: Functional
    prefix: str | None = None
    weight: str = ""
    bias: str | None = None
    scale: float = 1.0
    softcap: float | None = None
    equal_lengths: bool = False
    held: Any = None


@torch.no_grad()
def describe(parts: Functional) -> LanguageModel:
    """Find the base model and the head, and compare with the model's own logits, padded and not."""
    model = _taken_apart(parts)
    weights = {**parts.frozen, **parts.params}
    tokens = vocabulary(parts.skeleton)
    if tokens is None:  # it may take something else than tokens
        return LanguageModel(parts)
    ids = torch.arange(_LENGTH, device=device_of(weights))[None] * 31 % tokens
    logits = own_logits(model, weights, {"input_ids": ids})
    if model.prefix is not None and not same_outputs(_logits_of_parts(model, weights, ids), logits):
        model = LanguageModel(parts)
    padded = own_logits(model, weights, {"input_ids": nn.functional.pad(ids, (0, _PADDING))})
    return model._replace(equal_lengths=not same_outputs(padded[:, :_LENGTH], logits))


def hidden_states(model: LanguageModel, weights: Mapping[str, Tensor], inputs: Inputs) -> Tensor:
    """Compute the base model's last hidden states (E, T, d)."""
    prefix = f"{model.prefix}."
    inside = {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
    base = model.parts.skeleton.get_submodule(model.prefix or "")
    return torch.func.functional_call(base, inside, (), dict(inputs), strict=True)[0]


def own_logits(model: LanguageModel, weights: Mapping[str, Tensor], inputs: Inputs) -> Tensor:
    """Compute the model's own logits (E, T, V).

    Raises:
        FuncattribError: a model without them.
    """
    output = torch.func.functional_call(model.parts.skeleton, dict(weights), (), dict(inputs), strict=True)
    logits = getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise FuncattribError(
            f"expected a model with logits, found {type(model.parts.skeleton).__name__}, which gives "
            f"{type(output).__name__}\ngive the model with its language-model head (…ForCausalLM), or a custom loss"
        )
    return logits


def without_adapter(parts: Functional) -> LanguageModel | None:
    """Return the model with its adapter off (peft's ``disable_adapter``); None where it has no such switch."""
    if not callable(getattr(parts.skeleton, "disable_adapter", None)):
        return None
    # The switch is thrown once and held, as peft's sets requires_grad, which no torch.func transform allows; and on
    # parameters of the twin's own (of the same storage), so that the user's keep theirs.
    shared: dict[int, Any] = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in parts.skeleton.parameters()}
    twin = copy.deepcopy(parts.skeleton, shared | {id(b): b for b in parts.skeleton.buffers()})
    held = twin.disable_adapter()  # type: ignore[operator]
    held.__enter__()
    return describe(parts._replace(skeleton=twin))._replace(held=held)


def _taken_apart(parts: Functional) -> LanguageModel:
    """Find the base model and the head by name; no prefix where there is no linear head."""
    found = _with_head(parts.skeleton)
    if found is None:
        return LanguageModel(parts)
    base, module, output = found
    names = {id(tensor): name for name, tensor in reversed(list(parts.skeleton.named_parameters()))}
    weight, bias = names.get(id(output.weight)), None if output.bias is None else names.get(id(output.bias))
    if weight is None:
        return LanguageModel(parts)
    return LanguageModel(parts, base, weight, bias, **_logit_transform(getattr(module, "config", None)))


def _with_head(skeleton: nn.Module) -> tuple[str, nn.Module, nn.Linear] | None:
    """Find the base's name, the model around it, and its head; a wrapper (an adapter's) has the model inside."""
    for path, module in skeleton.named_modules():
        if isinstance(module, PreTrainedModel) and isinstance(output := module.get_output_embeddings(), nn.Linear):
            return f"{path}.{module.base_model_prefix}".lstrip("."), module, output
    return None


def _logit_transform(config: Any) -> dict[str, Any]:
    """Read how the head transforms its products off the configuration: logit_scale, logits_scaling, soft-capping."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    scale = getattr(text, "logit_scale", None)
    divisor = getattr(text, "logits_scaling", None)
    scale = scale if scale is not None else 1.0 / divisor if divisor else 1.0
    return {"scale": float(scale), "softcap": getattr(text, "final_logit_softcapping", None)}


def _logits_of_parts(model: LanguageModel, weights: Mapping[str, Tensor], ids: Tensor) -> Tensor | None:
    """Compute logits by base and head; None where they do not fit together (layers between the two)."""
    bias = None if model.bias is None else weights[model.bias]
    try:
        hidden = hidden_states(model, weights, {"input_ids": ids})
        logits = nn.functional.linear(hidden, weights[model.weight], bias) * model.scale
    except (RuntimeError, KeyError, AttributeError):
        return None
    return logits if model.softcap is None else torch.tanh(logits / model.softcap) * model.softcap
