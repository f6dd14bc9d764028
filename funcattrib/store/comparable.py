"""Choose what of two manifests is compared: models by a hash that both have, code by one of the same version of Python.

A model's name and the place where it was are not compared.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from funcattrib.store.manifest import Manifest


def hash_kind(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    """Return the entry that tells two models apart: ``content``, or ``fingerprint``, which is all older stores have."""
    return "content" if "content" in ours and "content" in theirs else "fingerprint"


def hashes(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> tuple[Any, Any]:
    """Return the hashes of two models that are to be equal."""
    kind = hash_kind(ours, theirs)
    return ours.get(kind), theirs.get(kind)


def comparable(ours: Manifest, theirs: Manifest) -> tuple[Manifest, Manifest]:
    """Return two manifests without what is not compared: names of models, and hashes that one of the two lacks."""
    pair = [ours, theirs]
    models = without_names(*(manifest.model for manifest in pair))
    losses = [dict(manifest.loss) for manifest in pair]
    if all(isinstance(loss.get("reference"), Mapping) for loss in losses):
        references = without_names(*(loss["reference"] for loss in losses))
        losses = [{**loss, "reference": reference} for loss, reference in zip(losses, references, strict=True)]
    leave_out_code(losses[0], losses[1])
    chains = stages(ours.chain, theirs.chain)
    others = [dict(manifest.computed_with) for manifest in pair]
    if not all("given_content" in other for other in others):
        others = [{key: value for key, value in other.items() if key != "given_content"} for other in others]
    first, second = (
        replace(manifest, model=model, loss=loss, chain=chain, computed_with=other)
        for manifest, model, loss, chain, other in zip(pair, models, losses, chains, others, strict=True)
    )
    return first, second


def without_names(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return two identities of models without where they lie, and with the one kind of hash that both have."""
    kind = hash_kind(ours, theirs)
    if kind not in ours or kind not in theirs:
        return [dict(ours), dict(theirs)]
    dropped = {"id", "revision", "content", "fingerprint"} - {kind}
    return [{key: value for key, value in model.items() if key not in dropped} for model in (ours, theirs)]


def stages(
    first: Sequence[Mapping[str, Any]], second: Sequence[Mapping[str, Any]]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return two chains' settings as a manifest on disk has them, lists in place of tuples, without code that cannot be
    compared.
    """
    ours, theirs = (json.loads(json.dumps(chain, default=repr)) for chain in (first, second))
    for one, other in zip(ours, theirs, strict=False):
        leave_out_code(one, other)
    return ours, theirs


def same_code(ours: Mapping[str, Any] | None, theirs: Mapping[str, Any] | None) -> bool:
    """Return whether two hashes of code agree, or cannot be compared."""
    entries: tuple[dict[str, Any], dict[str, Any]] = ({"code": ours}, {"code": theirs})
    leave_out_code(*entries)
    return entries[0] == entries[1]


def leave_out_code(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Remove the hash of code from two entries where one lacks it, or has that of another version of Python."""
    versions = [(entry.get("code") or {}).get("python") for entry in (ours, theirs)]
    if None in versions or versions[0] != versions[1]:
        ours.pop("code", None)
        theirs.pop("code", None)
