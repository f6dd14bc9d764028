"""Losses: ``loss(params, example) -> scalar``, the one signature used everywhere.

Causal language models: with hidden states h_t and targets y_t = labels_{t+1},

    sum   Σ_t a_t ℓ(h_t, y_t)            mean   Σ_t a_t ℓ(h_t, y_t) / #labelled tokens

over the labelled tokens, a_t an optional weight of token t + 1; ℓ is cross-entropy or negative log-odds in nats
(``kernels/cross_entropy.py``). An example without a labelled token has loss 0 and gradient 0.
"""

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from funcattrib.errors import FuncattribError
from funcattrib.functional import Example, Functional, Loss, Params, functionalize
from funcattrib.kernels.cross_entropy import linear_cross_entropy
from funcattrib.kernels.head_tokens import IGNORED
from funcattrib.kernels.logit_loss import Head, Kind

Reduction = Literal["sum", "mean"]


class LanguageModel(NamedTuple):
    """What the fused head needs to know of a model: where its base ends and what its head does."""

    parts: Functional
    prefix: str | None
    weight: str
    bias: str | None
    head: Head


def causal_lm_loss(
    model: nn.Module,
    *,
    reduction: Reduction = "sum",
    kind: Kind = "ce",
    label_smoothing: float = 0.0,
    modules: Iterable[str] | None = None,
    exclude: Iterable[str] = (),
) -> tuple[Loss, dict[str, Tensor]]:
    """The loss of a Hugging Face causal language model, and the parameters to attribute.

    The head and the loss are fused (no logits in memory) where that reproduces the model's own logits, which
    is checked here on a few tokens; otherwise the model's logits are used.

    Args:
        reduction: ``sum`` or ``mean`` over an example's labelled tokens.
        kind: ``ce`` (cross-entropy) or ``log_odds`` (TRAK's margin per token).
        label_smoothing: ε of smoothed cross-entropy.
        modules, exclude: which parameters to attribute, as in ``functionalize``.

    Returns:
        ``loss(params, example) -> scalar`` with ``example`` holding ``input_ids`` (T,) and ``labels`` (T,), optionally
        ``attention_mask`` and ``token_weights`` (T,); and the parameters, name → tensor.

    Raises:
        FuncattribError: an unknown reduction or kind; no parameter chosen.

    Reference: TRAK's margin, arXiv 2303.14186.
    """
    for value, allowed in ((reduction, ("sum", "mean")), (kind, ("ce", "log_odds"))):
        if value not in allowed:
            raise FuncattribError(f"expected one of {allowed}, found {value!r}")
    if label_smoothing and kind != "ce":
        raise FuncattribError(
            f"expected label_smoothing 0 with kind={kind!r}, found {label_smoothing}; smooth cross-entropy only"
        )
    parts = functionalize(model, modules, exclude)
    described = _describe(parts, Head(kind=kind, smoothing=label_smoothing))
    return partial(_causal_loss, described, reduction), parts.params


def _causal_loss(model: LanguageModel, reduction: Reduction, params: Params, example: Example) -> Tensor:
    weights = {**model.parts.frozen, **params}
    labels = example["labels"]
    target = torch.nn.functional.pad(labels[1:], (0, 1), value=IGNORED)
    token_weights = example.get("token_weights")
    if token_weights is not None:
        token_weights = torch.nn.functional.pad(token_weights[1:], (0, 1))[None]
    inputs = {"input_ids": example["input_ids"][None]}
    if "attention_mask" in example:
        inputs["attention_mask"] = example["attention_mask"][None]
    if model.prefix is None:
        logits = torch.func.functional_call(model.parts.skeleton, weights, (), inputs, strict=True).logits
        loss = _logits_loss(logits, target[None], token_weights, model.head)[0]
    else:
        hidden = _hidden(model, weights, inputs)
        bias = None if model.bias is None else weights[model.bias]
        loss = linear_cross_entropy(hidden, weights[model.weight], target[None], bias, token_weights, model.head)[0]
    if reduction == "mean":
        loss = loss / (target != IGNORED).sum().clamp(min=1)
    return loss


