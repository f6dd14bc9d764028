"""From documents to rows: the store holds what the chain gives for each document alone, whatever stands around it."""

import json
import logging
import resource
import sys
from pathlib import Path

import datasets
import pytest
import torch
from torch import nn

import funcattrib as fa
from funcattrib.data import Columns
from funcattrib.query.attributor import Attributor
from funcattrib.runs import collect, workload
from funcattrib.store import StoreWriter
from funcattrib.store.metadata import example_text
from tests.support import cases, tiny
from tests.support.store_run import contents

TEXTS = tiny.texts()
SMALL = {"projection_dim": 4, "dtype": "float32", "rows_per_shard": 5, "token_batch_size": 64, "quiet": True}


def records(texts: list[str] = TEXTS) -> list[dict]:
    return [{"text": text} for text in texts]


def build(
    path: Path, data: object = None, model: nn.Module | None = None, **settings: object
) -> fa.store.GradientStore:
    model = cases.causal("gpt_neox") if model is None else model
    data = records() if data is None else data
    settings = {"tokenizer": tiny.make_tokenizer(), **SMALL, **settings}
    return fa.collect_gradients(model, data, path=path, **settings)


def one_by_one(
    chain: fa.Chain, examples: list[dict[str, list[int]]], model: nn.Module | None = None, **loss_settings: object
) -> torch.Tensor:
    """The chain on every document alone, unpadded."""
    loss, params = fa.causal_lm_loss(model or cases.causal("gpt_neox"), **loss_settings)
    rows = []
    for example in examples:
        batch = {name: torch.tensor(values, dtype=torch.long)[None] for name, values in example.items()}
        rows.append(torch.cat([grad.flatten() for grad in chain(loss, params, batch).values()]))
    return torch.stack(rows)


def tokens(texts: list[str] = TEXTS) -> list[dict[str, list[int]]]:
    tokenizer = tiny.make_tokenizer()
    return [{"input_ids": (ids := tokenizer(text)["input_ids"]), "labels": ids} for text in texts]


def assert_rows(store: fa.store.GradientStore, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    found = store.matrix().tensor()
    assert found.shape == expected.shape
    error = (found - expected).norm(dim=1) / expected.norm(dim=1).clamp(min=1e-12)
    assert float(error.max()) < tolerance


@pytest.mark.parametrize("name", ["gpt_neox", "gpt2", "llama", "gemma3", "mamba", cases.TIED])
def test_rows_are_those_of_each_document_alone(tmp_path: Path, name: str) -> None:
    model = cases.causal(name)
    store = build(tmp_path / "run", model=model)
    assert_rows(store, one_by_one(fa.compose(fa.per_example_grad, fa.project(4)), tokens(), model))
    assert store.examples["text"][:] == TEXTS
    assert store.examples["id"][:] == [str(i) for i in range(len(TEXTS))]
    assert store.examples["tokens"][:] == [len(text.split()) for text in TEXTS]
    assert store.manifest.complete


def test_losses_are_kept(tmp_path: Path) -> None:
    store = build(tmp_path / "run", loss="log_odds", loss_reduction="mean")
    loss, params = fa.causal_lm_loss(cases.causal("gpt_neox"), kind="log_odds", reduction="mean")
    expected = [float(loss(params, {k: torch.tensor(v) for k, v in each.items()})) for each in tokens()]
    torch.testing.assert_close(torch.tensor(store.examples["loss"][:]), torch.tensor(expected), rtol=1e-5, atol=1e-5)
    chain = fa.compose(fa.per_example_grad, fa.project(4))
    assert_rows(store, one_by_one(chain, tokens(), kind="log_odds", reduction="mean"))


@pytest.mark.parametrize("budget", [1, 64, 100_000])
def test_the_token_budget_changes_rounding_alone(tmp_path: Path, budget: int) -> None:
    store = build(tmp_path / "run", token_batch_size=budget, rows_per_shard=7)
    assert_rows(store, one_by_one(fa.compose(fa.per_example_grad, fa.project(4)), tokens()))


def test_whole_gradients(tmp_path: Path) -> None:
    store = build(tmp_path / "run", projection_dim=0, modules="*.query_key_value.*", exclude=["*.bias", "*.1.*"])
    assert list(store.leaves) == ["gpt_neox.layers.0.attention.query_key_value.weight"]
    assert store.gradients(next(iter(store.leaves))).shape == (len(TEXTS), 72, 24)
    expected = one_by_one(fa.compose(fa.per_example_grad), tokens(), modules=list(store.leaves))
    assert_rows(store, expected)


def test_every_module(tmp_path: Path) -> None:
    store = build(tmp_path / "run", modules="all")
    assert list(store.leaves) == [name for name, _ in cases.causal("gpt_neox").named_parameters()]
    expected = one_by_one(fa.compose(fa.per_example_grad, fa.project(4)), tokens(), modules="all")
    assert_rows(store, expected)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 1e-3), ("bfloat16", 1e-2), ("int8", 3e-2)])
