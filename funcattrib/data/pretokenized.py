"""Data that holds tokens already: checked, padding taken off, otherwise passed on."""

from typing import NamedTuple

import datasets
import numpy as np
import pyarrow as pa

from funcattrib.data.batching import IGNORED
from funcattrib.data.encode import TooLong
from funcattrib.errors import DataError


class Tokens(NamedTuple):
    """Columns of some rows: tokens and labels (int32), and weights (float32) where the data has them."""

    ids: list[np.ndarray]
    labels: list[np.ndarray]
    weights: list[np.ndarray] | None
    truncated: int


MASKS = ("completion_mask", "assistant_masks", "loss_mask")
"""Columns that say, as TRL's do, which tokens count where there are no labels: those that all of them hold 1 for."""
COLUMNS = ("input_ids", "labels", "attention_mask", "token_weights", *MASKS)


def ids_alone(dataset: datasets.Dataset) -> datasets.Dataset:
    """Return a data set of tokens without what else belongs to a causal language model: labels, weights, masks."""
    others = [name for name in COLUMNS if name in dataset.column_names and name not in ("input_ids", "attention_mask")]
    return dataset.remove_columns(others)


def check_columns(dataset: datasets.Dataset) -> None:
    """Refuse token columns that are not lists of numbers in every row, before any row is read."""
    for name in COLUMNS:
        if name not in dataset.column_names:
            continue
        kind = dataset.features.arrow_schema.field(name).type
        number = pa.types.is_floating if name == "token_weights" else pa.types.is_integer
        ragged = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
        truth = ragged and name.endswith(("_mask", "_masks")) and pa.types.is_boolean(kind.value_type)
        if not ragged or not (truth or number(kind.value_type) or pa.types.is_integer(kind.value_type)):
            found = f"{kind} (row 0: {dataset[0][name]!r:.60})"
            raise DataError(
                f"expected a list of {'numbers' if name == 'token_weights' else 'whole numbers'} in every row of "
                f"'{name}', found {found}\nconvert the column, or remove 'input_ids' to have the text tokenised"
            )


def read_tokens(
    batch: dict[str, list[np.ndarray]], *, vocab_size: int | None, max_length: int, truncation: bool, first_row: int = 0
) -> Tokens:
    """Check tokenised rows; labels default to the tokens that the masks count, and positions that `attention_mask`
    hides are taken off.

    Args:
        batch: lists (rows of arrays) by column name.
        vocab_size: ids must be below it; None leaves that unchecked.
        max_length: most tokens in a row.
        truncation: whether longer rows are cut (at the end) or an error.
        first_row: number of the first row, for messages.
    """
    ids, labels, weights, truncated = [], [], [], 0
    long: list[tuple[int, int]] = []
    for number, tokens in enumerate(batch["input_ids"]):
        row = first_row + number
        columns = {name: _array(batch[name][number], name, row) for name in COLUMNS if name in batch}
        if len({len(values) for values in columns.values()}) > 1:
            found = ", ".join(f"{len(values)} in '{name}'" for name, values in columns.items())
            raise DataError(f"expected columns of equal length in row {row}, found {found}\nrepair or drop the row")
        visible = columns.get("attention_mask", np.ones(len(tokens), bool)).astype(bool)
        positions = np.flatnonzero(visible)
        if len(positions) and positions[-1] - positions[0] + 1 != len(positions):
            raise DataError(
                f"'attention_mask' hides a token inside row {row}, and may hide padding at the ends only\n"
                "remove that token or the column"
            )
        columns = {name: values[visible] for name, values in columns.items()}
        if len(positions) > max_length and not truncation:
            long.append((row, len(positions)))
        truncated += len(positions) > max_length
        columns = {name: values[:max_length] for name, values in columns.items()}
        if "labels" not in columns:
            counted = np.logical_and.reduce([columns[name] != 0 for name in MASKS if name in columns] or [True])
            columns["labels"] = np.where(counted, columns["input_ids"], IGNORED)
        _check_range(columns["input_ids"], vocab_size, row, "input_ids")
        _check_range(columns["labels"][columns["labels"] != IGNORED], vocab_size, row, "labels")
        ids.append(columns["input_ids"].astype(np.int32))
        labels.append(columns["labels"].astype(np.int32))
        if "token_weights" in columns:
            weights.append(columns["token_weights"].astype(np.float32))
    if long:
        raise TooLong(long)
    return Tokens(ids, labels, weights if "token_weights" in batch else None, truncated)


def _array(values: np.ndarray, name: str, row: int) -> np.ndarray:
    # A null among whole numbers arrives as NaN.
    if values.dtype.kind not in "biuf" or (values.dtype.kind == "f" and not np.isfinite(values).all()):
        raise DataError(
            f"expected numbers in '{name}', found {values.tolist()!r:.60} in row {row}\nrepair or drop the row"
        )
    return values


def _check_range(values: np.ndarray, vocab_size: int | None, row: int, name: str) -> None:
    if not len(values):
        return
    low, high = int(values.min()), int(values.max())
    if low < 0 or (vocab_size is not None and high >= vocab_size):
        wrong = low if low < 0 else high
        above = "" if vocab_size is None else f" and below {vocab_size:,}, the size of the vocabulary"
        raise DataError(
            f"expected '{name}' of at least 0{above}, found {wrong} in row {row}\n"
            "tokenise the data with the tokenizer of this model"
        )
