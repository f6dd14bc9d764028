"""Second moments read from a saved optimizer.

torch.optim.Adam, AdamW, others with ``exp_avg_sq``    v / (1 − β₂^step)
bitsandbytes' Adam, 8 bits                            qmap₂[state₂] · absmax₂ of each block, likewise
transformers' and torch's Adafactor                   r and c as they are: their decay has no bias
"""

import math
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from funcattrib.checkpoints.parameter_order import match_parameters, parameters_in_order
from funcattrib.errors import FuncattribError
from funcattrib.transforms.moments import Moment

_WRAPPED = "__bnb_optimizer_quant_state__"
_INSIDE = ("optimizer", "optimizer_state_dict", "optim")
"""Keys under which training scripts put the optimizer in a checkpoint of several things."""
_TENSORS = {
    **dict.fromkeys(("exp_avg", "exp_avg_sq", "variance", "state1", "state2"), 0),
    **dict.fromkeys(("absmax1", "absmax2", "qmap1", "qmap2", "exp_avg_sq_row", "exp_avg_sq_col"), 1),
    **dict.fromkeys(("row_var", "col_var"), 2),
}
"""Entries of a parameter's state that are tensors, and the axes that each has at least."""


def optimizer_state(path: str | Path, model: nn.Module | Mapping[str, Tensor]) -> dict[str, Moment]:
    """Read second moments of every parameter that a saved optimizer has trained, as the normalisations take them.

    Args:
        path: a file with an optimizer's ``state_dict()``, or a checkpoint folder of transformers' Trainer. It is read
            without unpickling code.
        model: the model that was trained; or all of its parameters, in its order.

    Returns:
        Parameter name → v, shaped like the parameter, or Adafactor's (r, c); float32, bias-corrected. Parameters
        without a state (never stepped) are left out.

    Raises:
        FuncattribError: no such file, not an optimizer's state, no second moments in it, or a state that does not fit
            the model (the first such parameter is named).

    Example:
        >>> import tempfile
        >>> model = nn.Linear(2, 1)
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> model(torch.ones(2)).sum().backward(); optimizer.step()
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save(optimizer.state_dict(), f"{folder}/optimizer.pt")
        ...     moments = optimizer_state(folder, model)
        >>> moments["weight"].round(decimals=3)
        tensor([[1., 1.]])

    References: Adam, arXiv 1412.6980; Adafactor, arXiv 1804.04235; 8-bit optimizers, arXiv 2110.02861.
    """
    moments: dict[str, Moment] = {}
    for name, saved in saved_states(path, model).items():
        where = f"{name} in {path}"
        moments[name] = moment = moment_of(*saved, where)
        for part in (moment,) if isinstance(moment, Tensor) else moment:
            check_moment(part, where, squares=True)
    if not moments:
        raise FuncattribError(f"the optimizer in {path} has made no step and has no moments; give a later checkpoint")
    return moments


def saved_states(
    path: str | Path, model: nn.Module | Mapping[str, Tensor]
) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """Read parameter name → its state and the settings of its group, in the model's order; arguments as above."""
    saved = _read(Path(path).expanduser())
    groups = saved["param_groups"]
    check_state_dict(saved, path)
    numbered = {number: group for group in groups for number in group["params"]}
    states = {number: _unwrapped(state) for number, state in saved["state"].items()}
    names = match_parameters(path, model, groups, {number: _shape_of(state) for number, state in states.items()})
    found = {
        name: (states[number], group)
        for (number, group), name in zip(numbered.items(), names, strict=True)
        if number in states
    }
    order = {name: place for place, name in enumerate(parameters_in_order(model))}
    return dict(sorted(found.items(), key=lambda item: order[item[0]]))


def _read(path: Path) -> dict[str, Any]:
    """Read an optimizer's state dict, from its file or the folder that holds it."""
    file = path / "optimizer.pt" if os.path.isdir(path) else path
    if not os.path.isfile(file):
        inside = sorted(each.name for each in path.glob("checkpoint-*")) if os.path.isdir(path) else []
        hint = f"give one of its checkpoints, e.g. {path / inside[-1]}" if inside else "give an optimizer's state_dict"
        raise FuncattribError(f"the optimizer's state {file} does not exist; {hint}")
    try:
        # Mapped, so that of a large file only what is asked for is read.
        saved = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception as error:  # whatever a file written by others makes its reader raise
        raise FuncattribError(
            f"{file} cannot be read as an optimizer's state_dict ({type(error).__name__}); only tensors and numbers "
            "are unpickled: save optimizer.state_dict() alone"
        ) from error
    candidates = [saved, *(saved[key] for key in _INSIDE if key in saved)] if isinstance(saved, dict) else []
    for found in candidates:
        if isinstance(found, dict) and {"state", "param_groups"} <= found.keys():
            return found
    keys = f"keys {', '.join(map(str, list(saved)[:5]))}" if isinstance(saved, dict) else f"a {type(saved).__name__}"
    raise FuncattribError(f"expected an optimizer's state_dict (state and param_groups) in {file}, found {keys}")


def _unwrapped(state: Mapping[str, Any]) -> dict[str, Any]:
    """Unwrap quantised tensors, which bitsandbytes hides from FSDP in a dictionary."""
    return {**state, **state.get(_WRAPPED, {})}


