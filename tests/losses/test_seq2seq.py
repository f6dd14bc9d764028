"""Losses of encoder-decoders against a plain float64 autograd loop through the model itself."""

import pytest
import torch
from torch import Tensor, nn

import funcattrib as fa
from funcattrib.chain.per_example import spec
from funcattrib.chain.stages import apply_all, ready
from tests.losses.test_sequence_classification import documents, joined, own_grads, padded, worst
from tests.support import other_tasks

SOURCES, TARGETS = (9, 5, 12, 5), (4, 11, 2, 6)


def batch_of(sources: list[Tensor], targets: list[Tensor]) -> dict[str, Tensor]:
    labels = nn.utils.rnn.pad_sequence(targets, batch_first=True, padding_value=-100)
    return {**padded(sources), "labels": labels}


@pytest.mark.parametrize("name", list(other_tasks.PAIRS))
def test_rows_are_the_models_own(name: str) -> None:
    model = other_tasks.pair(name)
    loss, params = fa.seq2seq_loss(model, reduction="mean")  # which is the model's own of one example
    assert not loss.equal_lengths
    sources, targets = documents(SOURCES), documents(TARGETS)
    targets[1][2] = -100  # a token that does not count
    own = [{"input_ids": s[None], "labels": t[None]} for s, t in zip(sources, targets, strict=True)]
    expected, losses = own_grads(model, list(params), own)
    batch = batch_of(sources, targets)
    whole = fa.compose(fa.per_example_grad).bind(loss, params)(batch)
    assert worst(whole.grads, expected) < 2e-5
    torch.testing.assert_close(whole.losses.double(), losses, rtol=1e-5, atol=1e-6)
    chain = fa.compose(fa.per_example_grad, fa.project(4))
    compute = chain.bind(loss, params)
    found = compute(batch).grads
    projected = apply_all(
        chain.stages,
        ready(chain.stages, spec(params), torch.device("cpu")),
        {k: g.float() for k, g in expected.items()},
    )
    assert worst(found, projected) < 2e-5
    alone = [compute({"input_ids": s[None], "labels": t[None]}) for s, t in zip(sources, targets, strict=True)]
    assert worst(joined(alone), found) < 1e-5
    wider = {
        "input_ids": nn.functional.pad(batch["input_ids"], (0, 3), value=5),
        "attention_mask": nn.functional.pad(batch["attention_mask"], (0, 3)),
        "labels": nn.functional.pad(batch["labels"], (0, 4), value=-100),
    }
    assert worst(compute(wider).grads, found) < 1e-5


def test_sum_log_odds_and_smoothing() -> None:
    model = other_tasks.pair("t5")
    (source,), (target,) = documents((6,)), documents((4,))
    example = {"input_ids": source, "labels": target}
    z = model(input_ids=source[None], labels=target[None]).logits[0]
    p = z.softmax(-1).gather(-1, target[:, None])[:, 0]
    loss, params = fa.seq2seq_loss(model)
    torch.testing.assert_close(loss(params, example), -p.log().sum())
    loss, params = fa.seq2seq_loss(model, kind="log_odds")
    torch.testing.assert_close(loss(params, example), -torch.log(p / (1 - p)).sum())
    loss, params = fa.seq2seq_loss(model, label_smoothing=0.1)
    smoothed = nn.functional.cross_entropy(z, target, label_smoothing=0.1, reduction="sum")
    torch.testing.assert_close(loss(params, example), smoothed)


def test_an_example_without_labels_has_no_gradient() -> None:
    loss, params = fa.seq2seq_loss(other_tasks.pair("t5"))
    batch = batch_of(documents((5, 4)), [torch.tensor([-100, -100]), torch.tensor([7])])
    result = fa.compose(fa.per_example_grad, fa.project(2)).bind(loss, params)(batch)
    assert result.losses[0] == 0
    assert all(not grad[0].any() for grad in result.grads.values())


def test_what_the_loss_does_not_take() -> None:
    with pytest.raises(fa.FuncattribError, match=r"expected one of \('ce', 'log_odds'\) of an encoder-decoder"):
        fa.seq2seq_loss(other_tasks.pair("t5"), kind="kl")
    with pytest.raises(fa.FuncattribError, match="expected an encoder-decoder, found BertForSequenceClassification"):
        fa.seq2seq_loss(other_tasks.classifier("bert"))
