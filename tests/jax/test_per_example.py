"""Per-example gradients of JAX losses, as the source of a chain."""

import ast
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from tests.support import processes
from tests.support.waiting import OUTER_LIMIT

pytest.importorskip("jax", reason="jax is not installed; it comes with the dev extra")
pytest.importorskip("flax", reason="flax is not installed; it comes with the dev extra")
pytest.importorskip("equinox", reason="equinox is not installed; it comes with the dev extra")
import equinox as eqx
import flax.linen as linen
import jax
import jax.numpy as jnp
from flax import nnx

import funcattrib as fa
from funcattrib.chain.lowering import lower
from funcattrib.errors import ChainError, FuncattribError
from funcattrib.jax import chunked, lifted_dense, per_example, per_example_grad
from funcattrib.jax.dlpack import to_jax, to_torch
from funcattrib.jax.pytrees import take_apart, tensors_of
from funcattrib.runs.error_hints import explained
from funcattrib.types import Grads
from tests.support import jax_nets as nets

ROOT = Path(__file__).resolve().parents[2]


def close(found: Grads, expected: Grads, tolerance: float = 1e-5) -> None:
    assert list(found) == list(expected)
    for name in found:
        scale = float(expected[name].abs().max())
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=tolerance * scale)


def one_by_one(loss, params, batch) -> Grads:
    """A loop of ``jax.grad``, without vmap."""
    grad = jax.jit(jax.grad(loss))
    found = [take_apart(grad(params, example)).arrays for example in rows(batch)]
    return {name: torch.stack([to_torch(each[name]) for each in found]) for name in found[0]}


def rows(batch) -> list:
    return [jax.tree.map(lambda leaf, at=at: leaf[at], batch) for at in range(len(jax.tree.leaves(batch)[0]))]


# Parameters and their names


def linen_net():
    module = linen.Sequential([linen.Dense(4), jnp.tanh, linen.Dense(2)])
    params = module.init(jax.random.key(0), jnp.ones(3))
    return lambda params, example: jnp.square(module.apply(params, example["x"])).sum(), params


def equinox_net():
    params, rest = eqx.partition(eqx.nn.MLP(3, 2, 4, 1, key=jax.random.key(0)), eqx.is_inexact_array)
    return lambda params, example: jnp.square(eqx.combine(params, rest)(example["x"])).sum(), params


def nnx_net():
    graph, params = nnx.split(nets.Net((3, 4, 2)), nnx.Param)
    return lambda params, example: jnp.square(nnx.merge(graph, params)(example["x"])).sum(), params


NETS = {
    "linen": (linen_net, [f"params.layers_{at}.{what}" for at in (0, 2) for what in ("bias", "kernel")]),
    "equinox": (equinox_net, [f"layers.{at}.{what}" for at in (0, 1) for what in ("weight", "bias")]),
    "nnx": (nnx_net, [f"layers.{at}.{what}" for at in (0, 1) for what in ("bias", "kernel")]),
}


@pytest.mark.parametrize("name", NETS)
def test_any_pytree_of_parameters_gives_named_gradients(name) -> None:
    (make, names), batch = NETS[name], {"x": jax.random.normal(jax.random.key(1), (5, 3))}
    loss, params = make()
    found = per_example_grad(loss, params, batch)
    assert list(found) == names
    close(found, one_by_one(loss, params, batch))


def test_leaves_keep_their_order_beyond_ten_layers() -> None:
    # As strings, layers.10 comes before layers.2; all kernels have one shape, so a mix-up would go unnoticed by it.
    # Of norm one or so: twelve layers must not multiply float32's rounding.
    params = [jax.random.normal(jax.random.key(at), (4, 4)) / 3 for at in range(12)]

    def loss(params, example):
        x = example["x"]
        for kernel in params:
            x = jnp.tanh(lifted_dense(x, kernel))
        return x.sum()

    batch = {"x": jax.random.normal(jax.random.key(20), (3, 4))}
    expected = one_by_one(loss, params, batch)
    close(per_example_grad(loss, params, batch), expected)
    chain = fa.compose(per_example_grad, fa.project(2))
    assert list(chain(loss, params, batch)) == [str(at) for at in range(12)]
    close(chain(loss, params, batch), chain.plain(loss, params, batch))


