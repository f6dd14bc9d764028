"""Layout of a transformers model's attention heads in its weights, read off its modules and configuration."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from funcattrib.errors import FuncattribError
from funcattrib.models.attention_config import AttentionConfig, Order

_APART = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("q_lin", "k_lin", "v_lin"), ("q", "k", "v"))
_FUSED: Mapping[str, Order] = {"query_key_value": "head qkv", "c_attn": "qkv head", "Wqkv": "qkv head"}
_IN_BLOCKS = "qkv_proj"
"""Query, key and value blocks with their own numbers of heads (Phi-3)."""
_OUTPUT = ("o_proj", "out_proj", "dense", "c_proj", "out_lin", "o", "Wo")
_SIZE = ("head_dim", "head_size", "attention_head_size", "key_value_proj_dim")


def attention_configs(model: nn.Module) -> dict[str, AttentionConfig]:
    """Return the layout of heads in every attention weight of ``model``, as ``split_heads`` takes it.

    Query, key and value (apart, with grouped queries or not, or fused) by rows, with their biases; the output
    projection by the columns that read a head. Where blocks of a fused weight have their own numbers of heads (Phi-3),
    the heads of query, key and value are counted one after the other.

    Returns:
        Glob over parameter names → configuration; one glob for all the layers where they are alike.

    Raises:
        FuncattribError: no attention module is recognised.

    Example:
        >>> from transformers import GPTNeoXConfig, GPTNeoXModel
        >>> config = GPTNeoXConfig(hidden_size=8, num_attention_heads=2, num_hidden_layers=3, intermediate_size=8)
        >>> attention_configs(GPTNeoXModel(config))["layers.*.attention.query_key_value.weight"]
        AttentionConfig(num_heads=2, head_size=4, head_dim=0, order='head qkv')
    """
    found: dict[str, AttentionConfig] = {}
    for name, module in model.named_modules():
        size = _head_size(module, model)
        if size:
            found |= dict(_of_attention(model, name, module, size))
    if not found:
        raise FuncattribError(
            f"{type(model).__name__} has no attention modules of a known kind\n"
            "give split_heads an AttentionConfig for each module instead"
        )
    return _by_glob(found)


def _of_attention(model: nn.Module, name: str, module: nn.Module, size: int) -> Iterator[tuple[str, AttentionConfig]]:
    """Yield the weights of one attention module; nothing where ``module`` is none."""
    children = dict(module.named_children())
    prefix = f"{name}." if name else ""
    apart = next((names for names in _APART if children.keys() >= set(names)), None)
    fused = next((child for child in (*_FUSED, _IN_BLOCKS) if child in children), None)
    if apart is None and fused is None:
        return
    output = next((f"{prefix}{child}" for child in _OUTPUT if child in children), None)
    if output is None and (beside := f"{name.rpartition('.')[0]}.output.dense") in dict(model.named_modules()):
        output = beside  # BERT: attention.self and attention.output
    first = children[apart[0]] if apart else None
    inputs = _features(model.get_submodule(output))[1] if output else _features(first)[0]
    heads = inputs // size
    if not heads or inputs % size:
        return
    if apart:
        # Queries may have more rows a head than keys: a gate beside each (Qwen3-Next).
        yield from _outputs(f"{prefix}{apart[0]}", first, heads, _features(first)[0] // heads)
        for child in apart[1:]:
            yield from _outputs(f"{prefix}{child}", children[child], _features(children[child])[0] // size, size)
    elif fused == _IN_BLOCKS:
        if hasattr(module, "num_key_value_heads"):
            yield from _outputs(f"{prefix}{fused}", children[fused], _features(children[fused])[0] // size, size)
    elif fused and (fused != "c_attn" or _is_conv1d(children[fused])):
        yield from _outputs(f"{prefix}{fused}", children[fused], heads, size, _FUSED[fused])
    if output:
        axis = 0 if _is_conv1d(model.get_submodule(output)) else 1
        yield f"{output}.weight", AttentionConfig(heads, size, axis)


def _outputs(
    name: str, layer: Any, heads: int, size: int, order: Order = "head"
) -> Iterator[tuple[str, AttentionConfig]]:
    """Yield weight and bias of a layer whose outputs are heads, where they fill them."""
    if heads * size * (1 if order == "head" else 3) != _features(layer)[0] or not heads:
        return
    yield f"{name}.weight", AttentionConfig(heads, size, 1 if _is_conv1d(layer) else 0, order)
    if layer.bias is not None:
        yield f"{name}.bias", AttentionConfig(heads, size, 0, order)


def _features(layer: Any) -> tuple[int, int]:
    """Return outputs and inputs of a layer with a weight matrix; zeros for anything else."""
    if _is_conv1d(layer):
        return layer.weight.shape[1], layer.weight.shape[0]
    return (layer.out_features, layer.in_features) if isinstance(layer, nn.Linear) else (0, 0)


def _is_conv1d(layer: Any) -> bool:
    return any(kind.__name__ == "Conv1D" for kind in type(layer).__mro__)


def _head_size(module: nn.Module, model: nn.Module) -> int | None:
    """Return the size of a head that the module states, else the configuration."""
    config = getattr(module, "config", getattr(model, "config", None))
    for source in (module, config):
        if size := next((size for key in _SIZE if isinstance(size := getattr(source, key, None), int)), None):
            return size
    heads, width = (getattr(config, key, None) for key in ("num_attention_heads", "hidden_size"))
    return width // heads if heads and width else None


def _by_glob(found: Mapping[str, AttentionConfig]) -> dict[str, AttentionConfig]:
    """Join layers that are alike under one glob, the most specific glob first."""
    globs: dict[str, dict[str, AttentionConfig]] = {}
    for name, config in found.items():
        globs.setdefault(re.sub(r"(?<=\.)\d+(?=\.)", "*", name), {})[name] = config
    short: dict[str, AttentionConfig] = {}
    for glob, names in globs.items():
        short |= {glob: next(iter(names.values()))} if len(set(names.values())) == 1 else names
    return dict(sorted(short.items(), key=lambda item: -item[0].count(".")))
