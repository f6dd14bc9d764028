"""Small things that a later run need not find again: JSON files in the user's cache folder.

A file that is missing, damaged, or of another version holds nothing; one that cannot be written is no matter.
"""

import json
import os
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple


class UserCache(NamedTuple):
    """A file of the cache folder: its name, what its entries are called in it, and its version.

    Example:
        >>> UserCache("nothing", "things", version=1).read()
        {}
    """

    name: str
    entries: str
    version: int

    def read(self) -> dict[str, list[Any]]:
        """Read all entries, key → list of JSON values; an entry that is none is left out."""
        try:
            found = json.loads(self._file().read_text(encoding="utf-8"))
            entries = found[self.entries] if found["version"] == self.version else {}
            return {key: value for key, value in entries.items() if isinstance(value, list)}
        except (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError):
            return {}

    def add(self, key: str, value: Sequence[Any], most: int | None = None) -> None:
        """Add an entry; the file keeps the ``most`` that were added last."""
        with suppress(OSError, RuntimeError):
            file = self._file()
            file.parent.mkdir(parents=True, exist_ok=True)
            entries = {**{each: kept for each, kept in self.read().items() if each != key}, key: value}
            entries = dict(list(entries.items())[-most:]) if most else entries
            text = json.dumps({"version": self.version, self.entries: entries}, indent=1)
            with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False, encoding="utf-8") as part:
                part.write(text)
            os.replace(part.name, file)

    def _file(self) -> Path:
        """Return the file's path; RuntimeError where there is no home."""
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        return folder / "funcattrib" / f"{self.name}.json"
