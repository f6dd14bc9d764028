"""Scores of training examples against queries, on disk."""

from funcattrib.score.scores import Scores, open_scores, scores_manifest

__all__ = ["Scores", "open_scores", "scores_manifest"]
