"""Arrays handed over between JAX and torch: the same memory where both see the device, a copy where torch does not."""

import jax
import jax.dlpack
import jax.numpy as jnp
import numpy as np
import torch
from torch import Tensor


def to_torch(array: jax.Array) -> Tensor:
    """Convert the array to a tensor: by DLPack, no copy, on the CPU and on GPUs that torch sees; copied to the CPU
    otherwise.

    The tensor must not be written to: JAX takes its arrays for constant.

    Example:
        >>> array = jnp.ones((2, 3), jnp.bfloat16)
        >>> tensor = to_torch(array)
        >>> tensor.dtype, tensor.data_ptr() == array.unsafe_buffer_pointer()
        (torch.bfloat16, True)
    """
    platform = next(iter(array.devices())).platform
    if platform == "cpu":  # there is no stream that could wait for the computation
        return torch.from_dlpack(array.block_until_ready())
    if platform in ("gpu", "cuda", "rocm") and torch.cuda.is_available():
        return torch.from_dlpack(array)
    return torch.from_dlpack(jax.device_put(array, jax.devices("cpu")[0]).block_until_ready())


def to_jax(tensor: Tensor, device: jax.Device | None = None) -> jax.Array:
    """Convert the tensor to an array: by DLPack, no copy where it is contiguous, aligned to 64 bytes, and on
    ``device``.

    Without ``jax_enable_x64``, int64 becomes int32 and float64 float32, as everywhere in JAX.

    Args:
        device: by default the tensor's own.

    Example:
        >>> to_jax(torch.arange(3)).dtype
        dtype('int32')
    """
    array = jax.dlpack.from_dlpack(tensor.detach().contiguous())
    return array if device is None or array.devices() == {device} else jax.device_put(array, device)


def to_numpy(tensor: Tensor) -> np.ndarray:
    """Convert the tensor's values for a callback of JAX, whose arrays cannot be made inside one; bfloat16 as JAX has
    it.
    """
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(jnp.bfloat16)
    return tensor.numpy()
