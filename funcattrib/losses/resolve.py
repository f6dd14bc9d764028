"""The loss of a run: ``ce``, ``log_odds`` or ``kl`` of what the model was made for, or a user's function.

A user's function is recognised by its required arguments:

    loss(params, example) -> scalar          two: the loss itself
    factory(model) -> loss                   one: makes it from the model
    factory(model) -> (loss, params)         one, and brings its parameters

``params`` are all of the model's (or the factory's) parameters, name → tensor, of which the run attributes those that
it chooses. The example is what tokenising gives, ``input_ids`` and ``labels``, and every column of the data with one
number a row.
"""

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, cast, get_args

from torch import Tensor, nn

from funcattrib.errors import FuncattribError
from funcattrib.kernels.logit_loss import LossKind
from funcattrib.losses.causal_lm import Reduction, causal_lm_loss
from funcattrib.losses.seq2seq import seq2seq_loss
from funcattrib.losses.sequence_classification import Output, sequence_classification_loss
from funcattrib.models.functional import parameters_of
from funcattrib.models.selection import choose, chosen_among
from funcattrib.models.task import Task, task_of
from funcattrib.types import Example, Loss, Params, not_scalar

KINDS = get_args(LossKind)
Own = Callable[..., Any]


def loss_of(
    model: nn.Module,
    loss: str | Own,
    *,
    reduction: Reduction = "sum",
    label_smoothing: float = 0.0,
    reference: nn.Module | None = None,
    modules: Iterable[str] | None = None,
    exclude: Iterable[str] = (),
) -> tuple[Loss, dict[str, Tensor]]:
    """Return the loss that ``loss`` names, and the parameters to attribute.

    Args:
        loss: ``ce``, ``kl``, ``log_odds``, of tokens, a label or a target as the model is, or a function of the user's
            own: itself, or as ``package.module:function``.
        reduction, label_smoothing, reference, modules, exclude: as in ``causal_lm_loss``; the first three are refused
            where they mean nothing to the loss.

    Raises:
        FuncattribError: no such loss, or one that takes neither a model nor parameters and an example.
    """
    if loss in KINDS and (task := task_of(model)) != "causal_lm":
        if loss == "kl" or reference is not None:
            raise FuncattribError(
                f"the loss kl requires a causal language model, found {type(model).__name__}; use ce or log_odds"
            )
        output = cast("Output", loss)
        chosen: dict[str, Any] = {"modules": modules, "exclude": exclude}
        if task == "sequence_classification":  # of one label, sum and mean are the same
            return sequence_classification_loss(model, kind=output, label_smoothing=label_smoothing, **chosen)
        return seq2seq_loss(model, kind=output, reduction=reduction, label_smoothing=label_smoothing, **chosen)
    if loss in KINDS:
        return causal_lm_loss(
            model,
            kind=loss,  # type: ignore[arg-type]
            reduction=reduction,
            label_smoothing=label_smoothing,
            reference=reference,
            modules=modules,
            exclude=exclude,
        )
    for setting, given in (
        ("`loss_reduction='mean'`", reduction != "sum"),
        ("`label_smoothing`", bool(label_smoothing)),
        ("`reference_model`", reference is not None),
    ):
        if given:
            raise FuncattribError(
                f"{setting} cannot be combined with the custom loss {loss_name(loss)}; write it into the loss"
            )
    function = find_loss(loss) if isinstance(loss, str) else loss
    return _own_loss(model, function, loss_name(loss), modules, exclude)


def task_of_loss(model: nn.Module, loss: str | Own) -> Task:
    """Return the task whose loss and documents ``loss`` means for a model; a user's loss reads what a causal language
    model does.

    Raises:
        FuncattribError: a model of a kind that the library has no loss for.
    """
    return task_of(model) if loss in KINDS else "causal_lm"


def loss_name(loss: str | Own) -> str:
    """Return the manifest's name of a loss: ``package.module:function``."""
    if isinstance(loss, str):
        return loss
    of = loss.func if isinstance(loss, partial) else loss
    return f"{getattr(of, '__module__', '')}:{getattr(of, '__qualname__', type(of).__name__)}"


