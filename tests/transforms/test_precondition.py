"""Preconditioning against dense float64 algebra."""

import json
import math

import numpy as np
import pytest
import torch

import funcattrib as fa
from funcattrib import testing as laws
from funcattrib.chain import state_tree
from funcattrib.errors import ChainError
from funcattrib.transforms import precondition
from funcattrib.transforms.gram import gram_matrices
from funcattrib.transforms.registry import rebuild
from tests.support import cases

DOUBLE = {
    "a.weight": fa.Leaf((3, 4), torch.float64),
    "b.weight": fa.Leaf((2, 5), torch.float64),
    "b.bias": fa.Leaf((6,), torch.float64),
}
GROUPS = {
    "parameter": [["a.weight"], ["b.weight"], ["b.bias"]],
    "all": [["a.weight", "b.weight", "b.bias"]],
    "b": [["a.weight"], ["b.weight", "b.bias"]],
}


def chosen(groups: str):
    return {"b": "b.*"} if groups == "b" else groups


def rows(count: int, rank: int | None = None, seed: int = 0) -> fa.Grads:
    """Correlated rows; with ``rank``, of at most that rank in every leaf."""
    draw = torch.Generator().manual_seed(seed)
    mixing = torch.Generator().manual_seed(99)
    made = {}
    for name, leaf in DOUBLE.items():
        width = math.prod(leaf.shape)
        inner = rank or width
        basis = torch.randn(inner, width, generator=mixing, dtype=torch.float64)
        made[name] = (torch.randn(count, inner, generator=draw, dtype=torch.float64) @ basis).reshape(-1, *leaf.shape)
    return made


def flat(grads: fa.Grads, names: list[str]) -> np.ndarray:
    return np.concatenate([grads[name].reshape(len(grads[name]), -1).double().numpy() for name in names], 1)


def unit_vectors(names: list[str]) -> fa.Grads:
    """One row for every coordinate of ``names``."""
    sizes = {name: math.prod(leaf.shape) for name, leaf in DOUBLE.items()}
    width = sum(sizes[name] for name in names)
    parts = dict(zip(names, torch.eye(width, dtype=torch.float64).split([sizes[n] for n in names], 1), strict=True))
    nothing = {name: torch.zeros(width, sizes[name], dtype=torch.float64) for name in DOUBLE}
    return {name: part.reshape(width, *DOUBLE[name].shape) for name, part in (nothing | parts).items()}


def dense_inverse(gram: np.ndarray, damping: float, kind: str) -> np.ndarray:
    mean = np.trace(gram) / len(gram)
    if kind == "pseudoinverse":
        largest = np.linalg.norm(gram, 2)
        return np.linalg.pinv(gram, rcond=max(damping * mean / largest, 1e-12), hermitian=True)
    return np.linalg.inv(gram + (damping * mean if kind == "relative" else damping) * np.eye(len(gram)))


@pytest.mark.parametrize("kind", ["relative", "absolute", "pseudoinverse"])
@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("damping", [0.1, 0.7])
def test_both_powers_are_those_of_the_dense_matrix(groups, kind, damping) -> None:
    seen, given = rows(50), rows(4, seed=5)
    once, twice = (
        precondition(power=power, groups=chosen(groups), damping=damping, damping_kind=kind) for power in (-1, -0.5)
    )
    inverse = once(laws.fitted(once, [seen], DOUBLE), given)
    root_state = laws.fitted(twice, [seen], DOUBLE)
    root = twice(root_state, given)
    again = twice(root_state, root)
    for names in GROUPS[groups]:
        all_rows = flat(seen, names)
        matrix = dense_inverse(all_rows.T @ all_rows / 50, damping, kind)
        expected = flat(given, names) @ matrix
        np.testing.assert_allclose(flat(inverse, names), expected, rtol=1e-9, atol=1e-9 * np.abs(expected).max())
        # The positive root is the one symmetric matrix that squares to it and has no negative eigenvalue.
        np.testing.assert_allclose(flat(again, names), expected, rtol=1e-9, atol=1e-9 * np.abs(expected).max())
        operator = flat(twice(root_state, unit_vectors(names)), names)
        np.testing.assert_allclose(operator, operator.T, atol=1e-10 * np.abs(operator).max())
        assert np.linalg.eigvalsh(operator).min() > -1e-10


@pytest.mark.parametrize("groups", GROUPS)
def test_half_a_power_on_both_sides_is_the_inverse_on_one(groups) -> None:
    seen, a, b = rows(30), rows(6, seed=1), rows(5, seed=2)
    half, whole = (precondition(power=power, groups=chosen(groups)) for power in (-0.5, -1))
    state = laws.fitted(half, [seen], DOUBLE)
    left, right = half(state, a), half(state, b)
    one_side = whole(laws.fitted(whole, [seen], DOUBLE), b)
    names = list(DOUBLE)
    expected = flat(a, names) @ flat(one_side, names).T
    np.testing.assert_allclose(flat(left, names) @ flat(right, names).T, expected, rtol=1e-9, atol=1e-9)


