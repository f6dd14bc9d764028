"""``funcattrib quickstart``: the main job on invented facts, without a download."""

from dataclasses import dataclass
from pathlib import Path

import tyro

from funcattrib.errors import FuncattribError


@dataclass(frozen=True)
class Quickstart:
    """Train a tiny model on invented facts, and find the sentences that its answers come from.

    Nothing is downloaded. RUN gets the facts and the questions as jsonl, the model, and the gradient store, which
    `funcattrib query --index RUN/store` searches.
    """

    run: tyro.conf.Positional[Path] = Path("runs/facts")
    """The run's folder."""
    people: int = 40
    """Number of people to invent facts about."""
    epochs: int = 32
    """Number of times that the model reads the facts."""
    seed: int = 0
    """Another seed: other facts, another model."""

    def __post_init__(self) -> None:
        """Check what a type cannot say."""
        for name in ("people", "epochs"):
            if (value := getattr(self, name)) < 1:
                raise FuncattribError(f"expected --{name} of at least 1, found {value}")


def run(config: Quickstart) -> int | None:
    """Write RUN, and print what was found."""
    from funcattrib.recipes.quickstart import quickstart

    quickstart(config.run, people=config.people, epochs=config.epochs, seed=config.seed)
    return None
