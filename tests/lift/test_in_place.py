"""Models may modify in place what a tapped operation returned."""

import pytest
import torch
from torch import nn

import funcattrib as fa


def linear(x, params):
    return nn.functional.linear(x, params["w"], params["b"])


def conv1d(x, params):
    return torch.addmm(params["b"], x, params["w"])


def norm(x, params):
    return nn.functional.layer_norm(x, (4,), params["w"][0], params["b"])


def embedding(x, params):
    return nn.functional.embedding((x[:, 0] * 3).long().clamp(0, 3), params["w"])


def conv(x, params):
    return nn.functional.conv1d(x.T[None], params["w"][:, :, None], params["b"])[0].T


@pytest.mark.parametrize("operation", [linear, conv1d, norm, embedding, conv])
@pytest.mark.parametrize("trained", [False, True])
def test_results_may_be_modified_in_place(operation, trained: bool) -> None:
    torch.manual_seed(0)
    names = ("w",) if operation is embedding else ("w", "b")
    params = {name: torch.randn(*(4,) * (2 if name == "w" else 1), dtype=torch.float64) for name in names}
    batch = {"x": torch.rand(3, 5, 4, dtype=torch.float64)}

    def loss(params, example):
        x = example["x"] * 1.0 if not trained else nn.functional.linear(example["x"], params["w"])
        y = operation(x, params)
        y += 0.1
        return torch.relu_(y).square().sum()

    rows = {name: torch.zeros(3, *tensor.shape, dtype=torch.float64) for name, tensor in params.items()}
    for at in range(3):
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in params.items()}
        loss(leaves, {"x": batch["x"][at]}).backward()
        for name, leaf in leaves.items():
            rows[name][at] = leaf.grad
    torch.testing.assert_close(fa.compose(fa.per_example_grad)(loss, params, batch), rows)
    projected = fa.compose(fa.per_example_grad, fa.project(2))
    torch.testing.assert_close(projected(loss, params, batch), projected.plain(loss, params, batch))
