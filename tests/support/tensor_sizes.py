"""The sizes of the tensors that operations return, as they return them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


@contextmanager
def tensor_sizes() -> Iterator[list[int]]:
    """Collect the numbers in each operation's result inside the block."""
    made: list[int] = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            made.append(out.numel() if isinstance(out, Tensor) else 0)
            return out

    with Sizes():
        yield made
