"""funcattrib: which training examples made a model behave as it does?

Per-example gradients as pure functions on explicit state, composed with transforms, stored and queried.

Importing the package imports no torch: each public name is looked up when it is first used.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from funcattrib.version import __version__ as __version__

if TYPE_CHECKING:
    from funcattrib.adam_state import adam_state as adam_state
    from funcattrib.attention import attention_configs as attention_configs
    from funcattrib.compose import Chain as Chain
    from funcattrib.compose import Grads as Grads
    from funcattrib.compose import Leaf as Leaf
    from funcattrib.compose import Spec as Spec
    from funcattrib.compose import Transform as Transform
    from funcattrib.compose import compose as compose
    from funcattrib.curvature import gram_of as gram_of
    from funcattrib.curvature import mix as mix
    from funcattrib.errors import ChainError as ChainError
    from funcattrib.errors import DataError as DataError
    from funcattrib.errors import FuncattribError as FuncattribError
    from funcattrib.errors import StoreError as StoreError
    from funcattrib.functional import functionalize as functionalize
    from funcattrib.losses import causal_lm_loss as causal_lm_loss
    from funcattrib.optimizer_state import optimizer_state as optimizer_state
    from funcattrib.per_example import per_example_grad as per_example_grad
    from funcattrib.per_token import per_token_grad as per_token_grad
    from funcattrib.query.attributor import Attributor as Attributor
    from funcattrib.query.faiss_index import FaissConfig as FaissConfig
    from funcattrib.recipes.collect import collect_gradients as collect_gradients
    from funcattrib.recipes.collect import fit_gradients as fit_gradients
    from funcattrib.recipes.less import less as less
    from funcattrib.recipes.reduce import reduce_gradients as reduce_gradients
    from funcattrib.recipes.score import score_gradients as score_gradients
    from funcattrib.recipes.trak import trak as trak
    from funcattrib.score import open_scores as open_scores
    from funcattrib.store import open_store as open_store
    from funcattrib.training import GradientCollector as GradientCollector
    from funcattrib.training import GradientCollectorCallback as GradientCollectorCallback
    from funcattrib.training import collect as collect
    from funcattrib.training import prepare_for_gradient_collection as prepare_for_gradient_collection
    from funcattrib.transforms import AttentionConfig as AttentionConfig
    from funcattrib.transforms import adafactor_norm as adafactor_norm
    from funcattrib.transforms import adam_norm as adam_norm
    from funcattrib.transforms import adam_update as adam_update
    from funcattrib.transforms import against as against
    from funcattrib.transforms import cast as cast
    from funcattrib.transforms import clip as clip
    from funcattrib.transforms import nearest as nearest
    from funcattrib.transforms import precondition as precondition
    from funcattrib.transforms import project as project
    from funcattrib.transforms import select as select
    from funcattrib.transforms import self_influence as self_influence
    from funcattrib.transforms import sketch as sketch
    from funcattrib.transforms import split_experts as split_experts
    from funcattrib.transforms import split_heads as split_heads
    from funcattrib.transforms import unit_norm as unit_norm

# Public name -> the submodule that defines it. The block above says the same to type checkers; a test compares them.
_EXPORTS = {
    "AttentionConfig": "transforms",
    "Attributor": "query.attributor",
    "Chain": "compose",
    "ChainError": "errors",
    "DataError": "errors",
    "FaissConfig": "query.faiss_index",
    "FuncattribError": "errors",
    "GradientCollector": "training",
    "GradientCollectorCallback": "training",
    "Grads": "compose",
    "Leaf": "compose",
    "Spec": "compose",
    "StoreError": "errors",
    "Transform": "compose",
    "adafactor_norm": "transforms",
    "adam_norm": "transforms",
    "adam_state": "adam_state",
    "adam_update": "transforms",
    "against": "transforms",
    "attention_configs": "attention",
    "cast": "transforms",
    "causal_lm_loss": "losses",
    "clip": "transforms",
    "collect": "training",
    "collect_gradients": "recipes.collect",
    "compose": "compose",
    "fit_gradients": "recipes.collect",
    "functionalize": "functional",
    "gram_of": "curvature",
    "less": "recipes.less",
    "mix": "curvature",
    "open_scores": "score",
    "open_store": "store",
    "optimizer_state": "optimizer_state",
    "per_example_grad": "per_example",
    "per_token_grad": "per_token",
    "nearest": "transforms",
    "precondition": "transforms",
    "prepare_for_gradient_collection": "training",
    "project": "transforms",
    "reduce_gradients": "recipes.reduce",
    "score_gradients": "recipes.score",
    "select": "transforms",
    "self_influence": "transforms",
    "sketch": "transforms",
    "split_experts": "transforms",
    "split_heads": "transforms",
    "trak": "recipes.trak",
    "unit_norm": "transforms",
}

__all__ = ["__version__", *_EXPORTS]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})


class _Package(ModuleType):
    """The package's own type: an exported name stays what is exported.

    Importing the submodule `funcattrib.compose` would bind it as `funcattrib.compose`, over the function of that name.
    """

    def __setattr__(self, name: str, value: object) -> None:
        if name in _EXPORTS and isinstance(value, ModuleType):
            return
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
