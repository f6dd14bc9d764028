"""Row numbers that travel with a data set's examples through sampler and collator to the training step."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import datasets
import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset

from funcattrib.errors import FuncattribError

ROW = "_row"


class Numbered(Dataset[dict[str, Any]]):
    """A sequence of examples, each with its number."""

    def __init__(self, examples: Sequence[Mapping[str, Any]]) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {**self.examples[row], ROW: int(row)}


class Collate:
    """A collator that passes the numbers on; the one inside never sees them."""

    def __init__(self, collator: Callable[[list[Any]], Any]) -> None:
        self.collator = collator

    def __call__(self, features: list[Any]) -> Any:
        """Return the collator's batch, with the examples' numbers where they have any."""
        if not all(isinstance(each, Mapping) and ROW in each for each in features):
            return self.collator(features)
        batch = self.collator([{name: value for name, value in each.items() if name != ROW} for each in features])
        batch[ROW] = torch.tensor([int(each[ROW]) for each in features])
        return batch


def number(examples: Any) -> Any:
    """Return the data set with a column of row numbers, of the same kind, so that the Trainer samples it alike.

    Raises:
        FuncattribError: a data set that cannot be numbered.
    """
    if isinstance(examples, (datasets.IterableDataset, IterableDataset)) or not hasattr(examples, "__len__"):
        raise FuncattribError(
            f"the training set is a stream ({type(examples).__name__}), whose rows have no numbers; load it whole"
        )
    if not isinstance(examples, datasets.Dataset) or examples.format["type"] == "custom":
        return Numbered(examples)
    if ROW in examples.column_names:
        return examples
    view = examples.format
    numbered = examples.with_format(None).add_column(ROW, np.arange(len(examples)))
    if view["type"] is None and set(view["columns"]) == set(examples.column_names):
        return numbered
    return numbered.with_format(
        view["type"],
        columns=[*view["columns"], ROW],
        output_all_columns=view["output_all_columns"],
        **view["format_kwargs"],
    )
