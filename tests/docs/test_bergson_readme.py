"""The lines of Bergson's README, with this library's name in the place of its own."""

import copy
from pathlib import Path

import datasets
import pytest
import torch
from transformers import Trainer, TrainingArguments, default_data_collator

import funcattrib as fa
from tests.support import cases, tiny

TEXTS = tiny.texts(12, seed=3)
HEADS = {"layers.0.attention.dense": fa.AttentionConfig(num_heads=4, head_size=6, head_dim=1)}


@pytest.fixture
def data() -> datasets.Dataset:
    return datasets.Dataset.from_list([{"text": text} for text in TEXTS])


def test_an_index_is_built_and_queried(funcattrib, tmp_path: Path, model_folder: Path) -> None:
    path = tiny.write_jsonl(tmp_path / "pile.jsonl", [{"text": text} for text in TEXTS])
    words = "--truncation --token_batch_size 4096 --projection_dim 16"
    ran = funcattrib("build", tmp_path / "index", "--model", model_folder, "--dataset", path, *words.split())
    assert ran.code == 0, ran.err
    ran = funcattrib("query", "--index", tmp_path / "index", "--unit_norm", "--text", TEXTS[4])
    assert ran.code == 0, ran.err
    assert TEXTS[4][:20] in ran.out


@pytest.mark.parametrize("faiss", [None, fa.FaissConfig("IVF1,SQfp16", mmap_index=True)])
@pytest.mark.parametrize("name", ["gpt_neox", cases.TIED])
def test_the_base_model_is_traced(name: str, faiss: fa.FaissConfig | None, tmp_path: Path, data) -> None:
    if faiss is not None:
        pytest.importorskip("faiss")
    model, tokenizer = copy.deepcopy(cases.causal(name)), tiny.make_tokenizer()
    fa.collect_gradients(model, data, path=tmp_path / "index", tokenizer=tokenizer, quiet=True)
    attr = fa.Attributor(tmp_path / "index", device="cpu", faiss_cfg=faiss)
    query_tokens = tokenizer(TEXTS[4], return_tensors="pt")["input_ids"]
    before = dict(vars(model.base_model))
    with attr.trace(model.base_model, 5) as result:
        model(query_tokens, labels=query_tokens).loss.backward()
        model.zero_grad()
    with attr.trace(model, 5) as expected:
        model(query_tokens, labels=query_tokens).loss.backward()
    assert result.rows.tolist() == expected.rows.tolist()
    assert torch.equal(result.scores, expected.scores)
    assert vars(model.base_model) == before
    with torch.no_grad():
        next(model.base_model.parameters()).add_(1)
    with pytest.raises(fa.FuncattribError, match="expected the base of the model that made the store"):
        attr.trace(model.base_model).__enter__()


def test_a_base_that_does_not_hold_the_parameters_is_refused(tmp_path: Path, data: datasets.Dataset) -> None:
    settings = {"tokenizer": tiny.make_tokenizer(), "quiet": True, "projection_dim": 2}
    for name, modules in (("gpt_neox", "lm_head.weight"), (cases.TIED, "*embed_tokens*"), (cases.TIED, "all")):
        model, path = cases.causal(name), tmp_path / f"{name}-{len(modules)}"
        fa.collect_gradients(model, data, path=path, modules=modules, **settings)
        with pytest.raises(fa.FuncattribError, match="which the model uses outside of its base; trace the whole model"):
            fa.Attributor(path).trace(model.base_model).__enter__()


def test_rewards_make_the_loss(funcattrib, tmp_path: Path, model_folder: Path) -> None:
    rows = [{"text": text, "reward": float(number % 3)} for number, text in enumerate(TEXTS)]
    path = tiny.write_jsonl(tmp_path / "rewarded.jsonl", rows)
    words = ("--model", model_folder, "--dataset", path, "--reward_column", "reward")
    ran = funcattrib("build", tmp_path / "run", *words)
    assert ran.code == 0, ran.err
    assert "advantage" in fa.open_store(tmp_path / "run").examples.column_names