def test_float32_gradients_are_multiplied_in_float32_and_halves_are_not() -> None:
    seen = {name: value.float() for name, value in rows(50).items()}
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
        spec = {name: fa.Leaf(leaf.shape, dtype) for name, leaf in DOUBLE.items()}
        stage = precondition()
        state = laws.fitted(stage, [seen], spec)
        assert {p.dtype for p in state.power.values()} == {torch.float32}
        assert {g.dtype for g in state.gram.values()} == {torch.float64}
        given = {name: value.to(dtype) for name, value in rows(4, seed=5).items()}
        found = stage(state, given)
        maps = stage.maps(state, spec)
        for name in DOUBLE:
            exact = flat(seen, [name])
            gram = exact.T @ exact / 50
            values, vectors = np.linalg.eigh(gram + 0.1 * np.trace(gram) / len(gram) * np.eye(len(gram)))
            expected = flat(given, [name]) @ (vectors / np.sqrt(values)) @ vectors.T
            assert found[name].dtype == dtype
            np.testing.assert_allclose(flat(found, [name]), expected, atol=tolerance * np.abs(expected).max())
            gradient_map = maps[name].map.to(dtype)
            assert gradient_map.matrix.dtype == torch.float32
            assert torch.equal(gradient_map.from_gradient(given[name]), found[name])


@pytest.mark.parametrize("kind", ["relative", "absolute", "pseudoinverse"])
@pytest.mark.parametrize("power", [-1, -0.5])
@pytest.mark.parametrize("damping", [0.0, 0.1])
def test_a_parameter_without_gradient_gives_zeros(kind, power, damping) -> None:
    stage = precondition(power=power, damping=damping, damping_kind=kind)
    seen = rows(20)
    seen["b.bias"] = torch.zeros_like(seen["b.bias"])
    state = laws.fitted(stage, [seen], DOUBLE)
    found = stage(state, rows(3, seed=4))
    assert all(torch.isfinite(value).all() for value in found.values())
    assert not found["b.bias"].any()
    assert found["a.weight"].any()


@pytest.mark.parametrize("kind", ["relative", "absolute", "pseudoinverse"])
@pytest.mark.parametrize("groups", ["parameter", "all"])
def test_without_damping_directions_never_seen_are_dropped(kind, groups) -> None:
    seen = rows(40, rank=3)
    stage = precondition(power=-0.5, groups=groups, damping=0.0, damping_kind=kind)
    white = stage(laws.fitted(stage, [seen], DOUBLE), seen)
    for names, rank in zip(GROUPS[groups], [9] if groups == "all" else [3, 3, 3], strict=True):
        flattened = flat(white, names)
        values = np.linalg.eigvalsh(flattened.T @ flattened / 40)  # a projection on what was seen
        np.testing.assert_allclose(np.sort(values)[-rank:], 1, atol=1e-6)
        np.testing.assert_allclose(np.sort(values)[:-rank], 0, atol=1e-6)


def test_a_given_gram_is_as_good_as_a_fitted_one() -> None:
    seen, given = rows(30), rows(3, seed=8)
    for groups in GROUPS:
        fitted = precondition(groups=chosen(groups), power=-1, damping=0.3)
        state = laws.fitted(fitted, [seen], DOUBLE)
        stage = precondition(groups=chosen(groups), power=-1, damping=0.3, gram=gram_matrices(state))
        assert not stage.fitted
        laws.same(stage(stage.init(DOUBLE)[0], given), fitted(state, given))


def model():
    return fa.causal_lm_loss(cases.causal("llama_tied"), modules="all")


CHAINS = {
    "parameter": lambda: (fa.project(4), precondition()),
    "trackstar": lambda: (fa.adafactor_norm(), fa.project(4), precondition(), fa.unit_norm()),
    "all": lambda: (fa.project(3), precondition(groups="all", power=-1)),
    "attention": lambda: (fa.project(3), precondition(groups={"attention": ["*attn*"]}), fa.unit_norm()),
    "then projected": lambda: (fa.project(5), precondition(), fa.project(2)),
}


@pytest.mark.parametrize("name", CHAINS)
def test_a_lowered_chain_is_the_plain_chain(name) -> None:
    loss, params = model()
    batches = [cases.batch((9, 5)), cases.batch((12, 2, 7), seed=2)]
    chain = fa.compose(fa.per_example_grad, *CHAINS[name]())
    state = chain.fit(loss, params, batches)
    found = chain(loss, params, batches[0], state)
    plain = chain.plain(loss, params, batches[0], state)
    assert list(found) == list(plain)
    names = list(found)
    # H^p enlarges what float32 rounds in directions that had little gradient: errors are those of whole rows.
    expected = flat(plain, names)
    errors = np.linalg.norm(flat(found, names) - expected, axis=1) / np.linalg.norm(expected, axis=1)
    assert errors.max() < 1e-3


