"""Losses of language models against their definitions on whole logits in float64."""

import copy
import importlib.util
import warnings
from contextlib import contextmanager
from functools import cache

import pytest
import torch
from torch import Tensor, nn

import funcattrib as fa
from funcattrib.kernels.linear_cross_entropy import Reference, linear_cross_entropy
from funcattrib.kernels.logit_loss import Head
from tests.models.test_families import InFloat64, worst
from tests.support import cases
from tests.support.tensor_sizes import tensor_sizes

LENGTHS = (9, 5, 12, 2)


@cache
def with_bias() -> nn.Module:
    """A llama whose head has a bias."""
    model = copy.deepcopy(cases.causal("llama"))
    head = nn.Linear(24, cases.VOCABULARY)
    with torch.no_grad():
        head.weight.copy_(model.lm_head.weight)
    model.lm_head = head
    return model


class Wrapped(nn.Module):
    """A model that does something to its logits that no configuration tells."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, input_ids: Tensor) -> object:
        output = self.inner(input_ids=input_ids)
        return type(output)(logits=output.logits * 1.5)

    def get_output_embeddings(self) -> nn.Module:
        return self.inner.get_output_embeddings()


def models(name: str) -> nn.Module:
    special = {"bias": with_bias, "unfused": lambda: Wrapped(cases.causal("gpt_neox"))}
    return special[name]() if name in special else cases.causal(name)


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    inner = getattr(model, "inner", model)
    with warnings.catch_warnings(), InFloat64():
        warnings.simplefilter("ignore")
        inner.set_attn_implementation("eager")
        if inner._can_set_experts_implementation():
            inner.set_experts_implementation("eager")
        return model(input_ids=ids[None]).logits[0]


def dense(model: nn.Module, reference: nn.Module, batch: dict[str, Tensor]) -> tuple[list[dict[str, Tensor]], Tensor]:
    """Gradients and losses of KL(model ‖ reference), one example at a time."""
    double, other = copy.deepcopy(model).double(), copy.deepcopy(reference).double()
    rows, losses = [], []
    for b, length in enumerate(LENGTHS):
        double.zero_grad()
        ids, labels = batch["input_ids"][b, :length], batch["labels"][b, :length]
        counted = labels[1:] != -100
        p = torch.softmax(logits(double, ids)[:-1], -1)
        q = torch.softmax(logits(other, ids)[:-1].detach(), -1)
        loss = (p * (p / q).log()).sum(-1)[counted].sum()
        loss.backward()
        losses.append(loss.detach())
        grads = {n: torch.zeros_like(w) if w.grad is None else w.grad.clone() for n, w in double.named_parameters()}
        rows.append(grads)
    return rows, torch.stack(losses)


PAIRS = [
    ("gpt_neox", "llama"),
    ("gpt2", "gpt_neox"),
    (cases.TIED, "gemma2"),
    ("gemma2", "cohere"),
    ("cohere", "bias"),
    ("bias", "mixtral"),
    ("unfused", "llama"),
    ("llama", "unfused"),
]


@pytest.mark.parametrize(("name", "other"), PAIRS)
def test_divergence_from_a_reference(name: str, other: str) -> None:
    model, reference, batch = models(name), models(other), cases.batch(LENGTHS)
    rows, losses = dense(model, reference, batch)
    loss, params = fa.causal_lm_loss(model, kind="kl", reference=reference, modules="all")
    whole = fa.per_example_grad(loss, params, batch)
    assert worst(whole, rows) < 1e-5
    bound = fa.compose(fa.per_example_grad, fa.select(["*"])).bind(loss, params)(batch)  # lowered, every shape
    assert worst(bound.grads, rows) < 1e-5
    torch.testing.assert_close(bound.losses.double(), losses, rtol=1e-4, atol=1e-6)
    chain = fa.compose(fa.per_example_grad, fa.project(4))
    exact = chain.apply(
        chain.init(chain.source.spec(params))[0], {n: torch.stack([r[n] for r in rows]) for n in params}
    )
    assert worst(chain(loss, params, batch), [{n: g[b] for n, g in exact.items()} for b in range(len(rows))]) < 1e-5


def test_both_heads_are_fused_where_they_can_be() -> None:
    loss, _ = fa.causal_lm_loss(with_bias(), kind="kl", reference=cases.causal("gemma2"))
    assert loss.model.prefix == "model"
    assert loss.reference.prefix == "model"
    assert loss.head.reference == (1.0, 30.0)


def test_divergence_needs_a_reference_of_the_same_vocabulary() -> None:
    model = cases.causal("llama")
    with pytest.raises(fa.FuncattribError, match="the loss kl requires a reference model"):
        fa.causal_lm_loss(model, kind="kl")
    other = copy.deepcopy(model)
    other.resize_token_embeddings(70)
    with pytest.raises(fa.FuncattribError, match="vocabulary of 61 tokens, found 70"):
        fa.causal_lm_loss(model, kind="kl", reference=other)
    with pytest.raises(fa.FuncattribError, match="a reference model requires kind='kl', found kind='ce'"):
        fa.causal_lm_loss(model, reference=other)
    with pytest.raises(fa.FuncattribError, match=r"label_smoothing=0\.1 requires kind='ce', found kind='kl'"):
        fa.causal_lm_loss(model, kind="kl", reference=model, label_smoothing=0.1)
    with pytest.raises(fa.FuncattribError, match="'kl'"):
        fa.causal_lm_loss(model, kind="KL")


def test_a_model_does_not_diverge_from_itself() -> None:
    model, batch = cases.causal("gpt_neox"), cases.batch(LENGTHS)
    loss, params = fa.causal_lm_loss(model, kind="kl", reference=copy.deepcopy(model))
    bound = fa.compose(fa.per_example_grad).bind(loss, params)(batch)
    assert float(bound.losses.abs().max()) < 1e-5
    assert max(float(grad.abs().max()) for grad in bound.grads.values()) < 1e-5


class Adapted(nn.Module):
    """A model with an adapter that can be switched off, as peft's have it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.shift = nn.Parameter(torch.linspace(-1, 1, cases.VOCABULARY))
        self.on = True

    def forward(self, input_ids: Tensor) -> object:
        output = self.inner(input_ids=input_ids)
        return type(output)(logits=output.logits + self.shift) if self.on else output

    @contextmanager
    def disable_adapter(self):
        self.on = False
        self.shift.requires_grad_(False)
        try:
            yield
        finally:
            self.on = True
            self.shift.requires_grad_(True)


