"""Damage to bytes and to JSON values, drawn from a seeded generator."""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

ODD: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2**31, 2**53 + 1, 2**63, -(2**63), 1e308, -0.0, float("nan"), float("inf")),
    *("", " ", "\x00", "é", "\ud800", "NaN", "null", "../..", "a" * 300, "2001-13-45", "[" * 50),
    *([], [None], [[]], [1, "a"], {}, {"": None}, {"a": {"b": []}}),
)
"""Values that a reader may not expect."""


def damage_bytes(data: bytes, draw: Random) -> bytes:
    """Return the bytes with one to three places flipped, cut, doubled, overwritten or dropped."""
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        if not data:
            return draw.randbytes(draw.randint(0, 40))
        at = draw.choice((draw.randrange(len(data)), draw.randrange(min(len(data), 200))))
        data = draw.choice(_BYTES)(data, at, draw)
    return data


def damage_json(value: Any, draw: Random) -> Any:
    """Return a JSON value with one of its parts replaced, dropped, renamed or doubled."""
    if isinstance(value, dict) and value and draw.random() < 0.9:
        key = draw.choice(list(value))
        kind = draw.random()
        if kind < 0.1:
            return {k: v for k, v in value.items() if k != key}
        if kind < 0.15:
            return {(f"{k}x" if k == key else k): v for k, v in value.items()}
        return {**value, key: damage_json(value[key], draw)}
    if isinstance(value, list) and value and draw.random() < 0.9:
        at = draw.randrange(len(value))
        kind = draw.random()
        if kind < 0.1:
            return value[:at] + value[at + 1 :]
        if kind < 0.15:
            return [*value, value[at]]
        return [damage_json(each, draw) if i == at else each for i, each in enumerate(value)]
    if isinstance(value, int) and not isinstance(value, bool) and draw.random() < 0.4:
        return value + draw.choice((-1, 1, 7, -1000))
    return draw.choice(ODD)


def damage_file(path: Path, draw: Random) -> None:
    """Damage one file where it lies: its JSON values, its bytes, or what it is."""
    kind = draw.random()
    if kind < 0.03:
        path.unlink()
    elif kind < 0.05:
        path.unlink()
        path.mkdir()
    elif path.suffix in (".json", ".yaml") and kind < 0.7:
        try:
            value = json.loads(path.read_text())
        except ValueError:
            path.write_bytes(damage_bytes(path.read_bytes(), draw))
        else:
            path.write_text(json.dumps(damage_json(value, draw)))
    else:
        path.write_bytes(damage_bytes(path.read_bytes(), draw))


class Canary:
    """A pickle that leaves a file where it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.mark),))


def plant(path: Path, mark: Path) -> None:
    """Put a pickle in the place of a file; loading it would make the folder ``mark``."""
    path.write_bytes(pickle.dumps(Canary(mark)))


def _flip(data: bytes, at: int, draw: Random) -> bytes:
    return data[:at] + bytes([data[at] ^ (1 << draw.randrange(8))]) + data[at + 1 :]


def _overwrite(data: bytes, at: int, draw: Random) -> bytes:
    put = draw.choice(
        (b"\xff\xff\xff\xff", b"\x00" * 8, b"\x7f" * 4, b'"', b"{", b"(", b"\n", b"\xe9", b"\xed\xa0\x80")
    )
    return data[:at] + put + data[at + len(put) :]


def _insert(data: bytes, at: int, draw: Random) -> bytes:
    return data[:at] + draw.randbytes(draw.randint(1, 8)) + data[at:]


def _cut(data: bytes, at: int, draw: Random) -> bytes:
    return data[:at]


def _drop(data: bytes, at: int, draw: Random) -> bytes:
    return data[:at] + data[at + draw.randint(1, 16) :]


def _double(data: bytes, at: int, draw: Random) -> bytes:
    return data[: at + 20] + data[at:]


_BYTES: tuple[Callable[[bytes, int, Random], bytes], ...] = (_flip, _overwrite, _insert, _cut, _drop, _double)