@pytest.mark.parametrize("chunk", [1, 4, 11, 50])
def test_chunks_do_not_change_the_result(chunk) -> None:
    loss, params = nets.flax()
    batch = nets.batch(11)
    whole = chunked(1000).bind(loss, params, None)(batch)
    parts = chunked(chunk).bind(loss, params, None)(batch)
    close(parts.grads, whole.grads, 1e-6)
    torch.testing.assert_close(parts.losses, whole.losses)
    torch.testing.assert_close(whole.losses, to_torch(jnp.stack([jax.jit(loss)(params, each) for each in rows(batch)])))


def test_a_chunk_bounds_how_many_examples_are_computed_together(monkeypatch) -> None:
    sizes = []

    def loss(params, example):
        return (params["w"] * example["x"]).sum()

    computed = per_example._gradients

    def watched(*args):
        sizes.append(len(args[-1]["x"]))
        return computed(*args)

    monkeypatch.setattr(per_example, "_gradients", watched)
    chunked(4)(loss, {"w": jnp.ones(3)}, {"x": jnp.ones((10, 3))})
    assert sizes == [4, 4, 2]


# Memory


def test_arrays_are_handed_over_without_a_copy() -> None:
    for dtype in (jnp.float32, jnp.bfloat16, jnp.float16, jnp.int32, jnp.bool_):
        array = jnp.ones((4, 3), dtype)
        tensor = to_torch(array)
        assert tensor.data_ptr() == array.unsafe_buffer_pointer()
        assert str(tensor.dtype) == f"torch.{array.dtype}"
        tensor = torch.ones(4, 3).to(tensor.dtype)
        assert to_jax(tensor).unsafe_buffer_pointer() == tensor.data_ptr()
    params = nets.plain(nets.flax()[1])
    assert tensors_of(params)["layers.1.kernel"].data_ptr() == params["layers"][1]["kernel"].unsafe_buffer_pointer()


def test_the_gradients_are_the_memory_that_jax_computed(monkeypatch) -> None:
    left = {}

    def watched(*args):
        losses, grads = computed(*args)
        left.update({name: grad.unsafe_buffer_pointer() for name, grad in grads.items()})
        return losses, grads

    computed = per_example._gradients
    monkeypatch.setattr(per_example, "_gradients", watched)
    loss, params = nets.flax()
    found = fa.compose(per_example_grad, fa.project(3))(loss, params, nets.batch(5))
    assert {name: grad.data_ptr() for name, grad in found.items()} == left


def test_tensors_that_jax_cannot_take_as_they_are_are_copied_right() -> None:
    base = torch.arange(40.0)
    for tensor in (base[1:], base.reshape(4, 10).T, base.reshape(4, 10)[:, ::3], torch.tensor(2.0), torch.zeros(0, 3)):
        assert torch.equal(torch.from_dlpack(to_jax(tensor)), tensor)
    assert to_jax(torch.tensor([1, -2])).tolist() == [1, -2]  # int64, narrowed


# Chains


CHAINS = {
    "project": (fa.project(3),),
    "adafactor before": (fa.adafactor_norm, fa.project(3)),
    "adafactor behind": (fa.project(3), fa.adafactor_norm),
    "adam": (fa.adam_norm, fa.project(3)),
    "sketch": (fa.sketch(16),),
    "heads": (fa.split_heads({"layers.0.kernel": fa.AttentionConfig(3, 3, head_dim=1)}), fa.project(2)),
    "adam behind": (fa.project(3), fa.adam_norm, fa.sketch(8)),
    "precondition": (fa.project(3), fa.precondition(), fa.unit_norm),
    "select": (fa.select(["*kernel"]), fa.project(3)),
    "self influence": (fa.project(3), fa.self_influence),
    "nothing": (),
}


