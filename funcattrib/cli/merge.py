"""``funcattrib merge``: the parts of a run as one store."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from funcattrib.cli.output import print_store, reports_on_stderr


@dataclass(frozen=True)
class Merge:
    """Join the parts of a run, from machines without a shared folder, into one store.

    Each part is a folder that one machine wrote; together they hold every shard. The parts stay as they are.
    """

    run: tyro.conf.Positional[Path]
    """The run's folder: a new one, or one of the parts."""
    parts: tyro.conf.Positional[
        Annotated[tuple[Path, ...], tyro.conf.arg(metavar="PARTS [PARTS ...]", help_behavior_hint="(required)")]
    ]
    """The parts' folders, one or more."""


@reports_on_stderr
def run(config: Merge) -> int | None:
    """Join the parts and say what the store holds."""
    from funcattrib.store import merge_stores

    print_store(merge_stores(config.run, config.parts))
    return None
