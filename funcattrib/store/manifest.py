"""The manifest: a store's contents and how they were made, as one JSON file that is readable by people.

Two runs may share a store when their `identity` agrees; `differences` says in words where it does not.
"""

import json
import math
import os
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args, get_type_hints

from funcattrib.errors import StoreError
from funcattrib.store.json_values import check_checksum, typed, with_checksum
from funcattrib.store.layout import (
    FileFacts,
    LeafColumns,
    Shard,
    lay_out,
    shard_to_json,
)
from funcattrib.version import __version__

FORMAT = "funcattrib gradient store"
FORMAT_VERSION = 1
Kind: TypeAlias = Literal["gradients", "scores", "state"]
"""The kind of a store: rows of gradients, scores of rows against queries, or a fitted state without rows."""
DTYPES = ("float16", "float32", "bfloat16", "int8")
SCORE_CONVENTION = (
    "inner product of the transformed gradients of a training example and a query; positive means that a step that "
    "unlearns the training example raises the query's loss (a proponent)"
)
"""The meaning of a score's sign and size, as every manifest states it."""
MANIFEST_FILE = "manifest.json"

# Everything that must agree before a run may continue another's store. `extra` holds notes and is not compared.
_IDENTITY = (
    "kind",
    "format_version",
    "funcattrib_version",
    "model",
    "data",
    "loss",
    "computed_with",
    "chain",
    "seed",
    "leaves",
    "dtype",
    "score_convention",
    "rows",
    "rows_per_shard",
)
_NOTHING = object()  # of a key that one side lacks
STATE_FILE = "state.safetensors"

