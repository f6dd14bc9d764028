"""Runs of classifiers and encoder-decoders, in Python and on the command line: the loss is the model's own kind."""

import json
from pathlib import Path

import datasets
import pytest
import torch
from torch import nn

import funcattrib as fa
from funcattrib.data import Columns
from funcattrib.store import read_manifest
from tests.support import other_tasks, tiny

TEXTS = tiny.texts(9)
TARGETS = tiny.texts(9, seed=5, longest=7)
LABELS = [at % 3 for at in range(9)]
SMALL = {"projection_dim": 4, "rows_per_shard": 4, "dtype": "float32", "quiet": True}


@pytest.fixture(scope="module")
def words():
    return tiny.make_tokenizer()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, words) -> Path:
    """A classifier and an encoder-decoder as ``save_pretrained`` leaves them, with data for each."""
    folder = tmp_path_factory.mktemp("tasks")
    for name, model in (("bert", other_tasks.classifier("bert")), ("t5", other_tasks.pair("t5"))):
        model.save_pretrained(folder / name)
        words.save_pretrained(folder / name)
    rows = [{"text": t, "target": o, "label": y} for t, o, y in zip(TEXTS, TARGETS, LABELS, strict=True)]
    tiny.write_jsonl(folder / "d.jsonl", rows)
    return folder


def by_hand(loss, params, examples: list[dict]) -> torch.Tensor:
    compute = fa.compose(fa.per_example_grad, fa.project(4)).bind(loss, params)
    rows = [compute({name: value[None] for name, value in each.items()}).grads for each in examples]
    return torch.cat([torch.cat([grad.flatten(1) for grad in row.values()], 1) for row in rows])


def matrix(store) -> torch.Tensor:
    return torch.tensor(store.matrix()[:])


def encoded(words, texts: list[str]) -> list[torch.Tensor]:
    return [torch.tensor(words(text)["input_ids"]) for text in texts]


def classified(words) -> torch.Tensor:
    loss, params = fa.sequence_classification_loss(other_tasks.classifier("bert"))
    pairs = zip(encoded(words, TEXTS), LABELS, strict=True)
    return by_hand(loss, params, [{"input_ids": ids, "label": torch.tensor(label)} for ids, label in pairs])


def translated(words) -> torch.Tensor:
    loss, params = fa.seq2seq_loss(other_tasks.pair("t5"))
    pairs = zip(encoded(words, TEXTS), encoded(words, TARGETS), strict=True)
    return by_hand(loss, params, [{"input_ids": ids, "labels": target} for ids, target in pairs])


def test_a_classifier_from_python(words, tmp_path: Path) -> None:
    model, rows = other_tasks.classifier("bert"), [{"text": t, "kind": y} for t, y in zip(TEXTS, LABELS, strict=True)]
    columns = Columns(label_column="kind")
    store = fa.collect_gradients(model, rows, path=tmp_path / "run", tokenizer=words, columns=columns, **SMALL)
    expected = classified(words)
    torch.testing.assert_close(matrix(store), expected, rtol=1e-4, atol=1e-5)
    manifest = store.manifest
    assert (manifest.loss["kind"], manifest.loss["task"]) == ("ce", "sequence_classification")
    assert manifest.data["label_column"] == "kind"
    assert store.examples["kind"][:] == LABELS
    asked = fa.Attributor(tmp_path / "run", model=model, tokenizer=words)
    found = asked.gradients(rows[2:5])
    torch.testing.assert_close(found, expected[2:5], rtol=1e-4, atol=1e-5)
    assert asked.ask(rows[2:3], k=1)[0][0].text == TEXTS[int((expected @ expected[2]).argmax())]
    with pytest.raises(fa.DataError, match="requires labels, and the data has no column 'label'"):
        asked.ask(["w1 w2"])


def test_an_encoder_decoder_from_python(words, tmp_path: Path) -> None:
    model = other_tasks.pair("t5")
    rows = [{"de": source, "en": target} for source, target in zip(TEXTS, TARGETS, strict=True)]
    columns = Columns("de", "en")
    store = fa.collect_gradients(model, rows, path=tmp_path / "run", tokenizer=words, columns=columns, **SMALL)
    expected = translated(words)
    torch.testing.assert_close(matrix(store), expected, rtol=1e-4, atol=1e-5)
    assert store.manifest.loss["task"] == "seq2seq"
    assert store.manifest.text_columns == ("de", "en")
    asked = fa.Attributor(tmp_path / "run", model=model, tokenizer=words)
    torch.testing.assert_close(asked.gradients(rows[:3]), expected[:3], rtol=1e-4, atol=1e-5)
    ready = [
        {"input_ids": words(s)["input_ids"], "labels": [*words(t)["input_ids"], -100, -100]}
        for s, t in zip(TEXTS, TARGETS, strict=True)
    ]
    again = fa.collect_gradients(model, ready, path=tmp_path / "ready", **SMALL)
    assert torch.equal(matrix(again), matrix(store))


