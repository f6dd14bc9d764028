"""funcattrib finds the training examples that made a model behave as it does.

Per-example gradients as pure functions on explicit state, composed with transforms, stored and queried.

Importing the package imports no torch: each public name is looked up when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from funcattrib.version import __version__ as __version__

if TYPE_CHECKING:
    from funcattrib.chain.chain import Chain as Chain
    from funcattrib.chain.chain import compose as compose
    from funcattrib.chain.per_example import per_example_grad as per_example_grad
    from funcattrib.chain.per_token import per_token_grad as per_token_grad
    from funcattrib.chain.transform import Transform as Transform
    from funcattrib.checkpoints.adam_state import adam_state as adam_state
    from funcattrib.checkpoints.optimizer_state import optimizer_state as optimizer_state
    from funcattrib.data import Columns as Columns
    from funcattrib.errors import ChainError as ChainError
    from funcattrib.errors import DataError as DataError
    from funcattrib.errors import FuncattribError as FuncattribError
    from funcattrib.errors import StoreError as StoreError
    from funcattrib.losses.causal_lm import causal_lm_loss as causal_lm_loss
    from funcattrib.losses.seq2seq import seq2seq_loss as seq2seq_loss
    from funcattrib.losses.sequence_classification import sequence_classification_loss as sequence_classification_loss
    from funcattrib.models.attention import attention_configs as attention_configs
    from funcattrib.models.functional import functionalize as functionalize
    from funcattrib.models.loading import LoadOptions as LoadOptions
    from funcattrib.query.attributor import Attributor as Attributor
    from funcattrib.query.faiss_index import FaissConfig as FaissConfig
    from funcattrib.recipes.less import less as less
    from funcattrib.recipes.trackstar import trackstar as trackstar
    from funcattrib.recipes.trak import trak as trak
    from funcattrib.runs.collect import collect_gradients as collect_gradients
    from funcattrib.runs.collect import fit_chain as fit_chain
    from funcattrib.runs.config import FittedConfig as FittedConfig
    from funcattrib.runs.config import GradientConfig as GradientConfig
    from funcattrib.runs.config import RowConfig as RowConfig
    from funcattrib.runs.reduce import reduce_gradients as reduce_gradients
    from funcattrib.runs.score import score_gradients as score_gradients
    from funcattrib.runs.settings import Source as Source
    from funcattrib.scores import open_scores as open_scores
    from funcattrib.store import open_store as open_store
    from funcattrib.training import GradientCollector as GradientCollector
    from funcattrib.training import GradientCollectorCallback as GradientCollectorCallback
    from funcattrib.training import capture_gradients as capture_gradients
    from funcattrib.training import prepare_for_gradient_collection as prepare_for_gradient_collection
    from funcattrib.transforms import AttentionConfig as AttentionConfig
    from funcattrib.transforms import adafactor_norm as adafactor_norm
    from funcattrib.transforms import adam_norm as adam_norm
    from funcattrib.transforms import adam_update as adam_update
    from funcattrib.transforms import cast as cast
    from funcattrib.transforms import clip as clip
    from funcattrib.transforms import inner_products as inner_products
    from funcattrib.transforms import max_score as max_score
    from funcattrib.transforms import precondition as precondition
    from funcattrib.transforms import project as project
    from funcattrib.transforms import select as select
    from funcattrib.transforms import self_influence as self_influence
    from funcattrib.transforms import sketch as sketch
    from funcattrib.transforms import split_experts as split_experts
    from funcattrib.transforms import split_heads as split_heads
    from funcattrib.transforms import unit_norm as unit_norm
    from funcattrib.transforms.gram import gram_matrices as gram_matrices
    from funcattrib.transforms.mixed_gram import mix_grams as mix_grams
    from funcattrib.types import Grads as Grads
    from funcattrib.types import Leaf as Leaf
    from funcattrib.types import Spec as Spec

# Public name -> the module that defines it. The block above says the same to type checkers; a test compares them.
_EXPORTS = {
    "adafactor_norm": "transforms",
    "adam_norm": "transforms",
    "adam_state": "checkpoints.adam_state",
    "adam_update": "transforms",
    "attention_configs": "models.attention",
    "AttentionConfig": "transforms",
    "Attributor": "query.attributor",
    "capture_gradients": "training",
    "cast": "transforms",
    "causal_lm_loss": "losses.causal_lm",
    "Chain": "chain.chain",
    "ChainError": "errors",
    "clip": "transforms",
    "collect_gradients": "runs.collect",
    "Columns": "data",
    "compose": "chain.chain",
    "DataError": "errors",
    "FaissConfig": "query.faiss_index",
    "fit_chain": "runs.collect",
    "FittedConfig": "runs.config",
    "FuncattribError": "errors",
    "functionalize": "models.functional",
    "GradientCollector": "training",
    "GradientCollectorCallback": "training",
    "GradientConfig": "runs.config",
    "Grads": "types",
    "gram_matrices": "transforms.gram",
    "inner_products": "transforms",
    "Leaf": "types",
    "less": "recipes.less",
    "LoadOptions": "models.loading",
    "max_score": "transforms",
    "mix_grams": "transforms.mixed_gram",
    "open_scores": "scores",
    "open_store": "store",
    "optimizer_state": "checkpoints.optimizer_state",
    "per_example_grad": "chain.per_example",
    "per_token_grad": "chain.per_token",
    "precondition": "transforms",
    "prepare_for_gradient_collection": "training",
    "project": "transforms",
    "reduce_gradients": "runs.reduce",
    "RowConfig": "runs.config",
    "score_gradients": "runs.score",
    "select": "transforms",
    "self_influence": "transforms",
    "seq2seq_loss": "losses.seq2seq",
    "sequence_classification_loss": "losses.sequence_classification",
    "sketch": "transforms",
    "Source": "runs.settings",
    "Spec": "types",
    "split_experts": "transforms",
    "split_heads": "transforms",
    "StoreError": "errors",
    "trackstar": "recipes.trackstar",
    "trak": "recipes.trak",
    "Transform": "chain.transform",
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