def test_narrow_storage(tmp_path: Path, dtype: str, tolerance: float) -> None:
    store = build(tmp_path / "run", dtype=dtype)
    expected = one_by_one(fa.compose(fa.per_example_grad, fa.project(4)), tokens())
    assert_rows(store, expected, tolerance)
    attributor = Attributor(tmp_path / "run", model=cases.causal("gpt_neox"), tokenizer=tiny.make_tokenizer())
    assert [hits[0].row for hits in attributor.ask(TEXTS[:4], 1)] == expected[:4].mm(expected.T).argmax(1).tolist()


def test_normalizer_is_fitted_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"normalizer": "adafactor", "fit_documents": 11}
    whole = build(tmp_path / "whole", **settings)
    chain = fa.compose(fa.per_example_grad, fa.adafactor_norm, fa.project(4))
    loss, params = fa.causal_lm_loss(cases.causal("gpt_neox"))
    chosen = [i * len(TEXTS) // 11 for i in range(11)]
    batches = [{name: torch.tensor(ids)[None] for name, ids in tokens()[i].items()} for i in chosen]
    state = chain.fit(loss, params, batches)
    rows = [
        torch.cat(
            [
                g.flatten()
                for g in chain(loss, params, {k: torch.tensor(v)[None] for k, v in each.items()}, state).values()
            ]
        )
        for each in tokens()
    ]
    assert_rows(whole, torch.stack(rows), 1e-4)

    put, fits = StoreWriter.put, []
    passes = workload.passes

    def dies(writer: StoreWriter, shard: int, *rest: object) -> None:
        if shard == 2:
            raise KeyboardInterrupt
        put(writer, shard, *rest)

    monkeypatch.setattr(workload, "passes", lambda *args: (fits.append(1) or state for state in passes(*args)))
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(StoreWriter, "put", dies)
        build(tmp_path / "run", **settings)
    build(tmp_path / "run", **settings)
    assert fits == [1]
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")
    attributor = Attributor(tmp_path / "run", model=cases.causal("gpt_neox"), tokenizer=tiny.make_tokenizer())
    torch.testing.assert_close(attributor.gradients(TEXTS), whole.matrix().tensor(), rtol=1e-4, atol=1e-4)


def test_a_chain_of_ones_own(tmp_path: Path) -> None:
    chain = fa.compose(fa.per_example_grad, fa.project(3, seed=5), fa.unit_norm)
    store = build(tmp_path / "run", chain=chain)
    assert_rows(store, one_by_one(chain, tokens()))
    torch.testing.assert_close(store.matrix().tensor().norm(dim=1), torch.ones(len(TEXTS)))
    attributor = Attributor(tmp_path / "run", model=cases.causal("gpt_neox"), tokenizer=tiny.make_tokenizer())
    assert attributor.ask([TEXTS[3]], 1)[0][0].row == 3


def test_completions(tmp_path: Path) -> None:
    rows = [{"q": text, "a": f" {other}"} for text, other in zip(TEXTS, reversed(TEXTS), strict=True)]
    store = build(tmp_path / "run", rows, columns=Columns("q", "a"), max_length=64)
    examples = []
    for prompt, completion in zip(tokens(), reversed(tokens()), strict=True):
        ids = prompt["input_ids"] + completion["input_ids"]
        examples.append({"input_ids": ids, "labels": [-100] * len(prompt["input_ids"]) + completion["input_ids"]})
    assert_rows(store, one_by_one(fa.compose(fa.per_example_grad, fa.project(4)), examples))
    assert store.examples[0] == store.examples[0] | rows[0]


def test_conversations(tmp_path: Path) -> None:
    rows = [
        {"chat": [{"role": "user", "content": text}, {"role": "assistant", "content": other}]}
        for text, other in zip(TEXTS[:6], TEXTS[6:], strict=False)
    ]
    store = build(tmp_path / "run", rows, columns=Columns(conversation_column="chat"))
    counted = [len(row["chat"][1]["content"].split()) for row in rows]
    assert store.manifest.extra["report"]["labelled_tokens"] == sum(counted)
    assert store.matrix().tensor().any(1).all()
    attributor = Attributor(tmp_path / "run", model=cases.causal("gpt_neox"), tokenizer=tiny.make_tokenizer())
    assert [hits[0].row for hits in attributor.ask(rows, 1)] == attributor.gradients(rows).mm(
        store.matrix().tensor().T
    ).argmax(1).tolist()


def test_ready_tokens_need_no_tokenizer(tmp_path: Path) -> None:
    examples = tokens()
    examples[4]["labels"] = [-100] * 3 + examples[4]["labels"][3:]
    store = build(tmp_path / "run", datasets.Dataset.from_list(examples), tokenizer=None)
    assert_rows(store, one_by_one(fa.compose(fa.per_example_grad, fa.project(4)), examples))
    assert store.examples.column_names == ["id", "loss", "tokens"]
    shown = build(tmp_path / "shown", datasets.Dataset.from_list(examples))
    assert shown.examples["text"][:] == TEXTS


def test_rows_without_a_gradient_are_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    examples = [*tokens()[:3], {"input_ids": [], "labels": []}, {"input_ids": [5], "labels": [5]}]
    examples.append({"input_ids": [5, 6, 7], "labels": [-100] * 3})
    with caplog.at_level(logging.INFO, "funcattrib"):
        store = build(tmp_path / "run", datasets.Dataset.from_list(examples), rows_per_shard=2, quiet=False)
    assert store.matrix().tensor().any(1).tolist() == [True] * 3 + [False] * 3
    assert store.examples["loss"][:][3:] == [0, 0, 0]
    assert "2 documents have fewer than 2 tokens: kept, with a zero gradient" in caplog.text
    assert "1 document has no token that counts in the loss: kept" in caplog.text
    assert store.manifest.extra["report"]["empty"] == 2


def test_entries_that_are_clipped_or_not_finite_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    large = fa.Transform("large", apply=lambda state, grads: {name: grad * 1e9 for name, grad in grads.items()})
    store = build(tmp_path / "run", chain=fa.compose(fa.per_example_grad, large), dtype="float16", quiet=False)
    assert store.manifest.clipped > 0
    assert f"{store.manifest.clipped} entries were outside the range of float16 and were clipped" in caplog.text
    broken = fa.Transform("broken", apply=lambda state, grads: {name: grad / 0 for name, grad in grads.items()})
    store = build(tmp_path / "run", chain=fa.compose(fa.per_example_grad, broken), overwrite=True, quiet=False)
    assert store.manifest.nonfinite > 0
    assert f"the gradient is NaN or infinite in {len(store)} rows: 0, 1, 2, 3, 4, …" in caplog.text


def test_a_finished_run_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(tmp_path / "run")
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "run").rglob("*")}
    monkeypatch.setattr(collect, "fill", None)
    build(tmp_path / "run")
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "run").rglob("*")} == before


