"""What computing gradients may fail at, put into words."""

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
                "expected a loss without branches on values (if, while, float(), .item()), found one; choose between "
                "tensors with torch.where"
            ) from error
        if is_random(error):
            raise FuncattribError(
                "expected a model that is deterministic in eval mode, found one that draws random numbers (dropout, "
                "noise)\nmake the same input give the same output; `funcattrib check` tries it"
            ) from error
        if is_short(error):
            raise FuncattribError(
                f"expected memory for a batch, found too little: {''.join(str(error).splitlines()[:1])[:120]}\n"
                "use a smaller --token-batch-size, or --projection-dim; what is finished is kept"
            ) from error
        raise


def is_random(error: Exception) -> bool:
    """Whether this is vmap's refusal of a random operation."""
    return "randomness" in str(error)
