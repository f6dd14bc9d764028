"""The base of a model (``model.base_model``), whose forward pass ends before the head, by the names of the whole model.

A store of the whole model's gradients can be searched with those of its base: their parameters are the same tensors,
and a name in the base is a name in the model without its prefix (``gpt_neox.``).
"""

from collections.abc import Mapping
from typing import Any

from torch import nn

from funcattrib.models.functional import parameters_of, sharing
from funcattrib.models.skeleton import own_class
from funcattrib.weights.content_hash import sample_tensors


def base_identity(model: nn.Module) -> dict[str, Any] | None:
    """Return what a manifest keeps of a model's base, to know it again; None where it has none, or is held in shards.

    Returns:
        ``prefix``, ``architecture``, ``fingerprint`` of its weights, and ``outside``: the names of all parameters that
        the model uses outside of its base too, a tied one by each of its names.

    Example:
        >>> from transformers import GPTNeoXConfig, GPTNeoXForCausalLM
        >>> config = GPTNeoXConfig(hidden_size=8, num_attention_heads=2, num_hidden_layers=1, intermediate_size=8)
        >>> entry = base_identity(GPTNeoXForCausalLM(config))
        >>> entry["prefix"], entry["architecture"], entry["outside"]
        ('gpt_neox', 'GPTNeoXModel', ['lm_head.weight'])
    """
    base = getattr(model, "base_model", None)
    if not isinstance(base, nn.Module) or base is model:
        return None
    prefix = next((name for name, module in model.named_modules() if module is base), "")
    params = parameters_of(base)
    if not prefix or not params or sharing(params) is not None:
        return None
    named = list(model.named_parameters(remove_duplicate=False))
    outside = {id(tensor) for name, tensor in named if not name.startswith(f"{prefix}.")}
    return {
        "prefix": prefix,
        "architecture": own_class(base).__name__,
        "fingerprint": sample_tensors(params),
        "outside": [name for name, tensor in named if id(tensor) in outside],
    }


def base_fingerprint(model: nn.Module, base: Mapping[str, Any] | None) -> str | None:
    """Return the fingerprint of a model that is of the class of a base; None of any other."""
    if base is None or own_class(model).__name__ != base["architecture"]:
        return None
    return sample_tensors(parameters_of(model))


def named_as_in(base: nn.Module, prefix: str) -> nn.Module:
    """Return a module whose parameters are those of ``base`` by the names that they have in the whole model.

    Example:
        >>> [name for name, _ in named_as_in(nn.Linear(2, 3, bias=False), "model").named_parameters()]
        ['model.weight']
    """
    whole = inner = nn.Module()
    *above, last = prefix.split(".")
    for name in above:
        inner.add_module(name, nn.Module())
        inner = inner.get_submodule(name)
    inner.add_module(last, base)
    return whole
