"""Adam's two moments, read from a saved optimizer: its next step depends on both.

torch.optim.Adam and AdamW keep m and v as they are; bitsandbytes' Adam keeps them in 8 bits, dequantised here. Of a
parameter in shards each rank keeps its own rows of them, which are gathered like the weight's.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from funcattrib.checkpoints.optimizer_state import check_moment, dequantised, saved_states
from funcattrib.errors import FuncattribError
from funcattrib.models.functional import a_shard, parameters_of
from funcattrib.transforms.adam_update import AdamState
from funcattrib.weights.sharded import Sharded, divided
from funcattrib.weights.stored import Stored


def adam_state(path: str | Path, model: nn.Module | Mapping[str, Tensor]) -> dict[str, AdamState]:
    """Read Adam's state of every parameter that it has trained.

    Args:
        path, model: as in ``optimizer_state``.

    Returns:
        Parameter name → first and second moment as saved (float32, no bias correction), steps made, betas and ε. Of a
        parameter in shards they are ``Stored`` in the same shards.

    Raises:
        FuncattribError: no such file, not Adam's state, or one that does not fit the model.

    Reference: Adam, arXiv 1412.6980.

    Example:
        >>> import tempfile, torch
        >>> model = nn.Linear(2, 1, bias=False)
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> model(torch.ones(1, 2)).sum().backward()
        >>> optimizer.step()
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save(optimizer.state_dict(), f"{folder}/optimizer.pt")
        ...     adam_state(folder, model)["weight"].step
        1.0
    """
    found = {}
    params = parameters_of(model) if isinstance(model, nn.Module) else model
    like = a_shard(params)
    for name, (state, group) in saved_states(path, model).items():
        where = f"{name} in {path}"
        if "exp_avg" in state and "exp_avg_sq" in state and "betas" in group:
            first, second = state["exp_avg"], state["exp_avg_sq"]
        elif "state1" in state and "state2" in state:
            first, second = dequantised(state, 1, where), dequantised(state, 2, where)
        else:
            raise FuncattribError(
                f"expected Adam's first and second moments of {where}, found "
                f"{', '.join(map(str, state)) or 'nothing'}; give the state of an Adam or AdamW optimizer"
            )
        if "betas" not in group or "eps" not in group or "step" not in state or first.shape != second.shape:
            raise FuncattribError(f"the optimizer's state of {where} is damaged: it is not Adam's")
        check_moment(first, where)
        check_moment(second, where, squares=True)
        beta1, beta2 = group["betas"][:2]
        shared = like if isinstance(params[name], Stored) else None
        first, second = _kept(first, shared), _kept(second, shared)
        found[name] = AdamState(first, second, float(state["step"]), (float(beta1), float(beta2)), float(group["eps"]))
    if not found:
        raise FuncattribError(f"the optimizer in {path} has made no step and has no moments; give a later checkpoint")
    return found


def _kept(moment: Tensor, like: Sharded | None) -> Tensor:
    """Copy in float32, this rank's rows alone where the parameter is in shards; the file is then unused."""
    return moment.to(torch.float32, copy=True) if like is None else Stored(divided(moment, like, torch.float32))
