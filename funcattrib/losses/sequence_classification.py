"""The loss of a model that classifies texts, or rates them: one label, several, or numbers.

With logits z (C,) of a text and its label y,

    single label     ce        ℓ = logsumexp(z) − (1 − ε) z_y − ε mean(z)       log_odds  ℓ = logsumexp_{j≠y}(z) − z_y
    several labels   ce        ℓ = mean_c log(1 + exp(−s_c z_c))                log_odds  ℓ = −mean_c s_c z_c
    regression       ce        ℓ = mean_c (z_c − y_c)²

with s_c = 2 y_c − 1, as transformers computes them of one example; in nats, of regression in the label's units squared.
"""

import logging
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from funcattrib.errors import FuncattribError
from funcattrib.kernels.safe_norm import float32_at_least
from funcattrib.losses.padding import each_alone, model_inputs, set_padding_token, two_documents
from funcattrib.models.functional import Functional, functionalize
from funcattrib.models.output_difference import same_outputs
from funcattrib.models.task import require_task
from funcattrib.types import Batch, Example, Params

log = logging.getLogger(__name__)

Output = Literal["ce", "log_odds"]
Problem = Literal["single_label_classification", "multi_label_classification", "regression"]


@dataclass(frozen=True, eq=False)
class SequenceClassificationLoss:
    """The loss of a sequence classification model, for one example or a batch of them.

    Attributes:
        parts: the model's skeleton and parameters.
        kind: what is taken of the logits.
        problem: what labels are; None where the labels say so.
        label_smoothing: ε.
        pad: the model's padding token, where it has one.
        equal_lengths: documents of a batch must be equally long, as padding changes what the model computes.
    """

    parts: Functional
    kind: Output
    problem: Problem | None
    label_smoothing: float
    pad: int | None
    equal_lengths: bool

    def __call__(self, params: Params, example: Example) -> Tensor:
        """Compute one example's loss."""
        return self.batched(params, {name: value[None] for name, value in example.items()})[0]

    def batched(self, params: Params, batch: Batch) -> Tensor:
        """Compute the loss of every example (E,) in one forward pass."""
        logits, label = self.logits(params, batch), batch["label"]
        problem = self.problem or (
            "multi_label_classification" if label.is_floating_point() else "single_label_classification"
        )
        return _losses(logits, label, problem, self.kind, self.label_smoothing)

    def logits(self, params: Params, batch: Batch) -> Tensor:
        """Compute the model's logits (E, C), at least float32."""
        found: Tensor = self.parts.call(params, **model_inputs(batch, self.pad)).logits
        return float32_at_least(found)


def sequence_classification_loss(
    model: nn.Module,
    *,
    kind: Output = "ce",
    label_smoothing: float = 0.0,
    modules: Iterable[str] | None = None,
    exclude: Iterable[str] = (),
) -> tuple[SequenceClassificationLoss, dict[str, Tensor]]:
    """Return the loss of a Hugging Face sequence classification model, and the parameters to attribute.

    Labels are what ``config.problem_type`` says: one class, several (each 0 or 1), or numbers; where it is silent one
    output is a number, whole numbers are classes, and fractions are several labels, as in transformers. Where padding
    changes the logits in spite of the mask, ``equal_lengths`` of the loss says so, and runs batch documents of one
    length.

    Args:
        kind: ``ce`` (cross-entropy of one label or of each of several, mean squared error of numbers), or ``log_odds``
            (TRAK's margin, negative).
        label_smoothing: ε of smoothed cross-entropy, of a single label.
        modules, exclude: which parameters to attribute, as in ``functionalize``.

    Returns:
        ``loss(params, example) -> scalar`` with ``example`` holding ``input_ids`` (T,) and ``label`` (() or (C,)),
        optionally ``attention_mask`` (T,), 0 where padding is, and ``token_type_ids`` (T,); and the parameters, name →
        tensor.

    Raises:
        FuncattribError: another kind of model; an unknown kind of loss, or one that its labels have not; no parameter
            chosen.

    Reference: TRAK's margin, arXiv 2303.14186.

    Example:
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        >>> model = BertForSequenceClassification(BertConfig(vocab_size=10, num_labels=3, **size))
        >>> loss, params = sequence_classification_loss(model)
        >>> loss(params, {"input_ids": torch.tensor([1, 2, 3]), "label": torch.tensor(2)}).shape, len(params)
        (torch.Size([]), 6)
    """
    require_task(model, "sequence_classification")
    if kind not in get_args(Output):
        raise FuncattribError(f"expected one of {get_args(Output)} of a sequence classification model, found {kind!r}")
    problem = problem_of(model)
    if (kind == "log_odds" and problem == "regression") or (
        label_smoothing and (kind != "ce" or problem not in (None, "single_label_classification"))
    ):
        setting = "kind='log_odds'" if kind == "log_odds" else f"label_smoothing={label_smoothing}"
        raise FuncattribError(f"{setting} requires labels that are classes, found problem_type={problem!r}")
    parts = functionalize(model, modules, exclude)
    pad = set_padding_token(parts.skeleton)
    loss = SequenceClassificationLoss(parts, kind, problem, label_smoothing, pad, equal_lengths=False)
    if _sees_padding(loss):
        log.info(
            "%s computes other logits where a document is padded: batches hold documents of one length",
            type(model).__name__,
        )
        loss = replace(loss, equal_lengths=True)
    return loss, parts.params


def problem_of(model: nn.Module) -> Problem | None:
    """Return what a model's labels are, as its configuration says; None where whole numbers are classes and fractions
    several labels.

    Raises:
        FuncattribError: an unknown ``problem_type``.
    """
    config: Any = getattr(model, "config", None)
    problem = getattr(config, "problem_type", None)
    if problem is None:
        return "regression" if getattr(config, "num_labels", None) == 1 else None
    if problem not in get_args(Problem):
        raise FuncattribError(f"expected a problem_type of {', '.join(get_args(Problem))}, found {problem!r}")
    known: Problem = problem
    return known


def _losses(logits: Tensor, label: Tensor, problem: Problem, kind: Output, smoothing: float) -> Tensor:
    if problem == "single_label_classification":
        y = label.reshape(-1).long()
        if kind == "ce":
            return nn.functional.cross_entropy(logits, y, reduction="none", label_smoothing=smoothing)
        others = logits.scatter(-1, y[:, None], float("-inf"))
        return torch.logsumexp(others, -1) - logits.gather(-1, y[:, None])[:, 0]
    target = label.reshape(logits.shape).to(logits.dtype)
    if problem == "regression":
        return (logits - target).square().mean(-1)
    if kind == "ce":
        return nn.functional.binary_cross_entropy_with_logits(logits, target, reduction="none").mean(-1)
    return -((2 * target - 1) * logits).mean(-1)


@torch.no_grad()
def _sees_padding(loss: SequenceClassificationLoss) -> bool:
    """Return whether a document's logits change where it is padded.

    Raises:
        FuncattribError: the model does not run on tokens alone.
    """
    padded, alone = two_documents(loss.parts)
    call = partial(loss.logits, loss.parts.params)
    singles = torch.cat(each_alone(loss.parts, call, alone))
    return not same_outputs(call(padded), singles)
