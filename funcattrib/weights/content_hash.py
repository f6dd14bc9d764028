"""Hashes of parameters by their values: of every byte, and of evenly spaced samples.

    hash of a tensor = XXH3(XXH3(chunk 1), XXH3(chunk 2), …)        chunks of 16 MiB, hashed in parallel threads
    content          = SHA-256(names, shapes, dtypes and hashes of all tensors)

A hash does not depend on the device, or on where a weight is stored: one in shards is gathered, one at a time and by
all ranks of its group together, and hashed by one of them; a quantised one is dequantised.
"""

import hashlib
import json
import os
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from xxhash import xxh3_128_digest

from funcattrib.weights.sharded import Gathers, Sharded
from funcattrib.weights.sharded_quantised import ShardedQuantised
from funcattrib.weights.stored import Stored, made, source

_CHUNK = 16 << 20
_MOST_THREADS = 16
_SAMPLES = 1024
_BYTES = 16  # of a tensor's hash


class Hashes(NamedTuple):
    """Two hashes of the same parameters, as hexadecimal digits.

    Attributes:
        content: of every byte.
        sampled: of up to 1024 evenly spaced values of each parameter: all that older stores have.
    """

    content: str
    sampled: str


def sample_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Compute the hash of samples alone."""
    sampled = hashlib.sha256()
    for name, tensor in tensors.items():
        sampled.update(_header(name, tensor) + _samples(made(source(tensor.detach()))))
    return sampled.hexdigest()


def hash_tensors(tensors: Mapping[str, Tensor]) -> Hashes:
    """Compute the hashes of parameters, name → tensor. Ranks that hold them together call this together.

    Example:
        >>> one, other = torch.zeros(5000), torch.zeros(5000)
        >>> other[1] = 1
        >>> ours, theirs = hash_tensors({"w": one}), hash_tensors({"w": other})
        >>> ours.content == theirs.content, ours.sampled == theirs.sampled
        (False, True)
    """
    sampled = hashlib.sha256()
    headers: list[bytes] = []
    hashes: list[bytes | list[Future[bytes]] | None] = []
    gathers: Gathers | None = None
    with ThreadPoolExecutor(_threads()) as pool:
        for number, (name, tensor) in enumerate(tensors.items()):
            header = _header(name, tensor)
            headers.append(header)
            sampled.update(header)
            shared = _gathers(tensor)
            gathers = shared or gathers
            value = made(source(tensor.detach()))
            sampled.update(_samples(value))
            mine = shared is None or number % shared.size == shared.rank
            hashes.append(_hash(value, pool) if mine else None)
            if isinstance(tensor, Stored):  # its dense weight is dropped before the next is made
                hashes[-1] = _joined(hashes[-1])
            del value
        found = [_joined(each) for each in hashes]
    if gathers is not None:
        found = _exchanged(found, gathers)
    content = hashlib.sha256()
    for header, each in zip(headers, found, strict=True):
        assert each is not None, "some rank hashed it"
        content.update(header + each)
    return Hashes(content.hexdigest(), sampled.hexdigest())


def _header(name: str, tensor: Tensor) -> bytes:
    return json.dumps([name, list(tensor.shape), str(tensor.dtype)]).encode()


def _gathers(tensor: Tensor) -> Gathers | None:
    """Return the gathers of a tensor that several ranks hold together."""
    held = tensor.held if isinstance(tensor, Stored) else None
    shared = held.gathers if isinstance(held, Sharded | ShardedQuantised) else None
    return shared if shared is not None and shared.size > 1 else None


def _samples(value: Tensor) -> bytes:
    flat = value.reshape(-1)
    flat = flat.real if flat.is_complex() else flat
    step = max(1, flat.numel() // _SAMPLES)
    return flat[::step][:_SAMPLES].float().cpu().numpy().tobytes()


def _hash(value: Tensor, pool: ThreadPoolExecutor) -> bytes | list[Future[bytes]]:
    flat = value.reshape(-1)
    flat = (torch.view_as_real(flat).reshape(-1) if flat.is_complex() else flat).view(torch.uint8)
    if flat.numel() <= _CHUNK // 16:  # not worth a thread
        return xxh3_128_digest(_digest(flat))
    waiting: deque[Future[bytes]] = deque()
    for chunk in _chunks(flat):
        if flat.device.type != "cpu" and len(waiting) >= 2 * _threads():  # each is a copy
            waiting[-2 * _threads()].result()
        waiting.append(pool.submit(_digest, chunk))
    return list(waiting)


def _chunks(flat: Tensor) -> Iterator[Tensor]:
    for start in range(0, flat.numel(), _CHUNK):
        yield flat[start : start + _CHUNK].cpu()


def _digest(chunk: Tensor) -> bytes:
    return xxh3_128_digest(chunk.cpu().numpy().data if chunk.numel() else b"")


def _joined(hashed: bytes | list[Future[bytes]] | None) -> bytes | None:
    return xxh3_128_digest(b"".join(each.result() for each in hashed)) if isinstance(hashed, list) else hashed


def _exchanged(hashes: list[bytes | None], gathers: Gathers) -> list[bytes | None]:
    """Return all hashes on every rank; each was made by one of them, or by all where they all have the tensor."""
    numbers = [each if number % gathers.size == gathers.rank else None for number, each in enumerate(hashes)]
    table = torch.tensor([[*(each or bytes(_BYTES))] for each in numbers], dtype=torch.uint8, device=gathers.device)
    gathers.settle()
    dist.all_reduce(table, group=gathers.group)
    return [bytes(row) for row in table.tolist()]


def _threads() -> int:
    count = os.cpu_count() or 1
    with suppress(AttributeError):  # not on every system
        count = len(os.sched_getaffinity(0))
    return min(count, _MOST_THREADS)
