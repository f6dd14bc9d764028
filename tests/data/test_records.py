import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch

from funcattrib.data.numeric_examples import Examples
from funcattrib.data.records import open_examples, open_records
from funcattrib.errors import DataError

TEXTS = ["one", "two", "three"]
ROWS = [{"text": text} for text in TEXTS]
BASE = datasets.Dataset.from_list(ROWS)


@pytest.mark.parametrize(
    "data",
    [
        BASE,
        datasets.DatasetDict({"train": BASE, "test": BASE.select([0])}),
        pd.DataFrame({"text": TEXTS}, index=[5, 6, 7]),
        pa.table({"text": TEXTS}),
        TEXTS,
        tuple(TEXTS),
        np.array(TEXTS),
        {"text": TEXTS},
        ROWS,
        (row for row in ROWS),
    ],
    ids=lambda data: type(data).__name__,
)
def test_every_form_of_data_is_read(data):
    found = open_records(data)
    assert found.column_names == ["text"]
    assert found["text"][:] == TEXTS


def test_a_path_a_split_and_a_text_column(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\nthree\n")
    assert open_records(tmp_path / "a.txt", "train[1:]")["text"][:] == TEXTS[1:]
    assert open_records(datasets.DatasetDict({"a": BASE, "b": BASE.select([1])}), "b")["text"][:] == ["two"]
    assert open_records(TEXTS, text_column="body").column_names == ["body"]
    sparse = open_records([{"text": "a"}, {"text": "b", "note": "c"}])  # a key that the first row lacks
    assert sparse["note"][:] == [None, "c"]


def test_values_of_several_types_are_kept():
    calls = [{"m": [{"role": "user", "arguments": {"at": at}}]} for at in ("now", 5, [1, "a"])]
    assert [row["m"][0]["arguments"]["at"] for row in open_records(calls)] == ["now", 5, [1, "a"]]


BAD = {
    "nothing": (None, "found None"),
    "a number": (5, "found int"),
    "no rows": ([], "has no rows"),
    "numbers": ([1, 2], "rows as dicts or texts, found int"),
    "columns of two lengths": ({"text": ["a"], "id": [1, 2]}, "columns of one length"),
    "one row": ({"text": "a"}, "put one row into a list"),
    "splits": (datasets.DatasetDict({"a": BASE, "b": BASE}), "choose one with `split`"),
    "half a character": ([{"text": "ok"}, {"text": "a \ud83d b"}], r"the text in row 1 is no Unicode.*'\\ud83d'"),
    "half a character in a column": ({"text": ["caf\udce9"]}, r"the text in row 0 is no Unicode"),
    "a dict that is no column": ({"text": ["a"], "id": 5}, "columns of one length"),
}


@pytest.mark.parametrize("name", list(BAD))
def test_other_data_are_refused_in_two_lines(name):
    data, says = BAD[name]
    with pytest.raises(DataError, match=says) as raised:
        open_records(data)
    assert str(raised.value).count("\n") <= 1


def test_examples_for_a_loss():
    x, y = torch.eye(3), [0, 1, 2]
    rows = [{"x": x[i], "y": y[i]} for i in range(3)]
    for data in (rows, {"x": x, "y": y}, pd.DataFrame({"x": x.tolist(), "y": y}), (row for row in rows)):
        batch = Examples(open_examples(data)).batch([2, 0])
        assert torch.equal(batch["x"], x[[2, 0]])
        assert batch["y"].tolist() == [2, 0]
    with pytest.raises(DataError, match=r'found tuple\n.*\[\{"x": x, "y": y\} for x, y in data\]'):
        open_examples(torch.utils.data.TensorDataset(x, x))


def test_sequences_of_one_example_may_differ_in_length():
    rows = [{"x": torch.arange(12.0), "y": [1.0, 2.0, 3.0], "n": 1}, {"x": [1, 2], "y": torch.zeros(0), "n": 2}]
    corpus = Examples(rows)
    batch = corpus.batch([0, 1])
    assert corpus.lengths.tolist() == [12, 2]
    assert {name: tuple(tensor.shape) for name, tensor in batch.items()} == {"x": (2, 12), "y": (2, 3), "n": (2,)}
    assert batch["x"][1].tolist() == [1, 2] + [0] * 10
    assert batch["y"][1].tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("value", "dtype"),
    [
        (torch.ones(3, dtype=torch.float64), torch.float64),
        (torch.ones(1, 3, dtype=torch.float64), torch.float64),
        (torch.ones((), dtype=torch.float64), torch.float64),
        (torch.ones(2, 3, dtype=torch.bfloat16), torch.bfloat16),
        (torch.ones(3, dtype=torch.bfloat16), torch.float32),
        (torch.ones(2, 2, dtype=torch.uint8), torch.uint8),
        (torch.ones(3, dtype=torch.int32), torch.int64),
        (np.ones(3), torch.float32),
        ([1.0, 2.0], torch.float32),
        ([1, 2], torch.int64),
        ([], torch.int64),
        (True, torch.int64),
    ],
)
def test_the_types_of_examples(value, dtype):
    corpus = Examples([{"x": value}])
    assert corpus.batch([0])["x"].dtype == dtype
    assert len(corpus.identity()["fingerprint"]) == 64


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([{"x": torch.ones(1, 3)}, {"x": torch.ones(2, 3)}], r"found \(1, 3\) in row 0 and \(2, 3\) in row 1"),
        ([{"x": 1.0}, {"x": [1.0]}], r"found \(\) in row 0 and \(1,\) in row 1"),
        ([{"x": 1.0}, {"y": 1.0}], r"found \['y'\] in row 1"),
        ([{"input_ids": [1, 2], "labels": [1]}], "2 in 'input_ids', 1 in 'labels'"),
        ([{"x": "text"}], "expected numbers in 'x'"),
        ([{"x": [[1], [1, 2]]}], "lists of several lengths"),
        ([], "empty"),
    ],
)
def test_examples_that_cannot_be_stacked_are_refused_first(rows, says):
    with pytest.raises(DataError, match=says):
        Examples(rows)
