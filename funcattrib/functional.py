"""A module as a pure function of an explicit parameter dict.

``functionalize(model)`` gives a skeleton (the module tree, sharing the model's tensors, with a configuration of its
own) and the parameters in two dicts: those to attribute and the frozen rest. The model itself is left as it was.
"""

import copy
import difflib
import fnmatch
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from funcattrib.errors import FuncattribError
from funcattrib.kernels import register_attention, register_experts

Params = Mapping[str, Tensor]
Example = Mapping[str, Tensor]
Loss = Callable[[Params, Example], Tensor]
"""``loss(params, example) -> scalar``, for one example without a batch axis."""


def device_of(params: Params) -> torch.device:
    """Where the parameters are."""
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

    def call(self, params: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        """The module's forward with ``params`` in the place of its own."""
        return torch.func.functional_call(self.skeleton, {**self.frozen, **params}, args, kwargs, strict=True)


def functionalize(model: nn.Module, modules: Iterable[str] | None = None, exclude: Iterable[str] = ()) -> Functional:
    """Take ``model`` apart into skeleton, attributed and frozen parameters.

    Args:
        modules: globs over parameter names (``*.mlp.*``); ``"all"`` takes every parameter. By default the weight
            matrices of the model's blocks, experts and routers included: embeddings, head, norms and biases are left
            out.
        exclude: globs over parameter names to leave out.

    Raises:
        FuncattribError: a glob matches no parameter, or nothing is left.

    Example:
        >>> parts = functionalize(nn.Sequential(nn.Linear(2, 3)), modules=["*.weight"])
        >>> list(parts.params), list(parts.frozen)
        (['0.weight'], ['0.bias'])
        >>> parts.call(parts.params, torch.zeros(1, 2)).shape
        torch.Size([1, 3])
    """
    everything = {name: tensor.detach() for name, tensor in model.named_parameters()}
    chosen = choose(model, modules, exclude)
    params = {name: tensor for name, tensor in everything.items() if name in chosen}
    frozen = {name: tensor for name, tensor in everything.items() if name not in chosen}
    frozen |= dict(model.named_buffers())
    return Functional(_skeleton(model), params, frozen)


def choose(model: nn.Module, modules: Iterable[str] | None = None, exclude: Iterable[str] = ()) -> set[str]:
    """Names of the parameters that the globs select; a tied parameter answers to each of its names."""
    include, exclude = [modules] if isinstance(modules, str) else modules, list(exclude)
    include = ["*"] if include is not None and list(include) == ["all"] else include
    aliases = [(name, tensor) for name, tensor in model.named_parameters(remove_duplicate=False)]
    first: dict[int, str] = {}
    for name, tensor in aliases:
        first.setdefault(id(tensor), name)
    for glob in [*(include or ()), *exclude]:
        if not any(fnmatch.fnmatchcase(name, glob) for name, _ in aliases):
            raise FuncattribError(_no_match(glob, [name for name, _ in aliases]))
    default = set() if include is not None else _block_matrices(model)
    chosen: set[str] = set()
    for name, tensor in aliases:
        wanted = name in default if include is None else any(fnmatch.fnmatchcase(name, glob) for glob in include)
        if wanted and not any(fnmatch.fnmatchcase(name, glob) for glob in exclude):
            chosen.add(first[id(tensor)])
    if not chosen:
        what = "weight matrices in the model's blocks" if include is None else f"parameters matching {list(include)}"
        raise FuncattribError(
            f"expected {what}{f' and not {exclude}' if exclude else ''}, found none; "
            f"name some with --modules, e.g. {aliases[0][0]!r}, or take --modules all"
        )
    return chosen


def _no_match(glob: str, names: list[str]) -> str:
    near = difflib.get_close_matches(glob.strip("*."), names, n=1, cutoff=0.3) or names[:1]
    return f"expected a parameter whose name matches {glob!r}, found none; did you mean {near[0]!r}?"


def _block_matrices(model: nn.Module) -> set[str]:
    """Matrices of linear layers and mixtures in repeated blocks (``nn.ModuleList``), or all where nothing repeats."""
    blocks = [f"{name}." for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    head = getattr(model, "get_output_embeddings", lambda: None)()
    matrices = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if _is_linear(module) and module is not head and not _shares_embedding(model, module)
    }
    matrices |= {name for prefix, module in model.named_modules() for name in _mixture(prefix, module)}
    inside = {name for name in matrices if any(name.startswith(block) for block in blocks)}
    return inside or matrices


def _mixture(prefix: str, module: nn.Module) -> list[str]:
    """A mixture's stacks of experts (x, o, i), and its router's matrix, a parameter of no linear layer."""
    own = {
        f"{child}.{name}": tensor.ndim
        for child, each in module.named_children()
        for name, tensor in each.named_parameters(recurse=False)
    }
    stacks = [name for name, axes in own.items() if "experts" in name and axes == 3]
    routers = [name for name, axes in own.items() if stacks and name.endswith(".weight") and axes == 2]
    return [f"{prefix}.{name}" if prefix else name for name in (*stacks, *routers)]


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _shares_embedding(model: nn.Module, module: nn.Module) -> bool:
    return any(isinstance(m, nn.Embedding) and m.weight is module.weight for m in model.modules())


def _skeleton(model: nn.Module) -> nn.Module:
    """A copy of the module tree and its configurations that shares every tensor."""
    shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
    skeleton = copy.deepcopy(model, shared).eval()
    for module in skeleton.modules():
        if hasattr(module, "gradient_checkpointing"):
            vars(module)["gradient_checkpointing"] = False
        if isinstance(module, PreTrainedModel):
            _prepare(module)
    return skeleton


def _prepare(model: PreTrainedModel) -> None:
    """Settings under which a transformers model is a function that vmap can trace."""
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False
    # With a pad token and no mask it warns by looking at the tokens' values; its embedding keeps its own padding_idx.
    if getattr(model.config, "pad_token_id", None) is not None:
        model.config.pad_token_id = None
    if model._can_set_attn_implementation():
        model.set_attn_implementation(register_attention())
    if model._can_set_experts_implementation():
        model.set_experts_implementation(register_experts())
