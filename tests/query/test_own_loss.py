"""Stores of a loss of one's own: asked with (loss, params), never looked up by name, and not mixed with edited code."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import funcattrib as fa
from funcattrib.store import GradientStore

DATA = [{"x": [1.0, 2.0]}, {"x": [3.0, -1.0]}, {"x": [0.5, 0.5]}]


def loss(params: dict, example: dict) -> torch.Tensor:
    return (params["w"] * example["x"]).sum() ** 2


def edited(params: dict, example: dict) -> torch.Tensor:
    return 100 * (params["w"] * example["x"]).sum() ** 2


def params(value: float = 1.0) -> dict[str, torch.Tensor]:
    return {"w": torch.full((2,), value)}


def build(run: Path, model: tuple, **settings: object) -> GradientStore:
    return fa.collect_gradients(model, DATA, path=run, **{"dtype": "float32", "quiet": True, **settings})


def own(function: Callable) -> fa.Chain:
    stage = fa.Transform("mine", apply=lambda state, grads: {name: function(grad) for name, grad in grads.items()})
    return fa.compose(fa.per_example_grad, stage)


def refused(message: str, function: Callable) -> None:
    with pytest.raises(fa.FuncattribError, match=message) as caught:
        function()
    assert str(caught.value).count("\n") <= 1


@pytest.mark.parametrize("settings", [{}, {"projection_dim": 2}, {"normalizer": "adafactor", "projection_dim": 0}])
def test_asked_with_the_loss_and_its_parameters(tmp_path: Path, settings: dict) -> None:
    rows = build(tmp_path, (loss, params()), **settings).matrix().tensor()
    found = fa.Attributor(tmp_path, model=(loss, params()))
    torch.testing.assert_close(found.gradients(DATA), rows)
    assert [hits[0].score for hits in found.ask(DATA, 1)] == pytest.approx((rows @ rows.T).amax(1).tolist())


def test_never_looked_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, funcattrib) -> None:
    build(tmp_path, (loss, params()))
    monkeypatch.setattr("funcattrib.models.locate.hub_reachable", lambda: pytest.fail("the hub was asked"))
    message = "made with a loss and parameters in Python, which cannot be loaded by name"
    refused(message, lambda: fa.Attributor(tmp_path).ask(DATA, 1))
    ran = funcattrib("query", "--index", tmp_path, "--text", "x")
    assert ran.code != 0
    assert message in ran.err


def test_what_does_not_fit_the_store(tmp_path: Path) -> None:
    build(tmp_path, (loss, params()))
    ask = {
        "expected the model that made the store": (loss, params(2.0)),
        "the loss is not the one that made the store": (edited, params()),
    }
    for message, model in ask.items():
        refused(message, lambda model=model: fa.Attributor(tmp_path, model=model).ask(DATA, 1))
    refused("found a text", lambda: fa.Attributor(tmp_path, model=(loss, params())).ask(["text"], 1))


def test_an_edited_loss_makes_another_run(tmp_path: Path) -> None:
    rows = build(tmp_path, (loss, params())).matrix().tensor()
    torch.testing.assert_close(build(tmp_path, (loss, params())).matrix().tensor(), rows)
    refused(r"holds another run: loss\.code\.sha256: expected", lambda: build(tmp_path, (edited, params())))
    again = build(tmp_path, (edited, params()), overwrite=True)
    torch.testing.assert_close(again.matrix().tensor(), 100 * rows)


def test_an_edited_transform_makes_another_run(tmp_path: Path) -> None:
    model = (loss, params())
    rows = build(tmp_path, model, chain=own(torch.sign)).matrix().tensor()
    torch.testing.assert_close(build(tmp_path, model, chain=own(torch.sign)).matrix().tensor(), rows)
    other = own(lambda x: 0 * x)
    refused(r"holds another run: chain: expected mine\(code=\w{12}\), f", lambda: build(tmp_path, model, chain=other))
    refused("expected the chain that made the store", lambda: fa.Attributor(tmp_path, model=model, chain=other))
    scores = {"path": tmp_path / "out", "query_stores": tmp_path, "chain": other, "quiet": True}
    refused("differ in their chain", lambda: fa.score_gradients(model, DATA, **scores))
    refused(
        "a transform of the user.s, which no manifest can rebuild",
        lambda: fa.Attributor(tmp_path, model=model).ask(DATA, 1),
    )
    found = fa.Attributor(tmp_path, model=model, chain=own(torch.sign))
    torch.testing.assert_close(found.gradients(DATA), rows)
    assert not build(tmp_path, model, chain=other, overwrite=True).matrix().tensor().any()
