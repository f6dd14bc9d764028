"""The loss that made a store, again, for the gradients of its queries."""

import torch
from torch import Tensor, nn

from funcattrib.losses.resolve import loss_of
from funcattrib.losses.script import find_in_script, in_script
from funcattrib.models.functional import a_shard, parameters_of
from funcattrib.models.identity import model_identity
from funcattrib.models.loading import PRECISIONS, load_model
from funcattrib.models.sharded_loading import Shards
from funcattrib.store import Manifest
from funcattrib.store.compatibility import check_reference
from funcattrib.types import Loss


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
        reference = load_model(made_with["id"], precision=precision, device=str(device), shards=shards).model
        check_reference(made_with, model_identity(reference))
    kind = loss["kind"]
    return loss_of(
        model,
        find_in_script(kind, manifest.extra.get("loss_code")) if in_script(kind) else kind,
        reduction=loss["reduction"],
        label_smoothing=loss["label_smoothing"],
        reference=reference,
        modules=loss["modules"] or None,
        exclude=loss["exclude"],
    )
