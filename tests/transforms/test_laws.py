"""The laws over the table of transforms, and what only chains obey."""

import itertools
from dataclasses import dataclass

import pytest
import torch

import funcattrib as fa
from funcattrib import lift
from funcattrib import testing as laws
from funcattrib.chain import state_tree
from funcattrib.errors import ChainError
from funcattrib.lift.factors import outer
from tests.support import cases
from tests.support.sweeps import crossed

LAWS = [
    laws.apply_is_row_by_row,
    laws.announced_spec_is_produced,
    laws.maps_agree,
    laws.fit_ignores_splits_and_order,
    laws.other_leaves_do_not_matter,
]
JOINT = (
    "unit_norm",
    "sketch",
    "clip",
    "inner_products",
    "self_influence",
    "precondition_all",
    "precondition_groups",
    "cast_int8",
)
"""Transforms that join leaves on purpose."""


@pytest.mark.parametrize("spec", [laws.MATRICES, laws.VECTORS, laws.KERNELS], ids=["matrices", "vectors", "kernels"])
@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("name", cases.TRANSFORMS)
def test_law(name, law, spec) -> None:
    if name == "split_experts" and spec is not laws.KERNELS:
        pytest.skip("no stack")
    if law is laws.other_leaves_do_not_matter and name.startswith(JOINT):
        pytest.skip("joins leaves on purpose")
    law(cases.TRANSFORMS[name](), spec)


@pytest.mark.parametrize("name", cases.TRANSFORMS)
def test_state_survives_a_file(name) -> None:
    laws.state_survives_a_file(cases.TRANSFORMS[name](), laws.KERNELS)


BROKEN = {
    "apply is row by row": lambda state, grads: {n: g - g.mean(0) for n, g in grads.items()},
    "announced spec is produced": lambda state, grads: {n: g.flatten(1) for n, g in grads.items()},
    "other leaves do not matter": fa.unit_norm().apply,
}


@pytest.mark.parametrize("law", BROKEN)
def test_a_transform_that_breaks_a_law_is_named(law) -> None:
    with pytest.raises(AssertionError, match=f"breaks the law '{law}' on matrix"):
        laws.check_transform(fa.Transform("broken", apply=BROKEN[law]))


@dataclass(frozen=True)
class Adjointless(lift.GradientMap):
    """Squares that claim to be linear."""

    def from_gradient(self, gradient: torch.Tensor) -> torch.Tensor:
        return gradient.square()

    def adjoint(self, theta: torch.Tensor) -> torch.Tensor:
        return theta


@dataclass(frozen=True)
class Longer(lift.GradientMap):
    """Of factors, and of the gradient, by different numbers."""

    def from_gradient(self, gradient: torch.Tensor) -> torch.Tensor:
        return 1.001 * gradient

    def from_factors(self, rows, cols) -> torch.Tensor:
        return outer(rows, cols)

    def adjoint(self, theta: torch.Tensor) -> torch.Tensor:
        return 1.001 * theta


@pytest.mark.parametrize("gradient_map", [Adjointless(), Longer()], ids=["adjoint", "factors"])
def test_a_map_that_does_not_agree_is_named(gradient_map) -> None:
    broken = fa.Transform("broken", maps=lambda state, spec: {n: lift.readout(n, gradient_map) for n in spec})
    with pytest.raises(AssertionError, match="breaks the law 'maps agree' on matrix"):
        laws.check_transform(broken)


@pytest.mark.parametrize("settings", [{"scale": torch.ones(2)}, {1: "one"}], ids=["tensor", "number as a name"])
def test_settings_that_no_manifest_can_keep_are_named(settings) -> None:
    with pytest.raises(AssertionError, match="breaks the law 'settings are plain'"):
        laws.check_transform(fa.project(4)._replace(settings=settings))


def chains():
    names = ["project", "project_normal", "adafactor_norm", "unit_norm", "select", "cast_float16"]
    yield from ((name,) for name in names)
    yield from itertools.permutations(["project", "adafactor_norm", "unit_norm"], 3)
    yield from itertools.permutations(["project", "adafactor_norm", "select"], 3)
    yield ("adafactor_norm", "project", "project_normal", "unit_norm", "cast_float16")