# Types of what the library reads in a manifest's objects, where it is there.
_INSIDE: dict[str, dict[str, Any]] = {
    "model": {"id": str, "revision": str | None, "architecture": str, "dtype": str, "fingerprint": str},
    "data": {"fingerprint": str | None},
    "loss": {"kind": str, "modules": list[str] | None, "exclude": list[str] | None},
    "computed_with": {"state": str | None, "token_batch_size": int, "top_k": int, "scored": int, "shard": int},
    "extra": {"queries": list[dict[str, Any]], "query_text_columns": list[str] | None},
}


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The contents of a store and how they were made.

    Attributes:
        kind: gradients, scores or state; in a store written before this was kept, by what it holds.
        model: id, revision or fingerprint, and whatever else settles its weights.
        data: id, split, columns, content fingerprint, documents, tokens.
        loss: kind, reduction and other settings of the loss.
        computed_with: what else the rows' bits depend on: the tokens of a batch, the documents a state was fitted on.
        chain: the stages in order, each a dict of its settings.
        seed: of every random draw.
        leaves: the columns of a row, in order and without gaps.
        dtype: how entries are stored: float16, float32, bfloat16 or int8 (with a float32 scale per row).
        rows: of the whole data set; shard i holds rows [i * rows_per_shard, (i + 1) * rows_per_shard).
        rows_per_shard: rows in every shard but the last.
        score_convention: what the sign and size of an inner product mean.
        text_columns: columns of the examples that hold text, in the order to show them; None in a store written before
            this was kept. Not compared.
        extra: notes; JSON values, never compared.
        shards: the finished ones, once the store is complete (until then each has a file).
        complete: every shard is written and listed.
        clipped: entries that were beyond the stored dtype's range.
        nonfinite: entries that were NaN or infinite.
        state: the chain's fitted state, from when it is saved on, where there is one.
    """

    kind: Kind = "gradients"
    model: dict[str, Any]
    data: dict[str, Any]
    loss: dict[str, Any]
    chain: list[dict[str, Any]]
    seed: int
    leaves: list[LeafColumns]
    rows: int
    rows_per_shard: int
    dtype: str = "float16"
    computed_with: dict[str, Any] = field(default_factory=dict)
    score_convention: str = SCORE_CONVENTION
    text_columns: tuple[str, ...] | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    funcattrib_version: str = __version__
    format_version: int = FORMAT_VERSION
    shards: list[Shard] = field(default_factory=list)
    complete: bool = False
    clipped: int = 0
    nonfinite: int = 0
    state: FileFacts | None = None

    @property
    def width(self) -> int:
        """Return the columns of a row."""
        return self.leaves[-1].stop

    @property
    def by_token(self) -> bool:
        """Return whether a row is a token's, not an example's."""
        return self.computed_with.get("granularity") == "token"

    @property
    def shard_count(self) -> int:
        """Return the shards of the complete store."""
        return math.ceil(self.rows / self.rows_per_shard)

    def shard_range(self, shard: int) -> range:
        """Return the rows that a shard holds."""
        start = shard * self.rows_per_shard
        return range(start, min(start + self.rows_per_shard, self.rows))

    def to_json(self) -> str:
        """Return the text of `manifest.json`: one line for every leaf, stage and shard.

        Raises:
            StoreError: A setting is no JSON value.
        """
        values = with_checksum({"format": FORMAT, **_plain(self)})
        return (
            "{\n" + ",\n".join(f" {json.dumps(key)}: {_lines(key, value)}" for key, value in values.items()) + "\n}\n"
        )

    @classmethod
    def from_json(cls, text: str) -> "Manifest":
        """Read the text of a `manifest.json`. Fields that this version does not know are passed over.

        Raises:
            StoreError: Not a store's manifest, of a newer format, or not consistent in itself.
        """
        try:
            given = values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise StoreError(f"this file is not valid JSON ({error}); is the folder a store?") from error
        if not isinstance(values, dict) or values.get("format") != FORMAT:
            raise StoreError(
                f'this file is not the manifest of a store ("format" is not "{FORMAT}"); choose another folder'
            )
        version = values.get("format_version")
        if version != FORMAT_VERSION:
            raise StoreError(
                f"expected format version {FORMAT_VERSION}, found {version!r} (written by funcattrib "
                f"{values.get('funcattrib_version', 'of unknown version')}, this is {__version__}); use that version"
            )
        try:
            values = {"kind": _older_kind(values), "text_columns": None, **values}  # an older store's lacks these
            hints = {**get_type_hints(cls), "kind": str}
            if missing := [f.name for f in fields(cls) if f.name not in values]:
                raise ValueError(f"{missing[0]} is missing")
            manifest = cls(**{f.name: typed(hints[f.name], values[f.name], f.name) for f in fields(cls)})
            for name, inside in _INSIDE.items():
                for key in inside.keys() & values[name].keys():
                    typed(inside[key], values[name][key], f"{name}.{key}")
            for number, stage in enumerate(manifest.chain):
                typed(str, stage.get("name"), f"chain[{number}].name")
            check_manifest(manifest)
            check_checksum(given)
        except (ValueError, RecursionError) as error:
            raise StoreError(f"the manifest is damaged: {error}; restore it or build the store again") from error
        return manifest


def read_manifest(path: str | Path) -> Manifest:
    """Read the manifest of the store in folder `path`.

    Raises:
        StoreError: No folder, no store, or one of a newer format.
    """
    file = Path(path) / MANIFEST_FILE
    if not os.path.isfile(file):  # False too where the name is one that the system refuses
        if not os.path.exists(path):
            raise StoreError(f"{path} is not a store: it does not exist; build one with `funcattrib build {path} …`")
        wrong = f"has no {MANIFEST_FILE}" if os.path.isdir(path) else "is a file"
        raise StoreError(f"{path} is not a store: it {wrong}; give the folder of a run")
    try:
        return Manifest.from_json(file.read_text(encoding="utf-8"))
    except (StoreError, UnicodeDecodeError, OSError) as error:
        raise StoreError(f"{file}: {error}") from error


def identity(manifest: Manifest) -> dict[str, Any]:
    """Return everything that must agree for one run to continue another's store, as JSON values."""
    values = _plain(manifest)
    return {key: values[key] for key in _IDENTITY}


def differences(expected: Manifest, found: Manifest) -> list[str]:
    """List where two identities differ, one line each ("model.id: expected "A", found "B""); empty where they agree."""
    return list(_compare("", identity(expected), identity(found)))


