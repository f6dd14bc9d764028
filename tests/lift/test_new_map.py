"""A gradient map that is defined here alone serves every operation that has a rule, with no edit elsewhere."""

from dataclasses import dataclass

import pytest
import torch

import funcattrib as fa
from funcattrib import testing as laws
from funcattrib.lift import GradientMap, readout
from tests.support import cases


@dataclass(frozen=True)
class Reversed(GradientMap):
    """C(G) = G, its last axis in reverse order."""

    def from_gradient(self, gradient: torch.Tensor) -> torch.Tensor:
        return gradient.flip(-1)

    def adjoint(self, theta: torch.Tensor) -> torch.Tensor:
        return theta.flip(-1)


REVERSED = fa.Transform("reversed", maps=lambda state, spec: {name: readout(name, Reversed()) for name in spec})


def test_laws() -> None:
    laws.check_transform(REVERSED)


@pytest.mark.parametrize("model", ["llama_tied", "gpt2", "qwen3_moe", "mamba"])
def test_models(model: str) -> None:
    """Linear, embedding, norm, convolution, experts and head; before other maps and after them."""
    loss, params = fa.causal_lm_loss(cases.causal(model), modules="all")
    for stages in ([REVERSED], [REVERSED, fa.project(3)], [fa.project(3), REVERSED, fa.unit_norm]):
        chain = fa.compose(fa.per_example_grad, *stages)
        rows, plain = chain(loss, params, cases.batch()), chain.plain(loss, params, cases.batch())
        laws.close(rows, plain, 1e-4)
