"""From a manifest's description of a chain back to the chain."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from funcattrib.chain.chain import Chain, compose
from funcattrib.chain.per_example import GradientSource
from funcattrib.chain.transform import Transform
from funcattrib.errors import ChainError
from funcattrib.transforms.adafactor import adafactor_norm
from funcattrib.transforms.adam import adam_norm
from funcattrib.transforms.cast import cast
from funcattrib.transforms.clip import clip
from funcattrib.transforms.experts import split_experts
from funcattrib.transforms.heads import split_heads
from funcattrib.transforms.precondition import precondition
from funcattrib.transforms.project import project
from funcattrib.transforms.select import select
from funcattrib.transforms.sketch import sketch
from funcattrib.transforms.unit_norm import unit_norm

FACTORIES: dict[str, Callable[..., Transform]] = {
    "adafactor_norm": adafactor_norm,
    "adam_norm": adam_norm,
    "cast": cast,
    "clip": clip,
    "precondition": precondition,
    "project": project,
    "select": select,
    "sketch": sketch,
    "split_experts": split_experts,
    "split_heads": split_heads,
    "unit_norm": unit_norm,
}


def rebuild(source: GradientSource, description: Sequence[Mapping[str, Any]]) -> Chain:
    """Rebuild the chain that ``Chain.describe`` described, after ``source``.

    Raises:
        ChainError: a user's transform, which only its author can make again.

    Example:
        >>> from funcattrib.chain.per_example import per_example_grad
        >>> chain = compose(per_example_grad, project(4, seed=2), unit_norm)
        >>> rebuild(per_example_grad, chain.describe()).describe() == chain.describe()
        True
    """
    stages = []
    for entry in description:
        settings = {key: value for key, value in entry.items() if key != "name"}
        if entry["name"] not in FACTORIES or "code" in settings:
            raise ChainError(
                f"the store's stage {entry['name']!r} is a transform of the user's, which no manifest can rebuild\n"
                "ask in Python with the chain that made the store, Attributor(run, chain=chain); the command line has "
                f"the built-in stages alone: {', '.join(FACTORIES)}"
            )
        stages.append(FACTORIES[entry["name"]](**settings))
    return compose(source, *stages)
