"""Rewards, advantages and token weights: from columns of the data to gradients, against dense sums over tokens."""

import logging
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch

import funcattrib as fa
from funcattrib.data import Columns, advantages, number_columns, tokenize
from funcattrib.store import GradientStore
from tests.support import cases, tiny

SMALL = {"projection_dim": 0, "modules": "*.dense.weight", "dtype": "float32", "rows_per_shard": 3, "quiet": True}
PROMPTS = ["w1 w2", "w3 w4 w5", "w1 w2", "w3 w4 w5", "w1 w2", "w6"]
ANSWERS = [" w7 w8", " w9", " w10 w11 w12", " w7", " w8 w9", " w13 w14"]
REWARDS = [1.0, 0.5, 3.0, -2.0, 0.5, 4.0]


def rows(**columns: list) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"q": PROMPTS, "a": ANSWERS, **columns})


def build(path: Path, data: datasets.Dataset, columns: Columns, **settings: object) -> GradientStore:
    settings = {"tokenizer": tiny.make_tokenizer(), "columns": columns, **SMALL, **settings}
    return fa.collect_gradients(cases.causal("gpt_neox"), data, path=path, **settings)


def dense(weights: list[list[float]]) -> torch.Tensor:
    """Σ_t weight_t ∂(−log p_t)/∂W of prompt and answer, one row at a time, through plain logits."""
    model, tokenizer, out = cases.causal("gpt_neox"), tiny.make_tokenizer(), []
    chosen = [p for n, p in model.named_parameters() if n.endswith(".dense.weight")]
    for prompt, answer, weight in zip(PROMPTS, ANSWERS, weights, strict=True):
        ids = torch.tensor(tokenizer(prompt + answer)["input_ids"])
        losses = -torch.log_softmax(model(input_ids=ids[None]).logits[0, :-1], -1).gather(1, ids[1:, None])[:, 0]
        grads = torch.autograd.grad((losses * torch.tensor(weight)[1:]).sum(), chosen)
        out.append(torch.cat([grad.flatten() for grad in grads]))
    return torch.stack(out)


def answer_weights(factors: list[float]) -> list[list[float]]:
    pairs = zip(PROMPTS, ANSWERS, factors, strict=True)
    return [[0.0] * len(q.split()) + [factor] * len(a.split()) for q, a, factor in pairs]


