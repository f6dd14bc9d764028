"""Compatibility of the inputs of a search with the store's own settings."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from funcattrib.errors import ChainError, FuncattribError, StoreError
from funcattrib.store import GradientStore, Manifest, open_store
from funcattrib.store.manifest import Kind

_KINDS: Mapping[Kind, str] = {"gradients": "gradients", "scores": "scores", "state": "a fitted state"}
_ADVICE: Mapping[Kind, str] = {
    "gradients": "give the folder that build or reduce wrote",
    "scores": "open it with open_store",
    "state": "give the folder that fit or build wrote",
}


def check_kind(manifest: Manifest, path: str | Path, expected: Kind, *also: Kind) -> None:
    """Refuse a store of another kind than ``expected``, or than those in ``also``.

    Raises:
        StoreError: naming both kinds.
    """
    if manifest.kind not in (expected, *also):
        raise StoreError(
            f"expected {_KINDS[expected]} at {path}, found another kind of store: {_KINDS[manifest.kind]}; "
            f"{_ADVICE[expected]}"
        )


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
        f"expected the chain that made the store, whose stage {at + 1} is {next(said)}, found {next(said)}"
    )


def same_state(store: GradientStore, path: str | Path) -> None:
    """Refuse a fitted state other than the one that the store was made with.

    Raises:
        FuncattribError: no state at ``path``, one of another model or chain, or other numbers; it says which.
    """
    given, advice = open_store(path), "search a store that was built with this `state`, or leave it out"
    check_kind(given.manifest, path, "state", "gradients")
    ours, theirs = store.manifest, given.manifest
    if theirs.state is None:
        raise FuncattribError(f"the state at {path} is unfinished; run its fit command again to finish it")
    if ours.state is not None and ours.state.sha256 == theirs.state.sha256:
        return
    for what, mine, other in (
        ("model", ours.model["fingerprint"], theirs.model["fingerprint"]),
        ("chain", ours.chain, theirs.chain),
    ):
        if mine != other:
            raise FuncattribError(f"the state at {path} is of another {what} than {store.path}; {advice}")
    mine, other = store.state(), given.state()
    differing = [name for name in mine if name not in other or not torch.equal(mine[name], other[name])]
    if differing or len(mine) != len(other):
        named = differing[0] if differing else next(name for name in other if name not in mine)
        raise FuncattribError(
            f"the state at {path} is not that of {store.path}: its {named!r} has other numbers; {advice}"
        )


def check_given(wanted: Manifest, given: GradientStore) -> None:
    """Refuse a state that was fitted for another model, chain, or set of parameters; the message names which."""
    found, path = given.manifest, given.path
    check_kind(found, path, "state", "gradients")
    if found.state is None:
        raise ChainError(f"the state at {path} is unfinished; run its own command again to finish it")
    for what, ours, theirs in (
        ("model", wanted.model["fingerprint"], found.model["fingerprint"]),
        ("chain", wanted.chain, found.chain),
        ("leaves", [leaf.name for leaf in wanted.leaves], [leaf.name for leaf in found.leaves]),
    ):
        if ours != theirs:
            raise ChainError(
                f"the state at {path} was fitted for another {what} ({_difference(ours, theirs)}); fit one with the "
                "same settings"
            )


def _difference(ours: Any, theirs: Any) -> str:
    if isinstance(ours, str):
        return f"fingerprint {theirs[:12]}, here {ours[:12]}"
    names = [entry["name"] if isinstance(entry, dict) else entry for entry in theirs]
    return f"{len(names)} of them: {', '.join(map(str, names[:3]))}{', …' if names[3:] else ''}"


def check_gradients(train: Manifest, query: Manifest) -> None:
    """Refuse gradients whose inner products are meaningless, fitted states aside.

    Raises:
        FuncattribError: naming the first difference.
    """
    refuse("model", train.model["fingerprint"], query.model["fingerprint"])
    refuse("chain", train.chain, query.chain)
    refuse("leaves", train.leaves, query.leaves)


def refuse(what: str, ours: Any, theirs: Any) -> None:
    """Refuse two things that differ, saying how."""
    if ours != theirs:
        raise FuncattribError(
            f"the queries and the training gradients differ in their {what}{_where(what, ours, theirs)}\n"
            "compute both with the same settings and the same `state`"
        )


def state_hash(manifest: Manifest) -> str | None:
    """Return the SHA-256 of the fitted state that the rows were computed with."""
    return manifest.computed_with.get("state") if manifest.state is None else manifest.state.sha256


def _where(what: str, ours: Any, theirs: Any) -> str:
    if what == "chain":
        return f": {_stages(theirs)}, where the training gradients have {_stages(ours)}"
    if what == "leaves":
        names = [{leaf.name: leaf.shape for leaf in leaves} for leaves in (ours, theirs)]
        differing = [name for name in {**names[0], **names[1]} if names[0].get(name) != names[1].get(name)]
        return f" ({len(theirs)} instead of {len(ours)}, differing in {differing[0]})" if differing else " (in order)"
    return f" ({str(theirs)[:12]} instead of {str(ours)[:12]})"


def _stages(chain: Sequence[Mapping[str, Any]]) -> str:
    def told(stage: Mapping[str, Any]) -> str:
        return f"{stage['name']}({', '.join(f'{k}={v}' for k, v in stage.items() if k != 'name')})"

    return " → ".join(map(told, chain)) or "no transforms"