def test_ready_tokens_with_labels(words, tmp_path: Path) -> None:
    ready = [{"input_ids": words(t)["input_ids"], "labels": y} for t, y in zip(TEXTS, LABELS, strict=True)]
    store = fa.collect_gradients(other_tasks.classifier("bert"), ready, path=tmp_path / "run", **SMALL)
    torch.testing.assert_close(matrix(store), classified(words), rtol=1e-4, atol=1e-5)


def test_names_of_labels_several_labels_and_numbers(words, tmp_path: Path) -> None:
    def collected(model: nn.Module, labels: list, name: str) -> torch.Tensor:
        rows = [{"text": text, "label": label} for text, label in zip(TEXTS, labels, strict=False)]
        return matrix(fa.collect_gradients(model, rows, path=tmp_path / name, tokenizer=words, **SMALL))

    model = other_tasks.classifier("bert")
    named = collected(model, [f"LABEL_{y}" for y in LABELS], "named")
    torch.testing.assert_close(named, classified(words), rtol=1e-4, atol=1e-5)
    several, number = (other_tasks.classifier("bert", *made) for made in ((3, None), (1, None)))
    for model, labels, name in ((several, [[1, 0, 1], [0.0, 0.5, 0]], "several"), (number, [0.5, -2], "number")):
        loss, params = fa.sequence_classification_loss(model)
        ids = encoded(words, TEXTS)
        examples = [{"input_ids": ids[at], "label": torch.tensor(y).float()} for at, y in enumerate(labels)]
        torch.testing.assert_close(
            collected(model, labels, name), by_hand(loss, params, examples), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 3], "expected a class from 0 to 2 in 'label', found 3 in row 1\nrepair or drop the row"),
        ([0, -1], "found -1 in row 1"),
        ([0.0, 0.5], "found 0.5 in row 1"),
        ([1, None], "column 'label' has null in place of a label in 1 row: 1"),
        (
            ["LABEL_0", "good"],
            r"one of the model's labels \(LABEL_0, LABEL_1, LABEL_2\) in 'label', found 'good' in row 1",
        ),
        ([{"a": 1}, {"a": 2}], "expected a class a row in 'label'"),
    ],
)
def test_labels_that_are_wrong(words, tmp_path: Path, labels: list, message: str) -> None:
    rows = [{"text": "w1 w2", "label": label} for label in labels]
    with pytest.raises(fa.DataError, match=message):
        fa.collect_gradients(other_tasks.classifier("bert"), rows, path=tmp_path / "run", tokenizer=words, quiet=True)
    assert not (tmp_path / "run").exists()


def test_several_labels_that_are_wrong(words, tmp_path: Path) -> None:
    model = other_tasks.classifier("bert", 3, "multi_label_classification")
    for labels, message in (
        ([[0, 1, 1], [0, 1]], r"expected 3 labels, each from 0 to 1, in 'label', found \[0, 1\] in row 1"),
        ([[0, 1, 1], [0, 1, 2]], "found 2 in row 1"),
        ([0, 1], "expected 3 labels, each from 0 to 1, in 'label', found 0 in row 0"),
    ):
        rows = [{"text": "w1 w2", "label": label} for label in labels]
        with pytest.raises(fa.DataError, match=message):
            fa.collect_gradients(model, rows, path=tmp_path / "run", tokenizer=words, quiet=True)


