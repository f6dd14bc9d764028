"""The device of a process."""

import torch

from funcattrib.errors import FuncattribError
from funcattrib.runtime.hub import why
from funcattrib.runtime.launcher import launched, local_rank


def pick_device(device: str) -> torch.device:
    """Return the device; ``auto`` is a GPU where there is one, and each process of a machine has its own.

    Raises:
        FuncattribError: a device that torch does not know or that is not there.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and launched():
        device = f"cuda:{local_rank() % max(1, torch.cuda.device_count())}"
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise FuncattribError(f"expected a device such as cpu or cuda, found {device!r}") from error
    try:
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise FuncattribError(
            f"device {device!r} is not available on this machine: {why(error)}; use `device='cpu'`"
        ) from error
    return chosen
