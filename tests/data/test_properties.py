"""Properties of batching and of the labels, over generated lengths, texts and conversations."""

import datasets
import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st

from funcattrib.data import Columns, Rows, collate, plan, tokenize
from funcattrib.data.encode import Text, encode
from tests.data.test_tokenize import byte_tokenizer

LENGTHS = st.lists(st.integers(0, 60), max_size=60)
TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="<>"), max_size=30)
TOKENIZER = byte_tokenizer()


@given(LENGTHS, st.integers(1, 100), st.integers(1, 16))
def test_a_plan_takes_each_document_once_longest_first_within_the_budget(lengths, budget, multiple):
    batches = plan(lengths, budget, multiple=multiple)
    order = [index for batch in batches for index in batch]
    assert sorted(order) == list(range(len(lengths)))
    assert order == sorted(order, key=lambda index: (-max(1, lengths[index]), index))
    for batch in batches:
        longest = -(-max(1, lengths[batch[0]]) // multiple) * multiple
        assert len(batch) == 1 or len(batch) * longest <= budget


@given(LENGTHS, st.integers(1, 100))
def test_a_batch_is_closed_only_where_the_next_document_does_not_fit(lengths, budget):
    batches = plan(lengths, budget)
    for batch in batches[:-1]:
        assert (len(batch) + 1) * max(1, lengths[batch[0]]) > budget


@given(st.lists(st.lists(st.integers(0, 99), max_size=12), min_size=1, max_size=8))
def test_collate_keeps_every_token_and_adds_only_padding(ids):
    batch = collate([{"input_ids": row, "labels": row} for row in ids], pad_id=100)
    for row, padded, labels in zip(ids, batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
        assert padded[: len(row)] == labels[: len(row)] == row
        assert set(padded[len(row) :]) <= {100}
        assert set(labels[len(row) :]) <= {-100}


@settings(max_examples=60, deadline=None)
@given(st.lists(TEXTS, min_size=1, max_size=5))
def test_rows_are_the_tokenizers_own(texts):
    rows = Rows(
        tokenize(datasets.Dataset.from_dict({"text": texts}), TOKENIZER, max_length=999, truncation=False).dataset
    )
    for text, row in zip(texts, rows, strict=True):
        assert row["input_ids"].tolist() == row["labels"].tolist() == TOKENIZER(text)["input_ids"]


@settings(max_examples=100, deadline=None)
@given(TEXTS, TEXTS)
@example("", " ")
@example("", "  a")
def test_the_labelled_tokens_hold_the_completion(prompt, completion):
    data = datasets.Dataset.from_dict({"p": [prompt], "c": [completion]})
    row = tokenize(data, TOKENIZER, Columns("p", "c"), max_length=999, truncation=False).dataset[0]
    ids, labels = np.array(row["input_ids"]), np.array(row["labels"])
    labelled = labels != -100
    assert (ids[labelled] == labels[labelled]).all()
    assert np.all(np.diff(labelled.astype(int)) >= 0)  # once begun, to the end
    # The labelled tokens spell the completion, with what a token over the border holds of the prompt.
    assert TOKENIZER.decode(ids[labelled]).endswith(completion)
    assert bool(labelled.any()) == bool(completion)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["user", "assistant"]), TEXTS), min_size=1, max_size=5))
def test_marked_and_unmarked_templates_label_the_same_turns(turns):
    marked, unmarked = byte_tokenizer("generation"), byte_tokenizer("plain")
    messages = [{"role": "user", "content": "begin"}, *({"role": role, "content": text} for role, text in turns)]
    data = datasets.Dataset.from_dict({"m": [messages]})
    columns = Columns(conversation_column="m")
    first = tokenize(data, marked, columns, max_length=9999, truncation=False).dataset[0]
    second = tokenize(data, unmarked, columns, max_length=9999, truncation=False).dataset[0]
    assert first == second


@settings(max_examples=60, deadline=None)
@given(TEXTS, st.lists(st.integers(0, 30), min_size=2, max_size=2))
def test_offsets_and_prefixes_agree_on_bytes(text, borders):
    first, stop = sorted(min(border, len(text)) for border in borders)
    documents = [Text(text, [(first, stop)])]
    arguments = {"special_tokens": False, "max_length": 999, "truncation": False}
    fast = byte_tokenizer(merges=False)
    slow = byte_tokenizer(merges=False)
    slow.__class__ = type("Slow", (type(slow),), {"is_fast": False})
    left, right = encode(documents, fast, **arguments), encode(documents, slow, **arguments)
    assert left.labels[0].tolist() == right.labels[0].tolist()
