"""Scores of training examples against queries, on disk."""

from funcattrib.score.scores import Scores, check_gradients, open_scores, scores_manifest

__all__ = ["Scores", "check_gradients", "open_scores", "scores_manifest"]
