"""States as flat dictionaries of tensors, and back.

A state is a tree of dicts, tuples (NamedTuples among them) and ``None`` with tensors at its leaves.
Files hold the flat form; the structure comes from the chain's own ``init``, so nothing is unpickled.
"""

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from funcattrib.errors import ChainError

SEPARATOR = "/"


def leaves(tree: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of ``tree`` with its path, in a fixed order.

    Example:
        >>> import torch
        >>> [name for name, _ in leaves(({"w": torch.ones(1)}, None, torch.ones(2)))]
        ['0/w', '2']
    """
    if isinstance(tree, Tensor):
        yield SEPARATOR.join(path), tree
    for key, child in _children(tree):
        yield from leaves(child, (*path, key))


def flatten(tree: Any) -> dict[str, Tensor]:
    """Return ``leaves`` as a dictionary, ready for safetensors."""
    return dict(leaves(tree))


def map_tensors(function: Callable[[Tensor], Any], tree: Any) -> Any:
    """Apply ``function`` to every tensor of a tree."""
    return map_leaves(function, tree, Tensor)


def map_leaves(function: Callable[[Any], Any], tree: Any, kind: type) -> Any:
    """Apply ``function`` to every leaf of a kind; others stay as they are."""
    return _rebuild(tree, (), lambda _, leaf: function(leaf), kind)


def restore(template: Any, flat: dict[str, Tensor]) -> Any:
    """Replace the tensors of ``template`` by those of ``flat``.

    Raises:
        ChainError: a tensor is missing, unknown, or of another shape.
    """
    wanted = flatten(template)
    if missing := sorted(wanted.keys() - flat.keys()):
        raise ChainError(f"the state has no entry {missing[0]!r}; it was fitted for another chain")
    if unknown := sorted(flat.keys() - wanted.keys()):
        raise ChainError(
            f"the state has an entry {unknown[0]!r} that this chain does not have; it was fitted for another chain"
        )
    for name, tensor in wanted.items():
        if tensor.shape != flat[name].shape:
            raise ChainError(f"expected state {name!r} of shape {tuple(tensor.shape)}, found {tuple(flat[name].shape)}")
    return _rebuild(template, (), lambda name, tensor: flat[name].to(tensor.device))


def _children(tree: Any) -> list[tuple[str, Any]]:
    if isinstance(tree, dict):
        return [(str(key).replace(SEPARATOR, "|"), child) for key, child in tree.items()]
    if isinstance(tree, tuple):
        names = getattr(tree, "_fields", None) or [str(i) for i in range(len(tree))]
        return list(zip(names, tree, strict=True))
    return []


def _rebuild(tree: Any, path: tuple[str, ...], leaf: Callable[[str, Any], Any], kind: type = Tensor) -> Any:
    if isinstance(tree, kind):
        return leaf(SEPARATOR.join(path), tree)
    rebuilt = [_rebuild(child, (*path, key), leaf, kind) for key, child in _children(tree)]
    if isinstance(tree, dict):
        return dict(zip(tree.keys(), rebuilt, strict=True))
    if isinstance(tree, tuple):
        return type(tree)(*rebuilt) if hasattr(tree, "_fields") else tuple(rebuilt)
    return tree
