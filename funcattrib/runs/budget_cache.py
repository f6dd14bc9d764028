"""Tokens of a batch that were found before, kept in a file: by model, chain, longest length and device."""

import hashlib
import json
import os
import platform
from typing import NamedTuple

import torch

from funcattrib.runs.workload import Work
from funcattrib.runtime import memory
from funcattrib.runtime.user_cache import UserCache
from funcattrib.store import Manifest

_CACHE = UserCache("token_budgets", "budgets", version=1)


class Budget(NamedTuple):
    """A budget as it is kept in the file: tokens of a batch, tokens a second, bytes at the most."""

    tokens: int
    speed: float
    peak: int


def key_of(work: Work, manifest: Manifest, longest: int, fits: bool) -> str:
    """Compute the key of a budget, a hash."""
    device = work.device
    machine = [torch.cuda.get_device_name(device)] if device.type == "cuda" else [platform.machine(), os.cpu_count()]
    key_parts = {
        "model": manifest.model["fingerprint"],
        "dtype": manifest.model["dtype"],
        "loss": manifest.loss,
        "source": getattr(work.chain.source, "name", None),
        "chain": work.chain.describe(),
        "fits": fits,
        "longest": longest,
        "shards": work.step.storage,
        "device": [device.type, *machine, memory.total(device), torch.get_num_threads()],
        "torch": torch.__version__,
    }
    return hashlib.sha256(json.dumps(key_parts, sort_keys=True, default=str).encode()).hexdigest()


def known(key: str) -> Budget | None:
    """Look up a budget that was found before."""
    try:
        tokens, speed, peak = _CACHE.read()[key]
        return Budget(int(tokens), float(speed), int(peak)) if int(tokens) > 0 else None
    except (ValueError, KeyError, TypeError):
        return None  # not there, or damaged


def keep(key: str, budget: Budget) -> None:
    """Keep a budget for the next run."""
    _CACHE.add(key, budget)
