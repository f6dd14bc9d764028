"""Check that rows are the model's own gradients, and do not depend on their batch, with advice where they do."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from funcattrib.chain.chain import Chain, compose
from funcattrib.chain.evaluation import is_random, one_by_one
from funcattrib.chain.per_example import per_example_grad, spec
from funcattrib.chain.stages import apply_all, ready
from funcattrib.errors import FuncattribError
from funcattrib.kernels.safe_norm import as_rows, float32_at_least
from funcattrib.losses.causal_lm import causal_lm_loss
from funcattrib.models.functional import device_of, parameters_of
from funcattrib.models.limits import context_length, vocabulary
from funcattrib.transforms import project
from funcattrib.types import Example, Params
from funcattrib.weights.stored import Stored

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}


class Verdict(NamedTuple):
    """Largest relative differences ‖row − row′‖ / ‖row‖ between ways to compute the same batch.

    ``own`` compares with plain autograd through the model itself, document by document, its own attention and logits;
    None where its weights are in shards or quantised.
    """

    again: float
    permuted: float
    alone: float
    own: float | None
    tolerance: float
    dtype: torch.dtype
    finite: bool

    @property
    def passed(self) -> bool:
        """Return whether rows agree within rounding."""
        return self.finite and max(self.again, self.permuted, self.alone, self.own or 0.0) <= self.tolerance

    def lines(self) -> list[str]:
        """Format the verdict for people."""
        lines = [
            f"computed again:  {self.again:.1e}",
            f"permuted:        {self.permuted:.1e}",
            f"one by one:      {self.alone:.1e}",
            f"the model's own: {'not compared' if self.own is None else f'{self.own:.1e}'}      (relative differences; "
            f"rounding in {self.dtype} allows {self.tolerance:.0e})",
        ]
        return [*lines, self._advice()]

    def _advice(self) -> str:
        if not self.finite:
            return "Gradients are NaN or infinite: load the model with `precision='fp32'`."
        if self.passed:
            return (
                "Rows do not depend on their batch."
                if self.own is None
                else "Rows are the model's own gradients, and do not depend on their batch."
            )
        if self.again > self.tolerance:
            return (
                "The same batch gives two results: something in the model is random or keeps state (dropout, noise, "
                "a router with jitter); make it deterministic in eval mode."
            )
        if self.dtype in (torch.bfloat16, torch.float16):
            return "Rows depend on their batch more than rounding allows: load the model with `precision='fp32'`."
        if max(self.permuted, self.alone) <= self.tolerance:
            return (
                "Rows differ from the model's own gradients: its forward pass does something else on the copy that is "
                "differentiated; please report the model, and give a loss function that calls it (`loss`)."
            )
        return (
            "Rows depend on their batch: the model mixes examples or sees its padding (batch statistics, experts with "
            "a capacity, attention to the right); use `token_batch_size=1`, so that every document is its own batch."
        )


def check_model(
    model: nn.Module,
    lengths: Sequence[int] = (48, 17, 64, 5),
    projection_dim: int = 16,
    modules: Sequence[str] | None = None,
) -> Verdict:
    """Compute one batch of random tokens twice, permuted, one by one, and by the model itself, and compare the rows.

    Raises:
        FuncattribError: fewer than two documents, one below two tokens, or one longer than the model's context.
    """
    longest = context_length(model)
    if len(lengths) < 2 or min(lengths) < 2 or max(lengths) > longest:
        raise FuncattribError(
            f"expected at least two `lengths` of 2 to {longest} tokens (the model's context), found "
            f"{', '.join(map(str, lengths))}"
        )
    loss, params = causal_lm_loss(model, modules=modules)
    chain = compose(per_example_grad, project(projection_dim)) if projection_dim else compose(per_example_grad)
    compute = chain.bind(loss, params)
    device = device_of(params)
    batch = _random_batch(lengths, vocabulary(model) or 100)

    def rows(chosen: list[int], longest: int) -> Tensor:
        if loss.equal_lengths and len(chosen) > 1:  # as a run batches them
            return torch.cat([rows([at], lengths[at]) for at in chosen])
        part = {name: tensor[chosen, :longest].to(device) for name, tensor in batch.items()}
        return torch.cat([as_rows(grad).double().cpu() for grad in compute(part).grads.values()], 1)

    stored = any(isinstance(tensor, Stored) for tensor in parameters_of(model).values())
    own_rows = torch.empty(0) if stored else _own_rows(model, params, chain, lengths, batch)
    order = list(range(len(lengths)))
    dtype = next(iter(params.values())).dtype
    tolerance = TOLERANCE.get(dtype, 1e-5)
    try:
        whole = rows(order, max(lengths))
    except RuntimeError as error:
        if not is_random(error):
            raise
        return Verdict(math.inf, math.inf, math.inf, None, tolerance, dtype, finite=True)
    norm = whole.norm(dim=1).clamp(min=1e-30)

    def difference(other: Tensor) -> float:
        return float(((other - whole).norm(dim=1) / norm).max())

    return Verdict(
        again=difference(rows(order, max(lengths))),
        permuted=difference(rows(order[::-1], max(lengths)).flip(0)),
        alone=difference(torch.cat([rows([i], length) for i, length in enumerate(lengths)])),
        own=None if stored else difference(own_rows),
        tolerance=tolerance,
        dtype=dtype,
        finite=bool(whole.isfinite().all()),
    )


def _own_rows(
    model: nn.Module, params: Params, chain: Chain, lengths: Sequence[int], batch: Mapping[str, Tensor]
) -> Tensor:
    """Compute rows by autograd through the model itself, without any part of ours before the chain."""

    def loss(weights: Params, example: Example) -> Tensor:
        ids = example["input_ids"]
        logits = torch.func.functional_call(model, dict(weights), (), {"input_ids": ids[None]}).logits[0, :-1]
        return nn.functional.cross_entropy(float32_at_least(logits), ids[1:], reduction="sum")

    device = device_of(params)
    state = ready(chain.stages, spec(params), device)
    training = model.training
    model.eval()
    try:
        found = []
        for at, length in enumerate(lengths):
            document = {"input_ids": batch["input_ids"][at : at + 1, :length].to(device)}
            grads = apply_all(chain.stages, state, one_by_one(loss, params, None, document).grads)
            found.append(torch.cat([as_rows(grad).double().cpu() for grad in grads.values()], 1))
        return torch.cat(found)
    finally:
        model.train(training)


def _random_batch(lengths: Sequence[int], vocabulary: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, (len(lengths), max(lengths)), generator=generator)
    inside = torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]
    return {"input_ids": torch.where(inside, ids, 0), "labels": torch.where(inside, ids, -100)}
