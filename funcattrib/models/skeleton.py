"""A copy of a module tree that shares every tensor, for ``functional_call`` to run with other parameters in place.

FSDP2 and bitsandbytes are taken off the copy: layers that ``fully_shard`` has changed are their own class again,
without its hooks; quantised layers are plain linear ones. The tree that is copied stays as it is.
"""

import copy
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from funcattrib.weights.quantised import CLASSES

_HOOKS = [name for name in vars(nn.Module()) if "hooks" in name]


def skeleton_of(model: nn.Module) -> nn.Module:
    """Return the copy, in ``eval`` mode, with copied configurations."""
    memo: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    for module in model.modules():
        _bare(module, memo)
    skeleton = copy.deepcopy(model, memo).eval()
    for module in skeleton.modules():
        if hasattr(module, "gradient_checkpointing"):
            vars(module)["gradient_checkpointing"] = False
        if isinstance(module, PreTrainedModel):
            _prepare(module)
    return skeleton


def own_class(module: nn.Module) -> type[nn.Module]:
    """Return the class that a module had before ``fully_shard`` changed it."""
    return type(module).__mro__[module._orig_cls_mro_index] if isinstance(module, FSDPModule) else type(module)


def is_quantised(module: nn.Module) -> bool:
    """Return whether this is one of bitsandbytes' linear layers, its weight quantised."""
    return type(module._parameters.get("weight")).__name__ in CLASSES


def _bare(module: nn.Module, memo: dict[int, Any]) -> None:
    """Put the copy of a layer that cannot be copied as it is into ``memo``."""
    if id(module) in memo or not (isinstance(module, FSDPModule) or is_quantised(module)):
        return
    for inner in module.modules():
        if inner is not module:
            _bare(inner, memo)
    if is_quantised(module):
        memo[id(module)] = _plain_linear(module)
        return
    plain_class = own_class(module)
    bare = plain_class.__new__(plain_class)
    memo[id(module)] = bare
    kept = {name: value for name, value in vars(module).items() if not _holds_state(value)}
    vars(bare).update({name: _without_fsdp(value) if name in _HOOKS else value for name, value in kept.items()})
    vars(bare).update(copy.deepcopy(vars(bare), memo))


def _plain_linear(module: Any) -> nn.Linear:
    plain = nn.Linear.__new__(nn.Linear)
    nn.Module.__init__(plain)
    plain.in_features, plain.out_features = module.in_features, module.out_features
    plain._parameters = {"weight": module.weight, "bias": module.bias}
    return plain


def _holds_state(value: Any) -> bool:
    """Return whether this is state that torch.distributed keeps on a module: dictionaries of that package's objects."""
    return (
        isinstance(value, dict)
        and bool(value)
        and all(_is_distributed(each) and not isinstance(each, Tensor) for each in value.values())
    )


def _without_fsdp(hooks: Any) -> Any:
    """Return the hooks that are not FSDP's."""
    return type(hooks)((key, hook) for key, hook in hooks.items() if not _is_fsdp(hook))


def _is_fsdp(hook: Any) -> bool:
    while hook is not None:
        if _is_distributed(getattr(hook, "__self__", None)):
            return True
        hook = getattr(hook, "__wrapped__", None)
    return False


def _is_distributed(value: object) -> bool:
    return type(value).__module__.startswith("torch.distributed.")


def _no_warning(*_: Any, **__: Any) -> None:
    pass


def _prepare(model: PreTrainedModel) -> None:
    """Apply the settings under which a transformers model is a function that vmap can trace."""
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False
    # It looks at the tokens' values, which vmap forbids, to warn of padding without a mask.
    vars(model)["warn_if_padding_and_no_attention_mask"] = _no_warning
