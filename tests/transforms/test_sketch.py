"""The global sketch against a dense float64 matrix whose hash is written again here, in Python integers."""

import hashlib
import math
from dataclasses import replace

import pytest
import torch

import funcattrib as fa
from funcattrib import testing as laws
from funcattrib.errors import ChainError
from funcattrib.lift.maps import sketch as maps_sketch
from funcattrib.lift.maps.sketch import Sketched, buckets
from tests.support import cases


def mixed(x: int, key: int) -> int:
    x = (x ^ key) & 0xFFFFFFFF
    x = ((x ^ x >> 16) * 0x85EBCA6B) & 0xFFFFFFFF
    x = ((x ^ x >> 13) * 0xC2B2AE35) & 0xFFFFFFFF
    return x ^ x >> 16


def entry(how: Sketched, repetition: int, position: int) -> tuple[int, int]:
    block, offset = divmod(position, 1 << 31)
    text = "\x1f".join(map(str, ("sketch", how.seed, how.name, repetition, block)))
    digest = hashlib.sha256(text.encode()).digest()
    x = mixed(mixed(offset, int.from_bytes(digest[:4], "little")), int.from_bytes(digest[4:8], "little"))
    height = how.k // how.sparsity
    return repetition * height + (x >> 1) % height, 1 if x & 1 else -1


def dense(how: Sketched) -> torch.Tensor:
    """S, (k, n), in float64."""
    size = math.prod(how.shape)
    matrix = torch.zeros(how.k, size, dtype=torch.float64)
    for position in range(size):
        for repetition in range(how.sparsity):
            row, sign = entry(how, repetition, position)
            matrix[row, position] += sign / math.sqrt(how.sparsity)
    return matrix


@pytest.mark.parametrize("sparsity", [1, 4])
def test_equals_the_dense_matrix_on_a_model(sparsity: int) -> None:
    loss, params = fa.causal_lm_loss(cases.causal("llama_tied"), modules=["*.mlp.*", "*norm*"])
    batch = cases.batch()
    ours = fa.compose(fa.per_example_grad, fa.sketch(20, seed=3, sparsity=sparsity))(loss, params, batch)
    assert list(ours) == ["sketch"]
    rows = fa.per_example_grad(loss, params, batch)
    expected = sum(
        grad.flatten(1).double() @ dense(Sketched(name, tuple(grad.shape[1:]), 20, 3, sparsity)).T
        for name, grad in rows.items()
    )
    torch.testing.assert_close(ours["sketch"].double(), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("before", [fa.project(5), fa.select(["*.weight"]), fa.unit_norm()], ids=lambda t: t.name)
@pytest.mark.parametrize("model", ["gpt2", "llama_tied", "mamba"])
def test_lowered_is_plain_behind_other_stages(model: str, before) -> None:
    loss, params = fa.causal_lm_loss(cases.causal(model), modules="all")
    chain = fa.compose(fa.per_example_grad, before, fa.sketch(32, sparsity=2), fa.unit_norm)
    laws.close(chain(loss, params, cases.batch()), chain.plain(loss, params, cases.batch()), 1e-5)


def test_parts_are_those_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, cols = torch.randn(3, 6, 11), torch.randn(3, 6, 7)
    how = Sketched("w", (11, 7), 16, sparsity=2)
    whole = how.from_factors(rows, cols), how.from_gradient(rows.mT @ cols), how.adjoint(torch.ones(16))
    monkeypatch.setattr(maps_sketch, "_PART", 14)
    parts = how.from_factors(rows, cols), how.from_gradient(rows.mT @ cols), how.adjoint(torch.ones(16))
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(whole[0], whole[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("start", [0, 12345, (1 << 31) - 3, (1 << 33) + (1 << 31) - 3, (1 << 31) - (1 << 16)])
def test_the_hash_is_that_of_python_integers(start: int) -> None:
    how = Sketched("h.0.weight", (1 << 20, 1 << 14), 30, seed=5, sparsity=3)
    for repetition in range(3):
        rows, signs = buckets(how, repetition, start, start + 7, torch.device("cpu"))
        found = list(zip(rows.tolist(), signs.tolist(), strict=True))
        assert found == [entry(how, repetition, start + i) for i in range(7)]


def test_rows_and_signs_are_even_and_unrelated() -> None:
    how, n = Sketched("w", (1 << 20,), 64), 1 << 20
    rows, signs = buckets(how, 0, 0, n, torch.device("cpu"))
    counts = torch.bincount(rows, minlength=64).double()
    assert float(((counts - n / 64) ** 2 / (n / 64)).sum()) < 63 + 5 * (2 * 63) ** 0.5
    assert abs(float(signs.double().mean())) < 5 / n**0.5
    assert abs(float((signs[1:] * signs[:-1]).double().mean())) < 5 / n**0.5
    other = buckets(replace(how, seed=1), 0, 0, n, torch.device("cpu"))
    assert abs(float((other[0] == rows).double().mean()) - 1 / 64) < 5 * (1 / 64 / n) ** 0.5
    assert abs(float((other[1] * signs).double().mean())) < 5 / n**0.5


@pytest.mark.slow
@pytest.mark.parametrize("sparsity", [1, 3])
def test_inner_products_are_kept_on_average(sparsity: int) -> None:
    a, b = laws.grads(1, laws.VECTORS, 1), laws.grads(1, laws.VECTORS, 2)
    b = {name: a[name] + 0.3 * b[name] for name in a}
    products = []
    for seed in range(400):
        stage = fa.sketch(24, seed=seed, sparsity=sparsity)
        products.append(float((stage(None, a)["sketch"] * stage(None, b)["sketch"]).sum()))
    products = torch.tensor(products)
    exact = sum(float((a[name] * b[name]).sum()) for name in a)
    assert abs(float(products.mean()) - exact) < 4 * float(products.std()) / 400**0.5


def test_leaves_add_up_whatever_their_order() -> None:
    values, stage = laws.grads(4, laws.VECTORS), fa.sketch(12)
    alone = sum(stage(None, {name: value})["sketch"] for name, value in values.items())
    torch.testing.assert_close(stage(None, values)["sketch"], alone)
    torch.testing.assert_close(stage(None, dict(reversed(values.items())))["sketch"], alone)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_same_on_a_gpu() -> None:
    how = Sketched("w", (50_000,), 512, sparsity=2)
    for repetition in range(2):
        for ours, theirs in zip(
            buckets(how, repetition, (1 << 31) - 500, (1 << 31) + 500, torch.device("cpu")),
            buckets(how, repetition, (1 << 31) - 500, (1 << 31) + 500, torch.device("cuda")),
            strict=True,
        ):
            assert torch.equal(ours, theirs.cpu())
    gradient = torch.randn(3, 50_000)
    torch.testing.assert_close(
        how.from_gradient(gradient), how.from_gradient(gradient.cuda()).cpu(), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("settings", [{"k": 0}, {"k": 5, "sparsity": 2}, {"k": 4, "sparsity": 0}])
def test_refused(settings: dict) -> None:
    with pytest.raises(ChainError, match="k divisible by sparsity"):
        fa.sketch(**settings)
