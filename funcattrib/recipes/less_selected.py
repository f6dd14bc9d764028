"""The documents that LESS selects, as a data set on the disk."""

import logging
import math
import shutil
from pathlib import Path

import datasets

from funcattrib.data.columns import shown_name
from funcattrib.runs.error_hints import explained
from funcattrib.runtime.hub import quiet
from funcattrib.scores import Scores

log = logging.getLogger(__name__)

SELECTED = "selected"
"""Sub-folder of the scores with the data set of the best examples."""


def save_selected(
    records: datasets.Dataset, scores: Scores, fraction: float, folder: Path, unique: bool, silent: bool
) -> None:
    """Save the best documents as a data set, best first; it takes the place of an earlier one when it is whole."""
    count = max(1, math.floor(fraction * len(records) + 1e-9))
    if unique:
        values, best, copies = scores.unique_topk(count)
        if (left_out := int(copies.sum())) and not silent:
            log.info("%d documents are not selected because a better one has their text", left_out)
    else:
        values, best = scores.topk(count)
    rows = [int(row) for row in best[0] if row >= 0]
    added = {"score": values[0, : len(rows)].tolist(), "rank": range(1, len(rows) + 1), "source_row": rows}
    partial = folder.with_name(f".{folder.name}")
    with explained(), quiet():
        shutil.rmtree(partial, ignore_errors=True)
        selected = records.select(rows)
        taken = {name: shown_name(name, added) for name in selected.column_names if name in added}
        selected = selected.rename_columns(taken) if taken else selected
        for name, column in added.items():
            selected = selected.add_column(name, list(column))
        selected.save_to_disk(partial)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
