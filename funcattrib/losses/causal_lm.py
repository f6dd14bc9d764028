"""Losses: ``loss(params, example) -> scalar``, the one signature used everywhere.

Causal language models: with hidden states h_t and targets y_t = labels_{t+1},

    sum   A Σ_t a_t ℓ(h_t, y_t)            mean   A Σ_t a_t ℓ(h_t, y_t) / #labelled tokens

over the labelled tokens, a_t an optional weight of token t + 1 and A an optional advantage of the example; ℓ is
cross-entropy, negative log-odds, or the divergence from a reference model, in nats (``kernels/logit_loss.py``).
An example without a labelled token has loss 0 and gradient 0.
"""

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from funcattrib.errors import FuncattribError
from funcattrib.kernels.head_tokens import IGNORED
from funcattrib.kernels.linear_cross_entropy import Reference, linear_cross_entropy
from funcattrib.kernels.logit_loss import Head, LossKind
from funcattrib.losses.base_and_head import (
    LanguageModel,
    describe,
    hidden_states,
    own_logits,
    without_adapter,
)
from funcattrib.losses.token_losses import sum_of_token_losses
from funcattrib.models.functional import Functional, functionalize
from funcattrib.models.task import require_task
from funcattrib.types import Batch, Example, Params
from funcattrib.weights.stored import dense

log = logging.getLogger(__name__)

Reduction = Literal["sum", "mean"]


@dataclass(frozen=True, eq=False)
class CausalLoss:
    """The loss of a causal language model, for one example or a batch of them.

    Attributes:
        model: the model, taken apart.
        head: what is taken of the logits.
        reduction: how tokens are added up.
        reference: the model that ``kl`` compares with.
        equal_lengths: documents of a batch must be equally long, as padding changes what the model computes.
    """

    model: LanguageModel
    head: Head
    reduction: Reduction
    reference: LanguageModel | None
    equal_lengths: bool

    def __call__(self, params: Params, example: Example) -> Tensor:
        """Compute one example's loss."""
        return self.batched(params, {name: value[None] for name, value in example.items()})[0]

    def batched(self, params: Params, batch: Batch) -> Tensor:
        """Compute the loss of every example (E,) in one forward pass."""
        model, reference, head = self.model, self.reference, self.head
        weights = {**model.parts.frozen, **params}
        target = _next(batch["labels"], IGNORED)
        token_weights = _next(batch["token_weights"], 0) if "token_weights" in batch else None
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask") if name in batch}
        if model.prefix is None or (reference is not None and reference.prefix is None):
            logits = own_logits(model, weights, inputs)
            others = None if reference is None else _constant(own_logits, reference, inputs)
            loss = sum_of_token_losses(logits, target, token_weights, head, others)
        else:
            hidden = hidden_states(model, weights, inputs)
            bias = None if model.bias is None else weights[model.bias]
            against = None if reference is None else _compared(reference, inputs)
            operands = (hidden, weights[model.weight], target, bias, token_weights, head, against)
            loss = linear_cross_entropy(*operands)
        if self.reduction == "mean":
            loss = loss / (target != IGNORED).sum(-1).clamp(min=1)
        return loss * batch["advantage"] if "advantage" in batch else loss


