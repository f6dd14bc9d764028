"""Scores of training examples against queries, on disk."""

from funcattrib.scores.scores import Scores, open_scores, scores_manifest
from funcattrib.store.compatibility import check_gradients

__all__ = ["Scores", "check_gradients", "open_scores", "scores_manifest"]
