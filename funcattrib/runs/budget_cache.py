"""Tokens of a batch that were found before, kept in a file: by model, chain, longest length and device."""

import hashlib
import json
import os
import platform
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch

from funcattrib.runs.workload import Work
from funcattrib.runtime import memory
from funcattrib.store import Manifest

_VERSION = 1  # of the file


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
    return _load().get(key)


def keep(key: str, budget: Budget) -> None:
    """Keep a budget for the next run; a file that cannot be written is no matter."""
    with suppress(OSError, RuntimeError):
        file = _file()
        file.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"version": _VERSION, "budgets": {**_load(), key: budget}}, indent=1)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False, encoding="utf-8") as part:
            part.write(text)
        os.replace(part.name, file)


def _load() -> dict[str, Budget]:
    """Load all that was found; nothing where the file cannot be read as such."""
    try:
        kept = json.loads(_file().read_text(encoding="utf-8"))
        if kept["version"] != _VERSION:
            return {}
        return {key: Budget(int(t), float(s), int(p)) for key, (t, s, p) in kept["budgets"].items() if int(t) > 0}
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError):
        return {}  # missing, unreadable, damaged, or no home


def _file() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "funcattrib" / "token_budgets.json"