def test_the_adapter_off_is_the_reference() -> None:
    base, batch = cases.causal("gpt_neox"), cases.batch(LENGTHS)
    model = Adapted(base)
    model.shift.requires_grad_(False)
    rows, _ = dense(model, base, batch)
    loss, params = fa.causal_lm_loss(model, kind="kl", modules="*layers*")
    assert worst(fa.per_example_grad(loss, params, batch), rows) < 1e-5
    assert model.on
    assert not model.shift.requires_grad


@pytest.mark.skipif(not importlib.util.find_spec("peft"), reason="peft is not installed")
def test_a_lora_adapter_of_peft() -> None:
    import peft

    base, batch = cases.causal("llama"), cases.batch(LENGTHS)
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(copy.deepcopy(base), config).eval()
    required = {name: p.requires_grad for name, p in model.named_parameters()}
    double, other = copy.deepcopy(model).double(), base
    rows, losses = dense(double, other, batch)
    loss, params = fa.causal_lm_loss(model, kind="kl", modules="*lora*")
    assert loss.model.prefix == "base_model.model.model"
    bound = fa.compose(fa.per_example_grad, fa.select(["*"])).bind(loss, params)(batch)
    assert worst(bound.grads, rows) < 1e-5
    torch.testing.assert_close(bound.losses.double(), losses, rtol=1e-4, atol=1e-6)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == required


def test_an_advantage_multiplies_the_loss() -> None:
    model, batch = cases.causal("gpt2"), cases.batch(LENGTHS)
    advantage = torch.tensor([1.0, -2.0, 0.0, 0.5])
    for reduction in ("sum", "mean"):
        loss, params = fa.causal_lm_loss(model, reduction=reduction)
        plain = fa.compose(fa.per_example_grad, fa.project(4)).bind(loss, params)
        without, weighted = plain(batch), plain(batch | {"advantage": advantage})
        torch.testing.assert_close(weighted.losses, without.losses * advantage)
        for name, grads in without.grads.items():
            torch.testing.assert_close(weighted.grads[name], grads * advantage[:, None, None])


def test_no_logits_of_either_model_are_in_memory() -> None:
    hidden, weight = torch.randn(4, 512, 8, requires_grad=True), torch.randn(1000, 8)
    reference = Reference(torch.randn(4, 512, 16), torch.randn(1000, 16))
    target = torch.randint(0, 1000, (4, 512))
    with tensor_sizes() as made:
        linear_cross_entropy(hidden, weight, target, head=Head(kind="kl"), reference=reference).sum().backward()
    assert max(made) <= 128 * 1000
