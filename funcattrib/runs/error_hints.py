"""Errors of gradient computations, put into words."""

from collections.abc import Iterator
from contextlib import contextmanager

from funcattrib.errors import FuncattribError
from funcattrib.runtime.memory import is_short


@contextmanager
def explained() -> Iterator[None]:
    """Turn torch's errors about memory and randomness into what to do about them.

    Raises:
        FuncattribError: memory was short, the model draws random numbers, or a loss branches on values.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if "data-dependent control flow" in str(error):
            raise FuncattribError(
                "the loss branches on values (if, while, float(), .item()), which vmap cannot batch; choose between "
                "tensors with torch.where"
            ) from error
        if is_random(error):
            raise FuncattribError(
                "the model draws random numbers in eval mode (dropout, noise), so its gradients are not deterministic\n"
                "switch the randomness off; `funcattrib check` tests it"
            ) from error
        if is_short(error):
            raise FuncattribError(
                f"a batch does not fit in memory: {''.join(str(error).splitlines()[:1])[:120]}\n"
                "use a smaller `token_batch_size` or `projection_dim`; finished work is kept"
            ) from error
        raise


def is_random(error: Exception) -> bool:
    """Return whether this is vmap's refusal of a random operation."""
    return "randomness" in str(error)
