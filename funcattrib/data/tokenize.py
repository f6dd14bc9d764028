"""Text, prompt and completion, conversations or ready tokens: to tokens and labels, row by row, on disk."""

import logging
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from funcattrib.data.batching import IGNORED, shard_ranges
from funcattrib.data.columns import Columns
from funcattrib.data.conversation import has_template, options_read, render, renderer
from funcattrib.data.encode import Text, TooLong, encode
from funcattrib.data.pretokenized import COLUMNS, Tokens, check_columns, read_tokens
from funcattrib.data.report import TokenizeReport, some_rows
from funcattrib.data.rows import Rows
from funcattrib.data.spill import ScratchTable, ragged
from funcattrib.data.token_weights import check_weights, is_list, token_weights
from funcattrib.errors import DataError

log = logging.getLogger(__name__)

_ROWS = 1000
_BYTES = 16 << 20  # of text at a time: a thousand books do not fit in memory as Python objects


class Tokenized(NamedTuple):
    """A data set with ``input_ids``, ``labels`` (list of int32), ``length`` (int32), memory-mapped, and the report.

    Rows and their order are the input's. Ready tokens that came with ``token_weights`` keep them (list of float32).
    """

    dataset: datasets.Dataset
    report: TokenizeReport


def tokenize(
    dataset: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase | None,
    columns: Columns | None = None,
    *,
    max_length: int,
    truncation: bool,
    vocab_size: int | None = None,
    scratch: Path | None = None,
    advance: Callable[[int], object] | None = None,
    name: str = "",
) -> Tokenized:
    """Tokenise a data set, and say which tokens count in the loss.

    A data set with ``input_ids`` is passed through checked, unless other columns are asked for; tokens that its
    ``attention_mask`` hides (padding) are taken off.

    Args:
        dataset: from ``load``.
        tokenizer: None only for ready tokens.
        columns: which columns to read; the text in ``text`` by default.
        max_length: most tokens in a document, the model's context.
        truncation: cut longer documents; otherwise one of them is an error.
        vocab_size: the model's, which no token may reach; for ready tokens the tokenizer's by default.
        scratch: folder for the tokens (4 bytes each, 8 with separate labels); by default the temporary folder.
        advance: called with the number of documents done since the last call.
        name: what messages call the data.

    Raises:
        DataError: naming the row or the columns, what was expected and what to do.

    Example:
        >>> ready = datasets.Dataset.from_dict({"input_ids": [[5, 6, 7, 8], [9]]})
        >>> tokenized = tokenize(ready, None, max_length=3, truncation=True)
        >>> tokenized.dataset["input_ids"][:], tokenized.report.tokens
        ([[5, 6, 7], [9]], 4)
    """
    columns = columns or Columns()
    if not len(dataset):
        raise DataError("the data set has no rows to tokenise\nchoose another split or file")
    if max_length < 1:
        raise DataError(f"expected max_length of at least 1, found {max_length}")
    weights_column, dataset = _weights_beside(dataset, columns)
    read, names = _reader(
        dataset, tokenizer, columns, max_length=max_length, truncation=truncation, vocab_size=vocab_size
    )

    report, long = TokenizeReport(), list[tuple[int, int]]()
    all_labelled = (
        columns.completion_column is None and columns.conversation_column is None and "input_ids" not in names
    )
    with ScratchTable(scratch) as written:
        for first_row, batch in _batches(dataset, names):
            try:
                tokens = read(batch, first_row)
            except TooLong as error:  # all of them are found before it is said
                long += error.rows
            if long:
                continue
            if weights_column is not None:
                rows = dataset.select_columns([weights_column]).with_format(None)
                values = rows[first_row : first_row + len(tokens.ids)][weights_column]
                cut_at = max_length if truncation else None
                weights = token_weights(values, tokens.ids, weights_column, first_row, cut_at)
                tokens = tokens._replace(weights=weights)
            _check_vocabulary(tokens, vocab_size, first_row)
            report = TokenizeReport(*(old + new for old, new in zip(report, _counts(tokens), strict=True)))
            arrays = {
                "input_ids": ragged(tokens.ids),
                "length": pa.array(np.fromiter(map(len, tokens.ids), np.int32, len(tokens.ids))),
            }
            if not all_labelled:
                arrays["labels"] = ragged(tokens.labels)
            if tokens.weights is not None:
                arrays["token_weights"] = ragged(tokens.weights)
            written.write(arrays)
            if advance is not None:
                advance(len(tokens.ids))
        if long:
            (row, length), more = long[0], f", and {len(long) - 1:,} more that are longer" if long[1:] else ""
            where = f"{f' of {name}' if name else ''}{more}"
            raise DataError(
                f"expected documents of at most {max_length:,} tokens, found {length:,} in row {row}{where}\n"
                "cut such documents with `truncation`, or split or drop them in the data"
            )
        table = written.table()
    if all_labelled:  # one copy on disk serves both
        table = table.append_column("labels", table.column("input_ids"))
    order = [name for name in ("input_ids", "labels", "token_weights", "length") if name in table.column_names]
    # A fingerprint is given because `datasets` would hash the whole table to make one.
    return Tokenized(
        datasets.Dataset(datasets.table.InMemoryTable(table.select(order)), fingerprint=uuid.uuid4().hex), report
    )


