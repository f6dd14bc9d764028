"""FAISS, and its indexes on the device that is asked for: the CPU, or a GPU where FAISS was built for one."""

import logging
from types import ModuleType
from typing import Any

from funcattrib.errors import FuncattribError
from funcattrib.query.faiss_cache import reason

log = logging.getLogger(__name__)


def import_faiss() -> ModuleType:
    """Import FAISS.

    Raises:
        FuncattribError: it is not installed.
    """
    try:
        import faiss
    except ImportError as error:
        raise FuncattribError(
            "FAISS is not installed; install funcattrib[cpu] (or funcattrib[gpu]), or leave the index out: exact "
            "search needs none"
        ) from error
    return faiss


def check_device(faiss: ModuleType, device: str) -> int:
    """Return the number of the GPU that ``device`` names, ``cuda`` or ``cuda:N``.

    Raises:
        FuncattribError: another device, or a GPU that FAISS does not see.
    """
    kind, _, number = device.partition(":")
    if kind != "cuda" or (number and not number.isdecimal()):
        raise FuncattribError(f"expected device cpu, cuda or cuda:N, found {device!r}")
    ordinal = int(number or 0)
    gpus = faiss.get_num_gpus() if hasattr(faiss, "StandardGpuResources") else 0
    if ordinal >= gpus:
        raise FuncattribError(
            f"device {device!r} is not available: FAISS sees {gpus} GPUs; install funcattrib[gpu], or use device cpu"
        )
    return ordinal


def place(faiss: ModuleType, index: Any, device: str, index_factory: str) -> Any:
    """Return the index on ``device``; on the CPU, with a warning, where FAISS has none of its kind on a GPU."""
    if device == "cpu":
        return index
    try:
        resources = faiss.StandardGpuResources()
        return faiss.index_cpu_to_gpu(resources, check_device(faiss, device), index)
    except RuntimeError as error:  # HNSW, for one, exists on the CPU alone
        log.warning("FAISS has no %s on a GPU; using the CPU (%s)", index_factory, reason(error))
        return index
