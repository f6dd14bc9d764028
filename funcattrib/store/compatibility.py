"""Decide whether two runs may be continued as one or compared, and word the difference where not.

    continue   a store by the same command, parts by a merge      all of ``manifest.identity`` agrees but a model's name
    compare    gradients with queries                              model, chain, leaves and fitted state agree
    use        a state, model or chain that is given to a run      it is the run's

A check returns nothing where the two agree, and raises the error for the reader where they do not.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from funcattrib.errors import ChainError, FuncattribError, StoreError
from funcattrib.store.comparable import comparable, hash_kind, hashes, same_code, stages, without_names
from funcattrib.store.layout import LeafColumns
from funcattrib.store.manifest import Kind, Manifest, differences

if TYPE_CHECKING:
    from funcattrib.store.reader import GradientStore

_KINDS: Mapping[Kind, str] = {"gradients": "gradients", "scores": "scores", "state": "a fitted state"}
_ADVICE: Mapping[Kind, str] = {
    "gradients": "give the folder that build or reduce wrote",
    "scores": "open it with open_store",
    "state": "give the folder that fit or build wrote",
}
# Differences named in an error before the rest is only counted.
_NAMED = 4
_ENTAILED = ("leaves", "rows", "data.documents", "data.tokens", "computed_with.given")
_HASH = re.compile(r'"([0-9a-f]{12})[0-9a-f]{20,}["…]')
_HASH_DIGITS = 12


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


def check_continues(path: Path, wanted: Manifest, found: Manifest) -> None:
    """Refuse to continue the store ``found`` at ``path`` with a run that is to make ``wanted``.

    Raises:
        StoreError: naming the settings that differ.
    """
    if found.complete:  # nothing more is computed, so another version of this library does no harm
        wanted = replace(wanted, funcattrib_version=found.funcattrib_version)
    lines = _independent(wanted, found)
    if lines:
        more = f"; and {len(lines) - _NAMED} more" if lines[_NAMED:] else ""
        raise StoreError(
            f"{path} holds another run: {'; '.join(lines[:_NAMED])}{more}\n"
            "use `overwrite` to replace it, or another RUN"
        )


def check_parts(folders: Sequence[Path], manifests: Sequence[Manifest], states: Sequence[str | None]) -> None:
    """Refuse to merge parts of several runs; ``states`` are the hashes of their fitted states.

    Raises:
        StoreError: naming two folders and their first difference.
    """
    for folder, manifest in zip(folders[1:], manifests[1:], strict=True):
        if lines := differences(*comparable(manifests[0], manifest)):
            raise StoreError(f"{folder} is a part of another run than {folders[0]}: {lines[0]}")
    for folder, state in zip(folders[1:], states[1:], strict=True):
        if state != states[0]:
            raise StoreError(
                f"{folder} has another fitted state than {folders[0]}\n"
                "fit it once (`funcattrib fit`) and give it to every machine with `state`"
            )


def check_gradients(train: Manifest, query: Manifest) -> None:
    """Refuse gradients whose inner products are meaningless, fitted states aside.

    Raises:
        FuncattribError: naming the first difference.
    """
    _check_query("model", *hashes(train.model, query.model))
    _check_query("chain", *stages(train.chain, query.chain))
    _check_query("leaves", train.leaves, query.leaves)


def check_queries(train: Manifest, query: Manifest) -> None:
    """Refuse queries whose scores against the rows of ``train`` are meaningless.

    Raises:
        FuncattribError: naming the first difference.
    """
    check_gradients(train, query)
    _check_query("fitted state", _state_hash(train), _state_hash(query))


def loss_differences(train: Manifest, query: Manifest) -> list[tuple[str, Any, Any]]:
    """List the settings of the loss that differ, with both values. Two losses may be meant, so it is no error."""
    values = [(name, train.loss.get(name), query.loss.get(name)) for name in ("kind", "reduction", "label_smoothing")]
    return [(name, ours, theirs) for name, ours, theirs in values if ours != theirs]


def check_leaves(leaves: Mapping[str, LeafColumns], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse a query's gradients that do not fit a store's leaves: name → shape without the batch axis.

    Raises:
        FuncattribError: naming a leaf that differs.
    """
    missing = [name for name in leaves if name not in shapes]
    if missing or len(shapes) != len(leaves):
        other = missing or sorted(shapes.keys() - leaves.keys())
        raise FuncattribError(
            f"expected the store's {len(leaves)} leaves in the query, found {len(shapes)} "
            f"(differing in {other[0]!r}); compute the query with the store's own chain"
        )
    for name, leaf in leaves.items():
        if tuple(shapes[name]) != tuple(leaf.shape):
            raise FuncattribError(f"expected {name} of shape {leaf.shape}, found {tuple(shapes[name])}")


