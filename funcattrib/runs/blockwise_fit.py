"""A stage whose state is in parts, fitted by several processes: each part by the one that owns it.

    rows of a process → its disk        part by part: its partial state → the sum, at the owner alone → finalized there
    finalized parts → files of the run, which every process maps

So a process holds the parts that it owns, 1/n of them; of the others, one at a time while it is added up or handed on.
What is mapped is read from the file where it is applied, once for all processes of a machine.
"""

import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import torch
from torch import Tensor

from funcattrib.chain.fitting import fit_all_reduced
from funcattrib.chain.state_tree import flatten, restore
from funcattrib.chain.transform import State, Transform
from funcattrib.runtime.assignment import owners
from funcattrib.runtime.world import World
from funcattrib.store import StoreWriter
from funcattrib.store.spill import Scratch, Slot
from funcattrib.store.tensors import load_tensors, save_tensors
from funcattrib.store.writer import FITTING
from funcattrib.types import Grads, Spec

_ROWS = 1024  # read back at a time
_MOST = 1 << 30  # bytes of rows that wait on the disk, where the states are not larger


class StagePart(NamedTuple):
    """The stage that fits a part alone, and the leaves that it is given."""

    stage: Transform
    spec: Spec

    def start(self) -> State:
        """Return the state before any row."""
        return self.stage.init(self.spec)[0]


def by_owner(writer: StoreWriter, stage: Transform, spec: Spec, rows: Iterable[Grads], world: World) -> State:
    """Fit a stage as a ``fitting.FoldRows``: what processes hand each other lies in the run's folder, until
    ``forget_parts``.

    A stage that is not in parts, and a process that is alone, are fitted by ``fit_all_reduced``.
    """
    if world.size == 1 or stage.parts is None:
        return fit_all_reduced(stage, spec, rows, world)
    assert stage.statistics is None, "of a stage in parts, whole rows are kept"
    parts = {
        name: StagePart(each, {leaf: spec[leaf] for leaf in names}) for name, (each, names) in stage.parts(spec).items()
    }
    rank = owners({name: _bytes(part.start()) for name, part in parts.items()}, world.size)
    with PartialStates(writer.path, parts) as states:
        for grads in rows:
            states.observe(grads)
        sums = {name: world.reduce(rank[name], flatten(states.of(name))) for name in parts}
    mine: dict[str, dict[str, Tensor]] = {}
    for name, part in parts.items():
        if (total := sums.pop(name)) is not None:
            mine[name] = flatten(part.stage.finalize(restore(part.start(), total)))
    folder = writer.path / FITTING / str(world.broadcast_object(_unused(writer.path / FITTING)))
    files = [folder / f"{number:05d}.safetensors" for number in range(len(parts))]
    for name, file in zip(parts, files, strict=True):
        tensors = world.broadcast(mine.pop(name, None), rank[name])
        if writer.role.holds_lock and tensors is not None:
            folder.mkdir(parents=True, exist_ok=True)
            save_tensors(file, tensors)
    world.barrier()
    whole: dict[str, Tensor] = {}
    for file in files:
        whole |= load_tensors(file)
    return restore(stage.init(spec)[0], whole)


def forget_parts(writer: StoreWriter, world: World) -> None:
    """Remove what was handed on, once no process uses it any more."""
    world.barrier()
    if writer.role.holds_lock:
        shutil.rmtree(writer.path / FITTING, ignore_errors=True)


class PartialStates:
    """States of every part from the rows of one process: rows wait on the disk, and are folded into a part when asked
    for.

    Where they become many, they are folded into all parts' states, which lie on the disk as well.
    """

    def __init__(self, folder: Path, parts: Mapping[str, StagePart]) -> None:
        self._parts = parts
        self._most = max(_MOST, sum(_bytes(part.start()) for part in parts.values()))
        self._rows, self._states = Scratch(folder), Scratch(folder)
        self._batches: list[dict[str, Slot]] = []
        self._kept: dict[str, dict[str, Slot]] = {}
        self._device = torch.device("cpu")

    def observe(self, grads: Grads) -> None:
        """Add the rows of a batch."""
        self._device = next(iter(grads.values())).device
        self._batches.append({name: self._rows.put(grad) for name, grad in grads.items()})
        if self._rows.bytes > self._most:
            self._fold()

    def of(self, name: str) -> State:
        """Return a part's state, of all rows."""
        part = self._parts[name]
        state = part.start()
        if name in self._kept:
            state = restore(state, {tensor: self._states.get(slot) for tensor, slot in self._kept[name].items()})
        for rows in self._read(part.spec):
            state = part.stage.observe(state, rows)
        return state

    def _fold(self) -> None:
        for name in self._parts:
            state = flatten(self.of(name))
            if name not in self._kept:
                self._kept[name] = {tensor: self._states.put(value) for tensor, value in state.items()}
            else:
                for tensor, value in state.items():
                    self._states.replace(self._kept[name][tensor], value)
        self._batches.clear()
        self._rows.clear()

    def _read(self, names: Iterable[str]) -> Iterator[Grads]:
        """Yield some leaves of the rows, several batches at a time."""
        held: list[dict[str, Slot]] = []
        rows = 0
        for number, batch in enumerate(self._batches, 1):
            held.append(batch)
            rows += next(iter(batch.values())).shape[0]
            if rows >= _ROWS or number == len(self._batches):
                yield {
                    name: torch.cat([self._rows.get(each[name]) for each in held]).to(self._device) for name in names
                }
                held, rows = [], 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._rows.__exit__(kind, error, trace)
        self._states.__exit__(kind, error, trace)


def _bytes(state: State) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in flatten(state).values())


def _unused(folder: Path) -> int:
    """Return a number that no folder in ``folder`` has: that of an earlier stage is still in use."""
    return len([*folder.glob("*")]) if folder.exists() else 0
