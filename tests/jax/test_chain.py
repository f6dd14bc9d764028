"""Chains as functions on JAX arrays, states across, and optax's second moments."""

import pytest
import torch

pytest.importorskip("jax", reason="jax is not installed; it comes with the dev extra")
pytest.importorskip("flax", reason="flax is not installed; it comes with the dev extra")
pytest.importorskip("equinox", reason="equinox is not installed; it comes with the dev extra")
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import funcattrib as fa
from funcattrib import testing as laws
from funcattrib.chain import state_tree
from funcattrib.errors import ChainError, FuncattribError
from funcattrib.jax import as_jax, optimizer_state, per_example_grad, state_to_jax, state_to_torch
from funcattrib.jax.dlpack import to_jax, to_torch
from funcattrib.jax.pytrees import take_apart
from tests.support import cases
from tests.support import jax_nets as nets
from tests.support.sweeps import crossed

VECTORS = {name: leaf._replace(dtype=torch.float32) for name, leaf in laws.VECTORS.items()}  # JAX's widest, as it comes
GRADS = {name: to_jax(grad) for name, grad in laws.grads(6, VECTORS).items()}


def as_torch(found) -> dict[str, torch.Tensor]:
    return {name: to_torch(array) for name, array in found.items()}


def fitted(name: str):
    chain = fa.compose(cases.TRANSFORMS[name]())
    return chain, (laws.fitted(chain.stages[0], [laws.grads(6, VECTORS)], VECTORS),)


NAMES = [name for name in cases.TRANSFORMS if name != "split_experts"]  # which has nothing to split here


@pytest.mark.parametrize(("name", "callback"), crossed(NAMES, [False, True]))
def test_every_transform_on_jax_arrays_is_the_same_on_tensors(name, callback) -> None:
    chain, state = fitted(name)
    expected = chain.apply(state, laws.grads(6, VECTORS))
    function = as_jax(chain, state, callback=callback)
    found = as_torch((jax.jit(function) if callback else function)(GRADS))
    same(found, expected)


def same(found, expected) -> None:
    """But for the order, and for what it does to the rounding of a sum over leaves: JAX sorts a dict by its keys."""
    assert set(found) == set(expected)
    for leaf, value in expected.items():
        assert found[leaf].dtype == value.dtype
        tolerance = {torch.int8: 1, torch.bfloat16: 0, torch.float16: 0}.get(value.dtype, 2e-6 * value.abs().max())
        torch.testing.assert_close(found[leaf], value, rtol=0, atol=float(tolerance))


def test_in_a_training_loop_gradients_of_a_flax_model_are_transformed_inside_jit() -> None:
    loss, params = nets.flax()
    batch = nets.batch()
    chain = fa.compose(per_example_grad, fa.adafactor_norm, fa.project(3))
    state = chain.fit(loss, params, [batch])
    transform = as_jax(chain, state, callback=True)

    @jax.jit
    def step(params, batch):
        grads = jax.vmap(jax.grad(loss), (None, 0))(params, batch)
        mean = jax.tree.map(lambda grad: grad.mean(0), grads)
        return jax.tree.map(lambda leaf, grad: leaf - 0.1 * grad, params, mean), transform(grads)

    _, rows = step(params, batch)
    expected = chain(loss, params, batch, state)
    assert set(rows) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(to_torch(rows[name]), value, rtol=1e-5, atol=1e-5 * float(value.abs().max()))
    outside = as_jax(chain, state)(jax.vmap(jax.grad(loss), (None, 0))(params, batch))
    assert list(outside) == list(expected)


def test_bfloat16_goes_in_and_out_of_a_callback() -> None:
    grads = {"w": jnp.ones((2, 3), jnp.bfloat16)}
    for callback in (False, True):
        found = as_jax(fa.compose(fa.unit_norm), callback=callback)(grads)["w"]
        assert found.dtype == jnp.bfloat16
        assert jnp.allclose(found.astype(jnp.float32), 3**-0.5, atol=5e-3)


def test_under_vmap_a_callback_is_called_for_each() -> None:
    function = as_jax(fa.compose(fa.unit_norm), callback=True)
    many = jax.random.normal(jax.random.key(0), (3, 2, 4))
    found = jax.vmap(lambda grads: function({"w": grads}))(many)["w"]
    assert jnp.allclose(found, many / jnp.linalg.norm(many, axis=2, keepdims=True), atol=1e-6)


# States