def check_chain(made_with: Manifest, given: Sequence[Mapping[str, Any]]) -> None:
    """Refuse a chain other than the store's; ``given`` are its stages as settings.

    Raises:
        FuncattribError: naming the first stage that differs.
    """
    both = stages(made_with.chain, given)
    at = next((i for i, pair in enumerate(zip(*both, strict=False)) if pair[0] != pair[1]), min(map(len, both)))
    if at < max(map(len, both)):
        expected, found = (_stage_in_words(chain[at]) if at < len(chain) else "no stage" for chain in both)
        raise FuncattribError(
            f"expected the chain that made the store, whose stage {at + 1} is {expected}, found {found}"
        )


def check_same_model(made_with: Manifest, found: Mapping[str, Any]) -> None:
    """Refuse a model whose weights are not those that made the store; ``found`` is its identity.

    Raises:
        FuncattribError: naming the first difference.
    """
    expected, kind = made_with.model, hash_kind(made_with.model, found)
    if expected[kind] == found[kind]:
        return
    name = next(name for name in ("architecture", "dtype", kind) if expected[name] != found[name])
    ours, theirs = (str(model[name])[: _HASH_DIGITS if name == kind else None] for model in (expected, found))
    raise FuncattribError(
        f"expected the model that made the store ({expected['id']}, {name} {ours}), "
        f"found {found['id']} with {name} {theirs}\n"
        "give that model, or build a store for this one"
    )


def check_same_loss(made_with: Manifest, code: Mapping[str, Any] | None) -> None:
    """Refuse a loss in Python other than the one that made the store; ``code`` is its hash, None where it has none.

    Raises:
        FuncattribError: the code is another.
    """
    if not same_code(made_with.loss.get("code"), code):
        raise FuncattribError(
            "the loss is not the one that made the store: its code was edited since, or it refers to other values\n"
            "give that loss, or build a store for this one"
        )


def check_base(made_with: Manifest, fingerprint: str) -> None:
    """Refuse the base of a model whose weights are not those that made the store.

    Raises:
        FuncattribError: the weights differ.
    """
    if fingerprint != made_with.extra["base_model"]["fingerprint"]:
        raise FuncattribError(
            f"expected the base of the model that made the store ({made_with.model['id']}), found other weights\n"
            "give that model's, or build a store for this one"
        )