@pytest.mark.parametrize("name", CHAINS)
def test_every_transform_works_on_jax_gradients_as_on_torchs(name) -> None:
    """Lowered in JAX, for Flax's own layers and for ``lifted_dense``, against the plain form in torch."""
    loss, state = nets.flax()
    params, batch = nets.plain(state), nets.batch()
    chain = fa.compose(chunked(4), *CHAINS[name])
    fitted = chain.fit(nets.dense, params, [batch])
    expected = fa.compose(*CHAINS[name]).apply(fitted, one_by_one(loss, state, batch))
    close(chain(nets.dense, params, batch, fitted), expected, 2e-5)
    close(chain(loss, state, batch, fitted), expected, 2e-5)
    close(chain.plain(loss, state, batch, fitted), expected, 2e-5)


@pytest.mark.parametrize("settings", [{}, {"unit_norm": True}, {"by": "leaf"}], ids=str)
def test_scores_against_queries(settings) -> None:
    params, batch = nets.plain(nets.flax()[1]), nets.batch()
    before = fa.compose(chunked(4), fa.project(3))
    rows = before(nets.dense, params, batch)
    queries = {name: grad[:2] for name, grad in rows.items()}
    found = fa.compose(before, fa.inner_products(queries, **settings))(nets.dense, params, batch)
    flat = torch.cat([grad.flatten(1) for grad in rows.values()], 1).double()
    expected = flat @ flat[:2].T
    if settings.get("unit_norm"):
        expected = expected / flat.norm(dim=1, keepdim=True)
    scores = torch.stack(list(found.values())).sum(0) if settings.get("by") else found["scores"]
    torch.testing.assert_close(scores.double(), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_fit_sees_every_example_once_whatever_the_chunks() -> None:
    params, batch = nets.plain(nets.flax()[1]), nets.batch(11)
    halves = [{name: leaf[part] for name, leaf in batch.items()} for part in (slice(0, 5), slice(5, 11))]
    grads = one_by_one(nets.dense, params, batch)
    for source, batches in ((chunked(50), [batch]), (chunked(3), halves)):
        (state,) = fa.compose(source, fa.adafactor_norm).fit(nets.dense, params, batches)
        for name, grad in grads.items():
            squares = grad.double().square()
            parts = [squares.mean((0, 2)), squares.mean((0, 1))] if grad.ndim == 3 else [squares.mean(0)]
            torch.testing.assert_close(state["sums"][name], torch.cat(parts), rtol=1e-5, atol=1e-12)


def test_bfloat16_stays_bfloat16() -> None:
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), nets.plain(nets.flax()[1]))
    batch = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), nets.batch())
    assert {tensor.dtype for tensor in tensors_of(params).values()} == {torch.bfloat16}
    chain = fa.compose(per_example_grad, fa.project(3))
    found = chain(nets.dense, params, batch)
    assert {grad.dtype for grad in found.values()} == {torch.bfloat16}
    exact = chain(
        nets.dense,
        jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params),
        jax.tree.map(lambda leaf: leaf.astype(jnp.float32), batch),
    )
    close({name: grad.float() for name, grad in found.items()}, exact, 0.05)


# Lowering


def shapes_in(jaxpr) -> set[tuple[int, ...]]:
    """Of every value that a jaxpr computes, inner ones included."""
    found = set()
    for equation in jaxpr.eqns:
        found |= {tuple(variable.aval.shape) for variable in equation.outvars}
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda v: hasattr(v, "eqns")):
            inner = getattr(value, "jaxpr", value)
            found |= shapes_in(inner) if hasattr(inner, "eqns") else set()
    return found


SIZES = (61, 67, 71)


