"""Gradients while training: lifted parameters under the user's own forward and backward pass."""

from funcattrib.training.callback import GradientCollectorCallback
from funcattrib.training.loop import GradientCollector, collect, token_mean
from funcattrib.training.prepare import prepare_for_gradient_collection
from funcattrib.training.recover import recover

__all__ = [
    "GradientCollector",
    "GradientCollectorCallback",
    "collect",
    "prepare_for_gradient_collection",
    "recover",
    "token_mean",
]
