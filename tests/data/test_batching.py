import datasets
import numpy as np
import pytest
import torch

from funcattrib.data import Rows, collate, fingerprint, plan, shard_ranges
from funcattrib.errors import DataError


def test_shards_cover_every_row():
    assert shard_ranges(0, 4) == []
    assert shard_ranges(9, 4) == [range(4), range(4, 8), range(8, 9)]
    with pytest.raises(DataError):
        shard_ranges(9, 0)


def test_a_plan_keeps_to_its_budget_and_gives_a_long_document_its_own_batch():
    assert plan([2, 9, 2, 4, 2], 8) == [[1], [3, 0], [2, 4]]
    assert plan([3, 3, 3], 8, multiple=4) == [[0, 1], [2]]
    assert plan(np.array([0, 0, 0]), 2) == [[0, 1], [2]]
    assert plan([], 8) == []
    with pytest.raises(DataError):
        plan([1], 0)


def test_collate_pads_to_the_right_each_column_in_its_way():
    batch = collate(
        [
            {"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "token_weights": [0.5, 1, 1], "attention_mask": [1, 1, 1]},
            {
                "input_ids": np.array([8], np.int32),
                "labels": torch.tensor([8]),
                "token_weights": [2],
                "attention_mask": [1],
            },
            {"input_ids": [], "labels": [], "token_weights": [], "attention_mask": []},
        ],
        pad_id=9,
    )
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 9], [9, 9, 9]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [8, -100, -100], [-100, -100, -100]]
    assert batch["token_weights"].tolist() == [[0.5, 1, 1], [2, 0, 0], [0, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0], [0, 0, 0]]
    assert {name: column.dtype for name, column in batch.items()} == {
        "input_ids": torch.int64,
        "labels": torch.int64,
        "token_weights": torch.float32,
        "attention_mask": torch.int64,
    }


def test_collate_stacks_single_numbers_and_takes_a_length():
    batch = collate([{"input_ids": [1], "advantage": 0.5}, {"input_ids": [2, 3], "advantage": -1}], pad_id=0, length=4)
    assert batch["input_ids"].shape == (2, 4)
    assert batch["advantage"].tolist() == [0.5, -1.0]
    assert batch["advantage"].dtype == torch.float32


def test_a_document_without_tokens_is_one_padding_token_without_label():
    batch = collate([{"input_ids": [], "labels": []}], pad_id=3)
    assert batch["input_ids"].tolist() == [[3]]
    assert batch["labels"].tolist() == [[-100]]


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([], "at least one example"),
        ([{"input_ids": [1]}, {"labels": [1]}], "keys"),
        ([{"input_ids": [1], "labels": [1, 2]}], "equal lengths"),
        ([{"input_ids": ["a"]}], "number per token"),
        ([{"input_ids": [1], "text": "a"}], "number per token"),
        ([{"input_ids": [[1], [2, 3]]}], "number per token"),
        ([{"input_ids": [1]}, {"input_ids": 1}], "single number"),
        ([{"input_ids": [1, 2, 3]}], "at most 2"),
    ],
)
def test_collate_refuses_what_does_not_fit(rows, says):
    with pytest.raises(DataError, match=says):
        collate(rows, pad_id=0, length=2)


def tokens(ids, **columns):
    return datasets.Dataset.from_dict({"input_ids": ids, "labels": ids, **columns})


def test_rows_read_what_datasets_reads():
    ids = [[1, 2], [], [3], [4, 5, 6]]
    dataset = datasets.concatenate_datasets([tokens(ids[:2]), tokens(ids[2:])])
    for view in (dataset, dataset.select([3, 1, 0]), dataset.select(range(1, 4)), dataset.select([])):
        rows = Rows(view)
        assert [row["input_ids"].tolist() for row in rows] == [list(row) for row in view["input_ids"]]
        assert rows.lengths.tolist() == [len(row) for row in view["input_ids"]]
    with pytest.raises(IndexError):
        Rows(dataset)[4]
    with pytest.raises(DataError, match="input_ids"):
        Rows(datasets.Dataset.from_dict({"text": ["a"]}))


def test_a_fingerprint_is_of_the_content_alone():
    ids = [[1, 2], [3], [4, 5, 6]]
    whole = tokens(ids)
    parts = datasets.concatenate_datasets([tokens(ids[:1]), tokens(ids[1:], length=[1, 3])])
    narrow = whole.cast(datasets.Features({name: datasets.List(datasets.Value("int32")) for name in whole.features}))
    same = {
        fingerprint(whole),
        fingerprint(parts),
        fingerprint(narrow),
        fingerprint(tokens([*ids, [7]]).select(range(3))),
    }
    assert len(same) == 1
    others = [tokens([[1], [2, 3], [4, 5, 6]]), whole.select([0, 2, 1]), whole.select([0, 1])]
    others += [datasets.Dataset.from_dict({"input_ids": ids, "labels": [[1, 2], [3], [-100, 5, 6]]})]
    others += [tokens(ids, token_weights=[[1.0, 1.0], [1.0], [1.0, 1.0, 0.5]])]
    assert len(same | {fingerprint(other) for other in others}) == 6
