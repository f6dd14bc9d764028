"""The attention kernel against the plain formula in float64, alone and under ``vmap(grad(...))``."""

import warnings

import pytest
import torch
from torch import Tensor
from torch.func import grad, vmap

from funcattrib.kernels import attention
from funcattrib.kernels.attention_interface import _interface

EXAMPLES, HEADS, TOKENS, WIDTH = 3, 4, 7, 6


def plain(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """Softmax of masked logits, one head at a time."""
    outputs = []
    for h in range(q.shape[1]):
        g = h * k.shape[1] // q.shape[1]
        logits = q[:, h] @ k[:, g].transpose(-1, -2) / q.shape[-1] ** 0.5
        if causal:
            logits = logits.masked_fill(~torch.ones(logits.shape[-2:]).tril().bool(), float("-inf"))
        if mask is not None:
            own = mask[:, h % mask.shape[1]]
            logits = logits.masked_fill(~own, float("-inf")) if own.dtype == torch.bool else logits + own
        outputs.append(torch.softmax(logits, -1) @ v[:, g])
    return torch.stack(outputs, 1)


def inputs(groups: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = (HEADS, HEADS // groups, HEADS // groups)
    return [torch.randn(EXAMPLES, n, TOKENS, WIDTH, generator=generator, dtype=torch.float64).to(dtype) for n in sizes]


def window(tokens: int, size: int) -> Tensor:
    """Causal, and no further back than ``size``."""
    distance = torch.arange(tokens)[:, None] - torch.arange(tokens)[None]
    return (distance >= 0) & (distance < size)


MASKS = {
    "none": lambda: (None, False),
    "causal": lambda: (None, True),
    "sliding window": lambda: (window(TOKENS, 3)[None, None], False),
    "own padding": lambda: (
        (torch.arange(TOKENS) < torch.tensor([4, 7, 5])[:, None])[:, None, None].expand(-1, 1, TOKENS, -1),
        False,
    ),
    "additive": lambda: (torch.randn(EXAMPLES, 1, TOKENS, TOKENS, dtype=torch.float64), False),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("name", MASKS)
def test_values_and_gradients(name, groups, dtype) -> None:
    mask, causal = MASKS[name]()
    exact = [t.requires_grad_() for t in inputs(groups)]
    expected = plain(*exact, mask, causal)
    wanted = torch.autograd.grad(expected.square().sum(), exact)
    tolerance = {"rtol": 1e-10, "atol": 1e-10} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-5}
    own = [t.to(dtype).detach().requires_grad_() for t in exact]

    batched = attention(*own, mask, causal=causal)
    torch.testing.assert_close(batched.double(), expected.double(), **tolerance)
    for a, b in zip(torch.autograd.grad(batched.square().sum(), own), wanted, strict=True):
        torch.testing.assert_close(a.double(), b, **tolerance)

    def loss(qkv, own_mask):
        return attention(*(t[None] for t in qkv), own_mask, causal=causal).square().sum()

    shared = mask is None or mask.shape[0] == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        per_example = vmap(grad(loss), in_dims=(0, None if shared else 0))(
            tuple(t.detach() for t in own), mask if shared else mask[:, None]
        )
    for a, b in zip(per_example, wanted, strict=True):
        torch.testing.assert_close(a.double(), b, **tolerance)


def test_values_of_another_width_take_the_maths_path() -> None:
    q, k, _ = inputs(2)
    v = torch.randn(EXAMPLES, HEADS // 2, TOKENS, 9, dtype=torch.float64)
    torch.testing.assert_close(attention(q, k, v, causal=True), plain(q, k, v, None, True))


@pytest.mark.parametrize("extra", ["softcap", "sinks", "position bias"])
def test_what_the_fused_kernel_cannot_serve(extra) -> None:
    q, k, v = inputs(1)
    logits = q @ k.transpose(-1, -2) / WIDTH**0.5
    causal = torch.ones(TOKENS, TOKENS).tril().bool()
    options = {}
    if extra == "softcap":
        options["softcap"], logits = 2.0, torch.tanh(logits / 2) * 2
    if extra == "position bias":
        options["position_bias"] = torch.randn(1, HEADS, TOKENS, TOKENS, dtype=torch.float64)
        logits = logits + options["position_bias"]
    logits = logits.masked_fill(~causal, float("-inf"))
    weights = torch.softmax(logits, -1)
    if extra == "sinks":
        options["s_aux"] = torch.randn(HEADS, dtype=torch.float64)
        total = logits.exp().sum(-1, keepdim=True) + options["s_aux"].exp()[None, :, None, None]
        weights = logits.exp() / total
    module = torch.nn.Module()
    module.is_causal = True
    out, _ = _interface(module, q, k, v, None, **options)
    torch.testing.assert_close(out, (weights @ v).transpose(1, 2))