@pytest.mark.parametrize("name", ["project", "adafactor_norm", "precondition", "adam_norm", "inner_products", "select"])
def test_states_cross_both_ways_bit_for_bit(name) -> None:
    chain, state = fitted(name)
    crossed = state_to_jax(state)
    before, after = state_tree.flatten(state), state_tree.flatten(state_to_torch(crossed))
    assert list(after) == list(before)
    assert all(torch.equal(after[n], before[n]) and after[n].dtype == before[n].dtype for n in before)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(crossed))
    found = as_jax(chain, crossed)(GRADS)
    same(as_torch(found), chain.apply(state, laws.grads(6, VECTORS)))


def test_a_state_computed_in_jax_serves_a_chain_of_torch() -> None:
    params, batch = nets.plain(nets.flax()[1]), nets.batch()
    grads = jax.vmap(jax.grad(nets.dense), (None, 0))(params, batch)
    v = jax.tree.map(lambda grad: jnp.square(grad).mean(0), grads)
    named = {name: to_torch(leaf) for name, leaf in take_apart(v).arrays.items()}
    chain = fa.compose(per_example_grad, fa.adam_norm(named))
    fitted_here = fa.compose(per_example_grad, fa.adam_norm)
    own = fitted_here.fit(nets.dense, params, [batch])
    expected = fitted_here(nets.dense, params, batch, own)
    for name, value in chain(nets.dense, params, batch).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5)


# Errors


def test_another_structure_in_a_later_call() -> None:
    function = as_jax(fa.compose(fa.unit_norm))
    function({"w": jnp.ones((2, 3))})
    function({"w": jnp.ones((5, 3))})  # more examples are no other structure
    for grads, found in (
        (
            {"w": jnp.ones((2, 3)), "v": jnp.ones((2, 1))},
            r"v as nothing, as in the first call, found float32 of shape \(1,\)",
        ),
        (
            {"w": jnp.ones((2, 4))},
            r"w as float32 of shape \(3,\), as in the first call, found float32 of shape \(4,\)",
        ),
        ({"w": jnp.ones((2, 3), jnp.float16)}, r"w as float32 of shape \(3,\), as in the first call, found float16"),
        ({"u": jnp.ones((2, 3))}, "u as nothing, as in the first call, found"),
    ):
        with pytest.raises(FuncattribError, match=f"expected {found}"):
            function(grads)


@pytest.mark.parametrize(
    ("grads", "message"),
    [
        ({"w": 1.0}, "expected arrays in the gradients, found a float at w"),
        ({"w": jnp.ones((2, 3), jnp.int32)}, "floating-point arrays in the gradients, found int32 at w"),
        ({"w": jnp.ones(())}, "found w without an axis of examples"),
        ({}, "there are no arrays in the gradients"),
    ],
)
@pytest.mark.parametrize("callback", [False, True])
def test_gradients_that_are_none(grads, message, callback) -> None:
    with pytest.raises(FuncattribError, match=message):
        as_jax(fa.compose(fa.unit_norm), callback=callback)(grads)


def test_inside_jit_without_a_callback() -> None:
    with pytest.raises(FuncattribError, match="or use as_jax with callback=True"):
        jax.jit(as_jax(fa.compose(fa.unit_norm)))({"w": jnp.ones((2, 3))})


def test_a_state_of_other_parameters_or_none() -> None:
    chain, state = fitted("adafactor_norm")
    with pytest.raises(ChainError, match="it was fitted for another chain"):
        as_jax(chain, state)({"w": jnp.ones((2, 3))})
    with pytest.raises(ChainError, match="adafactor_norm must be fitted"):
        as_jax(chain)(GRADS)


# Optax