def test_the_model_is_left_as_it_was(tmp_path: Path) -> None:
    model = cases.causal("llama")
    model.train()
    before, config = tiny.state_bytes(model), model.config.to_dict()
    build(tmp_path / "run", model=model)
    assert model.training
    assert model.config.to_dict() == config
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    model.eval()


def test_a_model_that_is_random_is_refused(tmp_path: Path) -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = cases.causal("gpt_neox")

        def forward(self, input_ids: torch.Tensor) -> object:
            output = self.inner(input_ids=input_ids)
            return type(output)(logits=nn.functional.dropout(output.logits, 0.5, training=True))

    with pytest.raises(fa.FuncattribError, match="the model draws random numbers"):
        build(tmp_path / "run", model=Noisy())


def test_unknown_settings_are_named(tmp_path: Path) -> None:
    with pytest.raises(fa.FuncattribError, match="unknown setting 'projection'"):
        build(tmp_path / "run", projection=3)


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_memory_does_not_grow_with_the_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put, resident = StoreWriter.put, []

    def measured(writer: StoreWriter, *rest: object) -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[1]) - int(
            Path("/proc/self/statm").read_text().split()[2]
        )
        resident.append(pages * resource.getpagesize())
        put(writer, *rest)

    monkeypatch.setattr(StoreWriter, "put", measured)
    settings = {"projection_dim": 16, "rows_per_shard": 25, "token_batch_size": 512}
    store = build(tmp_path / "run", records(tiny.texts(1500, longest=6)), **settings)
    written = len(store) * store.width * 4
    assert max(resident[10:]) - max(resident[:10]) < written / 3


