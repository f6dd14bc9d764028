"""Taking models apart: which parameters are chosen, and that the model is left alone."""

import pytest
import torch

import funcattrib as fa
from funcattrib.models.selection import choose
from tests.support import cases


def test_globs_choose_by_name() -> None:
    model = cases.causal("llama")
    assert choose(model, ["*.mlp.*"]) == {n for n, _ in model.named_parameters() if ".mlp." in n}
    assert choose(model, ["*.mlp.*"], ["*layers.1.*"]) == {n for n, _ in model.named_parameters() if "0.mlp." in n}
    assert choose(model, "all") == {n for n, _ in model.named_parameters()}


LEFT_OUT = ("embed", "lm_head", "norm", "wte", "wpe", "ln_", "bias", "A_log", ".D", "conv1d")


@pytest.mark.parametrize("name", cases.EVERY)
def test_by_default_the_matrices_of_the_blocks(name) -> None:
    model = cases.causal(name)
    chosen = {n for n, _ in model.named_parameters() if not any(part in n for part in LEFT_OUT)}
    assert choose(model) == chosen
    kinds = {n.rpartition(".layers.0.")[2]: p.ndim for n, p in model.named_parameters() if n in chosen and ".0." in n}
    mixtures = {"mlp.experts.gate_up_proj": 3, "mlp.experts.down_proj": 3, "mlp.gate.weight": 2}
    if name in ("mixtral", "qwen3_moe"):
        assert kinds == {f"self_attn.{x}_proj.weight": 2 for x in "qkvo"} | mixtures
    else:
        assert set(kinds.values()) == {2}
        linear = {f"{n}.weight" for n, m in model.named_modules() if type(m).__name__ in ("Linear", "Conv1D")}
        assert chosen <= linear


def test_a_tied_parameter_answers_to_both_names() -> None:
    model = cases.causal("llama_tied")
    assert choose(model, ["lm_head.weight"]) == choose(model, ["model.embed_tokens.weight"])


@pytest.mark.parametrize(
    ("modules", "exclude", "message"),
    [
        (["*.mlp.*", "embed_out.weight"], [], "name matches 'embed_out.weight'; did you mean"),
        (None, ["*.atention.*"], r"name matches '\*.atention.\*'"),
        (["*.mlp.*"], ["*layers*"], "there are no parameters matching .*; name some with `modules`"),
    ],
)
def test_globs_that_choose_nothing_are_refused(modules, exclude, message) -> None:
    with pytest.raises(fa.FuncattribError, match=message):
        choose(cases.causal("llama"), modules, exclude)


def test_the_model_is_left_as_it_was() -> None:
    model = cases.causal("gpt2")
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    attention, cache, pad = model.config._attn_implementation, model.config.use_cache, model.config.pad_token_id
    parts = fa.functionalize(model)
    assert model.training
    assert not parts.skeleton.training
    model.eval()
    assert (model.config._attn_implementation, model.config.use_cache, model.config.pad_token_id) == (
        attention,
        cache,
        pad,
    )
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(
        p.data_ptr() == q.data_ptr() for p, q in zip(model.parameters(), parts.skeleton.parameters(), strict=True)
    )
    assert all(not tensor.requires_grad for tensor in (*parts.params.values(), *parts.frozen.values()))
