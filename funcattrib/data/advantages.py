"""Advantages, the factors of examples' losses: given, or computed from rewards.

    advantage = reward − mean reward of the rows with the identical prompt

without division by a standard deviation or a length (Dr. GRPO). The prompt is the prompt's text; of a conversation, the
messages before the assistant's first; of ready tokens, those before the first labelled one. Where all of a row counts
in the loss, all of it is the prompt.

Reference: Dr. GRPO, arXiv 2503.20783.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Iterator
from typing import Any

import datasets
import numpy as np

from funcattrib.data.batching import IGNORED
from funcattrib.data.columns import Columns
from funcattrib.data.number_columns import is_number, read_numbers
from funcattrib.data.report import some_rows
from funcattrib.data.rows import Rows
from funcattrib.errors import DataError

log = logging.getLogger(__name__)

_ROWS = 1000


def advantages(dataset: datasets.Dataset, tokens: datasets.Dataset, columns: Columns) -> np.ndarray | None:
    """Compute the advantage of each row, (rows,) float32, NaN where it is missing and may be; None where none is asked
    for.

    Args:
        dataset: the data as it came, with the reward or advantage column.
        tokens: the same rows tokenised.
        columns: which columns to read; rows without a value are refused unless ``skip_missing_rewards``.

    Raises:
        DataError: no such column, no numbers in it, or rows without a number, which are named.
    """
    name = columns.reward_column or columns.advantage_column
    if name is None:
        return None
    values = _numbers(dataset, name)
    missing = ~np.isfinite(values)
    if missing.all() or (missing.any() and not columns.skip_missing_rewards):
        skip = "" if missing.all() else ", or skip them with `columns=Columns(skip_missing_rewards=True)`"
        raise DataError(
            f"column '{name}' has no finite number in {some_rows(np.flatnonzero(missing))}\n"
            f"fill or drop these rows{skip}"
        )
    values = np.where(missing, np.nan, values)
    if columns.reward_column is not None:
        values = values - _group_means(values, missing, list(_prompts(dataset, tokens, columns)))
        if not values[~missing].any():
            log.warning("all advantages are 0: no two rows of one prompt have different rewards in '%s'", name)
    return values.astype(np.float32)


def _group_means(values: np.ndarray, missing: np.ndarray, prompts: list[bytes]) -> np.ndarray:
    """Compute the mean of each row's group over the rows that have a value."""
    groups = np.unique(np.array(prompts), return_inverse=True)[1]
    counts = np.bincount(groups, ~missing)
    sums = np.bincount(groups, np.where(missing, 0.0, values))
    return (sums / np.maximum(counts, 1))[groups]


def _prompts(dataset: datasets.Dataset, tokens: datasets.Dataset, columns: Columns) -> Iterator[bytes]:
    """Yield each row's prompt, hashed: the same for the rows of one group."""
    if columns.ready(dataset):
        rows = Rows(tokens, ["input_ids", "labels"])
        for row in range(len(rows)):
            labelled = np.flatnonzero(rows[row]["labels"] != IGNORED)
            first = labelled[0] if len(labelled) else 0
            yield _digest(rows[row]["input_ids"][: first or None].tobytes())
        return
    name = columns.conversation_column or columns.prompt
    write: Callable[[Any], str] = str if columns.conversation_column is None else _before_the_answer
    view = dataset.select_columns([name]).with_format(None)
    for start in range(0, len(view), _ROWS):
        for value in view[start : start + _ROWS][name]:
            yield _digest(write(value).encode("utf-8", "surrogatepass"))


def _before_the_answer(messages: list[dict[str, Any]]) -> str:
    answers = [turn for turn, message in enumerate(messages) if message["role"] == "assistant"]
    return json.dumps(messages[: answers[0] if answers else None])


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).hexdigest().encode()


def _numbers(dataset: datasets.Dataset, name: str) -> np.ndarray:
    """Read a column of numbers, (rows,) float64; NaN where there is none."""
    if name not in dataset.column_names:
        raise DataError(
            f"the data has no column '{name}'; its columns are {', '.join(dataset.column_names)}\n"
            "name the right one with `columns=Columns(reward_column=…)` or `advantage_column`"
        )
    kind = getattr(dataset.features[name], "dtype", "no number")
    if kind == "null":
        return np.full(len(dataset), np.nan)
    if not is_number(dataset, name):
        raise DataError(
            f"expected numbers in column '{name}', found {kind} (row 0: {dataset[0][name]!r:.60})\n"
            "convert the column, or name another"
        )
    return read_numbers(dataset, name)
