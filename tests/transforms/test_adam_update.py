"""``adam_update`` against the step that torch's own Adam makes on one example alone."""

import copy

import pytest
import torch

import funcattrib as fa
from funcattrib import testing as laws
from funcattrib.checkpoints.adam_state import adam_state
from funcattrib.transforms.adam_update import AdamState, adam_update
from tests.support import cases
from tests.support.sweeps import crossed

BATCH = cases.batch((9, 5, 12, 2))


def trained(name: str, folder, steps: int = 3):
    """A copy of a model after some steps of AdamW, with the optimizer that made them, saved as the Trainer does."""
    model = copy.deepcopy(cases.causal(name))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.0)
    for step in range(steps):
        batch = cases.batch((8, 6), seed=10 + step)
        optimizer.zero_grad()
        model(input_ids=batch["input_ids"], labels=batch["labels"]).loss.backward()
        optimizer.step()
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    return model, optimizer


def steps_of_adam(model, optimizer, reduction: str) -> list[dict[str, torch.Tensor]]:
    """What the parameters lose in one more step on each example alone, with learning rate 1, in float64."""
    kept, own = optimizer.state_dict(), {name: p.detach().double() for name, p in model.named_parameters()}
    updates = []
    for row in range(len(BATCH["input_ids"])):
        again = copy.deepcopy(model).double()
        if again._can_set_experts_implementation():
            again.set_experts_implementation("eager")
        fresh = torch.optim.AdamW(again.parameters(), weight_decay=0.0)
        fresh.load_state_dict(copy.deepcopy(kept))
        fresh.param_groups[0]["lr"] = 1.0
        for state in fresh.state.values():
            state.update({key: state[key].double() for key in ("exp_avg", "exp_avg_sq")})
        labels = BATCH["labels"][row : row + 1]
        loss = again(input_ids=BATCH["input_ids"][row : row + 1], labels=labels).loss
        (loss * (labels[:, 1:] != -100).sum() if reduction == "sum" else loss).backward()
        fresh.step()
        updates.append({name: own[name] - p.detach() for name, p in again.named_parameters()})
    return updates


MODELS = ["llama", "llama_tied", "gpt2", "mixtral"]


@pytest.mark.parametrize(("name", "projected", "reduction"), crossed(MODELS, [False, True], ["mean", "sum"]))
def test_updates_are_adams_next_steps(name, projected, reduction, tmp_path) -> None:
    model, optimizer = trained(name, tmp_path)
    expected = steps_of_adam(model, optimizer, reduction)
    loss, params = fa.causal_lm_loss(
        model, modules=["*weight", *(["*proj"] if name == "mixtral" else [])], reduction=reduction
    )
    project = fa.project(3, seed=5)
    chain = fa.compose(
        fa.per_example_grad, adam_update(adam_state(tmp_path, model), then=project if projected else None)
    )
    updates = chain(loss, params, BATCH)
    state = project.init(fa.per_example_grad.spec(params))[0]
    for row, one in enumerate(expected):
        wanted = {key: update[None].float() for key, update in one.items() if key in params}
        wanted = project(state, wanted) if projected else wanted
        for key in params:
            # where a gradient is all but zero, its sign (all that remains of it in g / √(d g²)) is rounding
            close = torch.isclose(updates[key][row], wanted[key][0], rtol=1e-2, atol=2e-2 * float(wanted[key].std()))
            assert close.float().mean() > 0.98, key
    laws.close(updates, chain.plain(loss, params, BATCH), 1e-3)


def test_states_that_do_not_fit_are_refused(tmp_path) -> None:
    model, _ = trained("gpt2", tmp_path)
    loss, params = fa.causal_lm_loss(model)
    states = adam_state(tmp_path, model)
    name = next(iter(params))
    without = {key: state for key, state in states.items() if key != name}
    small = states | {name: AdamState(torch.zeros(2), torch.zeros(2), 1)}
    for given, found in ((without, f"has no Adam moments for {name}"), (small, r"found \(2,\)")):
        with pytest.raises(fa.ChainError, match=found):
            fa.compose(fa.per_example_grad, adam_update(given))(loss, params, BATCH)
    with pytest.raises(fa.ChainError, match="must be a linear stage, and unit_norm is not"):
        adam_update(states, then=fa.unit_norm())
    with pytest.raises(fa.ChainError, match="must be a linear stage, and adam_update is not"):
        fa.compose(fa.per_example_grad, adam_update(states, then=adam_update(states)))(loss, params, BATCH)
    with pytest.raises(fa.ChainError, match="joins or divides"):
        fa.compose(fa.per_example_grad, adam_update(states, then=fa.sketch(4)))(loss, params, BATCH)
    torch.save(torch.optim.SGD(model.parameters(), momentum=0.9).state_dict(), tmp_path / "optimizer.pt")
    with pytest.raises(fa.FuncattribError, match="made no step"):
        adam_state(tmp_path, model)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    loss_of = model(input_ids=BATCH["input_ids"], labels=BATCH["labels"]).loss
    loss_of.backward()
    sgd.step()
    torch.save(sgd.state_dict(), tmp_path / "optimizer.pt")
    with pytest.raises(fa.FuncattribError, match=r"expected Adam's first and second moments.*momentum_buffer"):
        adam_state(tmp_path, model)


def test_a_chain_with_it_is_described_in_plain_values() -> None:
    described = fa.compose(adam_update({}, then=fa.project(4, seed=2)), adam_update({})).describe()
    project = {"name": "project", "k": 4, "kind": "rademacher", "seed": 2}
    assert described == [{"name": "adam_update", "then": project}, {"name": "adam_update", "then": None}]
