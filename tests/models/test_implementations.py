"""The copy that is differentiated computes what the model does, whatever its code asks of its attention."""

import logging
import sys
from types import SimpleNamespace

import pytest
import torch
import transformers
from torch import Tensor, nn

import funcattrib as fa
from benchmarks.models import examples, loop, padded, relative_error, rows
from benchmarks.tiny_models import tiny_model
from funcattrib.kernels.attention import attention
from funcattrib.kernels.attention_interface import _interface, _Name
from tests.support import cases


def logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(input_ids=batch["input_ids"], use_cache=False).logits


@pytest.mark.parametrize("kind", ["deepseek_v32", "doge", "inkling2_text", "gpt_oss", "gemma2"])
def test_attention_of_another_kind(kind: str) -> None:
    """A sparse index, a mask that depends on parameters, sinks by another name; sinks and softcaps that we know."""
    model = tiny_model(kind)
    loss, params = fa.causal_lm_loss(model)
    found, _ = rows(loss, params, examples())
    for ours, theirs in zip(found, loop(model, examples(), list(params)), strict=True):
        assert relative_error(ours, theirs) < 1e-4


def test_configured_names_are_read_as_they_are_meant() -> None:
    name = _Name("funcattrib")
    assert name in ("eager", "sdpa")
    assert name in ("funcattrib",)
    assert {"funcattrib": 1}[name] == 1
    assert name not in ("sdpa", "flash_attention_2")


def test_a_float_mask_gets_its_gradient() -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 1, 2, 5, 4, dtype=torch.float64)
    mask = torch.randn(1, 2, 5, 5, dtype=torch.float64, requires_grad=True)
    weights = torch.softmax(query @ key.mT / 2 + mask, -1)
    expected = torch.autograd.grad((weights @ value).square().sum(), mask)[0]
    found = torch.autograd.grad(attention(query, key, value, mask).square().sum(), mask)[0]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("mask", [None, torch.ones(5, 5, dtype=torch.bool).tril(1)[None, None]])
def test_unknown_arguments_are_left_to_the_model(mask: Tensor | None, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {}

    def eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout=0.0, bias=None, **rest):
        given.update(rest)
        weights = torch.softmax(query @ key.mT * scaling + attention_mask + bias, -1)
        return (weights @ value).transpose(1, 2), weights

    class Attention(nn.Module):
        is_causal = True

    monkeypatch.setitem(sys.modules, "their_model", SimpleNamespace(eager_attention_forward=eager_attention_forward))
    Attention.__module__ = "their_model"
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 1, 2, 5, 4, dtype=torch.float64)
    bias = torch.randn(5, 5, dtype=torch.float64)
    out, _ = _interface(Attention(), query, key, value, mask, scaling=0.3, bias=bias, sliding_window=3)
    seen = torch.ones(5, 5, dtype=torch.bool).tril() if mask is None else mask
    expected = torch.softmax((query @ key.mT * 0.3 + bias).masked_fill(~seen, -torch.inf), -1) @ value
    torch.testing.assert_close(out, expected.transpose(1, 2))
    assert given == {"sliding_window": 3}


def test_where_outputs_differ_the_models_own_attention_is_taken(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Llama with an attention that adds a bias, which it hands to nobody: it is in its eager formula alone."""
    module = sys.modules[transformers.LlamaForCausalLM.__module__]
    plain = module.eager_attention_forward

    def biased(layer, query, key, value, attention_mask, **rest):
        return plain(layer, query, key + 0.5 * key.flip(-1), value, attention_mask, **rest)

    monkeypatch.setattr(module, "eager_attention_forward", biased)
    model = cases.causal("llama")
    model.set_attn_implementation("eager")
    try:
        batch = padded(examples()[:2])
        batch["input_ids"] %= cases.VOCABULARY
        with caplog.at_level(logging.INFO, "funcattrib"):
            parts = fa.functionalize(model, "all")
        assert "LlamaForCausalLM is computed with the implementations 'eager', as" in caplog.text
        torch.testing.assert_close(
            parts.call(parts.params, input_ids=batch["input_ids"]).logits, logits(model, batch), rtol=1e-4, atol=1e-5
        )
        assert model.config._attn_implementation == "eager"
    finally:
        model.set_attn_implementation("sdpa")


def test_a_pooling_head_reads_the_pad_id() -> None:
    settings = {**cases.CAUSAL["llama"].settings, "num_labels": 1, "initializer_range": 0.3}
    torch.manual_seed(0)
    model = transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**settings)).eval()
    parts = fa.functionalize(model, "all")

    def loss(params, example):
        return parts.call(params, input_ids=example["input_ids"][None]).logits[0, 0].square()

    ids = torch.randint(1, cases.VOCABULARY, (2, 9))
    ids[1, 5:] = 0
    found = fa.per_example_grad(loss, parts.params, {"input_ids": ids})
    alone = fa.per_example_grad(loss, parts.params, {"input_ids": ids[1:, :5]})
    for name, grads in found.items():
        torch.testing.assert_close(grads[1], alone[name][0], rtol=1e-4, atol=1e-5)
