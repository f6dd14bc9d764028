"""Per-example gradients in a plain loop: against a loop over examples, and with the model left as it was."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils import checkpoint

import funcattrib as fa
from funcattrib import testing as laws
from funcattrib.kernels.experts import expert_linear
from funcattrib.lift import Lifted, TwoSided
from funcattrib.lift.rules import RULES
from funcattrib.training import GradientCollector, capture_gradients, token_mean
from tests.support import cases, tiny

EVERY = cases.swept(name for name in (*cases.CAUSAL, cases.TIED) if name != "mamba")
LENGTHS = (9, 5, 12, 2)


def fresh(name: str = "gpt_neox", training: bool = True) -> nn.Module:
    model = copy.deepcopy(cases.causal(name)).train(training)
    for module in model.modules():  # a loop over examples cannot draw the same masks
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout") and isinstance(module.attention_dropout, float):
            module.attention_dropout = 0.0
    return model


def summed(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    logits = model(input_ids=batch["input_ids"]).logits[:, :-1].flatten(0, 1)
    return nn.functional.cross_entropy(logits.float(), batch["labels"][:, 1:].flatten(), reduction="sum")


def loop(model: nn.Module, batch: dict[str, Tensor], names: list[str], loss=summed) -> dict[str, Tensor]:
    """Gradients of each example's own summed loss, one backward pass an example, in float64."""
    double = copy.deepcopy(model).double()
    if double._can_set_experts_implementation():
        double.set_experts_implementation("eager")
    rows = []
    for row in range(len(batch["input_ids"])):
        double.zero_grad()
        loss(double, {name: value[row : row + 1] for name, value in batch.items()}).backward()
        rows.append({n: p.grad.clone() for n, p in double.named_parameters() if n in names})
    return {name: torch.stack([row[name] for row in rows]) for name in names}


def expected(model: nn.Module, batch: dict[str, Tensor], names: list[str], *stages: object) -> dict[str, Tensor]:
    grads = loop(model, batch, names)
    chain = fa.compose(*stages)
    return chain.apply(chain.init({n: fa.Leaf(tuple(g.shape[1:]), g.dtype) for n, g in grads.items()})[0], grads)


def compare(ours: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float = 1e-4) -> None:
    laws.close({name: value.double() for name, value in ours.items()}, wanted, tolerance)


def unaltered(model: nn.Module, now: Tensor, before: Tensor) -> bool:
    """Bit for bit; to rounding where experts are read, which takes a forward of their own."""
    if "experts" not in "".join(name for name, _ in model.named_parameters()):
        return torch.equal(now, before)
    return torch.allclose(now, before, rtol=1e-4, atol=1e-5)


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", EVERY)
def test_rows_are_those_of_a_loop_and_the_backward_pass_keeps_its_bits(name: str) -> None:
    model, batch = fresh(name), cases.batch(LENGTHS)
    plain = summed(model, batch)
    plain.backward()
    unchanged = bits(model)
    model.zero_grad()
    before, own = tiny.state_bytes(model), dict(vars(model))
    with capture_gradients(model, fa.compose(fa.project(3))) as grads:
        assert not grads
        loss = summed(model, batch)
        loss.backward()
    compare(grads, expected(model, batch, list(grads), fa.project(3)))
    assert unaltered(model, loss, plain)
    assert all(unaltered(model, g, unchanged[n]) for n, g in bits(model).items())
    assert bits(model).keys() == unchanged.keys()
    assert vars(model) == own
    assert all(torch.equal(tensor, before[n]) for n, tensor in model.state_dict().items())
    assert all(type(parameter) is nn.Parameter for parameter in model.parameters())


def test_every_kind_of_parameter() -> None:
    model, batch = fresh("gpt2"), cases.batch(LENGTHS)
    with capture_gradients(model, fa.compose(fa.project(3)), modules="all", exclude=["transformer.wpe*"]) as grads:
        summed(model, batch).backward()
    assert "transformer.wte.weight" in grads
    compare(grads, expected(model, batch, list(grads), fa.project(3)))