def moment_of(state: Mapping[str, Any], group: Mapping[str, Any], where: str) -> Moment:
    """Return one parameter's second moment, from its state and the settings of its group; ``where`` is for errors."""
    if "exp_avg_sq_row" in state:
        return _copied(state["exp_avg_sq_row"]), _copied(state["exp_avg_sq_col"])
    if "row_var" in state:
        return _copied(state["row_var"][..., 0]), _copied(state["col_var"][..., 0, :])
    if "variance" in state or ("exp_avg_sq" in state and "betas" not in group):  # Adafactor's of a vector
        return _copied(state["variance"] if "variance" in state else state["exp_avg_sq"])
    if "state2" in state:
        v = dequantised(state, 2, where)
    elif "exp_avg_sq" in state:
        v = state["exp_avg_sq"].float()
    else:
        raise FuncattribError(
            f"expected second moments of {where}, found {', '.join(map(str, state)) or 'nothing'}\n"
            "supported are Adam, AdamW, bitsandbytes' 8-bit Adam, and Adafactor"
        )
    return v / (1 - group["betas"][1] ** float(state["step"]))


def _copied(moment: Tensor) -> Tensor:
    """Copy to float32, out of the file's memory."""
    return moment.to(torch.float32, copy=True)


def dequantised(state: Mapping[str, Any], which: int, where: str) -> Tensor:
    """Dequantise bitsandbytes' first or second moment: values of a map of 256, scaled block by block over the flattened
    tensor.
    """
    codes, absmax_name, map_name = state[f"state{which}"], f"absmax{which}", f"qmap{which}"
    if codes.is_floating_point():  # small parameters are kept in 32 bits
        return codes.float()
    if absmax_name not in state or map_name not in state:
        raise FuncattribError(
            f"expected a blockwise state ({absmax_name} and {map_name}) of {where}, found {', '.join(state)}"
        )
    if codes.dtype != torch.uint8 or state[map_name].shape != (256,) or not state[absmax_name].numel():
        raise FuncattribError(f"the 8-bit state of {where} is damaged: it is no map of 256 values with scales")
    absmax, values = state[absmax_name].float(), state[map_name].float()[codes.flatten().long()]
    size = 1 << max(0, -(-codes.numel() // absmax.numel()) - 1).bit_length()  # a power of two, whatever the version
    if -(-codes.numel() // size) != absmax.numel():
        raise FuncattribError(
            f"the 8-bit state of {where} is damaged: {absmax.numel()} scales do not fit blocks of {size} values"
        )
    return (values * absmax.repeat_interleave(size)[: codes.numel()]).reshape(codes.shape)


def check_state_dict(saved: Mapping[str, Any], path: str | Path) -> None:
    """Check that an optimizer's state dict has numbers and tensors where it must.

    Raises:
        FuncattribError: naming the first entry that is something else.
    """
    groups, states = saved["param_groups"], saved["state"]
    wrong = f"the optimizer's state in {path} is damaged: "
    fits = isinstance(groups, list) and all(isinstance(g, dict) and isinstance(g.get("params"), list) for g in groups)
    if not fits or not isinstance(states, dict) or not all(isinstance(state, dict) for state in states.values()):
        raise FuncattribError(f"{wrong}its groups or states are not what torch.optim saves")
    for group in groups:
        betas, eps = group.get("betas", (0.9, 0.999)), group.get("eps", 0.0)
        numbers = [*betas] if isinstance(betas, list | tuple) else [math.nan]
        numbers += [] if isinstance(eps, list | tuple) else [eps]  # of Adafactor two, unused here
        if any(_number(n) is None or n < 0 for n in numbers) or any(beta >= 1 for beta in numbers[: len(betas)]):
            raise FuncattribError(f"{wrong}its betas are {betas}, and its eps {eps}")
    for number, state in states.items():
        for key, value in _unwrapped(state).items():
            if key in _TENSORS and not isinstance(value, Tensor):
                raise FuncattribError(f"{wrong}{key} of parameter {number} is a {type(value).__name__}, no tensor")
            if key in _TENSORS and value.ndim < _TENSORS[key]:
                raise FuncattribError(f"{wrong}{key} of parameter {number} has {value.ndim} axes")
            if key == "step" and not (_number(value) or 0) > 0:
                raise FuncattribError(f"{wrong}the step of parameter {number} is {value}")


def check_moment(moment: Tensor, where: str, *, squares: bool = False) -> None:
    """Refuse a moment that is not finite, or a mean of ``squares`` below zero.

    Raises:
        FuncattribError: naming the parameter.
    """
    low, high = torch.aminmax(moment) if moment.numel() else (torch.zeros(()), torch.zeros(()))
    if not bool(low.isfinite() & high.isfinite()):
        raise FuncattribError(f"the optimizer's state of {where} is NaN or infinite; give an earlier checkpoint")
    if squares and low < 0:
        raise FuncattribError(f"the optimizer's state of {where} is damaged: a second moment is below zero")


def _number(value: Any) -> float | None:
    """Return a finite number, also out of a tensor of one; None where it is something else."""
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex():
        value = value.item()
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _shape_of(state: Mapping[str, Any]) -> tuple[int, ...] | None:
    """Return the shape of the parameter that a state belongs to, as far as it shows."""
    if "exp_avg_sq_row" in state:
        return (*state["exp_avg_sq_row"].shape, state["exp_avg_sq_col"].shape[-1])
    if "row_var" in state:
        return (*state["row_var"].shape[:-1], state["col_var"].shape[-1])
    found = next((state[key] for key in ("exp_avg_sq", "state2", "variance") if key in state), None)
    return None if found is None else tuple(found.shape)