def test_what_does_not_go_together(words, tmp_path: Path) -> None:
    settings = {"path": tmp_path / "run", "tokenizer": words, "quiet": True}
    bert, t5 = other_tasks.classifier("bert"), other_tasks.pair("t5")
    labelled, texts = [{"text": "w1", "label": 1}], [{"text": "w1 w2"}]
    for model, rows, more, message in (
        (t5, texts, {}, "an encoder-decoder requires a target; the data's columns are text\nname the column"),
        (bert, texts, {}, "requires labels, and the data has no column 'label'; its columns are text"),
        (bert, labelled, {"loss": "kl"}, "the loss kl requires a causal language model, found BertForSequenceClass"),
        (bert, labelled, {"granularity": "token"}, "granularity 'token' requires a causal language model"),
        (bert, labelled, {"columns": Columns(reward_column="label")}, r"`reward_column` \('label'\) requires a causal"),
        (
            t5,
            [{"input_ids": [3, 4]}],
            {},
            "an encoder-decoder requires a target, and beside 'input_ids' the data has no 'labels'",
        ),
    ):
        with pytest.raises(fa.FuncattribError, match=message):
            fa.collect_gradients(model, rows, **settings, **more)


@pytest.mark.parametrize("name", ["bert", "t5"])
def test_every_command(name: str, folders: Path, words, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """build, query, reduce, score and trackstar; the manifest names what the loss is of."""
    from funcattrib.cli.main import main

    def command(*given: object) -> str:
        assert main([str(word) for word in given]) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    data = ("--model", folders / name, "--dataset", folders / "d.jsonl")
    data += () if name == "bert" else ("--completion-column", "target")
    small = ("--projection-dim", 4, "--dtype", "float32")
    command("build", tmp_path / "run", *data, *small)
    expected = classified(words) if name == "bert" else translated(words)
    store = fa.open_store(tmp_path / "run")
    torch.testing.assert_close(matrix(store), expected, rtol=1e-4, atol=1e-5)
    asked = ("--label", LABELS[4]) if name == "bert" else ("--completion", TARGETS[4])
    said = command("query", "--index", tmp_path / "run", "--text", TEXTS[4], *asked, "--unit-norm", "--top-k", 1)
    assert said.splitlines()[1].split()[:3] == ["1", "1", "4"]
    assert TEXTS[4] in said
    command("reduce", tmp_path / "mean", *data, *small)
    torch.testing.assert_close(matrix(fa.open_store(tmp_path / "mean"))[0], expected.mean(0), rtol=1e-4, atol=1e-5)
    command("score", tmp_path / "scores", *data, *small, "--query-path", tmp_path / "run")
    scores = torch.tensor(fa.open_scores(tmp_path / "scores")[:])
    torch.testing.assert_close(scores, expected @ expected.T, rtol=1e-3, atol=1e-3)
    command("trackstar", tmp_path / "ts", *data, *small, "--query-dataset", folders / "d.jsonl")
    trained = read_manifest(tmp_path / "ts").loss
    task = {"bert": "sequence_classification", "t5": "seq2seq"}[name]
    assert (trained["kind"], trained["task"]) == ("log_odds", task)
    assert f"loss: ce, {'of a label' if name == 'bert' else 'sum over tokens of targets'}" in command(
        "inspect", tmp_path / "run"
    )
    assert main(["query", "--index", str(tmp_path / "run"), "--text", "w1"]) == 2
    wanted = "--label" if name == "bert" else "--completion"
    assert f"a query requires --text with {wanted}" in capsys.readouterr().err


def test_models_of_other_kinds_by_name(folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    from funcattrib.cli.main import main

    config = json.loads((folders / "bert" / "config.json").read_text())
    (tmp_path / "masked").mkdir()
    (tmp_path / "masked" / "config.json").write_text(json.dumps({**config, "architectures": ["BertForMaskedLM"]}))
    given = {
        "build": ["build", str(tmp_path / "run"), "--model", str(tmp_path / "masked"), "--dataset", "d.jsonl"],
        "plan": ["plan", "--model", str(tmp_path / "masked"), "--tokens", "1000000", "--tokens-per-second", "1"],
    }
    for words in given.values():
        assert main(words) == 2
        assert "an encoder (masked language model)\ngive a decoder" in capsys.readouterr().err
    for command in (["check", "--model"], ["plan", "--tokens", "1000000", "--tokens-per-second", "1", "--model"]):
        assert main([*command, str(folders / "t5")]) == 2
        assert "expected a causal language model, found" in capsys.readouterr().err


def test_data_sets_with_class_labels(words, tmp_path: Path) -> None:
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["a", "b", "c"])}
    )
    data = datasets.Dataset.from_dict({"text": TEXTS, "label": LABELS}, features=features)
    store = fa.collect_gradients(other_tasks.classifier("bert"), data, path=tmp_path / "run", tokenizer=words, **SMALL)
    torch.testing.assert_close(matrix(store), classified(words), rtol=1e-4, atol=1e-5)
