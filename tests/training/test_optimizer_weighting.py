"""Rows as the optimizer weighs them: a step with a batch of one is its row."""

from pathlib import Path

import pytest
import torch
import transformers

import funcattrib as fa
from funcattrib import testing as laws
from tests.support.training import check, examples, gradient, train
from tests.training.test_collect import fresh

WHOLE = fa.compose(fa.per_example_grad, fa.select("*"))


class Updates(transformers.TrainerCallback):
    """What each optimizer step changes, and the second moments after it."""

    def __init__(self, names: list[str]) -> None:
        self.names, self.of, self.rates = names, {}, {}

    def on_pre_optimizer_step(self, args, state, control, model, optimizer, **_) -> None:
        self.before = {n: p.detach().clone() for n, p in model.named_parameters()}
        self.rates[state.global_step + 1] = optimizer.param_groups[0]["lr"]

    def on_optimizer_step(self, args, state, control, model, **_) -> None:
        self.of[state.global_step + 1] = {n: p.detach() - self.before[n] for n, p in model.named_parameters()}


def collected(tmp: Path, **settings: object) -> tuple[fa.GradientCollectorCallback, dict]:
    callback = fa.GradientCollectorCallback(
        tmp / "run", dtype="float32", track_order=True, optimizer_moments=True, scale_by_lr=True, **settings
    )
    return callback, {"per_device_train_batch_size": 1, "max_grad_norm": 0.0, "weight_decay": 0.0}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["gpt_neox", "gpt2"])
def test_a_row_is_the_adam_step_of_a_batch_of_one(tmp_path: Path, name: str, checkpointing: bool) -> None:
    callback, settings = collected(tmp_path, chain=WHOLE)
    model = fresh(name)
    updates = Updates([])
    settings |= {"adam_beta1": 0.0, "adam_epsilon": 1e-3, "activation_checkpointing": checkpointing}
    ran = train(tmp_path, callback, model=model, extra=[updates], **settings)
    for epoch in (0, 1):
        store = fa.open_store(tmp_path / f"run/epoch_{epoch}")
        for row, told in enumerate(store.examples):
            ours = {n: store[n].tensor(row, row + 1)[0].double() * told["loss_scale"] for n in store.leaves}
            update = updates.of[told["step"]]
            # The weights' own rounding limits how well their difference shows the step.
            for n, value in ours.items():
                torch.testing.assert_close(-value, update[n].double(), rtol=1e-2, atol=3e-7)
                assert update[n].abs().max() > 1e-4
    assert ran.trainer.state.global_step == 22


@pytest.mark.parametrize("name", ["adam", "adafactor"])
def test_moments_after_the_step_with_accumulation_and_a_projection(tmp_path: Path, name: str) -> None:
    chain = fa.compose(fa.per_example_grad, fa.project(4))
    callback = fa.GradientCollectorCallback(
        tmp_path / "run", chain=chain, dtype="float32", track_order=True, optimizer_moments=True
    )

    at: dict = {}

    class Moments(transformers.TrainerCallback):
        def on_optimizer_step(self, args, state, control, model, optimizer, **_) -> None:
            torch.save(optimizer.state_dict(), tmp_path / "state.pt")
            at[state.global_step + 1] = fa.optimizer_state(tmp_path / "state.pt", model)

    optim = {"adam": "adamw_torch", "adafactor": "adafactor"}[name]
    ran = train(tmp_path, callback, extra=[Moments()], optim=optim, gradient_accumulation_steps=2, num_train_epochs=1)
    store, data = fa.open_store(tmp_path / "run/epoch_0"), examples()
    for row, told in enumerate(store.examples):
        grads = gradient(ran.trainer.model, ran.weights[told["step"]], data[row], list(store.leaves))
        moments = {n: m for n, m in at[told["step"]].items() if n in grads}
        norm = fa.adafactor_norm(moments) if name == "adafactor" else fa.adam_norm(moments)
        whole = fa.compose(norm, fa.project(4))
        state = whole.init({n: fa.Leaf(tuple(g.shape[1:]), g.dtype) for n, g in grads.items()})[0]
        wanted = whole.apply(state, grads)
        ours = {n: store[n].tensor(row, row + 1).double() for n in store.leaves}
        laws.close(ours, {n: wanted[n] for n in ours}, 1e-3)


def test_learning_rates_alone(tmp_path: Path) -> None:
    rates = Updates([])
    settings = {"num_train_epochs": 1, "optim": "sgd", "data": examples()}
    chain = fa.compose(fa.per_example_grad, fa.project(4))
    for scaled in (False, True):
        callback = fa.GradientCollectorCallback(
            tmp_path / f"{scaled}", chain=chain, dtype="float32", track_order=True, scale_by_lr=scaled
        )
        ran = train(tmp_path, callback, extra=[rates], **settings)
    plain, ours = (fa.open_store(tmp_path / f"{scaled}/epoch_0") for scaled in (False, True))
    check(ran, plain, chain)
    by_row = torch.tensor([rates.rates[told["step"]] for told in ours.examples])
    torch.testing.assert_close(ours.matrix().tensor(), plain.matrix().tensor() * by_row[:, None])
    assert len(set(by_row.tolist())) == 3