def drawn(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def steps(transformation, params, count: int = 3):
    """The state after steps on seeded gradients."""
    state, update = transformation.init(params), jax.jit(transformation.update)
    for seed in range(count):
        grads = {name: jnp.asarray(drawn(seed, leaf.shape)) for name, leaf in params.items()}
        _, state = update(grads, state, params)
    return state


SHAPES = {"wide": (3, 5), "tall": (5, 3), "square": (4, 4), "vector": (6,), "kernel": (2, 3, 4)}


def test_adams_second_moments_are_corrected_for_their_bias() -> None:
    params = {name: jnp.zeros(shape) for name, shape in SHAPES.items()}
    chained = optax.chain(optax.clip_by_global_norm(1e9), optax.adamw(1e-3, b2=0.9))
    masked = optax.masked(optax.adam(1e-3, b2=0.9), {name: name != "vector" for name in params})
    expected = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    for seed in range(3):
        for name, shape in SHAPES.items():
            grad = torch.from_numpy(drawn(seed, shape))
            expected[name] = 0.9 * expected[name] + 0.1 * grad.square()
    for transformation, names in ((chained, set(SHAPES)), (masked, set(SHAPES) - {"vector"})):
        found = optimizer_state(steps(transformation, params), params, b2=0.9)
        assert set(found) == names
        for name in names:
            torch.testing.assert_close(found[name], expected[name] / (1 - 0.9**3), rtol=1e-5, atol=1e-7)


def test_adafactors_factors_are_the_means_over_columns_and_rows() -> None:
    """Of one step, whose decay is 0: r and c are those of the gradient's own squares."""
    params = {name: jnp.zeros(shape) for name, shape in SHAPES.items()}
    transformation = optax.adafactor(1e-3, min_dim_size_to_factor=2, multiply_by_parameter_scale=False)
    found = optimizer_state(steps(transformation, params, 1), params)
    assert list(found) == sorted(SHAPES)
    for name, shape in SHAPES.items():
        squares = torch.from_numpy(drawn(0, shape)).square()
        if name == "kernel":  # its two longest axes are factored: v is their outer product
            r, c = squares.mean(2), squares.mean(1)
            expected = (r / r.mean(1, keepdim=True))[:, :, None] * c[:, None, :]
            torch.testing.assert_close(found[name], expected, rtol=1e-5, atol=1e-7)
        elif name == "vector":
            torch.testing.assert_close(found[name], squares)
        else:
            for side, mean in zip(found[name], (squares.mean(1), squares.mean(0)), strict=True):
                torch.testing.assert_close(side, mean, rtol=1e-5, atol=1e-7)
    stage = fa.adafactor_norm(found)
    rows = stage(
        stage.init({n: fa.Leaf(s, torch.float32) for n, s in SHAPES.items()})[0],
        {n: torch.ones(2, *s) for n, s in SHAPES.items()},
    )
    assert {name: tuple(row.shape[1:]) for name, row in rows.items()} == SHAPES


def test_small_matrices_are_not_factored_by_default() -> None:
    params = {"w": jnp.zeros((3, 5))}
    assert optimizer_state(steps(optax.adafactor(1e-3), params), params)["w"].shape == (3, 5)


def test_moments_of_a_flax_optimizer_normalise_the_gradients_of_its_model() -> None:
    model = nets.Net()
    optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)
    batch = nets.batch()
    grad = nnx.grad(lambda model: jnp.square(model(batch["x"]) - batch["y"]).sum())(model)
    optimizer.update(model, grad)
    graph, params = nnx.split(model, nnx.Param)

    def loss(params, example):
        return jnp.square(nnx.merge(graph, params)(example["x"]) - example["y"]).sum()

    moments = optimizer_state(optimizer.opt_state, params)
    for name, value in take_apart(nnx.state(grad, nnx.Param)).arrays.items():
        torch.testing.assert_close(moments[name], to_torch(value).square(), rtol=1e-4, atol=1e-12)
    chain = fa.compose(per_example_grad, fa.adam_norm(moments), fa.project(3))
    found, plain = chain(loss, params, batch), chain.plain(loss, params, batch)
    for name in found:
        torch.testing.assert_close(found[name], plain[name], rtol=1e-4, atol=1e-4)


def test_optimizers_without_moments() -> None:
    params = {"w": jnp.zeros((3, 5))}
    with pytest.raises(
        FuncattribError, match="the optimizer's state has no second moments; supported are optax's Adam and Adafactor"
    ):
        optimizer_state(steps(optax.sgd(1e-3), params), params)
    with pytest.raises(FuncattribError, match="has made no step"):
        optimizer_state(optax.adam(1e-3).init(params), params)
    for transformation in (optax.adam(1e-3), optax.adafactor(1e-3, min_dim_size_to_factor=2)):
        with pytest.raises(
            FuncattribError, match=r"has shape \(3, 5\), and the parameter has|expected moments of w for shape"
        ):
            optimizer_state(steps(transformation, params), {"w": jnp.zeros((7, 5)), "v": jnp.zeros(2)})
        with pytest.raises(FuncattribError, match="w"):
            optimizer_state(steps(transformation, params), {"other": jnp.zeros((3, 5))})