def test_a_mean_over_tokens_is_undone() -> None:
    model, batch = fresh(), cases.batch(LENGTHS)
    with capture_gradients(
        model, fa.compose(fa.project(3), fa.unit_norm), loss_scale=token_mean(batch["labels"])
    ) as normed:
        model(**batch).loss.backward()
    with capture_gradients(model, fa.compose(fa.project(3)), loss_scale=token_mean(batch["labels"])) as grads:
        (model(**batch).loss).backward()
    compare(grads, expected(model, batch, list(grads), fa.project(3)))
    compare(normed, expected(model, batch, list(grads), fa.project(3), fa.unit_norm))


CHAINS = {
    "whole": (fa.select("*"),),
    "project": (fa.project(3),),
    "sketch": (fa.sketch(12),),
    "project unit_norm cast": (fa.project(3), fa.unit_norm(), fa.cast("float16")),
}


@pytest.mark.parametrize("chain", CHAINS)
def test_chains_with_a_closure_and_without(chain: str) -> None:
    model, batches = fresh("llama"), [cases.batch(LENGTHS), cases.batch((4, 7), seed=2), cases.batch((3,), seed=3)]
    arrived: dict[str, list[Tensor]] = {}
    closure = GradientCollector(
        model, fa.compose(*CHAINS[chain]), lambda name, rows: arrived.setdefault(name, []).append(rows.clone())
    )
    with GradientCollector(model, fa.compose(*CHAINS[chain])) as kept:
        for batch in batches:
            summed(model, batch).backward()
            with torch.no_grad():
                summed(model, batch)  # an evaluation in between
    with closure:
        for batch in batches:
            summed(model, batch).backward()
    assert closure.grads == {}
    names = [n for n, p in model.named_parameters() if n.startswith("model.layers") and p.ndim == 2]
    wanted = [expected(model, batch, names, *CHAINS[chain]) for batch in batches]
    together = {name: torch.cat([each[name] for each in wanted]).double() for name in wanted[0]}
    tolerance = 1e-3 if "cast" in chain else 1e-4
    compare(kept.grads, together, tolerance)
    compare({name: torch.cat(arrived[name]) for name in together}, together, tolerance)
    assert arrived.keys() == together.keys()


def test_a_closure_has_each_weight_as_backward_reaches_it() -> None:
    model, batch = fresh("llama"), cases.batch(LENGTHS)
    seen: list[tuple[str, bool]] = []
    first = "model.layers.0.self_attn.q_proj.weight"
    weight = dict(model.named_parameters())[first]
    with GradientCollector(model, None, lambda name, rows: seen.append((name, weight.grad is None))):
        summed(model, batch).backward()
        assert len(seen) == 14
    assert seen[0] == ("model.layers.1.mlp.down_proj.weight", True)  # long before the first layer's weight has its own


def test_two_losses_and_one_backward_pass() -> None:
    model, one, two = fresh(), cases.batch(LENGTHS), cases.batch((6, 3), seed=5)
    with GradientCollector(model) as collector:
        (summed(model, one) + summed(model, two)).backward()
    names = list(collector.grads)
    wanted = [expected(model, batch, names, fa.project(16)) for batch in (one, two)]
    compare(collector.grads, {name: torch.cat([each[name] for each in wanted]) for name in names})


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["gpt_neox", "gpt2", "llama_tied", "mixtral"])
def test_gradient_checkpointing(name: str, reentrant: bool) -> None:
    model, batch = fresh(name), cases.batch((9, 9, 9))
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    model.config.use_cache = False
    plain = summed(model, batch)
    plain.backward()
    unchanged, functions = bits(model), [vars(m).get("_gradient_checkpointing_func") for m in model.modules()]
    model.zero_grad()
    with capture_gradients(model, fa.compose(fa.project(3))) as grads:
        loss = summed(model, batch)
        loss.backward()
    assert unaltered(model, loss, plain)
    assert all(unaltered(model, g, unchanged[n]) for n, g in bits(model).items())
    assert functions == [vars(m).get("_gradient_checkpointing_func") for m in model.modules()]
    model.activation_checkpointing_disable()
    compare(grads, expected(model, batch, list(grads), fa.project(3)))


