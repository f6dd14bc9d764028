"""One small network, in Flax, in JAX with ``lifted_dense``, and in torch, with the same names, layouts and weights."""

from functools import cache
from itertools import pairwise

import equinox as eqx
import flax.linen as linen
import jax
import jax.numpy as jnp
import torch
from flax import nnx
from torch import Tensor, nn

from funcattrib.jax import lifted_dense

SIZES = (7, 9, 5)


class Net(nnx.Module):
    """Two dense layers; ``layers.0.kernel`` is (7, 9)."""

    def __init__(self, sizes: tuple[int, ...] = SIZES, seed: int = 0) -> None:
        rngs = nnx.Rngs(seed)
        normal = nnx.initializers.normal()
        self.layers = nnx.List([nnx.Linear(i, o, bias_init=normal, rngs=rngs) for i, o in pairwise(sizes)])

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in self.layers[:-1]:
            x = jnp.tanh(layer(x))
        return self.layers[-1](x)


@cache
def flax(sizes: tuple[int, ...] = SIZES):
    """loss(params, example), and the parameters as NNX's state."""
    graph, params = nnx.split(Net(sizes), nnx.Param)

    def loss(params, example):
        return jnp.square(nnx.merge(graph, params)(example["x"]) - example["y"]).sum()

    return loss, params


def plain(params, sizes: tuple[int, ...] = SIZES):
    """NNX's state as plain dicts and lists."""
    tree = nnx.to_pure_dict(params)
    return {"layers": [tree["layers"][at] for at in range(len(sizes) - 1)]}


def dense(params, example, layer=lifted_dense):
    """The same loss on plain parameters, its dense layers written with ``layer``."""
    x = example["x"]
    for at, weights in enumerate(params["layers"]):
        x = layer(jnp.tanh(x) if at else x, weights["kernel"], weights["bias"])
    return jnp.square(x - example["y"]).sum()


def by_hand(x, kernel, bias):
    return x @ kernel + bias


class TorchDense(nn.Module):
    def __init__(self, kernel: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.bias, self.kernel = nn.Parameter(bias), nn.Parameter(kernel)

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.kernel)


class TorchNet(nn.Module):
    def __init__(self, named: dict[str, Tensor]) -> None:
        super().__init__()
        count = len(named) // 2
        pairs = [(named[f"layers.{at}.kernel"], named[f"layers.{at}.bias"]) for at in range(count)]
        self.layers = nn.ModuleList([TorchDense(kernel.clone(), bias.clone()) for kernel, bias in pairs])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = torch.tanh(layer(x))
        return self.layers[-1](x)


def batch(rows: int = 11, tokens: int = 3, seed: int = 1, sizes: tuple[int, ...] = SIZES):
    keys = jax.random.split(jax.random.key(seed))
    x, y = (jax.random.normal(key, (rows, tokens, n)) for key, n in zip(keys, (sizes[0], sizes[-1]), strict=True))
    return {"x": x, "y": y}


class NnxDense(nnx.Module):
    def __init__(self) -> None:
        self.kernel = nnx.Param(jax.random.normal(jax.random.key(0), (61, 67)))
        self.bias = nnx.Param(jnp.ones(67))

    def __call__(self, x: jax.Array) -> jax.Array:
        return lifted_dense(x, self.kernel[...], self.bias[...])


class LinenDense(linen.Module):
    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.param("kernel", linen.initializers.lecun_normal(), (61, 67))
        return lifted_dense(x, kernel, self.param("bias", linen.initializers.normal(), (67,)))


class EquinoxDense(eqx.Module):
    weight: jax.Array
    bias: jax.Array

    def __call__(self, x: jax.Array) -> jax.Array:
        return lifted_dense(x, self.weight, self.bias, out_first=True)


def of_nnx():
    graph, params = nnx.split(NnxDense(), nnx.Param)
    return lambda params, x: nnx.merge(graph, params)(x), params


def of_linen():
    return LinenDense().apply, LinenDense().init(jax.random.key(0), jnp.ones(61))


def of_equinox():
    module = EquinoxDense(jax.random.normal(jax.random.key(0), (67, 61)), jnp.ones(67))
    return lambda module, x: module(x), module
