"""Text that is no Unicode: found and named by file, row and byte."""

import bz2
import gzip
import lzma
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa

from funcattrib.errors import DataError

_SURROGATE = re.compile("[\ud800-\udfff]")
_KINDS = {".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".txt"}
_OPEN: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
_CURE = "save it as UTF-8, e.g. with iconv -f latin1 -t utf-8, or drop the row"


def has_half_character(text: str) -> bool:
    r"""Return whether a text has half a character (a surrogate), which is no Unicode.

    Example:
        >>> has_half_character("caf\udce9"), has_half_character("café")
        (True, False)
    """
    return _SURROGATE.search(text) is not None


def half_character(text: str, place: str) -> DataError:
    """Return the error for a text with half a character."""
    found = _SURROGATE.search(text)
    assert found is not None, "the text has one"
    return DataError(
        f"{place} is no Unicode: half a character, {found.group()!a}, at position {found.start()} of "
        f"{text[:40]!a}\ndecode its bytes with their own encoding, or drop what is broken: "
        "text.encode('utf-8', 'ignore').decode()"
    )


def check_text(dataset: datasets.Dataset, names: Iterable[str], source: str, files: Iterable[str] = ()) -> None:
    """Check that every text in some columns of a data set is UTF-8.

    Args:
        dataset: as it was opened.
        names: the columns; those that it does not have are passed over.
        source: its name, for messages.
        files: those it was read from.

    Raises:
        DataError: naming the file, or the column, and the row and the byte.
    """
    for name in dict.fromkeys(names):
        if name not in dataset.column_names or not _has_text(dataset.features.arrow_schema.field(name).type):
            continue
        row = 0
        for chunk in dataset.select_columns([name]).with_format("arrow")[:].column(name).chunks:
            if not _is_valid(chunk):
                at = next(at for at in range(len(chunk)) if not _is_valid(pa.concat_arrays([chunk.slice(at, 1)])))
                raise bad_bytes(files) or DataError(
                    f"{source} is no UTF-8 in column '{name}' of row {row + at}: {_bytes_of(chunk, at)}\n{_CURE}"
                )
            row += len(chunk)


def bad_bytes(files: Iterable[str]) -> DataError | None:
    """Return the error for the first line of text files that is no UTF-8, if there is one."""
    for file in files:
        suffixes = [suffix.lower() for suffix in Path(file).suffixes[-2:]]
        if not suffixes or not _KINDS & set(suffixes):
            continue
        with _OPEN.get(suffixes[-1], open)(file, "rb") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    line.decode()
                except UnicodeDecodeError as error:
                    near = line[max(0, error.start - 20) : error.start].decode(errors="ignore")
                    header = {".csv": 2, ".tsv": 2}.get(next(each for each in suffixes if each in _KINDS), 1)
                    row = "" if ".json" in suffixes else f" (row {number - header})"
                    return DataError(
                        f"{file} is no UTF-8 in line {number}{row}: byte 0x{line[error.start]:02x} after "
                        f"{near!r}\n{_CURE}"
                    )
    return None


def _has_text(kind: pa.DataType) -> bool:
    if isinstance(kind, pa.BaseExtensionType):
        return _has_text(kind.storage_type)
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return True
    return any(_has_text(kind.field(at).type) for at in range(kind.num_fields))


def _is_valid(chunk: pa.Array) -> bool:
    try:
        chunk.validate(full=True)
    except pa.ArrowInvalid:
        return False
    return True


def _bytes_of(chunk: pa.Array, at: int) -> str:
    kind = chunk.type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        return "a text within it"
    value = chunk.slice(at, 1).cast(pa.large_binary() if pa.types.is_large_string(kind) else pa.binary())[0].as_py()
    try:
        value.decode()
    except UnicodeDecodeError as error:
        return f"byte 0x{value[error.start]:02x} at position {error.start}"
    return "a text within it"