class Own(nn.Module):
    """A model that checkpoints a layer itself."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.first, self.second, self.reentrant = nn.Linear(4, 4), nn.Linear(4, 4), reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint.checkpoint(self.second, self.first(x).tanh(), use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_of_the_models_own_is_never_silently_wrong(reentrant: bool) -> None:
    model, x = Own(reentrant), torch.randn(3, 4)
    expected_error = fa.FuncattribError if reentrant else checkpoint.CheckpointError
    with pytest.raises(expected_error), capture_gradients(model, modules=["*.weight"]):
        model(x).square().sum().backward()
    with capture_gradients(model, modules=["first.weight"]) as grads:
        model(x).square().sum().backward()
    assert list(grads) == ["first.weight"]


def test_mixtures_of_experts_set_and_restore_their_forward() -> None:
    model, batch = fresh("mixtral"), cases.batch((9, 9, 9), masked=False)
    before = model.config._experts_implementation
    with capture_gradients(
        model, fa.compose(fa.project(3)), modules=["*experts*", "*q_proj*", "*mlp.gate.weight"]
    ) as grads:
        assert model.config._experts_implementation == "funcattrib"
        summed(model, batch).backward()
    assert model.config._experts_implementation == before
    compare(grads, expected(model, batch, list(grads), fa.project(3)))
    with pytest.raises(ZeroDivisionError), capture_gradients(model, modules=["*experts*"]):
        raise ZeroDivisionError
    assert model.config._experts_implementation == before


def test_frozen_weights_and_a_model_in_evaluation() -> None:
    model, batch = fresh(training=False).requires_grad_(False), cases.batch(LENGTHS)
    with capture_gradients(model, fa.compose(fa.project(3))) as grads:
        summed(model, batch).backward()
    assert not bits(model)
    compare(grads, expected(model.requires_grad_(True), batch, list(grads), fa.project(3)))


def test_by_default_what_is_trained() -> None:
    model, batch = fresh(), cases.batch(LENGTHS)
    model.gpt_neox.layers[0].requires_grad_(False)
    with capture_gradients(model) as grads:
        summed(model, batch).backward()
    assert all(name.startswith("gpt_neox.layers.1") for name in grads)


def test_the_model_is_left_as_it_was_after_an_exception() -> None:
    model, batch = fresh("gpt2"), cases.batch(LENGTHS)
    own, before = dict(vars(model)), tiny.state_bytes(model)
    with pytest.raises(ZeroDivisionError), capture_gradients(model):
        summed(model, batch).backward()
        raise ZeroDivisionError
    with pytest.raises(IndexError), GradientCollector(model):
        model(input_ids=torch.tensor([[10_000]]))
    assert vars(model) == own
    assert all(torch.equal(tensor, before[n]) for n, tensor in model.state_dict().items())
    assert all(type(parameter) is nn.Parameter for parameter in model.parameters())
    with pytest.raises(fa.FuncattribError, match="there was no forward pass"), capture_gradients(model):
        pass
    with pytest.raises(fa.FuncattribError, match="there was no backward pass"), capture_gradients(model):
        summed(model, batch)
    with (
        pytest.raises(fa.ChainError, match="adafactor_norm must be fitted"),
        capture_gradients(model, fa.compose(fa.adafactor_norm)),
    ):
        pass


def test_tokens_gathered_across_examples_are_refused() -> None:
    class Gathers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.layer(nn.functional.one_hot(input_ids, 4).float()[input_ids > 0])

    model = Gathers()
    with pytest.raises(fa.ChainError, match="gathers tokens across examples"), capture_gradients(model, modules=["*"]):
        model(torch.tensor([[1, 2, 0], [1, 0, 0]]))


def test_experts_whose_tokens_need_not_be_in_order_are_refused() -> None:
    weight = torch.randn(3, 4, 4)
    for tokens, count in ((None, 6), (2, 6), (4, 4)):
        leaf = Lifted(weight, torch.zeros(2, 3, 4, 4), TwoSided(), RULES, tokens)
        with pytest.raises(fa.ChainError, match="tokens of 2 examples of equal length"):
            expert_linear(torch.randn(count, 4), leaf, torch.zeros(count, dtype=torch.long))
