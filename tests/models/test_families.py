"""Gradients of every model family against a plain loop of autograd in float64."""

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import funcattrib as fa
from tests.support import cases


class InFloat64(TorchFunctionMode):
    """Casts to float32 that models write into their norms and softmaxes go to float64 instead."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        swap = {torch.float32: torch.float64}
        args = tuple(swap.get(a, a) if isinstance(a, torch.dtype) else a for a in args)
        kwargs = {k: swap.get(v, v) if isinstance(v, torch.dtype) else v for k, v in (kwargs or {}).items()}
        return torch.Tensor.double(*args) if func is torch.Tensor.float else func(*args, **kwargs)


def loop(model: nn.Module, batch: dict[str, Tensor], kind: str, reduction: str) -> list[dict[str, Tensor]]:
    """One example at a time, unpadded, in float64, with the model's own eager attention and its own logits."""
    double = copy.deepcopy(model).double()
    if hasattr(double, "set_attn_implementation"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            double.set_attn_implementation("eager")
            if double._can_set_experts_implementation():
                double.set_experts_implementation("eager")
    rows = []
    for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        double.zero_grad()
        length = int(ids.count_nonzero())
        with InFloat64():
            z, y = double(input_ids=ids[None, :length], use_cache=False).logits[0, :-1], labels[1:length]
        z, y = z[y != -100], y[y != -100]
        z_y = z.gather(1, y[:, None])[:, 0]
        others = z if kind == "ce" else z.scatter(1, y[:, None], float("-inf"))
        losses = others.logsumexp(1) - z_y
        (losses.sum() if reduction == "sum" else losses.sum() / max(len(y), 1)).backward()
        rows.append(
            {n: p.grad.clone() if p.grad is not None else torch.zeros_like(p) for n, p in double.named_parameters()}
        )
    return rows


def worst(ours: dict[str, Tensor], rows: list[dict[str, Tensor]]) -> float:
    """Largest relative error over rows and parameters, against 1 % of the row where a parameter has (nearly) none."""
    errors = []
    for b, row in enumerate(rows):
        whole = torch.cat([row[name].flatten() for name in ours]).norm()
        for name, grads in ours.items():
            difference = (grads[b].double() - row[name]).norm()
            errors.append(
                float(difference / torch.maximum(row[name].norm(), 1e-2 * whole)) if whole > 0 else float(difference)
            )
    return max(errors)


@pytest.mark.parametrize("name", cases.EVERY)
@pytest.mark.parametrize(("kind", "reduction"), [("ce", "sum"), ("ce", "mean"), ("log_odds", "sum")])
def test_every_parameter_against_the_float64_loop(name: str, kind: str, reduction: str) -> None:
    model, batch = cases.causal(name), cases.batch()
    rows = loop(model, batch, kind, reduction)
    loss, params = fa.causal_lm_loss(model, modules="all", kind=kind, reduction=reduction)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert worst(fa.per_example_grad(loss, params, batch), rows) < 1e-5
        lifted = fa.compose(fa.per_example_grad, fa.select(["*"]))(loss, params, batch)  # identity coordinates
    assert list(lifted) == list(params)
    assert worst(lifted, rows) < 1e-5


@pytest.mark.parametrize("name", cases.EVERY)
def test_a_row_does_not_depend_on_its_batch(name: str) -> None:
    batch = cases.batch((9, 5, 12, 2, 1))
    loss, params = fa.causal_lm_loss(copy.deepcopy(cases.causal(name)).double())  # in float32, rounding depends on it
    tolerance = 1e-6 if name == "gpt_neo" else 1e-10  # GPT-Neo attends in float32 whatever its type
    chain = fa.compose(fa.per_example_grad, fa.project(4))
    together = chain(loss, params, batch)
    for b, length in enumerate((9, 5, 12, 2, 1)):
        alone = chain(loss, params, {key: value[b : b + 1, :length] for key, value in batch.items()})
        for leaf, grads in together.items():
            torch.testing.assert_close(grads[b], alone[leaf][0], rtol=0, atol=tolerance * float(grads.abs().max()))


@pytest.mark.parametrize("name", cases.EVERY)
def test_the_fused_head_is_used(name: str) -> None:
    loss, _ = fa.causal_lm_loss(cases.causal(name))
    assert loss.model.prefix is not None


def test_an_example_without_labels_is_zero() -> None:
    batch = cases.batch()
    batch["labels"][1] = -100
    for reduction in ("sum", "mean"):
        loss, params = fa.causal_lm_loss(cases.causal("llama"), reduction=reduction)
        bound = fa.compose(fa.per_example_grad, fa.project(4), fa.unit_norm).bind(loss, params)(batch)
        assert bound.losses[1] == 0
        assert all(not grads[1].any() and grads[0].any() for grads in bound.grads.values())


def test_default_parameters_are_the_blocks_matrices() -> None:
    for name in cases.CAUSAL:
        _, params = fa.causal_lm_loss(cases.causal(name))
        assert all(p.ndim == (3 if "experts" in n else 2) for n, p in params.items())
        assert not any("embed" in n or "lm_head" in n or "wte" in n or "norm" in n for n in params)


def test_encoder_with_padding_mask_and_the_users_own_loss() -> None:
    model, batch = cases.regressor(), cases.regression_batch()
    parts = fa.functionalize(model, "all")

    def loss(params: dict[str, Tensor], example: dict[str, Tensor]) -> Tensor:
        predicted = parts.call(params, example["input_ids"][None], example["attention_mask"][None])
        return (predicted[0] - example["target"]).square()

    double, rows = copy.deepcopy(model).double(), []
    for b in range(len(batch["target"])):
        double.zero_grad()
        length = int(batch["attention_mask"][b].sum())
        ids = batch["input_ids"][b : b + 1, :length]
        (double(ids, torch.ones_like(ids))[0] - batch["target"][b]).square().backward()
        rows.append(
            {n: p.grad.clone() if p.grad is not None else torch.zeros_like(p) for n, p in double.named_parameters()}
        )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert worst(fa.per_example_grad(loss, parts.params, batch), rows) < 1e-5
        assert worst(fa.compose(fa.per_example_grad, fa.select("*"))(loss, parts.params, batch), rows) < 1e-5