def _weights_beside(dataset: datasets.Dataset, columns: Columns) -> tuple[str | None, datasets.Dataset]:
    """Return the column of weights that tokenising does not read itself; with ready tokens it reads lists of them."""
    name = columns.token_weights_column
    if name is None:
        return None, dataset
    check_weights(dataset, name)
    if not columns.ready(dataset) or not is_list(dataset.features.arrow_schema.field(name).type):
        return name, dataset
    if name != "token_weights":
        dataset = dataset.remove_columns([name for name in ("token_weights",) if name in dataset.column_names])
        dataset = dataset.rename_column(name, "token_weights")
    return None, dataset


def _reader(
    dataset: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase | None,
    columns: Columns,
    *,
    max_length: int,
    truncation: bool,
    vocab_size: int | None,
) -> tuple[Callable[[dict[str, list[Any]], int], Tokens], list[str]]:
    """Return the function that turns a batch of rows into tokens, and the columns that it takes."""
    prompt, completion, conversation = columns.prompt, columns.completion_column, columns.conversation_column
    if columns.ready(dataset):
        check_columns(dataset)
        for name in set(COLUMNS) & set(dataset.column_names):
            _check_nulls(dataset, name, "tokens")
        size = vocab_size if vocab_size is not None else _vocab_size(tokenizer)

        def ready(batch: dict[str, list[Any]], first_row: int) -> Tokens:
            return read_tokens(
                batch, vocab_size=size, max_length=max_length, truncation=truncation, first_row=first_row
            )

        return ready, [name for name in COLUMNS if name in dataset.column_names]

    if tokenizer is None:
        raise DataError(
            f"the data has no column 'input_ids' and no tokenizer was given; its columns are {dataset.column_names}\n"
            "pass the model's tokenizer"
        )
    names = [conversation] if conversation is not None else [prompt] if completion is None else [prompt, completion]
    chat = conversation is not None or (completion is not None and all(_are_messages(dataset, name) for name in names))
    for name in names:
        _check_column(dataset, name, text=not chat)
    if chat and not has_template(tokenizer):
        log.warning("the tokenizer has no chat template; the turns of a conversation are concatenated")
    write = renderer(tokenizer) if chat else None
    options = options_read(tokenizer, dataset.column_names) if chat else []

    def texts(batch: dict[str, list[Any]], first_row: int) -> Tokens:
        if write is not None:
            documents = [
                render(
                    {name: batch[name][at] for name in names},
                    write,
                    row=first_row + at,
                    options={name: batch[name][at] for name in options},
                )
                for at in range(len(batch[names[0]]))
            ]
        elif completion is not None:
            pairs = zip(batch[prompt], batch[completion], strict=True)
            documents = [Text(before + after, [(len(before), len(before + after))]) for before, after in pairs]
        else:
            documents = [Text(text, None) for text in batch[prompt]]
        encoded = encode(
            documents,
            tokenizer,
            special_tokens=write is None or not has_template(tokenizer),
            max_length=max_length,
            truncation=truncation,
            first_row=first_row,
        )
        return Tokens(encoded.ids, encoded.labels, None, encoded.truncated)

    return texts, [*names, *options]


