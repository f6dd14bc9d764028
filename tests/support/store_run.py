"""A run that writes a store of made-up rows, as a function and as a program: tests kill it, starve it, continue it."""

import argparse
import json
import resource
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from funcattrib.errors import StoreError
from funcattrib.store import Manifest, StoreWriter, create_store, lay_out

SHAPES = {"0.weight": (8, 4), "0.bias": (8,), "1.weight": (3, 8)}
WIDTH = 64


def manifest(**changes: object) -> Manifest:
    settings: dict = {
        "model": {"id": "tiny", "revision": "abc"},
        "data": {"id": "made-up", "split": "train", "fingerprint": "f00", "documents": 70, "tokens": 700},
        "loss": {"kind": "ce", "reduction": "sum"},
        "chain": [{"name": "project", "dim": 8, "shape": (3, 4)}, {"name": "unit_norm"}],
        "seed": 0,
        "leaves": lay_out(SHAPES),
        "rows": 70,
        "rows_per_shard": 16,
        "dtype": "float32",
    }
    return Manifest(**{**settings, **changes})


def edit_manifest(run: Path, *without: str, **changes: object) -> None:
    """Change or remove entries of a manifest, which then is one of a release that had no checksums."""
    values = {**json.loads((run / "manifest.json").read_text()), **changes}
    kept = {name: value for name, value in values.items() if name not in ("checksum", *without)}
    (run / "manifest.json").write_text(json.dumps(kept))


def take_apart(whole: Path, parts: Sequence[Path]) -> list[Path]:
    """Parts as machines without a shared folder leave them: shard i in part i mod n, and none of them finished."""
    manifest = json.loads((whole / "manifest.json").read_text())
    for which, part in enumerate(parts):
        shutil.copytree(whole, part)
        edit_manifest(part, shards=[], complete=False, state=None)
        for number, shard in enumerate(manifest["shards"]):
            if number % len(parts) == which:
                (part / f"shards/{number:05d}.json").write_text(json.dumps(shard))
            else:
                (part / shard["file"]).unlink()
    return list(parts)


def rows(span: range) -> torch.Tensor:
    """The rows of a span, a function of their numbers alone."""
    each = [torch.randn(WIDTH, generator=torch.Generator().manual_seed(row)) for row in span]
    return torch.stack(each) if each else torch.zeros(0, WIDTH)


def examples(span: range) -> dict:
    return {
        "id": list(span),
        "text": [f"document {row}" for row in span],
        "loss": torch.arange(span.start, span.stop) / 8,
        "tokens": [row % 7 for row in span],
    }


def fill(writer: StoreWriter, delay: float = 0.0, limit_after: int = -1, hold_after: int = -1) -> None:
    for done, shard in enumerate(writer.pending):
        if done == limit_after:
            # The rows of a shard no longer fit into one file; what was handed over before still does.
            while len(writer.finished) < done:
                time.sleep(0.001)
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))
        if done == hold_after:
            signal.pause()  # until it is killed
        time.sleep(delay)
        writer.put(shard, rows(writer.shard_range(shard)), examples(writer.shard_range(shard)))
    writer.finish()


def write(path: Path, **changes: object) -> Path:
    with create_store(path, manifest(**changes)) as writer:
        if not writer.manifest.complete:
            writer.save_state({"moments": torch.arange(5.0)})
            writer.save_config({"seed": 0, "model": "tiny"})
        fill(writer)
    return path


def contents(path: Path) -> dict[str, bytes]:
    """Every file of a store, to the last byte."""
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("path", type=Path)
    parser.add_argument("--rows", type=int, default=70)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--delay", type=float, default=0.0)
    parser.add_argument("--limit-after", type=int, default=-1)
    parser.add_argument("--hold-after", type=int, default=-1)
    args = parser.parse_args()
    torch.set_num_threads(1)
    try:
        with create_store(args.path, manifest(rows=args.rows, dtype=args.dtype)) as writer:
            print("ready", flush=True)
            writer.save_state({"moments": torch.arange(5.0)})
            writer.save_config({"seed": 0, "model": "tiny"})
            fill(writer, args.delay, args.limit_after, args.hold_after)
    except StoreError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
