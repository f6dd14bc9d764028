"""Mixtures of experts: the kernel, the stacks of transformers' models, and one leaf an expert."""

import copy
import fnmatch

import pytest
import torch
import transformers
from torch import Tensor, nn

import funcattrib as fa
from funcattrib import testing as laws
from funcattrib.kernels.experts import NAME, expert_linear, expert_outer, register_experts
from funcattrib.lift.lifted import Lifted
from funcattrib.training.capture import collecting
from tests.models.test_families import loop, worst
from tests.support import cases
from tests.support.sweeps import crossed

MIXTURES = ["mixtral", "qwen3_moe"]
MODULES = ["*experts*", "*mlp.gate.weight", "*q_proj*"]


@pytest.mark.parametrize("transposed", [False, True])
def test_kernel_against_the_loop(transposed: bool) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(9, 3, dtype=torch.float64), torch.randn(4, 5, 3, dtype=torch.float64)
    expert = torch.tensor([0, 2, 2, 0, 3, 3, 3, 0, 2])  # nobody goes to 1
    stored = weight.mT.contiguous() if transposed else weight
    torch.testing.assert_close(
        expert_linear(x, stored, expert, transposed),
        torch.stack([weight[e] @ row for e, row in zip(expert, x, strict=True)]),
    )
    x.requires_grad_(), stored.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, w: expert_linear(x, w, expert, transposed), (x, stored))


def test_sums_of_outer_products_by_expert() -> None:
    torch.manual_seed(0)
    rows, cols, expert = torch.randn(3, 8, 2), torch.randn(3, 8, 4), torch.randint(0, 5, (3, 8))
    expected = torch.zeros(3, 5, 2, 4)
    for e in range(3):
        for s in range(8):
            expected[e, expert[e, s]] += torch.outer(rows[e, s], cols[e, s])
    torch.testing.assert_close(expert_outer(rows, cols, expert, 5), expected)


def gpt_oss() -> nn.Module:
    """Experts stored (in, out), with biases, gate and up interleaved, attention sinks."""
    torch.manual_seed(3)
    settings = cases.CAUSAL["llama"].settings
    config = transformers.GptOssConfig(**settings, num_local_experts=4, num_experts_per_tok=2, sliding_window=4)
    model = transformers.GptOssForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model


def test_transposed_experts_with_biases_against_the_float64_loop() -> None:
    model, batch = gpt_oss(), cases.batch()
    rows = loop(model, batch, "ce", "sum")
    loss, params = fa.causal_lm_loss(model, modules="all")
    assert worst(fa.per_example_grad(loss, params, batch), rows) < 1e-5
    assert worst(fa.compose(fa.per_example_grad, fa.select("*"))(loss, params, batch), rows) < 1e-5


CHAINS = {
    "project": (fa.project(3),),
    "adafactor_norm project": (fa.adafactor_norm(), fa.project(3)),
    "project adafactor_norm unit_norm": (fa.project(3), fa.adafactor_norm(), fa.unit_norm()),
    "adam_norm project": (fa.adam_norm(), fa.project(3)),
    "sketch": (fa.sketch(12),),
    "project split_experts": (fa.project(3), fa.split_experts()),
    "split_experts project": (fa.split_experts(), fa.project(3)),
    "project split_experts select": (fa.project(3), fa.split_experts(), fa.select(["*#e1", "*#e3"])),
    "split_experts select project adafactor_norm": (
        fa.split_experts(),
        fa.select(["*#e1", "*q_proj*"]),
        fa.project(3),
        fa.adafactor_norm(),
    ),
}


@pytest.mark.parametrize(("model", "name"), crossed(MIXTURES, CHAINS))
def test_chains_against_the_float64_loop(model: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        Lifted, "dense", lambda self, operation: pytest.fail(f"{operation} fell back to the dense form")
    )
    batch = cases.batch()
    loss, params = fa.causal_lm_loss(cases.causal(model), modules=MODULES)
    chain = fa.compose(fa.per_example_grad, *CHAINS[name])
    state = chain.fit(loss, params, [batch])
    rows = loop(cases.causal(model), batch, "ce", "sum")
    expected = chain.apply(state, {n: torch.stack([row[n] for row in rows]) for n in params})
    ours = chain(loss, params, batch, state)
    laws.close({n: g.double() for n, g in ours.items()}, expected, 1e-4)


def test_experts_share_the_projection_of_their_stack() -> None:
    values = laws.grads(3, laws.KERNELS)
    before, after = fa.compose(fa.project(3), fa.split_experts), fa.compose(fa.split_experts, fa.project(3))
    ours = before.apply(before.init(laws.KERNELS)[0], values)
    laws.close(ours, after.apply(after.init(laws.KERNELS)[0], values))
    assert [n for n in ours if "#" in n] == [f"mlp.experts.down_proj.weight#e{x}" for x in range(3)]


@pytest.mark.parametrize("model", MIXTURES)
def test_an_expert_that_no_token_went_to_has_zeros(model: str) -> None:
    batch = cases.batch((2, 9))
    loss, params = fa.causal_lm_loss(cases.causal(model), modules=["*experts*"])
    grads = fa.compose(fa.per_example_grad, fa.project(3))(loss, params, batch)
    for grad in grads.values():  # two tokens, of which one has a label behind it, reach two experts each
        reached = grad[0].flatten(1).any(1)
        assert 1 <= int(reached.sum()) <= 4
        assert grad.shape[1:] == (len(reached), 3, 3)


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("model", MIXTURES)
def test_batched_autograd(model: str, trained: bool) -> None:
    original = cases.causal(model)
    batch = cases.batch((9, 9, 9), masked=False)
    loss, params = fa.causal_lm_loss(original, modules=["*experts*"])
    chain = fa.compose(fa.per_example_grad, fa.project(3))
    expected = chain(loss, params, batch)
    net = copy.deepcopy(original).train(False).requires_grad_(trained)
    net.set_experts_implementation(register_experts())
    assert net.config._experts_implementation == NAME
    names = [name for name, _ in net.named_parameters() if fnmatch.fnmatch(name, "*experts*")]
    with collecting(net, dict.fromkeys(names), chain, chain.init(fa.per_example_grad.spec(params))[0]) as collected:
        logits = net(input_ids=batch["input_ids"], use_cache=False).logits[:, :-1]
        losses = torch.nn.functional.cross_entropy(
            logits.reshape(-1, cases.VOCABULARY), batch["labels"][:, 1:].reshape(-1), reduction="sum"
        )
        losses.backward()
    laws.close(collected.coordinates(), expected, 1e-4)
    if trained:
        whole = fa.per_example_grad(loss, params, batch)
        for name, parameter in net.named_parameters():
            if name in whole:
                torch.testing.assert_close(parameter.grad, whole[name].sum(0), rtol=1e-4, atol=1e-5)


def test_expert_parallelism_is_refused() -> None:
    from funcattrib.kernels.experts import _interface

    class Experts:
        _is_expert_parallel = True

    empty = torch.zeros(1, 1)
    with pytest.raises(fa.FuncattribError, match="expert parallelism"):
        _interface(Experts(), empty, empty, empty)


def mixtures_have_stacks() -> dict[str, Tensor]:
    return {n: p for n, p in cases.causal("mixtral").named_parameters() if "experts" in n}


def test_transformers_stores_experts_as_stacks() -> None:
    assert {p.ndim for p in mixtures_have_stacks().values()} == {3}