def traced(loss, params, batch):
    """What is computed for a projection to 4."""
    structure, arrays = take_apart(params)
    chain = fa.compose(per_example_grad, fa.project(4))
    spec = per_example_grad.spec(params)
    lowered, _ = lower(chain.stages, spec, chain.init(spec)[0])
    sides = {
        name: tuple(None if side is None else to_jax(side) for side in how.map.sides_first()[:2])
        for name, how in lowered.items()
    }
    compute = partial(per_example._gradients, loss, structure, tuple(arrays), tuple(arrays))
    return compute.func, (*compute.args, tuple(arrays.values()), sides, batch)


@pytest.mark.parametrize("layer", [lifted_dense, nets.by_hand])
def test_the_whole_gradient_is_never_formed_with_lifted_dense(layer) -> None:
    params, batch = nets.plain(nets.flax(SIZES)[1], SIZES), nets.batch(5, sizes=SIZES)
    function, args = traced(partial(nets.dense, layer=layer), params, batch)
    seen = shapes_in(jax.make_jaxpr(lambda *rest: function(*args[:4], *rest))(*args[4:]).jaxpr)
    whole = {(5, 61, 67), (5, 67, 61), (5, 67, 71), (5, 71, 67)}
    alone = {(61, 67), (67, 61), (67, 71), (71, 67)}  # of the sum over examples, were it made
    assert (5, 4, 4) in seen
    assert bool(seen & whole) == (layer is not lifted_dense)
    assert layer is not lifted_dense or not seen & alone
    temporary = function.lower(*args).compile().memory_analysis().temp_size_in_bytes
    assert (temporary < 4 * 5 * 61 * 67) == (layer is lifted_dense)


def test_out_first_kernels_are_read_like_any_other() -> None:
    params = {"w": jax.random.normal(jax.random.key(0), (9, 7)), "b": jnp.ones(9)}
    batch = {"x": jax.random.normal(jax.random.key(1), (4, 3, 7))}

    def loss(params, example, layer=partial(lifted_dense, out_first=True)):
        return jnp.tanh(layer(example["x"], params["w"], params["b"])).sum()

    def plain(params, example):
        return loss(params, example, lambda x, w, b: x @ w.T + b)

    chain = fa.compose(per_example_grad, fa.project(3))
    close(chain(loss, params, batch), chain.plain(plain, params, batch))


def test_inside_checkpoint_and_jit_a_kernel_is_still_read() -> None:
    params, batch = nets.plain(nets.flax(SIZES)[1], SIZES), nets.batch(5, sizes=SIZES)

    def loss(params, example):
        layer = jax.checkpoint(jax.jit(lifted_dense))
        return nets.dense(params, example, layer)

    function, args = traced(loss, params, batch)
    seen = shapes_in(jax.make_jaxpr(lambda *rest: function(*args[:4], *rest))(*args[4:]).jaxpr)
    assert not seen & {(5, 61, 67), (5, 67, 61), (5, 67, 71), (5, 71, 67)}
    chain = fa.compose(per_example_grad, fa.project(4))
    close(chain(loss, params, batch), chain.plain(nets.dense, params, batch))


@pytest.mark.parametrize("make", [nets.of_nnx, nets.of_linen, nets.of_equinox])
def test_modules_of_flax_and_equinox_may_call_it(make) -> None:
    forward, params = make()
    batch = jax.random.normal(jax.random.key(1), (5, 3, 61))

    def loss(params, example):
        return jnp.square(forward(params, example)).sum()

    function, args = traced(loss, params, batch)
    seen = shapes_in(jax.make_jaxpr(lambda *rest: function(*args[:4], *rest))(*args[4:]).jaxpr)
    assert not seen & {(5, 61, 67), (5, 67, 61)}
    chain = fa.compose(per_example_grad, fa.project(4))
    close(chain(loss, params, batch), chain.plain(loss, params, batch))