def find_loss(name: str) -> Own:
    """Import ``package.module:function``, from the current directory or the path as ``python -m`` does.

    Raises:
        FuncattribError: no such module or function; the module fails when it is imported.

    Example:
        >>> find_loss("torch.nn.functional:mse_loss").__name__
        'mse_loss'
    """
    module_name, colon, attribute = name.partition(":")
    if not (module_name and colon and attribute):
        raise FuncattribError(
            f"expected one of {', '.join(KINDS)} or package.module:function as the loss, found {name!r}"
        )
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise _fails(module_name, error) from error
        raise FuncattribError(
            f"the module {module_name} of the loss {name} is neither in {os.getcwd()} nor installed\n"
            "run the command where the module is, or install it"
        ) from error
    except Exception as error:  # whatever the user's module raises
        raise _fails(module_name, error) from error
    found: Any = module
    for part in attribute.split("."):
        found = getattr(found, part, None)
    if not callable(found):
        raise FuncattribError(f"{module.__file__ or module_name} has no function {attribute}")
    loss: Own = found
    return loss


def _own_loss(
    model: nn.Module, function: Own, name: str, modules: Iterable[str] | None, exclude: Iterable[str]
) -> tuple[Loss, dict[str, Tensor]]:
    modules = None if modules is None else [modules] if isinstance(modules, str) else list(modules)
    loss: Any = function
    params: Any = None
    if _required(function, name) == 1:
        made = function(model)
        loss, params = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not callable(loss):
        raise FuncattribError(f"expected {name}(model) to return a loss or (loss, params), found {type(loss).__name__}")
    loss = partial(_checked, name, loss)
    if params is None:
        everything = parameters_of(model)
        names = choose(model, modules, exclude)
        chosen = {name: tensor for name, tensor in everything.items() if name in names}
        rest = {name: tensor for name, tensor in everything.items() if name not in chosen}
        return partial(_with_rest, loss, rest), chosen
    if not isinstance(params, dict) or not all(isinstance(tensor, Tensor) for tensor in params.values()):
        raise FuncattribError(f"{name}(model) must return its parameters as a dict of tensors")
    return _chosen(loss, params, modules, list(exclude), name)


def _required(function: Own, name: str) -> int:
    """Count the arguments that must be given: 1 of a factory, 2 of a loss."""
    try:
        arguments = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        arguments = {}.values()
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    required = [a.name for a in arguments if a.kind in positional and a.default is inspect.Parameter.empty]
    if len(required) not in (1, 2):
        raise FuncattribError(
            f"expected {name} to take (params, example), or a model, found ({', '.join(required)})\n"
            "write a loss of two arguments, or a factory of one"
        )
    return len(required)


def _chosen(
    loss: Loss, params: dict[str, Tensor], modules: list[str] | None, exclude: list[str], name: str
) -> tuple[Loss, dict[str, Tensor]]:
    """Select a factory's parameters that match the globs; the others stay as they are."""
    params = {parameter: tensor.detach() for parameter, tensor in params.items()}
    chosen = {parameter: params[parameter] for parameter in chosen_among(params, modules or ["all"], exclude)}
    if not chosen:
        raise FuncattribError(
            f"`modules` selects none of the {len(params)} parameters of {name}, such as {next(iter(params), 'none')}"
        )
    rest = {parameter: tensor for parameter, tensor in params.items() if parameter not in chosen}
    return (partial(_with_rest, loss, rest) if rest else loss), chosen


def _with_rest(loss: Loss, rest: Params, params: Params, example: Example) -> Tensor:
    return loss({**rest, **params}, example)


def _checked(name: str, loss: Loss, params: Params, example: Example) -> Tensor:
    """Compute the user's loss; what it returns must be a scalar."""
    try:
        value: Any = loss(params, example)
    except KeyError as error:
        key = error.args[0] if error.args else None
        if key in example or key in params:
            raise
        raise FuncattribError(
            f"the loss {name} reads {key!r}, and the example has {', '.join(example)}\n"
            "give data with such a column of numbers (a text alone, as in a query, has none)"
        ) from error
    if (found := not_scalar(value)) is not None:
        raise FuncattribError(
            f"expected {name} to return a scalar tensor of floating point for one example, found {found}\n"
            "add up or average over the example's tokens"
        )
    return value


def _fails(module_name: str, error: Exception) -> FuncattribError:
    return FuncattribError(
        f"the loss's module {module_name} cannot be imported: {type(error).__name__}: {error}\ncorrect the module"
    )
