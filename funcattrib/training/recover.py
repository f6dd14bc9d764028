"""Recovery after a training that was killed: stores of what it had finished."""

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import safetensors.torch
from torch import Tensor

from funcattrib.errors import FuncattribError
from funcattrib.store import GradientStore, Manifest
from funcattrib.store.create import PARTS
from funcattrib.training.assemble import settle
from funcattrib.training.journal import segments

PLAN = "plan.json"
STATE = "state.safetensors"


def recover(path: str | Path) -> list[GradientStore]:
    """Make the stores of a training that broke off from the rows it had written; it may still be resumed.

    Args:
        path: the callback's.

    Returns:
        A store an epoch that was begun and not finished (or the sum's), in the data set's order, with zeros for the
        examples that were not visited. ``store.manifest.extra["steps"]`` says which steps it holds.

    Raises:
        FuncattribError: no rows of a training there.
    """
    path = Path(path)
    folders = [folder for folder in (*sorted(path.glob("epoch_*"), key=_number), path / "sum") if segments(folder)]
    if not folders:
        raise FuncattribError(f"{path} has no rows of an interrupted training to recover; give the callback's path")
    return [_recover(folder) for folder in folders]


def save_plan(folder: Path, manifest: Manifest, state: Mapping[str, Tensor], settings: Mapping[str, bool]) -> None:
    """Save what ``recover`` must know, beside the journals of ``folder``."""
    (folder / PARTS).mkdir(parents=True, exist_ok=True)
    (folder / PARTS / PLAN).write_text(json.dumps({"manifest": manifest.to_json(), "settings": dict(settings)}))
    if state:
        contiguous = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in state.items()}
        safetensors.torch.save_file(contiguous, folder / PARTS / STATE)


def _recover(folder: Path) -> GradientStore:
    kept = folder / PARTS
    try:
        plan = json.loads((kept / PLAN).read_text())
    except (OSError, ValueError) as error:
        raise FuncattribError(f"{kept / PLAN} cannot be read; resume the training instead") from error
    state = safetensors.torch.load_file(kept / STATE) if (kept / STATE).exists() else {}
    manifest = replace(Manifest.from_json(plan["manifest"]), text_columns=())  # of the metadata the ids alone
    return settle(folder, manifest, state, _numbers, partial=True, **plan["settings"])


def _numbers(rows: range) -> dict[str, list[str]]:
    """Return the rows' numbers as metadata, as the data set is not at hand."""
    return {"id": [str(row) for row in rows]}


def _number(folder: Path) -> int:
    found = re.search(r"\d+$", folder.name)
    return int(found[0]) if found else -1