@pytest.mark.parametrize(("names", "modules"), crossed(chains(), [None, "all"]))
def test_a_lowered_chain_is_the_plain_chain(names, modules) -> None:
    loss, params = fa.causal_lm_loss(cases.causal("llama_tied"), modules=modules)
    batches = [cases.batch((9, 5)), cases.batch((12, 2), seed=2)]
    chain = fa.compose(fa.per_example_grad, *(cases.TRANSFORMS[name]() for name in names))
    state = chain.fit(loss, params, batches)
    lowered = chain(loss, params, batches[0], state)
    tolerance = 2e-3 if any("cast" in name for name in names) else 2e-5
    laws.close(lowered, chain.plain(loss, params, batches[0], state), tolerance)
    spec = chain.init(fa.per_example_grad.spec(params))[1]
    assert {n: fa.Leaf(tuple(g.shape[1:]), g.dtype) for n, g in lowered.items()} == spec


MODELS = ["llama_tied", "gpt2", "mamba"]
BEFORE = [(), ("project",), ("select",), ("unit_norm",)]


@pytest.mark.parametrize(("model", "before", "modules"), crossed(MODELS, BEFORE, [None, "all"]))
def test_statistics_read_in_backward_are_those_of_whole_gradients(model, before, modules) -> None:
    loss, params = fa.causal_lm_loss(cases.causal(model), modules=modules)
    if model == "mamba" and modules == "all":
        params = {name: p for name, p in params.items() if p.ndim < 3}
    batches = [cases.batch((9, 5)), cases.batch((12, 2), seed=2)]
    chain = fa.compose(fa.per_example_grad, *(cases.TRANSFORMS[n]() for n in before), fa.adafactor_norm)
    if model == "mamba" and modules == "all":  # its frozen rest must still reach the loss
        loss, params = fa.causal_lm_loss(cases.causal(model), modules=list(params))
    state = chain.fit(loss, params, batches)
    prefix = fa.compose(fa.per_example_grad, *chain.stages[:-1])
    rows = [prefix.plain(loss, params, batch, state[:-1]) for batch in batches]
    for name in rows[0]:
        squares = torch.cat([row[name] for row in rows]).double().square()
        r_c = [squares.mean(0)] if squares.ndim == 2 else [squares.mean(2).mean(0), squares.mean(1).mean(0)]
        expected = torch.cat(r_c)
        torch.testing.assert_close(state[-1]["sums"][name], expected, rtol=1e-4, atol=1e-6 * float(expected.max()))


def test_adafactor_formula() -> None:
    values = laws.grads(10, laws.VECTORS)
    stage = fa.adafactor_norm()
    ours = stage(laws.fitted(stage, [values], laws.VECTORS), values)
    for name, g in values.items():
        g = g.double()
        if g.ndim == 2:
            expected = g / g.square().mean(0).sqrt()
        else:
            r, c = g.square().mean((0, 2)), g.square().mean((0, 1))
            expected = g * (r.mean() / torch.outer(r, c)).sqrt()
        torch.testing.assert_close(ours[name].double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["rademacher", "normal"])
def test_projection_keeps_inner_products_on_average(kind) -> None:
    a, b = laws.grads(1, laws.VECTORS, 1), laws.grads(1, laws.VECTORS, 2)
    b = {n: a[n] + 0.3 * b[n] for n in a}
    products = {name: [] for name in a}
    for seed in range(400):
        stage = fa.project(4, kind=kind, seed=seed)
        state, _ = stage.init(laws.VECTORS)
        pa, pb = stage(state, a), stage(state, b)
        for name in a:
            products[name].append(float((pa[name] * pb[name]).sum()))
    for name, values in products.items():
        values = torch.tensor(values)
        exact = float((a[name] * b[name]).sum())
        assert abs(float(values.mean()) - exact) < 4 * float(values.std()) / 400**0.5 + 1e-4


def test_composition_is_associative_and_flattens() -> None:
    a, b, c = fa.project(4), fa.adafactor_norm(), fa.unit_norm()
    left = fa.compose(fa.compose(fa.per_example_grad, a), fa.compose(b, c))
    right = fa.compose(fa.per_example_grad, fa.compose(a, fa.compose(b, c)))
    assert left == right == fa.compose(fa.per_example_grad, a, b, c)


def test_a_second_use_makes_the_same_draw() -> None:
    first, second = (fa.project(3, seed=7).init(laws.MATRICES)[0] for _ in range(2))
    torch.manual_seed(123)
    for a, b in zip(state_tree.flatten(first).values(), state_tree.flatten(second).values(), strict=True):
        assert torch.equal(a, b)
    other = state_tree.flatten(fa.project(3, seed=8).init(laws.MATRICES)[0])
    assert not all(torch.equal(a, other[n]) for n, a in state_tree.flatten(first).items())


