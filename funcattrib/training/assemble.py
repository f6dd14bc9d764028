"""From journals to a store in the data set's order: one row an example, zeros where an epoch did not visit it.

Of an example that the sampler gave twice in an epoch the first row counts; with ``add_up`` all rows are added, over
epochs too. Rows of steps that a resumed training made again are taken from the later attempt.
"""

import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from funcattrib.errors import FuncattribError
from funcattrib.store import GradientStore, Manifest, create_store, open_store
from funcattrib.store.create import PARTS
from funcattrib.training.journal import segments
from funcattrib.training.metadata import ORDER

MetadataReader = Callable[[range], Mapping[str, Any]]


class Visits(NamedTuple):
    """Every row of the journals, in the order of training, and the stores they lie in."""

    stores: list[GradientStore]
    store: np.ndarray
    at: np.ndarray
    metadata: dict[str, np.ndarray]


def settle(
    folder: Path,
    manifest: Manifest,
    state: Mapping[str, Tensor],
    read_metadata: MetadataReader,
    *,
    add_up: bool,
    track_order: bool,
    partial: bool = False,
) -> GradientStore:
    """Build the store of ``folder`` from its journals, which are then removed unless the training broke off.

    Args:
        manifest: of the store to make.
        state: the chain's.
        read_metadata: returns the metadata of some rows' examples.
        partial: the training broke off; the journals are kept for the one that resumes it.
    """
    visits = read_visits(folder)
    rows, steps = visits.metadata["row"], visits.metadata["step"]
    if len(rows) and int(rows.max()) >= manifest.rows:
        raise FuncattribError(
            f"expected rows below {manifest.rows} in {folder}, found {rows.max()}; check that the data set is the same"
        )
    seen = {
        "visits": len(rows),
        "unseen": int(manifest.rows - len(np.unique(rows))),
        "steps": [int(steps.min()), int(steps.max())] if len(steps) else [],
        "partial": partial,
        "clipped": sum(shard.clipped for store in visits.stores for shard in store.shards),
    }
    order = np.lexsort((np.arange(len(rows)), steps, rows))
    starts = np.searchsorted(rows[order], np.arange(manifest.rows + 1))
    final = replace(manifest, extra={**manifest.extra, **seen})
    with create_store(folder, final, overwrite=True) as writer:
        if state:
            writer.save_state(state)
        for shard in writer.pending:
            span = writer.shard_range(shard)
            chosen = [order[starts[row] : starts[row + 1]] for row in span]
            if not add_up:
                chosen = [of_row[:1] for of_row in chosen]
            matrix = _rows(visits, chosen, manifest.width)
            writer.put(shard, matrix, {**read_metadata(span), **_metadata(visits, chosen, track_order, add_up)})
        writer.finish()
    if not partial:
        shutil.rmtree(folder / PARTS)
    return open_store(folder)


def read_visits(folder: Path) -> Visits:
    """Read the journals; of a segment that was not finished, its finished shards."""
    stores = []
    for path in segments(folder):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            stores.append(open_store(path))
    begun = [store.manifest.extra for store in stores]
    columns: dict[str, list[np.ndarray]] = {}
    for number, store in enumerate(stores):
        if not len(store):
            continue
        of_store = {name: np.asarray(store.examples[name][:]) for name in ("row", *ORDER, "tokens", "loss_scale")}
        later = [
            each["from_step"] for each in begun[number + 1 :] if each["rank"] == begun[number]["rank"]
        ]  # a training that was resumed goes on from an earlier step than this one reached
        kept = np.flatnonzero(of_store["step"] < min(later, default=np.inf))
        for name, values in {**of_store, "store": np.full(len(store), number), "at": np.arange(len(store))}.items():
            columns.setdefault(name, []).append(values[kept])
    if not columns:
        columns = {name: [np.zeros(0, np.int64)] for name in ("row", *ORDER, "tokens", "loss_scale", "store", "at")}
    metadata = {name: np.concatenate(parts) for name, parts in columns.items()}
    return Visits(stores, metadata.pop("store"), metadata.pop("at"), metadata)


def _rows(visits: Visits, chosen: list[np.ndarray], width: int) -> Tensor:
    matrix = torch.zeros(len(chosen), width)
    into = np.repeat(np.arange(len(chosen)), [len(of_row) for of_row in chosen])
    flat = np.concatenate(chosen) if chosen else np.zeros(0, np.int64)
    for number in np.unique(visits.store[flat]):
        here = np.flatnonzero(visits.store[flat] == number)
        rows = torch.from_numpy(np.array(visits.stores[number].matrix()[visits.at[flat[here]]])).float()
        matrix.index_add_(0, torch.from_numpy(into[here]), rows)
    return matrix


def _metadata(visits: Visits, chosen: list[np.ndarray], track_order: bool, add_up: bool) -> dict[str, list[Any]]:
    def of(name: str, unseen: Any) -> list[Any]:
        return [visits.metadata[name][of_row[0]].item() if len(of_row) else unseen for of_row in chosen]

    metadata: dict[str, list[Any]] = {"tokens": of("tokens", 0), "loss_scale": of("loss_scale", 0.0)}
    metadata["visits"] = [len(of_row) for of_row in chosen]
    for name in ORDER if track_order else ():
        metadata[name] = [visits.metadata[name][of_row].tolist() for of_row in chosen] if add_up else of(name, -1)
    return metadata