def _hidden(model: LanguageModel, weights: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> Tensor:
    """The base model's last hidden states (1, T, d)."""
    prefix = f"{model.prefix}."
    inside = {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
    base = model.parts.skeleton.get_submodule(model.prefix or "")
    return torch.func.functional_call(base, inside, (), dict(inputs), strict=True)[0]


def _logits_loss(logits: Tensor, target: Tensor, token_weights: Tensor | None, head: Head) -> Tensor:
    """The plain form of the fused head: the same formulas on logits (E, N, V)."""
    z = logits if logits.dtype == torch.float64 else logits.float()
    counted = target != IGNORED
    y = target.clamp(min=0)[..., None]
    z_y = z.gather(-1, y)[..., 0]
    if head.kind == "log_odds":
        others = torch.logsumexp(z.scatter(-1, y, float("-inf")), -1)
        per_token = others - z_y
    else:
        smoothing = head.smoothing
        per_token = torch.logsumexp(z, -1) - (1 - smoothing) * z_y - (smoothing * z.mean(-1) if smoothing else 0.0)
    factor = counted.to(z.dtype) if token_weights is None else counted * token_weights.to(z.dtype)
    return torch.where(counted, per_token * factor, 0.0).sum(-1)


def _describe(parts: Functional, head: Head) -> LanguageModel:
    """Find the base model and the head, and compare with the model's own logits."""
    skeleton = parts.skeleton
    unfused = LanguageModel(parts, None, "", None, head)
    output = getattr(skeleton, "get_output_embeddings", lambda: None)()
    prefix = getattr(skeleton, "base_model_prefix", "")
    if not isinstance(output, nn.Linear) or not hasattr(skeleton, prefix or "\0"):
        return unfused
    names = {id(tensor): name for name, tensor in reversed(list(skeleton.named_parameters()))}
    weight, bias = names.get(id(output.weight)), None if output.bias is None else names.get(id(output.bias))
    if weight is None:
        return unfused
    head = head._replace(**_logit_transform(getattr(skeleton, "config", None)))
    described = LanguageModel(parts, prefix, weight, bias, head)
    return described if _reproduces_logits(described) else unfused


def _logit_transform(config: Any) -> dict[str, Any]:
    """What the configuration says the head does to its products: logit_scale, logits_scaling, soft-capping."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    scale = getattr(text, "logit_scale", None)
    divisor = getattr(text, "logits_scaling", None)
    scale = scale if scale is not None else 1.0 / divisor if divisor else 1.0
    return {"scale": float(scale), "softcap": getattr(text, "final_logit_softcapping", None)}


@torch.no_grad()
def _reproduces_logits(model: LanguageModel) -> bool:
    skeleton, weights = model.parts.skeleton, {**model.parts.frozen, **model.parts.params}
    device = weights[model.weight].device
    ids = (torch.arange(8, device=device) * 31 % weights[model.weight].shape[0])[None]
    theirs = torch.func.functional_call(skeleton, weights, (), {"input_ids": ids}, strict=True).logits
    try:
        hidden = _hidden(model, weights, {"input_ids": ids})
    except (RuntimeError, KeyError):  # parameters outside base and head: not a plain head
        return False
    bias = None if model.bias is None else weights[model.bias]
    ours = torch.nn.functional.linear(hidden, weights[model.weight], bias) * model.head.scale
    if model.head.softcap is not None:
        ours = torch.tanh(ours / model.head.softcap) * model.head.softcap
    tolerance = 1e-4 if theirs.dtype in (torch.float32, torch.float64) else 2e-2
    spread = float(theirs.float().std()) + 1e-12
    return ours.shape == theirs.shape and float((ours - theirs).abs().max()) <= tolerance * max(spread, 1e-3)