def check_manifest(manifest: Manifest) -> None:
    """Check that a manifest is consistent in itself.

    Raises:
        StoreError: Naming the field.
    """
    if manifest.kind not in get_args(Kind):
        raise StoreError(f"expected a store of kind {', '.join(get_args(Kind))}, found {manifest.kind!r}")
    if manifest.dtype not in DTYPES:
        raise StoreError(f"expected a store dtype of {', '.join(DTYPES)}, found {manifest.dtype!r}")
    if manifest.rows < 0 or manifest.rows_per_shard < 1:
        raise StoreError(
            f"expected rows >= 0 and rows_per_shard >= 1, found {manifest.rows} and {manifest.rows_per_shard}"
        )
    if not manifest.leaves:
        raise StoreError("the rows have no leaves; check that `modules` matches a parameter")
    if [*manifest.leaves] != lay_out({leaf.name: leaf.shape for leaf in manifest.leaves}):
        raise StoreError("the leaves have gaps, overlaps or repeated names")
    counts = [manifest.clipped, manifest.nonfinite, *(n for shard in manifest.shards for n in shard[-2:])]
    if any(size < 0 for leaf in manifest.leaves for size in leaf.shape) or any(count < 0 for count in counts):
        raise StoreError("a shape or a count is below zero")
    if manifest.state is not None and manifest.state.file != STATE_FILE:
        raise StoreError(f"expected the state in {STATE_FILE}, found {manifest.state.file}")
    if manifest.complete and (
        len(manifest.shards) != manifest.shard_count
        or [range(shard.start, shard.stop) for shard in manifest.shards]
        != [manifest.shard_range(i) for i in range(manifest.shard_count)]
    ):
        raise StoreError(f"expected all {manifest.shard_count} shards listed in order, found {len(manifest.shards)}")


def unfinished(manifest: Manifest) -> Manifest:
    """Return the same manifest, before any shard was written."""
    return replace(manifest, shards=[], complete=False, clipped=0, nonfinite=0, state=None)


def _older_kind(values: dict[str, Any]) -> Kind:
    """Return the kind of a store whose manifest does not say it."""
    if "queries" in (values.get("extra") or {}):
        return "scores"
    return "gradients" if values.get("rows") else "state"


def _plain(manifest: Manifest) -> dict[str, Any]:
    values = {f.name: getattr(manifest, f.name) for f in fields(manifest)}
    values["leaves"] = [leaf._asdict() for leaf in manifest.leaves]
    values["shards"] = [shard_to_json(shard) for shard in manifest.shards]
    values["state"] = manifest.state._asdict() if manifest.state else None
    try:
        plain: dict[str, Any] = json.loads(json.dumps(values, allow_nan=False))  # tuples become lists, as in the file
    except (TypeError, ValueError) as error:
        raise StoreError(f"the manifest takes JSON values only: {error}") from error
    return plain


def _lines(key: str, value: Any) -> str:
    if isinstance(value, list) and value and key in ("leaves", "chain", "shards"):
        return "[\n" + ",\n".join(f"  {json.dumps(item, ensure_ascii=False)}" for item in value) + "\n ]"
    return json.dumps(value, ensure_ascii=False)


def _compare(at: str, expected: Any, found: Any) -> list[str]:
    if isinstance(expected, dict) and isinstance(found, dict):
        keys = [*expected, *(key for key in found if key not in expected)]
        return [
            line
            for key in keys
            for line in _compare(f"{at}.{key}" if at else key, expected.get(key, _NOTHING), found.get(key, _NOTHING))
        ]
    if isinstance(expected, list) and isinstance(found, list):
        if len(expected) != len(found):
            short = not any(isinstance(item, dict) for item in (*expected, *found))
            sizes = (_short(each) if short else f"{len(each)} of them" for each in (expected, found))
            return ["{}: expected {}, found {}".format(at, *sizes)]
        pairs = enumerate(zip(expected, found, strict=True))
        return [line for i, (a, b) in pairs for line in _compare(f"{at}[{i}]", a, b)]
    return [] if expected == found else [f"{at}: expected {_short(expected)}, found {_short(found)}"]


def _short(value: Any) -> str:
    if value is _NOTHING:
        return "nothing"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}…"
