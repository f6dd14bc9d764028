"""Stored weights: what is computed on them is what is computed on dense ones, and they are dropped after their use."""

import weakref
from dataclasses import replace

import pytest
import torch

import funcattrib as fa
from funcattrib.weights.stored import Stored, dense
from tests.support import cases

alive, most = [0], [0]


class Copied:
    """Makes a copy of a weight, and counts the bytes of copies alive."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight, self.shape, self.dtype, self.device = weight, tuple(weight.shape), weight.dtype, weight.device

    def dense(self) -> torch.Tensor:
        made, size = self.weight.clone(), self.weight.nbytes
        if torch._C._functorch.is_functorch_wrapped_tensor(made):  # of the plain form, which holds them all
            return made
        alive[0] += size
        most[0] = max(most[0], alive[0])
        weakref.finalize(made.untyped_storage(), lambda: alive.__setitem__(0, alive[0] - size))
        return made


def both(name: str, modules: str | None = None, **settings: object):
    """(loss, params) of a model of dense weights, and of one whose every parameter is stored."""
    loss, params = fa.causal_lm_loss(cases.causal(name), modules=modules, **settings)
    described = loss.model
    own = dict(cases.causal(name).named_parameters())
    stored = {n: Stored(Copied(p)) for n, p in params.items()}
    frozen = {n: Stored(Copied(t)) if n in own else t for n, t in described.parts.frozen.items()}
    parts = described.parts._replace(params=stored, frozen=frozen)
    return (loss, params), (replace(loss, model=described._replace(parts=parts)), stored)


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], grad) for name, grad in theirs.items())


@pytest.mark.parametrize("modules", [None, "all"])
@pytest.mark.parametrize("name", cases.EVERY)
def test_rows(name: str, modules: str | None) -> None:
    plain, stored = both(name, modules)
    batch = cases.batch()
    same(fa.per_example_grad(*stored, batch), fa.per_example_grad(*plain, batch))
    stages = [[fa.select("*")], [fa.adafactor_norm]]
    for each in stages if name != "mamba" or modules is None else stages[:1]:
        chain = fa.compose(fa.per_example_grad, *each)
        states = [chain.fit(*one, [batch]) for one in (stored, plain)]
        same(chain(*stored, batch, states[0]), chain(*plain, batch, states[1]))


@pytest.mark.parametrize("settings", [{"kind": "log_odds"}, {"kind": "kl", "reference": cases.causal("gpt_neox")}])
def test_other_losses(settings: dict) -> None:
    plain, stored = both("llama", "all", **settings)
    chain = fa.compose(fa.per_example_grad, fa.project(4))
    same(chain(*stored, cases.batch()), chain(*plain, cases.batch()))


@pytest.mark.parametrize("name", cases.EVERY)
def test_memory_is_what_is_in_use(name: str) -> None:
    """Vectors that norms keep for backward, and convolution kernels, stay; matrices do not."""
    _, stored = both(name)
    compute = fa.compose(fa.per_example_grad, fa.project(4)).bind(*stored)
    alive[0] = most[0] = 0
    compute(cases.batch())
    sizes = {n: p.nbytes for n, p in cases.causal(name).named_parameters()}
    matrices = [size for n, size in sizes.items() if cases.causal(name).get_parameter(n).ndim > 1 and "conv1d" not in n]
    others = sum(sizes.values()) - sum(matrices)
    assert alive[0] == 0
    assert max(matrices) <= most[0] <= 2 * max(matrices) + others


def test_any_operation_finds_the_weight() -> None:
    torch.manual_seed(0)
    w, x = torch.randn(3, 4), torch.randn(2, 5, 4)
    weight = Stored(Copied(w))
    assert torch.equal(torch.cat([weight, weight]), torch.cat([w, w]))
    assert torch.equal(weight[1], w[1])
    torch.testing.assert_close(x @ weight.T, x @ w.T)
    torch.testing.assert_close(weight @ x.mT, w @ x.mT)
    torch.testing.assert_close(torch.einsum("bni,oi->bno", x, weight), x @ w.T)
    torch.testing.assert_close(torch.nn.functional.linear(x, weight, torch.ones(3)), x @ w.T + 1)
    torch.testing.assert_close(torch.addmm(torch.ones(3), x[0], Stored(Copied(w.T.contiguous()))), x[0] @ w.T + 1)
    assert (weight.shape, weight.dtype, weight.device, weight.numel()) == ((3, 4), w.dtype, w.device, 12)
    assert isinstance(weight.detach(), Stored)
    assert isinstance(torch.nn.Parameter(weight, requires_grad=False), Stored)
    assert torch.equal(dense({"w": [weight]})["w"][0], w)


def test_what_reads_past_the_operations_finds_no_number() -> None:
    with torch._C.DisableTorchFunctionSubclass():
        assert bool(torch.isnan(torch.Tensor.sum(Stored(Copied(torch.ones(3, 2))))))


def test_a_bias_is_differentiated_beside_a_stored_weight() -> None:
    w, x = torch.randn(3, 4), torch.randn(6, 5, 4)
    weight = Stored(Copied(w))

    def loss(params: dict[str, torch.Tensor], example: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.nn.functional.linear(example["x"], weight, params["b"]).square().sum()

    params, batch = {"b": torch.randn(3)}, {"x": x}
    wanted = 2 * (x @ w.T + params["b"]).sum(1)
    torch.testing.assert_close(fa.per_example_grad(loss, params, batch)["b"], wanted)
    torch.testing.assert_close(fa.compose(fa.per_example_grad, fa.select("*"))(loss, params, batch)["b"], wanted)
