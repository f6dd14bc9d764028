"""Classification losses against a plain float64 autograd loop through the model itself."""

import copy

import pytest
import torch
from torch import Tensor, nn

import funcattrib as fa
from funcattrib.chain.per_example import spec
from funcattrib.chain.stages import apply_all, ready
from tests.support import other_tasks

LENGTHS = (9, 5, 12, 5, 3)


def documents(lengths: tuple[int, ...] = LENGTHS) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(4, other_tasks.VOCABULARY, (length,), generator=generator) for length in lengths]


def padded(rows: list[Tensor], pad: int = 0) -> dict[str, Tensor]:
    pad_to = nn.utils.rnn.pad_sequence
    return {
        "input_ids": pad_to(rows, batch_first=True, padding_value=pad),
        "attention_mask": pad_to([torch.ones_like(row) for row in rows], batch_first=True),
    }


def own_grads(model: nn.Module, names: list[str], batch: list[dict[str, Tensor]]) -> tuple[dict[str, Tensor], Tensor]:
    """Loss and gradient of every example by itself, the model's own loss, in float64."""
    model = copy.deepcopy(model).double()
    params = dict(model.named_parameters())
    grads, losses = [], []
    for example in batch:
        loss = model(**example).loss
        grads.append(torch.autograd.grad(loss, [params[name] for name in names], allow_unused=True))
        losses.append(loss.detach())
    columns = zip(*grads, strict=True)
    return {
        name: torch.stack([torch.zeros_like(params[name]) if g is None else g for g in column])
        for name, column in zip(names, columns, strict=True)
    }, torch.stack(losses)