def check_reference(made_with: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Refuse a reference model other than the one that the store's loss was compared with; both are identities.

    Raises:
        FuncattribError: the weights differ.
    """
    ours, theirs = hashes(made_with, found)
    if ours != theirs:
        raise FuncattribError(
            f"the reference model at {made_with['id']} is not the one that made the store; restore that one"
        )


def check_state(wanted: Manifest, given: "GradientStore") -> None:
    """Refuse a state that was not fitted for the run that is to make ``wanted``.

    Raises:
        StoreError: scores are given.
        ChainError: it was fitted for another model, chain, or set of parameters; the message names which.
    """
    check_kind(given.manifest, given.path, "state", "gradients")
    found, path = given.manifest, given.path
    if found.state is None:
        raise ChainError(f"the state at {path} is unfinished; run its command again to finish it")
    for what, ours, theirs in (
        ("model", *hashes(wanted.model, found.model)),
        ("chain", *stages(wanted.chain, found.chain)),
        ("leaves", wanted.leaves, found.leaves),
    ):
        same = _names(ours) == _names(theirs) if what == "leaves" else ours == theirs
        if not same:
            raise ChainError(
                f"the state at {path} does not fit the {what} of this run: {_difference(what, ours, theirs)}\n"
                "fit one with the same settings"
            )


def check_same_state(store: "GradientStore", given: "GradientStore") -> None:
    """Refuse a fitted state other than the one that ``store`` was made with.

    Raises:
        FuncattribError: ``given`` has no state, one of another model or chain, or other numbers; it says which.
    """
    check_kind(given.manifest, given.path, "state", "gradients")
    advice = "search a store that was built with this `state`, or leave it out"
    ours, theirs = store.manifest, given.manifest
    if theirs.state is None:
        raise FuncattribError(f"the state at {given.path} is unfinished; run its fit command again to finish it")
    if ours.state is not None and ours.state.sha256 == theirs.state.sha256:
        return
    for what, mine, other in (
        ("model", *hashes(ours.model, theirs.model)),
        ("chain", *stages(ours.chain, theirs.chain)),
    ):
        if mine != other:
            raise FuncattribError(
                f"the state at {given.path} is of another {what} than {store.path}: "
                f"{_difference(what, mine, other)}; {advice}"
            )
    saved, found = store.state(), given.state()
    differing = [name for name in saved if name not in found or not torch.equal(saved[name], found[name])]
    if differing or len(saved) != len(found):
        named = differing[0] if differing else next(name for name in found if name not in saved)
        raise FuncattribError(
            f"the state at {given.path} is not that of {store.path}: its {named!r} has other numbers; {advice}"
        )


def _check_query(what: str, ours: Any, theirs: Any) -> None:
    if ours != theirs:
        raise FuncattribError(
            f"the queries and the training gradients differ in their {what}: {_difference(what, ours, theirs)}\n"
            "compute both with the same settings and the same `state`"
        )


def _state_hash(manifest: Manifest) -> str | None:
    """Return the SHA-256 of the fitted state that the rows were computed with."""
    return manifest.computed_with.get("state") if manifest.state is None else manifest.state.sha256


def _difference(what: str, expected: Any, found: Any) -> str:
    """Word how two runs differ in their model or state (hashes), chain, or leaves."""
    if what == "chain":
        return f"{_chain_in_words(found)} instead of {_chain_in_words(expected)}"
    if what == "leaves":
        shapes = [{leaf.name: leaf.shape for leaf in leaves} for leaves in (expected, found)]
        differing = [name for name in {**shapes[0], **shapes[1]} if shapes[0].get(name) != shapes[1].get(name)]
        where = f"differing in {differing[0]}" if differing else "in another order"
        return f"{_leaves_in_words(found)} instead of {_leaves_in_words(expected)}, {where}"
    shown = [str(value)[:_HASH_DIGITS] if value else "none" for value in (found, expected)]
    return "{} instead of {}".format(*shown)


def _model_in_words(model: Mapping[str, Any], kind: str) -> str:
    return f"{model.get('id')} ({model.get('dtype')}, {str(model.get(kind))[:_HASH_DIGITS]})"


def _chain_in_words(chain: Sequence[Mapping[str, Any]]) -> str:
    return " → ".join(map(_stage_in_words, chain)) or "no transforms"


def _stage_in_words(stage: Mapping[str, Any]) -> str:
    settings = {key: value["sha256"][:_HASH_DIGITS] if key == "code" else value for key, value in stage.items()}
    return f"{stage['name']}({', '.join(f'{key}={value}' for key, value in settings.items() if key != 'name')})"


def _leaves_in_words(leaves: Sequence[LeafColumns]) -> str:
    return f"{len(leaves)} of {leaves[-1].stop:,} columns"


def _names(leaves: Any) -> list[str]:
    return [leaf.name for leaf in leaves]


def _independent(wanted: Manifest, found: Manifest) -> list[str]:
    """List differences without those that others entail: a chain's settings decide the leaves, the data its sizes."""
    lines = [line for line in differences(*comparable(wanted, found)) if not line.startswith(("chain", "model."))]
    models = without_names(wanted.model, found.model)
    if models[0] != models[1]:
        kind = hash_kind(wanted.model, found.model)
        named = (_model_in_words(manifest.model, kind) for manifest in (wanted, found))
        lines.insert(0, "model: expected {}, found {}".format(*named))
    chains = [_chain_in_words(chain) for chain in stages(wanted.chain, found.chain)]
    if chains[0] != chains[1]:
        lines.append("chain: expected {}, found {}".format(*chains))
    independent = [line for line in lines if not line.startswith(_ENTAILED)]
    lines = independent or [line for line in lines if not line.startswith("leaves")]
    if not lines and [*wanted.leaves] != [*found.leaves]:
        sizes = map(_leaves_in_words, (wanted.leaves, found.leaves))
        lines = ["leaves: expected {}, found {}".format(*sizes)]
    return [_HASH.sub(r"\1…", line) for line in lines]
