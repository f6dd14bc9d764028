"""The identity of a model: a name, and a fingerprint of its weights."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from funcattrib.models.functional import parameters_of
from funcattrib.models.skeleton import own_class
from funcattrib.weights.quantised import Quantised
from funcattrib.weights.sharded_quantised import ShardedQuantised
from funcattrib.weights.stored import Stored

_SAMPLES = 1024


def model_identity(model: nn.Module, name: str | None = None, revision: str | None = None) -> dict[str, Any]:
    """Return the manifest's entry for a model: its name, and a fingerprint of its configuration and weights.

    The fingerprint hashes up to 1024 values of each parameter, evenly spaced: it tells checkpoints apart without
    reading terabytes, and is the same on every device. Of a model in shards, parameters are gathered one at a time,
    by all ranks together; of a quantised one they are dequantised.
    """
    config = getattr(model, "config", None)
    params = parameters_of(model)
    storages = [tensor.held for tensor in params.values() if isinstance(tensor, Stored)]
    codes = (held.precision for held in storages if isinstance(held, (Quantised, ShardedQuantised)))
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    return {
        "id": name or getattr(config, "name_or_path", "") or own_class(model).__name__,
        "revision": revision,
        "architecture": own_class(model).__name__,
        "dtype": next(codes, dtype),
        "fingerprint": fingerprint_tensors(params),
    }


def fingerprint_tensors(params: Mapping[str, Tensor]) -> str:
    """Compute SHA-256 over names, shapes, dtypes and evenly spaced values of every parameter."""
    whole = hashlib.sha256()
    for name, tensor in params.items():
        whole.update(json.dumps([name, list(tensor.shape), str(tensor.dtype)]).encode())
        flat = tensor.detach().reshape(-1)
        step = max(1, flat.numel() // _SAMPLES)
        whole.update(flat[::step][:_SAMPLES].float().cpu().numpy().tobytes())
    return whole.hexdigest()
