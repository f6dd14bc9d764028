"""Taking models apart: which parameters are chosen, and that the model is left alone."""

import pytest
import torch

import funcattrib as fa
from funcattrib.functional import choose
from tests import cases


def test_globs_choose_by_name() -> None:
    model = cases.causal("llama")
    assert choose(model, ["*.mlp.*"]) == {n for n, _ in model.named_parameters() if ".mlp." in n}
    assert choose(model, ["*.mlp.*"], ["*layers.1.*"]) == {n for n, _ in model.named_parameters() if "0.mlp." in n}
    assert choose(model, "all") == {n for n, _ in model.named_parameters()}


def test_a_tied_parameter_answers_to_both_names() -> None:
    model = cases.causal("llama_tied")
    assert choose(model, ["lm_head.weight"]) == choose(model, ["model.embed_tokens.weight"])


@pytest.mark.parametrize(
    ("modules", "exclude", "message"),
    [
        (["*.mlp.*", "embed_out.weight"], [], "'embed_out.weight', found none; did you mean"),
        (None, ["*.atention.*"], r"'\*.atention.\*', found none"),
        (["*.mlp.*"], ["*layers*"], "found none; name some with --modules"),
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
