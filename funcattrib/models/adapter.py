"""PEFT adapters: the base that an adapter's folder names, and the model with the adapter on it.

peft is imported only for an adapter.
"""

import importlib.util
import json
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn
from transformers.utils.peft_utils import find_adapter_config_file

from funcattrib.errors import FuncattribError


class Base(NamedTuple):
    """The model that an adapter changes."""

    name: str
    revision: str | None


def base_of(source: Path | str, revision: str | None) -> Base | None:
    """Find the base of the adapter at a folder or hub id; None where that is no adapter.

    Raises:
        FuncattribError: an adapter that names no base.
    """
    file = find_adapter_config_file(str(source), revision=revision)
    if file is None:
        return None
    try:
        config = json.loads(Path(file).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise FuncattribError(f"{source}/adapter_config.json is damaged: {error}; save the adapter again") from error
    name = config.get("base_model_name_or_path") if isinstance(config, dict) else None
    if not isinstance(name, str) or not name:
        raise FuncattribError(
            f"{source}/adapter_config.json does not name its base model\nwrite it there as base_model_name_or_path"
        )
    return Base(name, config.get("revision"))


def adapter_on(base: nn.Module, source: Path | str, revision: str | None) -> nn.Module:
    """Return ``base`` with the adapter of a folder or hub id on it; what it trains requires grad, as in training.

    Raises:
        FuncattribError: peft is not installed; an adapter of prompts, or one that is not kept as safetensors.
    """
    if importlib.util.find_spec("peft") is None:
        raise FuncattribError(f"the adapter {source} requires peft, which is not installed\npip install peft")
    import peft

    options: dict[str, Any] = {} if revision is None else {"revision": revision}
    config = peft.PeftConfig.from_pretrained(str(source), **options)
    if config.is_prompt_learning:
        raise FuncattribError(
            f"expected an adapter of weights (LoRA and its like) at {source}, found {config.peft_type.value}\n"
            "attribute the base model, or an adapter of another kind"
        )
    if isinstance(source, Path) and not (source / "adapter_model.safetensors").exists():
        raise FuncattribError(
            f"{source} has no adapter_model.safetensors\nsave the adapter with safe_serialization=True"
        )
    # as trainable: which parameters an optimizer's state belongs to is known by them
    return peft.PeftModel.from_pretrained(base, str(source), config=config, is_trainable=True, **options).eval()


def adapter_names(model: nn.Module) -> list[str]:
    """List the parameters that peft's layers hold for their adapters; none where the model has no adapter.

    Matrices alone where there are any: vectors of magnitudes are not listed, as biases are not elsewhere.
    """
    found: dict[str, int] = {}
    for prefix, module in model.named_modules():
        for child in getattr(module, "adapter_layer_names", ()):
            held = getattr(module, child, None)
            if isinstance(held, nn.Module):
                path = f"{prefix}.{child}" if prefix else child
                found |= {f"{path}.{name}": tensor.ndim for name, tensor in held.named_parameters()}
    matrices = [name for name, axes in found.items() if axes > 1]
    return matrices or list(found)
