"""Second moments read from a saved optimizer.

    torch.optim.Adam, AdamW, others with ``exp_avg_sq``    v / (1 − β₂^step)
    bitsandbytes' Adam, 8 bits                            qmap₂[state₂] · absmax₂ of each block, likewise
    transformers' and torch's Adafactor                   r and c as they are: their decay has no bias

A state is numbered in the order in which the optimizer was given the parameters, over its groups: the names that it
recorded, the Trainer's order (weights that decay, then the rest), matrices before vectors, or the model's own. An order
counts where the groups have its sizes and every shape fits.
"""

import os
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from funcattrib.errors import FuncattribError
from funcattrib.transforms.moments import Moment

_WRAPPED = "__bnb_optimizer_quant_state__"
_INSIDE = ("optimizer", "optimizer_state_dict", "optim")
"""Keys under which training scripts put the optimizer in a checkpoint of several things."""
_NO_DECAY = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")
"""The Trainer's rule by name; layer norms' weights have no decay either."""


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
    moments = {name: moment_of(*saved, f"{name} in {path}") for name, saved in saved_states(path, model).items()}
    if not moments:
        raise FuncattribError(f"the optimizer in {path} has made no step and has no moments; give a later checkpoint")
    return moments


def saved_states(
    path: str | Path, model: nn.Module | Mapping[str, Tensor]
) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """Read parameter name → its state and the settings of its group, in the model's order; arguments as above."""
    saved = _read(Path(path).expanduser())
    groups = saved["param_groups"]
    numbered = {number: group for group in groups for number in group["params"]}
    states = {number: _unwrapped(state) for number, state in saved["state"].items()}
    names = _match(path, model, groups, {number: _shape_of(state) for number, state in states.items()})
    found = {
        name: (states[number], group)
        for (number, group), name in zip(numbered.items(), names, strict=True)
        if number in states
    }
    order = {name: place for place, name in enumerate(_parameters(model))}
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
    """Unwrap quantised tensors, which bitsandbytes hides from FSDP in a dictionary of their own."""
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
    absmax, values = state[absmax_name].float(), state[map_name].float()[codes.flatten().long()]
    size = 1 << max(0, -(-codes.numel() // absmax.numel()) - 1).bit_length()  # a power of two, whatever the version
    if -(-codes.numel() // size) != absmax.numel():
        raise FuncattribError(
            f"the 8-bit state of {where} is damaged: {absmax.numel()} scales do not fit blocks of {size} values"
        )
    return (values * absmax.repeat_interleave(size)[: codes.numel()]).reshape(codes.shape)


def _shape_of(state: Mapping[str, Any]) -> tuple[int, ...] | None:
    """Return the shape of the parameter that a state belongs to, as far as it shows."""
    if "exp_avg_sq_row" in state:
        return (*state["exp_avg_sq_row"].shape, state["exp_avg_sq_col"].shape[-1])
    if "row_var" in state:
        return (*state["row_var"].shape[:-1], state["col_var"].shape[-1])
    found = next((state[key] for key in ("exp_avg_sq", "state2", "variance") if key in state), None)
    return None if found is None else tuple(found.shape)


def _parameters(model: nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
    return dict(model.named_parameters() if isinstance(model, nn.Module) else model)


def _match(
    path: str | Path,
    model: nn.Module | Mapping[str, Tensor],
    groups: list[dict[str, Any]],
    shapes: Mapping[Any, tuple[int, ...] | None],
) -> list[str]:
    """Match the parameter of every number in the groups, by the first order that fits."""
    params = _parameters(model)
    numbers = [number for group in groups for number in group["params"]]
    sizes = [len(group["params"]) for group in groups if group["params"]]
    problems: list[tuple[int, str]] = []
    for order in _orders(model, params, groups):
        names = [name for part in order for name in part]
        if [len(part) for part in order if part] != sizes and (len(order) > 1 or len(names) != len(numbers)):
            continue
        problem = _misfit(path, names, numbers, params, shapes)
        if problem is None:
            return names
        problems.append(problem)
    if problems:  # of the order that fits furthest
        raise FuncattribError(max(problems)[1])
    beyond = list(params)[len(numbers) :]
    raise FuncattribError(
        f"expected the state of the model's {len(params)} parameters, found {len(numbers)} in {path}"
        + (f"; {beyond[0]} would have none" if beyond else f"; the last parameter is {list(params)[-1]}")
        + "\ngive the model as it was trained, with the same parameters frozen"
    )


def _orders(
    model: nn.Module | Mapping[str, Tensor], params: Mapping[str, Tensor], groups: list[dict[str, Any]]
) -> Iterator[list[list[str]]]:
    """Yield names as an optimizer may have been given them, by group; a single list goes over all groups."""
    recorded = [group.get("param_names", group["params"]) for group in groups]
    if all(isinstance(name, str) for part in recorded for name in part):
        yield recorded
        return
    norms = {f"{name}." for name, module in _modules(model) if isinstance(module, nn.LayerNorm)}

    def trainer(name: str) -> bool:
        return not _NO_DECAY.search(name.lower()) and name.rpartition(".")[0] + "." not in norms

    def matrix(name: str) -> bool:
        return params[name].ndim >= 2

    trained = [name for name, tensor in params.items() if tensor.requires_grad]
    for names in (list(params), trained) if 0 < len(trained) < len(params) else (list(params),):
        for decays in (trainer, matrix):
            yield [[name for name in names if decays(name)], [name for name in names if not decays(name)]]
        yield [names]


def _modules(model: nn.Module | Mapping[str, Tensor]) -> Iterable[tuple[str, nn.Module]]:
    return model.named_modules() if isinstance(model, nn.Module) else ()


def _misfit(
    path: str | Path,
    names: list[str],
    numbers: list[Any],
    params: Mapping[str, Tensor],
    shapes: Mapping[Any, tuple[int, ...] | None],
) -> tuple[int, str] | None:
    """Find the first parameter that a state does not fit: its place, and the message."""
    for place, (name, number) in enumerate(zip(names, numbers, strict=True)):
        if name not in params:
            return place, f"{path} has a state of {name}, which the model does not have; give the model it trained"
        shape = shapes.get(number)
        if shape is not None and shape != tuple(params[name].shape):
            return place, (
                f"expected the state of {name} to have shape {tuple(params[name].shape)}, found {shape} in {path}\n"
                "give the model that this optimizer trained"
            )
    return None