def test_an_unused_parameter_gives_zeros_and_is_named_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    params = {name: torch.ones(2, 3) for name in ("used", "frozen", "unused")}
    params["frozen"].requires_grad_(False)

    def loss(params: dict, example: dict) -> torch.Tensor:
        return nn.functional.linear(example["x"], params["used"] + params["frozen"]).square().sum()

    # The first batch of all has no gradient: it says nothing about the parameters.
    # No signs make the others' entries add up to 0.
    examples = [{"x": [[0.0] * 3]}] + [{"x": [[1.0, 2.0, i + 0.3]]} for i in range(9)]
    for number, settings in enumerate(({}, {"projection_dim": 2}, {"projection_dim": 2, "normalizer": "adafactor"})):
        caplog.clear()
        common = {"projection_dim": 0, "dtype": "float32", "rows_per_shard": 3, "token_batch_size": 1, **settings}
        store = fa.collect_gradients((loss, params), examples, path=tmp_path / str(number), quiet=False, **common)
        assert store.gradients("used")[1:].flatten(1).any(1).all()
        assert store.gradients("frozen")[1:].flatten(1).any(1).all()  # what is asked for is attributed
        assert not store.gradients("unused").any()
        told = [record.message for record in caplog.records if "have no gradient" in record.message]
        assert len(told) == 1
        assert "1 of 3 leaves have no gradient in the first batch (unused): the loss does not use them" in told[0]


def test_messages_with_arguments_of_several_types_are_stored_and_shown(tmp_path: Path) -> None:
    calls = [{"function": {"name": "f", "arguments": {"at": at}}} for at in ("now", 5, [1, "a"])]
    chats = [[{"role": "user", "content": "w1 w2"}, {"role": "assistant", "tool_calls": [call]}] for call in calls]
    chats = [[*chat, {"role": "assistant", "content": f"w{3 + at} w4"}] for at, chat in enumerate(chats)]
    columns = Columns(conversation_column="m")
    store = build(tmp_path / "run", [{"m": chat} for chat in chats], columns=columns, rows_per_shard=1)
    assert [json.loads(kept) for kept in store.examples["m"][:]] == chats
    shown = example_text(store.examples[1], store.manifest.text_columns)
    assert shown.splitlines()[::2] == ["user: w1 w2", "assistant: w4 w4"]
    assert '"at": 5' in shown


@pytest.mark.parametrize(
    "name", ["id", "tokens", "loss", "document", "advantage", "position", "rank", "step", "length"]
)
def test_a_text_column_of_any_name_is_shown_beside_its_row(tmp_path: Path, name: str) -> None:
    store = build(tmp_path / "run", [{name: text} for text in TEXTS[:3]], columns=Columns(name))
    shown = [example_text(example, store.manifest.text_columns) for example in store.examples]
    assert shown == TEXTS[:3]
    assert store.examples["tokens"][:] == [len(text.split()) for text in TEXTS[:3]]
    assert all(isinstance(loss, float) for loss in store.examples["loss"][:])


def test_a_column_called_advantage_is_the_users_where_none_is_asked_for(tmp_path: Path) -> None:
    model = cases.causal("gpt_neox")

    def factory(model):
        parts = fa.functionalize(model)
        return lambda params, example: (
            parts.call({**parts.params, **params}, input_ids=example["input_ids"][None]).logits[0, 0, 5]
            * example["labels"].ne(-100).sum()
        )

    data = [{"text": text, "advantage": float("nan"), "post": 2**60 + at} for at, text in enumerate(TEXTS[:2])]
    store = build(tmp_path / "run", data, model, loss=factory)
    assert "advantage" not in store.examples.column_names
    assert torch.isfinite(store.matrix().tensor()).all()
    assert (store.matrix().tensor() != 0).any()


@pytest.mark.parametrize("model", [{"a": torch.ones(2)}, None, (1, 2, 3), 5])
def test_what_is_no_model_is_refused(tmp_path: Path, model: object) -> None:
    with pytest.raises(fa.FuncattribError, match="expected a model, its name or folder, or"):
        fa.collect_gradients(model, TEXTS, path=tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_a_model_without_a_head_is_refused(tmp_path: Path) -> None:
    with pytest.raises(fa.FuncattribError, match="expected a model with logits, found GPTNeoXModel"):
        build(tmp_path / "run", model=cases.causal("gpt_neox").gpt_neox)
