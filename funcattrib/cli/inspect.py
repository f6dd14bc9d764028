"""``funcattrib inspect``: the contents of a store."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from funcattrib.cli.output import print_store, reports_on_stderr


@dataclass(frozen=True)
class Inspect:
    """Say what RUN holds, and whether it is whole."""

    run: tyro.conf.Positional[Path]
    """The run's folder."""
    verify: bool = False
    """Also compare every file with its hash (reads the whole store)."""
    leaves: bool = False
    """Also list the leaves with their columns."""


@reports_on_stderr
def run(config: Inspect) -> int | None:
    """Print the manifest in words; 1 where --verify finds damage."""
    from funcattrib.store import open_store, verify

    store = open_store(config.run)
    manifest = store.manifest
    print_store(store)
    model, data = manifest.model, manifest.data
    print(f"model: {model['id']} ({model['architecture']}, fingerprint {model['fingerprint'][:12]})")
    print(f"data: {data['id']}, {data['documents']:,} documents, {data['tokens']:,} tokens")
    print(f"loss: {_loss_in_words(manifest.loss)}")
    method = manifest.computed_with.get("method", manifest.computed_with)
    for name in ("name", "score", "unit_norm", "reduced", "unit_normalize", "granularity"):
        if name in method:
            print(f"{'made by' if name == 'name' else name}: {method[name]}")
    for stage in manifest.chain:
        settings = ", ".join(f"{key}={value}" for key, value in stage.items() if key != "name")
        print(f"stage: {stage['name']}({settings})")
    if manifest.kind == "state" and manifest.state is not None:
        print("a fitted state without rows: give it to --state")
    print(f"shards: {len(store.shards)} of {manifest.shard_count}{'' if manifest.complete else ' (unfinished)'}")
    for what, count in (("clipped", manifest.clipped), ("not finite", manifest.nonfinite)):
        if count:
            print(f"{count:,} entries {what}")
    print(f"score: {manifest.score_convention}")
    if config.leaves:
        for leaf in manifest.leaves:
            print(f"{leaf.start:>10,} – {leaf.stop:<10,} {'×'.join(map(str, leaf.shape)):>12}  {leaf.name}")
    if not config.verify:
        return None
    problems = verify(config.run)
    for problem in problems:
        print(problem)
    if not problems:
        print("every file is as it was written")
    return 1 if problems else None


def _loss_in_words(loss: Mapping[str, Any]) -> str:
    over = "of a label" if loss.get("task") == "sequence_classification" else f"{loss['reduction']} over tokens"
    return f"{loss['kind']}, {over}{' of targets' if loss.get('task') == 'seq2seq' else ''}"
