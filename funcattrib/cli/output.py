"""The output of commands: reports on stderr while they work, results on stdout."""

import logging
import sys
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar

from funcattrib.cli.flags import setting_names, with_flags
from funcattrib.errors import FuncattribError

if TYPE_CHECKING:
    from funcattrib.store import GradientStore

_Config = TypeVar("_Config")


def reports_on_stderr(run: Callable[[_Config], int | None]) -> Callable[[_Config], int | None]:
    """Print the library's reports (INFO and above) and warnings on stderr; settings are named by their flags."""

    @wraps(run)
    def reported(config: _Config) -> int | None:
        names = setting_names(type(config))
        with _library_on_stderr(names):
            try:
                return run(config)
            except FuncattribError as error:
                raise type(error)(with_flags(str(error), names)) from error

    return reported


@contextmanager
def _library_on_stderr(names: Collection[str]) -> Iterator[None]:
    library = logging.getLogger("funcattrib")
    handler, level = logging.StreamHandler(sys.stderr), library.level
    handler.setFormatter(_Flags(names))
    library.addHandler(handler)
    library.setLevel(logging.INFO)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            yield
    finally:
        library.removeHandler(handler)
        library.setLevel(level)


class _Flags(logging.Formatter):
    """Plain lines in which a command's settings are its flags."""

    def __init__(self, names: Collection[str]) -> None:
        super().__init__()
        self.names = names

    def format(self, record: logging.LogRecord) -> str:
        return with_flags(super().format(record), self.names)


def print_store(store: "GradientStore") -> None:
    """Print one line on a store's contents, of gradients or of scores."""
    manifest = store.manifest
    unit = "tokens" if manifest.by_token else "rows"
    if manifest.kind == "scores":
        kept = manifest.computed_with.get("top_k")
        best = f"the best {kept} of {manifest.computed_with['scored']:,} rows" if kept else f"{len(store):,} {unit}"
        print(f"{store.path}: scores of {best} for {len(manifest.extra['queries']):,} queries")
        return
    chain = " → ".join(stage["name"] for stage in manifest.chain) or "whole gradients"
    size = sum(shard.bytes for shard in store.shards)
    print(
        f"{store.path}: {len(store):,} {unit} × {store.width:,} ({len(store.leaves)} leaves, {manifest.dtype}, "
        f"{size / 2**20:,.1f} MiB), {chain}"
    )


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(message, file=sys.stderr)
