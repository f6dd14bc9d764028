"""A module as a pure function of an explicit parameter dict.

``functionalize(model)`` gives a skeleton (the module tree, sharing the model's tensors, with a configuration of its
own) and the parameters in two dicts: those to attribute and the frozen rest. The model itself stays as it was.

What a model that went through ``fully_shard`` has of its parameters is this rank's rows, and one loaded by bitsandbytes
has codes: these are in the dicts as ``lift.weights.Stored``, made dense where they are used.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from funcattrib.errors import FuncattribError
from funcattrib.models.implementations import choose_implementations
from funcattrib.models.selection import choose
from funcattrib.models.skeleton import is_quantised, own_class, skeleton_of
from funcattrib.types import Params
from funcattrib.weights.quantised import quantised
from funcattrib.weights.sharded import Gathers, Sharded, from_dtensor
from funcattrib.weights.sharded_quantised import ShardedQuantised
from funcattrib.weights.stored import Stored


def device_of(params: Params) -> torch.device:
    """Return the device of the parameters."""
    return next(iter(params.values())).device


class Functional(NamedTuple):
    """A module taken apart.

    Attributes:
        skeleton: the module tree; in ``eval`` mode, without cache or gradient checkpointing.
        params: the parameters to attribute, detached, in the model's order.
        frozen: all the others and the buffers, detached.
    """

    skeleton: nn.Module
    params: dict[str, Tensor]
    frozen: dict[str, Tensor]

    def __repr__(self) -> str:
        counts = [f"{len(each):,} {what}" for each, what in ((self.params, "attributed"), (self.frozen, "frozen"))]
        return f"Functional({own_class(self.skeleton).__name__}: {counts[0]} parameters, {counts[1]} tensors)"

    def call(self, params: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        """Call the module's forward with ``params`` in the place of the module's."""
        return torch.func.functional_call(self.skeleton, {**self.frozen, **params}, args, kwargs, strict=True)


def functionalize(model: nn.Module, modules: Iterable[str] | None = None, exclude: Iterable[str] = ()) -> Functional:
    """Take ``model`` apart into skeleton, attributed and frozen parameters.

    Args:
        modules: globs over parameter names (``*.mlp.*``); ``"all"`` takes every parameter. By default the weight
            matrices of the model's blocks, experts and routers included: embeddings, head, norms and biases are left
            out. Of a model with an adapter (peft), the adapter's matrices.
        exclude: globs over parameter names to leave out.

    Raises:
        FuncattribError: a glob matches no parameter, or none remains; a model sharded in a way that is not known.

    Example:
        >>> parts = functionalize(nn.Sequential(nn.Linear(2, 3)), modules=["*.weight"])
        >>> list(parts.params), list(parts.frozen)
        (['0.weight'], ['0.bias'])
        >>> parts.call(parts.params, torch.zeros(1, 2)).shape
        torch.Size([1, 3])
    """
    everything = parameters_of(model)
    chosen = choose(model, modules, exclude)
    params = {name: tensor for name, tensor in everything.items() if name in chosen}
    frozen = {name: tensor for name, tensor in everything.items() if name not in chosen}
    frozen |= dict(model.named_buffers())
    skeleton = skeleton_of(model)
    choose_implementations(skeleton, {**params, **frozen})
    return Functional(skeleton, params, frozen)


def parameters_of(model: nn.Module) -> dict[str, Tensor]:
    """Return every parameter once, detached, in the model's order; stored where only shards or quantised values of it
    are here.

    Raises:
        FuncattribError: a parameter that is sharded otherwise than ``fully_shard`` does by default.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # what a forward pass has gathered would be freed under our hands
    codes = {id(module.weight): module for module in model.modules() if is_quantised(module)}
    named = list(model.named_parameters())
    plain = next((tensor.dtype for _, tensor in named if tensor.is_floating_point()), torch.float32)

    def stored(name: str, tensor: Tensor) -> Tensor:
        if isinstance(tensor, DTensor):
            return Stored(from_dtensor(name, tensor))
        if id(tensor) in codes:
            return Stored(quantised(codes[id(tensor)], plain))
        return tensor.detach()

    return {name: stored(name, tensor) for name, tensor in named}


def sharing(*params: Params) -> Gathers | None:
    """Return the gathers of the group of ranks that hold these parameters together; None where each has them all.

    Raises:
        FuncattribError: some are held by another group than others.
    """
    storages = (tensor.held for each in params for tensor in each.values() if isinstance(tensor, Stored))
    found = {held.gathers for held in storages if isinstance(held, (Sharded, ShardedQuantised))}
    if len(found) > 1:
        raise FuncattribError(
            f"expected all parameters sharded over one group of processes, found {len(found)} groups\nshard every part "
            "of the model, and a reference model too, over the same mesh"
        )
    return next(iter(found), None)


def a_shard(params: Params) -> Sharded | None:
    """Return the first parameter in shards, which shows for all of them who holds them and where; None where there is
    none.
    """
    storages = (tensor.held for tensor in params.values() if isinstance(tensor, Stored))
    return next((held for held in storages if isinstance(held, Sharded)), None)
