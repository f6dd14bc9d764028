"""The memory of a process: how much is available, its peak, and giving it back.

Batches of many shapes leave glibc's heap in pieces: what a process holds grows with the number of batches although what
it uses does not. ``trim`` returns the free pages; elsewhere than on glibc it does nothing.
"""

import ctypes
import gc
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch

from funcattrib.runtime.launcher import local_size

_CGROUPS = (
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (
        Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
        Path("/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ),
)


def trim() -> None:
    """Return free pages of the heap (``malloc_trim``)."""
    if (release := _malloc_trim()) is not None:
        release(0)


def release(device: torch.device) -> None:
    """Give back everything that nothing refers to any more."""
    gc.collect()  # an exception's traceback may be in a cycle, and hold a whole batch
    if device.type == "cuda":
        torch.cuda.empty_cache()
    trim()


def is_short(error: BaseException) -> bool:
    """Return whether an error means that memory was short, on a GPU or on the CPU.

    Example:
        >>> is_short(torch.OutOfMemoryError("CUDA out of memory")), is_short(RuntimeError("shapes differ"))
        (True, False)
    """
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    said = str(error).lower()
    return isinstance(error, RuntimeError) and (
        "defaultcpuallocator: can't allocate memory" in said
        or "out of memory" in said  # CUDA itself, and XLA
        or said == "could not create a primitive"  # oneDNN, without room for its code; of a "descriptor" is another
    )


def available(device: torch.device) -> int:
    """Return the bytes that this process can still take: free ones, and those that it holds without using them.

    On the CPU within its container's and its own limit; the processes of a run that are on one machine divide them.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return min(_left()) // local_size()


def total(device: torch.device) -> int:
    """Return the bytes of the device's memory."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def in_use(device: torch.device) -> int:
    """Return the bytes that this process has on the device, and reset ``peak`` where the system can."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def peak(device: torch.device) -> int:
    """Return the most bytes that this process had on the device, since ``in_use`` was called or since it began."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _status("VmHWM")


def _left() -> Iterator[int]:
    if free := _number(Path("/proc/meminfo"), "MemAvailable"):
        yield free
    else:  # not Linux: half of what there is
        yield total(torch.device("cpu")) // 2
    for most, used in _CGROUPS:
        with suppress(OSError, ValueError):  # no such group, or no limit ("max")
            yield max(0, int(most.read_text()) - int(used.read_text()))
    limit = _address_space()
    if limit is not None:
        yield max(0, limit - _status("VmSize"))


def _address_space() -> int | None:
    import resource  # not on Windows

    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return None if limit == resource.RLIM_INFINITY else limit


def _status(name: str) -> int:
    """Return a size of this process in bytes; on other systems than Linux the most it ever had."""
    if found := _number(Path("/proc/self/status"), name):
        return found
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS counts bytes


def _number(file: Path, name: str) -> int:
    """Read a line ``name: 123 kB`` of a file, in bytes; 0 where there is none."""
    with suppress(OSError):
        if found := re.search(rf"^{name}:\s+(\d+) kB", file.read_text(), re.MULTILINE):
            return 1024 * int(found[1])
    return 0


@cache
def _malloc_trim() -> Any:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # musl, macOS, Windows
        return None
