"""Maps of a stage read in the backward pass: linear ones, statistics, and what stands between them and the rest."""

from collections.abc import Mapping
from functools import partial

import pytest
import torch

import funcattrib as fa
from funcattrib import testing as laws
from funcattrib.chain.lowering import lower, nonlinear
from funcattrib.lift import InnerProducts, Measured, Readout, Readouts, TwoSided, readout
from funcattrib.lift.maps.elementwise import Elementwise
from tests.support import cases


def squared_norm(shape: tuple[int, ...]) -> InnerProducts:
    return InnerProducts(torch.zeros(0, *shape), norm=True)


def in_one_probe(state: None, spec: fa.Spec) -> Readouts:
    """The squared norm of all leaves together: each weight's adds up in one probe."""
    return {name: Readout(squared_norm(leaf.shape), "norm", ("norm",)) for name, leaf in spec.items()}


def of_some(state: None, spec: fa.Spec) -> Readouts:
    """Of every second leaf; the others are dropped."""
    return {name: readout(name, squared_norm(spec[name].shape)) for name in list(spec)[::2]}


def signs(state: None, spec: fa.Spec) -> Readouts:
    return {name: readout(name, Elementwise(torch.sign)) for name in spec}


def roots(state: None, grads: Mapping[str, torch.Tensor]) -> fa.Grads:
    return {name: value.sqrt() for name, value in grads.items()}


STATISTICS = {
    "in one probe": fa.Transform("norm", maps=in_one_probe),
    "in one probe, then roots": fa.Transform("norm", maps=in_one_probe, apply=roots),
    "of some": fa.Transform("norms", maps=of_some, apply=roots),
    "measured": fa.Transform(
        "mean",
        maps=lambda state, spec: {n: readout(n, Measured(TwoSided(), lambda g: g.flatten(1).square())) for n in spec},
    ),
    "signs": fa.Transform("signs", maps=signs),
}
BEFORE = {
    "nothing": [],
    "project": [fa.project(3)],
    "heads": [fa.select(["*layers*weight"]), fa.split_heads({"*q_proj": fa.AttentionConfig(4, 6)}), fa.project(3)],
    "sketch": [fa.sketch(16)],
    "unit_norm": [fa.unit_norm],
}


@pytest.mark.parametrize("before", BEFORE)
@pytest.mark.parametrize("name", STATISTICS)
def test_a_statistic_is_that_of_whole_gradients(name, before) -> None:
    """Of weights that are used once, read inside; of the embedding, which is the head too, of its gradient."""
    loss, params = fa.causal_lm_loss(cases.causal("llama_tied"), modules="all")
    if name == "signs":  # of a gradient that is rounding alone, it is chance
        params = {n: p for n, p in params.items() if "layers.0" in n}
        loss, params = fa.causal_lm_loss(cases.causal("llama_tied"), modules=list(params))
    chain = fa.compose(fa.per_example_grad, *BEFORE[before], STATISTICS[name])
    rows, plain = chain(loss, params, cases.batch()), chain.plain(loss, params, cases.batch())
    if name == "signs":
        assert all(float((rows[n] == plain[n]).double().mean()) > 0.99 for n in plain)
    else:
        laws.close(rows, plain, 1e-4)
    announced = fa.compose(*BEFORE[before]).init(fa.per_example_grad.spec(params))[1]
    expected = {"in one probe": ["norm"], "in one probe, then roots": ["norm"], "of some": list(announced)[::2]}
    assert list(rows) == expected.get(name, list(announced))


@pytest.mark.parametrize("model", ["llama_tied", "mixtral"])
def test_linear_maps_before_a_function_are_two_stages_in_one(model) -> None:
    """Bit for bit, also where a weight is used twice: what is linear is always read inside."""
    loss, params = fa.causal_lm_loss(cases.causal(model), modules="all")
    one = fa.compose(fa.per_example_grad, fa.project(4)._replace(apply=fa.unit_norm().apply), fa.cast)
    two = fa.compose(fa.per_example_grad, fa.project(4), fa.unit_norm, fa.cast)
    state = two.init(fa.per_example_grad.spec(params))[0]
    laws.same(one(loss, params, cases.batch(), state[::2]), two(loss, params, cases.batch(), state))


@pytest.mark.parametrize(
    ("stages", "depth"),
    [
        ([fa.project(4), fa.unit_norm()], 1),
        ([fa.project(4), fa.select(["*"]), fa.sketch(8)], 3),
        ([fa.sketch(8), fa.project(4)], 1),  # of a sum over leaves, a map leaf by leaf is none of one leaf
        ([fa.self_influence()], 0),
        ([fa.project(4)._replace(apply=fa.unit_norm().apply)], 0),
        ([fa.project(4), fa.precondition(), fa.precondition(groups="all")], 2),
    ],
)
def test_the_linear_prefix(stages, depth) -> None:
    state = fa.compose(*stages).init(laws.MATRICES)[0]
    assert lower(stages, laws.MATRICES, state)[1] == depth


def test_stages_that_are_not_linear_are_named() -> None:
    stages = [fa.project(4), fa.precondition(groups="all"), fa.unit_norm(), fa.sketch(8), fa.self_influence()]
    assert nonlinear(stages, laws.MATRICES) == ["precondition", "unit_norm", "self_influence"]


def test_a_map_knows_whether_it_is_linear() -> None:
    mean = partial(torch.mean, dim=0, keepdim=True)
    square, norm, products = Measured(TwoSided(), mean), squared_norm((3, 2)), InnerProducts(torch.ones(1, 3, 2))
    assert [one.linear for one in (TwoSided(), square, norm, products)] == [True, False, False, True]
    assert [one.linear for one in (norm @ products, products @ products, products @ square)] == [False, True, False]


def test_a_scalar_is_kept_as_it_is() -> None:
    def loss(params: fa.Grads, example: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return params["scale"] * (params["w"] @ example["x"]).sum()

    params = {"w": torch.ones(2, 3), "scale": torch.tensor(2.0)}
    batch = {"x": torch.arange(6.0).reshape(2, 3)}
    for stages in ([fa.select(["scale"])], [fa.cast("float32"), fa.select(["scale"])]):
        chain = fa.compose(fa.per_example_grad, *stages)
        laws.close(chain(loss, params, batch), chain.plain(loss, params, batch), 1e-6)
        assert chain(loss, params, batch)["scale"].shape == (2,)
