"""Per-token gradients: the part of an example's gradient that each position adds.

A weight that is used at every position has G_b = Σ_t rows_bt colsᵀ_bt, and its row (b, t) is

    linear      ∂ℓ_b/∂y_bt  x_btᵀ                  y_bt = W x_bt, what position t passed through the weight
    head        ∂ℓ_b/∂z_bt  h_btᵀ                  the loss of predicting token t + 1 from position t
    embedding   e_id(bt)  ∂ℓ_b/∂x_btᵀ              token t's own vector
    vectors     ∂ℓ_b/∂y_bt [⊙ x̂_bt]                biases, weights of norms

ℓ_b is the whole example's loss: a row says where in the text the weight took part, not which token's loss it was
(earlier positions serve the losses of later tokens). Rows of padding are zero. Every stage of a chain sees rows
(example, token) as it otherwise sees examples: ``unit_norm`` normalises a token's row, ``adafactor_norm`` averages over
tokens; what is linear still adds up to the example's gradient.
"""

from collections.abc import Callable

import torch

from funcattrib.chain import per_example
from funcattrib.chain.per_example import GradientSource, measurable, named
from funcattrib.errors import FuncattribError
from funcattrib.lift import Readout, Readouts, TwoSided, readout, unpack
from funcattrib.lift.maps.per_token import PerToken
from funcattrib.types import Batch, Loss, Params, PerExample


def bind(loss: Loss, params: Params, lowered: Readouts | None) -> Callable[[Batch], PerExample]:
    """Return ``rows`` as a function of the batch."""
    lowered = {name: readout(name, TwoSided()) for name in params} if lowered is None else lowered
    by_length: dict[int, Callable[[Batch], PerExample]] = {}

    def compute(batch: Batch) -> PerExample:
        if "input_ids" not in batch or batch["input_ids"].ndim != 2:
            raise FuncattribError("per-token gradients require input_ids of shape (examples, tokens) in the batch")
        tokens = batch["input_ids"].shape[1]
        if tokens not in by_length:
            each = {name: Readout(PerToken(how.map, tokens), how.probe, (how.probe,)) for name, how in lowered.items()}
            by_length[tokens] = per_example.bind(loss, params, each)
        whole = by_length[tokens](batch)  # probe → (B, T, …)
        flat = {probe: grad.flatten(0, 1) for probe, grad in whole.grads.items()}
        return PerExample(unpack(lowered, flat), torch.repeat_interleave(whole.losses, tokens))

    return compute


def rows(loss: Loss, params: Params, batch: Batch, lowered: Readouts | None = None) -> PerExample:
    """Compute gradients of every position, (B·T, …) with an example's tokens one after the other.

    Args:
        loss: ``loss(params, example) -> scalar``, for one example without a batch axis.
        params: name → tensor; only these are differentiated.
        batch: the examples stacked along the first axis; ``input_ids`` (B, T) says how many tokens there are.
        lowered: linear maps to read off the gradients, by name. None gives a weight's shape for every token: with
            lm_head a (vocabulary, vocabulary) identity is made, so project first on a real model.

    Returns:
        The rows, and for each the loss of its example.

    Raises:
        FuncattribError: a batch without ``input_ids``.
        ChainError: a parameter that is not used once at each token.
    """
    return bind(loss, params, lowered)(batch)


per_token_grad = GradientSource("torch per token", bind, named, measurable)
"""``per_token_grad(loss, params, batch)``: rows (example, token), in the place of ``per_example_grad``.

Example:
    >>> loss = lambda params, example: torch.nn.functional.linear(example["x"], params["w"]).square().sum()
    >>> batch = {"input_ids": torch.zeros(1, 2), "x": torch.tensor([[[1.0], [2.0]]])}
    >>> per_token_grad(loss, {"w": torch.ones(1, 1)}, batch)["w"].flatten()
    tensor([2., 8.])
"""