def test_one_pass_per_fitted_stage() -> None:
    loss, params = fa.causal_lm_loss(cases.causal("gpt_neox"))

    class Counted(list):
        passes = 0

        def __iter__(self):
            Counted.passes += 1
            return super().__iter__()

    batches = Counted([cases.batch()])
    fa.compose(fa.per_example_grad, fa.adafactor_norm, fa.project(3), fa.adafactor_norm).fit(loss, params, batches)
    assert Counted.passes == 2


REFUSED = {
    "a source in second place": (lambda: fa.compose(fa.unit_norm, fa.per_example_grad), "must be the first stage"),
    "no stage": (lambda: fa.compose(fa.per_example_grad, 3), "stage 2, found int"),
    "k": (lambda: fa.project(0), "at least 1"),
    "kind": (lambda: fa.project(3, kind="sparse"), "found 'sparse'"),
    "dtype": (lambda: fa.cast("int3"), "float16, bfloat16, float32"),
    "select nothing": (lambda: chain_on(fa.select("nothing")), r"stage 1 \(select\) selects none"),
    "no batches": (lambda: fit_on([]), "no example has a finite loss"),
    "one-shot": (lambda: fit_on(iter([cases.batch()])), "one-shot iterator"),
    "unfitted": (lambda: chain_on(fa.adafactor_norm()), "adafactor_norm must be fitted"),
    "moments missing": (lambda: chain_on(fa.adafactor_norm({})), "has no moments for"),
    "a scalar": (lambda: fa.compose(fa.adafactor_norm()).init({"w": fa.Leaf((), torch.float32)}), "w is a scalar"),
    "no stack": (lambda: chain_on(fa.split_experts()), "stack of experts"),
}


def chain_on(stage):
    loss, params = fa.causal_lm_loss(cases.causal("gpt_neox"))
    return fa.compose(fa.per_example_grad, stage)(loss, params, cases.batch())


def fit_on(batches):
    loss, params = fa.causal_lm_loss(cases.causal("gpt_neox"))
    return fa.compose(fa.per_example_grad, fa.adafactor_norm, fa.adafactor_norm).fit(loss, params, batches)


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case) -> None:
    action, message = REFUSED[case]
    with pytest.raises(ChainError, match=message):
        action()


def test_the_snippet_of_the_design_runs_as_written() -> None:
    model, batches = cases.causal("gpt_neox"), [cases.batch()]
    batch = batches[0]

    attribute = fa.compose(fa.per_example_grad, fa.project(16), fa.adafactor_norm)

    loss, params = fa.causal_lm_loss(model)  # loss(params, example) -> scalar; params: dict[str, Tensor]
    state = attribute.fit(loss, params, batches)  # explicit, picklable, saved as safetensors
    grads = attribute(loss, params, batch, state)  # dict[str, Tensor], each (B, p, q)

    assert grads.keys() == params.keys()
    assert all(
        g.shape == (4, min(16, p.shape[0]), min(16, p.shape[1]))
        for g, p in zip(grads.values(), params.values(), strict=True)
    )


@pytest.mark.parametrize(
    "name", ["whole", "project", "unit_norm", "clip", "cast", "adam_norm", "sketch", "precondition"]
)
def test_a_scalar_parameter_is_a_leaf_like_any_other(name):
    made = {
        "whole": [],
        "project": [fa.project(2)],
        "unit_norm": [fa.unit_norm()],
        "clip": [fa.clip(0.1)],
        "cast": [fa.cast("int8")],
        "adam_norm": [fa.adam_norm({"w": torch.ones(2, 3), "t": torch.ones(())})],
        "sketch": [fa.sketch(8)],
        "precondition": [fa.precondition(gram={"w": torch.eye(6), "t": torch.eye(1)}, damping=0.0)],
    }
    scalar, vector = {"w": torch.ones(2, 3), "t": torch.tensor(0.7)}, {"w": torch.ones(2, 3), "t": torch.tensor([0.7])}
    batch = {"x": torch.arange(12.0).view(2, 2, 3) / 10}

    def loss(params, example):
        return (params["w"] * example["x"]).sum() * params["t"].sum() ** 2

    chain = fa.compose(fa.per_example_grad, *made[name])
    other = fa.compose(fa.per_example_grad, *(made[name] if name != "adam_norm" else [_adam_of_a_vector()]))
    ours, theirs = (
        each.bind(loss, params, each.init(fa.per_example_grad.spec(params))[0])(batch).grads
        for each, params in ((chain, scalar), (other, vector))
    )
    for leaf, grad in ours.items():
        torch.testing.assert_close(grad.reshape(theirs[leaf].shape), theirs[leaf])
    if "t" in ours:
        assert ours["t"].shape == (2,)


def _adam_of_a_vector():
    return fa.adam_norm({"w": torch.ones(2, 3), "t": torch.ones(1)})
