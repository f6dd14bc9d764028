"""A chain's state, fitted alone and given to a build."""

import pytest
import torch

import funcattrib as fa
from funcattrib.recipes.collect import collect_gradients, fit_gradients
from tests import cases

ROWS = [{"input_ids": [3, 5, 7, 9, 11, 2][: 2 + i % 5]} for i in range(12)]
COMMON = {"normalizer": "adafactor", "projection_dim": 4, "quiet": True, "dtype": "float32"}


def test_rows_with_a_given_state_are_those_of_a_build_that_fits(tmp_path) -> None:
    model = cases.causal("gpt_neox")
    alone = collect_gradients(model, ROWS, path=tmp_path / "alone", **COMMON)
    fitted = fit_gradients(model, ROWS, path=tmp_path / "state", **COMMON)
    assert len(fitted) == 0
    given = collect_gradients(model, ROWS, path=tmp_path / "given", state=fitted.path, **COMMON)
    assert torch.equal(alone.matrix().tensor(), given.matrix().tensor())
    again = fit_gradients(model, ROWS, path=tmp_path / "state", **COMMON)  # complete: nothing is fitted twice
    assert again.manifest.state == fitted.manifest.state


@pytest.mark.parametrize(
    ("what", "name", "settings"),
    [
        ("model", "gpt2", {}),
        ("chain", "gpt_neox", {"projection_dim": 5}),
        ("leaves", "gpt_neox", {"modules": ["*dense.weight"]}),
    ],
)
def test_a_state_that_does_not_fit_is_refused_by_name(what, name, settings, tmp_path) -> None:
    fitted = fit_gradients(cases.causal("gpt_neox"), ROWS, path=tmp_path / "state", **COMMON)
    with pytest.raises(fa.ChainError, match=f"a state for this {what}"):
        collect_gradients(cases.causal(name), ROWS, path=tmp_path / "run", state=fitted.path, **{**COMMON, **settings})


def test_a_loss_of_ones_own_fills_a_store(tmp_path) -> None:
    model, batch = cases.regressor(), cases.regression_batch()
    parts = fa.functionalize(model)

    def loss(params, example):
        predicted = parts.call(params, example["input_ids"][None], example["attention_mask"][None])
        return (predicted[0] - example["target"]).square()

    examples = [
        {
            "input_ids": batch["input_ids"][i, :n].tolist(),
            "attention_mask": [1] * n,
            "target": float(batch["target"][i]),
        }
        for i, n in enumerate((7, 4, 10))
    ]
    store = collect_gradients((loss, parts.params), examples, path=tmp_path / "run", **COMMON)
    chain = fa.compose(fa.per_example_grad, fa.adafactor_norm, fa.project(4))
    state = chain.fit(loss, parts.params, [batch])
    expected = chain(loss, parts.params, batch, state)
    for name, grads in expected.items():
        torch.testing.assert_close(store.gradients(name), grads, rtol=1e-4, atol=1e-4 * float(grads.abs().max()))
    found = fa.Attributor(store.path, unit_norm=True).search(expected, k=1)
    assert found.rows[:, 0].tolist() == [0, 1, 2]