def worst(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest difference of a row, relative to the row's norm."""
    flat = [torch.cat([tensor.double().flatten(1) for tensor in each.values()], 1) for each in (found, expected)]
    return float(((flat[0] - flat[1]).norm(dim=1) / flat[1].norm(dim=1)).max())


def check_rows(model: nn.Module, loss, params, batch: dict[str, Tensor], own: list[dict[str, Tensor]]) -> None:
    """Whole and projected rows of a padded batch are the model's own gradients."""
    names = list(params)
    expected, losses = own_grads(model, names, own)
    batches = [batch] if not loss.equal_lengths else [{k: v[None] for k, v in row.items()} for row in rows_of(batch)]
    whole = [fa.compose(fa.per_example_grad).bind(loss, params)(each) for each in batches]
    assert worst(joined(whole), expected) < 2e-5
    torch.testing.assert_close(torch.cat([each.losses for each in whole]).double(), losses, rtol=1e-5, atol=1e-6)
    chain = fa.compose(fa.per_example_grad, fa.project(4))
    projected = apply_all(
        chain.stages,
        ready(chain.stages, spec(params), torch.device("cpu")),
        {k: g.float() for k, g in expected.items()},
    )
    found = [chain.bind(loss, params)(each) for each in batches]
    assert worst(joined(found), projected) < 2e-5


def joined(results: list) -> dict[str, Tensor]:
    return {name: torch.cat([each.grads[name] for each in results]) for name in results[0].grads}


def rows_of(batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """The examples of a batch by themselves, without padding."""
    size = len(batch["label"])
    lengths = batch["attention_mask"].sum(1).tolist()
    tokens = ("input_ids", "attention_mask")
    return [
        {name: value[at, : lengths[at]] if name in tokens else value[at] for name, value in batch.items()}
        for at in range(size)
    ]


@pytest.mark.parametrize("name", list(other_tasks.CLASSIFIERS))
def test_rows_are_the_models_own(name: str) -> None:
    model = other_tasks.classifier(name)
    loss, params = fa.sequence_classification_loss(model)
    assert loss.equal_lengths is (name == "llama_without_padding")
    rows, labels = documents(), torch.tensor([0, 2, 1, 1, 2])
    own = [{"input_ids": row[None], "labels": label[None]} for row, label in zip(rows, labels, strict=True)]
    check_rows(model, loss, params, {**padded(rows), "label": labels}, own)


@pytest.mark.parametrize(
    ("problem", "num_labels", "labels"),
    [
        ("multi_label_classification", 3, [[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]]),
        (None, 3, [[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]]),
        ("regression", 1, [0.5, -2.0]),
        (None, 1, [0.5, -2.0]),
        ("regression", 2, [[0.5, 1.0], [-2.0, 3.0]]),
        (None, 3, [2, 0]),
    ],
)
def test_problem_types(problem: str | None, num_labels: int, labels: list) -> None:
    model = copy.deepcopy(other_tasks.classifier("bert", num_labels, problem))
    loss, params = fa.sequence_classification_loss(model, modules="all")
    rows, targets = documents((7, 4)), torch.tensor(labels)
    doubled = targets.double() if targets.is_floating_point() else targets
    own = [{"input_ids": row[None], "labels": label[None]} for row, label in zip(rows, doubled, strict=True)]
    check_rows(model, loss, params, {**padded(rows), "label": targets}, own)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_padding_and_batch_change_nothing(name: str) -> None:
    model = other_tasks.classifier(name)
    loss, params = fa.sequence_classification_loss(model, kind="log_odds")
    compute = fa.compose(fa.per_example_grad, fa.project(4)).bind(loss, params)
    batch = {**padded(documents(), pad=7), "label": torch.tensor([0, 2, 1, 1, 2])}
    wider = {**batch, **{k: nn.functional.pad(batch[k], (0, 6)) for k in ("input_ids", "attention_mask")}}
    together = compute(batch).grads
    assert worst(compute(wider).grads, together) < 1e-5
    alone = [compute({key: value[None] for key, value in row.items()}) for row in rows_of(batch)]
    assert worst(joined(alone), together) < 1e-5
    backwards = compute({key: value.flip(0) for key, value in batch.items()}).grads
    assert worst({key: value.flip(0) for key, value in backwards.items()}, together) < 1e-5
    torch.testing.assert_close(loss.batched(params, batch), torch.stack([loss(params, row) for row in rows_of(batch)]))


def test_log_odds_is_the_margin() -> None:
    model = other_tasks.classifier("bert")
    loss, params = fa.sequence_classification_loss(model, kind="log_odds")
    row = documents((6,))[0]
    p = model(input_ids=row[None]).logits.softmax(-1)[0, 2]
    torch.testing.assert_close(loss(params, {"input_ids": row, "label": torch.tensor(2)}), -torch.log(p / (1 - p)))


def test_several_labels_and_smoothing_by_their_formulas() -> None:
    row = documents((6,))[0]
    several = copy.deepcopy(other_tasks.classifier("bert", 3, "multi_label_classification"))
    loss, params = fa.sequence_classification_loss(several, kind="log_odds")
    z, y = several(input_ids=row[None]).logits[0], torch.tensor([1.0, 0.0, 1.0])
    torch.testing.assert_close(loss(params, {"input_ids": row, "label": y}), -((2 * y - 1) * z).mean())
    model = other_tasks.classifier("bert")
    loss, params = fa.sequence_classification_loss(model, label_smoothing=0.1)
    z = model(input_ids=row[None]).logits[0]
    expected = torch.logsumexp(z, 0) - 0.9 * z[2] - 0.1 * z.mean()
    torch.testing.assert_close(loss(params, {"input_ids": row, "label": torch.tensor(2)}), expected)


def test_what_a_loss_does_not_take() -> None:
    regression = copy.deepcopy(other_tasks.classifier("bert", 1, "regression"))
    with pytest.raises(fa.FuncattribError, match="kind='log_odds' requires labels that are classes"):
        fa.sequence_classification_loss(regression, kind="log_odds")
    with pytest.raises(fa.FuncattribError, match=r"label_smoothing=0.1 requires labels that are classes"):
        fa.sequence_classification_loss(regression, label_smoothing=0.1)
    with pytest.raises(fa.FuncattribError, match=r"expected one of \('ce', 'log_odds'\) of a sequence classification"):
        fa.sequence_classification_loss(other_tasks.classifier("bert"), kind="kl")
    with pytest.raises(fa.FuncattribError, match="expected a sequence classification model, found T5ForCond"):
        fa.sequence_classification_loss(other_tasks.pair("t5"))
