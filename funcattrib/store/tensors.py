"""Tensors by name in a safetensors file that appears whole or not at all.

What an unfinished run has so far carries a hash in its header. A fitted state does not: its file is the same, byte for
byte, in every release, and its hash stands in the manifest.
"""

import hashlib
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from funcattrib.errors import StoreError
from funcattrib.store.atomic import replacing

_HASH = "sha256"  # in the header

# Seconds in which a network file system must show what another machine has written.
DELAY = 60.0


def save_tensors(path: Path, tensors: Mapping[str, Tensor], *, hashed: bool = False) -> None:
    """Write a file, or replace it; ``hashed`` puts the content's hash into it, which ``load_tensors`` checks.

    Raises:
        StoreError: the disk is full, or the folder not writable; what was there stays.
    """
    separate = _own_memory(tensors)
    metadata = {_HASH: _digest(separate)} if hashed else None
    with replacing(path) as temporary:
        try:
            safetensors.torch.save_file(separate, temporary, metadata=metadata)
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
        StoreError: it does not appear, or is damaged.
    """
    until = time.monotonic() + DELAY
    while not path.exists():
        if time.monotonic() > until:
            raise StoreError(
                f"{path}, which another process of this run wrote, did not appear within {DELAY:.0f} s\n"
                "check that all machines share its folder, then run the same command again"
            )
        time.sleep(0.1)
    try:
        with safe_open(path, "pt") as file:
            written = (file.metadata() or {}).get(_HASH)
        tensors = safetensors.torch.load_file(path)
        if written is not None and written != _digest(tensors):
            raise ValueError("its hash does not match")
    except Exception as error:  # whatever a header that is not as it was written makes its reader raise
        raise StoreError(
            f"{path} is damaged: {error}\ndelete it and run the same command again, or use `overwrite`"
        ) from error
    return tensors


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


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """Compute the hash of names, types, shapes and numbers, in the names' order."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