def used_twice(params, example):
    return jnp.tanh(lifted_dense(jnp.tanh(lifted_dense(example["x"], params["w"])), params["w"])).sum()


def also_otherwise(params, example):
    return lifted_dense(example["x"], params["w"]).sum() + jnp.square(params["w"]).sum()


def transposed(params, example):
    return jnp.square(lifted_dense(example["x"], params["w"].T)).sum()


def in_a_loop(params, example):
    def step(x, _):
        return jnp.tanh(lifted_dense(x, params["w"])), None

    return jax.lax.scan(step, example["x"], length=3)[0].sum()


def returned_by_a_branch(params, example):
    return jax.lax.cond(example["x"].sum() > 0, lambda: lifted_dense(example["x"], params["w"]).sum(), lambda: 1.0)


@pytest.mark.parametrize("loss", [used_twice, also_otherwise, transposed, in_a_loop, returned_by_a_branch])
def test_kernels_used_in_other_ways_are_right_all_the_same(loss) -> None:
    params = {"w": jax.random.normal(jax.random.key(0), (6, 6))}
    batch = {"x": jax.random.normal(jax.random.key(1), (4, 6))}
    chain = fa.compose(per_example_grad, fa.project(3))
    expected = fa.compose(fa.project(3)).apply(
        chain.init(per_example_grad.spec(params))[0], one_by_one(loss, params, batch)
    )
    close(chain(loss, params, batch), expected)


def test_a_kernel_that_is_converted_on_the_way_is_told() -> None:
    def loss(params, example):
        return lifted_dense(example, jnp.asarray(params["w"])).sum()

    params, batch = {"w": jnp.ones((5, 6))}, jnp.ones((3, 5))
    assert per_example_grad(loss, params, batch)["w"].shape == (3, 5, 6)
    with pytest.raises(
        FuncattribError,
        match=r"kernel of shape \(5, 6\) was converted to an array before it was passed to lifted_dense",
    ):
        fa.compose(per_example_grad, fa.project(2))(loss, params, batch)


def test_a_loss_is_compiled_once_for_each_shape() -> None:
    traces = 0

    def loss(params, example):
        nonlocal traces
        traces += 1
        return jnp.square(params["e"][example["ids"]]).sum()

    params, ids = {"e": jax.random.normal(jax.random.key(0), (10, 4))}, torch.tensor([[1, 2], [2, 2], [0, 9]])
    chain = fa.compose(per_example_grad, fa.project(2))
    first = chain(loss, params, {"ids": ids})
    once = traces
    again = chain(loss, jax.tree.map(lambda leaf: leaf * 2, params), {"ids": ids})
    assert traces == once
    close(again, {name: 2 * grad for name, grad in first.items()})
    chain(loss, params, {"ids": ids[:2]})
    assert traces == 2 * once


def test_a_parameter_that_is_not_used_has_zeros() -> None:
    params = {"w": jnp.ones((5, 6)), "unused": jnp.ones((5, 6))}
    chain = fa.compose(per_example_grad, fa.project(2))
    found = chain(lambda params, example: lifted_dense(example, params["w"]).sum(), params, jnp.ones((3, 5)))
    assert not found["unused"].any()
    assert found["w"].any()


# Errors


def square(params, example):
    return sum(jnp.square(leaf).sum() for leaf in jax.tree.leaves(params)) * example["x"].sum()


BATCH = {"x": jnp.ones((2, 3))}


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"w": jnp.ones(3), "rate": 0.1}, "expected arrays in the parameters, found a float at rate"),
        ({"w": jnp.ones(3), "act": jnp.tanh}, "found a .* at act\npass what is differentiated alone"),
        ({"w": torch.ones(3)}, "expected arrays in the parameters, found a Tensor at w"),
        ({"step": jnp.zeros((), jnp.int32)}, "expected floating-point arrays in the parameters, found int32 at step"),
        ({"key": jax.random.key(0)}, "found key<fry> at key"),
        ({}, "there are no arrays in the parameters"),
        ({"a": {"b": jnp.ones(1)}, "a.b": jnp.ones(1)}, "two leaves of the parameters are named a.b"),
    ],
)
def test_parameters_that_cannot_be_differentiated(params, message) -> None:
    with pytest.raises(FuncattribError, match=message):
        fa.compose(per_example_grad, fa.project(2))(square, params, BATCH)


