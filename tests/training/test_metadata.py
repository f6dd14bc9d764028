"""Columns of the data set beside those that a store of a training has of its own."""

import datasets
import pytest

from funcattrib.training.metadata import metadata_of, text_columns
from tests.support import tiny

IDS = tiny.make_tokenizer()("w1 w2")["input_ids"]


@pytest.mark.parametrize(
    ("columns", "expected", "texts"),
    [
        ({"document": ["a", "b"], "n": [1, 2]}, {"document": ["b"]}, ("document",)),
        ({"tokens": ["a", "b"], "loss": ["c", "d"]}, {"data.tokens": ["b"], "loss": ["d"]}, ("data.tokens", "loss")),
        ({"input_ids": [IDS, IDS]}, {"text": ["w1 w2"]}, ("text",)),
    ],
)
def test_of_a_data_set(columns: dict, expected: dict, texts: tuple[str, ...]) -> None:
    examples, tokenizer = datasets.Dataset.from_dict(columns), tiny.make_tokenizer()
    assert metadata_of(examples, tokenizer)(range(1, 2)) == {"id": ["1"], **expected}
    assert text_columns(examples, tokenizer) == texts


def test_of_a_list() -> None:
    examples = [{"input_ids": IDS, "id": "x"}]
    assert metadata_of(examples, tiny.make_tokenizer())(range(1)) == {"id": ["x"], "text": ["w1 w2"]}
    assert text_columns(examples, tiny.make_tokenizer()) == ("text",)
    assert text_columns(examples, None) == ()
