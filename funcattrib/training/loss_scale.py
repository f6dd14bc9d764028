"""The factor between the Trainer's loss and the sum of its examples' losses.

    loss = c Σ_b ℓ_b,   c = P / D        ℓ_b summed over an example's labelled tokens

D counts labelled tokens: of all batches that a step accumulates, on all processes, where the Trainer hands that number
over (then P is the number of processes, whose gradients DDP averages), of this batch otherwise. What the Trainer does
to the loss afterwards (accumulation steps, scaling for float16) is read off the backward pass: the loss's own gradient.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from funcattrib.errors import FuncattribError

_TOLERANCE = 1e-3

LossScale = float | Callable[[Mapping[str, Any], Any], float | Tensor]
"""c, or a function of the batch's inputs and the Trainer's ``num_items_in_batch``."""


def targets(trainer: Any, inputs: Mapping[str, Any]) -> Tensor | None:
    """Return what the loss compares the logits with, −100 where nothing: labels moved to the position that predicts
    them.
    """
    if (shifted := inputs.get("shift_labels")) is not None:
        return shifted
    labels = inputs.get("labels")
    if not isinstance(labels, Tensor):
        return None
    return F.pad(labels[..., 1:], (0, 1), value=-100) if labels.ndim > 1 and _predicts_next(trainer) else labels


def token_scale(trainer: Any, target: Tensor | None, num_items: Tensor | int | None) -> Tensor:
    """Compute c of a loss that is a mean over labelled tokens."""
    if num_items is None:
        if target is None:
            raise FuncattribError("the batch has no labels; give the callback a loss_scale")
        return 1.0 / (target != -100).sum().clamp(min=1)
    processes = trainer.accelerator.num_processes if trainer.args.average_tokens_across_devices else 1
    return processes / torch.as_tensor(num_items).clamp(min=1)


def own_scale(loss_scale: LossScale, inputs: Mapping[str, Any], num_items: Tensor | int | None) -> Tensor:
    """Return c as the user gives it."""
    return torch.as_tensor(loss_scale(inputs, num_items) if callable(loss_scale) else loss_scale)


def summed(output: Any, target: Tensor | None, smoothing: float) -> Tensor | None:
    """Compute Σ_b ℓ_b from the model's output, an example at a time; None where that has neither logits nor losses."""
    if (of_tokens := _field(output, "log_probs")) is not None:  # TRL's fused head
        return -of_tokens.float().sum()
    logits = _field(output, "logits")
    if logits is None and isinstance(output, tuple):
        logits = next((each for each in output if isinstance(each, Tensor) and each.ndim > 1), None)
    if logits is None or target is None or logits.shape[:-1] != target.shape or target.is_floating_point():
        return None
    total = torch.zeros((), device=logits.device)
    for rows, wanted in zip(logits, target.to(logits.device), strict=True):
        rows, wanted = rows.reshape(-1, rows.shape[-1]).float(), wanted.reshape(-1)
        total = total + F.cross_entropy(rows, wanted, ignore_index=-100, reduction="sum", label_smoothing=smoothing)
    return total


def check(loss: Tensor, total: Tensor | None, scale: Tensor) -> None:
    """Refuse a loss that is not a mean over labelled tokens.

    Raises:
        FuncattribError: it is something else, or the model's output does not show what it is.
    """
    again = (
        "give the callback loss_scale=…, the factor between the loss and the sum of its examples' losses: a number, or "
        "a function of (inputs, num_items_in_batch)"
    )
    if total is None:
        raise FuncattribError(
            f"the model returns no logits, or has no labels, to compute each example's loss from\n{again}"
        )
    expected, found = float(scale.to(total.device) * total), float(loss.detach())
    if not abs(found - expected) <= _TOLERANCE * max(abs(expected), 1e-6):
        raise FuncattribError(
            f"expected the loss to be the mean over labelled tokens, {expected:.6g}, found {found:.6g}\n{again}"
        )


def _predicts_next(trainer: Any) -> bool:
    """Return whether a label belongs to the position before it."""
    model = getattr(trainer.model, "get_base_model", lambda: trainer.model)()
    named = type(model).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    return named or getattr(trainer, "_loss_shifts_labels", False)


def _field(output: Any, name: str) -> Any:
    return output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