def test_the_whole_of_an_equinox_module_is_refused_with_the_way_out() -> None:
    module = eqx.nn.MLP(3, 2, 4, 1, key=jax.random.key(0))
    with pytest.raises(FuncattribError, match=r"at activation\n.*eqx.partition"):
        per_example_grad(lambda module, example: module(example["x"]).sum(), module, BATCH)


def test_a_structure_that_changes_between_batches() -> None:
    bound = fa.compose(per_example_grad, fa.project(2)).bind(square, {"w": jnp.ones(3)})
    bound(BATCH)
    with pytest.raises(FuncattribError, match=r"expected every batch to have the structure .*'x'.*, found .*'y'"):
        bound({**BATCH, "y": jnp.ones((2, 1))})
    with pytest.raises(FuncattribError, match="expected every batch to have the structure"):
        fa.compose(per_example_grad, fa.adafactor_norm).fit(square, {"w": jnp.ones(3)}, [BATCH, {"x": [jnp.ones(2)]}])


def test_parameters_other_than_the_state_was_fitted_for() -> None:
    chain = fa.compose(per_example_grad, fa.adafactor_norm, fa.project(2))
    state = chain.fit(square, {"w": jnp.ones((3, 4))}, [BATCH])
    with pytest.raises(ChainError, match=r"state of adafactor_norm has no entry for v, one of 2 leaves; fit"):
        chain(square, {"w": jnp.ones((3, 4)), "v": jnp.ones(2)}, BATCH, state)


@pytest.mark.parametrize(
    ("loss", "batch", "message"),
    [
        (
            lambda params, example: params["w"] * example["x"],
            BATCH,
            r"one floating-point number, found float32\[3\]",
        ),
        (lambda params, example: jnp.int32(1), BATCH, r"one floating-point number, found int32\[\]"),
        (lambda params, example: (params["w"].sum(), 1.0), BATCH, "one floating-point number, found float32"),
        (square, {"x": jnp.ones((2, 3)), "y": jnp.ones(3)}, "equally many examples in a batch, found x 2, y 3"),
        (square, {"x": jnp.ones(())}, "found x without an axis"),
        (square, {}, "found no arrays"),
        (square, {"x": [1.0, 2.0]}, "expected arrays or tensors in a batch, found a float"),
    ],
)
def test_losses_and_batches_that_do_not_fit(loss, batch, message) -> None:
    with pytest.raises(FuncattribError, match=message):
        per_example_grad(loss, {"w": jnp.ones(3)}, batch)


def test_a_loss_that_cannot_be_hashed() -> None:
    module = eqx.nn.Linear(3, 2, key=jax.random.key(0))
    with pytest.raises(FuncattribError, match="must be hashable, and a Linear is not; wrap it in a def"):
        per_example_grad(module, {"w": jnp.ones(3)}, BATCH)


def test_inside_jit_it_says_so() -> None:
    with pytest.raises(FuncattribError, match="has no value while it is traced; call this outside jit"):
        jax.jit(lambda params: per_example_grad(square, params, BATCH)["w"])({"w": jnp.ones(3)})


def test_too_little_memory_is_explained_as_torchs_is() -> None:
    with pytest.raises(FuncattribError, match="a batch does not fit in memory"), explained():
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes.")


def test_no_chunk() -> None:
    with pytest.raises(FuncattribError, match="at least 1 example, found 0"):
        chunked(0)


