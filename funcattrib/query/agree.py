"""Whether what is given to a search is what its store was made with."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from funcattrib.errors import FuncattribError
from funcattrib.store import GradientStore, open_store


def same_chain(made_with: Sequence[Mapping[str, Any]], given: Sequence[Mapping[str, Any]]) -> None:
    """Refuse a chain other than the store's; its settings may hold tuples where the manifest has lists.

    Raises:
        FuncattribError: naming the first stage that differs.
    """
    expected, found = ([json.dumps(stage, sort_keys=True) for stage in chain] for chain in (made_with, given))
    if expected == found:
        return
    at = next((i for i, pair in enumerate(zip(expected, found, strict=False)) if len(set(pair)) > 1), None)
    if at is None:
        at = min(len(expected), len(found))
    said = (stages[at] if at < len(stages) else "no stage" for stages in (expected, found))
    raise FuncattribError(
        f"expected the chain that made the store, with {next(said)} as stage {at + 1}, found {next(said)}"
    )


def same_state(store: GradientStore, path: str | Path) -> None:
    """Refuse a fitted state other than the one that the store was made with.

    Raises:
        FuncattribError: no state at ``path``, one of another model or chain, or other numbers; it says which.
    """
    given, advice = open_store(path), "search a store that was built with this --state, or leave it out"
    ours, theirs = store.manifest, given.manifest
    if theirs.state is None:
        raise FuncattribError(f"expected a fitted state at {path}, found none that is finished; fit it to its end")
    if ours.state is not None and ours.state.sha256 == theirs.state.sha256:
        return
    for what, mine, other in (
        ("model", ours.model["fingerprint"], theirs.model["fingerprint"]),
        ("chain", ours.chain, theirs.chain),
    ):
        if mine != other:
            raise FuncattribError(
                f"expected the state of {store.path}, found one of another {what} at {path}; {advice}"
            )
    mine, other = store.state(), given.state()
    differing = [name for name in mine if name not in other or not torch.equal(mine[name], other[name])]
    if differing or len(mine) != len(other):
        named = differing[0] if differing else next(name for name in other if name not in mine)
        raise FuncattribError(
            f"expected the state of {store.path}, found another at {path} (its {named!r} has other numbers); {advice}"
        )
