"""The model whose backward pass is traced: the store's, or its base, by the names that the store has."""

from torch import nn

from funcattrib.errors import FuncattribError
from funcattrib.models.base_model import base_fingerprint, named_as_in
from funcattrib.models.identity import model_identity
from funcattrib.models.selection import chosen_among
from funcattrib.store import Manifest
from funcattrib.store.compatibility import check_base, check_same_model


def traced_model(manifest: Manifest, model: nn.Module) -> nn.Module:
    """Return a module with the parameters of ``model`` by the store's names: itself, or one around the base.

    Raises:
        FuncattribError: neither the model that made the store nor its base, or a base outside of which the model uses
            one of the store's parameters.
    """
    base = manifest.extra.get("base_model")
    found = base_fingerprint(model, base)
    if base is None or found is None:
        check_same_model(manifest, model_identity(model))
        return model
    check_base(manifest, found)
    if outside := chosen_among(base["outside"], manifest.loss["modules"], manifest.loss["exclude"]):
        raise FuncattribError(
            f"the store has gradients of {outside[0]}, which the model uses outside of its base; trace the whole model"
        )
    return named_as_in(model, base["prefix"])