@pytest.mark.parametrize("processor", ["tokenizer", "state", "its folder"])
def test_heads_of_attention_are_apart(processor: str, tmp_path: Path, data: datasets.Dataset) -> None:
    model, tokenizer = cases.causal("gpt_neox"), tiny.make_tokenizer()
    settings = {"normalizer": "adafactor", "attention_cfgs": HEADS, "projection_dim": 0, "quiet": True}
    settings |= {"tokenizer": tokenizer, "dtype": "float32"}
    fitted = fa.fit_chain(model, data, path=tmp_path / "fitted", **settings)
    if processor == "tokenizer":
        given = settings.pop("tokenizer")
    else:
        given = fitted if processor == "state" else str(fitted.path)
    store = fa.collect_gradients(model=model, data=data, processor=given, path=tmp_path / "run", **settings)
    settings |= {"attention_cfgs": {}, "tokenizer": tokenizer}
    whole = fa.collect_gradients(model, data, path=tmp_path / "whole", **settings)
    name = "gpt_neox.layers.0.attention.dense.weight"
    heads = [f"{name}#h{number}" for number in range(4)]
    assert [leaf for leaf in store.leaves if "#" in leaf] == heads
    torch.testing.assert_close(torch.cat([store.gradients(head) for head in heads], -1), whole.gradients(name))
    found, expected = store.state(), fitted.state()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_what_does_not_fit_is_refused(tmp_path: Path, data: datasets.Dataset) -> None:
    def collect(**settings: object) -> None:
        fa.collect_gradients(cases.causal("gpt_neox"), data, path=tmp_path / "run", quiet=True, **settings)

    tokenizer = tiny.make_tokenizer()
    with pytest.raises(fa.FuncattribError, match=r"no parameter's name matches 'layers.9.attention.dense'"):
        collect(tokenizer=tokenizer, attention_cfgs={"layers.9.attention.dense": HEADS["layers.0.attention.dense"]})
    with pytest.raises(fa.FuncattribError, match="`attention_cfgs` says where the heads are"):
        collect(tokenizer=tokenizer, attention_cfgs=HEADS, split_heads=True)
    with pytest.raises(fa.FuncattribError, match="`processor` is a tokenizer, and so is `tokenizer`"):
        collect(tokenizer=tokenizer, processor=tokenizer)
    with pytest.raises(fa.FuncattribError, match="`processor` is a fitted state, and so is `state`"):
        collect(state=tmp_path / "a", processor=tmp_path / "b")
    with pytest.raises(fa.FuncattribError, match=r"expected a tokenizer or a fitted state .* found dict"):
        collect(processor={})
    assert not (tmp_path / "run").exists()


def test_gradients_are_collected_while_training(tmp_path: Path) -> None:
    tokenizer = tiny.make_tokenizer()
    rows = [{"input_ids": tokenizer(text, padding="max_length", max_length=20)["input_ids"]} for text in TEXTS]
    train_dataset = datasets.Dataset.from_list([{**row, "labels": row["input_ids"]} for row in rows])
    training_args = TrainingArguments(
        str(tmp_path / "out"), num_train_epochs=1, report_to=[], disable_tqdm=True, save_strategy="no", use_cpu=True
    )
    callback = fa.GradientCollectorCallback(
        path=tmp_path / "example",
        track_order=True,
    )
    trainer = Trainer(
        model=copy.deepcopy(cases.causal("gpt_neox")),
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=train_dataset,
        data_collator=default_data_collator,
        callbacks=[callback],
    )
    trainer = fa.prepare_for_gradient_collection(trainer)
    trainer.train()
    store = fa.open_store(tmp_path / "example/epoch_0")
    assert len(store) == len(TEXTS)
    assert sorted(set(store.examples["step"][:])) == [1, 2]
