"""Errors of gradient computations, put into words."""

from collections.abc import Iterator
from contextlib import contextmanager

from funcattrib.chain.evaluation import is_random
from funcattrib.errors import FuncattribError
from funcattrib.runtime.memory import is_short


@contextmanager
def explained() -> Iterator[None]:
    """Turn torch's errors about memory and randomness into what to do about them.

    Raises:
        FuncattribError: memory was short, or the model draws random numbers.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
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