@pytest.mark.parametrize("groups", GROUPS)
def test_a_state_serves_the_same_leaves_in_another_order(groups) -> None:
    stage, values = precondition(groups=chosen(groups)), rows(40)
    turned = dict(reversed(values.items()))
    state = laws.fitted(stage, [values], DOUBLE)
    expected = stage(state, values)
    for other in (state, laws.fitted(stage, [turned], dict(reversed(DOUBLE.items())))):
        found = stage(other, turned)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-9)


def test_fit_does_not_depend_on_the_batches() -> None:
    loss, params = model()
    whole = cases.batch((9, 5, 12, 2, 7, 11, 3, 8, 4, 6, 10, 5, 9, 3))
    chain = fa.compose(fa.per_example_grad, fa.project(4), precondition())
    states = []
    for parts in (1, 2, 7):
        size = 14 // parts
        batches = [{k: v[i : i + size] for k, v in whole.items()} for i in range(0, 14, size)]
        states.append(gram_matrices(chain.fit(loss, params, batches)))
    for other in states[1:]:
        for name, matrix in states[0].items():  # the sums agree far better; the gradients are float32
            torch.testing.assert_close(other[name], matrix, rtol=1e-6, atol=1e-6 * float(matrix.abs().max()))


@pytest.mark.parametrize("groups", GROUPS)
def test_description_and_state_make_it_again(groups) -> None:
    seen, given = rows(20), rows(3, seed=1)
    stage = precondition(-1, chosen(groups), 0.2, "absolute")
    chain = fa.compose(fa.per_example_grad, stage)
    description = chain.describe()
    assert description == [
        {
            "name": "precondition",
            "power": -1.0,
            "groups": {"b": ["b.*"]} if groups == "b" else groups,
            "damping": 0.2,
            "damping_kind": "absolute",
        }
    ]
    again = rebuild(fa.per_example_grad, json.loads(json.dumps(description)))
    assert again.describe() == description
    state = laws.fitted(stage, [seen], DOUBLE)
    restored = state_tree.restore(again.init(DOUBLE)[0], state_tree.flatten((state,)))
    laws.same(again.apply(restored, given), stage(state, given))
    mixed = fa.compose(
        fa.per_example_grad, precondition(-1, chosen(groups), 0.2, "absolute", gram=gram_matrices(state))
    )
    assert mixed.describe() == description  # the matrices are state, not settings
    kept = state_tree.restore(again.init(DOUBLE)[0], state_tree.flatten(mixed.init(DOUBLE)[0]))
    laws.same(again.apply(kept, given), stage(state, given))


def init(stage, spec=DOUBLE):
    return fa.compose(stage).init(spec)


REFUSED = {
    "power": (lambda: precondition(power=0.5), "power of -1 or -0.5, found 0.5"),
    "kind": (lambda: precondition(damping_kind="none"), "found 'none'"),
    "damping": (lambda: precondition(damping=-0.1), "at least 0, found -0.1"),
    "groups": (lambda: precondition(groups="layer"), "found 'layer'"),
    "nothing": (lambda: init(precondition(groups={"c": "c.*"})), r"stage 1 \(precondition\) has a group 'c'"),
    "overlap": (lambda: init(precondition(groups={"b": "b.*", "w": "*.weight"})), "b.weight belongs to b and w"),
    "a parameter's name": (lambda: init(precondition(groups={"b.bias": "a.*"})), "b.bias belongs to"),
    "too wide": (
        lambda: init(precondition(), {"w": fa.Leaf((256, 1024), torch.float32)}),
        "found 262144 in w; put project before it",
    ),
    "missing": (lambda: init(precondition(gram={"a.weight": torch.eye(12)})), "has no Gram matrix for b.weight"),
    "side": (
        lambda: init(precondition(gram={n: torch.eye(10) for n in DOUBLE})),
        r"of a.weight of side 12, found \(10, 10\)",
    ),
    "not square": (lambda: precondition(gram={"w": torch.ones(2, 3)}), "square"),
    "not finite": (
        lambda: precondition(gram={"w": torch.full((2, 2), torch.nan)}),
        "the gradients of w are NaN or infinite",
    ),
    "gradients not finite": (
        lambda: laws.fitted(precondition(), [{n: v * torch.inf for n, v in rows(2).items()}], DOUBLE),
        "the gradients of a.weight are NaN or infinite",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case) -> None:
    action, message = REFUSED[case]
    with pytest.raises(ChainError, match=message):
        action()
