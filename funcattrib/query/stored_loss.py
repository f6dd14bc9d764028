"""The loss that made a store, again, for the gradients of its queries."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from funcattrib.chain.code_hash import code_hash
from funcattrib.errors import FuncattribError
from funcattrib.losses.resolve import KINDS, find_loss, loss_of
from funcattrib.losses.script import find_in_script, in_script
from funcattrib.models.functional import a_shard, parameters_of
from funcattrib.models.identity import OWN_LOSS, model_identity, parameters_identity
from funcattrib.models.loading import PRECISIONS, load_model
from funcattrib.models.sharded_loading import Shards
from funcattrib.store import Manifest
from funcattrib.store.comparable import same_code
from funcattrib.store.compatibility import check_reference, check_same_loss, check_same_model
from funcattrib.types import Loss


def check_named(manifest: Manifest) -> None:
    """Refuse to look for the model of a store that was made with (loss, params): a function has no name to load it by.

    Raises:
        FuncattribError: it was.
    """
    if manifest.model.get("architecture") == OWN_LOSS:
        raise FuncattribError(
            "this store was made with a loss and parameters in Python, which cannot be loaded by name\n"
            "query it in Python: Attributor(run, model=(loss, params))"
        )


def check_given(manifest: Manifest, loss: Loss, params: Mapping[str, Tensor]) -> None:
    """Refuse (loss, params) other than those that made the store; ``params`` are name → tensor.

    Raises:
        FuncattribError: other parameters, or another loss.
    """
    check_same_model(manifest, parameters_identity(params, "(loss, params)"))
    check_same_loss(manifest, code_hash(loss, "the loss"))


def stored_loss(model: nn.Module, manifest: Manifest, device: torch.device) -> tuple[Loss, dict[str, Tensor]]:
    """Return the loss of a store and the parameters that it attributes; a reference model is loaded from where it was,
    in shards where the model is.

    Raises:
        FuncattribError: the loss cannot be imported, it was defined in another script, or the reference model is not
            the one that made the store.
    """
    loss = manifest.loss
    made_with, reference = loss.get("reference"), None
    if made_with is not None:
        precision, like = PRECISIONS.get(made_with["dtype"], "fp32"), a_shard(parameters_of(model))
        shards = None if like is None else Shards(like.gathers, like.device, like.rows.device != like.device)
        loaded = load_model(made_with["id"], precision=precision, device=str(device), shards=shards)
        check_reference(made_with, model_identity(loaded.model, stamps=loaded.stamps))
        reference = loaded.model
    return loss_of(
        model,
        _function(manifest) if loss["kind"] not in KINDS else loss["kind"],
        reduction=loss["reduction"],
        label_smoothing=loss["label_smoothing"],
        reference=reference,
        modules=loss["modules"] or None,
        exclude=loss["exclude"],
    )


def _function(manifest: Manifest) -> Callable[..., Any]:
    """Return the function that is a store's loss, by its name, where its code is what it was."""
    name, code = manifest.loss["kind"], manifest.loss.get("code")
    if in_script(name):
        return find_in_script(name, lambda found: same_code(code, code_hash(found, f"the loss {name}")))
    function = find_loss(name)
    check_same_loss(manifest, code_hash(function, f"the loss {name}"))
    return function
