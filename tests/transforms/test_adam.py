"""``adam_norm`` against its formula, fitted in the backward pass and given."""

import copy
import json

import pytest
import torch

import funcattrib as fa
from funcattrib import testing as laws
from funcattrib.chain.fitting import bind_observed
from funcattrib.chain.lowering import lower
from funcattrib.errors import ChainError
from funcattrib.lift import Scale
from tests.support import cases


def test_formula() -> None:
    values = laws.grads(10, laws.VECTORS)
    stage = fa.adam_norm(eps=1e-3)
    ours = stage(laws.fitted(stage, [values], laws.VECTORS), values)
    for name, g in values.items():
        g = g.double()
        expected = g / (g.square().mean(0).sqrt() + 1e-3)
        torch.testing.assert_close(ours[name].double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("modules", [None, "all"])
@pytest.mark.parametrize("name", ["llama_tied", "gpt2", "gpt_neox"])
def test_fitted_moments_are_those_of_whole_gradients(name, modules) -> None:
    """Also of an embedding that is its own head, used twice: the square of the sum, not the sum of squares."""
    loss, params = fa.causal_lm_loss(cases.causal(name), modules=modules)
    batches = [cases.batch((9, 5)), cases.batch((12, 2, 7), seed=2)]
    state = fa.compose(fa.per_example_grad, fa.adam_norm).fit(loss, params, batches)
    rows = [fa.per_example_grad(loss, params, batch) for batch in batches]
    for parameter in params:
        expected = torch.cat([row[parameter] for row in rows]).double().square().mean(0)
        ours = state[0]["sums"][parameter]
        assert ours.dtype == torch.float64
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6 * float(expected.max()))


def test_the_squares_of_a_batch_take_one_weight_s_memory() -> None:
    loss, params = fa.causal_lm_loss(cases.causal("gpt2"))
    read = bind_observed(fa.per_example_grad, [fa.adam_norm()], loss, params, ())
    for name, squares in read(cases.batch()).grads.items():
        assert squares.shape == (4, *params[name].shape)
        assert squares.untyped_storage().nbytes() == 4 * params[name].numel()


@pytest.mark.parametrize(
    "behind", [[], [fa.project(4)], [fa.project(4), fa.adam_norm], [fa.adafactor_norm, fa.project(4)]]
)
def test_lowered_is_plain(behind) -> None:
    loss, params = fa.causal_lm_loss(cases.causal("llama_tied"), modules="all")
    chain = fa.compose(fa.per_example_grad, fa.adam_norm, *behind)
    state = chain.fit(loss, params, [cases.batch()])
    assert lower(chain.stages, fa.per_example_grad.spec(params), state)[1] == len(chain.stages)
    laws.close(chain(loss, params, cases.batch(), state), chain.plain(loss, params, cases.batch(), state), 5e-5)


def test_half_precision_gradients_are_squared_in_float32() -> None:
    stage, tiny = fa.adam_norm(), {"w": torch.full((3, 2, 2), 1e-5, dtype=torch.float16)}
    state = laws.fitted(stage, [tiny], {"w": fa.Leaf((2, 2), torch.float16)})
    assert (state["sums"]["w"] > 0).all()


def test_an_entry_without_gradient_stays_zero() -> None:
    stage = fa.adam_norm({"w": torch.tensor([[4.0, 0.0]])}, eps=0)
    ours = stage(stage.init({"w": fa.Leaf((1, 2), torch.float32)})[0], {"w": torch.ones(1, 1, 2)})
    assert ours["w"].tolist() == [[[0.5, 0.0]]]


SPEC = {"w": fa.Leaf((3, 4), torch.float32), "b": fa.Leaf((3,), torch.float32)}


def test_moments_of_one_form_serve_for_the_other() -> None:
    v, b = torch.rand(3, 4, dtype=torch.float64) + 0.1, torch.rand(3) + 0.1
    factors = {"w": (v.mean(1), v.mean(0)), "b": b}
    values = laws.grads(5, SPEC)
    from_v, from_factors = fa.adafactor_norm({"w": v, "b": b}), fa.adafactor_norm(factors)
    laws.close(from_v(from_v.init(SPEC)[0], values), from_factors(from_factors.init(SPEC)[0], values))
    whole = torch.outer(v.mean(1), v.mean(0)) / v.mean()
    adam, expected = fa.adam_norm(factors), fa.adam_norm({"w": whole, "b": b})
    laws.close(adam(adam.init(SPEC)[0], values), expected(expected.init(SPEC)[0], values))
    # Adafactor's own division is by the root of that reconstruction.
    laws.close(from_v(from_v.init(SPEC)[0], values), adam(adam.init(SPEC)[0], values), 1e-4)


@pytest.mark.parametrize("normalise", [fa.adam_norm, fa.adafactor_norm])
def test_given_moments_need_no_pass_and_are_not_settings(normalise) -> None:
    stage = normalise({"w": torch.ones(3, 4), "b": torch.ones(3)})
    assert not stage.fitted
    described = json.loads(json.dumps(fa.compose(stage).describe()))
    assert described == fa.compose(normalise).describe()
    for moments, message in [
        ({"w": torch.ones(3, 4)}, "has no moments for b"),
        ({"w": torch.ones(4, 3), "b": torch.ones(3)}, r"expected moments of w of shape \(3, 4\), found \(4, 3\)"),
        ({"w": (torch.ones(3), torch.ones(3)), "b": torch.ones(3)}, r"of shape \(3, 4\), found \(3, 3\)"),
    ]:
        with pytest.raises(ChainError, match=message):
            fa.compose(normalise(moments)).init(SPEC)


def test_a_matrix_is_scaled_entry_by_entry_and_a_vector_by_its_side() -> None:
    stage = fa.adam_norm({"w": torch.ones(3, 4), "b": torch.ones(3)})
    maps = stage.maps(stage.init(SPEC)[0], SPEC)
    assert isinstance(maps["w"].map, Scale)
    assert not isinstance(maps["b"].map, Scale)


@pytest.mark.parametrize("before", ["nothing", "heads"])
@pytest.mark.parametrize("normalizer", [fa.adafactor_norm, fa.adam_norm])
def test_squares_of_small_float16_gradients_do_not_vanish(normalizer, before) -> None:
    model = copy.deepcopy(cases.causal("llama")).half()
    whole, params = fa.causal_lm_loss(model)
    stages = [fa.split_heads(fa.attention_configs(model))] if before == "heads" else []

    def loss(params, example):
        return whole(params, example) * 2**-11

    batch = cases.batch()
    state = fa.compose(fa.per_example_grad, *stages, normalizer()).fit(loss, params, [batch])
    prefix = fa.compose(fa.per_example_grad, *stages)
    grads = prefix.plain(loss, params, batch)
    assert {grad.dtype for grad in grads.values()} == {torch.float16}
    there = torch.cat([grad.flatten() for grad in grads.values()])
    assert int((there.square() > 0).sum()) < int((there != 0).sum()) / 2
    for name, grad in grads.items():
        v = grad.double().square()
        expected = v.mean(0) if normalizer is fa.adam_norm else torch.cat([v.mean((0, 2)), v.mean((0, 1))])
        torch.testing.assert_close(state[-1]["sums"][name], expected, rtol=5e-2, atol=1e-2 * float(expected.max()))
        assert (expected > 0).any()