def causal_lm_loss(
    model: nn.Module,
    *,
    reduction: Reduction = "sum",
    kind: LossKind = "ce",
    label_smoothing: float = 0.0,
    reference: nn.Module | None = None,
    modules: Iterable[str] | None = None,
    exclude: Iterable[str] = (),
) -> tuple[CausalLoss, dict[str, Tensor]]:
    """Return the loss of a Hugging Face causal language model, and the parameters to attribute.

    The head and the loss are fused (no logits in memory) where that reproduces the model's own logits, which
    is checked here on a few tokens; otherwise the model's logits are used. Where tokens after a document's end change
    its logits, ``equal_lengths`` of the loss says so, and runs batch documents of one length.

    Args:
        reduction: ``sum`` or ``mean`` over an example's labelled tokens.
        kind: ``ce`` (cross-entropy), ``log_odds`` (TRAK's margin per token) or ``kl`` (KL(model ‖ reference) of the
            distributions that predict each labelled token).
        label_smoothing: ε of smoothed cross-entropy.
        reference: for ``kl``, a causal language model of the same vocabulary, taken as constant; by default ``model``
            with its adapter off.
        modules, exclude: which parameters to attribute, as in ``functionalize``.

    Returns:
        ``loss(params, example) -> scalar`` with ``example`` holding ``input_ids`` (T,) and ``labels`` (T,), optionally
        ``attention_mask``, ``token_weights`` (T,) and ``advantage`` (); and the parameters, name → tensor.

    Raises:
        FuncattribError: another kind of model, such as an encoder; an unknown reduction or kind; no parameter chosen;
            ``kl`` without a reference, or with one of another vocabulary.

    Reference: TRAK's margin, arXiv 2303.14186.

    Example:
        >>> from transformers import GPTNeoXConfig, GPTNeoXForCausalLM
        >>> size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        >>> model = GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=10, max_position_embeddings=8, **size))
        >>> loss, params = causal_lm_loss(model)
        >>> ids = torch.tensor([1, 2, 3])
        >>> loss(params, {"input_ids": ids, "labels": ids}).shape, len(params)
        (torch.Size([]), 4)
    """
    for value, allowed in ((reduction, get_args(Reduction)), (kind, get_args(LossKind))):
        if value not in allowed:
            raise FuncattribError(f"expected one of {allowed}, found {value!r}")
    if label_smoothing and kind != "ce":
        raise FuncattribError(f"label_smoothing={label_smoothing} requires kind='ce', found kind={kind!r}")
    if reference is not None and kind != "kl":
        raise FuncattribError(f"a reference model requires kind='kl', found kind={kind!r}")
    require_task(model, "causal_lm")
    parts = functionalize(model, modules, exclude)
    described = describe(parts)
    head = Head(kind, label_smoothing, described.scale, described.softcap)
    against = None
    if kind == "kl":
        against = _reference(parts, reference)
        head = head._replace(reference=(against.scale, against.softcap))
    equal_lengths = described.equal_lengths or (against is not None and against.equal_lengths)
    if equal_lengths:
        log.info(
            "%s computes other logits where a document is padded: batches hold documents of one length",
            type(model).__name__,
        )
    return CausalLoss(described, head, reduction, against, equal_lengths), parts.params


def _next(values: Tensor, last: int) -> Tensor:
    """Shift (E, T) so that each position has what belongs to the token after it."""
    return torch.nn.functional.pad(values[:, 1:], (0, 1), value=last)


def _reference(parts: Functional, reference: nn.Module | None) -> LanguageModel:
    """Return the model that ``kl`` compares with."""
    if reference is None:
        described = without_adapter(parts)
        if described is None:
            raise FuncattribError(
                "the loss kl requires a reference model, and the model has no adapter to switch off instead\n"
                "give one with `reference_model` (`reference` of `causal_lm_loss`)"
            )
        return described
    vocabulary, other = (_vocabulary(model) for model in (parts.skeleton, reference))
    if vocabulary != other:
        raise FuncattribError(
            f"expected a reference model with the model's vocabulary of {vocabulary} tokens, found {other}\n"
            "give one that shares the model's tokenizer"
        )
    return describe(functionalize(reference, "all"))


def _compared(reference: LanguageModel, inputs: Mapping[str, Tensor]) -> Reference:
    weights = {**reference.parts.frozen, **reference.parts.params}
    bias = None if reference.bias is None else weights[reference.bias]
    return Reference(_constant(hidden_states, reference, inputs), dense(weights[reference.weight]), dense(bias))


@torch.no_grad()
def _constant(compute: Callable[..., Tensor], model: LanguageModel, inputs: Mapping[str, Tensor]) -> Tensor:
    return compute(model, {**model.parts.frozen, **model.parts.params}, inputs)


def _vocabulary(model: nn.Module) -> int | None:
    """Return the width of the logits, where the model has an output layer."""
    output = getattr(model, "get_output_embeddings", lambda: None)()
    return None if output is None else int(output.weight.shape[0])
