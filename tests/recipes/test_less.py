"""LESS against its formula in dense float64; what is selected, refused and continued."""

import json
import shutil

import datasets
import numpy as np
import pytest
import torch
import transformers

import funcattrib as fa
from funcattrib.checkpoints.training_run import learning_rates
from funcattrib.recipes import less as recipe
from funcattrib.recipes.less import less
from funcattrib.recipes.query_halves import agreement
from tests.support import tiny
from tests.support.saved_runs import records, save_run

TRAIN, QUERY = records((9, 5, 12, 2, 7, 11, 6, 8, 10, 4), 1), records((6, 9, 7, 8), 2)
SUBTASKS = ["a", "b", "a", "c"]
COMMON = {"rows_per_shard": 4, "token_batch_size": 40, "quiet": True}
RATES = (2e-3, 1e-3)  # what `save_run` logs in the mean


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return save_run(tmp_path_factory.mktemp("run"))


def gradient(model, record, names):
    model.zero_grad()
    ids = torch.tensor([record["input_ids"]])
    model(input_ids=ids, labels=ids).loss.backward()
    own = dict(model.named_parameters())
    return {name: own[name].grad.clone() for name in names}


def dense(checkpoints, k):
    """Σ_i η_i cos(P Γ, P g) of every document and query, from the formula on whole gradients."""
    total = torch.zeros(len(TRAIN), len(QUERY), dtype=torch.float64)
    for rate, folder in zip(RATES, checkpoints, strict=True):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
        saved = torch.load(folder / "optimizer.pt", weights_only=True)
        group, order = saved["param_groups"][0], [name for name, _ in model.named_parameters()]
        (b1, b2), eps = group["betas"], group["eps"]
        names = list(fa.causal_lm_loss(model)[1])
        sides = fa.project(k, seed=7).init(
            {n: fa.Leaf(tuple(model.get_parameter(n).shape), torch.float32) for n in names}
        )

        def projected(grads, sides=sides[0], names=names):
            parts = []
            for name in names:
                left, right = (m if m is None else m.double() for m in (sides[name]["left"], sides[name]["right"]))
                g = grads[name] if left is None else left @ grads[name]
                parts.append((g if right is None else g @ right.T).flatten())
            return torch.nn.functional.normalize(torch.cat(parts), dim=0)

        def update(g, name, saved=saved, order=order, b1=b1, b2=b2, eps=eps):
            state = saved["state"][order.index(name)]
            t = float(state["step"]) + 1
            m = (b1 * state["exp_avg"].double() + (1 - b1) * g) / (1 - b1**t)
            v = (b2 * state["exp_avg_sq"].double() + (1 - b2) * g**2) / (1 - b2**t)
            return m / (v.sqrt() + eps)

        rows = []
        for record in TRAIN:
            whole = gradient(model, record, names)
            rows.append(projected({name: update(g, name) for name, g in whole.items()}))
        queries = torch.stack([projected(gradient(model, record, names)) for record in QUERY])
        total += rate * torch.stack(rows) @ queries.T
    return total.numpy()


@pytest.mark.parametrize("how", ["nearest", "mean", "subtasks"])
def test_scores_are_those_of_the_formula(how, run, tmp_path) -> None:
    every = dense(run, 3)
    expected = {
        "nearest": lambda: every.max(1),
        "mean": lambda: every.mean(1),
        "subtasks": lambda: np.stack([every[:, [0, 2]].mean(1), every[:, 1], every[:, 3]], 1).max(1),
    }[how]()
    queries = [{**record, "subtask": task} for record, task in zip(QUERY, SUBTASKS, strict=True)]
    options = {"subtask_column": "subtask"} if how == "subtasks" else {"score": how}
    scores = less(run, TRAIN, queries, path=tmp_path, fraction=0.3, projection_dim=3, seed=7, **COMMON, **options)
    assert scores.shape == (10, 1)
    np.testing.assert_allclose(np.asarray(scores)[:, 0], expected, atol=2e-4 * np.abs(expected).max())
    order = np.argsort(-expected)[:3]
    selected = datasets.load_from_disk(tmp_path / "selected")
    assert selected["id"][:] == [f"1-{i}" for i in order]
    assert selected["input_ids"][0] == TRAIN[order[0]]["input_ids"]
    assert (selected["rank"][:], selected["source_row"][:]) == ([1, 2, 3], order.tolist())
    np.testing.assert_allclose(selected["score"][:], np.asarray(scores)[order, 0])
    assert fa.open_scores(tmp_path).topk(3).rows[0].tolist() == order.tolist()
    assert fa.open_scores(tmp_path / "gradients" / "1").shape == (
        10,
        {"nearest": 4, "mean": 1 + 2, "subtasks": 3 + 2}[how],
    )


