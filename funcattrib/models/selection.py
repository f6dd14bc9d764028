"""Choosing the parameters to attribute: globs over names, and the default."""

import difflib
import fnmatch
from collections.abc import Iterable

from torch import nn

from funcattrib.errors import FuncattribError
from funcattrib.models.adapter import adapter_names


def choose(model: nn.Module, modules: Iterable[str] | None = None, exclude: Iterable[str] = ()) -> set[str]:
    """Select the parameters whose names match the globs; a tied parameter answers to each of its names."""
    include, exclude = [modules] if isinstance(modules, str) else modules, list(exclude)
    include = ["*"] if include is not None and list(include) == ["all"] else include
    aliases = [(name, tensor) for name, tensor in model.named_parameters(remove_duplicate=False)]
    first: dict[int, str] = {}
    for name, tensor in aliases:
        first.setdefault(id(tensor), name)
    for glob in [*(include or ()), *exclude]:
        if not any(fnmatch.fnmatchcase(name, glob) for name, _ in aliases):
            raise FuncattribError(no_match(glob, [name for name, _ in aliases]))
    default = set() if include is not None else _block_matrices(model)
    chosen: set[str] = set()
    for name, tensor in aliases:
        wanted = name in default if include is None else _matches(name, include)
        if wanted and not _matches(name, exclude):
            chosen.add(first[id(tensor)])
    if not chosen:
        what = "weight matrices in the model's blocks" if include is None else f"parameters matching {list(include)}"
        raise FuncattribError(
            f"there are no {what}{f' and not {exclude}' if exclude else ''}; "
            f"name some with `modules`, e.g. {aliases[0][0]!r}, or take `modules='all'`"
        )
    return chosen


def chosen_among(names: Iterable[str], modules: Iterable[str], exclude: Iterable[str]) -> list[str]:
    """Return the names that globs choose, ``all`` every one of them; without globs none.

    Example:
        >>> chosen_among(["lm_head.weight"], ["all"], []), chosen_among(["lm_head.weight"], [], [])
        (['lm_head.weight'], [])
    """
    include, exclude = ["*" if glob == "all" else glob for glob in modules], list(exclude)
    return [name for name in names if _matches(name, include) and not _matches(name, exclude)]


def _matches(name: str, globs: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, glob) for glob in globs)


def no_match(glob: str, names: list[str]) -> str:
    """Return the error of a glob that matches no parameter's name."""
    near = difflib.get_close_matches(glob.strip("*."), names, n=1, cutoff=0.3) or names[:1]
    return f"no parameter's name matches {glob!r}; did you mean {near[0]!r}?"


def _block_matrices(model: nn.Module) -> set[str]:
    """List matrices of linear layers and mixtures in repeated blocks (``nn.ModuleList``), or all where nothing repeats.

    Of a model with an adapter, the adapter's.
    """
    if adapter := adapter_names(model):
        return set(adapter)
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
    """List a mixture's stacks of experts (x, o, i), and its router's matrix, a parameter of no linear layer."""
    axes_of = {
        f"{child}.{name}": tensor.ndim
        for child, each in module.named_children()
        for name, tensor in each.named_parameters(recurse=False)
    }
    stacks = [name for name, axes in axes_of.items() if "experts" in name and axes == 3]
    routers = [name for name, axes in axes_of.items() if stacks and name.endswith(".weight") and axes == 2]
    return [f"{prefix}.{name}" if prefix else name for name in (*stacks, *routers)]


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or any(kind.__name__ == "Conv1D" for kind in type(module).__mro__)


def _shares_embedding(model: nn.Module, module: nn.Module) -> bool:
    return any(isinstance(m, nn.Embedding) and m.weight is module.weight for m in model.modules())
