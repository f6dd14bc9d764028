"""The chain of transforms that the settings ask for."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from funcattrib.chain.chain import Chain, compose
from funcattrib.chain.per_example import per_example_grad
from funcattrib.chain.transform import Transform
from funcattrib.checkpoints.optimizer_state import optimizer_state
from funcattrib.errors import FuncattribError
from funcattrib.models.attention import attention_configs
from funcattrib.models.selection import no_match
from funcattrib.runs.config import GradientConfig, RowConfig
from funcattrib.transforms import (
    AttentionConfig,
    adafactor_norm,
    adam_norm,
    precondition,
    project,
    sketch,
    split_experts,
    split_heads,
)
from funcattrib.transforms.heads import names_leaf
from funcattrib.types import Params


def chain_of(gradients: GradientConfig, model: nn.Module | Params) -> Chain:
    """Compose normaliser, the splits, projection or sketch, preconditioner: TrackStar's order.

    Moments are those of whole weights, as an optimizer has them; what follows sees each head or expert by itself.

    Args:
        model: whose optimizer's state is read and whose heads are split; or all of its parameters.

    Raises:
        FuncattribError: an optimizer's state that does not fit the model; heads of a model that is not known.
    """
    stages: list[Any] = []
    if gradients.normalizer != "none":
        normalize = {"adafactor": adafactor_norm, "adam": adam_norm}[gradients.normalizer]
        given = gradients.optimizer_state
        stages.append(normalize(optimizer_state(given, model) if given is not None else None))
    if gradients.split_experts:
        stages.append(split_experts())
    if heads := _heads(gradients, model):
        stages.append(split_heads(heads))
    if gradients.sketch_dim is not None:
        stages.append(sketch(gradients.sketch_dim, seed=gradients.seed))
    else:
        stages += projection_of(gradients)
    if gradients.precondition != "none":
        stages.append(precondition(power=-0.5, groups=gradients.precondition, damping=gradients.damping))
    return compose(per_example_grad, *stages)


def projection_of(rows: RowConfig, seed: int | None = None) -> list[Transform]:
    """Return the projection that the settings ask for, by their seed or another; none where they keep whole gradients.

    Example:
        >>> [stage.name for stage in projection_of(RowConfig())], projection_of(RowConfig(projection_dim=0))
        (['project'], [])
    """
    if not rows.projection_dim:
        return []
    return [project(rows.projection_dim, kind=rows.projection_type, seed=rows.seed if seed is None else seed)]


def _heads(gradients: GradientConfig, model: nn.Module | Params) -> Mapping[str, AttentionConfig]:
    if gradients.attention_cfgs:
        names = [name for name, _ in model.named_parameters()] if isinstance(model, nn.Module) else list(model)
        for glob in gradients.attention_cfgs:
            if not any(names_leaf(glob, name) for name in names):
                raise FuncattribError(no_match(glob, names))
        return gradients.attention_cfgs
    if gradients.split_heads:
        if not isinstance(model, nn.Module):
            raise FuncattribError(
                "split_heads reads the heads off a transformers model, and (loss, params) has none; describe them "
                "with split_attention_modules"
            )
        return attention_configs(model)
    if gradients.num_heads is None or gradients.head_size is None:
        return {}
    by_hand = AttentionConfig(gradients.num_heads, gradients.head_size, gradients.head_dim or 0)
    return dict.fromkeys(gradients.split_attention_modules, by_hand)