def test_whole_gradients_and_another_fraction_of_the_same_scores(run, tmp_path) -> None:
    whole = less(run, TRAIN, QUERY, path=tmp_path, projection_dim=0, fraction=0.5, **COMMON)
    wide = less(run, TRAIN, QUERY, path=tmp_path / "wide", projection_dim=1000, fraction=0.5, **COMMON)
    np.testing.assert_allclose(np.asarray(whole), np.asarray(wide), rtol=1e-4)
    assert len(datasets.load_from_disk(tmp_path / "selected")) == 5
    less(run, TRAIN, QUERY, path=tmp_path, projection_dim=0, fraction=0.01, **COMMON)
    assert datasets.load_from_disk(tmp_path / "selected")["id"][:] == [f"1-{np.argmax(np.asarray(whole)[:, 0])}"]


def test_a_text_is_selected_once_and_columns_stay(run, tmp_path) -> None:
    data = [*TRAIN[:4], *({**record, "id": f"copy of {record['id']}"} for record in TRAIN[:4])]
    data = [{**record, "rank": "theirs"} for record in data]
    tokenizer = tiny.make_tokenizer()
    settings = {**COMMON, "projection_dim": 2, "fraction": 0.5, "tokenizer": tokenizer}
    less(run, data, QUERY, path=tmp_path, **settings)
    selected = datasets.load_from_disk(tmp_path / "selected")
    assert sorted(selected["source_row"][:]) == [0, 1, 2, 3]
    assert selected["rank"][:] == [1, 2, 3, 4]
    assert selected["data.rank"][:] == ["theirs"] * 4
    less(run, data, QUERY, path=tmp_path, unique=False, **settings)
    rows = datasets.load_from_disk(tmp_path / "selected")["source_row"][:]
    assert [row % 4 for row in rows[::2]] == [row % 4 for row in rows[1::2]]


def test_queries_that_say_nothing_are_named(run, tmp_path, caplog) -> None:
    draw = np.random.default_rng(0)
    data = [{"input_ids": draw.integers(1, 60, 8).tolist()} for _ in range(24)]
    settings = {**COMMON, "projection_dim": 2, "quiet": False}
    scores = less(run, data, QUERY, path=tmp_path / "mean", score="mean", **settings)
    parts = [np.asarray(fa.open_scores(tmp_path / "mean/gradients" / str(number))) for number in range(2)]
    total = sum(rate * part for rate, part in zip(RATES, parts, strict=True))
    np.testing.assert_allclose(np.asarray(scores)[:, 0], total[:, 1:].mean(1), rtol=1e-4)
    found = agreement(total, {"mean": range(len(QUERY))})
    assert found.spread < 1.5 * found.noise, found
    assert "the queries hardly separate the documents" in caplog.text
    caplog.clear()
    less(run, data, [*data[:1] * 4], path=tmp_path / "one", score="mean", **settings)
    assert "hardly separate" not in caplog.text


def test_an_interrupted_run_continues_with_its_checkpoint(run, tmp_path, monkeypatch) -> None:
    settings = {**COMMON, "projection_dim": 3}
    expected = np.asarray(less(run, TRAIN, QUERY, path=tmp_path / "whole", **settings))
    visited, fill = [], recipe.fill

    def stopped(work, writer, state, label):
        visited.append((writer.path.name, list(writer.pending)))
        if len(visited) == 2:
            raise KeyboardInterrupt
        fill(work, writer, state, label)

    monkeypatch.setattr(recipe, "fill", stopped)
    with pytest.raises(KeyboardInterrupt):
        less(run, TRAIN, QUERY, path=tmp_path / "out", **settings)
    again = less(run, TRAIN, QUERY, path=tmp_path / "out", **settings)
    assert visited == [("0", [0, 1, 2]), ("1", [0, 1, 2]), ("1", [0, 1, 2])]
    assert (np.asarray(again) == expected).all()


