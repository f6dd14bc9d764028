"""A chain's state, fitted alone and given to a build."""

import pytest
import torch

import funcattrib as fa
from funcattrib.chain import fitting, state_tree
from funcattrib.runs.collect import collect_gradients, fit_chain
from tests.support import cases
from tests.support.store_run import contents

ROWS = [{"input_ids": [3, 5, 7, 9, 11, 2][: 2 + i % 5]} for i in range(12)]
COMMON = {"normalizer": "adafactor", "projection_dim": 4, "quiet": True, "dtype": "float32"}


def test_rows_with_a_given_state_are_those_of_a_build_that_fits(tmp_path) -> None:
    model = cases.causal("gpt_neox")
    alone = collect_gradients(model, ROWS, path=tmp_path / "alone", **COMMON)
    fitted = fit_chain(model, ROWS, path=tmp_path / "state", **COMMON)
    assert len(fitted) == 0
    given = collect_gradients(model, ROWS, path=tmp_path / "given", state=fitted.path, **COMMON)
    assert torch.equal(alone.matrix().tensor(), given.matrix().tensor())
    again = fit_chain(model, ROWS, path=tmp_path / "state", **COMMON)  # complete: nothing is fitted twice
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
    fitted = fit_chain(cases.causal("gpt_neox"), ROWS, path=tmp_path / "state", **COMMON)
    with pytest.raises(fa.ChainError, match=f"does not fit the {what} of this run"):
        collect_gradients(cases.causal(name), ROWS, path=tmp_path / "run", state=fitted.path, **{**COMMON, **settings})


TWO_PASSES = {**COMMON, "precondition": "parameter", "token_batch_size": 12, "rows_per_shard": 5}


def observed(monkeypatch: pytest.MonkeyPatch, dies_at: int | None = None) -> list[str]:
    """The name of the stage of every batch that is folded into a state; dies before that of number ``dies_at``."""
    seen: list[str] = []
    build = fitting.bind_observed

    def watched(source, stages, *rest):
        read = build(source, stages, *rest)

        def counted(batch):
            if len(seen) == dies_at:
                raise KeyboardInterrupt
            seen.append(stages[-1].name)
            return read(batch)

        return counted

    monkeypatch.setattr(fitting, "bind_observed", watched)
    return seen


@pytest.mark.parametrize("collect", [fit_chain, collect_gradients])
def test_a_fit_that_was_killed_goes_on_with_the_pass_it_was_in(collect, tmp_path, monkeypatch) -> None:
    model = cases.causal("gpt_neox")
    with monkeypatch.context() as patched:
        whole = observed(patched)
        collect(model, ROWS, path=tmp_path / "whole", **TWO_PASSES)
    batches = len(whole) // 2
    assert whole == ["adafactor_norm"] * batches + ["precondition"] * batches
    assert batches > 2
    again: list[str] = []
    for dies_at in (batches - 1, batches + 1, None):  # in the first pass, in the second after the first anew, never
        with monkeypatch.context() as patched:
            seen = observed(patched, dies_at)
            if dies_at is None:
                collect(model, ROWS, path=tmp_path / "run", **TWO_PASSES)
            else:
                with pytest.raises(KeyboardInterrupt):
                    collect(model, ROWS, path=tmp_path / "run", **TWO_PASSES)
            again.append("".join(name[2] for name in seen))
    assert again == ["a" * (batches - 1), "a" * batches + "e", "e" * batches]
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")
    with monkeypatch.context() as patched:
        seen = observed(patched)
        collect(model, ROWS, path=tmp_path / "run", **TWO_PASSES)
    assert not seen


def test_an_interrupted_fit_is_no_state_yet(tmp_path, monkeypatch) -> None:
    model = cases.causal("gpt_neox")
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        observed(patched, 8)
        fit_chain(model, ROWS, path=tmp_path / "state", **TWO_PASSES)
    with (
        pytest.raises(fa.ChainError, match=r"the state at .* is unfinished"),
        pytest.warns(UserWarning, match="unfinished"),
    ):
        collect_gradients(model, ROWS, path=tmp_path / "run", state=tmp_path / "state", **TWO_PASSES)
    assert not (tmp_path / "run").exists()
    # Another run in its place starts at the first pass.
    seen = observed(monkeypatch)
    fit_chain(model, ROWS, path=tmp_path / "state", overwrite=True, **{**TWO_PASSES, "damping": 0.2})
    assert seen.count("adafactor_norm") == seen.count("precondition") > 0


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


@pytest.mark.parametrize("fitted", [fa.adafactor_norm, fa.adam_norm, fa.precondition])
def test_examples_without_a_finite_loss_are_passed_over(fitted) -> None:
    def loss(params, example):
        return (params["w"] @ example["x"]).square().sum()

    params, nan = {"w": torch.ones(2, 3)}, float("nan")
    rows = [[1.0, 2.0, 3.0], [nan, 1.0, 1.0], [0.0, 1.0, -1.0], [4.0, 4.0, 1.0]]
    chain = fa.compose(fa.per_example_grad, fitted)
    some = chain.fit(loss, params, [{"x": torch.tensor(rows[:2])}, {"x": torch.tensor(rows[2:])}])
    without = chain.fit(loss, params, [{"x": torch.tensor([rows[0], *rows[2:]])}])
    for found, expected in zip(state_tree.flatten(some).values(), state_tree.flatten(without).values(), strict=True):
        torch.testing.assert_close(found, expected)
    with pytest.raises(fa.ChainError, match="cannot be fitted: no example has a finite loss and gradient"):
        chain.fit(loss, params, [{"x": torch.tensor(rows[1:2])}])


def overflowing(params, example):
    """A finite loss whose gradient is infinite where x is 0."""
    return (params["w"] @ example["x"]).sum() + (params["w"].sum() - 6 + example["x"][2]).abs().sqrt()


@pytest.mark.parametrize("fitted", [fa.adafactor_norm, fa.adam_norm, fa.precondition])
def test_examples_whose_gradient_overflows_are_passed_over_and_named(fitted, tmp_path, caplog) -> None:
    params = {"w": torch.ones(2, 3)}
    rows = [{"x": x} for x in ([1.0, 2.0, 3.0], [1.0, 1.0, 0.0], [0.0, 1.0, -1.0], [4.0, 4.0, 1.0])]
    settings = {"chain": fa.compose(fa.per_example_grad, fitted), "dtype": "float32"}
    some = fa.collect_gradients((overflowing, params), rows, path=tmp_path / "some", **settings)
    without = fa.collect_gradients((overflowing, params), rows[:1] + rows[2:], path=tmp_path / "without", **settings)
    for name, found in some.state().items():
        torch.testing.assert_close(found, without.state()[name])
    assert "the fitted state leaves out documents whose gradient is NaN or infinite: 1 row: 1" in caplog.text
    assert "the gradient is NaN or infinite in 1 row: 1; they come last in a search" in caplog.text
