"""Checkpoints of a training run, one after the other: comparing them, and the learning rates between them."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from funcattrib.errors import FuncattribError
from funcattrib.types import Params

Shapes = Mapping[str, tuple[int, ...]]


def shapes_of(model: nn.Module | Params) -> Shapes:
    """Return parameter name → shape."""
    named = model.named_parameters() if isinstance(model, nn.Module) else model.items()
    return {name: tuple(tensor.shape) for name, tensor in named}


def check_same(first: Shapes, other: Shapes, what: object) -> None:
    """Refuse a checkpoint of another architecture, naming the first parameter that differs."""
    if differing := [name for name in {**first, **other} if first.get(name) != other.get(name)]:
        name = differing[0]
        raise FuncattribError(
            f"all checkpoints must have one architecture: {name} has shape {other.get(name, 'none')} in {what}, and "
            f"{first.get(name, 'none')} in the first"
        )


def learning_rates(checkpoints: Sequence[Path], given: Sequence[float] = ()) -> list[float]:
    """Read each checkpoint's weight: the mean learning rate that was logged since the one before it.

    Where none was logged in between, the scheduler's at the checkpoint.

    Args:
        checkpoints: folders as transformers' Trainer writes them. The one before is the latest earlier one among them
            in the same folder, or the start of training.
        given: the rates themselves, one a checkpoint.

    Raises:
        FuncattribError: another number of rates than checkpoints, a rate that is not positive, or none to be found; a
            log that is damaged.
    """
    if given:
        if len(given) != len(checkpoints):
            raise FuncattribError(
                f"expected one learning rate for each of {len(checkpoints)} checkpoints, found {len(given)}"
            )
        if wrong := [rate for rate in given if not 0 < rate < float("inf")]:
            raise FuncattribError(f"expected positive learning rates, found {wrong[0]}")
        return [float(rate) for rate in given]
    states = {path: _trainer_state(path) for path in checkpoints}
    rates = []
    for path, state in states.items():
        step = state.get("global_step", 0)
        before = [other.get("global_step", 0) for at, other in states.items() if at.parent == path.parent]
        start = max((earlier for earlier in before if earlier < step), default=0)
        logged = [
            entry["learning_rate"]
            for entry in state.get("log_history", [])
            if start < entry.get("step", 0) <= step and "learning_rate" in entry
        ]
        rate = sum(logged) / len(logged) if logged else _scheduled(path)
        if not rate > 0:
            raise FuncattribError(
                f"{path} has no learning rate above 0 in its trainer_state.json or scheduler.pt; give one for each "
                "checkpoint with `learning_rates`"
            )
        rates.append(rate)
    return rates


def _trainer_state(path: Path) -> dict[str, Any]:
    """Read the Trainer's log; nothing where there is none.

    Raises:
        FuncattribError: it is damaged.
    """
    file = path / "trainer_state.json"
    if not os.path.isfile(file):
        return {}
    try:
        state = json.loads(file.read_text(encoding="utf-8"))
        history = state.get("log_history", [])
        numbers = [state.get("global_step", 0), *(entry.get("step", 0) for entry in history)]
        rates = [entry["learning_rate"] for entry in history if "learning_rate" in entry]
        if not all(type(number) in (int, float) and math.isfinite(number) for number in numbers + rates):
            raise ValueError("a step or a learning rate is no number")
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise FuncattribError(f"{file} is damaged: {error}; give `learning_rates`, one for each checkpoint") from error
    return dict(state)


def _scheduled(path: Path) -> float:
    """Read the scheduler's rate, the mean over groups of parameters; 0 where there is none."""
    try:
        last = torch.load(path / "scheduler.pt", map_location="cpu", weights_only=True)["_last_lr"]
        return sum(map(float, last)) / len(last)
    except Exception:  # no file, or whatever one written by others makes its reader raise
        return 0.0