def test_learning_rates_are_those_logged_since_the_checkpoint_before(run, tmp_path) -> None:
    assert learning_rates(run) == pytest.approx(RATES)
    assert learning_rates(run[1:]) == pytest.approx([np.mean(RATES)])
    assert learning_rates(run, [1.0, 3.0]) == [1.0, 3.0]
    silent = tmp_path / "checkpoint-3"
    shutil.copytree(run[0], silent)
    (silent / "trainer_state.json").write_text(json.dumps({"global_step": 3, "log_history": []}))
    assert learning_rates([silent]) == [2e-3]
    (silent / "scheduler.pt").unlink()
    with pytest.raises(
        fa.FuncattribError, match=r"has no learning rate above 0 .*; give one for each checkpoint with `learn"
    ):
        learning_rates([silent])


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"checkpoints": []}, "no checkpoint was given"),
        ({"fraction": 0.0}, "`fraction` above 0 and at most 1, found 0.0"),
        ({"fraction": 1.5}, "found 1.5"),
        ({"score": "best"}, "found 'best'"),
        ({"learning_rates": [1.0]}, "one learning rate for each of 2 checkpoints, found 1"),
        ({"learning_rates": [1.0, -1.0]}, "positive learning rates, found -1.0"),
        ({"subtask_column": "task"}, "the queries have no column 'task' of subtasks; they have input_ids, id"),
        ({"subtask_column": "id", "score": "mean"}, "`subtask_column` requires `score='nearest'`"),
        ({"checkpoints": ["nowhere"]}, "the checkpoint nowhere is not a folder"),
    ],
)
def test_what_cannot_be_asked_for(change, found, run, tmp_path) -> None:
    asked = {"checkpoints": run, **change}
    with pytest.raises(fa.FuncattribError, match=found):
        less(asked.pop("checkpoints"), TRAIN, QUERY, path=tmp_path / "out", **COMMON, **asked)
    assert not (tmp_path / "out").exists()


def test_checkpoints_that_do_not_fit_are_refused(run, tmp_path) -> None:
    bare, other = tmp_path / "bare", save_run(tmp_path / "other", "gpt2", (1e-3,))[0]
    shutil.copytree(run[0], bare)
    (bare / "optimizer.pt").unlink()
    with pytest.raises(fa.FuncattribError, match=r"bare has no optimizer\.pt, and LESS needs Adam's moments"):
        less([run[0], bare], TRAIN, QUERY, path=tmp_path / "out", **COMMON)
    shutil.copy(other / "optimizer.pt", bare / "optimizer.pt")
    with pytest.raises(fa.FuncattribError, match="expected the state of the model's"):
        less([bare], TRAIN, QUERY, path=tmp_path / "out", **COMMON)
    (bare / "config.json").unlink()
    with pytest.raises(fa.FuncattribError, match=r"the model .* cannot be loaded"):
        less([bare], TRAIN, QUERY, path=tmp_path / "out", **COMMON)
    with pytest.raises(fa.FuncattribError, match=r"one architecture: .* in .*checkpoint-3, and"):
        less([run[0], other], TRAIN, QUERY, path=tmp_path / "out", **COMMON)


def test_the_command_on_a_trainers_checkpoints(funcattrib, tmp_path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny.save_model(tmp_path / "model"))
    tokenizer = tiny.make_tokenizer()
    texts = tiny.texts(8)
    rows = [tokenizer(text) for text in texts]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path / "trained"),
        per_device_train_batch_size=4,
        num_train_epochs=2,
        save_strategy="epoch",
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        learning_rate=1e-3,
    )
    collator = transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False)
    transformers.Trainer(
        model, arguments, train_dataset=rows, data_collator=collator, processing_class=tokenizer
    ).train()
    train = tiny.write_jsonl(tmp_path / "train.jsonl", [{"text": text, "n": i} for i, text in enumerate(texts)])
    query = tiny.write_jsonl(tmp_path / "query.jsonl", [{"text": text} for text in texts[2:4]])
    checkpoints = sorted((tmp_path / "trained").iterdir())
    words = ["less", tmp_path / "out", "--dataset", train, "--query-dataset", query, "--fraction", 0.25]
    words += [word for folder in checkpoints for word in ("--checkpoint", folder)]
    ran = funcattrib(*words, "--projection-dim", 4)
    assert ran.code == 0, ran.err
    assert f"selected: {tmp_path / 'out' / 'selected'}" in ran.out
    selected = datasets.load_from_disk(tmp_path / "out" / "selected")
    assert selected.column_names == ["text", "n", "score", "rank", "source_row"]
    assert len(selected) == 2
    rates = fa.open_scores(tmp_path / "out").manifest.computed_with["method"]["learning_rates"]
    assert rates[0] > rates[1] > 0
    again = funcattrib("less", tmp_path / "out", "--config", tmp_path / "out" / "config.yaml")
    assert again.code == 0, again.err
    wrong = funcattrib(*words, "--fraction", 2)
    assert wrong.code == 2
    assert "at most 1, found 2" in wrong.err
