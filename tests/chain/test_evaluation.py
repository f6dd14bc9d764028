"""Ways to evaluate a loss on a batch: all give the rows of a float64 loop; the fastest that is right is taken."""

import logging

import pytest
import torch
from torch import Tensor, nn

import funcattrib as fa
from funcattrib.chain import evaluation
from funcattrib.chain.evaluation import batched, by_vmap, find_way, one_by_one
from funcattrib.lift import TwoSided, readout

EXAMPLES, TOKENS, WIDTH = 3, 5, 4


class OldFunction(torch.autograd.Function):
    """A square, written for ordinary autograd alone."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, g):
        return 2 * ctx.saved_tensors[0] * g


def item(y: Tensor) -> Tensor:
    return y * y.detach().abs().max().item()


def branch(y: Tensor) -> Tensor:
    return y if y.sum() > 0 else -3 * y


def nonzero(y: Tensor) -> Tensor:
    return y[y.sum(-1) > 0] * 2


def in_place(y: Tensor) -> Tensor:
    total = torch.zeros(TOKENS, WIDTH, dtype=y.dtype)
    total += y
    return total


def old_function(y: Tensor) -> Tensor:
    return OldFunction.apply(y)


REFUSED = (item, branch, nonzero, in_place, old_function)


def made(between):
    torch.manual_seed(0)
    params = {"w": torch.randn(WIDTH, WIDTH, dtype=torch.float64), "b": torch.randn(WIDTH, dtype=torch.float64)}
    batch = {"x": torch.randn(EXAMPLES, TOKENS, WIDTH, dtype=torch.float64)}

    def loss(params, example):
        return between(nn.functional.linear(example["x"], params["w"], params["b"])).tanh().sum()

    return loss, params, batch


def loop(loss, params, batch) -> dict[str, Tensor]:
    rows: dict[str, list[Tensor]] = {name: [] for name in params}
    for at in range(EXAMPLES):
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in params.items()}
        loss(leaves, {name: value[at] for name, value in batch.items()}).backward()
        for name, leaf in leaves.items():
            rows[name].append(leaf.grad)
    return {name: torch.stack(each) for name, each in rows.items()}


@pytest.mark.parametrize("between", REFUSED)
def test_what_vmap_refuses_is_computed(between) -> None:
    loss, params, batch = made(between)
    with pytest.raises((RuntimeError, NotImplementedError)):
        by_vmap(loss, params, None, batch)
    expected = loop(loss, params, batch)
    torch.testing.assert_close(fa.per_example_grad(loss, params, batch), expected)
    lifted = fa.compose(fa.per_example_grad, fa.select(["*"]))(loss, params, batch)
    torch.testing.assert_close(lifted, expected)


def test_the_way_is_found_once_and_said_once(caplog: pytest.LogCaptureFixture, monkeypatch) -> None:
    loss, params, batch = made(item)
    evaluation._say.cache_clear()
    tried = []
    monkeypatch.setattr(evaluation, "by_vmap", lambda *a: tried.append(1) or by_vmap(*a))
    with caplog.at_level(logging.INFO, "funcattrib"):
        bound = fa.compose(fa.per_example_grad, fa.project(2)).bind(loss, params)
        first, second = bound(batch), bound(batch)
    torch.testing.assert_close(first.grads, second.grads, rtol=0, atol=0)
    assert len(tried) == 1
    assert [record.message.split(",")[0] for record in caplog.records] == ["gradients are computed one by one (slower"]


def test_an_error_of_the_loss_is_its_own() -> None:
    def loss(params, example):
        return example["missing"].sum()

    with pytest.raises(KeyError, match="missing"):
        fa.per_example_grad(loss, {"w": torch.ones(1)}, {"x": torch.ones(2, 1)})


def test_short_memory_is_no_refusal() -> None:
    def loss(params, example):
        raise torch.OutOfMemoryError("CUDA out of memory")

    calls = []
    with pytest.raises(torch.OutOfMemoryError):
        find_way(lambda *a: calls.append(1) or loss(*a), {"w": torch.ones(1)}, None, {"x": torch.ones(2, 1)})
    assert len(calls) == 1


def test_random_numbers_are_refused() -> None:
    def loss(params, example):
        return (nn.functional.dropout(example["x"], 0.5) * params["w"]).sum()

    with pytest.raises(RuntimeError, match="randomness"):
        fa.per_example_grad(loss, {"w": torch.ones(1)}, {"x": torch.ones(2, 3)})


class Batched:
    """A loss with a batched form, which mixes examples where it is told to, and which vmap refuses."""

    def __init__(self, mixes: bool) -> None:
        self.mixes = mixes

    def __call__(self, params, example):
        return self.batched(params, {name: value[None] for name, value in example.items()})[0]

    def batched(self, params, batch):
        y = OldFunction.apply(nn.functional.linear(batch["x"], params["w"], params["b"]))
        if self.mixes:
            y = y - y.mean(0, keepdim=True) * (len(y) > 1)
        return y.tanh().sum((1, 2))


@pytest.mark.parametrize(("mixes", "way"), [(False, batched), (True, one_by_one)])
def test_the_batched_form_is_taken_where_it_does_not_mix_examples(mixes: bool, way) -> None:
    _, params, batch = made(item)
    loss = Batched(mixes)
    maps = {name: readout(name, TwoSided()) for name in params}
    found = find_way(loss, params, maps, batch)
    assert found.way is way
    torch.testing.assert_close(found.result.grads, loop(loss, params, batch))


def test_recurrent_layers() -> None:
    torch.manual_seed(0)
    net = nn.LSTM(WIDTH, 3, batch_first=True).double()
    params = {name: tensor.detach() for name, tensor in net.named_parameters()}

    def loss(params, example):
        return torch.func.functional_call(net, params, (example["x"][None],))[0].square().sum()

    batch = {"x": torch.randn(EXAMPLES, TOKENS, WIDTH, dtype=torch.float64)}
    torch.testing.assert_close(fa.per_example_grad(loss, params, batch), loop(loss, params, batch))
