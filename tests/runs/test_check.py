"""``check``: rows that depend on their batch are found, and the advice fits."""

import math

import pytest
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutput

import funcattrib as fa
from funcattrib.runs.check import check_model
from tests.support import cases


class Toy(nn.Module):
    """Embedding, one hidden layer, head; ``between`` is what a case does to the hidden states (B, T, d)."""

    def __init__(self, between: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(50, 12)
        self.layers = nn.ModuleList([nn.Linear(12, 12), nn.Linear(12, 12)])
        self.between = between
        self.head = nn.Linear(12, 50)

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def forward(self, input_ids: Tensor) -> CausalLMOutput:
        hidden = self.between(self.layers[0](self.embedding(input_ids)))
        return CausalLMOutput(logits=self.head(self.layers[1](hidden).tanh()))


class Statistics(nn.Module):
    """Batch statistics: over the batch and all its tokens, padding included."""

    def forward(self, hidden: Tensor) -> Tensor:
        return (hidden - hidden.mean((0, 1))) / (hidden.var((0, 1), correction=0) + 1e-5).sqrt()


class Long(nn.Module):
    """Something else where the batch is longer than what is tried when a loss is made."""

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden * (2 if hidden.shape[1] > 40 else 1)


class Dropout(nn.Module):
    """Dropout that eval mode does not turn off."""

    def forward(self, hidden: Tensor) -> Tensor:
        return nn.functional.dropout(hidden, 0.5, training=True)


class Counting(nn.Module):
    """A state that every forward pass changes."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, hidden: Tensor) -> Tensor:
        self.calls += 1
        return hidden * self.calls


class Overflow(nn.Module):
    def forward(self, hidden: Tensor) -> Tensor:
        return hidden * math.inf


@pytest.mark.parametrize("name", cases.EVERY)
def test_models_pass(name: str) -> None:
    verdict = check_model(cases.causal(name))
    assert verdict.passed, verdict
    assert verdict.lines()[-1] == "Rows are the model's own gradients, and do not depend on their batch."


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions_pass(dtype: torch.dtype) -> None:
    import copy

    verdict = check_model(copy.deepcopy(cases.causal("gpt_neox")).to(dtype))
    assert verdict.passed, verdict


def test_a_model_that_sees_its_padding_fails() -> None:
    verdict = check_model(Toy(Long()))
    assert not verdict.passed
    assert verdict.again <= verdict.tolerance
    assert verdict.alone > verdict.tolerance
    assert "use `token_batch_size=1`" in verdict.lines()[-1]
    assert check_model(Toy(nn.Identity())).passed


def test_what_is_seen_when_the_loss_is_made_is_avoided() -> None:
    loss, _ = fa.causal_lm_loss(Toy(Statistics()))
    assert loss.equal_lengths
    assert check_model(Toy(Statistics())).passed


@pytest.mark.parametrize("case", [Dropout, Counting])
def test_a_model_that_is_not_a_function_fails(case: type[nn.Module]) -> None:
    verdict = check_model(Toy(case()))
    assert not verdict.passed
    assert verdict.again > verdict.tolerance
    assert "make it deterministic in eval mode" in verdict.lines()[-1]


def test_a_copy_that_computes_something_else_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    model = cases.causal("llama")
    broken = fa.causal_lm_loss(model)[0]
    with torch.no_grad():
        broken.model.parts.frozen["model.norm.weight"] = broken.model.parts.frozen["model.norm.weight"] * 1.1
    monkeypatch.setattr("funcattrib.runs.check.causal_lm_loss", lambda *_, **__: (broken, broken.model.parts.params))
    verdict = check_model(model)
    assert not verdict.passed
    assert verdict.own is not None
    assert verdict.own > 1e-3
    assert "differ from the model's own gradients" in verdict.lines()[-1]


def test_gradients_that_are_not_finite_fail() -> None:
    verdict = check_model(Toy(Overflow()))
    assert not verdict.passed
    assert "`precision='fp32'`" in verdict.lines()[-1]


def test_the_advice_works(tmp_path) -> None:
    """Rows of a model with batch statistics are those of each document alone, in batches of one length as of one."""
    model = Toy(Statistics())
    data = [{"input_ids": list(range(n))} for n in (3, 9, 4, 9)]
    settings = {"projection_dim": 0, "dtype": "float32", "quiet": True}
    one = fa.collect_gradients(model, data, path=tmp_path / "one", token_batch_size=1, **settings)
    many = fa.collect_gradients(model, data, path=tmp_path / "many", **settings)
    torch.testing.assert_close(one.matrix().tensor(), many.matrix().tensor())
    alone = fa.collect_gradients(model, data[:1], path=tmp_path / "alone", **settings)
    torch.testing.assert_close(one.matrix().tensor(0, 1), alone.matrix().tensor())


def test_lengths_that_do_not_fit() -> None:
    for lengths in ((5,), (5, 1), (5, 65)):
        with pytest.raises(fa.FuncattribError, match="expected at least two `lengths` of 2 to 64 tokens"):
            check_model(cases.causal("gpt_neox"), lengths)


def test_the_command_fails(funcattrib, monkeypatch: pytest.MonkeyPatch) -> None:
    from funcattrib.models import loading

    loaded = loading.Loaded(Toy(Long()), None, "toy", None)
    monkeypatch.setattr("funcattrib.cli.load.load_model", lambda *_, **__: loaded)
    ran = funcattrib("check", "--model", "toy")
    assert ran.code == 1
    assert "one by one" in ran.out
    assert "use --token-batch-size 1" in ran.out
