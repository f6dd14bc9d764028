"""Tensors that wait on the disk for their use: in a nameless file, whose space is free again when the process ends."""

import tempfile
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import torch
from torch import Tensor

from funcattrib.errors import StoreError
from funcattrib.store.atomic import explain


class Slot(NamedTuple):
    """The place of a tensor in the file, its shape and dtype."""

    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype


class Scratch:
    """Tensors written one after the other; any of them can be read, or replaced by another of its kind.

    Args:
        folder: on whose disk the file is.

    Raises:
        StoreError: the folder cannot be written, or its disk is full.

    Example:
        >>> with Scratch(Path(tempfile.gettempdir())) as scratch:
        ...     place = scratch.put(torch.tensor([1.0, 2.0]))
        ...     scratch.get(place)
        tensor([1., 2.])
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self.bytes = folder, 0
        try:
            self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115  # closed by __exit__
        except OSError as error:
            raise StoreError(explain(error, folder / "scratch")) from error

    def put(self, tensor: Tensor) -> Slot:
        """Append a tensor."""
        slot = Slot(self.bytes, tuple(tensor.shape), tensor.dtype)
        self.replace(slot, tensor)
        self.bytes += tensor.numel() * tensor.element_size()
        return slot

    def replace(self, slot: Slot, tensor: Tensor) -> None:
        """Put a tensor where another one of its shape and dtype is."""
        content = _bytes(tensor.detach().cpu().contiguous())
        try:
            self._file.seek(slot.offset)
            while len(content):  # one call writes 2 GiB at the most
                content = content[self._file.write(content) :]
        except OSError as error:
            raise StoreError(explain(error, self._folder / "scratch")) from error

    def get(self, slot: Slot) -> Tensor:
        """Read a copy of a tensor."""
        tensor = torch.empty(slot.shape, dtype=slot.dtype)
        content = _bytes(tensor)
        self._file.seek(slot.offset)
        while len(content):
            content = content[self._file.readinto(content) :]
        return tensor

    def clear(self) -> None:
        """Remove everything."""
        self._file.truncate(0)
        self.bytes = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def _bytes(tensor: Tensor) -> memoryview:
    """Return the memory of a contiguous tensor."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data
