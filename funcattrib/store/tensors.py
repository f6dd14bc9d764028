"""Tensors by name in a safetensors file that appears whole or not at all."""

import os
import re
import time
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from funcattrib.errors import StoreError
from funcattrib.store.atomic import replacing

# Seconds in which a network file system must show what another machine has written.
DELAY = 60.0


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a file, or replace it.

    Raises:
        StoreError: the disk is full, or the folder not writable; what was there stays.
    """
    with replacing(path) as temporary:
        try:
            safetensors.torch.save_file(_own_memory(tensors), temporary)
        except SafetensorError as error:
            # It tells of a full disk in its text alone; as an OSError it is explained like any other.
            number = re.search(r"os error (\d+)", str(error))
            if number is None:
                raise
            raise OSError(int(number[1]), os.strerror(int(number[1]))) from error


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Map the tensors of a file: read where they are used, and no memory of the process's own.

    A file that another process has written is waited for.

    Raises:
        StoreError: it does not appear.
    """
    until = time.monotonic() + DELAY
    while not path.exists():
        if time.monotonic() > until:
            raise StoreError(
                f"{path}, which another process of this run wrote, did not appear within {DELAY:.0f} s\n"
                "check that all machines share its folder, then run the same command again"
            )
        time.sleep(0.1)
    return safetensors.torch.load_file(path)


def _own_memory(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors as safetensors takes them: on the CPU, contiguous, no two in the same memory."""
    seen: set[int] = set()
    separate = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        memory = tensor.untyped_storage().data_ptr()
        separate[name] = tensor.clone(memory_format=torch.contiguous_format) if memory in seen else tensor
        seen.add(memory)
    return separate
