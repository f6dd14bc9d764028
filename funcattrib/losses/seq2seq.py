"""The loss of an encoder-decoder: of the target's tokens given the source.

With decoder states h_t of the target's tokens before t and y_t its token,

    sum   Σ_t ℓ(h_t, y_t)            mean   Σ_t ℓ(h_t, y_t) / #labelled tokens

ℓ is cross-entropy or negative log-odds, in nats. The decoder's inputs are the labels shifted by the model itself. An
example without a labelled token has loss 0 and gradient 0.
"""

import logging
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, get_args

import torch
from torch import Tensor, nn

from funcattrib.errors import FuncattribError
from funcattrib.kernels.head_tokens import IGNORED
from funcattrib.kernels.logit_loss import Head
from funcattrib.losses.causal_lm import Reduction
from funcattrib.losses.padding import LENGTHS, each_alone, model_inputs, two_documents
from funcattrib.losses.sequence_classification import Output
from funcattrib.losses.token_losses import sum_of_token_losses
from funcattrib.models.functional import Functional, functionalize
from funcattrib.models.output_difference import same_outputs
from funcattrib.models.task import require_task
from funcattrib.types import Batch, Example, Params

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Seq2SeqLoss:
    """The loss of an encoder-decoder, for one example or a batch of them.

    Attributes:
        parts: the model's skeleton and parameters.
        head: what is taken of the logits.
        reduction: how the target's tokens are added up.
        pad: the model's padding token, where it has one.
        equal_lengths: a batch must hold one example, as padding changes what the model computes.
    """

    parts: Functional
    head: Head
    reduction: Reduction
    pad: int | None
    equal_lengths: bool

    def __call__(self, params: Params, example: Example) -> Tensor:
        """Compute one example's loss."""
        return self.batched(params, {name: value[None] for name, value in example.items()})[0]

    def batched(self, params: Params, batch: Batch) -> Tensor:
        """Compute the loss of every example (E,) in one forward pass."""
        labels = batch["labels"]
        loss = sum_of_token_losses(self.logits(params, batch), labels, None, self.head)
        return loss / (labels != IGNORED).sum(-1).clamp(min=1) if self.reduction == "mean" else loss

    def logits(self, params: Params, batch: Batch) -> Tensor:
        """Compute the model's logits (E, T, V) of the target's tokens."""
        labels = batch["labels"]
        shift: Any = getattr(self.parts.skeleton, "prepare_decoder_input_ids_from_labels", None)
        # Where a model does not say how it shifts, it is given the labels, and its own loss is left alone.
        decoded = {"labels": labels} if shift is None else {"decoder_input_ids": shift(labels=labels)}
        found: Tensor = self.parts.call(params, **model_inputs(batch, self.pad), **decoded).logits
        return found


def seq2seq_loss(
    model: nn.Module,
    *,
    reduction: Reduction = "sum",
    kind: Output = "ce",
    label_smoothing: float = 0.0,
    modules: Iterable[str] | None = None,
    exclude: Iterable[str] = (),
) -> tuple[Seq2SeqLoss, dict[str, Tensor]]:
    """Return the loss of a Hugging Face encoder-decoder, and the parameters to attribute.

    Source and target have lengths of their own. Where padding changes the logits in spite of the mask,
    ``equal_lengths`` of the loss says so, and runs compute one example at a time.

    Args:
        reduction: ``sum`` or ``mean`` over an example's labelled tokens.
        kind: ``ce`` (cross-entropy) or ``log_odds`` (TRAK's margin per token, negative).
        label_smoothing: ε of smoothed cross-entropy.
        modules, exclude: which parameters to attribute, as in ``functionalize``.

    Returns:
        ``loss(params, example) -> scalar`` with ``example`` holding ``input_ids`` (S,), the source, and ``labels``
        (T,), the target, -100 where a token does not count, optionally ``attention_mask`` (S,), 0 where the source is
        padded; and the parameters, name → tensor.

    Raises:
        FuncattribError: another kind of model; an unknown reduction or kind; no parameter chosen.

    Reference: TRAK's margin, arXiv 2303.14186.

    Example:
        >>> from transformers import T5Config, T5ForConditionalGeneration
        >>> size = {"d_model": 8, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2}
        >>> model = T5ForConditionalGeneration(T5Config(vocab_size=10, decoder_start_token_id=0, **size))
        >>> loss, params = seq2seq_loss(model)
        >>> loss(params, {"input_ids": torch.tensor([5, 6, 7]), "labels": torch.tensor([8, 9])}).shape, len(params)
        (torch.Size([]), 16)
    """
    require_task(model, "seq2seq")
    for value, allowed in ((reduction, get_args(Reduction)), (kind, get_args(Output))):
        if value not in allowed:
            raise FuncattribError(f"expected one of {allowed} of an encoder-decoder, found {value!r}")
    if label_smoothing and kind != "ce":
        raise FuncattribError(f"label_smoothing={label_smoothing} requires kind='ce', found kind={kind!r}")
    parts = functionalize(model, modules, exclude)
    config: Any = parts.skeleton.config
    pad = getattr(config.get_text_config(), "pad_token_id", None)
    loss = Seq2SeqLoss(parts, Head(kind, label_smoothing), reduction, pad, equal_lengths=False)
    if _sees_padding(loss):
        log.info(
            "%s computes other logits where an example is padded: every example is a batch",
            type(model).__name__,
        )
        loss = replace(loss, equal_lengths=True)
    return loss, parts.params


@torch.no_grad()
def _sees_padding(loss: Seq2SeqLoss) -> bool:
    """Return whether the logits of a target change where it and its source are padded.

    Raises:
        FuncattribError: the model does not run on tokens alone.
    """
    padded, alone = two_documents(loss.parts)
    lengths = LENGTHS[::-1]  # the longer target belongs to the shorter source
    targets = [each["input_ids"][0, :1].expand(length) for each, length in zip(alone, lengths, strict=True)]
    labels = nn.utils.rnn.pad_sequence(targets, batch_first=True, padding_value=IGNORED)
    call = partial(loss.logits, loss.parts.params)
    pairs = [{**each, "labels": target[None]} for each, target in zip(alone, targets, strict=True)]
    singles = [each[0] for each in each_alone(loss.parts, call, pairs)]
    both = call({**padded, "labels": labels})
    return not all(
        same_outputs(found[: len(expected)], expected) for found, expected in zip(both, singles, strict=True)
    )