def _check_column(dataset: datasets.Dataset, name: str, *, text: bool) -> None:
    """Check that a column is there, holds text where it should, and no nulls, before anything is tokenised."""
    if name not in dataset.column_names:
        raise DataError(
            f"the data has no column '{name}'; its columns are {', '.join(dataset.column_names)}\n"
            "name the right one with `columns=Columns(prompt_column=…)`, `completion_column` or `conversation_column`"
        )
    kind = dataset.features[name]
    if text and getattr(kind, "dtype", None) not in ("string", "large_string", "string_view"):
        passed = f"pass it as `columns=Columns(conversation_column={name!r})`"
        cure = passed if _are_messages(dataset, name) else "convert the column to text"
        raise DataError(
            f"expected text in column '{name}', found {_type_name(kind)} (row 0: {dataset[0][name]!r:.60})\n"
            f"{cure}, or name another column"
        )
    _check_nulls(dataset, name, "text" if text else "messages")


def _are_messages(dataset: datasets.Dataset, name: str) -> bool:
    kind = dataset.features.get(name)
    return isinstance(kind, datasets.List) and isinstance(kind.feature, dict | datasets.Json)


def _check_nulls(dataset: datasets.Dataset, name: str, what: str) -> None:
    nulls = _null_rows(dataset, name)
    if nulls:
        raise DataError(
            f"column '{name}' has null in place of {what} in {some_rows(nulls)}\n"
            "drop or fill these rows (in a csv, an empty field, NA, null and nan are all read as null)"
        )


def _type_name(kind: Any) -> str:
    return str(kind.dtype) if isinstance(kind, datasets.Value) else type(kind).__name__


def _null_rows(dataset: datasets.Dataset, name: str) -> list[int]:
    view = dataset.select_columns([name]).with_format("arrow")
    rows: list[int] = []
    for start in range(0, len(view), 100_000):
        column = view[start : start + 100_000].column(name)
        if column.null_count:
            rows += (start + np.flatnonzero(column.is_null().to_numpy())).tolist()
    return rows


def _batches(dataset: datasets.Dataset, names: list[str]) -> Iterator[tuple[int, dict[str, list[Any]]]]:
    if "input_ids" in names:
        rows = Rows(dataset, names)
        for part in shard_ranges(len(rows), _ROWS):
            examples = [rows[row] for row in part]
            yield part.start, {name: [example[name] for example in examples] for name in names}
        return
    view = dataset.select_columns(names).with_format(None)
    size = max(1, min(_ROWS, _BYTES * len(view.data) // max(1, view.data.nbytes)))
    for part in shard_ranges(len(view), size):
        yield part.start, view[part.start : part.stop]


def _counts(tokens: Tokens) -> tuple[int, ...]:
    lengths = np.fromiter(map(len, tokens.ids), np.int64, len(tokens.ids))
    counted = np.array([np.count_nonzero(labels[1:] != IGNORED) for labels in tokens.labels])
    empty = lengths < 2
    totals = (lengths.sum(), counted.sum(), empty.sum(), ((counted == 0) & ~empty).sum(), tokens.truncated)
    return len(lengths), *map(int, totals)


def _check_vocabulary(tokens: Tokens, vocab_size: int | None, first_row: int) -> None:
    if vocab_size is None:
        return
    for number, ids in enumerate(tokens.ids):
        if len(ids) and ids.max() >= vocab_size:
            raise DataError(
                f"expected tokens below {vocab_size:,}, the model's vocabulary, "
                f"found {ids.max()} in row {first_row + number}\n"
                "use the tokenizer that belongs to this model"
            )


def _vocab_size(tokenizer: PreTrainedTokenizerBase | None) -> int | None:
    return None if tokenizer is None else max(len(tokenizer), 1 + max(tokenizer.get_vocab().values(), default=-1))
