"""Gram matrices, their spectra and TrackStar's mixture, against numpy."""

import numpy as np
import pytest
import torch

import funcattrib as fa
from funcattrib import testing as laws
from funcattrib.errors import ChainError
from funcattrib.transforms import precondition
from funcattrib.transforms.gram import gram_matrices, spectrum
from funcattrib.transforms.mixed_gram import mix_grams
from tests.support import cases

SIDES = {"a": 5, "b": 7}


def grams(seed: int, scale: float = 1.0, count: int = 40) -> dict[str, torch.Tensor]:
    draw = np.random.default_rng(seed)
    made = {}
    for block, side in SIDES.items():
        rows = draw.normal(size=(count, side)) * np.linspace(1, 3, side) * scale
        made[block] = torch.from_numpy(rows.T @ rows / count)
    return made


def pooled(gram: dict[str, torch.Tensor]) -> np.ndarray:
    values = np.concatenate([np.linalg.svd(matrix.numpy(), compute_uv=False) for matrix in gram.values()])
    return np.sort(values)[::-1]


def test_gram_is_the_mean_outer_product_before_and_after_finalize() -> None:
    stage = precondition(groups={"both": ["matrix", "layer.dense.weight"]})
    values = laws.grads(12)
    state = stage.init(laws.MATRICES)[0]
    for part in laws.split(values, [5, 7]):
        state = stage.observe(state, part)
    # A joint block's leaves stand by name, whatever the order they come in.
    joint = torch.cat([values["layer.dense.weight"].flatten(1), values["matrix"].flatten(1)], 1).double()
    alone = values["layer.out.weight"].flatten(1).double()
    for found in (
        gram_matrices(state),
        gram_matrices(stage.finalize(state)),
        gram_matrices((None, stage.finalize(state))),
    ):
        assert list(found) == ["both", "layer.out.weight"]
        torch.testing.assert_close(found["both"], joint.T @ joint / 12, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(found["layer.out.weight"], alone.T @ alone / 12, rtol=1e-12, atol=1e-12)


def test_spectrum_pools_the_blocks() -> None:
    gram = grams(0)
    np.testing.assert_allclose(spectrum(gram).numpy(), pooled(gram), rtol=1e-10)
    assert spectrum({"w": torch.ones(4, 4)}).tolist()[1:] == [0.0, 0.0, 0.0]  # not 1e-17


@pytest.mark.parametrize("k", [1, 4, 12])
def test_the_spectra_cross_at_k(k) -> None:
    query, train = grams(0, scale=3.0), grams(1)
    mixed = mix_grams(query, train, k)
    of_query, of_train = pooled(query)[k - 1], pooled(train)[k - 1]
    assert mixed.component == k
    assert mixed.weight * of_query == pytest.approx((1 - mixed.weight) * of_train, rel=1e-10)
    for block in SIDES:
        expected = mixed.weight * query[block] + (1 - mixed.weight) * train[block]
        torch.testing.assert_close(mixed.gram[block], expected)


def test_with_fewer_directions_than_k_the_last_that_both_have_decides() -> None:
    query, train = grams(0), grams(1)
    assert mix_grams(query, train)[1:] == mix_grams(query, train, 12)[1:]
    assert mix_grams(query, train).component == 12
    few = grams(2, count=2)  # two queries: two directions in each block
    mixed = mix_grams(few, train, 9)
    assert mixed.component == 4
    assert mixed.weight == pytest.approx(pooled(train)[3] / (pooled(few)[3] + pooled(train)[3]), rel=1e-9)
    assert mix_grams(train, few, 9).weight == pytest.approx(1 - mixed.weight)


def test_what_is_zero_has_no_weight() -> None:
    gram = grams(0)
    zero = {block: torch.zeros_like(matrix) for block, matrix in gram.items()}
    assert mix_grams(zero, gram)[1:] == (0.0, 0)
    assert mix_grams(gram, zero)[1:] == (1.0, 0)
    assert mix_grams(zero, zero)[1:] == (0.5, 0)
    for mixed in (mix_grams(zero, gram), mix_grams(gram, zero)):
        torch.testing.assert_close(mixed.gram, gram)


def test_what_all_queries_share_is_divided_out() -> None:
    draw = torch.Generator().manual_seed(0)
    spec = {"w": fa.Leaf((6,), torch.float64)}
    template = torch.tensor([10.0, 0, 0, 0, 0, 0], dtype=torch.float64)
    train = {"w": torch.randn(200, 6, generator=draw, dtype=torch.float64)}
    query = {"w": template + 0.3 * torch.randn(50, 6, generator=draw, dtype=torch.float64)}
    stage = precondition(damping=0.0)
    mixed = mix_grams(*(gram_matrices(laws.fitted(stage, [part], spec)) for part in (query, train)), k=2)
    share = []
    for gram in (gram_matrices(laws.fitted(stage, [train], spec)), mixed.gram):
        own = precondition(gram=gram, damping=0.0)
        row = own(own.init(spec)[0], query)["w"]
        share.append(float((row[:, 0].square() / row.square().sum(1)).mean()))
    assert share[0] > 0.95  # the training data alone leave the template in charge
    assert share[1] < 0.5
    assert mixed.weight > 0.8


def test_trackstar_from_its_parts() -> None:
    loss, params = fa.causal_lm_loss(cases.causal("gpt_neox"))
    batches, queries = [cases.batch((9, 5)), cases.batch((12, 2), seed=2)], [cases.batch((6, 8), seed=3)]
    before = fa.compose(fa.per_example_grad, fa.project(3))
    stage = precondition()
    spec = before.init(fa.per_example_grad.spec(params))[1]
    seen = {}
    for name, data in (("query", queries), ("train", batches)):
        state = stage.init(spec)[0]
        for batch in data:
            state = stage.observe(state, before(loss, params, batch))
        seen[name] = gram_matrices(state)
    mixed = mix_grams(seen["query"], seen["train"], k=10)
    chain = fa.compose(before, precondition(power=-0.5, gram=mixed.gram), fa.unit_norm())
    train, query = (
        torch.cat([g.flatten(1) for g in chain(loss, params, b).values()], 1) for b in (batches[0], queries[0])
    )

    def dense(batch) -> np.ndarray:
        rows = []
        for name, grad in before(loss, params, batch).items():
            gram = mixed.weight * seen["query"][name] + (1 - mixed.weight) * seen["train"][name]
            values, vectors = np.linalg.eigh(gram.numpy())
            damped = np.clip(values, 0, None) + 0.1 * values.mean()
            rows.append(grad.flatten(1).double().numpy() @ (vectors * damped**-0.5) @ vectors.T)
        rows = np.concatenate(rows, 1)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    np.testing.assert_allclose((train @ query.T).numpy(), dense(batches[0]) @ dense(queries[0]).T, atol=1e-5)


REFUSED = {
    "k": (lambda: mix_grams(grams(0), grams(1), 0), "k of at least 1"),
    "blocks": (lambda: mix_grams(grams(0), {"a": grams(0)["a"]}), "the block 'b' is in one of the two"),
    "shapes": (lambda: mix_grams({"a": torch.eye(2)}, {"a": torch.eye(3)}), r"\(2, 2\) and \(3, 3\)"),
    "no such stage": (lambda: gram_matrices((None, {"w": torch.ones(1)})), "found 0"),
    "two stages": (lambda: gram_matrices(fa.compose(precondition, precondition).init(laws.MATRICES)[0]), "found 2"),
    "nothing seen": (lambda: gram_matrices(precondition().init(laws.MATRICES)[0]), "fit it first"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case) -> None:
    action, message = REFUSED[case]
    with pytest.raises(ChainError, match=message):
        action()