def test_torchs_source_refuses_jax_parameters_and_names_the_other() -> None:
    for params in ({"w": jnp.ones(3)}, nets.flax()[1]):
        with pytest.raises(FuncattribError, match=r"found .*\nof JAX, begin the chain at funcattrib.jax"):
            fa.compose(fa.per_example_grad, fa.project(2))(square, params, {"x": torch.ones(2, 3)})


TWO_DEVICES = """
import jax, jax.numpy as jnp, torch, funcattrib as fa
from funcattrib.jax import as_jax, lifted_dense, per_example_grad
loss = lambda params, example: jnp.square(lifted_dense(example["x"], params["w"])).sum()
chain = fa.compose(per_example_grad, fa.project(2))
first, second = jax.devices()
batch = {"x": torch.arange(24.0).reshape(3, 8)}
found = [chain(loss, {"w": jax.device_put(jnp.ones((8, 6)), device)}, batch)["w"] for device in (first, second)]
assert torch.equal(*found)
assert as_jax(fa.compose(fa.unit_norm))({"w": jax.device_put(jnp.ones((3, 2)), second)})["w"].devices() == {second}
mesh = jax.sharding.Mesh(jax.devices(), ("a",))
sharded = jax.device_put(jnp.ones((8, 6)), jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("a")))
try:
    chain(loss, {"w": sharded}, batch)
except fa.FuncattribError as error:
    print(error)
"""


@pytest.mark.slow
def test_results_stay_on_the_device_and_several_devices_are_refused() -> None:
    devices = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2", "PYTHONPATH": str(ROOT)}
    ran = subprocess.run(
        [sys.executable, "-c", TWO_DEVICES], env=devices, cwd=ROOT, capture_output=True, text=True, timeout=OUTER_LIMIT
    )
    assert ran.stdout.startswith("expected the parameters on one device, found w on 2"), ran.stderr


# An extra

TORCH_PATH = """
import sys, tempfile, torch, funcattrib as fa
loss = lambda params, example: torch.nn.functional.linear(example["x"], params["w"]).square().sum()
chain = fa.compose(fa.per_example_grad, fa.project(2), fa.adafactor_norm)
records = [{"x": [float(i), 1.0, 2.0]} for i in range(4)]
with tempfile.TemporaryDirectory() as folder:
    store = fa.collect_gradients((loss, {"w": torch.ones(5, 3)}), records, path=folder, chain=chain, quiet=True)
    fa.Attributor(folder).search(store.matrix().tensor(0, 1), 2)
print(sorted({"jax", "jaxlib", "flax", "equinox", "optax"} & set(sys.modules)))
"""


def test_the_path_of_torch_leaves_jax_out() -> None:
    assert processes.start("-c", TORCH_PATH).wait() == (0, "[]\n")


def test_nothing_else_imports_it() -> None:
    """Of the library's own modules; what it depends on is seen above."""
    own = ROOT / "funcattrib" / "jax"
    for file in (ROOT / "funcattrib").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())) if own not in file.parents else ():
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not [name for name in names if name.split(".")[0] == "jax" or name.startswith("funcattrib.jax")], (
                file
            )


def test_without_jax_the_import_says_what_to_install() -> None:
    code = "import sys; sys.modules['jax'] = None\nimport funcattrib.jax"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=OUTER_LIMIT)
    assert "jax is not installed; pip install 'funcattrib[jax]'" in ran.stderr


def test_a_batch_of_no_examples_has_no_rows() -> None:
    params = {"w": jnp.ones((3, 2))}
    chain = fa.compose(per_example_grad, fa.project(2))
    bound = chain.bind(lambda params, example: (example["x"] @ params["w"]).sum(), params)
    assert bound({"x": jnp.ones((5, 3))}).grads["w"].shape == (5, 2, 2)
    empty = bound({"x": jnp.ones((0, 3))})
    assert empty.grads["w"].shape == (0, 2, 2)
    assert empty.losses.shape == (0,)
