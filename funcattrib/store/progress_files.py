"""The processes' results of a pass that is not done: one file a process, ``progress-RANK.safetensors``.

Each holds a result and the numbers of the parts of the pass that it comes from, so that a run goes on from all of
them, whatever the number of processes then.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from funcattrib.errors import StoreError
from funcattrib.store.tensors import load_tensors, save_tensors

FILES = "progress-*.safetensors"
_MADE_OF = "parts"  # among the tensors


def save_parts(folder: Path, rank: int, tensors: Mapping[str, Tensor], parts: Sequence[int]) -> None:
    """Save what a process has computed of some parts, in the place of what it had before."""
    made_of = torch.tensor(parts, dtype=torch.int64)
    save_tensors(_file(folder, rank), {**tensors, _MADE_OF: made_of}, hashed=True)


def load_parts(folder: Path) -> list[tuple[dict[str, Tensor], list[int]]]:
    """Load what the processes of earlier runs have computed, each with its parts; no part twice.

    Raises:
        StoreError: a file is damaged.
    """
    found: list[tuple[dict[str, Tensor], list[int]]] = []
    seen: set[int] = set()
    for file in sorted(folder.glob(FILES), key=lambda file: (len(file.name), file.name)):
        tensors = load_tensors(file)
        if _MADE_OF not in tensors:
            raise StoreError(f"{file} is damaged: it does not say which parts it is made of; delete it")
        parts = [int(part) for part in tensors.pop(_MADE_OF)]
        if seen.isdisjoint(parts):
            found.append((tensors, parts))
            seen.update(parts)
    return found


def replace_parts(folder: Path, tensors: Mapping[str, Tensor], parts: Sequence[int]) -> None:
    """Put one result, as rank 0's, in the place of those that it was merged from."""
    save_parts(folder, 0, tensors, parts)  # first: of a part that is there twice, this file is the one that counts
    for file in folder.glob(FILES):
        if file != _file(folder, 0):
            file.unlink()


def _file(folder: Path, rank: int) -> Path:
    return folder / FILES.replace("*", str(rank))
