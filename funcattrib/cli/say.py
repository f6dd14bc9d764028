"""What commands say: reports on stderr while they work, results on stdout."""

import logging
import sys

from funcattrib.store import GradientStore


def report_to_stderr() -> None:
    """Let the library's reports (INFO and above) through to stderr, as plain lines."""
    library = logging.getLogger("funcattrib")
    if not library.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(message)s"))
        library.addHandler(handler)
        library.setLevel(logging.INFO)
        library.propagate = False


def say_store(store: GradientStore) -> None:
    """One line on what a store holds."""
    manifest = store.manifest
    chain = " → ".join(stage["name"] for stage in manifest.chain) or "whole gradients"
    size = sum(shard.bytes for shard in store.shards)
    print(
        f"{store.path}: {len(store):,} rows × {store.width:,} ({len(store.leaves)} leaves, {manifest.dtype}, "
        f"{size / 2**20:,.1f} MiB), {chain}"
    )
