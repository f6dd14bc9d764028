"""Per-token rows: against factors caught by hooks in float64, and their sum against the examples' gradients."""

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn

import funcattrib as fa
from funcattrib import testing as laws
from funcattrib.errors import ChainError
from tests.models.test_families import InFloat64
from tests.support import cases
from tests.support.sweeps import crossed

CHAINS = {
    "plain": (),
    "itself": (fa.select("*"),),
    "project": (fa.project(4),),
    "sketch": (fa.sketch(16),),
    "project sketch": (fa.project(4), fa.sketch(16)),
}
MODELS = ["gpt_neox", "gpt2", "llama", cases.TIED]


@pytest.mark.parametrize(("model", "chain"), crossed(MODELS, CHAINS))
def test_rows_add_up_to_the_examples(model: str, chain: str) -> None:
    batch = cases.batch()
    loss, params = fa.causal_lm_loss(cases.causal(model), modules="all")
    if model == "gpt2":  # wpe is looked up once, for all examples alike
        loss, params = fa.causal_lm_loss(cases.causal(model), modules="all", exclude=["*wpe*"])
    bound = fa.compose(fa.per_token_grad, *CHAINS[chain]).bind(loss, params)(batch)
    whole = fa.compose(fa.per_example_grad, *CHAINS[chain]).bind(loss, params)(batch)
    examples, tokens = batch["input_ids"].shape
    laws.close({n: g.unflatten(0, (examples, tokens)).sum(1) for n, g in bound.grads.items()}, whole.grads, 1e-4)
    torch.testing.assert_close(bound.losses, whole.losses.repeat_interleave(tokens))


def by_hooks(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Name → (B, T, *shape) in float64: what passed through each layer, and the gradient that came back."""
    double = copy.deepcopy(model).double()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        double.set_attn_implementation("eager")
    caught: dict[str, list[Tensor]] = {}
    tokens = batch["input_ids"].shape[1]

    def forward(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        x = args[0].detach()
        output.register_hook(lambda g: into[module].append(formed(module, x[0], g[0])))

    def formed(module: nn.Module, x: Tensor, g: Tensor) -> Tensor:
        if isinstance(module, nn.Embedding):
            x, g = g, torch.nn.functional.one_hot(x, module.num_embeddings).to(g.dtype)
        each = torch.einsum("to,ti->toi", g, x)
        return torch.cat([each, each.new_zeros(tokens - len(each), *each.shape[1:])])

    into: dict[nn.Module, list[Tensor]] = {}
    for name, module in double.named_modules():
        if isinstance(module, (nn.Linear, nn.Embedding)) and "rotary" not in name:
            into[module] = caught[f"{name}.weight"] = []
            module.register_forward_hook(forward)
    for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        length = int(ids.count_nonzero())
        with InFloat64():
            z, y = double(input_ids=ids[None, :length], use_cache=False).logits[0, :-1], labels[1:length]
        torch.nn.functional.cross_entropy(z, y, reduction="sum").backward()
    return {name: torch.stack(rows) for name, rows in caught.items()}


@pytest.mark.parametrize("model", ["gpt_neox", "llama"])
def test_matrices_head_and_embedding_are_what_hooks_catch(model: str) -> None:
    batch = cases.batch()
    expected = by_hooks(cases.causal(model), batch)
    loss, params = fa.causal_lm_loss(cases.causal(model), modules=list(expected))
    assert params.keys() == expected.keys()
    assert any("lm_head" in n or "embed_out" in n for n in params)
    assert any("embed_" in n for n in params)
    expected = {name: expected[name].flatten(0, 1) for name in params}
    ours = fa.per_token_grad(loss, params, batch)
    laws.close({n: g.double() for n, g in ours.items()}, expected, 1e-4)
    chain = fa.compose(fa.per_token_grad, fa.adafactor_norm, fa.project(4), fa.unit_norm)
    state = chain.fit(loss, params, [batch])
    laws.close(
        {n: g.double() for n, g in chain(loss, params, batch, state).items()}, chain.apply(state, expected), 1e-3
    )


def test_heads_of_tokens_add_up_to_heads_of_examples() -> None:
    model, batch = cases.causal("llama"), cases.batch()
    loss, params = fa.causal_lm_loss(model, modules=["*self_attn*"])
    stages = (fa.split_heads(fa.attention_configs(model)), fa.project(3))
    ours = fa.compose(fa.per_token_grad, *stages)(loss, params, batch)
    whole = fa.compose(fa.per_example_grad, *stages)(loss, params, batch)
    laws.close({n: g.unflatten(0, (4, -1)).sum(1) for n, g in ours.items()}, whole, 1e-4)


def test_rows_of_padding_and_of_unlabelled_ends_are_zero() -> None:
    batch = cases.batch((9, 5))
    loss, params = fa.causal_lm_loss(cases.causal("llama"))
    for grad in fa.compose(fa.per_token_grad, fa.project(4), fa.unit_norm)(loss, params, batch).values():
        rows = grad.unflatten(0, (2, 9)).flatten(2)
        assert not rows[1, 5:].any()
        assert not rows[0, 8].any()  # nothing is predicted from the last token
        assert rows[0, 7].any()


REFUSED = {
    "a norm over each head": ("qwen3", "*q_norm*"),
    "a convolution": ("mamba", "*conv1d.weight"),
    "experts": ("mixtral", "*experts*"),
    "an operation without a rule": ("mamba", "*A_log"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    model, modules = REFUSED[case]
    loss, params = fa.causal_lm_loss(cases.causal(model), modules=[modules])
    with pytest.raises(ChainError, match="used once at each token"):
        fa.per_token_grad(loss, params, cases.batch())


def test_a_batch_without_tokens_is_refused() -> None:
    with pytest.raises(fa.FuncattribError, match="input_ids"):
        fa.per_token_grad(lambda params, example: params["w"].sum(), {"w": torch.ones(2)}, {"x": torch.ones(3, 2)})
