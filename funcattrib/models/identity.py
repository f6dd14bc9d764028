"""The identity of a model: a name to find it again, and hashes of all that its outputs depend on.

    content = SHA-256(class, configuration, adapters' settings, names, shapes, dtypes and every byte of the weights)

Two models of one content are the same, wherever they lie; the name is not compared.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers import PretrainedConfig

from funcattrib.models import identity_cache
from funcattrib.models.functional import parameters_of, sharing
from funcattrib.models.identity_cache import FileStamp
from funcattrib.models.skeleton import own_class
from funcattrib.weights.content_hash import Hashes, hash_tensors, sample_tensors
from funcattrib.weights.quantised import Quantised
from funcattrib.weights.sharded_quantised import ShardedQuantised
from funcattrib.weights.stored import Stored

# Entries of a configuration that the logits do not depend on, or that the weights say: where it lies, what wrote it,
# what it returns beside them, and how the same function is computed. Names that begin with "_" are of the kind too.
_VOLATILE = frozenset(
    (
        *("architectures", "auto_map", "transformers_version"),
        *("output_attentions", "output_hidden_states", "return_dict"),
        *("attn_implementation", "experts_implementation", "gradient_checkpointing", "use_cache"),
        *("dtype", "quantization_config", "torch_dtype"),
    )
)
_VOLATILE_OF_ADAPTERS = frozenset(
    (
        *("auto_mapping", "base_model_name_or_path", "peft_version", "revision"),
        *("inference_mode", "init_lora_weights", "runtime_config"),
    )
)
OWN_LOSS = "own loss"
"""The architecture, in a manifest, of parameters that a user's loss came with."""
_PLAIN = (bool, int, float, str, type(None))


def model_identity(
    model: nn.Module,
    name: str | None = None,
    revision: str | None = None,
    stamps: tuple[FileStamp, ...] | None = None,
) -> dict[str, Any]:
    """Return the manifest's entry for a model: its name, and hashes of its configuration and weights.

    ``content`` is of the configuration, of adapters' settings and of every byte of the weights; ``fingerprint``, of up
    to 1024 values of each weight, is all that older stores have. Both are the same on every device. Of a model in
    shards, weights are gathered one at a time, by all ranks together; of a quantised one they are dequantised.

    Args:
        stamps: of the files that the model was loaded from, where it was not changed since: the hashes of an earlier
            run are taken.
    """
    params = parameters_of(model)
    storages = [tensor.held for tensor in params.values() if isinstance(tensor, Stored)]
    codes = (held.precision for held in storages if isinstance(held, (Quantised, ShardedQuantised)))
    dtype = next(codes, str(next(model.parameters()).dtype).removeprefix("torch."))
    hashes = _hashes(params, dtype, stamps)
    buffers = hash_tensors(_buffers(model))
    content = [own_class(model).__name__, settings_of(model), hashes.content, buffers.content]
    return {
        "id": name or getattr(getattr(model, "config", None), "name_or_path", "") or own_class(model).__name__,
        "revision": revision,
        "architecture": own_class(model).__name__,
        "dtype": dtype,
        "content": hashlib.sha256(_json(content).encode()).hexdigest(),
        "fingerprint": hashes.sampled,
    }


def parameters_identity(params: Mapping[str, Tensor], name: str) -> dict[str, Any]:
    """Return the manifest's entry for the parameters of a user's loss, name → tensor."""
    dtype = str(next(iter(params.values())).dtype).removeprefix("torch.")
    hashes = hash_tensors(params)
    entry = {"id": name, "revision": None, "architecture": OWN_LOSS, "dtype": dtype}
    return {**entry, "content": hashes.content, "fingerprint": hashes.sampled}


def change_marks(model: nn.Module) -> Any:
    """Return values that are others after a change of the model in memory, without reading all of its weights.

    An operation of torch is noticed by the tensor's count of changes; one past it (``.data``), where it touches a value
    that ``fingerprint`` samples.
    """
    counts = [(id(each), each._version) for each in (*model.parameters(), *model.buffers()) if not each.is_inference()]
    return counts, sample_tensors(parameters_of(model)), settings_of(model)


def settings_of(model: nn.Module) -> Any:
    """Return what a model's outputs depend on beside its class and weights, as JSON values.

    Example:
        >>> settings_of(nn.Sequential(nn.Linear(2, 3), nn.ReLU()))
        [['Sequential', {}], ['Linear', {'in_features': 2, 'out_features': 3}], ['ReLU', {'inplace': False}]]
    """
    config = getattr(model, "config", None)
    values: Any = config.to_dict() if isinstance(config, PretrainedConfig) else config
    if not isinstance(values, dict):  # the plain attributes of its modules, in place of a configuration
        return [[own_class(module).__name__, _plain_attributes(module)] for module in model.modules()]
    adapters = {
        str(name): _without(each.to_dict(), _VOLATILE_OF_ADAPTERS)
        for name, each in (getattr(model, "peft_config", None) or {}).items()
    }
    return {"config": _without(values, _VOLATILE), "adapters": adapters, "layers": _adapter_layers(model)}


def _hashes(params: Mapping[str, Tensor], dtype: str, stamps: tuple[FileStamp, ...] | None) -> Hashes:
    if stamps is None or sharing(params) is not None:  # the ranks of a group might not all have an entry
        return hash_tensors(params)
    key = identity_cache.key_of(stamps, params, dtype)
    found = identity_cache.known(key)
    if found is None:
        found = hash_tensors(params)
        identity_cache.keep(key, found)
    return found


def _buffers(model: nn.Module) -> dict[str, Tensor]:
    """Return the buffers that a checkpoint keeps: the others are made of the configuration."""
    return {
        f"{prefix}.{name}": tensor
        for prefix, module in model.named_modules()
        for name, tensor in module._buffers.items()
        if tensor is not None and name not in module._non_persistent_buffers_set
    }


def _plain_attributes(module: nn.Module) -> dict[str, Any]:
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in sorted(vars(module).items())
        if not name.startswith("_")
        and name != "training"
        and all(isinstance(each, _PLAIN) for each in (value if isinstance(value, tuple) else (value,)))
    }


def _adapter_layers(model: nn.Module) -> list[Any]:
    """List peft's layers with what is switched or scaled on them: name, active, disabled, merged, scales."""
    names = ("active_adapters", "disable_adapters", "merged_adapters", "scaling")
    return [
        [name, *(getattr(module, each, None) for each in names)]
        for name, module in model.named_modules()
        if getattr(module, "adapter_layer_names", ())
    ]


def _without(value: Any, volatile: frozenset[str]) -> Any:
    """Return JSON values without the volatile entries, at any depth."""
    if isinstance(value, Mapping):
        kept = {str(key): item for key, item in value.items()}
        return {k: _without(v, volatile) for k, v in kept.items() if k not in volatile and not k.startswith("_")}
    if isinstance(value, (set, frozenset)):
        return sorted(_json(_without(item, volatile)) for item in value)
    if isinstance(value, (list, tuple)):
        return [_without(item, volatile) for item in value]
    return value


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)
