"""A Flax model, trained in JAX: which training examples made it decide as it does?

Two rings of points, the inner one of class 1. The gradients are JAX's; they are transformed, stored and searched like
torch's.

    python examples/jax_flax.py
"""

import tempfile

import jax
import numpy as np
import optax
from flax import nnx

import funcattrib as fa
from funcattrib.jax import per_example_grad


class Net(nnx.Module):
    """Two hidden layers and one logit."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.layers = nnx.List([nnx.Linear(i, o, rngs=rngs) for i, o in ((2, 32), (32, 32), (32, 1))])

    def __call__(self, x: jax.Array) -> jax.Array:
        """The logit of class 1."""
        for layer in self.layers[:-1]:
            x = nnx.relu(layer(x))
        return self.layers[-1](x)[..., 0]


def rings(seed: int, count: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    label = random.integers(0, 2, count)
    angle, radius = random.uniform(0, 2 * np.pi, count), np.where(label == 1, 1.0, 2.0) + random.normal(0, 0.2, count)
    x = np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1).astype(np.float32)
    return {"x": x, "y": label.astype(np.float32)}


def main() -> None:
    train = rings(seed=0, count=200)
    query = {"x": train["x"][:20] + np.float32(0.01), "y": train["y"][:20]}  # beside the first 20
    graph, params = nnx.split(Net(nnx.Rngs(0)), nnx.Param)

    def loss(params: nnx.State, example: dict[str, jax.Array]) -> jax.Array:
        logit = nnx.merge(graph, params)(example["x"])
        return optax.sigmoid_binary_cross_entropy(logit, example["y"])

    adam = optax.adam(1e-2)

    @jax.jit
    def step(params: nnx.State, state: optax.OptState) -> tuple[nnx.State, optax.OptState]:
        grads = jax.grad(lambda p: jax.vmap(loss, (None, 0))(p, train).mean())(params)
        updates, state = adam.update(grads, state)
        return optax.apply_updates(params, updates), state

    state = adam.init(params)
    for _ in range(200):
        params, state = step(params, state)

    attribute = fa.compose(per_example_grad, fa.adafactor_norm, fa.project(8))
    fitted = attribute.fit(loss, params, [train])
    examples = [{"x": x, "y": y} for x, y in zip(train["x"], train["y"], strict=True)]
    with tempfile.TemporaryDirectory() as folder:
        fa.collect_gradients((loss, params), examples, path=folder, chain=attribute, quiet=True)
        found = fa.Attributor(folder, unit_norm=True).search(attribute(loss, params, query, fitted), 3)
    for row, score in zip(found.rows[0].tolist(), found.values[0].tolist(), strict=True):
        print(f"{score:+.2f}  {train['x'][row].round(1)} labelled {train['y'][row]:.0f}")
    twins = np.mean([at in rows for at, rows in enumerate(found.rows.tolist())])
    print(f"queries whose twin is among the 3 first: {twins:.2f} (chance: {3 / 200:.3f})")


if __name__ == "__main__":
    main()
