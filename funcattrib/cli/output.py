"""The output of commands: reports on stderr while they work, results on stdout."""

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from funcattrib.store import GradientStore


@contextmanager
def reports_on_stderr() -> Iterator[None]:
    """Print the library's reports (INFO and above) and warnings on stderr, as plain lines."""
    library = logging.getLogger("funcattrib")
    handler, level = logging.StreamHandler(sys.stderr), library.level
    library.addHandler(handler)
    library.setLevel(logging.INFO)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            yield
    finally:
        library.removeHandler(handler)
        library.setLevel(level)


def print_store(store: "GradientStore") -> None:
    """Print one line on a store's contents, of gradients or of scores."""
    manifest = store.manifest
    if manifest.kind == "scores":
        kept = manifest.computed_with.get("top_k")
        best = f"the best {kept} of {manifest.computed_with['scored']:,} rows" if kept else f"{len(store):,} rows"
        print(f"{store.path}: scores of {best} for {len(manifest.extra['queries']):,} queries")
        return
    chain = " → ".join(stage["name"] for stage in manifest.chain) or "whole gradients"
    size = sum(shard.bytes for shard in store.shards)
    print(
        f"{store.path}: {len(store):,} rows × {store.width:,} ({len(store.leaves)} leaves, {manifest.dtype}, "
        f"{size / 2**20:,.1f} MiB), {chain}"
    )


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(message, file=sys.stderr)