def check(store: GradientStore, weights: list[list[float]]) -> None:
    expected = dense(weights)
    torch.testing.assert_close(store.matrix().tensor(), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_rewards_less_the_mean_of_their_prompt(tmp_path: Path) -> None:
    store = build(tmp_path / "run", rows(r=REWARDS), Columns("q", "a", reward_column="r"))
    means = [1.5, -0.75, 1.5, -0.75, 1.5, 4.0]
    expected = [reward - mean for reward, mean in zip(REWARDS, means, strict=True)]
    assert store.examples["advantage"][:] == expected
    assert store.manifest.data["reward_column"] == "r"
    check(store, answer_weights(expected))
    other = build(tmp_path / "other", rows(r=[1, 2, 3, 4, 5, 6]), Columns("q", "a", reward_column="r"))
    assert other.manifest.data["fingerprint"] != store.manifest.data["fingerprint"]


def test_advantages_as_they_are(tmp_path: Path) -> None:
    store = build(tmp_path / "run", rows(v=REWARDS), Columns("q", "a", advantage_column="v"))
    check(store, answer_weights(REWARDS))


@pytest.mark.parametrize("hole", [None, float("nan"), float("inf")])
def test_missing_rewards_are_named_or_left_out(
    tmp_path: Path, hole: float | None, caplog: pytest.LogCaptureFixture
) -> None:
    rewards = [1.0, hole, 3.0, -2.0, hole, 4.0]
    with pytest.raises(
        fa.DataError, match=r"'r' has no finite number in 2 rows: 1, 4\n.*Columns\(skip_missing_rewards=True\)`"
    ):
        build(tmp_path / "run", rows(r=rewards), Columns("q", "a", reward_column="r"))
    assert not (tmp_path / "run").exists()
    columns = Columns("q", "a", reward_column="r", skip_missing_rewards=True)
    with caplog.at_level(logging.INFO, "funcattrib"):
        store = build(tmp_path / "run", rows(r=rewards), columns, quiet=False)
    expected = [-1.0, 0.0, 1.0, 0.0, 0.0, 0.0]  # the mean of w1 w2 is 2, of two rewards and not three
    check(store, answer_weights(expected))
    assert store.examples["advantage"][:] == [-1.0, None, 1.0, 0.0, None, 0.0]
    assert store.examples["loss"][:][1] == 0
    assert store.manifest.extra["without_reward"] == 2
    assert "no reward in 2 rows: 1, 4; kept, with a zero gradient" in caplog.text


def test_groups_of_every_kind_of_data(caplog: pytest.LogCaptureFixture) -> None:
    expected = [-0.5, -1.5, 1.5, 1.5, -1.0, 0.0]
    rewards = [1.0, 0.0, 3.0, 3.0, 0.5, 7.0]
    columns = Columns("q", "a", reward_column="r")
    tokenizer = tiny.make_tokenizer()

    def found(data: datasets.Dataset, columns: Columns) -> list[float]:
        tokens = tokenize(data, tokenizer, columns, max_length=64, truncation=False).dataset
        return advantages(data, tokens, columns).tolist()

    assert found(rows(r=rewards), columns) == expected
    chats = [
        [{"role": "user", "content": q}, {"role": "assistant", "content": a}]
        for q, a in zip(PROMPTS, ANSWERS, strict=True)
    ]
    turns = datasets.Dataset.from_dict({"chat": chats, "r": rewards})
    assert found(turns, Columns(conversation_column="chat", reward_column="r")) == expected
    ready = tokenize(rows(), tokenizer, Columns("q", "a"), max_length=64, truncation=False).dataset
    ready = datasets.Dataset.from_dict({**{n: ready[n][:] for n in ("input_ids", "labels")}, "r": rewards})
    assert found(ready, Columns(reward_column="r")) == expected
    plain = datasets.Dataset.from_dict({"text": PROMPTS, "r": rewards})
    assert found(plain, Columns(reward_column="r")) == expected
    assert "all advantages are 0" not in caplog.text
    assert not any(found(datasets.Dataset.from_dict({"text": ANSWERS, "r": rewards}), Columns(reward_column="r")))
    assert "all advantages are 0" in caplog.text


@pytest.mark.parametrize(
    ("values", "columns", "message"),
    [
        ({"r": REWARDS}, {"reward_column": "reward"}, "no column 'reward'; its columns are q, a, r"),
        ({"r": ["good"] * 6}, {"reward_column": "r"}, "expected numbers in column 'r', found string"),
        ({"r": [[1.0]] * 6}, {"advantage_column": "r"}, "expected numbers in column 'r'"),
        ({"r": [None] * 6}, {"reward_column": "r", "skip_missing_rewards": True}, "no finite number in 6 rows"),
        ({"w": REWARDS}, {"token_weights_column": "weights"}, "no column 'weights'; its columns are q, a, w"),
        ({"w": ["x"] * 6}, {"token_weights_column": "w"}, "expected a number or a list of numbers"),
        ({"w": [1.0, None, *REWARDS[2:]]}, {"token_weights_column": "w"}, "found None in row 1"),
        ({"w": [[1.0] * 4] * 6}, {"token_weights_column": "w"}, "one for each of 5 tokens, in 'w', found 4 in row 2"),
    ],
)
def test_mistakes(tmp_path: Path, values: dict, columns: dict, message: str) -> None:
    with pytest.raises(fa.DataError, match=message):
        build(tmp_path / "run", rows(**values), Columns("q", "a", **columns))


def test_columns_that_exclude_each_other() -> None:
    with pytest.raises(
        fa.DataError, match=r"`reward_column` \('r'\) and `advantage_column` \('a'\) cannot be combined"
    ):
        Columns(reward_column="r", advantage_column="a")
    with pytest.raises(
        fa.DataError, match=r"`conversation_column` \('m'\) and `completion_column` \('c'\) cannot be combined"
    ):
        Columns(conversation_column="m", completion_column="c")
    with pytest.raises(fa.DataError, match="`skip_missing_rewards` requires `reward_column` or `advantage_column`"):
        Columns(skip_missing_rewards=True)


def test_token_weights_of_text(tmp_path: Path) -> None:
    store = build(tmp_path / "one", rows(w=REWARDS), Columns("q", "a", token_weights_column="w"))
    check(store, answer_weights(REWARDS))
    each = [list(np.linspace(-1, 1, len((q + a).split()))) for q, a in zip(PROMPTS, ANSWERS, strict=True)]
    store = build(tmp_path / "each", rows(w=each), Columns("q", "a", token_weights_column="w"))
    masked = zip(each, answer_weights([1.0] * 6), strict=True)
    check(store, [[w * m for w, m in zip(weight, mask, strict=True)] for weight, mask in masked])
    short = build(
        tmp_path / "cut",
        rows(w=each),
        Columns("q", "a", token_weights_column="w"),
        truncation=True,
        max_length=3,
    )
    assert len(short) == 6


def test_token_weights_of_ready_tokens(tmp_path: Path) -> None:
    tokenizer = tiny.make_tokenizer()
    ids = [tokenizer(q + a)["input_ids"] for q, a in zip(PROMPTS, ANSWERS, strict=True)]
    each = [list(np.linspace(-1, 1, len(row))) for row in ids]
    data = datasets.Dataset.from_dict({"input_ids": ids, "mine": each, "one": REWARDS})
    check(build(tmp_path / "each", data, Columns(token_weights_column="mine")), each)
    whole = [[factor] * len(row) for row, factor in zip(ids, REWARDS, strict=True)]
    check(build(tmp_path / "one", data, Columns(token_weights_column="one")), whole)
    named = data.rename_column("mine", "token_weights")
    check(build(tmp_path / "named", named, Columns()), each)
    check(build(tmp_path / "other", named, Columns(token_weights_column="one")), whole)


def test_numbers_for_a_loss_of_ones_own() -> None:
    data = datasets.Dataset.from_dict(
        {"id": [1, 2], "flag": [True, False], "x": [1.5, None], "n": [1, None], "s": ["a", "b"]}
    )
    found = number_columns(data)
    assert {name: values.dtype.name for name, values in found.items()} == {
        "flag": "int64",
        "x": "float32",
        "n": "float32",
    }


def test_whole_numbers_that_no_float64_holds():
    ids = [2**60 + at for at in range(3)]
    columns = {"id_of_post": pa.array(ids), "large": pa.array([2**63 + 1, 1, 2], pa.uint64()), "some": [2**60, None, 1]}
    rows = datasets.Dataset(pa.table(columns))
    found = number_columns(rows)
    assert found["id_of_post"].tolist() == ids
    assert found["large"].dtype == found["some"].dtype == np.float32
    ready = rows.add_column("input_ids", [[1, 2]] * 3)
    values = advantages(ready, ready, Columns(advantage_column="id_of_post"))
    np.testing.assert_array_equal(values, np.array(ids, np.float32))
